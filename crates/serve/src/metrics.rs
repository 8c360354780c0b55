//! Figures for Prometheus. What other servers count too has vLLM's names, which dashboards know; the rest has ours.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use prometheus::{
    Gauge, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts, Registry, TextEncoder,
};

use crate::serve::State;
use crate::{EngineStats, Finish, RequestLog};

/// The media type of the text.
pub(crate) const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

/// Limits of the buckets, in seconds: of a first token, of a token, of a request.
const FIRST: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
const TOKEN: [f64; 19] = [
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
const REQUEST: [f64; 21] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
];
/// And in tokens.
const TOKENS: [f64; 17] = [
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0, 20000.0, 50000.0,
    100_000.0, 200_000.0,
];

/// All of them.
pub(crate) struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    canceled: IntCounter,
    finished: IntCounterVec,
    prompt_tokens: IntCounterVec,
    cached_tokens: IntCounterVec,
    generation_tokens: IntCounterVec,
    first: HistogramVec,
    token: HistogramVec,
    request: HistogramVec,
    prompt: HistogramVec,
    generation: HistogramVec,
    up: IntGauge,
    gauges: Vec<(Gauge, Read)>,
    /// The models that have figures of their own.
    models: Mutex<BTreeSet<String>>,
}

/// Models with figures of their own; those that come later share one label, since adapters may come and go for months and a
/// label is never forgotten.
const MAX_MODELS: usize = 500;
/// That label.
const OTHERS: &str = "others";

/// What a gauge shows of the engine's figures.
type Read = fn(&EngineStats) -> f64;

/// The engine's own figures; those that only grow are gauges here too, since they are read and not counted.
const ENGINE: [(&str, &str, Read); 17] = [
    ("vllm:num_requests_running", "Sequences that read their prompt or answer.", |s| s.running as f64),
    ("vllm:num_requests_waiting", "Sequences that wait for a place or for memory.", |s| s.waiting as f64),
    ("vllm:kv_cache_usage_perc", "Part of the memory for keys and values that is taken, 0 to 1.", |s| {
        (s.kv_reserved + s.kv_cached) as f64 / s.kv_budget.max(1) as f64
    }),
    ("graft_kv_budget_bytes", "Memory for keys and values.", |s| s.kv_budget as f64),
    ("graft_kv_reserved_bytes", "Of it, what running sequences have reserved.", |s| s.kv_reserved as f64),
    ("graft_kv_cached_bytes", "Of it, what kept prefixes take.", |s| s.kv_cached as f64),
    ("graft_prefix_hits", "Sequences that began with a kept prefix.", |s| s.prefix_hits as f64),
    ("graft_prefix_tokens", "Tokens of prompts that did not have to be computed.", |s| {
        s.prefix_tokens as f64
    }),
    ("graft_adapters", "Names of adapters that are served.", |s| s.adapters as f64),
    ("graft_adapter_generations", "Versions of adapters in memory.", |s| s.generations as f64),
    ("graft_adapter_leases", "Sequences that hold a version of an adapter.", |s| s.leases as f64),
    ("graft_adapter_bytes", "Memory of all versions.", |s| s.adapter_bytes as f64),
    ("graft_engine_steps", "Passes that gave tokens.", |s| s.steps as f64),
    ("graft_engine_failures", "Passes, and choices of a token, that failed.", |s| s.failures as f64),
    ("graft_sequences_canceled", "Sequences whose reader left or stood still before they were over.", |s| {
        s.canceled as f64
    }),
    ("graft_canceled_tokens", "Tokens that such sequences were answered.", |s| s.canceled_tokens as f64),
    ("graft_engine_busy_seconds", "Seconds that the engine had work.", |s| s.busy_seconds),
];

