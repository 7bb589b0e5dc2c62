//! From a checked request to what the engine is asked, and on to its events.

use crate::app::App;
use crate::error::ApiError;
use crate::loaded::{Loaded, Target};
use crate::types::Common;
use crate::worker::{Asked, Job};
use futures_util::stream::{Stream, select_all, unfold};
use hydralora_run::engine::{Constraint, Event, Refused, Request};
use hydralora_run::{Bias, Sampling};
use std::pin::Pin;
use std::sync::Arc;

/// Makes the constraint of one answer.
pub(crate) type MakeConstraint = Box<dyn Fn() -> Box<dyn Constraint> + Send>;

/// A prompt and how it is to be answered.
pub(crate) struct Ask<'a> {
    pub(crate) prompt: Vec<u32>,
    pub(crate) target: &'a Target,
    pub(crate) common: &'a Common,
    pub(crate) max_new_tokens: usize,
    pub(crate) top_logprobs: Option<usize>,
    pub(crate) prompt_logprobs: Option<usize>,
    /// Whether the prompt is a text to go on with, and no conversation.
    pub(crate) continues: bool,
    pub(crate) constraint: Option<&'a MakeConstraint>,
}

impl Ask<'_> {
    /// One request for each answer that is wanted. The draws of each have a seed of their own, the
    /// first that of the request.
    pub(crate) fn requests(&self) -> Vec<Asked> {
        let Common { sampling, bias, choices, stops, stop_ids, ignore_eos, routing, .. } =
            self.common;
        let end_ids: Arc<[u32]> = match (ignore_eos, stop_ids.is_empty()) {
            (true, _) => stop_ids.clone().into(),
            (false, true) => Arc::clone(&self.target.end_ids),
            (false, false) => self.target.end_ids.iter().chain(stop_ids).copied().collect(),
        };
        let barred = self.target.barred.iter().map(|&token| (token, f64::NEG_INFINITY));
        let bias: Bias = match self.target.barred.is_empty() {
            true => Arc::clone(bias),
            false => bias.iter().copied().chain(barred).collect(),
        };
        let adapter = self.target.adapter.as_ref();
        let one = |choice: usize| {
            let seed = sampling.seed.wrapping_add(choice as u64);
            let request = Request {
                prompt: self.prompt.clone(),
                adapter: adapter.map(|ready| Arc::clone(&ready.served)),
                sampling: Sampling { seed, ..*sampling },
                bias: Arc::clone(&bias),
                max_new_tokens: self.max_new_tokens,
                stops: stops.clone(),
                end_ids: Arc::clone(&end_ids),
                top_logprobs: self.top_logprobs,
                prompt_logprobs: self.prompt_logprobs,
                continues: self.continues,
                constraint: self.constraint.map(|make| make()),
                routing: *routing,
            };
            Asked { request, adapter: adapter.map(|ready| ready.name.clone()) }
        };
        (0..*choices).map(one).collect()
    }
}

/// How many tokens an answer may have; `least` is how many it has to.
///
/// # Errors
/// If the prompt, or what is asked for behind it, does not fit the context, or less may follow than has to.
pub(crate) fn room(
    loaded: &Loaded,
    prompt: usize,
    asked: Option<usize>,
    field: &str,
    usual: usize,
    least: usize,
) -> Result<usize, ApiError> {
    let most = most(loaded, prompt, asked, field, usual)?;
    if least > most {
        let message =
            format!("is {least}; expected at most {most}, as many as may follow ({field})");
        return Err(ApiError::field("min_tokens", message));
    }
    Ok(most)
}

fn most(
    loaded: &Loaded,
    prompt: usize,
    asked: Option<usize>,
    field: &str,
    usual: usize,
) -> Result<usize, ApiError> {
    let context = loaded.context;
    if prompt == 0 {
        return Err(ApiError::invalid("the prompt has no tokens"));
    }
    let left = context.saturating_sub(prompt);
    if prompt > context || (left == 0 && asked != Some(0)) {
        return Err(too_long(prompt, context));
    }
    match asked {
        None => Ok(left.min(usual)),
        Some(asked) if asked > left => {
            let message = format!(
                "is {asked}; the model's context is {context} tokens, of which the prompt takes \
                 {prompt}, so that at most {left} can follow"
            );
            Err(ApiError::field(field, message).coded("context_length_exceeded"))
        }
        Some(asked) => Ok(asked),
    }
}

fn too_long(tokens: usize, context: usize) -> ApiError {
    let message = format!(
        "the prompt has {tokens} tokens, and the model's context is {context} with what follows"
    );
    ApiError::invalid(message).coded("context_length_exceeded")
}

/// Hands requests to the engine.
///
/// # Errors
/// What it refuses, or that there is no room to wait.
pub(crate) async fn submit(loaded: &Loaded, asked: Vec<Asked>) -> Result<Vec<Job>, ApiError> {
    let gone = || ApiError::internal("the engine has ended by a fault; start the server anew");
    loaded.worker.submit(asked).await.map_err(|refused| refused.map_or_else(gone, of_refused))
}

fn of_refused(refused: Refused) -> ApiError {
    match refused {
        Refused::TooLong { tokens, context } => too_long(tokens, context),
        Refused::QueueFull { waiting } => {
            let message = format!("{waiting} requests wait already; try again soon");
            ApiError::busy(message, "queue_full", 1)
        }
        other => ApiError::invalid(other.to_string()),
    }
}

/// The events of several requests as they come, each with its request's number.
pub(crate) fn events(jobs: Vec<Job>) -> Pin<Box<dyn Stream<Item = (usize, Event)> + Send>> {
    let one = |(number, job): (usize, Job)| {
        let next = move |mut job: Job| async move {
            let event = job.next().await?;
            Some(((number, event), job))
        };
        Box::pin(unfold(job, next))
    };
    Box::pin(select_all(jobs.into_iter().enumerate().map(one)))
}

/// Does `work`, which may take a while, beside the threads that serve connections.
///
/// # Errors
/// What it says, or that it failed by a fault.
pub(crate) async fn aside<T: Send + 'static>(
    app: &App,
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|fault| {
        app.options.log.line(&format!("a request came upon a fault of the server: {fault}"));
        Err(ApiError::internal("this request came upon a fault of the server"))
    })
}

/// Does `work` within the time that a request may take.
///
/// # Errors
/// What it says, or that it took too long.
pub(crate) async fn in_time<T>(
    app: &App,
    work: impl Future<Output = Result<T, ApiError>>,
) -> Result<T, ApiError> {
    let most = app.options.request_time;
    let done = tokio::time::timeout(most, work).await;
    done.unwrap_or_else(|_| Err(ApiError::out_of_time(most.as_secs())))
}
