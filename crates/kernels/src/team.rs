//! Threads that stay awake through a run of short parallel loops.
//!
//! Decoding a token is hundreds of loops of some ten microseconds each, about as long as it takes to
//! wake a sleeping thread. Inside [`together`] the other threads of the pool wait for the next loop
//! with open eyes. `chunks_mut` gives every thread a run of neighbouring chunks, so that what one
//! calls for ahead of time in memory is what it reads next; who is done early helps the others. Outside
//! it falls back to the pool's own loops. Which thread computes a chunk does not change the result.

use rayon::prelude::*;
use std::cell::{RefCell, UnsafeCell};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

/// A loop's body, its borrow forgotten for as long as the loop is open.
type Body = *const (dyn Fn(usize) + Sync);

/// Alone in its cache lines, so that threads do not wait for each other's counts.
#[repr(align(128))]
struct Alone<T>(T);

impl<T> std::ops::Deref for Alone<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0
    }
}

struct Team {
    /// Odd while a loop is open.
    epoch: Alone<AtomicUsize>,
    /// Body and number of chunks; written only while no loop is open and nobody is inside one.
    work: UnsafeCell<Option<(Body, usize)>>,
    /// For every thread, how many chunks of its run have been taken.
    taken: Vec<Alone<AtomicUsize>>,
    /// Threads that may be looking at `work`.
    inside: Alone<AtomicUsize>,
    over: AtomicBool,
}

// SAFETY: `work` is written by the leading thread alone, and only when the epoch is even and
// `inside` is zero; the others read it only after they have raised `inside` and then seen an odd
// epoch. Sequential consistency of both counters makes these two conditions exclude each other.
unsafe impl Sync for Team {}
// SAFETY: as above; the raw pointer in `work` is only followed while the borrow it came from lives.
unsafe impl Send for Team {}

thread_local! {
    static LED: RefCell<Option<Arc<Team>>> = const { RefCell::new(None) };
}

/// Takes a thread out of the loop it is inside of, also when the body panics.
struct Leave<'a>(&'a AtomicUsize);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

/// Ends a team's work when its leader is done, also by a panic.
struct Over<'a>(&'a Team);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.over.store(true, SeqCst);
        LED.set(None);
    }
}

impl Team {
    /// Waits for loops and helps with them, as thread `own`, until the leader is done.
    fn serve(&self, own: usize) {
        let mut waited = 0_u32;
        while !self.over.load(SeqCst) {
            if self.epoch.load(SeqCst).is_multiple_of(2) {
                waited = waited.wrapping_add(1);
                // Somebody else may need this processor.
                if waited.is_multiple_of(4096) {
                    std::thread::yield_now()
                } else {
                    std::hint::spin_loop()
                }
                continue;
            }
            self.inside.fetch_add(1, SeqCst);
            let _leave = Leave(&self.inside);
            if self.epoch.load(SeqCst) % 2 == 1 {
                // SAFETY: this thread is counted in `inside` and the epoch is odd, so the leader
                // waits for it before it lets the body go or writes `work` again.
                if let Some((body, count)) = unsafe { *self.work.get() } {
                    // SAFETY: likewise.
                    self.take_chunks(own, unsafe { &*body }, count);
                }
            }
        }
    }

    /// Does the chunks of thread `own`'s run, then what is left of the others'.
    fn take_chunks(&self, own: usize, body: &(dyn Fn(usize) + Sync), count: usize) {
        let threads = self.taken.len();
        for thread in (own..threads).chain(0..own) {
            let run = thread * count / threads..(thread + 1) * count / threads;
            loop {
                let index = run.start + self.taken[thread].fetch_add(1, SeqCst);
                if index >= run.end {
                    break;
                }
                body(index);
            }
        }
    }

