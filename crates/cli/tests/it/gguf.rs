//! `graft convert` by its binary: a GGUF file becomes a model directory, and what is wrong is one message, a status, and
//! nothing left behind.

use std::path::Path;
use std::process::{Command, Output};

use graft_testkit::{Dtype, Family, GgufMaker, Tiny, tiny_gguf, tiny_model};

fn graft(dir: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_graft"))
        .args(arguments)
        .current_dir(dir)
        .env("HF_HUB_OFFLINE", "1")
        .env("HF_HOME", dir.join("hub"))
        .output()
        .unwrap()
}

fn tiny() -> Tiny {
    Tiny { packed: Some((4, 32)), dtype: Dtype::F16, ..Tiny::new(Family::Llama) }
}

/// A directory with a sound file, `ok.gguf`, and what can be wrong with one.
fn files() -> tempfile::TempDir {
    let temp = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| std::fs::write(temp.path().join(name), bytes).unwrap();
    for name in ["nothing", "two", "one", "taken"] {
        std::fs::create_dir(temp.path().join(name)).unwrap();
    }
    let maker = tiny_gguf(&tiny());
    let whole = maker.bytes();
    for name in ["ok.gguf", "blob", "two/a.gguf", "two/b.gguf", "one/a.GGUF"] {
        write(name, &whole);
    }
    write("empty.gguf", b"");
    write("text.gguf", b"hello");
    write("short.gguf", &whole[..whole.len() / 2]);
    write("header.gguf", &whole[..100]);
    let changed = |name: &str, change: &dyn Fn(&mut GgufMaker)| {
        let mut maker = maker.clone();
        change(&mut maker);
        write(name, &maker.bytes());
    };
    changed("gemma.gguf", &|m| m.text("general.architecture", "gemma3"));
    changed("lora.gguf", &|m| m.text("general.type", "adapter"));
    changed("part.gguf", &|m| m.u32("split.count", 2));
    changed("pre.gguf", &|m| m.text("tokenizer.ggml.pre", "viking"));
    changed("less.gguf", &|m| m.remove("blk.1.ffn_up.weight"));
    for (name, kind) in [("q4_k.gguf", 12), ("q6_k.gguf", 14)] {
        // Rows of these types have 256 weights.
        let mut maker = tiny_gguf(&Tiny { hidden: 256, heads: 16, ..Tiny::new(Family::Qwen2) });
        maker.remove("blk.0.attn_v.weight");
        maker.tensor("blk.0.attn_v.weight", &[32, 256], kind, &[0; 32 * 210]);
        write(name, &maker.bytes());
    }
    temp
}

#[test]
fn what_is_wrong_is_said_once_and_leaves_nothing() {
    let temp = files();
    let listing = || {
        let all = std::fs::read_dir(temp.path()).unwrap().map(|entry| entry.unwrap().file_name());
        all.collect::<std::collections::BTreeSet<_>>()
    };
    let before = listing();
    for (status, arguments, parts) in [
        (2, "", &["--hf-path", ".gguf"][..]),
        (1, "--hf-path absent.gguf", &["there is no file absent.gguf"]),
        (1, "--hf-path ./absent", &["./absent", "Hugging Face id"]),
        (1, "--hf-path owner/absent", &["owner/absent", "HF_HUB_OFFLINE"]),
        (1, "--hf-path empty.gguf", &["empty.gguf: damaged", "GGUF"]),
        (1, "--hf-path text.gguf", &["text.gguf", "\"hell\"", "GGUF"]),
        (1, "--hf-path short.gguf", &["short.gguf: damaged: tensor"]),
        (1, "--hf-path header.gguf", &["header.gguf: damaged"]),
        (1, "--hf-path gemma.gguf", &["gemma3", "llama, qwen2, qwen3"]),
        (1, "--hf-path lora.gguf", &["general.type", "adapter"]),
        (1, "--hf-path part.gguf", &["split.count", "--merge"]),
        (1, "--hf-path pre.gguf", &["tokenizer.ggml.pre", "viking"]),
        (1, "--hf-path less.gguf", &["less.gguf", "blk.1.ffn_up.weight: missing"]),
        (1, "--hf-path q4_k.gguf", &["blk.0.attn_v.weight", "Q4_K", "Q4_0"]),
        (1, "--hf-path q6_k.gguf", &["blk.0.attn_v.weight", "Q6_K", "Q4_0"]),
        (1, "--hf-path nothing", &["nothing: config.json is missing"]),
        (2, "--hf-path two", &["two holds 2 .gguf files"]),
        (2, "--hf-path ok.gguf --mlx-path taken", &["taken exists already"]),
        (1, "--hf-path ok.gguf --mlx-path blob/out", &["blob exists already", "no directory"]),
        (2, "--hf-path ok.gguf -q -d", &["--quantize and --dequantize"]),
        (2, "--hf-path ok.gguf -q --q-bits 7", &["7 bits"]),
        (2, "--hf-path ok.gguf --dtype int8", &["int8", "float16"]),
    ] {
        let all: Vec<&str> = ["convert"].into_iter().chain(arguments.split_whitespace()).collect();
        let output = graft(temp.path(), &all);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{arguments}: {said}");
        assert!(said.starts_with("error: ") && said.matches("error").count() == 1, "{arguments}: {said}");
        for part in parts {
            assert!(said.contains(part), "{arguments}: {said}");
        }
        assert!(output.stdout.is_empty());
        assert_eq!(listing(), before, "{arguments}");
    }
}

#[test]
fn a_file_becomes_a_directory_that_answers() {
    let temp = files();
    for (source, target) in [("ok.gguf", "a"), ("blob", "b"), ("one", "c")] {
        let output = graft(temp.path(), &["convert", "--hf-path", source, "--mlx-path", target]);
        assert!(output.status.success(), "{source}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(output.stderr.is_empty() && String::from_utf8_lossy(&output.stdout).starts_with(target));
    }
    let plain = tiny_model(&tiny());
    let answer = |model: &str| {
        let flags = ["--max-tokens", "5", "--temp", "0", "--verbose", "false", "--prompt", "hello"];
        let output = graft(temp.path(), &[&["generate", "--model", model][..], &flags].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    };
    let expected = answer(plain.path().to_str().unwrap());
    for target in ["a", "b", "c"] {
        assert_eq!(answer(target), expected);
    }
    let output = graft(temp.path(), &["convert", "--hf-path", "ok.gguf", "--mlx-path", "d", "-q"]);
    assert!(output.status.success() && String::from_utf8_lossy(&output.stderr).contains("packed already"));
}
