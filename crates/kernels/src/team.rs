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
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, OnceLock};

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
#[derive(Clone, Copy, Debug, Default)]
pub struct Stream([Piece; MOST_PIECES]);

/// Most pieces of a stream; what comes after them is not called for.
const MOST_PIECES: usize = 3;

/// Neighbouring memory of a stream.
#[derive(Clone, Copy, Debug, Default)]
struct Piece {
    /// An address that memory is called for from, and never read through.
    start: usize,
    bytes: usize,
    chunk_bytes: usize,
}

impl Piece {
    fn chunks(&self) -> usize {
        self.bytes.div_ceil(self.chunk_bytes.max(1))
    }
}

impl Stream {
    /// Pieces of memory, the bytes of each in chunks of so many, one after the other.
    pub(crate) fn new<'a>(pieces: impl IntoIterator<Item = (&'a [u8], usize)>) -> Self {
        let mut stream = Self::default();
        for (piece, (bytes, chunk_bytes)) in stream.0.iter_mut().zip(pieces) {
            *piece = Piece { start: bytes.as_ptr() as usize, bytes: bytes.len(), chunk_bytes };
        }
        stream
    }

    /// Whether it begins with `bytes`.
    fn begins_with(&self, bytes: &[u8]) -> bool {
        self.0[0].start == bytes.as_ptr() as usize
    }

    /// Addresses of what thread `own` of `threads` reads first, up to the end of a piece.
    fn run(&self, own: usize, threads: usize) -> Range<usize> {
        let all = self.0.iter().map(Piece::chunks).sum();
        let mut run = run_of(own, threads, all);
        for piece in &self.0 {
            let chunks = piece.chunks();
            if run.start < chunks {
                let at = |chunk: usize| piece.start + piece.bytes.min(chunk * piece.chunk_bytes);
                return at(run.start)..at(run.end);
            }
            run = run.start - chunks..run.end - chunks;
        }
        0..0
    }
}

/// A value that the first thread to need it computes while others that do wait with open eyes. The
/// computation must not itself share out work.
pub(crate) struct Early<T> {
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
    /// The value, computed now if nobody has begun to.
    ///
    /// # Panics
    /// If `compute` panics, here or in another thread.
    pub(crate) fn get(&self, compute: impl FnOnce() -> T) -> &T {
        /// Lets those who wait know that they do in vain.
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
        let mut waited = 0_u32;
        loop {
            if let Some(value) = self.value.get() {
                return value;
            }
            assert!(!self.failed.load(SeqCst), "what this waits for has failed");
            wait(&mut waited);
        }
    }

    /// The value, computed now if nobody needed it.
    pub(crate) fn into_inner(self, compute: impl FnOnce() -> T) -> T {
        self.value.into_inner().unwrap_or_else(compute)
    }
}

/// A moment of waiting; once in a while somebody else may have this processor.
fn wait(waited: &mut u32) {
    *waited = waited.wrapping_add(1);
    if waited.is_multiple_of(4096) { std::thread::yield_now() } else { std::hint::spin_loop() }
}

/// What a thread has still to call for of its run of a stream.
struct Ahead {
    stream: usize,
    addresses: Range<usize>,
}

impl Default for Ahead {
    fn default() -> Self {
        Self { stream: usize::MAX, addresses: 0..0 }
    }
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
        if ahead.stream != next {
            let run = self.streams.get(next).map_or(0..0, |s| s.run(own, self.taken.len()));
            let end = run.end.min(run.start + MOST);
            *ahead = Ahead { stream: next, addresses: run.start..end };
        }
        let from = ahead.addresses.start;
        if from < ahead.addresses.end {
            (0..STEP).step_by(simd::LINE_BYTES).for_each(|line| simd::fetch_at(from + line));
            ahead.addresses.start += STEP;
        }
    }

    /// Waits for loops and helps with them, as thread `own`, until the leader is done.
    fn serve(&self, own: usize) {
        let mut waited = 0_u32;
        let mut ahead = Ahead::default();
        while !self.over.load(SeqCst) {
            if self.epoch.load(SeqCst).is_multiple_of(2) {
                self.look_ahead(own, &mut ahead);
                wait(&mut waited);
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
        /// Chunks asked for at a time: asking ends with waiting for all memory called for before. The
        /// last ones are taken one by one, so that nobody waits long at the end.
        const MOST: usize = 4;
        let threads = self.taken.len();
        for thread in (own..threads).chain(0..own) {
            let run = run_of(thread, threads, count);
            loop {
                // Seeing that nothing is left costs less than asking for a chunk.
                let left = run.len().saturating_sub(self.taken[thread].load(SeqCst));
                if left == 0 {
                    break;
                }
                let many = (left / 3).clamp(1, MOST);
                let first = run.start + self.taken[thread].fetch_add(many, SeqCst);
                (first..(first + many).min(run.end)).for_each(body);
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

/// Says that the next loop reads the expected stream that begins with `bytes`.
pub(crate) fn reads(bytes: &[u8]) {
    LED.with_borrow(|team| {
        let Some(team) = team else { return };
        let next = team.next.load(Relaxed);
        let mut ahead = team.streams.iter().skip(next);
        if let Some(found) = ahead.position(|stream| stream.begins_with(bytes)) {
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
    fn a_value_needed_early_is_computed_once() {
        let computed = AtomicUsize::new(0);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(4).build().unwrap();
        pool.install(|| {
            together(Vec::new(), || {
                for round in 1..=50 {
                    let early = Early::default();
                    let mut seen = [0; 64];
                    chunks_mut(&mut seen, 1, |_, seen| {
                        seen[0] = *early.get(|| computed.fetch_add(1, SeqCst) + 1);
                    });
                    assert_eq!(seen, [round; 64]);
                    assert_eq!(early.into_inner(|| 0), round);
                }
            });
        });
        assert_eq!(Early::default().into_inner(|| 7), 7);
    }

    #[test]
    fn those_who_wait_learn_of_a_failure() {
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
            let early = Early::<usize>::default();
            pool.install(|| {
                together(Vec::new(), || {
                    chunks_mut(&mut [0; 64], 1, |_, seen| seen[0] = *early.get(|| panic!("none")));
                });
            });
        }));
        assert!(caught.is_err());
    }

    #[test]
    fn a_run_starts_in_the_piece_that_its_chunk_is_of() {
        let memory = [0_u8; 100];
        let at = memory.as_ptr() as usize;
        let stream = Stream::new([(&memory[..50], 10), (&memory[50..], 20)]);
        // Five chunks of ten bytes, three of twenty, the last of ten.
        assert_eq!(stream.run(0, 2), at..at + 40);
        assert_eq!(stream.run(1, 2), at + 40..at + 50);
        assert_eq!(stream.run(3, 4), at + 70..at + 100);
        assert_eq!(Stream::default().run(0, 2), 0..0);
    }

    #[test]
    fn what_is_read_next_follows_the_loops() {
        let memory = [0_u8; 100];
        let parts: Vec<&[u8]> = memory.chunks(20).collect();
        let streams = parts.iter().map(|part| Stream::new([(*part, 8)])).collect();
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
