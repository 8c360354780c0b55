//! Model directories that are written: the same tensors whether the header found the room that was left for it or not.
#![allow(clippy::unwrap_used, reason = "tests: a panic is the report")]

use std::path::Path;

use graft_quant::{Checkpoint, DirWriter, StoredDtype, Tensor, read_safetensors};

fn tensors() -> Vec<(String, Tensor)> {
    let of = |i: usize| {
        let data = (0..24 * i).map(|byte| (byte * 7 + i) as u8).collect();
        (format!("model.layers.{i}.weight"), Tensor { dtype: StoredDtype::F16, shape: vec![3 * i, 4], data })
    };
    (1..=20).map(of).collect()
}

/// A directory whose files had `room` bytes for their headers, and the length of its one file of tensors.
fn written(dir: &Path, room: usize) -> u64 {
    let mut writer = DirWriter::create(&dir.join(room.to_string()), false).unwrap().room(room);
    tensors().iter().for_each(|(name, tensor)| writer.add(name, tensor).unwrap());
    writer.describe("made_by", "a test".into());
    writer.write_config(&serde_json::Map::new()).unwrap();
    writer.finish().unwrap();
    std::fs::metadata(dir.join(room.to_string()).join("model.safetensors")).unwrap().len()
}

#[test]
fn a_header_takes_the_room_that_is_left_or_none_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let bare = written(dir.path(), 0);
    let data: usize = tensors().iter().map(|(_, tensor)| tensor.data.len()).sum();
    let header = bare as usize - data;
    for (room, length) in
        [(8, bare), (header - 8, bare), (header, bare), (header + 1, bare + 8), (4096, data as u64 + 4096)]
    {
        assert_eq!(written(dir.path(), room), length, "room for {room} bytes, the header has {header}");
        let made = dir.path().join(room.to_string());
        let names: Vec<_> = std::fs::read_dir(&made).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names.len(), 3, "{names:?}");
        let checkpoint = Checkpoint::open(&made).unwrap();
        for (name, tensor) in tensors() {
            assert_eq!(checkpoint.read(&name).unwrap(), tensor, "{name}, room {room}");
        }
        // The library that defines the format reads it, too.
        let (all, metadata) = read_safetensors(&made.join("model.safetensors")).unwrap();
        assert_eq!((all.len(), metadata["made_by"].as_str()), (20, "a test"));
    }
}
