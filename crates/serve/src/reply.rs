//! The bodies of answers in OpenAI's form: whole ones and the chunks of streamed ones.

use serde_json::{Map, Value, json};

use crate::anthropic;
use crate::calls::Call;
use crate::serve::mixed;
use crate::split::{Part, Shape, Splitter};
use crate::{Finish, TokenLogprob, Usage};

/// Chat, plain completion, or Anthropic's form of a chat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Chat,
    Completion,
    Message,
}

/// What every body of one answer has in common.
#[derive(Debug, Clone)]
pub(crate) struct Reply {
    pub(crate) kind: Kind,
    pub(crate) id: String,
    /// Seconds since 1970.
    pub(crate) created: u64,
    /// The model as the client named it.
    pub(crate) model: String,
    pub(crate) fingerprint: String,
    /// The version of the adapter that answers; none for the base.
    pub(crate) generation: Option<String>,
    /// What the answers are taken apart by.
    pub(crate) shape: Shape,
    /// Answers per prompt.
    pub(crate) choices: usize,
    /// Tokens of all prompts.
    pub(crate) prompt_tokens: usize,
    /// The client's stop strings.
    pub(crate) stops: Vec<String>,
    /// What the ids of calls are made of.
    pub(crate) seed: u64,
}

/// One choice as far as it has come.
#[derive(Debug, Clone)]
pub(crate) struct Choice {
    splitter: Splitter,
    pub(crate) thought: String,
    pub(crate) text: String,
    pub(crate) calls: Vec<Call>,
    pub(crate) logprobs: Option<Vec<TokenLogprob>>,
    pub(crate) finish: Finish,
}

impl Choice {
    pub(crate) fn new(shape: &Shape, logprobs: bool) -> Self {
        Self {
            splitter: Splitter::new(shape.clone()),
            thought: String::new(),
            text: String::new(),
            calls: Vec::new(),
            logprobs: logprobs.then(Vec::new),
            finish: Finish::Length,
        }
    }

    pub(crate) fn push(&mut self, text: &str, logprobs: Vec<TokenLogprob>) {
        let parts = self.splitter.push(text);
        self.take(parts);
        if let Some(all) = &mut self.logprobs {
            all.extend(logprobs);
        }
    }

    pub(crate) fn end(&mut self, finish: Finish) {
        let parts = self.splitter.finish();
        self.take(parts);
        self.finish = finish;
    }

    fn take(&mut self, parts: Vec<Part>) {
        for part in parts {
            match part {
                Part::Thought(text) => self.thought.push_str(&text),
                Part::Text(text) => self.text.push_str(&text),
                Part::Call(call) => self.calls.push(call),
                Part::Arguments(text) => {
                    if let Some(call) = self.calls.last_mut() {
                        call.arguments.push_str(&text);
                    }
                }
            }
        }
    }
}

impl Reply {
    fn frame(&self, object: &str, choices: Value) -> Map<String, Value> {
        let mut map = Map::new();
        map.insert("id".into(), self.id.as_str().into());
        map.insert("object".into(), object.into());
        map.insert("created".into(), self.created.into());
        map.insert("model".into(), self.model.as_str().into());
        map.insert("system_fingerprint".into(), self.fingerprint.as_str().into());
        if let Some(generation) = &self.generation {
            map.insert("adapter_generation".into(), generation.as_str().into());
        }
        map.insert("choices".into(), choices);
        map
    }

    /// The whole answer.
    pub(crate) fn whole(&self, choices: &[Choice], sum: Usage) -> Value {
        if self.kind == Kind::Message {
            return choices.first().map_or(Value::Null, |choice| anthropic::whole(self, choice, sum));
        }
        let choices = choices.iter().enumerate().map(|(index, choice)| match self.kind {
            Kind::Chat | Kind::Message => json!({
                "index": index,
                "message": self.message(index, choice),
                "logprobs": choice.logprobs.as_deref().map(chat_logprobs),
                "finish_reason": finish_word(choice.finish, !choice.calls.is_empty()),
            }),
            Kind::Completion => json!({
                "index": index,
                "text": choice.text,
                "logprobs": choice.logprobs.as_deref().map(|l| completion_logprobs(l, &mut 0)),
                "finish_reason": choice.finish.as_str(),
            }),
        });
        let object = match self.kind {
            Kind::Chat | Kind::Message => "chat.completion",
            Kind::Completion => "text_completion",
        };
        let mut map = self.frame(object, choices.collect());
        map.insert("usage".into(), usage(sum));
        Value::Object(map)
    }

    fn message(&self, index: usize, choice: &Choice) -> Value {
        let mut message = json!({"role": "assistant", "content": choice.text});
        if !choice.thought.is_empty() {
            message["reasoning_content"] = choice.thought.as_str().into();
        }
        if !choice.calls.is_empty() {
            if choice.text.is_empty() {
                message["content"] = Value::Null;
            }
            let calls = choice.calls.iter().enumerate().map(|(call, Call { name, arguments })| {
                json!({
                    "id": self.call_id(index, call), "type": "function",
                    "function": {"name": name, "arguments": arguments},
                })
            });
            message["tool_calls"] = calls.collect();
        }
        message
    }

