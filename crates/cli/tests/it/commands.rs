//! Each command once, from a recipe to text.

use crate::support::{Place, model};
use serde_json::Value;

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn a_recipe_becomes_an_adapter_a_report_and_better_answers() {
    let place = Place::new();
    let ran = place.succeed(&["train", "recipe.yaml", "--json"]);
    let result = json(&ran.stdout);
    assert_eq!(result["ending"], "finished");
    let domains = |side: &str| result[side]["domains"].as_array().unwrap().clone();
    for (before, after) in domains("baseline").iter().zip(domains("evaluation")) {
        let (before, after) = (before["loss"].as_f64().unwrap(), after["loss"].as_f64().unwrap());
        assert!(after < before, "held-out loss {before} -> {after}");
    }
    let files = [
        "recipe.yaml",
        "metrics.jsonl",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/hydralora.json",
        "best/adapter_model.safetensors",
        "checkpoints/step-000020/state.json",
        "report.html",
        "routing.json",
        "data.json",
    ];
    for file in files {
        assert!(place.path("run").join(file).exists(), "{file} is missing");
    }
    let rows: Vec<Value> = place.read("run/metrics.jsonl").lines().map(json).collect();
    assert_eq!(rows.iter().filter(|row| row.get("loss").is_some()).count(), 20);
    assert_eq!(rows.iter().filter(|row| row.get("valid_loss").is_some()).count(), 2);
    let checkpoints = std::fs::read_dir(place.path("run/checkpoints")).unwrap().count();
    assert_eq!(checkpoints, 2, "the last two are kept");
    let events = std::fs::read_dir(place.path("run/tensorboard")).unwrap().count();
    assert_eq!(events, 1);
    assert!(place.read("run/report.html").contains("Routing"));

    // The resolved recipe is a recipe, from wherever it is read.
    place.succeed(&["check", "run/recipe.yaml"]);

    let model = model().display().to_string();
    let generate = |adapter: &[&str]| {
        let mut arguments = vec!["generate", "--model", &model, "--prompt", "Sky 3?", "--json"];
        arguments.extend(["--max-new-tokens", "12"]);
        arguments.extend(adapter);
        json(&place.succeed(&arguments).stdout)["text"].as_str().unwrap().to_owned()
    };
    assert_ne!(generate(&["--adapter", "run/adapter"]), generate(&["--raw"]));

    let inspected =
        place.succeed(&["inspect", "--model", &model, "--adapter", "run/adapter", "--json"]);
    let inspected = json(&inspected.stdout);
    let parameters = &inspected["adapter"]["parameters"];
    // 5 layers of gate and up (64 → 172) and down (172 → 64), rank 2, 3 experts.
    assert_eq!(parameters["a"], 5 * 2 * (64 + 64 + 172));
    assert_eq!(parameters["b"], 5 * 6 * (172 + 172 + 64));
    assert_eq!(parameters["router"], 5 * 3 * (64 + 64 + 172));
    assert_eq!(inspected["model"]["parameters"], 260_032);
}

