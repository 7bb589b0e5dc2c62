//! Values that a loop's threads share and the first to need computes.

use crate::team::Patience;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

/// A value that the first thread to need it computes while others that do spin. Loops inside the
/// computation run on the thread that computes.
pub struct Early<T> {
    begun: AtomicBool,
    failed: AtomicBool,
    value: OnceLock<T>,
}

impl<T> Default for Early<T> {
    fn default() -> Self {
        let unset = || AtomicBool::new(false);
        Self { begun: unset(), failed: unset(), value: OnceLock::new() }
    }
}

impl<T> Early<T> {
    /// Returns the value, computed now if nobody has begun to.
    ///
    /// # Panics
    /// If `compute` panics, here or in another thread.
    pub fn get(&self, compute: impl FnOnce() -> T) -> &T {
        /// Tells those who wait that they do in vain.
        struct Fails<'a>(&'a AtomicBool);
        impl Drop for Fails<'_> {
            fn drop(&mut self) {
                self.0.store(true, SeqCst);
            }
        }
        if let Some(value) = self.value.get() {
            return value;
        }
        if !self.begun.swap(true, SeqCst) {
            let fails = Fails(&self.failed);
            let value = self.value.get_or_init(compute);
            std::mem::forget(fails);
            return value;
        }
        let mut patience = Patience::default();
        loop {
            if let Some(value) = self.value.get() {
                return value;
            }
            assert!(!self.failed.load(SeqCst), "what this waits for has failed");
            patience.wait();
        }
    }

    /// Returns the value, computed now if nobody needed it.
    pub fn into_inner(self, compute: impl FnOnce() -> T) -> T {
        self.value.into_inner().unwrap_or_else(compute)
    }
}
