//! Panics of libraries that trust what they are given. Where a file makes one panic, the crate that called it makes an
//! error of that, and nobody is to see more than the error; a panic that reaches the end is told whole.

use std::backtrace::Backtrace;
use std::panic;
use std::sync::{Mutex, PoisonError};

/// What was not told yet.
static HELD: Mutex<Option<String>> = Mutex::new(None);

/// Holds the messages of panics in libraries back, for [`tell_held`]; all others are told at once.
pub(crate) fn hold_foreign() {
    let usual = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        let is_foreign = panic.location().is_some_and(|at| is_foreign(at.file()));
        if is_foreign {
            let told = format!("{panic}\n{}", Backtrace::capture());
            *HELD.lock().unwrap_or_else(PoisonError::into_inner) = Some(told);
        } else {
            usual(panic);
        }
    }));
}

/// Tells what was held back last, where it was not made an error of.
pub(crate) fn tell_held() {
    if let Some(told) = HELD.lock().unwrap_or_else(PoisonError::into_inner).take() {
        crate::ui::tell(told.trim_end());
    }
}

/// Whether a source file is of a library from a registry, or vendored.
fn is_foreign(file: &str) -> bool {
    file.contains("/registry/src/")
        || file.contains("\\registry\\src\\")
        || file.starts_with("vendor/")
}

#[cfg(test)]
mod tests {
    use super::is_foreign;

    #[test]
    fn libraries_are_told_from_our_own_files() {
        assert!(is_foreign("/home/a/.cargo/registry/src/index-0/tokenizers-0.23.2/src/lib.rs"));
        assert!(!is_foreign("crates/cli/src/main.rs"));
        assert!(!is_foreign(file!()));
    }
}
