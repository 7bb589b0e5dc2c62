//! The frozen decoder: embedding, the family's layers, final norm, output layer.
//!
//! Sequences are packed one after the other without padding; every linear layer goes through the
//! [`Adapter`], which may also put learned positions before every sequence, or bring weights of its
//! own. Nothing here is trainable.

mod cached;
pub(crate) mod layers;
mod lead;
mod load;
mod training;
pub(crate) mod tree;

use crate::adapter::{Adapter, Adapters, NoAdapter, Pass};
use crate::cache::Cache;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::family::{Family, GgufNames};
use crate::site::{Kind, NormSite, Site, SiteShape};
use hydralora_kernels::block::BlockFormat;
use hydralora_kernels::ops::cross_entropy::{
    CrossEntropy, linear_cross_entropy, trained_cross_entropy,
};
use hydralora_kernels::ops::frozen_linear::FrozenLinear;
use hydralora_kernels::ops::rows::{drop_rows, select_rows};
use hydralora_kernels::{DType, Tensor, Var, no_grad};
use layers::{Forward, KeepGraph, Layer, ReadOrder, Rotation, norm};
use lead::{Lead, PackedAttention, Placed};
use std::collections::BTreeMap;

pub use training::{Added, Trained};

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

/// A frozen decoder language model.
pub struct Decoder {
    config: ModelConfig,
    family: &'static dyn Family,
    dtype: DType,
    /// The different rotations that its layers have.
    rotations: Vec<Rotation>,
    embedding: FrozenLinear,
    layers: Vec<Layer>,
    norm: Var,
    head: FrozenLinear,
    read_order: ReadOrder,
}

impl Decoder {
    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Type of the activations.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Counts the parameters; a tied output layer counts once.
    pub fn num_parameters(&self) -> usize {
        let linear =
            |l: &FrozenLinear| l.in_features() * l.out_features() + l.bias().map_or(0, Tensor::len);
        let norms = self.norms().map(|(_, norm)| norm.value().len());
        self.linears().map(linear).sum::<usize>() + norms.sum::<usize>()
    }

    /// Counts the bytes of all weights.
    pub fn weight_bytes(&self) -> usize {
        self.linears().map(FrozenLinear::bytes).sum()
    }

