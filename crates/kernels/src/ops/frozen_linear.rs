//! `y = x Wᵀ + b` for a weight that never changes: a gradient for `x` only.

use crate::block::{self, BlockFormat};
use crate::buffer::Buffer;
use crate::dense;
use crate::dispatch;
use crate::element::DType;
use crate::graph::Var;
use crate::matmul::{Mat, MatMut, Threads, Write, gemm};
use crate::simd::{self, vectorize};
use crate::tensor::Tensor;
use crate::tile::Right;
use hydralora_runtime::{Stream, chunks, chunks_mut, for_each};
use std::ops::Range;
use std::sync::Arc;

pub(crate) mod few;

/// A weight `[out, in]` of the base model.
#[derive(Clone)]
pub enum FrozenWeight {
    /// Numbers as the computation uses them.
    Dense(Tensor),
    /// Packed blocks as a GGUF file stores them, widened where they are used.
    Blocks {
        /// How the bytes encode numbers.
        format: BlockFormat,
        /// Row-major blocks; every row starts a block.
        bytes: PackedBytes,
        /// `[out, in]`.
        shape: [usize; 2],
        /// Type of the widened numbers.
        dtype: DType,
    },
}

/// Bytes of a packed weight, shared with whoever holds them: a buffer, or a file mapped into memory.
#[derive(Clone)]
pub struct PackedBytes {
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    range: Range<usize>,
}

impl PackedBytes {
    /// Part of what `owner` holds.
    ///
    /// # Panics
    /// If the range reaches past the end.
    pub fn shared(owner: Arc<dyn AsRef<[u8]> + Send + Sync>, range: Range<usize>) -> Self {
        assert!(range.end <= owner.as_ref().as_ref().len(), "the range reaches past the bytes");
        Self { owner, range }
    }
}

impl From<Vec<u8>> for PackedBytes {
    fn from(bytes: Vec<u8>) -> Self {
        let range = 0..bytes.len();
        Self { owner: Arc::new(bytes), range }
    }
}

impl std::ops::Deref for PackedBytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.owner.as_ref().as_ref()[self.range.clone()]
    }
}

/// Rows of a packed weight that are widened at a time.
const TILE_ROWS: usize = 256;

/// A frozen linear layer.
#[derive(Clone)]
pub struct FrozenLinear {
    weight: FrozenWeight,
    bias: Option<Tensor>,
    #[cfg(feature = "gpu")]
    placed: Option<Arc<crate::gpu::frozen::Placed>>,
}

impl FrozenLinear {
    /// A layer of `weight` and, optionally, `bias: [out]`.
    pub fn new(weight: FrozenWeight, bias: Option<Tensor>) -> Self {
        let layer = Self {
            weight,
            bias,
            #[cfg(feature = "gpu")]
            placed: None,
        };
        if let Some(bias) = &layer.bias {
            assert_eq!(bias.len(), layer.out_features(), "bias has another width");
        }
        layer
    }

    /// A layer of dense `weight: [out, in]`.
    pub fn dense(weight: Tensor) -> Self {
        Self::new(FrozenWeight::Dense(weight), None)
    }

    fn shape(&self) -> [usize; 2] {
        match &self.weight {
            FrozenWeight::Dense(weight) => [weight.rows(), weight.cols()],
            FrozenWeight::Blocks { shape, .. } => *shape,
        }
    }

    /// Width of the input.
    pub fn in_features(&self) -> usize {
        self.shape()[1]
    }

    /// Width of the output.
    pub fn out_features(&self) -> usize {
        self.shape()[0]
    }

    /// Type of the activations this layer computes with.
    pub fn dtype(&self) -> DType {
        match &self.weight {
            FrozenWeight::Dense(weight) => weight.dtype(),
            FrozenWeight::Blocks { dtype, .. } => *dtype,
        }
    }

    /// Bytes the layer occupies.
    pub fn bytes(&self) -> usize {
        let weight = match &self.weight {
            FrozenWeight::Dense(weight) => weight.len() * weight.dtype().size(),
            FrozenWeight::Blocks { bytes, .. } => bytes.len(),
        };
        weight + self.bias.as_ref().map_or(0, |bias| bias.len() * bias.dtype().size())
    }

    /// The weight as it lies in memory.
    fn weight_bytes(&self) -> &[u8] {
        match &self.weight {
            FrozenWeight::Dense(weight) => {
                dispatch!(weight.dtype(), |E| bytemuck::cast_slice(weight.data::<E>()))
            }
            FrozenWeight::Blocks { bytes, .. } => bytes,
        }
    }

