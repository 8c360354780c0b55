//! Writing that is whole or not at all: a file or a directory is made beside its place and then takes it.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{BufWriter, ErrorKind, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use rustix::fs::FlockOperation;
use serde_json::{Map, Value, json};
use tempfile::{NamedTempFile, TempDir, TempPath};

use crate::tensor::{Entry, header};
use crate::{Error, Result, Tensor};

/// Replaces `path` by `bytes`: whoever reads it sees the old contents or the new, never a part.
///
/// # Errors
/// When writing, syncing or renaming fails; the old file is then untouched.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = AtomicFile::create(path)?;
    file.write(bytes)?;
    file.persist()
}

/// A file in the making beside its place; dropped before [`AtomicFile::persist`], it leaves nothing behind.
#[derive(Debug)]
pub(crate) struct AtomicFile {
    /// Apart from its name, which it would add to every error.
    file: BufWriter<File>,
    place: TempPath,
    path: PathBuf,
    written: u64,
    /// Whether what is there already may be replaced.
    replace: bool,
}

impl AtomicFile {
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let (dir, prefix) = (parent(path), prefix(path));
        remove_abandoned(dir, &prefix);
        let file = tempfile::Builder::new().prefix(&prefix).tempfile_in(dir).map_err(Error::io(path))?;
        let (file, place) = file.into_parts();
        // As of a directory: it says that this process lives.
        let _ = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive);
        Ok(Self { file: BufWriter::new(file), place, path: path.to_path_buf(), written: 0, replace: true })
    }

    /// The same for a file that must not replace another.
    pub(crate) fn create_new(path: &Path) -> Result<Self> {
        Ok(Self { replace: false, ..Self::create(path)? })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(Error::writing(&self.path, self.written))?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    /// Synced and renamed to its place.
    pub(crate) fn persist(self) -> Result<()> {
        let Self { file, place, path, written, replace } = self;
        let file = file.into_inner().map_err(|error| Error::writing(&path, written)(error.into_error()))?;
        file.sync_all().map_err(Error::writing(&path, written))?;
        let file = NamedTempFile::from_parts(file, place);
        readable_by_all(file.path())?;
        let placed = if replace { file.persist(&path) } else { file.persist_noclobber(&path) };
        let placed = match placed {
            // A file system that cannot say so in one step.
            Err(e) if !replace && e.error.kind() != ErrorKind::AlreadyExists && !path.exists() => {
                e.file.persist(&path)
            }
            placed => placed,
        };
        placed.map_err(|error| Error::Io { path: path.clone(), source: error.error })?;
        sync_dir(parent(&path))
    }
}

/// Whether [`write_atomic`] could write `path`, found out before the work that it is to hold. What is no regular file, such
/// as /dev/null, must not be replaced.
///
/// # Errors
/// When something else than a regular file is there, or no file can be made beside it.
pub fn check_writable(path: &Path) -> Result<()> {
    if std::fs::metadata(path).is_ok_and(|found| !found.is_file()) {
        let why = "it is there already and no regular file, so it is not replaced";
        return Err(Error::Io { path: path.to_path_buf(), source: std::io::Error::other(why) });
    }
    NamedTempFile::new_in(parent(path)).map(drop).map_err(Error::io(path))
}

/// How the names begin of what is being made beside `path`.
fn prefix(path: &Path) -> String {
    format!(".{}.part-", path.file_name().and_then(|name| name.to_str()).unwrap_or("model"))
}

/// The directory in which `path` stands.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(Error::io(dir))
}

/// Temporary files are private to their owner; what takes their place should be as readable as any new file.
fn readable_by_all(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    let mode = if path.is_dir() { 0o755 } else { 0o644 };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(Error::io(path))
}

/// A model or adapter directory in the making. Dropped before [`DirWriter::finish`], it leaves nothing behind; a process that is killed
/// leaves a hidden directory beside the target, which the next writer of the same target removes.
#[derive(Debug)]
pub struct DirWriter {
    target: PathBuf,
    overwrite: bool,
    temp: TempDir,
    /// Bytes of the tensors so far.
    written: u64,
    shards: Vec<Shard>,
    metadata: BTreeMap<String, String>,
    /// The one file of tensors, where there are to be no shards and no index.
    single: Option<String>,
    /// Bytes left free for the header of each file.
    room: usize,
    /// Locks the directory while this process lives.
    lock: File,
}

