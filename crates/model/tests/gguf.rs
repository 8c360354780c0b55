//! GGUF files of every architecture against the same weights in a plain checkpoint; tokenizers of every kind; and files
//! that are damaged, contradict themselves, or are none of ours.
#![allow(clippy::unwrap_used, reason = "tests: a panic is the report")]

use std::path::{Path, PathBuf};

use graft_adapters::Route;
use graft_model::{ChatTemplate, GgufImport, Model, RopeScaling, Tokenizer, config_from_map};
use graft_ops::{Array, Rows};
use graft_quant::convert::{ConvertOptions, GgufParts, Report, convert_gguf, dtype_from_name};
use graft_quant::gguf::Gguf;
use graft_testkit::tolerance::{EXACT, F32_DEEP};
use graft_testkit::{
    Dtype, Family, GgufMaker, Tiny, assert_close, mlx, tiny_gguf, tiny_model, wanted, wanted_form_is_mlx,
};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

/// What a conversion left behind.
struct Converted {
    temp: TempDir,
    result: Result<Report, String>,
}

impl Converted {
    fn dir(&self) -> PathBuf {
        self.temp.path().join("out")
    }

    fn json(&self, name: &str) -> Value {
        json_of(&self.dir(), name)
    }

    /// The directory of a conversion that worked.
    #[track_caller]
    fn done(self) -> Self {
        if let Err(error) = &self.result {
            panic!("{error}");
        }
        self
    }

    /// The message of one that did not, which left nothing.
    #[track_caller]
    fn error(self) -> String {
        let left: Vec<_> =
            std::fs::read_dir(self.temp.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["m.gguf"]);
        self.result.unwrap_err()
    }
}

/// As `graft convert` does it.
fn convert_bytes(bytes: &[u8], dtype: Option<&str>) -> Converted {
    let temp = tempfile::tempdir().unwrap();
    let file = temp.path().join("m.gguf");
    std::fs::write(&file, bytes).unwrap();
    let options = ConvertOptions { pack: None, dequantize: false, dtype: dtype.and_then(dtype_from_name) };
    let out = temp.path().join("out");
    let run = || -> graft_model::Result<Report> {
        let gguf = Gguf::open(&file)?;
        let GgufImport { config, files, names } = GgufImport::new(&gguf)?;
        let parts = GgufParts { config, files, names: &|tensor| names.get(tensor).cloned() };
        Ok(convert_gguf(&gguf, &parts, &out, &options, &false.into(), &mut |_| {})?)
    };
    let result = mlx(run).map_err(|error| error.to_string());
    Converted { temp, result }
}

fn convert(maker: &GgufMaker) -> Converted {
    convert_bytes(&maker.bytes(), None)
}

fn json_of(dir: &Path, name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(dir.join(name)).unwrap()).unwrap()
}

fn logits(dir: &Path) -> Array {
    let model = Model::load(dir, graft_ops::Dtype::Float32).unwrap();
    let ids: Vec<i32> = (0..23).map(|i| (i * 37 + i * i * 7) % 288).collect();
    let h = model.hidden(&Array::from_slice(&ids, &[23]), &Rows::new(vec![23]), None, &Route::Base).unwrap();
    model.logits(&h, &Route::Base).unwrap()
}

fn decoder(dir: &Path) -> graft_model::DecoderConfig {
    let map = json_of(dir, "config.json").as_object().unwrap().clone();
    config_from_map(&dir.join("config.json"), &map).unwrap()
}

#[test]
fn every_architecture_computes_what_its_checkpoint_computes() {
    for family in Family::ALL {
        let packed = Tiny { packed: Some((4, 32)), dtype: Dtype::F16, ..Tiny::new(family) };
        for tiny in [
            Tiny::new(family),
            Tiny { tied: false, head_dim: 8, kv_heads: 4, ..Tiny::new(family) },
            Tiny { tied: false, ..packed.clone() },
            packed,
        ] {
            let plain = tiny_model(&tiny);
            let dtype = if tiny.dtype == Dtype::F32 { "float32" } else { "float16" };
            let converted = convert_bytes(&tiny_gguf(&tiny).bytes(), Some(dtype)).done();
            let (ours, theirs) = (decoder(&converted.dir()), decoder(plain.path()));
            // A Mistral is a Llama to llama.cpp.
            let model_type =
                if family == Family::Mistral { "llama".into() } else { theirs.model_type.clone() };
            assert_eq!(ours, graft_model::DecoderConfig { model_type, ..theirs });
            mlx(|| {
                if wanted_form_is_mlx() {
                    graft_ops::set_form(graft_ops::Form::Mlx);
                }
                if let Some(level) = wanted("GRAFT_CPU") {
                    graft_ops::set_cpu_level(level);
                }
                assert_close(&logits(&converted.dir()), &logits(plain.path()), EXACT);
            });
        }
    }
}

