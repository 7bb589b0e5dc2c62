//! The frozen decoder: embedding, pre-norm layers of rotary grouped attention and a gated
//! feed-forward block, final norm, output layer.
//!
//! ```text
//! h ← h + O·attention(rope(Q n₁), rope(K n₁), V n₁)     n₁ = RMSNorm(h)
//! h ← h + D(silu(G n₂) ⊙ U n₂)                          n₂ = RMSNorm(h)
//! ```
//!
//! Sequences are packed one after the other without padding; every linear layer goes through the
//! [`Adapter`], which may also put learned positions before every sequence, or bring weights of its
//! own. Nothing here is trainable.

pub(crate) mod tree;

use crate::adapter::{Adapter, KeyValue, NoAdapter, NormSite, Pass, Projection, Site, SiteShape};
use crate::cache::{Cache, LayerCache};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::family::{self, LayerPlan};
use crate::weights::Weights;
use hydralora_kernels::block::{self, BlockFormat};
use hydralora_kernels::buffer::release_kept;
use hydralora_kernels::ops::attention::{
    AttentionConfig, Source, Span, attend, causal_attention, spans, stream as keys_stream,
};
use hydralora_kernels::ops::cross_entropy::{
    CrossEntropy, linear_cross_entropy, trained_cross_entropy,
};
use hydralora_kernels::ops::elementwise::add;
use hydralora_kernels::ops::frozen_linear::{FrozenLinear, FrozenWeight};
use hydralora_kernels::ops::rms_norm::rms_norm;
use hydralora_kernels::ops::rope::{RopeTable, rope};
use hydralora_kernels::ops::rows::{drop_rows, lead_offsets, prepend_rows, select_rows, take_rows};
use hydralora_kernels::ops::swiglu::swiglu;
use hydralora_kernels::team::{Stream, together};
use hydralora_kernels::{DType, Tensor, Var, dispatch, no_grad};
use rayon::prelude::*;

mod training;

use std::collections::BTreeMap;
pub use training::{Added, Trained};

/// Tokens below which a pass is bound by waiting for threads more than by computing.
const FEW_TOKENS: usize = 8;

/// How a decoder holds its matrices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Held {
    /// As numbers of the type it computes in; a file of such numbers is used where it is mapped.
    #[default]
    Wide,
    /// Rounded to a packed format, and widened where they are used.
    Packed(BlockFormat),
    /// As the file has them, likewise.
    Stored,
}

/// Marks a row that has no token to predict.
pub const IGNORE_LABEL: u32 = u32::MAX;

/// Sequences packed one after the other.
#[derive(Clone, Copy, Debug)]
pub struct Packed<'a> {
    /// Token ids of all sequences.
    pub tokens: &'a [u32],
    /// Where each sequence starts, and the total: one entry more than there are sequences.
    pub offsets: &'a [usize],
}

struct Layer {
    input_norm: Var,
    post_attention_norm: Var,
    query: FrozenLinear,
    key: FrozenLinear,
    value: FrozenLinear,
    output: FrozenLinear,
    gate: FrozenLinear,
    up: FrozenLinear,
    down: FrozenLinear,
}

impl Layer {
    fn linear(&self, projection: Projection) -> &FrozenLinear {
        match projection {
            Projection::Query => &self.query,
            Projection::Key => &self.key,
            Projection::Value => &self.value,
            Projection::Output => &self.output,
            Projection::Gate => &self.gate,
            Projection::Up => &self.up,
            Projection::Down => &self.down,
        }
    }

    fn linear_mut(&mut self, projection: Projection) -> &mut FrozenLinear {
        match projection {
            Projection::Query => &mut self.query,
            Projection::Key => &mut self.key,
            Projection::Value => &mut self.value,
            Projection::Output => &mut self.output,
            Projection::Gate => &mut self.gate,
            Projection::Up => &mut self.up,
            Projection::Down => &mut self.down,
        }
    }
}

/// A frozen decoder language model.
pub struct Decoder {
    config: ModelConfig,
    dtype: DType,
    attention: AttentionConfig,
    inverse_frequencies: Vec<f64>,
    embedding: FrozenLinear,
    layers: Vec<Layer>,
    norm: Var,
    head: FrozenLinear,
}

