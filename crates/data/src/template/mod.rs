//! Chat templates: jinja as Hugging Face renders it.
//!
//! A template sees `messages` (each with `role`, `content` and what else the record says of the
//! turn), `tools`, `documents`, `add_generation_prompt`, `bos_token`, `eos_token`, and arguments of
//! its own such as `enable_thinking`. As in `transformers`: `trim_blocks` and `lstrip_blocks` are on,
//! `break` and `continue` work, Python's string, list and dict methods work, `raise_exception(text)`
//! refuses a conversation, `strftime_now(format)` writes the date, `tojson` writes JSON without HTML
//! escapes, `{% generation %}` marks are ignored, and values print as Python prints them.

mod calls;
mod counted;
mod dialect;
mod environment;
mod filters;
mod methods;
mod text;
mod walk;
mod worker;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use dialect::{ITERATED, PERCENT};
use minijinja::value::Value;
use minijinja::{Environment, ErrorKind};
use serde_json::{Map, Value as Json};

use crate::config::THINKING;
use crate::error::{Error, Result};
use crate::record::Message;
use crate::suggest;

/// The templates that come with the crate: name and source.
const BUILTIN: &[(&str, &str)] = &[
    ("alpaca", include_str!("../../templates/alpaca.jinja")),
    ("chatml", include_str!("../../templates/chatml.jinja")),
    ("gemma", include_str!("../../templates/gemma.jinja")),
    ("llama2", include_str!("../../templates/llama2.jinja")),
    ("llama3", include_str!("../../templates/llama3.jinja")),
    ("mistral", include_str!("../../templates/mistral.jinja")),
    ("phi3", include_str!("../../templates/phi3.jinja")),
    ("plain", include_str!("../../templates/plain.jinja")),
    ("vicuna", include_str!("../../templates/vicuna.jinja")),
    ("zephyr", include_str!("../../templates/zephyr.jinja")),
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
    environment: Arc<Environment<'static>>,
    arguments: Map<String, Json>,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("name", &self.name)
            .field("source", &self.source)
            .field("arguments", &self.arguments)
            .finish_non_exhaustive()
    }
}

impl PartialEq for ChatTemplate {
    /// Templates are equal when their sources and arguments are; the name says only where one came
    /// from.
    fn eq(&self, other: &Self) -> bool {
        self.source == other.source && self.arguments == other.arguments
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
        let text = Arc::clone(&source);
        let read = move || {
            counted::check_source(&text)?;
            let whole = counted::rewrite(&dialect::translate(&text), environment::syntax()?)?;
            let mut environment = environment::build(now)?;
            environment.add_template_owned(ONLY, whole)?;
            Ok::<_, minijinja::Error>(environment)
        };
        let fault = |line, message| Error::TemplateSyntax { name: name.clone(), line, message };
        let environment = worker::run(read)
            .map_err(|failed| fault(None, failed.to_string()))?
            .map_err(|error| fault(error.line(), message(&error)))?;
        Ok(Self { name, source, environment: Arc::new(environment), arguments: Map::new() })
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
            let source = hydralora_files::read_to_string(&path)?;
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

    /// The same with these arguments, such as `enable_thinking`, over those it has; null takes one
    /// away. `transformers` takes them as further keywords of `apply_chat_template`.
    #[must_use]
    pub fn with_arguments(mut self, arguments: &Map<String, Json>) -> Self {
        for (name, value) in arguments {
            if value.is_null() {
                self.arguments.shift_remove(name);
            } else {
                self.arguments.insert(name.clone(), value.clone());
            }
        }
        self
    }

    /// The arguments that every rendering gets.
    pub fn arguments(&self) -> &Map<String, Json> {
        &self.arguments
    }

    /// Whether its source names this variable at all, so that giving it may change something.
    pub fn reads(&self, variable: &str) -> bool {
        let word = |c: char| c.is_alphanumeric() || c == '_';
        self.source.match_indices(variable).any(|(at, found)| {
            let (before, after) = (&self.source[..at], &self.source[at + found.len()..]);
            !before.ends_with(word) && !after.starts_with(word)
        })
    }

    /// The name of the argument that switches reasoning in this template; the usual one where it has
    /// none.
    pub fn thinking(&self) -> &'static str {
        THINKING.into_iter().find(|name| self.reads(name)).unwrap_or(THINKING[0])
    }

