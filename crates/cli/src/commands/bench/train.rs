//! `hydralora bench train`: training steps of several methods in turn on the same batches, the time
//! of each part, and the limit that the unavoidable matrix products set.

use super::methods::{Asked, asked, peak_alone};
use super::{Timed, median, time_product};
use crate::args::{BenchTrainArguments, Global};
use crate::commands::model::known_shape;
use crate::energy::{Energy, Meter, Work, add};
use crate::failure::bad_input;
use crate::plan::{Base, open_base, refuse_larger_than_memory};
use crate::recipe::ModelDtype;
use crate::ui::{result, say, table, thousands};
use hydralora_energy::Reading;
use hydralora_kernels::block::BlockFormat;
use hydralora_kernels::buffer::release_kept;
use hydralora_kernels::profile::{self, Cost};
use hydralora_model::adapter::{Adapter, Kind, Pass, Site};
use hydralora_model::save::random_gguf;
use hydralora_model::{IGNORE_LABEL, ModelConfig, Packed};
use hydralora_peft::{TrainingPlan, Tuned};
use hydralora_run::probe::BaseAlone;
use hydralora_train::{Chosen, Stepper, peak_rss_mb, reset_peak_rss};
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Steps of the schedule that a method with one believes to be part of.
const TOTAL_STEPS: usize = 1000;

/// Sequences packed without padding, each row with the token it predicts.
struct Batch {
    tokens: Vec<u32>,
    offsets: Vec<usize>,
    labels: Vec<u32>,
}

impl Batch {
    fn new() -> Self {
        Self { tokens: Vec::new(), offsets: vec![0], labels: Vec::new() }
    }

    /// Adds a sequence; `predicted[t]` is whether token `t` is to be predicted.
    fn push(&mut self, tokens: &[u32], predicted: impl Fn(usize) -> bool) {
        for t in 0..tokens.len() {
            let next = t + 1;
            let label =
                if next < tokens.len() && predicted(next) { tokens[next] } else { IGNORE_LABEL };
            self.labels.push(label);
        }
        self.tokens.extend_from_slice(tokens);
        self.offsets.push(self.tokens.len());
    }

    fn label_rows(&self) -> usize {
        self.labels.iter().filter(|&&label| label != IGNORE_LABEL).count()
    }
}

/// Padded batches of token ids, with labels as transformers takes them (not shifted, -100 for none).
#[derive(Deserialize)]
struct TokenFile {
    batches: Vec<PaddedBatch>,
}

#[derive(Deserialize)]
struct PaddedBatch {
    input_ids: Vec<Vec<u32>>,
    labels: Vec<Vec<i64>>,
    attention_mask: Vec<Vec<u8>>,
}

fn read_tokens(path: &Path) -> anyhow::Result<Vec<Batch>> {
    let shown = path.display();
    let text = std::fs::read_to_string(path)
        .map_err(|error| bad_input(format!("--tokens: cannot read {shown}: {error}")))?;
    let file: TokenFile = serde_json::from_str(&text).map_err(|error| {
        bad_input(format!(
            "{shown}: {error}; expected {{\"batches\": [{{\"input_ids\", \"labels\", \"attention_mask\"}}]}}"
        ))
    })?;
    file.batches
        .iter()
        .enumerate()
        .map(|(index, padded)| {
            let mut batch = Batch::new();
            let rows = padded.input_ids.iter().zip(&padded.labels).zip(&padded.attention_mask);
            for (row, ((ids, labels), mask)) in rows.enumerate() {
                if ids.len() != labels.len() || ids.len() != mask.len() {
                    return Err(bad_input(format!(
                        "{shown}: batch {index}, row {row}: input_ids, labels and attention_mask differ in length"
                    )));
                }
                let real = mask.iter().filter(|&&seen| seen != 0).count();
                batch.push(&ids[..real], |t| labels[t] >= 0);
            }
            Ok(batch)
        })
        .collect()
}

