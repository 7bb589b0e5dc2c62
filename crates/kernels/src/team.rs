//! Threads that stay awake through a run of short parallel loops.
//!
//! Decoding a token is hundreds of loops of some ten microseconds each, about as long as it takes to
//! wake a sleeping thread. Inside [`together`] the other threads of the pool wait for the next loop
//! with open eyes. `chunks_mut` gives every thread a run of neighbouring chunks, so that what one
//! calls for ahead of time in memory is what it reads next; who is done early helps the others, and who
//! finds nothing to do calls for the memory of its run in the next loop, if that is known. Outside
//! it falls back to the pool's own loops. Which thread computes a chunk does not change the result.

use crate::simd;
use rayon::prelude::*;
use std::cell::{RefCell, UnsafeCell};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst};

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
    /// For every thread but the leading one, whether it may be looking at `work`.
    inside: Vec<Alone<AtomicBool>>,
    over: AtomicBool,
    /// What the loops read, in the order they are expected.
    streams: Vec<Stream>,
    /// The first stream that no loop has begun to read: a hint, on which nothing depends.
    next: Alone<AtomicUsize>,
}

/// Memory that a loop reads once, chunk after chunk.
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    /// An address that memory is called for from, and never read through.
    start: usize,
    chunks: usize,
    chunk_bytes: usize,
}

impl Stream {
    /// Memory `bytes`, of which every chunk of the loop reads `chunk_bytes`.
    pub(crate) fn new(bytes: &[u8], chunk_bytes: usize) -> Self {
        let chunks = bytes.len().div_ceil(chunk_bytes.max(1));
        Self { start: bytes.as_ptr() as usize, chunks, chunk_bytes }
    }
}

/// How far a thread has called for the memory of its run of a stream.
#[derive(Default)]
struct Ahead {
    stream: usize,
    bytes: usize,
}

/// The chunks, of `count`, that thread `own` of `threads` takes first.
fn run_of(own: usize, threads: usize, count: usize) -> Range<usize> {
    own * count / threads..(own + 1) * count / threads
}

// SAFETY: `work` is written by the leading thread alone, and only when the epoch is even and nobody
// is `inside`; the others read it only after they have said that they are inside and then seen an odd
// epoch. Sequential consistency of flags and epoch makes these two conditions exclude each other.
unsafe impl Sync for Team {}
// SAFETY: as above; the raw pointer in `work` is only followed while the borrow it came from lives.
unsafe impl Send for Team {}

thread_local! {
    static LED: RefCell<Option<Arc<Team>>> = const { RefCell::new(None) };
}

