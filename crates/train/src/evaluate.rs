//! Held-out loss, in total and per domain.

use crate::error::{Error, Result};
use crate::heads::HeadSummary;
use crate::ranks::Team;
use crate::routing::{Routing, RoutingLog};
use hydralora_data::{Batch, Example, Examples, Sets, valid_batches};
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
    /// The same for every evaluation set that has records.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sets: Vec<SetLoss>,
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

impl Evaluation {
    /// The loss of the evaluation set of that name, if it has records; without a name that of all
    /// records together.
    pub fn loss_of(&self, set: Option<&str>) -> Option<f64> {
        let Some(set) = set else { return Some(self.loss) };
        self.sets.iter().find(|of| of.set == set).map(|of| of.loss)
    }
}

/// Held-out loss of one evaluation set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SetLoss {
    /// The set.
    pub set: String,
    /// Mean loss in nats per label token.
    pub loss: f64,
    /// Label tokens.
    pub label_tokens: usize,
    /// Records.
    pub records: usize,
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
    let (team, sets) = (Team::alone(), Sets::default());
    let found = evaluate_until(&team, &never, decoder, adapter, examples, domains, &sets)?;
    found.ok_or_else(|| Error::Nothing { message: "the evaluation was broken off".to_owned() })
}

/// Sums of losses, label tokens and records.
type Sums = Vec<(f64, usize, usize)>;

/// The same, and by the evaluation set of each record, until `stop` is set, which is looked at before
/// every batch; none then. Ranks of a team take batches in turn, and all get the same; which gates were seen
/// rank 0 alone.
///
/// # Errors
/// As [`evaluate`], also of another rank.
pub fn evaluate_until(
    team: &Team<'_>,
    stop: &AtomicBool,
    decoder: &Decoder,
    adapter: &dyn Adapter,
    examples: &Examples,
    domains: &[String],
    sets: &Sets,
) -> Result<Option<Evaluation>> {
    let _guard = no_grad();
    let log = RoutingLog::new(domains.len());
    let mut sums: Sums = vec![(0.0, 0, 0); domains.len()];
    let mut of_sets: Sums = vec![(0.0, 0, 0); sets.names.len()];
    let mut broken_off = false;
    let batches = valid_batches(examples, 64, Some(TOKENS_PER_BATCH));
    for indices in batches.iter().skip(team.rank()).step_by(team.size()) {
        if stop.load(Ordering::Relaxed) {
            broken_off = true;
            break;
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
            // The sequence in which the row stands.
            let sequence = batch.offsets.partition_point(|&start| start <= row) - 1;
            if let Some(set) = sets.of(chosen[sequence].source) {
                of_sets[set].0 += loss;
                of_sets[set].1 += 1;
            }
        }
        for set in chosen.iter().filter_map(|example| sets.of(example.source)) {
            of_sets[set].2 += 1;
        }
        for &domain in &batch.domains {
            sums[domain as usize].2 += 1;
        }
    }
    let mut of_ranks = team.agree("evaluation", Ok((broken_off, sums, of_sets)))?.into_iter();
    let Some((mut broken_off, mut sums, mut of_sets)) = of_ranks.next() else { return Ok(None) };
    for (also, more, more_of_sets) in of_ranks {
        broken_off |= also;
        add_up(&mut sums, more);
        add_up(&mut of_sets, more_of_sets);
    }
    if broken_off {
        return Ok(None);
    }
    log.add_up(team)?;
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
        sets: sets
            .names
            .iter()
            .zip(&of_sets)
            .filter(|(_, sum)| sum.1 > 0)
            .map(|(set, &(loss, label_tokens, records))| SetLoss {
                set: set.clone(),
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

/// Adds the sums of another rank.
fn add_up(sums: &mut Sums, more: Sums) {
    for (sum, more) in sums.iter_mut().zip(more) {
        *sum = (sum.0 + more.0, sum.1 + more.1, sum.2 + more.2);
    }
}

/// The domain of every token of a batch.
pub(crate) fn token_domains(batch: &Batch) -> Vec<u32> {
    let lengths = batch.offsets.windows(2).map(|w| w[1] - w[0]);
    lengths
        .zip(&batch.domains)
        .flat_map(|(len, &domain)| std::iter::repeat_n(domain, len))
        .collect()
}
