//! PEFT's options of single layers, and of what is trained beside them.

use super::{Case, Start, model};
use hydralora_kernels::ops::dropout::mix;
use hydralora_kernels::{DType, Tensor};
use hydralora_model::adapter::NoAdapter;
use hydralora_peft::io::{self, Metadata};
use hydralora_peft::{TensorMap, methods};
use serde_json::{Map, Value, json};
use std::fs;
use std::path::Path;

/// More rows of the table of methods.
pub(super) fn cases() -> Vec<Case> {
    let case = |method, options| Case { method, options, start: Start::Same, learning_rate: 5e-3 };
    vec![
        case(
            "lora",
            json!({
                "rank_pattern": {"q_proj": 3, "mlp\\..*_proj": 5}, "alpha_pattern": {"down_proj": 4},
            }),
        ),
        Case {
            start: Start::Rounded,
            learning_rate: 2e-3,
            ..case(
                "lora",
                json!({
                    "init_lora_weights": "pissa", "rank_pattern": {"o_proj": 2},
                    "targets": "attention", "alpha": 8,
                }),
            )
        },
        case(
            "lora",
            json!({"modules_to_save": ["norm", "lm_head", "embed_tokens"], "targets": ["v_proj"]}),
        ),
        case(
            "lora",
            json!({
                "modules_to_save": ["embed_tokens", "mlp.up_proj"], "ensure_weight_tying": true,
                "targets": "qv",
            }),
        ),
        case("lora", json!({"targets": ["q_proj", "lm_head", "embed_tokens"], "dropout": 0.1})),
        case(
            "lora",
            json!({
                "targets": ["lm_head", "embed_tokens"], "rank_pattern": {"lm_head": 3},
                "alpha_pattern": {"embed_tokens": 2}, "use_rslora": true,
            }),
        ),
        case("lora", json!({"trainable_token_indices": [302, 13, 261], "targets": "qv"})),
        case(
            "lora",
            json!({
                "trainable_token_indices": {"embed_tokens": [302, 13], "lm_head": [265]},
                "targets": "qv",
            }),
        ),
        case(
            "hydralora",
            json!({
                "modules_to_save": ["model.norm", "lm_head"], "rank_pattern": {"layers.[01].*": 2},
                "trainable_token_indices": {"embed_tokens": [302, 13]}, "route_on": "a",
            }),
        ),
        case(
            "hydralora",
            json!({
                "router_scope": "block", "alpha_pattern": {"up_proj": 8}, "rank_pattern": {"up_proj": 7},
                "modules_to_save": ["input_layernorm"], "targets": "all",
            }),
        ),
    ]
}

fn section(value: Value) -> Map<String, Value> {
    value.as_object().unwrap().clone()
}

#[test]
fn wrong_values_are_named() {
    let says = |method: &str, options: Value, words: &[&str]| {
        let faults = methods::find(method).unwrap().read_recipe(&section(options)).err().unwrap();
        let text: Vec<String> = faults.iter().map(ToString::to_string).collect();
        let text = text.join("\n");
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
    };
    says("lora", json!({"rank_pattern": {"q_proj": 0}}), &["rank_pattern.q_proj", "at least 1"]);
    says(
        "lora",
        json!({"rank_pattern": {"q_(proj": 4}}),
        &["rank_pattern", "`q_(proj` is no pattern"],
    );
    says("lora", json!({"rank_pattern": [4]}), &["method.rank_pattern", "{q_proj: 16}"]);
    says("lora", json!({"rank_pattern": {"q_proj": "high"}}), &["rank_pattern", "high"]);
    says("lora", json!({"alpha_pattern": {"q_proj": -1}}), &["alpha_pattern.q_proj", "positive"]);
    says("lora", json!({"modules_to_save": "norm"}), &["method.modules_to_save"]);
    says("lora", json!({"modules_to_save": [""]}), &["modules_to_save", "empty name"]);
    says(
        "lora",
        json!({"modules_to_save": ["lm_head"], "targets": ["q_proj", "lm_head"]}),
        &["method.targets", "modules_to_save too"],
    );
    says("lora", json!({"trainable_token_indices": []}), &["trainable_token_indices", "no token"]);
    says("lora", json!({"trainable_token_indices": [3, 3]}), &["token 3 twice"]);
    says(
        "lora",
        json!({"trainable_token_indices": {"wte": [3]}}),
        &["`wte`", "embed_tokens or lm_head"],
    );
    says(
        "lora",
        json!({"trainable_token_indices": [3], "modules_to_save": ["embed_tokens"]}),
        &["trainable_token_indices", "trains whole"],
    );
    says(
        "lora",
        json!({"targets": ["embed_tokens"], "ensure_weight_tying": true}),
        &["ensure_weight_tying", "stays apart"],
    );
    says("lora", json!({"targets": ["lm_head"], "use_dora": true}), &["lm_head", "single pair"]);
    says("hydralora", json!({"targets": ["lm_head"]}), &["method.targets", "modules_to_save"]);
}