impl Decoder {
    /// Builds the decoder of `config` from `weights`, computing in `dtype`.
    ///
    /// # Errors
    /// If a tensor is missing, has another shape, holds a number that is not finite, or is left
    /// unused.
    pub fn load(config: &ModelConfig, weights: &Weights, dtype: DType) -> Result<Self> {
        Self::load_held(config, weights, dtype, Held::Wide)
    }

    /// [`load`](Self::load) with the matrices held as `held` says.
    ///
    /// # Errors
    /// As [`load`](Self::load), and if a matrix has rows that are no whole number of blocks.
    pub fn load_held(
        config: &ModelConfig,
        weights: &Weights,
        dtype: DType,
        held: Held,
    ) -> Result<Self> {
        let family = family::find(&config.model_type).ok_or_else(|| Error::UnknownModelType {
            path: weights.path().to_path_buf(),
            found: config.model_type.clone(),
            supported: family::supported().join(", "),
        })?;
        let plan = family.plan(config);
        let read = Reader { weights, dtype, held };
        let hidden = config.hidden_size;
        let embedding = read.linear("model.embed_tokens", config.vocab_size, hidden, false)?;
        let head = if config.tie_word_embeddings {
            embedding.clone()
        } else {
            read.linear("lm_head", config.vocab_size, hidden, false)?
        };
        let layers = (0..config.num_hidden_layers)
            .map(|index| load_layer(&read, config, plan, index))
            .collect::<Result<_>>()?;
        let norm = read.vector("model.norm.weight", hidden)?;
        let unused: Vec<String> = weights
            .unused()
            .into_iter()
            .filter(|name| !(config.tie_word_embeddings && name == "lm_head.weight"))
            .collect();
        if !unused.is_empty() {
            return Err(Error::UnusedTensors { path: weights.path().to_path_buf(), names: unused });
        }
        // What reading the files took, and each packed weight while it was wide.
        release_kept();
        Ok(Self {
            config: config.clone(),
            dtype,
            attention: AttentionConfig {
                num_heads: config.num_attention_heads,
                num_key_value_heads: config.num_key_value_heads,
                head_dim: config.head_dim,
                scale: 1.0 / (config.head_dim as f64).sqrt(),
                window: plan.window,
            },
            inverse_frequencies: config.inverse_frequencies(),
            embedding,
            layers,
            norm,
            head,
        })
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Type of the activations.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of parameters; a tied output layer counts once.
    pub fn num_parameters(&self) -> usize {
        let linear =
            |l: &FrozenLinear| l.in_features() * l.out_features() + l.bias().map_or(0, Tensor::len);
        let norms = self
            .layers
            .iter()
            .map(|layer| layer.input_norm.value().len() + layer.post_attention_norm.value().len());
        self.linears().map(linear).sum::<usize>() + norms.sum::<usize>() + self.norm.value().len()
    }

    /// Bytes of all weights.
    pub fn weight_bytes(&self) -> usize {
        self.linears().map(FrozenLinear::bytes).sum()
    }

    /// Every tensor under its name in a checkpoint, as plain numbers; a tied output layer is left
    /// out. Tensors that are not packed share the decoder's memory.
    pub fn named_weights(&self) -> BTreeMap<String, Tensor> {
        let mut all = BTreeMap::new();
        let mut linear = |name: String, layer: &FrozenLinear| {
            if let Some(bias) = layer.bias() {
                all.insert(format!("{name}.bias"), bias.clone());
            }
            all.insert(format!("{name}.weight"), layer.dense_weight());
        };
        linear("model.embed_tokens".to_owned(), &self.embedding);
        if !self.config.tie_word_embeddings {
            linear("lm_head".to_owned(), &self.head);
        }
        for SiteShape { site, .. } in self.sites() {
            linear(site.to_string(), self.frozen(site));
        }
        let layers = self.layers.iter().enumerate().flat_map(|(index, layer)| {
            let input = (NormSite::Input(index), &layer.input_norm);
            [input, (NormSite::PostAttention(index), &layer.post_attention_norm)]
        });
        for (site, norm) in layers.chain([(NormSite::Final, &self.norm)]) {
            all.insert(format!("{site}.weight"), norm.value().clone());
        }
        all
    }

    /// Lets go of the weights that `taken_over` says, by checkpoint name, so that an adapter that
    /// trains them can change them in place. From then on the decoder computes only with that
    /// adapter.
    pub fn release(&mut self, taken_over: impl Fn(&str) -> bool) {
        let is_taken = |name: &str| taken_over(&format!("{name}.weight"));
        if is_taken("model.embed_tokens") {
            self.embedding = self.embedding.released();
            if self.config.tie_word_embeddings {
                self.head = self.embedding.clone();
            }
        }
        if !self.config.tie_word_embeddings && is_taken("lm_head") {
            self.head = self.head.released();
        }
        for SiteShape { site, .. } in self.sites() {
            if is_taken(&site.to_string()) {
                let layer = self.layers[site.layer].linear_mut(site.projection);
                *layer = layer.released();
            }
        }
    }

    /// Gives all weights a place on `device`, where everything is computed from then on; see
    /// [`FrozenLinear::to_device`]. A decoder in `f64` stays on the host.
    #[cfg(feature = "gpu")]
    pub fn to_device(&mut self, device: &hydralora_kernels::gpu::Device) {
        let place = |norm: &mut Var| *norm = Var::constant(norm.value().to_device(device));
        self.embedding = self.embedding.to_device(device);
        self.head = match self.config.tie_word_embeddings {
            true => self.embedding.clone(),
            false => self.head.to_device(device),
        };
        for layer in &mut self.layers {
            place(&mut layer.input_norm);
            place(&mut layer.post_attention_norm);
            for projection in Projection::ALL {
                let linear = layer.linear_mut(projection);
                *linear = linear.to_device(device);
            }
        }
        place(&mut self.norm);
    }

    /// Every linear layer an adapter can reach, layer by layer.
    pub fn sites(&self) -> Vec<SiteShape> {
        self.config.sites()
    }

    /// The frozen layer at `site`.
    pub fn frozen(&self, site: Site) -> &FrozenLinear {
        self.layers[site.layer].linear(site.projection)
    }

    /// Final hidden states `[T, hidden_size]`, ready for [`loss`](Self::loss) or
    /// [`logits`](Self::logits).
    ///
    /// # Errors
    /// If a sequence is empty or longer than the context, or a token id is out of range.
    pub fn hidden(&self, batch: Packed<'_>, adapter: &dyn Adapter, pass: &Pass<'_>) -> Result<Var> {
        let lead = Lead::of(adapter, self.layers.len(), pass);
        self.validate(batch, |_| lead.rows())?;
        let placed = self.place(batch.offsets, &lead);
        let starts = &placed.starts;
        let embeddings = adapter.embed(batch.tokens, &self.embedding);
        let mut h = lead.before(embeddings, batch.offsets, starts);
        for (index, prefix) in lead.prefix.iter().enumerate() {
            let attention = |q, k, v| self.attend_placed(q, k, v, prefix, &placed);
            h = self.layer_forward(index, h, &placed.table, adapter, pass, attention, None);
        }
        let h = self.final_norm(&h, adapter);
        check_finite(h.value())?;
        Ok(if lead.prompt_rows > 0 {
            drop_rows(&h, lead.prompt_rows, batch.offsets, starts)
        } else {
            h
        })
    }

    /// Where the rows of fresh sequences stand behind `lead`.
    fn place(&self, offsets: &[usize], lead: &Lead) -> Placed {
        let starts = vec![true; offsets.len() - 1];
        let offsets = lead_offsets(offsets, lead.prompt_rows, &starts);
        let first = lead.prefix_rows;
        let positions: Vec<u32> = offsets
            .windows(2)
            .flat_map(|w| (first..first + w[1] - w[0]).map(|p| p as u32))
            .collect();
        let table = RopeTable::new(self.dtype, &positions, &self.inverse_frequencies);
        let keys = lead_offsets(&offsets, first, &starts);
        let spans: Vec<Span> = (spans(&offsets).into_iter().zip(keys.windows(2)))
            .map(|(span, w)| Span { keys: w[0]..w[1], ..span })
            .collect();
        Placed { starts, offsets, table, spans }
    }

    fn attend_placed(
        &self,
        q: Var,
        k: Var,
        v: Var,
        prefix: &Option<KeyValue>,
        placed: &Placed,
    ) -> Var {
        let Some(KeyValue { keys, values }) = prefix else {
            return causal_attention(&q, &k, &v, &placed.spans, self.attention);
        };
        let k = prepend_rows(keys, &k, &placed.offsets, &placed.starts);
        let v = prepend_rows(values, &v, &placed.offsets, &placed.starts);
        causal_attention(&q, &k, &v, &placed.spans, self.attention)
    }

    /// Embeddings `[T, hidden_size]` of `tokens`.
    ///
    /// # Errors
    /// If a token id is out of range.
    pub fn embeddings(&self, tokens: &[u32]) -> Result<Tensor> {
        self.validate_tokens(tokens)?;
        Ok(self.embedding.gather(tokens))
    }

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
        assert_eq!(caches.len() + 1, batch.offsets.len(), "one cache per sequence");
        let _guard = no_grad();
        let starts: Vec<bool> = caches.iter().map(|cache| cache.rows() == 0).collect();
        let lead = if starts.contains(&true) {
            Lead::of(adapter, self.layers.len(), pass)
        } else {
            Lead::none(self.layers.len())
        };
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
        let table = RopeTable::new(self.dtype, &positions, &self.inverse_frequencies);
        // A token at a time is hundreds of very short loops.
        let streams = (batch.tokens.len() < FEW_TOKENS).then(|| self.streams(caches));
        let mut layers = || {
            let embeddings = adapter.embed(batch.tokens, &self.embedding);
            let mut h = lead.before(embeddings, batch.offsets, &starts);
            for index in 0..self.layers.len() {
                let mut layers: Vec<&mut LayerCache> =
                    caches.iter_mut().map(|cache| cache.layer_mut(index)).collect();
                if let Some(prefix) = &lead.prefix[index] {
                    let (keys, values) = (prefix.keys.value(), prefix.values.value());
                    for (cache, _) in layers.iter_mut().zip(&starts).filter(|(_, start)| **start) {
                        dispatch!(self.dtype, |E| cache
                            .append(keys.data::<E>(), values.data::<E>()));
                    }
                }
                let attention =
                    |q: Var, k: Var, v: Var| self.attend_cached(&q, &k, &v, &offsets, &mut layers);
                h = self.layer_forward(index, h, &table, adapter, pass, attention, None);
            }
            h
        };
        let h = match streams {
            Some(streams) => together(streams, layers),
            None => layers(),
        };
        for (s, cache) in caches.iter_mut().enumerate() {
            if starts[s] {
                cache.set_lead(lead.rows());
            }
            cache.advance(batch.offsets[s + 1] - batch.offsets[s]);
        }
        let h = self.final_norm(&h, adapter);
        check_finite(h.value())?;
        Ok(drop_rows(&h, lead.prompt_rows, batch.offsets, &starts).into_value())
    }

