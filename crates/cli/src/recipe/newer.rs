//! Options that came after runs, checkpoints and cells were first told apart by all that a recipe says.
//! Where they say what they say by default, they are left out, so that those of earlier builds stay what
//! they were.

use hydralora_peft::methods;
use hydralora_train::{OPTIMIZER, TrainConfig};
use serde_json::{Map, Value, json};

/// Of methods that earlier builds had.
const OF_METHOD: [&str; 9] = [
    "router_gain",
    "router_temperature",
    "router_temperature_start",
    "router_guide",
    "router_guide_weight",
    "router_guide_decay",
    "router_top_k_gradient",
    "router_z_weight",
    "alignment",
];
/// Of single methods, where others had an option of that name before.
const OF_METHODS: [(&str, &str); 4] = [
    ("hydralora", "balance"),
    ("alora", "balance"),
    ("loramoe", "init_lora_weights"),
    ("lora-split", "init_lora_weights"),
];
/// Of `train`.
const OF_TRAIN: [&str; 6] = [
    "router_learning_rate_ratio",
    "min_learning_rate_ratio",
    "schedule_power",
    "decay_ratio",
    OPTIMIZER,
    "best_set",
];

/// Takes the newer options that say nothing new out of a recipe with every value spelt out.
pub(crate) fn leave_out(resolved: &mut Value) {
    let name = resolved["method"]["name"].as_str().unwrap_or_default();
    let own = OF_METHODS.iter().filter(|(method, _)| *method == name).map(|(_, option)| *option);
    let newer_of_method: Vec<&str> = OF_METHOD.into_iter().chain(own).collect();
    let of_method = methods::find(name).map(|method| method.defaults()).unwrap_or_default();
    let of_train = json!(TrainConfig::default());
    let of_train = of_train.as_object().cloned().unwrap_or_default();
    for (section, newer, defaults) in
        [("method", &newer_of_method[..], of_method), ("train", &OF_TRAIN[..], of_train)]
    {
        if let Some(section) = resolved.get_mut(section).and_then(Value::as_object_mut) {
            drop_defaults(section, newer, &defaults);
        }
    }
}

fn drop_defaults(section: &mut Map<String, Value>, newer: &[&str], defaults: &Map<String, Value>) {
    section.retain(|key, value| !newer.contains(&key.as_str()) || defaults.get(key) != Some(value));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_says_something_new_stays() {
        let mut recipe = json!({
            "method": {"name": "hydralora", "rank": 4, "router_gain": 1.0, "router_guide": "clusters",
                       "router_guide_decay": null},
            "train": {"learning_rate": 0.1, "router_learning_rate_ratio": 1.0, "optimizer": "adamw"},
        });
        leave_out(&mut recipe);
        let wanted = json!({
            "method": {"name": "hydralora", "rank": 4, "router_guide": "clusters"},
            "train": {"learning_rate": 0.1},
        });
        assert_eq!(recipe, wanted);
    }

    /// LoRAMoE's balance and the start of HydraLoRA's heads are as old as these methods are.
    #[test]
    fn what_one_method_had_before_another_stays_with_the_one() {
        for (method, stays) in [
            (json!({"name": "hydralora", "balance": "load", "init_lora_weights": "kaiming"}), 2),
            (json!({"name": "hydralora", "balance": "importance", "router_z_weight": 0.0}), 2),
            (json!({"name": "alora", "balance": "load", "router_top_k_gradient": "kept"}), 1),
            (json!({"name": "loramoe", "balance": "localized", "init_lora_weights": "kaiming"}), 2),
            (json!({"name": "lora-split", "init_lora_weights": "kaiming"}), 1),
            (json!({"name": "lora-split", "init_lora_weights": "singular_segments"}), 2),
            (json!({"name": "align-lora", "alignment": "kl", "align_weight": 0.01}), 2),
        ] {
            let mut recipe = json!({"method": method});
            leave_out(&mut recipe);
            assert_eq!(recipe["method"].as_object().unwrap().len(), stays, "{recipe}");
        }
    }
}
