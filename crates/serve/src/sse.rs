//! Server-sent events, byte for byte as OpenAI's clients expect them, and the response body that carries them.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::Interval;

use crate::anthropic::{self, Blocks};
use crate::log::Record;
use crate::reply::{Kind, Reply};
use crate::split::{Part, Splitter};
use crate::{ApiError, Event, Finish, TokenLogprob, Usage};

/// The event after which nothing comes.
const DONE: &[u8] = b"data: [DONE]\n\n";
/// A comment that keeps proxies from closing a connection on which nothing has come for a while.
const PING: &[u8] = b": ping\n\n";

/// One event: `data: {json}\n\n`, the JSON on one line.
pub(crate) fn event(value: &Value) -> Bytes {
    Bytes::from(format!("data: {value}\n\n"))
}

/// Turns the events of a request's sequences into the bytes of a stream.
pub(crate) struct Writer {
    reply: Reply,
    include_usage: bool,
    choices: Vec<Progress>,
    open: usize,
    usage: Usage,
}

/// How far a choice has come.
struct Progress {
    splitter: Splitter,
    /// Characters written.
    offset: usize,
    calls: usize,
    blocks: Blocks,
}

impl Writer {
    pub(crate) fn new(reply: Reply, choices: usize, include_usage: bool) -> Self {
        let start = || Progress {
            splitter: Splitter::new(reply.shape.clone()),
            offset: 0,
            calls: 0,
            blocks: Blocks::default(),
        };
        let progress = (0..choices).map(|_| start()).collect();
        Self { reply, include_usage, choices: progress, open: choices, usage: Usage::ZERO }
    }

    /// What comes before any text.
    pub(crate) fn opening(&self, out: &mut VecDeque<Bytes>) {
        match self.reply.kind {
            Kind::Chat => out.extend((0..self.choices.len()).map(|i| self.chunk(&Reply::opening(i)))),
            Kind::Message => out.push_back(anthropic::opening(&self.reply)),
            Kind::Completion => {}
        }
    }

    /// What is sent while nothing has come for a while, so that proxies do not close the connection.
    pub(crate) fn ping(&self) -> Bytes {
        match self.reply.kind {
            Kind::Message => Bytes::from_static(anthropic::PING),
            Kind::Chat | Kind::Completion => Bytes::from_static(PING),
        }
    }

    /// Writes what follows from an event; true when the stream is complete.
    pub(crate) fn push(&mut self, index: usize, happened: &Event, out: &mut VecDeque<Bytes>) -> bool {
        let Some(choice) = self.choices.get_mut(index) else { return false };
        match happened {
            Event::Accepted => {}
            Event::Piece { text, logprobs } => {
                let parts = choice.splitter.push(text);
                self.parts(index, &parts, logprobs, out);
            }
            Event::Done { finish, usage } => {
                let parts = choice.splitter.finish();
                self.parts(index, &parts, &[], out);
                self.usage.add(usage.counted(index, self.reply.choices));
                self.close(index, *finish, out);
                self.open -= 1;
                return self.open == 0;
            }
            Event::Failed(error) => {
                self.fail(error, out);
                return true;
            }
        }
        false
    }

    fn parts(&mut self, index: usize, parts: &[Part], logprobs: &[TokenLogprob], out: &mut VecDeque<Bytes>) {
        let Some(choice) = self.choices.get_mut(index) else { return };
        let mut logprobs = logprobs;
        let mut values = Vec::new();
        for part in parts {
            match self.reply.kind {
                Kind::Message => {
                    let id = self.reply.call_id(index, choice.calls);
                    choice.blocks.part(part, &id, out);
                }
                Kind::Chat => {
                    values.extend(self.reply.deltas(index, part, choice.calls).into_iter().map(|delta| {
                        // The tokens behind it go with the first chunk.
                        Reply::delta(index, &delta, std::mem::take(&mut logprobs))
                    }))
                }
                Kind::Completion => {
                    if let Part::Text(text) = part {
                        let logprobs = std::mem::take(&mut logprobs);
                        values.push(Reply::text(index, text, logprobs, &mut choice.offset));
                    }
                }
            }
            choice.calls += usize::from(matches!(part, Part::Call(_)));
        }
        if !logprobs.is_empty() {
            values.extend(match self.reply.kind {
                Kind::Chat => Some(Reply::delta(index, &json!({}), logprobs)),
                Kind::Completion => Some(Reply::text(index, "", logprobs, &mut choice.offset)),
                Kind::Message => None,
            });
        }
        out.extend(values.iter().map(|value| self.chunk(value)));
    }

    /// The end of a choice, and after the last one that of the stream.
    fn close(&mut self, index: usize, finish: Finish, out: &mut VecDeque<Bytes>) {
        let called = self.choices.get(index).is_some_and(|choice| choice.calls > 0);
        if self.reply.kind == Kind::Message {
            if let Some(choice) = self.choices.get_mut(index) {
                choice.blocks.close(out);
            }
            anthropic::closing(&self.reply, finish, called, self.usage, out);
            return;
        }
        out.push_back(self.chunk(&self.reply.closing(index, finish, called)));
        if self.open == 1 {
            if self.include_usage {
                out.push_back(event(&self.reply.usage_chunk(self.usage)));
            }
            out.push_back(Bytes::from_static(DONE));
        }
    }

    /// An error after the status line has gone: in-band, as the clients read it.
    pub(crate) fn fail(&self, error: &ApiError, out: &mut VecDeque<Bytes>) {
        if self.reply.kind == Kind::Message {
            out.push_back(anthropic::failure(error));
            return;
        }
        out.push_back(event(&error.body()));
        out.push_back(Bytes::from_static(DONE));
    }