    /// All matrices: those of the layers, the head, then an embedding that is not the head too.
    fn linears(&self) -> impl Iterator<Item = &FrozenLinear> {
        let layers = self.layers.iter();
        let sites = layers.flat_map(|layer| Projection::ALL.map(move |p| layer.linear(p)));
        let embedding = (!self.config.tie_word_embeddings).then_some(&self.embedding);
        sites.chain([&self.head]).chain(embedding)
    }

    /// What a pass over one more token of each cache reads, in this order.
    fn streams(&self, caches: &[Cache]) -> Vec<Stream> {
        let cached = |index: usize| {
            let layer = caches.first().filter(|_| self.dtype == DType::F32)?.layer(index);
            Some(keys_stream(layer.rows().0, self.attention))
        };
        let layers = self.layers.iter().enumerate().flat_map(|(index, layer)| {
            let first = FrozenLinear::stream(&[&layer.query, &layer.key, &layer.value]);
            let rest = [&[&layer.output][..], &[&layer.gate, &layer.up], &[&layer.down]];
            [first].into_iter().chain(cached(index)).chain(rest.map(FrozenLinear::stream))
        });
        layers.chain([FrozenLinear::stream(&[&self.head])]).collect()
    }

    fn attend_cached(
        &self,
        q: &Var,
        k: &Var,
        v: &Var,
        offsets: &[usize],
        caches: &mut [&mut LayerCache],
    ) -> Var {
        let (q, k, v) = (q.value(), k.value(), v.value());
        let (width, kv_width) = (q.cols(), k.cols());
        dispatch!(self.dtype, |E| {
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
            let mut out = Tensor::zeros(self.dtype, q.shape());
            attend(&sources, out.data_mut::<E>(), self.attention);
            Var::constant(out)
        })
    }

