//! Losses, gradients and ten optimizer steps against PyTorch and PEFT.
//!
//! `tests/fixtures/parity` by default; `HYDRALORA_PARITY_DIR` and `HYDRALORA_PARITY_MODELS` name
//! other references and their base models (a folder, or a GGUF file, by the model's name).
//! `HYDRALORA_FAMILIES_DIR` names a folder of model families in the form of
//! `tests/fixtures/parity/families`, which is then read as well.

use hydralora_kernels::{DType, Gradients, Tensor, no_grad};
use hydralora_model::adapter::{Kind, NoAdapter, Pass};
use hydralora_model::source::open_weights;
use hydralora_model::{Decoder, IGNORE_LABEL, ModelSource, Packed};
use hydralora_peft::io::Metadata;
use hydralora_peft::{Base, TensorMap, TrainingPlan, Tuned, io, methods};
use hydralora_testing::skip;
use hydralora_train::Stepper;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity")
}

fn root() -> PathBuf {
    std::env::var_os("HYDRALORA_PARITY_DIR").map_or_else(fixtures, PathBuf::from)
}

/// Every folder that references are read from.
fn roots() -> Vec<PathBuf> {
    let families = std::env::var_os("HYDRALORA_FAMILIES_DIR").map(PathBuf::from);
    [root()].into_iter().chain(families).collect()
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// Every folder below `folder` that holds a reference.
fn references(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    if folder.join("result.json").exists() && folder.join("batch.json").exists() {
        found.push(folder.to_path_buf());
    }
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(references(&path));
        }
    }
    found.sort();
    found
}

/// Where the base model of a reference is: beside the references, or in the models' folder.
fn find_model(name: &str) -> Option<PathBuf> {
    let base = Path::new(name).file_name().unwrap().to_string_lossy().into_owned();
    let models = std::env::var_os("HYDRALORA_PARITY_MODELS").map(PathBuf::from);
    let folders = [Some(root().join("models")), models, Some(fixtures().join("models"))];
    folders
        .into_iter()
        .flatten()
        .flat_map(|folder| [folder.join(&base), folder.join(format!("{base}.gguf"))])
        .find(|path| path.exists())
}

struct Reference {
    name: String,
    result: Value,
    tokens: Vec<u32>,
    offsets: Vec<usize>,
    /// Shifted.
    labels: Vec<u32>,
    /// Of each sequence, by its place among the adapter's.
    domains: Vec<u32>,
    path: PathBuf,
}

impl Reference {
    fn read(path: &Path) -> Self {
        let batch = read_json(&path.join("batch.json"));
        let (mut tokens, mut offsets, mut labels) = (Vec::new(), vec![0], Vec::new());
        let rows =
            |key: &str| -> Vec<Vec<i64>> { serde_json::from_value(batch[key].clone()).unwrap() };
        for ((ids, mask), targets) in
            rows("input_ids").iter().zip(rows("attention_mask")).zip(rows("labels"))
        {
            let len = mask.iter().sum::<i64>() as usize;
            tokens.extend(ids[..len].iter().map(|&id| id as u32));
            let shifted = (1..len).map(|t| targets[t]).chain([-100]);
            labels.extend(shifted.map(|t| if t < 0 { IGNORE_LABEL } else { t as u32 }));
            offsets.push(tokens.len());
        }
        let domains = serde_json::from_value(batch["domains"].clone());
        Self {
            domains: domains.unwrap_or_else(|_| vec![0; offsets.len() - 1]),
            name: roots()
                .iter()
                .find_map(|root| path.strip_prefix(root).ok())
                .unwrap_or(path)
                .display()
                .to_string(),
            result: read_json(&path.join("result.json")),
            tokens,
            offsets,
            labels,
            path: path.to_path_buf(),
        }
    }

