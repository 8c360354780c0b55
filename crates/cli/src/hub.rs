//! Turns a model, adapter or data argument into a directory: a local one, a snapshot in the Hugging Face cache, or one fetched now.
//!
//! Only configuration, tokenizer, template and weight files are ever fetched; nothing from the hub is executed.

use crate::ui;
use anyhow::{Context, Result, anyhow, bail};
use hf_hub::api::sync::ApiBuilder;
use hf_hub::{Cache, Repo, RepoType};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};

/// What an argument names.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum What {
    Model,
    Adapter,
    Data,
}

impl What {
    fn name(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Adapter => "adapter",
            Self::Data => "data",
        }
    }

    fn repo(self) -> (RepoType, &'static str) {
        match self {
            Self::Data => (RepoType::Dataset, "datasets"),
            _ => (RepoType::Model, "models"),
        }
    }

    /// The file without which a directory is not complete.
    fn key_file(self) -> &'static str {
        match self {
            Self::Model => "config.json",
            Self::Adapter => "adapter_config.json",
            Self::Data => "train.jsonl",
        }
    }

    /// Files worth fetching. Names with a folder are never: no file lands outside its snapshot.
    fn wants(self, name: &str) -> bool {
        if name.contains(['/', '\\']) || name.starts_with('.') {
            return false;
        }
        match self {
            Self::Data => ["train.jsonl", "valid.jsonl", "test.jsonl"].contains(&name),
            Self::Model => {
                name.ends_with(".json")
                    || name.ends_with(".jinja")
                    || (name.starts_with("model") && name.ends_with(".safetensors"))
            }
            Self::Adapter => {
                name.ends_with(".json") || (name.starts_with("adapter") && name.ends_with(".safetensors"))
            }
        }
    }
}

/// The directory behind `argument`. Errors name what was tried and what to do.
pub(crate) fn resolve(argument: &str, what: What) -> Result<PathBuf> {
    let path = Path::new(argument);
    if path.is_dir() {
        return Ok(path.to_path_buf());
    }
    if path.exists() {
        let expected = match what {
            What::Model => "a model directory was expected (graft convert makes one of a .gguf file)",
            What::Adapter => "a directory with adapter_config.json and adapters.safetensors was expected",
            What::Data => {
                "a directory with train.jsonl (and valid.jsonl, test.jsonl) was expected: give the one that it stands in"
            }
        };
        bail!("the {} argument `{argument}` is a file; {expected}", what.name());
    }
    if !is_id(argument) {
        bail!(
            "there is no {} directory `{argument}`; give a directory or a Hugging Face id such as `owner/name`",
            what.name()
        );
    }
    let cache = cache_dir()?;
    if let Some(found) = cached(&cache, argument, what) {
        return Ok(found);
    }
    let tried = format!(
        "`{argument}` is no local {} directory and no complete snapshot of it is in the Hugging Face cache {}",
        what.name(),
        cache.display()
    );
    if offline() {
        bail!(
            "{tried}; HF_HUB_OFFLINE is set: unset it to fetch the {0}, or give a local directory",
            what.name()
        );
    }
    fetch(argument, what, &cache).with_context(|| format!("{tried}; fetching it failed"))
}

/// `owner/name`, the form of a hub id.
fn is_id(argument: &str) -> bool {
    let part = |p: &str| {
        !p.is_empty()
            && !p.starts_with('.')
            && p.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    };
    argument.split_once('/').is_some_and(|(owner, name)| part(owner) && part(name))
}

fn env(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|v| !v.is_empty())
}

fn offline() -> bool {
    env("HF_HUB_OFFLINE").is_some_and(|v| !["0", "false", "no", "off"].contains(&v.to_lowercase().as_str()))
}

/// HF_HUB_CACHE, else HF_HOME/hub, else the hub's default place.
fn cache_dir() -> Result<PathBuf> {
    if let Some(dir) = env("HF_HUB_CACHE") {
        return Ok(dir.into());
    }
    if let Some(home) = env("HF_HOME") {
        return Ok(Path::new(&home).join("hub"));
    }
    let base = env("XDG_CACHE_HOME").map(PathBuf::from);
    let base = base.or_else(|| env("HOME").map(|home| Path::new(&home).join(".cache")));
    base.map(|b| b.join("huggingface").join("hub")).ok_or_else(|| {
        anyhow!("neither HF_HOME nor HOME is set, so the Hugging Face cache has no place; set HF_HOME")
    })
}