    /// Its source with its arguments in front, for programs that know of no arguments. One that is
    /// given at a rendering still goes before them.
    pub fn source_with_arguments(&self) -> String {
        let mut source = String::new();
        for (name, value) in &self.arguments {
            let value = literal(value);
            source.push_str(&format!(
                "{{%- if {name} is not defined %}}{{%- set {name} = {value} %}}{{%- endif %}}"
            ));
        }
        // A line break right behind a block counts as part of it.
        if !source.is_empty() && self.source.starts_with(['\n', '\r']) {
            source.push('\n');
        }
        source.push_str(&self.source);
        source
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
        self.render_with(messages, &Map::new(), add_generation_prompt, bos, eos)
    }

    /// [`ChatTemplate::render`] with variables of the record: `tools`, `documents`, and arguments
    /// that go before the template's own.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn render_with(
        &self,
        messages: &[Message],
        variables: &Map<String, Json>,
        add_generation_prompt: bool,
        bos: &str,
        eos: &str,
    ) -> Result<String> {
        let turn = |message: &Message| value_of(&message.to_json());
        let mut context: BTreeMap<&str, Value> = BTreeMap::from([
            ("bos_token", Value::from(bos)),
            ("eos_token", Value::from(eos)),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ]);
        for (name, value) in self.arguments.iter().chain(variables) {
            context.insert(name, value_of(value));
        }
        context.insert("messages", messages.iter().map(turn).collect::<Value>());
        context.insert("add_generation_prompt", Value::from(add_generation_prompt));
        let fault =
            |line, message| Error::TemplateRender { name: self.name.clone(), line, message };
        let context = Value::from_pairs(context);
        let environment = Arc::clone(&self.environment);
        worker::run(move || environment.get_template(ONLY)?.render(context))
            .map_err(|failed| fault(None, failed.to_string()))?
            .map_err(|error| fault(error.line(), message(&error)))
    }
}

/// A value of JSON as the engine holds it; maps keep their order.
fn value_of(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(value) => Value::from(*value),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(number), _) => Value::from(number),
            (None, Some(number)) => Value::from(number),
            (None, None) => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => items.iter().map(value_of).collect(),
        Json::Object(object) => {
            Value::from_pairs(object.iter().map(|(name, value)| (name.as_str(), value_of(value))))
        }
    }
}

/// A value of JSON as a template writes it.
fn literal(json: &Json) -> String {
    match json {
        Json::Null => "none".to_owned(),
        Json::Array(items) => {
            let items: Vec<String> = items.iter().map(literal).collect();
            format!("[{}]", items.join(", "))
        }
        Json::Object(object) => {
            let name = |name: &str| Json::from(name).to_string();
            let entries: Vec<String> = object
                .iter()
                .map(|(key, value)| format!("{}: {}", name(key), literal(value)))
                .collect();
            format!("{{{}}}", entries.join(", "))
        }
        plain => plain.to_string(),
    }
}

