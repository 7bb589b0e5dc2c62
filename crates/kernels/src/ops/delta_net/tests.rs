//! The operations against the definitions, written out token by token.

use super::*;
use crate::check;
use crate::graph::Var;
use crate::ops::rows::{columns, join_columns};

const GROUPED: DeltaConfig =
    DeltaConfig { num_key_heads: 2, num_value_heads: 4, key_head_dim: 3, value_head_dim: 2 };
const SINGLE: DeltaConfig =
    DeltaConfig { num_key_heads: 1, num_value_heads: 1, key_head_dim: 2, value_head_dim: 3 };

fn shapes(config: DeltaConfig, rows: usize) -> [[usize; 2]; 5] {
    let widths = [config.key_width(), config.key_width(), config.value_width()];
    let heads = config.num_value_heads;
    [[rows, widths[0]], [rows, widths[1]], [rows, widths[2]], [rows, heads], [rows, heads]]
}

fn refs(shapes: &[[usize; 2]]) -> Vec<&[usize]> {
    shapes.iter().map(|shape| &shape[..]).collect()
}

/// Decays and rates such as models have, from any numbers.
fn gates(x: &[Var], rate: f64) -> (Var, Var) {
    let heads = x[3].value().cols();
    let dtype = x[3].value().dtype();
    let constant =
        |value: f64| Var::constant(Tensor::from_f64(dtype, &vec![value; heads], [heads]));
    decay_and_beta(&x[3], &x[4], &constant(rate), &constant(-1.0))
}

/// States before the first row: none, or some numbers.
fn some_states(config: DeltaConfig, begun: &[bool]) -> Vec<Option<Tensor>> {
    let values = check::inputs(&[&[begun.len()], &config.state_shape()]);
    let states = begun.iter().enumerate().map(|(index, &begun)| {
        begun.then(|| {
            let mut state = values[1].value().clone();
            state.scale(0.5 + index as f64);
            state
        })
    });
    states.collect()
}

fn in_dtype(states: &[Option<Tensor>], dtype: DType) -> Vec<Option<Tensor>> {
    states.iter().map(|state| state.as_ref().map(|state| state.to_dtype(dtype))).collect()
}

/// The rule as it is defined; leaves the states after the last rows in `states`.
fn by_definition(
    x: &[Vec<f64>],
    config: DeltaConfig,
    offsets: &[usize],
    states: &mut [Vec<f64>],
) -> Vec<f64> {
    let DeltaConfig { num_key_heads, num_value_heads, key_head_dim: dk, value_head_dim: dv } =
        config;
    let normal = |x: &[f64]| -> Vec<f64> {
        let length = (x.iter().map(|x| x * x).sum::<f64>() + 1e-6).sqrt();
        x.iter().map(|x| x / length).collect()
    };
    let mut out = vec![0.0; x[2].len()];
    for (w, state) in offsets.windows(2).zip(states) {
        for (row, head) in (w[0]..w[1]).flat_map(|row| (0..num_value_heads).map(move |h| (row, h)))
        {
            let state = &mut state[head * dk * dv..(head + 1) * dk * dv];
            let shared = row * num_key_heads + head / (num_value_heads / num_key_heads);
            let [q, k] = [0, 1].map(|of: usize| normal(&x[of][shared * dk..][..dk]));
            let v = &x[2][(row * num_value_heads + head) * dv..][..dv];
            let [g, beta] = [3, 4].map(|of: usize| x[of][row * num_value_heads + head]);
            state.iter_mut().for_each(|s| *s *= g.exp());
            for d in 0..dv {
                let known: f64 = (0..dk).map(|i| state[i * dv + d] * k[i]).sum();
                let update = beta * (v[d] - known);
                (0..dk).for_each(|i| state[i * dv + d] += k[i] * update);
                let read: f64 = (0..dk).map(|i| state[i * dv + d] * q[i]).sum();
                out[(row * num_value_heads + head) * dv + d] = read / (dk as f64).sqrt();
            }
        }
    }
    out
}

/// Numbers for `config` over `rows` rows, gates included.
fn numbers(config: DeltaConfig, rows: usize) -> Vec<Var> {
    let mut x = check::inputs(&refs(&shapes(config, rows)));
    (x[3], x[4]) = gates(&x, 0.0);
    x
}

