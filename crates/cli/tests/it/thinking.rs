//! The switch between reasoning and not, and other arguments of chat templates.

use crate::support::{Place, Ran, model};
use serde_json::{Value, json as value};

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// A template whose prompts are longer without reasoning.
const TEMPLATE: &str = "\
{%- if SWITCH is defined and not SWITCH %}{{ word | default('Be quick.') }} {% endif %}
{%- for message in messages %}{{ message.content }}
{%- if message.role == 'assistant' %}{{ eos_token }}{% else %} {% endif %}{% endfor %}";

/// An adapter that is trained without reasoning, by a template that calls the switch `name`.
fn trained(name: &str) -> Place {
    let place = Place::new();
    place.write("switch.jinja", &TEMPLATE.replace("SWITCH", name));
    let set = ["data.template=switch.jinja", "data.thinking=false", "train.max_steps=2"];
    let mut arguments = vec!["train", "recipe.yaml", "--quiet"];
    arguments.extend(set.iter().flat_map(|change| ["--set", change]));
    place.succeed(&arguments);
    place
}

fn generate(place: &Place, model: &str, more: &[&str]) -> Ran {
    let start = ["generate", "--model", model, "--prompt", "Sky 3?", "--json"];
    place.run(&[&start[..], &["--max-new-tokens", "1"], more].concat())
}

/// How many tokens a prompt has.
fn prompt(place: &Place, model: &str, more: &[&str]) -> u64 {
    let ran = generate(place, model, more);
    assert_eq!(ran.code, Some(0), "{more:?}\n{}", ran.stderr);
    json(&ran.stdout)["prompt_tokens"].as_u64().unwrap()
}

#[test]
fn the_command_line_goes_before_the_adapter_and_the_adapter_before_nothing() {
    let model = model().display().to_string();
    for name in ["enable_thinking", "thinking"] {
        let place = trained(name);
        let saved = json(&place.read("run/adapter/hydralora.json"));
        assert_eq!(saved["template_arguments"], value!({name: false}));
        let adapter = ["--adapter", "run/adapter"];
        let with = |more: &[&str]| prompt(&place, &model, &[&adapter[..], more].concat());
        let off = with(&[]);
        let on = with(&["--thinking", "on"]);
        assert!(off > on, "{off} {on}");
        assert_eq!(with(&["--thinking", "off"]), off);
        assert_eq!(with(&["--template-arg", &format!("{name}=true")]), on);
        assert_eq!(with(&["--template-arg", &format!("{name}=null")]), on);
        assert!(with(&["--template-arg", "word=Answer in a word and no more."]) > off);
    }
}

#[test]
fn arguments_that_make_no_sense_are_refused_or_noted() {
    let (place, model) = (trained("enable_thinking"), model().display().to_string());
    let with = |more: &[&str]| {
        let arguments = [&["--adapter", "run/adapter"][..], more].concat();
        let ran = generate(&place, &model, &arguments);
        (ran.code, ran.stderr)
    };
    let refused = |more: &[&str], says: &str| {
        let (code, stderr) = with(more);
        assert_eq!(code, Some(2), "{more:?}\n{stderr}");
        assert!(stderr.contains(says), "{more:?}\n{stderr}");
    };
    refused(&["--thinking", "on", "--template-arg", "thinking=true"], "--thinking: --template-arg");
    refused(&["--raw", "--thinking", "on"], "which --raw leaves out");
    refused(&["--template-arg", "word"], "expected KEY=VALUE");
    refused(&["--template-arg", "a b=1"], "is no name");
    refused(&["--template-arg", "messages=[]"], "comes from the conversation");
    refused(&["--thinking", "maybe"], "maybe");
    let (code, stderr) = with(&["--template-arg", "colour=blue"]);
    assert_eq!(code, Some(0));
    assert!(stderr.contains("does not use `colour`"), "{stderr}");
    let chat = ["chat", "--model", &model, "--adapter", "run/adapter", "--max-new-tokens", "1"];
    let chat = [&chat[..], &["--thinking", "on", "--template-arg", "colour=blue"]].concat();
    let ran = place.run_with_input(&chat, "Sky 3?\n/quit\n");
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(ran.stderr.contains("does not use `colour`"), "{}", ran.stderr);
    let eval = ["eval", "--model", &model, "--tasks", "loss:animals.jsonl", "--thinking", "on"];
    let ran = place.run(&eval);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    assert!(ran.stderr.contains("the model has none"), "{}", ran.stderr);
}

#[test]
fn merged_models_and_other_forms_keep_them() {
    let (place, model) = (trained("enable_thinking"), model().display().to_string());
    let off = prompt(&place, &model, &["--adapter", "run/adapter"]);
    let on = prompt(&place, &model, &["--adapter", "run/adapter", "--thinking", "on"]);
    for out in ["merged", "merged.gguf"] {
        let merge = ["merge", "--model", &model, "--adapter", "run/adapter", "--gate", "uniform"];
        place.succeed(&[&merge[..], &["--out", out]].concat());
        assert_eq!(prompt(&place, out, &[]), off, "{out}");
        assert_eq!(prompt(&place, out, &["--thinking", "on"]), on, "{out}");
    }
    let written = place.read("merged/chat_template.jinja");
    assert!(written.starts_with("{%- if enable_thinking is not defined %}"), "{written}");

    let export = ["export", "--adapter", "run/adapter", "--model", &model, "--gate", "uniform"];
    place.succeed(&[&export[..], &["--as", "lora", "--out", "lora"]].concat());
    assert_eq!(prompt(&place, &model, &["--adapter", "lora"]), off);
    let import = ["import", "lora", "lora", "--from", "lora", "--model", &model];
    place.succeed(&[&import[..], &["--out", "imported"]].concat());
    assert_eq!(prompt(&place, &model, &["--adapter", "imported"]), off);
    let ran = place.succeed(&[&export[..], &["--as", "lora-gguf", "--out", "lora.gguf"]].concat());
    assert!(ran.stderr.contains(r#"{"enable_thinking":false}"#), "{}", ran.stderr);
}

#[test]
fn evaluations_ask_with_them_and_say_so() {
    let (place, model) = (trained("enable_thinking"), model().display().to_string());
    place.write("sky.jsonl", "{\"instruction\": \"Sky 3?\", \"output\": \"The sky is blue.\"}\n");
    let start = ["eval", "--model", &model, "--adapter", "run/adapter", "--skip-base", "--json"];
    let start = [&start[..], &["--tasks", "exact:sky.jsonl", "--apply-chat-template"]].concat();
    let config = |more: &[&str]| {
        let ran = place.succeed(&[&start[..], &["--max-new-tokens", "2"], more].concat());
        json(&ran.stdout)["models"]["run"]["config"].to_string()
    };
    assert!(config(&[]).contains(r#""template_arguments":{"enable_thinking":false}"#));
    assert!(config(&["--thinking", "on"]).contains(r#"{"enable_thinking":true}"#));
}
