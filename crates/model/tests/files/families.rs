//! Small models of every family that is read and written as GGUF: what a file says is what was written, and
//! random models of every published shape can be made.
//!
//! `HYDRALORA_FAMILIES_DIR` names a folder of other models in the form of the parity fixtures. With
//! `HYDRALORA_GGUF_OUT` the files stay in that folder, each beside a prompt and what follows it, for
//! `tests/llama_cpp.py` to compare with llama.cpp.

use hydralora_kernels::block::BlockFormat;
use hydralora_kernels::{DType, Tensor, no_grad};
use hydralora_model::save::{Saving, random_gguf};
use hydralora_model::source::open_weights;
use hydralora_model::{
    Decoder, ModelConfig, ModelIdentity, ModelSource, Packed, RopeScaling, Weights, shapes,
};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

/// The folders of one model each.
fn models() -> Vec<PathBuf> {
    let fixtures =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../train/tests/fixtures/parity/families");
    let folder = std::env::var_os("HYDRALORA_FAMILIES_DIR").map_or(fixtures, PathBuf::from);
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path().join("model"));
    let mut found: Vec<PathBuf> =
        entries.filter(|path| path.join("config.json").exists()).collect();
    found.sort();
    assert!(!found.is_empty());
    found
}

/// Logits of every token of some sequences.
pub(crate) fn logits(decoder: &Decoder, batch: Packed<'_>) -> Vec<f64> {
    let _guard = no_grad();
    let pass = hydralora_model::adapter::Pass::inference();
    let hidden = decoder.hidden(batch, &hydralora_model::adapter::NoAdapter, &pass).unwrap();
    let rows: Vec<usize> = (0..batch.tokens.len()).collect();
    decoder.logits(hidden.value(), &rows).to_f64()
}

/// The tokens that follow `prompt` greedily.
pub(crate) fn greedy(decoder: &Decoder, prompt: &[u32], count: usize) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    for _ in 0..count {
        let batch = Packed { tokens: &tokens, offsets: &[0, tokens.len()] };
        let logits = decoder.last_logits(batch).unwrap().to_f64();
        let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
        tokens.push(best as u32);
    }
    tokens.split_off(prompt.len())
}

pub(crate) fn relative_error(got: &[f64], expected: &[f64]) -> f64 {
    let difference: f64 = got.iter().zip(expected).map(|(a, b)| (a - b).powi(2)).sum();
    (difference / expected.iter().map(|b| b * b).sum::<f64>()).sqrt()
}

/// Sets what files of the architecture imply and these models were made to differ in.
fn as_files_imply(config: &mut ModelConfig) {
    if config.layer_embeddings.is_some_and(|of| of.shared_layers > 0) {
        // Of three layers that share, the keys are those of the last two before them.
        config.layer_embeddings.as_mut().unwrap().shared_layers = 3;
    } else if ["gemma2", "gemma3_text"].contains(&&*config.model_type) {
        config.arithmetic.attention_scale = Some(1.0 / (config.head_dim as f64).sqrt());
    }
    if config.model_type == "smollm3" {
        let rotated = (0..config.num_hidden_layers).map(|layer| !(layer + 1).is_multiple_of(4));
        config.rotated_layers = Some(rotated.collect());
    }
    // llama.cpp goes by the context it is opened with, which is longer than these sequences.
    if let RopeScaling::LongRope { original_max_position_embeddings, .. } = &mut config.rope.scaling
    {
        *original_max_position_embeddings = 4096;
        config.max_position_embeddings = 8192;
    }
    if config.gguf_names().architecture == "llama" {
        config.sliding_window = None;
    }
}

/// Whether a file holds single-precision divisors of frequencies, where a configuration holds formulas.
fn rounds_frequencies(config: &ModelConfig) -> bool {
    matches!(config.rope.scaling, RopeScaling::LongRope { .. } | RopeScaling::Llama3 { .. })
}

