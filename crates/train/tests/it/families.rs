//! Every method on a small model of every family: what does not depend on how a pass is cut up may not.
//!
//! The models are those of the parity fixtures, or of the folder that `HYDRALORA_FAMILIES_DIR` names.

mod files;

use crate::matrix::{Case, cases};
use crate::parity::{relative_error, source_of_any_tokenizer};
use hydralora_kernels::{DType, Tensor, Var, no_grad};
use hydralora_model::adapter::{Adapter, NoAdapter, Pass};
use hydralora_model::source::open_weights;
use hydralora_model::{Decoder, IGNORE_LABEL, Packed, RopeScaling, Run, Tokenizer, Trained, Tree};
use hydralora_peft::{Base, Error, TrainingPlan, Tuned};
use hydralora_testing::skip;
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};

/// What double precision leaves of the difference between two orders of summation.
const ROUNDING: f64 = 1e-9;

fn models() -> Vec<PathBuf> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity/families");
    let folder = std::env::var_os("HYDRALORA_FAMILIES_DIR").map_or(fixtures, PathBuf::from);
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path().join("model"));
    let mut found: Vec<PathBuf> =
        entries.filter(|path| path.join("config.json").exists()).collect();
    found.sort();
    assert!(!found.is_empty());
    found
}

/// A model and a batch for it.
struct Trial {
    name: String,
    decoder: Decoder,
    tokens: Vec<u32>,
    offsets: Vec<usize>,
}

impl Trial {
    fn open(path: &Path) -> Option<Self> {
        let opened = open_weights(path);
        if let Err(error @ hydralora_model::Error::UnknownModelType { .. }) = &opened {
            skip("references", error);
            return None;
        }
        let (config, weights) = opened.unwrap();
        Some(Self::of(Decoder::load(&config, &weights, DType::F64).unwrap()))
    }

    fn of(decoder: Decoder) -> Self {
        let name = decoder.config().model_type.clone();
        // Longer than the original context of the model with LongRoPE, and than all windows.
        let tokens = (0..52_u32).map(|i| (i * 37 + 11) % 300 + 3).collect();
        Self { name, decoder, tokens, offsets: vec![0, 37, 52] }
    }

