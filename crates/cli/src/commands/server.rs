//! `graft server`: the endpoint until a signal ends it.

use super::generate::json_object;
use super::load::{check_base, compute_dtype};
use crate::args::{ServerArgs, XTC_THRESHOLD};
use crate::errors::Usage;
use crate::hub::{self, What};
use crate::{host, ui};
use anyhow::{Context, Result, bail};
use graft_adapters::{AdapterSet, Fingerprint};
use graft_model::Sampling;
use graft_quant::Checkpoint;
use graft_serve::{
    AdapterPolicy, ApiKeys, Defaults, Engine, EngineConfig, LogEvent, LogSink, MAX_BODY_BYTES,
    MAX_CONCURRENT, MAX_QUEUE, RequestLog, ServeConfig,
};
use serde_json::{Value, json};
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::oneshot;

/// Bytes for keys and values on a machine that has hardly any left.
const LEAST_KV: u64 = 64 << 20;

/// Connections at a time.
const MAX_CONNECTIONS: usize = 1024;

/// Serves the model and its adapters.
pub(crate) fn server(args: &ServerArgs) -> Result<()> {
    let Some(model) = &args.model else {
        bail!(Usage("--model is required: graft serves the model that it was started with".into()));
    };
    let template_args = json_object("--chat-template-args", &args.chat_template_args)?;
    let sampling = sampling(args);
    sampling.check()?;
    let concurrency = match args.decode_concurrency {
        0 => bail!(Usage("--decode-concurrency must be at least 1".into())),
        n if n > MAX_CONCURRENT => {
            ui::note(&format!(
                "note: --decode-concurrency {n} is more than {MAX_CONCURRENT}, above which an answer could depend on what runs \
                 beside it; {MAX_CONCURRENT} is used"
            ));
            MAX_CONCURRENT
        }
        n => n,
    };
    let addr = address(&args.host, args.port)?;
    let (adapters, default_adapter) = adapters(args)?;
    let policy = policy(args)?;
    let dir = hub::resolve(model, What::Model)?;
    let checkpoint = Checkpoint::open(&dir)?;
    let base = Fingerprint::of(&checkpoint, model);
    for (_, adapter) in &adapters {
        // Its tensors are the engine thread's to read.
        check_base(AdapterSet::trained_on(adapter)?, adapter, &base)?;
    }
    let log = log_sink(&args.log_level, args.log_format == "json");
    let api_keys = api_keys(args)?;
    let model_id = args.model_id.clone().unwrap_or_else(|| model.clone());
    let config = ServeConfig {
        addr,
        model_id: model_id.clone(),
        default_adapter: default_adapter.clone(),
        adapters: policy,
        allowed_origins: args.allowed_origins.clone(),
        api_keys,
        allowed_hosts: args.allowed_hosts.clone(),
        max_body_bytes: MAX_BODY_BYTES,
        header_timeout: Duration::from_secs(30),
        body_timeout: Duration::from_secs(60),
        write_timeout: Duration::from_secs(60),
        ping_interval: Duration::from_secs(15),
        drain_timeout: Duration::from_secs(30),
        max_connections: MAX_CONNECTIONS,
        defaults: Defaults { max_tokens: args.max_tokens, sampling, template_args },
        seed: 0,
        log: log.clone(),
    };
    // A port in use is known before a large model is loaded.
    drop(std::net::TcpListener::bind(addr).with_context(|| {
        format!("cannot listen on {addr}; is another server running there? Choose another --port")
    })?);
    ui::note(&format!("Loading {model}"));
    let engine = Engine::start(EngineConfig {
        model_dir: dir.clone(),
        dtype: compute_dtype(&checkpoint),
        adapters,
        fingerprint: Some(base),
        kv_memory: args.kv_memory.unwrap_or_else(|| kv_memory(&dir)),
        chat_template: Some(args.chat_template.clone()).filter(|t| !t.is_empty()),
        max_context: None,
        max_concurrent: concurrency,
        max_queue: MAX_QUEUE,
        stall_timeout: Duration::from_secs(60),
        log,
    })?;
    drop(checkpoint);
    let (ended, end) = oneshot::channel::<()>();
    let ended = Arc::new(Mutex::new(Some(ended)));
    let at_signal = ended.clone();
    let _stop = host::stop_flag(move || {
        ui::note("Finishing the requests that run; once more ends at once");
        let sender = at_signal.lock().unwrap_or_else(PoisonError::into_inner).take();
        sender.map(|s| s.send(()));
    });
    let on_ready = |addr: SocketAddr| {
        ui::out(&format!("Serving {model_id} on http://{addr}"));
        if let Some(name) = &default_adapter {
            ui::note(&format!(
                "Requests that name no model, or `default_model`, get the adapter `{name}`; `{model_id}` is the base"
            ));
        }
    };
    graft_serve::serve_blocking(config, engine, on_ready, async move {
        // The sender lives as long as the server, so this ends with a signal only.
        let _signal = end.await;
    })?;
    drop(ended);
    ui::note("Stopped.");
    Ok(())
}

