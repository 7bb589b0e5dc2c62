//! Answers that are sent while they come, as server-sent events.

use crate::app::{App, InFlight};
use crate::error::ApiError;
use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use futures_util::stream::unfold;
use serde_json::Value;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// Pieces that may lie ready for a caller before it is waited for.
const AHEAD: usize = 64;
/// How often a caller is told that it is not forgotten.
const ALIVE: Duration = Duration::from_secs(15);

/// Where the pieces of an answer go.
#[derive(Clone)]
pub(crate) struct Pieces(mpsc::Sender<String>);

/// That nobody reads any more.
pub(crate) struct Gone;

impl Pieces {
    /// Sends a piece.
    pub(crate) async fn data(&self, piece: &Value) -> Result<(), Gone> {
        self.raw(format!("data: {piece}\n\n")).await
    }

    /// Sends a piece with the name of its kind.
    pub(crate) async fn event(&self, name: &str, piece: &Value) -> Result<(), Gone> {
        self.raw(format!("event: {name}\ndata: {piece}\n\n")).await
    }

    /// Says that that was all.
    pub(crate) async fn done(&self) -> Result<(), Gone> {
        self.raw("data: [DONE]\n\n".to_owned()).await
    }

    async fn raw(&self, text: String) -> Result<(), Gone> {
        self.0.send(text).await.map_err(|_| Gone)
    }
}

/// Why a stream ended before its time.
pub(crate) enum Broken {
    Gone,
    Failed(ApiError),
}

impl From<Gone> for Broken {
    fn from(_: Gone) -> Self {
        Self::Gone
    }
}

impl From<ApiError> for Broken {
    fn from(error: ApiError) -> Self {
        Self::Failed(error)
    }
}

/// Answers with what `write` sends. It is given up, and with it what it asked of the engine, when nobody
/// reads any more or its time is over. A failure is sent as the last piece, as `fail` writes it.
pub(crate) fn respond<F>(
    app: &Arc<App>,
    in_flight: InFlight,
    write: impl FnOnce(Pieces) -> F,
    fail: fn(&ApiError) -> (Option<&'static str>, Value),
) -> Response
where
    F: Future<Output = Result<(), Broken>> + Send + 'static,
{
    let (sender, receiver) = mpsc::channel(AHEAD);
    let most = app.options.request_time;
    let pieces = Pieces(sender.clone());
    let written = write(pieces.clone());
    tokio::spawn(async move {
        let _in_flight = in_flight;
        let mut alive = tokio::time::interval(ALIVE);
        alive.tick().await;
        let work = async {
            let mut work = Box::pin(tokio::time::timeout(most, written));
            loop {
                tokio::select! {
                    done = &mut work => break done,
                    () = sender.closed() => break Ok(Err(Broken::Gone)),
                    _ = alive.tick() => drop(sender.try_send(": still here\n\n".to_owned())),
                }
            }
        };
        let failed = match work.await {
            Ok(Ok(()) | Err(Broken::Gone)) => return,
            Ok(Err(Broken::Failed(error))) => error,
            Err(_) => ApiError::out_of_time(most.as_secs()),
        };
        // A caller that reads nothing does not hold this up.
        let last = async {
            let (name, piece) = fail(&failed);
            let _ = match name {
                Some(name) => pieces.event(name, &piece).await,
                None => pieces.data(&piece).await,
            };
            if name.is_none() {
                let _ = pieces.done().await;
            }
        };
        let _ = tokio::time::timeout(Duration::from_secs(1), last).await;
    });
    let body = unfold(receiver, async |mut receiver| {
        let piece = receiver.recv().await?;
        Some((Ok::<_, Infallible>(piece), receiver))
    });
    let mut response = Body::from_stream(body).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    // Proxies are not to gather the pieces.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}
