//! Writing that is whole or not at all: a file or a directory is made beside its place and then takes it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use rustix::fs::FlockOperation;
use serde_json::{Map, Value, json};
use tempfile::{NamedTempFile, TempDir};

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
    file: BufWriter<NamedTempFile>,
    path: PathBuf,
}

impl AtomicFile {
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let file = NamedTempFile::new_in(parent(path)).map_err(Error::io(path))?;
        Ok(Self { file: BufWriter::new(file), path: path.to_path_buf() })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(Error::io(&self.path))
    }

    /// Synced and renamed to its place.
    pub(crate) fn persist(self) -> Result<()> {
        let path = self.path;
        let file = self.file.into_inner().map_err(|error| Error::io(&path)(error.into_error()))?;
        file.as_file().sync_all().map_err(Error::io(&path))?;
        readable_by_all(file.path())?;
        file.persist(&path).map_err(|error| Error::Io { path: path.clone(), source: error.error })?;
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
    temp: TempDir,
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
    /// Begins a directory that will stand at `target`, replacing what is there if `overwrite`.
    ///
    /// # Errors
    /// When the target exists and must not be replaced, or is no model directory; or when nothing can be written there.
    pub fn create(target: &Path, overwrite: bool) -> Result<DirWriter> {
        check_target(target, overwrite)?;
        let dir = parent(target);
        std::fs::create_dir_all(dir).map_err(Error::io(dir))?;
        let name = target.file_name().and_then(|name| name.to_str()).unwrap_or("model");
        let prefix = format!(".{name}.part-");
        remove_abandoned(dir, &prefix);
        let temp = tempfile::Builder::new().prefix(&prefix).tempdir_in(dir).map_err(Error::io(dir))?;
        let lock = File::open(temp.path()).map_err(Error::io(temp.path()))?;
        // A file system without locks leaves what a killed process wrote; that is no reason to refuse it.
        let _ = rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive);
        let metadata = BTreeMap::from([("format".to_owned(), "mlx".to_owned())]);
        let target = target.to_path_buf();
        Ok(DirWriter { target, temp, shards: Vec::new(), metadata, single: None, room: 0, lock })
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
        let path = self.data_path(self.shards.len() - 1);
        let Some(shard) = self.shards.last_mut() else { return Ok(()) };
        shard.write(&tensor.data).map_err(Error::io(&path))?;
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
        write_synced(&self.temp.path().join(name), bytes)
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
        Ok(Made { target: self.target, temp: self.temp, _lock: self.lock })
    }

    fn data_path(&self, index: usize) -> PathBuf {
        self.temp.path().join(format!(".data-{index}"))
    }

    /// Header, then data: those that cannot stay are copied file to file, which the kernel does without the bytes passing
    /// through us.
    fn assemble(&self, index: usize, shard: Shard, name: &str) -> Result<()> {
        let (from, to) = (self.data_path(index), self.temp.path().join(name));
        let (mut file, entries, bytes) = shard.close().map_err(Error::io(&from))?;
        let head = header(&entries, &self.metadata, self.room)?;
        if head.len() == self.room {
            let written = file.rewind().and_then(|()| file.write_all(&head)).and_then(|()| file.sync_all());
            return written.and_then(|()| std::fs::rename(&from, &to)).map_err(Error::io(&from));
        }
        let mut source = File::open(&from).map_err(Error::io(&from))?;
        source.seek(SeekFrom::Start(self.room as u64)).map_err(Error::io(&from))?;
        let mut file = File::create_new(&to).map_err(Error::io(&to))?;
        file.write_all(&head).map_err(Error::io(&to))?;
        let copied = std::io::copy(&mut source.take(bytes), &mut file).map_err(Error::io(&to))?;
        if copied != bytes {
            return Err(Error::Damaged { file: from, what: format!("{copied} of {bytes} bytes were left") });
        }
        file.sync_all().map_err(Error::io(&to))?;
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
        write_synced(&self.temp.path().join(name), bytes)
    }

    /// Puts the directory in its place.
    ///
    /// # Errors
    /// When renaming fails; what stood at the target is then untouched.
    pub fn place(self) -> Result<()> {
        sync_dir(self.temp.path())?;
        readable_by_all(self.temp.path())?;
        place(self.temp.path(), &self.target)?;
        // After an exchange the old directory stands where the new one was made, and goes with it.
        sync_dir(parent(&self.target))
    }
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = File::create(path).map_err(Error::io(path))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(Error::io(path))
}

/// What a killed process may leave is removed when nobody has held it for as long as it takes to make and lock a directory.
const ABANDONED: std::time::Duration = std::time::Duration::from_secs(10);

/// Removes the directories of that prefix whose processes are no more; what cannot be removed stays.
fn remove_abandoned(dir: &Path, prefix: &str) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let ours = entry.file_name().to_str().is_some_and(|name| name.starts_with(prefix));
        let age = entry
            .metadata()
            .ok()
            .filter(std::fs::Metadata::is_dir)
            .and_then(|m| m.modified().ok()?.elapsed().ok());
        if !ours || age.is_none_or(|age| age < ABANDONED) {
            continue;
        }
        let held = |file: &File| rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive).is_err();
        if File::open(&path).is_ok_and(|file| !held(&file)) {
            let _ = std::fs::remove_dir_all(&path);
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

/// Refuses a target that would be lost: one that exists without leave, or that is no model directory.
fn check_target(target: &Path, overwrite: bool) -> Result<()> {
    let no_directory = "it is no directory; choose another path";
    if let Some(file) = target.ancestors().skip(1).find(|dir| dir.is_file()) {
        return Err(Error::Exists { path: file.to_path_buf(), hint: no_directory.into() });
    }
    let Ok(metadata) = std::fs::symlink_metadata(target) else { return Ok(()) };
    let exists = |hint: &str| Err(Error::Exists { path: target.to_path_buf(), hint: hint.into() });
    if !metadata.is_dir() {
        return exists(no_directory);
    }
    let mut inside = std::fs::read_dir(target).map_err(Error::io(target))?.flatten().peekable();
    if inside.peek().is_none() {
        return Ok(());
    }
    if !overwrite {
        return exists("remove it or choose another path");
    }
    // A model's files stand side by side; a folder among them is someone's data, adapters being trained perhaps.
    if !target.join("config.json").is_file() || inside.any(|entry| entry.path().is_dir()) {
        return exists(
            "it holds other things than a model's files, which would be lost; choose another path",
        );
    }
    Ok(())
}

/// Puts `made` in the place of `target`.
fn place(made: &Path, target: &Path) -> Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    if !target.exists() {
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