fn rule(x: &[Var], config: DeltaConfig, offsets: &[usize], initial: &[Option<Tensor>]) -> Var {
    gated_delta_rule(&x[0], &x[1], &x[2], &x[3], &x[4], config, offsets, initial)
}

fn assert_close(got: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len());
    for (index, (a, b)) in got.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= tolerance, "{index}: {a} instead of {b}");
    }
}

fn joined(x: &[Var]) -> Var {
    join_columns(&join_columns(&x[0], &x[1]), &x[2])
}

#[test]
fn chunks_agree_with_the_definition() {
    let wide =
        DeltaConfig { num_key_heads: 1, num_value_heads: 2, key_head_dim: 33, value_head_dim: 17 };
    for config in [SINGLE, GROUPED, wide] {
        for lengths in [&[1][..], &[63], &[64], &[65], &[200], &[5, 0, 129, 64, 1]] {
            for begun in [false, true] {
                let mut offsets = vec![0];
                lengths.iter().for_each(|len| offsets.push(offsets[offsets.len() - 1] + len));
                let begun: Vec<bool> = (0..lengths.len()).map(|i| begun && i % 2 == 0).collect();
                let initial = some_states(config, &begun);
                let x = numbers(config, offsets[lengths.len()]);
                let got = rule(&x, config, &offsets, &initial);
                let x: Vec<Vec<f64>> = x.iter().map(|x| x.value().to_f64()).collect();
                let zeros = Tensor::zeros(DType::F64, config.state_shape());
                let mut states: Vec<Vec<f64>> =
                    initial.iter().map(|state| state.as_ref().unwrap_or(&zeros).to_f64()).collect();
                let expected = by_definition(&x, config, &offsets, &mut states);
                assert_close(&got.value().to_f64(), &expected, 1e-12);
            }
        }
    }
}

#[test]
fn gradients_match_finite_differences() {
    let check = |config: DeltaConfig, offsets: &[usize], begun: &[bool]| {
        let initial = some_states(config, begun);
        let rows = offsets[offsets.len() - 1];
        check::gradients(&refs(&shapes(config, rows)), |x| {
            let (decay, beta) = gates(x, -2.0);
            gated_delta_rule(&x[0], &x[1], &x[2], &decay, &beta, config, offsets, &initial)
        });
    };
    check(SINGLE, &[0, 1], &[]);
    check(SINGLE, &[0, 7], &[true]);
    check(SINGLE, &[0, 64], &[false]);
    check(SINGLE, &[0, 65], &[]);
    check(SINGLE, &[0, 131], &[true]);
    check(GROUPED, &[0, 5, 5, 12], &[]);
    check(GROUPED, &[0, 66, 66, 70], &[false, true, true]);
    // Without the gates, so that decays and rates may have any sign.
    check::gradients(&refs(&shapes(GROUPED, 9)), |x| rule(x, GROUPED, &[0, 4, 9], &[]));
}

#[test]
fn it_is_the_same_apart_and_side_by_side() {
    let (rows, offsets) = (90, [0, 20, 90]);
    let initial = some_states(GROUPED, &[true, false]);
    let run = |side_by_side: bool| {
        let x = check::leaves(&refs(&shapes(GROUPED, rows)));
        let (decay, beta) = gates(&x, 0.0);
        let y = if side_by_side {
            gated_delta_rule_joined(&joined(&x), &decay, &beta, GROUPED, &offsets, &initial)
        } else {
            rule(
                &[x[0].clone(), x[1].clone(), x[2].clone(), decay, beta],
                GROUPED,
                &offsets,
                &initial,
            )
        };
        let gradients = y.backward_from(y.value().clone());
        let gradients: Vec<_> = x.iter().map(|x| gradients.get(x).unwrap().to_f64()).collect();
        (y.value().to_f64(), gradients)
    };
    assert_eq!(run(true), run(false));
}

#[test]
fn a_value_kept_as_a_recipe_gives_the_same_gradients() {
    let offsets = [0, 30, 70];
    check::gradients(&[&[70, SINGLE.joined_width()], &[SINGLE.joined_width(), 3]], |x| {
        let heads = Tensor::from_f64(DType::F64, &[-0.3; 70], [70, 1]);
        let gates = Var::constant(heads.clone());
        let rates = Var::constant(Tensor::from_f64(DType::F64, &[0.6; 70], [70, 1]));
        let qkv = causal_conv(&x[0], &x[1], &[], &offsets);
        gated_delta_rule_joined(&qkv, &gates, &rates, SINGLE, &offsets, &[])
    });
}