    /// One layer. With `chosen` rows the feed-forward block computes only those, and the result has
    /// only those.
    fn layer_forward(
        &self,
        index: usize,
        h: Var,
        table: &RopeTable,
        adapter: &dyn Adapter,
        pass: &Pass<'_>,
        attention: impl FnOnce(Var, Var, Var) -> Var,
        chosen: Option<&[usize]>,
    ) -> Var {
        let layer = &self.layers[index];
        let at = |projection| (Site { layer: index, projection }, layer.linear(projection));
        let linear = |projection: Projection, x: &Var| {
            let (site, frozen) = at(projection);
            adapter.linear(site, x, frozen, pass)
        };
        let epsilon = self.config.rms_norm_eps;
        let norm = adapter.norm(NormSite::Input(index), &layer.input_norm);
        let normed = rms_norm(&h, norm, epsilon);
        let read = [Projection::Query, Projection::Key, Projection::Value].map(at);
        let [query, key, value] = exactly(adapter.linears(&read, &normed, pass));
        let attended = attention(rope(query, table), rope(key, table), value);
        let h = add(&h, linear(Projection::Output, &attended));
        let h = match chosen {
            Some(rows) => take_rows(&h, rows),
            None => h,
        };
        let norm = adapter.norm(NormSite::PostAttention(index), &layer.post_attention_norm);
        let normed = rms_norm(&h, norm, epsilon);
        let read = [Projection::Gate, Projection::Up].map(at);
        let [gate, up] = exactly(adapter.linears(&read, &normed, pass));
        let activated = swiglu(&gate, &up);
        add(&h, linear(Projection::Down, &activated))
    }

