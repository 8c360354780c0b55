//! From a parsed request to its answer: names, admission, the prompt's tokens, and the events that come back.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::{Instant, MissedTickBehavior};

use crate::engine::Info;
use crate::loader::resolve;
use crate::log::Record;
use crate::reply::{Choice, Kind, Reply};
use crate::serve::State;
use crate::sse::{Stream, Writer};
use crate::{ApiError, ChatRequest, Common, CompletionRequest, Event, Finish, Job, Lease, Prompt, Usage};

/// Events a sequence may be ahead of its reader before the engine lets it wait.
const EVENTS_AHEAD: usize = 32;

/// An answer that has begun.
pub(crate) enum Answer {
    /// All of it.
    Whole(Value),
    /// What a stream begins with.
    Stream(Start),
}

/// A stream whose status line has not been sent.
pub(crate) struct Start {
    events: mpsc::Receiver<(usize, Event)>,
    writer: Writer,
    first: Vec<(usize, Event)>,
}

impl Start {
    /// The body, with a comment whenever nothing has come for `ping`.
    pub(crate) fn stream(self, record: Record, ping: Duration) -> Stream {
        let mut interval = tokio::time::interval_at(Instant::now() + ping, ping);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Stream::new(self.events, self.writer, self.first, interval, record)
    }
}

/// What has to become token ids.
enum Source {
    Chat(Box<ChatRequest>),
    Prompts(Vec<Prompt>),
}

/// Answers a request. Everything that can be wrong with it is found before the engine sees it.
pub(crate) async fn generate(
    state: &Arc<State>,
    kind: Kind,
    body: Map<String, Value>,
    record: &mut Record,
) -> Result<Answer, ApiError> {
    state.available()?;
    let info = state.engine.info();
    let defaults = &state.config.defaults;
    let (common, source, count) = match kind {
        Kind::Chat => {
            let request = ChatRequest::parse(&body, defaults, info.vocab)?;
            (request.common.clone(), Source::Chat(Box::new(request)), 1)
        }
        Kind::Completion => {
            let request = CompletionRequest::parse(&body, defaults, info.vocab)?;
            let count = request.prompts.len();
            (request.common, Source::Prompts(request.prompts), count)
        }
    };
    drop(body);
    let permits = state.engine.admit(count)?;
    let (lease, model) = resolve(state, common.model.as_deref(), common.adapter_scale).await?;
    record.log.model = Some(model.clone());
    state.fair(lease.as_ref(), count)?;
    let generation = lease.as_ref().map(|lease| lease.generation().content().to_owned());
    let (prompts, permits) = tokens(info.clone(), source, permits).await?;
    let events = submit(state, &common, lease.as_ref(), prompts, permits)?;
    let reply = Reply {
        kind,
        id: state.unique(if kind == Kind::Chat { "chatcmpl-" } else { "cmpl-" }),
        created: state.seconds(),
        model,
        fingerprint: format!("graft-{}", env!("CARGO_PKG_VERSION")),
        generation,
    };
    if common.stream {
        let writer = Writer::new(reply, count, common.include_usage);
        hold(events, writer, state.config.ping_interval).await.map(Answer::Stream)
    } else {
        collect(events, &reply, count, common.params.sampling.logprobs.is_some(), record)
            .await
            .map(Answer::Whole)
    }
}

/// Template and tokenizer can take seconds on a long text, so they run beside the server's own threads. The permits go
/// along: a client that leaves does not make room while its work still runs.
async fn tokens(
    info: Arc<Info>,
    source: Source,
    permits: Vec<OwnedSemaphorePermit>,
) -> Result<(Vec<Vec<u32>>, Vec<OwnedSemaphorePermit>), ApiError> {
    let work = move || {
        let prompts = match source {
            Source::Chat(request) => vec![chat_prompt(&info, &request)?],
            Source::Prompts(prompts) => {
                prompts.into_iter().map(|prompt| plain_prompt(&info, prompt)).collect::<Result<_, _>>()?
            }
        };
        Ok((prompts, permits))
    };
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(_) => Err(ApiError::server("the prompt could not be read")),
    }
}

fn chat_prompt(info: &Info, request: &ChatRequest) -> Result<Vec<u32>, ApiError> {
    let Some(template) = &info.template else {
        let why = "This model has no chat template; use /v1/completions.";
        return Err(ApiError::unsupported("messages", why));
    };
    let mut variables = info.tokenizer.template_variables();
    variables.extend(request.template_args.clone());
    let text = template.render(&request.messages, request.tools.as_ref(), true, &variables).map_err(|e| {
        // Where the template's file is concerns nobody outside.
        let why = match e {
            graft_model::Error::Template { message, .. } => message,
            other => other.to_string(),
        };
        ApiError::invalid("messages", format!("The chat template refuses these messages: {why}"))
    })?;
    let ids = info.tokenizer.encode(&text, false).map_err(|_| unreadable("messages"))?;
    fitting(info, "messages", ids)
}

