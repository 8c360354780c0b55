//! The usual faults of data: each is planted and must be named with its lines, and clean rows raise none.

use std::collections::BTreeMap;

use graft_model::{ChatTemplate, Tokenizer};
use graft_testkit::{CHAT_STYLES, ChatStyle};
use graft_train::{Data, DataConfig, ModelEncoder};
use serde_json::{Value, json};

/// The warnings of some splits (train, valid, test) by name, with the lines of each.
type Named = BTreeMap<&'static str, Vec<usize>>;

fn style(name: &str) -> &'static ChatStyle {
    CHAT_STYLES.iter().find(|style| style.name == name).unwrap()
}

fn load(style: &ChatStyle, splits: &[&[Value]], config: &DataConfig) -> Data {
    let (model, dir) = (style.model(), tempfile::tempdir().unwrap());
    for (name, rows) in ["train", "valid", "test"].iter().zip(splits) {
        let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
        std::fs::write(dir.path().join(format!("{name}.jsonl")), lines.join("\n")).unwrap();
    }
    let tokenizer = Tokenizer::load(model.path()).unwrap();
    let template = ChatTemplate::load(model.path()).unwrap();
    let (extra, eos) = (tokenizer.template_variables(), tokenizer.eos_id());
    let encoder = ModelEncoder { tokenizer: &tokenizer, template: Some(&template), extra, eos };
    Data::load(dir.path(), &encoder, config).unwrap()
}

fn named(data: &Data, batch_size: usize) -> Named {
    data.warnings(batch_size, data.valid.found).into_iter().map(|w| (w.fault.name(), w.lines)).collect()
}

/// The faults of a training file.
fn faults(name: &str, mask: bool, rows: &[Value]) -> Named {
    named(&load(style(name), &[rows], &DataConfig::new(mask, 600)), 1)
}

fn chat(messages: &[(&str, &str)]) -> Value {
    let message = |(role, content): &(&str, &str)| json!({"role": role, "content": content});
    json!({"messages": messages.iter().map(message).collect::<Vec<_>>()})
}

fn ask(question: &str, answer: &str) -> Value {
    chat(&[("user", question), ("assistant", answer)])
}

fn call(name: &str) -> Value {
    json!({"role": "assistant", "content": null,
           "tool_calls": [{"id": "123456789", "type": "function", "function": {"name": name, "arguments": {"x": 1}}}]})
}

fn tool(name: &str) -> Value {
    json!([{"type": "function", "function": {"name": name, "description": "", "parameters": {}}}])
}

fn calling(defined: &str, called: &str) -> Value {
    json!({"messages": [{"role": "user", "content": "How warm is it?"}, call(called)], "tools": tool(defined)})
}

#[track_caller]
fn is_only(found: &Named, name: &str, lines: &[usize]) {
    assert_eq!(found.iter().map(|(n, l)| (*n, l.as_slice())).collect::<Vec<_>>(), [(name, lines)]);
}

