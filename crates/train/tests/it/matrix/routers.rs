//! Routers that are sharpened, cooled and guided, heads that start apart, and the methods beside HydraLoRA.

use super::{Case, Model, STEPS, Start, model};
use hydralora_kernels::{DType, no_grad};
use hydralora_model::Packed;
use hydralora_model::adapter::{NO_CLUSTER, Pass};
use hydralora_peft::analysis::heads;
use hydralora_peft::{TrainingPlan, Tuned, methods};
use serde_json::{Value, json};

/// More rows of the table of methods.
pub(super) fn cases() -> Vec<Case> {
    let case = |method, options| Case { method, options, start: Start::Same, learning_rate: 5e-3 };
    let other = |options| Case { start: Start::Other, ..case("hydralora", options) };
    let rounded_of = |method, options| Case {
        start: Start::Rounded,
        learning_rate: 2e-3,
        ..case(method, options)
    };
    let rounded = |options| Case { start: Start::Rounded, ..case("hydralora", options) };
    vec![
        case("hydralora", json!({"router_gain": 10.0, "router_init": "layer_centroids"})),
        case("hydralora", json!({"router_temperature": 0.5, "router_temperature_start": 2.0})),
        case(
            "hydralora",
            json!({
                "router_temperature": 0.3, "route_on": "a", "router_bias": true, "router_gain": 2.0,
            }),
        ),
        case(
            "hydralora",
            json!({"router_guide": "domains", "router_guide_weight": 0.5, "router_guide_decay": 0.5}),
        ),
        case(
            "hydralora",
            json!({
                "router_guide": "domains", "router_scope": "block", "router_temperature": 0.5,
                "router_temperature_start": 1.5, "balance_weight": 0.01, "router_top_k": 2,
                "targets": "all",
            }),
        ),
        other(json!({"init_lora_weights": "zero_sum"})),
        rounded(json!({"init_lora_weights": "zero_sum", "gate": "none"})),
        other(json!({"init_lora_weights": "orthogonal", "num_experts": 3})),
        rounded(json!({"init_lora_weights": "orthogonal", "gate": "uniform"})),
        other(json!({"init_lora_weights": "singular_slices", "dropout": 0.1})),
        rounded(
            json!({"init_lora_weights": "singular_slices", "gate": "uniform", "targets": "qv"}),
        ),
        case("hydralora", json!({"route_on": "sequence"})),
        case(
            "hydralora",
            json!({
                "route_on": "sequence", "router_scope": "block", "router_bias": true, "targets": "all",
                "router_top_k": 2, "balance_weight": 0.01, "router_z_weight": 1e-3, "router_gain": 10.0,
            }),
        ),
        other(json!({"route_on": "sequence", "init_lora_weights": "rlora", "router_gain": 10.0})),
        case(
            "hydralora",
            json!({
                "router_z_weight": 1e-2, "balance": "importance", "balance_weight": 0.05, "router_bias": true,
            }),
        ),
        case(
            "hydralora",
            json!({
                "router_z_weight": 1e-3, "router_scope": "block", "targets": "all", "router_top_k": 2,
                "router_top_k_gradient": "straight_through", "router_temperature": 0.5,
            }),
        ),
        case(
            "loramoe",
            json!({
                "num_experts": 4, "router_top_k": 2, "balance": "importance", "router_z_weight": 1e-3,
                "router_top_k_gradient": "straight_through", "dropout": 0.1,
            }),
        ),
        rounded_of(
            "lora-split",
            json!({"rank": 2, "combine": "sum", "init_lora_weights": "singular_segments"}),
        ),
        Case {
            start: Start::Other,
            ..rounded_of("lora-split", json!({"rank": 2, "init_lora_weights": "singular_segments"}))
        },
        Case {
            start: Start::Other,
            ..rounded_of(
                "loramoe",
                json!({
                    "rank": 3, "num_experts": 3, "router_top_k": 2, "balance": "load", "dropout": 0.1,
                    "init_lora_weights": "singular_segments", "targets": "all",
                }),
            )
        },
        case("domain-heads", json!({"domains": ["facts", "stories"]})),
        case(
            "domain-heads",
            json!({
                "domains": ["stories", "facts"], "rank": 3, "alpha": 4, "dropout": 0.1, "use_rslora": true,
                "targets": "all",
            }),
        ),
        case("alora", json!({})),
        case(
            "alora",
            json!({
                "num_experts": 3, "router_top_k": 2, "balance_weight": 0.01, "dropout": 0.1,
                "rank_pattern": {"up_proj": 3}, "targets": "all",
            }),
        ),
        case(
            "alora",
            json!({
                "num_experts": 3, "router_top_k": 2, "router_top_k_gradient": "straight_through",
                "balance": "importance", "balance_weight": 0.01, "router_z_weight": 1e-3,
            }),
        ),
        case("align-lora", json!({"rank": 4})),
        case("align-lora", json!({"rank": 4, "align_weight": 0.3, "dropout": 0.1})),
        case("align-lora", json!({"rank": 3, "align_weight": 0.3, "alignment": "mmd"})),
        case("block-hydra", json!({"rank": 4, "alpha": 16, "num_experts": 4})),
        case(
            "block-hydra",
            json!({
                "rank": 3, "alpha": 12, "num_experts": 3, "groups": 4, "balance_weight": 0.02,
                "dropout": 0.1, "targets": "ffn",
            }),
        ),
        case("block-hydra", json!({"rank": 4, "num_experts": 1, "targets": ["q_proj"]})),
        case(
            "block-hydra",
            json!({"rank": 3, "num_experts": 2, "spectral_weight": 0.25, "targets": "attention"}),
        ),
        Case { learning_rate: 2e-2, ..case("flylora", json!({"rank": 16, "active_rank": 4})) },
        Case {
            learning_rate: 2e-2,
            ..case(
                "flylora",
                json!({
                    "rank": 8, "alpha": 8, "active_rank": 3, "density": 0.5, "bias_rate": 0.01, "dropout": 0.1,
                    "targets": "attention",
                }),
            )
        },
    ]
}