impl Metrics {
    /// Nothing counted yet.
    ///
    /// # Errors
    /// When two of them have one name.
    pub(crate) fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let model = &["model_name"];
        let counters = |name: &str, help: &str, labels: &[&str]| {
            let made = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(made.clone()))?;
            Ok::<_, prometheus::Error>(made)
        };
        let histograms = |name: &str, help: &str, buckets: &[f64]| {
            let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
            let made = HistogramVec::new(options, model)?;
            registry.register(Box::new(made.clone()))?;
            Ok::<_, prometheus::Error>(made)
        };
        let gauge = |name: &str, help: &str| {
            let made = IntGauge::new(name, help)?;
            registry.register(Box::new(made.clone()))?;
            Ok::<_, prometheus::Error>(made)
        };
        let canceled =
            IntCounter::new("graft_requests_canceled_total", "Requests whose client left before the end.")?;
        registry.register(Box::new(canceled.clone()))?;
        let build = Opts::new("graft_build_info", "The version that runs.")
            .const_label("version", env!("CARGO_PKG_VERSION"));
        let build = IntGauge::with_opts(build)?;
        build.set(1);
        registry.register(Box::new(build))?;
        let mut gauges = Vec::with_capacity(ENGINE.len());
        for (name, help, read) in ENGINE {
            let made = Gauge::new(name, help)?;
            registry.register(Box::new(made.clone()))?;
            gauges.push((made, read));
        }
        Ok(Self {
            requests: counters(
                "graft_http_requests_total",
                "Requests by route and status; 499 where the client left before there was one.",
                &["method", "route", "status"],
            )?,
            finished: counters(
                "vllm:request_success_total",
                "Answers that ended, by reason.",
                &["model_name", "finished_reason"],
            )?,
            prompt_tokens: counters("vllm:prompt_tokens_total", "Tokens of prompts.", model)?,
            cached_tokens: counters(
                "vllm:prompt_tokens_cached_total",
                "Tokens of prompts that did not have to be computed.",
                model,
            )?,
            generation_tokens: counters("vllm:generation_tokens_total", "Tokens of answers.", model)?,
            first: histograms(
                "vllm:time_to_first_token_seconds",
                "From the request's arrival to its first text, in seconds.",
                &FIRST,
            )?,
            token: histograms(
                "vllm:request_time_per_output_token_seconds",
                "Mean time per token after the first text of a request, in seconds.",
                &TOKEN,
            )?,
            request: histograms(
                "vllm:e2e_request_latency_seconds",
                "From the request's arrival to the end of its answer, in seconds.",
                &REQUEST,
            )?,
            prompt: histograms("vllm:request_prompt_tokens", "Tokens of a request's prompts.", &TOKENS)?,
            generation: histograms(
                "vllm:request_generation_tokens",
                "Tokens of a request's answers.",
                &TOKENS,
            )?,
            up: gauge("graft_engine_up", "1 while the engine's thread runs.")?,
            gauges,
            models: Mutex::default(),
            canceled,
            registry,
        })
    }

    /// Counts a request that has ended.
    pub(crate) fn count(&self, log: &RequestLog) {
        let method = match log.method.as_str() {
            known @ ("GET" | "HEAD" | "POST" | "OPTIONS" | "PUT" | "DELETE" | "PATCH") => known,
            _ => "other",
        };
        self.requests.with_label_values(&[method, log.route, &log.status.to_string()]).inc();
        // The model is there only where it has been found, so that clients cannot make up labels.
        let Some(model) = log.model.as_deref().map(|model| self.label(model)) else { return };
        let labels = &[model];
        for finish in &log.finishes {
            let reason = match finish {
                Finish::Length => "length",
                Finish::Stop | Finish::StopString(_) => "stop",
            };
            self.finished.with_label_values(&[model, reason]).inc();
        }
        if log.canceled {
            self.canceled.inc();
            self.finished.with_label_values(&[model, "abort"]).inc();
        }
        let usage = log.usage;
        if usage.prompt == 0 {
            return;
        }
        let total = log.total.as_secs_f64();
        self.prompt_tokens.with_label_values(labels).inc_by(usage.prompt as u64);
        self.cached_tokens.with_label_values(labels).inc_by(usage.cached as u64);
        self.generation_tokens.with_label_values(labels).inc_by(usage.completion as u64);
        // How long a request took says something only where all of it was answered.
        if log.canceled || log.error.is_some() {
            return;
        }
        self.request.with_label_values(labels).observe(total);
        self.prompt.with_label_values(labels).observe(usage.prompt as f64);
        self.generation.with_label_values(labels).observe(usage.completion as f64);
        if let Some(first) = log.first.map(|first| first.as_secs_f64()) {
            self.first.with_label_values(labels).observe(first);
            if usage.completion > 1 {
                let each = (total - first) / (usage.completion - 1) as f64;
                self.token.with_label_values(labels).observe(each);
            }
        }
    }

    fn label<'a>(&self, model: &'a str) -> &'a str {
        let mut models = self.models.lock().unwrap_or_else(PoisonError::into_inner);
        if models.contains(model) || (models.len() < MAX_MODELS && models.insert(model.to_owned())) {
            model
        } else {
            OTHERS
        }
    }

    /// The text of them all, with what the engine does at the moment.
    pub(crate) fn text(&self, state: &State) -> String {
        let stats = state.stats();
        for (gauge, read) in &self.gauges {
            gauge.set(read(&stats));
        }
        self.up.set(i64::from(state.engine.is_alive()));
        TextEncoder::new().encode_to_string(&self.registry.gather()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::log::Record;

    #[test]
    fn models_that_come_and_go_for_ever_do_not_fill_the_memory() {
        let metrics = Metrics::new().unwrap();
        for index in 0..MAX_MODELS + 50 {
            let mut record = Record::new("id".into(), "POST".into(), "/".into(), Arc::new(|_| {}));
            record.log.model = Some(format!("run-{index}"));
            for _ in 0..2 {
                metrics.count(&record.log);
            }
        }
        let text = TextEncoder::new().encode_to_string(&metrics.registry.gather()).unwrap();
        let aborts: Vec<&str> =
            text.lines().filter(|l| l.starts_with("vllm:request_success_total{")).collect();
        assert_eq!(aborts.len(), MAX_MODELS + 1);
        assert!(
            aborts.iter().any(|line| line.contains("\"others\"") && line.ends_with(" 100")),
            "{aborts:?}"
        );
    }
}