/// A model directory that is complete beside its place. Dropped before [`Made::place`], it leaves nothing behind.
#[derive(Debug)]
pub struct Made {
    target: PathBuf,
    overwrite: bool,
    temp: TempDir,
    _lock: File,
}

/// Tensors of one file, their data collected apart because the header, which comes first, is known last.
#[derive(Debug)]
struct Shard {
    data: BufWriter<File>,
    entries: Vec<Entry>,
    bytes: u64,
    /// How many of them the disk was told to keep, and by whom: at the end there is then little left to wait for.
    told: u64,
    syncing: Option<JoinHandle<std::io::Result<()>>>,
}

impl Shard {
    /// `room` bytes for the header, then the data.
    fn create(path: &Path, room: usize) -> std::io::Result<Shard> {
        let mut file = File::create_new(path)?;
        file.seek(SeekFrom::Start(room as u64))?;
        Ok(Shard { data: BufWriter::new(file), entries: Vec::new(), bytes: 0, told: 0, syncing: None })
    }

    fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.data.write_all(bytes)?;
        self.bytes += bytes.len() as u64;
        if self.bytes - self.told >= FLUSHED && self.syncing.as_ref().is_none_or(JoinHandle::is_finished) {
            self.settle()?;
            let file = self.data.get_ref().try_clone()?;
            self.told = self.bytes;
            self.syncing = Some(std::thread::spawn(move || file.sync_data()));
        }
        Ok(())
    }

    /// Waits for the disk; a failure is told to whoever asks first, so that no sync after it would say so.
    fn settle(&mut self) -> std::io::Result<()> {
        let outcome = self.syncing.take().map(JoinHandle::join);
        outcome.unwrap_or(Ok(Ok(()))).unwrap_or_else(|_| Err(std::io::Error::other("a sync panicked")))
    }

    /// All data in the file.
    fn close(mut self) -> std::io::Result<(File, Vec<Entry>, u64)> {
        self.settle()?;
        Ok((self.data.into_inner().map_err(std::io::IntoInnerError::into_error)?, self.entries, self.bytes))
    }
}

/// Data after which the disk is told to keep it.
const FLUSHED: u64 = 256 << 20;

/// mlx-lm's limit of one file: 5 GiB; a single tensor may exceed it.
const MAX_SHARD: u64 = 5 << 30;

