//! `y_t = silu(Σ_k w_k ⊙ x_{t − K + 1 + k})`: a causal convolution of every channel with its own `K` taps.

use super::{DeltaState, check_offsets};
use crate::buffer::Buffer;
use crate::dispatch;
use crate::graph::{ParentGradients, Var};
use crate::ops::activation::sigmoid;
use crate::simd::{rows_per_task, vectorize};
use crate::tensor::{Tensor, TensorElement};
use hydralora_runtime::{each_mut, for_each, map};
use std::ops::Range;
use std::sync::Arc;

/// Channels that a task takes for the gradient of their taps.
const CHANNELS: usize = 256;

/// Convolves every channel of the packed sequences in `x: [T, C]` with its taps in `weight: [C, K]`, the
/// last of which meets the token itself, and applies SiLU. Gradients for both.
///
/// `past` has, for every sequence, the last `K − 1` inputs `[K − 1, C]` before its first row, or none where
/// it starts; an empty slice if all start.
///
/// The result can be recomputed from `x`.
///
/// # Panics
/// If the extents disagree.
pub fn causal_conv(x: &Var, weight: &Var, past: &[Option<Tensor>], offsets: &[usize]) -> Var {
    let conv = Conv::new(x.value(), weight.value(), past.to_vec(), offsets);
    let conv = Arc::new(conv);
    let recipe = conv.clone();
    let shape = weight.value().shape().to_vec();
    Var::computed(conv.forward(), &[x, weight], move |gradient, parents| {
        dispatch!(gradient.dtype(), |E| conv.backward::<E>(gradient, &shape, parents));
    })
    .with_recipe(move || recipe.forward())
}

/// [`causal_conv`] without a graph: `x` holds the next rows of sequences that go on from their states, one
/// a sequence, and leave the last inputs there.
///
/// # Panics
/// If the extents disagree.
pub fn conv_step(
    x: &Tensor,
    weight: &Tensor,
    offsets: &[usize],
    states: &mut [&mut DeltaState],
) -> Tensor {
    assert_eq!(states.len() + 1, offsets.len(), "one state per sequence");
    let past = states.iter().map(|state| Some(state.conv.clone())).collect();
    let conv = Conv::new(x, weight, past, offsets);
    let value = conv.forward();
    for (sequence, state) in states.iter_mut().enumerate() {
        state.conv = dispatch!(x.dtype(), |E| conv.last_inputs::<E>(sequence));
    }
    value
}

struct Conv {
    x: Tensor,
    /// `[K, C]`.
    taps: Tensor,
    past: Vec<Option<Tensor>>,
    offsets: Vec<usize>,
}

/// `[K, C]` of `weight: [C, K]`. Four taps, which models have, are moved by vectors: generation does this for
/// every token.
fn transposed<E: TensorElement>(weight: &[E], kernel: usize) -> Buffer<E> {
    let mut taps = Buffer::<E>::scratch(weight.len());
    let channels = weight.len() / kernel;
    vectorize(
        #[inline(always)]
        || {
            if kernel == 4 {
                let (weight, _) = weight.as_chunks::<4>();
                let (first, last) = taps.split_at_mut(2 * channels);
                let [(a, b), (c, d)] = [first, last].map(|half| half.split_at_mut(channels));
                let rows = a.iter_mut().zip(b).zip(c.iter_mut().zip(d));
                for (((a, b), (c, d)), w) in rows.zip(weight) {
                    [*a, *b, *c, *d] = *w;
                }
            } else {
                for (tap, out) in taps.chunks_exact_mut(channels).enumerate() {
                    let weight = weight.iter().skip(tap).step_by(kernel);
                    out.iter_mut().zip(weight).for_each(|(out, &w)| *out = w);
                }
            }
        },
    );
    taps
}

