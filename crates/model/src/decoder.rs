//! The frozen decoder: embedding, the family's layers, final norm, output layer.
//!
//! Sequences are packed one after the other without padding; every linear layer goes through the
//! [`Adapter`], which may also put learned positions before every sequence, or bring weights of its
//! own. Nothing here is trainable.

mod cached;
pub(crate) mod layers;
mod lead;
mod load;
pub(crate) mod modules;
mod training;
pub(crate) mod tree;

use crate::adapter::{Adapter, Adapters, NoAdapter, Order, Output, OutputLayer, Pass, joined};
use crate::cache::{Cache, CacheDType};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::family::kit::{LinearPlan, ModulesPlan, StartContext};
use crate::family::{Family, GgufNames, Heads, Layout};
use crate::site::{Site, SiteShape, TensorSite};
use hydralora_kernels::block::BlockFormat;
use hydralora_kernels::ops::cross_entropy::{
    CrossEntropy, adapted_cross_entropy, linear_cross_entropy, trained_cross_entropy,
};
use hydralora_kernels::ops::delta_net::DeltaState;
use hydralora_kernels::ops::elementwise::scale;
use hydralora_kernels::ops::frozen_linear::FrozenLinear;
use hydralora_kernels::ops::linear::linear;
use hydralora_kernels::ops::rows::{drop_rows, select_rows};
use hydralora_kernels::ops::softcap::softcap;
use hydralora_kernels::{DType, Tensor, Var, no_grad};
use layers::{Forward, KeepGraph, Layer, ReadOrder, Rotation, norm};
use lead::{Lead, PackedAttention, Placed, SharedKeys};
use modules::{FrozenTensor, Modules};
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
    outside: Modules,
    norm: FrozenTensor,
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
        let norms = self.tensors().map(|tensor| tensor.value.value().len());
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
        for (site, frozen) in self.modules().flat_map(|modules| &modules.linears) {
            linear(site.to_string(), frozen);
        }
        for (name, table) in self.modules().flat_map(|modules| &modules.tables) {
            linear(format!("model.{name}"), table);
        }
        for tensor in self.tensors() {
            all.insert(tensor.site.to_string(), tensor.value.value().clone());
        }
        all
    }

    /// Gives the tensor of that name in a checkpoint, as plain numbers; a tied output layer is the
    /// embedding.
    pub fn weight(&self, name: &str) -> Option<Tensor> {
        let (module, part) = name.rsplit_once('.')?;
        let of_tensor = || self.tensors().find(|tensor| tensor.site.to_string() == name);
        match (self.matrix(module), part) {
            (Some(linear), "weight") => Some(linear.dense_weight()),
            (Some(linear), "bias") => linear.bias().cloned(),
            _ => of_tensor().map(|tensor| tensor.value.value().clone()),
        }
    }

    /// Gives the rows `ids` of the matrix of that name, likewise.
    ///
    /// # Panics
    /// If it has fewer.
    pub fn rows_of(&self, name: &str, ids: &[u32]) -> Option<Tensor> {
        Some(self.matrix(name.strip_suffix(".weight")?)?.gather(ids))
    }

    fn matrix(&self, module: &str) -> Option<&FrozenLinear> {
        let mut linears = self.modules().flat_map(|modules| &modules.linears);
        let mut tables = self.modules().flat_map(|modules| &modules.tables);
        match module {
            "model.embed_tokens" => Some(&self.embedding),
            "lm_head" => Some(&self.head),
            _ => match linears.find(|(site, _)| site.to_string() == module) {
                Some((_, linear)) => Some(linear),
                None => tables
                    .find(|(name, _)| module.strip_prefix("model.") == Some(*name))
                    .map(|(_, table)| table),
            },
        }
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
        let layers = self.layers.iter_mut().map(|layer| &mut layer.modules);
        for modules in layers.chain([&mut self.outside]) {
            for (site, frozen) in &mut modules.linears {
                if is_taken(&site.to_string()) {
                    *frozen = frozen.released();
                }
            }
            for (name, table) in &mut modules.tables {
                if is_taken(&format!("model.{name}")) {
                    *table = table.released();
                }
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
        let layers = self.layers.iter_mut().map(|layer| &mut layer.modules);
        for modules in layers.chain([&mut self.outside]) {
            modules.tensors.iter_mut().for_each(|tensor| place(&mut tensor.value));
            for (_, linear) in &mut modules.linears {
                *linear = linear.to_device(device);
            }
        }
        place(&mut self.norm.value);
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
        match site.linear.outside {
            true => self.outside.linear(site.linear).1,
            false => self.layers[site.layer].modules.linear(site.linear).1,
        }
    }

    /// Computes final hidden states `[T, hidden_size]`, ready for [`loss`](Self::loss) or
    /// [`logits`](Self::logits).
    ///
    /// # Errors
    /// If a sequence is empty or longer than the context, or a token id is out of range.
    pub fn hidden(&self, batch: Packed<'_>, adapter: &dyn Adapter, pass: &Pass<'_>) -> Result<Var> {
        let lead = self.lead(adapter, pass);
        self.validate(batch, |_| lead.rows())?;
        let placed = Placed::new(batch.offsets, &lead);
        let adapters = Adapters::One(adapter);
        let embeddings = self.embed(adapter, batch.tokens);
        let h = lead.before(embeddings, batch.offsets, &placed.starts);
        pass.follow(Order::packed(placed.offsets()));
        let shared = self.shared(&adapters, pass, batch, (lead.prompt_rows, &placed.starts), &h);
        let tables = placed.rope_tables(self);
        let run = Forward { adapters, pass, tables, shared, rows: None };
        let mut attention = PackedAttention::new(&placed, &lead.prefix, SharedKeys::default());
        let h = self.run_layers(0..self.layers.len(), h, &run, &mut attention, &mut KeepGraph);
        let h = self.final_norm(&h, &run.adapters);
        check_finite(h.value())?;
        Ok(if lead.prompt_rows > 0 {
            drop_rows(&h, lead.prompt_rows, batch.offsets, &placed.starts)
        } else {
            h
        })
    }

    /// Looks up the embeddings `[T, hidden_size]` of `tokens`, as an adapter's prompt takes them: without
    /// the configuration's factor where that is on prompts too.
    ///
    /// # Errors
    /// If a token id is out of range.
    pub fn embeddings(&self, tokens: &[u32]) -> Result<Tensor> {
        self.validate_tokens(tokens)?;
        Ok(match self.config.arithmetic.scales_prompt {
            true => NoAdapter.embed(tokens, &self.embedding).into_value(),
            false => self.embed(&NoAdapter, tokens).into_value(),
        })
    }

    /// What `adapter` puts before every sequence, the prompt by the configuration's factor.
    fn lead(&self, adapter: &dyn Adapter, pass: &Pass<'_>) -> Lead {
        let mut lead = Lead::of(adapter, self.layers.len(), pass);
        let of = &self.config.arithmetic;
        if of.scales_prompt && of.embedding_scale != 1.0 {
            lead.prompt = lead.prompt.map(|prompt| scale(&prompt, of.embedding_scale));
        }
        lead
    }

    /// Embeddings `[T, hidden_size]` of `tokens` as `adapter` has them, by the configuration's factor.
    fn embed(&self, adapter: &dyn Adapter, tokens: &[u32]) -> Var {
        let embedded = adapter.embed(tokens, &self.embedding);
        match self.config.arithmetic.embedding_scale {
            1.0 => embedded,
            factor => scale(&embedded, factor),
        }
    }

    /// The weights of the layers, one after the other, then those outside.
    fn modules(&self) -> impl Iterator<Item = &Modules> {
        self.layers.iter().map(|layer| &layer.modules).chain([&self.outside])
    }

    /// All matrices: those of the layers, the head, then an embedding that is not the head too.
    fn linears(&self) -> impl Iterator<Item = &FrozenLinear> {
        let linears = self.modules().flat_map(|modules| &modules.linears).map(|(_, linear)| linear);
        let tables = self.modules().flat_map(|modules| &modules.tables).map(|(_, table)| table);
        let embedding = (!self.config.tie_word_embeddings).then_some(&self.embedding);
        linears.chain(tables).chain([&self.head]).chain(embedding)
    }

    /// All norms and lists, layer by layer, then the last norm.
    fn tensors(&self) -> impl Iterator<Item = &FrozenTensor> {
        self.modules().flat_map(|modules| &modules.tensors).chain([&self.norm])
    }

    /// What the family computes for all layers, from `tokens` and the hidden states they start with, of
    /// which those of sequences that `starts` marks stand behind `prompt_rows` others.
    fn shared(
        &self,
        adapters: &Adapters<'_>,
        pass: &Pass<'_>,
        batch: Packed<'_>,
        (prompt_rows, starts): (usize, &[bool]),
        h: &Var,
    ) -> Option<Var> {
        let context = StartContext { modules: &self.outside, config: &self.config, adapters, pass };
        let mut tokens = Vec::with_capacity(h.value().rows());
        for (w, &start) in batch.offsets.windows(2).zip(starts) {
            tokens.extend(std::iter::repeat_n(0, if start { prompt_rows } else { 0 }));
            tokens.extend_from_slice(&batch.tokens[w[0]..w[1]]);
        }
        self.family.start(&context, &tokens, h)
    }

    /// What the output layer reads, by the configuration's factor on logits.
    fn final_norm(&self, h: &Var, adapters: &Adapters<'_>) -> Var {
        let hidden = norm(adapters, &self.norm, h, self.config.rms_norm_eps);
        match self.config.arithmetic.logit_scale {
            1.0 => hidden,
            factor => scale(&hidden, factor),
        }
    }

    /// Computes the cross-entropy of `hidden` against `labels` (the token each row predicts,
    /// [`IGNORE_LABEL`] for none), times `factor`, through the frozen output layer.
    pub fn loss(&self, hidden: &Var, labels: &[u32], factor: f64) -> CrossEntropy {
        self.loss_with(&NoAdapter, hidden, labels, factor, &Pass::inference())
    }

    /// [`loss`](Self::loss) through the output layer that `adapter` has, which may train one.
    pub fn loss_with(
        &self,
        adapter: &dyn Adapter,
        hidden: &Var,
        labels: &[u32],
        factor: f64,
        pass: &Pass<'_>,
    ) -> CrossEntropy {
        let cap = self.config.arithmetic.logit_softcap;
        let head = &self.head;
        match adapter.output(hidden, self.output_layer(), pass) {
            Output::Frozen => linear_cross_entropy(hidden, head, labels, IGNORE_LABEL, factor, cap),
            Output::Replace(weight) => {
                trained_cross_entropy(hidden, weight, labels, IGNORE_LABEL, factor, cap)
            }
            Output::Add { layer, z, b } => {
                let (layer, added) = (layer.unwrap_or(head), [&z, &b]);
                adapted_cross_entropy(hidden, layer, added, labels, IGNORE_LABEL, factor, cap)
            }
        }
    }

    fn output_layer(&self) -> OutputLayer<'_> {
        OutputLayer { frozen: &self.head, is_tied: self.config.tie_word_embeddings }
    }

    /// Computes logits `[rows, vocab_size]` of some rows of `hidden`, through the frozen output layer.
    pub fn logits(&self, hidden: &Tensor, rows: &[usize]) -> Tensor {
        self.logits_with(&NoAdapter, hidden, rows)
    }

    /// [`logits`](Self::logits) through the output layer that `adapter` has.
    pub fn logits_with(&self, adapter: &dyn Adapter, hidden: &Tensor, rows: &[usize]) -> Tensor {
        let _guard = no_grad();
        let rows = Var::constant(select_rows(hidden, rows));
        self.announce_first(rows.value().rows());
        let logits = match adapter.output(&rows, self.output_layer(), &Pass::inference()) {
            Output::Frozen => self.head.apply(rows.value()),
            Output::Replace(weight) => {
                FrozenLinear::dense(weight.value().clone()).apply(rows.value())
            }
            Output::Add { layer, z, b } => {
                let mut logits = layer.unwrap_or(&self.head).apply(rows.value());
                logits.add_assign(linear(&z, &b, None).value());
                logits
            }
        };
        match self.config.arithmetic.logit_softcap {
            Some(cap) => softcap(logits, cap),
            None => logits,
        }
    }

    /// Computes logits `[rows, vocab_size]` of all rows of `hidden`, which belong to several adapters:
    /// each to neighbouring rows, given as their number and the adapter. The frozen output layer is read
    /// once for all that have it.
    pub fn logits_each(&self, adapters: &[(usize, &dyn Adapter)], hidden: &Tensor) -> Tensor {
        let _guard = no_grad();
        let pass = Pass::inference();
        let mut first = 0;
        let mut groups = Vec::with_capacity(adapters.len());
        for &(count, adapter) in adapters {
            let rows: Vec<usize> = (first..first + count).collect();
            first += count;
            let own = Var::constant(select_rows(hidden, &rows));
            let output = adapter.output(&own, self.output_layer(), &pass);
            groups.push((rows, adapter, output));
        }
        let frozen = |output: &Output<'_>| {
            matches!(output, Output::Frozen | Output::Add { layer: None, .. })
        };
        let shared: Vec<usize> = (groups.iter())
            .filter(|(.., output)| frozen(output))
            .flat_map(|(rows, ..)| rows.iter().copied())
            .collect();
        if groups.len() == 1 || shared.is_empty() {
            let each = groups
                .iter()
                .map(|(rows, adapter, _)| Var::constant(self.logits_with(*adapter, hidden, rows)));
            return joined(each.collect()).into_value();
        }
        self.announce_first(shared.len());
        let base = self.head.apply(&select_rows(hidden, &shared));
        let mut parts = Vec::with_capacity(groups.len());
        let mut next = 0;
        for (rows, adapter, output) in groups {
            if !frozen(&output) {
                parts.push(Var::constant(self.logits_with(adapter, hidden, &rows)));
                continue;
            }
            let taken: Vec<usize> = (next..next + rows.len()).collect();
            next += rows.len();
            let mut own = select_rows(&base, &taken);
            if let Output::Add { z, b, .. } = &output {
                own.add_assign(linear(z, b, None).value());
            }
            let capped = match self.config.arithmetic.logit_softcap {
                Some(cap) => softcap(own, cap),
                None => own,
            };
            parts.push(Var::constant(capped));
        }
        joined(parts).into_value()
    }

    /// Makes an empty cache for one sequence.
    pub fn new_cache(&self) -> Cache {
        self.new_cache_in(CacheDType::F32)
    }

    /// Makes an empty cache for one sequence that stores keys and values in some way.
    pub fn new_cache_in(&self, stored: CacheDType) -> Cache {
        let own = |layer: &Layer| layer.owns_keys().then_some(layer.attention);
        let layers = self.layers.iter().map(|layer| (own(layer), self.empty_state(layer)));
        Cache::new(stored, self.dtype, layers)
    }

    /// Makes an empty cache for a sequence of `tokens` tokens that are read in parts. The first `prompt`
    /// of them were given at once, the others came one after the other: where a rotation depends on a
    /// sequence's length, each token gets the one it would have had then.
    pub fn new_cache_for(&self, stored: CacheDType, prompt: usize, tokens: usize) -> Cache {
        let mut cache = self.new_cache_in(stored);
        cache.expect(if self.turns().next().is_some() { tokens } else { prompt });
        cache
    }

    /// The state before the first token, if the layer keeps one.
    fn empty_state(&self, layer: &Layer) -> Option<DeltaState> {
        let (config, kernel) = layer.recurrent()?;
        Some(DeltaState::new(self.dtype, config, kernel))
    }

    /// Counts the bytes a cache takes per token, as long as no window is full.
    pub fn cache_bytes_per_token(&self) -> usize {
        let width = |layer: &Layer| layer.attention.num_key_value_heads * layer.attention.head_dim;
        let own = self.layers.iter().filter(|layer| layer.owns_keys());
        2 * own.map(width).sum::<usize>() * self.dtype.size()
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
        let limit = self.config.context_length();
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
        let shapes = |layer: usize, plan: ModulesPlan| {
            plan.linears.into_iter().map(move |plan| SiteShape {
                site: Site { layer, linear: plan.linear },
                in_features: plan.in_features,
                out_features: plan.out_features,
            })
        };
        let of_layers = (0..self.num_hidden_layers)
            .flat_map(|layer| shapes(layer, family.layer(self, layer).modules));
        let mut all: Vec<SiteShape> = of_layers.chain(shapes(0, family.outside(self))).collect();
        all.sort_by_key(|shape| shape.site);
        all
    }

    /// How the model's tensors are named and ordered in a GGUF file.
    pub fn gguf_names(&self) -> &'static GgufNames {
        crate::family::find(&self.model_type).map_or(&GgufNames::LLAMA, |family| family.gguf())
    }

    /// Tells how the tensor of this Hugging Face name differs in a GGUF file of this model.
    pub fn gguf_layout(&self, name: &str) -> Layout {
        let heads = Heads::of_config(self);
        crate::family::find(&self.model_type)
            .map(|family| Layout::of(family, name, &heads))
            .unwrap_or_default()
    }

    /// Tells whether every layer has keys and values of its own, of the same width.
    pub fn has_equal_keys(&self) -> bool {
        let Some(family) = crate::family::find(&self.model_type) else { return false };
        let width = |layer: usize| {
            let plan = family.layer(self, layer);
            let of = plan.attention;
            let owns = plan.recurrent.is_none() && plan.keys_of.is_none();
            owns.then_some(of.num_key_value_heads * of.head_dim)
        };
        let first = width(0);
        first.is_some() && (1..self.num_hidden_layers).all(|layer| width(layer) == first)
    }

    /// Counts the parameters of a model of these dimensions; a tied output layer counts once.
    pub fn num_parameters(&self) -> usize {
        let Some(family) = crate::family::find(&self.model_type) else { return 0 };
        let of = |plan: ModulesPlan| -> usize {
            let linear =
                |of: &LinearPlan| of.out_features * (of.in_features + usize::from(of.bias));
            let linears: usize = plan.linears.iter().map(linear).sum();
            linears + plan.tables.iter().map(|&(_, rows, cols)| rows * cols).sum::<usize>()
        };
        let layers = (0..self.num_hidden_layers).map(|layer| of(family.layer(self, layer).modules));
        let ends =
            self.vocab_size * self.hidden_size * if self.tie_word_embeddings { 1 } else { 2 };
        layers.sum::<usize>() + of(family.outside(self)) + self.norm_parameters() + ends
    }

    /// Gives the shape of every tensor that the decoder computes with, by its name in a checkpoint; a tied
    /// output layer is left out.
    pub fn named_shapes(&self) -> BTreeMap<String, Vec<usize>> {
        let Some(family) = crate::family::find(&self.model_type) else { return BTreeMap::new() };
        let ends = vec![self.vocab_size, self.hidden_size];
        let mut all = BTreeMap::from([
            ("model.embed_tokens.weight".to_owned(), ends.clone()),
            (TensorSite::FINAL_NORM.to_string(), vec![self.hidden_size]),
        ]);
        if !self.tie_word_embeddings {
            all.insert("lm_head.weight".to_owned(), ends);
        }
        let mut add = |layer: Option<usize>, plan: ModulesPlan| {
            for linear in plan.linears {
                let site = Site { layer: layer.unwrap_or(0), linear: linear.linear };
                let shape = vec![linear.out_features, linear.in_features];
                all.insert(format!("{site}.weight"), shape);
                if linear.bias {
                    all.insert(format!("{site}.bias"), vec![linear.out_features]);
                }
            }
            for (name, rows, cols) in plan.tables {
                all.insert(format!("model.{name}.weight"), vec![rows, cols]);
            }
            for tensor in plan.tensors {
                let site = TensorSite { layer, name: tensor.name, is_weight: tensor.is_weight };
                all.insert(site.to_string(), tensor.shape);
            }
        };
        (0..self.num_hidden_layers)
            .for_each(|layer| add(Some(layer), family.layer(self, layer).modules));
        add(None, family.outside(self));
        all
    }

    /// Counts the numbers in all norms and other small tensors.
    pub fn norm_parameters(&self) -> usize {
        let Some(family) = crate::family::find(&self.model_type) else { return 0 };
        let of = |plan: ModulesPlan| -> usize {
            plan.tensors.iter().map(|tensor| tensor.shape.iter().product::<usize>()).sum()
        };
        let layers = (0..self.num_hidden_layers).map(|layer| of(family.layer(self, layer).modules));
        layers.sum::<usize>() + of(family.outside(self)) + self.hidden_size
    }
}
