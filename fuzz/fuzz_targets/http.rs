//! The server, over a socket: a byte that chooses an address and a body for it, or bytes as they are in
//! place of a request. Whatever comes is answered, refused in words, or given up for its time.
#![no_main]

use hydralora_data::ChatTemplate;
use hydralora_fuzz::{STORIES, repository};
use hydralora_kernels::DType;
use hydralora_model::{Decoder, ModelSource};
use hydralora_peft::io;
use hydralora_run::ends;
use hydralora_run::engine::EngineOptions;
use hydralora_serve::{AdapterLimits, Log, Model, OpenedAdapter, Options, Server};
use libfuzzer_sys::fuzz_target;
use std::net::SocketAddr;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

#[allow(dead_code, reason = "tests use the rest")]
#[path = "../../crates/serve/tests/it/client.rs"]
mod client;

const TEMPLATE: &str = "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}\
    {% for m in messages %}{{ m.role }}: {{ m.content }}{{ m.tool_calls }}\n{% endfor %}\
    {% if false %}<tool_call></tool_call>{% endif %}";

static SERVER: LazyLock<(Server, SocketAddr)> = LazyLock::new(|| {
    let options = Options {
        model: "stories".to_owned(),
        request_time: Duration::from_millis(20),
        header_time: Duration::from_millis(500),
        adapters: AdapterLimits {
            root: Some(repository("crates/cli/tests/fixtures/interop")),
            ..AdapterLimits::default()
        },
        log: Log::new(|line| assert!(!line.contains("fault"), "{line}")),
        ..Options::default()
    };
    let server = Server::bind(options, "127.0.0.1", 0).expect("a free port");
    let engine = EngineOptions { max_waiting: 4, ..EngineOptions::default() };
    server.ready(model(), engine, &[]).expect("a server");
    let address = server.address();
    (server, address)
});

fn model() -> Model {
    let source = ModelSource::open(&STORIES).expect("the model of the tests");
    let decoder = Decoder::load(&source.config, &source.weights, DType::F32).expect("a decoder");
    let template = ChatTemplate::from_source("fuzzed", TEMPLATE).expect("a template");
    let end_ids = ends::end_ids(&source.tokenizer, Some(&template), &[], &[]).expect("ends");
    let (of_adapters, ends) = (template.clone(), end_ids.clone());
    Model {
        root: "stories260K".to_owned(),
        fingerprint: source.identity.fingerprint.clone(),
        decoder: Arc::new(decoder),
        tokenizer: Arc::new(source.tokenizer.clone()),
        template: Some(template),
        end_ids,
        added: Vec::new(),
        open_adapter: Box::new(move |folder, _| {
            let loaded = io::load(folder, &source.config, DType::F32);
            let tuned = loaded.map_err(|error| error.to_string())?.tuned;
            Ok(OpenedAdapter { tuned, template: Some(of_adapters.clone()), end_ids: ends.clone() })
        }),
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((&kind, rest)) = input.split_first() else { return };
    let server = SERVER.1;
    match client::ADDRESSES.get(usize::from(kind)) {
        Some(path) => {
            client::stands(server, path, rest);
        }
        None => client::stands_raw(server, rest),
    }
});
