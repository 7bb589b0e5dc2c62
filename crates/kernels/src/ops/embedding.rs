//! `h_t = W[id_t]`: an embedding that is trained.

use crate::buffer::Buffer;
use crate::dispatch;
use crate::graph::Var;
use crate::simd;
use crate::tensor::Tensor;

/// Rows `ids` of `weight: [V, d]`, giving `[T, d]`. The gradient of a row is the sum over the places
/// it was read at, added in place to what other uses of the weight have contributed.
///
/// # Panics
/// If an id is not below `V`.
pub fn embedding(weight: &Var, ids: &[u32]) -> Var {
    let _part = crate::profile::part("embedding");
    let shape = weight.value().shape().to_vec();
    let (rows, cols) = (weight.value().rows(), weight.value().cols());
    let value = dispatch!(weight.value().dtype(), |E| {
        let table = weight.value().data::<E>();
        let mut out = Buffer::<E>::scratch(ids.len() * cols);
        for (out, &id) in out.chunks_exact_mut(cols.max(1)).zip(ids) {
            let id = id as usize;
            assert!(id < rows, "token id {id} is not below the vocabulary size {rows}");
            out.copy_from_slice(&table[id * cols..(id + 1) * cols]);
        }
        Tensor::new(out, [ids.len(), cols])
    });
    let ids = ids.to_vec();
    Var::computed(value, &[weight], move |gradient, parents| {
        let _part = crate::profile::part("embedding backward");
        let carried = parents.take(0);
        let mut sum = carried.unwrap_or_else(|| Tensor::zeros(gradient.dtype(), shape));
        dispatch!(gradient.dtype(), |E| {
            let sum = sum.data_mut::<E>();
            for (row, &id) in gradient.data::<E>().chunks_exact(cols.max(1)).zip(&ids) {
                simd::add_scaled(1.0, row, &mut sum[id as usize * cols..][..cols]);
            }
        });
        parents.add(0, sum);
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check;
    use crate::ops::linear::linear;

    #[test]
    fn gradients_match_finite_differences() {
        check::gradients(&[&[5, 3]], |w| embedding(&w[0], &[4, 0, 4, 2]));
        check::gradients(&[&[2, 1]], |w| embedding(&w[0], &[1]));
        check::gradients(&[&[2, 3]], |w| embedding(&w[0], &[]));
    }

    #[test]
    fn a_weight_that_is_also_the_output_layer_gathers_both_gradients() {
        check::gradients(&[&[5, 3]], |w| linear(&embedding(&w[0], &[4, 0, 4]), &w[0], None));
    }
}
