//! The little of HTTP that asking `graft server` takes: one request a connection, the answer read as it comes.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// The server sends a sign of life every 15 seconds, so this long a silence means that it is stuck.
const SILENCE: Duration = Duration::from_secs(120);

/// A request whose answer is wanted whole: its status and its body.
pub(crate) fn request(
    address: &str,
    line: &str,
    headers: &[(&str, &str)],
    body: Option<&Value>,
) -> Result<(u16, Value)> {
    let mut socket =
        TcpStream::connect(address).with_context(|| format!("no server answers at {address}"))?;
    socket.set_read_timeout(Some(SILENCE))?;
    let body = body.map(Value::to_string).unwrap_or_default();
    let mut head = format!("{line} HTTP/1.0\r\nHost: {address}\r\nContent-Length: {}\r\n", body.len());
    for (name, value) in headers.iter().chain(&[("Content-Type", "application/json")]) {
        head += &format!("{name}: {value}\r\n");
    }
    socket.write_all((head + "\r\n" + &body).as_bytes())?;
    let mut reply = String::new();
    socket.read_to_string(&mut reply)?;
    let (head, body) = reply.split_once("\r\n\r\n").with_context(|| format!("{line}: {reply:?}"))?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    let status = status.with_context(|| format!("{line}: {head:?}"))?;
    Ok((status, serde_json::from_str(body).with_context(|| format!("{line}: {body:?}"))?))
}

/// Posts a streaming request and joins the text of its events. `go_on` is shown the text so far; when it says no the
/// connection is closed, which ends the server's work on the answer too.
pub(crate) fn stream(
    address: &str,
    path: &str,
    body: &Value,
    go_on: impl Fn(&str) -> bool,
) -> Result<String> {
    let mut text = String::new();
    let ended = events(address, path, body, |event| {
        let choice = &event["choices"][0];
        text += choice["delta"]["content"].as_str().or_else(|| choice["text"].as_str()).unwrap_or_default();
        go_on(&text)
    });
    ended.with_context(|| format!("{path}: the answer stopped after {text:?}"))?;
    Ok(text)
}

/// Posts a streaming request and shows its events to `go_on`, until they are done or it says no.
pub(crate) fn events(
    address: &str,
    path: &str,
    body: &Value,
    mut go_on: impl FnMut(&Value) -> bool,
) -> Result<()> {
    let mut socket =
        TcpStream::connect(address).with_context(|| format!("no server answers at {address}"))?;
    socket.set_read_timeout(Some(SILENCE))?;
    let body = body.to_string();
    // Version 1.0 ends the body with the connection, so it has no chunks to take apart.
    let head = format!(
        "POST {path} HTTP/1.0\r\nHost: {address}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    socket.write_all((head + &body).as_bytes())?;
    let mut reader = BufReader::new(socket);
    let mut status = String::new();
    reader.read_line(&mut status)?;
    for line in reader.by_ref().lines() {
        if line?.is_empty() {
            break;
        }
    }
    if status.split(' ').nth(1) != Some("200") {
        let mut reply = String::new();
        reader.read_to_string(&mut reply)?;
        bail!("{path}: {} {}", status.trim(), reply.trim());
    }
    for line in reader.lines() {
        let line = line?;
        let Some(event) = line.strip_prefix("data: ") else { continue };
        if event == "[DONE]" {
            return Ok(());
        }
        let event: Value = serde_json::from_str(event).with_context(|| format!("{path}: {event}"))?;
        ensure!(event["error"].is_null(), "{path}: {}", event["error"]);
        if !go_on(&event) {
            return Ok(());
        }
    }
    bail!("{path}: the answer broke off")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    /// What `stream` makes of a reply, and what it had sent.
    fn of(reply: &'static str, go_on: fn(&str) -> bool) -> (Result<String>, String) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = std::thread::spawn(move || {
            let (mut socket, _) = listener.accept().unwrap();
            // All of the request first: a server that closes early takes its reply back.
            let mut request = String::new();
            while !request.ends_with('}') {
                let mut part = vec![0; 4096];
                let length = socket.read(&mut part).unwrap();
                request += std::str::from_utf8(&part[..length]).unwrap();
            }
            socket.write_all(reply.as_bytes()).unwrap();
            request
        });
        let result = stream(&address, "/v1/completions", &serde_json::json!({"prompt": "é"}), go_on);
        (result, server.join().unwrap())
    }

    const REPLY: &str = "HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n: ping\n\n\
        data: {\"choices\":[{\"delta\":{\"role\":\"assistant\"}}]}\n\n\
        data: {\"choices\":[{\"delta\":{\"content\":\"a \"}}]}\n\n\
        data: {\"choices\":[{\"delta\":{\"content\":\"b\"}}]}\n\ndata: {\"choices\":[]}\n\n";

    #[test]
    fn events_are_joined_until_they_are_done_or_enough() {
        let (text, request) = of(&format!("{REPLY}data: [DONE]\n\n").leak()[..], |_| true);
        assert_eq!(text.unwrap(), "a b");
        assert!(request.ends_with("Content-Length: 15\r\n\r\n{\"prompt\":\"é\"}"), "{request}");
        assert_eq!(of(REPLY, |text| text != "a ").0.unwrap(), "a ");
    }

    #[test]
    fn what_goes_wrong_is_told() {
        let message = |reply| format!("{:#}", of(reply, |_| true).0.unwrap_err());
        assert!(message(REPLY).contains("after \"a b\": /v1/completions: the answer broke off"));
        assert!(message("HTTP/1.0 404 Not Found\r\n\r\n{\"error\":\"no model x\"}").contains("no model x"));
        let failed = "HTTP/1.0 200 OK\r\n\r\ndata: {\"error\":{\"message\":\"out of memory\"}}\n\n";
        assert!(message(failed).contains("out of memory"));
    }
}
