//! From an HTTP request to a route and from an answer to an HTTP response: methods, bodies, headers.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::body::{Body as _, Incoming};
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use serde_json::{Map, Value, json};

use crate::answer::{Answer, count_tokens, generate};
use crate::auth::host_allowed;
use crate::lifecycle::{Change, authorize, change};
use crate::log::Record;
use crate::reply::Kind;
use crate::serve::State;
use crate::sse::Reader;
use crate::{ApiError, anthropic, metrics, openapi, page};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Where Anthropic's clients look for it.
const MESSAGE_REQUEST_ID: HeaderName = HeaderName::from_static("request-id");

/// What a path means. `/v1` in front of it may be left out, as with mlx-lm.
pub(crate) enum Route {
    Page,
    Health,
    Ready,
    Metrics,
    OpenApi,
    Models,
    Model(String),
    Generate(Kind),
    Adapters,
    Stats,
    Change(Change),
    CountTokens,
}

impl Route {
    pub(crate) fn of(path: &str) -> Option<Self> {
        if path == "/" {
            return Some(Self::Page);
        }
        let path = path.strip_prefix("/v1").filter(|rest| rest.starts_with('/')).unwrap_or(path);
        match path {
            "/health" => Some(Self::Health),
            "/ready" => Some(Self::Ready),
            "/metrics" => Some(Self::Metrics),
            "/openapi.json" => Some(Self::OpenApi),
            "/models" | "/models/" => Some(Self::Models),
            "/chat/completions" => Some(Self::Generate(Kind::Chat)),
            "/completions" => Some(Self::Generate(Kind::Completion)),
            "/stats" => Some(Self::Stats),
            "/lora_adapters" => Some(Self::Adapters),
            "/load_lora_adapter" => Some(Self::Change(Change::Load)),
            "/unload_lora_adapter" => Some(Self::Change(Change::Unload)),
            "/messages" => Some(Self::Generate(Kind::Message)),
            "/messages/count_tokens" => Some(Self::CountTokens),
            _ => path.strip_prefix("/models/").map(|id| Self::Model(percent_decoded(id))),
        }
    }

    /// The path as documents write it, and the methods that it takes.
    pub(crate) fn describe(&self) -> (&'static str, &'static str) {
        const READ: &str = "GET, HEAD, OPTIONS";
        const WRITE: &str = "POST, OPTIONS";
        match self {
            Self::Page => ("/", READ),
            Self::Health => ("/health", READ),
            Self::Ready => ("/ready", READ),
            Self::Metrics => ("/metrics", READ),
            Self::OpenApi => ("/openapi.json", READ),
            Self::Models => ("/v1/models", READ),
            Self::Model(_) => ("/v1/models/{model}", READ),
            Self::Generate(Kind::Chat) => ("/v1/chat/completions", WRITE),
            Self::Generate(Kind::Completion) => ("/v1/completions", WRITE),
            Self::Generate(Kind::Message) => ("/v1/messages", WRITE),
            Self::CountTokens => ("/v1/messages/count_tokens", WRITE),
            Self::Adapters => ("/v1/lora_adapters", READ),
            Self::Stats => ("/v1/stats", READ),
            Self::Change(Change::Load) => ("/v1/load_lora_adapter", WRITE),
            Self::Change(Change::Unload) => ("/v1/unload_lora_adapter", WRITE),
        }
    }

    /// One of each.
    #[cfg(test)]
    pub(crate) fn all() -> Vec<Self> {
        let kinds = [Kind::Chat, Kind::Completion, Kind::Message].map(Self::Generate);
        let others = [Self::Page, Self::Health, Self::Ready, Self::Metrics, Self::OpenApi, Self::Models];
        let rest = [Self::Model("m".into()), Self::CountTokens, Self::Adapters, Self::Stats];
        let changes = [Change::Load, Change::Unload].map(Self::Change);
        kinds.into_iter().chain(others).chain(rest).chain(changes).collect()
    }

    /// Needs no key: it tells nothing and does nothing.
    fn is_public(&self) -> bool {
        matches!(self, Self::Page | Self::Health | Self::Ready)
    }

