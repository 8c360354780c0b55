//! Tokenizer, streaming, templates and sampling: against transformers and mlx-lm (tests/data/text.py wrote their
//! answers), and against properties that any tokenizer must have.
#![allow(clippy::unwrap_used, reason = "tests: a panic is the report")]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use graft_model::{ChatTemplate, Error, Sampler, Sampling, Tokenizer};
use graft_testkit::{Family, Tiny, tiny_model, tokenizer_json};
use serde_json::{Map, Value, json};

fn data(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn object(value: &Value) -> Map<String, Value> {
    value.as_object().unwrap().clone()
}

fn template(text: &str) -> ChatTemplate {
    ChatTemplate::new(PathBuf::from("t"), &[("default".into(), text.into())], Map::new()).unwrap()
}

#[test]
fn templates_render_as_transformers_renders_them() {
    let golden = data("chat.json");
    for case in golden["cases"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let text = golden["templates"][case["template"].as_str().unwrap()].as_str().unwrap();
        let templates = [("default".to_owned(), text.to_owned())];
        let template = ChatTemplate::new(PathBuf::from("t"), &templates, object(&golden["tokens"])).unwrap();
        let tools = Some(&case["tools"]).filter(|v| !v.is_null());
        let messages = case["messages"].as_array().unwrap();
        let generation = case["add_generation_prompt"].as_bool().unwrap();
        match template.render(messages, tools, generation, &object(&case["extra"])) {
            Ok(text) => assert_eq!(text, case["expected"].as_str().unwrap_or("an error"), "{name}"),
            Err(e) => {
                let expected = case["error"].as_str().unwrap_or_else(|| panic!("{name}: {e}"));
                assert!(e.to_string().contains(expected), "{name}: {e}");
            }
        }
    }
}

#[test]
fn templates_are_found_where_models_have_them() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, value: &str| std::fs::write(dir.path().join(name), value).unwrap();
    let render = |tools: Option<&Value>| {
        let template = ChatTemplate::load(dir.path()).unwrap();
        template.render(&[json!({"role": "user", "content": "x"})], tools, false, &Map::new()).unwrap()
    };
    let missing = ChatTemplate::load(dir.path()).unwrap_err().to_string();
    assert!(missing.contains("there is none") && !ChatTemplate::exists(dir.path()).unwrap(), "{missing}");
    let named = json!([{"name": "default", "template": "D{{ eos_token }}{{ bos_token }}"}, {"name": "tool_use", "template": "T"}]);
    let eos = json!({"content": "</s>", "lstrip": false});
    write(
        "tokenizer_config.json",
        &json!({"chat_template": named, "eos_token": eos, "bos_token": null}).to_string(),
    );
    write("special_tokens_map.json", &json!({"bos_token": "<s>"}).to_string());
    assert_eq!((render(None), render(Some(&json!([])))), ("D</s>".into(), "T".into()));
    write("chat_template.json", &json!({"chat_template": "J"}).to_string());
    assert_eq!(render(None), "J");
    write("chat_template.jinja", "F\n");
    assert_eq!(render(None), "F");
    write("chat_template.jinja", "{% if %}");
    assert!(matches!(ChatTemplate::load(dir.path()), Err(Error::Template { .. })));
}

#[test]
fn dates_are_of_now_and_bad_formats_are_errors() {
    let render = |text: &str| template(text).render(&[], None, false, &Map::new());
    assert_eq!(render("{{ strftime_now('%Y') | length }}").unwrap(), "4");
    assert!(render("{{ strftime_now('%Q%') }}").unwrap_err().to_string().contains("not a date format"));
}

#[test]
fn hostile_templates_end_in_errors() {
    let render = |text: &str| template(text).render(&[], None, false, &Map::new());
    assert!(render("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}").is_err());
    assert!(render("{{ missing.field }}").is_err());
    assert!(render("{{ missing | tojson }}").unwrap_err().to_string().contains("undefined"));
    assert!(render("{% for i in range(100000000000) %}x{% endfor %}").is_err());
    let nested = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}";
    assert!(render(nested).unwrap_err().to_string().contains("fuel"));
    assert!(render("{{ [1]|tojson(indent=99999999999) }}").is_err());
    for print in ["ns.x", "ns.x | string", "ns.x | tojson", "[ns.x] | join"] {
        let after = |n: usize, step: &str| {
            let set = format!(
                "{{% set ns = namespace(x=[]) %}}{{% for i in range({n}) %}}{{% set ns.x = {step} %}}"
            );
            render(&format!("{set}{{% endfor %}}{{{{ {print} }}}}")).unwrap_err().to_string()
        };
        assert!(after(1000, "[ns.x]").contains("nested deeper"), "{print}");
        assert!(after(40, "[ns.x, ns.x]").contains("more than 16 MB"), "{print}");
    }
}

