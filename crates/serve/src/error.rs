//! Refusals and failures as clients of OpenAI's protocol read them.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// Why a request was not answered. It is written as `{"error": {"message", "type", "param", "code"}}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ApiError {
    status: StatusCode,
    message: String,
    kind: &'static str,
    param: Option<String>,
    code: Option<&'static str>,
    retry_after: Option<u64>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { status, message, kind, param: None, code: None, retry_after: None }
    }

    /// Refuses a request that makes no sense as a whole.
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// Refuses a request for its field `param`.
    pub(crate) fn field(param: impl Into<String>, message: impl std::fmt::Display) -> Self {
        let param = param.into();
        let message = format!("{param}: {message}");
        Self { param: Some(param), ..Self::invalid(message) }
    }

    /// The same with a code that programs read.
    pub(crate) fn coded(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    /// Says that there is no model of this name.
    pub(crate) fn no_model(name: &str) -> Self {
        let message = format!("the model `{name}` does not exist; /v1/models lists those that do");
        let missing = Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message);
        Self { param: Some("model".to_owned()), ..missing }.coded("model_not_found")
    }

    /// Says that nothing is there.
    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message).coded("not_found")
    }

    /// Refuses a method at a path that has others.
    pub(crate) fn method(method: &str, path: &str) -> Self {
        let message = format!("{path} takes no {method}");
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", message)
            .coded("method_not_allowed")
    }

    /// Refuses a caller without a key that counts here.
    pub(crate) fn unauthorized() -> Self {
        let message =
            "the request carries no key that is valid here; send `Authorization: Bearer KEY`";
        Self::new(StatusCode::UNAUTHORIZED, "authentication_error", message)
            .coded("invalid_api_key")
    }

    /// Refuses what this server was not started for.
    pub(crate) fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "permission_error", message).coded("forbidden")
    }

    /// Refuses a change of what has changed meanwhile.
    pub(crate) fn conflict(message: impl Into<String>, code: &'static str) -> Self {
        Self::new(StatusCode::CONFLICT, "invalid_request_error", message).coded(code)
    }

    /// Refuses a body of more than `most` bytes.
    pub(crate) fn too_large(most: usize) -> Self {
        let message = format!("the body has more than the {most} bytes that are allowed");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", message)
            .coded("request_too_large")
    }

    /// Refuses a body that is not said to be JSON.
    pub(crate) fn media_type() -> Self {
        let message = "expected a JSON body, announced by `Content-Type: application/json`";
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "invalid_request_error", message)
            .coded("unsupported_media_type")
    }

    /// Refuses for now.
    pub(crate) fn busy(message: impl Into<String>, code: &'static str, seconds: u64) -> Self {
        let busy = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message);
        Self { retry_after: Some(seconds), ..busy }.coded(code)
    }

    /// Says that the server is not up yet, or no longer.
    pub(crate) fn unavailable(message: impl Into<String>) -> Self {
        let down = Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message);
        Self { retry_after: Some(1), ..down }.coded("unavailable")
    }

    /// Says that the caller was too slow.
    pub(crate) fn too_slow(message: impl Into<String>) -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "invalid_request_error", message).coded("timeout")
    }

    /// Says that the answer took longer than a request may.
    pub(crate) fn out_of_time(seconds: u64) -> Self {
        let message =
            format!("the answer took longer than the {seconds} s that a request may take");
        Self::new(StatusCode::GATEWAY_TIMEOUT, "server_error", message).coded("request_timeout")
    }

    /// Says that the server failed. `message` must say nothing of the machine.
    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message).coded("internal")
    }

    /// What it says.
    pub(crate) fn message(&self) -> &str {
        &self.message
    }

    /// Names another field as the one at fault.
    pub(crate) fn of_field(self, param: impl Into<String>) -> Self {
        let param = param.into();
        Self { message: format!("{param}: {}", self.message), param: Some(param), ..self }
    }

    /// Its body.
    pub(crate) fn to_json(&self) -> Value {
        json!({"error": {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }})
    }
}

/// An answer in JSON.
pub(crate) struct Json(pub(crate) Value);

impl IntoResponse for Json {
    fn into_response(self) -> Response {
        ([(header::CONTENT_TYPE, "application/json")], self.0.to_string()).into_response()
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.to_json())).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
