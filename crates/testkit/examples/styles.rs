//! Writes a tiny model for each way of writing conversations, with an adapter beside it, for `cargo xtask clients`:
//! `styles OUT` fills OUT with one directory per style.
#![allow(clippy::expect_used, reason = "development only: a panic is the report")]

use std::path::Path;

use graft_testkit::{CHAT_STYLES, Tiny, tiny_adapter};

fn main() {
    let out = std::env::args().nth(1).expect("usage: styles OUT");
    for style in CHAT_STYLES {
        let place = Path::new(&out).join(style.name.replace(' ', "-"));
        let model = style.model();
        let tiny = Tiny { layers: 1, vocab: 320, ..Tiny::new(style.family) };
        let adapter = tiny_adapter(model.path(), &tiny, false, 4, 9);
        copy(model.path(), &place.join("model"));
        copy(adapter.path(), &place.join("adapter"));
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a writable folder");
    for entry in std::fs::read_dir(from).expect("a readable folder") {
        let path = entry.expect("an entry").path();
        std::fs::copy(&path, to.join(path.file_name().expect("a name"))).expect("a copy");
    }
}