#[test]
fn faults_of_rows_are_named_with_their_lines() {
    let good = || ask("What is it?", "A thing.");
    // Each planted beside a clean row, and nothing else is said.
    for (name, row) in [
        ("empty-answer", ask("Why?", " \n")),
        ("empty-answer", json!({"prompt": "Why?", "completion": ""})),
        ("empty-text", ask("", "Yes.")),
        ("empty-answer", ask("Why?", "\u{200b}\u{feff}\u{202e} ")),
        ("no-answer", chat(&[("user", "a"), ("assistant", "b"), ("user", "c")])),
        ("unknown-role", chat(&[("human", "Why?"), ("assistant", "So.")])),
        ("special-token-in-content", ask("What is <|im_end|> for?", "An end.")),
        ("broken-characters", ask("A cafÃ©?", "Yes.")),
        ("broken-characters", ask("It\u{fffd}s?", "Yes.")),
        ("broken-characters", ask("Itâ€™s?", "Yes.")),
        ("broken-characters", ask("StraÃŸe", "Yes.")),
        ("broken-characters", ask("Ã‰", "Yes.")),
        ("broken-characters", ask("20 Â°C", "Yes.")),
        ("broken-characters", ask("Â£5", "Yes.")),
        ("broken-characters", ask("â‚¬5", "Yes.")),
        ("broken-characters", ask("GÃ¼nter", "Yes.")),
        ("broken-characters", ask("Å¼e", "Yes.")),
        ("broken-characters", ask("ðŸ˜€", "Yes.")),
        ("broken-characters", ask("Ð¿Ñ€Ð¸Ð²ÐµÑ‚", "Yes.")),
        ("broken-characters", ask("í•œêµ\u{ad}ì–´", "Yes.")),
        ("thinking-trained", ask("Why?", "<think>Let me see.</think>So.")),
        ("duplicate", good()),
    ] {
        let form =
            if row.get("prompt").is_some() { json!({"prompt": "p", "completion": "c"}) } else { good() };
        is_only(&faults("smollm2", false, &[form.clone(), row.clone()]), name, &[2]);
        is_only(&faults("smollm2", true, &[form, row]), name, &[2]);
    }
    // Accented letters with marks after them are whole.
    let whole = [
        "«IRMÃ»",
        "Déjà vu\u{a0}? «\u{a0}Café\u{a0}»",
        "„Spaß“…",
        "¡Olé!…”",
        "Ærø, Ångström, 3º: 20 °C, £5 ½",
    ];
    assert_eq!(faults("smollm2", false, &whole.map(|text| ask(text, "Yes."))), Named::new());
    let long = ask("Why?", &"because ".repeat(300));
    is_only(&faults("qwen 3", true, &[good(), long]), "truncated", &[2]);
    let found = faults("qwen 3", true, &[good(), ask(&"why ".repeat(600), "So.")]);
    assert_eq!((&found["nothing-to-train"], &found["truncated"], found.len()), (&vec![2], &vec![2], 2));
    // What is cut off may differ.
    let long = |end: &str| ask("Why?", &format!("{}{end}", "because ".repeat(300)));
    is_only(&faults("qwen 3", true, &[long("I do"), long("so it is")]), "truncated", &[1, 2]);
    // As long as each other, too.
    is_only(&faults("qwen 3", true, &[long("a"), long("b")]), "truncated", &[1, 2]);
    let found = faults("qwen 3", true, &[long("a"), long("a")]);
    assert_eq!((&found["duplicate"], &found["truncated"]), (&vec![2], &vec![1, 2]));
    let mixed = [good(), good_text(), ask("Why?", "So.")];
    is_only(&faults("llama 3", false, &mixed), "mixed-forms", &[2]);
}

fn good_text() -> Value {
    json!({"text": "A text."})
}

#[test]
fn faults_of_texts_are_named() {
    let text = |text: &str| json!({"text": text});
    let of = |name: &str, row: &str| faults(name, false, &[good_text(), text(row)]);
    is_only(&of("llama 3", "<|begin_of_text|>Once more."), "double-bos", &[2]);
    is_only(&of("mistral", "<s>Once more.</s>"), "double-bos", &[2]);
    is_only(&of("mistral", "Once more.</s>\n"), "double-end", &[2]);
    is_only(&of("qwen 2", "Once more.<|im_end|><|im_end|>"), "double-end", &[2]);
    // One that is typed where it belongs is none too many.
    for name in ["qwen 2", "llama 3"] {
        assert_eq!(of(name, &format!("Once more.{}", style(name).eos)), Named::new());
    }
    is_only(&of("llama 3", " "), "empty-text", &[2]);
    // A row of which only the end token is left has nothing before it.
    let found = of("qwen 2", "");
    assert_eq!(found.keys().copied().collect::<Vec<_>>(), ["empty-text", "nothing-to-train"]);
}