    fn packed(&self) -> Packed<'_> {
        Packed { tokens: &self.tokens, offsets: &self.offsets }
    }

    /// The adapter of a case, moved away from its start; none where the method says that the family's
    /// layers are not for it.
    fn build(&self, case: &crate::matrix::Case, tokenizer: &Tokenizer) -> Option<Box<dyn Tuned>> {
        let options = case.options();
        let sites = match options.select(&self.decoder.sites()) {
            // A layer that these models have not.
            Err(Error::TargetMatchesNothing { .. }) => return None,
            sites => sites.unwrap(),
        };
        let mut tuned = options.build(&sites, DType::F64, 7);
        let base = Base { decoder: &self.decoder, tokenizer, new_tokens: &[] };
        match tuned.start_from(&base) {
            Err(Error::Options { faults }) if case.method == "prefix-tuning" => {
                assert!(!self.decoder.config().has_equal_keys());
                assert!(faults[0].to_string().contains("layers of"), "{}", faults[0]);
                return None;
            }
            started => started.unwrap(),
        }
        for trainable in tuned.trainables_mut() {
            for (at, value) in
                trainable.parameter.value_mut().data_mut::<f64>().iter_mut().enumerate()
            {
                *value += 0.02 * ((at * 7919 % 13) as f64 / 6.0 - 1.0);
            }
        }
        let domains = ["facts".to_owned(), "stories".to_owned()];
        tuned.begin(&TrainingPlan { total_steps: 20, domains: &domains }).unwrap();
        Some(tuned)
    }

    fn trained(&self, tuned: &dyn Tuned, checkpointing: bool) -> Trained {
        let labels: Vec<u32> = (self.offsets.windows(2))
            .flat_map(|w| {
                let next = self.tokens[w[0] + 1..w[1]].iter().copied();
                next.chain([IGNORE_LABEL]).collect::<Vec<_>>()
            })
            .collect();
        let pass = Pass::training(3).of_sequences(&self.offsets, &[0, 1]);
        let pass = pass.checkpointing(checkpointing);
        let added = |pass: &Pass<'_>| tuned.aux_loss(pass);
        self.decoder
            .gradients(self.packed(), &labels, 0.1, tuned.as_adapter(), &pass, &added)
            .unwrap()
    }

    /// Final hidden states of all tokens in one pass.
    fn hidden(&self, adapter: &dyn Adapter) -> Vec<f64> {
        let _guard = no_grad();
        let pass = Pass::inference().of_sequences(&self.offsets, &[0, 1]);
        self.decoder.hidden(self.packed(), adapter, &pass).unwrap().value().to_f64()
    }

    /// The same through caches, `step` tokens of both sequences at a time.
    fn in_pieces(&self, adapter: &dyn Adapter, step: usize) -> Vec<f64> {
        let width = self.decoder.config().hidden_size;
        let mut caches = [self.decoder.new_cache(), self.decoder.new_cache()];
        let mut found = [Vec::new(), Vec::new()];
        let mut fed = [0, 0];
        let lengths = [self.offsets[1], self.offsets[2] - self.offsets[1]];
        while fed != lengths {
            let (mut tokens, mut offsets, mut domains) = (Vec::new(), vec![0], Vec::new());
            let mut part = Vec::new();
            let left: Vec<usize> = (0..2).filter(|&s| fed[s] < lengths[s]).collect();
            for sequence in left {
                let end = lengths[sequence].min(fed[sequence] + step);
                let first = self.offsets[sequence];
                tokens.extend_from_slice(&self.tokens[first + fed[sequence]..first + end]);
                offsets.push(tokens.len());
                domains.push(sequence as u32);
                part.push(sequence);
                fed[sequence] = end;
            }
            let pass = Pass::inference().of_sequences(&offsets, &domains);
            let chosen = part[0]..part[part.len() - 1] + 1;
            let batch = Packed { tokens: &tokens, offsets: &offsets };
            let rows =
                self.decoder.extend(batch, &mut caches[chosen], adapter, &pass).unwrap().to_f64();
            for (at, &sequence) in part.iter().enumerate() {
                found[sequence]
                    .extend_from_slice(&rows[offsets[at] * width..offsets[at + 1] * width]);
            }
        }
        found.concat()
    }

    /// Rows whose values do not depend on how long their sequence was when they were fed: with LongRoPE
    /// those of a sequence that outgrows the original context are others before it does.
    fn settled(&self, rows: &[f64]) -> Vec<f64> {
        let mut first = 0;
        if let RopeScaling::LongRope { original_max_position_embeddings, .. } =
            self.decoder.config().rope.scaling
            && self.offsets[1] > original_max_position_embeddings
        {
            first = original_max_position_embeddings;
        }
        rows[first * self.decoder.config().hidden_size..].to_vec()
    }

    /// The same by a tree: the first sequence as a stem, its end as one of two branches.
    fn in_a_tree(&self, adapter: &dyn Adapter) -> Option<Vec<f64>> {
        if self.decoder.lead_rows(adapter, &Pass::inference()) > 0 {
            return None;
        }
        let width = self.decoder.config().hidden_size;
        let end = self.offsets[1];
        let other = &self.tokens[3..8];
        let tokens = [&self.tokens[..10], other, &self.tokens[10..end]].concat();
        let runs = [
            Run { len: 10, parent: None },
            Run { len: other.len(), parent: Some(0) },
            Run { len: end - 10, parent: Some(0) },
        ];
        let tree = Tree { tokens: &tokens, runs: &runs };
        let offsets = [0, tokens.len()];
        let pass = Pass::inference().of_sequences(&offsets, &[0]);
        let rows = self.decoder.hidden_tree(tree, None, adapter, &pass).unwrap().to_f64();
        Some([&rows[..10 * width], &rows[15 * width..]].concat())
    }
}

/// Full fine-tuning leaves out nothing but constants, and every gradient is the slope of the loss.
#[test]
fn full_fine_tuning_trains_every_weight_of_every_family() {
    let tokenizer = source_of_any_tokenizer().tokenizer;
    let case = cases().into_iter().find(|case| case.method == "full").unwrap();
    for path in models() {
        let Some(trial) = Trial::open(&path) else { continue };
        let name = &trial.name;
        let mut tuned = trial.build(&case, &tokenizer).unwrap();
        let mut left: Vec<String> = trial.decoder.named_weights().into_keys().collect();
        let found = trial.trained(tuned.as_ref(), false);
        let gradients: Vec<Vec<f64>> = (tuned.trainables().into_iter())
            .map(|trainable| {
                left.retain(|name| name != trainable.parameter.name());
                let gradient = found.gradients.get(trainable.var());
                let gradient = gradient.map(Tensor::to_f64).unwrap_or_default();
                let what = trainable.parameter.name();
                assert!(gradient.iter().any(|&g| g != 0.0), "{name}: {what} has no gradient");
                gradient
            })
            .collect();
        assert!(left.iter().all(|name| name.ends_with("layer_scalar")), "{name}: {left:?}");
        for (number, gradient) in gradients.iter().enumerate() {
            let steepest = (0..gradient.len())
                .max_by(|&a, &b| gradient[a].abs().total_cmp(&gradient[b].abs()))
                .unwrap();
            let mut loss_at = |step: f64| {
                let mut all = tuned.trainables_mut();
                all[number].parameter.value_mut().data_mut::<f64>()[steepest] += step;
                trial.trained(tuned.as_ref(), false).loss
            };
            let (above, below) = (loss_at(1e-6), loss_at(-2e-6));
            loss_at(1e-6);
            let slope = (above - below) / 2e-6;
            let what = tuned.trainables()[number].parameter.name().to_owned();
            let expected = gradient[steepest];
            let off = (slope - expected).abs();
            let limit = 1e-5 * expected.abs() + 1e-7;
            assert!(off < limit, "{name}: {what} {expected} where the loss rises by {slope}");
        }
    }
}

