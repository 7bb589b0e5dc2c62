//! The optimizers against those of PyTorch, transformers and lion-pytorch: `fixtures/optimizers`, with the
//! script that wrote them.

use hydralora_kernels::{DType, Tensor};
use hydralora_peft::Role;
use hydralora_train::{Chosen, OPTIMIZERS, Step, Trained};
use serde_json::{Map, Value};
use std::collections::BTreeSet;

const STEPS: usize = 12;

/// Name, role and shape of the parameters, as the script has them.
const PARAMETERS: [(&str, Role, &[usize]); 4] = [
    ("wide.lora_A", Role::A, &[3, 8]),
    ("tall.lora_B", Role::B, &[7, 3]),
    ("square.lora_B", Role::B, &[4, 4]),
    ("magnitude", Role::Scale, &[5]),
];

fn start(index: usize, count: usize) -> Vec<f64> {
    (0..count).map(|at| 0.3 * (1.3 * at as f64 + index as f64).sin()).collect()
}

fn gradient(index: usize, step: usize, count: usize) -> Vec<f64> {
    let size = match (index, step) {
        (0, 1) => 0.0,
        _ => 10_f64.powi(-((step % 3) as i32)),
    };
    let (index, step) = (index as f64, step as f64);
    let value = |at: f64| 0.7 * at + 1.9 * step + 0.4 * index + 0.05 * at * step;
    (0..count).map(|at| size * value(at as f64).sin()).collect()
}

/// What a recipe's options make of the parameters, after every step.
fn follow(options: &Map<String, Value>, rate: f64, dtype: DType) -> Vec<Vec<Vec<f64>>> {
    let chosen = Chosen::take(&mut options.clone()).unwrap();
    let mut after = vec![Vec::new(); STEPS];
    for (index, (name, role, shape)) in PARAMETERS.into_iter().enumerate() {
        let of = Trained { name, role, shape };
        let count = shape.iter().product();
        let mut value = Tensor::from_f64(dtype, &start(index, count), shape);
        let state = chosen.rule().state(of).into_iter();
        let mut state: Vec<Tensor> = state.map(|state| Tensor::zeros(dtype, state.shape)).collect();
        for step in 1..=STEPS {
            let gradient = Tensor::from_f64(dtype, &gradient(index, step, count), shape);
            let step = Step { number: step as u64, learning_rate: rate, decayed: true };
            chosen.rule().update(step, of, &mut value, &gradient, &mut state);
            after[step.number as usize - 1].push(value.to_f64());
        }
    }
    after
}

fn expected() -> Map<String, Value> {
    let text = include_str!("../fixtures/optimizers/expected.json");
    serde_json::from_str(text).unwrap()
}

/// The largest distance of a case's parameters from what the others make of them, in parts of the
/// largest.
fn off(case: &Value, dtype: DType) -> f64 {
    let options = case["options"].as_object().unwrap();
    let found = follow(options, case["learning_rate"].as_f64().unwrap(), dtype);
    let mut worst = 0.0_f64;
    for (step, wanted) in case["after"].as_object().unwrap() {
        let found = &found[step.parse::<usize>().unwrap() - 1];
        for ((name, ..), found) in PARAMETERS.iter().zip(found) {
            let wanted: Vec<f64> = serde_json::from_value(wanted[*name].clone()).unwrap();
            assert_eq!(wanted.len(), found.len());
            let size = wanted.iter().fold(0.0_f64, |size, value| size.max(value.abs()));
            for (found, wanted) in found.iter().zip(&wanted) {
                let off = (found - wanted).abs() / size;
                worst = if off.is_finite() { worst.max(off) } else { f64::INFINITY };
            }
        }
    }
    worst
}

#[test]
fn every_optimizer_does_what_the_others_do() {
    let mut seen = BTreeSet::new();
    for (name, case) in &expected() {
        for (dtype, bound) in [(DType::F64, 1e-9), (DType::F32, 3e-5)] {
            let off = off(case, dtype);
            assert!(off < bound, "{name}, {dtype}: off by {off:.1e}");
        }
        seen.insert(case["options"]["optimizer"].as_str().unwrap().to_owned());
    }
    let all: BTreeSet<String> = OPTIMIZERS.iter().map(|kind| kind.name().to_owned()).collect();
    assert_eq!(seen, all, "every optimizer has a case");
}

/// A case that asked for other constants than it says would be off by far more than rounding.
#[test]
fn a_changed_constant_shows() {
    let cases = expected();
    for (case, option, value) in [
        ("torch AdamW", "beta2", 0.998),
        ("lion-pytorch, other constants", "weight_decay", 0.31),
        ("torch Adafactor", "decay_rate", 0.79),
        ("transformers Adafactor, other constants", "beta1", 0.89),
        ("torch Muon", "momentum", 0.94),
    ] {
        let mut case = cases[case].clone();
        case["options"][option] = value.into();
        let off = off(&case, DType::F64);
        assert!(off > 1e-6, "{option}: off by {off:.1e} alone");
    }
}