#[test]
fn faults_of_the_template_are_named() {
    let good = || ask("What is it?", "A thing.");
    let system = chat(&[("system", "Be brief."), ("user", "Why?"), ("assistant", "So.")]);
    let with_template = |template: &str, mask: bool, rows: &[Value]| {
        let template = Box::leak(template.to_owned().into_boxed_str());
        let changed = ChatStyle { template, ..*style("smollm2") };
        named(&load(&changed, &[rows], &DataConfig::new(mask, 600)), 1)
    };
    let plain = style("smollm2").template;
    for mask in [false, true] {
        let none = plain.replace("<|im_end|>\\n' }}\n{%- endfor", "\\n' }}\n{%- endfor");
        assert_ne!(none, plain);
        is_only(&with_template(&none, mask, &[good(), ask("Why?", "So.")]), "no-end-of-turn", &[1, 2]);
        let dropping = "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n\
                        {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
        is_only(&with_template(dropping, mask, &[good(), system.clone()]), "role-dropped", &[2]);
        assert_eq!(with_template(plain, mask, &[good(), system.clone()]), Named::new());
        // A system message that is kept at the beginning only; its words stand elsewhere, too.
        let late =
            chat(&[("system", "So."), ("user", "Why?"), ("system", "Be brief."), ("assistant", "So.")]);
        let first = dropping.replace("if m.role != 'system'", "if m.role != 'system' or m == messages[0]");
        is_only(&with_template(&first, mask, &[system.clone(), late]), "role-dropped", &[2]);
        let parts = json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]},
                                        {"role": "assistant", "content": "So."}]});
        is_only(&with_template(plain, mask, &[good(), parts.clone()]), "content-not-text", &[2]);
        let strings = plain.replace("m.content ~", "(m.content if m.content is string else '') ~");
        is_only(&with_template(&strings, mask, &[good(), parts.clone()]), "role-dropped", &[2]);
        // Joined it is a text, and may look like a program's.
        let joined = strings.replace("else '')", "else m.content | map(attribute='text') | join)");
        let mut program = parts.clone();
        program["messages"][0]["content"][0]["text"] = "Why {'a': 1}?".into();
        assert_eq!(with_template(&joined, mask, &[good(), parts, program]), Named::new());
    }
    // The question's end is not the answer's, however short that is.
    let ended = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}\
                 {% if add_generation_prompt %}<|im_start|>{% endif %}";
    let endless = ended.replace("<|im_end|>", "{{ '<|im_end|>' if m.role == 'user' }}");
    for mask in [false, true] {
        for answer in ["y", "yes", "A thing that is long."] {
            is_only(&with_template(&endless, mask, &[ask("Why?", answer)]), "no-end-of-turn", &[1]);
            assert_eq!(with_template(ended, mask, &[ask("Why?", answer)]), Named::new());
        }
    }
    // The mask ends where the prompt alone would, which is not where the answer begins.
    let counting = format!("{{{{ messages | length }}}}\n{plain}");
    is_only(&with_template(&counting, true, &[good()]), "mask-shifted", &[1]);
    assert_eq!(with_template(&counting, false, &[good()]), Named::new());
    // Thoughts that the template puts there, or drops, or leaves empty.
    let thinking = json!({"messages": [{"role": "user", "content": "Why?"},
                                       {"role": "assistant", "content": "So.", "reasoning_content": "Let me see."}]});
    is_only(&faults("qwen 3", true, &[good(), thinking.clone()]), "thinking-trained", &[2]);
    assert_eq!(faults("qwen 2", true, &[good(), thinking]), Named::new());
    let earlier = chat(&[
        ("user", "Why?"),
        ("assistant", "<think>\nLet me see.\n</think>\n\nSo."),
        ("user", "And?"),
        ("assistant", "No more."),
    ]);
    assert_eq!(faults("qwen 3", true, &[good(), earlier.clone()]), Named::new());
    is_only(&faults("qwen 2", false, &[good(), earlier]), "thinking-trained", &[2]);
    // Words about thoughts are none.
    let about = [
        chat(&[("system", "Reason within <think> </think> tags."), ("user", "Why?"), ("assistant", "So.")]),
        ask("What does </think> mean?", "An end."),
        ask("What is <think>this</think>?", "A thought."),
    ];
    for name in ["qwen 2", "qwen 3"] {
        for mask in [false, true] {
            assert_eq!(faults(name, mask, &about), Named::new(), "{name}, masked: {mask}");
        }
    }
    // A thought that the prompt begins.
    let begun = plain.replace("assistant\\n' }}{% endif", "assistant\\n<think>\\n' }}{% endif");
    let begun = begun
        .replace("m.role ~ '\\n' ~", "m.role ~ '\\n' ~ ('<think>\\n' if m.role == 'assistant' else '') ~");
    assert!(begun.matches("<think>").count() == 2);
    is_only(&with_template(&begun, true, &[ask("Why?", "Let me see.</think>So.")]), "thinking-trained", &[1]);
}