fn looks_like_file(name: &str) -> bool {
    let endings = [".jinja", ".jinja2", ".j2", ".txt"];
    name.contains(['/', '\\']) || endings.iter().any(|ending| name.ends_with(ending))
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

#[cfg(test)]
mod tests {
    use super::*;

    /// 2024-02-29 12:34:56 UTC.
    const NOW: i64 = 1_709_210_096;

    fn text(template: &str, messages: &[Message], generate: bool) -> Result<String> {
        ChatTemplate::from_source_at("test", template, 0)?.render(messages, generate, "<s>", "</s>")
    }

    #[test]
    fn arguments_written_into_the_source_say_the_same() {
        let body = "\n{{ enable_thinking }}|{{ words['a'][1] }}|{{ words.b is none }}|{{ quoted }}";
        let arguments = serde_json::json!({
            "enable_thinking": false, "words": {"a": [1, 2.5], "b": null}, "quoted": "\"ü'\n%}{{",
        });
        let plain = ChatTemplate::from_source_at("test", body, 0).unwrap();
        assert_eq!(plain.source_with_arguments(), body);
        let given = plain.with_arguments(arguments.as_object().unwrap());
        let expected = "\nFalse|2.5|True|\"ü'\n%}{{";
        assert_eq!(given.render(&[], false, "", "").unwrap(), expected);
        let written =
            ChatTemplate::from_source_at("test", given.source_with_arguments(), 0).unwrap();
        assert_eq!(written.render(&[], false, "", "").unwrap(), expected);
        let other = serde_json::json!({"enable_thinking": true});
        let other = written.with_arguments(other.as_object().unwrap());
        assert!(other.render(&[], false, "", "").unwrap().starts_with("\nTrue|"));
    }

    /// Compares with renderings of `transformers` in a folder with templates beside them and says how
    /// many there are.
    fn compare_folder(folder: &Path) -> usize {
        let text = fs_err::read_to_string(folder.join("renderings.json")).unwrap();
        let stored: serde_json::Value = serde_json::from_str(&text).unwrap();
        let mut templates = BTreeMap::new();
        let (mut faults, mut tried) = (Vec::new(), 0);
        for case in stored["cases"].as_array().unwrap() {
            let [name, conversation] = [&case[0], &case[1]].map(|v| v.as_str().unwrap());
            let template = templates.entry(name.to_owned()).or_insert_with(|| {
                let source = fs_err::read_to_string(folder.join(format!("{name}.jinja"))).unwrap();
                ChatTemplate::from_source_at(name, source, NOW).map_err(|error| error.to_string())
            });
            let arguments = case[2].as_object().unwrap();
            let data = &stored["conversations"][conversation];
            let messages: Vec<Message> =
                data["messages"].as_array().unwrap().iter().map(message_of).collect();
            let variables: Map<String, Json> = ["tools", "documents"]
                .into_iter()
                .filter_map(|key| Some((key.to_owned(), data.get(key)?.clone())))
                .collect();
            let rendered = template.clone().and_then(|template| {
                let template = template.with_arguments(arguments);
                let generate = case[3].as_bool().unwrap();
                let result = template.render_with(&messages, &variables, generate, "<s>", "</s>");
                result.map_err(|error| error.to_string())
            });
            tried += 1;
            let label = format!("{name}, {conversation}, {} {}", case[2], case[3]);
            match (case[4].as_str(), rendered) {
                (Some(expected), Ok(found)) if found == expected => {}
                (None, Err(_)) => {}
                (Some(expected), Ok(found)) => {
                    let same = expected.bytes().zip(found.bytes()).take_while(|(a, b)| a == b);
                    let at = expected.floor_char_boundary(same.count().saturating_sub(40));
                    let part = |text: &str| text[at..].chars().take(140).collect::<String>();
                    let (wanted, got) = (part(expected), part(&found));
                    faults.push(format!("{label}\n  expected {wanted:?}\n  found    {got:?}"));
                }
                (Some(_), Err(error)) => faults.push(format!("{label}\n  refused: {error}")),
                (None, Ok(_)) => faults.push(format!("{label}\n  was to be refused")),
            }
        }
        assert!(faults.is_empty(), "{} of {tried} differ:\n{}", faults.len(), faults.join("\n"));
        tried
    }

    /// Compares `cases` with what they render, where they see what `expressions.json` says.
    fn compare(cases: &[serde_json::Value]) {
        let text = include_str!("../../tests/fixtures/expressions.json");
        let stored: serde_json::Value = serde_json::from_str(text).unwrap();
        let turns = stored["conversation"]["messages"].as_array().unwrap();
        let messages: Vec<Message> = turns.iter().map(message_of).collect();
        let mut variables = stored["arguments"].as_object().unwrap().clone();
        variables.insert("tools".to_owned(), stored["conversation"]["tools"].clone());
        let mut faults = Vec::new();
        for case in cases {
            let source = case[0].as_str().unwrap();
            let rendered = ChatTemplate::from_source_at("test", source, NOW).and_then(|template| {
                template.render_with(&messages, &variables, false, "<s>", "</s>")
            });
            let found = rendered.as_ref().map(String::as_str).ok();
            if found != case[1].as_str() {
                let expected = &case[1];
                faults.push(format!("{source}\n  expected {expected}\n  found    {rendered:?}"));
            }
        }
        let tried = cases.len();
        assert!(faults.is_empty(), "{} of {tried} differ:\n{}", faults.len(), faults.join("\n"));
    }

    /// `tests/fixtures/expressions.py` says what made the expectations.
    #[test]
    fn expressions_give_what_python_gives() {
        let text = include_str!("../../tests/fixtures/expressions.json");
        let stored: serde_json::Value = serde_json::from_str(text).unwrap();
        let cases = stored["cases"].as_array().unwrap();
        compare(cases);
        assert!(cases.len() > 250);
    }

    /// `tests/fixtures/generated.py` says what made the expectations.
    #[test]
    fn generated_templates_give_what_python_gives() {
        let text = include_str!("../../tests/fixtures/generated.json");
        let cases: Vec<serde_json::Value> = serde_json::from_str(text).unwrap();
        compare(&cases);
        assert!(cases.len() > 1000);
    }

    fn message_of(turn: &serde_json::Value) -> Message {
        let turn = turn.as_object().unwrap();
        let content = turn.get("content").and_then(serde_json::Value::as_str);
        let mut message = Message::new(turn["role"].as_str().unwrap(), content.unwrap_or(""));
        let others = turn.iter().filter(|(name, _)| !["role", "content"].contains(&name.as_str()));
        message.fields = others.map(|(name, value)| (name.clone(), value.clone())).collect();
        if content.is_none() {
            message.fields.insert("content".to_owned(), serde_json::Value::Null);
        }
        message
    }

    /// Released models' templates are not part of the repository: `tests/fixtures/families/renderings.py`
    /// makes the renderings of a folder of them.
    #[test]
    fn templates_of_a_named_folder_render_as_in_transformers() {
        match std::env::var_os("HYDRALORA_TEMPLATES_DIR") {
            Some(folder) => assert!(compare_folder(Path::new(&folder)) > 0),
            None => hydralora_testing::skip(
                "templates",
                "HYDRALORA_TEMPLATES_DIR names no folder with renderings.json",
            ),
        }
    }

    #[test]
    fn arguments_switch_thinking() {
        let source = "{{ messages[0].content }}{% if enable_thinking is defined and not \
                      enable_thinking %} quickly{% endif %}{{ tools | length if tools else '' }}";
        let template = ChatTemplate::from_source("switch", source).unwrap();
        assert!(template.reads("enable_thinking") && !template.reads("thinking"));
        let render = |template: &ChatTemplate, variables: &Map<String, Json>| {
            template.render_with(&[Message::user("a")], variables, false, "", "").unwrap()
        };
        let off = serde_json::json!({"enable_thinking": false});
        let (off, none) = (off.as_object().unwrap(), Map::new());
        assert_eq!(render(&template, &none), "a");
        assert_eq!(render(&template, off), "a quickly");
        let quick = template.clone().with_arguments(off);
        assert_ne!(quick, template);
        assert_eq!(render(&quick, &none), "a quickly");
        let both = serde_json::json!({"enable_thinking": true, "tools": [{}]});
        assert_eq!(render(&quick, both.as_object().unwrap()), "a1");
        let away = serde_json::json!({"enable_thinking": null});
        assert_eq!(quick.with_arguments(away.as_object().unwrap()), template);
    }

    /// `tests/fixtures/templates.py` says what made the expectations.
    #[test]
    fn renderings_are_those_of_transformers() {
        let fixture = include_str!("../../tests/fixtures/templates.json");
        let cases: Vec<serde_json::Value> = serde_json::from_str(fixture).unwrap();
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
            ("{% set ns.it = ('\\n' * 100000) | indent(60000, true, true) | length %}", ""),
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
}
