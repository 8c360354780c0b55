//! From a parsed request to its answer: names, admission, the prompt's tokens, and the events that come back.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value, json};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::{Instant, MissedTickBehavior};

use crate::loader::resolve;
use crate::log::Record;
use crate::prompt::{Ready, Source, ready};
use crate::reply::{Choice, Kind, Reply};
use crate::serve::State;
use crate::sse::{Stream, Writer};
use crate::{ApiError, ChatRequest, Common, CompletionRequest, Event, Job, Lease, Tally, Usage, anthropic};

/// Events a sequence may be ahead of its reader before the engine lets it wait.
const EVENTS_AHEAD: usize = 32;

/// An answer that has begun.
pub(crate) enum Answer {
    /// All of it.
    Whole(Value),
    /// What a stream begins with.
    Stream(Box<Start>),
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
    let (mut common, source, prompts) = match kind {
        Kind::Chat => chat_source(&body, state)?,
        Kind::Message => chat_source(&anthropic::chat_request(&body, false)?, state)?,
        Kind::Completion => {
            let request = CompletionRequest::parse(&body, defaults, info.vocab)?;
            let count = request.prompts.len();
            (request.common, Source::Prompts(request.prompts), count)
        }
    };
    drop(body);
    let count = prompts * common.choices;
    let permits = state.engine.admit(count).map_err(|e| match (e.status, common.choices) {
        (400, 2..) => ApiError {
            param: Some("n".into()),
            message: "`n`: that many answers at a time are more \
            than this server takes"
                .into(),
            ..e
        },
        _ => e,
    })?;
    let (lease, model) = resolve(state, common.model.as_deref(), common.adapter_scale).await?;
    record.log.model = Some(model.clone());
    state.fair(lease.as_ref(), count)?;
    let generation = lease.as_ref().map(|lease| lease.generation().content().to_owned());
    record.log.generation.clone_from(&generation);
    let (ready, permits) = prepared(state, &common, source, permits).await?;
    let reply = Reply {
        kind,
        id: state.unique(match kind {
            Kind::Chat => "chatcmpl-",
            Kind::Completion => "cmpl-",
            Kind::Message => "msg_",
        }),
        created: state.seconds(),
        model,
        fingerprint: format!("graft-{}", env!("CARGO_PKG_VERSION")),
        generation,
        shape: ready.shape.clone(),
        choices: common.choices,
        prompt_tokens: ready.prompts.iter().map(Vec::len).sum(),
        stops: common.params.stop.clone(),
        seed: state.random(),
    };
    common.params.stop.extend(ready.stops.iter().cloned());
    record.follow(count, common.choices);
    let events = submit(state, &common, lease.as_ref(), &ready, (permits, record.tallies()))?;
    // From here on each sequence holds the version for itself, and only what runs or waits is counted.
    drop(lease);
    if common.stream {
        let writer = Writer::new(reply, count, common.include_usage);
        hold(events, writer, state.config.ping_interval).await.map(|start| Answer::Stream(Box::new(start)))
    } else {
        collect(events, &reply, count, common.params.sampling.logprobs.is_some(), record)
            .await
            .map(Answer::Whole)
    }
}

fn chat_source(body: &Map<String, Value>, state: &State) -> Result<(Common, Source, usize), ApiError> {
    let request = ChatRequest::parse(body, &state.config.defaults, state.engine.info().vocab)?;
    Ok((request.common.clone(), Source::Chat(Box::new(request)), 1))
}

/// How many tokens the messages of a request in Anthropic's form have.
pub(crate) async fn count_tokens(state: &Arc<State>, body: Map<String, Value>) -> Result<Value, ApiError> {
    state.available()?;
    let (common, source, count) = chat_source(&anthropic::chat_request(&body, true)?, state)?;
    let permits = state.engine.admit(count)?;
    // What could be asked can be counted, so a name that is not known is looked for as it is there.
    let _held = resolve(state, common.model.as_deref(), common.adapter_scale).await?;
    let (ready, _permits) = prepared(state, &common, source, permits).await?;
    Ok(json!({"input_tokens": ready.prompts.iter().map(Vec::len).sum::<usize>()}))
}

/// [`ready`] beside the server's own threads. The permits go along: a client that leaves does not make room while its
/// work still runs.
async fn prepared(
    state: &Arc<State>,
    common: &Common,
    source: Source,
    permits: Vec<OwnedSemaphorePermit>,
) -> Result<(Ready, Vec<OwnedSemaphorePermit>), ApiError> {
    let (state, common) = (state.clone(), common.clone());
    let work = move || Ok((ready(state.engine.info(), &state.guides, &common, source)?, permits));
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(_) => Err(ApiError::server("the prompt could not be read")),
    }
}

fn submit(
    state: &State,
    common: &Common,
    adapter: Option<&Lease>,
    ready: &Ready,
    (permits, tallies): (Vec<OwnedSemaphorePermit>, &[Arc<Tally>]),
) -> Result<mpsc::Receiver<(usize, Event)>, ApiError> {
    let info = state.engine.info();
    let (sender, events) = mpsc::channel(EVENTS_AHEAD * permits.len().max(1));
    let prompts = ready.prompts.iter().flat_map(|prompt| std::iter::repeat_n(prompt, common.choices));
    for (index, ((prompt, permit), tally)) in prompts.zip(permits).zip(tallies).enumerate() {
        let mut params = common.params.clone();
        // What does not fit ends with `length`, as it does at a limit that the client set.
        params.max_tokens = params.max_tokens.min(info.context - prompt.len());
        // Choices of one seeded request differ from each other, and each is the same every time.
        let seed = params.sampling.seed.map(|seed| seed.wrapping_add(index as u64));
        params.sampling.seed = Some(seed.unwrap_or_else(|| state.random()));
        params.sampling.xtc_special_tokens.clone_from(&info.xtc_special_tokens);
        // Where nothing else can follow, the end must be possible.
        if common.ignore_eos && ready.guide.is_none() {
            let ends = info.tokenizer.eos_ids().iter().filter(|id| (**id as usize) < info.vocab);
            params.sampling.logit_bias.extend(ends.map(|id| (*id, f32::NEG_INFINITY)));
        }
        let adapter = adapter.cloned();
        let (prompt, guide, events) = (prompt.clone(), ready.guide.clone(), sender.clone());
        let tally = tally.clone();
        state.engine.submit(Job { prompt, params, guide, adapter, index, events, tally, permit })?;
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
    let mut choices = vec![Choice::new(&reply.shape, logprobs); count];
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
                choice.push(&text, logprobs);
            }
            Event::Done { finish, usage } => {
                choice.end(finish);
                record.log.finishes.push(finish);
                sum.add(usage.counted(index, reply.choices));
                open -= 1;
            }
            Event::Failed(error) => return Err(error),
        }
    }
    record.complete(sum);
    Ok(reply.whole(&choices, sum))
}
