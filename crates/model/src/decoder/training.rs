//! The training pass: loss and gradients of one micro-batch.
//!
//! The last layer's feed-forward block is computed only at rows that carry a label. With
//! checkpointing (Chen et al., arXiv 1604.06174) a layer keeps its input alone; its activations are
//! computed again, one layer at a time, when the gradient comes back to it.

use super::{Decoder, IGNORE_LABEL, Lead, Packed, Placed, check_finite};
use crate::adapter::{Adapter, KeyValue, Pass};
use crate::error::{Error, Result};
use hydralora_kernels::ops::cross_entropy::CrossEntropy;
use hydralora_kernels::ops::elementwise::add;
use hydralora_kernels::ops::rows::take_rows;
use hydralora_kernels::{Gradients, Tensor, Var, backward_onto};
use std::mem;

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
    /// The cross-entropy of `batch` against `labels` (the token each row predicts,
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
        let (lead, placed, rows) = self.prepare(batch, labels, adapter, pass)?;
        if pass.keeps_layer_inputs_only() {
            return self
                .recomputing(batch, labels, factor, adapter, pass, added, lead, placed, &rows);
        }
        let embeddings = adapter.embed(batch.tokens, &self.embedding);
        let mut h = lead.before(embeddings, batch.offsets, &placed.starts);
        for index in 0..self.layers.len() {
            h = self.training_layer(index, h, &lead.prefix[index], &placed, adapter, pass, &rows);
        }
        let found = self.tail(&h, labels, factor, &rows, adapter)?;
        drop(h);
        let (total, loss, added) = with_added(found, added(pass));
        Ok(Trained { loss, added, gradients: total.backward() })
    }

    fn prepare(
        &self,
        batch: Packed<'_>,
        labels: &[u32],
        adapter: &dyn Adapter,
        pass: &Pass<'_>,
    ) -> Result<(Lead, Placed, LabelRows)> {
        assert_eq!(batch.tokens.len(), labels.len(), "one label per token");
        let lead = Lead::of(adapter, self.layers.len(), pass);
        self.validate(batch, |_| lead.rows())?;
        let placed = self.place(batch.offsets, &lead);
        let labelled: Vec<usize> =
            (0..labels.len()).filter(|&row| labels[row] != IGNORE_LABEL).collect();
        if labelled.is_empty() {
            return Err(Error::NoLabels);
        }
        // Rows of the hidden state stand behind those of the prompt.
        let mut sequence = 0;
        let at = labelled
            .iter()
            .map(|&row| {
                while row >= batch.offsets[sequence + 1] {
                    sequence += 1;
                }
                row + (sequence + 1) * lead.prompt_rows
            })
            .collect();
        let rows = LabelRows { labelled, at, early: adapter.rows_stand_alone() };
        Ok((lead, placed, rows))
    }

    fn training_layer(
        &self,
        index: usize,
        h: Var,
        prefix: &Option<KeyValue>,
        placed: &Placed,
        adapter: &dyn Adapter,
        pass: &Pass<'_>,
        rows: &LabelRows,
    ) -> Var {
        let chosen = (rows.early && index + 1 == self.layers.len()).then_some(&rows.at[..]);
        let attention = |q, k, v| self.attend_placed(q, k, v, prefix, placed);
        self.layer_forward(index, h, &placed.table, adapter, pass, attention, chosen)
    }

    /// From the last layer's output to the loss.
    fn tail(
        &self,
        h: &Var,
        labels: &[u32],
        factor: f64,
        rows: &LabelRows,
        adapter: &dyn Adapter,
    ) -> Result<CrossEntropy> {
        let h = if rows.early { h.clone() } else { take_rows(h, &rows.at) };
        let hidden = self.final_norm(&h, adapter);
        check_finite(hidden.value())?;
        let labels: Vec<u32> = rows.labelled.iter().map(|&row| labels[row]).collect();
        Ok(self.loss_with(adapter, &hidden, &labels, factor))
    }

    /// [`gradients`](Self::gradients) with only the layers' inputs kept.
    #[allow(clippy::too_many_arguments)]
    fn recomputing(
        &self,
        batch: Packed<'_>,
        labels: &[u32],
        factor: f64,
        adapter: &dyn Adapter,
        pass: &Pass<'_>,
        added: Added<'_>,
        mut lead: Lead,
        placed: Placed,
        rows: &LabelRows,
    ) -> Result<Trained> {
        let embeddings = adapter.embed(batch.tokens, &self.embedding);
        let start = lead.before(embeddings, batch.offsets, &placed.starts);
        // Learned keys and values are computed once; each layer sees them as leaves of its own.
        let prefix: Vec<Option<KeyValue>> = mem::take(&mut lead.prefix).into_iter().collect();
        let leaves: Vec<Option<KeyValue>> = prefix
            .iter()
            .map(|part| {
                part.as_ref().map(|part| KeyValue {
                    keys: Var::leaf(part.keys.value().clone()),
                    values: Var::leaf(part.values.value().clone()),
                })
            })
            .collect();

        let mut inputs: Vec<Tensor> = Vec::with_capacity(self.layers.len());
        let mut trained_below = vec![start.needs_grad()];
        let mut h = start.value().clone();
        for index in 0..self.layers.len() {
            let input = Var::constant(h.clone());
            let output =
                self.training_layer(index, input, &leaves[index], &placed, adapter, pass, rows);
            trained_below.push(trained_below[index] || output.needs_grad());
            inputs.push(h);
            h = output.into_value();
            pass.forget_shared();
            pass.detach_set_aside();
        }
        // What the adapter set aside for its own loss term gets a gradient here and hands it to the
        // layer that computes it again.
        let aside: Vec<_> = (pass.take_set_aside().into_iter())
            .map(|(site, value)| (site, Var::leaf(value.into_value())))
            .collect();
        for (site, leaf) in &aside {
            pass.set_aside(*site, leaf.clone());
        }
        let last = Var::leaf(h);
        let found = self.tail(&last, labels, factor, rows, adapter)?;
        let (total, loss, added) = with_added(found, added(pass));
        let mut gradients = total.backward();
        let _ = pass.take_set_aside();

        let mut carried = gradients.take(&last);
        for (index, input) in inputs.into_iter().enumerate().rev() {
            let Some(gradient) = carried.take().filter(|_| trained_below[index + 1]) else { break };
            let input = if trained_below[index] { Var::leaf(input) } else { Var::constant(input) };
            let prefix = &leaves[index];
            let output =
                self.training_layer(index, input.clone(), prefix, &placed, adapter, pass, rows);
            pass.forget_shared();
            let mut seeds = vec![(output, gradient)];
            let mut again = pass.take_set_aside();
            for (site, leaf) in aside.iter().filter(|(site, _)| site.layer == index) {
                if let (Some(value), Some(gradient)) = (again.remove(site), gradients.take(leaf)) {
                    seeds.push((value, gradient));
                }
            }
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
        backward_onto(seeds, &mut gradients);
        Ok(Trained { loss, added, gradients })
    }
}

/// The rows that carry a label.
struct LabelRows {
    /// Among the tokens.
    labelled: Vec<usize>,
    /// Among the rows of the hidden state, which has the prompt's rows too.
    at: Vec<usize>,
    /// Whether the last feed-forward block may be given these rows alone.
    early: bool,
}

fn with_added(found: CrossEntropy, term: Option<Var>) -> (Var, f64, f64) {
    let loss = found.loss.value().item();
    match term {
        Some(term) => {
            let added = term.value().item();
            (add(&found.loss, term), loss, added)
        }
        None => (found.loss, loss, 0.0),
    }
}
