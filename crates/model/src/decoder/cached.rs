//! Passes over new tokens of sequences whose earlier tokens are cached, as in decoding.

use super::layers::{Attention, Forward, KeepGraph, Positions};
use super::lead::{Lead, offsets_within};
use super::{Decoder, Packed, check_finite};
use crate::adapter::{Adapter, Adapters, KeyValue, Order, Pass, joined};
use crate::cache::{Cache, Reached};
use crate::error::{Error, Result};
use hydralora_kernels::ops::attention::{AttentionConfig, Source, attend, stream as keys_stream};
use hydralora_kernels::ops::delta_net::{DeltaConfig, DeltaState, conv_step, delta_step};
use hydralora_kernels::ops::rows::{drop_rows, lead_offsets, select_rows};
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
        if self.outgrow_their_rotation(batch, caches) {
            return self.extend_anew(batch, caches, adapters, pass);
        }
        let _guard = no_grad();
        let starts: Vec<bool> = caches.iter().map(|cache| cache.rows() == 0).collect();
        let lead = self.common_lead(adapters, batch.offsets, &starts, pass)?;
        let past = |s: usize| if starts[s] { lead.rows() } else { caches[s].rows() };
        self.validate(batch, past)?;
        let offsets = lead_offsets(batch.offsets, lead.prompt_rows, &starts);
        let mut positions = Positions::default();
        for s in 0..caches.len() {
            let first = if starts[s] { lead.prefix_rows } else { caches[s].rows() };
            let rows = first..first + offsets[s + 1] - offsets[s];
            match caches[s].expected() {
                Some(tokens) => {
                    let lead =
                        if starts[s] { lead.rows() } else { caches[s].rows() - caches[s].len() };
                    let beyond = |turn: &usize| rows.end > *turn;
                    let turned = self.turns().filter(beyond).max().map_or(0, |turn| turn + 1);
                    positions.add_expecting(rows.clone(), (lead + tokens).max(turned));
                }
                None => positions.add(rows),
            }
        }
        let reached: Vec<Reached> = caches.iter().map(|cache| cache.history().reached()).collect();
        let mut attention = CachedAttention {
            offsets: &offsets,
            starts: &starts,
            prefix: &lead.prefix,
            caches,
            bound_by_memory: batch.tokens.len() < FEW_TOKENS && self.dtype == DType::F32,
        };
        let of_tokens = Adapters::of_sequences(adapters, batch.offsets);
        let embedded = |(_, rows, adapter): (usize, Range<usize>, &dyn Adapter)| {
            self.embed(adapter, &batch.tokens[rows])
        };
        let embeddings = joined(of_tokens.groups(batch.tokens.len()).map(embedded).collect());
        let h = lead.before(embeddings, batch.offsets, &starts);
        let adapters = Adapters::of_sequences(adapters, &offsets);
        pass.follow(Order::behind(&offsets, reached));
        let shared = self.shared(&adapters, pass, batch, (lead.prompt_rows, &starts), &h);
        let tables = self.rope_tables(&positions);
        let run = Forward { adapters, pass, tables, shared, rows: None };
        let h = self.run_layers(0..self.layers.len(), h, &run, &mut attention, &mut KeepGraph);
        let mut histories = pass.take_order().into_histories();
        for (s, cache) in caches.iter_mut().enumerate() {
            if starts[s] {
                cache.set_lead(lead.rows());
            }
            if let Some(of_pass) = histories.next() {
                cache.append_history(&of_pass);
            }
            cache.advance(&batch.tokens[batch.offsets[s]..batch.offsets[s + 1]]);
        }
        let h = self.final_norm(&h, &run.adapters);
        check_finite(h.value())?;
        Ok(drop_rows(&h, lead.prompt_rows, batch.offsets, &starts).into_value())
    }

    /// Tells whether `batch` makes a cached sequence longer than a context for which other rotary
    /// frequencies hold than for what is cached.
    fn outgrow_their_rotation(&self, batch: Packed<'_>, caches: &[Cache]) -> bool {
        let lengths = batch.offsets.windows(2).map(|w| w[1] - w[0]);
        caches.iter().zip(lengths).any(|(cache, more)| self.outgrows(cache, more))
    }

    /// Tells whether `more` tokens make the sequence in `cache` longer than a context for which other
    /// rotary frequencies hold than for what is cached: a pass then computes all of it again.
    pub fn outgrows(&self, cache: &Cache, more: usize) -> bool {
        let (held, all) = (cache.rows(), cache.rows() + more);
        let expected = cache.expected().map_or(0, |tokens| held - cache.len() + tokens);
        self.turns().any(|turn| held > 0 && held.max(expected) <= turn && all > turn)
    }

    /// Tells whether what is cached of a token depends on how long its sequence is.
    pub fn depends_on_length(&self) -> bool {
        self.rotations.iter().any(|rotation| rotation.config.depends_on_length())
    }

    /// The lengths beyond which other frequencies hold.
    pub(super) fn turns(&self) -> impl Iterator<Item = usize> {
        self.rotations.iter().filter_map(|rotation| rotation.config.changes_after())
    }

    /// Extends sequences whose cached tokens are computed again, since none of what is cached holds for
    /// the longer ones. It happens once in the life of a sequence.
    fn extend_anew(
        &self,
        batch: Packed<'_>,
        caches: &mut [Cache],
        adapters: &[&dyn Adapter],
        pass: &Pass<'_>,
    ) -> Result<Tensor> {
        let (mut tokens, mut offsets, mut wanted) = (Vec::new(), vec![0], Vec::new());
        let mut emptied = Vec::with_capacity(caches.len());
        for (cache, w) in caches.iter().zip(batch.offsets.windows(2)) {
            tokens.extend_from_slice(cache.tokens());
            let first = tokens.len();
            tokens.extend_from_slice(&batch.tokens[w[0]..w[1]]);
            wanted.extend(first..tokens.len());
            offsets.push(tokens.len());
            emptied.push(cache.emptied());
        }
        let whole = Packed { tokens: &tokens, offsets: &offsets };
        let hidden = self.extend_each(whole, &mut emptied, adapters, pass)?;
        caches.clone_from_slice(&emptied);
        Ok(select_rows(&hidden, &wanted))
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
            return Ok(self.lead(adapter, pass));
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
        let keys = self.caches.iter().map(|cache| cache.layer(layer).keys_ahead());
        let keys = keys.filter(|keys| !keys.is_empty());
        keys.fold(Stream::default(), |all, keys| all.then(&keys_stream(keys, config)))
    }

    fn attend(&mut self, layer: usize, config: AttentionConfig, [q, k, v]: [Var; 3]) -> Var {
        let (k, v) = (k.value(), v.value());
        let kv_width = k.cols();
        dispatch!(k.dtype(), |E| {
            for (cache, w) in self.caches.iter_mut().zip(self.offsets.windows(2)) {
                let rows = w[0] * kv_width..w[1] * kv_width;
                let (k, v) = (&k.data::<E>()[rows.clone()], &v.data::<E>()[rows]);
                cache.layer_mut(layer).append(k, v);
            }
        });
        self.attend_to(layer, config, &q)
    }

    fn convolve(&mut self, layer: usize, x: &Var, weight: &Var, rows: Range<usize>) -> Var {
        let (sequences, offsets) = offsets_within(self.offsets, &rows);
        let mut states: Vec<&mut DeltaState> =
            self.caches[sequences].iter_mut().map(|cache| cache.state_mut(layer)).collect();
        Var::constant(conv_step(x.value(), weight.value(), &offsets, &mut states))
    }

    fn delta(&mut self, layer: usize, config: DeltaConfig, inputs: [&Var; 3]) -> Var {
        let [qkv, decay, beta] = inputs.map(Var::value);
        let mut states: Vec<&mut DeltaState> =
            self.caches.iter_mut().map(|cache| cache.state_mut(layer)).collect();
        Var::constant(delta_step(qkv, decay, beta, config, self.offsets, &mut states))
    }

    /// A cache keeps them anyway.
    fn share(&mut self, _layer: usize, _keys: &Var, _values: &Var) {}

    fn attend_again(
        &mut self,
        _layer: usize,
        owner: usize,
        config: AttentionConfig,
        q: Var,
    ) -> Var {
        self.attend_to(owner, config, &q)
    }
}

impl CachedAttention<'_> {
    /// Attends to what layer `owner` has cached, this pass's rows included.
    fn attend_to(&self, owner: usize, config: AttentionConfig, q: &Var) -> Var {
        let q = q.value();
        let width = q.cols();
        dispatch!(q.dtype(), |E| {
            let stored: Vec<_> =
                self.caches.iter().map(|cache| cache.layer(owner).rows::<E>()).collect();
            let mut sources: Vec<Source<'_, E>> = Vec::with_capacity(self.caches.len());
            for ([keys, values], w) in stored.iter().zip(self.offsets.windows(2)) {
                let queries = &q.data::<E>()[w[0] * width..w[1] * width];
                sources.push(Source { queries, keys, values });
            }
            let mut out = Tensor::zeros(q.dtype(), q.shape());
            attend(&sources, out.data_mut::<E>(), config);
            Var::constant(out)
        })
    }
}
