//! `graft generate`: the lines it prints and what it refuses.

use std::io::Write as _;
use std::process::Stdio;

use crate::setting::{Folder, Run};

#[test]
fn the_lines_are_mlx_lms() {
    let folder = Folder::with_model();
    let run = folder.ok("generate --model model --prompt hello --max-tokens 6");
    let lines: Vec<&str> = run.out.lines().collect();
    let rule = "==========";
    assert_eq!((lines[0], lines[lines.len() - 4]), (rule, rule), "{run:?}");
    let text = lines[1..lines.len() - 4].join("\n");
    let speed = |line: &str, start: &str| {
        let rest = line.strip_prefix(start).unwrap_or_else(|| panic!("{line:?}"));
        let (tokens, rest) = rest.split_once(" tokens, ").unwrap();
        let speed = rest.strip_suffix(" tokens-per-sec").unwrap_or_else(|| panic!("{line:?}"));
        assert!(
            speed.parse::<f64>().unwrap() > 0.0 && speed.split_once('.').unwrap().1.len() == 3,
            "{line:?}"
        );
        tokens.parse::<usize>().unwrap()
    };
    let [.., prompt, generation, peak] = lines[..] else { panic!("{run:?}") };
    assert!(speed(prompt, "Prompt: ") > 5);
    assert_eq!(speed(generation, "Generation: "), 6);
    let peak = peak.strip_prefix("Peak memory: ").and_then(|rest| rest.strip_suffix(" GB")).unwrap();
    assert!(peak.parse::<f64>().unwrap() > 0.001);

    // Only the text, and nothing on stderr.
    let quiet = folder.ok("generate --model model --prompt hello --max-tokens 6 --verbose false");
    assert_eq!((quiet.out, quiet.err), (format!("{text}\n"), String::new()));
    let again = folder.ok("generate --model model -p hello -m 6 --verbose F --temp 0.8 --seed 3").out;
    assert_eq!(folder.ok("generate --model model -p hello -m 6 --verbose F --temp 0.8 --seed 3").out, again);
    let none = folder.ok("generate --model model --max-tokens 0");
    assert!(none.out.contains("No text generated for this prompt"), "{none:?}");
}