    /// Runs `body` for every index below `count`.
    fn run(&self, count: usize, body: &(dyn Fn(usize) + Sync)) {
        /// Closes the loop and waits until everyone has left it, also when the body panics here.
        struct Close<'a>(&'a Team);
        impl Drop for Close<'_> {
            fn drop(&mut self) {
                self.0.epoch.fetch_add(1, SeqCst);
                while self.0.inside.load(SeqCst) > 0 {
                    std::hint::spin_loop();
                }
            }
        }
        // SAFETY: only the lifetime changes. The pointer is followed only by threads counted in
        // `inside` during this loop, and `Close` waits for them before the borrow ends.
        let body_pointer: Body = unsafe { std::mem::transmute(std::ptr::from_ref(body)) };
        // SAFETY: no loop is open and `inside` was seen zero when the last one closed; a thread
        // that raises it now sees the even epoch and does not look.
        unsafe { *self.work.get() = Some((body_pointer, count)) };
        self.taken.iter().for_each(|taken| taken.store(0, SeqCst));
        self.epoch.fetch_add(1, SeqCst);
        let _close = Close(self);
        self.take_chunks(0, body, count);
    }
}

/// Runs `body` on this thread with the pool's other threads awake for its `chunks_mut`.
pub fn together<R>(body: impl FnOnce() -> R) -> R {
    let threads = rayon::current_num_threads();
    if threads == 1 || LED.with_borrow(Option::is_some) {
        return body();
    }
    let team = Arc::new(Team {
        epoch: Alone(AtomicUsize::new(0)),
        work: UnsafeCell::new(None),
        taken: (0..threads).map(|_| Alone(AtomicUsize::new(0))).collect(),
        inside: Alone(AtomicUsize::new(0)),
        over: AtomicBool::new(false),
    });
    rayon::in_place_scope(|scope| {
        let team = &team;
        for own in 1..threads {
            scope.spawn(move |_| team.serve(own));
        }
        LED.set(Some(team.clone()));
        let _over = Over(team);
        body()
    })
}

/// A pointer that may go to other threads.
#[derive(Clone, Copy)]
struct Shared<T>(*mut T);
// SAFETY: `chunks_mut` lets every thread reach another part of what it points to.
unsafe impl<T: Send> Sync for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Shared<T> {}

impl<T> Shared<T> {
    fn at(&self, index: usize) -> *mut T {
        self.0.wrapping_add(index)
    }
}

/// Runs `body(i, chunk)` for the chunks of `size` elements of `data`, shared out among threads.
pub(crate) fn chunks_mut<T: Send>(
    data: &mut [T],
    size: usize,
    body: impl Fn(usize, &mut [T]) + Sync + Send,
) {
    let Some(team) = LED.with_borrow(Clone::clone) else {
        data.par_chunks_mut(size).enumerate().for_each(|(index, chunk)| body(index, chunk));
        return;
    };
    let (len, start) = (data.len(), Shared(data.as_mut_ptr()));
    team.run(len.div_ceil(size), &|index| {
        let first = index * size;
        // SAFETY: chunks of different indices do not overlap, every index is given out once, and
        // `data` stays borrowed until the loop is over.
        let chunk =
            unsafe { std::slice::from_raw_parts_mut(start.at(first), size.min(len - first)) };
        body(index, chunk);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(len: usize) -> Vec<usize> {
        let mut data = vec![0; len];
        chunks_mut(&mut data, 7, |index, chunk| {
            for (at, value) in chunk.iter_mut().enumerate() {
                *value += index * 7 + at + 1;
            }
        });
        data
    }

    #[test]
    fn every_chunk_is_done_once() {
        for threads in [1, 2, 4] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                together(|| {
                    for len in (0..200).chain([5000]) {
                        assert_eq!(fill(len), (1..=len).collect::<Vec<_>>());
                    }
                });
                assert_eq!(fill(100), (1..=100).collect::<Vec<_>>());
            });
        }
    }

    #[test]
    fn a_panic_in_a_chunk_reaches_the_caller() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pool.install(|| {
                together(|| {
                    chunks_mut(&mut [0; 64], 1, |index, _| assert!(index != 40, "chunk forty"));
                });
            });
        }));
        assert!(caught.is_err());
    }
}
