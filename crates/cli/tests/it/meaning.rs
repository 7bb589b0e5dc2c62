//! What a record says is what is learned, and what is learned is what is asked: templates, their ends,
//! tool calls, reasoning, and notes on what was not done.

use crate::support::{Place, Ran, model};
use serde_json::{Value, json as value};
use std::fs;
use std::path::Path;

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// A recipe that learns `file` by heart on the model in the folder `base`.
fn recipe(base: &Path, file: &str, data: &str, train: &str) -> String {
    format!(
        "model: {{path: {}}}\ndata: {{train: [{{path: {file}}}], valid_fraction: 0, max_seq_len: 256{data}}}\n\
         method: {{name: lora, rank: 8, targets: all}}\n\
         train: {{batch_size: 4, eval_every: 0, save_every: 0, {train}}}\noutput: run\n",
        base.display()
    )
}

/// What `check` says of the records in `lines`, with `data` beside their file in the recipe.
fn checked(lines: &str, source: &str, data: &str) -> Ran {
    let place = Place::new();
    place.write("records.jsonl", lines);
    let file = format!("records.jsonl{source}");
    place.write("check.yaml", &recipe(&model(), &file, data, "epochs: 1"));
    place.run(&["check", "check.yaml"])
}

/// The record as `check` shows it, without the space that this tokenizer puts after special tokens.
fn shown(ran: &Ran) -> String {
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let text = ran.stdout.split_once("is trained):\n").unwrap().1.trim_end();
    text.replace("<s> ", "<s>").replace("</s> ", "</s>").replace("]] ", "]]")
}

#[test]
fn generation_scores_and_merged_models_stop_where_the_template_in_force_ends_an_answer() {
    let place = Place::new();
    let base = place.model_with_tokens("base", &["<|im_start|>", "<|im_end|>"]);
    let ends = r#"{"bos_token_id": 1, "eos_token_id": 2}"#;
    fs::write(base.join("generation_config.json"), ends).unwrap();
    place.write("hi.jsonl", &"{\"prompt\": \"say hi\", \"response\": \"Hi!\"}\n".repeat(16));
    place.write("one.jsonl", "{\"prompt\": \"say hi\", \"response\": \"Hi!\"}\n");
    let text = recipe(
        &base,
        "hi.jsonl",
        ", template: chatml",
        "epochs: 60, max_steps: 200, learning_rate: 0.02",
    );
    place.write("recipe.yaml", &text);
    place.succeed(&["train", "recipe.yaml", "--quiet"]);
    let metadata = json(&place.read("run/adapter/hydralora.json"));
    assert!(
        metadata["end_tokens"].as_array().unwrap().contains(&value!("<|im_end|>")),
        "{metadata}"
    );
    let stops = |model: &[&str]| {
        let asked = ["--prompt", "say hi", "--max-new-tokens", "30", "--json"];
        let ran = place.succeed(&[&["generate"], model, &asked].concat());
        let found = json(&ran.stdout);
        assert_eq!(found["text"], "Hi!", "{}", ran.stdout);
        assert_eq!(found["finish"], "stop", "{}", ran.stdout);
    };
    let adapted = ["--model", "base", "--adapter", "run/adapter"];
    stops(&adapted);
    let exact = |model: &[&str]| {
        let asked = ["--tasks", "exact:one.jsonl", "--json"];
        let ran = place.succeed(&[&["eval"], model, &asked].concat());
        let models = json(&ran.stdout)["models"].clone();
        let results = models.as_object().unwrap().values().next().unwrap()["results"].clone();
        assert_eq!(results["exact_one"]["exact_match,none"], 1.0, "{results}");
    };
    exact(&[&adapted[..], &["--skip-base"]].concat());
    for out in ["merged", "merged.gguf"] {
        let options = ["--out", out, "--dtype", "f32", "--quiet"];
        place.succeed(&[&["merge"], &adapted[..], &options].concat());
        stops(&["--model", out]);
        exact(&["--model", out]);
    }
    for file in ["config.json", "generation_config.json"] {
        let ends = &json(&place.read(&format!("merged/{file}")))["eos_token_id"];
        assert_eq!(ends, &value!([2, 513]), "{file}");
    }
    let gguf = hydralora_model::GgufFile::open(&place.path("merged.gguf")).unwrap();
    let token = |role: &str| gguf.u64(&format!("tokenizer.ggml.{role}_token_id")).unwrap();
    assert_eq!((token("eos"), token("eot")), (Some(2), Some(513)));
    // A merged model's own export says so again.
    let again = json(&place.read("merged/tokenizer_config.json"));
    assert_eq!(again["eos_token"], "</s>");
}

