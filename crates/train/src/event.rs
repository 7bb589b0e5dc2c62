//! What a run tells whoever watches it.

use crate::error::Result;
use crate::evaluate::Evaluation;
use crate::fit::RankMetrics;
use crate::heads::RouterMetrics;
use serde::Serialize;
use std::path::PathBuf;

/// Something that happened in a run.
#[derive(Clone, Debug)]
pub enum Event {
    /// Training is about to start or to go on.
    Started {
        /// Steps done already.
        step: usize,
        /// Steps in all.
        total_steps: usize,
    },
    /// An optimizer step was taken.
    Step(StepMetrics),
    /// The held-out records were evaluated after `step`.
    Evaluated {
        /// The step.
        step: usize,
        /// What was found.
        evaluation: Evaluation,
        /// Whether no earlier evaluation was better.
        best: bool,
    },
    /// A checkpoint was written.
    Saved {
        /// The step.
        step: usize,
        /// Its folder.
        path: PathBuf,
    },
    /// Something did not work out that the run does not need.
    Note(String),
}

/// One optimizer step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepMetrics {
    /// Number of the step, from 1.
    pub step: usize,
    /// Passes over the data so far.
    pub epoch: f64,
    /// Mean cross-entropy over the step's label tokens.
    pub loss: f64,
    /// What the method added to it, a balance or a regulariser; 0 for most.
    pub aux_loss: f64,
    /// The learning rate used.
    pub learning_rate: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Tokens of this step.
    pub tokens: usize,
    /// Label tokens of this step.
    pub label_tokens: usize,
    /// Tokens per second over this step.
    pub tokens_per_s: f64,
    /// Largest resident memory of the process so far, where the system tells.
    pub peak_rss_mb: Option<f64>,
    /// Joules used so far, pauses left out; none where they are not known.
    pub energy_j: Option<f64>,
    /// What they come from: `rapl:package-0+dram`, `estimate: 65 W x wall time`.
    pub energy_source: Option<String>,
    /// Seconds since the run first started, pauses left out.
    pub elapsed_s: f64,
    /// Routers and heads, at every tenth step of methods that have them; of the first micro-batch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub routers: Option<RouterMetrics>,
    /// What several ranks spent on each other; none in a run of one process.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ranks: Option<RankMetrics>,
}

/// A receiver of events.
pub trait Sink {
    /// Takes note of an event.
    ///
    /// # Errors
    /// If it cannot be recorded; the run then stops.
    fn record(&mut self, event: &Event) -> Result<()>;
}

/// Sends every event to several sinks.
impl Sink for Vec<Box<dyn Sink + '_>> {
    fn record(&mut self, event: &Event) -> Result<()> {
        self.iter_mut().try_for_each(|sink| sink.record(event))
    }
}

/// The largest resident memory of this process so far in MB, where the system tells.
pub fn peak_rss_mb() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kilobytes: f64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kilobytes / 1024.0)
}

/// Starts the measurement of [`peak_rss_mb`] afresh, where the system can.
pub fn reset_peak_rss() {
    // 5 resets the high-water mark (proc(5)); without the right to do so the old one stays.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}
