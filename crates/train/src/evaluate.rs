//! Held-out loss, in total and per domain.

use crate::error::{Error, Result};
use crate::heads::HeadSummary;
use crate::routing::{Routing, RoutingLog};
use hydralora_data::{Batch, Example, Examples, valid_batches};
use hydralora_kernels::no_grad;
use hydralora_model::adapter::{Adapter, Pass};
use hydralora_model::{Decoder, Packed};
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicBool, Ordering};

/// Tokens of an evaluation batch.
const TOKENS_PER_BATCH: usize = 4096;

/// Held-out loss.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Mean loss in nats per label token.
    pub loss: f64,
    /// Label tokens it is the mean over.
    pub label_tokens: usize,
    /// The same for every domain that has held-out records.
    pub domains: Vec<DomainLoss>,
    /// Mean gates, if the adapter routes.
    #[serde(skip)]
    pub routing: Option<Routing>,
    /// Distance of the routers' weights from where they started, over the norm of the start; none
    /// without routers, and outside of training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub router_movement: Option<f64>,
    /// What the heads have in common; none where there is one alone, and outside of training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heads: Option<HeadSummary>,
}

/// Held-out loss of one domain.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DomainLoss {
    /// The domain.
    pub domain: String,
    /// Mean loss in nats per label token.
    pub loss: f64,
    /// Label tokens.
    pub label_tokens: usize,
    /// Records.
    pub records: usize,
}

/// Evaluates `examples` with `adapter` on.
///
/// # Errors
/// If a sequence does not fit the model.
pub fn evaluate(
    decoder: &Decoder,
    adapter: &dyn Adapter,
    examples: &Examples,
    domains: &[String],
) -> Result<Evaluation> {
    let never = AtomicBool::new(false);
    let found = evaluate_until(&never, decoder, adapter, examples, domains)?;
    found.ok_or_else(|| Error::Nothing { message: "the evaluation was broken off".to_owned() })
}

/// The same until `stop` is set, which is looked at before every batch; none then.
///
/// # Errors
/// As [`evaluate`].
pub fn evaluate_until(
    stop: &AtomicBool,
    decoder: &Decoder,
    adapter: &dyn Adapter,
    examples: &Examples,
    domains: &[String],
) -> Result<Option<Evaluation>> {
    let _guard = no_grad();
    let log = RoutingLog::new(domains.len());
    let mut sums = vec![(0.0, 0_usize, 0_usize); domains.len()];
    for indices in valid_batches(examples, 64, Some(TOKENS_PER_BATCH)).iter() {
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let chosen = indices.map(|index| examples.get(index));
        let chosen: Vec<Example> = chosen.collect::<hydralora_data::Result<_>>()?;
        let batch = Batch::pack(&chosen.iter().collect::<Vec<_>>());
        let of_token = token_domains(&batch);
        log.next_batch(of_token.clone());
        let pass = Pass::inference().observed_by(&log).of_sequences(&batch.offsets, &batch.domains);
        let packed = Packed { tokens: &batch.tokens, offsets: &batch.offsets };
        let hidden = decoder.hidden(packed, adapter, &pass)?;
        let found = decoder.loss_with(adapter, &hidden, &batch.labels, 1.0, &pass);
        for (&row, loss) in found.rows.iter().zip(&found.token_losses) {
            let sum = &mut sums[of_token[row] as usize];
            sum.0 += loss;
            sum.1 += 1;
        }
        for &domain in &batch.domains {
            sums[domain as usize].2 += 1;
        }
    }
    let label_tokens: usize = sums.iter().map(|sum| sum.1).sum();
    let total: f64 = sums.iter().map(|sum| sum.0).sum();
    let per_domain = domains.iter().zip(&sums).filter(|(_, sum)| sum.1 > 0);
    Ok(Some(Evaluation {
        loss: total / label_tokens.max(1) as f64,
        label_tokens,
        domains: per_domain
            .map(|(domain, &(loss, label_tokens, records))| DomainLoss {
                domain: domain.clone(),
                loss: loss / label_tokens as f64,
                label_tokens,
                records,
            })
            .collect(),
        routing: log.summary(domains),
        router_movement: None,
        heads: None,
    }))
}

/// The domain of every token of a batch.
pub(crate) fn token_domains(batch: &Batch) -> Vec<u32> {
    let lengths = batch.offsets.windows(2).map(|w| w[1] - w[0]);
    lengths
        .zip(&batch.domains)
        .flat_map(|(len, &domain)| std::iter::repeat_n(domain, len))
        .collect()
}
