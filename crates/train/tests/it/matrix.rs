//! What every method has to do, on a trained model of 260,032 parameters.

mod batches;
mod domains;
mod ends;
pub(crate) mod merge;
mod optimizers;
mod options;
mod ranks;
mod refusals;
mod routers;
mod sequences;

use hydralora_data::{DataReport, Dataset, Example, Examples};
use hydralora_kernels::ops::dropout::mix;
use hydralora_kernels::{DType, Tensor, no_grad};
use hydralora_model::adapter::{Adapter, NoAdapter, Pass};
use hydralora_model::{Decoder, IGNORE_LABEL, ModelSource, Packed, Trained};
use hydralora_peft::io::{self, Metadata};
use hydralora_peft::{Base, MethodOptions, TrainingPlan, Tuned, methods};
use hydralora_train::ranks::Team;
use hydralora_train::{Ending, Event, Result, Run, Sink, Stepper, TrainConfig, fit};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

const STEPS: usize = 20;

pub(crate) struct Case {
    pub(crate) method: &'static str,
    pub(crate) options: Value,
    start: Start,
    learning_rate: f64,
}

/// What a fresh adapter makes of the base model.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Start {
    /// Nothing, to the bit.
    Same,
    /// Nothing but rounding.
    Rounded,
    /// Something else.
    Other,
}

/// Every method, and every option that changes what is computed.
pub(crate) fn cases() -> Vec<Case> {
    let low_rank =
        |method, options| Case { method, options, start: Start::Same, learning_rate: 5e-3 };
    let rounded = |method, options| Case {
        start: Start::Rounded,
        learning_rate: 2e-3,
        ..low_rank(method, options)
    };
    let full = |options| Case { method: "full", options, start: Start::Same, learning_rate: 1e-3 };
    let prompt =
        |method, options| Case { method, options, start: Start::Other, learning_rate: 2e-2 };
    let mut cases = vec![
        low_rank("lora", json!({})),
        low_rank("lora", json!({"dropout": 0.1, "targets": "qv", "use_rslora": true})),
        rounded("lora", json!({"use_dora": true, "rank": 4})),
        rounded("lora", json!({"use_dora": true, "dropout": 0.1, "targets": "ffn"})),
        rounded("lora", json!({"init_lora_weights": "pissa", "rank": 4})),
        rounded(
            "lora",
            json!({
                "init_lora_weights": "pissa", "rank": 4, "alpha": 4, "dropout": 0.1,
                "use_rslora": true, "targets": "attention",
            }),
        ),
        full(json!({})),
        full(json!({"freeze_embeddings": true, "freeze_norms": true, "targets": "qv"})),
        full(json!({"targets": "model.layers.4.*"})),
        low_rank("lora-split", json!({"rank": 2})),
        low_rank("lora-split", json!({"combine": "sum", "dropout": 0.1})),
        low_rank("hydralora", json!({})),
        low_rank("hydralora", json!({"gate": "uniform"})),
        low_rank("hydralora", json!({"gate": "none"})),
        low_rank("hydralora", json!({"route_on": "a", "router_bias": true})),
        low_rank("hydralora", json!({"router_scope": "block", "targets": "all"})),
        low_rank("hydralora", json!({"dropout": 0.1, "dropout_mask": "per_expert"})),
        low_rank("hydralora", json!({"num_experts": 1})),
        low_rank("hydralora", json!({"router_top_k": 2})),
        Case {
            start: Start::Other,
            ..low_rank("hydralora", json!({"init_lora_weights": "rlora"}))
        },
        Case {
            start: Start::Rounded,
            ..low_rank("hydralora", json!({"init_lora_weights": "rlora", "gate": "uniform"}))
        },
        Case {
            start: Start::Other,
            ..low_rank(
                "hydralora",
                json!({
                    "init_lora_weights": "rlora", "dropout": 0.1, "dropout_mask": "per_expert",
                    "num_experts": 3, "targets": "all",
                }),
            )
        },
        low_rank(
            "hydralora",
            json!({
                "router_top_k": 3, "balance_weight": 0.01, "router_scope": "block",
                "router_bias": true, "dropout": 0.1,
            }),
        ),
        low_rank("loramoe", json!({"num_experts": 4})),
        low_rank("loramoe", json!({"num_experts": 4, "router_top_k": 2, "balance": "load"})),
        low_rank(
            "loramoe",
            json!({"num_experts": 4, "balance_weight": 0.1, "knowledge_domains": ["facts"]}),
        ),
        low_rank("mtl-lora", json!({"domains": ["stories", "facts"]})),
        low_rank(
            "mtl-lora",
            json!({
                "domains": ["facts", "stories"], "rank": 3, "num_experts": 2, "temperature": 0.5,
                "dropout": 0.1, "use_rslora": true, "targets": "all",
            }),
        ),
        low_rank("adalora", json!({"init_r": 6, "target_r": 3, "tinit": 3, "tfinal": 5})),
        low_rank("adalora", json!({"dropout": 0.1, "delta_t": 4, "targets": "ffn"})),
        Case { method: "ia3", options: json!({}), start: Start::Same, learning_rate: 2e-2 },
        Case {
            method: "ia3",
            options: json!({"targets": "all", "feedforward": "ffn"}),
            start: Start::Same,
            learning_rate: 2e-2,
        },
        prompt("prompt-tuning", json!({"num_virtual_tokens": 5})),
        prompt("prompt-tuning", json!({"num_virtual_tokens": 7, "init": "vocab"})),
        prompt(
            "prompt-tuning",
            json!({"num_virtual_tokens": 9, "init": "text", "init_text": "Once upon a time"}),
        ),
        prompt("p-tuning", json!({"num_virtual_tokens": 5})),
        prompt(
            "p-tuning",
            json!({"num_virtual_tokens": 5, "encoder": "lstm", "encoder_hidden_size": 24}),
        ),
        prompt("prefix-tuning", json!({"num_virtual_tokens": 5})),
        prompt("prefix-tuning", json!({"num_virtual_tokens": 5, "init": "zero"})),
        prompt("prefix-tuning", json!({"num_virtual_tokens": 5, "projection": true})),
    ];
    cases.extend(options::cases());
    cases.extend(routers::cases());
    cases
}