/// A complete snapshot: the one `refs/main` names, else the newest complete one.
fn cached(cache: &Path, id: &str, what: What) -> Option<PathBuf> {
    let repo = cache.join(format!("{}--{}", what.repo().1, id.replace('/', "--")));
    let snapshots = repo.join("snapshots");
    if let Ok(commit) = std::fs::read_to_string(repo.join("refs").join("main")) {
        let dir = snapshots.join(commit.trim());
        if complete(&dir, what) {
            return Some(dir);
        }
    }
    let mut dirs: Vec<_> = std::fs::read_dir(snapshots).ok()?.flatten().collect();
    dirs.sort_by_key(|d| std::cmp::Reverse(d.metadata().and_then(|m| m.modified()).ok()));
    dirs.into_iter().map(|d| d.path()).find(|d| complete(d, what))
}

/// The key file and, for a model, every shard of the index are there.
fn complete(dir: &Path, what: What) -> bool {
    if !dir.join(what.key_file()).exists() {
        return false;
    }
    if what != What::Model {
        return true;
    }
    let Ok(text) = std::fs::read_to_string(dir.join("model.safetensors.index.json")) else {
        return dir.join("model.safetensors").exists();
    };
    let index: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
    let shards = index.get("weight_map").and_then(|m| m.as_object());
    shards.is_some_and(|m| m.values().all(|f| f.as_str().is_some_and(|f| dir.join(f).exists())))
}

fn fetch(id: &str, what: What, cache: &Path) -> Result<PathBuf> {
    let endpoint = env("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
    let hint = format!(
        "check the name, the network and, for a private repository, HF_TOKEN (endpoint {endpoint}), or give a local directory"
    );
    let cache = Cache::new(cache.to_path_buf());
    let token = env("HF_TOKEN").or_else(|| cache.token());
    let api = ApiBuilder::from_cache(cache)
        .with_endpoint(endpoint)
        .with_token(token)
        .with_progress(std::io::stderr().is_terminal())
        .build()?;
    let repo = api.repo(Repo::new(id.to_string(), what.repo().0));
    let info = repo.info().map_err(|e| anyhow!("{e}; {hint}"))?;
    let mut names: Vec<String> =
        info.siblings.into_iter().map(|s| s.rfilename).filter(|n| what.wants(n)).collect();
    let key = what.key_file();
    let Some(at) = names.iter().position(|n| n == key) else {
        if what == What::Data {
            bail!(
                "the data set `{id}` holds no {key}, and graft reads JSON lines alone (no parquet): save its rows as {key} in \
                 a directory and give that (graft perplexity also takes --data-path FILE.jsonl)"
            );
        }
        bail!("the repository `{id}` holds no {key}, so it is no {} that graft can read", what.name());
    };
    if what == What::Model && !names.iter().any(|n| n.ends_with(".safetensors")) {
        let hint = "graft fetches safetensors only; a .gguf file goes through graft convert";
        bail!("the repository `{id}` holds no model*.safetensors; {hint}");
    }
    // The key file comes last: a snapshot that has it is complete.
    let last = names.remove(at);
    names.push(last);
    let mut dir = PathBuf::new();
    for (i, name) in names.iter().enumerate() {
        ui::note(&format!("fetching {id}: {name} ({} of {})", i + 1, names.len()));
        let path = repo.get(name).map_err(|e| anyhow!("{name}: {e}; {hint}"))?;
        dir = path.parent().map(Path::to_path_buf).unwrap_or_default();
    }
    Ok(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_paths_are_told_apart() {
        assert!(is_id("mlx-community/Mistral-7B-Instruct-v0.3-4bit"));
        for path in ["mlx_model", "./a/b", "/a/b", "a/b/c", "../b", "a/", "a/.."] {
            assert!(!is_id(path), "{path}");
        }
    }

    #[test]
    fn no_code_and_no_folders_are_fetched() {
        for name in [
            "modeling_x.py",
            "../config.json",
            "sub/config.json",
            "consolidated.safetensors",
            "a.bin",
            ".x.json",
        ] {
            assert!(!What::Model.wants(name), "{name}");
        }
        for name in
            ["config.json", "tokenizer.json", "model-00001-of-00002.safetensors", "chat_template.jinja"]
        {
            assert!(What::Model.wants(name), "{name}");
        }
    }

    #[test]
    fn a_snapshot_counts_when_every_shard_is_there() {
        let cache = tempfile::tempdir().unwrap();
        let repo = cache.path().join("models--o--n");
        let snapshot = repo.join("snapshots").join("abc");
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::create_dir_all(repo.join("refs")).unwrap();
        std::fs::write(repo.join("refs/main"), "abc").unwrap();
        std::fs::write(snapshot.join("config.json"), "{}").unwrap();
        std::fs::write(
            snapshot.join("model.safetensors.index.json"),
            r#"{"weight_map": {"w": "model-1.safetensors"}}"#,
        )
        .unwrap();
        assert_eq!(cached(cache.path(), "o/n", What::Model), None);
        std::fs::write(snapshot.join("model-1.safetensors"), "").unwrap();
        assert_eq!(cached(cache.path(), "o/n", What::Model), Some(snapshot));
    }
}
