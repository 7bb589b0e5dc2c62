//! Calls of tools as models write them.
//!
//! How a model writes calls is its template's business. A form that templates in use have is a file here
//! and a word in [`forms`]; what looks like a call and is none stays text.

use hydralora_data::ChatTemplate;
use serde_json::{Map, Value};

/// Declares the forms; the first that fits a template counts.
macro_rules! forms {
    ($($name:ident,)*) => {
        $(pub(crate) mod $name;)*

        static FORMS: &[&CallForm] = &[$(&$name::FORM,)*];
    };
}

forms! {
    elements,
    granite,
    gemma,
    python,
    tagged,
    listed,
    bare,
}

/// How calls are written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CallForm {
    /// Whether a template with this source, which knows tools, has calls written so.
    is_of: fn(&str) -> bool,
    /// What calls stand between.
    pub(crate) brackets: &'static [Bracket],
    /// What an answer begins with that may be calls as a whole.
    pub(crate) whole: Option<char>,
    /// Tokens that part an answer; where they are special ones they are left out of texts.
    pub(crate) marks: &'static [&'static str],
    /// The calls of a text between brackets; none if they are no calls.
    read: fn(&str) -> Option<Vec<Call>>,
    /// What stands before and behind the JSON of a call that has to be.
    pub(crate) around: (&'static str, &'static str),
}

/// What calls stand between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bracket {
    pub(crate) open: &'static str,
    /// None where calls go to the answer's end, as they may in any case.
    pub(crate) close: Option<&'static str>,
}

/// A call of a tool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) name: String,
    /// JSON.
    pub(crate) arguments: String,
}

impl CallForm {
    /// The form that a template has calls written in; none if it knows no tools, or none of the forms.
    pub(crate) fn of(template: &ChatTemplate) -> Option<&'static Self> {
        let source = template.source();
        template.reads("tools").then(|| Self::of_source(source)).flatten()
    }

    fn of_source(source: &str) -> Option<&'static Self> {
        FORMS.iter().find(|form| (form.is_of)(source)).copied()
    }

    /// The calls of a text between brackets, or with them; none if they are no calls.
    pub(crate) fn calls(&self, text: &str) -> Option<Vec<Call>> {
        (self.read)(self.bare(text)).filter(|calls| !calls.is_empty())
    }

    /// A text without the brackets around it.
    pub(crate) fn bare<'a>(&self, text: &'a str) -> &'a str {
        let mut text = text.trim();
        for Bracket { open, close } in self.brackets {
            text = text.strip_prefix(open).unwrap_or(text);
            text = close.and_then(|close| text.strip_suffix(close)).unwrap_or(text);
        }
        text.trim()
    }
}

/// A call or a list of them, as JSON.
pub(crate) fn json_calls(text: &str) -> Option<Vec<Call>> {
    let call = |value: &Value| {
        let call = value.get("function").filter(|inner| inner.is_object()).unwrap_or(value);
        let name = call.get("name")?.as_str().filter(|name| !name.is_empty())?.to_owned();
        let arguments = call.get("arguments").or_else(|| call.get("parameters"));
        let arguments = match arguments {
            None | Some(Value::Null) => "{}".to_owned(),
            // Some write the JSON of an object as a text.
            Some(Value::String(text)) => {
                serde_json::from_str::<Map<String, Value>>(text).ok()?;
                text.clone()
            }
            Some(object @ Value::Object(_)) => object.to_string(),
            Some(_) => return None,
        };
        Some(Call { name, arguments })
    };
    match serde_json::from_str(text).ok()? {
        Value::Array(calls) => calls.iter().map(call).collect(),
        one => Some(vec![call(&one)?]),
    }
}

/// How deep values of arguments may lie in one another where they are no JSON.
const MOST_DEPTH: usize = 64;

/// A text that is read from its beginning.
struct Text<'a>(&'a str);

impl<'a> Text<'a> {
    /// Leaves out spaces.
    fn trim(&mut self) -> &mut Self {
        self.0 = self.0.trim_start();
        self
    }

    /// Whether it begins with `mark`, which is taken then, as are the spaces before it.
    fn take(&mut self, mark: &str) -> bool {
        let rest = self.trim().0.strip_prefix(mark);
        self.0 = rest.unwrap_or(self.0);
        rest.is_some()
    }

    /// Takes what stands before `mark`, and `mark`.
    fn until(&mut self, mark: &str) -> Option<&'a str> {
        let (before, rest) = self.0.split_once(mark)?;
        self.0 = rest;
        Some(before)
    }

    /// Takes all letters, from the first on, that are of a kind.
    fn all(&mut self, is_of: impl Fn(char) -> bool) -> &'a str {
        let end = self.trim().0.find(|letter: char| !is_of(letter)).unwrap_or(self.0.len());
        let (taken, rest) = self.0.split_at(end);
        self.0 = rest;
        taken
    }

    /// Takes what `one` reads, separated by commas, up to `close`; a comma may stand before that.
    fn list<T>(
        &mut self,
        close: &str,
        mut one: impl FnMut(&mut Self) -> Option<T>,
    ) -> Option<Vec<T>> {
        let mut all = Vec::new();
        while !self.take(close) {
            all.push(one(self)?);
            if !self.take(",") {
                return self.take(close).then_some(all);
            }
        }
        Some(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_are_told_apart() {
        for (source, expected) in [
            ("<tool_call>\n<function=name>", &elements::FORM),
            ("answer with <tool_call></tool_call>", &tagged::FORM),
            ("respond with <|tool_call|> followed by a list of JSON", &granite::FORM),
            ("<|tool_call>call:{{ name }}<tool_call|>", &gemma::FORM),
            ("<start_function_call>call:{{ name }}<end_function_call>", &gemma::FORM),
            ("write it in a block ```tool_code", &python::FORM),
            ("[TOOL_CALLS]", &listed::FORM),
            ("Environment: ipython", &bare::FORM),
            ("<|python_tag|>", &bare::FORM),
        ] {
            let found = CallForm::of_source(source).unwrap();
            assert!(std::ptr::eq(found, expected), "{source}: {found:?}");
        }
        assert!(CallForm::of_source("{{ tools }}").is_none());
    }
}
