//! `<tool_call>{"name": …, "arguments": …}</tool_call>`, as Hermes, Qwen 2.5, Qwen 3 and Granite 4 have it.

use super::{Bracket, CallForm, json_calls};

pub(super) const BRACKET: Bracket = Bracket { open: "<tool_call>", close: Some("</tool_call>") };

pub(crate) static FORM: CallForm = CallForm {
    is_of: |source| source.contains(BRACKET.open),
    brackets: &[BRACKET],
    whole: None,
    marks: &["<tool_call>", "</tool_call>"],
    read: json_calls,
    around: ("<tool_call>\n", "\n</tool_call>"),
};