#[test]
fn full_fine_tuning_leaves_a_model() {
    let place = Place::new();
    let method = "method={name: full}";
    let checked = place.succeed(&["check", "recipe.yaml", "--set", method]);
    assert!(checked.stdout.contains("260,032 trainable (100.000 % of all)"), "{}", checked.stdout);
    let set = [method, "train.learning_rate=1e-3", "train.gradient_checkpointing=true"];
    let mut arguments = vec!["train", "recipe.yaml", "--json"];
    arguments.extend(set.iter().flat_map(|change| ["--set", change]));
    let result = json(&place.succeed(&arguments).stdout);
    let after = result["evaluation"]["loss"].as_f64().unwrap();
    assert!(after < result["baseline"]["loss"].as_f64().unwrap());
    for file in ["config.json", "tokenizer.json", "model.safetensors", "hydralora.json"] {
        assert!(place.path("run/adapter").join(file).exists(), "{file} is missing");
    }
    let base = model().display().to_string();
    let generate = |model: &str| {
        let arguments = ["generate", "--model", model, "--prompt", "Sky 3?", "--raw", "--json"];
        json(&place.succeed(&arguments).stdout)["text"].as_str().unwrap().to_owned()
    };
    assert_ne!(generate("run/adapter"), generate(&base));

    // It is the base of the next run, with the loss it ended with.
    let set = ["model.path=run/adapter", "output=next", "train.max_steps=1"];
    let mut arguments = vec!["train", "recipe.yaml", "--json"];
    arguments.extend(set.iter().flat_map(|change| ["--set", change]));
    let next = json(&place.succeed(&arguments).stdout);
    assert_eq!(next["baseline"]["loss"].as_f64().unwrap(), after);

    let ran =
        place.run(&["generate", "--model", &base, "--adapter", "run/adapter", "--prompt", "a"]);
    assert_eq!(ran.code, Some(2));
    assert!(ran.stderr.contains("give it as the model"), "{}", ran.stderr);
}

#[test]
fn check_shows_the_plan_and_marks_what_is_trained() {
    let place = Place::new();
    let ran = place.succeed(&["check", "recipe.yaml"]);
    for part in ["trainable", "memory", "animals", "[[", "layers   15 of 35"] {
        assert!(ran.stdout.contains(part), "{part} is missing in\n{}", ran.stdout);
    }
    assert!(!place.path("run").exists(), "check writes nothing");
    let ran = place.succeed(&["check", "recipe.yaml", "--json", "--set", "method.rank=7"]);
    assert_eq!(json(&ran.stdout)["recipe"]["method"]["rank"], 7);
}

/// A recipe's line without the `#` before its option.
fn uncommented(line: &str) -> String {
    let option = line.trim_start().strip_prefix("# ").and_then(|rest| rest.split_once(": "));
    match option {
        Some((name, _))
            if name.chars().all(|c| c.is_ascii_lowercase() || "_0123456789".contains(c)) =>
        {
            line.replacen("# ", "", 1)
        }
        _ => line.to_owned(),
    }
}

#[test]
fn init_writes_recipes_that_pass_check() {
    let place = Place::new();
    let model = model().display().to_string();
    let schema = json(&place.succeed(&["schema"]).stdout);
    let methods = schema["properties"]["method"]["oneOf"].as_array().unwrap();
    for method in methods {
        let name = method["properties"]["name"]["const"].as_str().unwrap();
        let file = format!("{name}.yaml");
        let from = ["init", &file, "--method", name, "--model", &model, "--data", "animals.jsonl"];
        place.succeed(&from);
        let text = std::fs::read_to_string(place.path(&file)).unwrap();
        for (option, schema) in method["properties"].as_object().unwrap() {
            assert!(text.contains(&format!("{option}: ")), "{name}: {option} is missing");
            assert_ne!(schema["description"], serde_json::Value::Null, "{name}: {option}");
        }
        assert!(!text.lines().any(|line| line.trim() == "#"), "{text}");
        // What is shown as a default is one.
        let spelt_out: String = text.lines().map(|line| uncommented(line) + "\n").collect();
        place.write("whole.yaml", &spelt_out);
        let resolved = |file: &str| {
            let set = ["--set", "data.max_seq_len=256", "--set", "data.template=plain"];
            let arguments = [&["check", file, "--json"][..], &set].concat();
            json(&place.succeed(&arguments).stdout)["recipe"].clone()
        };
        assert_eq!(resolved(&file), resolved("whole.yaml"));
        let again = place.run(&from);
        assert_eq!(again.code, Some(2));
        assert!(again.stderr.contains("is there already"), "{}", again.stderr);
    }
    let ran = place.run(&["init", "x.yaml", "--method", "lroa"]);
    assert_eq!(ran.code, Some(2), "{}", ran.stderr);
    assert!(!place.path("x.yaml").exists());
}