#[test]
fn the_directory_says_what_others_read() {
    let converted =
        convert(&tiny_gguf(&Tiny { packed: Some((4, 32)), dtype: Dtype::F16, ..Tiny::new(Family::Qwen3) }))
            .done();
    let config = converted.json("config.json");
    for (field, value) in [
        ("architectures", json!(["Qwen3ForCausalLM"])),
        ("model_type", json!("qwen3")),
        ("hidden_act", json!("silu")),
        ("rms_norm_eps", json!(1e-5)),
        ("rope_theta", json!(10_000.0)),
        ("head_dim", json!(16)),
        ("tie_word_embeddings", json!(true)),
        ("eos_token_id", json!(287)),
        ("torch_dtype", json!("float16")),
        ("quantization", json!({"group_size": 32, "bits": 4, "mode": "affine"})),
    ] {
        assert_eq!(config[field], value, "{field}");
    }
    assert!(config.get("rope_scaling").is_none() && config.get("bos_token_id").is_none());
    assert_eq!(converted.json("generation_config.json"), json!({"eos_token_id": 287, "pad_token_id": 285}));
    let tokenizer = converted.json("tokenizer_config.json");
    assert_eq!(tokenizer["eos_token"], "<|im_end|>");
    assert_eq!(tokenizer["pad_token"], "<|endoftext|>");
    assert_eq!(tokenizer["bos_token"], Value::Null);
    assert_eq!(tokenizer["chat_template"], graft_testkit::CHAT_TEMPLATE);
}

#[test]
fn biases_of_every_linear_come_along() {
    let tiny = Tiny {
        extra: json!({"attention_bias": true, "mlp_bias": true}).as_object().unwrap().clone(),
        ..Tiny::new(Family::Llama)
    };
    let mut maker = tiny_gguf(&tiny);
    let floats = |n: usize| (0..n).flat_map(|i| (i as f32 * 0.01).to_le_bytes()).collect::<Vec<u8>>();
    for layer in 0..2 {
        for (name, n) in [("attn_q", 64), ("attn_k", 32), ("attn_v", 32), ("attn_output", 64)] {
            maker.tensor(&format!("blk.{layer}.{name}.bias"), &[n], 0, &floats(n as usize));
        }
    }
    let without_mlp = convert(&maker).done();
    assert_eq!(without_mlp.json("config.json")["mlp_bias"], false);
    for layer in 0..2 {
        for (name, n) in [("ffn_gate", 128), ("ffn_up", 128), ("ffn_down", 64)] {
            maker.tensor(&format!("blk.{layer}.{name}.bias"), &[n], 0, &floats(n as usize));
        }
    }
    let all = convert_bytes(&maker.bytes(), Some("float32")).done();
    let checkpoint = graft_quant::Checkpoint::open(&all.dir()).unwrap();
    let bias = |name: &str| {
        let tensor = checkpoint.read(&format!("model.layers.1.{name}.bias")).unwrap();
        tensor.to_f32().unwrap().iter().map(|x| (x * 100.0).round() as i32).collect::<Vec<_>>()
    };
    // Heads of 16: even rows of the file are the first half, odd ones the second.
    let head = |first: i32| (0..16).map(move |i| first + if i < 8 { 2 * i } else { 2 * i - 15 });
    assert_eq!(bias("self_attn.k_proj"), (0..2).flat_map(|h| head(16 * h)).collect::<Vec<_>>());
    assert_eq!(bias("self_attn.q_proj"), (0..4).flat_map(|h| head(16 * h)).collect::<Vec<_>>());
    assert_eq!(bias("self_attn.v_proj"), (0..32).collect::<Vec<_>>());
    assert_eq!(bias("mlp.down_proj"), (0..64).collect::<Vec<_>>());
    mlx(|| Model::load(&all.dir(), graft_ops::Dtype::Float32).unwrap());
}

