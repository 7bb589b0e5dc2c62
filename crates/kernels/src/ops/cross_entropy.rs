//! `loss = c · Σ_t (log Σ_v exp(h_t · W_v) − h_t · W_label(t))` without ever holding all logits,
//! which may be kept below a soft cap.
//!
//! Only rows that carry a label are computed, a chunk at a time; the gradient of the hidden state
//! is formed in the same pass, while the chunk's logits are at hand.
//!
//! In `f32` logits are held transposed, `[V, chunk]`: then the first product does not have to reorder
//! the output layer, by far the largest matrix, and softmax runs down the columns with whole vectors.
//! A frozen output layer needs those of one block of the vocabulary at a time, a trained one all of
//! a chunk's.

use crate::dispatch;
use crate::element::DType;
use crate::graph::Var;
use crate::matmul::{Mat, MatMut, Threads, Write, gemm};
use crate::ops::frozen_linear::FrozenLinear;
use crate::ops::rows::select_rows;
use crate::ops::softcap::{Softcap, softcap};
use crate::simd::{self, vectorize};
use crate::tensor::{Tensor, TensorElement};
pub use adapted::adapted_cross_entropy;
use hydralora_runtime::{chunks_mut, map};

/// Rows whose logits are held at once where all of them are.
pub(crate) const CHUNK_ROWS: usize = 192;

/// Numbers held at once to form the loss in `f32` through an output layer `[vocabulary, hidden]`: all
/// logits of a chunk where the layer is trained, sums over stretches of the vocabulary where not.
pub fn working_len(vocabulary: usize, hidden: usize, trained: bool) -> usize {
    if trained { CHUNK_ROWS * vocabulary } else { streamed::PARTS * streamed::ROWS * hidden }
}

/// What [`linear_cross_entropy`] gives.
pub struct CrossEntropy {
    /// `factor` times the sum of all token losses, shape `[1]`.
    pub loss: Var,
    /// Rows of the hidden state that carry a label, ascending.
    pub rows: Vec<usize>,
    /// The loss in nats of each of those rows, not multiplied by `factor`.
    pub token_losses: Vec<f64>,
}

/// Cross-entropy of `hidden: [T, d]` through the output layer `head: [V, d]` against `labels`
/// (`[T]`, the token each row has to predict; `ignore` for rows that carry none). With a `cap` (Gemma 2)
/// every logit `l` becomes `cap · tanh(l / cap)` first.
///
/// # Panics
/// If a label is not below the vocabulary size, or if the cap is not positive.
pub fn linear_cross_entropy(
    hidden: &Var,
    head: &FrozenLinear,
    labels: &[u32],
    ignore: u32,
    factor: f64,
    cap: Option<f64>,
) -> CrossEntropy {
    cross_entropy(hidden, head, None, labels, ignore, factor, cap)
}

/// [`linear_cross_entropy`] through an output layer `weight: [V, d]` that is trained: its gradient
/// `Σ_t dlogits_t ⊗ h_t` is summed up chunk by chunk in one buffer.
///
/// # Panics
/// As [`linear_cross_entropy`].
pub fn trained_cross_entropy(
    hidden: &Var,
    weight: &Var,
    labels: &[u32],
    ignore: u32,
    factor: f64,
    cap: Option<f64>,
) -> CrossEntropy {
    let head = FrozenLinear::dense(weight.value().clone());
    cross_entropy(hidden, &head, Some(weight), labels, ignore, factor, cap)
}

/// Rows in `f32` that carry a label, and how their losses are formed.
struct Labelled<'a> {
    /// `[n, d]`.
    h: &'a Tensor,
    /// The label of each row.
    targets: &'a [u32],
    /// Factor on the losses.
    factor: f32,
    /// The cap of the logits.
    cap: Option<Softcap<f32>>,
}

