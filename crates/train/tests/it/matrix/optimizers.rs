//! Every optimizer with adapters of several kinds: it lowers the loss, goes on bit for bit, keeps to the
//! rules for rates and decay, and its state is told from another one's.

use super::{Model, STEPS, model, train_with};
use hydralora_kernels::{DType, Tensor};
use hydralora_peft::{Role, Tuned, io, methods};
use hydralora_train::{Chosen, Ending, Error, OPTIMIZERS, Rates, Result, Stepper, TrainConfig};
use serde_json::{Value, json};
use std::path::Path;

fn chosen(section: Value) -> Chosen {
    Chosen::take(&mut section.as_object().unwrap().clone()).unwrap()
}

fn build(model: &Model, method: &str, options: &Value) -> Box<dyn Tuned> {
    let section = options.as_object().unwrap();
    let options = methods::find(method).unwrap().read_recipe(section).unwrap();
    model.build(options.as_ref())
}

fn train(
    model: &Model,
    optimizer: &Chosen,
    tuned: &mut dyn Tuned,
    folder: &Path,
    resume: bool,
    stop_after: usize,
) -> Result<(Ending, Vec<f64>)> {
    let config = TrainConfig {
        epochs: STEPS as f64,
        batch_size: 2,
        grad_accumulation: 2,
        learning_rate: if optimizer.name() == "lion" { 5e-4 } else { 5e-3 },
        warmup_ratio: 0.0,
        eval_every: 0,
        save_every: 0,
        optimizer: optimizer.clone(),
        router_learning_rate_ratio: 2.0,
        ..TrainConfig::default()
    };
    train_with(model, &config, tuned, folder, resume, stop_after)
}

#[test]
fn every_optimizer_lowers_the_loss_and_goes_on_bit_for_bit() {
    let model = model(DType::F32);
    let hydralora = json!({"rank": 2, "num_experts": 3, "router_bias": true});
    let dora = json!({"use_dora": true, "rank": 4});
    for kind in OPTIMIZERS {
        let optimizer = chosen(json!({"optimizer": kind.name(), "weight_decay": 0.01}));
        for (method, options) in [("hydralora", &hydralora), ("lora", &dora), ("full", &json!({}))]
        {
            let what = format!("{} of {method}", kind.name());
            let root = tempfile::tempdir().unwrap();
            let (straight, parts) = (root.path().join("straight"), root.path().join("parts"));
            let mut whole = build(&model, method, options);
            let (ending, losses) =
                train(&model, &optimizer, whole.as_mut(), &straight, false, usize::MAX).unwrap();
            assert_eq!(ending, Ending::Finished);
            let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
            assert!(mean(&losses[STEPS - 3..]) < mean(&losses[..3]), "{what}: {losses:?}");
            let mut first = build(&model, method, options);
            let (ending, mut rest) =
                train(&model, &optimizer, first.as_mut(), &parts, false, 7).unwrap();
            assert_eq!((ending, rest.len()), (Ending::Interrupted, 7));
            let mut second = build(&model, method, options);
            rest.extend(
                train(&model, &optimizer, second.as_mut(), &parts, true, usize::MAX).unwrap().1,
            );
            assert_eq!(rest, losses, "{what}");
            for (name, tensor) in whole.tensors() {
                assert_eq!(tensor.to_f64(), second.tensors()[&name].to_f64(), "{what}: {name}");
            }
        }
    }
}

#[test]
fn another_optimizers_state_is_refused() {
    let model = model(DType::F32);
    let root = tempfile::tempdir().unwrap();
    let lora = json!({"rank": 2});
    let mut tuned = build(&model, "lora", &lora);
    let lion = chosen(json!({"optimizer": "lion"}));
    train(&model, &lion, tuned.as_mut(), root.path(), false, 3).unwrap();
    let checkpoint = root.path().join("checkpoints/step-000003/optimizer.safetensors");
    let names = io::decode(&checkpoint, DType::F32).unwrap();
    assert!(names.keys().all(|name| name.ends_with(".weight/exp_avg")), "{names:?}");
    let mut again = build(&model, "lora", &lora);
    let refused = train(&model, &Chosen::default(), again.as_mut(), root.path(), true, usize::MAX);
    let error = refused.unwrap_err();
    assert!(matches!(error, Error::Checkpoint { .. }));
    let said = error.to_string();
    assert!(said.contains("the optimizer `lion`, and the run has `adamw`"), "{said}");
    // A state with a tensor of another name, and one without a tensor.
    let mut state = names.clone();
    let (name, tensor) = state.pop_first().unwrap();
    state.insert(name.replace("exp_avg", "exp_avg_sq"), tensor);
    io::write_tensors(&checkpoint, &state).unwrap();
    let refused = train(&model, &lion, again.as_mut(), root.path(), true, usize::MAX);
    let said = refused.unwrap_err().to_string();
    assert!(said.contains(&format!("`{name}` [")) && said.contains("is missing"), "{said}");
    assert!(said.contains("exp_avg_sq` is left over"), "{said}");
}

/// What a step moves each role by, with and without a rule that is for the role alone.
#[test]
fn rates_and_decay_keep_to_their_roles() {
    let model = model(DType::F64);
    let moved = |optimizer: &Chosen, rates: Rates, method: &str, options: &Value| {
        let mut tuned = build(&model, method, options);
        let values = |tuned: &dyn Tuned| -> Vec<(Role, Tensor)> {
            let all = tuned.trainables().into_iter();
            all.map(|of| (of.role, of.parameter.value().clone())).collect()
        };
        let before = values(tuned.as_ref());
        let found = model.trained(tuned.as_ref(), false);
        let mut stepper = Stepper::new(optimizer, rates, tuned.as_ref());
        stepper.step(tuned.as_mut(), &found.gradients, 1e-3);
        let after = values(tuned.as_ref());
        let change = |((role, before), (_, after)): (&(Role, Tensor), &(Role, Tensor))| {
            let pairs = before.to_f64().into_iter().zip(after.to_f64());
            (*role, pairs.map(|(before, after)| after - before).collect::<Vec<f64>>())
        };
        before.iter().zip(&after).map(change).collect::<Vec<_>>()
    };
    for kind in OPTIMIZERS {
        let plain = chosen(json!({"optimizer": kind.name()}));
        let hydralora = json!({"rank": 2, "num_experts": 2, "init_lora_weights": "rlora"});
        let once = moved(&plain, Rates::default(), "hydralora", &hydralora);
        let faster = moved(&plain, Rates { b: 4.0, router: 3.0 }, "hydralora", &hydralora);
        for ((role, once), (_, faster)) in once.iter().zip(&faster) {
            let ratio = match role {
                Role::B => 4.0,
                Role::Router => 3.0,
                _ => 1.0,
            };
            for (once, faster) in once.iter().zip(faster) {
                assert!((once * ratio - faster).abs() < 1e-12, "{} {role:?}", kind.name());
            }
        }
        assert!(once.iter().any(|(role, _)| *role == Role::Router));
        let decaying = chosen(json!({"optimizer": kind.name(), "weight_decay": 0.5}));
        let [plain, decayed] = [&plain, &decaying]
            .map(|optimizer| moved(optimizer, Rates::default(), "full", &json!({})));
        for ((role, plain), (_, decayed)) in plain.iter().zip(&decayed) {
            assert_eq!(plain == decayed, *role == Role::Norm, "{} {role:?}", kind.name());
        }
    }
}
