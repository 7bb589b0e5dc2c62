//! Reducing: what several ranks found of one step becomes what all of them follow.
//!
//! Before the first backward pass the label tokens are counted, since the loss is the mean over all of them;
//! after the last the losses and gradients are added up, all gradients in one buffer. A run of one process
//! is given back what it found.

use super::backward::Summed;
use super::load::StepData;
use crate::error::Result;
use crate::ranks::{Team, Traffic};
use hydralora_kernels::{DType, Gradients, Tensor, TensorElement, dispatch};
use hydralora_peft::{Trainable, Tuned};
use serde::{Deserialize, Serialize};

/// What a step consists of, over all ranks.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Totals {
    pub(super) tokens: usize,
    pub(super) label_tokens: usize,
    pub(super) micro_batches: usize,
}

/// Counts a step over all ranks; `own` is what this one read of it.
///
/// # Errors
/// If a rank could not read its share.
pub(super) fn totals(team: &Team<'_>, own: &StepData) -> Result<Totals> {
    let own = Totals {
        tokens: own.tokens(),
        label_tokens: own.label_tokens(),
        micro_batches: own.micro_batches.len(),
    };
    let all = team.agree("load", Ok(own))?;
    let sum = |of: fn(&Totals) -> usize| all.iter().map(of).sum();
    Ok(Totals {
        tokens: sum(|of| of.tokens),
        label_tokens: sum(|of| of.label_tokens),
        micro_batches: sum(|of| of.micro_batches),
    })
}

/// What a rank tells of its way back before gradients travel.
#[derive(Serialize, Deserialize)]
struct Found {
    loss: f64,
    aux_loss: f64,
    /// For each trainable, `1` where the rank has a gradient.
    present: String,
    /// What its method counted.
    tallies: Vec<Vec<u64>>,
}

/// Adds up what all ranks found, the same bits on each.
///
/// # Errors
/// If a rank's loss is not finite, or a rank is gone.
pub(super) fn sums(team: &Team<'_>, tuned: &mut dyn Tuned, own: Summed) -> Result<Summed> {
    if team.size() == 1 {
        return Ok(own);
    }
    let has = |gradient: Option<&Tensor>| if gradient.is_some() { '1' } else { '0' };
    let present = tuned.trainables().into_iter().map(|of| has(own.gradients.get(of.var())));
    let present = present.collect();
    let tallies = tuned.tallies().into_iter().map(|tally| tally.to_vec()).collect();
    let found = Found { loss: own.loss, aux_loss: own.aux_loss, present, tallies };
    let all = team.agree("backward", Ok(found))?;
    let trained = tuned.trainables().len();
    let one_has = |at: usize| all.iter().any(|of| of.present.as_bytes().get(at) == Some(&b'1'));
    let wanted: Vec<bool> = (0..trained).map(one_has).collect();
    for (number, tally) in tuned.tallies().into_iter().enumerate() {
        for (at, count) in tally.iter_mut().enumerate() {
            *count = all.iter().filter_map(|of| of.tallies.get(number)?.get(at)).sum();
        }
    }
    let parameters: &dyn Tuned = tuned;
    let mut gradients = own.gradients;
    for dtype in [DType::F32, DType::F64] {
        dispatch!(dtype, |E| add_up::<E>(team, parameters, dtype, &wanted, &mut gradients)?);
    }
    Ok(Summed {
        gradients,
        loss: all.iter().map(|of| of.loss).sum(),
        aux_loss: all.iter().map(|of| of.aux_loss).sum(),
    })
}

/// Adds up the gradients of one type. One that no rank has stays away: its parameter does not move.
fn add_up<E: TensorElement>(
    team: &Team<'_>,
    tuned: &dyn Tuned,
    dtype: DType,
    wanted: &[bool],
    gradients: &mut Gradients,
) -> Result<()> {
    let trainables = || {
        let all = tuned.trainables().into_iter().zip(wanted);
        let of_type = move |of: &Trainable| of.parameter.value().dtype() == dtype;
        all.filter(move |(of, wanted)| **wanted && of_type(of)).map(|(of, _)| of)
    };
    let len = trainables().map(|of| of.parameter.value().len()).sum();
    let mut buffer: Vec<E> = Vec::with_capacity(len);
    for of in trainables() {
        match gradients.take(of.var()) {
            Some(gradient) => buffer.extend_from_slice(gradient.data::<E>()),
            None => buffer.resize(buffer.len() + of.parameter.value().len(), E::ZERO),
        }
    }
    team.sum(&mut buffer)?;
    let mut rest = buffer.as_slice();
    for of in trainables() {
        let value = of.parameter.value();
        let (own, more) = rest.split_at(value.len());
        rest = more;
        let mut gradient = Tensor::zeros(dtype, value.shape());
        gradient.data_mut::<E>().copy_from_slice(own);
        gradients.put(of.var(), gradient);
    }
    Ok(())
}

/// What a step cost the ranks beside computing.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct RankMetrics {
    /// Number of ranks.
    pub ranks: usize,
    /// Seconds until all ranks were at the same place.
    pub waited_s: f64,
    /// Seconds in which gradients travelled.
    pub summed_s: f64,
    /// Bytes that a rank sent and received for them.
    pub bytes: u64,
}

impl RankMetrics {
    /// What came since `before`; nothing for a run of one process.
    pub(super) fn since(before: Traffic, team: &Team<'_>) -> Option<Self> {
        let now = team.traffic();
        (team.size() > 1).then(|| Self {
            ranks: team.size(),
            waited_s: now.waited_s - before.waited_s,
            summed_s: now.summed_s - before.summed_s,
            bytes: now.bytes - before.bytes,
        })
    }
}

/// Words for the values of an adapter, so that ranks can be compared.
pub(super) fn digest(tuned: &dyn Tuned) -> String {
    let of_tensor = |crc: u32, tensor: &Tensor| {
        let values = tensor.to_f64();
        crc32c::crc32c_append(crc, bytemuck::cast_slice(&values))
    };
    let trainables = tuned.trainables();
    let crc = trainables.iter().fold(0, |crc, of| of_tensor(crc, of.parameter.value()));
    format!("{crc:08x}")
}