/// Made-up batches: `sequences` of `seq_len` ids each, the second half of each to be predicted.
fn made_up(count: usize, sequences: usize, seq_len: usize, vocab_size: usize) -> Vec<Batch> {
    (0..count)
        .map(|index| {
            let mut batch = Batch::new();
            for sequence in 0..sequences {
                let start = (index * sequences + sequence) * seq_len;
                let ids: Vec<u32> = (start..start + seq_len)
                    .map(|i| ((i * 7919 + 17) % (vocab_size - 1) + 1) as u32)
                    .collect();
                batch.push(&ids, |t| t >= seq_len / 2);
            }
            batch
        })
        .collect()
}

/// What is timed.
struct Contender {
    name: String,
    tuned: Option<(Box<dyn Tuned>, Stepper)>,
    trainable: usize,
    seconds: Vec<f64>,
    losses: Vec<f64>,
    peak_mb: f64,
    costs: BTreeMap<&'static str, Cost>,
    /// Of all steps that were timed, the repeated ones too.
    used: Option<Reading>,
    trained_tokens: usize,
}

impl Contender {
    fn new(method: &Asked, base: &Base) -> anyhow::Result<Self> {
        let mut tuned = None;
        if let Some(method) = &method.options {
            let all = base.decoder.sites();
            let sites = if method.whole_model() { all } else { method.select(&all)? };
            refuse_larger_than_memory(method.as_ref(), &sites, &Chosen::default())?;
            let mut fresh = method.build(&sites, base.decoder.dtype(), 41);
            fresh.start_from(&hydralora_peft::Base {
                decoder: &base.decoder,
                tokenizer: base.tokenizer(),
                new_tokens: &[],
            })?;
            fresh.begin(&TrainingPlan { total_steps: TOTAL_STEPS, domains: &[] })?;
            let optimizer = Stepper::adamw(fresh.as_ref());
            tuned = Some((fresh, optimizer));
        }
        let trainable = tuned.as_ref().map_or(0, |(tuned, _)| {
            tuned.trainables().iter().map(|t| t.parameter.value().len()).sum()
        });
        Ok(Self {
            name: method.text.clone(),
            tuned,
            trainable,
            seconds: Vec::new(),
            losses: Vec::new(),
            peak_mb: 0.0,
            costs: BTreeMap::new(),
            used: None,
            trained_tokens: 0,
        })
    }

    /// One optimizer step; gives seconds and loss.
    fn step(
        &mut self,
        base: &Base,
        batch: &Batch,
        checkpointing: bool,
    ) -> anyhow::Result<(f64, f64)> {
        let started = Instant::now();
        let adapter: &dyn Adapter =
            self.tuned.as_ref().map_or(&BaseAlone, |(tuned, _)| tuned.as_adapter());
        let domains = vec![0; batch.offsets.len() - 1];
        let pass =
            Pass::training(7).of_sequences(&batch.offsets, &domains).checkpointing(checkpointing);
        let packed = Packed { tokens: &batch.tokens, offsets: &batch.offsets };
        let factor = 1.0 / batch.label_rows().max(1) as f64;
        let added = |pass: &Pass<'_>| self.tuned.as_ref().and_then(|(t, _)| t.aux_loss(pass));
        let labels = &batch.labels;
        let found = base.decoder.gradients(packed, labels, factor, adapter, &pass, &added)?;
        if let Some((tuned, optimizer)) = &mut self.tuned {
            let _part = profile::part("optimizer");
            optimizer.step(tuned.as_mut(), &found.gradients, 2e-4);
            tuned.after_step(optimizer.steps() as usize, &found.gradients);
        }
        Ok((started.elapsed().as_secs_f64(), found.loss))
    }
}

/// A matrix product `[rows, inner] · [inner, cols]` and how often it is needed.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Product {
    rows: usize,
    inner: usize,
    cols: usize,
    times: usize,
}

