//! The thread that owns the engine: it takes requests over a channel, lets the engine take step after
//! step while there is work, and hands what comes of each request to whoever asked.

use crate::app::Log;
use crate::metrics::Metrics;
use hydralora_run::engine::{Engine, EngineStats, Event, Finish, Refused, Request, RequestId};
use hydralora_runtime::Pool;
use std::collections::{BTreeSet, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Instant;
use tokio::sync::{mpsc as asynchronous, oneshot};

/// Makes an engine, at the start and after one has failed.
pub(crate) type MakeEngine = Box<dyn Fn() -> Engine<'static> + Send>;

/// What a request asks, and under which name its adapter is known.
pub(crate) struct Asked {
    pub(crate) request: Request<'static>,
    pub(crate) adapter: Option<String>,
}

enum Command {
    Submit(Vec<Asked>, oneshot::Sender<Result<Vec<Submitted>, Refused>>),
    Cancel(RequestId),
    Stop,
}

/// A request in the engine.
struct Submitted {
    id: RequestId,
    events: asynchronous::UnboundedReceiver<Event>,
}

/// What is known of the engine from outside.
#[derive(Clone, Debug, Default)]
pub(crate) struct Snapshot {
    pub(crate) stats: EngineStats,
    /// Names of adapters with requests that are being computed.
    pub(crate) running_adapters: BTreeSet<String>,
    /// Names of those with requests that wait.
    pub(crate) waiting_adapters: BTreeSet<String>,
}

/// The way to the engine's thread.
pub(crate) struct Worker {
    commands: mpsc::Sender<Command>,
    snapshot: Arc<Mutex<Snapshot>>,
    failed: Arc<AtomicBool>,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
}

/// A request that is being answered; dropped, it is cancelled.
pub(crate) struct Job {
    submitted: Submitted,
    commands: mpsc::Sender<Command>,
    ended: bool,
}

impl Job {
    /// What comes next of it; none once it has ended, or if the engine's thread is gone.
    pub(crate) async fn next(&mut self) -> Option<Event> {
        if self.ended {
            return None;
        }
        let event = self.submitted.events.recv().await;
        if matches!(event, None | Some(Event::Done { .. } | Event::Failed { .. })) {
            self.ended = true;
        }
        event
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        if !self.ended {
            // Without the thread there is nothing to cancel.
            let _ = self.commands.send(Command::Cancel(self.submitted.id));
        }
    }
}

impl Worker {
    /// Starts the thread, which computes on `pool`.
    ///
    /// # Errors
    /// If the system grants no thread.
    pub(crate) fn start(
        make: MakeEngine,
        pool: Pool,
        metrics: Arc<Metrics>,
        log: Log,
    ) -> std::io::Result<Self> {
        let (commands, received) = mpsc::channel();
        let snapshot = Arc::new(Mutex::new(Snapshot::default()));
        let failed = Arc::new(AtomicBool::new(false));
        let (shown, down) = (Arc::clone(&snapshot), Arc::clone(&failed));
        let run = move || {
            let told = log.clone();
            let ended = catch_unwind(AssertUnwindSafe(|| {
                pool.enter(|| Loop::new(make, shown, metrics, log).run(&received));
            }));
            if ended.is_err() {
                down.store(true, Ordering::SeqCst);
                told.line("the engine has ended by a fault and answers nothing more");
            }
        };
        let thread = std::thread::Builder::new().name("engine".to_owned()).spawn(run)?;
        Ok(Self { commands, snapshot, failed, thread: Mutex::new(Some(thread)) })
    }

    /// Hands requests to the engine, all of them or none.
    ///
    /// # Errors
    /// What the engine says of the first that it refuses; none if its thread is gone.
    pub(crate) async fn submit(&self, asked: Vec<Asked>) -> Result<Vec<Job>, Option<Refused>> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Submit(asked, reply)).map_err(|_| None)?;
        let submitted = answer.await.map_err(|_| None)??;
        let job = |submitted| Job { submitted, commands: self.commands.clone(), ended: false };
        Ok(submitted.into_iter().map(job).collect())
    }

    /// What is known of the engine.
    pub(crate) fn snapshot(&self) -> Snapshot {
        self.snapshot.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether the thread has ended by a fault.
    pub(crate) fn failed(&self) -> bool {
        self.failed.load(Ordering::SeqCst)
    }

    /// Ends the thread and waits for it.
    pub(crate) fn stop(&self) {
        let _ = self.commands.send(Command::Stop);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }
}

