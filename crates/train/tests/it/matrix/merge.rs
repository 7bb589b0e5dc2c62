//! Every method folded into the base's weights: the same logits, or a reason why not.

use super::{Model, cases, model};
use hydralora_kernels::block::BlockFormat;
use hydralora_kernels::ops::dropout::mix;
use hydralora_kernels::{DType, Tensor};
use hydralora_model::adapter::NoAdapter;
use hydralora_model::save::Saving;
use hydralora_model::{Decoder, ModelSource};
use hydralora_peft::exchange::Lora;
use hydralora_peft::merge::{Gates, MergePlan};
use hydralora_peft::{Role, Tuned};

/// Moves every value off its start; routers go to zero, so that their gates are even.
pub(crate) fn randomise(tuned: &mut dyn Tuned) {
    for (index, trainable) in tuned.trainables_mut().into_iter().enumerate() {
        let start = trainable.parameter.value().clone();
        let noise = |at: usize| (mix((index * 7919 + at) as u64) >> 40) as f64 / 1e8 - 0.08;
        let values: Vec<f64> = if trainable.role == Role::Router {
            vec![0.0; start.len()]
        } else {
            start.to_f64().iter().enumerate().map(|(at, v)| v + noise(at)).collect()
        };
        trainable.parameter.set(Tensor::from_f64(start.dtype(), &values, start.shape()));
    }
}

/// The logits of a model whose weights have the adapter in them.
fn folded(model: &Model, plan: &MergePlan<'_>) -> Vec<f64> {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("merged");
    let edit = |name: &str, tensor: Tensor| plan.edit(name, tensor);
    let source = &model.source;
    let format = BlockFormat::F32;
    let (name, untie) = ("merged", plan.unties());
    Saving { source, format, chat_template: None, end_ids: &[], name, edit: &edit, untie }
        .folder(&out)
        .unwrap();
    let written = ModelSource::open(&out).unwrap();
    let decoder = Decoder::load(&written.config, &written.weights, DType::F64).unwrap();
    Model { source: written, decoder, dataset: model.dataset.clone() }.logits(&NoAdapter)
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    let largest = a.iter().fold(0.0_f64, |m, x| m.max(x.abs()));
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max) / largest
}

#[test]
fn merged_is_unmerged_or_refused() {
    let model = model(DType::F64);
    let all = model.decoder.sites();
    let base = model.logits(&NoAdapter);
    let (mut static_ones, mut routed, mut refused) = (0, 0, 0);
    for case in cases() {
        let mut tuned = model.build(case.options().as_ref());
        randomise(tuned.as_mut());
        if tuned.as_whole_model().is_some() {
            // What it leaves is a model already.
            continue;
        }
        let domain = tuned.as_domain_aware().map(|aware| aware.domains()[0].clone());
        if let Some(domain) = domain {
            let error = MergePlan::new(tuned.as_ref(), &all, &Gates::Uniform).unwrap_err();
            assert!(error.to_string().contains("for every domain"), "{error}");
            tuned.as_domain_aware_mut().unwrap().choose_domain(&domain).unwrap();
        }
        let adapted = model.logits(tuned.as_adapter());
        assert!(distance(&base, &adapted) > 1e-3, "{} does nothing", case.name());
        let gates = match MergePlan::new(tuned.as_ref(), &all, &Gates::PerToken) {
            Ok(_) => {
                static_ones += 1;
                Gates::PerToken
            }
            Err(error) => {
                let error = error.to_string();
                if error.contains("for every token") {
                    routed += 1;
                    let options = case.options().to_recipe();
                    if options.get("router_top_k").is_some_and(|k| !k.is_null()) {
                        // Even gates are not what a router does that uses only some heads.
                        continue;
                    }
                    Gates::Uniform
                } else {
                    assert!(error.contains("no weight of the base can hold"), "{error}");
                    let unfoldable = ["block-hydra", "flylora"].contains(&case.method);
                    let prompts = case.method.ends_with("tuning");
                    assert!(unfoldable || prompts, "{}: {error}", case.name());
                    refused += 1;
                    continue;
                }
            }
        };
        let plan = MergePlan::new(tuned.as_ref(), &all, &gates).unwrap();
        let off = distance(&adapted, &folded(&model, &plan));
        assert!(off < 1e-5, "{}: {off}", case.name());
        if tuned.beside().is_none() {
            let error = Lora::from_tuned(tuned.as_ref(), &all, &gates, false).unwrap_err();
            assert!(error.to_string().contains("beside its layers"), "{error}");
            continue;
        }
        if case.method == "ia3" || case.options["use_dora"] == true {
            let error = Lora::from_tuned(tuned.as_ref(), &all, &gates, false).unwrap_err();
            assert!(error.to_string().contains("two thin matrices"), "{error}");
            continue;
        }
        for compact in [false, true] {
            let lora = Lora::from_tuned(tuned.as_ref(), &all, &gates, compact).unwrap();
            let live = lora.attach(model.decoder.config(), DType::F64).unwrap();
            let off = distance(&adapted, &model.logits(live.as_adapter()));
            assert!(off < 1e-5, "{} as a LoRA: {off}", case.name());
        }
    }
    assert!(static_ones >= 14 && routed >= 9 && refused >= 8, "{static_ones} {routed} {refused}");
}

