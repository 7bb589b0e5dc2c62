//! `text`: `{text}`, or in a file that is not JSON one text a line; no template.

use super::{FieldFault, Fields, Format};
use crate::record::Body;

pub(super) struct Text;

impl Format for Text {
    fn name(&self) -> &'static str {
        "text"
    }

    fn required(&self) -> &'static [&'static str] {
        &["text"]
    }

    fn optional(&self) -> &'static [&'static str] {
        &[]
    }

    fn is_chat(&self) -> bool {
        false
    }

    fn reads_lines(&self) -> bool {
        true
    }

    fn parse(&self, fields: &Fields<'_>) -> Result<Body, FieldFault> {
        fields.text("text").map(|text| Body::Text(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::parse;
    use super::*;

    #[test]
    fn the_text_is_kept_as_it_is() {
        let body = parse(&Text, r#"{"body": " a\n\nb "}"#, &[("text", "body")]).unwrap();
        assert_eq!(body, Body::Text(" a\n\nb ".into()));
        assert!(parse(&Text, r#"{"text": {}}"#, &[]).is_err());
    }
}