    /// What a product of `layers` with a few rows of one input reads, for
    /// [`announce`](hydralora_runtime::announce).
    pub fn stream(layers: &[&Self]) -> Stream {
        few::stream(layers)
    }

    /// The bias `[out]`, if there is one.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// The frozen weight.
    pub fn weight(&self) -> &FrozenWeight {
        &self.weight
    }

    /// The same layer without its numbers, for when someone else holds the weight: it still knows
    /// its shape and type, and computing with it panics.
    #[must_use]
    pub fn released(&self) -> Self {
        let weight = FrozenWeight::Blocks {
            format: BlockFormat::F32,
            bytes: Vec::new().into(),
            shape: self.shape(),
            dtype: self.dtype(),
        };
        Self::new(weight, self.bias.clone())
    }

    /// The same layer without its bias.
    #[must_use]
    pub fn without_bias(&self) -> Self {
        Self { bias: None, ..self.clone() }
    }

    /// The layer's place on a device, if it has one.
    #[cfg(feature = "gpu")]
    pub(crate) fn placed(&self) -> Option<&crate::gpu::frozen::Placed> {
        self.placed.as_deref()
    }

    /// The same layer with another place, or on the host alone.
    #[cfg(feature = "gpu")]
    pub(crate) fn placed_at(&self, placed: Option<Arc<crate::gpu::frozen::Placed>>) -> Self {
        Self { placed, ..self.clone() }
    }

    /// The weight as plain numbers `[out, in]`; shares them if it is not packed.
    pub fn dense_weight(&self) -> Tensor {
        match &self.weight {
            FrozenWeight::Dense(weight) => weight.clone(),
            FrozenWeight::Blocks { .. } => {
                let rows: Vec<u32> = (0..self.out_features() as u32).collect();
                self.gather(&rows)
            }
        }
    }

    /// `x Wᵀ + b` for `x: [T, in]`, giving `[T, out]`.
    pub fn forward(&self, x: &Var) -> Var {
        let layer = self.clone();
        Var::computed(self.apply(x.value()), &[x], move |gradient, parents| {
            let carried = parents.take(0);
            parents.add(0, layer.input_gradient(&gradient, carried));
        })
    }

    /// [`forward`](Self::forward) without a graph.
    pub fn apply(&self, x: &Tensor) -> Tensor {
        let _part = crate::profile::part("frozen_linear");
        let [out_features, in_features] = self.shape();
        assert_eq!(x.cols(), in_features, "input has another width than the layer");
        on_device!(frozen::apply(self, x));
        let rows = x.rows();
        if x.dtype() == DType::F32 {
            return if !dense::are_few(rows) {
                self.apply_packed(x)
            } else {
                let part = few::Part { layer: self, updates: &[] };
                let mut out = few::products(x.data::<f32>(), rows, &[part]);
                Tensor::new(out.remove(0), [rows, out_features])
            };
        }
        dispatch!(x.dtype(), |E| {
            let mut out = Buffer::<E>::scratch(rows * out_features);
            let input = Mat::new(x.data::<E>(), rows, in_features);
            match &self.weight {
                FrozenWeight::Dense(weight) => gemm(
                    MatMut::new(&mut out, rows, out_features),
                    input,
                    Mat::new(weight.data::<E>(), out_features, in_features).t(),
                    1.0,
                    Write::Set,
                    Threads::All,
                ),
                FrozenWeight::Blocks { format, bytes, .. } => {
                    let mut tile = Buffer::<f32>::scratch(TILE_ROWS * in_features);
                    for first in (0..out_features).step_by(TILE_ROWS) {
                        let tile_rows = TILE_ROWS.min(out_features - first);
                        widen(*format, bytes, first, tile_rows, in_features, &mut tile);
                        let tile = Tensor::new(
                            tile[..tile_rows * in_features].to_vec(),
                            [tile_rows, in_features],
                        )
                        .to_dtype(x.dtype());
                        gemm(
                            MatMut::strided(&mut out[first..], rows, tile_rows, out_features),
                            input,
                            Mat::new(tile.data::<E>(), tile_rows, in_features).t(),
                            1.0,
                            Write::Set,
                            Threads::All,
                        );
                    }
                }
            }
            if let Some(bias) = &self.bias {
                let bias = bias.data::<E>();
                vectorize(
                    #[inline(always)]
                    || {
                        for row in out.chunks_exact_mut(out_features) {
                            simd::axpy(1.0, bias, row);
                        }
                    },
                );
            }
            Tensor::new(out, [rows, out_features])
        })
    }

