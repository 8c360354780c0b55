//! The bodies of answers: whole ones and the chunks of streamed ones.

use serde_json::{Map, Value, json};

use crate::{Finish, TokenLogprob, Usage};

/// Chat or plain completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Chat,
    Completion,
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
}

/// One finished choice.
#[derive(Debug, Clone)]
pub(crate) struct Choice {
    pub(crate) text: String,
    pub(crate) logprobs: Option<Vec<TokenLogprob>>,
    pub(crate) finish: Finish,
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
        let choices = choices.iter().enumerate().map(|(index, choice)| match self.kind {
            Kind::Chat => json!({
                "index": index,
                "message": {"role": "assistant", "content": choice.text},
                "logprobs": choice.logprobs.as_deref().map(chat_logprobs),
                "finish_reason": choice.finish.as_str(),
            }),
            Kind::Completion => json!({
                "index": index,
                "text": choice.text,
                "logprobs": choice.logprobs.as_deref().map(|l| completion_logprobs(l, &mut 0)),
                "finish_reason": choice.finish.as_str(),
            }),
        });
        let object = match self.kind {
            Kind::Chat => "chat.completion",
            Kind::Completion => "text_completion",
        };
        let mut map = self.frame(object, choices.collect());
        map.insert("usage".into(), usage(sum));
        Value::Object(map)
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
            Kind::Chat => "chat.completion.chunk",
            Kind::Completion => "text_completion",
        }
    }

    /// The choice of the first chunk of a chat: the role.
    pub(crate) fn opening(index: usize) -> Value {
        json!({"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": null, "finish_reason": null})
    }

    /// The choice of a chunk with text. `offset` counts the characters of this choice so far.
    pub(crate) fn piece(
        &self,
        index: usize,
        text: &str,
        logprobs: &[TokenLogprob],
        offset: &mut usize,
    ) -> Value {
        let some = !logprobs.is_empty();
        match self.kind {
            Kind::Chat => json!({
                "index": index, "delta": {"content": text},
                "logprobs": some.then(|| chat_logprobs(logprobs)), "finish_reason": null,
            }),
            Kind::Completion => json!({
                "index": index, "text": text,
                "logprobs": some.then(|| completion_logprobs(logprobs, offset)), "finish_reason": null,
            }),
        }
    }

    /// The choice of the chunk that ends it.
    pub(crate) fn closing(&self, index: usize, finish: Finish) -> Value {
        let finish = finish.as_str();
        match self.kind {
            Kind::Chat => json!({"index": index, "delta": {}, "logprobs": null, "finish_reason": finish}),
            Kind::Completion => {
                json!({"index": index, "text": "", "logprobs": null, "finish_reason": finish})
            }
        }
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
        let entries = t.top.iter().map(|(token, logprob)| (token.text.clone(), json!(logprob)));
        Value::Object(entries.collect())
    });
    json!({
        "tokens": tokens.iter().map(|t| &t.token.text).collect::<Vec<_>>(),
        "token_logprobs": tokens.iter().map(|t| t.logprob).collect::<Vec<_>>(),
        "top_logprobs": top.collect::<Value>(),
        "text_offset": offsets,
    })
}