    /// Its errors have Anthropic's form.
    fn is_message(&self) -> bool {
        matches!(self, Self::Generate(Kind::Message) | Self::CountTokens)
    }
}

/// Answers one request; whatever is wrong with it becomes a response.
pub(crate) async fn handle(request: Request<Incoming>, state: Arc<State>) -> Response<Reader> {
    let id = request_id(request.headers()).unwrap_or_else(|| state.unique("req-"));
    let origin = allowed_origin(request.headers(), &state.config.allowed_origins);
    let (method, path) = (request.method().to_string(), request.uri().path().to_owned());
    let record = Record::new(id.clone(), method, path, state.log.clone());
    let mut response = route(request, &state, record).await;
    let headers = response.headers_mut();
    if let Ok(value) = HeaderValue::from_str(&id) {
        headers.insert(MESSAGE_REQUEST_ID, value.clone());
        headers.insert(REQUEST_ID, value);
    }
    if let Some(origin) = origin {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static("x-request-id"));
    }
    if !state.config.allowed_origins.is_empty() {
        headers.insert(header::VARY, HeaderValue::from_static("origin"));
    }
    response
}

async fn route(request: Request<Incoming>, state: &Arc<State>, mut record: Record) -> Response<Reader> {
    let found = Route::of(request.uri().path());
    let config = &state.config;
    record.message = found.as_ref().is_some_and(Route::is_message);
    let allowed = found.as_ref().map(|route| {
        let (path, allowed) = route.describe();
        record.log.route = path;
        allowed
    });
    if !host_allowed(request.headers(), state.addr, &config.api_keys, &config.allowed_hosts) {
        let message =
            "This server answers to names of this machine; start it with --allowed-hosts for others.";
        return failed(
            &ApiError { kind: "permission_error", ..ApiError::request(403, "host_not_allowed", message) },
            &mut record,
        );
    }
    let method = request.method().clone();
    if let (Some(allowed), &Method::OPTIONS) = (allowed, &method) {
        return preflight(request.headers(), allowed, &mut record);
    }
    let public = found.as_ref().is_some_and(Route::is_public);
    if !public && !config.api_keys.allow(request.headers()) {
        let mut response = failed(&ApiError::unauthorized(), &mut record);
        response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        return response;
    }
    let (Some(route), Some(allowed)) = (found, allowed) else {
        let message = format!("There is no {method} {}.", request.uri().path());
        return failed(&ApiError::request(404, "not_found", message), &mut record);
    };
    if !allowed.split(", ").any(|name| name == method.as_str()) {
        let message = format!("{method} is not allowed here; use {allowed}.");
        let mut response = failed(&ApiError::request(405, "method_not_allowed", message), &mut record);
        response.headers_mut().insert(header::ALLOW, HeaderValue::from_static(allowed));
        return response;
    }
    let done = match route {
        Route::Page => return page(&mut record),
        Route::Metrics => return text(metrics::CONTENT_TYPE, state.metrics.text(state), &mut record),
        Route::OpenApi => return text("application/json", openapi::DOCUMENT, &mut record),
        Route::Health => health(state),
        Route::Ready => state.available().map(|()| json!({"status": "ready"})),
        Route::Models => Ok(state.registry.list()),
        Route::Model(id) => state.registry.card(&id),
        Route::Adapters => Ok(state.registry.adapters()),
        Route::Stats => Ok(state.stats().body()),
        // The key first: what a stranger sends is not even read.
        Route::Change(asked) => match authorize(state, request.headers()) {
            Ok(()) => match read_object(request, state).await {
                Ok(body) => change(state, asked, &body).await,
                Err(error) => Err(error),
            },
            Err(error) => Err(error),
        },
        Route::Generate(kind) => return generation(request, state, kind, record).await,
        Route::CountTokens => match read_object(request, state).await {
            Ok(body) => count_tokens(state, body).await,
            Err(error) => Err(error),
        },
    };
    match done {
        Ok(value) => whole(StatusCode::OK, &value, &mut record),
        Err(error) => failed(&error, &mut record),
    }
}