fn build(model: &Model, method: &str, options: Value) -> Box<dyn Tuned> {
    let section = options.as_object().unwrap().clone();
    let options = methods::find(method).unwrap().read_recipe(&section);
    let mut tuned = model.build(options.unwrap_or_else(|faults| panic!("{faults:?}")).as_ref());
    tuned.begin(&TrainingPlan { total_steps: STEPS, domains: &model.dataset.domains }).unwrap();
    tuned
}

/// What the method adds to the loss, with the sequences in these clusters.
fn added(model: &Model, tuned: &dyn Tuned, clusters: &[u32]) -> f64 {
    let (tokens, offsets, labels, domains) = model.packed();
    let batch = Packed { tokens: &tokens, offsets: &offsets };
    let pass = Pass::training(3).of_sequences(&offsets, &domains).in_clusters(clusters);
    let _guard = no_grad();
    let term = |pass: &Pass<'_>| tuned.aux_loss(pass);
    let found = model.decoder.gradients(batch, &labels, 1.0, tuned.as_adapter(), &pass, &term);
    found.unwrap().added
}

#[test]
fn a_guide_is_the_cross_entropy_of_the_gates_and_fades() {
    let model = model(DType::F64);
    let options = json!({
        "num_experts": 2, "router_guide": "clusters", "router_guide_weight": 0.5,
        "router_guide_decay": 0.5,
    });
    let mut tuned = build(&model, "hydralora", options);
    // Routers of zero have even gates.
    for trainable in tuned.trainables_mut() {
        if trainable.parameter.name().contains("lora_route") {
            trainable.parameter.value_mut().data_mut::<f64>().fill(0.0);
        }
    }
    let even = 0.5 * 2.0_f64.ln();
    for clusters in [[0, 1, 1, 0], [1, 1, 1, NO_CLUSTER]] {
        let found = added(&model, tuned.as_ref(), &clusters);
        assert!((found - even).abs() < 1e-12, "{found} {even}");
    }
    // Who belongs to no cluster is not guided, and who knows of no clusters adds nothing.
    assert_eq!(added(&model, tuned.as_ref(), &[NO_CLUSTER; 4]), 0.0);
    assert_eq!(added(&model, tuned.as_ref(), &[]), 0.0);
    for (taken, share) in [(0, 1.0), (5, 0.5), (10, 0.0), (19, 0.0)] {
        tuned.before_step(taken);
        let found = added(&model, tuned.as_ref(), &[0, 1, 1, 0]);
        assert!((found - share * even).abs() < 1e-12, "{taken}: {found}");
    }
}

