//! `hydralora quickstart`: a base model, HydraLoRA and a LoRA of the same size, compared on five
//! small domains.

use super::train::{Start, Trained, train};
use crate::args::{Global, QuickstartArguments};
use crate::energy::{Energy, EnergyArguments};
use crate::failure::bad_input;
use crate::output::check_folder;
use crate::plan::{Base, Plan, encode_chat, open_base};
use crate::recipe::{ModelDtype, Recipe};
use crate::stop::{self, Interrupted};
use crate::ui::{result, say, table, thousands};
use hydralora_data::{ChatTemplate, Message};
use hydralora_files::mark::MARK_FILE;
use hydralora_files::{Kind, replace_folder, write_file};
use hydralora_model::adapter::{Adapter, NoAdapter};
use hydralora_peft::methods;
use hydralora_run::ends::{self, AnswerEnd};
use hydralora_run::{Generator, Request, Sampling};
use hydralora_train::ranks::Team;
use hydralora_train::report::{self, Answers};
use hydralora_train::{Ending, Evaluation, METRICS_FILE, read_metrics};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

/// Domain and records, so that the binary needs no other file.
pub(crate) const SAMPLE: &[(&str, &str)] = &[
    ("general", include_str!("../../../../data/sample/general.jsonl")),
    ("language", include_str!("../../../../data/sample/language.jsonl")),
    ("law", include_str!("../../../../data/sample/law.jsonl")),
    ("math", include_str!("../../../../data/sample/math.jsonl")),
    ("translation", include_str!("../../../../data/sample/translation.jsonl")),
];

/// What the folder is.
const FOLDER: Kind = Kind { name: "quickstart", earlier: None };

/// `alpha / rank` of both adapters: at another scale the same learning rate is another one.
const SCALE: usize = 8;
/// Peak learning rates: the best of 1e-3, 2e-3 and 4e-3 for each of them, chosen with another seed, and
/// so with other held-out records, than what is shown (README).
const RATE_OF_HYDRA: f64 = 2e-3;
const RATE_OF_LORA: f64 = 1e-3;
const SEED: u64 = 41;

/// Questions shown before and after, in the form of two of the domains.
const QUESTIONS: &[&str] =
    &["Translate the word into German.\nhouse", "Write the plural of the word.\nwolf"];

pub(crate) fn run(global: &Global, arguments: &QuickstartArguments) -> anyhow::Result<ExitCode> {
    let out = &arguments.out;
    check_folder(out, &FOLDER, &[])?;
    // Unless it is empty, it is an earlier one: anything else was just refused.
    let again = || -> anyhow::Result<()> {
        if arguments.force || !out.join(MARK_FILE).exists() {
            return Ok(());
        }
        let out = out.display();
        Err(bad_input(format!(
            "--out: {out} holds a quickstart already; repeat it with --force, or choose another folder"
        )))
    };
    again()?;
    let mut shown = None;
    // All of it under another name first, so that an older one is there until this one is whole.
    let done = replace_folder::<anyhow::Error>(out, &FOLDER, |folder| {
        shown = Some(compare(global, arguments, folder)?);
        again()
    });
    match (done, shown) {
        (Err(error), _) if error.is::<Interrupted>() => {
            say(global, error.to_string());
            Ok(ExitCode::from(130))
        }
        (Ok(()), Some((json, text))) => {
            result(global, &json, &text)?;
            Ok(ExitCode::SUCCESS)
        }
        (done, _) => done.map(|()| ExitCode::SUCCESS),
    }
}

