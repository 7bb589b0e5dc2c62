//! `<|tool_call|>[{"name": …, "arguments": …}]`, as Granite 3 has it; its later models write the mark as
//! the word `<tool_call>`. The list goes to the answer's end.

use super::{Bracket, CallForm, json_calls, tagged};

const OPEN: &str = "<|tool_call|>";

pub(crate) static FORM: CallForm = CallForm {
    is_of: |source| source.contains(OPEN),
    brackets: &[Bracket { open: OPEN, close: None }, tagged::BRACKET],
    whole: None,
    marks: &[OPEN],
    read: json_calls,
    around: ("", ""),
};