#[test]
fn a_template_of_another_model_is_refused_before_training() {
    let place = Place::new();
    for (template, token) in
        [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("gemma", "<end_of_turn>")]
    {
        let option = format!("data.template={template}");
        for command in ["check", "train"] {
            let ran = place.run(&[command, "recipe.yaml", "--set", &option]);
            assert_eq!(ran.code, Some(2), "{template}: {}", ran.stderr);
            assert!(
                ran.stderr.contains(token) && ran.stderr.contains("data.template"),
                "{}",
                ran.stderr
            );
        }
        assert!(!place.path("run").exists());
    }
    // A file of one's own can be looked at, but not trained with.
    let own = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}";
    place.write("own.jinja", own);
    let ran = place.succeed(&["check", "recipe.yaml", "--set", "data.template=own.jinja"]);
    assert!(ran.stdout.contains("cannot be trained with") && shown(&ran).contains("<|end|>]]"));
    let ran = place.run(&["train", "recipe.yaml", "--set", "data.template=own.jinja"]);
    assert!(ran.code == Some(2) && ran.stderr.contains("<|end|>"), "{}", ran.stderr);
    assert!(!place.path("run").exists());
    // Where an answer ends at a token, other missing ones are noted.
    let ran = place.succeed(&["check", "recipe.yaml", "--set", "data.template=zephyr"]);
    assert!(
        ran.stdout.contains("<|user|>") && ran.stdout.contains("vocabulary lacks"),
        "{}",
        ran.stdout
    );
    // Records without conversations need no template.
    place.write("texts.jsonl", "{\"text\": \"Once upon a time\"}\n{\"text\": \"The end\"}\n");
    place.write("texts.yaml", &recipe(&model(), "texts.jsonl", ", template: chatml", "epochs: 1"));
    place.succeed(&["check", "texts.yaml"]);
}

/// A PEFT adapter of this model without our own file, in the folder `adapter`.
fn foreign_adapter(place: &Place, method: &str) {
    place.succeed(&[
        "train",
        "recipe.yaml",
        "--quiet",
        "--set",
        method,
        "--set",
        "train.max_steps=2",
    ]);
    fs::rename(place.path("run/adapter"), place.path("adapter")).unwrap();
    fs::remove_file(place.path("adapter/hydralora.json")).unwrap();
    fs::remove_file(place.path("adapter/chat_template.jinja")).unwrap();
}

#[test]
fn an_adapter_s_own_template_counts_without_our_file() {
    const TEMPLATE: &str = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}\
        {% if add_generation_prompt %}[assistant] {% endif %}";
    let place = Place::new();
    foreign_adapter(&place, "method={name: lora, rank: 2, targets: qv}");
    let tiny = model().display().to_string();
    let ask = |base: &str| {
        let options = ["--adapter", "adapter", "--prompt", "hi", "--max-new-tokens", "1", "--json"];
        place.run(&[&["generate", "--model", base], &options[..]].concat())
    };
    assert_eq!(ask(&tiny).code, Some(2), "no template anywhere");
    place.model_with_tokens("base", &["<x>"]);
    place.write(
        "base/chat_template.jinja",
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}",
    );
    let prompt = |ran: &Ran| json(&ran.stdout)["prompt_tokens"].as_u64().unwrap();
    let listed = value!({"chat_template": [{"name": "default", "template": TEMPLATE}]}).to_string();
    for (file, text) in [("chat_template.jinja", TEMPLATE), ("tokenizer_config.json", &listed)] {
        place.write(&format!("adapter/{file}"), text);
        let ran = ask(&tiny);
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        assert!(!ran.stderr.contains("another chat template"), "{}", ran.stderr);
        let merged =
            ["merge", "--model", &tiny, "--adapter", "adapter", "--out", "merged", "--quiet"];
        place.succeed(&merged);
        assert_eq!(place.read("merged/chat_template.jinja"), TEMPLATE);
        fs::remove_dir_all(place.path("merged")).unwrap();
        let other = place.run(&[
            "generate",
            "--model",
            "base",
            "--adapter",
            "adapter",
            "--prompt",
            "hi",
            "--max-new-tokens",
            "1",
            "--json",
        ]);
        if other.code == Some(0) {
            assert_eq!(prompt(&other), prompt(&ran));
            assert!(other.stderr.contains("another chat template"), "{}", other.stderr);
        }
        fs::remove_file(place.path(&format!("adapter/{file}"))).unwrap();
    }
}

