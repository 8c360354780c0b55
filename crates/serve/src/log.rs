//! What the server tells its caller about each request. The library itself prints nothing, and no prompt is told.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::{Finish, Usage};

/// Something worth a line in a log.
#[derive(Debug, Clone)]
pub enum LogEvent {
    /// A request ended, however it did.
    Request(RequestLog),
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
    /// HTTP status; 499 where the client left before there was one.
    pub status: u16,
    /// The error's code and the field that is to blame, where it was one; nothing of what the client wrote.
    pub error: Option<String>,
    /// How its answers ended, of those that did.
    pub finishes: Vec<Finish>,
    /// The client left before the answer was complete.
    pub canceled: bool,
    /// Tokens, as far as they were counted when it ended.
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
}

impl Record {
    pub(crate) fn new(id: String, method: String, path: String, sink: LogSink) -> Self {
        let log = RequestLog {
            id,
            method,
            path,
            route: "none",
            model: None,
            status: 499,
            error: None,
            finishes: Vec::new(),
            canceled: true,
            usage: Usage::ZERO,
            first: None,
            total: Duration::ZERO,
        };
        Self { log, message: false, start: Instant::now(), sink }
    }

    /// Text has come.
    pub(crate) fn first(&mut self) {
        self.log.first.get_or_insert(self.start.elapsed());
    }

    /// The answer is complete.
    pub(crate) fn complete(&mut self, usage: Usage) {
        self.log.usage = usage;
        self.log.canceled = false;
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        self.log.total = self.start.elapsed();
        (self.sink)(LogEvent::Request(self.log.clone()));
    }
}
