//! Options and files that are refused, each by the name of what is wrong.

use super::model;
use hydralora_kernels::DType;
use hydralora_peft::{TrainingPlan, methods};
use serde_json::{Map, Value, json};

#[test]
fn wrong_options_are_named() {
    let faults = |method: &str, section: Value| -> String {
        let section = section.as_object().unwrap().clone();
        let faults = methods::find(method).unwrap().read_recipe(&section).err().unwrap();
        faults.iter().map(|fault| fault.to_string() + "\n").collect()
    };
    let says = |found: String, parts: &[&str]| {
        for part in parts {
            assert!(found.contains(part), "{found} does not say {part}");
        }
    };
    says(faults("lora-split", json!({"combin": "sum"})), &["method.combin", "`combine`"]);
    says(faults("lora-split", json!({"num_experts": 0})), &["method.num_experts", "at least 1"]);
    says(
        faults("loramoe", json!({"balance_delta": 1.5, "balance_weight": -1.0})),
        &["method.balance_delta", "method.balance_weight"],
    );
    says(
        faults("adalora", json!({"init_r": 4, "target_r": 6, "delta_t": 0, "beta1": 1.0})),
        &["method.target_r", "method.delta_t", "method.beta1"],
    );
    says(
        faults("adalora", json!({"tinit": 5, "tfinal": 5, "total_step": 10})),
        &["method.tinit", "no step of 10"],
    );
    says(faults("ia3", json!({"targets": []})), &["method.targets"]);
    says(
        faults("prompt-tuning", json!({"init": "text", "num_virtual_tokens": 0})),
        &["method.init_text", "method.num_virtual_tokens"],
    );
    says(faults("p-tuning", json!({"encoder": "gru"})), &["method.encoder", "lstm"]);
    says(faults("prefix-tuning", json!({"encoder_hidden_size": 0})), &["encoder_hidden_size"]);
    says(
        faults("hydralora", json!({"gate": "none", "router_bias": true})),
        &["method.router_bias", "gate: softmax"],
    );
    says(
        faults("hydralora", json!({"router_top_k": 5, "balance_weight": -1.0})),
        &["method.router_top_k", "2 to num_experts", "method.balance_weight"],
    );
    says(
        faults("hydralora", json!({"router_top_k": 2, "route_on": "a"})),
        &["method.router_top_k", "reads x"],
    );
    says(faults("loramoe", json!({"router_top_k": 1})), &["method.router_top_k"]);
    says(
        faults("loramoe", json!({"balance": "load", "knowledge_domains": ["facts"]})),
        &["method.knowledge_domains", "localized"],
    );
    says(
        faults("lora", json!({"use_dora": true, "init_lora_weights": "pissa"})),
        &["method.init_lora_weights", "DoRA"],
    );
    says(faults("lora", json!({"init_lora_weights": "rlora"})), &["several heads"]);
    says(faults("hydralora", json!({"init_lora_weights": "pissa"})), &["single pair"]);
    says(
        faults("lora", json!({"init_lora_weights": "olora"})),
        &["init_lora_weights", "did you mean"],
    );
    says(faults("lora", json!({"init_lora_weights": "svd"})), &["init_lora_weights", "pissa"]);
    says(faults("full", json!({"freeze_embedings": true})), &["`freeze_embeddings`"]);
    says(faults("full", json!({"targets": []})), &["method.targets"]);
}

#[test]
fn unsupported_options_of_a_file_are_named() {
    let refused = |config: Value, key: &str| {
        let config: Map<String, Value> = config.as_object().unwrap().clone();
        let method = methods::METHODS.iter().find(|method| method.claims(&config)).unwrap();
        let faults = method.read_peft(&config).err().unwrap();
        assert!(faults.iter().any(|fault| fault.field.contains(key)), "{faults:?}");
    };
    let targets = json!(["k_proj"]);
    refused(json!({"peft_type": "IA3"}), "target_modules");
    refused(
        json!({"peft_type": "IA3", "target_modules": targets, "fan_in_fan_out": true}),
        "fan_in_fan_out",
    );
    refused(json!({"peft_type": "PROMPT_TUNING"}), "num_virtual_tokens");
    let lora = json!({"peft_type": "LORA", "target_modules": targets, "r": 4, "lora_alpha": 8});
    let with = |key: &str, value: Value| {
        let mut config = lora.clone();
        config[key] = value;
        config
    };
    refused(with("init_lora_weights", json!("pissa")), "init_lora_weights");
    refused(with("use_dora", json!("yes")), "use_dora");
    let mut hydra = with("use_dora", json!(true));
    hydra["lora_nums"] = json!(2);
    refused(hydra, "use_dora");
    refused(
        json!({"peft_type": "P_TUNING", "num_virtual_tokens": 4, "num_transformer_submodules": 2}),
        "num_transformer_submodules",
    );
    refused(
        json!({
            "peft_type": "ADALORA", "target_modules": targets, "init_r": 4, "target_r": 2,
            "lora_alpha": 8, "rank_pattern": {"model.layers.0.self_attn.k_proj.lora_E": [true]},
        }),
        "rank_pattern",
    );
    refused(
        json!({
            "peft_type": "ADALORA", "target_modules": targets, "init_r": 4, "target_r": 2,
            "lora_alpha": 8, "use_dora": true,
        }),
        "use_dora",
    );
}

#[test]
fn a_run_that_cannot_be_what_the_options_need_is_refused() {
    let model = model(DType::F32);
    let refusal = |method: &str, options: Value| {
        let options = methods::find(method).unwrap().read_recipe(options.as_object().unwrap());
        let options = options.unwrap();
        let sites = options.select(&model.decoder.sites()).unwrap();
        let mut tuned = options.build(&sites, DType::F32, 1);
        let plan = TrainingPlan { total_steps: 10, domains: &model.dataset.domains };
        tuned.begin(&plan).unwrap_err().to_string()
    };
    let error = refusal("adalora", json!({"tinit": 6, "tfinal": 6}));
    assert!(error.contains("no step of 10"), "{error}");
    let error = refusal("loramoe", json!({"knowledge_domains": ["fact"]}));
    assert!(error.contains("`fact`") && error.contains("facts, stories"), "{error}");
    let error = refusal("lora", json!({"use_dora": true}));
    assert!(error.contains("base model's weights"), "{error}");
    let error = refusal("full", json!({}));
    assert!(error.contains("base model's weights"), "{error}");
    let error = refusal("prompt-tuning", json!({"init": "text", "init_text": "Hello"}));
    assert!(error.contains("method.init"), "{error}");
}
