//! `config.json` in both layouts, and what is refused.

use crate::{copied_stories, replace};
use hydralora_model::{ModelConfig, RopeScaling, source::config_of_folder};
use serde_json::{Value, json};
use std::path::Path;

fn base() -> Value {
    json!({
        "model_type": "llama", "vocab_size": 320, "hidden_size": 48, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    })
}

fn with(changes: Value) -> hydralora_model::Result<ModelConfig> {
    let mut config = base();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    ModelConfig::from_json(&config, Path::new("m/config.json"))
}

fn error(changes: Value) -> String {
    with(changes).unwrap_err().to_string()
}

#[test]
fn old_and_new_rope_layouts_agree() {
    let scaling = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    });
    let old = with(json!({"rope_theta": 500000.0, "rope_scaling": scaling})).unwrap();
    let mut parameters = scaling;
    parameters["rope_theta"] = json!(500000.0);
    let new = with(json!({"rope_parameters": parameters})).unwrap();
    assert_eq!(old, new);
    assert_eq!(new.rope.theta, 500000.0);
    let expected = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    assert_eq!(new.rope.scaling, expected);
    let linear = with(json!({"rope_scaling": {"type": "linear", "factor": 2}})).unwrap();
    assert_eq!(linear.rope.scaling, RopeScaling::Linear { factor: 2.0 });
    assert_eq!(linear.rope.theta, 10000.0);
    let plain = with(json!({"rope_parameters": {"rope_type": "default"}})).unwrap();
    assert_eq!(plain.rope.scaling, RopeScaling::None);
}

#[test]
fn defaults_and_token_ids() {
    let config = with(json!({})).unwrap();
    assert_eq!((config.head_dim, config.num_key_value_heads), (8, 2));
    assert!(!config.tie_word_embeddings && !config.attention_bias && !config.mlp_bias);
    assert_eq!((config.bos_token_id, config.eos_token_ids), (None, vec![]));
    let ids = json!({"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": -1, "head_dim": 4});
    let config = with(ids).unwrap();
    assert_eq!((config.bos_token_id, config.eos_token_ids), (Some(1), vec![2, 3]));
    assert_eq!(with(json!({"eos_token_id": -1})).unwrap().eos_token_ids.len(), 0);
    assert_eq!(config.head_dim, 4);
    assert_eq!(with(json!({"eos_token_id": 7})).unwrap().eos_token_ids, [7]);
    assert_eq!(with(json!({"num_key_value_heads": null})).unwrap().num_key_value_heads, 6);
    let window = json!({"model_type": "mistral", "sliding_window": 128});
    assert_eq!(with(window).unwrap().sliding_window, Some(128));
    let unused = json!({"sliding_window": 128, "use_sliding_window": false});
    assert_eq!(with(unused).unwrap().sliding_window, None);
}

#[test]
fn what_cannot_be_built_is_refused_by_field() {
    for (changes, field, message) in [
        (
            json!({"model_type": "mamba"}),
            "",
            "model_type `mamba` is not supported; supported are llama",
        ),
        (json!({"model_type": null}), "model_type: ", "missing; expected"),
        (json!({"hidden_size": 0}), "hidden_size: ", "found 0"),
        (
            json!({"hidden_size": "48"}),
            "hidden_size: ",
            "expected a positive integer, found \"48\"",
        ),
        (json!({"hidden_size": 47}), "hidden_size: ", "not divisible by num_attention_heads 6"),
        (json!({"hidden_size": 42}), "head_dim: ", "expected an even number, found 7"),
        (json!({"num_attention_heads": 0}), "num_attention_heads: ", "found 0"),
        (
            json!({"num_key_value_heads": 4}),
            "num_key_value_heads: ",
            "expected a divisor of num_attention_heads 6, found 4",
        ),
        (json!({"num_hidden_layers": -1}), "num_hidden_layers: ", "found -1"),
        (json!({"vocab_size": null}), "vocab_size: ", "missing; expected"),
        (json!({"vocab_size": 1e30}), "vocab_size: ", "expected a positive integer"),
        (json!({"hidden_act": "gelu"}), "hidden_act: ", "`gelu` is not supported"),
        (json!({"rms_norm_eps": 0}), "rms_norm_eps: ", "between 0 and 1"),
        (json!({"rope_theta": -1.0}), "rope_theta: ", "found -1"),
        (
            json!({"rope_scaling": {"rope_type": "yarn", "factor": 2}}),
            "rope_scaling.rope_type: ",
            "`yarn` is not supported",
        ),
        (
            json!({"rope_scaling": {"rope_type": "linear"}}),
            "rope_scaling.factor: ",
            "missing; expected",
        ),
        (
            json!({"rope_scaling": {"rope_type": "linear", "factor": 0}}),
            "rope_scaling.factor: ",
            "positive",
        ),
        (json!({"rope_scaling": 3}), "rope_scaling: ", "expected an object, found 3"),
        (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor: ", "found 0.5"),
        (
            json!({"quantization_config": {"quant_method": "gptq"}}),
            "quantization_config: ",
            "quantised with gptq",
        ),
        (json!({"eos_token_id": 320}), "eos_token_id: ", "320 is outside the vocabulary of 320"),
        (json!({"eos_token_id": "x"}), "eos_token_id: ", "expected a token id or a list"),
        (
            json!({"tie_word_embeddings": 1}),
            "tie_word_embeddings: ",
            "expected true or false, found 1",
        ),
    ] {
        let error = error(changes.clone());
        assert!(error.starts_with("m/config.json: "), "{changes}: {error}");
        assert!(error.contains(field) && error.contains(message), "{changes}: {error}");
    }
}

#[test]
fn a_file_that_is_no_json_is_named_with_the_line() {
    let folder = copied_stories();
    let path = folder.path().join("config.json");
    replace(&path, ":", ";");
    let error = config_of_folder(folder.path()).unwrap_err().to_string();
    assert!(error.contains("config.json") && error.contains("line "), "{error}");
    std::fs::remove_file(path).unwrap();
    let error = config_of_folder(folder.path()).unwrap_err().to_string();
    assert!(error.contains("no model here"), "{error}");
}

#[test]
fn llama_3_is_recognised_by_its_frequency_divisors() {
    let (theta, pairs, factor) = (500000f64, 64, 8.0);
    let factors: Vec<f32> = (0..pairs)
        .map(|i| {
            let frequency = theta.powf(-f64::from(i) / f64::from(pairs));
            let wavelength = 2.0 * std::f64::consts::PI / frequency;
            if wavelength < 8192.0 / 4.0 {
                1.0
            } else if wavelength > 8192.0 {
                factor as f32
            } else {
                let smooth = (8192.0 / wavelength - 1.0) / 3.0;
                (1.0 / ((1.0 - smooth) / factor + smooth)) as f32
            }
        })
        .collect();
    let found = RopeScaling::from_factors(&factors, theta).unwrap();
    assert!(matches!(found, RopeScaling::Llama3 { factor: 8.0, .. }), "{found:?}");
    assert_eq!(RopeScaling::from_factors(&[1.0; 8], theta), Some(RopeScaling::None));
    assert_eq!(
        RopeScaling::from_factors(&[2.0; 8], theta),
        Some(RopeScaling::Linear { factor: 2.0 })
    );
    assert_eq!(RopeScaling::from_factors(&[1.0, 3.0, 2.0, 8.0], theta), None);
}
