//! Chat templates: jinja as Hugging Face renders it.
//!
//! A template sees `messages` (each with `role` and `content`), `add_generation_prompt`,
//! `bos_token`, `eos_token`, and `tools` and `documents` as none. As in `transformers`:
//! `trim_blocks` and `lstrip_blocks` are on, `break` and `continue` work, Python's string, list and
//! dict methods work, `raise_exception(text)` refuses a conversation, `strftime_now(format)` writes
//! the date, `tojson` writes JSON without HTML escapes, `{% generation %}` marks are ignored, and
//! `none`, `true` and `false` print as Python prints them.

use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{AutoEscape, Environment, ErrorKind, State, escape_formatter};

use crate::error::{Error, Result};
use crate::record::Message;
use crate::strftime::strftime;
use crate::suggest;

/// The templates that come with the crate: name and source.
const BUILTIN: &[(&str, &str)] = &[
    ("alpaca", include_str!("../templates/alpaca.jinja")),
    ("chatml", include_str!("../templates/chatml.jinja")),
    ("gemma", include_str!("../templates/gemma.jinja")),
    ("llama2", include_str!("../templates/llama2.jinja")),
    ("llama3", include_str!("../templates/llama3.jinja")),
    ("mistral", include_str!("../templates/mistral.jinja")),
    ("phi3", include_str!("../templates/phi3.jinja")),
    ("plain", include_str!("../templates/plain.jinja")),
    ("vicuna", include_str!("../templates/vicuna.jinja")),
    ("zephyr", include_str!("../templates/zephyr.jinja")),
];

/// The name under which the one template of an environment is stored.
const ONLY: &str = "chat_template";
/// Steps that one conversation may take: far more than any does, and a template that comes with
/// somebody's model cannot run for ever. Text costs a step per [`STEP_BYTES`] when it is written,
/// joined or captured, so this bounds the memory of a text that doubles itself too.
const MOST_STEPS: u64 = MOST_BYTES / STEP_BYTES;
const MOST_BYTES: u64 = 256 << 20;
/// The text that the engine counts as one step, and what of lists and maps that are written out.
const STEP_BYTES: u64 = 64;
const STEP_BYTES_WALKED: u64 = 4;
/// How deep lists and maps may lie in each other where they become JSON.
const MOST_NESTED: usize = 500;

/// The names that [`ChatTemplate::builtin`] takes.
pub fn builtin_template_names() -> Vec<&'static str> {
    BUILTIN.iter().map(|(name, _)| *name).collect()
}

/// How a model writes a conversation.
#[derive(Clone)]
pub struct ChatTemplate {
    name: String,
    source: Arc<str>,
    environment: Environment<'static>,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("name", &self.name)
            .field("source", &self.source)
            .finish_non_exhaustive()
    }
}

impl PartialEq for ChatTemplate {
    /// Templates are equal when their sources are; the name says only where one came from.
    fn eq(&self, other: &Self) -> bool {
        self.source == other.source
    }
}

