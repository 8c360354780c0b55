//! Writes the tiny models and adapters for which golden values are made: `tiny OUT` fills OUT with one directory per case.
#![allow(clippy::expect_used, reason = "development only: a panic is the report")]

use std::path::Path;

use graft_testkit::{Family, Tiny, tiny_adapter, tiny_model};

fn main() {
    let out = std::env::args().nth(1).expect("usage: tiny OUT");
    let out = Path::new(&out);
    for family in Family::ALL {
        // mlx-lm cannot run DoRA on 3, 5 and 6 bits.
        let affine = [(0, true), (0, false), (4, true), (8, false)].map(|(bits, tied)| {
            let tiny = Tiny { packed: (bits > 0).then_some((bits, 32)), tied, ..Tiny::new(family) };
            (bits.to_string(), tiny)
        });
        let modes = ["mxfp4", "nvfp4", "mxfp8"].into_iter().filter(|_| family == Family::Llama);
        let floats = modes.map(|mode| (mode.to_owned(), Tiny::new(family).in_mode(mode)));
        for (name, tiny) in affine.into_iter().chain(floats) {
            let (tied, bits) = (tiny.tied, tiny.packed.map_or(0, |(bits, _)| bits));
            for adapter in ["none", "lora", "dora"] {
                let case = out.join(format!("{}-{name}-{tied}-{adapter}", family.name()));
                let model = tiny_model(&tiny);
                copy(model.path(), &case.join("model"));
                if adapter != "none" {
                    copy(
                        tiny_adapter(model.path(), &tiny, adapter == "dora", 4, 9).path(),
                        &case.join("adapter"),
                    );
                }
                let facts = format!(
                    "{{\"family\": \"{}\", \"bits\": {bits}, \"mode\": \"{}\", \"tied\": {tied}, \"adapter\": \"{adapter}\"}}",
                    family.name(),
                    tiny.mode
                );
                std::fs::write(case.join("case.json"), facts).expect("a writable folder");
            }
        }
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a writable folder");
    for entry in std::fs::read_dir(from).expect("a readable folder") {
        let path = entry.expect("an entry").path();
        std::fs::copy(&path, to.join(path.file_name().expect("a name"))).expect("a copy");
    }
}