/// Alive while the engine's thread runs; whether new work is taken is another question.
fn health(state: &State) -> Result<Value, ApiError> {
    if !state.engine.is_alive() {
        return Err(ApiError::unavailable("engine_dead", "The engine has ended; restart the server."));
    }
    Ok(json!({"status": "ok"}))
}

fn page(record: &mut Record) -> Response<Reader> {
    let mut response = text("text/html; charset=utf-8", page::PAGE, record);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(page::policy()));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

async fn generation(
    request: Request<Incoming>,
    state: &Arc<State>,
    kind: Kind,
    mut record: Record,
) -> Response<Reader> {
    let body = match read_object(request, state).await {
        Ok(body) => body,
        Err(error) => return failed(&error, &mut record),
    };
    match generate(state, kind, body, &mut record).await {
        Ok(Answer::Whole(value)) => whole(StatusCode::OK, &value, &mut record),
        Ok(Answer::Stream(start)) => {
            record.log.status = 200;
            let stream = start.stream(record, state.config.ping_interval);
            let mut response = Response::new(Reader::Stream(Box::new(stream)));
            let headers = response.headers_mut();
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
            headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
            headers.insert(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));
            response
        }
        Err(error) => failed(&error, &mut record),
    }
}

/// Reads a body that must be a JSON object, within the limits of size and time.
///
/// It is read to its end even if the request is refused later: only then does the HTTP library notice that a client
/// has left.
async fn read_object(request: Request<Incoming>, state: &State) -> Result<Map<String, Value>, ApiError> {
    let config = &state.config;
    let (parts, body) = request.into_parts();
    let limit = config.max_body_bytes;
    let too_large = || {
        ApiError::request(413, "request_body_too_large", format!("The body may have at most {limit} bytes."))
    };
    let length = parts.headers.get(header::CONTENT_LENGTH);
    if length.is_none() && !parts.headers.contains_key(header::TRANSFER_ENCODING) {
        return Err(ApiError::request(
            411,
            "length_required",
            "The request needs a body and its Content-Length.",
        ));
    }
    if body.size_hint().lower() > limit as u64 {
        return Err(too_large());
    }
    let kind = parts.headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    // Also what keeps a page of another site from posting here without asking: a form cannot have this type.
    if kind != "application/json" {
        let message = format!("Content-Type must be application/json, found {kind:?}.");
        return Err(ApiError::request(415, "invalid_content_type", message));
    }
    let bytes = read_all(body, limit, config.body_timeout).await.map_err(|problem| match problem {
        Problem::TooLarge => too_large(),
        Problem::TooSlow => ApiError::request(408, "request_timeout", "The body took too long to arrive."),
        Problem::Broken => ApiError::request(400, "invalid_body", "The body ended before it was complete."),
    })?;
    match serde_json::from_slice(&bytes) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(ApiError::request(400, "invalid_json", "The body must be a JSON object.")),
        Err(e) => Err(ApiError::request(400, "invalid_json", format!("The body is not JSON: {e}."))),
    }
}

enum Problem {
    TooLarge,
    TooSlow,
    Broken,
}

async fn read_all(body: Incoming, limit: usize, timeout: Duration) -> Result<Bytes, Problem> {
    match tokio::time::timeout(timeout, Limited::new(body, limit).collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(e)) if e.is::<LengthLimitError>() => Err(Problem::TooLarge),
        Ok(Err(_)) => Err(Problem::Broken),
        Err(_) => Err(Problem::TooSlow),
    }
}

fn preflight(asked: &HeaderMap, allowed: &'static str, record: &mut Record) -> Response<Reader> {
    let mut response = Response::new(Reader::Whole(None));
    *response.status_mut() = StatusCode::NO_CONTENT;
    let headers = response.headers_mut();
    headers.insert(header::ALLOW, HeaderValue::from_static(allowed));
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static(allowed));
    // Clients of OpenAI and Anthropic have a dozen of their own; what a browser may not read it does not send either.
    let names = HeaderValue::from_static("authorization, content-type, x-admin-key, x-api-key, x-request-id");
    let names = asked.get(header::ACCESS_CONTROL_REQUEST_HEADERS).cloned().unwrap_or(names);
    headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, names);
    headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
    record.log.status = 204;
    record.log.canceled = false;
    response
}