#[test]
fn f32_agrees_with_f64() {
    let config =
        DeltaConfig { num_key_heads: 2, num_value_heads: 4, key_head_dim: 32, value_head_dim: 24 };
    let offsets = [0, 70, 71, 300];
    let initial = some_states(config, &[true, false, false]);
    for rate in [-4.0, 0.0, 2.0] {
        check::f32_agrees(&refs(&shapes(config, 300)), 1e-5, |x| {
            let (decay, beta) = gates(x, rate);
            let initial = in_dtype(&initial, decay.value().dtype());
            gated_delta_rule(&x[0], &x[1], &x[2], &decay, &beta, config, &offsets, &initial)
        });
    }
}

#[test]
fn the_strongest_and_the_weakest_decay_stay_finite() {
    let rows = 200;
    // Forgetting all, nothing, and all but only once in a while.
    let decays: [fn(usize) -> f64; 3] =
        [|_| -50.0, |_| 0.0, |row| if row % 7 == 0 { -1e4 } else { -1e-3 }];
    for dtype in [DType::F32, DType::F64] {
        for decay in decays {
            let x = numbers(GROUPED, rows);
            let decay: Vec<f64> = (0..rows * 4).map(|i| decay(i / 4)).collect();
            let decay = Tensor::from_f64(DType::F64, &decay, [rows, 4]);
            let leaf = |x: &Tensor| Var::leaf(x.to_dtype(dtype));
            let mut x: Vec<Var> = x.iter().map(|x| leaf(x.value())).collect();
            x[3] = leaf(&decay);
            let y = rule(&x, GROUPED, &[0, rows], &[]);
            assert!(y.value().is_finite());
            let gradients = y.backward_from(y.value().clone());
            assert!(x.iter().all(|x| gradients.get(x).unwrap().is_finite()));
            let x: Vec<Vec<f64>> = x.iter().map(|x| x.value().to_f64()).collect();
            let mut states = [vec![0.0; 4 * GROUPED.state_len()]];
            let expected = by_definition(&x, GROUPED, &[0, rows], &mut states);
            let tolerance = if dtype == DType::F32 { 1e-5 } else { 1e-12 };
            assert_close(&y.value().to_f64(), &expected, tolerance);
        }
    }
}

#[test]
fn keys_and_queries_of_zero_stay_finite() {
    let mut x = numbers(GROUPED, 70);
    for side in &mut x[..2] {
        *side = Var::leaf(Tensor::zeros(DType::F32, side.value().shape()));
    }
    for side in &mut x[2..] {
        *side = Var::constant(side.value().to_dtype(DType::F32));
    }
    let y = rule(&x, GROUPED, &[0, 70], &[]);
    assert_eq!(y.value().norm(), 0.0);
    let seed = Tensor::from_f64(DType::F32, &vec![1.0; y.value().len()], y.value().shape());
    let gradients = y.backward_from(seed);
    assert!(x[..2].iter().all(|x| gradients.get(x).unwrap().is_finite()));
}

/// Results and gradients, in `f32`, of the sequences from `first` to `last` of a batch of several.
fn of_sequences(first: usize, last: usize) -> Vec<Vec<f64>> {
    let config =
        DeltaConfig { num_key_heads: 2, num_value_heads: 6, key_head_dim: 16, value_head_dim: 8 };
    let offsets = [0, 70, 71, 100, 300];
    let (from, to) = (offsets[first], offsets[last]);
    let initial = in_dtype(&some_states(config, &[true, false, true, false]), DType::F32);
    let x: Vec<Var> = numbers(config, 300)
        .iter()
        .map(|x| {
            let width = x.value().cols();
            let part = &x.value().to_f64()[from * width..to * width];
            Var::leaf(Tensor::from_f64(DType::F32, part, [to - from, width]))
        })
        .collect();
    let offsets: Vec<usize> = offsets[first..=last].iter().map(|at| at - from).collect();
    let y = rule(&x, config, &offsets, &initial[first..last]);
    let gradients = y.backward_from(y.value().clone());
    let gradients = x.iter().map(|x| gradients.get(x).unwrap().to_f64());
    std::iter::once(y.value().to_f64()).chain(gradients).collect()
}

