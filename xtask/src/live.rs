//! A server whose adapters come and go, and adapters to put into it: what `swap-proof` and `soak` have in common.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::pipeline::{Graft, Server, words};
use crate::{data, http, model, setup, sh};

/// What lets us change adapters; the server is ours and on loopback.
const KEY: &str = "xtask";

/// A server with a directory of adapters.
pub(crate) struct Live {
    pub(crate) server: Server,
    root: PathBuf,
    published: AtomicU64,
}

/// Graft, freshly built, and a base: the given one, or the demo's.
pub(crate) fn base(given: Option<&str>) -> Result<(Graft, String)> {
    setup::run()?;
    let graft = Graft(sh::graft()?);
    let base = match given {
        Some(given) => given.to_owned(),
        None => model::dir(&graft.0)?.display().to_string(),
    };
    Ok((graft, base))
}

/// Trains an adapter on the demo's data, a few steps so that its answers are its own.
pub(crate) fn train(graft: &Graft, base: &str, to: &Path, seed: u64, dora: bool) -> Result<()> {
    let (data, to, seed) = (data::dir().display().to_string(), to.display().to_string(), seed.to_string());
    let kind = if dora { "dora" } else { "lora" };
    let mut line =
        words(&["train", "--model", base, "--data", &data, "--adapter-path", &to, "--seed", &seed]);
    line.extend(words(&[
        "--fine-tune-type",
        kind,
        "--iters",
        "12",
        "--num-layers",
        "8",
        "--batch-size",
        "2",
    ]));
    line.extend(words(&["--learning-rate", "2e-3", "--steps-per-eval", "1000"]));
    graft.run(&line)
}

impl Live {
    /// Starts it on `base`, without adapters; they will lie in `root`.
    pub(crate) fn start(graft: &Graft, base: &str, root: PathBuf) -> Result<Self> {
        fs::create_dir_all(&root)?;
        let place = root.display().to_string();
        let line = words(&["server", "--model", base, "--model-id", "base", "--adapter-root", &place]);
        let server = graft.serve(&[line, words(&["--admin-key", KEY, "--kv-memory", "512M"])].concat())?;
        Ok(Self { server, root, published: AtomicU64::new(0) })
    }

    /// Puts the adapter directory `from` under `name` as a trainer does: all of it beside, then a rename.
    pub(crate) fn publish(&self, from: &Path, name: &str) -> Result<()> {
        let n = self.published.fetch_add(1, Ordering::Relaxed);
        let [fresh, old] = ["fresh", "old"].map(|what| self.root.join(format!(".{what}-{n}")));
        fs::create_dir(&fresh)?;
        for file in ["adapter_config.json", "adapters.safetensors"] {
            fs::copy(from.join(file), fresh.join(file)).with_context(|| format!("{}", from.display()))?;
        }
        let place = self.root.join(name);
        if place.exists() {
            fs::rename(&place, &old)?;
            fs::rename(&fresh, &place)?;
            fs::remove_dir_all(&old)?;
        } else {
            fs::rename(&fresh, &place)?;
        }
        Ok(())
    }

    /// Sends a change of adapters: its status, and what the server says.
    pub(crate) fn change(&self, what: &str, body: &Value) -> Result<(u16, Value)> {
        let line = format!("POST /v1/{what}_lora_adapter");
        http::request(&self.server.address, &line, &[("X-Admin-Key", KEY)], Some(body))
    }

    /// Loads what is published as `path` under `name`, in place of the version `expected` if there is one; the new version.
    pub(crate) fn load(&self, name: &str, path: &str, expected: Option<&str>) -> Result<String> {
        let mut body = json!({"lora_name": name, "lora_path": path, "load_inplace": expected.is_some()});
        if let Some(expected) = expected {
            body["expected_generation"] = expected.into();
        }
        let (status, reply) = self.change("load", &body)?;
        ensure!(status == 200, "loading {name}: {status} {reply}");
        Ok(reply["adapter_generation"].as_str().unwrap_or_default().to_owned())
    }

    /// The server's figures.
    pub(crate) fn stats(&self) -> Result<Value> {
        Ok(http::request(&self.server.address, "GET /v1/stats", &[], None)?.1)
    }

    /// Waits until nothing runs and nobody holds an adapter; what is still held after half a minute is a leak.
    pub(crate) fn settle(&self) -> Result<Value> {
        for _ in 0..300 {
            let stats = self.stats()?;
            let held = ["/sequences/running", "/sequences/waiting", "/adapters/leases", "/kv_bytes/reserved"];
            if held.iter().all(|field| stats.pointer(field) == Some(&json!(0))) {
                return Ok(stats);
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        anyhow::bail!("something is held though nothing runs: {}", self.stats()?)
    }
}

/// The arguments of a task: the number after each of `names`, and the base after `--model`.
pub(crate) fn numbers<const N: usize>(
    args: &[String],
    mut named: [(&str, u64); N],
) -> Result<([u64; N], Option<String>)> {
    let mut base = None;
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let value = args.next().with_context(|| format!("{arg} needs a value"))?;
        match named.iter_mut().find(|(name, _)| name == arg) {
            Some((_, number)) => *number = value.parse().with_context(|| format!("{arg} needs a number"))?,
            None if arg == "--model" => base = Some(value.clone()),
            None => anyhow::bail!(
                "unknown argument {arg}; expected --model M, {}",
                named.map(|(name, _)| format!("{name} N")).join(", ")
            ),
        }
    }
    Ok((named.map(|(_, number)| number), base))
}

#[cfg(test)]
mod tests {
    use super::numbers;

    #[test]
    fn arguments_are_read() {
        let read = |line: &str| {
            let args: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
            numbers(&args, [("--a", 1), ("--b", 2)]).map_err(|e| format!("{e:#}"))
        };
        assert_eq!(read("--b 5 --model m"), Ok(([1, 5], Some("m".into()))));
        assert_eq!(read(""), Ok(([1, 2], None)));
        assert!(
            read("--c 1").unwrap_err().contains("unknown argument --c; expected --model M, --a N, --b N")
        );
        assert!(read("--a x").unwrap_err().contains("--a needs a number"));
        assert!(read("--a").unwrap_err().contains("--a needs a value"));
    }
}