/// Routers of zero have scores of zero, so that the z-loss of each is `(ln N)²`; one that serves a block
/// counts once.
#[test]
fn a_z_loss_is_the_sum_over_routers() {
    let model = model(DType::F64);
    let of = |options: Value| -> f64 {
        let mut tuned = build(&model, "hydralora", options);
        for trainable in tuned.trainables_mut() {
            if trainable.parameter.name().contains("lora_route") {
                trainable.parameter.value_mut().data_mut::<f64>().fill(0.0);
            }
        }
        added(&model, tuned.as_ref(), &[])
    };
    let one = 3.0_f64.ln().powi(2);
    let options = |scope: &str| {
        json!({
            "num_experts": 3, "targets": "ffn", "router_scope": scope, "router_z_weight": 0.1,
        })
    };
    // Five layers, each with a gate, an up and a down projection.
    for (scope, routers) in [("linear", 15.0), ("block", 5.0)] {
        let found = of(options(scope));
        assert!((found - 0.1 * routers * one).abs() < 1e-12, "{scope}: {found}");
    }
    // Beside other terms, and of even gates, whose importance is even too.
    let mut both = options("block");
    both["balance"] = json!("importance");
    both["balance_weight"] = json!(0.5);
    let found = of(both);
    assert!((found - 0.5 * one).abs() < 1e-9, "{found}");
}

/// Layers kept by their inputs alone give the gradients of those kept whole, of scores too.
#[test]
fn gradients_of_scores_are_the_same_when_layers_are_computed_again() {
    let model = model(DType::F64);
    for scope in ["linear", "block"] {
        let options = json!({
            "num_experts": 3, "targets": "ffn", "router_scope": scope, "router_z_weight": 0.3,
            "balance": "importance", "balance_weight": 0.5, "router_guide": "domains",
            "router_top_k": 2, "router_top_k_gradient": "straight_through",
        });
        let mut tuned = build(&model, "hydralora", options);
        for trainable in tuned.trainables_mut() {
            let data = trainable.parameter.value_mut().data_mut::<f64>();
            for (at, value) in data.iter_mut().enumerate() {
                *value += 0.1 * (at as f64 * 1.3).sin();
            }
        }
        let [whole, again] = [false, true].map(|on| model.trained(tuned.as_ref(), on));
        assert!((whole.added - again.added).abs() < 1e-9, "{scope}");
        for trainable in tuned.trainables() {
            let [a, b] = [&whole, &again]
                .map(|found| found.gradients.get(trainable.var()).unwrap().to_f64());
            let norm = a.iter().map(|v| v * v).sum::<f64>().sqrt();
            let apart = a.iter().zip(&b).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
            let name = trainable.parameter.name();
            assert!(norm > 0.0 && apart < 1e-9 * norm, "{scope} {name}: {apart} of {norm}");
        }
    }
}