impl ChatTemplate {
    /// A template from its source; `name` appears in messages only.
    ///
    /// `strftime_now` gives the moment of this call, so that all renderings of one template agree.
    ///
    /// # Errors
    /// [`Error::TemplateSyntax`] with the line.
    pub fn from_source(name: impl Into<String>, source: impl Into<String>) -> Result<Self> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let seconds = now.map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX));
        Self::from_source_at(name, source, seconds)
    }

    /// [`ChatTemplate::from_source`] with the moment that `strftime_now` gives, in seconds since
    /// 1970-01-01T00:00:00Z; a template that writes the date renders the same on another day.
    ///
    /// # Errors
    /// [`Error::TemplateSyntax`] with the line.
    pub fn from_source_at(
        name: impl Into<String>,
        source: impl Into<String>,
        now: i64,
    ) -> Result<Self> {
        let name = name.into();
        let source: Arc<str> = source.into().into();
        let syntax = |error: minijinja::Error| Error::TemplateSyntax {
            name: name.clone(),
            line: error.line(),
            message: message(&error),
        };
        let mut environment = environment(now).map_err(syntax)?;
        environment.add_template_owned(ONLY, without_generation_marks(&source)).map_err(syntax)?;
        Ok(Self { name, source, environment })
    }

    /// A template that comes with the crate.
    ///
    /// # Errors
    /// [`Error::UnknownTemplate`] with the nearest names.
    pub fn builtin(name: &str) -> Result<Self> {
        match BUILTIN.iter().find(|(known, _)| *known == name) {
            Some((_, source)) => Self::from_source(name, *source),
            None => Err(Error::UnknownTemplate {
                message: suggest::unknown("chat template", name, &builtin_template_names()),
            }),
        }
    }

    /// A built-in template by name, or else a jinja file, relative to `base_dir`.
    ///
    /// # Errors
    /// When it is neither, or the file cannot be read or is no valid template.
    pub fn resolve(name: &str, base_dir: &Path) -> Result<Self> {
        let path = base_dir.join(name);
        if BUILTIN.iter().any(|(known, _)| *known == name) {
            Self::builtin(name)
        } else if path.is_file() || looks_like_file(name) {
            let source = fs_err::read_to_string(&path)?;
            Self::from_source(path.display().to_string(), source)
        } else {
            let known = suggest::unknown("chat template", name, &builtin_template_names());
            Err(Error::UnknownTemplate {
                message: format!("{known}; nor is there a file {}", path.display()),
            })
        }
    }

    /// The name it was given.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its jinja source, to be saved with an adapter.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The conversation as text; with `add_generation_prompt` it ends where the assistant is to
    /// speak next. `bos` and `eos` are the texts of the model's special tokens, empty where it has
    /// none.
    ///
    /// # Errors
    /// [`Error::TemplateRender`] when the template refuses the conversation or fails.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        bos: &str,
        eos: &str,
    ) -> Result<String> {
        let turn = |message: &Message| {
            Value::from_pairs([
                ("role", Value::from(message.role.as_str())),
                ("content", Value::from(message.content.as_str())),
            ])
        };
        let context = Value::from_pairs([
            ("messages", messages.iter().map(turn).collect::<Value>()),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
            ("bos_token", Value::from(bos)),
            ("eos_token", Value::from(eos)),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ]);
        let template = self.environment.get_template(ONLY);
        template.and_then(|template| template.render(context)).map_err(|error| {
            let (name, line) = (self.name.clone(), error.line());
            Error::TemplateRender { name, line, message: message(&error) }
        })
    }
}

/// The text of a list or map, paid for before it grows. The engine counts it only afterwards, and a
/// few lists that hold each other twice can be written without end.
struct Paid<'a, 's, 'e> {
    state: &'a State<'s, 'e>,
    text: String,
    owed: u64,
}

impl<'a, 's, 'e> Paid<'a, 's, 'e> {
    fn new(state: &'a State<'s, 'e>) -> Self {
        Self { state, text: String::new(), owed: 0 }
    }

    fn pay(&mut self, bytes: usize) -> std::result::Result<(), minijinja::Error> {
        self.owed = self.owed.saturating_add(bytes as u64);
        let steps = self.owed / STEP_BYTES_WALKED;
        self.owed %= STEP_BYTES_WALKED;
        self.state.consume_fuel(steps)
    }

    fn push(&mut self, text: &str) -> std::result::Result<(), minijinja::Error> {
        self.pay(text.len())?;
        self.text.push_str(text);
        Ok(())
    }
}

impl std::fmt::Write for Paid<'_, '_, '_> {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        self.push(text).map_err(|_| std::fmt::Error)
    }
}

fn looks_like_file(name: &str) -> bool {
    let endings = [".jinja", ".jinja2", ".j2", ".txt"];
    name.contains(['/', '\\']) || endings.iter().any(|ending| name.ends_with(ending))
}

fn environment(now: i64) -> std::result::Result<Environment<'static>, minijinja::Error> {
    let mut environment = Environment::new();
    // Without it a fault names the value at fault only in builds with debug assertions.
    environment.set_debug(true);
    environment.set_fuel(Some(MOST_STEPS));
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(|out, state, value| match value.kind() {
        ValueKind::None => out.write_str("None").map_err(minijinja::Error::from),
        ValueKind::Bool => {
            let text = if value.is_true() { "True" } else { "False" };
            out.write_str(text).map_err(minijinja::Error::from)
        }
        ValueKind::Seq | ValueKind::Map | ValueKind::Iterable | ValueKind::Plain => {
            let mut paid = Paid::new(state);
            write!(paid, "{value}").map_err(|_| minijinja::Error::from(ErrorKind::OutOfFuel))?;
            let text = Value::from(paid.text);
            escape_formatter(out, state, &text)
        }
        _ => escape_formatter(out, state, value),
    });
    environment.add_filter("tojson", to_json);
    environment.add_function(
        "raise_exception",
        |text: String| -> std::result::Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, text))
        },
    );
    environment.add_function("strftime_now", move |format: String| {
        strftime(&format, now)
            .map_err(|text| minijinja::Error::new(ErrorKind::InvalidOperation, text))
    });
    Ok(environment)
}