fn cross_entropy(
    hidden: &Var,
    head: &FrozenLinear,
    weight: Option<&Var>,
    labels: &[u32],
    ignore: u32,
    factor: f64,
    cap: Option<f64>,
) -> CrossEntropy {
    let _part = crate::profile::part("cross_entropy");
    let h = hidden.value();
    assert_eq!(h.rows(), labels.len(), "one label per row");
    let rows = labelled_rows(labels, ignore, head.out_features());
    // A device knows no cap.
    if weight.is_none() && cap.is_none() {
        on_device!(cross_entropy::linear_cross_entropy(hidden, head, labels, &rows, factor));
    }
    let wanted = hidden.needs_grad();
    let (cols, dtype, shape) = (h.cols(), h.dtype(), h.shape().to_vec());
    let mut weight_gradient = weight
        .filter(|weight| weight.needs_grad())
        .map(|weight| Tensor::zeros(dtype, weight.value().shape()));
    let mut token_losses = Vec::with_capacity(rows.len());
    let mut chunks = Vec::new();
    let streamed = dtype == DType::F32 && weight_gradient.is_none();
    let chunk_rows = if streamed { streamed::ROWS } else { CHUNK_ROWS };
    for rows in rows.chunks(chunk_rows) {
        let targets: Vec<u32> = rows.iter().map(|&t| labels[t]).collect();
        let selected = select_rows(h, rows);
        if dtype == DType::F32 {
            let labelled = Labelled {
                h: &selected,
                targets: &targets,
                factor: factor as f32,
                cap: cap.map(|cap| Softcap::new(cap, 1.0)),
            };
            let losses = &mut token_losses;
            chunks.extend(match &mut weight_gradient {
                None => streamed::chunk(&labelled, head, losses, wanted),
                Some(sum) => transposed::chunk(&labelled, head, losses, wanted, sum),
            });
            continue;
        }
        let mut logits = head.apply(&selected);
        dispatch!(dtype, |E| {
            capped_softmax_loss::<E>(&mut logits, &targets, factor, cap, &mut token_losses);
        });
        if wanted {
            chunks.push(head.input_gradient(&logits, None));
        }
        if let Some(sum) = &mut weight_gradient {
            let vocabulary = logits.cols();
            dispatch!(dtype, |E| gemm(
                MatMut::new(sum.data_mut::<E>(), vocabulary, cols),
                Mat::new(logits.data::<E>(), rows.len(), vocabulary).t(),
                Mat::new(selected.data::<E>(), rows.len(), cols),
                1.0,
                Write::Add,
                Threads::All,
            ));
        }
    }
    let total = factor * token_losses.iter().sum::<f64>();
    let gradient_rows = rows.clone();
    let none = Var::constant(Tensor::empty(dtype));
    let parents = [hidden, weight.unwrap_or(&none)];
    let loss = Var::computed(Tensor::scalar(dtype, total), &parents, move |seed, parents| {
        let seed = seed.item();
        if let Some(mut sum) = weight_gradient.filter(|_| parents.needs(1)) {
            if seed != 1.0 {
                sum.scale(seed);
            }
            parents.add(1, sum);
        }
        if parents.needs(0) {
            let rows = gradient_rows.chunks(chunk_rows);
            parents.add(0, placed(&chunks, rows, Tensor::zeros(dtype, shape), seed));
        }
    });
    CrossEntropy { loss, rows, token_losses }
}

mod adapted;
mod columns;
mod streamed;
mod transposed;

/// The rows that carry a label.
///
/// # Panics
/// If a label is not below `vocabulary`.
fn labelled_rows(labels: &[u32], ignore: u32, vocabulary: usize) -> Vec<usize> {
    let rows: Vec<usize> = (0..labels.len()).filter(|&t| labels[t] != ignore).collect();
    if let Some(target) = rows.iter().map(|&t| labels[t]).find(|&t| t as usize >= vocabulary) {
        panic!("label {target} is not below the vocabulary {vocabulary}");
    }
    rows
}

/// Puts the rows of `chunks` times `factor` at the places `rows` of `out: [T, cols]`, which is zero.
fn placed<'a>(
    chunks: &[Tensor],
    rows: impl Iterator<Item = &'a [usize]>,
    mut out: Tensor,
    factor: f64,
) -> Tensor {
    let cols = out.cols();
    dispatch!(out.dtype(), |E| {
        let out = out.data_mut::<E>();
        for (rows, chunk) in rows.zip(chunks) {
            for (&row, from) in rows.iter().zip(chunk.data::<E>().chunks_exact(cols)) {
                for (to, &from) in out[row * cols..(row + 1) * cols].iter_mut().zip(from) {
                    *to = from * factor as E;
                }
            }
        }
    });
    out
}