struct Model {
    source: ModelSource,
    decoder: Decoder,
    dataset: Dataset,
}

fn model(dtype: DType) -> Model {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/fixtures/stories260K");
    let source = ModelSource::open(&folder).unwrap();
    let decoder = Decoder::load(&source.config, &source.weights, dtype).unwrap();
    let texts = [
        ("facts", "The sun is a star and the moon is not."),
        ("facts", "Seven and five are twelve."),
        ("stories", "Ann has a red car. It goes very fast in the rain!"),
        ("stories", "Zed the robot eats only green bolts on Monday."),
    ];
    let domains = vec!["facts".to_owned(), "stories".to_owned()];
    let train: Vec<Example> = texts
        .iter()
        .enumerate()
        .map(|(row, (domain, text))| {
            let mut tokens = vec![1];
            tokens.extend(source.tokenizer.encode(text).unwrap());
            let domain = domains.iter().position(|name| name == domain).unwrap() as u32;
            Example { labels: tokens.clone(), tokens, domain, source: 0, row: row as u32 }
        })
        .collect();
    let report = DataReport { train_examples: texts.len(), ..DataReport::default() };
    let (train, valid) = (train.into(), Examples::default());
    let dataset = Dataset { domains, train, valid, template: None, report };
    Model { source, decoder, dataset }
}

impl Model {
    /// All records packed: tokens, offsets, shifted labels, domains.
    fn packed(&self) -> (Vec<u32>, Vec<usize>, Vec<u32>, Vec<u32>) {
        let (mut tokens, mut offsets, mut labels) = (Vec::new(), vec![0], Vec::new());
        for example in self.dataset.train.iter() {
            let example = example.unwrap();
            tokens.extend(&example.tokens);
            labels.extend(example.tokens[1..].iter().chain([&IGNORE_LABEL]));
            offsets.push(tokens.len());
        }
        let domains = self.dataset.train.iter().map(|example| example.unwrap().domain).collect();
        (tokens, offsets, labels, domains)
    }

