//! What a family's code is written with: names that many families share, and a decoder layer during a
//! pass.

use crate::adapter::{self, Adapters, Pass, joined};
use crate::config::{ModelConfig, RopeConfig};
use crate::decoder::layers::{
    Attention, Following, Layer, Recorder, Rotated, Step, by_adapter, norm,
};
use crate::decoder::modules::Modules;
use crate::site::{Kind, Linear};
use hydralora_kernels::ops::attention::AttentionConfig;
use hydralora_kernels::ops::delta_net::DeltaConfig;
use hydralora_kernels::ops::elementwise::{add, scale, scale_rows};
use hydralora_kernels::ops::frozen_linear::FrozenLinear;
use hydralora_kernels::ops::rms_norm::rms_norm;
use hydralora_kernels::ops::rope::{Pairs, rope};
use hydralora_kernels::ops::rows::{columns, reshape, take_rows};
use hydralora_kernels::ops::swiglu::gated;
use hydralora_kernels::{Tensor, Var};
use std::ops::Range;

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

/// Query, key and value projections in one.
pub static QKV_PROJ: Linear =
    Linear::new("self_attn.qkv_proj", Kind::QUERY.and(Kind::KEY).and(Kind::VALUE), 15);
/// Gate and up-projection in one.
pub static GATE_UP_PROJ: Linear = Linear::new("mlp.gate_up_proj", Kind::GATE.and(Kind::UP), 55);

/// The seven linear layers of Llama's decoder layer.
pub static LLAMA_LINEARS: &[&Linear] =
    &[&Q_PROJ, &K_PROJ, &V_PROJ, &O_PROJ, &GATE_PROJ, &UP_PROJ, &DOWN_PROJ];

/// Norm before the attention block.
pub const INPUT_NORM: &str = "input_layernorm";
/// Norm before the feed-forward block.
pub const POST_ATTENTION_NORM: &str = "post_attention_layernorm";

/// Norm of queries.
pub const QUERY_NORM: &str = "self_attn.q_norm";
/// Norm of keys.
pub const KEY_NORM: &str = "self_attn.k_norm";
/// Norm before the feed-forward block, where the one after attention has taken its usual name.
pub const PRE_FEED_FORWARD_NORM: &str = "pre_feedforward_layernorm";
/// Norm of what the feed-forward block adds.
pub const POST_FEED_FORWARD_NORM: &str = "post_feedforward_layernorm";

/// Marks all of `layers` layers but every `period`-th; a period of 0 counts as 1.
pub(super) fn all_but_every(period: usize, layers: usize) -> Vec<bool> {
    (0..layers).map(|layer| !(layer + 1).is_multiple_of(period.max(1))).collect()
}

/// The weights of a decoder layer, or of what a decoder has outside its layers.
#[derive(Clone, Debug, Default)]
pub struct ModulesPlan {
    /// Linear layers.
    pub linears: Vec<LinearPlan>,
    /// Norms and lists of numbers.
    pub tensors: Vec<TensorPlan>,
    /// Tables that tokens are looked up in: name inside the model, rows, columns.
    pub tables: Vec<(&'static str, usize, usize)>,
}

/// A tensor that is no linear layer.
#[derive(Clone, Debug)]
pub struct TensorPlan {
    /// Its name, or that of the module whose weight it is.
    pub name: &'static str,
    /// Its extents.
    pub shape: Vec<usize>,
    /// Whether it is the weight of a module.
    pub is_weight: bool,
}

/// What one decoder layer consists of.
#[derive(Clone, Debug)]
pub struct LayerPlan {
    /// Its weights.
    pub modules: ModulesPlan,
    /// Heads, scale and window of its attention.
    pub attention: AttentionConfig,
    /// How its queries and keys are rotated; not at all if none.
    pub rope: Option<RopeConfig>,
    /// Which numbers of a head turn together.
    pub pairs: Pairs,
    /// The earlier layer whose keys and values it uses instead of its own.
    pub keys_of: Option<usize>,
    /// The delta rule that it has in place of attention, and the taps of its convolution.
    pub recurrent: Option<(DeltaConfig, usize)>,
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
            modules: ModulesPlan::default(),
            attention: AttentionConfig {
                num_heads: config.num_attention_heads,
                num_key_value_heads: config.num_key_value_heads,
                head_dim: config.head_dim,
                scale: (config.arithmetic.attention_scale)
                    .unwrap_or_else(|| 1.0 / (config.head_dim as f64).sqrt()),
                window: config.window_of(index),
                softcap: config.arithmetic.attention_softcap,
            },
            rope: config.rope_of(index).cloned(),
            pairs: Pairs::Halves,
            keys_of: None,
            recurrent: None,
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
        self.modules.linears.push(LinearPlan { linear, out_features, in_features, bias });
        self
    }

