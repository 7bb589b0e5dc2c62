//! The seam through which a fine-tuning method changes the frozen decoder.
//!
//! The decoder knows this trait and nothing else about fine-tuning: it hands every linear layer,
//! with the name it has in the checkpoint, to the adapter and uses what comes back.

use hydralora_kernels::ops::adapted_linear::adapted_linears;
use hydralora_kernels::ops::frozen_linear::FrozenLinear;
use hydralora_kernels::{Tensor, Var};
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::str::FromStr;

/// A linear layer inside a decoder layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Projection {
    /// Attention queries.
    Query,
    /// Attention keys.
    Key,
    /// Attention values.
    Value,
    /// Attention output.
    Output,
    /// Gate of the feed-forward block.
    Gate,
    /// Up-projection of the feed-forward block.
    Up,
    /// Down-projection of the feed-forward block.
    Down,
}

impl Projection {
    /// All projections, in the order a layer computes them.
    pub const ALL: [Projection; 7] = [
        Projection::Query,
        Projection::Key,
        Projection::Value,
        Projection::Output,
        Projection::Gate,
        Projection::Up,
        Projection::Down,
    ];

    /// The last part of the checkpoint name, `q_proj` … `down_proj`.
    pub fn name(self) -> &'static str {
        match self {
            Projection::Query => "q_proj",
            Projection::Key => "k_proj",
            Projection::Value => "v_proj",
            Projection::Output => "o_proj",
            Projection::Gate => "gate_proj",
            Projection::Up => "up_proj",
            Projection::Down => "down_proj",
        }
    }

    /// Whether the layer belongs to the attention block rather than the feed-forward block.
    pub fn is_attention(self) -> bool {
        matches!(self, Projection::Query | Projection::Key | Projection::Value | Projection::Output)
    }

    /// The block's name in the checkpoint, `self_attn` or `mlp`.
    pub fn block(self) -> &'static str {
        if self.is_attention() { "self_attn" } else { "mlp" }
    }
}

/// One linear layer of the decoder, displayed as its checkpoint name
/// (`model.layers.3.mlp.gate_proj`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Site {
    /// Index of the decoder layer.
    pub layer: usize,
    /// Which linear layer of it.
    pub projection: Projection,
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { layer, projection } = self;
        write!(f, "model.layers.{layer}.{}.{}", projection.block(), projection.name())
    }
}

impl FromStr for Site {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        let rest = name.strip_prefix("model.layers.").ok_or(())?;
        let (layer, rest) = rest.split_once('.').ok_or(())?;
        let layer = layer.parse().map_err(|_| ())?;
        let projection = Projection::ALL
            .into_iter()
            .find(|p| {
                rest.strip_prefix(p.block()).and_then(|r| r.strip_prefix('.')) == Some(p.name())
            })
            .ok_or(())?;
        Ok(Site { layer, projection })
    }
}

/// A site and the widths of its layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SiteShape {
    /// Which layer.
    pub site: Site,
    /// Input width.
    pub in_features: usize,
    /// Output width.
    pub out_features: usize,
}

/// One norm of the decoder, displayed as its checkpoint name (`model.layers.3.input_layernorm`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NormSite {
    /// Before the attention block of a layer.
    Input(usize),
    /// Before the feed-forward block of a layer.
    PostAttention(usize),
    /// Before the output layer.
    Final,
}

impl fmt::Display for NormSite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NormSite::Input(layer) => write!(f, "model.layers.{layer}.input_layernorm"),
            NormSite::PostAttention(layer) => {
                write!(f, "model.layers.{layer}.post_attention_layernorm")
            }
            NormSite::Final => write!(f, "model.norm"),
        }
    }
}

/// Keys and values of learned positions, each `[p, kv_heads · head_dim]`. The keys are used as they
/// are, without rotation.
#[derive(Clone)]
pub struct KeyValue {
    /// The keys.
    pub keys: Var,
    /// The values, of the same shape.
    pub values: Var,
}

/// What a fine-tuning method may change in the frozen decoder.
pub trait Adapter: Send + Sync {
    /// The layer at `site` applied to `x: [T, in]`, giving `[T, out]`.
    fn linear(&self, site: Site, x: &Var, frozen: &FrozenLinear, pass: &Pass<'_>) -> Var {
        let _ = (site, pass);
        frozen.forward(x)
    }

    /// The layers at several sites of one decoder layer, all applied to `x`: as [`linear`](Self::linear)
    /// of each, perhaps sooner.
    fn linears(&self, layers: &[(Site, &FrozenLinear)], x: &Var, pass: &Pass<'_>) -> Vec<Var> {
        layers.iter().map(|(site, frozen)| self.linear(*site, x, frozen, pass)).collect()
    }

    /// Embeddings `[T, hidden_size]` of `tokens`.
    fn embed(&self, tokens: &[u32], frozen: &FrozenLinear) -> Var {
        Var::constant(frozen.gather(tokens))
    }

    /// The weight of the norm at `site`.
    fn norm<'a>(&'a self, site: NormSite, frozen: &'a Var) -> &'a Var {
        let _ = site;
        frozen
    }

    /// The weight `[vocab_size, hidden_size]` of the output layer, where it is not the frozen one.
    fn head(&self) -> Option<&Var> {
        None
    }

    /// Whether what [`linear`](Self::linear) does to a row depends on that row alone, so that it may
    /// be given some rows of the batch instead of all.
    fn rows_stand_alone(&self) -> bool {
        false
    }