    /// Gives every tensor under its name in a checkpoint, as plain numbers; a tied output layer is left
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
        for (site, frozen) in self.layers.iter().flat_map(|layer| &layer.linears) {
            linear(site.to_string(), frozen);
        }
        for (site, norm) in self.norms() {
            all.insert(format!("{site}.weight"), norm.value().clone());
        }
        all
    }

    /// Drops the weights for which `taken_over` returns true, by checkpoint name, so that an adapter
    /// that trains them is their only owner. Afterwards the decoder works only with that adapter.
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
        for (site, frozen) in self.layers.iter_mut().flat_map(|layer| &mut layer.linears) {
            if is_taken(&site.to_string()) {
                *frozen = frozen.released();
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
            layer.norms.iter_mut().for_each(|(_, norm)| place(norm));
            for (_, linear) in &mut layer.linears {
                *linear = linear.to_device(device);
            }
        }
        place(&mut self.norm);
    }

    /// Lists every linear layer an adapter can reach, layer by layer.
    pub fn sites(&self) -> Vec<SiteShape> {
        self.config.sites()
    }

    /// The frozen layer at `site`.
    ///
    /// # Panics
    /// If the model has no such layer.
    pub fn frozen(&self, site: Site) -> &FrozenLinear {
        self.layers[site.layer].linear(site.linear).1
    }

    /// Computes final hidden states `[T, hidden_size]`, ready for [`loss`](Self::loss) or
    /// [`logits`](Self::logits).
    ///
    /// # Errors
    /// If a sequence is empty or longer than the context, or a token id is out of range.
    pub fn hidden(&self, batch: Packed<'_>, adapter: &dyn Adapter, pass: &Pass<'_>) -> Result<Var> {
        let lead = Lead::of(adapter, self.layers.len(), pass);
        self.validate(batch, |_| lead.rows())?;
        let placed = Placed::new(batch.offsets, &lead);
        let run = Forward {
            adapters: Adapters::One(adapter),
            pass,
            tables: placed.rope_tables(self),
            rows: None,
        };
        let embeddings = adapter.embed(batch.tokens, &self.embedding);
        let h = lead.before(embeddings, batch.offsets, &placed.starts);
        let mut attention = PackedAttention { placed: &placed, prefix: &lead.prefix };
        let h = self.run_layers(0..self.layers.len(), h, &run, &mut attention, &mut KeepGraph);
        let h = self.final_norm(&h, &run.adapters);
        check_finite(h.value())?;
        Ok(if lead.prompt_rows > 0 {
            drop_rows(&h, lead.prompt_rows, batch.offsets, &placed.starts)
        } else {
            h
        })
    }

    /// Looks up the embeddings `[T, hidden_size]` of `tokens`.
    ///
    /// # Errors
    /// If a token id is out of range.
    pub fn embeddings(&self, tokens: &[u32]) -> Result<Tensor> {
        self.validate_tokens(tokens)?;
        Ok(self.embedding.gather(tokens))
    }

    /// All matrices: those of the layers, the head, then an embedding that is not the head too.
    fn linears(&self) -> impl Iterator<Item = &FrozenLinear> {
        let layers = self.layers.iter().flat_map(|layer| &layer.linears);
        let embedding = (!self.config.tie_word_embeddings).then_some(&self.embedding);
        layers.map(|(_, linear)| linear).chain([&self.head]).chain(embedding)
    }

    /// All norms, layer by layer, then the last.
    fn norms(&self) -> impl Iterator<Item = (NormSite, &Var)> {
        let layers = self.layers.iter().flat_map(|layer| &layer.norms);
        layers.map(|(site, norm)| (*site, norm)).chain([(NormSite::FINAL, &self.norm)])
    }

    fn final_norm(&self, h: &Var, adapters: &Adapters<'_>) -> Var {
        norm(adapters, NormSite::FINAL, &self.norm, h, self.config.rms_norm_eps)
    }

    /// Computes the cross-entropy of `hidden` against `labels` (the token each row predicts,
    /// [`IGNORE_LABEL`] for none), times `factor`, through the frozen output layer.
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
            Some(weight) => {
                trained_cross_entropy(hidden, weight, labels, IGNORE_LABEL, factor, None)
            }
            None => linear_cross_entropy(hidden, &self.head, labels, IGNORE_LABEL, factor, None),
        }
    }

    /// Computes logits `[rows, vocab_size]` of some rows of `hidden`, through the frozen output layer.
    pub fn logits(&self, hidden: &Tensor, rows: &[usize]) -> Tensor {
        self.logits_with(&NoAdapter, hidden, rows)
    }

    /// [`logits`](Self::logits) through the output layer that `adapter` has.
    pub fn logits_with(&self, adapter: &dyn Adapter, hidden: &Tensor, rows: &[usize]) -> Tensor {
        let rows = select_rows(hidden, rows);
        self.announce_first(rows.rows());
        match adapter.head() {
            Some(weight) => FrozenLinear::dense(weight.value().clone()).apply(&rows),
            None => self.head.apply(&rows),
        }
    }

    /// Makes an empty cache for one sequence.
    pub fn new_cache(&self) -> Cache {
        Cache::new(self.dtype, self.layers.iter().map(Layer::attention))
    }

    /// Counts the bytes a cache takes per token, as long as no window is full.
    pub fn cache_bytes_per_token(&self) -> usize {
        let width = |layer: &Layer| layer.attention.num_key_value_heads * layer.attention.head_dim;
        2 * self.layers.iter().map(width).sum::<usize>() * self.dtype.size()
    }

    /// Computes logits after each sequence of `batch`, without an adapter: `[sequences, vocab_size]`.
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

impl ModelConfig {
    /// Lists every linear layer inside the decoder layers, with its widths, layer by layer.
    pub fn sites(&self) -> Vec<SiteShape> {
        let Some(family) = crate::family::find(&self.model_type) else { return Vec::new() };
        let mut all: Vec<SiteShape> = (0..self.num_hidden_layers)
            .flat_map(|layer| {
                family.layer(self, layer).linears.into_iter().map(move |plan| SiteShape {
                    site: Site { layer, linear: plan.linear },
                    in_features: plan.in_features,
                    out_features: plan.out_features,
                })
            })
            .collect();
        all.sort_by_key(|shape| shape.site);
        all
    }

    /// How the model's tensors are named and ordered in a GGUF file.
    pub fn gguf_names(&self) -> &'static GgufNames {
        crate::family::find(&self.model_type).map_or(&GgufNames::LLAMA, |family| family.gguf())
    }

    /// Gives the number of heads whose rows a GGUF file of this model interleaves in the tensor of this
    /// Hugging Face name, if it does.
    pub fn interleaved_heads(&self, name: &str) -> Option<usize> {
        let (module, _) = name.rsplit_once('.').filter(|_| self.gguf_names().interleaved)?;
        match module.parse::<Site>().ok()?.kind() {
            Kind::QUERY => Some(self.num_attention_heads),
            Kind::KEY => Some(self.num_key_value_heads),
            _ => None,
        }
    }

    /// Counts the numbers in all norms.
    pub fn norm_parameters(&self) -> usize {
        let Some(family) = crate::family::find(&self.model_type) else { return 0 };
        let of_layer =
            |layer| family.layer(self, layer).norms.iter().map(|norm| norm.1).sum::<usize>();
        (0..self.num_hidden_layers).map(of_layer).sum::<usize>() + self.hidden_size
    }
}