    /// Adds a tensor that is the weight of the module `name`.
    #[must_use]
    pub fn weight(mut self, name: &'static str, shape: &[usize]) -> Self {
        self.modules.tensors.push(TensorPlan { name, shape: shape.to_vec(), is_weight: true });
        self
    }

    /// Adds a list of numbers that belongs to no module.
    #[must_use]
    pub fn list(mut self, name: &'static str, len: usize) -> Self {
        self.modules.tensors.push(TensorPlan { name, shape: vec![len], is_weight: false });
        self
    }

    /// Adds a norm with a weight of `width` numbers.
    #[must_use]
    pub fn norm(self, name: &'static str, width: usize) -> Self {
        self.weight(name, &[width])
    }

    /// Adds Llama's four projections of attention.
    #[must_use]
    pub fn attention_linears(
        self,
        config: &ModelConfig,
        qkv_bias: bool,
        output_bias: bool,
    ) -> Self {
        let hidden = config.hidden_size;
        let query = config.num_attention_heads * config.head_dim;
        let key_value = config.num_key_value_heads * config.head_dim;
        self.linear(&Q_PROJ, query, hidden, qkv_bias)
            .linear(&K_PROJ, key_value, hidden, qkv_bias)
            .linear(&V_PROJ, key_value, hidden, qkv_bias)
            .linear(&O_PROJ, hidden, query, output_bias)
    }

    /// Adds Llama's three layers of the feed-forward block.
    #[must_use]
    pub fn feed_forward_linears(self, config: &ModelConfig, bias: bool) -> Self {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        self.linear(&GATE_PROJ, inner, hidden, bias)
            .linear(&UP_PROJ, inner, hidden, bias)
            .linear(&DOWN_PROJ, hidden, inner, bias)
    }

    /// Adds the two layers of a feed-forward block whose gate and up-projection are one.
    #[must_use]
    pub fn fused_feed_forward_linears(self, config: &ModelConfig) -> Self {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        self.linear(&GATE_UP_PROJ, 2 * inner, hidden, false)
            .linear(&DOWN_PROJ, hidden, inner, false)
    }

    /// Adds Llama's seven linear layers and two norms.
    #[must_use]
    pub fn llama(self, config: &ModelConfig, attention_bias: bool, mlp_bias: bool) -> Self {
        self.norm(INPUT_NORM, config.hidden_size)
            .attention_linears(config, attention_bias, attention_bias)
            .norm(POST_ATTENTION_NORM, config.hidden_size)
            .feed_forward_linears(config, mlp_bias)
    }

    /// Adds norms of query and key heads.
    #[must_use]
    pub fn head_norms(self, config: &ModelConfig) -> Self {
        self.norm(QUERY_NORM, config.head_dim).norm(KEY_NORM, config.head_dim)
    }
}

/// What a decoder has outside its layers, before the first of them runs.
pub struct StartContext<'a> {
    pub(crate) modules: &'a Modules,
    pub(crate) config: &'a ModelConfig,
    pub(crate) adapters: &'a Adapters<'a>,
    pub(crate) pass: &'a Pass<'a>,
}