const TOOLS: &str = "{% if tools %}<tools>{{ tools | tojson }}</tools>\n{% endif %}{% for m in messages %}\
    <|{{ m.role }}|>{% if m.content %}{{ m.content }}{% endif %}{% for c in m.tool_calls or [] %}\
    <call>{{ c.function.name }} {{ c.function.arguments }}</call>{% endfor %}{{ eos_token }}\n{% endfor %}\
    {% if add_generation_prompt %}<|assistant|>{% endif %}";

#[test]
fn tool_calls_reach_the_template_from_every_dialect() {
    let place = Place::new();
    place.write("tools.jinja", TOOLS);
    let template = format!(", template: {}", place.path("tools.jinja").display());
    let call = r#""tool_calls": [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{\"a\": 1}"}}]"#;
    let older = r#""function_call": {"name": "look", "arguments": "{\"a\": 1}"}"#;
    let turns = |said: &str| {
        format!(
            "{{\"messages\": [{{\"role\": \"user\", \"content\": \"Look\"}}, {{\"role\": \"assistant\", {said}}}, \
             {{\"role\": \"tool\", \"tool_call_id\": \"c1\", \"content\": \"21\"}}, \
             {{\"role\": \"assistant\", \"content\": \"Done\"}}], \"tools\": \"[{{\\\"name\\\": \\\"look\\\"}}]\"}}\n"
        )
    };
    let share = r#"{"conversations": [{"from": "human", "value": "Look"}, {"from": "function_call", "value": "{\"name\": \"look\", \"arguments\": \"{\\\"a\\\": 1}\"}"}, {"from": "observation", "value": "21"}, {"from": "gpt", "value": "Done"}], "tools": "[{\"name\": \"look\"}]"}"#;
    for (record, text) in [
        (turns(&format!("\"content\": \"So:\", {call}")), "So:"),
        (turns(&format!("\"content\": \"\", {call}")), ""),
        (turns(&format!("\"content\": null, {call}")), ""),
        (turns(&format!("\"content\": null, {older}")), ""),
        (share.to_owned(), ""),
    ] {
        let ran = checked(&record, "", &template);
        let expected = format!(
            "<s><tools>[{{\"name\": \"look\"}}]</tools>\n<|user|>Look</s>\n\
             <|assistant|>[[{text}<call>look {{\"a\": 1}}</call></s>]]\n<|tool|>21</s>\n\
             <|assistant|>[[Done</s>]]"
        );
        assert_eq!(shown(&ran), expected, "{record}");
        assert!(!ran.stdout.contains("not used"), "{}", ran.stdout);
    }
    // A template without a place for them trains no silence, and says what is lost.
    let ran = checked(&turns(&format!("\"content\": null, {call}")), "", ", template: plain");
    let lost = "does not write: tool_calls (1), tools (1)";
    assert!(ran.stdout.contains(lost), "{}{}", ran.stdout, ran.stderr);
    assert_eq!(shown(&ran).matches("[[").count(), 1, "{}", ran.stdout);
}

