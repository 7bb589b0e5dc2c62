//! What is trained beside the updates of layers, under the names that PEFT gives it: whole copies of
//! modules (`modules_to_save`), low-rank pairs at the embedding and at the output layer, and single rows of
//! either (`trainable_token_indices`).
//!
//! ```text
//! h_t = W_e[id] + s B A[:, id]        l_t = W_o h_t + s B A h_t        W[id] = D[k]  where id = ids_k
//! ```

mod merging;
mod tokens;

pub(crate) use tokens::TokenIndices;

use super::LowRankSpec;
use super::spec::Size;
use crate::error::{Error, Fault, Result};
use crate::new_tokens::{mean_row, put_rows};
use crate::options::LoraConfigKeys;
use crate::random::{kaiming_bound, normal, uniform};
use crate::trainable::{Role, TensorMap, Trainable, load_by_name, take_tensor};
use crate::tuned::Base;
use hydralora_kernels::ops::dropout::{Dropout, dropout, mix};
use hydralora_kernels::ops::elementwise::{add, scale};
use hydralora_kernels::ops::embedding::embedding;
use hydralora_kernels::ops::frozen_linear::FrozenLinear;
use hydralora_kernels::ops::linear::linear;
use hydralora_kernels::{DType, Tensor, Var, dispatch};
use hydralora_model::ModelConfig;
use hydralora_model::adapter::{Output, OutputLayer, Pass, Site, TensorSite, Update, name_hash};
use std::collections::BTreeMap;
use tokens::Rows;

/// The embedding's module.
pub(crate) const EMBEDDING: &str = "model.embed_tokens";
/// The output layer's.
pub(crate) const HEAD: &str = "lm_head";

/// What is asked for.
#[derive(Clone, Debug)]
pub(crate) struct EndsSpec {
    modules_to_save: Vec<String>,
    tokens: Option<TokenIndices>,
    /// Whether a tied output layer stays the embedding when that is copied.
    ensure_weight_tying: bool,
    /// Whether a fresh adapter has a pair at the embedding and at the output layer.
    wanted: [bool; 2],
    /// The sizes of these.
    sizes: [Size; 2],
    dropout: f64,
}

impl EndsSpec {
    /// What these options ask for.
    pub(super) fn of(keys: &LoraConfigKeys, sizes: [Size; 2]) -> Self {
        Self {
            modules_to_save: keys.modules_to_save.clone(),
            tokens: keys.trainable_token_indices.clone(),
            ensure_weight_tying: keys.ensure_weight_tying,
            wanted: [EMBEDDING, HEAD].map(|end| keys.targets.name_end(end)),
            sizes,
            dropout: keys.dropout,
        }
    }

    /// Whether nothing is asked for.
    fn is_empty(&self) -> bool {
        self.modules_to_save.is_empty() && self.tokens.is_none() && self.wanted == [false; 2]
    }
}

/// A low-rank pair at an end.
struct EndPair {
    /// `[r, hidden]` at the output layer; at the embedding `[vocabulary, r]`, the transpose of what a file
    /// holds, so that tokens are rows.
    a: Trainable,
    /// `[out, r]`.
    b: Trainable,
    scale: f64,
}

/// A weight of an end that a file brought along, twice the same memory.
struct Brought {
    weight: Var,
    layer: FrozenLinear,
}

/// What is trained beside the updates of layers.
pub(super) struct Ends {
    spec: EndsSpec,
    /// Whether pairs at the ends are what the method computes there.
    takes_pairs: bool,
    dtype: DType,
    seed: u64,
    /// Whole tensors, by their checkpoint names.
    copies: BTreeMap<String, Trainable>,
    embedding: Option<EndPair>,
    head: Option<EndPair>,
    embedding_rows: Option<Rows>,
    head_rows: Option<Rows>,
    /// Weights of the ends that a file brought along, by their names in it.
    brought: BTreeMap<String, Brought>,
    /// Whether the base's output layer is its embedding, once the base is known.
    is_tied: Option<bool>,
}