    fn final_norm(&self, h: &Var, adapter: &dyn Adapter) -> Var {
        rms_norm(h, adapter.norm(NormSite::Final, &self.norm), self.config.rms_norm_eps)
    }

    /// Cross-entropy of `hidden` against `labels` (the token each row predicts, [`IGNORE_LABEL`]
    /// for none), times `factor`, through the frozen output layer.
    pub fn loss(&self, hidden: &Var, labels: &[u32], factor: f64) -> CrossEntropy {
        self.loss_with(&NoAdapter, hidden, labels, factor)
    }

    /// [`loss`](Self::loss) through the output layer that `adapter` has, which may train one.
    pub fn loss_with(
        &self,
        adapter: &dyn Adapter,
        hidden: &Var,
        labels: &[u32],
        factor: f64,
    ) -> CrossEntropy {
        match adapter.head() {
            Some(weight) => trained_cross_entropy(hidden, weight, labels, IGNORE_LABEL, factor),
            None => linear_cross_entropy(hidden, &self.head, labels, IGNORE_LABEL, factor),
        }
    }

    /// Logits `[rows, vocab_size]` of some rows of `hidden`, through the frozen output layer.
    pub fn logits(&self, hidden: &Tensor, rows: &[usize]) -> Tensor {
        self.logits_with(&NoAdapter, hidden, rows)
    }

    /// [`logits`](Self::logits) through the output layer that `adapter` has.
    pub fn logits_with(&self, adapter: &dyn Adapter, hidden: &Tensor, rows: &[usize]) -> Tensor {
        let rows = select_rows(hidden, rows);
        match adapter.head() {
            Some(weight) => FrozenLinear::dense(weight.value().clone()).apply(&rows),
            None => self.head.apply(&rows),
        }
    }

