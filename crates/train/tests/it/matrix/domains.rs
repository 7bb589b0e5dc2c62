//! Adapters that do something else in every domain.

use super::{STEPS, cases, model};
use hydralora_kernels::DType;
use hydralora_kernels::ops::dropout::mix;
use hydralora_peft::TrainingPlan;

/// In a batch of several domains every text gets what it gets where its domain is chosen for all.
#[test]
fn a_domain_has_its_own_update() {
    let model = model(DType::F64);
    let (_, offsets, _, domains) = model.packed();
    let names = &model.dataset.domains;
    for case in
        cases().into_iter().filter(|case| ["mtl-lora", "domain-heads"].contains(&case.method))
    {
        let mut tuned = model.build(case.options().as_ref());
        for (index, trainable) in tuned.trainables_mut().into_iter().enumerate() {
            let value = trainable.parameter.value_mut().data_mut::<f64>();
            for (at, value) in value.iter_mut().enumerate() {
                *value += (mix((index * 7919 + at) as u64) >> 40) as f64 / 1e8 - 0.08;
            }
        }
        tuned.begin(&TrainingPlan { total_steps: STEPS, domains: names }).unwrap();
        let together = model.logits(tuned.as_adapter());
        let width = together.len() / offsets[offsets.len() - 1];
        let mut alone = Vec::new();
        for name in names {
            tuned.as_domain_aware_mut().unwrap().choose_domain(name).unwrap();
            alone.push(model.logits(tuned.as_adapter()));
        }
        for (span, &domain) in offsets.windows(2).zip(&domains) {
            for at in span[0] * width..span[1] * width {
                let [own, other] = [0, 1].map(|i| alone[(domain as usize + i) % 2][at]);
                assert!((together[at] - own).abs() < 1e-9, "{}", case.name());
                assert!(at % width > 0 || (own - other).abs() > 1e-9, "{}", case.name());
            }
        }
        let error =
            tuned.as_domain_aware_mut().unwrap().choose_domain("law").unwrap_err().to_string();
        assert!(error.contains("`law`") && error.contains("facts"), "{error}");
        let mut tuned = model.build(case.options().as_ref());
        let other = ["facts".to_owned(), "law".to_owned()];
        let error = tuned.begin(&TrainingPlan { total_steps: 1, domains: &other }).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("domain `law` too") && error.contains("`stories` is no"), "{error}");
    }
}
