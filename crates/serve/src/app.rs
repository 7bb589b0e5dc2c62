//! What all requests share, and the ways they take.

use crate::adapters::AdapterLimits;
use crate::api;
use crate::error::ApiError;
use crate::loaded::Loaded;
use crate::metrics::Metrics;
use crate::worker::Snapshot;
use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderValue, Method, Request, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use sha2::{Digest, Sha256};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use subtle::ConstantTimeEq;
use tokio::sync::watch;
use tower_http::cors::{AllowOrigin, CorsLayer};

/// A key that callers show, as its hash.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct ApiKey([u8; 32]);

impl ApiKey {
    /// Takes a key.
    pub fn new(key: &str) -> Self {
        Self(Sha256::digest(key).into())
    }
}

impl std::fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ApiKey(..)")
    }
}

/// Where the server tells whoever runs it what went wrong, a line at a time. Callers are told less.
#[derive(Clone)]
pub struct Log(Arc<dyn Fn(&str) + Send + Sync>);

impl Log {
    /// Tells by `line`, which any thread may call.
    pub fn new(line: impl Fn(&str) + Send + Sync + 'static) -> Self {
        Self(Arc::new(line))
    }

    /// Tells `text` in one line.
    pub(crate) fn line(&self, text: &str) {
        let one: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        (self.0)(&one.join("; "));
    }
}

impl Default for Log {
    /// Tells nobody.
    fn default() -> Self {
        Self::new(|_| {})
    }
}

impl std::fmt::Debug for Log {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Log(..)")
    }
}

/// How the server behaves, whatever it serves.
#[derive(Clone, Debug)]
pub struct Options {
    /// The name under which the base is asked.
    pub model: String,
    /// Keys of which a caller has to show one; nobody needs one if there is none.
    pub keys: Vec<ApiKey>,
    /// Most bytes of a request's body.
    pub max_body_bytes: usize,
    /// Most time for an answer.
    pub request_time: Duration,
    /// Most time for a request's head, and between two requests of a connection.
    pub header_time: Duration,
    /// Most time that a caller may leave what is sent to it unread.
    pub write_time: Duration,
    /// Most time for the answers that are in work when the server is told to end.
    pub drain_time: Duration,
    /// Most connections at a time; further ones wait.
    pub max_connections: usize,
    /// Sites whose pages may ask.
    pub cors_origins: Vec<String>,
    /// What adapters may take.
    pub adapters: AdapterLimits,
    /// Where failures are told.
    pub log: Log,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            model: "model".to_owned(),
            keys: Vec::new(),
            max_body_bytes: 16 << 20,
            request_time: Duration::from_secs(600),
            header_time: Duration::from_secs(15),
            write_time: Duration::from_secs(60),
            drain_time: Duration::from_secs(60),
            max_connections: 1024,
            cors_origins: Vec::new(),
            adapters: AdapterLimits::default(),
            log: Log::default(),
        }
    }
}

/// What all requests share.
pub(crate) struct App {
    pub(crate) options: Options,
    pub(crate) metrics: Arc<Metrics>,
    loaded: OnceLock<Arc<Loaded>>,
    draining: AtomicBool,
    in_flight: watch::Sender<usize>,
}

/// A request that is being answered.
pub(crate) struct InFlight(Arc<App>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.send_modify(|count| *count -= 1);
    }
}

impl App {
    pub(crate) fn new(options: Options) -> Arc<Self> {
        let metrics = Arc::new(Metrics::new(&options.model));
        let (loaded, draining) = (OnceLock::new(), AtomicBool::new(false));
        let in_flight = watch::Sender::new(0);
        Arc::new(Self { options, metrics, loaded, draining, in_flight })
    }

    /// Takes the model, from now on requests are answered. False if there is one already.
    pub(crate) fn ready(&self, loaded: Loaded) -> bool {
        self.loaded.set(Arc::new(loaded)).is_ok()
    }

    /// The model.
    ///
    /// # Errors
    /// If it is not there yet, or its engine is gone.
    pub(crate) fn loaded(&self) -> Result<Arc<Loaded>, ApiError> {
        let loaded = self.loaded.get();
        let loaded = loaded.ok_or_else(|| ApiError::unavailable("the model is being loaded"))?;
        if loaded.worker.failed() {
            return Err(ApiError::internal(
                "the engine has ended by a fault; start the server anew",
            ));
        }
        Ok(Arc::clone(loaded))
    }

    /// Notes that a request is being answered, for as long as what is returned lives.
    ///
    /// # Errors
    /// If the server is about to end.
    pub(crate) fn begin(self: &Arc<Self>) -> Result<InFlight, ApiError> {
        // Counted first: whoever drains sees it, or it sees the drain.
        self.in_flight.send_modify(|count| *count += 1);
        let in_flight = InFlight(Arc::clone(self));
        match self.draining.load(Ordering::SeqCst) {
            true => Err(ApiError::unavailable("the server is about to end")),
            false => Ok(in_flight),
        }
    }