    /// `dy W`, added to `carried` if there is one.
    pub(crate) fn input_gradient(&self, gradient: &Tensor, carried: Option<Tensor>) -> Tensor {
        let _part = crate::profile::part("frozen_linear backward");
        on_device!(frozen::input_gradient(self, gradient, carried.as_ref()));
        let [out_features, in_features] = self.shape();
        let rows = gradient.rows();
        if gradient.dtype() == DType::F32 && rows >= dense::FEWEST_ROWS {
            return self.input_gradient_packed(gradient, carried);
        }
        let write = if carried.is_some() { Write::Add } else { Write::Set };
        dispatch!(gradient.dtype(), |E| {
            let mut out = carried.unwrap_or_else(|| {
                Tensor::new(Buffer::<E>::scratch(rows * in_features), [rows, in_features])
            });
            let data = out.data_mut::<E>();
            match &self.weight {
                FrozenWeight::Dense(weight) => gemm(
                    MatMut::new(data, rows, in_features),
                    Mat::new(gradient.data::<E>(), rows, out_features),
                    Mat::new(weight.data::<E>(), out_features, in_features),
                    1.0,
                    write,
                    Threads::All,
                ),
                FrozenWeight::Blocks { format, bytes, .. } => {
                    let mut tile = Buffer::<f32>::scratch(TILE_ROWS * in_features);
                    let mut write = write;
                    for first in (0..out_features).step_by(TILE_ROWS) {
                        let tile_rows = TILE_ROWS.min(out_features - first);
                        widen(*format, bytes, first, tile_rows, in_features, &mut tile);
                        let tile = Tensor::new(
                            tile[..tile_rows * in_features].to_vec(),
                            [tile_rows, in_features],
                        )
                        .to_dtype(gradient.dtype());
                        gemm(
                            MatMut::new(data, rows, in_features),
                            Mat::strided(
                                &gradient.data::<E>()[first..],
                                rows,
                                tile_rows,
                                out_features,
                            ),
                            Mat::new(tile.data::<E>(), tile_rows, in_features),
                            1.0,
                            write,
                            Threads::All,
                        );
                        write = Write::Add;
                    }
                }
            }
            out
        })
    }

    /// [`apply`](Self::apply) in `f32` for many rows, the weight packed for the whole product.
    fn apply_packed(&self, x: &Tensor) -> Tensor {
        let [out_features, in_features] = self.shape();
        let panels = dense::packed_transpose(&self.dense_f32(), in_features);
        let right = Right::packed(&panels, in_features);
        let mut out = Buffer::<f32>::scratch(x.rows() * out_features);
        let x = x.data::<f32>();
        dense::by_blocks(x, in_features, right, &mut out, out_features, Write::Set);
        if let Some(bias) = &self.bias {
            let bias = bias.data::<f32>();
            for_each(chunks_mut(&mut out, out_features.max(1)), |_, row| {
                simd::add_scaled(1.0, bias, row);
            });
        }
        let rows = x.len() / in_features.max(1);
        Tensor::new(out, [rows, out_features])
    }

    /// [`input_gradient`](Self::input_gradient) likewise.
    fn input_gradient_packed(&self, gradient: &Tensor, carried: Option<Tensor>) -> Tensor {
        let [out_features, in_features] = self.shape();
        let rows = gradient.rows();
        let write = if carried.is_some() { Write::Add } else { Write::Set };
        let mut out = carried.unwrap_or_else(|| {
            Tensor::new(Buffer::<f32>::scratch(rows * in_features), [rows, in_features])
        });
        let panels = dense::packed_rows(&self.dense_f32(), in_features);
        let right = Right::packed(&panels, out_features);
        let gradient = gradient.data::<f32>();
        let sum = out.data_mut::<f32>();
        dense::by_blocks(gradient, out_features, right, sum, in_features, write);
        out
    }