/// Whether one of `modules` means the tensor `name`: as PEFT does, by how the name of its module, or of one
/// that contains it, ends.
pub(crate) fn is_saved(modules: &[String], name: &str) -> bool {
    let Some((module, _)) = name.rsplit_once('.') else { return false };
    let ends = module.match_indices('.').map(|(at, _)| at).chain([module.len()]);
    let names: Vec<&str> = ends.map(|end| &module[..end]).collect();
    names.iter().any(|name| modules.iter().any(|key| name.ends_with(key.as_str())))
}

/// Whether a file's tensor belongs to an update, or to something wrapped, and is no module's own.
fn is_added(name: &str) -> bool {
    [".lora_", ".token_adapter.", ".base_layer."].iter().any(|part| name.contains(part))
}

fn weight_of(end: &str) -> String {
    format!("{end}.weight")
}

/// The names under which a file may bring the base's weight of an end: that of a model with more tokens,
/// and those of what a pair or trained rows are wrapped around.
fn brought_names(end: &str) -> [String; 3] {
    ["weight", "base_layer.weight", "token_adapter.base_layer.weight"]
        .map(|part| format!("{end}.{part}"))
}

/// Which extent of a file's tensor is the vocabulary, if one is.
pub(crate) fn vocabulary_axis(name: &str) -> Option<usize> {
    let of_end = |end: &str| brought_names(end).iter().any(|brought| brought == name);
    let [[embedding_a, _], [_, head_b]] = [EMBEDDING, HEAD].map(pair_names);
    if [EMBEDDING, HEAD].into_iter().any(of_end) || head_b == name {
        return Some(0);
    }
    (embedding_a == name).then_some(1)
}

/// The names of a pair's tensors in a file.
fn pair_names(end: &str) -> [String; 2] {
    match end == EMBEDDING {
        true => ["A", "B"].map(|part| format!("{end}.lora_embedding_{part}")),
        false => ["A", "B"].map(|part| format!("{end}.lora_{part}.weight")),
    }
}

/// The columns of `m: [n, k]` as rows.
fn transposed(m: &Tensor) -> Tensor {
    let (rows, cols) = (m.rows(), m.cols());
    dispatch!(m.dtype(), |E| {
        let values = m.data::<E>();
        let turned: Vec<E> = (0..cols)
            .flat_map(|column| (0..rows).map(move |row| row * cols + column))
            .map(|at| values[at])
            .collect();
        Tensor::new(turned, [cols, rows])
    })
}

impl Ends {
    /// Nothing yet: what it holds follows from the base, or from a file.
    pub(super) fn new(spec: &LowRankSpec, dtype: DType, seed: u64) -> Self {
        Self {
            spec: spec.ends.clone(),
            takes_pairs: spec.takes_pairs(),
            dtype,
            seed,
            copies: BTreeMap::new(),
            embedding: None,
            head: None,
            embedding_rows: None,
            head_rows: None,
            brought: BTreeMap::new(),
            is_tied: None,
        }
    }

    /// Whether it trains nothing and changes nothing.
    pub(super) fn is_empty(&self) -> bool {
        self.brought.is_empty() && self.trainables().next().is_none()
    }

    /// Whether values that follow from the base's weights are still to come.
    pub(super) fn waits(&self) -> bool {
        !self.spec.is_empty() && self.is_empty()
    }

    fn pairs(&self) -> impl Iterator<Item = &EndPair> {
        self.embedding.iter().chain(&self.head)
    }

    fn rows(&self) -> impl Iterator<Item = &Rows> {
        self.embedding_rows.iter().chain(&self.head_rows)
    }

    pub(super) fn trainables(&self) -> impl Iterator<Item = &Trainable> {
        let pairs = self.pairs().flat_map(|pair| [&pair.a, &pair.b]);
        self.copies.values().chain(pairs).chain(self.rows().map(|rows| &rows.values))
    }

    pub(super) fn trainables_mut(&mut self) -> impl Iterator<Item = &mut Trainable> {
        let pairs = self.embedding.iter_mut().chain(&mut self.head);
        let pairs = pairs.flat_map(|pair| [&mut pair.a, &mut pair.b]);
        let rows = self.embedding_rows.iter_mut().chain(&mut self.head_rows);
        self.copies.values_mut().chain(pairs).chain(rows.map(|rows| &mut rows.values))
    }

