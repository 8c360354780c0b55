//! From a directory to a version that is served. The files are read and checked as bytes beside the server's threads; the
//! engine takes them in linear by linear; the name changes hands when all is done, and not at all if anything fails.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use graft_adapters::{CONFIG_FILE, StoredSet};
use tokio::sync::OwnedMutexGuard;

use crate::registry::{Place, Published};
use crate::serve::State;
use crate::{ApiError, Generation, Lease};

/// What is to be served under which name.
pub(crate) struct Load {
    pub(crate) name: String,
    /// The directory, below the root.
    pub(crate) path: String,
    pub(crate) place: Place,
}

/// What came of it.
pub(crate) struct Loaded {
    pub(crate) generation: Arc<Generation>,
    /// The content that had the name before.
    pub(crate) replaced: Option<String>,
}

/// Loads and publishes. It runs to its end even if whoever asked for it leaves; `turn` is held as long.
pub(crate) async fn load(
    state: &Arc<State>,
    load: Load,
    turn: OwnedMutexGuard<()>,
) -> Result<Loaded, ApiError> {
    let state = state.clone();
    let work = async move {
        let result = steps(&state, load).await;
        drop(turn);
        result
    };
    tokio::spawn(work).await.unwrap_or_else(|_| Err(ApiError::server("the adapter could not be loaded")))
}

async fn steps(state: &Arc<State>, load: Load) -> Result<Loaded, ApiError> {
    let registry = &state.registry;
    registry.may(&load.name, &load.place)?;
    let Some(root) = registry.policy.root.clone() else {
        return Err(ApiError::request(
            403,
            "lora_updates_disabled",
            "This server has no directory of adapters.",
        ));
    };
    let (for_read, path, limit) = (state.clone(), load.path.clone(), registry.policy.max_bytes);
    let work = move || read(&for_read, &root, &path, limit);
    let read = tokio::task::spawn_blocking(work).await;
    let (stored, content) = read.map_err(|_| ApiError::server("the adapter's files could not be read"))??;
    let generation = match registry.of_content(&content) {
        // The same bytes are the same version, whatever they are called.
        Some(generation) => generation,
        None => {
            registry.fits(&load.name, stored.rank(), stored.nbytes())?;
            adopt(state, stored, content).await?
        }
    };
    registry.fits(&load.name, generation.rank(), 0)?;
    let (name, root) = (load.name.as_str(), load.path.as_str());
    let (place, created) = (&load.place, state.seconds());
    let replaced = registry.publish(&Published { name, generation: &generation, root, place, created })?;
    Ok(Loaded { generation, replaced })
}

async fn adopt(state: &State, stored: StoredSet, content: String) -> Result<Arc<Generation>, ApiError> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    // If nobody waits any more, the version is let go at once.
    let done = move |result| sender.send(result).unwrap_or_default();
    let generation = state.engine.adopt(stored, content, Box::new(done));
    match receiver.await {
        Ok(Ok(())) => Ok(generation),
        Ok(Err(e)) => Err(unusable(format!("The adapter cannot be served: {e}"))),
        Err(_) => Err(ApiError::unavailable("engine_dead", "The engine has ended; restart the server.")),
    }
}

/// What a request's `model` stands for. A name that is not known is looked for below the root, where there is one.
pub(crate) async fn resolve(
    state: &Arc<State>,
    model: Option<&str>,
    scale: f32,
) -> Result<(Option<Lease>, String), ApiError> {
    let registry = &state.registry;
    let unknown = match registry.resolve(model, scale) {
        Err(error) if error.code == Some("model_not_found") => error,
        other => return other,
    };
    let (Some(root), Some(name)) = (registry.policy.root.clone(), model) else { return Err(unknown) };
    let (name, looked) = (name.to_owned(), name.to_owned());
    // One directory has one name: none with `//`, `/./` or a slash at its end.
    let plain = |name: &str| Path::new(name).components().collect::<PathBuf>().as_os_str() == name;
    let there = move || relative(&looked) && plain(&looked) && root.join(looked).join(CONFIG_FILE).is_file();
    if registry.check_name(&name).is_err() || !tokio::task::spawn_blocking(there).await.unwrap_or(false) {
        return Err(unknown);
    }
    // Those who ask for one name together wait for one load.
    let turn = registry.loading.clone().lock_owned().await;
    if let Ok(found) = registry.resolve(Some(&name), scale) {
        return Ok(found);
    }
    let loaded =
        load(state, Load { name: name.clone(), path: name.clone(), place: Place::OnDemand }, turn).await?;
    Ok((Some(Lease::new(&loaded.generation, scale)), name))
}

/// A path that leads nowhere but down.
fn relative(path: &str) -> bool {
    !path.is_empty() && Path::new(path).components().all(|part| matches!(part, Component::Normal(_)))
}

