//! Memory of the system's own, cut from regions.
//!
//! Large buffers are asked of the system itself: on large pages where it has them, which take fewer
//! faults to touch and fewer look-ups to read, and given back the moment they are let go. Asked for one
//! by one, two neighbours would get small pages where they meet: half of a model's weights, each a few
//! megabytes. So a region is asked for at a time, and its pieces lie side by side.

use memmap2::{MmapMut, MmapRaw};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes of a region. Elsewhere than on Linux a part of one cannot be given back, so every piece is a
/// region of its own.
const REGION: usize = if cfg!(target_os = "linux") { 1 << 26 } else { 0 };

/// The largest piece that shares a region.
const LARGEST_SHARING: usize = REGION / 4;

/// A multiple of every page size of the architecture's small pages.
const PAGE: usize = if cfg!(target_arch = "x86_64") { 1 << 12 } else { 1 << 16 };

/// The region that pieces are cut from, and how much of it has been.
#[derive(Default)]
pub(crate) struct Regions(Mutex<Option<(Arc<MmapRaw>, usize)>>);

impl Regions {
    fn open(&self) -> MutexGuard<'_, Option<(Arc<MmapRaw>, usize)>> {
        // A panic elsewhere cannot leave it half-changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Cuts no more pieces from the open region, which goes with its last piece.
    pub(crate) fn close(&self) {
        let open = self.open().take();
        drop(open);
    }
}

/// A run of bytes of its own, all zero at first.
pub(crate) struct Piece {
    region: Arc<MmapRaw>,
    /// Where it lies in the region; no two pieces share a page, and none lies where another has been.
    range: Range<usize>,
    len: usize,
}

/// A region of zeros, on large pages if the system has them.
fn region(bytes: usize) -> Option<Arc<MmapRaw>> {
    let map = MmapMut::map_anon(bytes).ok()?;
    // A system without large pages says so, and nothing is lost.
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    Some(Arc::new(map.into()))
}

impl Piece {
    /// A piece of `len` bytes, if the system has them.
    pub(crate) fn zeroed(regions: &Regions, len: usize) -> Option<Self> {
        let size = len.checked_next_multiple_of(PAGE)?.max(PAGE);
        if size > LARGEST_SHARING {
            return Some(Self { region: region(size)?, range: 0..size, len });
        }
        let mut open = regions.open();
        let (region, start) = match open.take() {
            Some((region, cut)) if cut + size <= REGION => (region, cut),
            _ => (region(REGION)?, 0),
        };
        *open = Some((region.clone(), start + size));
        Some(Self { region, range: start..start + size, len })
    }
}

impl std::ops::Deref for Piece {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the range lies within the region, which `self` keeps alive, holds initialized bytes and
        // belongs to this piece alone.
        unsafe { std::slice::from_raw_parts(self.region.as_ptr().add(self.range.start), self.len) }
    }
}

impl std::ops::DerefMut for Piece {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed exclusively.
        unsafe {
            std::slice::from_raw_parts_mut(self.region.as_mut_ptr().add(self.range.start), self.len)
        }
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        // A region of its own goes with it.
        #[cfg(target_os = "linux")]
        if self.range.len() <= LARGEST_SHARING {
            let advice = memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: the pages are this piece's alone, nobody borrows it any more, and they are not handed
            // out again. Should the system refuse, they stay until the region goes.
            let _ = unsafe {
                self.region.unchecked_advise_range(advice, self.range.start, self.range.len())
            };
        }
    }
}

#[cfg(all(test, not(any(miri, loom))))]
mod tests {
    use super::*;

    #[test]
    fn pieces_keep_to_themselves_and_begin_as_zeros() {
        let regions = Regions::default();
        let mut held: Vec<(u8, Piece)> = Vec::new();
        for round in 0..200_usize {
            let len = (round * 7919 % 37) * 500_003 / 4 + round % 3;
            let mut piece = Piece::zeroed(&regions, len).unwrap();
            assert_eq!(piece.len(), len);
            assert!(piece.iter().all(|&byte| byte == 0), "round {round}");
            let mark = (round % 251) as u8 + 1;
            piece.fill(mark);
            held.push((mark, piece));
            if round % 2 == 1 {
                held.swap_remove(round * 31 % held.len());
            }
        }
        for (mark, piece) in &held {
            assert!(piece.iter().all(|byte| byte == mark));
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn memory_that_is_let_go_goes_back() {
        let resident = || {
            let status = std::fs::read_to_string("/proc/self/statm").unwrap();
            status.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
        };
        let regions = Regions::default();
        let pieces: Vec<Piece> = (0..40)
            .map(|_| {
                let mut piece = Piece::zeroed(&regions, 5_000_000).unwrap();
                piece.fill(1);
                piece
            })
            .collect();
        let full = resident();
        drop(pieces);
        // Other tests run beside this one.
        assert!(resident() + 100_000_000 < full, "{full} bytes before, {} after", resident());
    }

    #[test]
    fn more_than_there_is_is_refused() {
        assert!(Piece::zeroed(&Regions::default(), usize::MAX).is_none());
        assert!(Piece::zeroed(&Regions::default(), usize::MAX / 2).is_none());
    }
}