    /// The ends that have a pair, as PEFT's `target_modules` lists them.
    pub(super) fn targets(&self) -> Vec<&'static str> {
        let ends = [("embed_tokens", &self.embedding), (HEAD, &self.head)];
        ends.into_iter().filter(|(_, pair)| pair.is_some()).map(|(name, _)| name).collect()
    }
}

/// Computing.
impl Ends {
    /// What becomes of the layer at `site` where its weight is trained whole.
    pub(super) fn update(&self, site: Site) -> Option<Update<'_>> {
        if self.copies.is_empty() {
            return None;
        }
        let weight = self.copies.get(&format!("{site}.weight"))?;
        let bias = self.copies.get(&format!("{site}.bias"));
        Some(Update::Replace(weight.var(), bias.map(Trainable::var)))
    }

    pub(super) fn tensor<'a>(&'a self, site: TensorSite, frozen: &'a Var) -> &'a Var {
        if self.copies.is_empty() {
            return frozen;
        }
        self.copies.get(&site.to_string()).map_or(frozen, Trainable::var)
    }

    /// What a file brought in place of the base's weight of an end; where both are tied, of either.
    fn base_of(&self, end: &str) -> Option<&Brought> {
        if self.brought.is_empty() {
            return None;
        }
        let other = if end == EMBEDDING { HEAD } else { EMBEDDING };
        let ends = [Some(end), (self.is_tied == Some(true)).then_some(other)];
        let mut names = ends.into_iter().flatten().flat_map(brought_names);
        names.find_map(|name| self.brought.get(&name))
    }

    /// The embeddings of `tokens`, `[T, hidden]`.
    pub(super) fn embed(&self, tokens: &[u32], frozen: &FrozenLinear) -> Var {
        if let Some(copy) = self.copies.get(&weight_of(EMBEDDING)) {
            return embedding(copy.var(), tokens);
        }
        let base = self.base_of(EMBEDDING).map_or(frozen, |brought| &brought.layer);
        let mut h = Var::constant(base.gather(tokens));
        if let Some(rows) = &self.embedding_rows {
            h = rows.embed(h, tokens);
        }
        if let Some(pair) = &self.embedding {
            let z = scale(&embedding(pair.a.var(), tokens), pair.scale);
            h = add(&h, linear(&z, pair.b.var(), None));
        }
        h
    }

    /// What becomes of the output layer.
    pub(super) fn output(
        &self,
        hidden: &Var,
        layer: OutputLayer<'_>,
        pass: &Pass<'_>,
    ) -> Output<'_> {
        if let Some(copy) = self.copies.get(&weight_of(HEAD)) {
            return Output::Replace(copy.var());
        }
        let embedding = self.copies.get(&weight_of(EMBEDDING));
        if let Some(copy) = embedding.filter(|_| layer.is_tied && self.spec.ensure_weight_tying) {
            return Output::Replace(copy.var());
        }
        let brought = self.base_of(HEAD);
        let base = brought.map(|brought| &brought.layer);
        if let Some(pair) = &self.head {
            let mask = pass.dropout_seed().filter(|_| self.spec.dropout > 0.0);
            let mask = mask.map(|seed| Dropout {
                probability: self.spec.dropout,
                seed: mix(seed ^ mix(name_hash(HEAD))),
            });
            let dropped = mask.map(|mask| dropout(hidden, mask));
            let z = linear(dropped.as_ref().unwrap_or(hidden), pair.a.var(), None);
            let (z, b) = (scale(&z, pair.scale), pair.b.var().clone());
            return Output::Add { layer: base, z, b };
        }
        // A tied output layer follows the embedding's rows.
        let followed = self.embedding_rows.as_ref().filter(|_| layer.is_tied);
        if let Some(rows) = self.head_rows.as_ref().or(followed) {
            let [z, b] = rows.output(hidden, base.unwrap_or(layer.frozen));
            return Output::Add { layer: base, z, b };
        }
        brought.map_or(Output::Frozen, |brought| Output::Replace(&brought.weight))
    }
}