/// Reads an adapter below `root`, checks it against the base, and hashes it.
fn read(state: &State, root: &Path, given: &str, limit: usize) -> Result<(StoredSet, String), ApiError> {
    let (dir, before) = located(root, given, limit)?;
    let told = |e: graft_adapters::Error| {
        // Where the root is concerns nobody outside.
        unusable(e.to_string().replace(&dir.display().to_string(), given))
    };
    let stored = StoredSet::load(&dir).map_err(told)?;
    if located(root, given, limit)?.1 != before {
        let message = format!(
            "The files of '{given}' changed while they were read; publish a directory by renaming it."
        );
        return Err(ApiError::request(409, "adapter_file_changed", message));
    }
    state.engine.check(&dir, &stored).map_err(told)?;
    let content = stored.content();
    Ok((stored, content))
}

fn unusable(message: String) -> ApiError {
    let error = ApiError::request(422, "invalid_lora_adapter", message);
    ApiError { param: Some("lora_path".into()), ..error }
}

/// What tells one state of a file from another: device, inode, length, time of the last change.
type Stamp = (u64, u64, u64, i64, i64);

/// The directory and the state of its files; all of it must lie below the root, wherever links lead.
fn located(root: &Path, given: &str, limit: usize) -> Result<(PathBuf, Vec<Stamp>), ApiError> {
    let refuse = |status, code, message: String| ApiError {
        param: Some("lora_path".into()),
        ..ApiError::request(status, code, message)
    };
    let outside = || {
        let message = format!("'{given}' is not below the server's directory of adapters.");
        refuse(403, "adapter_path_forbidden", message)
    };
    let missing = |e: std::io::Error| match e.kind() {
        ErrorKind::NotFound | ErrorKind::NotADirectory => {
            let message = format!("There is no adapter directory '{given}'.");
            refuse(404, "adapter_path_not_found", message)
        }
        _ => refuse(403, "adapter_path_forbidden", format!("'{given}' cannot be read: {}.", e.kind())),
    };
    let root = root.canonicalize().map_err(missing)?;
    let below = Path::new(given).strip_prefix(&root).unwrap_or(Path::new(given));
    if !relative(&below.to_string_lossy()) {
        return Err(outside());
    }
    let dir = root.join(below).canonicalize().map_err(missing)?;
    if !dir.starts_with(&root) {
        return Err(outside());
    }
    let mut stamps = Vec::new();
    for name in [CONFIG_FILE, graft_adapters::ADAPTER_FILE, "adapter_model.safetensors"] {
        let file = match dir.join(name).canonicalize() {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::NotFound && name != CONFIG_FILE => continue,
            Err(e) => return Err(missing(e)),
        };
        let found = fs::metadata(&file).map_err(missing)?;
        if !file.starts_with(&root) || !found.is_file() {
            return Err(outside());
        }
        if found.len() > limit as u64 {
            let message = format!("{name} of '{given}' has {} bytes; at most {limit} are read.", found.len());
            return Err(refuse(413, "lora_adapter_file_too_large", message));
        }
        stamps.push((found.dev(), found.ino(), found.len(), found.mtime(), found.mtime_nsec()));
    }
    Ok((dir, stamps))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_outside_the_root_is_read() {
        let (root, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for dir in [root.path().join("a/b"), other.path().join("c"), root.path().join("empty")] {
            fs::create_dir_all(&dir).unwrap();
            if dir.ends_with("empty") {
                continue;
            }
            fs::write(dir.join(CONFIG_FILE), "{}").unwrap();
            fs::write(dir.join("adapters.safetensors"), "12345").unwrap();
        }
        std::os::unix::fs::symlink(other.path().join("c"), root.path().join("out")).unwrap();
        std::os::unix::fs::symlink(root.path().join("a/b"), root.path().join("in")).unwrap();
        let half = root.path().join("half");
        fs::create_dir(&half).unwrap();
        std::os::unix::fs::symlink(other.path().join("c").join(CONFIG_FILE), half.join(CONFIG_FILE)).unwrap();
        let code =
            |given: &str, limit| located(root.path(), given, limit).map(|_| ()).map_err(|e| e.code.unwrap());
        assert_eq!(code("a/b", 5), Ok(()));
        assert_eq!(code("in", 5), Ok(()));
        assert_eq!(code(root.path().canonicalize().unwrap().join("a/b").to_str().unwrap(), 5), Ok(()));
        assert_eq!(code("a/b", 4), Err("lora_adapter_file_too_large"));
        for given in ["out", "half", "..", "a/../../x", "/etc", "", "/"] {
            assert_eq!(code(given, 5), Err("adapter_path_forbidden"), "{given}");
        }
        for given in ["nobody", "empty", "a/b/adapter_config.json"] {
            assert_eq!(code(given, 5), Err("adapter_path_not_found"), "{given}");
        }
        let (_, before) = located(root.path(), "a/b", 5).unwrap();
        fs::rename(other.path().join("c").join(CONFIG_FILE), root.path().join("a/b").join(CONFIG_FILE))
            .unwrap();
        assert_ne!(located(root.path(), "a/b", 5).unwrap().1, before);
    }
}