fn text(kind: &'static str, body: impl Into<Bytes>, record: &mut Record) -> Response<Reader> {
    record.log.status = 200;
    record.log.canceled = false;
    let mut response = Response::new(Reader::Whole(Some(body.into())));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

fn whole(status: StatusCode, value: &Value, record: &mut Record) -> Response<Reader> {
    let mut response = text("application/json", value.to_string(), record);
    record.log.status = status.as_u16();
    *response.status_mut() = status;
    response
}

fn failed(error: &ApiError, record: &mut Record) -> Response<Reader> {
    record.failed(error);
    let status = StatusCode::from_u16(error.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let body = if record.message {
        let mut body = anthropic::error_body(error);
        body["request_id"] = record.log.id.as_str().into();
        body
    } else {
        error.body()
    };
    let mut response = whole(status, &body, record);
    let headers = response.headers_mut();
    if matches!(error.status, 429 | 503) {
        headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    if error.status == 409 {
        // OpenAI's clients would send it again, as it is.
        headers.insert(HeaderName::from_static("x-should-retry"), HeaderValue::from_static("false"));
    }
    if error.status == 401 {
        headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    if matches!(error.status, 401 | 403 | 408 | 413) {
        // What is left of the body will not be read, so nothing can follow it.
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// The client's name for its request, if it is one that a log can hold.
fn request_id(headers: &HeaderMap) -> Option<String> {
    let id = headers.get(REQUEST_ID)?.to_str().ok()?;
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.:".contains(c);
    (!id.is_empty() && id.len() <= 128 && id.chars().all(plain)).then(|| id.to_owned())
}

/// What to answer a page of another origin: nothing, unless the origin (or `*`) was named.
fn allowed_origin(headers: &HeaderMap, allowed: &[String]) -> Option<HeaderValue> {
    let origin = headers.get(header::ORIGIN)?;
    if allowed.iter().any(|name| name == "*") {
        return Some(HeaderValue::from_static("*"));
    }
    allowed.iter().any(|name| name.as_bytes() == origin.as_bytes()).then(|| origin.clone())
}

/// `%2F` to `/`; what is not a valid escape stays as it is.
fn percent_decoded(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = text.get(at + 1..at + 3).filter(|hex| hex.bytes().all(|b| b.is_ascii_hexdigit()));
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) if bytes[at] == b'%' => {
                out.push(byte);
                at += 3;
            }
            _ => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_with_and_without_v1_mean_the_same() {
        for prefix in ["", "/v1"] {
            assert!(matches!(Route::of(&format!("{prefix}/health")), Some(Route::Health)));
            assert!(matches!(Route::of(&format!("{prefix}/models")), Some(Route::Models)));
            assert!(matches!(Route::of(&format!("{prefix}/messages")), Some(Route::Generate(Kind::Message))));
            assert!(matches!(
                Route::of(&format!("{prefix}/completions")),
                Some(Route::Generate(Kind::Completion))
            ));
            let Some(Route::Model(id)) = Route::of(&format!("{prefix}/models/org%2Fname%zz/%EA%B0%80"))
            else {
                panic!()
            };
            assert_eq!(id, "org/name%zz/가");
        }
        for path in ["/v1/", "/v1", "/v2/models", "/v1models", "/chat"] {
            assert!(Route::of(path).is_none(), "{path}");
        }
    }

    #[test]
    fn origins_are_compared_whole() {
        let mut headers = HeaderMap::new();
        headers.insert(header::ORIGIN, HeaderValue::from_static("http://localhost.evil.com"));
        assert!(allowed_origin(&headers, &[]).is_none());
        assert!(allowed_origin(&headers, &["http://localhost".into()]).is_none());
        assert_eq!(allowed_origin(&headers, &["*".into()]).unwrap(), "*");
    }
}
