//! What a model writes, taken apart while it comes: its reasoning, its text, its calls of tools.
//!
//! What looks like a call and is none stays text.

use crate::calls::{Bracket, Call, CallForm, json_calls};

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
    /// How the model marks its reasoning, if it does.
    pub(crate) reasoning: Option<&'static Thinking>,
    /// Whether its reasoning has begun in the prompt.
    pub(crate) begun: bool,
    /// How it writes calls, if it may call.
    pub(crate) calls: Option<&'static CallForm>,
    /// Whether the whole answer is a call, as JSON.
    pub(crate) only_call: bool,
}

/// How reasoning is marked.
#[derive(Debug)]
pub(crate) struct Thinking {
    open: &'static str,
    close: &'static str,
    /// The tokens among them, where they are special ones.
    pub(crate) marks: [&'static str; 2],
}

static THINKING: [Thinking; 2] = [
    Thinking { open: "<think>", close: "</think>", marks: ["<think>", "</think>"] },
    // Gemma 4's channel of thoughts.
    Thinking {
        open: "<|channel>thought",
        close: "<channel|>",
        marks: ["<|channel>", "<channel|>"],
    },
];

impl Thinking {
    /// How reasoning is marked where the template has this source.
    pub(crate) fn of(source: &str) -> Option<&'static Self> {
        THINKING.iter().find(|known| source.contains(known.close))
    }

