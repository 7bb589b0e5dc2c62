//! Layers with one update of all rows, in `f32`.

use super::{INPUTS, OUTPUTS, frozen};
use crate::check;
use crate::dense;
use crate::element::DType;
use crate::graph::Var;
use crate::ops::dropout::Dropout;
use crate::ops::low_rank::{
    AdaptedLayer, Gate, LowRank, Mask, adapted_linear, adapted_linears, gated_low_rank,
};
use crate::tensor::Tensor;

const RANK: usize = 3;
const TOKENS: usize = 250;

fn gate<'a>(kind: &str, v: &'a [Var]) -> Gate<'a> {
    match kind {
        "one" => Gate::One,
        "uniform" => Gate::Uniform,
        "input" => Gate::Input { weight: &v[3], bias: None },
        "input+bias" => Gate::Input { weight: &v[3], bias: Some(&v[4]) },
        "low-rank" => Gate::LowRank { weight: &v[3], bias: Some(&v[4]) },
        "given" => Gate::Given(&v[3]),
        other => panic!("{other}"),
    }
}

fn leaves(kind: &str, experts: usize, own_a: bool) -> Vec<Var> {
    let z_cols = if own_a { experts * RANK } else { RANK };
    let router = match kind {
        "low-rank" => [experts, z_cols],
        "given" => [TOKENS, experts],
        _ => [experts, INPUTS],
    };
    let shapes: [&[usize]; 5] =
        [&[TOKENS, INPUTS], &[z_cols, INPUTS], &[OUTPUTS, experts * RANK], &router, &[experts]];
    check::inputs(&shapes).iter().map(|v| Var::leaf(v.value().to_dtype(DType::F32))).collect()
}

fn close(what: &str, got: &Tensor, expected: &Tensor) {
    let (got, expected) = (got.to_f64(), expected.to_f64());
    let off: f64 = got.iter().zip(&expected).map(|(a, b)| (a - b).powi(2)).sum();
    let norm: f64 = expected.iter().map(|b| b * b).sum();
    assert!(off.sqrt() <= 1e-5 * norm.sqrt(), "{what}: {off} of {norm}");
}

