//! A server with a small model.

pub(crate) use crate::client::{Answer, ask, connect, receive, send};

use hydralora_data::ChatTemplate;
use hydralora_kernels::DType;
use hydralora_model::{Decoder, ModelSource};
use hydralora_peft::{io, methods::METHODS};
use hydralora_run::ends;
use hydralora_run::engine::EngineOptions;
use hydralora_serve::{Model, OpenedAdapter, Options, Server};
use serde_json::{Value, json};
use std::net::SocketAddr;
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
        added: Vec::new(),
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

/// Numbers that look drawn, the same on every run.
pub(crate) struct Drawn(pub(crate) u64);

impl Drawn {
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}