#[test]
fn results_do_not_depend_on_threads_or_on_other_sequences() {
    let run = |threads: usize| hydralora_runtime::Pool::new(threads).enter(|| of_sequences(0, 4));
    let all = run(1);
    assert_eq!(all, run(3));
    let offsets = [0, 70, 71, 100, 300];
    for sequence in 0..4 {
        for (alone, all) in of_sequences(sequence, sequence + 1).iter().zip(&all) {
            let width = all.len() / 300;
            assert!(alone[..] == all[offsets[sequence] * width..offsets[sequence + 1] * width]);
        }
    }
}

/// Runs `rows` rows through convolution and rule in steps of `size` rows.
fn in_steps(x: &[Tensor; 4], size: usize, state: &mut DeltaState) -> Vec<f64> {
    let (rows, mut out) = (x[0].rows(), Vec::new());
    for first in (0..rows).step_by(size) {
        let part = first..(first + size).min(rows);
        let of = |x: &Tensor| {
            let width = x.cols();
            let part = &x.to_f64()[part.start * width..part.end * width];
            Tensor::from_f64(x.dtype(), part, [part.len() / width, width])
        };
        let offsets = [0, part.len()];
        let qkv = conv_step(&of(&x[0]), &x[1], &offsets, &mut [&mut *state]);
        let gates = [of(&x[2]), of(&x[3])];
        let states = &mut [&mut *state];
        out.extend(delta_step(&qkv, &gates[0], &gates[1], GROUPED, &offsets, states).to_f64());
    }
    out
}

fn layer(rows: usize, kernel: usize, dtype: DType) -> [Tensor; 4] {
    let width = GROUPED.joined_width();
    let x = check::inputs(&[&[rows, width], &[width, kernel]]);
    let gates = numbers(GROUPED, rows);
    [&x[0], &x[1], &gates[3], &gates[4]].map(|x| x.value().to_dtype(dtype))
}

#[test]
fn steps_of_any_size_agree_with_the_whole() {
    for (rows, kernel) in [(1, 4), (2, 4), (131, 4), (40, 2), (40, 1)] {
        for dtype in [DType::F64, DType::F32] {
            let x = layer(rows, kernel, dtype);
            let offsets = [0, rows];
            let v = x.clone().map(Var::constant);
            let qkv = causal_conv(&v[0], &v[1], &[], &offsets);
            let whole = gated_delta_rule_joined(&qkv, &v[2], &v[3], GROUPED, &offsets, &[]);
            let whole = whole.value().to_f64();
            let tolerance = if dtype == DType::F32 { 2e-6 } else { 1e-12 };
            let mut after: Option<DeltaState> = None;
            for size in [1, 3, 50, rows] {
                let mut state = DeltaState::new(dtype, GROUPED, kernel);
                assert_close(&in_steps(&x, size, &mut state), &whole, tolerance);
                if let Some(after) = &after {
                    assert_eq!(after.conv.to_f64(), state.conv.to_f64());
                    let [a, b] = [after, &state].map(|state| state.recurrent.to_f64());
                    assert_close(&a, &b, tolerance);
                }
                after = Some(state);
            }
        }
    }
}

#[test]
fn a_graph_goes_on_from_a_state() {
    let (rows, first) = (100, 37);
    let x = layer(rows, 4, DType::F64);
    let mut state = DeltaState::new(DType::F64, GROUPED, 4);
    let before = state.clone();
    let head = |x: &Tensor, range: Range<usize>| {
        let width = x.cols();
        let part = &x.to_f64()[range.start * width..range.end * width];
        Tensor::from_f64(DType::F64, part, [range.len(), width])
    };
    let whole = in_steps(&x, rows, &mut before.clone());
    let early = [head(&x[0], 0..first), x[1].clone(), head(&x[2], 0..first), head(&x[3], 0..first)];
    in_steps(&early, first, &mut state);
    // The state was copied before it was written to.
    assert_eq!(before.recurrent.norm(), 0.0);
    let rest = |x: &Tensor| Var::constant(head(x, first..rows));
    let offsets = [0, rows - first];
    let weight = Var::constant(x[1].clone());
    let qkv = causal_conv(&rest(&x[0]), &weight, &[Some(state.conv)], &offsets);
    let initial = [Some(state.recurrent)];
    let y = gated_delta_rule_joined(&qkv, &rest(&x[2]), &rest(&x[3]), GROUPED, &offsets, &initial);
    assert_close(&y.value().to_f64(), &whole[first * GROUPED.value_width()..], 1e-12);
}