/// Starting from the base.
impl Ends {
    pub(super) fn start_from(&mut self, base: &Base<'_>) -> Result<()> {
        let config = base.decoder.config();
        self.is_tied = Some(config.tie_word_embeddings);
        if self.spec.is_empty() {
            return Ok(());
        }
        let names = self.saved_names(config)?;
        for name in names {
            let Some(mut value) = base.decoder.weight(&name) else { continue };
            if [EMBEDDING, HEAD].iter().any(|end| weight_of(end) == name) {
                let new = base.new_tokens.iter().map(|&id| id as usize);
                start_at_mean(base, &name, &mut value, new);
            }
            self.copies.insert(name.clone(), copy(name, value));
        }
        let (vocabulary, hidden) = (config.vocab_size, config.hidden_size);
        let widths = [[vocabulary, hidden], [hidden, vocabulary]];
        for (at, end) in [EMBEDDING, HEAD].into_iter().enumerate() {
            if self.spec.wanted[at] {
                let pair = self.fresh_pair(end, self.spec.sizes[at], widths[at]);
                *[&mut self.embedding, &mut self.head][at] = Some(pair);
            }
        }
        let Some(tokens) = &self.spec.tokens else { return Ok(()) };
        tokens.check(vocabulary).map_err(|fault| Error::Options { faults: vec![fault] })?;
        let [of_embedding, of_head] = [EMBEDDING, HEAD].map(|end| tokens.of(end).to_vec());
        let rows = |end: &str, ids: Vec<u32>| -> Option<Rows> {
            let name = weight_of(end);
            let mut weight = base.decoder.rows_of(&name, &ids)?;
            let new = (0..ids.len()).filter(|at| base.new_tokens.contains(&ids[*at]));
            start_at_mean(base, &name, &mut weight, new);
            (!ids.is_empty()).then(|| Rows::new(end, ids, weight))
        };
        if !(config.tie_word_embeddings && of_head == of_embedding) {
            self.head_rows = rows(HEAD, of_head);
        }
        self.embedding_rows = rows(EMBEDDING, of_embedding);
        Ok(())
    }

    /// The tensors of a model that `modules_to_save` means.
    fn saved_names(&self, config: &ModelConfig) -> Result<Vec<String>> {
        let modules = &self.spec.modules_to_save;
        let mut names: Vec<String> = config.named_shapes().into_keys().collect();
        if config.tie_word_embeddings {
            names.push(weight_of(HEAD));
        }
        let idle =
            |key: &&String| !names.iter().any(|name| is_saved(std::slice::from_ref(key), name));
        if let Some(key) = modules.iter().find(idle) {
            let message = format!(
                "`{key}` is the end of no module's name; expected one such as norm, embed_tokens, \
                 lm_head or input_layernorm"
            );
            let faults = vec![Fault::new("method.modules_to_save", message)];
            return Err(Error::Options { faults });
        }
        names.retain(|name| is_saved(modules, name));
        // Kept tied, there is one weight, the embedding's.
        let kept_tied = config.tie_word_embeddings && self.spec.ensure_weight_tying;
        if kept_tied && names.contains(&weight_of(HEAD)) {
            names.retain(|name| *name != weight_of(HEAD) && *name != weight_of(EMBEDDING));
            names.push(weight_of(EMBEDDING));
        }
        Ok(names)
    }

    /// A fresh pair: `A` zero and `B` normal at the embedding, as PEFT starts it; `A` Kaiming-uniform and
    /// `B` zero at the output layer.
    fn fresh_pair(&self, end: &str, size: Size, [inputs, outputs]: [usize; 2]) -> EndPair {
        let (dtype, rank, [a_name, b_name]) = (self.dtype, size.rank, pair_names(end));
        let [a, b] = match end == EMBEDDING {
            true => [
                Tensor::zeros(dtype, [inputs, rank]),
                normal(self.seed, &b_name, 1.0, dtype, [outputs, rank]),
            ],
            false => [
                uniform(self.seed, &a_name, kaiming_bound(inputs), dtype, [rank, inputs]),
                Tensor::zeros(dtype, [outputs, rank]),
            ],
        };
        pair(end, [a, b], size.scale)
    }
}

