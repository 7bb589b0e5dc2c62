//! Positions that an adapter puts before every sequence, and where the rows of fresh sequences stand
//! behind them.

use super::Decoder;
use super::layers::{Attention, RopeTables};
use crate::adapter::{Adapter, KeyValue, Pass};
use hydralora_kernels::Var;
use hydralora_kernels::ops::attention::{AttentionConfig, Span, causal_attention, spans};
use hydralora_kernels::ops::rows::{lead_offsets, prepend_rows};

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
    positions: Vec<u32>,
    spans: Vec<Span>,
}

impl Placed {
    /// Places sequences behind `lead`.
    pub(super) fn new(offsets: &[usize], lead: &Lead) -> Self {
        let starts = vec![true; offsets.len() - 1];
        let offsets = lead_offsets(offsets, lead.prompt_rows, &starts);
        let first = lead.prefix_rows;
        let positions: Vec<u32> = offsets
            .windows(2)
            .flat_map(|w| (first..first + w[1] - w[0]).map(|p| p as u32))
            .collect();
        let keys = lead_offsets(&offsets, first, &starts);
        let spans: Vec<Span> = (spans(&offsets).into_iter().zip(keys.windows(2)))
            .map(|(span, w)| Span { keys: w[0]..w[1], ..span })
            .collect();
        Self { starts, offsets, positions, spans }
    }

    pub(super) fn rope_tables(&self, decoder: &Decoder) -> RopeTables {
        decoder.rope_tables(&self.positions)
    }
}

/// Attention among the rows of a pass, and to the keys that an adapter puts before them.
pub(super) struct PackedAttention<'a> {
    pub(super) placed: &'a Placed,
    /// One entry per layer.
    pub(super) prefix: &'a [Option<KeyValue>],
}

impl Attention for PackedAttention<'_> {
    fn attend(&mut self, layer: usize, config: AttentionConfig, [q, k, v]: [Var; 3]) -> Var {
        let Placed { spans, offsets, starts, .. } = self.placed;
        let Some(KeyValue { keys, values }) = &self.prefix[layer] else {
            return causal_attention(&q, &k, &v, spans, config);
        };
        let k = prepend_rows(keys, &k, offsets, starts);
        let v = prepend_rows(values, &v, offsets, starts);
        causal_attention(&q, &k, &v, spans, config)
    }
}