impl Conv {
    fn new(x: &Tensor, weight: &Tensor, past: Vec<Option<Tensor>>, offsets: &[usize]) -> Self {
        check_offsets(offsets, x.rows());
        let (channels, kernel) = (weight.rows(), weight.cols());
        assert_eq!(channels, x.cols(), "one row of taps per channel");
        assert!(kernel > 0 && channels > 0, "a convolution has channels and taps");
        assert!(past.is_empty() || past.len() + 1 == offsets.len(), "one past per sequence");
        for past in past.iter().flatten() {
            assert_eq!(past.shape(), [kernel - 1, channels], "the inputs before the first");
        }
        let taps = dispatch!(x.dtype(), |E| {
            Tensor::new(transposed(weight.data::<E>(), kernel), [kernel, channels])
        });
        Self { x: x.clone(), taps, past, offsets: offsets.to_vec() }
    }

    /// Rows of a sequence.
    fn rows(&self, sequence: usize) -> Range<usize> {
        self.offsets[sequence]..self.offsets[sequence + 1]
    }

    /// What tap `tap` meets when the convolution is at `row`; nothing before the first token.
    #[inline(always)]
    fn input<E: TensorElement>(&self, sequence: usize, row: usize, tap: usize) -> Option<&[E]> {
        let (first, back) = (self.offsets[sequence], self.taps.rows() - 1 - tap);
        let (from, at) = if row >= first + back {
            (&self.x, row - back)
        } else {
            // Row `K − 1` of the past would be the first row of the sequence.
            (self.past.get(sequence)?.as_ref()?, self.taps.rows() - 1 + row - first - back)
        };
        Some(&from.data::<E>()[at * self.x.cols()..(at + 1) * self.x.cols()])
    }

    /// The last `K − 1` inputs of a sequence, its past included.
    fn last_inputs<E: TensorElement>(&self, sequence: usize) -> Tensor {
        let (kernel, channels, rows) = (self.taps.rows(), self.x.cols(), self.rows(sequence));
        let mut last = Buffer::<E>::zeros((kernel - 1) * channels);
        for (tap, out) in last.chunks_exact_mut(channels.max(1)).enumerate() {
            // The next token's taps but the last one, which meets that token.
            if let Some(input) = self.input::<E>(sequence, rows.end, tap) {
                out.copy_from_slice(input);
            }
        }
        Tensor::new(last, [kernel - 1, channels])
    }

    /// Runs `body(sequence, rows, their part of out)` over blocks of rows of `out: [T, C]` on all threads.
    fn for_blocks<E: TensorElement>(
        &self,
        out: &mut [E],
        body: impl Fn(usize, Range<usize>, &mut [E]) + Sync,
    ) {
        let channels = self.x.cols();
        let size = rows_per_task(channels);
        let (mut tasks, mut rest) = (Vec::new(), out);
        for sequence in 0..self.offsets.len() - 1 {
            let rows = self.rows(sequence);
            for first in rows.clone().step_by(size) {
                let block = first..(first + size).min(rows.end);
                let (out, after) = std::mem::take(&mut rest).split_at_mut(block.len() * channels);
                rest = after;
                tasks.push((sequence, block, out));
            }
        }
        for_each(each_mut(&mut tasks), |_, (sequence, rows, out)| {
            body(*sequence, rows.clone(), out);
        });
    }

    /// The convolution at `row`, before the SiLU.
    #[inline(always)]
    fn convolve<E: TensorElement>(&self, sequence: usize, row: usize, out: &mut [E]) {
        out.fill(E::ZERO);
        for (tap, taps) in self.taps.data::<E>().chunks_exact(out.len()).enumerate() {
            if let Some(input) = self.input::<E>(sequence, row, tap) {
                for ((out, &x), &w) in out.iter_mut().zip(input).zip(taps) {
                    *out = w.mul_add(x, *out);
                }
            }
        }
    }

