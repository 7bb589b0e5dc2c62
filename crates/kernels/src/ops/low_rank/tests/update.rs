//! The update on its own, in `f64`.

use crate::check;
use crate::element::DType;
use crate::graph::Var;
use crate::ops::dropout::Dropout;
use crate::ops::linear::linear;
use crate::ops::low_rank::{
    Gate, LowRank, Mask, gated_low_rank, gates_of, router_gates, router_scores,
};
use crate::tensor::Tensor;

const TOKENS: usize = 5;
const INPUTS: usize = 7;
const OUTPUTS: usize = 6;
const RANK: usize = 2;

/// Shapes: x, y0, A, B, router weight, router bias.
fn run(experts: usize, own_a: bool, masks: &[Mask], kind: &str) {
    let a_rows = if own_a { experts * RANK } else { RANK };
    for &mask in masks {
        let z_cols = if own_a || (experts > 1 && matches!(mask, Mask::PerExpert(_))) {
            experts * RANK
        } else {
            RANK
        };
        let router = match kind {
            "low-rank" => [experts, z_cols],
            "given" => [TOKENS, experts],
            _ => [experts, INPUTS],
        };
        let shapes: [&[usize]; 6] = [
            &[TOKENS, INPUTS],
            &[TOKENS, OUTPUTS],
            &[a_rows, INPUTS],
            &[OUTPUTS, experts * RANK],
            &router,
            &[experts],
        ];
        check::gradients(&shapes, |v| {
            let gate = match kind {
                "one" => Gate::One,
                "uniform" => Gate::Uniform,
                "input" => Gate::Input { weight: &v[4], bias: None },
                "input+bias" => Gate::Input { weight: &v[4], bias: Some(&v[5]) },
                "low-rank" => Gate::LowRank { weight: &v[4], bias: Some(&v[5]) },
                "given" => Gate::Given(&v[4]),
                _ => unreachable!(),
            };
            let p = LowRank { a: &v[2], b: &v[3], num_experts: experts, gate, scale: 1.7, mask };
            gated_low_rank(&v[0], v[1].clone(), &p).y
        });
    }
}

fn masks() -> [Mask; 3] {
    let dropout = Dropout { probability: 0.3, seed: 11 };
    [Mask::None, Mask::Shared(dropout), Mask::PerExpert(dropout)]
}

#[test]
fn gradients_match_finite_differences_for_every_gate_and_mask() {
    for kind in ["one", "uniform", "input", "input+bias", "low-rank", "given"] {
        for (experts, own_a) in [(1, false), (3, false), (3, true)] {
            run(experts, own_a, &masks(), kind);
        }
    }
}

#[test]
fn router_gates_match_finite_differences_and_sum_to_one() {
    check::gradients(&[&[4, 5], &[3, 5], &[3]], |v| router_gates(&v[0], &v[1], Some(&v[2])));
    check::gradients(&[&[4, 5], &[3, 5]], |v| router_gates(&v[0], &v[1], None));
    let v = check::inputs(&[&[4, 5], &[3, 5]]);
    for row in router_gates(&v[0], &v[1], None).value().to_f64().chunks(3) {
        assert!((row.iter().sum::<f64>() - 1.0).abs() < 1e-12);
    }
}

#[test]
fn gates_of_scores_are_the_routers() {
    check::gradients(&[&[4, 3]], |v| gates_of(&v[0]));
    let v = check::inputs(&[&[4, 5], &[3, 5], &[3]]);
    let scores = linear(&v[0], &v[1], Some(&v[2]));
    let (one, other) = (gates_of(&scores), router_gates(&v[0], &v[1], Some(&v[2])));
    for (one, other) in one.value().to_f64().iter().zip(other.value().to_f64()) {
        assert!((one - other).abs() < 1e-12);
    }
}

