//! The training pass: loss and gradients of one micro-batch.
//!
//! The last layer's feed-forward block is computed only at rows that carry a label. With
//! checkpointing (Chen et al., arXiv 1604.06174) a layer keeps its input alone; its activations are
//! computed again, one layer at a time, when the gradient comes back to it.

use super::layers::{Forward, Keep, KeepGraph};
use super::lead::{Lead, PackedAttention, Placed, SharedKeys};
use super::{Decoder, IGNORE_LABEL, Packed, check_finite};
use crate::adapter::{Adapter, Adapters, Aside, KeyValue, Order, Pass};
use crate::error::{Error, Result};
use crate::site::Site;
use hydralora_kernels::ops::cross_entropy::CrossEntropy;
use hydralora_kernels::ops::elementwise::add;
use hydralora_kernels::ops::rows::take_rows;
use hydralora_kernels::{Gradients, Tensor, Var, backward_onto};

/// What a micro-batch gave.
pub struct Trained {
    /// The factor times the sum of all token losses.
    pub loss: f64,
    /// What the adapter added to it.
    pub added: f64,
    /// Gradients of the sum of both.
    pub gradients: Gradients,
}

/// A loss term an adapter adds once the pass has run, shape `[1]`.
pub type Added<'a> = &'a dyn Fn(&Pass<'_>) -> Option<Var>;

impl Decoder {
    /// Computes the cross-entropy of `batch` against `labels` (the token each row predicts,
    /// [`IGNORE_LABEL`] for none) times `factor`, plus what `added` gives, and the gradients of
    /// that sum with respect to everything trainable in `adapter`.
    ///
    /// # Errors
    /// If no row carries a label, a sequence is empty or longer than the context, a token id is out
    /// of range, or the activations stop being finite.
    pub fn gradients(
        &self,
        batch: Packed<'_>,
        labels: &[u32],
        factor: f64,
        adapter: &dyn Adapter,
        pass: &Pass<'_>,
        added: Added<'_>,
    ) -> Result<Trained> {
        assert_eq!(batch.tokens.len(), labels.len(), "one label per token");
        let lead = self.lead(adapter, pass);
        self.validate(batch, |_| lead.rows())?;
        let placed = Placed::new(batch.offsets, &lead);
        let rows = LabelRows::of(labels, batch.offsets, &lead)?;
        // What the adapter does to a row may depend on others, so all of them are computed.
        let early = adapter.rows_stand_alone();
        let adapters = Adapters::One(adapter);
        let embeddings = self.embed(adapter, batch.tokens);
        let h = lead.before(embeddings, batch.offsets, &placed.starts);
        pass.follow(Order::packed(placed.offsets()));
        let shared = self.shared(&adapters, pass, batch, (lead.prompt_rows, &placed.starts), &h);
        let tables = placed.rope_tables(self);
        let micro_batch = MicroBatch {
            decoder: self,
            adapter,
            run: Forward { adapters, pass, tables, shared, rows: early.then_some(&rows.at) },
            rows: &rows,
            factor,
            added,
        };
        if pass.keeps_layer_inputs_only() {
            return micro_batch.recomputing(h, &placed, &lead.prefix);
        }
        let mut attention = PackedAttention::new(&placed, &lead.prefix, SharedKeys::default());
        let layers = 0..self.layers.len();
        let h = self.run_layers(layers, h, &micro_batch.run, &mut attention, &mut KeepGraph);
        let (total, loss, added) = micro_batch.loss(&h)?;
        drop(h);
        Ok(Trained { loss, added, gradients: total.backward() })
    }
}

/// The rows that carry a label.
struct LabelRows {
    /// What they predict.
    labels: Vec<u32>,
    /// Where they are among the rows of the hidden state, which has the prompt's rows too.
    at: Vec<usize>,
}

impl LabelRows {
    fn of(labels: &[u32], offsets: &[usize], lead: &Lead) -> Result<Self> {
        // Rows of the hidden state stand behind those of the prompt.
        let mut sequence = 0;
        let mut rows = Self { labels: Vec::new(), at: Vec::new() };
        for (row, &label) in labels.iter().enumerate().filter(|(_, label)| **label != IGNORE_LABEL)
        {
            while row >= offsets[sequence + 1] {
                sequence += 1;
            }
            rows.labels.push(label);
            rows.at.push(row + (sequence + 1) * lead.prompt_rows);
        }
        if rows.at.is_empty() { Err(Error::NoLabels) } else { Ok(rows) }
    }
}

/// A micro-batch on its way through the decoder.
struct MicroBatch<'a> {
    decoder: &'a Decoder,
    adapter: &'a dyn Adapter,
    run: Forward<'a>,
    rows: &'a LabelRows,
    factor: f64,
    added: Added<'a>,
}