/// Takes a thread out of the loop it is inside of, also when the body panics.
struct Leave<'a>(&'a AtomicBool);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.0.store(false, SeqCst);
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
    /// Calls for a little more of what thread `own` reads next, if that is known.
    #[inline(always)]
    fn look_ahead(&self, own: usize, ahead: &mut Ahead) {
        /// Bytes called for at a time: waiting must not take long to end.
        const STEP: usize = 4 * simd::LINE_BYTES;
        /// As much as memory delivers while a loop ends and the next one begins, and well below what the
        /// second cache holds.
        const MOST: usize = 1 << 16;
        let next = self.next.load(Relaxed);
        let Some(stream) = self.streams.get(next) else { return };
        if ahead.stream != next {
            *ahead = Ahead { stream: next, bytes: 0 };
        }
        let run = run_of(own, self.taken.len(), stream.chunks);
        if ahead.bytes < MOST.min(run.len() * stream.chunk_bytes) {
            let start = stream.start + run.start * stream.chunk_bytes + ahead.bytes;
            (0..STEP).step_by(simd::LINE_BYTES).for_each(|line| simd::fetch_at(start + line));
            ahead.bytes += STEP;
        }
    }

    /// Waits for loops and helps with them, as thread `own`, until the leader is done.
    fn serve(&self, own: usize) {
        let mut waited = 0_u32;
        let mut ahead = Ahead::default();
        while !self.over.load(SeqCst) {
            if self.epoch.load(SeqCst).is_multiple_of(2) {
                waited = waited.wrapping_add(1);
                self.look_ahead(own, &mut ahead);
                // Somebody else may need this processor.
                if waited.is_multiple_of(4096) {
                    std::thread::yield_now()
                } else {
                    std::hint::spin_loop()
                }
                continue;
            }
            let inside = &self.inside[own - 1];
            inside.store(true, SeqCst);
            let _leave = Leave(inside);
            if self.epoch.load(SeqCst) % 2 == 1 {
                // SAFETY: this thread says that it is inside and the epoch is odd, so the leader
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
            let run = run_of(thread, threads, count);
            // Seeing that nothing is left costs less than asking for a chunk.
            while self.taken[thread].load(SeqCst) < run.len() {
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
                let mut ahead = Ahead::default();
                while self.0.inside.iter().any(|inside| inside.load(SeqCst)) {
                    self.0.look_ahead(0, &mut ahead);
                    std::hint::spin_loop();
                }
            }
        }
        // SAFETY: only the lifetime changes. The pointer is followed only by threads that are
        // inside during this loop, and `Close` waits for them before the borrow ends.
        let body_pointer: Body = unsafe { std::mem::transmute(std::ptr::from_ref(body)) };
        // SAFETY: no loop is open and nobody was inside when the last one closed; a thread that
        // enters now sees the even epoch and does not look.
        unsafe { *self.work.get() = Some((body_pointer, count)) };
        self.taken.iter().for_each(|taken| taken.store(0, SeqCst));
        self.epoch.fetch_add(1, SeqCst);
        let _close = Close(self);
        self.take_chunks(0, body, count);
    }
}

/// Runs `body` on this thread with the pool's other threads awake for its `chunks_mut`. The loops are
/// expected to read `streams` in this order; some may be left out, others come between.
pub fn together<R>(streams: Vec<Stream>, body: impl FnOnce() -> R) -> R {
    let threads = rayon::current_num_threads();
    if threads == 1 || LED.with_borrow(Option::is_some) {
        return body();
    }
    let team = Arc::new(Team {
        epoch: Alone(AtomicUsize::new(0)),
        work: UnsafeCell::new(None),
        taken: (0..threads).map(|_| Alone(AtomicUsize::new(0))).collect(),
        inside: (1..threads).map(|_| Alone(AtomicBool::new(false))).collect(),
        over: AtomicBool::new(false),
        streams,
        next: Alone(AtomicUsize::new(0)),
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

/// Says that the next loop reads the expected stream of `bytes`.
pub(crate) fn reads(bytes: &[u8]) {
    LED.with_borrow(|team| {
        let Some(team) = team else { return };
        let next = team.next.load(Relaxed);
        let start = bytes.as_ptr() as usize;
        let mut ahead = team.streams.iter().skip(next);
        if let Some(found) = ahead.position(|stream| stream.start == start) {
            team.next.store(next + found + 1, Relaxed);
        }
    });
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
                together(Vec::new(), || {
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
                together(Vec::new(), || {
                    chunks_mut(&mut [0; 64], 1, |index, _| assert!(index != 40, "chunk forty"));
                });
            });
        }));
        assert!(caught.is_err());
    }

    #[test]
    fn what_is_read_next_follows_the_loops() {
        let memory = [0_u8; 100];
        let parts: Vec<&[u8]> = memory.chunks(20).collect();
        let streams = parts.iter().map(|part| Stream::new(part, 8)).collect();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        let next = || LED.with_borrow(|team| team.as_ref().unwrap().next.load(Relaxed));
        pool.install(|| {
            together(streams, || {
                assert_eq!(next(), 0);
                // One that is skipped, one that is not expected, and one that is past.
                let seen = [(parts[1], 2), (&memory[3..5], 2), (parts[0], 2), (parts[4], 5)];
                for (part, expected) in seen {
                    reads(part);
                    fill(100);
                    assert_eq!(next(), expected);
                }
            });
        });
        reads(parts[0]);
    }
}