fn plain_prompt(info: &Info, prompt: Prompt) -> Result<Vec<u32>, ApiError> {
    let ids = match prompt {
        Prompt::Text(text) => info.tokenizer.encode(&text, true).map_err(|_| unreadable("prompt"))?,
        Prompt::Ids(ids) => ids,
    };
    fitting(info, "prompt", ids)
}

fn unreadable(param: &str) -> ApiError {
    ApiError::invalid(param, format!("`{param}` cannot be split into tokens"))
}

/// Checks a prompt's tokens. One without any begins where a text begins.
fn fitting(info: &Info, param: &str, mut ids: Vec<u32>) -> Result<Vec<u32>, ApiError> {
    if ids.is_empty() {
        match info.start {
            Some(id) => ids.push(id),
            None => {
                return Err(ApiError::invalid(
                    param,
                    format!("`{param}` has no tokens; the model needs one"),
                ));
            }
        }
    }
    if ids.len() >= info.context {
        return Err(ApiError::context_length(param, ids.len(), info.context));
    }
    if let Some(id) = ids.iter().find(|id| **id as usize >= info.vocab) {
        return Err(ApiError::invalid(param, format!("`{param}` has the token {id}, which the model lacks")));
    }
    Ok(ids)
}

fn submit(
    state: &State,
    common: &Common,
    adapter: Option<&Lease>,
    prompts: Vec<Vec<u32>>,
    permits: Vec<OwnedSemaphorePermit>,
) -> Result<mpsc::Receiver<(usize, Event)>, ApiError> {
    let (sender, events) = mpsc::channel(EVENTS_AHEAD * prompts.len().max(1));
    for (index, (prompt, permit)) in prompts.into_iter().zip(permits).enumerate() {
        let mut params = common.params.clone();
        // What does not fit ends with `length`, as it does at a limit that the client set.
        params.max_tokens = params.max_tokens.min(state.engine.info().context - prompt.len());
        // Choices of one seeded request differ from each other, and each is the same every time.
        let seed = params.sampling.seed.map(|seed| seed.wrapping_add(index as u64));
        params.sampling.seed = Some(seed.unwrap_or_else(|| state.random()));
        params.sampling.xtc_special_tokens.clone_from(&state.engine.info().xtc_special_tokens);
        let (adapter, events) = (adapter.cloned(), sender.clone());
        state.engine.submit(Job { prompt, params, adapter, index, events, permit })?;
    }
    Ok(events)
}

/// Waits for the engine's first result, so that an error before it has its true status; but not longer than a client
/// or a proxy would wait for a first byte.
async fn hold(
    mut events: mpsc::Receiver<(usize, Event)>,
    writer: Writer,
    patience: Duration,
) -> Result<Start, ApiError> {
    let deadline = Instant::now() + patience;
    let mut first = Vec::new();
    loop {
        match tokio::time::timeout_at(deadline, events.recv()).await {
            Ok(Some((_, Event::Accepted))) => {}
            Ok(Some((_, Event::Failed(error)))) => return Err(error),
            Ok(Some(other)) => {
                first.push(other);
                break;
            }
            Ok(None) => return Err(ApiError::server("the answer was interrupted")),
            Err(_) => break,
        }
    }
    Ok(Start { events, writer, first })
}

async fn collect(
    mut events: mpsc::Receiver<(usize, Event)>,
    reply: &Reply,
    count: usize,
    logprobs: bool,
    record: &mut Record,
) -> Result<Value, ApiError> {
    let empty = Choice { text: String::new(), logprobs: logprobs.then(Vec::new), finish: Finish::Length };
    let mut choices = vec![empty; count];
    let (mut open, mut sum) = (count, Usage::ZERO);
    while open > 0 {
        let Some((index, event)) = events.recv().await else {
            return Err(ApiError::server("the answer was interrupted"));
        };
        let Some(choice) = choices.get_mut(index) else { continue };
        match event {
            Event::Accepted => {}
            Event::Piece { text, logprobs } => {
                record.first();
                choice.text.push_str(&text);
                if let Some(all) = &mut choice.logprobs {
                    all.extend(logprobs);
                }
            }
            Event::Done { finish, usage } => {
                choice.finish = finish;
                sum.add(usage);
                open -= 1;
            }
            Event::Failed(error) => return Err(error),
        }
    }
    record.complete(sum);
    Ok(reply.whole(&choices, sum))
}
