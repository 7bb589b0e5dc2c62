//! `/metrics`: what Prometheus and the gateways of Kubernetes read. Names that begin with `vllm:` mean
//! what they mean there; those of our own begin with `hydralora_`.

use crate::worker::Snapshot;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use std::borrow::Cow;
use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

type Labels = Vec<(&'static str, String)>;
type Number = Gauge<f64, AtomicU64>;

/// Bounds of times, in seconds.
const SECONDS: [f64; 16] =
    [0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0];

/// Everything that is counted.
pub(crate) struct Metrics {
    registry: Mutex<Registry>,
    model: String,
    /// Tokens of prompts.
    pub(crate) prompt_tokens: Counter,
    /// Tokens written.
    pub(crate) generation_tokens: Counter,
    /// Engines that failed and were replaced.
    pub(crate) engine_failures: Counter,
    first_token: Histogram,
    next_token: Histogram,
    whole: Histogram,
    ended: Family<Labels, Counter>,
    answered: Family<Labels, Counter>,
    waiting: Family<Labels, Number>,
    running: Family<Labels, Number>,
    cache: Family<Labels, Number>,
    adapters: Family<Labels, Number>,
    loaded: Number,
    cache_bytes: Family<Labels, Number>,
    preemptions: Number,
    hits: Number,
    queries: Number,
}

impl Metrics {
    /// Starts counting for a base of this name.
    pub(crate) fn new(model: &str) -> Self {
        let mut registry = Registry::default();
        let histogram = || Histogram::new(SECONDS);
        let metrics = Self {
            registry: Mutex::new(Registry::default()),
            model: model.to_owned(),
            prompt_tokens: Counter::default(),
            generation_tokens: Counter::default(),
            engine_failures: Counter::default(),
            first_token: histogram(),
            next_token: histogram(),
            whole: histogram(),
            ended: Family::default(),
            answered: Family::default(),
            waiting: Family::default(),
            running: Family::default(),
            cache: Family::default(),
            adapters: Family::default(),
            loaded: Gauge::default(),
            cache_bytes: Family::default(),
            preemptions: Gauge::default(),
            hits: Gauge::default(),
            queries: Gauge::default(),
        };
        let all = &metrics;
        registry.register("vllm:num_requests_waiting", "Requests that wait", all.waiting.clone());
        registry.register("vllm:num_requests_running", "Requests in work", all.running.clone());
        let cache = "Part of the cache that is in use, 1 for all of it";
        registry.register("vllm:kv_cache_usage_perc", cache, all.cache.clone());
        let adapters = "Adapters with requests; the value is the time in seconds";
        registry.register("vllm:lora_requests_info", adapters, all.adapters.clone());
        // These have one value, and so no family to keep the label.
        let label = (Cow::Borrowed("model_name"), Cow::Owned(model.to_owned()));
        let own = registry.sub_registry_with_label(label);
        own.register("vllm:prompt_tokens", "Tokens of prompts", all.prompt_tokens.clone());
        let written = all.generation_tokens.clone();
        own.register("vllm:generation_tokens", "Tokens written", written);
        let first = all.first_token.clone();
        own.register("vllm:time_to_first_token_seconds", "Time to the first token", first);
        let next = all.next_token.clone();
        own.register("vllm:inter_token_latency_seconds", "Time between tokens", next);
        let whole = all.whole.clone();
        own.register("vllm:e2e_request_latency_seconds", "Time of whole requests", whole);
        registry.register("vllm:request_success", "Requests by how they ended", all.ended.clone());
        registry.register("hydralora_http_responses", "Answers by status", all.answered.clone());
        registry.register("hydralora_adapters_loaded", "Adapters loaded", all.loaded.clone());
        let bytes = all.cache_bytes.clone();
        registry.register("hydralora_cache_bytes", "Bytes of the cache by kind", bytes);
        let preempted = "Requests that had to make room and began again";
        registry.register("hydralora_preemptions", preempted, all.preemptions.clone());
        let hits = "Tokens of prompts that the cache held";
        registry.register("hydralora_prefix_cache_hits", hits, all.hits.clone());
        let queries = "Tokens of prompts that were looked up in it";
        registry.register("hydralora_prefix_cache_queries", queries, all.queries.clone());
        let failures = all.engine_failures.clone();
        registry.register("hydralora_engine_failures", "Engines that failed", failures);
        *metrics.registry.lock().unwrap_or_else(PoisonError::into_inner) = registry;
        metrics
    }

    /// Notes the time to a first token, in seconds.
    pub(crate) fn first_token(&self, seconds: f64) {
        self.first_token.observe(seconds);
    }

    /// Notes the time since the token before.
    pub(crate) fn next_token(&self, seconds: f64) {
        self.next_token.observe(seconds);
    }

    /// Notes the time of a request.
    pub(crate) fn whole(&self, seconds: f64) {
        self.whole.observe(seconds);
    }

    /// Notes how a request ended.
    pub(crate) fn ended(&self, reason: &str) {
        let labels = self.labels(&[("finished_reason", reason)]);
        self.ended.get_or_create(&labels).inc();
    }

    /// Notes an answer's status.
    pub(crate) fn answered(&self, status: u16) {
        self.answered.get_or_create(&vec![("status", status.to_string())]).inc();
    }

    fn labels(&self, more: &[(&'static str, &str)]) -> Labels {
        let mut labels = vec![("model_name", self.model.clone())];
        labels.extend(more.iter().map(|(name, value)| (*name, (*value).to_owned())));
        labels
    }

    /// Writes everything down, with the engine's present state.
    pub(crate) fn text(&self, now: &Snapshot, loaded: usize, most_adapters: usize) -> String {
        let stats = &now.stats;
        let own = self.labels(&[]);
        self.waiting.get_or_create(&own).set(stats.waiting as f64);
        self.running.get_or_create(&own).set(stats.running as f64);
        let (used, budget) = (stats.cache_bytes as f64, stats.cache_budget as f64);
        self.cache.get_or_create(&own).set(if budget > 0.0 { used / budget } else { 0.0 });
        self.cache_bytes.get_or_create(&vec![("kind", "used".to_owned())]).set(used);
        self.cache_bytes.get_or_create(&vec![("kind", "budget".to_owned())]).set(budget);
        self.preemptions.set(stats.preemptions as f64);
        self.hits.set(stats.prefix_hits as f64);
        self.queries.set(stats.prefix_queries as f64);
        self.loaded.set(loaded as f64);
        let joined = |names: &std::collections::BTreeSet<String>| {
            names.iter().map(String::as_str).collect::<Vec<_>>().join(",")
        };
        // Readers take the newest, so only one stands.
        self.adapters.clear();
        let adapters = vec![
            ("max_lora", most_adapters.to_string()),
            ("running_lora_adapters", joined(&now.running_adapters)),
            ("waiting_lora_adapters", joined(&now.waiting_adapters)),
        ];
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let seconds = since.map_or(0.0, |since| since.as_secs_f64());
        self.adapters.get_or_create(&adapters).set(seconds);
        let mut text = String::new();
        // Writing to a text does not fail.
        let _ = encode(&mut text, &self.registry.lock().unwrap_or_else(PoisonError::into_inner));
        text
    }
}
