//! Servers on tiny models, and what the same model says without a server.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use graft_adapters::{AdapterSet, Route};
use graft_model::{GenerateOptions, Generator, Model, Sampling, Tokenizer};
use graft_ops::Dtype;
use graft_serve::{
    AdapterPolicy, ApiKeys, Defaults, Engine, EngineConfig, LogEvent, LogSink, RequestLog, ServeConfig,
    serve_blocking,
};
use graft_testkit::{Family, Tiny, tiny_adapter, tiny_model};
use serde_json::json;
use tempfile::TempDir;
use tokio::sync::oneshot;

/// A model with adapters `lora`, `dora`, and `broken`, whose scale makes every logit overflow.
pub(crate) struct Fixture {
    pub(crate) model: TempDir,
    pub(crate) lora: TempDir,
    pub(crate) dora: TempDir,
    pub(crate) broken: TempDir,
}

pub(crate) fn fixture() -> &'static Fixture {
    static FIXTURE: OnceLock<Fixture> = OnceLock::new();
    FIXTURE.get_or_init(|| {
        let extra = json!({"max_position_embeddings": 50_000});
        let extra = extra.as_object().unwrap().clone();
        let tiny = Tiny { packed: Some((4, 32)), extra, ..Tiny::new(Family::Llama) };
        let model = tiny_model(&tiny);
        let lora = tiny_adapter(model.path(), &tiny, false, 4, 11);
        let dora = tiny_adapter(model.path(), &tiny, true, 2, 12);
        let broken = tiny_adapter(model.path(), &tiny, false, 4, 13);
        let config = broken.path().join("adapter_config.json");
        let text = std::fs::read_to_string(&config).unwrap();
        let changed = text.replace("\"scale\": 2.0", "\"scale\": 3e38");
        assert_ne!(changed, text);
        std::fs::write(&config, changed).unwrap();
        Fixture { model, lora, dora, broken }
    })
}

pub(crate) struct Server {
    pub(crate) addr: SocketAddr,
    pub(crate) logs: Arc<Mutex<Vec<LogEvent>>>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<graft_serve::Result<()>>>,
}

impl Server {
    /// Asks the server to stop; [`Server::wait`] tells how that went.
    pub(crate) fn stop(&mut self) {
        let _gone = self.stop.take().map(|stop| stop.send(()));
    }

    pub(crate) fn wait(&mut self) {
        self.thread.take().unwrap().join().unwrap().unwrap();
    }

    pub(crate) fn requests(&self) -> Vec<RequestLog> {
        let logs = self.logs.lock().unwrap();
        logs.iter()
            .filter_map(|event| match event {
                LogEvent::Request(request) => Some((**request).clone()),
                LogEvent::Failure { .. } => None,
            })
            .collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            let _ended = thread.join();
        }
    }
}

pub(crate) fn configs() -> (EngineConfig, ServeConfig, Arc<Mutex<Vec<LogEvent>>>) {
    let logs = Arc::new(Mutex::new(Vec::new()));
    let kept = logs.clone();
    let log: LogSink = Arc::new(move |event| kept.lock().unwrap().push(event));
    let f = fixture();
    let named = |name: &str, dir: &TempDir| (name.to_owned(), dir.path().to_path_buf());
    let engine = EngineConfig {
        model_dir: f.model.path().to_path_buf(),
        dtype: Dtype::Float32,
        adapters: vec![named("lora", &f.lora), named("org/dora", &f.dora), named("broken", &f.broken)],
        fingerprint: None,
        kv_memory: 512 << 20,
        chat_template: None,
        max_context: None,
        max_concurrent: 8,
        max_queue: 64,
        stall_timeout: Duration::from_secs(10),
        log: log.clone(),
    };
    let serve = ServeConfig {
        addr: "127.0.0.1:0".parse().unwrap(),
        model_id: "org/tiny".into(),
        default_adapter: None,
        adapters: AdapterPolicy::default(),
        allowed_origins: vec!["http://localhost:3000".into()],
        api_keys: ApiKeys::default(),
        allowed_hosts: Vec::new(),
        max_body_bytes: 1 << 20,
        header_timeout: Duration::from_secs(10),
        body_timeout: Duration::from_secs(10),
        write_timeout: Duration::from_secs(10),
        ping_interval: Duration::from_secs(10),
        drain_timeout: Duration::from_secs(10),
        max_connections: 64,
        defaults: Defaults {
            max_tokens: 16,
            sampling: Sampling::greedy(),
            template_args: serde_json::Map::new(),
        },
        seed: 1,
        log,
    };
    (engine, serve, logs)
}

pub(crate) fn start(change: impl FnOnce(&mut EngineConfig, &mut ServeConfig)) -> Server {
    if graft_testkit::wanted_form_is_mlx() {
        graft_ops::set_form(graft_ops::Form::Mlx);
    }
    if let Some(level) = graft_testkit::wanted("GRAFT_CPU") {
        graft_ops::set_cpu_level(level);
    }
    let (mut engine, mut serve, logs) = configs();
    change(&mut engine, &mut serve);
    let engine = Engine::start(engine).expect("the engine starts");
    let (ready, addr) = std::sync::mpsc::channel();
    let (stop, stopped) = oneshot::channel();
    let thread = std::thread::spawn(move || {
        let shutdown = async move {
            let _gone = stopped.await;
        };
        serve_blocking(serve, engine, |addr| ready.send(addr).unwrap(), shutdown)
    });
    Server { addr: addr.recv().expect("the server starts"), logs, stop: Some(stop), thread: Some(thread) }
}

/// The server that most tests share.
pub(crate) fn shared() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| start(|_, _| {}))
}

/// The ids of an answer without a server, and its text.
pub(crate) fn direct(
    adapter: Option<&Path>,
    prompt: &str,
    special: bool,
    sampling: Sampling,
    max: usize,
) -> (Vec<u32>, String) {
    let model_dir: PathBuf = fixture().model.path().to_path_buf();
    let adapter = adapter.map(Path::to_path_buf);
    let tokenizer = Tokenizer::load(&model_dir).unwrap();
    let ids = tokenizer.encode(prompt, special).unwrap();
    let stop_ids: BTreeSet<u32> = tokenizer.eos_ids().iter().copied().collect();
    let tokens = graft_testkit::mlx(move || {
        let model = Model::load(&model_dir, Dtype::Float32).unwrap();
        let table = adapter
            .map(|dir| AdapterSet::load(&dir).unwrap().table(&dir, |path| model.target(path)).unwrap());
        let route = table.as_ref().map_or(Route::Base, Route::Table);
        let options = GenerateOptions { max_tokens: max, stop_ids, sampling };
        let mut generator = Generator::new(&model, &ids, options, route).unwrap();
        let mut tokens = Vec::new();
        while let Some(token) = generator.step().unwrap() {
            tokens.push(token);
        }
        tokens
    });
    let mut stream = tokenizer.stream();
    let mut text = String::new();
    for token in tokens.iter().filter(|t| !t.stop) {
        text += &stream.push(token.id).unwrap();
    }
    text += &stream.finish().unwrap();
    (tokens.iter().map(|t| t.id).collect(), text)
}

/// What the tiny model's template makes of one question.
pub(crate) fn chat_text(question: &str) -> String {
    format!("<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
}