    /// Whether a prompt ends where reasoning has begun.
    pub(crate) fn is_begun(&self, prompt: &str) -> bool {
        prompt.trim_end().ends_with(self.open)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing was said yet.
    Start,
    Reasoning,
    /// Reasoning or a call has ended, and text has not begun.
    Between,
    Content,
    /// A call behind this.
    Call(Bracket),
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
            () if shape.reasoning.is_some() && shape.begun => State::Reasoning,
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
            State::Call(Bracket { open, .. }) => {
                self.end_call(&mut parts, open, &rest, "");
            }
            State::Whole => {
                self.end_call(&mut parts, "", &rest, "");
            }
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
                if let Some(Thinking { open, .. }) = self.shape.reasoning {
                    if let Some(rest) = said.strip_prefix(open) {
                        self.text = rest.to_owned();
                        self.state = State::Reasoning;
                        return true;
                    }
                    if open.starts_with(said) {
                        return false;
                    }
                }
                self.state = self.speaks();
                true
            }
            State::Reasoning if !self.thought => {
                let begins = self.text.len() - self.text.trim_start().len();
                self.text.drain(..begins);
                self.thought = !self.text.is_empty();
                self.thought
            }
            State::Reasoning => {
                let close = self.shape.reasoning.map_or("", |thinking| thinking.close);
                match self.text.find(close) {
                    Some(at) => {
                        let rest = self.text.split_off(at)[close.len()..].to_owned();
                        let reasoning = std::mem::replace(&mut self.text, rest);
                        add_reasoning(parts, reasoning.trim_end());
                        self.state = State::Between;
                        true
                    }
                    None => {
                        // The space before the end mark belongs to neither.
                        let sure = held_from(&self.text, close);
                        let sure = self.text[..sure].trim_end().len();
                        let rest = self.text.split_off(sure);
                        add_reasoning(parts, &std::mem::replace(&mut self.text, rest));
                        false
                    }
                }
            }
            State::Between => {
                let begins = self.text.len() - self.text.trim_start().len();
                self.text.drain(..begins);
                if self.text.is_empty() {
                    return false;
                }
                self.state = self.speaks();
                true
            }
            State::Content => {
                let Some(form) = self.shape.calls else {
                    add_content(parts, &std::mem::take(&mut self.text));
                    return false;
                };
                let found = form.brackets.iter().filter_map(|bracket| {
                    let at = self.text.find(bracket.open)?;
                    Some((at, *bracket))
                });
                let Some((at, bracket)) = found.min_by_key(|(at, _)| *at) else {
                    let opens = form.brackets.iter().map(|bracket| bracket.open);
                    let sure = opens.map(|open| held_from(&self.text, open)).min();
                    let sure = self.text[..sure.unwrap_or(self.text.len())].trim_end().len();
                    let rest = self.text.split_off(sure);
                    add_content(parts, &std::mem::replace(&mut self.text, rest));
                    return false;
                };
                let rest = self.text.split_off(at);
                let rest = rest[bracket.open.len()..].to_owned();
                let said = std::mem::replace(&mut self.text, rest);
                add_content(parts, said.trim_end());
                self.state = State::Call(bracket);
                true
            }
            State::Call(Bracket { open, close }) => {
                let Some((close, at)) = close.and_then(|c| Some((c, self.text.find(c)?))) else {
                    return false;
                };
                let rest = self.text.split_off(at);
                let inside = std::mem::replace(&mut self.text, rest[close.len()..].to_owned());
                let called = self.end_call(parts, open, &inside, close);
                self.state = if called { State::Between } else { State::Content };
                true
            }
            State::Whole => false,
        }
    }

    /// What follows from the first letter of what the model says.
    fn speaks(&self) -> State {
        let whole = self.shape.calls.and_then(|form| form.whole).filter(|_| !self.called);
        match whole {
            Some(first) if self.text.trim_start().starts_with(first) => State::Whole,
            _ => State::Content,
        }
    }

    /// Takes what stood between `open` and `close` where a call is expected, and says whether it is one.
    fn end_call(&mut self, parts: &mut Vec<Part>, open: &str, inside: &str, close: &str) -> bool {
        let read = match (self.shape.calls, self.shape.only_call) {
            (form, true) => json_calls(form.map_or(inside, |form| form.bare(inside)).trim()),
            (Some(form), false) => form.calls(inside),
            (None, false) => None,
        };
        match read {
            Some(calls) => {
                self.called = true;
                parts.extend(calls.into_iter().map(Part::Call));
                true
            }
            None => {
                add_content(parts, &format!("{open}{inside}{close}"));
                false
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
    use crate::calls;

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

    fn with(form: &'static CallForm) -> Shape {
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
        let shape = Shape { reasoning: Thinking::of("</think>"), ..Shape::default() };
        let text = "<think>\nSo it is.\n</think>\n\nYes.";
        assert_eq!(parts(shape, text), [reasoning("So it is."), content("Yes.")]);
        let begun = Shape { begun: true, ..shape };
        assert_eq!(parts(begun, "a < b\n</think>Yes."), [reasoning("a < b"), content("Yes.")]);
        assert_eq!(parts(begun, "never ends"), [reasoning("never ends")]);
        assert_eq!(parts(shape, "No <think> here"), [content("No <think> here")]);
        assert_eq!(parts(shape, "<th"), [content("<th")]);
        let shape = Shape { reasoning: Thinking::of("| split('<channel|>')"), ..shape };
        let text = "<|channel>thought\nSo it is.\n<channel|>Yes.";
        assert_eq!(parts(shape, text), [reasoning("So it is."), content("Yes.")]);
        assert_eq!(parts(shape, "<|channel>thought\n<channel|>Yes."), [content("Yes.")]);
        assert!(Thinking::of("{{ messages }}").is_none());
    }

    #[test]
    fn tagged_calls_are_read() {
        let shape = with(&calls::tagged::FORM);
        let text = "Let me see.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>\n\
            <tool_call>\n{\"name\": \"g\", \"arguments\": {}}\n</tool_call>";
        let expected = [content("Let me see."), call("f", "{\"a\":1}"), call("g", "{}")];
        assert_eq!(parts(shape, text), expected);
        let more = format!("{text}\n\nThat is it, as it were.");
        assert_eq!(parts(shape, &more)[3], content("That is it, as it were."));
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
        assert_eq!(parts(with(&calls::elements::FORM), text), [expected]);
        let json = "<tool_call>{\"name\": \"f\"}</tool_call>";
        assert_eq!(parts(with(&calls::elements::FORM), json), [call("f", "{}")]);
    }

    #[test]
    fn lists_are_read() {
        let shape = with(&calls::listed::FORM);
        let text = "[TOOL_CALLS][{\"name\": \"f\", \"arguments\": {}}, {\"name\": \"g\"}]";
        assert_eq!(parts(shape, text), [call("f", "{}"), call("g", "{}")]);
        let text = "[TOOL_CALLS]f[ARGS]{\"a\": 1}[TOOL_CALLS]g[ARGS]{}";
        assert_eq!(parts(shape, text), [call("f", "{\"a\": 1}"), call("g", "{}")]);
        assert_eq!(parts(shape, "[TOOL_CALLS]so"), [content("[TOOL_CALLS]so")]);
    }

    #[test]
    fn bare_calls_are_read() {
        let shape = with(&calls::bare::FORM);
        let text = "{\"name\": \"f\", \"parameters\": {\"a\": \"x; y\"}}";
        assert_eq!(parts(shape, text), [call("f", "{\"a\":\"x; y\"}")]);
        let text = "<|python_tag|>{\"name\": \"f\", \"parameters\": {}}; {\"name\": \"g\"}";
        assert_eq!(parts(shape, text), [call("f", "{}"), call("g", "{}")]);
        assert_eq!(parts(shape, "{not JSON}"), [content("{not JSON}")]);
        let text = "<think>So.</think>\n\n{\"name\": \"f\"}";
        let thinks = Shape { reasoning: Thinking::of("</think>"), ..shape };
        assert_eq!(parts(thinks, text), [reasoning("So."), call("f", "{}")]);
    }

    #[test]
    fn granites_lists_are_read() {
        let shape = with(&calls::granite::FORM);
        let list = "[{\"name\": \"f\", \"arguments\": {\"a\": 1}}, {\"name\": \"g\"}]";
        let expected = [call("f", "{\"a\":1}"), call("g", "{}")];
        for text in [
            format!("<|tool_call|>{list}"),
            format!("<|tool_call|> {list}\n"),
            format!("<tool_call>{list}"),
            format!("<tool_call>{list}</tool_call>"),
        ] {
            assert_eq!(parts(shape, &text), expected, "{text}");
        }
        let text = format!("I look.\n<|tool_call|>{list}");
        assert_eq!(parts(shape, &text)[0], content("I look."));
        // The same list under a template that has the word alone.
        assert_eq!(parts(with(&calls::tagged::FORM), &format!("<tool_call>{list}")), expected);
        for broken in ["<|tool_call|>[{\"name\": \"f\"", "<|tool_call|>so", "a <|tool"] {
            assert_eq!(parts(shape, broken), [content(broken)]);
        }
    }

    #[test]
    fn gemmas_calls_are_read() {
        let shape = with(&calls::gemma::FORM);
        let text = "Well.<|tool_call>call:find{city:<|\"|>Bonn, \"am\" {Rhein}<|\"|>,days:3,deep:{on:true,\
            of:[1,-2.5,<|\"|>x<|\"|>,null,{}]},none:[]}<tool_call|>";
        let arguments = "{\"city\":\"Bonn, \\\"am\\\" {Rhein}\",\"days\":3,\"deep\":{\"on\":true,\
            \"of\":[1,-2.5,\"x\",null,{}]},\"none\":[]}";
        assert_eq!(parts(shape, text), [content("Well."), call("find", arguments)]);
        let text = "<|tool_call>call:f{}<tool_call|><|tool_call>call:g{ a : 1 }<tool_call|>";
        assert_eq!(parts(shape, text), [call("f", "{}"), call("g", "{\"a\":1}")]);
        let text = "<start_function_call>call:f{a:<escape>it's; so<escape>,b:2}<end_function_call>";
        assert_eq!(parts(shape, text), [call("f", "{\"a\":\"it's; so\",\"b\":2}")]);
        // Without marks, in quotes as JSON has them, and cut off behind the call.
        let text = "<|tool_call>call:f{a:Bonn am Rhein,\"b\":\"\\u00e4\"}";
        assert_eq!(parts(shape, text), [call("f", "{\"a\":\"Bonn am Rhein\",\"b\":\"ä\"}")]);
        for broken in [
            "<|tool_call>call:f{a:1<tool_call|>",
            "<|tool_call>call:f{a:<|\"|>x<tool_call|>",
            "<|tool_call>call:f{a}<tool_call|>",
            "<|tool_call>call:{}<tool_call|>",
            "<|tool_call>f{}<tool_call|>",
            "<|tool_call>call:f{a:1}}<tool_call|>",
            "a <|tool_ca",
        ] {
            assert_eq!(parts(shape, broken), [content(broken)]);
        }
        let deep =
            format!("<|tool_call>call:f{{a:{}{}}}<tool_call|>", "[".repeat(300), "]".repeat(300));
        let mut splitter = Splitter::new(shape);
        assert_eq!(splitter.push(&deep), [content(&deep)]);
    }

    #[test]
    fn pythons_calls_are_read() {
        let shape = with(&calls::python::FORM);
        let text = "[find(city=\"Bonn\", days=3, at=[1, 2.5, -1], on=True, off=None), g()]";
        let arguments = "{\"city\":\"Bonn\",\"days\":3,\"at\":[1,2.5,-1],\"on\":true,\"off\":null}";
        assert_eq!(parts(shape, text), [call("find", arguments), call("g", "{}")]);
        let text =
            "So:\n```tool_code\nf(a='it\\'s \\u00e4', b={'k': (1, 2), 3: \"\"})\ng()\n```\nDone.";
        let arguments = "{\"a\":\"it's ä\",\"b\":{\"k\":[1,2],\"3\":\"\"}}";
        let expected = [content("So:"), call("f", arguments), call("g", "{}"), content("Done.")];
        assert_eq!(parts(shape, text), expected);
        let text = "```tool_code\na.f(x=\"\"\"one\n\"two\" \\d\"\"\",)\n```";
        assert_eq!(parts(shape, text), [call("a.f", "{\"x\":\"one\\n\\\"two\\\" \\\\d\"}")]);
        for plain in [
            "[1] In the beginning",
            "[f(1)]",
            "[f(a=)]",
            "[f(a=\"x)]",
            "[f(a=1)] and so on",
            "[]",
            "```tool_code\nf(a=b)\n```",
            "```tool_code\nf(a='\\x4')\n```",
            "```tool_code\n\n```",
            "```tool",
        ] {
            assert_eq!(parts(shape, plain), [content(plain)]);
        }
        let deep = format!("[f(a={}1{})]", "[".repeat(300), "]".repeat(300));
        assert_eq!(parts(shape, &deep), [content(&deep)]);
    }

    #[test]
    fn a_forced_call_is_all_of_it() {
        let shape = Shape { only_call: true, ..with(&calls::tagged::FORM) };
        let inner = "{\"name\": \"f\", \"arguments\": {}}";
        for text in [inner.to_owned(), format!("<tool_call>\n{inner}\n</tool_call>")] {
            assert_eq!(parts(shape, &text), [call("f", "{}")]);
        }
    }
}