    fn logits(&self, adapter: &dyn Adapter) -> Vec<f64> {
        let (tokens, offsets, _, domains) = self.packed();
        let batch = Packed { tokens: &tokens, offsets: &offsets };
        let _guard = no_grad();
        let pass = Pass::inference().of_sequences(&offsets, &domains);
        let hidden = self.decoder.hidden(batch, adapter, &pass).unwrap();
        let rows: Vec<usize> = (0..tokens.len()).collect();
        self.decoder.logits_with(adapter, hidden.value(), &rows).to_f64()
    }

    fn build(&self, options: &dyn MethodOptions) -> Box<dyn Tuned> {
        let sites = options.select(&self.decoder.sites()).unwrap();
        let mut tuned = options.build(&sites, self.decoder.dtype(), 7);
        let base =
            Base { decoder: &self.decoder, tokenizer: &self.source.tokenizer, new_tokens: &[] };
        tuned.start_from(&base).unwrap();
        tuned
    }

    /// Loss and gradients over all records, with what the method adds.
    fn trained(&self, tuned: &dyn Tuned, checkpointing: bool) -> Trained {
        let (tokens, offsets, labels, domains) = self.packed();
        let batch = Packed { tokens: &tokens, offsets: &offsets };
        let pass = Pass::training(3).of_sequences(&offsets, &domains).checkpointing(checkpointing);
        let factor = 1.0 / tokens.len() as f64;
        let added = |pass: &Pass<'_>| tuned.aux_loss(pass);
        self.decoder.gradients(batch, &labels, factor, tuned.as_adapter(), &pass, &added).unwrap()
    }
}

impl Case {
    pub(crate) fn options(&self) -> Box<dyn MethodOptions> {
        let section = self.options.as_object().unwrap();
        methods::find(self.method).unwrap().read_recipe(section).unwrap_or_else(|f| panic!("{f:?}"))
    }

    /// Whether a tensor's gradient is that of the loss. DoRA's own takes the norms of the changed
    /// weight for constants, which depend on everything but the magnitudes, and Block-Hydra's penalty the
    /// sizes of heads. Gradients straight through a choice are not the loss's by intention, for all that
    /// a router reads.
    fn is_exact(&self, tensor: &str) -> bool {
        let dora = self.options["use_dora"] == json!(true);
        let spectral = self.options["spectral_weight"].is_number() && tensor.contains("lora_B");
        let straight = self.options["router_top_k_gradient"] == json!("straight_through");
        !(straight || spectral || dora && !tensor.ends_with("lora_magnitude_vector"))
    }

    pub(crate) fn name(&self) -> String {
        format!("{} {}", self.method, self.options)
    }
}

/// Keeps the losses, and stops a run after some step.
struct Watch<'a> {
    losses: Vec<f64>,
    stop_after: usize,
    stop: &'a AtomicBool,
}