#[test]
fn chat_remembers_and_starts_over() {
    let place = Place::new();
    place.succeed(&["train", "recipe.yaml", "--quiet"]);
    let model = model().display().to_string();
    let arguments = [
        "chat",
        "--model",
        &model,
        "--adapter",
        "run/adapter",
        "--max-new-tokens",
        "10",
        "--quiet",
    ];
    let ran = place.run_with_input(&arguments, "Sky 3?\n/new\nSky 3?\n/quit\nnever read\n");
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let answers: Vec<&str> = ran.stdout.lines().collect();
    assert_eq!(answers.len(), 2, "{}", ran.stdout);
    assert_eq!(answers[0], answers[1], "the same question afresh");
}

#[test]
fn the_guide_has_every_command() {
    let made = Place::new().succeed(&["reference"]).stdout;
    let guide = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/commands.md");
    let guide = std::fs::read_to_string(guide).unwrap();
    assert!(made == guide, "docs/commands.md is not what `hydralora reference` prints");
}

#[test]
fn chat_knows_its_commands() {
    let place = Place::new();
    let model = model().display().to_string();
    let arguments = ["chat", "--model", &model, "--max-new-tokens", "8", "--temperature", "2"];
    let ran = place.run_with_input(&arguments, "/nwe\n/retry\n//etc?\n/retry\n/help\n");
    assert_eq!(ran.code, Some(2), "stories260K has no chat template: {}", ran.stderr);
    place.succeed(&["train", "recipe.yaml", "--quiet"]);
    let arguments = [&arguments[..], &["--adapter", "run/adapter"]].concat();
    let ran = place.run_with_input(&arguments, "/nwe\n/retry\n//etc?\n/retry\n/help\n");
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(ran.stderr.contains("/nwe is no command"), "{}", ran.stderr);
    assert!(ran.stderr.contains("nothing to answer"), "{}", ran.stderr);
    assert_eq!(ran.stderr.matches("/quit    end").count(), 2, "{}", ran.stderr);
    let again = place.run_with_input(&arguments, "//etc?\n/retry\n");
    assert_eq!(ran.stdout, again.stdout, "only messages are answered");
    let first = place.run_with_input(&arguments, "//etc?\n");
    assert!(ran.stdout.starts_with(&first.stdout));
    assert_ne!(ran.stdout, first.stdout.repeat(2), "other draws");
}