/// Trains both into `folder`; gives what to print, as JSON and as text.
fn compare(
    global: &Global,
    arguments: &QuickstartArguments,
    folder: &Path,
) -> anyhow::Result<(Value, String)> {
    let started = Instant::now();
    let out = &arguments.out;
    let data = folder.join("data");
    fs::create_dir_all(&data)?;
    for (domain, records) in SAMPLE {
        write_file(&data.join(format!("{domain}.jsonl")), records.as_bytes())?;
    }
    say(global, format!("1/4  getting the base model {}", arguments.model));
    let base = open_base(&arguments.model, ModelDtype::F32)?;
    let before = answers(&base, &NoAdapter)?;

    let hydra = json!({"name": "hydralora", "rank": 4, "alpha": 4 * SCALE, "num_experts": 4, "targets": "ffn"});
    let rank = lora_rank_of_equal_size(&base, &hydra)?;
    let lora = json!({"name": "lora", "rank": rank, "alpha": SCALE * rank, "targets": "ffn"});

    say(
        global,
        "\n2/4  training HydraLoRA: one A, four B heads and a router per feed-forward layer",
    );
    let run =
        train_one(global, base, ("hydralora", &hydra, RATE_OF_HYDRA), arguments, folder, None)?;
    let of_hydra = answers(&run.plan.base, run.plan.tuned.as_adapter())?;
    let base_name = run.plan.metadata.base_model.clone();
    let hydra_facts = Facts::of(&run);
    let baseline = run.baseline.clone();
    let routing = run.outcome.evaluation.as_ref().and_then(|e| e.routing.clone());
    let recipe = run.plan.recipe.to_yaml()?;
    let base = run.plan.base;

    say(global, format!("\n3/4  training a LoRA of the same size (rank {rank})"));
    let run = train_one(global, base, ("lora", &lora, RATE_OF_LORA), arguments, folder, baseline)?;
    let of_lora = answers(&run.plan.base, run.plan.tuned.as_adapter())?;
    let lora_facts = Facts::of(&run);
    let line = |text: &String| text.trim().replace('\n', " ");
    let shown: Vec<Answers> = QUESTIONS
        .iter()
        .enumerate()
        .map(|(at, question)| Answers {
            question: question.replace('\n', " "),
            answers: [("base", &before), ("LoRA", &of_lora), ("HydraLoRA", &of_hydra)]
                .map(|(who, answers)| (who.to_owned(), line(&answers[at])))
                .to_vec(),
        })
        .collect();

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
    for Answers { question, answers } in &shown {
        text.push(format!("\n> {question}"));
        text.extend(answers.iter().map(|(who, answer)| format!("  {who:<10} {answer}")));
    }
    if let Some(routing) = &routing {
        text.push(format!("\ngates by domain   {}", routing.in_words()));
    }
    let report_path = out.join("report.html");
    let both = [
        ("hydralora".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
        ("base model".to_owned(), base_name),
        ("HydraLoRA".to_owned(), hydra_facts.in_words(&hydra, RATE_OF_HYDRA)),
        ("LoRA".to_owned(), lora_facts.in_words(&lora, RATE_OF_LORA)),
        ("training".to_owned(), format!("{} steps each, seed {SEED}", arguments.max_steps)),
        ("time".to_owned(), format!("{:.0} s in all", started.elapsed().as_secs_f64())),
        ("adapter".to_owned(), out.join("hydralora/adapter").display().to_string()),
    ];
    let losses_of = |facts: &Facts, base: bool| -> Vec<(String, f64)> {
        let rows = facts.losses.iter();
        rows.map(|row| (row.0.clone(), if base { row.1 } else { row.2 })).collect()
    };
    let metrics = |name: &str| read_metrics(&folder.join(name).join(METRICS_FILE));
    let page = report::render(&report::ReportInput {
        title: "HydraLoRA and LoRA on five domains",
        facts: &both,
        runs: &[
            ("HydraLoRA".to_owned(), metrics("hydralora")?),
            ("LoRA".to_owned(), metrics("lora")?),
        ],
        comparison: &[
            ("base".to_owned(), losses_of(&hydra_facts, true)),
            ("LoRA".to_owned(), losses_of(&lora_facts, false)),
            ("HydraLoRA".to_owned(), losses_of(&hydra_facts, false)),
        ],
        answers: &shown,
        routing: routing.as_ref(),
        heads: None,
        recipe: &recipe,
    });
    write_file(&folder.join("report.html"), page.as_bytes())?;
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
        "hydralora": {
            "trainable": hydra_facts.trainable, "losses": losses(&hydra_facts),
            "energy": hydra_facts.energy,
        },
        "lora": {
            "trainable": lora_facts.trainable, "losses": losses(&lora_facts),
            "energy": lora_facts.energy,
        },
        "answers": shown,
        "routing": routing.map(|routing| json!({
            "specialisation": routing.specialisation(),
            "spread_by_layer": routing.spread_by_layer(),
        })),
        "report": report_path,
        "seconds": started.elapsed().as_secs_f64(),
    });
    Ok((json, text.join("\n")))
}