#[test]
fn a_prompt_of_minus_is_read_from_stdin() {
    let folder = Folder::with_model();
    let mut command = folder.command(&["generate", "--model", "model", "-p", "-", "--verbose", "false"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"hello").unwrap();
    let run: Run = child.wait_with_output().unwrap().into();
    assert_eq!(run.out, folder.ok("generate --model model -p hello --verbose false").out);
}

/// A template that prints contents as they are, or trimmed.
fn with_template(folder: &Folder, content: &str) {
    let text = format!(
        "{{% for m in messages %}}[{{{{ m['role'] }}}}]{{{{ {content} }}}}[end]{{% endfor %}}{{% if \
         add_generation_prompt %}}[assistant]{{% endif %}}"
    );
    folder.write("model/chat_template.jinja", &text);
}

#[test]
fn a_prefilled_answer_goes_on_where_it_ends() {
    let folder = Folder::with_model();
    // How many tokens a prompt has is all that is shown of it, so it is compared with one that is written out.
    let tokens = |arguments: &[&str]| {
        let base = ["generate", "--model", "model", "--max-tokens", "2"];
        let run: Run = folder.command(&[&base[..], arguments].concat()).output().unwrap().into();
        assert_eq!(run.status, Some(0), "{run:?}");
        run.out.replace(|c: char| c == '.' || c.is_ascii_digit(), "")
            + run.out.split("Prompt: ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap()
    };
    let plain = |text: &str| tokens(&["--ignore-chat-template", "-p", text]);
    // The prompt holds the beginning of the answer too, so a search from the front or for the text alone goes wrong.
    for (content, prefill, expected) in [
        ("m['content']", "end ", "[user]end end[end][assistant]end "),
        ("m['content']", "", "[user]end end[end][assistant]"),
        ("m['content']", "- a", "[user]end end[end][assistant]- a"),
        ("m['content'] | trim", "end ", "[user]end end[end][assistant]end"),
    ] {
        with_template(&folder, content);
        assert_eq!(
            tokens(&["-p", "end end", "--prefill-response", prefill]),
            plain(expected),
            "{expected:?}"
        );
    }
    with_template(&folder, "'nothing'");
    folder.fails(1, "generate --model model --prefill-response x", &["does not print --prefill-response"]);
}

#[test]
fn numbers_mean_what_they_do_in_mlx_lm() {
    let folder = Folder::with_model();
    // Token 285 ends an answer; as every id is one here, the first token does.
    let ids: Vec<String> = (0..288).map(|id| id.to_string()).collect();
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    let command =
        ["generate", "--model", "model", "--max-tokens", "-1", "-p", "- hello", "--extra-eos-token"];
    let run: Run = folder.command(&[&command[..], &ids].concat()).output().unwrap().into();
    assert!(run.status == Some(0) && run.out.contains("No text generated"), "{run:?}");
    let more =
        ["generate", "--model", "model", "-m", "1", "--system-prompt", "- be brief", "--prompt", "-- x"];
    let run: Run = folder.command(&more).output().unwrap().into();
    assert_eq!(run.status, Some(0), "{run:?}");
}

#[test]
fn what_it_cannot_do_is_said_before_anything_is_printed() {
    let folder = Folder::with_model();
    for (status, flags, part) in [
        (1, "--model gone", "there is no model directory `gone`; give a directory or a Hugging Face id"),
        (1, "--model owner/name", "HF_HUB_OFFLINE is set"),
        (1, "--model model/config.json", "is a file; a model directory was expected"),
        (1, "--model model --adapter-path gone", "there is no adapter directory `gone`"),
        (1, "--model model --adapter-path model", "adapter_config.json is missing"),
        (1, "--model model --extra-eos-token nix", "the vocabulary of model has no such token"),
        (1, "--model model --ignore-chat-template -p ''", "the prompt has no tokens"),
        (2, "--model model --temp -1", "`temperature`: expected a number of at least 0, found -1"),
        (2, "--model model --top-p 2", "`top_p`"),
        (2, "--model model --chat-template-config {", "--chat-template-config must be a JSON object"),
        (2, "--model model --draft-model x", "--draft-model is not supported by graft generate"),
        (2, "--model model --kv-bits 4", "--kv-bits is not supported by graft generate"),
        (2, "--model model --max-tokens many", "invalid value 'many' for '--max-tokens"),
    ] {
        folder.fails(status, &format!("generate {flags}"), &[part]);
    }
    std::fs::remove_file(folder.path("model/tokenizer.json")).unwrap();
    folder.fails(1, "generate --model model", &["model/tokenizer.json: missing; a model directory needs it"]);
}

#[test]
fn a_file_that_lies_about_its_contents_is_named() {
    let folder = Folder::with_model();
    let file = "model/model.safetensors";
    let bytes = folder.read(file);
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = String::from_utf8(bytes[8..8 + length].to_vec()).unwrap();
    let with = |header: &[u8], length: u64| {
        let rest = &bytes[8 + header.len().min(bytes.len() - 8)..];
        std::fs::write(folder.path(file), [&length.to_le_bytes()[..], header, rest].concat()).unwrap();
        folder.fails(
            1,
            "generate --model model",
            &["model/model.safetensors: damaged", "get the file again"],
        );
    };
    // Shapes that the bytes do not fill, offsets beyond the end, no JSON, a header longer than the file.
    let shape = header.replacen("\"shape\":[64,", "\"shape\":[99,", 1);
    assert_ne!(shape, header);
    with(shape.as_bytes(), length as u64);
    with(header.replacen("data_offsets\":[", "data_offsets\":[9", 1).as_bytes(), length as u64 + 1);
    with(&vec![b'x'; length], length as u64);
    with(header.as_bytes(), u64::MAX);
    with(header.as_bytes(), 1 << 40);
    std::fs::write(folder.path(file), b"tiny").unwrap();
    folder.fails(1, "generate --model model", &["model/model.safetensors: damaged"]);
}