    fn chunk(&self, choice: &Value) -> Bytes {
        event(&self.reply.chunk(choice, self.include_usage))
    }
}

/// The body of a streamed answer. Dropping it (the client has left) drops the receiver, by which the engine knows.
pub(crate) struct Stream {
    events: mpsc::Receiver<(usize, Event)>,
    writer: Writer,
    ready: VecDeque<Bytes>,
    ping: Interval,
    complete: bool,
    record: Record,
}

impl Stream {
    /// A stream that begins with `first`, events that came before the status line was sent.
    pub(crate) fn new(
        events: mpsc::Receiver<(usize, Event)>,
        writer: Writer,
        first: Vec<(usize, Event)>,
        ping: Interval,
        record: Record,
    ) -> Self {
        let mut ready = VecDeque::new();
        writer.opening(&mut ready);
        let mut stream = Self { events, writer, ready, ping, complete: false, record };
        for (index, happened) in first {
            stream.take(index, &happened);
        }
        stream
    }

    fn take(&mut self, index: usize, happened: &Event) {
        self.complete = self.writer.push(index, happened, &mut self.ready);
        match happened {
            Event::Piece { .. } => self.record.first(),
            Event::Done { finish, .. } => self.record.log.finishes.push(*finish),
            Event::Failed(error) => self.record.failed(error),
            Event::Accepted => {}
        }
        if self.complete && self.record.log.error.is_none() {
            self.record.complete(self.writer.usage);
        }
    }

    fn poll(&mut self, cx: &mut Context) -> Poll<Option<Bytes>> {
        loop {
            if let Some(bytes) = self.ready.pop_front() {
                self.ping.reset();
                return Poll::Ready(Some(bytes));
            }
            if self.complete {
                return Poll::Ready(None);
            }
            match self.events.poll_recv(cx) {
                Poll::Ready(Some((index, happened))) => self.take(index, &happened),
                // The engine gave the sequence up without a word; a silent end would look like success.
                Poll::Ready(None) => {
                    self.take(0, &Event::Failed(ApiError::server("the answer was interrupted")));
                }
                Poll::Pending => {
                    return match self.ping.poll_tick(cx) {
                        Poll::Ready(_) => Poll::Ready(Some(self.writer.ping())),
                        Poll::Pending => Poll::Pending,
                    };
                }
            }
        }
    }
}

/// The body of a response.
pub(crate) enum Reader {
    /// All at once.
    Whole(Option<Bytes>),
    /// As it comes.
    Stream(Box<Stream>),
}

impl Body for Reader {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let bytes = match self.get_mut() {
            Self::Whole(bytes) => Poll::Ready(bytes.take()),
            Self::Stream(stream) => stream.poll(cx),
        };
        bytes.map(|bytes| bytes.map(|bytes| Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Whole(None))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |b| b.len() as u64)),
            Self::Stream(_) => SizeHint::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::split::Shape;

    fn written(kind: Kind, include_usage: bool, events: &[Event]) -> String {
        let (id, model) = ("chatcmpl-1".into(), "m".into());
        let reply = Reply {
            kind,
            id,
            created: 7,
            model,
            fingerprint: "graft".into(),
            generation: None,
            shape: Shape::default(),
            choices: 1,
            prompt_tokens: 3,
            stops: Vec::new(),
            seed: 1,
        };
        let mut writer = Writer::new(reply, 1, include_usage);
        let mut out = VecDeque::new();
        writer.opening(&mut out);
        for happened in events {
            writer.push(0, happened, &mut out);
        }
        out.iter().map(|b| String::from_utf8_lossy(b).into_owned()).collect()
    }

    fn piece(text: &str) -> Event {
        Event::Piece { text: text.into(), logprobs: Vec::new() }
    }

    const DONE_EVENT: Event =
        Event::Done { finish: Finish::Stop, usage: Usage { prompt: 3, completion: 2, cached: 0 } };

    #[test]
    fn chat_chunks_are_exact() {
        let frame = |rest: &str| {
            format!(
                "data: {{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":7,\"model\":\"m\",\
                 \"system_fingerprint\":\"graft\",\"choices\":{rest}}}\n\n"
            )
        };
        let expected = [
            frame(
                "[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"logprobs\":null,\"finish_reason\":null}]",
            ),
            frame(
                "[{\"index\":0,\"delta\":{\"content\":\"a\\nb\"},\"logprobs\":null,\"finish_reason\":null}]",
            ),
            frame("[{\"index\":0,\"delta\":{},\"logprobs\":null,\"finish_reason\":\"stop\"}]"),
            "data: [DONE]\n\n".to_owned(),
        ];
        assert_eq!(written(Kind::Chat, false, &[piece("a\nb"), DONE_EVENT]), expected.concat());
    }

    #[test]
    fn usage_comes_last_and_is_null_before() {
        let text = written(Kind::Completion, true, &[piece("x"), DONE_EVENT]);
        let events: Vec<&str> = text.split_terminator("\n\n").collect();
        assert_eq!(events.len(), 4);
        for event in &events[..2] {
            assert!(event.ends_with(",\"usage\":null}"), "{event}");
        }
        assert!(events[2].contains(
            "\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":2,\"total_tokens\":5,"
        ));
        assert_eq!(events[3], "data: [DONE]");
    }

    #[test]
    fn an_error_comes_in_band() {
        let text = written(Kind::Chat, false, &[piece("x"), Event::Failed(ApiError::server("no"))]);
        assert!(text.ends_with(
            "data: {\"error\":{\"message\":\"no\",\"type\":\"server_error\",\"param\":null,\"code\":\"internal_error\"}}\n\n\
             data: [DONE]\n\n"
        ));
    }
}