/// A gate that was not kept learns only if gradients go straight through the choice.
#[test]
fn a_router_learns_of_what_it_did_not_choose() {
    let model = model(DType::F64);
    let gradients = |gradient: &str| -> Vec<f64> {
        let options = json!({
            "num_experts": 4, "targets": ["model.layers.1.mlp.up_proj"], "router_top_k": 2,
            "router_top_k_gradient": gradient, "router_bias": true,
        });
        let mut tuned = build(&model, "hydralora", options);
        for trainable in tuned.trainables_mut() {
            let name = trainable.parameter.name().to_owned();
            let data = trainable.parameter.value_mut().data_mut::<f64>();
            match &name {
                // Two heads that every token chooses.
                name if name.contains("lora_route.bias") => {
                    data.copy_from_slice(&[9.0, 9.0, 0.0, 0.0])
                }
                name if name.contains("lora_B") => {
                    for (at, value) in data.iter_mut().enumerate() {
                        *value = 0.1 * (at as f64 * 0.7).sin();
                    }
                }
                _ => {}
            }
        }
        let found = model.trained(tuned.as_ref(), false).gradients;
        let bias = tuned.trainables().into_iter().find(|t| t.parameter.name().ends_with("bias"));
        found.get(bias.unwrap().var()).unwrap().to_f64()
    };
    let (kept, straight) = (gradients("kept"), gradients("straight_through"));
    // Their gates are e⁻⁹ of the others'.
    let most = straight.iter().fold(0.0_f64, |most, slope| most.max(slope.abs()));
    assert!(kept[2..].iter().all(|slope| slope.abs() < 1e-12 * most), "{kept:?}");
    assert!(straight[2..].iter().all(|slope| slope.abs() > 1e-7 * most), "{straight:?}");
}

/// The samples' discrepancy falls as that of Gaussians does.
#[test]
fn a_discrepancy_of_samples_falls_in_training() {
    let model = model(DType::F64);
    let options = json!({"rank": 3, "align_weight": 5.0, "alignment": "mmd"});
    let mut aligned = build(&model, "align-lora", options);
    let mut losses = Vec::new();
    let mut optimizer = hydralora_train::Stepper::adamw(aligned.as_ref());
    for _ in 0..15 {
        let found = model.trained(aligned.as_ref(), false);
        losses.push(found.added);
        optimizer.step(aligned.as_mut(), &found.gradients, 1e-2);
    }
    assert!(losses[0] > 0.0 && losses[14] < 0.9 * losses[0], "{losses:?}");
}

#[test]
fn more_domains_than_heads_cannot_guide() {
    let model = model(DType::F32);
    let options = json!({"num_experts": 2, "router_guide": "domains"});
    let options = methods::find("hydralora").unwrap().read_recipe(options.as_object().unwrap());
    let mut tuned = model.build(options.unwrap().as_ref());
    let domains = ["law", "math", "medicine"].map(str::to_owned);
    let plan = TrainingPlan { total_steps: 3, domains: &domains };
    let error = tuned.begin(&plan).unwrap_err().to_string();
    for part in ["method.router_guide", "3 (law, math, medicine)", "2 experts", "`clusters`"] {
        assert!(error.contains(part), "{error}");
    }
    let mut aligned = build(&model, "align-lora", json!({}));
    let plan = TrainingPlan { total_steps: 3, domains: &domains[..1] };
    let error = aligned.begin(&plan).unwrap_err().to_string();
    assert!(error.contains("method.align_weight") && error.contains("one domain"), "{error}");
}

/// In training scores are divided by a temperature on its way, elsewhere by the last.
#[test]
fn the_temperature_cools_in_training_alone() {
    let model = model(DType::F64);
    let cooling = json!({"router_temperature": 0.5, "router_temperature_start": 2.0});
    let mut cooling = build(&model, "hydralora", cooling);
    let fixed =
        |temperature: f64| build(&model, "hydralora", json!({"router_temperature": temperature}));
    let differ = |tuned: &mut dyn Tuned| {
        // Heads that differ, so that gates matter.
        for trainable in tuned.trainables_mut() {
            if trainable.parameter.name().contains("lora_B") {
                let data = trainable.parameter.value_mut().data_mut::<f64>();
                for (at, value) in data.iter_mut().enumerate() {
                    *value = 0.1 * (at as f64 * 0.7).sin();
                }
            }
        }
    };
    differ(cooling.as_mut());
    for (taken, temperature) in [(0, 2.0), (19, 0.5)] {
        cooling.before_step(taken);
        let mut still = fixed(temperature);
        differ(still.as_mut());
        let [a, b] = [&cooling, &still].map(|tuned| model.trained(tuned.as_ref(), false).loss);
        assert!((a - b).abs() < 1e-12, "after {taken}: {a} {b}");
    }
    cooling.before_step(0);
    let mut last = fixed(0.5);
    differ(last.as_mut());
    let [a, b] = [&cooling, &last].map(|tuned| model.logits(tuned.as_adapter()));
    assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-12));
    let [a, b] = [&cooling, &last].map(|tuned| model.trained(tuned.as_ref(), false).loss);
    assert!((a - b).abs() > 1e-6, "{a} {b}");
}

