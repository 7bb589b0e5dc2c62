//! What a GGUF file's metadata say of arithmetic: read, or refused by key.

use crate::families::logits;
use hydralora_kernels::DType;
use hydralora_kernels::block::BlockFormat;
use hydralora_model::gguf::{Array, GgufFile, GgufWriter, Value};
use hydralora_model::save::random_gguf;
use hydralora_model::source::open_weights;
use hydralora_model::{Decoder, ModelConfig, Packed, RopeScaling};
use serde_json::{Value as Json, json};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A small configuration of a family.
fn config(model_type: &str, changes: &Json) -> ModelConfig {
    let mut json = json!({
        "model_type": model_type, "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 8192, "sliding_window": null,
    });
    if ["gemma2", "gemma3_text"].contains(&model_type) {
        // What a file implies.
        json["query_pre_attn_scalar"] = json!(8);
    }
    for (key, value) in changes.as_object().unwrap() {
        json[key] = value.clone();
    }
    ModelConfig::from_json(&json, Path::new("config.json")).unwrap()
}

/// Files of small random models, with changed metadata.
struct Files {
    folder: TempDir,
}

impl Files {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn of(&self, config: &ModelConfig) -> hydralora_model::Result<PathBuf> {
        let path = self.folder.path().join("model.gguf");
        random_gguf(config, BlockFormat::F32, 7, &path)?;
        Ok(path)
    }

    /// The file again, with these keys of its architecture set or taken away, more tensors, and every key
    /// that begins with `from` beginning with `to`.
    fn changed(
        &self,
        path: &Path,
        changes: &[(&str, Option<Value>)],
        tensors: &[(&str, Vec<f32>)],
        architecture: Option<&str>,
    ) -> PathBuf {
        let bytes = std::fs::read(path).unwrap();
        let file = GgufFile::parse(&bytes, path).unwrap();
        let own = file.str("general.architecture").unwrap().unwrap().to_owned();
        let to = architecture.unwrap_or(&own);
        let mut writer = GgufWriter::new();
        writer.metadata("general.architecture", Value::String(to.to_owned()));
        for (key, value) in file.metadata() {
            let inside = key.strip_prefix(&own).and_then(|rest| rest.strip_prefix('.'));
            match inside {
                Some(inside) if changes.iter().any(|(name, _)| *name == inside) => {}
                Some(inside) => {
                    writer.metadata(format!("{to}.{inside}"), value.clone());
                }
                None if key == "general.architecture" => {}
                None => {
                    writer.metadata(key.clone(), value.clone());
                }
            }
        }
        for (name, value) in changes {
            if let Some(value) = value {
                writer.metadata(format!("{to}.{name}"), value.clone());
            }
        }
        for tensor in file.tensors() {
            let data = bytes[tensor.range.clone()].to_vec();
            writer.tensor(tensor.name.clone(), tensor.format, &tensor.shape, data);
        }
        for (name, values) in tensors {
            let data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            writer.tensor(*name, BlockFormat::F32, &[values.len()], data);
        }
        let changed = self.folder.path().join("changed.gguf");
        writer.write(&changed).unwrap();
        changed
    }

    /// What a file of the family says after a change.
    fn read(
        &self,
        model_type: &str,
        changes: &[(&str, Option<Value>)],
    ) -> hydralora_model::Result<ModelConfig> {
        let path = self.of(&config(model_type, &json!({}))).unwrap();
        open_weights(&self.changed(&path, changes, &[], None)).map(|(config, _)| config)
    }
}

fn number(value: f32) -> Option<Value> {
    Some(Value::F32(value))
}

fn count(value: u32) -> Option<Value> {
    Some(Value::U32(value))
}

fn text(value: &str) -> Option<Value> {
    Some(Value::String(value.to_owned()))
}

