//! What a model writes, taken apart while it comes: its reasoning, its text, its calls of tools.
//!
//! How a model writes calls is its template's business; the forms that are told apart here are those of
//! templates in use. What looks like a call and is none stays text.

use hydralora_data::ChatTemplate;
use serde_json::{Map, Value, json};

/// How calls are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CallForm {
    /// `<tool_call>{"name": …, "arguments": …}</tool_call>`, as Hermes, Qwen 2.5 and Qwen 3 do.
    Tagged,
    /// `<tool_call><function=name><parameter=key>value</parameter></function></tool_call>`, as Qwen 3.5
    /// does.
    Elements,
    /// `[TOOL_CALLS][{"name": …, "arguments": …}]` or `[TOOL_CALLS]name[ARGS]{…}`, as Mistral does.
    Listed,
    /// `{"name": …, "parameters": …}` as the whole answer, as Llama 3 does.
    Bare,
}

impl CallForm {
    /// The form that a template writes calls in; none if it writes none, or in a form unknown here.
    pub(crate) fn of(template: &ChatTemplate) -> Option<Self> {
        let source = template.source();
        let has = |text: &str| source.contains(text);
        match () {
            () if !template.reads("tools") => None,
            () if has("<tool_call>") && has("<function=") => Some(Self::Elements),
            () if has("<tool_call>") => Some(Self::Tagged),
            () if has("[TOOL_CALLS]") => Some(Self::Listed),
            () if has("<|python_tag|>") || has("Environment: ipython") => Some(Self::Bare),
            () => None,
        }
    }

    /// What a call begins with, beside what it may begin with as the whole answer.
    fn open(self) -> &'static str {
        match self {
            Self::Tagged | Self::Elements => "<tool_call>",
            Self::Listed => "[TOOL_CALLS]",
            Self::Bare => "<|python_tag|>",
        }
    }

    /// What it ends with; none where it goes to the answer's end.
    fn close(self) -> Option<&'static str> {
        match self {
            Self::Tagged | Self::Elements => Some("</tool_call>"),
            Self::Listed | Self::Bare => None,
        }
    }

    /// Tokens that are left out of a text as special ones, and tell where a call begins.
    pub(crate) fn marks(self) -> &'static [&'static str] {
        match self {
            Self::Tagged | Self::Elements => &["<tool_call>", "</tool_call>"],
            Self::Listed => &["[TOOL_CALLS]", "[ARGS]"],
            Self::Bare => &["<|python_tag|>"],
        }
    }

    /// What the calls of a text between its marks are; none if they are no calls.
    fn read(self, text: &str) -> Option<Vec<Call>> {
        let text = text.trim();
        match self {
            Self::Tagged => json_calls(text),
            Self::Elements => element_calls(text).or_else(|| json_calls(text)),
            Self::Listed => named_calls(text).or_else(|| json_calls(text)),
            Self::Bare => {
                let parts = text.split(';').map(str::trim).filter(|part| !part.is_empty());
                let each: Option<Vec<_>> = parts.map(json_calls).collect();
                each.map(|calls| calls.concat()).or_else(|| json_calls(text))
            }
        }
        .filter(|calls| !calls.is_empty())
    }
}

/// A call of a tool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) name: String,
    /// JSON.
    pub(crate) arguments: String,
}

/// A call or a list of them, as JSON.
fn json_calls(text: &str) -> Option<Vec<Call>> {
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

/// `name[ARGS]{…}`, several behind one another.
fn named_calls(text: &str) -> Option<Vec<Call>> {
    let parts = text.split("[TOOL_CALLS]").map(str::trim).filter(|part| !part.is_empty());
    let call = |part: &str| {
        let at = part.find("[ARGS]").or_else(|| part.find('{'))?;
        let (name, rest) = part.split_at(at);
        let arguments = rest.strip_prefix("[ARGS]").unwrap_or(rest).trim();
        serde_json::from_str::<Map<String, Value>>(arguments).ok()?;
        let name = name.trim();
        let plain = !name.is_empty() && !name.contains(char::is_whitespace);
        plain.then(|| Call { name: name.to_owned(), arguments: arguments.to_owned() })
    };
    parts.map(call).collect()
}

/// `<function=name><parameter=key>value</parameter></function>`. A value that is JSON is taken as such.
fn element_calls(text: &str) -> Option<Vec<Call>> {
    let mut calls = Vec::new();
    let mut rest = text.trim();
    while !rest.is_empty() {
        let (name, inside) = rest.strip_prefix("<function=")?.split_once('>')?;
        let (mut inside, after) = inside.split_once("</function>")?;
        let mut arguments = Map::new();
        while let Some((_, parameter)) = inside.split_once("<parameter=") {
            let (key, value) = parameter.split_once('>')?;
            let (value, after) = value.split_once("</parameter>")?;
            let value = value.strip_prefix('\n').unwrap_or(value);
            let value = value.strip_suffix('\n').unwrap_or(value);
            let value = serde_json::from_str(value).unwrap_or_else(|_| json!(value));
            arguments.insert(key.to_owned(), value);
            inside = after;
        }
        let name = name.trim().to_owned();
        calls.push(Call { name, arguments: Value::Object(arguments).to_string() });
        rest = after.trim();
    }
    Some(calls)
}

/// A part of an answer, as soon as it is certain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// What the model thinks before it speaks.
    Reasoning(String),
    /// What it says.
    Content(String),
    /// What it calls.
    Call(Call),
}