    /// Embeddings `[p, hidden_size]` put before every sequence as if they were tokens; their rows
    /// are taken out of the final hidden states again.
    fn prompt(&self, pass: &Pass<'_>) -> Option<Var> {
        let _ = pass;
        None
    }

    /// Keys and values put before those of every sequence in layer `layer`, the same number in
    /// every layer; tokens then start at position `p`.
    fn prefix(&self, layer: usize, pass: &Pass<'_>) -> Option<KeyValue> {
        let _ = (layer, pass);
        None
    }
}

/// The frozen decoder as it is.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoAdapter;

impl Adapter for NoAdapter {
    fn linears(&self, layers: &[(Site, &FrozenLinear)], x: &Var, _: &Pass<'_>) -> Vec<Var> {
        frozen_linears(layers, x)
    }

    fn rows_stand_alone(&self) -> bool {
        true
    }
}

/// [`Adapter::linears`] of layers that no method changes.
pub fn frozen_linears(layers: &[(Site, &FrozenLinear)], x: &Var) -> Vec<Var> {
    let layers: Vec<_> = layers.iter().map(|(_, frozen)| (*frozen, None)).collect();
    adapted_linears(x, &layers).into_iter().map(|output| output.y).collect()
}

/// Sees the gates of routed adapters as they are computed.
pub trait GateObserver {
    /// `gates: [T, N]`, one row per token of the pass, each summing to 1.
    fn observe(&self, site: Site, gates: &Tensor);
}

/// Where the sequences of a pass lie and what they are about.
#[derive(Clone, Copy, Debug)]
pub struct Sequences<'a> {
    /// Where each sequence starts, and the total: one entry more than there are sequences.
    pub offsets: &'a [usize],
    /// The domain of each sequence.
    pub domains: &'a [u32],
}

/// One run through the decoder: what is the same for all layers of it.
#[derive(Default)]
pub struct Pass<'a> {
    dropout_seed: Option<u64>,
    observer: Option<&'a dyn GateObserver>,
    sequences: Option<Sequences<'a>>,
    checkpointing: bool,
    shared: RefCell<HashMap<(usize, &'static str), Var>>,
    set_aside: RefCell<BTreeMap<Site, Var>>,
}

impl<'a> Pass<'a> {
    /// Evaluation: no dropout.
    pub fn inference() -> Self {
        Self::default()
    }

    /// Training: dropout masks are drawn from `seed`, which differs for every micro-batch.
    pub fn training(seed: u64) -> Self {
        Self { dropout_seed: Some(seed), ..Self::default() }
    }

    /// Shows the gates of this pass to `observer`.
    #[must_use]
    pub fn observed_by(mut self, observer: &'a dyn GateObserver) -> Self {
        self.observer = Some(observer);
        self
    }

    /// Says where the sequences of this pass lie and which domain each belongs to.
    #[must_use]
    pub fn of_sequences(mut self, offsets: &'a [usize], domains: &'a [u32]) -> Self {
        self.sequences = Some(Sequences { offsets, domains });
        self
    }

    /// Says whether layers keep only their inputs for the way back and compute the rest again.
    #[must_use]
    pub fn checkpointing(mut self, on: bool) -> Self {
        self.checkpointing = on;
        self
    }

    /// Whether layers keep only their inputs for the way back.
    pub fn keeps_layer_inputs_only(&self) -> bool {
        self.checkpointing
    }

    /// The sequences of this pass, if they were described.
    pub fn sequences(&self) -> Option<Sequences<'a>> {
        self.sequences
    }

    /// Keeps a value an adapter computed at `site` for a loss term of its own.
    pub fn set_aside(&self, site: Site, value: Var) {
        self.set_aside.borrow_mut().insert(site, value);
    }

    /// Takes out all values that were set aside, by site.
    pub fn take_set_aside(&self) -> BTreeMap<Site, Var> {
        self.set_aside.take()
    }

    /// The seed of this pass's dropout masks, if it trains.
    pub fn dropout_seed(&self) -> Option<u64> {
        self.dropout_seed
    }

    /// Reports the gates used at `site`.
    pub fn report_gates(&self, site: Site, gates: &Tensor) {
        if let Some(observer) = self.observer {
            observer.observe(site, gates);
        }
    }

    /// Keeps what was set aside as mere values, without the activations they were computed from.
    pub(crate) fn detach_set_aside(&self) {
        for value in self.set_aside.borrow_mut().values_mut() {
            *value = value.detach();
        }
    }

    /// Drops the values adapters share within a layer, which is about to be computed again.
    pub(crate) fn forget_shared(&self) {
        self.shared.borrow_mut().clear();
    }

    /// A value an adapter computed earlier in this pass for the same layer, or `compute`d now.
    pub fn shared(&self, layer: usize, name: &'static str, compute: impl FnOnce() -> Var) -> Var {
        if let Some(value) = self.shared.borrow().get(&(layer, name)) {
            return value.clone();
        }
        let value = compute();
        self.shared.borrow_mut().insert((layer, name), value.clone());
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for projection in Projection::ALL {
            let site = Site { layer: 12, projection };
            assert_eq!(site.to_string().parse(), Ok(site));
        }
        assert_eq!(
            Site { layer: 3, projection: Projection::Gate }.to_string(),
            "model.layers.3.mlp.gate_proj"
        );
        for wrong in ["model.layers.3.mlp.q_proj", "model.layers.x.mlp.up_proj", "lm_head"] {
            assert_eq!(wrong.parse::<Site>(), Err(()));
        }
    }
}