/// Where adapters may come from while the server runs, and who may send for them.
fn policy(args: &ServerArgs) -> Result<AdapterPolicy> {
    let own = || std::env::var("GRAFT_ADMIN_KEY").ok();
    let admin_key = args.admin_key.clone().or_else(own).filter(|key| !key.is_empty());
    if admin_key.is_some() && args.adapter_root.is_none() {
        bail!(Usage(
            "--admin-key needs --adapter-root DIR: adapters are loaded from below that directory only".into()
        ));
    }
    if let Some(root) = args.adapter_root.as_ref().filter(|root| !root.is_dir()) {
        bail!("--adapter-root {}: there is no such directory", root.display());
    }
    Ok(AdapterPolicy {
        root: args.adapter_root.clone(),
        admin_key,
        max_adapters: args.max_adapters,
        max_rank: args.max_adapter_rank,
        max_bytes: args.adapter_memory,
    })
}

/// Half of the memory that is free once the weights in `dir` are loaded; where that is not known, a quarter of the machine's.
fn kv_memory(dir: &Path) -> usize {
    let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let weights = files.filter(|file| file.path().extension().is_some_and(|e| e == "safetensors"));
    let weights: u64 = weights.filter_map(|file| Some(file.path().metadata().ok()?.len())).sum();
    let free = match host::memory() {
        (_, Some(available)) => available.saturating_sub(weights) / 2,
        (Some(total), None) => total / 4,
        (None, None) => 2 << 30,
    };
    usize::try_from(free.max(LEAST_KV)).unwrap_or(usize::MAX)
}

/// What a request gets where it says nothing. The ids that XTC spares are the engine's to know.
fn sampling(args: &ServerArgs) -> Sampling {
    Sampling {
        temperature: args.temp,
        top_p: args.top_p,
        top_k: args.top_k,
        min_p: args.min_p,
        xtc_threshold: XTC_THRESHOLD,
        ..Sampling::greedy()
    }
}

fn address(host: &str, port: u16) -> Result<SocketAddr> {
    let mut found = (host, port).to_socket_addrs().with_context(|| format!("--host {host} is no address"))?;
    found.next().with_context(|| format!("--host {host} has no address"))
}

/// Names and directories.
type Adapters = Vec<(String, PathBuf)>;

/// `--adapter NAME=DIR` of all, then `--adapter-path` under its directory's name, which is then the default.
fn adapters(args: &ServerArgs) -> Result<(Adapters, Option<String>)> {
    let mut all = Vec::new();
    for given in &args.adapter {
        let Some((name, dir)) =
            given.split_once('=').filter(|(name, dir)| !name.is_empty() && !dir.is_empty())
        else {
            bail!(Usage(format!("--adapter {given}: expected NAME=DIR, such as --adapter sql=./adapters")));
        };
        all.push((name.to_string(), hub::resolve(dir, What::Adapter)?));
    }
    let Some(path) = args.adapter_path.as_deref().filter(|p| !p.is_empty()) else { return Ok((all, None)) };
    let dir = hub::resolve(path, What::Adapter)?;
    let own = dir.canonicalize()?;
    let name = own.file_name().map_or_else(|| path.to_string(), |n| n.to_string_lossy().into_owned());
    all.push((name.clone(), dir));
    Ok((all, Some(name)))
}

