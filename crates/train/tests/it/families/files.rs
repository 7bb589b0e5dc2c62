//! Every family from both kinds of files: merged into a folder and a GGUF file, and trained from a GGUF file.

use super::{Trial, models};
use crate::matrix::merge::randomise;
use crate::matrix::{Case, cases};
use crate::parity::relative_error;
use hydralora_kernels::block::BlockFormat;
use hydralora_kernels::{DType, Tensor, no_grad};
use hydralora_model::adapter::{Adapter, NoAdapter, Pass};
use hydralora_model::save::{Saving, random_gguf};
use hydralora_model::source::open_weights;
use hydralora_model::{
    Decoder, ModelConfig, ModelIdentity, ModelSource, RopeScaling, Tokenizer, shapes,
};
use hydralora_peft::merge::{Gates, MergePlan};
use hydralora_train::Stepper;
use serde_json::json;
use std::collections::BTreeSet;
use std::path::Path;

/// What single precision leaves of a file's numbers.
const SINGLE: f64 = 1e-5;

/// Sets what GGUF files of the architecture imply and these models were made to differ in.
fn as_files_imply(config: &mut ModelConfig) {
    if config.model_type.starts_with("gemma") && config.layer_embeddings.is_none() {
        config.arithmetic.attention_scale = Some(1.0 / (config.head_dim as f64).sqrt());
    }
    if config.model_type == "smollm3" {
        let rotated = (0..config.num_hidden_layers).map(|layer| !(layer + 1).is_multiple_of(4));
        config.rotated_layers = Some(rotated.collect());
    }
    if config.gguf_names().architecture == "llama" {
        config.sliding_window = None;
    }
}

/// The first model of every family, and of Gemma 4 both.
fn one_of_each() -> Vec<(ModelSource, Trial)> {
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    for path in models() {
        let Ok((mut config, weights)) = open_weights(&path) else { continue };
        // GGUF files have no word for it.
        if matches!(config.rope.scaling, RopeScaling::Dynamic { .. }) {
            continue;
        }
        let values_of_keys = config.layer_embeddings.is_some_and(|of| of.values_of_keys);
        if !seen.insert((config.model_type.clone(), values_of_keys)) {
            continue;
        }
        as_files_imply(&mut config);
        let decoder = Decoder::load(&config, &weights, DType::F64).unwrap();
        let (reference, fingerprint) = (String::new(), String::new());
        let name = config.model_type.clone();
        let identity = ModelIdentity { name, reference, fingerprint };
        let tokenizer = tokenizer_for(&config);
        let source = ModelSource { config, weights, tokenizer, identity, added: Vec::new() };
        found.push((source, Trial::of(decoder)));
    }
    found
}

/// Any model with as many tokens has a tokenizer that fits.
fn tokenizer_for(config: &ModelConfig) -> Tokenizer {
    let scratch = tempfile::tempdir().unwrap();
    let mut plain = shapes::find("smollm2-135m").unwrap().config().unwrap();
    (plain.vocab_size, plain.num_hidden_layers) = (config.vocab_size, 1);
    let file = scratch.path().join("plain.gguf");
    random_gguf(&plain, BlockFormat::Q8_0, 1, &file).unwrap();
    ModelSource::open(&file).unwrap().tokenizer
}

/// Why the model has no GGUF file; none if it has.
fn no_gguf(config: &ModelConfig) -> Option<&'static str> {
    // Its last layers use other keys than llama.cpp has them use.
    let shared = config.layer_embeddings.is_some_and(|of| of.shared_layers == 2);
    shared.then_some("num_kv_shared_layers")
}

/// Writes the model with `edit` as a folder or a GGUF file, and opens it.
fn written(
    source: &ModelSource,
    edit: &dyn Fn(&str, Tensor) -> Tensor,
    untie: bool,
    gguf: Option<&Path>,
    folder: &Path,
) -> hydralora_model::Result<Decoder> {
    let (format, name) = (BlockFormat::F32, "written");
    let saving = Saving { source, format, chat_template: None, end_ids: &[], name, edit, untie };
    let (config, weights) = match gguf {
        Some(path) => {
            saving.gguf(path)?;
            open_weights(path)?
        }
        None => {
            let place = folder.join("written");
            let _ = std::fs::remove_dir_all(&place);
            saving.folder(&place)?;
            // A folder carries what it was read from, which `as_files_imply` changed.
            let config = source.config.to_json("float32").to_string();
            std::fs::write(place.join("config.json"), config).unwrap();
            open_weights(&place)?
        }
    };
    Decoder::load(&config, &weights, DType::F64)
}

