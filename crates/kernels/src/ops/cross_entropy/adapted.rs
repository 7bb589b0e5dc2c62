//! Cross-entropy through a frozen output layer with a thin product added to its logits:
//!
//! ```text
//! l_t = W h_t + b + B z_t        dz_t = Bᵀ dl_t        dB = Σ_t dl_t ⊗ z_t
//! ```

use super::{CHUNK_ROWS, CrossEntropy, capped_softmax_loss, labelled_rows, placed};
use crate::dispatch;
use crate::graph::Var;
use crate::matmul::{Mat, MatMut, Threads, Write, gemm};
use crate::ops::frozen_linear::FrozenLinear;
use crate::ops::rows::select_rows;
use crate::tensor::Tensor;

/// [`linear_cross_entropy`](super::linear_cross_entropy) with `z Bᵀ` added to the logits before the cap,
/// for `z: [T, k]` and `b: [V, k]`, either of which may be trained.
///
/// # Panics
/// As [`linear_cross_entropy`](super::linear_cross_entropy), and if the shapes do not fit.
pub fn adapted_cross_entropy(
    hidden: &Var,
    head: &FrozenLinear,
    [z, b]: [&Var; 2],
    labels: &[u32],
    ignore: u32,
    factor: f64,
    cap: Option<f64>,
) -> CrossEntropy {
    let _part = crate::profile::part("cross_entropy");
    let (h, dtype) = (hidden.value(), hidden.value().dtype());
    let (vocabulary, thin) = (head.out_features(), z.value().cols());
    assert_eq!([h.rows(), z.value().rows()], [labels.len(); 2], "one label per row");
    assert_eq!(b.value().shape(), [vocabulary, thin], "a row of B for every token");
    let rows = labelled_rows(labels, ignore, vocabulary);
    let mut b_gradient = b.needs_grad().then(|| Tensor::zeros(dtype, b.value().shape()));
    let (mut of_hidden, mut of_z, mut token_losses) = (Vec::new(), Vec::new(), Vec::new());
    for rows in rows.chunks(CHUNK_ROWS) {
        let targets: Vec<u32> = rows.iter().map(|&t| labels[t]).collect();
        let some_z = select_rows(z.value(), rows);
        let mut logits = head.apply(&select_rows(h, rows));
        dispatch!(dtype, |E| {
            gemm(
                MatMut::new(logits.data_mut::<E>(), rows.len(), vocabulary),
                Mat::new(some_z.data::<E>(), rows.len(), thin),
                Mat::new(b.value().data::<E>(), vocabulary, thin).t(),
                1.0,
                Write::Add,
                Threads::All,
            );
            capped_softmax_loss::<E>(&mut logits, &targets, factor, cap, &mut token_losses);
            if z.needs_grad() {
                let mut gradient = Tensor::zeros(dtype, [rows.len(), thin]);
                gemm(
                    MatMut::new(gradient.data_mut::<E>(), rows.len(), thin),
                    Mat::new(logits.data::<E>(), rows.len(), vocabulary),
                    Mat::new(b.value().data::<E>(), vocabulary, thin),
                    1.0,
                    Write::Add,
                    Threads::All,
                );
                of_z.push(gradient);
            }
            if let Some(sum) = &mut b_gradient {
                gemm(
                    MatMut::new(sum.data_mut::<E>(), vocabulary, thin),
                    Mat::new(logits.data::<E>(), rows.len(), vocabulary).t(),
                    Mat::new(some_z.data::<E>(), rows.len(), thin),
                    1.0,
                    Write::Add,
                    Threads::All,
                );
            }
        });
        if hidden.needs_grad() {
            of_hidden.push(head.input_gradient(&logits, None));
        }
    }
    let total = factor * token_losses.iter().sum::<f64>();
    let (at, all) = (rows.clone(), labels.len());
    let parents = [hidden, z, b];
    let loss = Var::computed(Tensor::scalar(dtype, total), &parents, move |seed, parents| {
        let seed = seed.item();
        for (parent, chunks) in [(0, of_hidden), (1, of_z)] {
            if parents.needs(parent) && !chunks.is_empty() {
                let out = Tensor::zeros(dtype, [all, chunks[0].cols()]);
                parents.add(parent, placed(&chunks, at.chunks(CHUNK_ROWS), out, seed));
            }
        }
        if let Some(mut sum) = b_gradient.filter(|_| parents.needs(2)) {
            sum.scale(seed);
            parents.add(2, sum);
        }
    });
    CrossEntropy { loss, rows, token_losses }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check;
    use crate::element::DType;
    use crate::ops::cross_entropy::linear_cross_entropy;
    use crate::ops::elementwise::scale;

    const IGNORE: u32 = u32::MAX;

    fn head(vocabulary: usize, hidden: usize) -> Tensor {
        let values: Vec<f64> =
            (0..vocabulary * hidden).map(|i| ((i * 53 + 7) % 89) as f64 / 30.0 - 1.5).collect();
        Tensor::from_f64(DType::F64, &values, [vocabulary, hidden])
    }

    #[test]
    fn gradients_match_finite_differences() {
        let head = FrozenLinear::dense(head(11, 4));
        let labels = [3, IGNORE, 10, 0, IGNORE];
        for cap in [None, Some(2.0)] {
            check::gradients(&[&[5, 4], &[5, 2], &[11, 2]], |v| {
                let added = [&v[1], &v[2]];
                let found = adapted_cross_entropy(&v[0], &head, added, &labels, IGNORE, 0.7, cap);
                scale(&found.loss, 1.5)
            });
        }
    }

    #[test]
    fn f32_agrees_with_f64() {
        let (rows, vocabulary) = (CHUNK_ROWS + 9, 203);
        let labels: Vec<u32> = (0..rows as u32)
            .map(|t| if t % 4 == 3 { IGNORE } else { t * 37 % vocabulary as u32 })
            .collect();
        check::f32_agrees(&[&[rows, 12], &[rows, 3], &[vocabulary, 3]], 1e-4, |v| {
            let head = FrozenLinear::dense(head(vocabulary, 12).to_dtype(v[0].value().dtype()));
            adapted_cross_entropy(&v[0], &head, [&v[1], &v[2]], &labels, IGNORE, 0.1, Some(9.0))
                .loss
        });
    }

    #[test]
    fn nothing_added_changes_nothing() {
        let head = FrozenLinear::dense(head(11, 4));
        let v = check::inputs(&[&[5, 4], &[5, 2]]);
        let zero = Var::constant(Tensor::zeros(DType::F64, [11, 2]));
        let labels = [3, IGNORE, 10, 0, IGNORE];
        let found = adapted_cross_entropy(&v[0], &head, [&v[1], &zero], &labels, IGNORE, 1.0, None);
        let plain = linear_cross_entropy(&v[0], &head, &labels, IGNORE, 1.0, None);
        assert_eq!(found.rows, plain.rows);
        for (got, want) in found.token_losses.iter().zip(&plain.token_losses) {
            assert!((got - want).abs() < 1e-12);
        }
    }
}