impl Product {
    fn flops(self) -> f64 {
        2.0 * self.rows as f64 * self.inner as f64 * self.cols as f64 * self.times as f64
    }
}

/// The products with frozen weights that no method can do without: forward everywhere, the input's
/// gradient down to the first adapted block, and the last layer and the output layer only where a
/// label asks for it.
fn unavoidable(config: &ModelConfig, batch: &Batch) -> Vec<Product> {
    let (tokens, labels) = (batch.tokens.len(), batch.label_rows());
    let last = config.num_hidden_layers - 1;
    let mut products = Vec::new();
    for shape in config.sites() {
        let Site { layer, .. } = shape.site;
        let keys = shape.site.kind().overlaps(Kind::KEY.and(Kind::VALUE));
        let rows = if layer == last && !keys { labels } else { tokens };
        let backward = layer > 0 || !shape.site.is_attention();
        products.push(Product {
            rows,
            inner: shape.in_features,
            cols: shape.out_features,
            times: 1 + usize::from(backward),
        });
    }
    let (inner, cols) = (config.hidden_size, config.vocab_size);
    products.push(Product { rows: labels, inner, cols, times: 2 });
    products
}

/// Rates of this model's layers' products by `(inner, cols)`, each over all times it was measured: a
/// machine that others share is faster in some moments than it can be for a whole run.
#[derive(Default)]
struct Rates(BTreeMap<(usize, usize), Timed>);

impl Rates {
    /// Measures every product with `rows` rows once more.
    fn measure(&mut self, config: &ModelConfig, rows: usize) {
        let mut shapes = BTreeSet::new();
        for shape in config.sites().iter().take_while(|shape| shape.site.layer == 0) {
            shapes.insert((shape.in_features, shape.out_features));
            shapes.insert((shape.out_features, shape.in_features));
        }
        for (inner, cols) in shapes {
            *self.0.entry((inner, cols)).or_default() += time_product(rows, inner, cols);
        }
    }

    /// The rate of the fastest, in FLOP/s.
    fn best(&self) -> f64 {
        self.0.values().map(|timed| timed.rate()).fold(0.0, f64::max)
    }
}

/// One contender's figures.
#[derive(Serialize)]
struct Figures {
    method: String,
    trainable_parameters: usize,
    tokens_per_s: f64,
    share_of_limit: f64,
    seconds: f64,
    step_seconds: Vec<f64>,
    /// Median over the batches of this step's time by the first contender's.
    relative_time: f64,
    /// None where it was not measured.
    peak_rss_mb: Option<f64>,
    first_loss: f64,
    last_loss: f64,
    parts: Vec<PartFigures>,
    /// Of the timed steps and their repetitions.
    energy: Energy,
}

#[derive(Serialize)]
struct PartFigures {
    part: &'static str,
    seconds: f64,
    share: f64,
    gflops_per_s: f64,
    calls: usize,
}

/// Random weights in a folder that goes with the handle, and the arguments that name them.
fn drawn(
    shape: &str,
    arguments: &BenchTrainArguments,
) -> anyhow::Result<(TempDir, BenchTrainArguments)> {
    let config = known_shape(shape)?.config()?;
    let format = match arguments.dtype {
        ModelDtype::Bf16 => BlockFormat::BF16,
        ModelDtype::F16 => BlockFormat::F16,
        ModelDtype::Q80 => BlockFormat::Q8_0,
        ModelDtype::Q40 | ModelDtype::Stored => BlockFormat::Q4_0,
        ModelDtype::F32 | ModelDtype::F64 | ModelDtype::Q41 => BlockFormat::F32,
    };
    let folder = tempfile::tempdir()?;
    let file = folder.path().join(format!("{shape}.gguf"));
    random_gguf(&config, format, 0, &file)?;
    let model = file.display().to_string();
    Ok((folder, BenchTrainArguments { model, shape: None, ..arguments.clone() }))
}