#[test]
fn a_file_of_prompts_is_answered_line_by_line() {
    let place = Place::new();
    place.succeed(&["train", "recipe.yaml", "--quiet"]);
    let model = model().display().to_string();
    let base =
        ["generate", "--model", &model, "--adapter", "run/adapter", "--max-new-tokens", "12"];
    std::fs::write(place.path("p.txt"), "Sky 3?\n\nSea 4?\nSky 3?\n").unwrap();
    let records = concat!(
        r#"{"prompt": "Sky 3?"}"#,
        "\n",
        r#"{"messages": [{"role": "user", "content": "Sea 4?"}], "id": 7}"#,
        "\n"
    );
    std::fs::write(place.path("p.jsonl"), records).unwrap();
    let alone = |prompt: &str, more: &[&str]| {
        let arguments = [&base[..], &["--prompt", prompt, "--json"], more].concat();
        json(&place.succeed(&arguments).stdout)
    };
    let together = |file: &str, more: &[&str]| -> Vec<serde_json::Value> {
        let arguments = [&base[..], &["--prompts", file], more].concat();
        place.succeed(&arguments).stdout.lines().map(json).collect()
    };
    let (sky, sea) = (alone("Sky 3?", &[]), alone("Sea 4?", &[]));
    for (file, expected) in [("p.txt", vec![&sky, &sea, &sky]), ("p.jsonl", vec![&sky, &sea])] {
        let found = together(file, &[]);
        assert_eq!(found.len(), expected.len());
        for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
            assert_eq!(found["index"], index);
            for field in ["text", "finish", "prompt_tokens", "new_tokens"] {
                assert_eq!(found[field], expected[field], "{file} {index} {field}");
            }
        }
    }

    // A text to stop at ends each alike, and is left out.
    let text = sky["text"].as_str().unwrap();
    let stop: String = text.chars().skip(3).take(2).collect();
    let stopped = alone("Sky 3?", &["--stop", &stop]);
    assert_eq!(stopped["text"].as_str().unwrap(), text.split(&stop).next().unwrap());
    assert_eq!(stopped["finish"], "stop");
    assert_eq!(together("p.txt", &["--stop", &stop])[2]["text"], stopped["text"]);

    // Equal prompts get draws of their own, the same on every run.
    let drawn = together("p.txt", &["--temperature", "2"]);
    assert_ne!(drawn[0]["text"], drawn[2]["text"]);
    assert_eq!(drawn, together("p.txt", &["--temperature", "2"]));

    let piped = [&base[..], &["--prompt", "-", "--json"]].concat();
    assert_eq!(json(&place.run_with_input(&piped, "Sky 3?\n").stdout)["text"], sky["text"]);
    let shown = place.succeed(&[&base[..], &["--prompt", "Sky 3?"]].concat());
    assert!(shown.stderr.contains("tokens/s]"), "{}", shown.stderr);
    assert_ne!(alone("Sky 3?", &["--repetition-penalty", "3"])["text"], sky["text"]);
    // The answers repeat nothing that a penalty could be on; stories do.
    let told = |more: &[&str]| {
        let story =
            ["generate", "--model", &model, "--raw", "--prompt", "Once", "--max-new-tokens"];
        place.succeed(&[&story[..], &["40"], more].concat()).stdout
    };
    let story = told(&[]);
    for penalty in ["--frequency-penalty", "--presence-penalty"] {
        assert_ne!(told(&[penalty, "2"]), story);
        assert_eq!(told(&[penalty, "-0.0"]), story);
        assert_eq!(alone("Sky 3?", &[penalty, "2"])["text"], sky["text"]);
    }
    let longest = alone("Sky 3?", &["--stop", &stop, "--min-new-tokens", "8"]);
    assert!(longest["new_tokens"].as_u64().unwrap() >= 8, "{longest}");
}

#[test]
fn wrong_prompts_are_named() {
    let place = Place::new();
    let model = model().display().to_string();
    let long = format!("{}\n", "long ".repeat(600));
    for (name, content, more, expected) in [
        ("none.txt", &b"\n \n"[..], "--raw", "holds no prompt"),
        ("bytes.txt", b"a\nb\xe9\n", "--raw", "bytes.txt:2: not valid UTF-8"),
        (
            "field.jsonl",
            b"{\"prompt\": \"a\"}\n{\"text\": \"b\"}\n",
            "--raw",
            "field.jsonl:2: expected",
        ),
        ("both.jsonl", b"{\"prompt\": \"a\", \"messages\": []}\n", "--quiet", "both `prompt` and"),
        (
            "role.jsonl",
            b"{\"messages\": [{\"content\": \"a\"}]}\n",
            "--quiet",
            "missing field `role`",
        ),
        ("raw.jsonl", b"{\"messages\": []}\n", "--raw", "--raw leaves out"),
        ("long.txt", long.as_bytes(), "--raw", "the model's context holds 512"),
    ] {
        std::fs::write(place.path(name), content).unwrap();
        let ran = place.run(&["generate", "--model", &model, "--prompts", name, more]);
        assert_eq!(ran.code, Some(2), "{name}: {}", ran.stderr);
        assert!(ran.stderr.contains(expected), "{name}: {}", ran.stderr);
        assert_eq!(ran.stdout, "");
    }
    let prompt = ["generate", "--model", &model, "--raw", "--prompt"];
    for (more, expected) in [
        (&["a", "--stop", ""][..], "--stop: is empty"),
        (&["a", "--min-p", "2"], "--min-p: is 2; expected 0 to 1"),
        (&["a", "--repetition-penalty", "0"], "--repetition-penalty: is 0"),
        (&["a", "--frequency-penalty", "-3"], "--frequency-penalty: is -3; expected -2 to 2"),
        (&["a", "--min-new-tokens", "300"], "--min-new-tokens: is 300; expected at most"),
        (&["a", "--system", "b"], "--system: is for the chat template"),
        (&[""], "--prompt: is empty"),
    ] {
        let ran = place.run(&[&prompt[..], more].concat());
        assert_eq!(ran.code, Some(2), "{}", ran.stderr);
        assert!(ran.stderr.contains(expected), "{}", ran.stderr);
    }
    let ran = place.run_with_input(&[&prompt[..], &["-"]].concat(), "");
    assert_eq!(ran.code, Some(2));
}