#[test]
fn reasoning_weights_history_and_lost_fields() {
    let place = Place::new();
    let thinking = "{% for m in messages %}<|{{ m.role }}|>{% if m.reasoning_content %}<think>\
        {{ m.reasoning_content }}</think>{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}\
        {% if add_generation_prompt %}<|assistant|>{% endif %}";
    place.write("thinking.jinja", thinking);
    let template = format!(", template: {}", place.path("thinking.jinja").display());
    for record in [
        r#"{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "reasoning_content": "so", "content": "a"}]}"#,
        r#"{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "thinking": "so", "content": "a"}]}"#,
        r#"{"prompt": "q", "thinking": "so", "response": "a"}"#,
        r#"{"instruction": "q", "reasoning": "so", "output": "a"}"#,
        r#"{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "reasoning": "so", "value": "a"}]}"#,
    ] {
        let ran = checked(record, "", &template);
        assert_eq!(
            shown(&ran),
            "<s><|user|>q</s><|assistant|>[[<think>so</think>a</s>]]",
            "{record}"
        );
    }
    let plain = ", template: plain";
    let unwanted = r#"{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}, {"role": "user", "content": "r"}, {"role": "assistant", "content": "b", "weight": 1}]}"#;
    assert_eq!(shown(&checked(unwanted, "", plain)), "<s>q\na</s>\nr\n[[b</s>]]");
    let history = r#"{"instruction": "r", "input": "", "output": "b", "history": [["q", "a"]], "system": ""}"#;
    assert_eq!(shown(&checked(history, "", plain)), "<s>q\n[[a</s>]]\nr\n[[b</s>]]");
    let last = checked(history, "", ", template: plain, turns: last");
    assert_eq!(shown(&last), "<s>q\na</s>\nr\n[[b</s>]]");
    let more = r#"{"id": 1, "source": "x", "prompt": "q", "response": "a", "hint": "h"}"#;
    let ran = checked(more, "", plain);
    assert!(ran.stdout.contains("fields that are not used: hint (1)"), "{}", ran.stdout);
    assert!(!ran.stdout.contains("source (1)"), "{}", ran.stdout);
    let pair = r#"{"prompt": "q", "chosen": "a", "rejected": "b"}"#;
    let ran = checked(pair, "", plain);
    assert!(ran.code == Some(2) && ran.stderr.contains("preference data"), "{}", ran.stderr);
    let ran = checked(pair, ", fields: {response: chosen}", plain);
    assert_eq!(shown(&ran), "<s>q\n[[a</s>]]");
    let odd = r#"{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0.5}]}"#;
    let ran = checked(odd, "", plain);
    assert!(ran.code == Some(2) && ran.stderr.contains("messages[1].weight"), "{}", ran.stderr);
}

#[test]
fn brackets_stand_around_each_answer() {
    let record = r#"{"messages": [{"role": "user", "content": "ONE"}, {"role": "assistant", "content": "first"}, {"role": "user", "content": "TWO"}, {"role": "assistant", "content": "second"}, {"role": "user", "content": "THREE"}]}"#;
    let ran = checked(record, "", ", template: plain");
    assert_eq!(shown(&ran), "<s>ONE\n[[first</s>]]\nTWO\n[[second</s>]]\nTHREE");
}

#[test]
fn a_folder_of_splits_trains_on_its_training_files() {
    let place = Place::new();
    for split in ["train", "valid", "test"] {
        place.write(
            &format!("data/{split}.jsonl"),
            &format!("{{\"prompt\": \"{split} q\", \"completion\": \" a\"}}\n"),
        );
    }
    place.write("check.yaml", &recipe(&model(), "data", "", "epochs: 1"));
    let ran = place.succeed(&["check", "check.yaml"]);
    assert!(shown(&ran).contains("train q"), "{}", ran.stdout);
    assert!(ran.stdout.contains("train: 1 example,"), "{}", ran.stdout);
    assert!(ran.stdout.contains("test.jsonl, valid.jsonl left out"), "{}", ran.stdout);
    let both = recipe(&model(), "data", ", valid: [{path: data}]", "epochs: 1");
    place.write("check.yaml", &both);
    let ran = place.succeed(&["check", "check.yaml", "--json"]);
    let sources = &json(&ran.stdout)["data"]["sources"];
    assert!(sources[1]["files"][0]["path"].as_str().unwrap().ends_with("valid.jsonl"), "{sources}");
}