#[test]
fn the_tiny_tokenizer_loads_with_all_its_ends() {
    let dir = tiny_model(&Tiny::new(Family::Llama));
    let t = Tokenizer::load(dir.path()).unwrap();
    let (eot, start, end) = (285, 286, 287);
    assert_eq!(t.vocab_size(), 288);
    assert_eq!(t.eos_ids().iter().copied().collect::<Vec<_>>(), [eot, end]);
    assert_eq!((t.eos_id(), t.bos_id()), (Some(end), None));
    assert_eq!(
        (t.token_to_id("<|im_start|>"), t.id_to_token(start).as_deref()),
        (Some(start), Some("<|im_start|>"))
    );
    assert!(t.decode(&[eot], true).unwrap().is_empty() && !t.decode(&[0], true).unwrap().is_empty());
    let text = "the user<|im_end|>";
    let ids = t.encode(text, false).unwrap();
    assert_eq!(ids.last(), Some(&end));
    assert_eq!(t.decode(&ids, false).unwrap(), text);
    assert_eq!(t.decode(&ids, true).unwrap(), "the user");
}

#[test]
fn a_missing_or_broken_tokenizer_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let error = || Tokenizer::load(dir.path()).unwrap_err().to_string();
    assert!(error().contains("tokenizer.json: missing"), "{}", error());
    std::fs::write(dir.path().join("tokenizer.model"), "x").unwrap();
    assert!(error().contains("tokenizer.model alone cannot be read"), "{}", error());
    std::fs::write(dir.path().join("tokenizer.json"), "{").unwrap();
    assert!(error().contains("not a tokenizer"), "{}", error());
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer_json().to_string()).unwrap();
    std::fs::write(dir.path().join("config.json"), "{\"eos_token_id\": \"x\"}").unwrap();
    assert!(error().contains("config.json") && error().contains("eos_token_id"), "{}", error());
}

fn byte_level() -> Tokenizer {
    Tokenizer::new("t".into(), tokenizer_json().to_string().as_bytes(), &Map::new(), Default::default())
        .unwrap()
}

/// As sentencepiece models are converted: a space is U+2581, one stands before every text, unknown characters are bytes.
fn sentencepiece() -> Tokenizer {
    let mut vocab = Map::new();
    for token in ["<unk>", "<s>", "</s>"] {
        vocab.insert(token.into(), vocab.len().into());
    }
    for byte in 0..256 {
        vocab.insert(format!("<0x{byte:02X}>"), vocab.len().into());
    }
    for token in ["▁", "a", "b", "é", "▁a", "▁ab", "�"] {
        vocab.insert(token.into(), vocab.len().into());
    }
    let special = |id: u32, content: &str| json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab, "merges": ["▁ a", "▁a b"]}
    });
    Tokenizer::new("t".into(), tokenizer.to_string().as_bytes(), &Map::new(), Default::default()).unwrap()
}

/// What a stream returns for `ids`, piece by piece; the last one is what was left.
fn pieces(t: &Tokenizer, ids: &[u32]) -> Vec<String> {
    let mut stream = t.stream();
    let mut all: Vec<String> = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
    all.push(stream.finish().unwrap());
    all
}

#[test]
fn streams_return_whole_characters_and_all_of_them() {
    let texts = [
        "a ab  a b",
        " leading and trailing ",
        "über é 你好, 😀👩‍👩‍👧 ok",
        "😀😀😀",
        "\n\n\t a",
        "",
        "\u{feff}é",
        "a\u{301}",
        "���������� literal � ��",
    ];
    for t in [byte_level(), sentencepiece()] {
        for text in texts {
            let ids = t.encode(text, false).unwrap();
            let pieces = pieces(&t, &ids);
            assert_eq!(pieces.concat(), t.decode(&ids, false).unwrap(), "{pieces:?}");
            assert!(
                text.contains('\u{FFFD}') || !pieces.iter().any(|p| p.contains('\u{FFFD}')),
                "{text}: {pieces:?}"
            );
        }
    }
    let t = sentencepiece();
    let ids = t.encode("a a 你", false).unwrap();
    assert_eq!(pieces(&t, &ids), ["a", " a", " ", "", "", "你", ""]);
}

