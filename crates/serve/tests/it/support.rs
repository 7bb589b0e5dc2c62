//! A server with a small model, and a client that says exactly what it is told.

use hydralora_data::ChatTemplate;
use hydralora_kernels::DType;
use hydralora_model::{Decoder, ModelSource};
use hydralora_peft::{io, methods::METHODS};
use hydralora_run::ends;
use hydralora_run::engine::EngineOptions;
use hydralora_serve::{Model, OpenedAdapter, Options, Server};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// A template that knows tools and reasoning.
pub(crate) const TEMPLATE: &str = "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}\
    {% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}\
    {% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}\
    {% if false %}<tool_call></tool_call>{% endif %}";

/// The trained 260K-parameter model.
pub(crate) fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/fixtures/stories260K")
}

/// A server that ends with it.
pub(crate) struct Running {
    pub(crate) address: SocketAddr,
    server: Option<Server>,
}

impl Running {
    pub(crate) fn new(options: Options) -> Self {
        Self::with(options, EngineOptions::default())
    }

    pub(crate) fn with(options: Options, engine: EngineOptions) -> Self {
        let server = Server::bind(options, "127.0.0.1", 0).unwrap();
        server.ready(model(), engine, &[]).unwrap();
        Self { address: server.address(), server: Some(server) }
    }

    pub(crate) fn drain(&mut self) -> bool {
        self.server.take().unwrap().drain()
    }

    pub(crate) fn get(&self, path: &str) -> Answer {
        ask(self.address, "GET", path, &[], "")
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Answer {
        self.send(path, &body.to_string())
    }

    pub(crate) fn send(&self, path: &str, body: &str) -> Answer {
        ask(self.address, "POST", path, &[("content-type", "application/json")], body)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            server.drain();
        }
    }
}

/// The options of most tests.
pub(crate) fn options() -> Options {
    Options {
        model: "stories".to_owned(),
        // No machine is so busy that an answer takes as long.
        drain_time: Duration::from_secs(24 * 60 * 60),
        ..Options::default()
    }
}

fn model() -> Model {
    let source = ModelSource::open(&folder()).unwrap();
    let decoder = Decoder::load(&source.config, &source.weights, DType::F32).unwrap();
    let template = ChatTemplate::from_source("test", TEMPLATE).unwrap();
    let end_ids = ends::end_ids(&source.tokenizer, Some(&template), &[], &[]).unwrap();
    let tokenizer = Arc::new(source.tokenizer.clone());
    let (of_adapters, ends) = (template.clone(), end_ids.clone());
    Model {
        root: "stories260K".to_owned(),
        fingerprint: source.identity.fingerprint.clone(),
        decoder: Arc::new(decoder),
        tokenizer,
        template: Some(template),
        end_ids,
        open_adapter: Box::new(move |folder, _| {
            let loaded = io::load(folder, &source.config, DType::F32);
            let loaded = loaded.map_err(|error| error.to_string())?;
            let template = Some(of_adapters.clone());
            Ok(OpenedAdapter { tuned: loaded.tuned, template, end_ids: ends.clone() })
        }),
    }
}

/// Writes an adapter of the method that changes something.
pub(crate) fn adapter(folder: &Path, method: &str, seed: u64) {
    let source = ModelSource::open(&self::folder()).unwrap();
    let decoder = Decoder::load(&source.config, &source.weights, DType::F32).unwrap();
    let known = METHODS.iter().find(|known| known.name() == method).unwrap();
    let section = json!({"rank": 4, "targets": "ffn"});
    let options = known.read_recipe(section.as_object().unwrap());
    let options = options.unwrap_or_else(|faults| panic!("{faults:?}"));
    let sites = options.select(&decoder.sites()).unwrap();
    let mut tuned = options.build(&sites, DType::F32, seed);
    for (number, trainable) in tuned.trainables_mut().into_iter().enumerate() {
        let shape = trainable.parameter.value().shape().to_vec();
        let count: usize = shape.iter().product();
        let value = |at: usize| {
            let mixed = (at as u64 + 1) * (number as u64 + 3) * (seed + 7) % 1009;
            (mixed as f32 / 1009.0 - 0.5) * 0.4
        };
        let values: Vec<f32> = (0..count).map(value).collect();
        trainable.parameter.set(hydralora_kernels::Tensor::new(values, &shape));
    }
    let metadata = io::Metadata { base_model: "stories260K".to_owned(), ..Default::default() };
    io::save(folder, tuned.as_ref(), &metadata, &decoder.sites()).unwrap();
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
    body: &str,
) {
    let headers: String =
        headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n"
    );
    // The answer may come before all of a large body is read.
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body.as_bytes()));
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
    body: &str,
) -> Answer {
    let mut stream = connect(address);
    send(&mut stream, method, path, headers, body);
    receive(stream)
}