/// Lets the rows `new` of `value`, which are of the matrix of that name, start at the mean of the rows
/// of the tokens that are not new.
fn start_at_mean(
    base: &Base<'_>,
    name: &str,
    value: &mut Tensor,
    new: impl Iterator<Item = usize>,
) {
    if base.new_tokens.is_empty() {
        return;
    }
    if let Some(mean) = mean_row(base.decoder, name, base.new_tokens) {
        put_rows(value, new, &mean);
    }
}

/// The trainable copy of a tensor.
fn copy(name: String, value: Tensor) -> Trainable {
    let role = if value.shape().len() > 1 { Role::Weight } else { Role::Norm };
    Trainable::new(name, role, value)
}

fn pair(end: &str, [a, b]: [Tensor; 2], scale: f64) -> EndPair {
    let [a_name, b_name] = pair_names(end);
    // At the embedding it is `A` that starts at zero.
    let role = if end == EMBEDDING { Role::A } else { Role::B };
    EndPair { a: Trainable::new(a_name, Role::A, a), b: Trainable::new(b_name, role, b), scale }
}

/// Files and checkpoints.
impl Ends {
    /// Every trainable as a file holds it.
    pub(super) fn export(&self, pick: &dyn Fn(&Trainable) -> Tensor, map: &mut TensorMap) {
        let at_embedding = self.embedding.as_ref().map(|pair| pair.a.parameter.name());
        for trainable in self.trainables() {
            let (name, value) = (trainable.parameter.name(), pick(trainable));
            let turned = at_embedding == Some(name);
            map.insert(name.to_owned(), if turned { transposed(&value) } else { value });
        }
    }

    /// Whether the output layer stays the embedding, whose copy is trained.
    fn keeps_tied(&self) -> bool {
        self.is_tied == Some(true)
            && self.spec.ensure_weight_tying
            && self.copies.contains_key(&weight_of(EMBEDDING))
    }

    /// What a file holds beside the trainables.
    pub(super) fn to_file(&self, map: &mut TensorMap) {
        let values = self.brought.iter().map(|(name, end)| (name, end.weight.value()));
        map.extend(values.map(|(name, value)| (name.clone(), value.clone())));
        // PEFT looks for either of two tied copies.
        if let Some(copy) = self.copies.get(&weight_of(EMBEDDING)).filter(|_| self.keeps_tied()) {
            map.insert(weight_of(HEAD), copy.parameter.value().clone());
        }
    }

    /// Takes the trainables out of `tensors`, those of the options where none are there yet; gives every
    /// fault.
    pub(super) fn load(&mut self, tensors: &mut TensorMap) -> Vec<String> {
        let mut faults = Vec::new();
        // PEFT saves the insides of a copied end too, once the vocabulary was resized.
        for end in [EMBEDDING, HEAD] {
            if tensors.contains_key(&weight_of(end)) {
                for inside in ["modules_to_save", "original_module"] {
                    tensors.remove(&format!("{end}.{inside}.weight"));
                }
            }
        }
        // And the rows of a tied output layer, which are the embedding's.
        let [of_embedding, of_head] = [EMBEDDING, HEAD].map(tokens::name_of);
        let named = self.spec.tokens.as_ref().is_some_and(|tokens| !tokens.of(HEAD).is_empty());
        let repeated = match (tensors.get(&of_embedding), tensors.get(&of_head)) {
            (Some(rows), Some(again)) => {
                rows.shape() == again.shape() && rows.to_f64() == again.to_f64()
            }
            _ => false,
        };
        if repeated && !named {
            tensors.remove(&of_head);
        }
        if self.copies.is_empty() {
            let saved =
                |name: &&String| is_saved(&self.spec.modules_to_save, name) && !is_added(name);
            let names: Vec<String> = tensors.keys().filter(saved).cloned().collect();
            for name in names {
                if let Some(value) = tensors.remove(&name) {
                    self.copies.insert(name.clone(), copy(name, value.to_dtype(self.dtype)));
                }
            }
        } else {
            faults
                .extend(load_by_name(self.copies.values_mut(), tensors).err().unwrap_or_default());
        }
        for (at, end) in [EMBEDDING, HEAD].into_iter().enumerate() {
            faults.extend(self.load_pair(at, end, tensors));
            faults.extend(self.load_rows(end, tensors));
        }
        faults
    }