pub(crate) fn run(global: &Global, arguments: &BenchTrainArguments) -> anyhow::Result<ExitCode> {
    if arguments.seq_len < 2 {
        return Err(bad_input("--seq-len: expected at least 2"));
    }
    let methods = asked(arguments)?;
    let drawn = arguments.shape.as_deref().map(|shape| drawn(shape, arguments)).transpose()?;
    let arguments = drawn.as_ref().map_or(arguments, |(_, arguments)| arguments);
    let opening = Instant::now();
    let mut base = open_base(&arguments.model, arguments.dtype)?;
    let opened = opening.elapsed().as_secs_f64();
    let config = base.decoder.config().clone();
    let mut batches = match &arguments.tokens {
        Some(path) => read_tokens(path)?,
        None => {
            made_up(arguments.batches, arguments.batch_size, arguments.seq_len, config.vocab_size)
        }
    };
    if batches.is_empty() {
        return Err(bad_input("there is no batch to train on"));
    }
    if arguments.largest_batch_only {
        let largest = batches.into_iter().max_by_key(|batch| batch.tokens.len());
        batches = largest.into_iter().collect();
    }
    let mut contenders = methods
        .iter()
        .map(|method| Contender::new(method, &base))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let alone = contenders.len() == 1;
    if let ([Contender { tuned: Some((tuned, _)), .. }], Base { decoder, .. }) =
        (&contenders[..], &mut base)
    {
        // As a training run does; others beside it would need what is let go.
        if let Some(model) = tuned.as_whole_model() {
            decoder.release(|name| model.takes_over(name));
        }
    }

    // As training does before its first step.
    release_kept();

    let meter = Meter::start(global, &arguments.energy);
    let checkpointing = arguments.gradient_checkpointing;
    let mut rates = Rates::default();
    let largest = batches.iter().max_by_key(|batch| batch.tokens.len());
    for (index, batch) in batches.iter().enumerate() {
        rates.measure(&config, batch.tokens.len());
        for contender in &mut contenders {
            reset_peak_rss();
            if index == 0
                && let Some(largest) = largest
            {
                // Pages are touched, threads started and caches filled outside the measurement.
                contender.step(&base, largest, checkpointing)?;
            }
            let mark = meter.mark();
            profile::start();
            let (mut seconds, loss) = contender.step(&base, batch, checkpointing)?;
            for (part, cost) in profile::finish() {
                let sum = contender.costs.entry(part).or_default();
                sum.time += cost.time;
                sum.flops += cost.flops;
                sum.calls += cost.calls;
            }
            for _ in 1..arguments.repeat {
                seconds = seconds.min(contender.step(&base, batch, checkpointing)?.0);
            }
            contender.used = Some(add(contender.used.take(), meter.since(&mark)));
            contender.trained_tokens += batch.tokens.len() * arguments.repeat.max(1);
            contender.seconds.push(seconds);
            contender.losses.push(loss);
            if alone {
                contender.peak_mb = contender.peak_mb.max(peak_rss_mb().unwrap_or(0.0));
            }
        }
        say(global, format!("batch {} of {}", index + 1, batches.len()));
    }
    if !alone && !arguments.no_memory {
        for (contender, method) in contenders.iter_mut().zip(&methods) {
            contender.peak_mb = peak_alone(global, arguments, method)?;
            say(global, format!("memory of {}", method.text));
        }
    }

    let tokens: usize = batches.iter().map(|batch| batch.tokens.len()).sum();
    let flops: f64 =
        batches.iter().flat_map(|batch| unavoidable(&config, batch)).map(Product::flops).sum();
    let rate = rates.best();
    let limit = tokens as f64 / (flops / rate);
    let first = contenders[0].seconds.clone();
    let figures: Vec<Figures> = contenders
        .iter_mut()
        .map(|contender| {
            let used = contender.used.take().unwrap_or_default();
            let energy = meter.energy(used, Work::tokens(contender.trained_tokens));
            figures(contender, tokens, limit, &first, energy)
        })
        .collect();

    let mut rows = vec![
        ["method", "parameters", "tokens/s", "of the limit", "step, median s", "time", "peak MB"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for one in &figures {
        rows.push(vec![
            one.method.clone(),
            thousands(one.trainable_parameters),
            format!("{:.1}", one.tokens_per_s),
            format!("{:.1} %", 100.0 * one.share_of_limit),
            format!("{:.3}", median(&mut one.step_seconds.clone())),
            format!("{:.3}", one.relative_time),
            one.peak_rss_mb.map_or_else(String::new, |peak| format!("{peak:.0}")),
        ]);
    }
    let mut text = table(&rows);
    for one in &figures {
        text += &format!("\n\n{}\n{}", one.method, parts_table(&one.parts));
        if one.energy.energy_j.is_some() {
            text += &format!("\nenergy  {}", one.energy.in_words());
        }
    }
    text += &format!(
        "\n\nlimit: {limit:.1} tokens/s, the {:.1} TFLOP of unavoidable products at the rate of the fastest, {:.1} GFLOP/s",
        flops / 1e12,
        rate / 1e9
    );
    text += &format!("\nmodel opened in {opened:.2} s");
    let json = json!({
        "model": base.source.identity.name,
        "threads": hydralora_runtime::threads(),
        "batches": batches.len(),
        "tokens": tokens,
        "label_tokens": batches.iter().map(Batch::label_rows).sum::<usize>(),
        "gradient_checkpointing": checkpointing,
        "best_gflops_per_s": rate / 1e9,
        "unavoidable_tflop": flops / 1e12,
        "limit_tokens_per_s": limit,
        "model_open_s": opened,
        "methods": figures,
    });
    result(global, &json, &text)?;
    Ok(ExitCode::SUCCESS)
}

fn figures(
    contender: &Contender,
    tokens: usize,
    limit: f64,
    first: &[f64],
    energy: Energy,
) -> Figures {
    let seconds: f64 = contender.seconds.iter().sum();
    let tokens_per_s = tokens as f64 / seconds;
    let mut ratios: Vec<f64> =
        contender.seconds.iter().zip(first).map(|(own, first)| own / first).collect();
    let whole: Duration = contender.costs.values().map(|cost| cost.time).sum();
    let mut parts: Vec<PartFigures> = contender
        .costs
        .iter()
        .map(|(&part, cost)| {
            let seconds = cost.time.as_secs_f64();
            PartFigures {
                part,
                seconds,
                share: seconds / whole.as_secs_f64(),
                gflops_per_s: cost.flops / seconds / 1e9,
                calls: cost.calls,
            }
        })
        .collect();
    parts.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    Figures {
        method: contender.name.clone(),
        trainable_parameters: contender.trainable,
        tokens_per_s,
        share_of_limit: tokens_per_s / limit,
        seconds,
        step_seconds: contender.seconds.clone(),
        relative_time: median(&mut ratios),
        peak_rss_mb: Some(contender.peak_mb).filter(|&peak| peak > 0.0),
        first_loss: contender.losses.first().copied().unwrap_or(0.0),
        last_loss: contender.losses.last().copied().unwrap_or(0.0),
        parts,
        energy,
    }
}

fn parts_table(parts: &[PartFigures]) -> String {
    let mut rows =
        vec![["part", "seconds", "share", "GFLOP/s", "calls"].map(str::to_owned).to_vec()];
    for part in parts {
        let rate = if part.gflops_per_s > 0.0 {
            format!("{:.1}", part.gflops_per_s)
        } else {
            String::new()
        };
        rows.push(vec![
            part.part.to_owned(),
            format!("{:.3}", part.seconds),
            format!("{:.1} %", 100.0 * part.share),
            rate,
            part.calls.to_string(),
        ]);
    }
    table(&rows)
}