impl MicroBatch<'_> {
    /// From the last layer's output to the loss with what the adapter adds: the sum of both, and each.
    fn loss(&self, h: &Var) -> Result<(Var, f64, f64)> {
        let (adapter, pass) = (self.adapter, self.run.pass);
        let h = if self.run.rows.is_some() { h.clone() } else { take_rows(h, &self.rows.at) };
        let hidden = self.decoder.final_norm(&h, &self.run.adapters);
        check_finite(hidden.value())?;
        let found: CrossEntropy =
            self.decoder.loss_with(adapter, &hidden, &self.rows.labels, self.factor, pass);
        let loss = found.loss.value().item();
        Ok(match (self.added)(pass) {
            Some(term) => {
                let added = term.value().item();
                (add(&found.loss, term), loss, added)
            }
            None => (found.loss, loss, 0.0),
        })
    }

    /// Loss and gradients with only the layers' inputs kept, from the input `start` of the first.
    fn recomputing(
        mut self,
        start: Var,
        placed: &Placed,
        prefix: &[Option<KeyValue>],
    ) -> Result<Trained> {
        let pass = self.run.pass;
        // What all layers share was computed once; its gradient is the sum of theirs.
        let shared = self.run.shared.take();
        let shared_leaf = shared.as_ref().map(|shared| match shared.needs_grad() {
            true => Var::leaf(shared.value().clone()),
            false => shared.clone(),
        });
        self.run.shared = shared_leaf.clone();
        // Learned keys and values are computed once; each layer sees them as leaves of its own.
        let leaves: Vec<Option<KeyValue>> =
            prefix.iter().map(|part| part.as_ref().map(as_leaves)).collect();
        let mut attention = PackedAttention::new(placed, &leaves, SharedKeys::cut_off());
        let layers = 0..self.decoder.layers.len();
        let mut kept =
            KeepInputs { pass, inputs: Vec::new(), trained_below: vec![start.needs_grad()] };
        let h = start.detach();
        let h = self.decoder.run_layers(layers, h, &self.run, &mut attention, &mut kept);
        let KeepInputs { inputs, trained_below, .. } = kept;

        // What the adapter set aside for its own loss term gets a gradient here and hands it to the
        // layer that computes it again.
        let set_aside = pass.take_set_aside();
        let aside: Vec<_> = (set_aside.iter())
            .map(|(key, value)| (*key, Var::leaf(value.value().clone())))
            .collect();
        for ((site, what), leaf) in &aside {
            pass.set_aside(*site, *what, leaf.clone());
        }
        let last = Var::leaf(h.into_value());
        let (total, loss, added) = self.loss(&last)?;
        let mut gradients = total.backward();
        let _ = pass.take_set_aside();

        let mut carried = gradients.take(&last);
        for (index, input) in inputs.into_iter().enumerate().rev() {
            let Some(gradient) = carried.take().filter(|_| trained_below[index + 1]) else { break };
            let input = if trained_below[index] { Var::leaf(input) } else { Var::constant(input) };
            let layer = index..index + 1;
            let again = input.clone();
            let output =
                self.decoder.run_layers(layer, again, &self.run, &mut attention, &mut KeepGraph);
            pass.forget_shared();
            let mut seeds = vec![(output, gradient)];
            seeds.extend(seeds_of(index, &aside, pass, &mut gradients));
            seeds.extend(attention.shared.seeds_of(index, &mut gradients));
            backward_onto(seeds, &mut gradients);
            carried = gradients.take(&input);
        }
        // What lies before the layers: the prompt's and the prefix's own making.
        let mut seeds: Vec<(Var, Tensor)> = carried.map(|g| (start, g)).into_iter().collect();
        for (real, leaf) in prefix.iter().zip(&leaves) {
            if let (Some(real), Some(leaf)) = (real, leaf) {
                for (real, leaf) in [(&real.keys, &leaf.keys), (&real.values, &leaf.values)] {
                    seeds.extend(gradients.take(leaf).map(|gradient| (real.clone(), gradient)));
                }
            }
        }
        for (key, leaf) in aside.iter().filter(|((site, _), _)| site.linear.outside) {
            let gradient = gradients.take(leaf);
            seeds.extend(gradient.map(|gradient| (set_aside[key].clone(), gradient)));
        }
        if let (Some(shared), Some(leaf)) = (shared, shared_leaf) {
            seeds.extend(gradients.take(&leaf).map(|gradient| (shared, gradient)));
        }
        backward_onto(seeds, &mut gradients);
        Ok(Trained { loss, added, gradients })
    }
}

/// Keeps every layer's input as a mere value, and nothing that was computed inside.
struct KeepInputs<'a> {
    pass: &'a Pass<'a>,
    inputs: Vec<Tensor>,
    /// Whether something below layer `i` is trained.
    trained_below: Vec<bool>,
}

impl Keep for KeepInputs<'_> {
    fn enter(&mut self, _layer: usize, input: Var) -> Var {
        self.inputs.push(input.value().clone());
        input
    }

    fn leave(&mut self, layer: usize, output: Var) -> Var {
        self.trained_below.push(self.trained_below[layer] || output.needs_grad());
        self.pass.forget_shared();
        self.pass.detach_set_aside();
        output.detach()
    }
}

fn as_leaves(part: &KeyValue) -> KeyValue {
    let leaf = |var: &Var| Var::leaf(var.value().clone());
    KeyValue { keys: leaf(&part.keys), values: leaf(&part.values) }
}

/// What layer `index` set aside when it was computed again, with the gradients that came to it.
fn seeds_of(
    index: usize,
    aside: &[((Site, Aside), Var)],
    pass: &Pass<'_>,
    gradients: &mut Gradients,
) -> Vec<(Var, Tensor)> {
    let mut again = pass.take_set_aside();
    let of_layer = aside.iter().filter(|((site, _), _)| site.layer == index);
    of_layer.filter_map(|(key, leaf)| Some((again.remove(key)?, gradients.take(leaf)?))).collect()
}