    fn packed(&self) -> Packed<'_> {
        Packed { tokens: &self.tokens, offsets: &self.offsets }
    }

    /// The first of these numbers that the reference holds.
    fn number(&self, names: [&str; 2]) -> f64 {
        names.iter().find_map(|name| self.result[*name].as_f64()).unwrap()
    }

    /// The loss in double precision.
    fn exact_loss(&self) -> f64 {
        self.number(["loss_f64", "loss"])
    }

    /// The loss before each step, and after the last.
    fn curve(&self) -> Vec<f64> {
        let names = ["curve", "loss_curve_10_adamw_steps"];
        let curve = names.iter().map(|name| &self.result[*name]).find(|curve| curve.is_array());
        serde_json::from_value(curve.unwrap().clone()).unwrap()
    }

    /// Whether it is of a model without an adapter.
    fn is_base(&self) -> bool {
        self.result["greedy"].is_array()
    }

    /// Where the base model is, if it is at hand.
    fn model(&self) -> Option<PathBuf> {
        match self.result["model"].as_str() {
            Some(name) => find_model(name),
            None => Some(self.path.join("../model")),
        }
    }

    /// The adapter's configuration as a file for a model with these layers would hold it.
    fn config(&self, decoder: &Decoder) -> Map<String, Value> {
        // The layers of the feed-forward block, under the names that the family gives them.
        let mut targets: Vec<&str> = Vec::new();
        for site in decoder.sites().iter().map(|shape| shape.site) {
            let module = site.linear.module();
            if site.kind().overlaps(Kind::FEED_FORWARD) && !targets.contains(&module) {
                targets.push(module);
            }
        }
        let peft = self.path.join("peft_format").join(io::CONFIG_FILE);
        let config = if self.result["config"].is_object() {
            self.result["config"].clone()
        } else if peft.exists() {
            read_json(&peft)
        } else {
            json!({
                "peft_type": "HYDRALORA", "r": self.result["r"], "lora_alpha": self.result["alpha"],
                "lora_nums": self.result["n"], "target_modules": targets,
            })
        };
        config.as_object().unwrap().clone()
    }

    /// The loss with what the method adds to it, and its gradients.
    fn loss(&self, decoder: &Decoder, tuned: &dyn Tuned, checkpointing: bool) -> (f64, Gradients) {
        let labels = self.labels.iter().filter(|&&label| label != IGNORE_LABEL).count();
        let pass = Pass::training(0).of_sequences(&self.offsets, &self.domains);
        let pass = pass.checkpointing(checkpointing);
        let factor = 1.0 / labels as f64;
        let found = decoder.gradients(
            self.packed(),
            &self.labels,
            factor,
            tuned.as_adapter(),
            &pass,
            &|pass| tuned.aux_loss(pass),
        );
        let found = found.unwrap();
        (found.loss + found.added, found.gradients)
    }

    /// How far the logits after each sequence are from the reference.
    fn check_logits(&self, decoder: &Decoder, tuned: &dyn Tuned, what: &str) {
        let pass = Pass::inference().of_sequences(&self.offsets, &self.domains);
        let hidden = decoder.hidden(self.packed(), tuned.as_adapter(), &pass).unwrap();
        let last: Vec<usize> = self.offsets[1..].iter().map(|end| end - 1).collect();
        let logits = decoder.logits_with(tuned.as_adapter(), hidden.value(), &last).to_f64();
        let expected = last_logits(&self.path);
        assert_eq!(logits.len(), expected.len());
        let off = logits.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(off < 2e-3, "{}: logits of {what} are off by {off}", self.name);
    }

    /// Which singular values are left after `step`, where the reference says so.
    fn check_ranks(&self, tuned: &dyn Tuned, step: usize) {
        let path = self.path.join("rank_allocation.json");
        if !path.exists() {
            return;
        }
        let all = read_json(&path);
        let found = all.as_array().unwrap().iter().find(|entry| entry["step"] == json!(step));
        let tensors = tuned.tensors();
        let wanted = found.unwrap()["nonzero_E"].as_object().unwrap();
        for (name, flags) in wanted {
            let plain = name.replace("base_model.model.", "").replace(".default", "");
            let left: Vec<u8> =
                tensors[&plain].to_f64().iter().map(|&e| u8::from(e != 0.0)).collect();
            let flags: Vec<u8> = serde_json::from_value(flags.clone()).unwrap();
            assert_eq!(left, flags, "{}: {name} after step {step}", self.name);
        }
    }
}

pub(crate) fn relative_error(got: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len());
    let difference: f64 = got.iter().zip(expected).map(|(a, b)| (a - b).powi(2)).sum();
    let norm: f64 = expected.iter().map(|b| b * b).sum();
    (difference / norm.max(1e-300)).sqrt()
}

