//! Passes over new tokens of sequences whose earlier tokens are cached, as in decoding.

use super::layers::{Attention, Forward, KeepGraph};
use super::lead::Lead;
use super::{Decoder, Packed, check_finite};
use crate::adapter::{Adapter, Adapters, KeyValue, Pass, joined};
use crate::cache::{Cache, LayerCache};
use crate::error::{Error, Result};
use hydralora_kernels::ops::attention::{AttentionConfig, Source, attend, stream as keys_stream};
use hydralora_kernels::ops::rows::{drop_rows, lead_offsets};
use hydralora_kernels::{DType, Tensor, Var, dispatch, no_grad};
use hydralora_runtime::Stream;
use std::ops::Range;

/// Tokens below which a pass is bound by reading the weights.
pub(super) const FEW_TOKENS: usize = 8;

impl Decoder {
    /// Feeds new tokens to sequences whose earlier tokens are in `caches` (one per sequence) and
    /// gives the final hidden states `[T, hidden_size]` of the new tokens.
    ///
    /// # Errors
    /// As [`hidden`](Self::hidden), counting the cached tokens.
    pub fn extend(
        &self,
        batch: Packed<'_>,
        caches: &mut [Cache],
        adapter: &dyn Adapter,
        pass: &Pass<'_>,
    ) -> Result<Tensor> {
        self.extend_each(batch, caches, &vec![adapter; caches.len()], pass)
    }

    /// [`extend`](Self::extend) with an adapter of its own for each sequence. The base's weights are
    /// read once for all of them; a sequence's result does not depend on the others.
    ///
    /// # Errors
    /// As [`extend`](Self::extend), and if one of several adapters puts learned positions before a
    /// sequence that starts here: such a sequence starts in a pass of its own.
    pub fn extend_each(
        &self,
        batch: Packed<'_>,
        caches: &mut [Cache],
        adapters: &[&dyn Adapter],
        pass: &Pass<'_>,
    ) -> Result<Tensor> {
        assert_eq!(caches.len() + 1, batch.offsets.len(), "one cache per sequence");
        assert_eq!(caches.len(), adapters.len(), "one adapter per sequence");
        let _guard = no_grad();
        let starts: Vec<bool> = caches.iter().map(|cache| cache.rows() == 0).collect();
        let lead = self.common_lead(adapters, batch.offsets, &starts, pass)?;
        let past = |s: usize| if starts[s] { lead.rows() } else { caches[s].rows() };
        self.validate(batch, past)?;
        let offsets = lead_offsets(batch.offsets, lead.prompt_rows, &starts);
        let positions: Vec<u32> = (0..caches.len())
            .flat_map(|s| {
                let first = if starts[s] { lead.prefix_rows } else { caches[s].rows() };
                first..first + offsets[s + 1] - offsets[s]
            })
            .map(|position| position as u32)
            .collect();
        let run = Forward {
            adapters: Adapters::of_sequences(adapters, &offsets),
            pass,
            tables: self.rope_tables(&positions),
            rows: None,
        };
        let of_tokens = Adapters::of_sequences(adapters, batch.offsets);
        let mut attention = CachedAttention {
            offsets: &offsets,
            starts: &starts,
            prefix: &lead.prefix,
            caches,
            bound_by_memory: batch.tokens.len() < FEW_TOKENS && self.dtype == DType::F32,
        };
        let embedded = |(_, rows, adapter): (usize, Range<usize>, &dyn Adapter)| {
            adapter.embed(&batch.tokens[rows], &self.embedding)
        };
        let embeddings = joined(of_tokens.groups(batch.tokens.len()).map(embedded).collect());
        let h = lead.before(embeddings, batch.offsets, &starts);
        let h = self.run_layers(0..self.layers.len(), h, &run, &mut attention, &mut KeepGraph);
        for (s, cache) in caches.iter_mut().enumerate() {
            if starts[s] {
                cache.set_lead(lead.rows());
            }
            cache.advance(batch.offsets[s + 1] - batch.offsets[s]);
        }
        let h = self.final_norm(&h, &run.adapters);
        check_finite(h.value())?;
        Ok(drop_rows(&h, lead.prompt_rows, batch.offsets, &starts).into_value())
    }

    /// What the adapter puts before the sequences that start; several adapters put nothing.
    fn common_lead(
        &self,
        adapters: &[&dyn Adapter],
        offsets: &[usize],
        starts: &[bool],
        pass: &Pass<'_>,
    ) -> Result<Lead> {
        let none = || Lead::none(self.layers.len());
        let starting: Vec<&dyn Adapter> =
            adapters.iter().zip(starts).filter(|(_, start)| **start).map(|(a, _)| *a).collect();
        if starting.is_empty() {
            return Ok(none());
        }
        if let Adapters::One(adapter) = Adapters::of_sequences(adapters, offsets) {
            return Ok(Lead::of(adapter, self.layers.len(), pass));
        }
        if starting.iter().any(|adapter| self.lead_rows(*adapter, pass) > 0) {
            return Err(Error::LeadNeedsOwnPass);
        }
        Ok(none())
    }
}

/// Attention to the keys in caches, which take up those of the pass.
struct CachedAttention<'a> {
    offsets: &'a [usize],
    /// The sequences that start here.
    starts: &'a [bool],
    /// What an adapter puts before those, by layer.
    prefix: &'a [Option<KeyValue>],
    caches: &'a mut [Cache],
    bound_by_memory: bool,
}

impl Attention for CachedAttention<'_> {
    fn begin(&mut self, layer: usize) {
        let Some(KeyValue { keys, values }) = &self.prefix[layer] else { return };
        let (keys, values) = (keys.value(), values.value());
        for (cache, _) in self.caches.iter_mut().zip(self.starts).filter(|(_, start)| **start) {
            let cache = cache.layer_mut(layer);
            dispatch!(keys.dtype(), |E| cache.append(keys.data::<E>(), values.data::<E>()));
        }
    }

    fn is_bound_by_memory(&self) -> bool {
        self.bound_by_memory
    }

    fn keys(&self, layer: usize, config: AttentionConfig) -> Stream {
        let keys = self.caches.iter().map(|cache| cache.layer(layer).rows().0);
        keys.fold(Stream::default(), |all, keys| all.then(&keys_stream(keys, config)))
    }

    fn attend(&mut self, layer: usize, config: AttentionConfig, [q, k, v]: [Var; 3]) -> Var {
        let (q, k, v) = (q.value(), k.value(), v.value());
        let (width, kv_width) = (q.cols(), k.cols());
        let offsets = self.offsets;
        dispatch!(q.dtype(), |E| {
            let mut caches: Vec<&mut LayerCache> =
                self.caches.iter_mut().map(|cache| cache.layer_mut(layer)).collect();
            for (cache, w) in caches.iter_mut().zip(offsets.windows(2)) {
                let rows = w[0] * kv_width..w[1] * kv_width;
                cache.append(&k.data::<E>()[rows.clone()], &v.data::<E>()[rows]);
            }
            let sources: Vec<Source<'_, E>> = caches
                .iter()
                .zip(offsets.windows(2))
                .map(|(cache, w)| {
                    let (keys, values) = cache.rows();
                    Source { queries: &q.data::<E>()[w[0] * width..w[1] * width], keys, values }
                })
                .collect();
            let mut out = Tensor::zeros(q.dtype(), q.shape());
            attend(&sources, out.data_mut::<E>(), config);
            Var::constant(out)
        })
    }
}