#[test]
fn what_is_said_of_no_layer_of_the_model_is_refused() {
    let model = model(DType::F32);
    let error = |options: Value| {
        let options = methods::find("lora").unwrap().read_recipe(&section(options)).unwrap();
        let sites = options.select(&model.decoder.sites()).unwrap();
        if let Err(error) = options.check_layers(&sites) {
            return error.to_string();
        }
        let base = hydralora_peft::Base {
            decoder: &model.decoder,
            tokenizer: &model.source.tokenizer,
            new_tokens: &[],
        };
        options.build(&sites, DType::F32, 1).start_from(&base).unwrap_err().to_string()
    };
    let idle = error(json!({"rank_pattern": {"q_proj": 4, "k_prj": 2}}));
    assert!(idle.contains("rank_pattern.k_prj") && idle.contains("k_proj"), "{idle}");
    let idle = error(json!({"alpha_pattern": {"up_proj": 4}, "targets": "qv"}));
    assert!(idle.contains("alpha_pattern.up_proj") && idle.contains("v_proj"), "{idle}");
    let twice = error(json!({"modules_to_save": ["q_proj"]}));
    assert!(twice.contains("a target too"), "{twice}");
    let idle = error(json!({"modules_to_save": ["classifier"]}));
    assert!(idle.contains("`classifier`") && idle.contains("lm_head"), "{idle}");
    let outside = error(json!({"trainable_token_indices": [5, 512]}));
    assert!(outside.contains("token 512") && outside.contains("512"), "{outside}");
    let unknown =
        methods::find("ia3").unwrap().read_recipe(&section(json!({"targets": ["lm_head"]})));
    let unknown = unknown.unwrap().select(&model.decoder.sites()).unwrap_err().to_string();
    assert!(unknown.contains("`lm_head`"), "{unknown}");
}

#[test]
fn a_start_is_kept_as_read_unless_it_changed_the_base() {
    let lora = |start: Value| {
        section(json!({
            "peft_type": "LORA", "target_modules": ["q_proj"], "r": 4, "lora_alpha": 8,
            "init_lora_weights": start,
        }))
    };
    let method = methods::find("lora").unwrap();
    for start in [
        json!(true),
        json!(false),
        json!("gaussian"),
        json!("eva"),
        json!("orthogonal"),
        json!("mica"),
    ] {
        let options = method.read_peft(&lora(start.clone())).unwrap();
        assert_eq!(options.to_peft()["init_lora_weights"], start);
    }
    for start in ["pissa", "pissa_niter_16", "olora", "corda", "lora_ga", "loftq"] {
        let faults = method.read_peft(&lora(json!(start))).err().unwrap();
        let text = faults[0].to_string();
        assert!(text.contains(start) && text.contains("path_initial_model"), "{text}");
    }
    let faults = method.read_peft(&lora(json!("magic"))).err().unwrap();
    assert!(faults[0].to_string().contains("not known here"), "{faults:?}");
}