#[test]
fn what_changes_the_arithmetic_and_is_not_done_is_refused_by_key() {
    let files = Files::new();
    let no = Some(Value::Bool(false));
    for (family, key, value) in [
        ("llama", "attention.causal", no.clone()),
        ("llama", "attention.scale", number(1.0)),
        ("llama", "logit_scale", number(2.0)),
        ("llama", "attn_logit_softcapping", number(1.0)),
        ("llama", "attention.max_alibi_bias", number(8.0)),
        ("llama", "attention.clamp_kqv", number(8.0)),
        ("llama", "attention.twist", text("left")),
        ("llama", "use_parallel_residual", Some(Value::Bool(true))),
        ("llama", "rope.scaling.attn_factor", number(1.2)),
        ("llama", "rope.scaling.yarn_attn_factor", number(1.2)),
        ("llama", "rope.scaling.yarn_ext_factor", number(1.0)),
        ("llama", "attention.sliding_window", count(64)),
        ("qwen2", "final_logit_softcapping", number(30.0)),
        ("olmo2", "attention.sliding_window", count(64)),
        ("gemma3_text", "attn_logit_softcapping", number(50.0)),
        ("granite", "rope.scaling.finetuned", no),
        ("granite", "attention.temperature_length", count(64)),
    ] {
        let error = files.read(family, &[(key, value)]).unwrap_err().to_string();
        assert!(error.contains(&format!(".{key}: ")), "{family}: {key}: {error}");
    }
    let yarn = |key: &'static str, value: f32| {
        let found = files.read(
            "llama",
            &[
                ("rope.scaling.type", text("yarn")),
                ("rope.scaling.factor", number(4.0)),
                (key, number(value)),
            ],
        );
        found.map(|config| match config.rope.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor,
            other => panic!("{other:?}"),
        })
    };
    let usual = 0.1 * 4f64.ln() + 1.0;
    for (key, value, expected) in [
        ("rope.scaling.attn_factor", 1.25, Some(usual * 1.25)),
        ("rope.scaling.yarn_attn_factor", usual as f32, Some(usual)),
        ("rope.scaling.yarn_attn_factor", 1.0, Some(usual)),
        ("rope.scaling.yarn_attn_factor", 1.5, None),
        ("rope.scaling.yarn_ext_factor", -1.0, Some(usual)),
        ("rope.scaling.yarn_ext_factor", 0.5, None),
    ] {
        match (yarn(key, value), expected) {
            (Ok(found), Some(expected)) => assert!((found - expected).abs() < 1e-9, "{key}"),
            (found, None) => assert!(found.unwrap_err().to_string().contains(key), "{key}"),
            (found, _) => panic!("{key} {value}: {found:?}"),
        }
    }
}

#[test]
fn what_says_nothing_or_nothing_here_is_let_through() {
    let files = Files::new();
    let expected = files.read("llama", &[]).unwrap();
    for (key, value) in [
        ("attention.causal", Some(Value::Bool(true))),
        ("attention.scale", number(0.0)),
        ("logit_scale", number(1.0)),
        ("expert_count", count(0)),
        ("expert_used_count", count(0)),
        ("expert_shared_feed_forward_length", count(64)),
        ("ssm.state_size", count(128)),
        ("pooling_type", count(3)),
        ("rope.scaling.finetuned", Some(Value::Bool(false))),
        ("rope.scaling.original_context_length", count(4096)),
        ("rope.scaling.yarn_beta_fast", number(16.0)),
        ("rope.scaling.attn_factor", number(1.0)),
        ("rope.scaling.factor", number(0.0)),
        ("attention.sliding_window", count(8192)),
        ("attention.layer_norm_epsilon", number(1e-5)),
        ("attention.sliding_window_pattern", Some(Value::Array(Array::Bool(vec![false; 6])))),
        ("tensor_data_layout", text("Meta AI original pth")),
    ] {
        assert_eq!(files.read("llama", &[(key, value)]).unwrap(), expected, "{key}");
    }
}

#[test]
fn a_silent_gemma_2_file_has_the_published_caps_and_window() {
    let files = Files::new();
    let keys = ["attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window"];
    let silent = files.read("gemma2", &keys.map(|key| (key, None))).unwrap();
    assert_eq!(silent.arithmetic.attention_softcap, Some(50.0));
    assert_eq!(silent.arithmetic.logit_softcap, Some(30.0));
    assert_eq!((silent.window_of(0), silent.window_of(1)), (Some(4096), None));
    // So what has none of them cannot be left out.
    for (field, value) in [(keys[0], json!(null)), (keys[1], json!(null))] {
        let error = files.of(&config("gemma2", &json!({field: value}))).unwrap_err().to_string();
        assert!(error.contains(field) && error.contains("where they are silent"), "{error}");
    }
    let wide = files.of(&config("gemma2", &json!({}))).unwrap();
    let (read, _) = open_weights(&wide).unwrap();
    assert_eq!(read.window_of(0), Some(8192));
}

#[test]
fn gemma_files_say_which_layers_are_windowed() {
    let files = Files::new();
    let (window, pattern) = ("attention.sliding_window", "attention.sliding_window_pattern");
    for (family, period) in [("gemma2", 2), ("gemma3_text", 6)] {
        let windowed = |value: Option<Value>| {
            let found = files.read(family, &[(window, count(64)), (pattern, value)]);
            found.map(|config| (0..6).map(|l| config.window_of(l).is_some()).collect::<Vec<_>>())
        };
        let every = |period: usize| (1..=6).map(|l| l % period != 0).collect::<Vec<bool>>();
        assert_eq!(windowed(None).unwrap(), every(period), "{family}");
        assert_eq!(windowed(count(3)).unwrap(), every(3), "{family}");
        assert_eq!(windowed(count(1)).unwrap(), vec![false; 6], "{family}");
        assert_eq!(windowed(count(0)).unwrap(), vec![true; 6], "{family}");
        let listed = vec![true, true, false, false, true, false];
        let list = Value::Array(Array::Bool(listed.clone()));
        assert_eq!(windowed(Some(list)).unwrap(), listed, "{family}");
        let short = Value::Array(Array::Bool(listed[..4].to_vec()));
        for (wrong, words) in [(text("often"), "unsigned"), (Some(short), "of 6 layers, found 4")] {
            let error = windowed(wrong).unwrap_err().to_string();
            assert!(error.contains(pattern) && error.contains(words), "{family}: {error}");
        }
    }
}

