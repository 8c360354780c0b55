//! What the server tells its caller about each request. The library itself prints nothing, and no prompt is told.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::{ApiError, Finish, Tally, Usage};

/// Something worth a line in a log.
#[derive(Debug, Clone)]
pub enum LogEvent {
    /// A request ended, however it did.
    Request(Box<RequestLog>),
    /// The engine failed on a sequence; the request was told less.
    Failure {
        /// What the model or the array library said.
        message: String,
    },
}

/// One request.
#[derive(Debug, Clone)]
pub struct RequestLog {
    /// `x-request-id`, the client's or ours.
    pub id: String,
    /// HTTP method.
    pub method: String,
    /// Path as sent.
    pub path: String,
    /// The route it took, which is one of a few.
    pub route: &'static str,
    /// The model it named, where one was found.
    pub model: Option<String>,
    /// The version of the adapter that answered; none for the base.
    pub generation: Option<String>,
    /// HTTP status; 499 where the client left before there was one.
    pub status: u16,
    /// The error's code and the field that is to blame, where it was one; nothing of what the client wrote.
    pub error: Option<String>,
    /// How its answers ended, of those that did.
    pub finishes: Vec<Finish>,
    /// The client left before the answer was complete.
    pub canceled: bool,
    /// Tokens. Of an answer that was not completed those that were taken until then, up to one pass before its end.
    pub usage: Usage,
    /// Until the first piece of text.
    pub first: Option<Duration>,
    /// Until the end.
    pub total: Duration,
}

/// Receives events; called from the server's threads, so it should not block.
pub type LogSink = Arc<dyn Fn(LogEvent) + Send + Sync>;

/// The record of a request that is running; it is sent when dropped, so that nothing ends unseen.
pub(crate) struct Record {
    pub(crate) log: RequestLog,
    /// Its errors have Anthropic's form.
    pub(crate) message: bool,
    start: Instant,
    sink: LogSink,
    /// What its sequences have taken so far, and how many of them a prompt has.
    tallies: Vec<Arc<Tally>>,
    choices: usize,
    /// The usage is known.
    counted: bool,
}

impl Record {
    pub(crate) fn new(id: String, method: String, path: String, sink: LogSink) -> Self {
        let log = RequestLog {
            id,
            method,
            path,
            route: "none",
            model: None,
            generation: None,
            status: 499,
            error: None,
            finishes: Vec::new(),
            canceled: true,
            usage: Usage::ZERO,
            first: None,
            total: Duration::ZERO,
        };
        let (tallies, start) = (Vec::new(), Instant::now());
        Self { log, message: false, start, sink, tallies, choices: 1, counted: false }
    }

    /// It will have `count` sequences, `choices` of each prompt.
    pub(crate) fn follow(&mut self, count: usize, choices: usize) {
        self.tallies = (0..count).map(|_| Arc::default()).collect();
        self.choices = choices;
    }

    /// One for each sequence.
    pub(crate) fn tallies(&self) -> &[Arc<Tally>] {
        &self.tallies
    }

    /// Text has come.
    pub(crate) fn first(&mut self) {
        self.log.first.get_or_insert(self.start.elapsed());
    }

    /// The answer is complete.
    pub(crate) fn complete(&mut self, usage: Usage) {
        self.log.usage = usage;
        self.log.canceled = false;
        self.counted = true;
    }

    /// An error ended it.
    pub(crate) fn failed(&mut self, error: &ApiError) {
        self.log.error = Some(error.label());
        self.log.canceled = false;
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        self.log.total = self.start.elapsed();
        if !self.counted {
            for (index, tally) in self.tallies.iter().enumerate() {
                self.log.usage.add(tally.usage().counted(index, self.choices));
            }
        }
        (self.sink)(LogEvent::Request(Box::new(self.log.clone())));
    }
}