    /// The weight in `f32`, widened if it is packed: `[out · in]`.
    pub(crate) fn dense_f32(&self) -> Dense<'_> {
        self.dense_rows(0, self.out_features())
    }

    /// `count` rows of the weight from row `first` on, likewise.
    pub(crate) fn dense_rows(&self, first: usize, count: usize) -> Dense<'_> {
        match &self.weight {
            FrozenWeight::Dense(weight) => {
                let cols = weight.cols();
                Dense::Kept(&weight.data::<f32>()[first * cols..(first + count) * cols])
            }
            FrozenWeight::Blocks { format, bytes, shape: [_, cols], .. } => {
                if *format == BlockFormat::F32
                    && let Ok(weight) = bytemuck::try_cast_slice::<u8, f32>(bytes)
                {
                    return Dense::Kept(&weight[first * cols..(first + count) * cols]);
                }
                let mut wide = Buffer::<f32>::scratch(count * cols);
                widen(*format, bytes, first, count, *cols, &mut wide);
                Dense::Widened(wide)
            }
        }
    }

    /// Rows `ids` of the weight as `[ids, in]`: an embedding look-up.
    ///
    /// # Panics
    /// If an id is not below the number of rows.
    pub fn gather(&self, ids: &[u32]) -> Tensor {
        on_device!(frozen::gather(self, ids));
        let [rows, cols] = self.shape();
        dispatch!(self.dtype(), |E| {
            let mut out = Buffer::<E>::scratch(ids.len() * cols);
            let mut wide = vec![0.0_f32; cols];
            for (out, &id) in out.chunks_exact_mut(cols.max(1)).zip(ids) {
                let id = id as usize;
                assert!(id < rows, "token id {id} is not below the vocabulary size {rows}");
                match &self.weight {
                    FrozenWeight::Dense(weight) => {
                        out.copy_from_slice(&weight.data::<E>()[id * cols..(id + 1) * cols]);
                    }
                    FrozenWeight::Blocks { format, bytes, .. } => {
                        widen(*format, bytes, id, 1, cols, &mut wide);
                        for (out, &value) in out.iter_mut().zip(&wide) {
                            *out = E::from(value);
                        }
                    }
                }
            }
            Tensor::new(out, [ids.len(), cols])
        })
    }
}

/// A weight in `f32`.
pub(crate) enum Dense<'a> {
    /// As the layer keeps it.
    Kept(&'a [f32]),
    /// Widened for one product.
    Widened(Buffer<f32>),
}

impl std::ops::Deref for Dense<'_> {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        match self {
            Dense::Kept(weight) => weight,
            Dense::Widened(weight) => weight,
        }
    }
}

/// Widens `rows` rows of a packed weight, from row `first` on.
fn widen(
    format: BlockFormat,
    bytes: &[u8],
    first: usize,
    rows: usize,
    cols: usize,
    out: &mut [f32],
) {
    let row_bytes = format.bytes_for(cols);
    let bytes = chunks(&bytes[first * row_bytes..(first + rows) * row_bytes], row_bytes);
    for_each((chunks_mut(out, cols), bytes), |_, (out, bytes)| {
        block::dequantize(format, bytes, out);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check;

    fn weight(out_features: usize, in_features: usize) -> Tensor {
        let values: Vec<f64> = (0..out_features * in_features)
            .map(|i| ((i * 37 + 11) % 101) as f64 / 50.0 - 1.0)
            .collect();
        Tensor::from_f64(DType::F64, &values, [out_features, in_features])
    }

    #[test]
    fn gradients_match_finite_differences() {
        let bias = Tensor::from_f64(DType::F64, &[0.5, -1.0, 2.0, 0.0, 1.0], [5]);
        let layer = FrozenLinear::new(FrozenWeight::Dense(weight(5, 3)), Some(bias));
        check::gradients(&[&[4, 3]], |x| layer.forward(&x[0]));
        check::gradients(&[&[4, 3]], |x| {
            crate::ops::elementwise::add(&layer.forward(&x[0]), layer.forward(&x[0]))
        });
    }

    #[test]
    fn no_rows_give_no_rows() {
        let dense = weight(32, 64).to_dtype(DType::F32);
        let mut bytes = Vec::new();
        crate::block::quantize(BlockFormat::Q8_0, dense.data::<f32>(), &mut bytes);
        let packed = FrozenWeight::Blocks {
            format: BlockFormat::Q8_0,
            bytes: bytes.into(),
            shape: [32, 64],
            dtype: DType::F32,
        };
        for layer in [FrozenLinear::dense(dense), FrozenLinear::new(packed, None)] {
            assert_eq!(layer.apply(&Tensor::zeros(DType::F32, [0, 64])).shape(), [0, 32]);
            let gradient = layer.input_gradient(&Tensor::zeros(DType::F32, [0, 32]), None);
            assert_eq!(gradient.shape(), [0, 64]);
        }
    }

    #[test]
    fn gather_reads_rows() {
        let layer = FrozenLinear::dense(weight(6, 4));
        let rows = layer.gather(&[5, 0]);
        let FrozenWeight::Dense(all) = layer.weight() else { panic!("dense") };
        assert_eq!(rows.to_f64()[..4], all.to_f64()[20..]);
        assert_eq!(rows.to_f64()[4..], all.to_f64()[..4]);
    }
}