#[test]
fn faults_of_tools_are_named() {
    for name in ["llama 3", "mistral", "qwen 2", "qwen 3"] {
        for mask in [false, true] {
            let of = |row: Value| faults(name, mask, &[calling("heat", "heat"), row]);
            assert_eq!(of(calling("open", "open")), Named::new(), "{name}");
            is_only(&of(calling("heat", "heaten")), "unknown-tool", &[2]);
            let mut bare = ask("Why?", "So.");
            bare["tools"] = tool("heat");
            is_only(&faults(name, mask, &[bare.clone(), ask("Who?", "Me.")]), "tools-unused", &[1]);
            let written = json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "heat(1)"}],
                                 "tools": tool("heat")});
            assert_eq!(faults(name, mask, &[bare, written]), Named::new(), "{name}");
        }
        let mut told = calling("heat", "heat");
        let messages = told["messages"].as_array_mut().unwrap();
        messages.push(
            json!({"role": "tool", "content": "21 \"degrees\"", "tool_call_id": "123456789", "name": "heat"}),
        );
        messages.push(json!({"role": "assistant", "content": "It is 21."}));
        assert_eq!(faults(name, false, &[told.clone()]), Named::new(), "{name}");
        is_only(&faults(name, true, &[told]), "call-masked", &[1]);
    }
    // A template without tools prints neither them nor the call.
    let mut row = calling("heat", "heat");
    row["messages"][1]["content"] = "I will.".into();
    let found = faults("smollm2", true, &[row]);
    assert_eq!(
        found.into_iter().collect::<Vec<_>>(),
        [("call-dropped", vec![1]), ("tools-dropped", vec![1])]
    );
    let mut none = calling("heat", "heat");
    none["messages"][1]["content"] = Value::Null;
    let found = faults("smollm2", true, &[none]);
    assert_eq!(found["content-not-text"], [1]);
    let mut text = calling("heat", "heat");
    text["tools"] = text["tools"].to_string().into();
    is_only(&faults("llama 3", true, &[text]), "tools-not-parsed", &[1]);
    let mut text = calling("heat", "heat");
    text["messages"][1]["content"] = "".into();
    text["messages"][1]["tool_calls"] = text["messages"][1]["tool_calls"].to_string().into();
    is_only(&faults("smollm2", true, &[text]), "tools-not-parsed", &[1]);
    // That words of a row are the tool's name does not hide it, in no row.
    let worded =
        |n: usize| json!({"messages": ask("What?", &format!("heat {n}"))["messages"], "tools": tool("heat")});
    is_only(&faults("smollm2", false, &[worded(1), worded(2), worded(3)]), "tools-dropped", &[1, 2, 3]);
    // A call that is dropped beside words only; the tools hold its name.
    let template =
        style("qwen 2").template.replace("in m.tool_calls or []", "in m.tool_calls or [] if not m.content");
    assert_ne!(template, style("qwen 2").template);
    let changed = ChatStyle { template: Box::leak(template.into_boxed_str()), ..*style("qwen 2") };
    let mut spoken = calling("heat", "heat");
    spoken["messages"][1]["content"] = "I will.".into();
    let data = load(&changed, &[&[calling("heat", "heat"), spoken]], &DataConfig::new(true, 600));
    is_only(&named(&data, 1), "call-dropped", &[2]);
}

#[test]
fn faults_between_splits_are_named() {
    let rows: Vec<Value> = (0..6).map(|i| ask(&format!("What is {i}?"), "A number.")).collect();
    let config = DataConfig::new(true, 600);
    let style = style("qwen 2");
    let data = load(
        style,
        &[&rows[..4], &[rows[4].clone(), rows[1].clone()], &[rows[4].clone(), rows[1].clone()]],
        &config,
    );
    let all = data.warnings(2, true);
    let found: Vec<_> = all.iter().map(|w| (w.fault.name(), w.lines.as_slice())).collect();
    assert_eq!(found, [("in-two-splits", &[2][..]), ("in-two-splits", &[2]), ("in-two-splits", &[1])]);
    let (first, last) = (&all[0].text, &all[2].text);
    assert!(first.contains("valid.jsonl: in-two-splits: 1 of 2 rows are in another split"), "{first}");
    assert!(
        first.contains("the first repeats line 2 of") && first.contains("train.jsonl; line 2)"),
        "{first}"
    );
    assert!(last.contains("test.jsonl: in-two-splits") && last.contains("valid.jsonl"), "{last}");

    let few = load(style, &[&rows[..4], &rows[4..]], &config);
    is_only(&named(&few, 3), "too-few-rows", &[1, 2]);
    assert_eq!(named(&few, 2), Named::new());
    let none = load(style, &[&rows], &config);
    assert_eq!(none.warnings(2, true)[0].fault.name(), "no-validation");
    assert_eq!(none.warnings(2, false), []);
}

#[test]
fn clean_rows_of_every_form_raise_nothing_in_any_style() {
    for style in &CHAT_STYLES {
        let chats = [
            ask("What is it?", "A thing: <b>é</b> \"quoted\"\nin two lines"),
            chat(&[("system", "Be brief."), ("user", "  Why?  "), ("assistant", "So.")]),
            chat(&[("user", "a"), ("assistant", "b"), ("user", "a"), ("assistant", "c")]),
        ];
        let pairs =
            [json!({"prompt": "Why?", "completion": "So."}), json!({"prompt": "Who?", "completion": "Me."})];
        let texts = [good_text(), json!({"text": "Another one\n"})];
        for (mask, rows) in
            [(false, &chats[..]), (true, &chats), (false, &pairs), (true, &pairs), (false, &texts)]
        {
            let data = load(style, &[rows], &DataConfig::new(mask, 600));
            assert_eq!(named(&data, 1), Named::new(), "{}, masked: {mask}", style.name);
        }
    }
}