/// The weights of the small Gemma 4 at `path` with a third layer that uses earlier keys: its feed-forward
/// block becomes as wide as those of the other two.
fn with_three_sharing(path: &Path, scratch: &Path) -> Weights {
    let to = scratch.join("three.safetensors");
    let rename = |name: &str| match name.strip_prefix("model.layers.4.mlp") {
        Some(rest) => vec![name.to_owned(), format!("model.layers.3.mlp{rest}")],
        None if name.starts_with("model.layers.3.mlp") => Vec::new(),
        None => vec![name.to_owned()],
    };
    let bytes = fs::read(path.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensors = file
        .iter()
        .flat_map(|(name, view)| rename(name).into_iter().map(move |name| (name, view.clone())));
    fs::write(&to, safetensors::serialize(tensors.collect::<Vec<_>>(), None).unwrap()).unwrap();
    Weights::open(&to).unwrap()
}

#[test]
fn what_a_file_cannot_say_is_refused_by_field() {
    let scratch = tempfile::tempdir().unwrap();
    let refused = |name: &str, change: &dyn Fn(&mut ModelConfig), field: &str| {
        let mut config = shapes::find(name).unwrap().config().unwrap();
        change(&mut config);
        let path = scratch.path().join("never.gguf");
        let error = random_gguf(&config, BlockFormat::Q8_0, 1, &path).unwrap_err().to_string();
        assert!(error.contains(field), "{error}");
        assert!(!path.exists());
    };
    let scale = |config: &mut ModelConfig| config.arithmetic.attention_scale = Some(0.5);
    refused("gemma2-2b", &scale, "query_pre_attn_scalar");
    let layers = |config: &mut ModelConfig| config.sliding_layers = None;
    refused("gemma3-270m", &layers, "layer_types");
    let rotated = |config: &mut ModelConfig| config.rotated_layers = None;
    refused("smollm3-3b", &rotated, "no_rope_layers");
    let window = |config: &mut ModelConfig| config.sliding_window = Some(8);
    refused("mistral-7b", &window, "sliding_window");
    let rope = |config: &mut ModelConfig| {
        config.rope.scaling =
            RopeScaling::Dynamic { factor: 2.0, original_max_position_embeddings: 8 };
    };
    refused("llama3.2-1b", &rope, "rope_parameters");
    let layers = |config: &mut ModelConfig| {
        config.linear_attention.as_mut().unwrap().layers[1] = false;
    };
    refused("qwen3.5-9b", &layers, "layer_types");
    let width = |config: &mut ModelConfig| {
        config.linear_attention.as_mut().unwrap().value_head_dim = 64;
    };
    refused("qwen3.5-9b", &width, "linear_value_head_dim");
    let bias = |config: &mut ModelConfig| config.attention_bias = true;
    refused("qwen3.5-9b", &bias, "attention_bias");
}

#[test]
fn a_gguf_file_is_the_same_model() {
    let scratch = tempfile::tempdir().unwrap();
    let tokens: Vec<u32> = (0..60).map(|i| (i * 37 + 11) % 300 + 3).collect();
    let batch = Packed { tokens: &tokens, offsets: &[0, 40, 60] };
    for path in models() {
        let json: Value =
            serde_json::from_slice(&fs::read(path.join("config.json")).unwrap()).unwrap();
        let Ok((mut config, mut weights)) = open_weights(&path) else {
            hydralora_testing::skip("references", format!("no family {}", json["model_type"]));
            continue;
        };
        let name = config.model_type.clone();
        let file = scratch.path().join(format!("{name}.gguf"));
        if matches!(config.rope.scaling, RopeScaling::Dynamic { .. }) {
            let refusal = random_gguf(&config, BlockFormat::F32, 1, &file).unwrap_err().to_string();
            assert!(refusal.contains("rope_parameters"), "{refusal}");
            continue;
        }
        if config.layer_embeddings.is_some_and(|of| of.shared_layers > 0) {
            let refusal = random_gguf(&config, BlockFormat::F32, 1, &file).unwrap_err().to_string();
            let words =
                ["num_kv_shared_layers", "layer 4 does not", "a Hugging Face folder instead"];
            assert!(words.iter().all(|word| refusal.contains(word)), "{refusal}");
            weights = with_three_sharing(&path, scratch.path());
        }
        // Any model with as many tokens has a tokenizer that fits.
        let mut plain = shapes::find("smollm2-135m").unwrap().config().unwrap();
        (plain.vocab_size, plain.num_hidden_layers) = (config.vocab_size, 1);
        random_gguf(&plain, BlockFormat::Q8_0, 1, &file).unwrap();
        let tokenizer = ModelSource::open(&file).unwrap().tokenizer;
        as_files_imply(&mut config);
        let decoder = Decoder::load(&config, &weights, DType::F64).unwrap();
        let expected = logits(&decoder, batch);
        let (reference, fingerprint) = (String::new(), String::new());
        let identity = ModelIdentity { name: name.clone(), reference, fingerprint };
        let source =
            ModelSource { config: config.clone(), weights, tokenizer, identity, added: Vec::new() };
        let saving = Saving {
            source: &source,
            name: "small",
            edit: &|_, tensor: Tensor| tensor,
            format: BlockFormat::F32,
            chat_template: None,
            end_ids: &[],
            untie: false,
        };
        let written = scratch.path().join(format!("{name}-written.gguf"));
        saving.gguf(&written).unwrap();
        if let Some(out) = std::env::var_os("HYDRALORA_GGUF_OUT").map(PathBuf::from) {
            let fixture = path.parent().and_then(Path::file_name).unwrap().to_string_lossy();
            fs::copy(&written, out.join(format!("{fixture}.gguf"))).unwrap();
            let prompt = &tokens[..12];
            let follows = greedy(&decoder, prompt, 20);
            let json = serde_json::json!({"prompt": prompt, "greedy": follows});
            fs::write(out.join(format!("{fixture}.json")), json.to_string()).unwrap();
        }
        let (read, weights) = open_weights(&written).unwrap();
        let decoder = Decoder::load(&read, &weights, DType::F64).unwrap();
        let error = relative_error(&logits(&decoder, batch), &expected);
        assert!(error < 1e-6, "{name}: logits from GGUF are off by {error}: {read:?}");
        // Whatever the file keeps in other numbers, single precision computes the very same.
        if !rounds_frequencies(&config) {
            let single = |config: &ModelConfig, weights: &Weights| {
                logits(&Decoder::load(config, weights, DType::F32).unwrap(), batch)
            };
            assert_eq!(single(&read, &weights), single(&config, &source.weights), "{name}");
        }
        // And back to a folder.
        let folder = scratch.path().join(format!("{name}-folder"));
        let source = ModelSource::open(&written).unwrap();
        let saving = Saving { source: &source, ..saving };
        saving.folder(&folder).unwrap();
        let (again, weights) = open_weights(&folder).unwrap();
        let decoder = Decoder::load(&again, &weights, DType::F64).unwrap();
        let error = relative_error(&logits(&decoder, batch), &expected);
        assert!(error < 1e-6, "{name}: logits from the folder are off by {error}: {again:?}");
        println!("{name}: {error:.1e}");
    }
}

#[test]
fn what_config_json_says_reads_back_the_same() {
    let scratch = Path::new("written/config.json");
    let shapes = shapes::SHAPES.iter().map(|shape| shape.config().unwrap());
    let models = models().into_iter().filter_map(|path| Some(open_weights(&path).ok()?.0));
    for config in shapes.chain(models) {
        let json = config.to_json("float32");
        let again = ModelConfig::from_json(&json, scratch).unwrap();
        assert_eq!(again, config, "{json}");
    }
}

/// Copies the tensors of `from` to `to`, under the names that `rename` gives, with one more that nobody reads.
fn renamed(from: &Path, to: &Path, rename: impl Fn(&str) -> String, extra: &str) {
    let bytes = fs::read(from).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Vec<(String, _)> =
        file.iter().map(|(name, view)| (rename(name), view)).collect();
    tensors.push((extra.to_owned(), tensors[0].1.clone()));
    fs::write(to, safetensors::serialize(tensors, None).unwrap()).unwrap();
}

#[test]
fn a_multimodal_folder_opens_as_its_text_part() {
    let fixtures =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../train/tests/fixtures/parity/families");
    let path = fixtures.join("gemma3_text/model");
    let (config, weights) = open_weights(&path).unwrap();
    let tokens: Vec<u32> = (3..23).collect();
    let batch = Packed { tokens: &tokens, offsets: &[0, 20] };
    let expected = logits(&Decoder::load(&config, &weights, DType::F64).unwrap(), batch);
    let text: Value = serde_json::from_slice(&fs::read(path.join("config.json")).unwrap()).unwrap();
    for (newer, prefix) in [(true, "model.language_model."), (false, "language_model.model.")] {
        let folder = tempfile::tempdir().unwrap();
        let outer = serde_json::json!({
            "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"],
            "text_config": text, "vision_config": {"hidden_size": 8, "num_experts": 3},
        });
        fs::write(folder.path().join("config.json"), outer.to_string()).unwrap();
        let rename = |name: &str| name.replacen("model.", prefix, 1);
        let extra = match newer {
            true => "model.vision_tower.patches.weight",
            false => "vision_tower.patches.weight",
        };
        let to = folder.path().join("model.safetensors");
        renamed(&path.join("model.safetensors"), &to, rename, extra);
        let (again, weights) = open_weights(folder.path()).unwrap();
        assert_eq!(again, config);
        let found = logits(&Decoder::load(&again, &weights, DType::F64).unwrap(), batch);
        assert_eq!(found, expected);
        // What is no part of it still counts as left over.
        renamed(&path.join("model.safetensors"), &to, rename, "model.other.weight");
        let (again, weights) = open_weights(folder.path()).unwrap();
        let error = Decoder::load(&again, &weights, DType::F64).err().unwrap().to_string();
        assert!(error.contains("model.other.weight"), "{error}");
    }
}

#[test]
fn tensors_of_another_layout_are_refused_by_name() {
    let fixtures =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../train/tests/fixtures/parity/families");
    for (family, from, to) in [
        ("qwen3", "self_attn.q_norm", "self_attn.query_norm"),
        ("phi3_longrope", "self_attn.qkv_proj", "self_attn.q_proj"),
        ("qwen2", "mlp.gate_proj", "mlp.gate_up_proj"),
    ] {
        let path = fixtures.join(family).join("model");
        let folder = tempfile::tempdir().unwrap();
        fs::copy(path.join("config.json"), folder.path().join("config.json")).unwrap();
        let file = folder.path().join("model.safetensors");
        let rename = |name: &str| name.replace(from, to);
        renamed(&path.join("model.safetensors"), &file, rename, "model.layers.0.extra.weight");
        let (config, weights) = open_weights(folder.path()).unwrap();
        let error = Decoder::load(&config, &weights, DType::F64).err().unwrap().to_string();
        let missing = format!("tensor `model.layers.0.{from}.weight` is missing; the nearest");
        assert!(error.contains(&missing), "{family}: {error}");
    }
}