/// Writes an adapter of `options`, changes its tensors, and reads it again.
fn read_changed(options: Value, change: impl Fn(&mut TensorMap)) -> String {
    let model = model(DType::F32);
    let options = methods::find("lora").unwrap().read_recipe(&section(options)).unwrap();
    let tuned = model.build(options.as_ref());
    let place = tempfile::tempdir().unwrap();
    let folder = place.path().join("adapter");
    io::save(&folder, tuned.as_ref(), &Metadata::default(), &model.decoder.sites()).unwrap();
    let path = folder.join(io::TENSOR_FILE);
    let mut tensors = io::decode(&path, DType::F32).unwrap();
    change(&mut tensors);
    let prefixed = tensors.into_iter().map(|(name, t)| (format!("base_model.model.{name}"), t));
    io::write_tensors(&path, &prefixed.collect()).unwrap();
    match io::load(&folder, model.decoder.config(), DType::F32) {
        Ok(_) => String::new(),
        Err(error) => error.to_string(),
    }
}

#[test]
fn tensors_beside_the_layers_are_checked() {
    let zeros = |shape: &[usize]| Tensor::zeros(DType::F32, shape);
    let saved = json!({"modules_to_save": ["norm", "lm_head"], "targets": "qv"});
    assert_eq!(read_changed(saved.clone(), |_| {}), "");
    let error = read_changed(saved.clone(), |tensors| {
        tensors.insert("model.norm.weight".to_owned(), zeros(&[3]));
    });
    assert!(error.contains("`model.norm.weight` has shape [3], expected [64]"), "{error}");
    let error = read_changed(saved.clone(), |tensors| {
        tensors.insert("lm_head.weight".to_owned(), zeros(&[514, 64]));
    });
    assert!(error.contains("[514, 64]") && error.contains("tokens were added"), "{error}");
    let error = read_changed(saved, |tensors| {
        tensors.remove("model.layers.0.input_layernorm.weight");
    });
    assert!(error.contains("input_layernorm.weight` is missing"), "{error}");
    let ends = json!({"targets": ["q_proj", "lm_head", "embed_tokens"]});
    assert_eq!(read_changed(ends.clone(), |_| {}), "");
    for (name, shape) in [
        ("model.embed_tokens.lora_embedding_A", [8, 500]),
        ("model.embed_tokens.lora_embedding_B", [63, 8]),
        ("lm_head.lora_A.weight", [7, 64]),
        ("lm_head.lora_B.weight", [511, 8]),
    ] {
        let error = read_changed(ends.clone(), |tensors| {
            tensors.insert(name.to_owned(), zeros(&shape));
        });
        assert!(error.contains(name) && error.contains("expected"), "{name}: {error}");
    }
    let rows = json!({"trainable_token_indices": [5, 9], "targets": "qv"});
    assert_eq!(read_changed(rows.clone(), |_| {}), "");
    let error = read_changed(rows, |tensors| {
        let name = "model.embed_tokens.token_adapter.trainable_tokens_delta".to_owned();
        tensors.insert(name, zeros(&[3, 64]));
    });
    assert!(error.contains("trainable_tokens_delta"), "{error}");
}

