//! Positions that an adapter puts before every sequence, and where the rows of fresh sequences stand
//! behind them.

use super::Decoder;
use super::layers::{Attention, Positions, RopeTables};
use crate::adapter::{Adapter, KeyValue, Pass};
use hydralora_kernels::ops::attention::{AttentionConfig, Span, causal_attention, spans};
use hydralora_kernels::ops::delta_net::{DeltaConfig, causal_conv, gated_delta_rule_joined};
use hydralora_kernels::ops::rows::{lead_offsets, prepend_rows};
use hydralora_kernels::{Gradients, Tensor, Var};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;

/// What an adapter puts before every sequence.
pub(super) struct Lead {
    pub(super) prompt: Option<Var>,
    pub(super) prompt_rows: usize,
    /// One entry per layer.
    pub(super) prefix: Vec<Option<KeyValue>>,
    pub(super) prefix_rows: usize,
}

impl Lead {
    pub(super) fn none(layers: usize) -> Self {
        Self { prompt: None, prompt_rows: 0, prefix: vec![None; layers], prefix_rows: 0 }
    }

    pub(super) fn of(adapter: &dyn Adapter, layers: usize, pass: &Pass<'_>) -> Self {
        let prompt = adapter.prompt(pass);
        let prefix: Vec<Option<KeyValue>> =
            (0..layers).map(|layer| adapter.prefix(layer, pass)).collect();
        let rows = |part: &Option<KeyValue>| part.as_ref().map_or(0, |p| p.keys.value().rows());
        let prefix_rows = prefix.first().map_or(0, rows);
        assert!(
            prefix.iter().all(|part| rows(part) == prefix_rows),
            "every layer has as many leading keys"
        );
        let prompt_rows = prompt.as_ref().map_or(0, |prompt| prompt.value().rows());
        Self { prompt, prompt_rows, prefix, prefix_rows }
    }

    /// Positions before a sequence's first token.
    pub(super) fn rows(&self) -> usize {
        self.prompt_rows + self.prefix_rows
    }

    /// The embeddings of packed tokens, behind the prompt where a sequence starts.
    pub(super) fn before(&self, embeddings: Var, offsets: &[usize], starts: &[bool]) -> Var {
        match &self.prompt {
            Some(prompt) => prepend_rows(prompt, &embeddings, offsets, starts),
            None => embeddings,
        }
    }
}

/// Where the rows of fresh sequences stand.
pub(super) struct Placed {
    /// All true: every sequence starts here.
    pub(super) starts: Vec<bool>,
    /// Of the rows with the prompt's.
    offsets: Vec<usize>,
    positions: Positions,
    spans: Vec<Span>,
}

impl Placed {
    /// Places sequences behind `lead`.
    pub(super) fn new(offsets: &[usize], lead: &Lead) -> Self {
        let starts = vec![true; offsets.len() - 1];
        let offsets = lead_offsets(offsets, lead.prompt_rows, &starts);
        let first = lead.prefix_rows;
        let mut positions = Positions::default();
        offsets.windows(2).for_each(|w| positions.add(first..first + w[1] - w[0]));
        let keys = lead_offsets(&offsets, first, &starts);
        let spans: Vec<Span> = (spans(&offsets).into_iter().zip(keys.windows(2)))
            .map(|(span, w)| Span { keys: w[0]..w[1], ..span })
            .collect();
        Self { starts, offsets, positions, spans }
    }

    /// Where each sequence starts among the rows, and the total.
    pub(super) fn offsets(&self) -> &[usize] {
        &self.offsets
    }

    pub(super) fn rope_tables(&self, decoder: &Decoder) -> RopeTables {
        decoder.rope_tables(&self.positions)
    }
}

/// The sequences that make up `rows`, and where they begin in these.
pub(super) fn offsets_within(offsets: &[usize], rows: &Range<usize>) -> (Range<usize>, Vec<usize>) {
    let first = offsets.partition_point(|&offset| offset < rows.start);
    let last = offsets.partition_point(|&offset| offset < rows.end);
    let within = offsets[first..=last].iter().map(|offset| offset - rows.start).collect();
    (first..last, within)
}