/// A head for each domain is a LoRA for each, once one is chosen.
#[test]
fn a_domains_head_is_a_lora() {
    let model = model(DType::F64);
    let domains = json!({"domains": ["stories", "facts"], "rank": 4, "alpha": 8});
    let mut heads = build(&model, "domain-heads", domains);
    for trainable in heads.trainables_mut() {
        let data = trainable.parameter.value_mut().data_mut::<f64>();
        for (at, value) in data.iter_mut().enumerate() {
            *value += 0.05 * (at as f64 * 1.3).sin();
        }
    }
    let tensors = heads.tensors();
    let each = |head: usize| {
        let mut lora = build(&model, "lora", json!({"rank": 4, "alpha": 8, "targets": "ffn"}));
        let mut own: hydralora_peft::TensorMap = tensors
            .iter()
            .filter(|(name, _)| name.contains("lora_A") || name.contains(&format!("lora_B{head}")))
            .map(|(name, tensor)| {
                (name.replace(&format!("lora_B{head}"), "lora_B"), tensor.clone())
            })
            .collect();
        lora.load(&mut own).unwrap();
        model.logits(lora.as_adapter())
    };
    let [stories, facts] = [each(0), each(1)];
    // In a batch every row gets that of its own domain: the first two records are facts.
    let mixed = model.logits(heads.as_adapter());
    let (_, offsets, _, _) = model.packed();
    let border = offsets[2] * model.decoder.config().vocab_size;
    let near = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-9);
    assert!(near(&mixed[..border], &facts[..border]) && near(&mixed[border..], &stories[border..]));
    let aware = heads.as_domain_aware_mut().unwrap();
    aware.choose_domain("stories").unwrap();
    assert!(aware.choose_domain("law").unwrap_err().to_string().contains("stories, facts"));
    assert!(near(&model.logits(heads.as_adapter()), &stories));
    assert!(!near(&stories, &facts));
}

/// `B Σ w_i A_i x` is `Σ w_i B A_i x`: a LoRA-Split whose every `B_i` is the one.
#[test]
fn alora_is_lora_split_with_equal_heads() {
    let model = model(DType::F64);
    let options = json!({"rank": 2, "alpha": 4, "num_experts": 3, "targets": "ffn"});
    let mut alora = build(&model, "alora", options.clone());
    for trainable in alora.trainables_mut() {
        let data = trainable.parameter.value_mut().data_mut::<f64>();
        for (at, value) in data.iter_mut().enumerate() {
            *value += 0.1 * (at as f64 * 1.3).sin();
        }
    }
    let mut split = build(&model, "lora-split", options);
    let mut tensors = hydralora_peft::TensorMap::new();
    for (name, tensor) in alora.tensors() {
        if name.contains("lora_B.") {
            for head in 0..3 {
                tensors.insert(name.replace("lora_B", &format!("lora_B{head}")), tensor.clone());
            }
        } else {
            tensors.insert(name, tensor);
        }
    }
    split.load(&mut tensors).unwrap();
    let [a, b] = [&alora, &split].map(|tuned| model.logits(tuned.as_adapter()));
    assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-9));
    let found = heads(alora.tensors());
    assert!(found.values().all(|site| site.num_heads == 3 && site.full_rank == 6));
}