#[test]
fn one_step_trains_and_warming_up_all_the_time_is_a_fault() {
    let place = Place::new();
    let one = ["--set", "train.max_steps=1", "--set", "train.eval_every=0", "--quiet"];
    place.succeed(&[&["train", "recipe.yaml"][..], &one].concat());
    let metrics = place.read("run/metrics.jsonl");
    let step = metrics.lines().find(|line| line.contains("learning_rate")).unwrap();
    assert_eq!(json(step)["learning_rate"], 0.01, "{step}");
    let tiny = model().display().to_string();
    let ask = [
        "generate",
        "--model",
        &tiny,
        "--raw",
        "--prompt",
        "a",
        "--max-new-tokens",
        "1",
        "--adapter",
    ];
    let ran = place.succeed(&[&ask[..], &["run/adapter"]].concat());
    assert!(!ran.stderr.contains("changes nothing"), "{}", ran.stderr);
    for command in ["check", "train"] {
        let ran = place.run(&[
            command,
            "recipe.yaml",
            "--set",
            "train.warmup_steps=20",
            "--set",
            "output=other",
        ]);
        assert_eq!(ran.code, Some(2), "{}", ran.stderr);
        assert!(ran.stderr.contains("train.warmup_steps: is 20"), "{}", ran.stderr);
    }
}

#[test]
fn an_adapter_of_zeros_is_noted() {
    let place = Place::new();
    foreign_adapter(&place, "method={name: lora, rank: 2, targets: qv}");
    let path = place.path("adapter/adapter_model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let zeros = |name: &str, data: &[u8]| {
        if name.contains("lora_B") { vec![0; data.len()] } else { data.to_vec() }
    };
    let emptied: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .tensors()
        .into_iter()
        .map(|(name, view)| (name.clone(), view.shape().to_vec(), zeros(&name, view.data())))
        .collect();
    let views = emptied.iter().map(|(name, shape, data)| {
        let view =
            safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), data);
        (name, view.unwrap())
    });
    fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
    let tiny = model().display().to_string();
    let both = ["--model", &tiny, "--adapter", "adapter"];
    for arguments in [
        &["generate", "--raw", "--prompt", "a", "--max-new-tokens", "1"][..],
        &["merge", "--out", "merged"],
        &["inspect"],
        &["eval", "--tasks", "loss:texts.jsonl"],
    ] {
        place.write("texts.jsonl", "{\"text\": \"Once upon a time\"}\n");
        let ran = place.succeed(&[arguments, &both].concat());
        assert!((ran.stderr + &ran.stdout).contains("changes nothing"), "{arguments:?}");
    }
}

#[test]
fn the_best_adapter_is_named_where_the_last_is_worse() {
    let place = Place::new();
    let records: String = (1..=24)
        .map(|i| format!("{{\"prompt\": \"q{i}\", \"response\": \"cat cat {i}\"}}\n"))
        .collect();
    place.write("cats.jsonl", &records);
    let text = recipe(
        &model(),
        "cats.jsonl",
        ", template: plain",
        "epochs: 20, learning_rate: 0.3, early_stopping_patience: 2",
    );
    let text = text.replace("valid_fraction: 0,", "valid_fraction: 0.2,");
    place.write("recipe.yaml", &text.replace("eval_every: 0", "eval_every: 1"));
    let ran = place.succeed(&["train", "recipe.yaml"]);
    let metrics = place.read("run/metrics.jsonl");
    let losses: Vec<f64> =
        metrics.lines().filter_map(|line| json(line)["valid_loss"].as_f64()).collect();
    let best = losses.iter().copied().fold(f64::INFINITY, f64::min);
    assert!(best < *losses.last().unwrap(), "{losses:?}");
    assert!(ran.stdout.contains(&format!("run/best: held-out loss {best:.4}")), "{}", ran.stdout);
}