/// A request as the thread knows it.
struct Running {
    events: asynchronous::UnboundedSender<Event>,
    adapter: Option<String>,
    asked: Instant,
    /// When its last token came.
    last: Option<Instant>,
    started: bool,
}

struct Loop {
    make: MakeEngine,
    engine: Engine<'static>,
    running: HashMap<RequestId, Running>,
    snapshot: Arc<Mutex<Snapshot>>,
    metrics: Arc<Metrics>,
    log: Log,
}

impl Loop {
    fn new(
        make: MakeEngine,
        snapshot: Arc<Mutex<Snapshot>>,
        metrics: Arc<Metrics>,
        log: Log,
    ) -> Self {
        let engine = make();
        Self { make, engine, running: HashMap::new(), snapshot, metrics, log }
    }

    fn run(&mut self, commands: &mpsc::Receiver<Command>) {
        let mut events = Vec::new();
        loop {
            self.publish();
            // Without work it sleeps until there is some.
            if self.engine.is_idle() {
                match commands.recv() {
                    Ok(Command::Stop) | Err(_) => return,
                    Ok(command) => self.take(command),
                }
            }
            while let Ok(command) = commands.try_recv() {
                match command {
                    Command::Stop => return,
                    command => self.take(command),
                }
            }
            if self.engine.is_idle() {
                continue;
            }
            let step = catch_unwind(AssertUnwindSafe(|| self.engine.step(&mut events)));
            for event in events.drain(..) {
                self.hand_out(event);
            }
            if step.is_err() {
                self.fail("the engine came upon a fault of its own");
            }
        }
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Submit(asked, reply) => {
                let answer = self.submit(asked);
                if let Err(Ok(given_up)) = reply.send(answer) {
                    given_up.iter().for_each(|submitted| self.cancel(submitted.id));
                }
            }
            Command::Cancel(id) => self.cancel(id),
            Command::Stop => {}
        }
    }

    fn submit(&mut self, asked: Vec<Asked>) -> Result<Vec<Submitted>, Refused> {
        let mut all: Vec<Submitted> = Vec::with_capacity(asked.len());
        for Asked { request, adapter } in asked {
            let prompt_tokens = request.prompt.len();
            match self.engine.submit(request) {
                Ok(id) => {
                    let (sender, events) = asynchronous::unbounded_channel();
                    let asked = Instant::now();
                    let running =
                        Running { events: sender, adapter, asked, last: None, started: false };
                    self.running.insert(id, running);
                    self.metrics.prompt_tokens.inc_by(prompt_tokens as u64);
                    all.push(Submitted { id, events });
                }
                Err(refused) => {
                    all.iter().for_each(|submitted| self.cancel(submitted.id));
                    return Err(refused);
                }
            }
        }
        Ok(all)
    }

    fn cancel(&mut self, id: RequestId) {
        if self.running.remove(&id).is_some() {
            self.engine.cancel(id);
            self.metrics.ended("abort");
        }
    }

    fn hand_out(&mut self, event: Event) {
        let id = event.id();
        let Some(running) = self.running.get_mut(&id) else { return };
        running.started = true;
        let now = Instant::now();
        let mut ended = None;
        match &event {
            Event::Token { .. } => {
                self.metrics.generation_tokens.inc();
                match running.last.replace(now) {
                    None => self.metrics.first_token((now - running.asked).as_secs_f64()),
                    Some(last) => self.metrics.next_token((now - last).as_secs_f64()),
                }
            }
            Event::Done { finish, .. } => {
                self.metrics.whole((now - running.asked).as_secs_f64());
                ended = Some(match finish {
                    Finish::Stop => "stop",
                    Finish::Length => "length",
                    _ => "abort",
                });
            }
            Event::Failed { error, .. } => {
                let whose = match &running.adapter {
                    Some(name) => format!(" of the adapter {name}"),
                    None => String::new(),
                };
                self.log.line(&format!("answer {id}{whose} failed: {error}"));
                ended = Some("error");
            }
            Event::Prompt { .. } => {}
        }
        // Whoever asked may be gone; the command to cancel is on its way then.
        let _ = running.events.send(event);
        if let Some(reason) = ended {
            self.metrics.ended(reason);
            self.running.remove(&id);
        }
    }

    /// Gives up all requests and begins with a new engine: what the old one holds is not to be trusted.
    fn fail(&mut self, error: &str) {
        let count = self.running.len();
        self.log.line(&format!("{error}; it begins anew, and gave up {count} answers"));
        for (id, running) in self.running.drain() {
            self.metrics.ended("error");
            let _ = running.events.send(Event::Failed { id, error: error.to_owned() });
        }
        self.metrics.engine_failures.inc();
        self.engine = (self.make)();
    }

    fn publish(&self) {
        let of = |started: bool| {
            let all = self.running.values().filter(move |running| running.started == started);
            all.filter_map(|running| running.adapter.clone()).collect()
        };
        let now = Snapshot {
            stats: self.engine.stats(),
            running_adapters: of(true),
            waiting_adapters: of(false),
        };
        *self.snapshot.lock().unwrap_or_else(PoisonError::into_inner) = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hydralora_kernels::DType;
    use hydralora_model::{Decoder, ModelSource};
    use hydralora_run::engine::{Constraint, EngineOptions};
    use std::path::Path;

    /// Goes wrong at the first token.
    struct Broken {
        by_fault: bool,
    }

    impl Constraint for Broken {
        fn allow(&mut self, _: &mut [u64]) -> Result<(), String> {
            assert!(!self.by_fault, "a fault on purpose");
            Err("no token\ncan follow".to_owned())
        }

        fn accept(&mut self, _: u32) -> Result<(), String> {
            Ok(())
        }

        fn is_done(&self) -> bool {
            false
        }
    }

    #[test]
    fn failures_are_told_in_a_line_each_and_others_are_answered() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
        let source =
            ModelSource::open(&folder.join("../model/tests/fixtures/stories260K")).unwrap();
        let decoder = Arc::new(Decoder::load(&source.config, &source.weights, DType::F32).unwrap());
        let tokenizer = Arc::new(source.tokenizer.clone());
        let make = move || {
            Engine::new(Arc::clone(&decoder), Arc::clone(&tokenizer), EngineOptions::default())
        };
        let lines = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&lines);
        let log = Log::new(move |line| kept.lock().unwrap().push(line.to_owned()));
        let metrics = Arc::new(Metrics::new("stories"));
        let worker = Worker::start(Box::new(make), Pool::current(), metrics, log).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        // The last event of a request.
        let last = |constraint: Option<Broken>, adapter: Option<&str>| {
            let constraint = constraint.map(|broken| Box::new(broken) as Box<dyn Constraint>);
            let request = Request { constraint, ..Request::new(vec![1, 5], 3) };
            let asked = vec![Asked { request, adapter: adapter.map(str::to_owned) }];
            runtime.block_on(async {
                let mut job = worker.submit(asked).await.unwrap().pop().unwrap();
                let mut last = None;
                while let Some(event) = job.next().await {
                    last = Some(event);
                }
                last.unwrap()
            })
        };
        let fails = |event| assert!(matches!(event, Event::Failed { .. }), "{event:?}");
        let answers = || assert!(matches!(last(None, None), Event::Done { .. }));
        answers();
        fails(last(Some(Broken { by_fault: false }), Some("law")));
        fails(last(Some(Broken { by_fault: true }), None));
        answers();
        worker.stop();
        let lines = lines.lock().unwrap();
        assert_eq!(lines[0], "answer 1 of the adapter law failed: no token; can follow");
        assert!(lines[1].starts_with("the engine came upon a fault"), "{lines:?}");
        assert!(lines[1].ends_with("gave up 1 answers") && lines.len() == 2, "{lines:?}");
    }
}
