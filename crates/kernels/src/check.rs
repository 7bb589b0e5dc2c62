//! Finite differences: the test every differentiable operation has to pass.

use crate::element::DType;
use crate::graph::Var;
use crate::ops::dropout::mix;
use crate::tensor::Tensor;

/// A reproducible value in `(-1, 1)`, different for every `(seed, index)`.
fn value(seed: u64, index: usize) -> f64 {
    (mix(seed ^ mix(index as u64)) >> 11) as f64 / (1u64 << 52) as f64 - 1.0
}

/// Reproducible constants in `(-1, 1)`, `f64`.
pub fn inputs(shapes: &[&[usize]]) -> Vec<Var> {
    tensors(shapes).into_iter().map(Var::constant).collect()
}

/// The same as trainable leaves.
pub fn leaves(shapes: &[&[usize]]) -> Vec<Var> {
    tensors(shapes).into_iter().map(Var::leaf).collect()
}

fn tensors(shapes: &[&[usize]]) -> Vec<Tensor> {
    let fill = |(seed, shape): (usize, &&[usize])| {
        let values: Vec<f64> =
            (0..shape.iter().product()).map(|i| value(seed as u64 + 1, i)).collect();
        Tensor::from_f64(DType::F64, &values, shape)
    };
    shapes.iter().enumerate().map(fill).collect()
}

/// `Σ c_i y_i` with reproducible `c`, so that every output element matters.
fn probe(y: &Tensor) -> f64 {
    y.to_f64().iter().enumerate().map(|(i, y)| y * value(99, i)).sum()
}

/// Compares the gradient of `Σ c_i f(x)_i` with central differences in `f64`, for every element of
/// every input. Inputs that `f` does not read must get no gradient.
///
/// # Panics
/// Naming the input and element whose gradient is off by more than `1e-6` relative.
pub fn gradients(shapes: &[&[usize]], f: impl Fn(&[Var]) -> Var) {
    let step = 1e-5;
    let leaves = leaves(shapes);
    let y = f(&leaves);
    let seed: Vec<f64> = (0..y.value().len()).map(|i| value(99, i)).collect();
    let found = y.backward_from(Tensor::from_f64(DType::F64, &seed, y.value().shape()));
    let values: Vec<Tensor> = leaves.iter().map(|leaf| leaf.value().clone()).collect();
    drop((y, leaves.clone()));
    let at = |values: &[Tensor]| {
        let vars: Vec<Var> = values.iter().cloned().map(Var::constant).collect();
        probe(f(&vars).value())
    };
    for (input, leaf) in leaves.iter().enumerate() {
        let gradient = found.get(leaf).map(Tensor::to_f64);
        for element in 0..leaf.value().len() {
            let mut moved = values.clone();
            moved[input].data_mut::<f64>()[element] += step;
            let up = at(&moved);
            moved[input].data_mut::<f64>()[element] -= 2.0 * step;
            let down = at(&moved);
            let expected = (up - down) / (2.0 * step);
            let got = gradient.as_ref().map_or(0.0, |gradient| gradient[element]);
            assert!(
                (got - expected).abs() <= 1e-6 * (1.0 + expected.abs()),
                "input {input} element {element}: backward gives {got}, differences {expected}"
            );
        }
    }
}

/// The device that tests run on, opened once: the best one, or what `HYDRALORA_GPU` names (`vulkan`,
/// `gl`, …). Where there is none, says that the test is skipped.
///
/// # Panics
/// If there is none although `HYDRALORA_REQUIRE` lists `gpu` or `all`.
#[cfg(feature = "gpu")]
#[allow(clippy::print_stderr, reason = "tests tell people")]
pub fn device() -> Option<crate::gpu::Device> {
    use crate::gpu::{Backend, Device};
    static DEVICE: std::sync::OnceLock<Option<Device>> = std::sync::OnceLock::new();
    let open = || {
        let wanted = std::env::var("HYDRALORA_GPU").unwrap_or_else(|_| Backend::Any.to_string());
        let backend: Backend = wanted.parse().expect("HYDRALORA_GPU names a backend");
        let opened = Device::open(backend);
        let required = std::env::var("HYDRALORA_REQUIRE").unwrap_or_default();
        let required = required.split(',').any(|entry| matches!(entry, "all" | "gpu"));
        match &opened {
            Ok(device) => eprintln!("on {device}"),
            Err(error) => assert!(!required, "{error}"),
        }
        opened.ok()
    };
    let device = DEVICE.get_or_init(open).clone();
    if device.is_none() {
        eprintln!("skipped: no GPU adapter");
    }
    device
}

/// Runs `f` forward and backward in `f32` and in `f64` on the same numbers and compares the results
/// and all gradients in norm.
///
/// # Panics
/// If one differs by more than `tolerance` relative.
pub fn f32_agrees(shapes: &[&[usize]], tolerance: f64, f: impl Fn(&[Var]) -> Var) {
    let run = |dtype: DType| {
        let leaves: Vec<Var> = tensors(shapes)
            .iter()
            .map(|t| Var::leaf(t.to_dtype(DType::F32).to_dtype(dtype)))
            .collect();
        let y = f(&leaves);
        let seed: Vec<f64> = (0..y.value().len()).map(|i| value(99, i) as f32 as f64).collect();
        let gradients = y.backward_from(Tensor::from_f64(dtype, &seed, y.value().shape()));
        let mut all = vec![y.value().to_f64()];
        all.extend(leaves.iter().map(|leaf| gradients.get(leaf).map_or(vec![], Tensor::to_f64)));
        all
    };
    for (index, (a, b)) in run(DType::F32).iter().zip(run(DType::F64)).enumerate() {
        let norm = b.iter().map(|x| x * x).sum::<f64>().sqrt();
        let error = a.iter().zip(&b).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
        assert!(error <= tolerance * norm, "result {index}: f32 is off by {}", error / norm);
    }
}