impl Sink for Watch<'_> {
    fn record(&mut self, event: &Event) -> Result<()> {
        if let Event::Step(step) = event {
            self.losses.push(step.loss);
            self.stop.store(step.step == self.stop_after, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// Trains for [`STEPS`] steps, or on from a checkpoint, or up to `stop_after`.
fn train(
    model: &Model,
    case: &Case,
    tuned: &mut dyn Tuned,
    folder: &Path,
    resume: bool,
    stop_after: usize,
) -> (Ending, Vec<f64>) {
    let config = TrainConfig {
        epochs: STEPS as f64,
        batch_size: 2,
        grad_accumulation: 2,
        learning_rate: case.learning_rate,
        warmup_ratio: 0.0,
        eval_every: 0,
        save_every: 0,
        ..TrainConfig::default()
    };
    train_with(model, &config, tuned, folder, resume, stop_after).unwrap()
}

/// Trains as `config` says, up to `stop_after`.
fn train_with(
    model: &Model,
    config: &TrainConfig,
    tuned: &mut dyn Tuned,
    folder: &Path,
    resume: bool,
    stop_after: usize,
) -> Result<(Ending, Vec<f64>)> {
    let (stop, metadata) = (AtomicBool::new(false), Metadata::default());
    let run = Run {
        decoder: &model.decoder,
        dataset: &model.dataset,
        weights: &[1.0],
        shuffle: true,
        config,
        metadata: &metadata,
        fingerprint: "the same",
        continues: None,
        settings: &Value::Null,
        folder: Some(folder),
        meter: None,
        clusters: None,
        stop: &stop,
        team: &Team::alone(),
    };
    let mut watch = Watch { losses: Vec::new(), stop_after, stop: &stop };
    let outcome = fit(&run, tuned, resume, &mut watch)?;
    Ok((outcome.ending, watch.losses))
}

#[test]
fn every_method_has_a_case() {
    let cases: BTreeSet<&str> = cases().iter().map(|case| case.method).collect();
    let all: BTreeSet<&str> = methods::METHODS.iter().map(|method| method.name()).collect();
    assert_eq!(cases, all);
}

#[test]
fn a_fresh_adapter_keeps_the_promise_of_its_method() {
    let model = model(DType::F32);
    let base = model.logits(&NoAdapter);
    for case in cases() {
        let tuned = model.build(case.options().as_ref());
        let found = model.logits(tuned.as_adapter());
        let off = found.iter().zip(&base).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        let size = base.iter().map(|v| v.abs()).fold(0.0, f64::max);
        let start = match off {
            0.0 => Start::Same,
            off if off < 1e-4 * size => Start::Rounded,
            _ => Start::Other,
        };
        let kept = start == case.start || (start == Start::Same && case.start == Start::Rounded);
        assert!(kept, "{} is off by {off} of {size}", case.name());
    }
}

#[test]
fn options_survive_a_recipe_and_a_file() {
    let model = model(DType::F32);
    let shapes = |options: &dyn MethodOptions| -> Vec<(String, Vec<usize>)> {
        let tuned = model.build(options);
        tuned.tensors().into_iter().map(|(name, t)| (name, t.shape().to_vec())).collect()
    };
    for case in cases() {
        let options = case.options();
        let method = methods::find(case.method).unwrap();
        let again = method.read_recipe(&options.to_recipe()).unwrap();
        assert_eq!(again.to_recipe(), options.to_recipe(), "{}", case.name());
        let config = options.to_peft();
        let claims: Vec<&str> =
            methods::METHODS.iter().filter(|m| m.claims(&config)).map(|m| m.name()).collect();
        assert_eq!(claims, [case.method], "one method reads {}", case.name());
        let read = method.read_peft(&config).unwrap_or_else(|faults| panic!("{faults:?}"));
        assert_eq!(shapes(read.as_ref()), shapes(options.as_ref()), "{}", case.name());
    }
}

#[test]
fn gradients_of_the_whole_loss_match_finite_differences() {
    let model = model(DType::F64);
    for case in cases() {
        let mut tuned = model.build(case.options().as_ref());
        let plan = TrainingPlan { total_steps: STEPS, domains: &model.dataset.domains };
        tuned.begin(&plan).unwrap();
        // Away from the start, where many tensors are zero and shield others.
        for (index, trainable) in tuned.trainables_mut().into_iter().enumerate() {
            for (at, value) in
                trainable.parameter.value_mut().data_mut::<f64>().iter_mut().enumerate()
            {
                let random = mix(mix(index as u64) ^ at as u64);
                *value += 0.1 * ((random >> 11) as f64 / (1_u64 << 52) as f64 - 1.0);
            }
        }
        let gradients = model.trained(tuned.as_ref(), false).gradients;
        let recomputed = model.trained(tuned.as_ref(), true).gradients;
        let count = tuned.trainables().len();
        for index in 0..count {
            let trainable = tuned.trainables()[index];
            let name = format!("{}: {}", case.name(), trainable.parameter.name());
            let gradient = gradients.get(trainable.var());
            let gradient = gradient.unwrap_or_else(|| panic!("{name} gets no gradient")).to_f64();
            assert!(gradient.iter().any(|&g| g != 0.0), "{name} gets a gradient of zeros");
            let again = recomputed.get(trainable.var());
            let again =
                again.unwrap_or_else(|| panic!("{name} gets none when recomputed")).to_f64();
            for (one, other) in gradient.iter().zip(&again) {
                assert!((one - other).abs() <= 1e-12 * (1.0 + one.abs()), "{name}: {one} {other}");
            }
            // A few tensors, at the element that matters most.
            if index % (1 + count / 8) != 0 || !case.is_exact(trainable.parameter.name()) {
                continue;
            }
            let largest = (0..gradient.len())
                .max_by(|&a, &b| gradient[a].abs().total_cmp(&gradient[b].abs()))
                .unwrap();
            let mut at = |by: f64| {
                let mut trainables = tuned.trainables_mut();
                trainables[index].parameter.value_mut().data_mut::<f64>()[largest] += by;
                let _guard = no_grad();
                let found = model.trained(tuned.as_ref(), false);
                found.loss + found.added
            };
            let found = gradient[largest];
            // Where a choice of ranks or heads changes within a step there is a jump: a shorter one then.
            let slopes = [1e-5, 1e-6, 1e-7].map(|step| {
                let (up, down) = (at(step), at(-2.0 * step));
                at(step);
                (up - down) / (2.0 * step)
            });
            assert!(
                slopes.iter().any(|slope| (found - slope).abs() <= 1e-6 * (1e-2 + slope.abs())),
                "{name}: backward gives {found}, differences {slopes:?}"
            );
        }
    }
}

#[test]
fn training_lowers_the_loss_resumes_bit_for_bit_and_leaves_the_base_alone() {
    let model = model(DType::F32);
    let base = model.logits(&NoAdapter);
    for case in cases() {
        let name = case.name();
        let folder = tempfile::tempdir().unwrap();
        let options = case.options();
        let mut whole = model.build(options.as_ref());
        let (ending, losses) =
            train(&model, &case, whole.as_mut(), &folder.path().join("whole"), false, 0);
        assert_eq!((ending, losses.len()), (Ending::Finished, STEPS), "{name}");
        assert!(losses[STEPS - 1] < losses[0] - 0.05, "{name}: {losses:?}");
        assert_eq!(model.logits(&NoAdapter), base, "{name} changed the base model");

        let parts = folder.path().join("parts");
        let mut first = model.build(options.as_ref());
        let (ending, before) = train(&model, &case, first.as_mut(), &parts, false, STEPS / 2);
        assert_eq!((ending, before.len()), (Ending::Interrupted, STEPS / 2), "{name}");
        let mut second = model.build(options.as_ref());
        let (ending, after) = train(&model, &case, second.as_mut(), &parts, true, 0);
        assert_eq!(ending, Ending::Finished, "{name}");
        assert_eq!([before, after].concat(), losses, "{name} goes on differently");
        let values = |tuned: &dyn Tuned| -> Vec<Vec<f64>> {
            tuned.tensors().values().map(Tensor::to_f64).collect()
        };
        assert_eq!(values(second.as_ref()), values(whole.as_ref()), "{name}");

        // What was saved is what was trained.
        let saved = folder.path().join("whole/adapter");
        if whole.as_whole_model().is_some() {
            let source = ModelSource::open(&saved).unwrap();
            let decoder = Decoder::load(&source.config, &source.weights, DType::F32).unwrap();
            let trained = model.logits(whole.as_adapter());
            let opened = Model { source, decoder, dataset: self::model(DType::F32).dataset };
            assert_eq!(opened.logits(&NoAdapter), trained, "{name}");
            let text = "Ann has a red car.";
            let ids = |model: &Model| model.source.tokenizer.encode(text).unwrap();
            assert_eq!(ids(&opened), ids(&model), "{name}");
            let refused = io::load(&saved, model.decoder.config(), DType::F32).err().unwrap();
            assert!(refused.to_string().contains("give it as the model"), "{refused}");
            continue;
        }
        let mut loaded = io::load(&saved, model.decoder.config(), DType::F32).unwrap().tuned;
        // The domains of the data, which a file does not know.
        let plan = TrainingPlan { total_steps: STEPS, domains: &model.dataset.domains };
        loaded.begin(&plan).unwrap();
        let trained = model.logits(whole.as_adapter());
        // A file of another shape than the live adapter (PiSSA's) is summed in another order.
        for (loaded, trained) in model.logits(loaded.as_adapter()).iter().zip(&trained) {
            assert!((loaded - trained).abs() < 1e-4, "{name}: {loaded} {trained}");
        }
        // And it can be saved again without a change.
        let again = folder.path().join("again");
        io::save(&again, loaded.as_ref(), &Metadata::default(), &model.decoder.sites()).unwrap();
        let bytes = |folder: &Path| std::fs::read(folder.join(io::TENSOR_FILE)).unwrap();
        assert_eq!(bytes(&again), bytes(&saved), "{name}");
    }
}

#[test]
fn a_cache_gives_what_the_whole_sequence_gives() {
    let model = model(DType::F32);
    for case in cases() {
        let mut tuned = model.build(case.options().as_ref());
        for trainable in tuned.trainables_mut() {
            for value in trainable.parameter.value_mut().data_mut::<f32>() {
                *value += 0.02;
            }
        }
        let adapter = tuned.as_adapter();
        let [first, second] = [0, 2].map(|at| model.dataset.train.get(at).unwrap().tokens);
        let whole = |tokens: &[u32]| {
            let batch = Packed { tokens, offsets: &[0, tokens.len()] };
            let hidden = model.decoder.hidden(batch, adapter, &Pass::inference()).unwrap();
            hidden.value().to_f64()
        };
        let mut caches = [model.decoder.new_cache(), model.decoder.new_cache()];
        let width = model.decoder.config().hidden_size;
        let mut found = [Vec::new(), Vec::new()];
        let mut feed = |caches: &mut [hydralora_model::Cache], parts: [&[u32]; 2]| {
            let used: Vec<usize> = (0..2).filter(|&s| !parts[s].is_empty()).collect();
            let tokens: Vec<u32> = used.iter().flat_map(|&s| parts[s]).copied().collect();
            let mut offsets = vec![0];
            for &s in &used {
                offsets.push(offsets[offsets.len() - 1] + parts[s].len());
            }
            let batch = Packed { tokens: &tokens, offsets: &offsets };
            let caches = if used.len() == 2 { caches } else { &mut caches[used[0]..=used[0]] };
            let rows = model.decoder.extend(batch, caches, adapter, &Pass::inference()).unwrap();
            let rows = rows.to_f64();
            for (at, &s) in used.iter().enumerate() {
                found[s].extend_from_slice(&rows[offsets[at] * width..offsets[at + 1] * width]);
            }
        };
        // The second sequence starts while the first goes on.
        feed(&mut caches, [&first[..4], &[]]);
        feed(&mut caches, [&first[4..7], &second[..5]]);
        feed(&mut caches, [&first[7..], &second[5..]]);
        assert_eq!([caches[0].len(), caches[1].len()], [first.len(), second.len()]);
        for (sequence, found) in [&first, &second].into_iter().zip(&found) {
            let expected = whole(sequence);
            let off = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            let size = expected.iter().map(|v| v.abs()).fold(0.0, f64::max);
            assert!(off < 1e-4 * size, "{}: off by {off} of {size}", case.name());
        }
        // Cut back to nothing, a cache starts over.
        caches[0].truncate(0);
        let batch = Packed { tokens: &first, offsets: &[0, first.len()] };
        let rows =
            model.decoder.extend(batch, &mut caches[..1], adapter, &Pass::inference()).unwrap();
        let expected = whole(&first);
        let rows = rows.to_f64();
        let off = rows.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(off < 1e-3, "{}", case.name());
    }
}

/// Weights that the base lets go of are trained where they are.
#[test]
fn full_fine_tuning_keeps_one_copy_of_the_weights() {
    let mut model = model(DType::F32);
    let base = model.logits(&NoAdapter);
    let options = methods::find("full").unwrap().read_recipe(&serde_json::Map::new()).unwrap();
    let mut tuned = model.build(options.as_ref());
    let whole_model = tuned.as_whole_model().unwrap();
    model.decoder.release(|name| whole_model.takes_over(name));
    assert_eq!(model.decoder.weight_bytes(), 0);
    assert_eq!(model.decoder.num_parameters(), 260_032);
    let places = |tuned: &dyn Tuned| -> Vec<*const f32> {
        let values = tuned.trainables().into_iter().map(|t| t.parameter.value());
        // The norms are small, and the base keeps them.
        values.filter(|value| value.shape().len() > 1).map(|v| v.data::<f32>().as_ptr()).collect()
    };
    let before = places(tuned.as_ref());
    assert_eq!(before.len(), 36);
    for checkpointing in [false, true] {
        let found = model.trained(tuned.as_ref(), checkpointing);
        let mut optimizer = Stepper::adamw(tuned.as_ref());
        optimizer.step(tuned.as_mut(), &found.gradients, 1e-3);
        assert_eq!(places(tuned.as_ref()), before);
    }
    assert_ne!(model.logits(tuned.as_adapter()), base);
}

/// A model whose output layer is a weight of its own, equal to the embedding: their gradients add up
/// to that of the tied weight.
#[test]
fn an_output_layer_of_its_own_is_trained_apart() {
    let tied = model(DType::F64);
    let folder = tempfile::tempdir().unwrap();
    let mut weights = tied.decoder.named_weights();
    let embedding = weights["model.embed_tokens.weight"].clone();
    weights.insert("lm_head.weight".to_owned(), embedding);
    io::write_tensors(&folder.path().join("model.safetensors"), &weights).unwrap();
    let mut config = tied.source.config.clone();
    config.tie_word_embeddings = false;
    let text = config.to_json("float64").to_string();
    std::fs::write(folder.path().join("config.json"), text).unwrap();
    tied.source.tokenizer.save(folder.path()).unwrap();
    let source = ModelSource::open(folder.path()).unwrap();
    let decoder = Decoder::load(&source.config, &source.weights, DType::F64).unwrap();
    let apart = Model { source, decoder, dataset: model(DType::F64).dataset };

    let gradients = |model: &Model, options: Value| {
        let section = options.as_object().unwrap().clone();
        let options = methods::find("full").unwrap().read_recipe(&section).unwrap();
        let tuned = model.build(options.as_ref());
        let found = model.trained(tuned.as_ref(), false).gradients;
        tuned.export(&|trainable| found.get(trainable.var()).unwrap().clone())
    };
    let (whole, parts) = (gradients(&tied, json!({})), gradients(&apart, json!({})));
    assert_eq!(parts.len(), whole.len() + 1);
    let mut sum = parts["model.embed_tokens.weight"].clone();
    sum.add_assign(&parts["lm_head.weight"]);
    let expected = whole["model.embed_tokens.weight"].to_f64();
    for (got, want) in sum.to_f64().iter().zip(&expected) {
        assert!((got - want).abs() < 1e-12, "{got} {want}");
    }
    let frozen = gradients(&apart, json!({"freeze_embeddings": true}));
    assert!(!frozen.keys().any(|name| name.contains("embed") || name.contains("head")));
    assert_eq!(frozen.len(), whole.len() - 1);
}

#[test]
fn virtual_tokens_count_against_the_context() {
    let model = model(DType::F32);
    let section = json!({"num_virtual_tokens": 20});
    let limit = model.decoder.config().max_position_embeddings;
    for name in ["prompt-tuning", "prefix-tuning"] {
        let options = methods::find(name).unwrap().read_recipe(section.as_object().unwrap());
        let tuned = model.build(options.unwrap().as_ref());
        let tokens = vec![5; limit - 19];
        let batch = Packed { tokens: &tokens, offsets: &[0, tokens.len()] };
        let error = model.decoder.hidden(batch, tuned.as_adapter(), &Pass::inference());
        let error = error.err().unwrap().to_string();
        assert!(error.contains(&format!("{} tokens", limit + 1)), "{error}");
    }
}