/// How an answer is to be taken apart.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Shape {
    /// Whether the model marks its reasoning.
    pub(crate) reasoning: bool,
    /// Whether its reasoning has begun in the prompt.
    pub(crate) begun: bool,
    /// How it writes calls, if it may call.
    pub(crate) calls: Option<CallForm>,
    /// Whether the whole answer is a call, as JSON.
    pub(crate) only_call: bool,
}

const THINK: &str = "<think>";
const END_THINK: &str = "</think>";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing was said yet.
    Start,
    Reasoning,
    /// Reasoning has ended and text has not begun.
    Between,
    Content,
    Call,
    /// All of it is a call, or the text of something that looks like one.
    Whole,
}

/// Takes an answer apart, piece by piece.
#[derive(Debug)]
pub(crate) struct Splitter {
    shape: Shape,
    state: State,
    text: String,
    /// Whether its reasoning has a first letter.
    thought: bool,
    called: bool,
}

impl Splitter {
    pub(crate) fn new(shape: Shape) -> Self {
        let state = match () {
            () if shape.only_call => State::Whole,
            () if shape.reasoning && shape.begun => State::Reasoning,
            () => State::Start,
        };
        Self { shape, state, text: String::new(), thought: false, called: false }
    }

    /// Whether a tool was called.
    pub(crate) fn called(&self) -> bool {
        self.called
    }

    /// Whether the model is thinking.
    pub(crate) fn reasons(&self) -> bool {
        self.state == State::Reasoning
    }

    /// Takes the next piece of text.
    pub(crate) fn push(&mut self, piece: &str) -> Vec<Part> {
        self.text += piece;
        let mut parts = Vec::new();
        while self.advance(&mut parts) {}
        parts
    }

    /// Takes the end.
    pub(crate) fn finish(&mut self) -> Vec<Part> {
        let mut parts = Vec::new();
        let rest = std::mem::take(&mut self.text);
        match self.state {
            State::Reasoning => add_reasoning(&mut parts, &rest),
            State::Call | State::Whole => self.end_call(&mut parts, &rest, ""),
            State::Start | State::Between => add_content(&mut parts, rest.trim_start()),
            State::Content => add_content(&mut parts, &rest),
        }
        parts
    }