    fn load_pair(&mut self, at: usize, end: &str, tensors: &mut TensorMap) -> Vec<String> {
        let mut faults = Vec::new();
        let names = pair_names(end);
        let Size { rank, scale } = self.spec.sizes[at];
        let held = [&self.embedding, &self.head][at].as_ref();
        let turned = end == EMBEDDING;
        // From the two widths: those of the pair that is there, or of the file's own tensors.
        let [inputs, outputs] = match held {
            Some(pair) if turned => {
                [pair.a.parameter.value().rows(), pair.b.parameter.value().rows()]
            }
            Some(pair) => [pair.a.parameter.value().cols(), pair.b.parameter.value().rows()],
            None => {
                let [Some(a), Some(b)] = names.each_ref().map(|name| tensors.get(name)) else {
                    return faults;
                };
                if !self.takes_pairs {
                    return faults;
                }
                [a.cols(), b.rows()]
            }
        };
        let a = take_tensor(tensors, &names[0], &[rank, inputs], &mut faults);
        let b = take_tensor(tensors, &names[1], &[outputs, rank], &mut faults);
        if let (Some(a), Some(b)) = (a, b) {
            let a = if turned { transposed(&a) } else { a };
            let values = [a, b].map(|value| value.to_dtype(self.dtype));
            match &mut [&mut self.embedding, &mut self.head][at] {
                Some(pair) => {
                    let [a, b] = values;
                    pair.a.parameter.set(a);
                    pair.b.parameter.set(b);
                }
                empty => **empty = Some(pair(end, values, scale)),
            }
        }
        faults
    }

    fn load_rows(&mut self, end: &str, tensors: &mut TensorMap) -> Vec<String> {
        let held = match end == EMBEDDING {
            true => &mut self.embedding_rows,
            false => &mut self.head_rows,
        };
        let name = tokens::name_of(end);
        let ids = self.spec.tokens.as_ref().map_or(&[][..], |tokens| tokens.of(end));
        let mut faults = Vec::new();
        let width = match (&*held, tensors.get(&name)) {
            (Some(rows), _) => rows.values.parameter.value().cols(),
            (None, Some(found)) if !ids.is_empty() => found.cols(),
            _ => return faults,
        };
        if let Some(value) = take_tensor(tensors, &name, &[ids.len(), width], &mut faults) {
            let value = value.to_dtype(self.dtype);
            match held {
                Some(rows) => rows.values.parameter.set(value),
                None => *held = Some(Rows::new(end, ids.to_vec(), value)),
            }
        }
        faults
    }

    /// Takes what a file brings along of the base.
    pub(super) fn load_file(&mut self, tensors: &mut TensorMap) {
        for end in [EMBEDDING, HEAD] {
            for name in brought_names(end) {
                let is_matrix = tensors.get(&name).is_some_and(|found| found.shape().len() == 2);
                let Some(value) = is_matrix.then(|| tensors.remove(&name)).flatten() else {
                    continue;
                };
                let value = value.to_dtype(self.dtype);
                let layer = FrozenLinear::dense(value.clone());
                self.brought.insert(name, Brought { weight: Var::constant(value), layer });
            }
        }
    }