#[test]
fn the_seed_decides_a_sampled_text() {
    let place = Place::new();
    let model = model().display().to_string();
    let text = |seed: &str| {
        let arguments = [
            "generate",
            "--model",
            &model,
            "--raw",
            "--prompt",
            "Once",
            "--seed",
            seed,
            "--temperature",
            "1.5",
            "--max-new-tokens",
            "20",
        ];
        place.succeed(&arguments).stdout
    };
    assert_eq!(text("1"), text("1"));
    assert_ne!(text("1"), text("2"));
}

#[test]
fn the_paper_table_has_the_paper_percentages() {
    let place = Place::new();
    let result = json(&place.succeed(&["inspect", "--table", "--json"]).stdout);
    let rows = result["table"].as_array().unwrap();
    assert_eq!(rows.len(), 13);
    for row in rows {
        let ours = if row.get("own").is_some() { &row["own"] } else { &row["qv"] };
        let paper = row["paper_percent"].as_str().unwrap();
        let paper = if paper.starts_with('.') { format!("0{paper}") } else { paper.to_owned() };
        assert_eq!(paper, ours["percent"].as_str().unwrap(), "{}", row["name"]);
    }
    // The only encoder that fits the paper's figure.
    assert_eq!(rows[1]["own"]["parameters"], 13_062_656);
    assert_eq!(rows[11]["qv"]["parameters"], 20 * 4_194_304);
    let hydra = &rows[9];
    assert_eq!(hydra["qv"]["parameters"], 8_388_608);
    assert_eq!(hydra["qv"]["router"], 786_432);
    assert_eq!(hydra["ffn"]["parameters"], 24_969_216);
}

#[test]
fn accumulated_micro_batches_are_one_batch() {
    let place = Place::new();
    let plain =
        ["--set", "method.dropout=0", "--set", "data.shuffle=false", "--set", "train.max_steps=4"];
    let losses = |output: &str, more: &[&str]| -> Vec<f64> {
        let output_option = format!("output={output}");
        let mut arguments = vec!["train", "recipe.yaml", "--quiet", "--set", &output_option];
        arguments.extend(plain);
        arguments.extend(more);
        place.succeed(&arguments);
        let metrics = place.read(&format!("{output}/metrics.jsonl"));
        metrics.lines().filter_map(|line| json(line)["loss"].as_f64()).collect()
    };
    let whole = losses("whole", &["--set", "train.batch_size=8"]);
    let parts =
        losses("parts", &["--set", "train.batch_size=2", "--set", "train.grad_accumulation=4"]);
    assert_eq!(whole.len(), 4);
    for (whole, parts) in whole.iter().zip(&parts) {
        assert!((whole - parts).abs() < 1e-4 * whole, "{whole} and {parts}");
    }
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let place = Place::new();
    for (threads, output) in [("1", "one"), ("3", "three")] {
        let output = format!("output={output}");
        let arguments = ["train", "recipe.yaml", "--quiet", "--threads", threads, "--set", &output];
        place.succeed(&arguments);
    }
    let adapter = |run: &str| {
        std::fs::read(place.path(run).join("adapter/adapter_model.safetensors")).unwrap()
    };
    assert!(adapter("one") == adapter("three"));
}