    fn forward(&self) -> Tensor {
        let _part = crate::profile::part("causal convolution");
        let channels = self.x.cols();
        dispatch!(self.x.dtype(), |E| {
            let mut out = Buffer::<E>::scratch(self.x.len());
            self.for_blocks(&mut out, |sequence, rows, out| {
                vectorize(
                    #[inline(always)]
                    || {
                        for (row, out) in rows.zip(out.chunks_exact_mut(channels)) {
                            self.convolve(sequence, row, out);
                            for y in out {
                                *y = *y * sigmoid(*y);
                            }
                        }
                    },
                );
            });
            Tensor::new(out, self.x.shape())
        })
    }

    /// With `z` the convolution and `dz = dy ⊙ silu'(z)`: `dx_t = Σ_k w_k ⊙ dz_{t + K − 1 − k}`,
    /// `dw_k = Σ_t dz_t ⊙ x_{t − K + 1 + k}`.
    fn backward<E: TensorElement>(
        &self,
        mut dz: Tensor,
        weight_shape: &[usize],
        parents: &mut ParentGradients<'_>,
    ) {
        let _part = crate::profile::part("causal convolution backward");
        let (kernel, channels) = (self.taps.rows(), self.x.cols());
        self.for_blocks(dz.data_mut::<E>(), |sequence, rows, dz| {
            vectorize(
                #[inline(always)]
                || {
                    let mut z = vec![E::ZERO; channels];
                    for (row, dz) in rows.zip(dz.chunks_exact_mut(channels)) {
                        self.convolve(sequence, row, &mut z);
                        for (dz, &z) in dz.iter_mut().zip(&z) {
                            let s = sigmoid(z);
                            *dz *= s * (E::ONE + z * (E::ONE - s));
                        }
                    }
                },
            );
        });
        let given = dz.data::<E>();
        if parents.needs(1) {
            let blocks = map(0..channels.div_ceil(CHANNELS), |_, block| {
                let block = block * CHANNELS..channels.min((block + 1) * CHANNELS);
                self.tap_gradient(given, block)
            });
            let mut gradient = Vec::with_capacity(kernel * channels);
            for sums in &blocks {
                let width = sums.len() / kernel;
                gradient.extend((0..sums.len()).map(|i| sums[i % kernel * width + i / kernel]));
            }
            parents.add(1, Tensor::new(gradient, weight_shape));
        }
        if parents.needs(0) {
            let mut dx = Buffer::<E>::zeros(self.x.len());
            let taps = self.taps.data::<E>();
            self.for_blocks(&mut dx, |sequence, rows, dx| {
                vectorize(
                    #[inline(always)]
                    || {
                        let end = self.rows(sequence).end;
                        for (row, dx) in rows.zip(dx.chunks_exact_mut(channels)) {
                            for (tap, taps) in taps.chunks_exact(channels).enumerate().rev() {
                                let met = row + kernel - 1 - tap;
                                if met < end {
                                    let dz = &given[met * channels..(met + 1) * channels];
                                    for ((dx, &dz), &w) in dx.iter_mut().zip(dz).zip(taps) {
                                        *dx = w.mul_add(dz, *dx);
                                    }
                                }
                            }
                        }
                    },
                );
            });
            parents.add(0, Tensor::new(dx, self.x.shape()));
        }
    }

    /// Gradient of the taps of a block of channels, `[K, block]`.
    fn tap_gradient<E: TensorElement>(&self, dz: &[E], block: Range<usize>) -> Vec<E> {
        let channels = self.x.cols();
        let mut sums = vec![E::ZERO; self.taps.rows() * block.len()];
        vectorize(
            #[inline(always)]
            || {
                for sequence in 0..self.offsets.len() - 1 {
                    for row in self.rows(sequence) {
                        let dz = &dz[row * channels..(row + 1) * channels][block.clone()];
                        for (tap, sums) in sums.chunks_exact_mut(block.len()).enumerate() {
                            if let Some(input) = self.input::<E>(sequence, row, tap) {
                                for ((sum, &dz), &x) in
                                    sums.iter_mut().zip(dz).zip(&input[block.clone()])
                                {
                                    *sum = dz.mul_add(x, *sum);
                                }
                            }
                        }
                    }
                }
            },
        );
        sums
    }
}