#[test]
fn special_tokens_are_text_that_breaks_characters() {
    let t = byte_level();
    let ids = t.encode("é", false).unwrap();
    let [a, b] =
        [195_u8, 169].map(|byte| (0..256).find(|id| t.decode(&[*id], false).unwrap().as_bytes() == [byte]));
    assert_eq!((a, b), (None, None), "bytes alone are no text");
    let bytes: Vec<u32> = t.encode("ÿ", false).unwrap();
    assert_eq!(bytes.len(), 2);
    assert_eq!(pieces(&t, &[287, bytes[0], bytes[1], 286])[..4], ["<|im_end|>", "", "ÿ", "<|im_start|>"]);
    let broken = pieces(&t, &[bytes[0], 287, bytes[1], ids[0]]).concat();
    assert_eq!(broken, t.decode(&[bytes[0], 287, bytes[1], ids[0]], false).unwrap());
}

#[test]
fn streams_of_garbage_end_and_take_linear_time() {
    for t in [byte_level(), sentencepiece()] {
        let first = t.token_to_id("<0x80>").unwrap_or_else(|| t.token_to_id("Ä").unwrap());
        let start = Instant::now();
        // One continuation byte for ever, one lead byte for ever, pseudo-random ids.
        let mut x = 1_u32;
        let mut random = || {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (x >> 8) % t.vocab_size() as u32
        };
        let noise: Vec<u32> = (0..20_000).map(|_| random()).collect();
        for ids in [vec![first; 20_000], vec![first + 0x42; 20_000], vec![2; 20_000], noise] {
            let pieces = pieces(&t, &ids);
            let longest = pieces.iter().map(String::len).max().unwrap();
            assert!(longest < 400, "text must not pile up: {longest}");
            if t.token_to_id("<0x80>").is_none() && ids[1] != ids[2] {
                assert_eq!(pieces.concat(), t.decode(&ids, false).unwrap());
            }
        }
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    }
}

fn number(map: &Value, key: &str) -> Option<f32> {
    map.get(key).and_then(Value::as_f64).map(|v| v as f32)
}

#[test]
fn sampling_keeps_what_mlx_lm_keeps() {
    for (i, case) in data("sample.json").as_array().unwrap().iter().enumerate() {
        let (p, f) = (&case["penalties"], &case["filters"]);
        let mut s = Sampling::greedy();
        // So hot that every token that is not filtered turns up.
        (s.temperature, s.seed) = (1000.0, Some(i as u64));
        s.repetition_penalty = number(p, "repetition_penalty").unwrap_or(0.0);
        s.repetition_context = number(p, "repetition_context_size").unwrap_or(20.0) as usize;
        s.presence_penalty = number(p, "presence_penalty").unwrap_or(0.0);
        s.frequency_penalty = number(p, "frequency_penalty").unwrap_or(0.0);
        s.frequency_context = number(p, "frequency_context_size").unwrap_or(20.0) as usize;
        s.logit_bias = serde_json::from_value(p.get("logit_bias").cloned().unwrap_or(json!([]))).unwrap();
        s.top_p = number(f, "top_p").unwrap_or(0.0);
        s.min_p = number(f, "min_p").unwrap_or(0.0);
        s.min_tokens_to_keep = number(f, "min_tokens_to_keep").unwrap_or(1.0) as usize;
        s.top_k = number(f, "top_k").unwrap_or(0.0) as usize;
        s.xtc_probability = number(f, "xtc_probability").unwrap_or(0.0);
        s.xtc_threshold = number(f, "xtc_threshold").unwrap_or(0.0);
        s.xtc_special_tokens =
            serde_json::from_value(f.get("xtc_special_tokens").cloned().unwrap_or(json!([]))).unwrap();
        let list = |key: &str| serde_json::from_value::<Vec<f32>>(case[key].clone()).unwrap();
        let history: Vec<u32> = list("history").iter().map(|id| *id as u32).collect();
        let (logits, expected) = (list("logits"), list("logprobs"));
        let mut sampler = Sampler::new(&s).unwrap();
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..2000 {
            let (id, logprob) = sampler.sample(&logits, &history).unwrap();
            assert!(
                (logprob - expected[id as usize]).abs() < 1e-5,
                "case {i}: {logprob} {}",
                expected[id as usize]
            );
            seen.insert(id);
        }
        // A token that the bias made impossible is not filtered but never drawn either.
        let kept: Vec<f32> = serde_json::from_value(case["kept"].clone()).unwrap();
        let kept: std::collections::BTreeSet<u32> = kept.iter().map(|id| *id as u32).collect();
        assert_eq!(seen, kept, "case {i}: {p} {f}");
        s.temperature = 0.0;
        let best = (0..24).rev().max_by(|a: &usize, b| expected[*a].total_cmp(&expected[*b])).unwrap();
        assert_eq!(Sampler::new(&s).unwrap().sample(&logits, &history).unwrap().0, best as u32, "case {i}");
    }
}