#[test]
fn families_and_sizes_are_listed_as_in_the_guide() {
    let place = Place::new();
    let printed = place.succeed(&["models"]).stdout;
    let guide = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/models.md");
    let guide = std::fs::read_to_string(guide).unwrap();
    for line in printed.lines() {
        assert!(guide.lines().any(|known| known == line), "docs/models.md lacks: {line}");
    }
    let listed = json(&place.succeed(&["models", "--json"]).stdout);
    let types: Vec<&str> = (listed["families"].as_array().unwrap().iter())
        .map(|family| family["model_type"].as_str().unwrap())
        .collect();
    assert!(types.contains(&"qwen3") && types.contains(&"gemma3_text"));
    assert!(listed["shapes"][0]["gigabytes"]["q4_0"].as_f64().unwrap() > 0.0);
}

#[test]
fn random_models_of_a_known_size_load_and_train() {
    let place = Place::new();
    let refused = place.run(&["model", "random", "--shape", "qwen9", "--to", "x.gguf"]);
    assert_eq!(refused.code, Some(2));
    assert!(refused.stderr.contains("`qwen9` is unknown; expected one of smollm2-135m"));
    let written = place.succeed(&[
        "model",
        "random",
        "--shape",
        "gemma3-270m",
        "--format",
        "q4_0",
        "--to",
        "x.gguf",
        "--json",
    ]);
    assert_eq!(json(&written.stdout)["parameters"], 268_098_176);
    place.succeed(&[
        "generate",
        "--model",
        "x.gguf",
        "--dtype",
        "stored",
        "--max-new-tokens",
        "2",
        "--raw",
        "--prompt",
        "Hi",
    ]);
    let timed = place.succeed(&[
        "bench",
        "train",
        "--shape",
        "smollm2-135m",
        "--dtype",
        "q4_0",
        "--method",
        "hydralora",
        "--batches",
        "1",
        "--batch-size",
        "1",
        "--seq-len",
        "8",
        "--no-memory",
        "--json",
    ]);
    assert_eq!(json(&timed.stdout)["methods"][0]["method"], "hydralora");
}

#[test]
fn shells_and_man_know_every_command() {
    let place = Place::new();
    let listed = place.succeed(&["--help"]).stdout;
    let listed = listed.split("Commands:").nth(1).unwrap().split("Options:").next().unwrap();
    let names: Vec<&str> = listed
        .lines()
        .filter_map(|line| line.strip_prefix("  ").filter(|rest| !rest.starts_with(' ')))
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| *name != "help")
        .collect();
    assert!(names.len() > 18, "{names:?}");
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let script = place.succeed(&["completions", shell]).stdout;
        for name in &names {
            assert!(script.contains(name), "{shell} {name}");
        }
        assert!(script.contains("max-new-tokens"), "{shell}");
    }
    assert_eq!(place.run(&["completions", "csh"]).code, Some(2));
    place.succeed(&["man", "--out", "pages"]);
    for name in names {
        let page = place.read(&format!("pages/hydralora-{name}.1"));
        assert!(page.contains(".SH OPTIONS") || page.contains(".SH SUBCOMMANDS"), "{name}");
    }
    assert!(place.read("pages/hydralora-model-get.1").contains(".TH"));
    assert!(!place.path("pages/hydralora-reference.1").exists(), "it is hidden");
}

/// What bash does with the script: complete a command's name.
#[cfg(unix)]
#[test]
fn bash_completes_a_command() {
    let place = Place::new();
    place.write("complete.bash", &place.succeed(&["completions", "bash"]).stdout);
    let asked = "source complete.bash; COMP_WORDS=(hydralora gen); COMP_CWORD=1; \
                 _hydralora hydralora gen hydralora; echo \"${COMPREPLY[@]}\"";
    let Ok(ran) =
        std::process::Command::new("bash").args(["-c", asked]).current_dir(place.path("")).output()
    else {
        return hydralora_testing::skip("bash", "there is no bash");
    };
    let found = String::from_utf8_lossy(&ran.stdout).into_owned();
    assert_eq!(found.trim(), "generate", "{}", String::from_utf8_lossy(&ran.stderr));
}