    /// Goes one step on; false when more text is needed.
    fn advance(&mut self, parts: &mut Vec<Part>) -> bool {
        match self.state {
            State::Start => {
                let said = self.text.trim_start();
                if said.is_empty() {
                    return false;
                }
                if self.shape.reasoning {
                    if let Some(rest) = said.strip_prefix(THINK) {
                        self.text = rest.to_owned();
                        self.state = State::Reasoning;
                        return true;
                    }
                    if THINK.starts_with(said) {
                        return false;
                    }
                }
                let bare = self.shape.calls == Some(CallForm::Bare) && said.starts_with('{');
                self.state = if bare { State::Whole } else { State::Content };
                true
            }
            State::Reasoning if !self.thought => {
                let begins = self.text.len() - self.text.trim_start().len();
                self.text.drain(..begins);
                self.thought = !self.text.is_empty();
                self.thought
            }
            State::Reasoning => match self.text.find(END_THINK) {
                Some(at) => {
                    let rest = self.text.split_off(at);
                    let reasoning =
                        std::mem::replace(&mut self.text, rest[END_THINK.len()..].into());
                    add_reasoning(parts, reasoning.trim_end());
                    self.state = State::Between;
                    true
                }
                None => {
                    // The space before the end mark belongs to neither.
                    let sure = held_from(&self.text, END_THINK);
                    let sure = self.text[..sure].trim_end().len();
                    let rest = self.text.split_off(sure);
                    add_reasoning(parts, &std::mem::replace(&mut self.text, rest));
                    false
                }
            },
            State::Between => {
                let begins = self.text.len() - self.text.trim_start().len();
                self.text.drain(..begins);
                if self.text.is_empty() {
                    return false;
                }
                self.state = State::Content;
                true
            }
            State::Content => {
                let Some(form) = self.shape.calls else {
                    add_content(parts, &std::mem::take(&mut self.text));
                    return false;
                };
                let open = form.open();
                let Some(at) = self.text.find(open) else {
                    let sure = held_from(&self.text, open);
                    let sure = self.text[..sure].trim_end().len();
                    let rest = self.text.split_off(sure);
                    let mut said = std::mem::replace(&mut self.text, rest);
                    if self.called {
                        said = said.trim_start().to_owned();
                    }
                    add_content(parts, &said);
                    return false;
                };
                let rest = self.text.split_off(at);
                let said = std::mem::replace(&mut self.text, rest[open.len()..].to_owned());
                add_content(parts, said.trim_end());
                self.state = State::Call;
                true
            }
            State::Call => {
                let close = self.shape.calls.and_then(CallForm::close);
                let Some((close, at)) = close.and_then(|c| Some((c, self.text.find(c)?))) else {
                    return false;
                };
                let rest = self.text.split_off(at);
                let inside = std::mem::replace(&mut self.text, rest[close.len()..].to_owned());
                self.end_call(parts, &inside, close);
                self.state = State::Content;
                true
            }
            State::Whole => false,
        }
    }

    /// Takes what stood between the marks of a call.
    fn end_call(&mut self, parts: &mut Vec<Part>, inside: &str, close: &str) {
        let form = self.shape.calls.unwrap_or(CallForm::Tagged);
        let bare = inside.trim();
        let bare = bare.strip_prefix(form.open()).unwrap_or(bare);
        let bare = form.close().and_then(|close| bare.strip_suffix(close)).unwrap_or(bare);
        let read = if self.shape.only_call { json_calls(bare.trim()) } else { form.read(bare) };
        match read {
            Some(calls) => {
                self.called = true;
                parts.extend(calls.into_iter().map(Part::Call));
            }
            None => {
                let open = if self.state == State::Call { form.open() } else { "" };
                add_content(parts, &format!("{open}{inside}{close}"));
            }
        }
    }
}

fn add_reasoning(parts: &mut Vec<Part>, text: &str) {
    if !text.is_empty() {
        parts.push(Part::Reasoning(text.to_owned()));
    }
}

fn add_content(parts: &mut Vec<Part>, text: &str) {
    if !text.is_empty() {
        parts.push(Part::Content(text.to_owned()));
    }
}