/// Largest relative error over tensors of the same name.
fn worst(got: &TensorMap, expected: &TensorMap) -> (f64, String) {
    assert_eq!(
        got.keys().collect::<Vec<_>>(),
        expected.keys().collect::<Vec<_>>(),
        "the same tensors on both sides"
    );
    got.iter()
        .map(|(name, tensor)| {
            assert_eq!(tensor.shape(), expected[name].shape(), "{name}");
            (relative_error(&tensor.to_f64(), &expected[name].to_f64()), name.clone())
        })
        .fold((0.0, String::new()), |a, b| if b.0 > a.0 { b } else { a })
}

/// Name, shape and numbers of every tensor of an adapter's file, as they are there.
fn stored(folder: &Path) -> BTreeMap<String, (Vec<usize>, Vec<f64>)> {
    let bytes = fs::read(folder.join(io::TENSOR_FILE)).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let numbers = |view: &safetensors::tensor::TensorView<'_>| match view.dtype() {
        safetensors::Dtype::F64 => {
            view.data().as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect()
        }
        safetensors::Dtype::F32 => (view.data().as_chunks().0.iter())
            .map(|b| f64::from(f32::from_le_bytes(*b)))
            .collect::<Vec<f64>>(),
        other => panic!("{other:?}"),
    };
    let of = |view: safetensors::tensor::TensorView<'_>| (view.shape().to_vec(), numbers(&view));
    file.iter().map(|(name, view)| (name.to_owned(), of(view))).collect()
}

