//! What is answered at each address.

mod chat;
mod completions;
mod conversation;
mod models;
mod responses;
mod tokens;

pub(crate) use chat::chat;
pub(crate) use completions::completions;
pub(crate) use models::{adapters, load_adapter, model, models, unload_adapter};
pub(crate) use responses::responses;
pub(crate) use tokens::{detokenize, tokenize, tokenizer_info};

use axum::http::header;
use axum::response::{IntoResponse, Response};
use std::time::{SystemTime, UNIX_EPOCH};

/// The page for people.
const PAGE: &str = include_str!("../page.html");
/// What the page may do: its own script and style, and asking this server.
const POLICY: &str = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; \
    connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

pub(crate) async fn page() -> Response {
    let kind = (header::CONTENT_TYPE, "text/html; charset=utf-8");
    ([kind, (header::CONTENT_SECURITY_POLICY, POLICY)], PAGE).into_response()
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
