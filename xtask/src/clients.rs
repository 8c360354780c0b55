//! `cargo xtask clients`: programs that others have written, against `graft server` on tiny models and on the demo's base:
//! OpenAI's and Anthropic's own packages, and schemathesis, which makes up requests from our /openapi.json.

use std::io::{BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::children::{Process, Temporary};
use crate::{cache, model, reference, setup, sh};

const OPENAI: &str = "3.57.0";
const ANTHROPIC: &str = "2.14.0";
const OPENAI_NODE: &str = "6.49.0";
const SCHEMATHESIS: &str = "4.32.5";

const SUITES: [&str; 4] = ["openai", "openai-node", "anthropic", "schemathesis"];

/// Cases made up per operation of the document; with those that cover its limits they are more than 3 000.
const CASES: &str = "100";
/// A case whose schema is right may be refused for reasons that no schema can say: a prompt that is too long, a model that
/// is not there, a JSON schema that cannot be followed. All else is checked.
const UNCHECKED: &str = "positive_data_acceptance";

/// Runs all suites, or those named with `--only`.
pub(crate) fn task(args: &[String]) -> Result<()> {
    let wanted: Vec<&str> = match args.split_first() {
        None => SUITES.to_vec(),
        Some((flag, names)) if flag == "--only" && !names.is_empty() => {
            names.iter().map(String::as_str).collect()
        }
        _ => bail!("usage: cargo xtask clients [--only {}]", SUITES.join("|")),
    };
    if let Some(unknown) = wanted.iter().find(|name| !SUITES.contains(name)) {
        bail!("there is no suite {unknown}; there are {}", SUITES.join(", "));
    }
    setup::run()?;
    let graft = sh::graft()?;
    let styles = sh::build(&["--workspace", "--example", "styles"])?.join("examples/styles");
    let temporary = Temporary::new()?;
    sh::run(Command::new(styles).arg(&temporary.0))?;
    let tiny = temporary.0.join("qwen-3");
    let (tiny_model, adapter) = (tiny.join("model"), format!("mine={}", tiny.join("adapter").display()));
    let base = model::dir(&graft)?;

    let tools = Server::start(&graft, &tiny_model, &["--adapter", &adapter])?;
    let mut failed = Vec::new();
    let mut ran = |name: &'static str, result: Result<()>| {
        if let Err(error) = result {
            eprintln!("{name}: {error:#}");
            failed.push(name);
        }
    };
    if wanted.iter().any(|name| *name != "schemathesis") {
        let plain = Server::start(&graft, &base, &[])?;
        let locked = Server::start(&graft, &tiny_model, &["--api-key", "secret"])?;
        let addresses = [&tools, &plain, &locked].map(|server| server.address.as_str());
        for (name, package, script) in [
            ("openai", format!("openai=={OPENAI}"), "openai_suite.py"),
            ("anthropic", format!("anthropic=={ANTHROPIC}"), "anthropic_suite.py"),
        ] {
            if wanted.contains(&name) {
                ran(name, python(&package, script, addresses));
            }
        }
        if wanted.contains(&"openai-node") {
            ran("openai-node", node(addresses));
        }
    }
    if wanted.contains(&"schemathesis") {
        ran("schemathesis", schemathesis(&graft, &temporary.0, &tiny_model, &adapter));
    }
    if failed.is_empty() { Ok(()) } else { bail!("failed: {}", failed.join(", ")) }
}

/// A server that listens; it is ended when this is dropped.
struct Server {
    address: String,
    _stdout: BufReader<ChildStdout>,
    _process: Process,
}

impl Server {
    fn start(graft: &Path, model: &Path, flags: &[&str]) -> Result<Self> {
        let mut command = Command::new(graft);
        command.arg("server").arg("--model").arg(model).args(["--model-id", "base", "--port", "0"]);
        command.args(["--log-level", "ERROR"]);
        let (process, stdout) = Process::start(command.args(flags).stdout(Stdio::piped()))?;
        let mut stdout = BufReader::new(stdout.context("graft server has no output")?);
        let mut ready = String::new();
        stdout.read_line(&mut ready)?;
        let Some((_, address)) = ready.trim().split_once("http://") else {
            bail!("graft server ended with {} before it was ready", process.wait()?);
        };
        Ok(Self { address: address.to_owned(), _stdout: stdout, _process: process })
    }
}

fn scripts() -> PathBuf {
    sh::root().join("xtask/clients")
}

fn python(package: &str, script: &str, [tools, plain, locked]: [&str; 3]) -> Result<()> {
    let mut command = reference::environment(&format!("clients-{package}"), &[package])?;
    command.arg(scripts().join(script));
    sh::run(command.args(["--tools", tools, "--plain", plain, "--locked", locked]))
}

fn node(addresses: [&str; 3]) -> Result<()> {
    if !sh::works(Command::new("node").arg("--version")) || !sh::works(Command::new("npm").arg("--version")) {
        eprintln!("openai (Node): left out, since there is no node and npm on this machine");
        return Ok(());
    }
    let package = format!("openai@{OPENAI_NODE}");
    let modules = cache::dir(&format!("clients-node-{OPENAI_NODE}"), |temporary| {
        eprintln!("installing {package} from npm");
        let mut install = Command::new("npm");
        install
            .args(["install", "--no-audit", "--no-fund", "--silent", &package])
            .arg("--prefix")
            .arg(temporary);
        sh::run(&mut install)
    })?;
    let mut command = Command::new("node");
    command.arg(scripts().join("openai_suite.mjs")).args(addresses);
    sh::run(command.env("GRAFT_NODE_MODULES", modules))
}

/// On a copy of the tiny model that holds few tokens, so that an answer without a limit takes no time.
fn schemathesis(graft: &Path, folder: &Path, model: &Path, adapter: &str) -> Result<()> {
    let short = folder.join("short");
    std::fs::create_dir(&short)?;
    for entry in std::fs::read_dir(model)?.flatten() {
        std::fs::copy(entry.path(), short.join(entry.file_name()))?;
    }
    let config = short.join("config.json");
    let mut text = String::new();
    std::fs::File::open(&config)?.read_to_string(&mut text)?;
    let mut value: serde_json::Value = serde_json::from_str(&text)?;
    value["max_position_embeddings"] = 512.into();
    std::fs::write(&config, value.to_string())?;
    let server = Server::start(graft, &short, &["--adapter", adapter, "--max-tokens", "4"])?;
    let package = format!("schemathesis=={SCHEMATHESIS}");
    let mut command = reference::environment(&format!("clients-{package}"), &[&package])?;
    command.current_dir(folder).args(["-m", "schemathesis.cli", "run", "--no-color"]);
    command.arg(format!("http://{}/openapi.json", server.address));
    command.args(["--checks", "all", "--exclude-checks", UNCHECKED, "--max-examples", CASES]);
    command.args([
        "--phases",
        "coverage,fuzzing",
        "--seed",
        "1",
        "--request-timeout",
        "30",
        "--workers",
        "2",
    ]);
    sh::run(command.args(["--suppress-health-check", "all", "--continue-on-failure", "--warnings", "off"]))
}
