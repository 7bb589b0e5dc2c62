//! `{"name": …, "parameters": …}` as the whole answer, as Llama 3 has it; several between semicolons.

use super::{Bracket, CallForm, json_calls};

const OPEN: &str = "<|python_tag|>";

pub(crate) static FORM: CallForm = CallForm {
    is_of: |source| source.contains(OPEN) || source.contains("Environment: ipython"),
    brackets: &[Bracket { open: OPEN, close: None }],
    whole: Some('{'),
    marks: &[OPEN],
    read: |text| {
        let parts = text.split(';').map(str::trim).filter(|part| !part.is_empty());
        let each: Option<Vec<_>> = parts.map(json_calls).collect();
        each.map(|calls| calls.concat()).or_else(|| json_calls(text))
    },
    around: ("", ""),
};