    /// An empty cache for one sequence.
    pub fn new_cache(&self) -> Cache {
        let width = self.config.num_key_value_heads * self.config.head_dim;
        Cache::new(self.layers.len(), self.dtype, width)
    }

    /// Logits after each sequence of `batch`, without an adapter: `[sequences, vocab_size]`.
    ///
    /// # Errors
    /// As [`hidden`](Self::hidden).
    pub fn last_logits(&self, batch: Packed<'_>) -> Result<Tensor> {
        let _guard = no_grad();
        let hidden = self.hidden(batch, &NoAdapter, &Pass::inference())?;
        let rows: Vec<usize> = batch.offsets[1..].iter().map(|end| end - 1).collect();
        Ok(self.logits(hidden.value(), &rows))
    }

    fn validate(&self, batch: Packed<'_>, past: impl Fn(usize) -> usize) -> Result<()> {
        let limit = self.config.max_position_embeddings;
        assert_eq!(batch.offsets.last(), Some(&batch.tokens.len()), "offsets end at the tokens");
        for (sequence, w) in batch.offsets.windows(2).enumerate() {
            let length = w[1] - w[0];
            if length == 0 {
                return Err(Error::EmptySequence { sequence });
            }
            let length = length + past(sequence);
            if length > limit {
                return Err(Error::ContextExceeded { sequence, length, limit });
            }
        }
        self.validate_tokens(batch.tokens)
    }

    fn validate_tokens(&self, tokens: &[u32]) -> Result<()> {
        match tokens.iter().find(|&&token| token as usize >= self.config.vocab_size) {
            Some(&token) => {
                Err(Error::TokenOutOfRange { token, vocab_size: self.config.vocab_size })
            }
            None => Ok(()),
        }
    }
}

fn check_finite(hidden: &Tensor) -> Result<()> {
    if hidden.is_finite() { Ok(()) } else { Err(Error::NonFiniteActivations) }
}

/// As many as there were layers.
fn exactly<const N: usize>(outputs: Vec<Var>) -> [Var; N] {
    outputs.try_into().unwrap_or_else(|_| panic!("an adapter gives one output for each layer"))
}

/// Where the rows of fresh sequences stand.
struct Placed {
    /// All true: every sequence starts here.
    starts: Vec<bool>,
    /// Of the rows with the prompt's.
    offsets: Vec<usize>,
    table: RopeTable,
    spans: Vec<Span>,
}

/// What an adapter puts before every sequence.
struct Lead {
    prompt: Option<Var>,
    prompt_rows: usize,
    /// One entry per layer.
    prefix: Vec<Option<KeyValue>>,
    prefix_rows: usize,
}

impl Lead {
    fn none(layers: usize) -> Self {
        Self { prompt: None, prompt_rows: 0, prefix: vec![None; layers], prefix_rows: 0 }
    }

    fn of(adapter: &dyn Adapter, layers: usize, pass: &Pass<'_>) -> Self {
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
    fn rows(&self) -> usize {
        self.prompt_rows + self.prefix_rows
    }

    /// The embeddings of packed tokens, behind the prompt where a sequence starts.
    fn before(&self, embeddings: Var, offsets: &[usize], starts: &[bool]) -> Var {
        match &self.prompt {
            Some(prompt) => prepend_rows(prompt, &embeddings, offsets, starts),
            None => embeddings,
        }
    }
}

/// Reads named tensors in one element type.
struct Reader<'a> {
    weights: &'a Weights,
    dtype: DType,
    held: Held,
}