#[test]
fn samples_have_the_distribution_of_the_temperature_and_repeat_with_their_seed() {
    let logits: Vec<f32> = (0..8).map(|i| (i as f32 * 0.9).sin() * 2.0).collect();
    let s = Sampling { temperature: 0.7, seed: Some(3), logprobs: Some(3), ..Sampling::greedy() };
    let draw = |n: usize| {
        let mut sampler = Sampler::new(&s).unwrap();
        (0..n).map(|_| sampler.sample(&logits, &[]).unwrap().0).collect::<Vec<_>>()
    };
    let (n, ids) = (40_000, draw(40_000));
    assert_eq!(ids[..50], draw(50));
    let weights: Vec<f64> = logits.iter().map(|l| (f64::from(*l) / 0.7).exp()).collect();
    for id in 0..8 {
        let p = weights[id] / weights.iter().sum::<f64>();
        let found = ids.iter().filter(|x| **x == id as u32).count() as f64 / n as f64;
        assert!((found - p).abs() < 4.0 * (p * (1.0 - p) / n as f64).sqrt(), "{id}: {found} {p}");
    }
    let mut sampler = Sampler::new(&s).unwrap();
    let (id, logprob) = sampler.sample(&logits, &[]).unwrap();
    let best = sampler.alternatives();
    assert!(best.len() == 3 && best[0].1 >= best[1].1 && best[1].1 >= best[2].1);
    let total: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
    assert!((f64::from(logprob) - (f64::from(logits[id as usize]) - total.ln())).abs() < 1e-6);
}

#[test]
fn odd_logits_and_settings_are_answered() {
    let greedy = Sampling::greedy();
    assert!(greedy.is_plain_greedy() && !Sampling { logprobs: Some(0), ..greedy.clone() }.is_plain_greedy());
    let hot = Sampling { temperature: 1.0, top_k: 1000, top_p: 1.0, seed: Some(0), ..greedy.clone() };
    let sample = |s: &Sampling, logits: &[f32]| Sampler::new(s)?.sample(logits, &[0, 900]);
    let none = f32::NEG_INFINITY;
    assert_eq!(sample(&hot, &[none, 0.5, none]).unwrap(), (1, 0.0));
    assert_eq!(sample(&greedy, &[1.0, 3.0, 3.0]).unwrap().0, 1);
    let long: Vec<f32> = (0..100).map(|i| if i % 50 == 37 { 9.0 } else { i as f32 / 100.0 }).collect();
    assert_eq!(Sampler::best(&long).unwrap(), sample(&greedy, &long).unwrap().0);
    let forbid = Sampling { logit_bias: vec![(1, none)], repetition_penalty: 2.0, ..hot.clone() };
    assert_eq!(sample(&forbid, &[none, 0.5, 0.1]).unwrap().0, 2);
    for bad in [&[0.0, f32::NAN][..], &[f32::INFINITY, 0.0], &[none, none], &[]] {
        assert!(sample(&hot, bad).is_err() && sample(&greedy, bad).is_err(), "{bad:?}");
        assert!(Sampler::best(bad).is_err(), "{bad:?}");
    }
    let outside = Sampling { logit_bias: vec![(3, 1.0)], ..greedy.clone() };
    assert!(
        sample(&outside, &[0.0; 3])
            .unwrap_err()
            .to_string()
            .contains("`logit_bias`: expected ids below 3, found 3")
    );
    for (field, s) in [
        ("temperature", Sampling { temperature: -1.0, ..greedy.clone() }),
        ("temperature", Sampling { temperature: f32::NAN, ..greedy.clone() }),
        ("top_p", Sampling { top_p: 1.5, ..greedy.clone() }),
        ("min_p", Sampling { min_p: -0.1, ..greedy.clone() }),
        ("min_tokens_to_keep", Sampling { min_tokens_to_keep: 0, ..greedy.clone() }),
        ("xtc_threshold", Sampling { xtc_threshold: 0.6, ..greedy.clone() }),
        ("xtc_probability", Sampling { xtc_probability: 2.0, ..greedy.clone() }),
        ("repetition_penalty", Sampling { repetition_penalty: -1.0, ..greedy.clone() }),
        ("presence_penalty", Sampling { presence_penalty: f32::INFINITY, ..greedy.clone() }),
        ("frequency_penalty", Sampling { frequency_penalty: f32::NAN, ..greedy.clone() }),
        ("logit_bias", Sampling { logit_bias: vec![(0, f32::NAN)], ..greedy.clone() }),
    ] {
        assert!(s.check().unwrap_err().to_string().starts_with(&format!("`{field}`")), "{field}");
    }
}