    /// The id of a choice's call. Mistral's templates take nine letters and digits and nothing else.
    pub(crate) fn call_id(&self, choice: usize, call: usize) -> String {
        let place = ((choice as u64) << 32) + call as u64 + 1;
        let bits = mixed(self.seed.wrapping_add(place.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        match (self.shape.calls, self.kind) {
            (Some(style), _) if style.short_ids() => format!("{:09x}", bits >> 28),
            (_, Kind::Message) => format!("toolu_{bits:016x}"),
            _ => format!("call_{bits:016x}"),
        }
    }

    /// A chunk with one choice. `usage` is there (as null) where a last chunk will bring it.
    pub(crate) fn chunk(&self, choice: &Value, with_usage: bool) -> Value {
        let mut map = self.frame(self.chunk_object(), json!([choice]));
        if with_usage {
            map.insert("usage".into(), Value::Null);
        }
        Value::Object(map)
    }

    /// The chunk after all others, with the usage and no choices.
    pub(crate) fn usage_chunk(&self, sum: Usage) -> Value {
        let mut map = self.frame(self.chunk_object(), json!([]));
        map.insert("usage".into(), usage(sum));
        Value::Object(map)
    }

    fn chunk_object(&self) -> &'static str {
        match self.kind {
            Kind::Chat | Kind::Message => "chat.completion.chunk",
            Kind::Completion => "text_completion",
        }
    }

    /// The choice of the first chunk of a chat: the role.
    pub(crate) fn opening(index: usize) -> Value {
        json!({"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": null, "finish_reason": null})
    }

    /// What a chat's chunks say of a part: one delta, or for a whole call two, the name first. `call` counts the calls before it.
    pub(crate) fn deltas(&self, index: usize, part: &Part, call: usize) -> Vec<Value> {
        match part {
            Part::Text(text) => vec![json!({"content": text})],
            Part::Thought(text) => vec![json!({"reasoning_content": text})],
            Part::Call(Call { name, arguments }) => {
                let function = json!({"name": name, "arguments": ""});
                let id = self.call_id(index, call);
                let first = json!({"index": call, "id": id, "type": "function", "function": function});
                let mut all = vec![json!({"tool_calls": [first]})];
                if !arguments.is_empty() {
                    all.extend(self.deltas(index, &Part::Arguments(arguments.clone()), call + 1));
                }
                all
            }
            Part::Arguments(text) => {
                let more = json!({"index": call.saturating_sub(1), "function": {"arguments": text}});
                vec![json!({"tool_calls": [more]})]
            }
        }
    }

    /// The choice of a chunk of a chat.
    pub(crate) fn delta(index: usize, delta: &Value, logprobs: &[TokenLogprob]) -> Value {
        let logprobs = (!logprobs.is_empty()).then(|| chat_logprobs(logprobs));
        json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": null})
    }

    /// The choice of a completion's chunk. `offset` counts the characters of this choice so far.
    pub(crate) fn text(index: usize, text: &str, logprobs: &[TokenLogprob], offset: &mut usize) -> Value {
        let logprobs = (!logprobs.is_empty()).then(|| completion_logprobs(logprobs, offset));
        json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": null})
    }

    /// The choice of the chunk that ends it.
    pub(crate) fn closing(&self, index: usize, finish: Finish, called: bool) -> Value {
        match self.kind {
            Kind::Chat | Kind::Message => {
                let finish = finish_word(finish, called);
                json!({"index": index, "delta": {}, "logprobs": null, "finish_reason": finish})
            }
            Kind::Completion => {
                json!({"index": index, "text": "", "logprobs": null, "finish_reason": finish.as_str()})
            }
        }
    }
}

fn finish_word(finish: Finish, called: bool) -> &'static str {
    match finish {
        Finish::Stop | Finish::StopString(_) if called => "tool_calls",
        other => other.as_str(),
    }
}

fn usage(sum: Usage) -> Value {
    json!({
        "prompt_tokens": sum.prompt,
        "completion_tokens": sum.completion,
        "total_tokens": sum.prompt + sum.completion,
        "prompt_tokens_details": {"cached_tokens": sum.cached},
    })
}

fn chat_logprobs(tokens: &[TokenLogprob]) -> Value {
    let content = tokens.iter().map(|t| {
        let top = t
            .top
            .iter()
            // What is impossible has no logarithm that JSON could hold.
            .filter(|(_, logprob)| logprob.is_finite())
            .map(|(token, logprob)| json!({"token": token.text, "logprob": logprob, "bytes": token.bytes}));
        json!({
            "token": t.token.text, "logprob": t.logprob, "bytes": t.token.bytes,
            "top_logprobs": top.collect::<Value>(),
        })
    });
    json!({"content": content.collect::<Value>(), "refusal": null})
}

/// `offset` is where the first token's text begins, in characters; it moves behind the last.
fn completion_logprobs(tokens: &[TokenLogprob], offset: &mut usize) -> Value {
    let mut offsets = Vec::with_capacity(tokens.len());
    for token in tokens {
        offsets.push(*offset);
        *offset += token.token.text.chars().count();
    }
    let top = tokens.iter().map(|t| {
        let possible = t.top.iter().filter(|(_, logprob)| logprob.is_finite());
        let entries = possible.map(|(token, logprob)| (token.text.clone(), json!(logprob)));
        Value::Object(entries.collect())
    });
    json!({
        "tokens": tokens.iter().map(|t| &t.token.text).collect::<Vec<_>>(),
        "token_logprobs": tokens.iter().map(|t| t.logprob).collect::<Vec<_>>(),
        "top_logprobs": top.collect::<Value>(),
        "text_offset": offsets,
    })
}
