//! Ctrl-C, termination and a closed terminal: the work at hand is ended and saved, not dropped.

use crate::ui::tell;
use std::io::Read;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, Once};
use std::time::{Duration, Instant};

/// A closing terminal sends more than one signal; only a later one is a person's second wish.
const TOGETHER: Duration = Duration::from_secs(1);

/// Time to end by oneself when whoever started the program is gone.
const GRACE: Duration = Duration::from_secs(60);

static FLAG: AtomicBool = AtomicBool::new(false);

/// A flag that is set from the first signal on, of which `message` is said. A second signal ends
/// the process at once. The first caller's message is the one that counts.
pub(crate) fn flag(message: &'static str) -> &'static AtomicBool {
    listen(Some(message))
}

/// The same for a process that has another beside it which says so.
pub(crate) fn quiet_flag() -> &'static AtomicBool {
    listen(None)
}

fn listen(message: Option<&'static str>) -> &'static AtomicBool {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let first: Mutex<Option<Instant>> = Mutex::new(None);
        let handler = move || {
            let Ok(mut first) = first.lock() else { return };
            match *first {
                None => {
                    *first = Some(Instant::now());
                    FLAG.store(true, Ordering::SeqCst);
                    if let Some(message) = message {
                        tell(message);
                    }
                }
                Some(at) if at.elapsed() < TOGETHER => {}
                Some(_) => std::process::exit(130),
            }
        };
        // Without a handler a signal ends the process, as it would anyway.
        let _ = ctrlc::set_handler(handler);
    });
    &FLAG
}

/// Sets the flag when stdin ends: it is a pipe that a worker holds open as long as it lives.
pub(crate) fn watch_stdin() {
    std::thread::spawn(|| {
        let mut buffer = [0; 64];
        let mut stdin = std::io::stdin().lock();
        while stdin.read(&mut buffer).is_ok_and(|read| read > 0) {}
        FLAG.store(true, Ordering::SeqCst);
        std::thread::sleep(GRACE);
        std::process::exit(130);
    });
}

/// What work that was told to stop before it had anything to keep ends with.
#[derive(Debug)]
pub(crate) struct Interrupted;

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("interrupted; nothing was kept")
    }
}

impl std::error::Error for Interrupted {}
