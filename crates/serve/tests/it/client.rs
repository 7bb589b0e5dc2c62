//! A client that says exactly what it is told, and what a server has to do with whatever it is sent.
//!
//! The fuzz target `http` uses this file as it is.

use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};

/// Where bodies are sent to.
pub(crate) const ADDRESSES: [&str; 7] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/tokenize",
    "/detokenize",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
];

/// Sends a body, which has to be answered, refused with an error that says why, or given up for its time;
/// the status.
///
/// # Panics
/// If it is not.
pub(crate) fn stands(server: SocketAddr, path: &str, body: &[u8]) -> u16 {
    let answer = ask(server, "POST", path, &[("content-type", "application/json")], body);
    let shown = || format!("{path} {}: {answer:?}", String::from_utf8_lossy(body));
    let is_stream = answer.header("content-type") == Some("text/event-stream");
    match answer.status {
        200 if is_stream => {
            assert!(!answer.body.contains("\"code\":\"internal\""), "{}", shown());
            assert!(answer.body.ends_with("\n\n"), "{}", shown());
        }
        200 => assert!(answer.json().is_object(), "{}", shown()),
        400..=499 | 504 => {
            let error = &answer.json()["error"];
            let told = error["message"].as_str().is_some_and(|message| !message.is_empty());
            let field = error["param"].is_string() || error["param"].is_null();
            assert!(told && field && error["type"].is_string(), "{}", shown());
        }
        _ => panic!("{}", shown()),
    }
    answer.status
}

/// Sends bytes as they are, and nothing more. If anything comes back it is an answer of HTTP, and no
/// fault of the server's own.
///
/// # Panics
/// If it is something else.
pub(crate) fn stands_raw(server: SocketAddr, bytes: &[u8]) {
    let mut stream = connect(server);
    // It may be closed before all is sent.
    let _ = stream.write_all(bytes).and_then(|()| stream.shutdown(Shutdown::Write));
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let text = String::from_utf8_lossy(&answer);
    let sent = String::from_utf8_lossy(bytes);
    assert!(text.is_empty() || text.starts_with("HTTP/1."), "{sent:?}: {text}");
    let head = text.lines().next().unwrap_or_default();
    assert!(!head.contains(" 500"), "{sent:?}: {text}");
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(known, _)| known == name);
        found.map(|(_, value)| value.as_str())
    }

    /// The pieces of a stream, without the last mark, which has to be there.
    pub(crate) fn pieces(&self) -> Vec<Value> {
        let mut all: Vec<&str> =
            self.body.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        assert_eq!(all.pop(), Some("[DONE]"), "{self:?}");
        all.into_iter().map(|piece| serde_json::from_str(piece).unwrap()).collect()
    }

    /// The fault it tells, of this status and field.
    pub(crate) fn fault(&self, status: u16, param: Option<&str>) -> String {
        assert_eq!(self.status, status, "{self:?}");
        let error = &self.json()["error"];
        assert_eq!(error["param"].as_str(), param, "{self:?}");
        assert!(error["type"].is_string(), "{self:?}");
        error["message"].as_str().unwrap().to_owned()
    }
}

/// A connection without a time limit: a busy machine may take long.
pub(crate) fn connect(address: SocketAddr) -> TcpStream {
    TcpStream::connect(address).unwrap()
}

/// Sends a request, without its answer.
pub(crate) fn send(
    stream: &mut TcpStream,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &(impl AsRef<[u8]> + ?Sized),
) {
    let headers: String =
        headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let (body, length) = (body.as_ref(), body.as_ref().len());
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n"
    );
    // The answer may come before all of a large body is read.
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
}

/// Reads an answer to its end.
pub(crate) fn receive(stream: TcpStream) -> Answer {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let status = line.split(' ').nth(1).unwrap_or_else(|| panic!("{line:?}")).parse().unwrap();
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        let Some((name, value)) = line.trim_end().split_once(": ") else { break };
        headers.push((name.to_lowercase(), value.to_owned()));
    }
    let mut bytes = Vec::new();
    let _ = reader.read_to_end(&mut bytes);
    let chunked = headers.iter().any(|(name, _)| name == "transfer-encoding");
    let body = if chunked { unchunked(&bytes) } else { bytes };
    Answer { status, headers, body: String::from_utf8(body).unwrap() }
}

fn unchunked(mut bytes: &[u8]) -> Vec<u8> {
    let mut whole = Vec::new();
    while let Some(at) = bytes.windows(2).position(|two| two == b"\r\n") {
        let length = std::str::from_utf8(&bytes[..at]).unwrap();
        let length = usize::from_str_radix(length, 16).unwrap();
        if length == 0 {
            break;
        }
        whole.extend(&bytes[at + 2..at + 2 + length]);
        bytes = &bytes[at + 4 + length..];
    }
    whole
}

pub(crate) fn ask(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &(impl AsRef<[u8]> + ?Sized),
) -> Answer {
    let mut stream = connect(address);
    send(&mut stream, method, path, headers, body);
    receive(stream)
}
