//! What is read next: hints that threads without work act on.
//!
//! Before a leader opens a loop it [`announce`](crate::announce)s what the loop after that one will read.
//! A thread that waits then prefetches the first part of the run that will be its own. Addresses are only
//! ever prefetched, never read through, so a stale or torn hint costs a little time and nothing else.

use crate::team::run_of;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Bytes of a cache line.
pub const LINE_BYTES: usize = 64;

/// Most pieces of a stream; those past them are not prefetched.
const MOST_PIECES: usize = 8;

/// Memory that a loop reads once, chunk after chunk.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stream {
    pieces: [Piece; MOST_PIECES],
    len: usize,
}

/// Neighbouring memory of a stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Piece {
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
    /// Pieces of memory, one after the other: bytes, and how many of them the loop reads per index.
    pub fn new<'a>(pieces: impl IntoIterator<Item = (&'a [u8], usize)>) -> Self {
        let mut stream = Self::default();
        for (piece, (bytes, chunk_bytes)) in stream.pieces.iter_mut().zip(pieces) {
            *piece = Piece { start: bytes.as_ptr() as usize, bytes: bytes.len(), chunk_bytes };
            stream.len += 1;
        }
        stream
    }

    /// The stream that reads `self` and then `next`.
    pub fn then(mut self, next: &Self) -> Self {
        for piece in &next.pieces[..next.len] {
            if self.len < MOST_PIECES {
                self.pieces[self.len] = *piece;
                self.len += 1;
            }
        }
        self
    }
}

/// Addresses of what thread `own` of `threads` reads first, up to the end of a piece. Arithmetic wraps:
/// the numbers may be of two streams.
fn run(pieces: &[Piece], own: usize, threads: usize) -> Range<usize> {
    let all = pieces.iter().fold(0_usize, |all, piece| all.saturating_add(piece.chunks()));
    let mut run = run_of(own, threads, all.min(1 << 32));
    for piece in pieces {
        let chunks = piece.chunks();
        if run.start < chunks {
            let within = |chunk: usize| piece.bytes.min(chunk.saturating_mul(piece.chunk_bytes));
            let at = |chunk: usize| piece.start.saturating_add(within(chunk));
            return at(run.start)..at(run.end);
        }
        run = run.start - chunks..run.end - chunks;
    }
    0..0
}

/// The latest announced stream, as numbers that may be torn.
#[derive(Default)]
pub(crate) struct Announced {
    /// Changes with every announcement; zero before the first.
    version: AtomicUsize,
    len: AtomicUsize,
    pieces: [[AtomicUsize; 3]; MOST_PIECES],
}

/// What a thread has still to prefetch of its run.
#[derive(Default)]
pub(crate) struct Lookahead {
    version: usize,
    addresses: Range<usize>,
}

impl Announced {
    /// Replaces what waiting threads prefetch.
    pub(crate) fn set(&self, stream: &Stream) {
        for (to, from) in self.pieces.iter().zip(&stream.pieces[..stream.len]) {
            to[0].store(from.start, Relaxed);
            to[1].store(from.bytes, Relaxed);
            to[2].store(from.chunk_bytes, Relaxed);
        }
        self.len.store(stream.len, Relaxed);
        self.version.fetch_add(1, Relaxed);
    }

    fn pieces(&self) -> ([Piece; MOST_PIECES], usize) {
        let mut pieces = [Piece::default(); MOST_PIECES];
        let len = self.len.load(Relaxed).min(MOST_PIECES);
        for (to, from) in pieces[..len].iter_mut().zip(&self.pieces) {
            let [start, bytes, chunk_bytes] = from.each_ref().map(|number| number.load(Relaxed));
            *to = Piece { start, bytes, chunk_bytes };
        }
        (pieces, len)
    }

    /// Prefetches a little more of what thread `own` of `threads` reads next, if that is known.
    #[inline]
    pub(crate) fn look_ahead(&self, own: usize, threads: usize, ahead: &mut Lookahead) {
        /// Bytes prefetched at a time: waiting must not take long to end.
        const STEP: usize = 4 * LINE_BYTES;
        /// As much as memory delivers between two loops, and well below what the second cache holds.
        const MOST: usize = 1 << 16;
        let version = self.version.load(Relaxed);
        if ahead.version != version {
            let (pieces, len) = self.pieces();
            let run = run(&pieces[..len], own, threads);
            let end = run.end.min(run.start.saturating_add(MOST));
            *ahead = Lookahead { version, addresses: run.start..end };
        }
        let from = ahead.addresses.start;
        if from < ahead.addresses.end {
            for line in (0..STEP).step_by(LINE_BYTES) {
                prefetch_second(std::ptr::without_provenance(from.wrapping_add(line)));
            }
            ahead.addresses.start = from.saturating_add(STEP);
        }
    }
}

/// Prefetches the cache line at `address`, which need not be anybody's, into the second-level cache.
#[inline(always)]
fn prefetch_second(address: *const i8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch reads nothing and never faults, whatever the address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(address);
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_run_starts_in_the_piece_that_its_chunk_is_of() {
        let memory = [0_u8; 100];
        let at = memory.as_ptr() as usize;
        let stream = Stream::new([(&memory[..50], 10), (&memory[50..], 20)]);
        // Five chunks of ten bytes, three of twenty, the last of ten.
        let of = |own, threads| run(&stream.pieces, own, threads);
        assert_eq!(of(0, 2), at..at + 40);
        assert_eq!(of(1, 2), at + 40..at + 50);
        assert_eq!(of(3, 4), at + 70..at + 100);
        assert_eq!(run(&[], 0, 2), 0..0);
    }

    #[test]
    fn streams_follow_each_other() {
        let memory = [0_u8; 100];
        let [one, two] = [0, 50].map(|at| Stream::new([(&memory[at..at + 50], 10)]));
        let both = Stream::new([(&memory[..50], 10), (&memory[50..], 10)]);
        assert_eq!(one.then(&two).pieces, both.pieces);
        let many = (0..20).fold(one, |all, _| all.then(&two));
        assert_eq!(many.len, MOST_PIECES);
    }

    #[test]
    fn a_torn_hint_is_harmless() {
        let announced = Announced::default();
        let extremes = [0, 1, 7, usize::MAX / 2, usize::MAX];
        for start in extremes {
            for bytes in extremes {
                for chunk_bytes in extremes {
                    let pieces = [Piece { start, bytes, chunk_bytes }; MOST_PIECES];
                    announced.set(&Stream { pieces, len: MOST_PIECES });
                    for (own, threads) in [(0, 1), (3, 4), (0, 200)] {
                        let mut ahead = Lookahead::default();
                        (0..2000).step_by(500).for_each(|_| {
                            announced.look_ahead(own, threads, &mut ahead);
                        });
                    }
                }
            }
        }
    }
}