/// With fixed gates the fold is the adapter whose router gives just these gates.
#[test]
fn fixed_gates_weigh_the_heads() {
    let model = model(DType::F64);
    let all = model.decoder.sites();
    let case = cases().into_iter().find(|case| case.method == "hydralora").unwrap();
    let options = hydralora_peft::methods::find("hydralora").unwrap();
    let section = serde_json::json!({"router_bias": true, "num_experts": 3, "rank": 2});
    let options = options.read_recipe(section.as_object().unwrap()).unwrap();
    assert_eq!(case.method, "hydralora");
    let mut tuned = model.build(options.as_ref());
    randomise(tuned.as_mut());
    let wanted: [f64; 3] = [0.6, 0.3, 0.1];
    for trainable in tuned.trainables_mut() {
        if trainable.parameter.name().ends_with("lora_route.bias") {
            let logs = wanted.map(f64::ln);
            trainable.parameter.set(Tensor::from_f64(DType::F64, &logs, [3]));
        }
    }
    let adapted = model.logits(tuned.as_adapter());
    let fixed = tuned.sites().into_iter().map(|site| (site, wanted.to_vec())).collect();
    let gates = Gates::Fixed(fixed);
    let plan = MergePlan::new(tuned.as_ref(), &all, &gates).unwrap();
    assert!(distance(&adapted, &folded(&model, &plan)) < 1e-5);
    let stacked = Lora::from_tuned(tuned.as_ref(), &all, &gates, false).unwrap();
    let compact = Lora::from_tuned(tuned.as_ref(), &all, &gates, true).unwrap();
    assert_eq!((stacked.rank, compact.rank), (6, 2));
    assert!((stacked.scale() - compact.scale()).abs() < 1e-12);
    for lora in [stacked, compact] {
        let live = lora.attach(model.decoder.config(), DType::F64).unwrap();
        assert!(distance(&adapted, &model.logits(live.as_adapter())) < 1e-5);
    }
    // Uniform gates are something else here.
    let plan = MergePlan::new(tuned.as_ref(), &all, &Gates::Uniform).unwrap();
    assert!(distance(&adapted, &folded(&model, &plan)) > 1e-3);
    // Gates of another number of heads, or for no layer, are refused.
    let short = tuned.sites().into_iter().map(|site| (site, vec![0.5; 2])).collect();
    let error = MergePlan::new(tuned.as_ref(), &all, &Gates::Fixed(short)).unwrap_err();
    assert!(error.to_string().contains("has 3 heads, not 2"), "{error}");
    let error = MergePlan::new(tuned.as_ref(), &all, &Gates::Fixed([].into())).unwrap_err();
    assert!(error.to_string().contains("no gates are known"), "{error}");
}