/// The variable that may hold a key.
const API_KEY: &str = "GRAFT_API_KEY";

/// The keys of the flags, of the file and of the environment. One that was given and is empty would open the server to
/// all, so it is refused.
fn api_keys(args: &ServerArgs) -> Result<ApiKeys> {
    let mut keys = args.api_key.clone();
    if let Some(path) = &args.api_key_file {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("--api-key-file {}: cannot be read", path.display()))?;
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        let before = keys.len();
        keys.extend(lines.map(str::to_owned));
        if keys.len() == before {
            bail!("--api-key-file {}: expected a key a line, found none", path.display());
        }
    }
    keys.extend(std::env::var(API_KEY));
    if keys.iter().any(|key| key.trim().is_empty()) {
        bail!(Usage(format!(
            "--api-key and {API_KEY}: expected a key, found an empty text; leave it out for none"
        )));
    }
    Ok(ApiKeys::new(keys.iter().map(String::as_str)))
}

/// One line a request on stderr at INFO and DEBUG; failures always. No line holds a prompt or an answer.
fn log_sink(level: &str, as_json: bool) -> LogSink {
    let requests = ["DEBUG", "INFO"].contains(&level);
    Arc::new(move |event| match event {
        LogEvent::Request(r) if requests => {
            let line = if as_json { request_json(&r).to_string() } else { request_text(&r) };
            ui::note(&line);
        }
        LogEvent::Failure { message } if as_json => {
            ui::note(&json!({"time": now(), "event": "failure", "message": message}).to_string());
        }
        LogEvent::Failure { message } => ui::note(&format!("error: {message}")),
        LogEvent::Request(_) => {}
    })
}

fn request_text(r: &RequestLog) -> String {
    let error = r.error.as_ref().map(|e| format!(" ({e})")).unwrap_or_default();
    let canceled = if r.canceled { " canceled" } else { "" };
    // As much of a version as tells it from others in a log.
    let generation = r.generation.as_ref().map(|g| format!("@{g:.12}")).unwrap_or_default();
    format!(
        "{} {} {}{canceled}{error} model={}{generation} {:.3}s id={}",
        r.method,
        r.path,
        r.status,
        r.model.as_deref().unwrap_or("-"),
        r.total.as_secs_f64(),
        r.id
    )
}

fn request_json(r: &RequestLog) -> Value {
    json!({
        "time": now(),
        "event": "request",
        "id": r.id,
        "method": r.method,
        "path": r.path,
        "route": r.route,
        "status": r.status,
        "model": r.model,
        "adapter_generation": r.generation,
        "error": r.error,
        "finish": r.finishes.iter().map(|finish| finish.as_str()).collect::<Vec<_>>(),
        "canceled": r.canceled,
        "prompt_tokens": r.usage.prompt,
        "cached_tokens": r.usage.cached,
        "completion_tokens": r.usage.completion,
        "first_seconds": r.first.map(|first| first.as_secs_f64()),
        "total_seconds": r.total.as_secs_f64(),
    })
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_millis() as f64 / 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{self, Cli, Command};
    use clap::FromArgMatches as _;

    #[test]
    fn defaults_are_those_of_mlx_lms_server() {
        let matches = args::command().try_get_matches_from(["graft", "server", "--model", "m"]).unwrap();
        let Command::Server(args) = Cli::from_arg_matches(&matches).unwrap().command else { unreachable!() };
        let found = sampling(&args);
        assert_eq!((found.temperature, found.top_p, found.top_k, found.min_p), (0.0, 1.0, 0, 0.0));
        assert_eq!((found.xtc_probability, found.xtc_threshold), (0.0, 0.1));
    }
}