/// What the comparison needs of a run.
struct Facts {
    trainable: usize,
    losses: Vec<(String, f64, f64)>,
    energy: Energy,
}

impl Facts {
    fn of(run: &Trained) -> Self {
        Self {
            trainable: run.plan.parameters().trainable,
            losses: run.losses(),
            energy: run.energy.clone(),
        }
    }

    /// Size, scale and learning rate.
    fn in_words(&self, method: &Value, rate: f64) -> String {
        format!(
            "{} trainable parameters, rank {}, alpha {}, learning rate {rate}",
            thousands(self.trainable),
            method["rank"],
            method["alpha"]
        )
    }
}

fn train_one(
    global: &Global,
    base: Base,
    (name, method, rate): (&str, &Value, f64),
    arguments: &QuickstartArguments,
    folder: &Path,
    baseline: Option<Evaluation>,
) -> anyhow::Result<Trained> {
    let train_on = SAMPLE.iter().map(|(domain, _)| {
        json!({"path": format!("data/{domain}.jsonl"), "format": "alpaca", "domain": domain})
    });
    let template = match base.template()? {
        None => Some(fallback_template(&base)?.0),
        Some(_) => None,
    };
    let recipe = json!({
        "model": {"path": arguments.model},
        "data": {
            "train": train_on.collect::<Vec<_>>(), "valid_fraction": 0.06, "max_seq_len": 384,
            "template": template,
        },
        "method": method,
        "train": {
            "batch_size": 8, "max_steps": arguments.max_steps, "learning_rate": rate,
            "eval_every": 0, "save_every": 0, "seed": SEED,
        },
        "output": arguments.out.join(name),
    });
    let recipe = Recipe::from_value(&recipe, folder)
        .map_err(|faults| hydralora_peft::Error::Options { faults })?;
    let mut plan = Plan::open(recipe, Some(base))?;
    // The records say where the data will be.
    let there = |path: &mut PathBuf| {
        if let Ok(inside) = path.strip_prefix(folder) {
            *path = arguments.out.join(inside);
        }
    };
    for source in &mut plan.dataset.report.sources {
        there(&mut source.path);
        source.files.iter_mut().for_each(|file| there(&mut file.path));
    }
    let stop = stop::flag("stopping; nothing will be kept");
    let energy = &EnergyArguments::default();
    let (folder, team) = (folder.join(name), Team::alone());
    let start = Start { folder: &folder, resume: false, baseline, stop, energy, team: &team };
    let trained = train(global, plan, start)?;
    match trained.outcome.ending {
        Ending::Interrupted => Err(Interrupted.into()),
        Ending::Finished | Ending::EarlyStopped => Ok(trained),
    }
}

/// A template for a base model without one, by name and as such: ChatML where the vocabulary has its
/// tokens, else one that needs none.
fn fallback_template(base: &Base) -> anyhow::Result<(&'static str, ChatTemplate)> {
    let chatml = ChatTemplate::builtin("chatml")?;
    match ends::answer_end(base.tokenizer(), &chatml)? {
        Some(AnswerEnd::NoToken(_)) => Ok(("alpaca", ChatTemplate::builtin("alpaca")?)),
        _ => Ok(("chatml", chatml)),
    }
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
        None => fallback_template(base)?.1,
    };
    let end_ids = ends::end_ids(base.tokenizer(), Some(&template), &[], &[])?;
    let (decoder, tokenizer) = (&base.decoder, base.tokenizer());
    let mut generator = Generator::new(decoder, tokenizer, adapter, &end_ids, false);
    QUESTIONS
        .iter()
        .map(|question| {
            let prompt = encode_chat(base.tokenizer(), &template, &[Message::user(*question)])?;
            let request = Request {
                prompt: &prompt,
                sampling: Sampling::default(),
                max_new_tokens: LONGEST,
                stops: &[],
                continues: false,
            };
            let text = generator.generate(request, &mut |_| true)?;
            Ok(text.text)
        })
        .collect()
}