#[test]
fn a_penalty_on_what_a_makes_of_domains_falls_in_training() {
    let model = model(DType::F64);
    let mut aligned = build(&model, "align-lora", json!({"rank": 3, "align_weight": 5.0}));
    let mut losses = Vec::new();
    let mut optimizer = hydralora_train::Stepper::adamw(aligned.as_ref());
    for _ in 0..15 {
        let found = model.trained(aligned.as_ref(), false);
        losses.push(found.added);
        optimizer.step(aligned.as_mut(), &found.gradients, 1e-2);
    }
    assert!(losses[0] > 0.0 && losses[14] < 0.7 * losses[0], "{losses:?}");
}

/// An adapter beside a block sees what the block sees: with even gates and one kind of head it is the same
/// as a product of the block's input, and gates of groups that are equal are gates of the whole.
#[test]
fn groups_with_equal_gates_are_one() {
    let model = model(DType::F64);
    let options = |groups: usize| json!({"rank": 2, "alpha": 8, "num_experts": 3, "groups": groups, "targets": "all"});
    let mut one = build(&model, "block-hydra", options(1));
    for trainable in one.trainables_mut() {
        let data = trainable.parameter.value_mut().data_mut::<f64>();
        for (at, value) in data.iter_mut().enumerate() {
            *value += 0.1 * (at as f64 * 1.3).sin();
        }
    }
    let mut four = build(&model, "block-hydra", options(4));
    let mut tensors = hydralora_peft::TensorMap::new();
    for (name, tensor) in one.tensors() {
        let tensor = match name.contains("lora_route") {
            true => {
                let rows = tensor.to_f64();
                let shape = [4 * tensor.rows(), tensor.cols()];
                hydralora_kernels::Tensor::from_f64(DType::F64, &rows.repeat(4), shape)
            }
            false => tensor,
        };
        tensors.insert(name, tensor);
    }
    four.load(&mut tensors).unwrap();
    let [a, b] = [&one, &four].map(|tuned| model.logits(tuned.as_adapter()));
    assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-9));
    assert!(heads(one.tensors()).values().all(|site| site.num_heads == 3));
}

/// Every token uses as many ranks as it should, and those used least are favoured next.
#[test]
fn flylora_uses_a_part_of_its_ranks_and_evens_out_the_load() {
    let model = model(DType::F64);
    let options = json!({"rank": 8, "active_rank": 2, "density": 0.25, "bias_rate": 0.5});
    let mut fly = build(&model, "flylora", options);
    let file = fly.file_tensors();
    let a = file.iter().filter(|(name, _)| name.contains("lora_A"));
    for (name, a) in a {
        let rows = a.to_f64();
        let filled = (0.25 * a.cols() as f64) as usize;
        for row in rows.chunks_exact(a.cols()) {
            assert_eq!(row.iter().filter(|value| **value != 0.0).count(), filled, "{name}");
        }
    }
    assert!(fly.trainables().iter().all(|t| t.parameter.name().contains("lora_B")));
    let bias = |fly: &dyn Tuned| -> Vec<f64> {
        let file = fly.file_tensors();
        file.iter()
            .filter(|(name, _)| name.contains("lora_d"))
            .flat_map(|(_, d)| d.to_f64())
            .collect()
    };
    assert!(bias(fly.as_ref()).iter().all(|d| *d == 0.0));
    let gradients = model.trained(fly.as_ref(), false).gradients;
    fly.after_step(1, &gradients);
    let once = bias(fly.as_ref());
    assert!(once.contains(&0.5) && once.contains(&-0.5), "{once:?}");
    // Nothing was computed since.
    fly.after_step(2, &gradients);
    assert_eq!(bias(fly.as_ref()), once);
}

