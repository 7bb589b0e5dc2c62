//! What a family's code is written with: names that many families share, and a decoder layer during a
//! pass.

use crate::adapter::{self, Adapters, Pass};
use crate::config::{ModelConfig, RopeConfig};
use crate::decoder::layers::{Attention, Following, Layer, Recorder, Step, norm};
use crate::site::{Kind, Linear};
use hydralora_kernels::Var;
use hydralora_kernels::ops::attention::AttentionConfig;
use hydralora_kernels::ops::elementwise::add;
use hydralora_kernels::ops::frozen_linear::FrozenLinear;
use hydralora_kernels::ops::rope::{RopeTable, rope};
use hydralora_kernels::ops::rows::take_rows;
use hydralora_kernels::ops::swiglu::swiglu;

/// Query projection.
pub static Q_PROJ: Linear = Linear::new("self_attn.q_proj", Kind::QUERY, 10);
/// Key projection.
pub static K_PROJ: Linear = Linear::new("self_attn.k_proj", Kind::KEY, 20);
/// Value projection.
pub static V_PROJ: Linear = Linear::new("self_attn.v_proj", Kind::VALUE, 30);
/// Output projection of the attention block.
pub static O_PROJ: Linear = Linear::new("self_attn.o_proj", Kind::OUTPUT, 40);
/// Gate of the feed-forward block.
pub static GATE_PROJ: Linear = Linear::new("mlp.gate_proj", Kind::GATE, 50);
/// Up-projection of the feed-forward block.
pub static UP_PROJ: Linear = Linear::new("mlp.up_proj", Kind::UP, 60);
/// Down-projection of the feed-forward block.
pub static DOWN_PROJ: Linear = Linear::new("mlp.down_proj", Kind::DOWN, 70);

/// The seven linear layers of Llama's decoder layer.
pub static LLAMA_LINEARS: &[&Linear] =
    &[&Q_PROJ, &K_PROJ, &V_PROJ, &O_PROJ, &GATE_PROJ, &UP_PROJ, &DOWN_PROJ];

/// Norm before the attention block.
pub const INPUT_NORM: &str = "input_layernorm";
/// Norm before the feed-forward block.
pub const POST_ATTENTION_NORM: &str = "post_attention_layernorm";

/// What one decoder layer consists of.
#[derive(Clone, Debug)]
pub struct LayerPlan {
    /// Its linear layers.
    pub linears: Vec<LinearPlan>,
    /// Its norms: name inside the layer, width of the weight.
    pub norms: Vec<(&'static str, usize)>,
    /// Heads, scale and window of its attention.
    pub attention: AttentionConfig,
    /// How its queries and keys are rotated; not at all if none.
    pub rope: Option<RopeConfig>,
}

/// A linear layer, its widths, and whether it has a bias.
#[derive(Clone, Copy, Debug)]
pub struct LinearPlan {
    /// Its name.
    pub linear: &'static Linear,
    /// Output width.
    pub out_features: usize,
    /// Input width.
    pub in_features: usize,
    /// Whether a bias is added.
    pub bias: bool,
}

impl LayerPlan {
    /// Starts a plan with the attention and the rotation that `config` describes for layer `index`.
    pub fn new(config: &ModelConfig, index: usize) -> Self {
        Self {
            linears: Vec::new(),
            norms: Vec::new(),
            attention: AttentionConfig {
                num_heads: config.num_attention_heads,
                num_key_value_heads: config.num_key_value_heads,
                head_dim: config.head_dim,
                scale: 1.0 / (config.head_dim as f64).sqrt(),
                window: config.window_of(index),
                softcap: None,
            },
            rope: Some(config.rope),
        }
    }

    /// Adds a linear layer.
    #[must_use]
    pub fn linear(
        mut self,
        linear: &'static Linear,
        out_features: usize,
        in_features: usize,
        bias: bool,
    ) -> Self {
        self.linears.push(LinearPlan { linear, out_features, in_features, bias });
        self
    }

    /// Adds a norm with a weight of `width` numbers.
    #[must_use]
    pub fn norm(mut self, name: &'static str, width: usize) -> Self {
        self.norms.push((name, width));
        self
    }

