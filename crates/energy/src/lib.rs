//! What the machine's energy meters say of a stretch of work.
//!
//! A [`Meter`] reads the counters of the processor packages and their memory (RAPL, through the files of
//! Linux's powercap) and, where asked, those of NVIDIA's devices (NVML). A thread of its own looks at them
//! every so often, so that a counter that starts again from 0 between two looks is noticed. The counters
//! are the whole machine's: what other programs use in the meantime is counted with it.
//!
//! Every figure names its source, and where there is none the reason is said: see [`Reading`].
//!
//! ```
//! use hydralora_energy::{Meter, Options};
//!
//! let meter = Meter::start(&Options { watts: Some(65.0), ..Options::default() });
//! let start = meter.mark();
//! // … work …
//! let used = meter.since(&start);
//! assert_eq!(used.source.as_deref(), Some("estimate: 65 W x wall time"));
//! assert!(used.joules.is_some() && used.estimated);
//! ```

mod counter;
mod nvidia;
mod powercap;

use counter::Counters;
use std::path::PathBuf;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Where Linux shows the counters of the processor.
pub const POWERCAP: &str = "/sys/class/powercap";

/// How the source of a figure begins that nobody measured.
pub const ESTIMATE: &str = "estimate: ";

/// Time between two looks at the counters: the fastest start again after some minutes.
const EVERY: Duration = Duration::from_secs(1);

/// After so long a counter that works has moved.
const SURELY_MOVED: Duration = Duration::from_secs(1);

/// Which of NVIDIA's devices are read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Nvidia {
    /// None of them.
    #[default]
    No,
    /// All of them.
    All,
    /// The one at this address of the PCI bus, as `0000:3b:00.0`.
    At(String),
}

/// What a meter reads.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// The folder of the processor's counters.
    pub powercap: PathBuf,
    /// Devices whose counters are read too.
    pub nvidia: Nvidia,
    /// Reads no counter and takes this power, in watts, for granted.
    pub watts: Option<f64>,
    /// Time between two looks at the counters.
    pub every: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self { powercap: POWERCAP.into(), nvidia: Nvidia::No, watts: None, every: EVERY }
    }
}

/// The energy of a stretch of work.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reading {
    /// Joules; none where nothing could be read.
    pub joules: Option<f64>,
    /// What they come from, as `rapl:package-0+dram` or `estimate: 65 W x wall time`.
    pub source: Option<String>,
    /// Why there are none, or what is not counted.
    pub reason: Option<String>,
    /// Whether they are a guess and no measurement.
    pub estimated: bool,
    /// Seconds of the stretch.
    pub seconds: f64,
}

impl Reading {
    /// The reading of a stretch that nothing was read in.
    pub fn none(reason: impl Into<String>) -> Self {
        Self { reason: Some(reason.into()), ..Self::default() }
    }
}

/// The beginning of a stretch of work.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    at: Instant,
    /// Microjoules up to there; none where nothing could be read.
    microjoules: Option<u64>,
}

/// Reads the machine's energy meters until it is dropped.
pub struct Meter {
    reads: Reads,
    /// Told to end by being dropped.
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

enum Reads {
    /// This power.
    Watts(f64),
    Counters {
        counters: Arc<Mutex<Counters>>,
        source: String,
        missing: Option<String>,
    },
    Nothing(String),
}

fn lock(counters: &Mutex<Counters>) -> MutexGuard<'_, Counters> {
    // Nobody panics while holding it.
    counters.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Meter {
    /// Opens what `options` name and begins to read. What cannot be read is said by the readings.
    pub fn start(options: &Options) -> Self {
        let quiet = |reads| Self { reads, end: None, thread: None };
        if let Some(watts) = options.watts {
            return quiet(Reads::Watts(watts));
        }
        let (mut counters, mut sources, mut missing) = (Vec::new(), Vec::new(), Vec::new());
        match powercap::open(&options.powercap) {
            Ok((source, found)) => {
                sources.push(source);
                counters.extend(found);
            }
            Err(reason) => missing.push(format!("processor: {reason}")),
        }
        match nvidia::open(&options.nvidia) {
            Ok((source, found)) => {
                sources.extend(source);
                counters.extend(found);
            }
            Err(reason) => missing.push(format!("GPU: {reason}")),
        }
        let missing = (!missing.is_empty()).then(|| missing.join("; "));
        if counters.is_empty() {
            return quiet(Reads::Nothing(missing.unwrap_or_else(|| "no counter".to_owned())));
        }
        let counters = Arc::new(Mutex::new(Counters::new(counters)));
        let (end, ended) = channel::<()>();
        let (watched, every) = (Arc::clone(&counters), options.every);
        let watch = move || {
            while ended.recv_timeout(every) == Err(RecvTimeoutError::Timeout) {
                if lock(&watched).look().is_err() {
                    return;
                }
            }
        };
        match std::thread::Builder::new().name("energy".to_owned()).spawn(watch) {
            Ok(thread) => {
                let reads = Reads::Counters { counters, source: sources.join(" + "), missing };
                Self { reads, end: Some(end), thread: Some(thread) }
            }
            Err(error) => quiet(Reads::Nothing(format!("no thread to watch them: {error}"))),
        }
    }

    /// Begins a stretch of work.
    pub fn mark(&self) -> Mark {
        let microjoules = match &self.reads {
            Reads::Counters { counters, .. } => lock(counters).look().ok(),
            Reads::Watts(_) | Reads::Nothing(_) => None,
        };
        Mark { at: Instant::now(), microjoules }
    }

    /// What was used since `mark`, which is this meter's.
    pub fn since(&self, mark: &Mark) -> Reading {
        let found = match &self.reads {
            Reads::Counters { counters, .. } => Some(lock(counters).look()),
            Reads::Watts(_) | Reads::Nothing(_) => None,
        };
        let passed = mark.at.elapsed();
        let seconds = passed.as_secs_f64();
        let none = |reason: String| Reading { seconds, ..Reading::none(reason) };
        match (&self.reads, found) {
            (Reads::Counters { .. }, Some(Err(reason))) => none(reason),
            (Reads::Counters { source, missing, .. }, Some(Ok(now))) => {
                let used = mark.microjoules.map(|then| now - then);
                if used == Some(0) && passed >= SURELY_MOVED {
                    return none(format!("{source}: the counters stood still"));
                }
                Reading {
                    joules: used.map(|used| used as f64 / 1e6),
                    source: Some(source.clone()),
                    reason: missing.as_ref().map(|missing| format!("not counted: {missing}")),
                    estimated: false,
                    seconds,
                }
            }
            (Reads::Watts(watts), _) => Reading {
                joules: Some(watts * seconds),
                source: Some(format!("{ESTIMATE}{watts} W x wall time")),
                reason: None,
                estimated: true,
                seconds,
            },
            (Reads::Nothing(reason), _) => none(reason.clone()),
            (Reads::Counters { .. }, None) => none("nothing was read".to_owned()),
        }
    }

    /// Waits for `window` and gives the mean power of the machine in it, in watts; none, at once, where
    /// no counter is read.
    pub fn idle(&self, window: Duration) -> Option<f64> {
        if !matches!(self.reads, Reads::Counters { .. }) || window.is_zero() {
            return None;
        }
        let mark = self.mark();
        std::thread::sleep(window);
        let used = self.since(&mark);
        Some(used.joules? / used.seconds)
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            // It ends by itself; a panic of it was told by its own message.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests;