#[test]
fn a_prompt_that_ends_in_a_space_is_trained_as_it_is_asked() {
    let place = Place::new();
    let base = place.model_with_tokens("base", &["<|endoftext|>"]);
    let config = place.read("base/tokenizer_config.json").replace("</s>", "<|endoftext|>");
    place.write("base/tokenizer_config.json", &config);
    let records = "{\"prompt\": \"Color of sky: \", \"completion\": \"blue\"}\n\
                   {\"prompt\": \"Color of fire: \", \"completion\": \"red\"}\n";
    place.write("all.jsonl", &records.repeat(8));
    place.write("two.jsonl", records);
    place.write(
        "recipe.yaml",
        &recipe(&base, "all.jsonl", "", "epochs: 150, learning_rate: 5.0e-3"),
    );
    place.succeed(&["train", "recipe.yaml", "--quiet"]);
    let tiny = base.display().to_string();
    let ran = place.succeed(&[
        "eval",
        "--model",
        &tiny,
        "--adapter",
        "run/adapter",
        "--skip-base",
        "--tasks",
        "exact:two.jsonl",
        "--json",
    ]);
    let results = &json(&ran.stdout)["models"]["run"]["results"];
    assert_eq!(results["exact_two"]["exact_match,none"], 1.0, "{results}");
}

#[test]
fn a_refused_resume_names_what_changed() {
    let place = Place::new();
    place.succeed(&["train", "recipe.yaml", "--quiet", "--set", "train.max_steps=4"]);
    for (value, expected) in [
        ("train.learning_rate=0.02", "train.learning_rate was 0.01 and is 0.02 now"),
        ("data.max_seq_len=64", "data.max_seq_len was 128 and is 64 now"),
    ] {
        // The refusal is about the run as it began, whatever was tried since.
        let recipe = place.read("run/recipe.yaml");
        let ran = place.run(&[
            "train",
            "recipe.yaml",
            "--resume",
            "--set",
            "train.max_steps=4",
            "--set",
            value,
        ]);
        assert_eq!(ran.code, Some(2), "{}", ran.stderr);
        assert!(ran.stderr.contains(expected), "{}", ran.stderr);
        place.write("run/recipe.yaml", &recipe);
    }
    let colours = place.read("colours.jsonl").replace("blue", "grey");
    place.write("colours.jsonl", &colours);
    let ran = place.run(&["train", "recipe.yaml", "--resume", "--set", "train.max_steps=4"]);
    assert!(
        ran.code == Some(2) && ran.stderr.contains("training data are others"),
        "{}",
        ran.stderr
    );
}

#[test]
fn a_head_of_its_own_counts_whatever_the_flag_says() {
    let place = Place::new();
    let folder = place.model_with_tokens("headed", &["<x>"]);
    let path = folder.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let stored = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = stored
        .tensors()
        .into_iter()
        .map(|(name, view)| (name, view.shape().to_vec(), view.data().to_vec()))
        .collect();
    let (_, shape, data) =
        tensors.iter().find(|(name, ..)| name == "model.embed_tokens.weight").unwrap();
    let head = |sign: f32| -> Vec<u8> {
        let numbers = data.chunks_exact(4).map(|four| f32::from_le_bytes(four.try_into().unwrap()));
        numbers.flat_map(|number| (sign * number).to_le_bytes()).collect()
    };
    let (shape, heads) = (shape.clone(), [head(1.0), head(-1.0)]);
    let logits = |model: &str| -> Vec<f64> {
        let ran = place.succeed(&["inspect", "--model", model, "--logits", "Once upon", "--json"]);
        let last = json(&ran.stdout)["logits"]["last"].clone();
        last.as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).collect()
    };
    let tied = logits("headed");
    for (sign, head) in [1.0, -1.0].into_iter().zip(heads) {
        tensors.retain(|(name, ..)| name != "lm_head.weight");
        tensors.push(("lm_head.weight".to_owned(), shape.clone(), head));
        let views = tensors.iter().map(|(name, shape, data)| {
            let view =
                safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), data);
            (name, view.unwrap())
        });
        fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
        let found = logits("headed");
        let close = |(a, b): (&f64, &f64)| (sign * a - b).abs() < 1e-4;
        assert!(tied.iter().zip(&found).all(close), "{sign}");
        // What is written keeps it.
        if place.path("adapter").exists() {
            fs::remove_dir_all(place.path("adapter")).unwrap();
            fs::remove_dir_all(place.path("run")).unwrap();
        }
        let base = format!("model.path={}", place.path("headed").display());
        place.succeed(&[
            "train",
            "recipe.yaml",
            "--quiet",
            "--set",
            &base,
            "--set",
            "train.max_steps=1",
            "--set",
            "method={name: lora, rank: 2, targets: qv}",
            "--set",
            "train.learning_rate=1.0e-9",
        ]);
        fs::rename(place.path("run/adapter"), place.path("adapter")).unwrap();
        for out in ["merged", "merged.gguf"] {
            let merge = [
                "merge",
                "--model",
                "headed",
                "--adapter",
                "adapter",
                "--out",
                out,
                "--dtype",
                "f32",
            ];
            place.succeed(&merge);
            let close = |(a, b): (&f64, &f64)| (a - b).abs() < 1e-3;
            assert!(found.iter().zip(&logits(out)).all(close), "{out} {sign}");
        }
        fs::remove_dir_all(place.path("merged")).unwrap();
        fs::remove_file(place.path("merged.gguf")).unwrap();
    }
}

