//! Listening: connections, their time limits, and the end.

use crate::adapters::{Adapters, OpenAdapter};
use crate::app::{App, Options, router};
use crate::error::ApiError;
use crate::forms::Forms;
use crate::loaded::Loaded;
use crate::pieces::Pieces;
use crate::worker::Worker;
use hydralora_data::ChatTemplate;
use hydralora_model::{Decoder, Tokenizer};
use hydralora_run::engine::{Engine, EngineOptions};
use hydralora_runtime::Pool;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::runtime::Runtime;
use tokio::sync::{Semaphore, watch};
use tokio_io_timeout::TimeoutStream;

/// Threads that read requests and write answers; the engine has its own.
const HTTP_THREADS: usize = 2;
/// Most bytes of a request's head.
const HEAD_BYTES: usize = 32 << 10;
/// How long connections may take to close after the last answer.
const CLOSING: Duration = Duration::from_secs(5);

/// The base model to be served.
pub struct Model {
    /// Where it came from, as callers are told: no path.
    pub root: String,
    /// What tells it from others.
    pub fingerprint: String,
    /// The decoder.
    pub decoder: Arc<Decoder>,
    /// Its tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// Its chat template.
    pub template: Option<ChatTemplate>,
    /// The tokens at which its answers end.
    pub end_ids: Vec<u32>,
    /// Tokens that were added for adapters, of which the base alone knows nothing.
    pub added: Vec<u32>,
    /// How its adapters are opened.
    pub open_adapter: OpenAdapter,
}

/// A server that listens: at first it says that its model is being loaded.
pub struct Server {
    app: Arc<App>,
    runtime: Runtime,
    address: SocketAddr,
    end: watch::Sender<bool>,
    accepting: tokio::task::JoinHandle<()>,
}

impl Server {
    /// Listens at an address.
    ///
    /// # Errors
    /// If the address cannot be had, or the system grants no threads.
    pub fn bind(options: Options, host: &str, port: u16) -> std::io::Result<Self> {
        let listener = TcpListener::bind((host, port))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(HTTP_THREADS)
            .thread_name("http")
            .enable_all()
            .build()?;
        let app = App::new(options);
        let (end, ended) = watch::channel(false);
        let listener = {
            let _guard = runtime.enter();
            tokio::net::TcpListener::from_std(listener)?
        };
        let accepting = runtime.spawn(accept(listener, Arc::clone(&app), ended));
        Ok(Self { app, runtime, address, end, accepting })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers with `model` from now on, and loads the adapters `given` as name, folder and domain. The
    /// engine computes on the pool that the calling thread has entered.
    ///
    /// # Errors
    /// If an adapter cannot be loaded, or the system grants no thread.
    pub fn ready(
        &self,
        model: Model,
        engine: EngineOptions,
        given: &[(String, &Path, Option<&str>)],
    ) -> Result<(), String> {
        let options = &self.app.options;
        let Model { root, fingerprint, decoder, tokenizer, template, end_ids, added, open_adapter } =
            model;
        let adapters = Adapters::new(open_adapter, options.adapters.clone(), &options.model);
        for (name, folder, domain) in given {
            let loaded = adapters.load_given(name, folder, *domain);
            loaded.map_err(|error: ApiError| format!("--adapter {name}: {}", error.message()))?;
        }
        let config = decoder.config();
        let (context, vocabulary) = (config.context_length(), config.vocab_size);
        let max_waiting = engine.max_waiting;
        let (of_engine, words) = (Arc::clone(&decoder), Arc::clone(&tokenizer));
        let make = move || Engine::new(Arc::clone(&of_engine), Arc::clone(&words), engine.clone());
        let (metrics, log) = (Arc::clone(&self.app.metrics), options.log.clone());
        let worker = Worker::start(Box::new(make), Pool::current(), metrics, log)
            .map_err(|error| format!("the engine cannot be started: {error}"))?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let loaded = Loaded {
            name: options.model.clone(),
            root,
            fingerprint,
            created: now.map_or(0, |since| since.as_secs()),
            context,
            vocabulary,
            max_waiting,
            pieces: Pieces::of(&tokenizer, vocabulary),
            forms: Forms::new(&end_ids),
            tokenizer,
            template,
            end_ids: end_ids.into(),
            added: added.into(),
            adapters,
            worker,
        };
        self.app.ready(loaded);
        Ok(())
    }

    /// Ends: takes no more requests, lets those in work end within their time, then closes. False if
    /// some had to be cut off.
    pub fn drain(self) -> bool {
        let app = Arc::clone(&self.app);
        let whole = self.runtime.block_on(async {
            let whole = app.drain().await;
            let _ = self.end.send(true);
            let _ = tokio::time::timeout(CLOSING, self.accepting).await;
            whole
        });
        self.app.stop();
        self.runtime.shutdown_timeout(CLOSING);
        whole
    }
}

/// Takes connections until told to end, then waits for those that are open.
async fn accept(
    listener: tokio::net::TcpListener,
    app: Arc<App>,
    mut ended: watch::Receiver<bool>,
) {
    let places = Arc::new(Semaphore::new(app.options.max_connections));
    let graceful = GracefulShutdown::new();
    let routes = router(&app);
    loop {
        let place = tokio::select! {
            place = Arc::clone(&places).acquire_owned() => place,
            _ = ended.wait_for(|ended| *ended) => break,
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = ended.wait_for(|ended| *ended) => break,
        };
        let Ok((stream, _)) = accepted else {
            // As when there are no more file descriptors: others end meanwhile.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        // Pieces of an answer are small, and are not to wait for each other.
        let _ = stream.set_nodelay(true);
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(app.options.write_time));
        let service = TowerToHyperService::new(routes.clone());
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(app.options.header_time)
            .max_header_size(HEAD_BYTES)
            .max_buf_size(64 << 10)
            .serve_connection(TokioIo::new(Box::pin(stream)), service);
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            // A connection that breaks is its caller's business.
            let _ = connection.await;
            drop(place);
        });
    }
    drop(listener);
    graceful.shutdown().await;
}
