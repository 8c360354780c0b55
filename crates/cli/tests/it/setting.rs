//! A folder with a tiny model, an adapter and data in it, and the binary run there.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use graft_testkit::{Family, Tiny, tiny_adapter, tiny_model};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A folder in which commands run; paths in arguments are relative to it.
pub(crate) struct Folder(TempDir);

/// What a command came to.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) status: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl From<Output> for Run {
    fn from(output: Output) -> Self {
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        Self { status: output.status.code(), out: text(&output.stdout), err: text(&output.stderr) }
    }
}

/// The tiny model that most tests use.
pub(crate) fn llama(packed: Option<(i32, i32)>) -> Tiny {
    Tiny { packed, ..Tiny::new(Family::Llama) }
}

impl Folder {
    /// `data/` with three splits of eight rows each.
    pub(crate) fn new() -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        for split in ["train", "valid", "test"] {
            let rows: Vec<Value> = (0..8).map(|i| row(&format!("hello {i}"), "the user")).collect();
            folder.rows(&format!("data/{split}.jsonl"), &rows);
        }
        folder
    }

    /// With the model in `model/`, packed in 4 bits, and a LoRA adapter on it in `adapter/`.
    pub(crate) fn with_model() -> Self {
        let (folder, tiny) = (Self::new(), llama(Some((4, 32))));
        folder.model("model", &tiny);
        let adapter = tiny_adapter(&folder.path("model"), &tiny, false, 4, 9);
        std::fs::rename(adapter.keep(), folder.path("adapter")).unwrap();
        folder
    }

    pub(crate) fn model(&self, name: &str, tiny: &Tiny) {
        std::fs::rename(tiny_model(tiny).keep(), self.path(name)).unwrap();
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        std::fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
        std::fs::write(self.path(name), text).unwrap();
    }

    pub(crate) fn rows(&self, name: &str, rows: &[Value]) {
        let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
        self.write(name, &(lines.join("\n") + "\n"));
    }

    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    pub(crate) fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&self.read(name)).unwrap()
    }

    /// What stands in the folder, or in one below it.
    pub(crate) fn names(&self, name: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.path(name)).unwrap();
        let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// A copy of a folder's files under another name.
    pub(crate) fn copy(&self, from: &str, to: &str) {
        std::fs::create_dir(self.path(to)).unwrap();
        for name in self.names(from) {
            std::fs::copy(self.path(from).join(&name), self.path(to).join(&name)).unwrap();
        }
    }

    /// The command, ready to run: offline, with an empty cache of models.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_graft"));
        command.args(arguments).current_dir(self.0.path()).stdin(Stdio::null());
        command.env("HF_HUB_OFFLINE", "1").env("HF_HOME", self.path("cache")).env_remove("HF_HUB_CACHE");
        command
    }

    pub(crate) fn run(&self, arguments: &str) -> Run {
        self.command(&words(arguments)).output().unwrap().into()
    }

    /// Runs a command that must succeed.
    #[track_caller]
    pub(crate) fn ok(&self, arguments: &str) -> Run {
        let run = self.run(arguments);
        assert_eq!(run.status, Some(0), "graft {arguments}: {run:?}");
        run
    }

    /// Runs a command that must fail with `status`: one message that holds all of `parts`, nothing on stdout, nothing
    /// left in the folder.
    #[track_caller]
    pub(crate) fn fails(&self, status: i32, arguments: &str, parts: &[&str]) -> String {
        let before = self.names(".");
        let run = self.run(arguments);
        assert_eq!(run.status, Some(status), "graft {arguments}: {run:?}");
        let errors: Vec<&str> = run.err.lines().filter(|line| line.starts_with("error: ")).collect();
        assert_eq!(errors.len(), 1, "graft {arguments}: {run:?}");
        for part in parts {
            assert!(errors[0].contains(part), "graft {arguments}: {part:?} is not in {}", errors[0]);
        }
        assert!(!run.err.contains("should not") && !run.err.contains("panicked"), "{run:?}");
        assert_eq!(run.out, "", "graft {arguments}");
        assert_eq!(self.names("."), before, "graft {arguments}");
        run.err
    }

    /// A command that goes on by itself; it is killed when the value is dropped.
    pub(crate) fn start(&self, arguments: &str) -> Running {
        let mut command = self.command(&words(arguments));
        Running(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
    }
}

/// The words of a command line; `''` is an empty one.
fn words(arguments: &str) -> Vec<&str> {
    arguments.split_whitespace().map(|word| if word == "''" { "" } else { word }).collect()
}

/// A row of a conversation.
pub(crate) fn row(question: &str, answer: &str) -> Value {
    json!({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
}

/// A running command.
pub(crate) struct Running(pub(crate) Child);

impl Running {
    /// Sends an interrupt, as Ctrl-C does.
    pub(crate) fn interrupt(&self) {
        let kill = format!("kill -INT {}", self.0.id());
        assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
    }

    /// Waits for the end; what was not read of the output yet comes with it.
    pub(crate) fn end(mut self) -> Run {
        let text = |pipe: Option<&mut dyn std::io::Read>| {
            let mut text = String::new();
            pipe.map(|pipe| pipe.read_to_string(&mut text)).transpose().unwrap();
            text
        };
        let err = text(self.0.stderr.as_mut().map(|p| p as &mut dyn std::io::Read));
        let out = text(self.0.stdout.as_mut().map(|p| p as &mut dyn std::io::Read));
        Run { status: self.0.wait().unwrap().code(), out, err }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ended = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// Cuts a file short.
pub(crate) fn truncate(file: &Path, length: usize) {
    let bytes = std::fs::read(file).unwrap();
    std::fs::write(file, &bytes[..length]).unwrap();
}