#[test]
fn every_method_trains_and_generates_on_every_family() {
    let tokenizer = source_of_any_tokenizer().tokenizer;
    for path in models() {
        let Some(trial) = Trial::open(&path) else { continue };
        let name = &trial.name;
        let mut tried = 0;
        // These models have fewer tokens than the tokenizer at hand.
        let mut cases = cases();
        cases.retain(|case| case.options["init"] != json!("text"));
        // Patterns and modules beside the targets name layers that not every family has.
        let beside =
            ["rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices"];
        let ends = |case: &Case| case.options["targets"].to_string().contains("embed_tokens");
        cases.retain(|case| !ends(case) && beside.iter().all(|key| case.options[*key].is_null()));
        // Loads are counted of layers outside the decoder layers too.
        if let Some(counted) = cases.iter_mut().find(|case| case.options["balance_weight"] == 0.01)
        {
            counted.options["targets"] = json!("all");
        }
        for case in &cases {
            let what = format!("{name}: {}", case.name());
            let Some(tuned) = trial.build(case, &tokenizer) else { continue };
            let plain = trial.trained(tuned.as_ref(), false);
            let again = trial.trained(tuned.as_ref(), true);
            assert!((plain.loss - again.loss).abs() < ROUNDING * plain.loss, "{what}: loss");
            let mut moved = 0;
            for trainable in tuned.trainables() {
                let gradients = [&plain, &again].map(|of| of.gradients.get(trainable.var()));
                let [Some(plain), Some(again)] = gradients.map(|g| g.map(Tensor::to_f64)) else {
                    assert_eq!(gradients[0].is_some(), gradients[1].is_some(), "{what}");
                    continue;
                };
                let size: f64 = plain.iter().map(|g| g * g).sum();
                let off = relative_error(&again, &plain);
                let tensor = trainable.parameter.name();
                assert!(off < ROUNDING || size < 1e-24, "{what}: {tensor} is off by {off}");
                moved += usize::from(size > 0.0);
            }
            assert!(moved > 0, "{what}: nothing gets a gradient");
            let adapter = tuned.as_adapter();
            let whole = trial.hidden(adapter);
            for step in [1, 3, 40] {
                let off = relative_error(
                    &trial.settled(&trial.in_pieces(adapter, step)),
                    &trial.settled(&whole),
                );
                assert!(off < ROUNDING, "{what}: {step} at a time are off by {off}");
            }
            if let Some(found) = trial.in_a_tree(adapter) {
                let off = relative_error(&found, &whole[..found.len()]);
                assert!(off < ROUNDING, "{what}: a tree is off by {off}");
            }
            tried += 1;
        }
        println!("{name}: {tried} adapters");
        let base = trial.hidden(&NoAdapter);
        for step in [1, 5] {
            let found = trial.settled(&trial.in_pieces(&NoAdapter, step));
            let off = relative_error(&found, &trial.settled(&base));
            assert!(off < ROUNDING, "{name}: the base, {step} at a time, is off by {off}");
        }
    }
}

/// A prompt that holds the embeddings of tokens is those tokens, as it is in PEFT; Granite's factor is on
/// what enters the model, the others' on what their embedding gives.
#[test]
fn a_prompt_of_embeddings_is_its_tokens_in_every_family() {
    struct Prompt(Var);
    impl Adapter for Prompt {
        fn prompt(&self, _pass: &Pass<'_>) -> Option<Var> {
            Some(self.0.clone())
        }
    }
    let mut compared = 0;
    for trial in models().iter().filter_map(|path| Trial::open(path)) {
        // Its layers have embeddings of tokens of their own, and a prompt has none.
        if trial.decoder.config().layer_embeddings.is_some_and(|of| of.width > 0) {
            continue;
        }
        let (lead, rest) = trial.tokens.split_at(3);
        let rows = trial.decoder.embeddings(lead).unwrap();
        let prompt = Prompt(Var::constant(rows.clone()));
        let pass = Pass::inference();
        let hidden = |tokens: &[u32], adapter: &dyn Adapter| {
            let batch = Packed { tokens, offsets: &[0, tokens.len()] };
            trial.decoder.hidden(batch, adapter, &pass).unwrap().value().to_f64()
        };
        let whole = hidden(&trial.tokens, &NoAdapter);
        let width = trial.decoder.config().hidden_size;
        let off = relative_error(&hidden(rest, &prompt), &whole[3 * width..]);
        assert!(off < ROUNDING, "{}: {off}", trial.name);
        if trial.name == "granite" {
            let raw = trial.decoder.rows_of("model.embed_tokens.weight", lead).unwrap();
            assert_eq!(rows.to_f64(), raw.to_f64());
        }
        compared += 1;
    }
    assert!(compared > 0);
}