/// What went wrong, without the engine's own mention of the template's name and line.
fn message(error: &minijinja::Error) -> String {
    if error.kind() == ErrorKind::OutOfFuel {
        let most = MOST_BYTES >> 20;
        return format!(
            "takes more than {MOST_STEPS} steps or {most} MiB of text for one conversation; expected \
             loops that end"
        );
    }
    error.detail().map_or_else(|| error.kind().to_string(), str::to_owned)
}

/// Turns `{% generation %}` and `{% endgeneration %}` into blocks that always apply and keeps
/// their whitespace control: they mark answers for `transformers`, which are found otherwise here.
fn without_generation_marks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        rest = tag;
        // Not the `%` that opens it: `{%}` is no tag.
        let Some(len) = tag[2..].find("%}") else { break };
        let (inside, after) = (&tag[2..2 + len], &tag[len + 4..]);
        let replacement = match inside.trim_matches(['-', '+']).trim() {
            "generation" => Some("if true"),
            "endgeneration" => Some("endif"),
            _ => None,
        };
        match replacement {
            Some(block) => {
                let sign = |found: Option<char>| {
                    found
                        .filter(|sign| matches!(sign, '-' | '+'))
                        .map_or("", |sign| if sign == '-' { "-" } else { "+" })
                };
                let (open, close) = (sign(inside.chars().next()), sign(inside.chars().last()));
                out.push_str(&["{%", open, " ", block, " ", close, "%}"].concat());
            }
            None => out.push_str(&tag[..len + 4]),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=…, separators=…, sort_keys=…)`.
fn to_json(
    state: &State<'_, '_>,
    value: &Value,
    options: Kwargs,
) -> std::result::Result<Value, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let sort_keys: Option<bool> = options.get("sort_keys")?;
    let ascii: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        // With line breaks between items, Python leaves the space after the comma out.
        _ if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        _ => (", ".to_owned(), ": ".to_owned()),
    };
    let mut writer = JsonWriter {
        out: Paid::new(state),
        indent,
        item,
        key,
        sort_keys: sort_keys.unwrap_or(false),
        ascii: ascii.unwrap_or(false),
    };
    writer.write(value, 0)?;
    Ok(Value::from(writer.out.text))
}

struct JsonWriter<'a, 's, 'e> {
    out: Paid<'a, 's, 'e>,
    indent: Option<usize>,
    item: String,
    key: String,
    sort_keys: bool,
    ascii: bool,
}

impl JsonWriter<'_, '_, '_> {
    fn write(&mut self, value: &Value, depth: usize) -> std::result::Result<(), minijinja::Error> {
        if depth > MOST_NESTED {
            return Err(minijinja::Error::new(
                ErrorKind::InvalidOperation,
                format!("tojson cannot write more than {MOST_NESTED} lists or maps in each other"),
            ));
        }
        match value.kind() {
            ValueKind::Undefined | ValueKind::None => self.out.push("null"),
            ValueKind::Bool => self.out.push(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push(&value.to_string()),
            ValueKind::String => self.string(value.as_str().unwrap_or("")),
            ValueKind::Seq | ValueKind::Iterable => {
                self.out.push("[")?;
                let mut empty = true;
                for item in value.try_iter()? {
                    self.separate(empty, depth + 1)?;
                    self.write(&item, depth + 1)?;
                    empty = false;
                }
                self.close("]", empty, depth)
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.out.push("{")?;
                for (index, key) in keys.iter().enumerate() {
                    self.separate(index == 0, depth + 1)?;
                    self.string(&key.to_string())?;
                    self.out.push(&self.key)?;
                    self.write(&value.get_item(key)?, depth + 1)?;
                }
                self.close("}", keys.is_empty(), depth)
            }
            other => Err(minijinja::Error::new(
                ErrorKind::InvalidOperation,
                format!("tojson cannot write a value of kind {other}"),
            )),
        }
    }

    fn separate(&mut self, first: bool, depth: usize) -> std::result::Result<(), minijinja::Error> {
        if !first {
            self.out.push(&self.item)?;
        }
        self.new_line(depth)
    }

    fn close(
        &mut self,
        bracket: &str,
        empty: bool,
        depth: usize,
    ) -> std::result::Result<(), minijinja::Error> {
        if !empty {
            self.new_line(depth)?;
        }
        self.out.push(bracket)
    }

    fn new_line(&mut self, depth: usize) -> std::result::Result<(), minijinja::Error> {
        if let Some(indent) = self.indent {
            let spaces = indent.saturating_mul(depth);
            self.out.pay(spaces)?;
            self.out.text.push('\n');
            self.out.text.extend(std::iter::repeat_n(' ', spaces));
        }
        Ok(())
    }

    fn string(&mut self, text: &str) -> std::result::Result<(), minijinja::Error> {
        self.out.pay(text.len() + 2)?;
        let out = &mut self.out.text;
        out.push('"');
        for character in text.chars() {
            match character {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if (c as u32) < 0x20 || (self.ascii && !c.is_ascii()) => {
                    let mut units = [0; 2];
                    for unit in c.encode_utf16(&mut units) {
                        out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(template: &str, messages: &[Message], generate: bool) -> Result<String> {
        ChatTemplate::from_source_at("test", template, 0)?.render(messages, generate, "<s>", "</s>")
    }

    #[test]
    fn a_tag_needs_more_than_one_percent_sign() {
        assert_eq!(without_generation_marks("a{%}b{%- generation %}c"), "a{%}b{%- generation %}c");
        assert_eq!(without_generation_marks("a{%- generation %}b{%"), "a{%- if true %}b{%");
        assert!(ChatTemplate::from_source("test", "a{%}").is_err());
    }

    /// `tests/fixtures/templates.py` says what made the expectations.
    #[test]
    fn renderings_are_those_of_transformers() {
        let fixture = include_str!("../tests/fixtures/templates.json");
        let cases: Vec<serde_json::Value> = serde_json::from_str(fixture).unwrap();
        // 2024-02-29 12:34:56 UTC.
        const NOW: i64 = 1_709_210_096;
        let mut rendered = 0;
        for case in &cases {
            let string = |key: &str| case[key].as_str().unwrap();
            let named = string("template");
            let builtin = BUILTIN.iter().find(|(name, _)| *name == named);
            let source = builtin.map_or(named, |(_, source)| source);
            let template = ChatTemplate::from_source_at(string("name"), source, NOW).unwrap();
            let messages: Vec<Message> = case["messages"]
                .as_array()
                .unwrap()
                .iter()
                .map(|turn| {
                    Message::new(turn["role"].as_str().unwrap(), turn["content"].as_str().unwrap())
                })
                .collect();
            let generate = case["add_generation_prompt"].as_bool().unwrap();
            let result = template.render(&messages, generate, "<s>", "</s>");
            match case["expected"].as_str() {
                Some(expected) => {
                    assert_eq!(result.unwrap(), expected, "{}", string("name"));
                    rendered += 1;
                }
                None => assert!(result.is_err(), "{}", string("name")),
            }
        }
        assert!(rendered > 100, "{rendered} of {}", cases.len());
        for (name, _) in BUILTIN {
            assert!(cases.iter().any(|case| case["template"] == *name), "no case for {name}");
        }
    }

    #[test]
    fn builtin_names_are_found_and_others_answered_with_the_nearest() {
        for name in builtin_template_names() {
            let template = ChatTemplate::builtin(name).unwrap();
            assert_eq!(template.name(), name);
            let copy = ChatTemplate::from_source("copy", template.source()).unwrap();
            assert_eq!(copy, template);
        }
        let message = ChatTemplate::builtin("chat-ml").unwrap_err().to_string();
        insta::assert_snapshot!(message, @"unknown chat template `chat-ml`; did you mean `chatml`? known: alpaca, chatml, gemma, llama2, llama3, mistral, phi3, plain, vicuna, zephyr");
    }

    #[test]
    fn faults_name_template_and_line() {
        let message = text("a\n{% if %}", &[], false).unwrap_err().to_string();
        insta::assert_snapshot!(message, @r#"chat template test, line 2: unexpected end of block"#);
        let message =
            text("\n{{ raise_exception('no ' ~ messages[0].role) }}", &[Message::user("x")], false)
                .unwrap_err()
                .to_string();
        insta::assert_snapshot!(message, @r#"chat template test, line 2: no user"#);
        let message = text("{{ messages.nothing.more }}", &[], false).unwrap_err().to_string();
        insta::assert_snapshot!(message, @r#"chat template test, line 1: `messages.nothing` is undefined"#);
    }

    #[test]
    fn loops_without_end_are_stopped() {
        let nested = "{% for a in range(9999) %}{% for b in range(9999) %}{{ x }}{% endfor %}\
                      {% endfor %}";
        let message = text(nested, &[Message::user("x")], false).unwrap_err().to_string();
        insta::assert_snapshot!(message, @"chat template test, line 1: takes more than 4194304 steps or 256 MiB of text for one conversation; expected loops that end");
        let long = "{% for a in range(9999) %}{{ messages[0].content }}{% endfor %}";
        let turn = Message::user("y".repeat(100_000));
        let message = text(long, &[turn], false).unwrap_err().to_string();
        assert!(message.contains("or 256 MiB of text"), "{message}");
    }

    #[test]
    fn texts_that_double_are_stopped() {
        let doubled = |step: &str, end: &str| {
            let start = "{% set ns = namespace(it='ab', list=[1]) %}{% for a in range(30) %}";
            let source = [start, step, "{% endfor %}", end].concat();
            text(&source, &[], false).unwrap_err().to_string()
        };
        let nested = "{% set ns.list = [ns.list, ns.list] %}";
        for (step, end) in [
            ("{% set ns.it = ns.it + ns.it %}", ""),
            ("{% set ns.it = ns.it ~ ns.it %}", ""),
            ("{% set ns.it = ns.it * 2 %}", ""),
            ("{% set ns.it = [ns.it, ns.it] | join %}", ""),
            ("{% set ns.it = ns.it.replace('a', 'aa') %}", ""),
            ("{% set it %}{{ ns.it }}{{ ns.it }}{% endset %}{% set ns.it = it %}", ""),
            (nested, "{{ ns.list }}"),
            (nested, "{% set it %}{{ ns.list }}{% endset %}"),
            (nested, "{{ ns.list | tojson }}"),
            ("{% set ns.list = ns.list + ns.list %}", "{{ ns.list | tojson }}"),
            ("", "{{ ns.list | tojson(indent=1000000000000) }}"),
        ] {
            let message = doubled(step, end);
            assert!(message.contains("or 256 MiB of text"), "{step}{end}: {message}");
        }
        let deep = "{% for a in range(9) %}{% set ns.list = [[[[[[[ns.list]]]]]]] %}{% endfor %}";
        let message = doubled(deep, "{{ ns.list | tojson }}");
        assert!(message.contains("more than 500 lists"), "{message}");
    }

    #[test]
    fn files_are_found_beside_the_recipe() {
        let folder = tempfile::tempdir().unwrap();
        fs_err::write(folder.path().join("own.jinja"), "{{ messages[0].content }}").unwrap();
        let template = ChatTemplate::resolve("own.jinja", folder.path()).unwrap();
        let rendered = template.render(&[Message::user("<&>")], false, "", "").unwrap();
        assert_eq!(rendered, "<&>");
        assert!(matches!(
            ChatTemplate::resolve("other.jinja", folder.path()),
            Err(Error::Io(error)) if error.to_string().contains("other.jinja")
        ));
        assert!(matches!(
            ChatTemplate::resolve("lama3.1", folder.path()),
            Err(Error::UnknownTemplate { message }) if message.contains("`llama3`")
        ));
    }

    #[test]
    fn generation_marks_keep_their_whitespace_control() {
        assert_eq!(
            without_generation_marks("a {%- generation %}b{% endgeneration -%} {% if x %}"),
            "a {%- if true %}b{% endif -%} {% if x %}"
        );
        assert_eq!(without_generation_marks("{% generation"), "{% generation");
    }
}
