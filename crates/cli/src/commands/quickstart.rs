//! `hydralora quickstart`: a base model, HydraLoRA and a LoRA of the same size, compared on five
//! small domains.

use super::train::{Trained, open, train};
use crate::args::{Global, QuickstartArguments};
use crate::plan::{Base, encode_chat, open_base};
use crate::recipe::{ModelDtype, Recipe};
use crate::ui::{result, say, table, thousands};
use hydralora_data::{ChatTemplate, Message};
use hydralora_model::adapter::{Adapter, NoAdapter};
use hydralora_model::durable::write_file;
use hydralora_peft::methods;
use hydralora_run::ends;
use hydralora_run::{Generator, Sampling};
use hydralora_train::{Ending, Evaluation, METRICS_FILE, report};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

/// Domain and records, so that the binary needs no other file.
const SAMPLE: &[(&str, &str)] = &[
    ("general", include_str!("../../../../data/sample/general.jsonl")),
    ("language", include_str!("../../../../data/sample/language.jsonl")),
    ("law", include_str!("../../../../data/sample/law.jsonl")),
    ("math", include_str!("../../../../data/sample/math.jsonl")),
    ("translation", include_str!("../../../../data/sample/translation.jsonl")),
];

/// For a base model that brings no chat template.
const FALLBACK_TEMPLATE: &str = "chatml";

/// Questions shown before and after, in the form of two of the domains.
const QUESTIONS: &[&str] =
    &["Translate the word into German.\nhouse", "Write the plural of the word.\nwolf"];

pub(crate) fn run(global: &Global, arguments: &QuickstartArguments) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    let out = &arguments.out;
    let data = out.join("data");
    fs::create_dir_all(&data)?;
    for (domain, records) in SAMPLE {
        write_file(&data.join(format!("{domain}.jsonl")), records.as_bytes())?;
    }
    say(global, format!("1/4  getting the base model {}", arguments.model));
    let base = open_base(&arguments.model, ModelDtype::F32)?;
    let before = answers(&base, &NoAdapter)?;

    let hydra =
        json!({"name": "hydralora", "rank": 4, "alpha": 32, "num_experts": 4, "targets": "ffn"});
    let rank = lora_rank_of_equal_size(&base, &hydra)?;
    let lora = json!({"name": "lora", "rank": rank, "alpha": 2 * rank, "targets": "ffn"});

    say(
        global,
        "\n2/4  training HydraLoRA: one A, four B heads and a router per feed-forward layer",
    );
    let run = train_one(global, base, "hydralora", &hydra, arguments, None)?;
    if run.outcome.ending == Ending::Interrupted {
        return Ok(ExitCode::from(130));
    }
    let after = answers(&run.plan.base, run.plan.tuned.as_adapter())?;
    let hydra_facts = Facts::of(&run);
    let baseline = run.baseline.clone();
    let routing = run.outcome.evaluation.as_ref().and_then(|e| e.routing.clone());
    let recipe = run.plan.recipe.to_yaml()?;
    let base = run.plan.base;

    say(global, format!("\n3/4  training a LoRA of the same size (rank {rank})"));
    let run = train_one(global, base, "lora", &lora, arguments, baseline)?;
    if run.outcome.ending == Ending::Interrupted {
        return Ok(ExitCode::from(130));
    }
    let lora_facts = Facts::of(&run);

    say(global, "\n4/4  comparing");
    let mut rows =
        vec![["held-out loss", "base", "LoRA", "", "HydraLoRA", ""].map(str::to_owned).to_vec()];
    for ((domain, base, hydra), (_, _, lora)) in hydra_facts.losses.iter().zip(&lora_facts.losses) {
        let change = |loss: &f64| format!("{:+.1} %", 100.0 * (loss / base - 1.0));
        rows.push(vec![
            domain.clone(),
            format!("{base:.3}"),
            format!("{lora:.3}"),
            change(lora),
            format!("{hydra:.3}"),
            change(hydra),
        ]);
    }
    let mut text = vec![
        format!(
            "trainable parameters  LoRA {}  HydraLoRA {}",
            thousands(lora_facts.trainable),
            thousands(hydra_facts.trainable)
        ),
        String::new(),
        table(&rows),
    ];
    for ((question, before), after) in QUESTIONS.iter().zip(&before).zip(&after) {
        let line = |text: &str| text.trim().replace('\n', " ");
        text.push(format!(
            "\n> {}\n  base       {}\n  HydraLoRA  {}",
            line(question),
            line(before),
            line(after)
        ));
    }
    if let Some(routing) = &routing {
        let experts = routing.overall().first().map_or(0, Vec::len);
        let head = std::iter::once("mean gate".to_owned());
        let mut rows =
            vec![head.chain((0..experts).map(|e| format!("expert {e}"))).collect::<Vec<_>>()];
        for (domain, gates) in routing.domains.iter().zip(routing.overall()) {
            let gates = gates.iter().map(|gate| format!("{gate:.3}"));
            rows.push(std::iter::once(domain.clone()).chain(gates).collect());
        }
        text.push(format!("\n{}", table(&rows)));
    }
    let report_path = out.join("report.html");
    write_comparison(&report_path, out, &hydra_facts, &lora_facts, routing.as_ref(), &recipe)?;
    text.push(format!(
        "\nreport   {}\nadapter  {}\ntook     {:.0} s",
        report_path.display(),
        out.join("hydralora/adapter").display(),
        started.elapsed().as_secs_f64()
    ));
    text.push(format!(
        "\ntalk to it:  hydralora chat --model {} --adapter {}",
        arguments.model,
        out.join("hydralora/adapter").display()
    ));
    let losses = |facts: &Facts| -> Value {
        let row = |(domain, base, loss): &(String, f64, f64)| json!({"domain": domain, "base": base, "trained": loss});
        facts.losses.iter().map(row).collect()
    };
    let json = json!({
        "hydralora": {"trainable": hydra_facts.trainable, "losses": losses(&hydra_facts)},
        "lora": {"trainable": lora_facts.trainable, "losses": losses(&lora_facts)},
        "generations": QUESTIONS.iter().zip(&before).zip(&after).map(|((q, b), a)| {
            json!({"prompt": q, "base": b, "hydralora": a})
        }).collect::<Vec<_>>(),
        "routing": routing.map(|routing| routing.overall()),
        "report": report_path,
        "seconds": started.elapsed().as_secs_f64(),
    });
    result(global, &json, &text.join("\n"))?;
    Ok(ExitCode::SUCCESS)
}