/// Where the end of a text begins that may become `mark`.
fn held_from(text: &str, mark: &str) -> usize {
    let starts = text.char_indices().map(|(at, _)| at);
    let may = |at: &usize| mark.starts_with(&text[*at..]);
    starts.filter(|at| text.len() - at < mark.len()).find(may).unwrap_or(text.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The parts of a text, neighbours of a kind joined, however it is cut.
    fn parts(shape: Shape, text: &str) -> Vec<Part> {
        let of = |pieces: &[&str]| {
            let mut splitter = Splitter::new(shape);
            let mut all: Vec<Part> = Vec::new();
            for piece in pieces {
                all.extend(splitter.push(piece));
            }
            all.extend(splitter.finish());
            let mut joined: Vec<Part> = Vec::new();
            for part in all {
                match (joined.last_mut(), part) {
                    (Some(Part::Content(text)), Part::Content(more)) => *text += &more,
                    (Some(Part::Reasoning(text)), Part::Reasoning(more)) => *text += &more,
                    (_, part) => joined.push(part),
                }
            }
            joined
        };
        let whole = of(&[text]);
        let letters: Vec<String> = text.chars().map(String::from).collect();
        let letters: Vec<&str> = letters.iter().map(String::as_str).collect();
        assert_eq!(of(&letters), whole, "{text:?} letter by letter");
        for at in text.char_indices().map(|(at, _)| at) {
            assert_eq!(of(&[&text[..at], &text[at..]]), whole, "{text:?} cut at {at}");
        }
        whole
    }

    fn content(text: &str) -> Part {
        Part::Content(text.to_owned())
    }

    fn reasoning(text: &str) -> Part {
        Part::Reasoning(text.to_owned())
    }

    fn call(name: &str, arguments: &str) -> Part {
        Part::Call(Call { name: name.to_owned(), arguments: arguments.to_owned() })
    }

    fn with(form: CallForm) -> Shape {
        Shape { calls: Some(form), ..Shape::default() }
    }

    #[test]
    fn a_plain_answer_stays_as_it_is() {
        assert_eq!(parts(Shape::default(), "a <think> b"), [content("a <think> b")]);
        assert_eq!(parts(Shape::default(), "<tool_call>{}"), [content("<tool_call>{}")]);
        assert_eq!(parts(Shape::default(), ""), []);
    }

    #[test]
    fn reasoning_is_set_apart() {
        let shape = Shape { reasoning: true, ..Shape::default() };
        let text = "<think>\nSo it is.\n</think>\n\nYes.";
        assert_eq!(parts(shape, text), [reasoning("So it is."), content("Yes.")]);
        let begun = Shape { begun: true, ..shape };
        assert_eq!(parts(begun, "a < b\n</think>Yes."), [reasoning("a < b"), content("Yes.")]);
        assert_eq!(parts(begun, "never ends"), [reasoning("never ends")]);
        assert_eq!(parts(shape, "No <think> here"), [content("No <think> here")]);
        assert_eq!(parts(shape, "<th"), [content("<th")]);
    }

    #[test]
    fn tagged_calls_are_read() {
        let shape = with(CallForm::Tagged);
        let text = "Let me see.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>\n\
            <tool_call>\n{\"name\": \"g\", \"arguments\": {}}\n</tool_call>";
        let expected = [content("Let me see."), call("f", "{\"a\":1}"), call("g", "{}")];
        assert_eq!(parts(shape, text), expected);
        // Cut off before its end mark, but whole.
        let text = "<tool_call>{\"name\": \"f\", \"arguments\": \"{\\\"a\\\": 1}\"}";
        assert_eq!(parts(shape, text), [call("f", "{\"a\": 1}")]);
        for broken in ["<tool_call>{\"name\": \"f\", ", "<tool_call>no</tool_call>", "a <tool"] {
            assert_eq!(parts(shape, broken), [content(broken)]);
        }
        let text = "<tool_call>[{\"name\": 3}]</tool_call> x";
        assert_eq!(parts(shape, text), [content("<tool_call>[{\"name\": 3}]</tool_call> x")]);
    }

    #[test]
    fn elements_are_read() {
        let text = "<tool_call>\n<function=find>\n<parameter=city>\nBonn\n</parameter>\n<parameter=days>\n3\n\
            </parameter>\n</function>\n</tool_call>";
        let expected = call("find", "{\"city\":\"Bonn\",\"days\":3}");
        assert_eq!(parts(with(CallForm::Elements), text), [expected]);
        let json = "<tool_call>{\"name\": \"f\"}</tool_call>";
        assert_eq!(parts(with(CallForm::Elements), json), [call("f", "{}")]);
    }

    #[test]
    fn lists_are_read() {
        let shape = with(CallForm::Listed);
        let text = "[TOOL_CALLS][{\"name\": \"f\", \"arguments\": {}}, {\"name\": \"g\"}]";
        assert_eq!(parts(shape, text), [call("f", "{}"), call("g", "{}")]);
        let text = "[TOOL_CALLS]f[ARGS]{\"a\": 1}[TOOL_CALLS]g[ARGS]{}";
        assert_eq!(parts(shape, text), [call("f", "{\"a\": 1}"), call("g", "{}")]);
        assert_eq!(parts(shape, "[TOOL_CALLS]so"), [content("[TOOL_CALLS]so")]);
    }

    #[test]
    fn bare_calls_are_read() {
        let shape = with(CallForm::Bare);
        let text = "{\"name\": \"f\", \"parameters\": {\"a\": \"x; y\"}}";
        assert_eq!(parts(shape, text), [call("f", "{\"a\":\"x; y\"}")]);
        let text = "<|python_tag|>{\"name\": \"f\", \"parameters\": {}}; {\"name\": \"g\"}";
        assert_eq!(parts(shape, text), [call("f", "{}"), call("g", "{}")]);
        assert_eq!(parts(shape, "{not JSON}"), [content("{not JSON}")]);
    }

    #[test]
    fn a_forced_call_is_all_of_it() {
        let shape = Shape { only_call: true, ..with(CallForm::Tagged) };
        let inner = "{\"name\": \"f\", \"arguments\": {}}";
        for text in [inner.to_owned(), format!("<tool_call>\n{inner}\n</tool_call>")] {
            assert_eq!(parts(shape, &text), [call("f", "{}")]);
        }
    }
}