/// [`softmax_loss`] of logits that `cap` keeps small, if there is one; the gradient is that of the logits
/// before it.
fn capped_softmax_loss<E: TensorElement>(
    logits: &mut Tensor,
    targets: &[u32],
    factor: f64,
    cap: Option<f64>,
    losses: &mut Vec<f64>,
) {
    let Some(cap) = cap else { return softmax_loss::<E>(logits, targets, factor, losses) };
    let dtype = logits.dtype();
    *logits = softcap(std::mem::replace(logits, Tensor::empty(dtype)), cap);
    let slopes = Softcap::<E>::new(cap, 1.0).slopes(logits.data::<E>());
    softmax_loss::<E>(logits, targets, factor, losses);
    for (logit, &slope) in logits.data_mut::<E>().iter_mut().zip(&slopes[..]) {
        *logit *= slope;
    }
}

/// Appends each row's loss and turns its logits into `factor · (softmax − onehot)`.
fn softmax_loss<E: TensorElement>(
    logits: &mut Tensor,
    targets: &[u32],
    factor: f64,
    losses: &mut Vec<f64>,
) {
    let vocabulary = logits.cols();
    let factor = E::from_f64(factor);
    let rows = (chunks_mut(logits.data_mut::<E>(), vocabulary), targets);
    let found: Vec<f64> = map(rows, |_, (row, &target)| {
        let target = target as usize;
        vectorize(
            #[inline(always)]
            || {
                let peak = simd::max(row);
                let wanted = (row[target] - peak).to_f64();
                for x in row.iter_mut() {
                    *x = (*x - peak).exp();
                }
                // Blocks of f32 partial sums, then f64: the rounding of a plain f32 sum over a
                // large vocabulary is visible in the loss.
                let sum: f64 =
                    row.chunks(1024).map(|block| simd::sum_map(block, |x| x).to_f64()).sum();
                let scale = factor * E::from_f64(1.0 / sum);
                for x in row.iter_mut() {
                    *x *= scale;
                }
                row[target] -= factor;
                sum.ln() - wanted
            },
        )
    });
    losses.extend(found);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check;
    use crate::ops::frozen_linear::FrozenWeight;

    const IGNORE: u32 = u32::MAX;

    fn head(vocabulary: usize, hidden: usize) -> FrozenLinear {
        let values: Vec<f64> =
            (0..vocabulary * hidden).map(|i| ((i * 53 + 7) % 89) as f64 / 30.0 - 1.5).collect();
        FrozenLinear::dense(Tensor::from_f64(DType::F64, &values, [vocabulary, hidden]))
    }

    #[test]
    fn gradients_match_finite_differences() {
        let head = head(11, 4);
        let labels = [3, IGNORE, 10, 0, IGNORE];
        check::gradients(&[&[5, 4]], |x| {
            linear_cross_entropy(&x[0], &head, &labels, IGNORE, 0.7, None).loss
        });
    }

    #[test]
    fn gradients_of_a_trained_output_layer_match_finite_differences() {
        let labels = [3, IGNORE, 10, 0, IGNORE];
        check::gradients(&[&[5, 4], &[11, 4]], |v| {
            let found = trained_cross_entropy(&v[0], &v[1], &labels, IGNORE, 0.7, None);
            crate::ops::elementwise::scale(&found.loss, 1.5)
        });
        // Also where nothing below it is trained.
        let hidden = check::inputs(&[&[5, 4]]);
        check::gradients(&[&[11, 4]], |v| {
            trained_cross_entropy(&hidden[0], &v[0], &labels, IGNORE, 0.7, None).loss
        });
    }

    #[test]
    fn a_trained_output_layer_in_f32_agrees_with_f64() {
        let (rows, hidden, vocabulary) = (CHUNK_ROWS + 9, 20, 5003);
        let labels: Vec<u32> = (0..rows as u32).map(|t| t * 37 % vocabulary as u32).collect();
        let run = |dtype: DType| {
            let v: Vec<Var> = check::inputs(&[&[rows, hidden], &[vocabulary, hidden]])
                .iter()
                .map(|v| Var::leaf(v.value().to_dtype(dtype)))
                .collect();
            let loss = trained_cross_entropy(&v[0], &v[1], &labels, IGNORE, 0.5, None).loss;
            let gradients = loss.backward();
            [0, 1].map(|i: usize| gradients.get(&v[i]).unwrap().to_f64())
        };
        for (expected, got) in run(DType::F64).iter().zip(&run(DType::F32)) {
            for (expected, got) in expected.iter().zip(got) {
                assert!((expected - got).abs() < 1e-5 * (1.0 + expected.abs()), "{expected} {got}");
            }
        }
    }

    #[test]
    fn losses_match_the_definition_across_chunks() {
        let (rows, hidden, vocabulary) = (2 * CHUNK_ROWS + 3, 3, 7);
        let head = head(vocabulary, hidden);
        let x = check::inputs(&[&[rows, hidden]]);
        let labels: Vec<u32> =
            (0..rows as u32).map(|t| if t % 3 == 1 { IGNORE } else { t % 7 }).collect();
        let out = linear_cross_entropy(&x[0], &head, &labels, IGNORE, 0.5, None);
        let logits = head.apply(x[0].value()).to_f64();
        let mut total = 0.0;
        for (&row, &loss) in out.rows.iter().zip(&out.token_losses) {
            let logits = &logits[row * vocabulary..(row + 1) * vocabulary];
            let sum: f64 = logits.iter().map(|l| l.exp()).sum();
            let expected = sum.ln() - logits[labels[row] as usize];
            assert!((loss - expected).abs() < 1e-12);
            total += 0.5 * expected;
        }
        assert!((out.loss.value().item() - total).abs() < 1e-9);
        assert!(out.rows.iter().all(|row| row % 3 != 1));
    }

    #[test]
    fn f32_agrees_with_f64() {
        let (rows, hidden, vocabulary) = (CHUNK_ROWS + 31, 20, 1003);
        let wide = head(vocabulary, hidden);
        let FrozenWeight::Dense(weight) = wide.weight() else { panic!("dense") };
        let narrow = FrozenLinear::dense(weight.to_dtype(DType::F32));
        let labels: Vec<u32> = (0..rows as u32)
            .map(|t| if t % 4 == 3 { IGNORE } else { t * 37 % vocabulary as u32 })
            .collect();
        let run = |dtype: DType, head: &FrozenLinear| {
            let x = Var::leaf(check::inputs(&[&[rows, hidden]])[0].value().to_dtype(dtype));
            let out = linear_cross_entropy(&x, head, &labels, IGNORE, 0.5, None);
            let gradient = out.loss.backward().get(&x).unwrap().to_f64();
            (out.token_losses, gradient)
        };
        let (expected, got) = (run(DType::F64, &wide), run(DType::F32, &narrow));
        for (expected, got) in [(expected.0, got.0), (expected.1, got.1)] {
            for (expected, got) in expected.iter().zip(&got) {
                assert!((expected - got).abs() < 1e-5 * (1.0 + expected.abs()), "{expected} {got}");
            }
        }
    }

    #[test]
    fn gradients_through_a_cap_match_finite_differences() {
        let head = head(11, 4);
        let labels = [3, IGNORE, 10, 0, IGNORE];
        for cap in [0.3, 2.0, 30.0] {
            check::gradients(&[&[5, 4]], |x| {
                linear_cross_entropy(&x[0], &head, &labels, IGNORE, 0.7, Some(cap)).loss
            });
            check::gradients(&[&[5, 4], &[11, 4]], |v| {
                trained_cross_entropy(&v[0], &v[1], &labels, IGNORE, 0.7, Some(cap)).loss
            });
        }
    }

    /// Losses and gradients of `hidden: [rows, 20]` through a frozen output layer with a bias and through
    /// a trained one.
    fn both_layers(dtype: DType, vocabulary: usize, cap: Option<f64>) -> Vec<Vec<f64>> {
        let (rows, hidden) = (CHUNK_ROWS + 9, 20);
        let inputs: Vec<Tensor> =
            check::inputs(&[&[rows, hidden], &[vocabulary, hidden], &[vocabulary]])
                .iter()
                .map(|v| v.value().to_dtype(DType::F32).to_dtype(dtype))
                .collect();
        let labels: Vec<u32> = (0..rows as u32)
            .map(|t| if t % 4 == 3 { IGNORE } else { t * 37 % vocabulary as u32 })
            .collect();
        let [x, weight] = [0, 1].map(|i: usize| Var::leaf(inputs[i].clone()));
        let frozen = FrozenWeight::Dense(inputs[1].clone());
        let frozen = FrozenLinear::new(frozen, Some(inputs[2].clone()));
        let of_frozen = linear_cross_entropy(&x, &frozen, &labels, IGNORE, 0.5, cap);
        let of_trained = trained_cross_entropy(&x, &weight, &labels, IGNORE, 0.5, cap);
        let through_frozen = of_frozen.loss.backward();
        let through_trained = of_trained.loss.backward();
        vec![
            of_frozen.token_losses,
            of_trained.token_losses,
            through_frozen.get(&x).unwrap().to_f64(),
            through_trained.get(&x).unwrap().to_f64(),
            through_trained.get(&weight).unwrap().to_f64(),
        ]
    }

    fn agree(expected: &[Vec<f64>], got: &[Vec<f64>], tolerance: f64) {
        assert_eq!(expected.len(), got.len());
        for (index, (expected, got)) in expected.iter().zip(got).enumerate() {
            let norm = expected.iter().map(|x| x * x).sum::<f64>().sqrt();
            let error = expected.iter().zip(got).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
            assert!(error <= tolerance * norm, "result {index} is off by {}", error / norm);
        }
    }

    #[test]
    fn capped_logits_in_f32_agree_with_f64() {
        for (vocabulary, cap) in [(3, 0.5), (1003, 2.0), (1003, 30.0), (5003, 5.0)] {
            let run = |dtype| both_layers(dtype, vocabulary, Some(cap));
            agree(&run(DType::F64), &run(DType::F32), 1e-5);
        }
    }

    #[test]
    fn a_cap_far_above_the_logits_changes_nothing() {
        for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F64, 1e-10)] {
            for cap in [1e7, f64::MAX] {
                let got = both_layers(dtype, 1003, Some(cap));
                agree(&both_layers(dtype, 1003, None), &got, tolerance);
            }
        }
    }

    #[test]
    fn a_cap_that_cuts_everything_off_makes_all_tokens_alike() {
        for dtype in [DType::F32, DType::F64] {
            for cap in [f64::MIN_POSITIVE, 1e-9] {
                let found = both_layers(dtype, 1003, Some(cap));
                let expected = 1003_f64.ln();
                assert!(found[..2].iter().flatten().all(|loss| (loss - expected).abs() < 1e-5));
                assert!(found[2..].iter().flatten().all(|x| x.abs() < 1e-4));
            }
        }
    }

    #[test]
    fn capped_losses_match_the_definition() {
        let (rows, hidden, vocabulary, cap) = (CHUNK_ROWS + 3, 3, 7, 1.5);
        let head = head(vocabulary, hidden);
        let x = check::inputs(&[&[rows, hidden]]);
        let labels: Vec<u32> = (0..rows as u32).map(|t| t % 7).collect();
        let out = linear_cross_entropy(&x[0], &head, &labels, IGNORE, 0.5, Some(cap));
        let logits = head.apply(x[0].value()).to_f64();
        for ((logits, &loss), &label) in
            logits.chunks(vocabulary).zip(&out.token_losses).zip(&labels)
        {
            let capped: Vec<f64> = logits.iter().map(|l| cap * (l / cap).tanh()).collect();
            let sum: f64 = capped.iter().map(|l| l.exp()).sum();
            assert!((loss - (sum.ln() - capped[label as usize])).abs() < 1e-12);
        }
    }

    #[test]
    fn no_labels_give_zero() {
        let x = check::leaves(&[&[2, 3]]);
        let out = linear_cross_entropy(&x[0], &head(5, 3), &[IGNORE, IGNORE], IGNORE, 1.0, None);
        assert_eq!(out.loss.value().item(), 0.0);
        assert_eq!(out.loss.backward().get(&x[0]).unwrap().to_f64(), [0.0; 6]);
    }
}
