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
    let silent = with(json!({"model_type": "mistral"})).unwrap();
    assert_eq!(silent.sliding_window, Some(4096));
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
            "model_type `mamba` is not supported (it has state-space layers)",
        ),
        (
            json!({"model_type": "qwen3_x"}),
            "",
            "`qwen3_x` is not supported (a dense decoder takes one file over the kit of families",
        ),
        (
            json!({"model_type": "qwen3_x"}),
            "",
            "CONTRIBUTING.md); the nearest supported one by name is `qwen3`; supported are llama",
        ),
        (json!({"model_type": "zzz"}), "", "; the nearest supported one by name is `"),
        (
            json!({"model_type": "mixtral"}),
            "",
            "(it has experts); the nearest supported one is `mistral`",
        ),
        (
            json!({"model_type": "granitemoehybrid"}),
            "",
            "GGUF files of dense ones are read, as `granite`); the nearest supported one is `granite`",
        ),
        (
            json!({"model_type": "mistral", "sliding_window": 0}),
            "sliding_window: ",
            "expected a size from 1",
        ),
        (
            json!({"model_type": "gemma2", "layer_types": ["full_attention", "sliding_attention"],
                   "sliding_window": null}),
            "layer_types: ",
            "there is no sliding_window",
        ),
        (
            json!({"layer_types": ["full_attention", "linear_attention"]}),
            "layer_types: ",
            "expected `full_attention` or `sliding_attention`",
        ),
        (
            json!({"final_logit_softcapping": 30.0}),
            "final_logit_softcapping: ",
            "found 30.0; this model_type has no such field here",
        ),
        (
            json!({"num_local_experts": 8}),
            "num_local_experts: ",
            "found 8; this model_type has no such field",
        ),
        (json!({"residual_multiplier": 0.2}), "residual_multiplier: ", "may change what the model"),
        (json!({"use_qk_norm": true}), "use_qk_norm: ", "may change what the model computes"),
        (json!({"position_embedding_type": "alibi"}), "position_embedding_type: ", "\"alibi\""),
        (json!({"kv_lora_rank": 512}), "kv_lora_rank: ", "found 512"),
        (json!({"temperature_tuning": true}), "temperature_tuning: ", "found true"),
        (json!({"dual_chunk": {"size": 8}}), "dual_chunk: ", "found an object"),
        (json!({"use_rope": false}), "use_rope: ", "found false"),
        (json!({"rope_interleaved": true}), "rope_interleaved: ", "found true"),
        (json!({"is_causal": false}), "is_causal: ", "attention in both directions"),
        (
            json!({"model_type": "qwen3_5_text", "attn_output_gate": false}),
            "attn_output_gate: ",
            "without the gate",
        ),
        (json!({"sliding_window": 64}), "sliding_window: ", "reaches back to the first token"),
        (
            json!({"model_type": "olmo2", "use_sliding_window": true}),
            "use_sliding_window: ",
            "has no window",
        ),
        (
            json!({"model_type": "granite", "layer_types": ["full_attention", "sliding_attention"]}),
            "layer_types: ",
            "layers of this model_type do not have",
        ),
        (
            json!({"model_type": "phi3", "sliding_window": 64,
                   "layer_types": ["full_attention", "sliding_attention"]}),
            "layer_types: ",
            "all layers of this model_type have the sliding_window of 64",
        ),
        (
            json!({"model_type": "phi3", "sliding_window": 64, "use_sliding_window": false}),
            "use_sliding_window: ",
            "uses whatever this says",
        ),
        (
            json!({"model_type": "gemma2", "sliding_window": 64, "sliding_window_size": 32}),
            "sliding_window_size: ",
            "the same as sliding_window",
        ),
        (
            json!({"rope_scaling": {"rope_type": "linear", "factor": 2},
                   "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
            "rope_scaling: ",
            "something else than rope_parameters",
        ),
        (
            json!({"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2},
                   "rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 10000.0}}),
            "rope_scaling: ",
            "something else than rope_parameters",
        ),
        (
            json!({"model_type": "gemma3_text", "head_dim": 8,
                   "rope_scaling": {"rope_type": "linear", "factor": 8},
                   "rope_parameters": {"full_attention": {"rope_type": "default"}}}),
            "rope_scaling: ",
            "something else than rope_parameters",
        ),
        (
            json!({"model_type": "gemma4_text", "head_dim": 8, "attention_k_eq_v": true,
                   "num_global_key_value_heads": 4}),
            "num_global_key_value_heads: ",
            "expected a divisor of num_attention_heads 6, found 4",
        ),
        (
            json!({"model_type": "gemma4_text", "head_dim": 8, "num_hidden_layers": 6,
                   "per_layer_config": {"04": {"head_dim": 16}}}),
            "per_layer_config.04.head_dim: ",
            "expected 8 in a windowed layer",
        ),
        (
            json!({"model_type": "gemma4_text", "head_dim": 8, "num_hidden_layers": 6,
                   "per_layer_config": {"6": {"head_dim": 16}}}),
            "per_layer_config.6: ",
            "expected a layer below 6",
        ),
        (
            json!({"rope_scaling": {"rope_type": "linear", "factor": 2, "twist": 3}}),
            "rope_scaling.twist: ",
            "what it asks for is not supported",
        ),
        (
            json!({"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [1, 1]}}),
            "rope_scaling.long_factor: ",
            "missing",
        ),
        (
            json!({"model_type": "phi3", "rope_scaling": {
                "type": "longrope", "short_factor": [1, 1], "long_factor": [1, 1, 1, 1],
            }}),
            "short_factor: ",
            "expected 4 numbers, found 2",
        ),
        (
            json!({"model_type": "smollm3", "no_rope_layers": [1, 2]}),
            "no_rope_layers: ",
            "expected a list of 0 and 1",
        ),
        (
            json!({"model_type": "qwen3_5_text", "linear_num_value_heads": 3,
                   "linear_num_key_heads": 2}),
            "linear_num_value_heads: ",
            "expected a multiple of linear_num_key_heads 2",
        ),
        (
            json!({"model_type": "gemma4_text", "num_kv_shared_layers": 2, "head_dim": 8}),
            "num_kv_shared_layers: ",
            "no earlier layer of its kind",
        ),
        (
            json!({"model_type": "gemma4_text", "enable_moe_block": true, "head_dim": 8}),
            "enable_moe_block: ",
            "experts are not supported",
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
            json!({"rope_scaling": {"rope_type": "spiral", "factor": 2}}),
            "rope_scaling.rope_type: ",
            "`spiral` is not supported; expected `default`, `linear`",
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
    let found = RopeScaling::from_factors(&factors, theta);
    assert!(matches!(found, RopeScaling::Llama3 { factor: 8.0, .. }), "{found:?}");
    assert_eq!(RopeScaling::from_factors(&[1.0; 8], theta), RopeScaling::None);
    assert_eq!(RopeScaling::from_factors(&[2.0; 8], theta), RopeScaling::Linear { factor: 2.0 });
    // Any other divisors are taken as they are.
    let found = RopeScaling::from_factors(&[1.0, 3.0, 2.0, 8.0], theta);
    let RopeScaling::LongRope { short, long, attention_factor, .. } = found else {
        panic!("{found:?}")
    };
    assert_eq!((&short[..], attention_factor), (&[1.0, 3.0, 2.0, 8.0][..], 1.0));
    assert_eq!(short, long);
}

#[test]
fn fields_that_say_nothing_or_nothing_here_are_let_through() {
    let harmless = json!({
        "attention_dropout": 0.1, "pretraining_tp": 2, "initializer_range": 0.02,
        "final_logit_softcapping": null, "residual_multiplier": 1.0, "num_experts": 0,
        "use_bidirectional_attention": false, "_name_or_path": "x", "unsloth_version": "2026.1",
        "sliding_window_pattern": null, "rope_scaling": {}, "layer_types": ["full_attention", "attention"],
        "is_causal": true, "use_cache": true, "sliding_window": 256, "use_mrope": false,
        "temperature": 0.6, "top_k": 20, "max_sequence_length": 4096, "image_token_index": 9,
        "auto_map": {"AutoConfig": "x.y"}, "rope_interleaved": false, "resid_pdrop": 0.1,
    });
    assert_eq!(with(harmless).unwrap(), with(json!({})).unwrap());
    let scaling = json!({"rope_type": "linear", "factor": 2.0});
    let both = json!({
        "rope_theta": 5e5, "rope_scaling": scaling,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
    });
    let one = json!({"rope_theta": 5e5, "rope_scaling": scaling});
    assert_eq!(with(both).unwrap(), with(one).unwrap());
    let sized = json!({"model_type": "gemma2", "sliding_window": 64, "sliding_window_size": 64});
    assert_eq!(with(sized).unwrap().sliding_window, Some(64));
}

/// What transformers writes of every family's own defaults, and of published models beside them.
#[test]
fn what_transformers_and_published_models_say_is_read() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/configs.json");
    let all: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let mut families = Vec::new();
    for (name, config) in all.as_object().unwrap() {
        let read = ModelConfig::from_json(config, Path::new(name));
        let read = read.unwrap_or_else(|error| panic!("{error}"));
        let again = ModelConfig::from_json(&read.to_json("float32"), Path::new(name)).unwrap();
        assert_eq!(again, read, "{name}");
        families.push(read.model_type);
    }
    for family in hydralora_model::family::supported() {
        assert!(families.iter().any(|known| known == family), "{family}");
    }
}

#[test]
fn the_text_part_of_a_larger_model_is_read() {
    let mut text = base();
    text["model_type"] = json!("gemma3_text");
    text["head_dim"] = json!(8);
    let outer = json!({
        "model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 3},
        "eos_token_id": [1, 106], "mm_tokens_per_image": 256,
    });
    let config = ModelConfig::from_json(&outer, Path::new("config.json")).unwrap();
    assert_eq!(config.model_type, "gemma3_text");
    assert!(config.tie_word_embeddings);
    assert_eq!(config.eos_token_ids, [1, 106]);
    let broken = json!({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}});
    let error = ModelConfig::from_json(&broken, Path::new("c.json")).unwrap_err().to_string();
    assert!(error.starts_with("c.json: text_config.hidden_size: missing"), "{error}");
}

#[test]
fn older_and_newer_layouts_of_gemma_3_agree() {
    let of = |changes: Value| {
        let mut config = base();
        config["model_type"] = json!("gemma3_text");
        config["head_dim"] = json!(8);
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
        ModelConfig::from_json(&config, Path::new("config.json")).unwrap()
    };
    let older = of(json!({
        "rope_theta": 500000.0, "rope_local_base_freq": 5000.0, "sliding_window_pattern": 2,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window": 16,
    }));
    let newer = of(json!({
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
        },
        "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16,
    }));
    assert_eq!(older, newer);
    assert_eq!(older.rope_of(1).unwrap().scaling, RopeScaling::Linear { factor: 8.0 });
    assert_eq!(older.rope_of(0).unwrap().theta, 5000.0);
    assert_eq!((older.window_of(0), older.window_of(1)), (Some(16), None));
}

#[test]
fn more_layers_than_any_model_has_are_refused_before_anything_is_made_of_them() {
    for family in ["llama", "gemma2", "gemma3_text", "qwen2", "smollm3"] {
        for layers in [5000_u64, 1 << 31, 1 << 40] {
            let message = error(json!({"model_type": family, "num_hidden_layers": layers}));
            assert!(message.contains("num_hidden_layers"), "{family}: {message}");
        }
    }
}
