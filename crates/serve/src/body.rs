//! Bodies of requests: read whole within a limit and a time, then as what is expected there.

use crate::app::App;
use crate::error::ApiError;
use axum::body::Body;
use axum::http::{Request, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;
use serde_json::error::Category;
use std::time::Duration;

/// How long a body may take to come in, in seconds.
const BODY_SECONDS: u64 = 60;

/// Reads a request's JSON as `T`.
pub(crate) async fn json<T: DeserializeOwned>(
    app: &App,
    request: Request<Body>,
) -> Result<T, ApiError> {
    let kind = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    // A page of another site can send plain texts and forms here unasked, but not this.
    let is_json = kind.is_some_and(|kind| {
        let kind = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        kind == "application/json" || (kind.starts_with("application/") && kind.ends_with("+json"))
    });
    if !is_json {
        return Err(ApiError::media_type());
    }
    let most = app.options.max_body_bytes;
    let announced = request.headers().get(header::CONTENT_LENGTH);
    let announced = announced.and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    if announced.is_some_and(|bytes| bytes > most) {
        return Err(ApiError::too_large(most));
    }
    let collected = Limited::new(request.into_body(), most).collect();
    let bytes = match tokio::time::timeout(Duration::from_secs(BODY_SECONDS), collected).await {
        Err(_) => return Err(ApiError::too_slow("the body did not come in time")),
        Ok(Err(error)) if error.is::<LengthLimitError>() => return Err(ApiError::too_large(most)),
        Ok(Err(_)) => return Err(ApiError::invalid("the body could not be read to its end")),
        Ok(Ok(whole)) => whole.to_bytes(),
    };
    parse(&bytes)
}

/// Reads JSON as `T`; faults name the field.
pub(crate) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    // A list would be read as the fields in their order.
    if bytes.trim_ascii_start().first() == Some(&b'[') {
        return Err(ApiError::invalid("the body is a list; expected a JSON object"));
    }
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
        let path = error.path().to_string();
        let inner = error.into_inner();
        match inner.classify() {
            Category::Data => of_data(&path, &inner.to_string()),
            _ => not_json(&inner),
        }
    })?;
    reader.end().map_err(|error| not_json(&error))?;
    Ok(value)
}

fn not_json(error: &serde_json::Error) -> ApiError {
    ApiError::invalid(format!("the body is not valid JSON: {error}")).coded("invalid_json")
}

fn of_data(path: &str, message: &str) -> ApiError {
    // Where in the text it stands says less than the field.
    let message = message.rsplit_once(" at line ").map_or(message, |(message, _)| message);
    if let Some(rest) = message.strip_prefix("unknown field `") {
        let name = rest.split('`').next().unwrap_or_default();
        let within = path.rsplit_once('.').map(|(within, _)| within);
        let field = match within {
            Some(within) if path.ends_with(name) => format!("{within}.{name}"),
            _ if path == "." || path == name => name.to_owned(),
            _ => format!("{path}.{name}"),
        };
        return ApiError::field(field, "no such field is known here").coded("unknown_field");
    }
    if let Some(rest) = message.strip_prefix("missing field `") {
        let name = rest.trim_end_matches('`');
        let field = if path == "." { name.to_owned() } else { format!("{path}.{name}") };
        return ApiError::field(field, "is missing").coded("missing_field");
    }
    match path {
        "." => ApiError::invalid(message),
        path => ApiError::field(path, message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Inner {
        #[serde(rename = "count")]
        _count: u8,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Outer {
        #[serde(rename = "inner")]
        _inner: Vec<Inner>,
    }

    #[test]
    fn faults_name_the_field() {
        for (body, param) in [
            (r#"{"inner": [], "more": 1}"#, Some("more")),
            (r#"{"inner": [{"count": 1, "colour": 2}]}"#, Some("inner[0].colour")),
            (r#"{"inner": [{"count": 1}, {}]}"#, Some("inner[1].count")),
            (r#"{"inner": [{"count": 300}]}"#, Some("inner[0].count")),
            (r#"{"inner": [{"count": "x"}]}"#, Some("inner[0].count")),
            (r#"{}"#, Some("inner")),
            (r#"{"inner": []"#, None),
            (r#"{"inner": []} x"#, None),
            ("", None),
            ("[1]", None),
        ] {
            let error = parse::<Outer>(body.as_bytes()).unwrap_err().to_json();
            assert_eq!(error["error"]["param"].as_str(), param, "{body}: {error}");
            assert_eq!(error["error"]["type"], "invalid_request_error");
        }
        assert!(parse::<Outer>(br#"{"inner": [{"count": 3}]}"#).is_ok());
    }

    #[test]
    fn depth_is_limited() {
        let deep = "{\"a\":".repeat(100_000);
        assert!(parse::<serde_json::Value>(deep.as_bytes()).is_err());
    }
}