impl DirWriter {
    /// Begins a directory that will stand at `target`, in the place of a model directory that is there if `overwrite`.
    ///
    /// # Errors
    /// When the target exists and must not or cannot be replaced, or holds other files than a model's; or when nothing can be
    /// written there.
    pub fn create(target: &Path, overwrite: bool) -> Result<DirWriter> {
        check_target(target, overwrite)?;
        let dir = parent(target);
        std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
        let prefix = prefix(target);
        remove_abandoned(dir, &prefix);
        let temp = tempfile::Builder::new().prefix(&prefix).tempdir_in(dir).map_err(Error::io(dir))?;
        let lock = File::open(temp.path()).map_err(Error::io(temp.path()))?;
        // A file system without locks leaves what a killed process wrote; that is no reason to refuse it.
        let _ = rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive);
        let metadata = BTreeMap::from([("format".to_owned(), "mlx".to_owned())]);
        let (target, shards) = (target.to_path_buf(), Vec::new());
        Ok(DirWriter { target, overwrite, temp, written: 0, shards, metadata, single: None, room: 0, lock })
    }

    /// Leaves room for a header of `bytes` bytes at the beginning of each file of tensors. The header comes first and is known
    /// last: where it finds room the data stay where they are, else they are copied once more. Room left over is blanks.
    #[must_use]
    pub fn room(mut self, bytes: usize) -> DirWriter {
        self.room = bytes.next_multiple_of(8);
        self
    }

    /// Puts all tensors into one file of that name, without an index, as adapters have it.
    #[must_use]
    pub fn single(mut self, name: &str) -> DirWriter {
        self.single = Some(name.to_owned());
        self
    }

    /// What the header of each file of tensors says beside them.
    pub fn set_metadata(&mut self, metadata: BTreeMap<String, String>) {
        self.metadata = metadata;
    }

    /// Adds an entry to the metadata of every file of tensors.
    pub fn describe(&mut self, key: &str, value: String) {
        self.metadata.insert(key.to_owned(), value);
    }

    /// Appends a tensor.
    ///
    /// # Errors
    /// When writing fails, or the tensor's bytes do not fit its shape.
    pub fn add(&mut self, name: &str, tensor: &Tensor) -> Result<()> {
        let bits = tensor.len() as u64 * tensor.dtype.bitsize() as u64;
        if bits != tensor.data.len() as u64 * 8 {
            return Err(Error::Request(format!(
                "tensor {name}: {:?} of {:?} are {} bytes, found {}",
                tensor.shape,
                tensor.dtype,
                bits / 8,
                tensor.data.len()
            )));
        }
        let size = tensor.data.len() as u64;
        let limit = if self.single.is_some() { u64::MAX - size } else { MAX_SHARD };
        if self.shards.last().is_none_or(|shard| shard.bytes + size > limit && shard.bytes > 0) {
            let path = self.data_path(self.shards.len());
            self.shards.push(Shard::create(&path, self.room).map_err(Error::io(&path))?);
        }
        let Some(shard) = self.shards.last_mut() else { return Ok(()) };
        shard.write(&tensor.data).map_err(Error::writing(&self.target, self.written))?;
        self.written += size;
        shard.entries.push((name.to_owned(), tensor.dtype, tensor.shape.clone(), size));
        Ok(())
    }

    /// Copies a file into the directory.
    ///
    /// # Errors
    /// When reading or writing fails.
    pub fn copy_file(&mut self, source: &Path, name: &str) -> Result<()> {
        let bytes = std::fs::read(source).map_err(Error::io(source))?;
        self.write_file(name, &bytes)
    }

    /// Writes a file into the directory.
    ///
    /// # Errors
    /// When writing fails.
    pub fn write_file(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        write_synced(&self.temp.path().join(name), bytes, (&self.target, self.written))
    }

    /// Writes config.json as mlx-lm does: keys sorted, four spaces.
    ///
    /// # Errors
    /// When writing fails.
    pub fn write_config(&mut self, config: &Map<String, Value>) -> Result<()> {
        let sorted: BTreeMap<&String, &Value> = config.iter().collect();
        self.write_file("config.json", &pretty(&json!(sorted))?)
    }

    /// Completes the files and puts the directory in its place.
    ///
    /// # Errors
    /// When writing or renaming fails; what stood at the target is then untouched.
    pub fn finish(self) -> Result<()> {
        self.complete()?.place()
    }

    /// Completes the files; the directory stays beside its place, to be looked at first.
    ///
    /// # Errors
    /// When writing fails.
    pub fn complete(mut self) -> Result<Made> {
        let shards = std::mem::take(&mut self.shards);
        let count = shards.len();
        let (mut weight_map, mut total) = (BTreeMap::new(), 0);
        for (index, shard) in shards.into_iter().enumerate() {
            let name = match (&self.single, count) {
                (Some(name), _) => name.clone(),
                (None, 1) => "model.safetensors".to_owned(),
                (None, _) => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
            };
            total += shard.bytes;
            weight_map.extend(shard.entries.iter().map(|(tensor, ..)| (tensor.clone(), name.clone())));
            self.assemble(index, shard, &name)?;
        }
        if count > 0 && self.single.is_none() {
            let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
            let bytes = pretty(&index)?;
            self.write_file("model.safetensors.index.json", &bytes)?;
        }
        Ok(Made { target: self.target, overwrite: self.overwrite, temp: self.temp, _lock: self.lock })
    }

    fn data_path(&self, index: usize) -> PathBuf {
        self.temp.path().join(format!(".data-{index}"))
    }

    /// Header, then data: those that cannot stay are copied file to file, which the kernel does without the bytes passing
    /// through us.
    fn assemble(&self, index: usize, shard: Shard, name: &str) -> Result<()> {
        let (from, to) = (self.data_path(index), self.temp.path().join(name));
        let full = || Error::writing(&self.target, self.written);
        let (mut file, entries, bytes) = shard.close().map_err(full())?;
        let head = header(&entries, &self.metadata, self.room)?;
        if head.len() == self.room {
            let written = file.rewind().and_then(|()| file.write_all(&head)).and_then(|()| file.sync_all());
            return written
                .map_err(full())
                .and_then(|()| std::fs::rename(&from, &to).map_err(Error::io(&from)));
        }
        let mut source = File::open(&from).map_err(Error::io(&from))?;
        source.seek(SeekFrom::Start(self.room as u64)).map_err(Error::io(&from))?;
        let mut file = File::create_new(&to).map_err(Error::io(&to))?;
        file.write_all(&head).map_err(full())?;
        let copied = std::io::copy(&mut source.take(bytes), &mut file).map_err(full())?;
        if copied != bytes {
            return Err(Error::Damaged { file: from, what: format!("{copied} of {bytes} bytes were left") });
        }
        file.sync_all().map_err(full())?;
        std::fs::remove_file(&from).map_err(Error::io(&from))
    }
}

