//! A client of one request: HTTP/1.1 by hand over loopback.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use serde_json::Value;

/// Status and body of `POST path` (`GET` without a body).
pub(crate) fn request(address: &str, path: &str, body: Option<&Value>) -> (u16, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let text = body.map(Value::to_string).unwrap_or_default();
    let method = if body.is_some() { "POST" } else { "GET" };
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n",
        text.len()
    );
    stream.write_all((head + &text).as_bytes()).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    if !head.to_ascii_lowercase().contains("transfer-encoding: chunked") {
        return (status, body.to_owned());
    }
    let (mut whole, mut rest) = (String::new(), body);
    while let Some((size, next)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        whole += &next[..size];
        rest = &next[size + 2..];
        if size == 0 {
            break;
        }
    }
    (status, whole)
}

/// The JSON of an answer with status 200.
#[track_caller]
pub(crate) fn json(address: &str, path: &str, body: Option<&Value>) -> Value {
    let (status, text) = request(address, path, body);
    assert_eq!(status, 200, "{text}");
    serde_json::from_str(&text).unwrap()
}

/// The text of a streamed chat answer, its framing checked.
#[track_caller]
pub(crate) fn streamed(address: &str, body: &Value) -> String {
    let (status, text) = request(address, "/v1/chat/completions", Some(body));
    assert_eq!(status, 200, "{text}");
    let mut events: Vec<&str> =
        text.split_terminator("\n\n").filter_map(|event| event.strip_prefix("data: ")).collect();
    assert_eq!(events.pop(), Some("[DONE]"), "{text}");
    let chunks = events.iter().map(|event| serde_json::from_str::<Value>(event).unwrap());
    chunks.filter_map(|c| Some(c["choices"][0]["delta"]["content"].as_str()?.to_owned())).collect()
}
