//! What arrives from outside, made up at random and from a corpus: nothing of it may panic, and what is taken apart in
//! pieces must come out as if it had been whole.

use std::collections::VecDeque;

use graft_model::Sampling;
use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::{Map, Number, Value};

use crate::calls::Call;
use crate::reply::{Choice, Kind, Reply};
use crate::split::Shape;
use crate::sse::Writer;
use crate::tools::CallStyle;
use crate::{
    ApiError, ChatRequest, CompletionRequest, Defaults, Event, Finish, StopMatcher, Usage, anthropic,
};

const REQUESTS: &str = include_str!("../tests/corpus/requests.jsonl");
const TEXTS: &str = include_str!("../tests/corpus/texts.jsonl");

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Names and words that requests have, so that what is made up is near to what is read.
fn word() -> impl Strategy<Value = String> {
    let known: Vec<String> = [
        "messages",
        "role",
        "content",
        "user",
        "assistant",
        "tool",
        "type",
        "text",
        "function",
        "name",
        "arguments",
        "parameters",
        "tools",
        "tool_choice",
        "required",
        "auto",
        "none",
        "stop",
        "prompt",
        "max_tokens",
        "temperature",
        "logit_bias",
        "stream",
        "response_format",
        "json_schema",
        "schema",
        "$ref",
        "#",
        "",
        "1",
        "99999999999999999999",
        "-1",
    ]
    .map(String::from)
    .to_vec();
    prop_oneof![3 => proptest::sample::select(known), 1 => any::<String>()]
}

fn leaf() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (-3_i64..40).prop_map(Value::from),
        any::<f64>().prop_map(|n| Number::from_f64(n).map_or(Value::Null, Value::Number)),
        word().prop_map(Value::from),
    ]
}

fn json() -> impl Strategy<Value = Value> {
    leaf().prop_recursive(4, 24, 5, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..5).prop_map(Value::from),
            vec((word(), inner), 0..5).prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
        ]
    })
}

/// A request of the corpus with one value replaced, or one field added.
fn request() -> impl Strategy<Value = Map<String, Value>> {
    let corpus = lines(REQUESTS);
    let change = (proptest::sample::select(corpus), vec(any::<prop::sample::Index>(), 1..6), word(), json());
    change.prop_map(|(mut request, path, name, new)| {
        replace(&mut request, &path, name, new);
        match request {
            Value::Object(map) => map,
            _ => Map::new(),
        }
    })
}

/// Walks down the path and puts `new` there: as a further field of an object, or in place of another value.
fn replace(value: &mut Value, path: &[prop::sample::Index], name: String, new: Value) {
    match (value, path.split_first()) {
        (Value::Array(items), Some((step, rest))) if !items.is_empty() => {
            let at = step.index(items.len());
            replace(&mut items[at], rest, name, new);
        }
        (Value::Object(map), Some((step, rest))) if !map.is_empty() => {
            let at = step.index(map.len());
            replace(map.values_mut().nth(at).unwrap(), rest, name, new);
        }
        (Value::Object(map), _) => {
            map.insert(name, new);
        }
        (other, _) => *other = new,
    }
}

fn defaults() -> Defaults {
    Defaults { max_tokens: 5, sampling: Sampling::greedy(), template_args: Map::new() }
}

/// Whatever is wrong with a request is told as such: a status of 4xx, a field, a sentence.
fn told<T>(result: Result<T, ApiError>) {
    if let Err(error) = result {
        assert!(error.status == 400 && error.param.is_some() && !error.message.is_empty(), "{error:?}");
        assert!(error.message.len() < 2000, "{} bytes of message", error.message.len());
    }
}

fn parse(body: &Map<String, Value>) {
    told(ChatRequest::parse(body, &defaults(), 300));
    told(CompletionRequest::parse(body, &defaults(), 300));
    for counted in [false, true] {
        told(
            anthropic::chat_request(body, counted)
                .and_then(|chat| ChatRequest::parse(&chat, &defaults(), 300)),
        );
    }
}

/// Text with marks in it, cut somewhere.
fn pieces() -> impl Strategy<Value = Vec<String>> {
    let texts: Vec<String> = lines(TEXTS).iter().map(|text| text.as_str().unwrap().to_owned()).collect();
    let marks = [
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "<|python_tag|>",
        "{",
        "}",
        " ",
        "\n",
    ];
    let piece = prop_oneof![
        2 => proptest::sample::select(texts),
        2 => proptest::sample::select(marks.map(String::from).to_vec()),
        1 => any::<String>(),
    ];
    (vec(piece, 0..6), vec(any::<prop::sample::Index>(), 0..8)).prop_map(|(parts, cuts)| {
        let text: Vec<char> = parts.concat().chars().collect();
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(text.len() + 1)).collect();
        cuts.extend([0, text.len()]);
        cuts.sort_unstable();
        cuts.windows(2).map(|pair| text[pair[0]..pair[1]].iter().collect()).collect()
    })
}

fn shape() -> impl Strategy<Value = Shape> {
    let styles =
        [None, Some(CallStyle::Tagged), Some(CallStyle::Bare), Some(CallStyle::List), Some(CallStyle::Named)];
    let calls = proptest::sample::select(styles.to_vec());
    (any::<bool>(), any::<bool>(), calls, any::<bool>(), any::<bool>()).prop_map(
        |(thought, thinks, calls, single, forced)| Shape {
            thought: thought.then_some(("<think>", "</think>")),
            thinks: thinks && thought,
            calls,
            names: vec!["f".into()],
            single,
            forced: forced && calls.is_some(),
        },
    )
}

