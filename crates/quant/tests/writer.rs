//! Writing that is whole or not at all: what may be replaced, and what is left behind.
#![allow(clippy::unwrap_used, reason = "tests: a panic is the report")]

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use graft_quant::{DirWriter, write_atomic};
use tempfile::TempDir;

/// A directory with a small model in `model`.
fn with_model() -> (TempDir, PathBuf) {
    let parent = tempfile::tempdir().unwrap();
    let model = parent.path().join("model");
    std::fs::create_dir(&model).unwrap();
    for name in
        ["config.json", "model.safetensors", "tokenizer.json", "fuse_report.json", "m.gguf", "LICENSE"]
    {
        std::fs::write(model.join(name), "old").unwrap();
    }
    (parent, model)
}

fn refused(target: &Path, overwrite: bool) -> String {
    DirWriter::create(target, overwrite).map(|_| ()).unwrap_err().to_string()
}

/// A writer with one file in it.
fn writer(target: &Path, overwrite: bool) -> DirWriter {
    let mut writer = DirWriter::create(target, overwrite).unwrap();
    writer.write_file("config.json", b"new").unwrap();
    writer
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn only_a_models_own_files_are_replaced() {
    let (parent, model) = with_model();
    writer(&model, true).finish().unwrap();
    assert_eq!(names(&model), ["config.json"]);
    for name in
        ["adapters.safetensors", "notes.txt", "diary.json", "train.py", "weights.safetensors", "rows.jsonl"]
    {
        let (_parent, model) = with_model();
        std::fs::write(model.join(name), "mine").unwrap();
        let text = refused(&model, true);
        assert!(text.contains(&format!("would be lost ({name})")), "{text}");
        assert_eq!(std::fs::read(model.join(name)).unwrap(), b"mine");
    }
    std::fs::create_dir(model.join("checkpoints")).unwrap();
    assert!(refused(&model, true).contains("would be lost (checkpoints)"));
    assert_eq!(names(parent.path()), ["model"]);
}

#[test]
fn what_came_to_the_target_meanwhile_is_not_lost() {
    // Nothing was there at the start, and something is at the end.
    let parent = tempfile::tempdir().unwrap();
    let target = parent.path().join("model");
    let made = writer(&target, false).complete().unwrap();
    std::fs::create_dir(&target).unwrap();
    std::fs::write(target.join("config.json"), "another's").unwrap();
    assert!(made.place().unwrap_err().to_string().contains("model exists already"));
    assert_eq!(std::fs::read(target.join("config.json")).unwrap(), b"another's");
    assert_eq!(names(parent.path()), ["model"]);
    // A model that has got company.
    let (parent, model) = with_model();
    let made = writer(&model, true).complete().unwrap();
    std::fs::write(model.join("notes.txt"), "mine").unwrap();
    assert!(made.place().unwrap_err().to_string().contains("would be lost (notes.txt)"));
    assert_eq!(std::fs::read(model.join("notes.txt")).unwrap(), b"mine");
    assert_eq!(names(parent.path()), ["model"]);
    // An empty directory is nobody's.
    let target = parent.path().join("empty");
    let made = writer(&target, false).complete().unwrap();
    std::fs::create_dir(&target).unwrap();
    made.place().unwrap();
    assert_eq!(names(&target), ["config.json"]);
}

#[test]
fn a_target_that_cannot_be_replaced_is_found_at_the_start() {
    for path in [".", "..", "/", "no/such/.."] {
        for overwrite in [false, true] {
            let text = refused(Path::new(path), overwrite);
            assert!(
                text.contains("cannot be replaced") && text.contains("choose a folder inside it"),
                "{text}"
            );
        }
    }
    // A mount point on every system that we know.
    let text = refused(Path::new("/dev"), true);
    assert!(text.contains("it is a mount point") && text.contains("such as /dev/model"), "{text}");
    let (parent, model) = with_model();
    let link = parent.path().join("link");
    std::os::unix::fs::symlink(&model, &link).unwrap();
    let text = refused(&link, true);
    assert!(text.contains("it is a symbolic link") && text.contains(model.to_str().unwrap()), "{text}");
    assert_eq!(names(parent.path()), ["link", "model"]);
}

#[test]
fn what_a_killed_process_left_of_a_file_goes_with_the_next_write() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for name in [".a.gguf.part-old", ".a.gguf.part-held", ".a.gguf.part-new", ".b.gguf.part-old"] {
        let file = std::fs::File::create(at(name)).unwrap();
        if !name.ends_with("new") {
            file.set_modified(SystemTime::now() - Duration::from_secs(60)).unwrap();
        }
    }
    let held = std::fs::File::open(at(".a.gguf.part-held")).unwrap();
    rustix::fs::flock(&held, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
    write_atomic(&at("a.gguf"), b"whole").unwrap();
    let left = [".a.gguf.part-held", ".a.gguf.part-new", ".b.gguf.part-old", "a.gguf"];
    assert_eq!(names(dir.path()), left);
}