impl Trial {
    /// Logits of some tokens of both sequences, with an adapter.
    fn logits(&self, decoder: &Decoder, adapter: &dyn Adapter) -> Vec<f64> {
        let _guard = no_grad();
        let pass = Pass::inference().of_sequences(&self.offsets, &[0, 0]);
        let hidden = decoder.hidden(self.packed(), adapter, &pass).unwrap();
        decoder.logits_with(adapter, hidden.value(), &[0, 9, 20, 36, 37, 44, 51]).to_f64()
    }
}

/// The cases that every family has layers for.
fn common_cases() -> Vec<Case> {
    let beside = ["rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices"];
    let mut cases = cases();
    cases.retain(|case| {
        case.options["init"] != json!("text")
            && case.method != "full"
            && !case.options["targets"].to_string().contains("embed_tokens")
            && beside.iter().all(|key| case.options[*key].is_null())
    });
    cases
}

#[test]
fn every_method_merges_on_every_family_into_both_kinds_of_files() {
    let scratch = tempfile::tempdir().unwrap();
    let (mut files, mut merged) = (0, 0);
    for (source, trial) in one_of_each() {
        let name = &trial.name;
        let file = scratch.path().join("merged.gguf");
        let base = trial.logits(&trial.decoder, &NoAdapter);
        let all = trial.decoder.sites();
        let mut here = 0;
        for case in common_cases() {
            let Some(mut tuned) = trial.build(&case, &source.tokenizer) else { continue };
            randomise(tuned.as_mut());
            let domain = tuned.as_domain_aware().map(|aware| aware.domains()[0].clone());
            if let Some(domain) = domain {
                tuned.as_domain_aware_mut().unwrap().choose_domain(&domain).unwrap();
            }
            // What uses only some heads has no even gates.
            let some_heads = case.options().to_recipe();
            if some_heads.get("router_top_k").is_some_and(|k| !k.is_null()) {
                continue;
            }
            let gates = [Gates::PerToken, Gates::Uniform];
            let plan =
                gates.iter().find_map(|gates| MergePlan::new(tuned.as_ref(), &all, gates).ok());
            let Some(plan) = plan else { continue };
            let what = format!("{name}: {}", case.name());
            let expected = trial.logits(&trial.decoder, tuned.as_adapter());
            assert!(relative_error(&expected, &base) > 1e-4, "{what} does nothing");
            let edit = |name: &str, tensor: Tensor| plan.edit(name, tensor);
            for gguf in [None, Some(file.as_path())] {
                let found = written(&source, &edit, plan.unties(), gguf, scratch.path());
                if let Some(field) = no_gguf(&source.config).filter(|_| gguf.is_some()) {
                    let error = found.err().unwrap().to_string();
                    assert!(error.contains(field), "{what}: {error}");
                    continue;
                }
                let found = trial.logits(&found.unwrap(), &NoAdapter);
                let off = relative_error(&found, &expected);
                assert!(off < SINGLE, "{what}: gguf {}: off by {off}", gguf.is_some());
                files += 1;
            }
            here += 1;
        }
        println!("{name}: {here} merged");
        assert!(here > 4, "{name}: {here}");
        merged += here;
    }
    assert!(files > merged && merged > 0);
}

/// A step of HydraLoRA and one of LoRA on a GGUF file are those on the folder.
#[test]
fn every_family_trains_from_a_gguf_file() {
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("base.gguf");
    let mut trained = 0;
    for (source, trial) in one_of_each() {
        if no_gguf(&source.config).is_some() {
            continue;
        }
        let edit = |_: &str, tensor: Tensor| tensor;
        let decoder = written(&source, &edit, false, Some(&file), scratch.path()).unwrap();
        let other = Trial::of(decoder);
        let name = &trial.name;
        for method in ["hydralora", "lora"] {
            let case = cases().into_iter().find(|case| case.method == method).unwrap();
            let mut curves = Vec::new();
            for trial in [&trial, &other] {
                let mut tuned = trial.build(&case, &source.tokenizer).unwrap();
                let mut optimizer = Stepper::adamw(tuned.as_ref());
                let first = trial.trained(tuned.as_ref(), false);
                optimizer.step(tuned.as_mut(), &first.gradients, 1e-2);
                tuned.after_step(1, &first.gradients);
                let second = trial.trained(tuned.as_ref(), false);
                assert!(second.loss != first.loss, "{name}: {method} learns nothing");
                curves.push([first.loss, second.loss]);
            }
            for (found, expected) in curves[1].iter().zip(curves[0]) {
                let off = (found - expected).abs() / expected;
                assert!(off < SINGLE, "{name}: {method}: {curves:?}");
            }
        }
        trained += 1;
    }
    assert!(trained > 12, "{trained}");
}