    /// Takes no more requests and waits for those in work, as long as that may take. False if some
    /// were left.
    pub(crate) async fn drain(&self) -> bool {
        self.draining.store(true, Ordering::SeqCst);
        let mut count = self.in_flight.subscribe();
        let all = count.wait_for(|count| *count == 0);
        tokio::time::timeout(self.options.drain_time, all).await.is_ok()
    }

    /// Stops the engine.
    pub(crate) fn stop(&self) {
        if let Some(loaded) = self.loaded.get() {
            loaded.worker.stop();
        }
    }

    fn is_allowed(&self, request: &Request<Body>) -> bool {
        let keys = &self.options.keys;
        if keys.is_empty() || request.method() == Method::OPTIONS {
            return true;
        }
        // What probes, gatherers of metrics and browsers ask first.
        if matches!(request.uri().path(), "/" | "/health" | "/metrics") {
            return true;
        }
        let shown = request.headers().get(header::AUTHORIZATION);
        let shown = shown.and_then(|value| value.to_str().ok());
        let Some((scheme, key)) = shown.and_then(|value| value.split_once(' ')) else {
            return false;
        };
        let shown: [u8; 32] = Sha256::digest(key.trim()).into();
        // All are compared, so that the time tells nothing of which.
        let any = keys.iter().fold(subtle::Choice::from(0), |any, key| any | key.0.ct_eq(&shown));
        scheme.eq_ignore_ascii_case("bearer") && bool::from(any)
    }
}

/// The ways that requests take.
pub(crate) fn router(app: &Arc<App>) -> Router {
    let routes = Router::new()
        .route("/", get(api::page))
        .route("/health", get(health))
        .route("/version", get(version))
        .route("/metrics", get(metrics))
        .route("/v1/models", get(api::models))
        .route("/v1/models/{*name}", get(api::model))
        .route("/v1/chat/completions", post(api::chat))
        .route("/v1/completions", post(api::completions))
        .route("/v1/responses", post(api::responses))
        .route("/tokenize", post(api::tokenize))
        .route("/detokenize", post(api::detokenize))
        .route("/tokenizer_info", get(api::tokenizer_info))
        .route("/v1/lora_adapters", get(api::adapters))
        .route("/v1/load_lora_adapter", post(api::load_adapter))
        .route("/v1/unload_lora_adapter", post(api::unload_adapter))
        .fallback(async |request: Request<Body>| {
            ApiError::not_found(format!("there is nothing at {}", request.uri().path()))
        })
        .method_not_allowed_fallback(async |request: Request<Body>| {
            ApiError::method(request.method().as_str(), request.uri().path())
        })
        .layer(middleware::from_fn_with_state(Arc::clone(app), guard))
        .with_state(Arc::clone(app));
    let origins = &app.options.cors_origins;
    if origins.is_empty() {
        return routes;
    }
    let allowed = if origins.iter().any(|origin| origin == "*") {
        AllowOrigin::any()
    } else {
        AllowOrigin::list(origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok()))
    };
    let cors = CorsLayer::new()
        .allow_origin(allowed)
        .allow_methods([Method::GET, Method::POST])
        .allow_headers([header::AUTHORIZATION, header::CONTENT_TYPE]);
    routes.layer(cors)
}

/// Turns away callers without a key, and counts answers.
async fn guard(State(app): State<Arc<App>>, request: Request<Body>, next: Next) -> Response {
    let mut response = match app.is_allowed(&request) {
        true => next.run(request).await,
        false => ApiError::unauthorized().into_response(),
    };
    app.metrics.answered(response.status().as_u16());
    let headers = response.headers_mut();
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    if !headers.contains_key(header::CACHE_CONTROL) {
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    }
    response
}

async fn health(State(app): State<Arc<App>>) -> Result<StatusCode, ApiError> {
    app.loaded()?;
    match app.draining.load(Ordering::SeqCst) {
        true => Err(ApiError::unavailable("the server is about to end")),
        false => Ok(StatusCode::OK),
    }
}

async fn version() -> crate::error::Json {
    crate::error::Json(serde_json::json!({"version": env!("CARGO_PKG_VERSION")}))
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    let most = app.options.adapters.count;
    let text = match app.loaded.get() {
        Some(loaded) => {
            let all = loaded.adapters.all().len();
            app.metrics.text(&loaded.worker.snapshot(), all, most)
        }
        None => app.metrics.text(&Snapshot::default(), 0, most),
    };
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}