    /// Whether all of it fits a model of these dimensions; gives every fault.
    pub(super) fn belong_to(&mut self, config: &ModelConfig) -> Vec<String> {
        self.is_tied = Some(config.tie_word_embeddings);
        if self.is_empty() && self.spec.is_empty() {
            return Vec::new();
        }
        if self.keeps_tied() {
            self.copies.remove(&weight_of(HEAD));
            self.brought.remove(&weight_of(HEAD));
        }
        let (vocabulary, hidden) = (config.vocab_size, config.hidden_size);
        let mut shapes = config.named_shapes();
        shapes.insert(weight_of(HEAD), vec![vocabulary, hidden]);
        let mut faults = Vec::new();
        let mut check = |name: &str, found: &[usize], wanted: Option<&Vec<usize>>| {
            let Some(wanted) = wanted.filter(|wanted| *wanted != found) else { return };
            let more = match found.len() == 2 && wanted[0] == vocabulary && found[0] > vocabulary {
                true => "; tokens were added to the model it was trained on",
                false => "",
            };
            faults.push(format!("`{name}` has shape {found:?}, expected {wanted:?}{more}"));
        };
        for (name, copy) in &self.copies {
            check(name, copy.parameter.value().shape(), shapes.get(name));
        }
        for (name, end) in &self.brought {
            check(name, end.weight.value().shape(), Some(&vec![vocabulary, hidden]));
        }
        let ends = [
            (&self.embedding, [Some(vocabulary), None], hidden),
            (&self.head, [None, Some(hidden)], vocabulary),
        ];
        for (pair, of_a, outputs) in ends {
            let Some(EndPair { a, b, .. }) = pair else { continue };
            let rank = b.parameter.value().cols();
            let of_a = of_a.map(|extent| extent.unwrap_or(rank)).to_vec();
            for (part, wanted) in [(a, of_a), (b, vec![outputs, rank])] {
                check(part.parameter.name(), part.parameter.value().shape(), Some(&wanted));
            }
        }
        for rows in self.rows() {
            let value = rows.values.parameter.value();
            let wanted = vec![value.rows(), hidden];
            check(rows.values.parameter.name(), value.shape(), Some(&wanted));
        }
        if let Some(tokens) = self.spec.tokens.as_ref().filter(|_| self.rows().next().is_some()) {
            faults.extend(tokens.check(vocabulary).err().map(|fault| fault.to_string()));
        }
        faults.extend(
            self.copies
                .keys()
                .filter(|name| !shapes.contains_key(*name))
                .map(|name| format!("`{name}` is for a module the model does not have")),
        );
        let missing_pair =
            |(at, pair): (usize, bool)| (self.spec.wanted[at] && !pair).then_some(at);
        let pairs = [self.embedding.is_some(), self.head.is_some()].into_iter().enumerate();
        faults.extend(pairs.filter_map(missing_pair).map(|at| {
            let names = pair_names([EMBEDDING, HEAD][at]);
            format!("`{}` is missing, whose module is a target", names[0])
        }));
        if self.spec.tokens.is_some() && self.rows().next().is_none() {
            faults.push(format!("`{}` is missing", tokens::name_of(EMBEDDING)));
        }
        let kept_tied = self.keeps_tied();
        let tied_away = |name: &String| kept_tied && *name == weight_of(HEAD);
        let missing = |name: &&String| {
            is_saved(&self.spec.modules_to_save, name)
                && !self.copies.contains_key(*name)
                && !tied_away(name)
        };
        faults.extend(
            shapes
                .keys()
                .filter(missing)
                .map(|name| format!("`{name}` is missing, which modules_to_save lists")),
        );
        faults
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_meant_by_the_end_of_their_names_as_peft_has_it() {
        let saved = |key: &str, name: &str| is_saved(&[key.to_owned()], name);
        assert!(saved("norm", "model.norm.weight"));
        assert!(saved("norm", "model.layers.3.input_layernorm.weight"));
        assert!(saved("lm_head", "lm_head.weight"));
        assert!(saved("mlp", "model.layers.0.mlp.gate_proj.weight"));
        assert!(saved("layers.0", "model.layers.0.mlp.gate_proj.bias"));
        assert!(saved("q_proj", "model.layers.0.self_attn.q_proj.bias"));
        assert!(!saved("norm", "model.layers.0.mlp.gate_proj.weight"));
        assert!(!saved("layers.1", "model.layers.11.mlp.gate_proj.weight"));
        assert!(!saved("weight", "lm_head.weight"));
    }

    #[test]
    fn transposing_twice_changes_nothing() {
        let m = Tensor::from_f64(DType::F64, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [2, 3]);
        assert_eq!(transposed(&m).to_f64(), [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
        assert_eq!(transposed(&transposed(&m)).to_f64(), m.to_f64());
    }
}