#[test]
fn several_sequences_step_together() {
    let (rows, offsets) = (40, [0, 1, 31, 31, 40]);
    let x = layer(rows, 4, DType::F64);
    let mut states = [(); 4].map(|()| DeltaState::new(DType::F64, GROUPED, 4));
    let mut each: Vec<&mut DeltaState> = states.iter_mut().collect();
    let qkv = conv_step(&x[0], &x[1], &offsets, &mut each);
    let got = delta_step(&qkv, &x[2], &x[3], GROUPED, &offsets, &mut each).to_f64();
    let v = x.map(Var::constant);
    let qkv = causal_conv(&v[0], &v[1], &[], &offsets);
    let expected = gated_delta_rule_joined(&qkv, &v[2], &v[3], GROUPED, &offsets, &[]);
    assert_close(&got, &expected.value().to_f64(), 1e-12);
    assert_eq!(states[2].recurrent.norm(), 0.0);
    assert_eq!(states[0].bytes(), 8 * (3 * GROUPED.joined_width() + 4 * GROUPED.state_len()));
}

#[test]
fn the_convolution_is_its_definition() {
    let (channels, kernel, offsets) = (3, 4, [0, 2, 2, 9]);
    let x = check::inputs(&[&[9, channels], &[channels, kernel], &[kernel - 1, channels]]);
    let past = [Some(x[2].value().clone()), None, None];
    let got = causal_conv(&x[0], &x[1], &past, &offsets).value().to_f64();
    let [x, weight, past] = [0, 1, 2].map(|i: usize| x[i].value().to_f64());
    for row in 0..9 {
        let start: usize = if row < 2 { 0 } else { 2 };
        for channel in 0..channels {
            let input = |back: usize| match (row - start).checked_sub(back) {
                Some(at) => x[(start + at) * channels + channel],
                None if start == 0 => past[(kernel - 1 + row - back) * channels + channel],
                None => 0.0,
            };
            let sum: f64 =
                (0..kernel).map(|k| weight[channel * kernel + k] * input(kernel - 1 - k)).sum();
            let expected = sum / (1.0 + (-sum).exp());
            assert!((got[row * channels + channel] - expected).abs() < 1e-14);
        }
    }
}

#[test]
fn gradients_of_the_convolution_match_finite_differences() {
    for (kernel, offsets) in [(1, vec![0, 5]), (4, vec![0, 2, 2, 9]), (3, vec![0, 1, 4])] {
        let rows = offsets[offsets.len() - 1];
        check::gradients(&[&[rows, 3], &[3, kernel]], |x| causal_conv(&x[0], &x[1], &[], &offsets));
        let past = check::inputs(&[&[1], &[kernel - 1, 3]])[1].value().clone();
        let mut pasts = vec![None; offsets.len() - 1];
        pasts[0] = Some(past);
        check::gradients(&[&[rows, 3], &[3, 1, kernel]], |x| {
            causal_conv(&x[0], &x[1], &pasts, &offsets)
        });
    }
    check::f32_agrees(&[&[70, 300], &[300, 4]], 1e-6, |x| {
        causal_conv(&x[0], &x[1], &[], &[0, 30, 70])
    });
}

#[test]
fn columns_of_the_convolution_can_be_taken_apart() {
    let width = GROUPED.joined_width();
    let (rows, offsets) = (12, [0, 12]);
    let x = layer(rows, 4, DType::F64).map(Var::constant);
    let qkv = causal_conv(&x[0], &x[1], &[], &offsets);
    let key = GROUPED.key_width();
    let parts = [0..key, key..2 * key, 2 * key..width].map(|range| columns(&qkv, range));
    let [q, k, v] = &parts;
    let apart = gated_delta_rule(q, k, v, &x[2], &x[3], GROUPED, &offsets, &[]);
    let together = gated_delta_rule_joined(&qkv, &x[2], &x[3], GROUPED, &offsets, &[]);
    assert_eq!(apart.value().to_f64(), together.value().to_f64());
}