impl Made {
    /// Where the directory is for now.
    pub fn path(&self) -> &Path {
        self.temp.path()
    }

    /// Writes a file into the directory, or replaces one.
    ///
    /// # Errors
    /// When writing fails.
    pub fn write_file(&self, name: &str, bytes: &[u8]) -> Result<()> {
        write_synced(&self.temp.path().join(name), bytes, (&self.target, 0))
    }

    /// Puts the directory in its place.
    ///
    /// # Errors
    /// When the target has come to hold what must not be lost, or renaming fails; what stood at the target is then untouched.
    pub fn place(self) -> Result<()> {
        sync_dir(self.temp.path())?;
        readable_by_all(self.temp.path())?;
        // Hours may have passed since the first look.
        check_target(&self.target, self.overwrite)?;
        place(self.temp.path(), &self.target, self.overwrite)?;
        // After an exchange the old directory stands where the new one was made, and goes with it.
        sync_dir(parent(&self.target))
    }
}

/// Writes a file of a directory that will stand at `target`, of which so many bytes are written.
fn write_synced(path: &Path, bytes: &[u8], (target, written): (&Path, u64)) -> Result<()> {
    let mut file = File::create(path).map_err(Error::io(path))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(Error::writing(target, written))
}

/// What a killed process may leave is removed when nobody has held it for as long as it takes to make and lock a directory.
const ABANDONED: std::time::Duration = std::time::Duration::from_secs(10);

/// Removes the directories and files of that prefix whose processes are no more; what cannot be removed stays.
fn remove_abandoned(dir: &Path, prefix: &str) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let ours = entry.file_name().to_str().is_some_and(|name| name.starts_with(prefix));
        let Some(metadata) = entry.metadata().ok().filter(|m| ours && (m.is_dir() || m.is_file())) else {
            continue;
        };
        let age = metadata.modified().ok().and_then(|time| time.elapsed().ok());
        if age.is_none_or(|age| age < ABANDONED) {
            continue;
        }
        let held = |file: &File| rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive).is_err();
        if File::open(&path).is_ok_and(|file| !held(&file)) {
            let _ =
                if metadata.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
        }
    }
}

/// JSON with four spaces, as Python's `indent=4`, for files that people compare with mlx-lm's.
///
/// # Errors
/// When a key of a map is no text.
pub fn pretty(value: &Value) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, formatter);
    serde::Serialize::serialize(value, &mut serializer)
        .map_err(|error| Error::Request(format!("cannot write JSON: {error}")))?;
    Ok(bytes)
}