/// Llama 3's formula, in the form in which llama.cpp's converter applies it.
fn llama3_factors(theta: f64, head_dim: usize, factor: f64, original: f64) -> Vec<f32> {
    let one = |i: usize| {
        let wave = std::f64::consts::TAU * theta.powf(2.0 * i as f64 / head_dim as f64);
        if wave < original / 4.0 {
            1.0
        } else if wave > original {
            factor
        } else {
            let smooth = (original / wave - 1.0) / 3.0;
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    };
    (0..head_dim / 2).map(|i| one(i) as f32).collect()
}

fn with_factors(tiny: &Tiny, factors: &[f32]) -> GgufMaker {
    let mut maker = tiny_gguf(tiny);
    let bytes: Vec<u8> = factors.iter().flat_map(|x| x.to_le_bytes()).collect();
    maker.tensor("rope_freqs.weight", &[factors.len() as u64], 0, &bytes);
    maker
}

#[test]
fn scalings_of_positions_become_their_formulas() {
    let llama = |rope_theta: f32| Tiny { rope_theta, head_dim: 64, ..Tiny::new(Family::Llama) };
    for (theta, factor, original) in
        [(500_000.0, 8.0, 8192.0), (500_000.0, 32.0, 8192.0), (10_000.0, 4.0, 4096.0)]
    {
        let tiny = Tiny {
            extra: json!({"rope_scaling": {
                "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }})
            .as_object()
            .unwrap()
            .clone(),
            ..llama(theta)
        };
        let mut maker =
            with_factors(&tiny, &llama3_factors(theta.into(), 64, factor.into(), original.into()));
        if original != 8192.0 {
            maker.u32("llama.rope.scaling.original_context_length", original as u32);
        }
        let converted = convert_bytes(&maker.bytes(), Some("float32")).done();
        assert_eq!(
            decoder(&converted.dir()).rope.scaling,
            RopeScaling::Llama3 { factor, low: 1.0, high: 4.0, original }
        );
        let plain = tiny_model(&tiny);
        mlx(|| assert_close(&logits(&converted.dir()), &logits(plain.path()), F32_DEEP));
    }

    let ones = convert(&with_factors(&llama(10_000.0), &[1.0; 32])).done();
    assert_eq!(decoder(&ones.dir()).rope.scaling, RopeScaling::Default);
    for (key, factor) in [("qwen2.rope.scaling.factor", 4.0), ("qwen2.rope.scale_linear", 2.5)] {
        let mut maker = tiny_gguf(&Tiny::new(Family::Qwen2));
        maker.text("qwen2.rope.scaling.type", "linear");
        maker.f32(key, factor);
        let converted = convert(&maker).done();
        assert_eq!(decoder(&converted.dir()).rope.scaling, RopeScaling::Linear { factor });
        maker.text("qwen2.rope.scaling.type", "none");
        assert_eq!(decoder(&convert(&maker).done().dir()).rope.scaling, RopeScaling::Default);
    }

    let mut factors = llama3_factors(500_000.0, 64, 8.0, 8192.0);
    factors[20] *= 1.01;
    let error = convert(&with_factors(&llama(500_000.0), &factors)).error();
    assert!(error.contains("rope_freqs.weight") && error.contains("Llama 3's formula"), "{error}");
    let mut both = with_factors(&llama(500_000.0), &llama3_factors(500_000.0, 64, 8.0, 8192.0));
    both.f32("llama.rope.scaling.factor", 2.0);
    assert!(convert(&both).error().contains("linear factor as well"));
}

/// The tiny Llama with another tokenizer: as many tokens as the embedding has rows, the given ones first.
fn with_tokens(model: &str, tokens: &[(&str, i32)]) -> GgufMaker {
    let mut maker = tiny_gguf(&Tiny::new(Family::Llama));
    for key in ["tokenizer.ggml.merges", "tokenizer.ggml.padding_token_id", "tokenizer.chat_template"] {
        maker.remove(key);
    }
    let fill: Vec<String> = (tokens.len()..288).map(|id| format!("[PAD{id}]")).collect();
    let texts: Vec<&str> = tokens.iter().map(|t| t.0).chain(fill.iter().map(String::as_str)).collect();
    let kinds: Vec<i32> = tokens.iter().map(|t| t.1).chain(fill.iter().map(|_| 5)).collect();
    maker.text("tokenizer.ggml.model", model);
    maker.texts("tokenizer.ggml.tokens", &texts);
    maker.i32s("tokenizer.ggml.token_type", &kinds);
    maker.u32("tokenizer.ggml.eos_token_id", 1);
    maker
}

fn tokenizer(maker: &GgufMaker) -> Tokenizer {
    Tokenizer::load(&convert(maker).done().dir()).unwrap()
}

#[test]
fn a_byte_level_tokenizer_is_the_one_it_was_made_from() {
    let plain = tiny_model(&Tiny::new(Family::Llama));
    let theirs = Tokenizer::load(plain.path()).unwrap();
    let mut maker = tiny_gguf(&Tiny::new(Family::Llama));
    let converted = convert(&maker).done();
    let ours = Tokenizer::load(&converted.dir()).unwrap();
    for text in [
        "hello the user",
        " über 😀\n\t",
        "<|im_start|>user\nhi<|im_end|>\n",
        "it's 2024, isn't it?  3.14",
        "",
        "the<|endoftext|>the",
    ] {
        let ids = ours.encode(text, true).unwrap();
        assert_eq!(ids, theirs.encode(text, true).unwrap(), "{text}");
        assert_eq!(ours.decode(&ids, false).unwrap(), text);
        assert_eq!(ours.decode(&ids, true).unwrap(), theirs.decode(&ids, true).unwrap());
    }
    assert_eq!((ours.vocab_size(), ours.eos_id(), ours.bos_id()), (288, Some(287), None));
    // The end of a turn is an end, whatever the end of a text is.
    maker.u32("tokenizer.ggml.eos_token_id", 285);
    assert_eq!(tokenizer(&maker).eos_ids().iter().copied().collect::<Vec<_>>(), [285, 287]);
    maker.u32("tokenizer.ggml.eot_token_id", 286);
    assert_eq!(tokenizer(&maker).eos_ids().iter().copied().collect::<Vec<_>>(), [285, 286]);

    maker.texts("tokenizer.chat_templates", &["tool_use"]);
    maker.text("tokenizer.chat_template.tool_use", "T");
    let converted = convert(&maker).done();
    let template = ChatTemplate::load(&converted.dir()).unwrap();
    let user = [json!({"role": "user", "content": "x"})];
    let render = |tools: Option<&Value>| template.render(&user, tools, false, &Map::new()).unwrap();
    assert_eq!(render(None), "<|im_start|>user\nx<|im_end|>\n");
    assert_eq!(render(Some(&json!([]))), "T");
}

/// Ids 0..10 are the digits, 10 and 11 special, then pieces of several characters with their merges.
fn digits() -> (Vec<(&'static str, i32)>, Vec<&'static str>) {
    let mut tokens: Vec<(&str, i32)> =
        ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"].map(|t| (t, 1)).into();
    tokens.extend([("<b>", 3), ("<e>", 3)]);
    tokens.extend(
        ["Ġ", "a", "b", "ab", "Ġa", "12", "123", "1234", "B", "aB", "Ã", "©", "Ã©", "e", "Ì", "ģ"]
            .map(|t| (t, 1)),
    );
    tokens.push(("<user> ", 4));
    (tokens, vec!["a b", "Ġ a", "1 2", "12 3", "123 4", "a B", "Ã ©", "Ì ģ"])
}

#[test]
fn text_is_split_as_the_file_names_it() {
    let (mut tokens, merges) = digits();
    tokens.extend([("Ìģ", 1), ("abab", 1)]);
    let id = |token: &str| tokens.iter().position(|t| t.0 == token).unwrap() as u32;
    let ids = |all: &[&str]| all.iter().map(|t| id(t)).collect::<Vec<u32>>();
    let make = |pre: &str| {
        let mut maker = with_tokens("gpt2", &tokens);
        maker.text("tokenizer.ggml.pre", pre);
        maker.texts("tokenizer.ggml.merges", &merges);
        maker.u32("tokenizer.ggml.bos_token_id", 10);
        tokenizer(&maker)
    };
    let one_by_one = ids(&["1", "2", "3", "4", "5"]);
    for (pre, digits, whole, composed, cased) in [
        ("gpt-2", ids(&["1234", "5"]), false, false, ids(&["aB"])),
        ("default", ids(&["1234", "5"]), false, false, ids(&["aB"])),
        ("smollm", one_by_one.clone(), false, false, ids(&["aB"])),
        ("refact", one_by_one.clone(), false, false, ids(&["aB"])),
        ("llama-bpe", ids(&["123", "4", "5"]), true, false, ids(&["aB"])),
        ("llama3", ids(&["123", "4", "5"]), true, false, ids(&["aB"])),
        ("tekken", one_by_one.clone(), true, false, ids(&["a", "B"])),
        ("qwen2", one_by_one.clone(), false, true, ids(&["aB"])),
    ] {
        let t = make(pre);
        let encode = |text: &str| t.encode(text, false).unwrap();
        assert_eq!(encode("12345"), digits, "{pre}");
        assert_eq!(encode("ab a"), ids(&["ab", "Ġa"]), "{pre}");
        // No merge makes it: only a piece that is taken whole is this token.
        assert_eq!(encode("abab"), if whole { ids(&["abab"]) } else { ids(&["ab", "ab"]) }, "{pre}");
        assert_eq!(encode("e\u{301}"), if composed { ids(&["Ã©"]) } else { ids(&["e", "Ìģ"]) }, "{pre}");
        assert_eq!(encode("aB"), cased, "{pre}");
        assert_eq!(encode("<e>a<user> a"), ids(&["<e>", "a", "<user> ", "a"]), "{pre}");
        let plain = |token: &str| t.decode(&[id(token)], true).unwrap();
        assert!(plain("<e>").is_empty() && !plain("<user> ").is_empty());
        let begun = t.encode("a", true).unwrap();
        assert_eq!(begun, if whole { ids(&["<b>", "a"]) } else { ids(&["a"]) }, "{pre}");
        // Rows that only fill the embedding up are no tokens.
        assert_eq!((t.vocab_size(), t.token_to_id("[PAD200]")), (tokens.len(), None));
    }
}

#[test]
fn what_stands_around_a_text_is_the_files_word() {
    let (mut tokens, merges) = digits();
    tokens.push(("Ìģ", 1));
    for (bos, eos, expected) in [
        (true, true, &[10, 13, 11][..]),
        (true, false, &[10, 13]),
        (false, true, &[13, 11]),
        (false, false, &[13]),
    ] {
        let mut maker = with_tokens("gpt2", &tokens);
        maker.text("tokenizer.ggml.pre", "llama-bpe");
        maker.texts("tokenizer.ggml.merges", &merges);
        maker.u32("tokenizer.ggml.bos_token_id", 10);
        maker.u32("tokenizer.ggml.eos_token_id", 11);
        maker.bool("tokenizer.ggml.add_bos_token", bos);
        maker.bool("tokenizer.ggml.add_eos_token", eos);
        let t = tokenizer(&maker);
        assert_eq!(t.encode("a", true).unwrap(), expected);
        assert_eq!(t.encode("a", false).unwrap(), [13]);
    }
}

/// <unk>, <s>, </s>, 256 bytes, then pieces; the scores are minus the ranks.
fn pieces() -> (Vec<String>, Vec<i32>, Vec<f32>) {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).into();
    let mut kinds = vec![2, 3, 3];
    tokens.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
    kinds.extend([6; 256]);
    let mut scores = vec![0.0; 259];
    // abc comes before ab, bc and the rest; ▁a before a.
    for (score, piece) in [
        (-1.0, "▁a"),
        (-2.0, "bc"),
        (-3.0, "abc"),
        (-4.0, "ab"),
        (-5.0, "▁abc"),
        (-6.0, "cc"),
        (-7.0, "▁▁"),
        (-7.0, "▁▁▁"),
        (-20.0, "▁"),
        (-21.0, "a"),
        (-22.0, "b"),
        (-23.0, "c"),
        (-24.0, "é"),
    ] {
        tokens.push(piece.to_owned());
        kinds.push(1);
        scores.push(score);
    }
    (tokens, kinds, scores)
}

fn sentencepiece(scores: &[f32]) -> (GgufMaker, Vec<String>) {
    let (tokens, kinds, _) = pieces();
    let all: Vec<(&str, i32)> = tokens.iter().map(String::as_str).zip(kinds).collect();
    let mut maker = with_tokens("llama", &all);
    let scores: Vec<f32> = scores.iter().copied().chain(std::iter::repeat(0.0)).take(288).collect();
    maker.f32s("tokenizer.ggml.scores", &scores);
    maker.remove("tokenizer.ggml.pre");
    maker.u32("tokenizer.ggml.bos_token_id", 1);
    maker.u32("tokenizer.ggml.eos_token_id", 2);
    (maker, tokens)
}

#[test]
fn a_sentencepiece_tokenizer_merges_by_score() {
    let (mut maker, tokens) = sentencepiece(&pieces().2);
    let id = |piece: &str| tokens.iter().position(|t| t == piece).unwrap() as u32;
    let ids = |all: &[&str]| all.iter().map(|t| id(t)).collect::<Vec<u32>>();
    let t = tokenizer(&maker);
    let encode = |text: &str| t.encode(text, false).unwrap();
    // ▁ a b c: ▁a is first, then bc; nothing makes ▁abc of ▁a and bc but that pair, which is a merge.
    assert_eq!(encode("abc"), ids(&["▁abc"]));
    assert_eq!(encode("babc"), ids(&["▁", "b", "abc"]));
    assert_eq!(encode("abcc"), ids(&["▁abc", "c"]));
    assert_eq!(encode("  a"), ids(&["▁▁", "▁a"]));
    // Of one score: from the left, not in pairs.
    assert_eq!(encode("   "), ids(&["▁▁▁", "▁"]));
    assert_eq!(encode("é你"), ids(&["▁", "é", "<0xE4>", "<0xBD>", "<0xA0>"]));
    assert_eq!(encode("a</s>a"), ids(&["▁a", "</s>", "▁a"]));
    assert_eq!(t.encode("a", true).unwrap(), ids(&["<s>", "▁a"]));
    for text in ["abc babc", "  a é你\n", "a"] {
        assert_eq!(t.decode(&encode(text), true).unwrap(), text);
    }
    assert_eq!((t.bos_id(), t.eos_id()), (Some(1), Some(2)));
    maker.bool("tokenizer.ggml.add_space_prefix", false);
    maker.bool("tokenizer.ggml.add_bos_token", false);
    let bare = tokenizer(&maker);
    assert_eq!(bare.encode("abc a", true).unwrap(), ids(&["abc", "▁a"]));
    assert_eq!(bare.decode(&ids(&["▁a"]), true).unwrap(), " a");
}

#[test]
fn without_scores_pieces_merge_in_the_order_of_their_ids() {
    let t = tokenizer(&sentencepiece(&[-1000.0; 272]).0);
    let scored = tokenizer(&sentencepiece(&pieces().2).0);
    for text in ["abc", "babc abcc", "  a bcc ab"] {
        assert_eq!(t.encode(text, false).unwrap(), scored.encode(text, false).unwrap());
    }
}

/// Thirty thousand pieces in a moment: the cost is that of their characters.
#[test]
fn merges_of_a_large_vocabulary_take_no_time() {
    let tiny = Tiny {
        vocab: 32_000,
        hidden: 32,
        ffn: 32,
        layers: 1,
        heads: 2,
        kv_heads: 1,
        ..Tiny::new(Family::Llama)
    };
    let mut maker = tiny_gguf(&tiny);
    let letters: Vec<char> = ('a'..='z').collect();
    let word = |mut n: usize| {
        let mut word = String::new();
        while n > 0 {
            word.push(letters[(n - 1) % 26]);
            n = (n - 1) / 26;
        }
        word
    };
    let tokens: Vec<String> = (0..32_000).map(|id| if id == 0 { "<unk>".into() } else { word(id) }).collect();
    let scores: Vec<f32> = (0..32_000).map(|id| -(id as f32)).collect();
    maker.text("tokenizer.ggml.model", "llama");
    maker.texts("tokenizer.ggml.tokens", &tokens.iter().map(String::as_str).collect::<Vec<_>>());
    maker.i32s("tokenizer.ggml.token_type", &[&[2][..], &[1; 31_999]].concat());
    maker.f32s("tokenizer.ggml.scores", &scores);
    for key in ["eos_token_id", "padding_token_id"] {
        maker.u32(&format!("tokenizer.ggml.{key}"), 0);
    }
    let start = std::time::Instant::now();
    convert(&maker).done();
    assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
}

#[test]
fn what_we_do_not_know_is_refused_by_name() {
    let llama = || tiny_gguf(&Tiny::new(Family::Llama));
    let refused = |change: &dyn Fn(&mut GgufMaker), parts: &[&str]| {
        let mut maker = llama();
        change(&mut maker);
        let error = convert(&maker).error();
        for part in parts.iter().chain(&["m.gguf"]) {
            assert!(error.contains(part), "{part}: {error}");
        }
    };
    refused(&|m| m.text("general.architecture", "gemma3"), &["gemma3", "llama, qwen2, qwen3"]);
    refused(&|m| m.remove("general.architecture"), &["general.architecture", "nothing"]);
    refused(&|m| m.text("general.type", "adapter"), &["general.type", "adapter"]);
    refused(&|m| m.u32("split.count", 3), &["split.count", "llama-gguf-split --merge"]);
    refused(&|m| m.u32("llama.expert_count", 8), &["llama.expert_count", "8"]);
    refused(&|m| m.u32("llama.attention.value_length", 8), &["value_length", "16"]);
    refused(&|m| m.u32("llama.rope.dimension_count", 8), &["rope.dimension_count", "16"]);
    refused(&|m| m.u32("llama.attention.sliding_window", 64), &["sliding_window", "2048", "64"]);
    refused(&|m| m.text("llama.rope.scaling.type", "yarn"), &["llama.rope.scaling.type", "yarn", "linear"]);
    refused(&|m| m.text("tokenizer.ggml.model", "t5"), &["tokenizer.ggml.model", "t5", "gpt2"]);
    refused(
        &|m| m.text("tokenizer.ggml.pre", "viking"),
        &["tokenizer.ggml.pre", "viking", "llama-bpe", "qwen2"],
    );
    refused(&|m| m.remove("tokenizer.ggml.pre"), &["tokenizer.ggml.pre", "nothing"]);
    for (number, name) in [(12, "Q4_K"), (14, "Q6_K"), (23, "IQ4_XS"), (99, "type 99")] {
        // These types have rows of 256.
        let mut maker = tiny_gguf(&Tiny { hidden: 256, heads: 16, kv_heads: 2, ..Tiny::new(Family::Llama) });
        maker.remove("blk.1.attn_v.weight");
        maker.tensor("blk.1.attn_v.weight", &[32, 256], number, &[0; 32 * 210]);
        let error = convert(&maker).error();
        for part in ["m.gguf", "blk.1.attn_v.weight", name, "Q4_0"] {
            assert!(error.contains(part), "{part}: {error}");
        }
    }
}

#[test]
fn files_that_contradict_themselves_are_refused() {
    let refused = |change: &dyn Fn(&mut GgufMaker), parts: &[&str]| {
        let mut maker = tiny_gguf(&Tiny::new(Family::Qwen2));
        change(&mut maker);
        let error = convert(&maker).error();
        for part in parts.iter().chain(&["m.gguf"]) {
            assert!(error.contains(part), "{part}: {error}");
        }
    };
    for key in
        ["block_count", "embedding_length", "attention.head_count", "feed_forward_length", "context_length"]
    {
        refused(&|m| m.remove(&format!("qwen2.{key}")), &[key, "a whole number", "nothing"]);
        refused(&|m| m.text(&format!("qwen2.{key}"), "many"), &[key, "many"]);
        if key != "context_length" {
            refused(&|m| m.u32(&format!("qwen2.{key}"), 0), &[]);
        }
        refused(&|m| m.u32(&format!("qwen2.{key}"), u32::MAX), &[]);
        refused(&|m| m.i32s(&format!("qwen2.{key}"), &[1, 2]), &[key, "an array of 2 values"]);
    }
    refused(&|m| m.remove("qwen2.attention.layer_norm_rms_epsilon"), &["layer_norm_rms_epsilon"]);
    refused(&|m| m.u32("qwen2.attention.key_length", 0), &["the size of a head, 0"]);
    refused(
        &|m| m.u32("qwen2.block_count", 3),
        &["blk.2.ffn_up.weight: missing", "blk.2.attn_q.bias: missing"],
    );
    refused(
        &|m| m.u32("qwen2.block_count", 1),
        &["blk.1.ffn_up.weight: the architecture has no such tensor"],
    );
    refused(&|m| m.u32("qwen2.block_count", 2_000_000_000), &["qwen2.block_count", "2000000000"]);
    let many_heads = |m: &mut GgufMaker| {
        for key in ["head_count", "head_count_kv", "key_length", "value_length"] {
            m.u32(&format!("qwen2.attention.{key}"), 1 << 20);
        }
    };
    refused(&many_heads, &["head_dim", "1048576"]);
    refused(&|m| m.remove("token_embd.weight"), &["token_embd.weight"]);
    refused(&|m| m.remove("blk.0.attn_k.bias"), &["blk.0.attn_k.bias: missing"]);
    refused(&|m| m.tensor("blk.0.odd.weight", &[2], 0, &[0; 8]), &["blk.0.odd.weight: the architecture"]);
    refused(&|m| m.tensor("rope_freqs.weight", &[2], 0, &[0; 8]), &["rope_freqs.weight", "8 factors"]);
    refused(&|m| m.tensor("rope_freqs.weight", &[1, 32], 2, &[0; 18]), &["rope_freqs.weight", "Q4_0"]);

    let key = |name: &str| format!("tokenizer.ggml.{name}");
    for name in ["model", "tokens", "token_type", "merges"] {
        refused(&|m| m.remove(&key(name)), &[name, "nothing"]);
        refused(&|m| m.u32(&key(name), 1), &[name]);
    }
    refused(&|m| m.texts(&key("tokens"), &["a"]), &["token_type", "an array of 1 numbers"]);
    refused(&|m| m.texts(&key("tokens"), &["a"; 288]), &["tokens", "every token once"]);
    refused(&|m| m.texts(&key("tokens"), &["a"; 289]), &["tokens", "288 rows", "289"]);
    refused(&|m| m.texts(&key("merges"), &["a"]), &["merges", "a space between"]);
    refused(&|m| m.texts(&key("merges"), &["a nowhere"]), &["not a tokenizer"]);
    refused(&|m| m.u32(&key("eos_token_id"), 288), &["eos_token_id", "below 288"]);
    refused(&|m| m.bool(&key("bos_token_id"), true), &["bos_token_id"]);
    refused(&|m| m.text(&key("model"), "llama"), &["tokenizer.ggml.scores", "nothing"]);
    refused(&|m| m.u32("tokenizer.chat_template", 1), &["tokenizer.chat_template"]);
}

#[test]
fn truncated_and_damaged_files_leave_nothing() {
    let whole = tiny_gguf(&Tiny::new(Family::Qwen3)).bytes();
    for length in (0..whole.len()).step_by(whole.len() / 97) {
        let error = convert_bytes(&whole[..length], None).error();
        assert!(error.contains("m.gguf") && error.contains("damaged"), "{length} bytes: {error}");
    }
    // Whatever a byte of the header becomes: an error or a model, no panic.
    let header = whole.len() - Tiny::new(Family::Qwen3).vocab * 64 * 4;
    for at in (0..header.min(12_000)).step_by(41) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x55;
        let temp = tempfile::tempdir().unwrap();
        let file = temp.path().join("m.gguf");
        std::fs::write(&file, &bytes).unwrap();
        if let Ok(gguf) = Gguf::open(&file) {
            let _ = GgufImport::new(&gguf);
        }
    }
}
