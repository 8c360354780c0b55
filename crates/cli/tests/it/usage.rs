//! The command line itself: commands that are not there, and flags that say nothing twice.

use serde_json::Value;

use crate::setting::{Folder, Run};

#[test]
fn commands_of_mlx_lm_that_are_not_here_are_refused_with_ours() {
    let folder = Folder::new();
    for (command, ours) in [
        ("evaluate --model x", "use `graft perplexity`"),
        ("mlx_lm.evaluate", "use `graft perplexity`"),
        ("awq", "use `graft convert -q`"),
        ("cache_prompt", "give `graft generate` the whole prompt"),
        ("manage", "huggingface-cli"),
        ("frobnicate", "unrecognized subcommand 'frobnicate'"),
    ] {
        folder.fails(2, command, &[ours]);
    }
    let help = folder.run("");
    assert_eq!(help.status, Some(2));
    assert!(help.err.contains("Usage: graft") && help.err.contains("fuse"), "{help:?}");
    assert_eq!(folder.ok("--version").out, format!("graft {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn flags_that_change_nothing_are_noted_and_the_last_of_two_counts() {
    let folder = Folder::with_model();
    let flags = "generate --model gone --trust-remote-code --max-tokens 9 --model model --max-tokens 1";
    let run = folder.ok(flags);
    assert!(run.err.contains("note: graft runs no code from a model directory"), "{run:?}");
    assert!(run.out.contains("Generation: 1 tokens"), "{run:?}");
    folder.fails(2, "generate --model model --threads 0", &["--threads must be at least 1"]);
}

#[test]
fn the_environment_chooses_instructions() {
    let folder = Folder::with_model();
    let run = |level: &str| -> Run {
        let words = ["generate", "--model", "model", "--max-tokens", "1"];
        folder.command(&words).env("GRAFT_CPU", level).output().unwrap().into()
    };
    for level in ["portable", "avx2", "avx512", ""] {
        let run = run(level);
        assert_eq!(run.status, Some(0), "{level}: {run:?}");
    }
    let run = run("sse2");
    assert_eq!(run.status, Some(2), "{run:?}");
    assert!(run.err.contains("GRAFT_CPU: expected `avx512`, `avx2` or `portable`, found `sse2`"), "{run:?}");
}

#[test]
fn every_flag_is_listed_for_tools() {
    let flags: Value = serde_json::from_str(&Folder::new().ok("flags").out).unwrap();
    assert_eq!(flags["fuse"]["--policy"], "supported");
    assert_eq!(flags["fuse"]["--upload-repo"], "refused");
    assert_eq!(flags["export gguf"]["--type"], "supported");
    assert_eq!(flags["data show"]["--mask-prompt"], "supported");
    assert_eq!(flags["server"]["--prompt-cache-size"], "noted");
}