impl StartContext<'_> {
    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        self.config
    }

    /// Looks up `tokens`, one for every row, in the table of that name, as the rows' adapters have it.
    pub fn gather(&self, table: &str, tokens: &[u32]) -> Var {
        let (frozen, name) = (self.modules.table(table), format!("model.{table}.weight"));
        let groups = self.adapters.groups(tokens.len());
        joined(groups.map(|(_, rows, own)| own.look_up(&name, &tokens[rows], frozen)).collect())
    }

    /// Applies a linear layer, and what the adapter adds to it, to `x: [T, in]`.
    pub fn linear(&self, linear: &Linear, x: &Var) -> Var {
        let layer = self.modules.linear(linear);
        joined(adapter::linears(self.adapters, &[layer], x, self.pass))
    }

    /// Normalises stretches of the rows of `x` as wide as the weight of that name.
    pub fn norm(&self, name: &'static str, x: &Var) -> Var {
        norm(self.adapters, self.modules.tensor(name), x, self.config.rms_norm_eps)
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
    pub(crate) rope: Option<&'a Rotated>,
    pub(crate) shared: Option<&'a Var>,
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
            following.advance(|owner| {
                self.attention.keys(owner.unwrap_or(self.index), self.layer.attention())
            });
        }
    }

    /// Normalises stretches of the rows of `x` as wide as the weight of that name, each by its root mean
    /// square: whole rows, or every head by itself.
    pub fn norm(&self, name: &'static str, x: &Var) -> Var {
        norm(self.adapters, self.layer.modules.tensor(name), x, self.config.rms_norm_eps)
    }

    /// Normalises every `width` neighbouring numbers of `x` by themselves, without a weight.
    pub fn unit_norm(&self, x: &Var, width: usize) -> Var {
        let dtype = x.value().dtype();
        let ones = Var::constant(Tensor::from_f64(dtype, &vec![1.0; width], [width]));
        rms_norm(x, &ones, self.config.rms_norm_eps)
    }

    /// Computes rows from those of `inputs` with tensors of the layer as their adapters have them: all
    /// at once where the adapters agree. `apply` is given the rows and the tensors.
    pub fn with_tensors<const N: usize, const I: usize, const O: usize>(
        &self,
        names: [&'static str; N],
        inputs: [&Var; I],
        mut apply: impl FnMut([&Var; I], &[&Var]) -> [Var; O],
    ) -> [Var; O] {
        let tensors = names.map(|name| self.layer.modules.tensor(name));
        by_adapter(self.adapters, &tensors, inputs, |x, own, _| apply(x, own))
    }

    /// Tells whether the layer has the delta rule in place of attention.
    pub fn is_recurrent(&self) -> bool {
        self.layer.recurrent().is_some()
    }

    /// Convolves every column of `x: [T, C]` along its sequence with the taps `[C, 1, K]` of that name,
    /// and applies SiLU.
    pub fn convolve(&mut self, name: &'static str, x: &Var) -> Var {
        let Self { layer, adapters, attention, index, .. } = self;
        let taps = layer.modules.tensor(name);
        let convolve = |[x]: [&Var; 1], own: &[&Var], rows: Range<usize>| {
            let shape = own[0].value().shape();
            let taps = reshape(own[0], &[shape[0], shape[shape.len() - 1]]);
            [attention.convolve(*index, x, &taps, rows)]
        };
        let [convolved] = by_adapter(adapters, &[taps], [x], convolve);
        convolved
    }

    /// Applies the gated delta rule to queries, keys and values side by side, under the logarithms of
    /// what is kept and the shares of what is written, `[T, value_heads]` each.
    ///
    /// # Panics
    /// If the layer's plan says nothing of it.
    pub fn delta(&mut self, qkv: &Var, decay: &Var, beta: &Var) -> Var {
        let config = self.layer.recurrent().map(|(config, _)| config);
        let config = config.unwrap_or_else(|| panic!("the layer's plan has no delta rule"));
        self.attention.delta(self.index, config, [qkv, decay, beta])
    }

    /// The number in a frozen list of one.
    pub fn number(&self, name: &'static str) -> f64 {
        self.layer.modules.tensor(name).value.value().item()
    }

    /// Columns of what the family computed for all layers before the first.
    ///
    /// # Panics
    /// If it computed nothing.
    pub fn shared(&self, range: Range<usize>) -> Var {
        let shared = self.shared.unwrap_or_else(|| panic!("the family computes nothing before"));
        columns(shared, range)
    }

    /// Applies several linear layers, and what the adapter adds to them, to the same `x: [T, in]`.
    pub fn linears<const N: usize>(&self, linears: [&Linear; N], x: &Var) -> [Var; N] {
        let layers = linears.map(|linear| self.layer.modules.linear(linear));
        self.reads(|| Step::Weights(FrozenLinear::stream(&layers.map(|(_, frozen)| frozen))));
        let outputs = adapter::linears(self.adapters, &layers, x, self.pass);
        outputs.try_into().unwrap_or_else(|_| panic!("an adapter gives one output for each layer"))
    }

    /// Applies one linear layer, and what the adapter adds to it, to `x: [T, in]`.
    pub fn linear(&self, linear: &Linear, x: &Var) -> Var {
        let [output] = self.linears([linear], x);
        output
    }

    /// Applies the three projections of attention, whether they are three layers or one.
    pub fn queries_keys_values(&self, x: &Var) -> [Var; 3] {
        if !self.layer.modules.has(&QKV_PROJ) {
            return self.linears([&Q_PROJ, &K_PROJ, &V_PROJ], x);
        }
        let all = self.linear(&QKV_PROJ, x);
        let of = self.layer.attention();
        let query = of.num_heads * of.head_dim;
        let key_value = of.num_key_value_heads * of.head_dim;
        [0..query, query..query + key_value, query + key_value..query + 2 * key_value]
            .map(|range: Range<usize>| columns(&all, range))
    }

    /// Rotates every head of `x` by its token's position.
    pub fn rope(&self, x: Var) -> Var {
        match self.rope {
            Some(rotation) => rope(x, &rotation.table),
            None => x,
        }
    }

    /// Multiplies the queries of later positions as the configuration says.
    pub fn scale_queries(&self, query: Var) -> Var {
        match self.rope.and_then(|rotation| rotation.query_factors.as_ref()) {
            Some(factors) => scale_rows(&query, factors),
            None => query,
        }
    }

    /// Attends with queries `[T, heads · head_dim]` to keys and values `[T, kv_heads · head_dim]` of
    /// this pass and to those before it, as the layer's plan says.
    pub fn attend(&mut self, q: Var, k: Var, v: Var) -> Var {
        self.reads(|| Step::Keys);
        if self.layer.shares_keys() {
            self.attention.share(self.index, &k, &v);
        }
        self.attention.attend(self.index, self.layer.attention(), [q, k, v])
    }

    /// Attends with queries to the keys and values of the earlier layer that the layer's plan names.
    ///
    /// # Panics
    /// If it names none.
    pub fn attend_again(&mut self, q: Var) -> Var {
        let owner =
            self.layer.keys_of().unwrap_or_else(|| panic!("the layer's plan names no owner"));
        self.reads(|| Step::KeysOf(owner));
        self.attention.attend_again(self.index, owner, self.layer.attention(), q)
    }

    /// `act(gate) ⊙ up`, with the configuration's activation.
    pub fn glu(&self, gate: &Var, up: &Var) -> Var {
        gated(gate, up, self.config.arithmetic.activation)
    }

    /// Applies the feed-forward block's layers to `x`, whether gate and up-projection are two or one.
    pub fn feed_forward(&self, x: &Var) -> Var {
        let inner = self.config.intermediate_size;
        let activated = if self.layer.modules.has(&GATE_UP_PROJ) {
            let both = self.linear(&GATE_UP_PROJ, x);
            self.glu(&columns(&both, 0..inner), &columns(&both, inner..2 * inner))
        } else {
            let [gate, up] = self.linears([&GATE_PROJ, &UP_PROJ], x);
            self.glu(&gate, &up)
        };
        self.linear(&DOWN_PROJ, &activated)
    }

    /// `h + update`, the update by the configuration's factor, in the storage of `update` when nobody
    /// else holds it.
    pub fn add(&self, h: &Var, update: Var) -> Var {
        match self.config.arithmetic.residual_scale {
            1.0 => add(h, update),
            factor => add(h, scale(&update, factor)),
        }
    }

    /// Gives the model's configuration.
    pub fn config(&self) -> &ModelConfig {
        self.config
    }

    /// Gives the width of a head of the layer.
    pub fn head_dim(&self) -> usize {
        self.layer.attention().head_dim
    }

    /// Tells whether the layer has that linear layer.
    pub fn has(&self, linear: &Linear) -> bool {
        self.layer.modules.has(linear)
    }

    /// Gives the index of the layer.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Tells whether the layer has keys and values of its own.
    pub fn owns_keys(&self) -> bool {
        self.layer.keys_of().is_none()
    }

    /// Leaves only the rows of `x` that [`wanted`](Self::wanted) will leave of the hidden states.
    pub fn wanted_rows(&self, x: Var) -> Var {
        match self.rows {
            Some(rows) => take_rows(&x, rows),
            None => x,
        }
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