    /// Adds Llama's seven linear layers and two norms.
    #[must_use]
    pub fn llama(self, config: &ModelConfig, attention_bias: bool, mlp_bias: bool) -> Self {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let query = config.num_attention_heads * config.head_dim;
        let key_value = config.num_key_value_heads * config.head_dim;
        self.norm(INPUT_NORM, hidden)
            .linear(&Q_PROJ, query, hidden, attention_bias)
            .linear(&K_PROJ, key_value, hidden, attention_bias)
            .linear(&V_PROJ, key_value, hidden, attention_bias)
            .linear(&O_PROJ, hidden, query, attention_bias)
            .norm(POST_ATTENTION_NORM, hidden)
            .linear(&GATE_PROJ, inner, hidden, mlp_bias)
            .linear(&UP_PROJ, inner, hidden, mlp_bias)
            .linear(&DOWN_PROJ, hidden, inner, mlp_bias)
    }
}

/// One decoder layer during a pass: what a family's code computes with.
pub struct LayerContext<'a> {
    pub(crate) index: usize,
    pub(crate) layer: &'a Layer,
    pub(crate) config: &'a ModelConfig,
    pub(crate) adapters: &'a Adapters<'a>,
    pub(crate) pass: &'a Pass<'a>,
    /// Of this layer; none where nothing is rotated.
    pub(crate) rope: Option<&'a RopeTable>,
    pub(crate) attention: &'a mut dyn Attention,
    /// Rows whose output is wanted; all if none. Taken by [`wanted`](Self::wanted).
    pub(crate) rows: Option<&'a [usize]>,
    pub(crate) recorder: &'a Recorder,
    pub(crate) following: Option<&'a Following<'a>>,
}

impl LayerContext<'_> {
    /// Notes what is about to be read, and announces what is read after it.
    fn reads(&self, step: impl FnOnce() -> Step) {
        self.recorder.note(step);
        if let Some(following) = self.following {
            following.advance(|| self.attention.keys(self.index, self.layer.attention()));
        }
    }

    /// Normalises `x` by the root mean square of its rows, with the weight of that name.
    pub fn norm(&self, name: &'static str, x: &Var) -> Var {
        let (site, weight) = self.layer.norm(name);
        norm(self.adapters, site, weight, x, self.config.rms_norm_eps)
    }

    /// Normalises every head of `x: [T, heads · head_dim]` by itself, with a weight `[head_dim]`.
    pub fn head_norm(&self, name: &'static str, x: &Var) -> Var {
        self.norm(name, x)
    }

    /// Applies several linear layers, and what the adapter adds to them, to the same `x: [T, in]`.
    pub fn linears<const N: usize>(&self, linears: [&Linear; N], x: &Var) -> [Var; N] {
        let layers = linears.map(|linear| self.layer.linear(linear));
        self.reads(|| Step::Weights(FrozenLinear::stream(&layers.map(|(_, frozen)| frozen))));
        let outputs = adapter::linears(self.adapters, &layers, x, self.pass);
        outputs.try_into().unwrap_or_else(|_| panic!("an adapter gives one output for each layer"))
    }

    /// Applies one linear layer, and what the adapter adds to it, to `x: [T, in]`.
    pub fn linear(&self, linear: &Linear, x: &Var) -> Var {
        let [output] = self.linears([linear], x);
        output
    }

    /// Rotates every head of `x` by its token's position.
    pub fn rope(&self, x: Var) -> Var {
        match self.rope {
            Some(table) => rope(x, table),
            None => x,
        }
    }

    /// Attends with queries `[T, heads · head_dim]` to keys and values `[T, kv_heads · head_dim]` of
    /// this pass and to those before it, as the layer's plan says.
    pub fn attend(&mut self, q: Var, k: Var, v: Var) -> Var {
        self.reads(|| Step::Keys);
        self.attention.attend(self.index, self.layer.attention(), [q, k, v])
    }

    /// `silu(gate) ⊙ up`.
    pub fn glu(&self, gate: &Var, up: &Var) -> Var {
        swiglu(gate, up)
    }

    /// `h + update`, in the storage of `update` when nobody else holds it.
    pub fn add(&self, h: &Var, update: Var) -> Var {
        add(h, update)
    }

    /// Leaves only the rows whose output is wanted. A family calls it once the tokens of a sequence
    /// have met, after the attention block; what follows is then computed for those rows alone.
    pub fn wanted(&mut self, h: Var) -> Var {
        match self.rows.take() {
            Some(rows) => take_rows(&h, rows),
            None => h,
        }
    }
}
