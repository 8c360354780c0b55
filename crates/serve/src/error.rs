//! What can go wrong: a server that cannot start ([`Error`]), and a request that cannot be answered ([`ApiError`]).

use std::net::SocketAddr;

use serde_json::{Value, json};

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// A server that cannot start or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Another process listens there.
    #[error("{addr}: the port is in use; stop the program that listens there, or choose another with --port")]
    PortInUse {
        /// The address asked for.
        addr: SocketAddr,
    },
    /// The address cannot be listened on.
    #[error("{addr}: cannot listen: {source}")]
    Bind {
        /// The address asked for.
        addr: SocketAddr,
        /// The system's error.
        source: std::io::Error,
    },
    /// A model name stands for two things.
    #[error("model name {name:?}: {why}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        why: String,
    },
    /// A setting is outside its range.
    #[error("setting `{field}`: expected {expected}, found {found}")]
    Setting {
        /// The field.
        field: &'static str,
        /// What it may be.
        expected: &'static str,
        /// What it was.
        found: String,
    },
    /// Keys and values of not even two tokens fit in.
    #[error(
        "{given} bytes for keys and values hold no sequence: {least} is the least; give more with --kv-memory"
    )]
    Memory {
        /// Bytes given.
        given: usize,
        /// Bytes of the shortest sequence.
        least: usize,
    },
    /// The metrics could not be set up.
    #[error("metrics: {0}")]
    Metrics(String),
    /// The engine's thread could not be started, or ended while it loaded.
    #[error("the engine thread {0}")]
    Engine(String),
    /// The model could not go on with an answer.
    #[error("the model failed on an answer: {0}")]
    Answer(String),
    /// The model, its tokenizer or its chat template cannot be loaded, or asked this.
    #[error(transparent)]
    Model(#[from] graft_model::Error),
    /// An adapter cannot be served on this base.
    #[error("adapter {name:?}: {source}")]
    Adapter {
        /// The name it was to be served under.
        name: String,
        /// What is wrong.
        source: Box<graft_adapters::Error>,
    },
}

/// An answer that is an error: one envelope, always `{"error":{"message","type","param","code"}}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    /// HTTP status.
    pub status: u16,
    /// OpenAI's class of error (`invalid_request_error`, `rate_limit_error`, `server_error`, ...).
    pub kind: &'static str,
    /// What is wrong, in one sentence, without paths of this machine.
    pub message: String,
    /// The field of the request that is to blame.
    pub param: Option<String>,
    /// A stable word for programs.
    pub code: Option<&'static str>,
}

impl ApiError {
    /// 400: the field `param` has a value it may not have.
    pub fn invalid(param: &str, message: impl Into<String>) -> Self {
        Self {
            status: 400,
            kind: "invalid_request_error",
            message: message.into(),
            param: Some(param.to_owned()),
            code: Some("invalid_value"),
        }
    }

    /// 400: the field `param` means something that this server does not do; it is refused rather than ignored.
    pub fn unsupported(param: &str, message: impl Into<String>) -> Self {
        Self { code: Some("unsupported_value"), ..Self::invalid(param, message) }
    }

    /// An error of the request as a whole.
    pub fn request(status: u16, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind: "invalid_request_error", message: message.into(), param: None, code: Some(code) }
    }

    /// 401: no key, or none of those that are known; which of the two is not told.
    pub fn unauthorized() -> Self {
        Self {
            kind: "authentication_error",
            ..Self::request(
                401,
                "invalid_api_key",
                "A known API key is needed, as `Authorization: Bearer KEY` or `X-Api-Key: KEY`.",
            )
        }
    }

    /// 404: no base and no adapter has this name; the base never answers in its place.
    pub fn model_not_found(name: &str) -> Self {
        Self {
            status: 404,
            kind: "invalid_request_error",
            message: format!("The model `{name}` does not exist."),
            param: Some("model".into()),
            code: Some("model_not_found"),
        }
    }

    /// 400: the prompt does not fit.
    pub fn context_length(param: &str, tokens: usize, context: usize) -> Self {
        Self {
            code: Some("context_length_exceeded"),
            ..Self::invalid(
                param,
                format!(
                    "This model's context is {context} tokens, but the prompt has {tokens}; at least one must stay free \
                     for the answer. Please shorten the prompt."
                ),
            )
        }
    }

    /// 429: as many requests run and wait as may.
    pub fn queue_full(limit: usize) -> Self {
        Self {
            status: 429,
            kind: "rate_limit_error",
            message: format!("{limit} requests are running or waiting, which is the limit; try again soon."),
            param: None,
            code: Some("queue_full"),
        }
    }

    /// 503: the server is on its way out, or its engine has ended.
    pub fn unavailable(code: &'static str, message: impl Into<String>) -> Self {
        Self {
            status: 503,
            kind: "unavailable_error",
            message: message.into(),
            param: None,
            code: Some(code),
        }
    }

    /// 500: the engine failed on this request. The cause is logged, not told.
    pub fn server(message: impl Into<String>) -> Self {
        Self {
            status: 500,
            kind: "server_error",
            message: message.into(),
            param: None,
            code: Some("internal_error"),
        }
    }

    /// What a log says of it: its code and the field, not the message, which may hold what the client wrote.
    pub(crate) fn label(&self) -> String {
        let code = self.code.unwrap_or(self.kind);
        self.param.as_ref().map_or_else(|| code.to_owned(), |param| format!("{code} {param}"))
    }

    /// The envelope.
    pub fn body(&self) -> Value {
        json!({"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}})
    }
}