#[test]
fn longrope_without_its_divisors_is_refused() {
    let files = Files::new();
    let path = files.of(&config("phi3", &json!({}))).unwrap();
    let kind = [("rope.scaling.type", text("longrope"))];
    let error = open_weights(&files.changed(&path, &kind, &[], None)).unwrap_err().to_string();
    assert!(
        error.contains("phi3.rope.scaling.type") && error.contains("rope_factors_long"),
        "{error}"
    );
    let both = [
        ("rope_factors_long.weight", vec![2.0; 4]),
        ("rope_factors_short.weight", vec![1.0; 4]),
        ("rope_freqs.weight", vec![2.0; 4]),
    ];
    assert!(open_weights(&files.changed(&path, &kind, &both[..2], None)).is_ok());
    let error = open_weights(&files.changed(&path, &kind, &both, None)).unwrap_err().to_string();
    assert!(error.contains("found both"), "{error}");
}

/// llama.cpp divides by the tensor of divisors, and does what the metadata say to the quotient.
#[test]
fn divisors_are_taken_beside_what_the_metadata_do() {
    let files = Files::new();
    let path = files.of(&config("llama", &json!({}))).unwrap();
    let tokens: Vec<u32> = (3..40).collect();
    let of = |changes: &[(&str, Option<Value>)], divisors: Option<[f32; 4]>| {
        let tensors: Vec<_> =
            divisors.map(|all| ("rope_freqs.weight", all.to_vec())).into_iter().collect();
        let changed = files.changed(&path, changes, &tensors, None);
        let (config, weights) = open_weights(&changed).unwrap();
        let decoder = Decoder::load(&config, &weights, DType::F64).unwrap();
        logits(&decoder, Packed { tokens: &tokens, offsets: &[0, tokens.len()] })
    };
    let linear = |factor: f32| {
        vec![("rope.scaling.type", text("linear")), ("rope.scaling.factor", number(factor))]
    };
    let yarn = || vec![("rope.scaling.type", text("yarn")), ("rope.scaling.factor", number(4.0))];
    assert_eq!(of(&linear(2.0), Some([4.0; 4])), of(&linear(8.0), None));
    assert_ne!(of(&linear(2.0), Some([4.0; 4])), of(&linear(4.0), None));
    let uneven = [1.0, 2.0, 4.0, 4.0];
    assert_eq!(of(&linear(2.0), Some(uneven)), of(&[], Some(uneven.map(|divisor| divisor * 2.0))));
    assert_eq!(of(&yarn(), Some([1.0; 4])), of(&yarn(), None));
    // Where YaRN leaves all frequencies, it is a factor on cosines and sines.
    let whole = |mut changes: Vec<(&'static str, Option<Value>)>| {
        changes.push(("rope.scaling.yarn_beta_fast", number(1e9)));
        changes.push(("rope.scaling.yarn_beta_slow", number(1e8)));
        changes
    };
    let stretched = of(&whole(yarn()), Some(uneven));
    assert_ne!(stretched, of(&whole(yarn()), None));
    let mut bare = whole(yarn());
    bare.push(("rope.scaling.yarn_log_multiplier", number(1.0)));
    let expected = of(&[], Some(uneven));
    let bare = of(&bare, Some(uneven));
    assert!(bare.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-6));
    assert!(stretched.iter().zip(&expected).any(|(a, b)| (a - b).abs() > 1e-6));
}

#[test]
fn a_file_of_another_architecture_than_it_says_is_refused() {
    let files = Files::new();
    for (family, says, tensor) in [
        ("llama", "qwen3", "q_norm"),
        ("qwen3", "llama", "k_norm"),
        ("llama", "phi3", "qkv_proj"),
        ("phi3", "llama", "q_proj"),
        ("llama", "qwen2", "bias"),
        ("llama", "olmo2", "norm"),
        ("glm4", "phi3", "qkv_proj"),
    ] {
        let path = files.of(&config(family, &json!({}))).unwrap();
        let (config, weights) = open_weights(&files.changed(&path, &[], &[], Some(says))).unwrap();
        let error = Decoder::load(&config, &weights, DType::F32).err();
        let error = error.unwrap_or_else(|| panic!("{family} as {says}")).to_string();
        assert!(error.contains("tensor") && error.contains(tensor), "{family} as {says}: {error}");
    }
}