impl Reader<'_> {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = Tensor::new(self.weights.take_f32(name, shape)?, shape);
        if !tensor.is_finite() {
            return Err(self.non_finite(name));
        }
        Ok(tensor.to_dtype(self.dtype))
    }

    fn vector(&self, name: &str, len: usize) -> Result<Var> {
        Ok(Var::constant(self.tensor(name, &[len])?))
    }

    fn linear(&self, name: &str, out: usize, inputs: usize, bias: bool) -> Result<FrozenLinear> {
        let full = format!("{name}.weight");
        let weight = self.weight(&full, [out, inputs])?;
        let bias = bias.then(|| self.tensor(&format!("{name}.bias"), &[out])).transpose()?;
        Ok(FrozenLinear::new(weight, bias))
    }

    fn weight(&self, name: &str, shape: [usize; 2]) -> Result<FrozenWeight> {
        let dtype = self.dtype;
        let stored = self.weights.describe(name).map(|(_, format)| format);
        let plain = stored == Some(BlockFormat::F32) && dtype == DType::F32;
        if self.held == Held::Stored || (self.held == Held::Wide && plain) {
            let (format, bytes) = self.weights.take_packed(name, &shape)?;
            self.check_blocks(name, format, shape[1])?;
            let finite = bytes
                .par_chunks(format.bytes_for(shape[1]).max(1))
                .all(|row| block::is_finite(format, row));
            if !finite {
                return Err(self.non_finite(name));
            }
            return Ok(FrozenWeight::Blocks { format, bytes, shape, dtype });
        }
        let tensor = self.tensor(name, &shape)?;
        let Held::Packed(format) = self.held else { return Ok(FrozenWeight::Dense(tensor)) };
        self.check_blocks(name, format, shape[1])?;
        let rows: Vec<Vec<u8>> = tensor
            .to_dtype(DType::F32)
            .data::<f32>()
            .par_chunks(shape[1].max(1) * 64)
            .map(|rows| {
                let mut out = Vec::new();
                block::quantize(format, rows, &mut out);
                out
            })
            .collect();
        Ok(FrozenWeight::Blocks { format, bytes: rows.concat().into(), shape, dtype })
    }

    fn check_blocks(&self, name: &str, format: BlockFormat, cols: usize) -> Result<()> {
        if cols.is_multiple_of(format.block_len()) {
            return Ok(());
        }
        Err(Error::malformed(
            self.weights.path(),
            format!(
                "`{name}` has rows of {cols} numbers; {format} packs {} at a time, so hold it in another type",
                format.block_len()
            ),
        ))
    }

    fn non_finite(&self, name: &str) -> Error {
        Error::NonFinite { path: self.weights.path().to_path_buf(), name: name.to_owned() }
    }
}

fn load_layer(
    read: &Reader<'_>,
    config: &ModelConfig,
    plan: LayerPlan,
    index: usize,
) -> Result<Layer> {
    let linear = |projection: Projection| {
        let site = Site { layer: index, projection };
        let shape = config.site_shape(site);
        let bias = match projection {
            Projection::Query | Projection::Key | Projection::Value => plan.query_key_value_bias,
            Projection::Output => plan.output_bias,
            Projection::Gate | Projection::Up | Projection::Down => plan.feed_forward_bias,
        };
        read.linear(&site.to_string(), shape.out_features, shape.in_features, bias)
    };
    let norm = |name: &str| {
        read.vector(&format!("model.layers.{index}.{name}.weight"), config.hidden_size)
    };
    Ok(Layer {
        input_norm: norm("input_layernorm")?,
        post_attention_norm: norm("post_attention_layernorm")?,
        query: linear(Projection::Query)?,
        key: linear(Projection::Key)?,
        value: linear(Projection::Value)?,
        output: linear(Projection::Output)?,
        gate: linear(Projection::Gate)?,
        up: linear(Projection::Up)?,
        down: linear(Projection::Down)?,
    })
}

impl ModelConfig {
    /// The widths of the linear layer at `site`.
    pub fn site_shape(&self, site: Site) -> SiteShape {
        let hidden = self.hidden_size;
        let query = self.num_attention_heads * self.head_dim;
        let key_value = self.num_key_value_heads * self.head_dim;
        let (out_features, in_features) = match site.projection {
            Projection::Query => (query, hidden),
            Projection::Key | Projection::Value => (key_value, hidden),
            Projection::Output => (hidden, query),
            Projection::Gate | Projection::Up => (self.intermediate_size, hidden),
            Projection::Down => (hidden, self.intermediate_size),
        };
        SiteShape { site, in_features, out_features }
    }

    /// Every linear layer inside the decoder layers, layer by layer.
    pub fn sites(&self) -> Vec<SiteShape> {
        (0..self.num_hidden_layers)
            .flat_map(|layer| Projection::ALL.map(|projection| Site { layer, projection }))
            .map(|site| self.site_shape(site))
            .collect()
    }
}
