//! Threads on which templates are read and rendered.
//!
//! They have a stack for whatever depth the bounds on source and values leave, which the caller's
//! may not have, and somebody waits for them: should a template find work that no count covers, the
//! caller gets an error after [`MOST_TIME`] instead of waiting for ever. The thread is then left to
//! itself. It holds nothing that anybody waits for, only its own values and shared ones that nobody
//! changes, so it can do no harm beyond the processor's time that it takes, until the program ends.
//! That time depends on the machine is why it is the last wall: what renders at all takes a small
//! part of it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

/// Bytes of a thread's stack; pages that are not touched cost nothing.
const STACK: usize = 16 << 20;
/// How long a caller waits.
const MOST_TIME: Duration = Duration::from_secs(60);

type Job = Box<dyn FnOnce() + Send>;

/// Threads that have nothing to do.
static IDLE: Mutex<Vec<Sender<Job>>> = Mutex::new(Vec::new());

/// Why there is no result.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Failed {
    /// It took more than the time there is, in seconds.
    Late(u64),
    /// The engine panicked, or no thread could be made.
    Broken,
}

impl std::fmt::Display for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Late(seconds) => {
                write!(f, "takes more than {seconds} s; expected loops that end")
            }
            Self::Broken => f.write_str("the template engine failed on it"),
        }
    }
}

/// What `work` returns, computed on such a thread.
pub(super) fn run<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Failed> {
    run_within(MOST_TIME, work)
}

fn run_within<T: Send + 'static>(
    most: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Failed> {
    let idle = IDLE.lock().ok().and_then(|mut idle| idle.pop());
    let worker = match idle {
        Some(worker) => worker,
        None => start()?,
    };
    let (answer, result) = channel();
    let job: Job = Box::new(move || {
        // Nobody is left to hear it where the caller has gone.
        let _ = answer.send(catch_unwind(AssertUnwindSafe(work)));
    });
    worker.send(job).map_err(|_| Failed::Broken)?;
    match result.recv_timeout(most) {
        Ok(result) => {
            if let Ok(mut idle) = IDLE.lock() {
                idle.push(worker);
            }
            result.map_err(|_| Failed::Broken)
        }
        Err(RecvTimeoutError::Timeout) => Err(Failed::Late(most.as_secs())),
        Err(RecvTimeoutError::Disconnected) => Err(Failed::Broken),
    }
}

fn start() -> Result<Sender<Job>, Failed> {
    let (sender, jobs): (Sender<Job>, Receiver<Job>) = channel();
    let work = move || {
        for job in jobs {
            job();
        }
    };
    let thread = std::thread::Builder::new().name("template".to_owned()).stack_size(STACK);
    thread.spawn(work).map(|_| sender).map_err(|_| Failed::Broken)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_that_does_not_end_is_left() {
        assert_eq!(run(|| 1 + 1), Ok(2));
        let most = Duration::from_millis(20);
        let endless = || loop {
            std::thread::sleep(Duration::from_millis(5));
        };
        assert_eq!(run_within::<()>(most, endless), Err(Failed::Late(0)));
        assert_eq!(run::<()>(|| panic!("a panic of the engine")), Err(Failed::Broken));
        assert_eq!(run(|| 2 + 2), Ok(4));
    }

    #[test]
    fn the_stack_is_deep() {
        fn deep(levels: usize) -> usize {
            let room = std::hint::black_box([levels; 64]);
            if levels == 0 { room[0] } else { deep(levels - 1) + room[63].min(1) }
        }
        assert_eq!(run(|| deep(10_000)), Ok(10_000));
    }
}