/// The double-precision logits; the file also holds integers, which adapters never do.
fn last_logits(folder: &Path) -> Vec<f64> {
    let bytes = fs::read(folder.join("logits_last.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let view = file.tensor("logits_last_f64").or_else(|_| file.tensor("f64")).unwrap();
    view.data().as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect()
}

fn check(reference: &Reference, decoder: &Decoder, tolerance: f64) {
    let config = reference.config(decoder);
    let Some(method) = methods::METHODS.iter().find(|method| method.claims(&config)) else {
        skip("references", format!("{}: no method {}", reference.name, config["peft_type"]));
        return;
    };
    let dtype = decoder.dtype();
    let options = method.read_peft(&config).unwrap_or_else(|faults| panic!("{faults:?}"));
    let read = |name: &str| io::decode(&reference.path.join(name), dtype).unwrap();
    // What is trained whole starts from the model itself.
    let start = match reference.path.join("adapter.safetensors").exists() {
        true => read("adapter.safetensors"),
        false => decoder.named_weights(),
    };
    let attached = io::attach(&reference.path, options.as_ref(), start, decoder.config(), dtype);
    let mut tuned = attached.unwrap();
    let curve = reference.curve();
    let domains = tuned.as_domain_aware().map_or(Vec::new(), |aware| aware.domains().to_vec());
    tuned.begin(&TrainingPlan { total_steps: curve.len() - 1, domains: &domains }).unwrap();

    let (loss, gradients) = reference.loss(decoder, tuned.as_ref(), false);
    let expected = reference.exact_loss();
    assert!(
        (loss - expected).abs() <= 1e-5 * expected,
        "{}: loss {loss}, reference {expected}",
        reference.name
    );
    for trainable in tuned.trainables() {
        assert!(
            gradients.get(trainable.var()).is_some(),
            "{}: {} gets no gradient",
            reference.name,
            trainable.parameter.name()
        );
    }
    let exported = tuned.export(&|trainable| gradients.get(trainable.var()).unwrap().clone());
    let (error, name) = worst(&exported, &read("grads_f64_rounded_to_f32.safetensors"));
    // PyTorch's own single precision is off by 1.6e-4 in Qwen3.5's.
    let qwen3_5 = decoder.config().model_type == "qwen3_5_text";
    let tolerance = if dtype == DType::F32 && qwen3_5 { 2e-4 } else { tolerance };
    assert!(error <= tolerance, "{}: gradient of {name} is off by {error}", reference.name);

    reference.check_logits(decoder, tuned.as_ref(), "the start");
    let folder = reference.path.join("peft_format");
    if folder.join(io::TENSOR_FILE).exists() {
        let loaded = io::load(&folder, decoder.config(), dtype).unwrap();
        reference.check_logits(decoder, loaded.tuned.as_ref(), "PEFT's own folder");
        // Written again, it holds the same tensors under PEFT's names, to the last bit.
        let again = tempfile::tempdir().unwrap();
        let again = again.path().join("adapter");
        io::save(&again, loaded.tuned.as_ref(), &Metadata::default(), &decoder.sites()).unwrap();
        assert!(stored(&again) == stored(&folder), "{}: other tensors", reference.name);
    }

    let mut optimizer = Stepper::adamw(tuned.as_ref());
    // The curve was computed in single precision. Where that is visibly off in the first loss, the
    // optimizer's steps carry the error on: a double-precision run leaves the curve just as much.
    let exact = reference.exact_loss();
    let rounded = reference.result["loss_f32"].as_f64().unwrap_or(exact);
    let allowed = (100.0 * ((rounded - exact) / exact).abs()).max(1e-4);
    // Not determined in single precision: PyTorch's own leaves these curves, made in double precision, from the
    // second step on, by up to 2.2e-2 (Gemma 4) and 4.3e-2 (Qwen3.5).
    let ill = dtype == DType::F32
        && ["gemma4_text", "qwen3_5_text"].contains(&&*decoder.config().model_type);
    let learning_rate = reference.result["lr"].as_f64().unwrap_or(2e-4);
    let mut steps = 0;
    for (step, expected) in curve.iter().enumerate() {
        let (loss, gradients) = reference.loss(decoder, tuned.as_ref(), true);
        let allowed = if ill && step > 1 { 5e-2 } else { allowed };
        assert!(
            (loss - expected).abs() < allowed * expected.abs().max(1.0),
            "{}: loss {loss} before step {step}, reference {expected}",
            reference.name
        );
        if step + 1 < curve.len() {
            optimizer.step(tuned.as_mut(), &gradients, learning_rate);
            steps += 1;
            tuned.after_step(steps, &gradients);
            reference.check_ranks(tuned.as_ref(), steps);
        }
    }
    let after = reference.path.join("adapter_after10.safetensors");
    if after.exists() {
        let (error, name) = worst(&tuned.tensors(), &read("adapter_after10.safetensors"));
        assert!(error < 1e-3, "{}: {name} after 10 steps is off by {error}", reference.name);
    }
    println!(
        "{}: {dtype} loss off by {:.1e}, worst gradient {error:.1e}, {steps} steps follow",
        reference.name,
        (loss - exact).abs()
    );
}

/// Logits of every token, the loss, and what follows a prompt token by token.
fn check_base(reference: &Reference, decoder: &Decoder) {
    let (dtype, name) = (decoder.dtype(), &reference.name);
    let _guard = no_grad();
    let hidden = decoder.hidden(reference.packed(), &NoAdapter, &Pass::inference()).unwrap();
    let rows: Vec<usize> = (0..reference.tokens.len()).collect();
    let logits = decoder.logits(hidden.value(), &rows);
    let bytes = fs::read(reference.path.join("logits.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let stored = file.tensor("logits").unwrap();
    let expected: Vec<f64> =
        stored.data().as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect();
    let error = relative_error(&logits.to_f64(), &expected);
    // transformers computes the frequencies of a stretched length in single precision.
    let exact = if name.contains("dynamic") { 1e-8 } else { 1e-9 };
    let allowed = if dtype == DType::F64 { exact } else { 1e-5 };
    assert!(error < allowed, "{name}: logits are off by {error}");
    let labels = reference.labels.iter().filter(|&&label| label != IGNORE_LABEL).count();
    let loss = decoder.loss(&hidden, &reference.labels, 1.0 / labels as f64).loss.value().item();
    let expected = reference.exact_loss();
    assert!((loss - expected).abs() <= 1e-5 * expected, "{name}: loss {loss}, not {expected}");

    let ids =
        |key: &str| -> Vec<u32> { serde_json::from_value(reference.result[key].clone()).unwrap() };
    let (mut tokens, mut fed) = (ids("prompt"), 0);
    let mut cache = [decoder.new_cache()];
    while tokens.len() < ids("greedy").len() {
        let (new, offsets) = (&tokens[fed..], [0, tokens.len() - fed]);
        let batch = Packed { tokens: new, offsets: &offsets };
        let hidden = decoder.extend(batch, &mut cache, &NoAdapter, &Pass::inference()).unwrap();
        let logits = decoder.logits(&hidden, &[new.len() - 1]).to_f64();
        let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
        fed = tokens.len();
        tokens.push(best as u32);
    }
    assert_eq!(tokens, ids("greedy"), "{name}: what follows the prompt");
    println!("{name}: {dtype} logits off by {error:.1e}, greedy tokens agree");
}

fn run(dtype: DType, tolerance: f64, only_small: bool, place: impl Fn(&mut Decoder)) {
    let mut by_model: BTreeMap<PathBuf, Vec<Reference>> = BTreeMap::new();
    for path in roots().iter().flat_map(|root| references(root)) {
        let reference = Reference::read(&path);
        match reference.model() {
            Some(model) => by_model.entry(model).or_default().push(reference),
            None => skip("references", format!("no base model for {}", reference.name)),
        }
    }
    assert!(!by_model.is_empty(), "no references in {:?}", roots());
    for (path, references) in by_model {
        let (config, weights) = match open_weights(&path) {
            Err(error @ hydralora_model::Error::UnknownModelType { .. }) => {
                skip("references", error);
                continue;
            }
            opened => opened.unwrap(),
        };
        if only_small && config.hidden_size > 128 {
            continue;
        }
        let mut decoder = Decoder::load(&config, &weights, dtype).unwrap();
        place(&mut decoder);
        for reference in &references {
            match reference.is_base() {
                true => check_base(reference, &decoder),
                false => check(reference, &decoder, tolerance),
            }
        }
    }
}

/// PiSSA's start is compared as a product, since the signs of singular vectors are free; from PEFT's
/// own signs gradients and steps follow, and what is written is what PEFT converts to.
#[test]
fn pissa_starts_and_converts_as_peft_does() {
    let folder = fixtures().join("tiny/lora_pissa");
    let (config, weights) = open_weights(&fixtures().join("models/tiny-llama")).unwrap();
    let decoder = Decoder::load(&config, &weights, DType::F64).unwrap();
    let result = read_json(&folder.join("pissa.json"));
    let section = json!({
        "rank": result["r"], "alpha": result["lora_alpha"], "targets": result["target_modules"],
        "init_lora_weights": "pissa",
    });
    let options = methods::find("lora").unwrap().read_recipe(section.as_object().unwrap()).unwrap();
    let sites = options.select(&decoder.sites()).unwrap();
    let tokenizer = source_of_any_tokenizer().tokenizer;
    let mut tuned = options.build(&sites, DType::F64, 0);
    tuned.start_from(&Base { decoder: &decoder, tokenizer: &tokenizer, new_tokens: &[] }).unwrap();

    let read = |name: &str| io::decode(&folder.join(name), DType::F64).unwrap();
    let (own, theirs) = (tuned.tensors(), read("adapter.safetensors"));
    assert!(own.keys().eq(theirs.keys()));
    for site in sites.iter().map(|shape| shape.site) {
        let product = |map: &TensorMap| {
            let [a, b] = ["A", "B"].map(|part| &map[&format!("{site}.lora_{part}.weight")]);
            multiply(b, a)
        };
        let error = relative_error(&product(&own), &product(&theirs));
        // Theirs is found in single precision.
        assert!(error < 1e-4, "{site}: the start is off by {error}");
    }

    tuned.load(&mut theirs.clone()).unwrap();
    let renamed = |(name, tensor): (&String, &Tensor)| {
        (name.replace(".weight", "_start.weight"), tensor.clone())
    };
    tuned.load_state(&mut theirs.iter().map(renamed).collect()).unwrap();
    let reference = Reference {
        name: "lora_pissa".to_owned(),
        result: result.clone(),
        path: folder.clone(),
        ..Reference::read(&fixtures().join("tiny/lora"))
    };
    let (loss, gradients) = reference.loss(&decoder, tuned.as_ref(), false);
    assert!((loss - result["loss_f64"].as_f64().unwrap()).abs() < 1e-6);
    let exported = tuned.export(&|trainable| gradients.get(trainable.var()).unwrap().clone());
    let (error, name) = worst(&exported, &read("grads_f64_rounded_to_f32.safetensors"));
    assert!(error < 1e-5, "gradient of {name} is off by {error}");
    reference.check_logits(&decoder, tuned.as_ref(), "the start");

    let mut optimizer = Stepper::adamw(tuned.as_ref());
    for step in 0..10 {
        let (loss, gradients) = reference.loss(&decoder, tuned.as_ref(), false);
        assert!((loss - result["curve"][step].as_f64().unwrap()).abs() < 1e-4, "step {step}");
        optimizer.step(tuned.as_mut(), &gradients, result["lr"].as_f64().unwrap());
    }
    let converted = tuned.file_tensors();
    let (error, name) = worst(&converted, &read("converted/adapter_model.safetensors"));
    assert!(error < 1e-4, "{name} is off by {error}");
    let written = tuned.peft_config(&decoder.sites());
    let theirs = read_json(&folder.join("converted").join(io::CONFIG_FILE));
    for key in ["r", "lora_alpha", "init_lora_weights", "use_rslora"] {
        assert_eq!(written[key], theirs[key], "{key}");
    }
    // PEFT's conversion, read here, is the same model.
    let loaded = io::load(&folder.join("converted"), decoder.config(), DType::F64).unwrap();
    let (ours, _) = reference.loss(&decoder, tuned.as_ref(), false);
    let (theirs, _) = reference.loss(&decoder, loaded.tuned.as_ref(), false);
    assert!((ours - theirs).abs() < 1e-4, "{ours} {theirs}");
}

/// Experts start where the published code's do, compared as products, since the signs of singular vectors
/// are free.
#[test]
fn experts_start_in_segments_as_published() {
    let folder = fixtures().join("tiny/lora_split_segments");
    let (config, weights) = open_weights(&fixtures().join("models/tiny-llama")).unwrap();
    let decoder = Decoder::load(&config, &weights, DType::F64).unwrap();
    let published = &read_json(&folder.join("result.json"))["config"];
    let experts = published["lora_nums"].as_u64().unwrap();
    let section = json!({
        "rank": published["r"], "alpha": published["lora_alpha"], "num_experts": experts,
        "targets": published["target_modules"], "init_lora_weights": "singular_segments",
    });
    let options = methods::find("lora-split").unwrap();
    let options = options.read_recipe(section.as_object().unwrap()).unwrap();
    let sites = options.select(&decoder.sites()).unwrap();
    let tokenizer = source_of_any_tokenizer().tokenizer;
    let mut tuned = options.build(&sites, DType::F64, 0);
    tuned.start_from(&Base { decoder: &decoder, tokenizer: &tokenizer, new_tokens: &[] }).unwrap();
    let theirs = io::decode(&folder.join("adapter.safetensors"), DType::F64).unwrap();
    let own = tuned.file_tensors();
    assert!(own.keys().eq(theirs.keys()));
    for site in sites.iter().map(|shape| shape.site) {
        let pairs = (0..experts).map(|expert| expert.to_string()).chain(["_start".to_owned()]);
        for pair in pairs {
            let product = |map: &TensorMap| {
                let [a, b] =
                    ["A", "B"].map(|part| &map[&format!("{site}.lora_{part}{pair}.weight")]);
                multiply(b, a)
            };
            let error = relative_error(&product(&own), &product(&theirs));
            // Theirs is stored in single precision.
            assert!(error < 1e-6, "{site} {pair}: the start is off by {error}");
        }
    }
}

/// `b · a`.
fn multiply(b: &Tensor, a: &Tensor) -> Vec<f64> {
    let (rank, inputs) = (a.rows(), a.cols());
    let (a, b) = (a.to_f64(), b.to_f64());
    let entry = |i: usize, j: usize| (0..rank).map(|k| b[i * rank + k] * a[k * inputs + j]).sum();
    (0..b.len() / rank)
        .flat_map(|i| (0..inputs).map(move |j| (i, j)))
        .map(|(i, j)| entry(i, j))
        .collect()
}

/// A tokenizer where one has to be given and none is used.
pub(crate) fn source_of_any_tokenizer() -> ModelSource {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/fixtures/stories260K");
    ModelSource::open(&folder).unwrap()
}

#[test]
fn f32_agrees_with_the_double_precision_reference() {
    run(DType::F32, 1e-4, false, |_| {});
}

#[cfg(feature = "gpu")]
#[test]
fn a_gpu_agrees_with_the_double_precision_reference() {
    let Some(device) = hydralora_kernels::check::device() else { return };
    run(DType::F32, 1e-4, true, |decoder| decoder.to_device(&device));
}

#[test]
fn f64_agrees_to_the_reference_rounding() {
    run(DType::F64, 2e-7, true, |_| {});
}