fn whole(shape: &Shape, pieces: &[String], finish: Finish) -> Choice {
    let mut choice = Choice::new(shape, false);
    pieces.iter().for_each(|piece| choice.push(piece, Vec::new()));
    choice.end(finish);
    choice
}

fn reply(kind: Kind, shape: &Shape) -> Reply {
    Reply {
        kind,
        id: "id".into(),
        created: 1,
        model: "m\"\n".into(),
        fingerprint: "f".into(),
        generation: None,
        shape: shape.clone(),
        choices: 1,
        prompt_tokens: 3,
        stops: vec!["a".into()],
        seed: 9,
    }
}

/// The payloads of a stream, each on one line, framed exactly.
fn payloads(bytes: &VecDeque<bytes::Bytes>, kind: Kind) -> Vec<Value> {
    let mut all = Vec::new();
    for event in bytes {
        let text = std::str::from_utf8(event).unwrap().strip_suffix("\n\n").unwrap();
        let data = match kind {
            Kind::Message => text.split_once('\n').unwrap().1,
            _ => text,
        };
        let data = data.strip_prefix("data: ").unwrap();
        assert!(!data.contains('\n'), "{data}");
        all.push(serde_json::from_str(data).unwrap_or_else(|_| Value::from(data)));
    }
    all
}

/// What the payloads say: thought, text and calls.
fn said(payloads: &[Value], kind: Kind) -> (String, String, Vec<Call>) {
    let (mut thought, mut text, mut calls) = (String::new(), String::new(), Vec::<Call>::new());
    let empty = |name: &Value| Call { name: name.as_str().unwrap().into(), arguments: String::new() };
    for payload in payloads {
        let (delta, pointer) = match kind {
            Kind::Message => (&payload["delta"], &payload["content_block"]),
            _ => (&payload["choices"][0]["delta"], &payload["choices"][0]),
        };
        let of = |key: &str| delta[key].as_str().unwrap_or_default();
        thought += &(of("reasoning_content").to_owned() + of("thinking"));
        text += &(of("content").to_owned() + of("text") + pointer["text"].as_str().unwrap_or_default());
        let function = &delta["tool_calls"][0]["function"];
        if function["name"].is_string() {
            calls.push(empty(&function["name"]));
        }
        if pointer["type"] == "tool_use" {
            calls.push(empty(&pointer["name"]));
        }
        let more = function["arguments"].as_str().unwrap_or_default().to_owned() + of("partial_json");
        if !more.is_empty() {
            calls.last_mut().unwrap().arguments += &more;
        }
    }
    (thought, text, calls)
}

#[test]
fn the_corpus_is_read() {
    for request in lines(REQUESTS) {
        parse(request.as_object().unwrap());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn no_request_panics(body in request()) {
        parse(&body);
    }

    #[test]
    fn no_json_panics(body in json()) {
        if let Value::Object(map) = body {
            parse(&map);
        }
    }

    #[test]
    fn where_a_text_is_cut_changes_neither_its_stop_nor_its_parts(
        pieces in pieces(),
        shape in shape(),
        stops in vec("[a<{ ]{0,3}", 0..4),
    ) {
        let text = pieces.concat();
        let run = |pieces: &[String]| {
            let mut matcher = StopMatcher::new(&stops);
            let mut out = String::new();
            for piece in pieces {
                let matched = matcher.push(piece);
                out += &matched.text;
                if matched.stop.is_some() {
                    return (out, true);
                }
            }
            (out + &matcher.finish(), false)
        };
        let (cut, stopped) = run(&pieces);
        prop_assert_eq!(&(cut.clone(), stopped), &run(std::slice::from_ref(&text)));
        prop_assert!(stopped || cut == text);

        let (one, many) = (whole(&shape, std::slice::from_ref(&text), Finish::Stop), whole(&shape, &pieces, Finish::Stop));
        prop_assert_eq!((&one.thought, &one.text, &one.calls), (&many.thought, &many.text, &many.calls));
        if shape.thought.is_none() && shape.calls.is_none() {
            prop_assert_eq!(one.text, text);
        }
    }

    #[test]
    fn a_stream_says_what_the_whole_answer_says(
        pieces in pieces(),
        shape in shape(),
        kind in proptest::sample::select(vec![Kind::Chat, Kind::Message]),
        fails in any::<bool>(),
    ) {
        let reply = reply(kind, &shape);
        let mut writer = Writer::new(reply.clone(), 1, true);
        let mut out = VecDeque::new();
        writer.opening(&mut out);
        for text in &pieces {
            writer.push(0, &Event::Piece { text: text.clone(), logprobs: Vec::new() }, &mut out);
        }
        if fails {
            let failed = Event::Failed(ApiError::server("x\ny"));
            prop_assert!(writer.push(0, &failed, &mut out));
            payloads(&out, kind);
            return Ok(());
        }
        let usage = Usage { prompt: 3, completion: 2, cached: 1 };
        let done = Event::Done { finish: Finish::Length, usage };
        prop_assert!(writer.push(0, &done, &mut out));
        let choice = whole(&shape, &pieces, Finish::Length);
        let expected = (choice.thought.clone(), choice.text.clone(), choice.calls.clone());
        prop_assert_eq!(said(&payloads(&out, kind), kind), expected);
        prop_assert!(reply.whole(&[choice], usage).is_object());
    }
}
