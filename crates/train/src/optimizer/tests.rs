use super::*;
use serde_json::json;

fn take(section: Value) -> (Map<String, Value>, Result<Chosen, Vec<String>>) {
    let mut section = section.as_object().unwrap().clone();
    let found = Chosen::take(&mut section);
    let words = |faults: Vec<Fault>| faults.iter().map(ToString::to_string).collect();
    (section, found.map_err(words))
}

#[test]
fn names_and_options_are_taken_out_of_their_section() {
    let (rest, found) = take(json!({"seed": 1, "optimizer": "lion", "beta2": 0.95}));
    assert_eq!(Value::Object(rest), json!({"seed": 1}));
    let found = found.unwrap();
    assert_eq!(found.name(), "lion");
    assert_eq!(found.options()["beta2"], 0.95);
    assert_eq!(found.options()["beta1"], 0.9);
    let (rest, found) = take(json!({"beta1": 0.8}));
    assert!(rest.is_empty());
    assert_eq!(
        (found.as_ref().unwrap().name(), &found.unwrap().options()["beta1"]),
        ("adamw", &json!(0.8))
    );
}

/// Runs, cells and checkpoints are told apart by what a recipe spells out, in this order.
#[test]
fn adamw_is_spelt_out_as_builds_with_it_alone_did() {
    let train = serde_json::to_string(&crate::TrainConfig::default()).unwrap();
    let wanted = "\"warmup_steps\":null,\"optimizer\":\"adamw\",\"weight_decay\":0.0,\"beta1\":0.9,\
                  \"beta2\":0.999,\"epsilon\":1e-8,\"b_learning_rate_ratio\":1.0";
    assert!(train.contains(wanted), "{train}");
}

#[test]
fn what_is_spelt_out_is_read_again() {
    for kind in OPTIMIZERS {
        let (_, found) = take(json!({"optimizer": kind.name()}));
        let found = found.unwrap();
        assert_eq!(found.options(), &kind.defaults());
        let spelt = serde_json::to_value(&found).unwrap();
        assert_eq!(take(spelt).1.unwrap(), found);
    }
}

#[test]
fn what_is_wrong_is_named() {
    for (section, expected) in [
        (
            json!({"optimizer": "lyon"}),
            "train.optimizer: `lyon` is not known; did you mean `lion`?",
        ),
        (
            json!({"optimizer": "adamw_torch_fused"}),
            "`adamw_torch_fused` is not known; did you mean `adamw`?",
        ),
        (json!({"optimizer": "sophia"}), "expected one of adamw, lion, adafactor, muon"),
        (json!({"optimizer": 3}), "train.optimizer: is 3; expected one of adamw,"),
        (json!({"momentum": 0.9}), "train.momentum: `adamw` has no such option; it is one of muon"),
        (
            json!({"optimizer": "lion", "epsilon": 1e-8}),
            "train.epsilon: `lion` has no such option; it is one of adamw, adafactor, muon",
        ),
        (json!({"optimizer": "muon", "ns_steps": 0}), "train.ns_steps: is 0; expected 1 to 99"),
        (json!({"optimizer": "muon", "adjust_lr_fn": "orignal"}), "did you mean `original`?"),
        (
            json!({"optimizer": "adafactor", "beta1": 1.0}),
            "train.beta1: is 1; expected 0 ≤ beta1 < 1",
        ),
        (
            json!({"optimizer": "adafactor", "decay_rate": -0.8}),
            "train.decay_rate: is -0.8; expected 0 <",
        ),
        (json!({"beta1": "0.9"}), "train.beta1: is the text `0.9`; expected a number"),
    ] {
        let found = take(section).1.unwrap_err();
        assert!(found.len() == 1 && found[0].contains(expected), "{expected}: {found:?}");
    }
    // Two of another optimizer's are two faults; of one that is none nothing is said of options.
    let found = take(json!({"optimizer": "lion", "momentum": 1, "ns_steps": 2})).1.unwrap_err();
    assert_eq!(found.len(), 2, "{found:?}");
    let (rest, found) = take(json!({"optimizer": "x", "momentum": 1, "beta1": 7}));
    assert_eq!((rest.len(), found.unwrap_err().len()), (0, 1));
}

#[test]
fn muon_is_for_matrices_between_the_ends() {
    let muon = take(json!({"optimizer": "muon"})).1.unwrap();
    for (name, role, shape, names) in [
        (
            "model.layers.0.self_attn.q_proj.lora_A.weight",
            Role::A,
            &[4, 8][..],
            &["momentum_buffer"][..],
        ),
        ("model.layers.0.mlp.up_proj.weight", Role::Weight, &[4, 8], &["momentum_buffer"]),
        (
            "model.layers.0.mlp.up_proj.lora_route.weight",
            Role::Router,
            &[3, 8],
            &["momentum_buffer"],
        ),
        ("model.embed_tokens.weight", Role::Weight, &[9, 8], &["exp_avg", "exp_avg_sq"]),
        ("lm_head.weight", Role::Weight, &[9, 8], &["exp_avg", "exp_avg_sq"]),
        ("prompt_embeddings", Role::Prompt, &[3, 8], &["exp_avg", "exp_avg_sq"]),
        (
            "model.layers.0.self_attn.q_proj.lora_magnitude_vector",
            Role::Scale,
            &[8],
            &["exp_avg", "exp_avg_sq"],
        ),
        ("model.layers.0.conv1d.weight", Role::Weight, &[8, 1, 4], &["exp_avg", "exp_avg_sq"]),
    ] {
        let state = muon.rule().state(Trained { name, role, shape });
        assert_eq!(state.iter().map(|state| state.name).collect::<Vec<_>>(), names, "{name}");
    }
}

#[test]
fn state_takes_the_memory_that_the_guide_says() {
    let copies: Vec<(&str, usize)> = OPTIMIZERS
        .iter()
        .map(|kind| (kind.name(), kind.read(&Map::new()).unwrap().copies(Role::A)))
        .collect();
    assert_eq!(copies, [("adamw", 2), ("lion", 1), ("adafactor", 0), ("muon", 1)]);
    let of = Trained { name: "x", role: Role::Weight, shape: &[5, 3, 4] };
    let adafactor = take(json!({"optimizer": "adafactor"})).1.unwrap();
    let shapes: Vec<Vec<usize>> = adafactor.rule().state(of).into_iter().map(|s| s.shape).collect();
    assert_eq!(shapes, [vec![5, 3], vec![5, 4]]);
}
