//! Keys and values of tokens already seen, so that generation computes each position once.

use hydralora_kernels::{DType, Tensor, dispatch};

/// Rows a cache grows by at least.
const SMALLEST_GROWTH: usize = 64;

/// The cache of one sequence over all layers.
#[derive(Clone)]
pub struct Cache {
    layers: Vec<LayerCache>,
    len: usize,
    /// Rows before the first token that an adapter put there.
    lead: usize,
}

/// Keys and values of one layer, `[capacity, kv_heads · head_dim]` with the first rows in use.
#[derive(Clone)]
pub(crate) struct LayerCache {
    keys: Tensor,
    values: Tensor,
    len: usize,
}

impl Cache {
    pub(crate) fn new(num_layers: usize, dtype: DType, width: usize) -> Self {
        let empty = || LayerCache {
            keys: Tensor::zeros(dtype, [0, width]),
            values: Tensor::zeros(dtype, [0, width]),
            len: 0,
        };
        Self { layers: (0..num_layers).map(|_| empty()).collect(), len: 0, lead: 0 }
    }

    /// Number of tokens held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets all but the first `len` tokens.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        if self.len == 0 {
            self.lead = 0;
        }
        let rows = self.rows();
        for layer in &mut self.layers {
            layer.len = layer.len.min(rows);
        }
    }

    /// Positions held: tokens, and what an adapter put before them.
    pub(crate) fn rows(&self) -> usize {
        self.lead + self.len
    }

    /// Notes that `rows` rows now stand before the first token.
    pub(crate) fn set_lead(&mut self, rows: usize) {
        self.lead = rows;
    }

    /// A copy with room for `more` tokens, so that it need not grow soon.
    #[must_use]
    pub fn fork(&self, more: usize) -> Self {
        let layers = self.layers.iter().map(|layer| layer.fork(more)).collect();
        Self { layers, ..*self }
    }

    pub(crate) fn layer(&self, index: usize) -> &LayerCache {
        &self.layers[index]
    }

    pub(crate) fn layer_mut(&mut self, index: usize) -> &mut LayerCache {
        &mut self.layers[index]
    }

    pub(crate) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }
}

impl LayerCache {
    fn fork(&self, more: usize) -> Self {
        let width = self.keys.cols();
        let copy = |side: &Tensor| {
            let mut copy = Tensor::zeros(side.dtype(), [self.len + more, width]);
            let used = self.len * width;
            dispatch!(side.dtype(), |E| {
                copy.data_mut::<E>()[..used].copy_from_slice(&side.data::<E>()[..used]);
            });
            copy
        };
        Self { keys: copy(&self.keys), values: copy(&self.values), len: self.len }
    }

    /// Appends `rows` rows given row-major.
    pub(crate) fn append<E: hydralora_kernels::TensorElement>(&mut self, keys: &[E], values: &[E]) {
        let width = self.keys.cols();
        let rows = keys.len() / width;
        let needed = self.len + rows;
        if needed > self.keys.rows() {
            let capacity = needed.max(self.keys.rows() * 2).max(SMALLEST_GROWTH);
            for side in [&mut self.keys, &mut self.values] {
                let mut grown = Tensor::zeros(side.dtype(), [capacity, width]);
                let used = self.len * width;
                grown.data_mut::<E>()[..used].copy_from_slice(&side.data::<E>()[..used]);
                *side = grown;
            }
        }
        for (side, new) in [(&mut self.keys, keys), (&mut self.values, values)] {
            side.data_mut::<E>()[self.len * width..needed * width].copy_from_slice(new);
        }
        self.len = needed;
    }

    /// The rows in use: keys, then values.
    pub(crate) fn rows<E: hydralora_kernels::TensorElement>(&self) -> (&[E], &[E]) {
        let used = self.len * self.keys.cols();
        (&self.keys.data::<E>()[..used], &self.values.data::<E>()[..used])
    }
}

impl std::fmt::Debug for Cache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let bytes: usize = self
            .layers
            .iter()
            .map(|layer| dispatch!(layer.keys.dtype(), |E| 2 * layer.keys.len() * size_of::<E>()))
            .sum();
        write!(f, "Cache({} tokens, {bytes} bytes)", self.len)
    }
}