/// PEFT brings the base's own weight along where the embedding or the output layer has a pair.
#[test]
fn a_weight_that_a_file_brings_takes_the_place_of_the_bases() {
    let model = model(DType::F64);
    let options = section(json!({"targets": ["q_proj", "lm_head"]}));
    let options = methods::find("lora").unwrap().read_recipe(&options).unwrap();
    let tuned = model.build(options.as_ref());
    let mut tensors = tuned.file_tensors();
    let mut head = model.decoder.weight("lm_head.weight").unwrap();
    head.scale(2.0);
    tensors.insert("lm_head.base_layer.weight".to_owned(), head.clone());
    tensors.insert("model.embed_tokens.base_layer.weight".to_owned(), {
        model.decoder.weight("model.embed_tokens.weight").unwrap()
    });
    let (path, config) = (Path::new("adapter"), model.decoder.config());
    let loaded = io::attach(path, options.as_ref(), tensors.clone(), config, DType::F64).unwrap();
    let (base, found) = (model.logits(&NoAdapter), model.logits(loaded.as_adapter()));
    for (base, found) in base.iter().zip(&found) {
        assert!((2.0 * base - found).abs() < 1e-9, "{base} {found}");
    }
    let place = tempfile::tempdir().unwrap();
    let folder = place.path().join("adapter");
    io::save(&folder, loaded.as_ref(), &Metadata::default(), &model.decoder.sites()).unwrap();
    let again = io::decode(&folder.join(io::TENSOR_FILE), DType::F64).unwrap();
    assert!(again.keys().eq(tensors.keys()));
    let config: Value =
        serde_json::from_slice(&fs::read(folder.join(io::CONFIG_FILE)).unwrap()).unwrap();
    assert_eq!(config["target_modules"], json!(["q_proj", "lm_head"]));
}

/// PEFT may store only the rows of the singular values that were kept.
#[test]
fn adalora_reads_files_that_hold_only_the_kept_rows() {
    let model = model(DType::F32);
    let config = json!({
        "peft_type": "ADALORA", "target_modules": ["k_proj"], "init_r": 3, "target_r": 1,
        "lora_alpha": 6, "total_step": 10,
        "rank_pattern": {"model.layers.1.self_attn.k_proj.lora_E": [true, false, true]},
    });
    let config = config.as_object().unwrap();
    let options = methods::find("adalora").unwrap().read_peft(config).unwrap();
    let site = "model.layers.1.self_attn.k_proj";
    let shape = model.decoder.sites().into_iter().find(|s| s.site.to_string() == site).unwrap();
    let (inputs, outputs) = (shape.in_features, shape.out_features);
    let numbers = |rows: usize, cols: usize, seed: u64| {
        let values: Vec<f64> =
            (0..rows * cols).map(|i| (mix(seed ^ i as u64) >> 40) as f64 / 1e8).collect();
        Tensor::from_f64(DType::F32, &values, [rows, cols])
    };
    let (a, e, b) = (numbers(2, inputs, 1), numbers(2, 1, 2), numbers(outputs, 2, 3));
    let read = |a: &Tensor, e: &Tensor, b: &Tensor| {
        let parts = [("lora_A", a), ("lora_E", e), ("lora_B", b)];
        let tensors =
            parts.into_iter().map(|(name, t)| (format!("{site}.{name}"), t.clone())).collect();
        let path = Path::new("adapter");
        io::attach(path, options.as_ref(), tensors, model.decoder.config(), DType::F32).unwrap()
    };
    let pruned = model.logits(read(&a, &e, &b).as_adapter());
    // The same with the row between them at a singular value of zero.
    let mut wide = [numbers(3, inputs, 9), numbers(3, 1, 9), numbers(outputs, 3, 9)];
    let [wide_a, wide_e, wide_b] = &mut wide;
    wide_e.data_mut::<f32>()[1] = 0.0;
    for (k, row) in [(0, 0), (1, 2)] {
        wide_a.data_mut::<f32>()[row * inputs..(row + 1) * inputs]
            .copy_from_slice(&a.data::<f32>()[k * inputs..(k + 1) * inputs]);
        wide_e.data_mut::<f32>()[row] = e.data::<f32>()[k];
        for out in 0..outputs {
            wide_b.data_mut::<f32>()[out * 3 + row] = b.data::<f32>()[out * 2 + k];
        }
    }
    let full = model.logits(read(wide_a, wide_e, wide_b).as_adapter());
    let off = full.iter().zip(&pruned).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(off < 1e-4, "{off}");
    assert_ne!(full, model.logits(&NoAdapter));
}