#[test]
fn one_pass_agrees_with_the_two_operations() {
    let dropout = Dropout { probability: 0.3, seed: 11 };
    for kind in ["one", "uniform", "input", "input+bias", "low-rank", "given"] {
        for (experts, own_a) in [(1, false), (3, false), (3, true)] {
            for mask in [Mask::None, Mask::Shared(dropout)] {
                let what = format!("{kind} {experts} {own_a} {mask:?}");
                let v = leaves(kind, experts, own_a);
                let p = LowRank {
                    a: &v[1],
                    b: &v[2],
                    num_experts: experts,
                    gate: gate(kind, &v),
                    scale: 1.7,
                    mask,
                };
                let layer = frozen(kind == "given");
                let one = adapted_linear(&v[0], &layer, &p);
                let two = gated_low_rank(&v[0], layer.forward(&v[0]), &p);
                close(&what, one.y.value(), two.y.value());
                if let (Some(one), Some(two)) = (&one.gates, &two.gates) {
                    close(&what, one, two);
                }
                let seed = two.y.value().clone();
                let one = one.y.backward_from(seed.clone());
                let two = two.y.backward_from(seed);
                for (index, leaf) in v.iter().enumerate() {
                    match (one.get(leaf), two.get(leaf)) {
                        (Some(one), Some(two)) => close(&format!("{what}: {index}"), one, two),
                        (one, two) => {
                            assert_eq!(one.is_some(), two.is_some(), "{what}: {index}")
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_few_rows_agree_with_many() {
    for kind in ["one", "input+bias", "low-rank"] {
        let v = leaves(kind, 3, false);
        let v: Vec<Var> = v.iter().map(Var::detach).collect();
        let p = LowRank {
            a: &v[1],
            b: &v[2],
            num_experts: 3,
            gate: gate(kind, &v),
            scale: 1.7,
            mask: Mask::None,
        };
        let layer = frozen(true);
        let many = adapted_linear(&v[0], &layer, &p).y.value().to_f64();
        for rows in [1, 5] {
            let x = v[0].value().data::<f32>()[..rows * INPUTS].to_vec();
            let x = Var::constant(Tensor::new(x, [rows, INPUTS]));
            let few = adapted_linear(&x, &layer, &p).y.value().to_f64();
            for (few, many) in few.iter().zip(&many) {
                assert!((few - many).abs() < 1e-4, "{kind}: {few} {many}");
            }
        }
    }
}

#[test]
fn several_layers_at_once_agree_with_each_by_itself() {
    use crate::block::{BlockFormat, quantize};
    use crate::ops::frozen_linear::{FrozenLinear, FrozenWeight};
    let v: Vec<Var> = leaves("input+bias", 3, false).iter().map(Var::detach).collect();
    let update = |scale: f64| LowRank {
        a: &v[1],
        b: &v[2],
        num_experts: 3,
        gate: gate("input+bias", &v),
        scale,
        mask: Mask::None,
    };
    let mut bytes = Vec::new();
    let numbers: Vec<f32> = (0..OUTPUTS * INPUTS).map(|i| (i % 13) as f32 - 6.0).collect();
    quantize(BlockFormat::F32, &numbers, &mut bytes);
    let packed = FrozenWeight::Blocks {
        format: BlockFormat::F32,
        bytes: bytes.into(),
        shape: [OUTPUTS, INPUTS],
        dtype: DType::F32,
    };
    let frozen = [frozen(true), frozen(false), FrozenLinear::new(packed, None)];
    let updates = [Some(update(1.7)), None, Some(update(-0.3))];
    for rows in [0, 1, 5, dense::FEWEST_ROWS] {
        let x = v[0].value().data::<f32>()[..rows * INPUTS].to_vec();
        let x = Var::constant(Tensor::new(x, [rows, INPUTS]));
        let layers = [0, 1, 2].map(|at: usize| AdaptedLayer::new(&frozen[at], rows, updates[at]));
        for threads in [1, 3] {
            let pool = hydralora_runtime::Pool::new(threads);
            let together = || adapted_linears(&x, &layers);
            for (at, at_once) in pool.enter(together).into_iter().enumerate() {
                let (y, gates) = match &updates[at] {
                    Some(update) => {
                        let one = adapted_linear(&x, &frozen[at], update);
                        (one.y, vec![one.gates.map(|gates| gates.to_f32())])
                    }
                    None => (frozen[at].forward(&x), Vec::new()),
                };
                assert_eq!(at_once.y.value().to_f32(), y.value().to_f32());
                let at_once = at_once.gates.iter().map(|gates| gates.as_ref().map(Tensor::to_f32));
                assert_eq!(at_once.collect::<Vec<_>>(), gates);
            }
        }
    }
}

#[test]
fn gradients_join_what_the_input_has_already() {
    let v = leaves("input", 3, false);
    let p = LowRank {
        a: &v[1],
        b: &v[2],
        num_experts: 3,
        gate: gate("input", &v),
        scale: 1.0,
        mask: Mask::None,
    };
    let layer = frozen(false);
    let twice = |one: bool| {
        let run = || match one {
            true => adapted_linear(&v[0], &layer, &p).y,
            false => gated_low_rank(&v[0], layer.forward(&v[0]), &p).y,
        };
        let sum = crate::ops::elementwise::add(&run(), run());
        sum.backward_from(sum.value().clone())
    };
    let (one, two) = (twice(true), twice(false));
    for leaf in &v[..4] {
        close("twice", one.get(leaf).unwrap(), two.get(leaf).unwrap());
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let run = |threads: usize| {
        let pool = hydralora_runtime::Pool::new(threads);
        pool.enter(|| {
            let v = leaves("input+bias", 3, false);
            let p = LowRank {
                a: &v[1],
                b: &v[2],
                num_experts: 3,
                gate: gate("input+bias", &v),
                scale: 1.0,
                mask: Mask::Shared(Dropout { probability: 0.2, seed: 3 }),
            };
            let y = adapted_linear(&v[0], &frozen(false), &p).y;
            let gradients = y.backward_from(y.value().clone());
            let all: Vec<Vec<f32>> =
                v.iter().map(|leaf| gradients.get(leaf).unwrap().to_f32()).collect();
            (y.value().to_f32(), all)
        })
    };
    assert_eq!(run(1), run(3));
}