#[test]
fn starts_that_part_heads_part_them() {
    let model = model(DType::F64);
    let cosine = |options: Value| -> Option<f64> {
        let tuned = build(&model, "hydralora", options);
        let found = heads(tuned.tensors());
        let all: Vec<f64> = found.values().filter_map(|site| site.cosine).collect();
        (!all.is_empty()).then(|| all.iter().sum::<f64>() / all.len() as f64)
    };
    assert_eq!(cosine(json!({})), None);
    for start in ["orthogonal", "singular_slices"] {
        let found = cosine(json!({"init_lora_weights": start})).unwrap();
        assert!(found.abs() < 1e-9, "{start}: {found}");
    }
    // Four heads that sum to zero: `Σ_{i≠j} ⟨B_i, B_j⟩ = −Σ ‖B_i‖²`.
    let found = cosine(json!({"init_lora_weights": "zero_sum"})).unwrap();
    assert!((found + 1.0 / 3.0).abs() < 0.05, "{found}");
}

#[test]
fn options_that_contradict_each_other_are_named() {
    let faults = |method: &str, section: Value| -> String {
        let section = section.as_object().unwrap().clone();
        let faults = methods::find(method).unwrap().read_recipe(&section).err().unwrap();
        faults.iter().map(|fault| fault.to_string() + "\n").collect()
    };
    for (method, section, parts) in [
        (
            "hydralora",
            json!({"init_lora_weights": "zero_sum", "num_experts": 1}),
            ["method.init_lora_weights", "a single one"],
        ),
        (
            "hydralora",
            json!({"router_guide": "clusters", "num_experts": 1}),
            ["method.router_guide", "a single head has none"],
        ),
        (
            "hydralora",
            json!({"router_guide": "clusters", "gate": "uniform"}),
            ["method.router_guide", "gate: softmax"],
        ),
        (
            "hydralora",
            json!({"router_guide": "clusters", "route_on": "a"}),
            ["method.router_guide", "reads x"],
        ),
        (
            "hydralora",
            json!({"router_guide_decay": 0.5}),
            ["method.router_guide_decay", "`clusters` or `domains`"],
        ),
        (
            "hydralora",
            json!({"router_guide": "domains", "router_guide_decay": 1.5}),
            ["method.router_guide_decay", "is 1.5"],
        ),
        (
            "hydralora",
            json!({"router_gain": 0.0, "router_temperature": -1.0}),
            ["method.router_gain", "method.router_temperature"],
        ),
        (
            "hydralora",
            json!({"balance_weight": 0.1, "gate": "uniform"}),
            ["method.balance_weight", "gate: softmax"],
        ),
        ("hydralora", json!({"router_gain": 3, "gate": "none"}), ["router_gain", "gate: softmax"]),
        (
            "hydralora",
            json!({"router_z_weight": 0.1, "gate": "uniform"}),
            ["method.router_z_weight", "gate: softmax"],
        ),
        (
            "hydralora",
            json!({"route_on": "sequence", "gate": "none"}),
            ["method.route_on", "gate: softmax"],
        ),
        (
            "hydralora",
            json!({"router_z_weight": 0.1, "route_on": "a"}),
            ["method.router_z_weight", "reads x"],
        ),
        (
            "hydralora",
            json!({"router_z_weight": 0.1, "num_experts": 1}),
            ["method.router_z_weight", "a single head has none"],
        ),
        ("hydralora", json!({"router_z_weight": -1}), ["method.router_z_weight", "0 or more"]),
        (
            "hydralora",
            json!({"balance": "importance", "balance_weight": 0.1, "gate": "uniform"}),
            ["method.balance:", "gate: softmax"],
        ),
        (
            "hydralora",
            json!({"balance": "importance"}),
            ["method.balance:", "`balance_weight` is 0"],
        ),
        ("alora", json!({"balance": "importance"}), ["method.balance:", "`balance_weight` is 0"]),
        (
            "loramoe",
            json!({"balance": "importance", "balance_weight": 0}),
            ["method.balance:", "`balance_weight` is 0"],
        ),
        (
            "loramoe",
            json!({"balance": "importance", "knowledge_domains": ["law"]}),
            ["method.knowledge_domains", "`importance` knows no kinds"],
        ),
        (
            "hydralora",
            json!({"router_top_k_gradient": "straight_through"}),
            ["method.router_top_k_gradient", "`router_top_k`, which is not given"],
        ),
        (
            "alora",
            json!({"router_top_k_gradient": "straight_through"}),
            ["method.router_top_k_gradient", "`router_top_k`, which is not given"],
        ),
        (
            "loramoe",
            json!({"router_top_k_gradient": "straight_through"}),
            ["method.router_top_k_gradient", "`router_top_k`, which is not given"],
        ),
        (
            "hydralora",
            json!({"init_lora_weights": "singular_segments"}),
            ["method.init_lora_weights", "`singular_slices`"],
        ),
        (
            "lora-split",
            json!({"init_lora_weights": "rlora"}),
            ["method.init_lora_weights", "`singular_segments`"],
        ),
        (
            "loramoe",
            json!({"init_lora_weights": "singular_segments", "num_experts": 1}),
            ["method.init_lora_weights", "a single one"],
        ),
        (
            "lora",
            json!({"init_lora_weights": "singular_segments"}),
            ["method.init_lora_weights", "several heads"],
        ),
        (
            "align-lora",
            json!({"alignment": "mmd", "align_weight": 0}),
            ["method.alignment", "`align_weight`, which is 0"],
        ),
        (
            "lora",
            json!({"init_lora_weights": "singular_slices"}),
            ["singular_slices", "several heads"],
        ),
        ("alora", json!({"num_experts": 1}), ["method.num_experts", "`name: lora`"]),
        ("align-lora", json!({"align_weight": -1}), ["method.align_weight", "0 or more"]),
        ("flylora", json!({"active_rank": 33}), ["method.active_rank", "rank, which is 32"]),
        ("flylora", json!({"density": 0.0}), ["method.density", "above 0"]),
        ("block-hydra", json!({"groups": 0}), ["method.groups", "at least 1"]),
        (
            "block-hydra",
            json!({"num_experts": 1, "groups": 2}),
            ["method.groups", "a single head has none"],
        ),
        ("domain-heads", json!({}), ["method.domains", "is empty"]),
        ("domain-heads", json!({"domains": ["a", "a"]}), ["method.domains", "twice"]),
    ] {
        let found = faults(method, section);
        assert!(parts.iter().all(|part| found.contains(part)), "{found} lacks {parts:?}");
    }
    // What a layer is too narrow for is known with the model.
    let model = model(DType::F32);
    let section = json!({"groups": 5});
    let options = methods::find("block-hydra").unwrap().read_recipe(section.as_object().unwrap());
    let options = options.unwrap();
    let sites = options.select(&model.decoder.sites()).unwrap();
    assert_eq!(sites.len(), 10);
    let error = options.check_layers(&sites).unwrap_err().to_string();
    assert!(error.contains("method.groups") && error.contains("64 wide"), "{error}");
    for (start, rank) in [("orthogonal", 50), ("singular_slices", 20)] {
        let section = json!({"init_lora_weights": start, "rank": rank, "num_experts": 4});
        let options = methods::find("hydralora").unwrap().read_recipe(section.as_object().unwrap());
        let options = options.unwrap();
        let sites = options.select(&model.decoder.sites()).unwrap();
        let error = options.check_layers(&sites).unwrap_err().to_string();
        assert!(error.contains(start) && error.contains("wide"), "{error}");
    }
    for method in ["lora-split", "loramoe"] {
        let section =
            json!({"init_lora_weights": "singular_segments", "rank": 17, "num_experts": 4});
        let options = methods::find(method).unwrap().read_recipe(section.as_object().unwrap());
        let options = options.unwrap();
        let sites = options.select(&model.decoder.sites()).unwrap();
        let error = options.check_layers(&sites).unwrap_err().to_string();
        assert!(error.contains("singular_segments") && error.contains("68 in all"), "{error}");
    }
}