/// Files beside a model's weights that it may have had from its maker or from us, by name.
const MODEL_FILES: [&str; 21] = [
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "fuse_report.json",
    "adapter_config.json",
    "README.md",
    "USE_POLICY.md",
    ".gitattributes",
    ".DS_Store",
];

/// Whether a model directory of ours may hold a file of that name.
fn is_model_file(name: &str) -> bool {
    let code = ["modeling_", "configuration_", "tokenization_"].iter().any(|start| name.starts_with(start));
    MODEL_FILES.contains(&name)
        || (name.starts_with("model") && name.ends_with(".safetensors"))
        || (code && name.ends_with(".py"))
        || [".gguf", ".tiktoken"].iter().any(|end| name.to_ascii_lowercase().ends_with(end))
        || ["LICENSE", "NOTICE"].iter().any(|start| name.starts_with(start))
}

/// Refuses a target that would be lost, because it exists without leave or holds more than a model, or that cannot be replaced.
fn check_target(target: &Path, overwrite: bool) -> Result<()> {
    let no_directory = "it is no directory; choose another path";
    if let Some(file) = target.ancestors().skip(1).find(|dir| dir.is_file()) {
        return Err(Error::Exists { path: file.to_path_buf(), hint: no_directory.into() });
    }
    let exists = |hint: String| Err(Error::Exists { path: target.to_path_buf(), hint });
    let inside = || format!("choose a folder inside it, such as {}", target.join("model").display());
    if target.file_name().is_none() {
        // It would have to be renamed, and has no name.
        return exists(format!("it cannot be replaced by a new directory; {}", inside()));
    }
    let Ok(metadata) = std::fs::symlink_metadata(target) else { return Ok(()) };
    if metadata.is_symlink() {
        let to = std::fs::read_link(target).unwrap_or_default();
        return exists(format!("it is a symbolic link; give what it points to, {}", to.display()));
    }
    if !metadata.is_dir() {
        return exists(no_directory.into());
    }
    if std::fs::metadata(parent(target)).is_ok_and(|dir| dir.dev() != metadata.dev()) {
        return exists(format!(
            "it is a mount point, which no directory can take the place of; {}",
            inside()
        ));
    }
    let entries = std::fs::read_dir(target).map_err(Error::io(target))?.flatten();
    let mut entries: Vec<_> = entries.map(|entry| (entry.file_name(), entry.path())).collect();
    if entries.is_empty() {
        return Ok(());
    }
    if !overwrite {
        return exists("remove it or choose another path".into());
    }
    // A model's files stand side by side; whatever else is there is someone's data, adapters being trained perhaps.
    entries.sort();
    let foreign =
        |(name, path): &&(OsString, PathBuf)| !path.is_file() || !name.to_str().is_some_and(is_model_file);
    if let Some((name, _)) = entries.iter().find(foreign) {
        let name = name.to_string_lossy();
        return exists(format!(
            "it holds other things than a model's files, which would be lost ({name}); choose another path"
        ));
    }
    if !target.join("config.json").is_file() {
        return exists("it is no model directory, as config.json is missing; choose another path".into());
    }
    Ok(())
}

/// Puts `made` in the place of `target`; of a model that is there only if `overwrite`.
fn place(made: &Path, target: &Path, overwrite: bool) -> Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    // A plain rename of a directory replaces an empty directory and nothing else.
    if !overwrite || !target.exists() {
        return std::fs::rename(made, target).map_err(Error::io(target));
    }
    if renameat_with(CWD, made, CWD, target, RenameFlags::EXCHANGE).is_ok() {
        return Ok(());
    }
    // A file system without exchange: for a moment the old directory has another name.
    let aside = made.with_extension("old");
    std::fs::rename(target, &aside).map_err(Error::io(target))?;
    if let Err(source) = std::fs::rename(made, target) {
        // The old directory goes back; if even that fails, the error names where it is.
        return match std::fs::rename(&aside, target) {
            Ok(()) => Err(Error::Io { path: target.to_path_buf(), source }),
            Err(_) => Err(Error::Io { path: aside, source }),
        };
    }
    std::fs::remove_dir_all(&aside).map_err(Error::io(&aside))
}