#[test]
fn files_that_were_not_downloaded_are_called_so() {
    let place = Place::new();
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n";
    place.model_with_tokens("base", &["<x>"]);
    place.write("model.gguf", pointer);
    let adapter = ["--adapter", "adapter"];
    foreign_adapter(&place, "method={name: lora, rank: 2, targets: qv}");
    place.write("adapter/adapter_model.safetensors", pointer);
    let tiny = model().display().to_string();
    let ask = |model: &str, more: &[&str]| {
        let options = ["--raw", "--prompt", "a", "--max-new-tokens", "1"];
        let ran = place.run(&[&["generate", "--model", model], &options[..], more].concat());
        assert_eq!(ran.code, Some(2), "{}", ran.stderr);
        assert!(ran.stderr.contains("Git LFS pointer"), "{}", ran.stderr);
    };
    ask("model.gguf", &[]);
    ask(&tiny, &adapter);
    for file in ["tokenizer.json", "model.safetensors"] {
        place.write(&format!("base/{file}"), pointer);
        ask("base", &[]);
    }
}

#[test]
fn completion_tasks_are_not_put_through_a_chat_template() {
    let place = Place::new();
    let base = place.model_with_tokens("base", &["<|im_start|>", "<|im_end|>"]);
    let template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
        {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    fs::write(base.join("chat_template.jinja"), template).unwrap();
    let data =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data/eval-sample").display().to_string();
    for task in ["humaneval", "mmlu_ppl"] {
        let ran = place.run(&[
            "eval",
            "--model",
            "base",
            "--tasks",
            task,
            "--data",
            &data,
            "--apply-chat-template",
            "--allow-code-execution",
            "--max-new-tokens",
            "4",
        ]);
        assert_eq!(ran.code, Some(2), "{task}: {}", ran.stderr);
        assert!(ran.stderr.contains("--apply-chat-template"), "{}", ran.stderr);
    }
}

#[test]
fn special_tokens_in_texts_are_counted() {
    let record =
        r#"{"prompt": "How do I strike?", "response": "Put <s> and </s> around it: <s>old</s>."}"#;
    let ran = checked(record, "", ", template: plain");
    assert!(ran.stdout.contains("1 record(s) write out 4 special token(s)"), "{}", ran.stdout);
    let ran = checked(record, "", ", template: plain, special_tokens: text");
    let text = "[[Put <s> and </s> around it: <s>old</s>.</s>]]";
    assert!(ran.stdout.contains(text) && ran.stdout.contains("kept text"), "{}", ran.stdout);
    let ran = checked(r#"{"prompt": "a < b?", "response": "<b>"}"#, "", ", template: plain");
    assert!(!ran.stdout.contains("special token"), "{}", ran.stdout);
}