/// Without a graph a row's gates and scores are the same to the last bit whatever rows are beside it.
#[test]
fn rows_of_a_router_stand_alone() {
    let (rows, inputs) = (37, 45);
    let v = check::inputs(&[&[rows, inputs], &[5, inputs], &[5]]);
    let [x, weight, bias] = [0, 1, 2].map(|at| v[at].value().to_dtype(DType::F32));
    let part = |from: usize, to: usize| {
        let numbers = x.data::<f32>()[from * inputs..to * inputs].to_vec();
        Var::constant(Tensor::new(numbers, [to - from, inputs]))
    };
    let [weight, bias] = [weight, bias].map(Var::constant);
    let of = |x: &Var| {
        let found = [router_gates(x, &weight, Some(&bias)), router_scores(x, &weight, Some(&bias))];
        found.map(|found| found.value().data::<f32>().to_vec())
    };
    let [gates, scores] = of(&part(0, rows));
    for (from, to) in [(0, 1), (1, 3), (3, 20), (20, 37)] {
        let [some_gates, some_scores] = of(&part(from, to));
        assert_eq!(some_gates, gates[from * 5..to * 5]);
        assert_eq!(some_scores, scores[from * 5..to * 5]);
    }
    // As a graph computes them.
    let leaf = Var::leaf(weight.value().clone());
    let graph = router_scores(&part(0, rows), &leaf, Some(&bias));
    for (one, other) in graph.value().data::<f32>().iter().zip(&scores) {
        assert!((one - other).abs() < 1e-5);
    }
    assert_eq!(router_scores(&part(0, 0), &weight, Some(&bias)).value().shape(), [0, 5]);
}

/// The definition, token by token and head by head.
#[test]
fn forward_matches_the_loop_over_heads() {
    let shapes: [&[usize]; 5] = [
        &[TOKENS, INPUTS],
        &[TOKENS, OUTPUTS],
        &[RANK, INPUTS],
        &[OUTPUTS, 3 * RANK],
        &[3, INPUTS],
    ];
    let v = check::inputs(&shapes);
    let p = LowRank {
        a: &v[2],
        b: &v[3],
        num_experts: 3,
        gate: Gate::Input { weight: &v[4], bias: None },
        scale: 2.0,
        mask: Mask::None,
    };
    let out = gated_low_rank(&v[0], v[1].clone(), &p);
    let [x, y0, a, b, g] = [0, 1, 2, 3, 4].map(|i: usize| v[i].value().to_f64());
    let got = out.y.value().to_f64();
    for t in 0..TOKENS {
        let x = &x[t * INPUTS..(t + 1) * INPUTS];
        let dot = |row: &[f64]| row.iter().zip(x).map(|(a, b)| a * b).sum::<f64>();
        let scores: Vec<f64> = g.chunks(INPUTS).map(|row| dot(row).exp()).collect();
        let total: f64 = scores.iter().sum();
        let z: Vec<f64> = a.chunks(INPUTS).map(dot).collect();
        for o in 0..OUTPUTS {
            let mut y = y0[t * OUTPUTS + o];
            for e in 0..3 {
                for i in 0..RANK {
                    y += 2.0 * scores[e] / total * b[o * 3 * RANK + e * RANK + i] * z[i];
                }
            }
            assert!((y - got[t * OUTPUTS + o]).abs() < 1e-12);
        }
    }
}

#[test]
fn no_tokens_give_no_rows_and_zero_gradients() {
    let shapes: [&[usize]; 5] = [&[0, 4], &[0, 3], &[2, 4], &[3, 4], &[2, 4]];
    let v = check::leaves(&shapes);
    let p = LowRank {
        a: &v[2],
        b: &v[3],
        num_experts: 2,
        gate: Gate::Input { weight: &v[4], bias: None },
        scale: 1.0,
        mask: Mask::None,
    };
    let y = gated_low_rank(&v[0], v[1].clone(), &p).y;
    assert_eq!(y.value().shape(), [0, 3]);
}