/// Keys and values that later layers use again, by the layer that computed them.
#[derive(Default)]
pub(super) struct SharedKeys {
    kept: BTreeMap<usize, [Var; 2]>,
    /// Whether layers will be computed again: what is kept is then cut off from the layer it is of.
    cut_off: bool,
    /// What a layer gave when it was computed again.
    again: BTreeMap<usize, [Var; 2]>,
}

impl SharedKeys {
    /// For a pass whose layers are computed again on the way back.
    pub(super) fn cut_off() -> Self {
        Self { cut_off: true, ..Self::default() }
    }

    fn keep(&mut self, layer: usize, pair: [Var; 2]) {
        if !self.cut_off {
            self.kept.insert(layer, pair);
            return;
        }
        match self.kept.entry(layer) {
            Entry::Occupied(_) => {
                self.again.insert(layer, pair);
            }
            // The layer's input was cut off too: whether a gradient is wanted shows only on the way back.
            Entry::Vacant(free) => {
                free.insert(pair.map(|var| Var::leaf(var.into_value())));
            }
        }
    }

    /// What layer `layer` gave when it was computed again, with the gradients that later layers left.
    pub(super) fn seeds_of(
        &mut self,
        layer: usize,
        gradients: &mut Gradients,
    ) -> Vec<(Var, Tensor)> {
        let (Some(again), Some(kept)) = (self.again.remove(&layer), self.kept.get(&layer)) else {
            return Vec::new();
        };
        let pairs = again.into_iter().zip(kept);
        pairs.filter_map(|(again, leaf)| Some((again, gradients.take(leaf)?))).collect()
    }
}

/// Attention among the rows of a pass, and to the keys that an adapter puts before them.
pub(super) struct PackedAttention<'a> {
    placed: &'a Placed,
    /// One entry per layer.
    prefix: &'a [Option<KeyValue>],
    pub(super) shared: SharedKeys,
}

impl<'a> PackedAttention<'a> {
    pub(super) fn new(
        placed: &'a Placed,
        prefix: &'a [Option<KeyValue>],
        shared: SharedKeys,
    ) -> Self {
        Self { placed, prefix, shared }
    }

    /// Attends to keys and values behind the prefix of layer `owner`.
    fn behind_prefix(&self, owner: usize, config: AttentionConfig, [q, k, v]: [&Var; 3]) -> Var {
        let Placed { spans, offsets, starts, .. } = self.placed;
        let Some(KeyValue { keys, values }) = &self.prefix[owner] else {
            return causal_attention(q, k, v, spans, config);
        };
        let k = prepend_rows(keys, k, offsets, starts);
        let v = prepend_rows(values, v, offsets, starts);
        causal_attention(q, &k, &v, spans, config)
    }
}

impl Attention for PackedAttention<'_> {
    fn attend(&mut self, layer: usize, config: AttentionConfig, [q, k, v]: [Var; 3]) -> Var {
        self.behind_prefix(layer, config, [&q, &k, &v])
    }

    fn convolve(&mut self, _layer: usize, x: &Var, weight: &Var, rows: Range<usize>) -> Var {
        causal_conv(x, weight, &[], &offsets_within(&self.placed.offsets, &rows).1)
    }

    fn delta(&mut self, _layer: usize, config: DeltaConfig, inputs: [&Var; 3]) -> Var {
        let [qkv, decay, beta] = inputs;
        gated_delta_rule_joined(qkv, decay, beta, config, &self.placed.offsets, &[])
    }

    fn share(&mut self, layer: usize, keys: &Var, values: &Var) {
        self.shared.keep(layer, [keys.clone(), values.clone()]);
    }

    fn attend_again(
        &mut self,
        _layer: usize,
        owner: usize,
        config: AttentionConfig,
        q: Var,
    ) -> Var {
        let [k, v] = self.shared.kept[&owner].clone();
        self.behind_prefix(owner, config, [&q, &k, &v])
    }
}