/// What the comparison needs of a run.
struct Facts {
    trainable: usize,
    losses: Vec<(String, f64, f64)>,
}

impl Facts {
    fn of(run: &Trained) -> Self {
        Self { trainable: run.plan.parameters().trainable, losses: run.losses() }
    }
}

fn train_one(
    global: &Global,
    base: Base,
    name: &str,
    method: &Value,
    arguments: &QuickstartArguments,
    baseline: Option<Evaluation>,
) -> anyhow::Result<Trained> {
    let output = arguments.out.join(name);
    // A quickstart always starts afresh; its own folder holds nothing else.
    if output.exists() {
        fs::remove_dir_all(&output)?;
    }
    let train_on = SAMPLE.iter().map(|(domain, _)| {
        json!({"path": format!("data/{domain}.jsonl"), "format": "alpaca", "domain": domain})
    });
    let template = base.template()?.is_none().then_some(FALLBACK_TEMPLATE);
    let recipe = json!({
        "model": {"path": arguments.model},
        "data": {
            "train": train_on.collect::<Vec<_>>(), "valid_fraction": 0.06, "max_seq_len": 384,
            "template": template,
        },
        "method": method,
        "train": {
            "batch_size": 8, "max_steps": arguments.max_steps, "learning_rate": 1e-3,
            "eval_every": 0, "save_every": 0, "seed": 41,
        },
        "output": output,
    });
    let recipe = Recipe::from_value(&recipe, &arguments.out)
        .map_err(|faults| hydralora_peft::Error::Options { faults })?;
    let plan = open(recipe, Some(base), false)?;
    train(global, plan, false, baseline)
}

/// The rank whose LoRA on the same layers comes closest in parameters.
fn lora_rank_of_equal_size(base: &Base, hydra: &Value) -> anyhow::Result<usize> {
    let size = |name: &str, options: &Value| -> anyhow::Result<usize> {
        let mut options = options.as_object().cloned().unwrap_or_default();
        options.remove("name");
        let options = methods::find(name)?
            .read_recipe(&options)
            .map_err(|faults| hydralora_peft::Error::Options { faults })?;
        let sites = options.select(&base.decoder.sites())?;
        let tuned = options.build(&sites, hydralora_kernels::DType::F32, 0);
        Ok(hydralora_peft::count(tuned.as_ref()).values().sum())
    };
    let wanted = size("hydralora", hydra)?;
    let one = size("lora", &json!({"rank": 1, "targets": hydra["targets"]}))?;
    Ok(((wanted as f64 / one as f64).round() as usize).max(1))
}

/// Short answers to the questions, the likeliest token each time.
fn answers(base: &Base, adapter: &dyn Adapter) -> anyhow::Result<Vec<String>> {
    const LONGEST: usize = 40;
    let template = match base.template()? {
        Some(template) => template,
        None => ChatTemplate::builtin(FALLBACK_TEMPLATE)?,
    };
    let end_ids = ends::end_ids(base.tokenizer(), Some(&template), &[], &[])?;
    let (decoder, tokenizer) = (&base.decoder, base.tokenizer());
    let generator = Generator { decoder, tokenizer, adapter, end_ids: &end_ids };
    QUESTIONS
        .iter()
        .map(|question| {
            let prompt = encode_chat(base.tokenizer(), &template, &[Message::user(*question)])?;
            let mut cache = base.decoder.new_cache();
            let sampling = Sampling::default();
            let text = generator.generate(&prompt, &mut cache, sampling, LONGEST, &mut |_| true)?;
            Ok(text.text)
        })
        .collect()
}

fn write_comparison(
    path: &Path,
    out: &Path,
    hydra: &Facts,
    lora: &Facts,
    routing: Option<&hydralora_train::Routing>,
    recipe: &str,
) -> anyhow::Result<()> {
    let pick = |facts: &Facts, base: bool| -> Vec<(String, f64)> {
        let rows = facts.losses.iter();
        rows.map(|row| (row.0.clone(), if base { row.1 } else { row.2 })).collect()
    };
    let page = report::render(&report::ReportInput {
        title: "hydralora quickstart",
        facts: &[
            (
                "HydraLoRA".to_owned(),
                format!("{} trainable parameters", thousands(hydra.trainable)),
            ),
            ("LoRA".to_owned(), format!("{} trainable parameters", thousands(lora.trainable))),
        ],
        metrics: &hydralora_train::read_metrics(&out.join("hydralora").join(METRICS_FILE))?,
        comparison: &[
            ("base".to_owned(), pick(hydra, true)),
            ("LoRA".to_owned(), pick(lora, false)),
            ("HydraLoRA".to_owned(), pick(hydra, false)),
        ],
        routing,
        recipe,
    });
    Ok(write_file(path, page.as_bytes())?)
}
