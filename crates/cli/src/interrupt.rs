//! Being asked to stop: by Ctrl-C, by termination, or by the end of the program that started this one.

use std::io::Read;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// Time to end by oneself when whoever started the program is gone.
const GRACE: Duration = Duration::from_secs(60);

static FLAG: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// The flag that is set when the program is asked to stop. `notice` is said then; a second Ctrl-C ends the
/// program at once.
pub(crate) fn flag(notice: &'static str) -> Arc<AtomicBool> {
    static WATCHED: OnceLock<()> = OnceLock::new();
    let flag = FLAG.get_or_init(Arc::default).clone();
    WATCHED.get_or_init(|| {
        let set = flag.clone();
        let handler = move || {
            if set.swap(true, Ordering::SeqCst) {
                std::process::exit(130);
            }
            if !notice.is_empty() {
                eprintln!("{notice}");
            }
        };
        // Without a handler Ctrl-C ends the process, as it would anyway.
        let _ = ctrlc::set_handler(handler);
    });
    flag
}

/// Sets the flag when stdin ends: it is a pipe that a worker holds open as long as it lives.
pub(crate) fn watch_stdin() {
    let flag = FLAG.get_or_init(Arc::default).clone();
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        let mut stdin = std::io::stdin().lock();
        while stdin.read(&mut buffer).is_ok_and(|read| read > 0) {}
        flag.store(true, Ordering::SeqCst);
        std::thread::sleep(GRACE);
        std::process::exit(130);
    });
}
