//! Memory for activations, kept between steps.
//!
//! A training step allocates and frees gigabytes of activations. Handed back to the operating system,
//! each of those pages is zeroed and faulted in again on the next step, which costs as much as the
//! element-wise work itself. So a dropped [`Buffer`] goes back to the free list of the pool it came from,
//! and the next request of its size class takes it from there, contents and all. What is in use and what
//! is kept together never exceed the most that was ever in use at once by more than a sixty-fourth.

use crate::pool;
use crate::region::{Piece, Regions};
use bytemuck::Pod;
use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use crate::pool::release_kept;

/// Buffers below this many bytes are left to the allocator.
const SMALLEST_KEPT: usize = 1 << 10;

/// Fewest bytes that are asked of the system itself.
const SMALLEST_MAPPED: usize = 1 << 18;

/// A pool's free memory.
#[derive(Default)]
pub(crate) struct Store {
    lists: Mutex<Lists>,
    regions: Regions,
}

/// What is kept, and the count of what is in use.
#[derive(Default)]
struct Lists {
    by_capacity: BTreeMap<usize, Vec<Memory>>,
    /// Bytes in `by_capacity`.
    kept: usize,
    /// Bytes of buffers handed out.
    used: usize,
    /// The most that `used` has been.
    most_used: usize,
    /// Whether nobody will ask again.
    closed: bool,
}

impl Store {
    fn lists(&self) -> MutexGuard<'_, Lists> {
        // A panic elsewhere cannot leave the lists half-changed.
        self.lists.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Zeros of `capacity` bytes.
    fn zeroed(&self, capacity: usize) -> Memory {
        // Miri knows no advice to the memory.
        if capacity >= SMALLEST_MAPPED
            && !cfg!(miri)
            && let Some(piece) = Piece::zeroed(&self.regions, capacity)
        {
            return Memory::Mapped(piece);
        }
        Memory::Heap(vec![0; capacity.div_ceil(size_of::<u64>())])
    }

    /// Memory of at least `class` bytes, contents unspecified.
    fn take(&self, class: usize) -> Memory {
        let surplus = {
            let mut lists = self.lists();
            if let Some(memory) = lists.fitting(class) {
                lists.count_used(memory.capacity());
                return memory;
            }
            lists.count_used(class);
            lists.surplus_for(class)
        };
        drop(surplus);
        self.zeroed(class)
    }

    fn put(&self, memory: Memory) {
        let not_kept = self.lists().put(memory);
        drop(not_kept);
    }

    /// Gives back what is kept.
    pub(crate) fn release(&self) {
        let kept = self.lists().empty();
        drop(kept);
        trim_heap();
    }

    /// Gives back what is kept, and from now on what comes back.
    pub(crate) fn close(&self) {
        let kept = {
            let mut lists = self.lists();
            lists.closed = true;
            lists.empty()
        };
        drop(kept);
        self.regions.close();
    }
}

impl Lists {
    fn empty(&mut self) -> BTreeMap<usize, Vec<Memory>> {
        self.kept = 0;
        std::mem::take(&mut self.by_capacity)
    }

    /// Takes out kept memory of that capacity.
    fn take(&mut self, capacity: usize) -> Option<Memory> {
        let list = self.by_capacity.get_mut(&capacity)?;
        let memory = list.pop()?;
        if list.is_empty() {
            self.by_capacity.remove(&capacity);
        }
        self.kept -= capacity;
        Some(memory)
    }

    /// The smallest kept memory that holds `bytes` and is not wastefully large.
    fn fitting(&mut self, bytes: usize) -> Option<Memory> {
        let capacity = *self.by_capacity.range(bytes..=2 * bytes).next()?.0;
        self.take(capacity)
    }

    /// Keeps memory that was in use, or returns it when nobody will ask again.
    fn put(&mut self, memory: Memory) -> Option<Memory> {
        let capacity = memory.capacity();
        self.used -= capacity;
        if self.closed {
            return Some(memory);
        }
        self.kept += capacity;
        self.by_capacity.entry(capacity).or_default().push(memory);
        None
    }

    fn count_used(&mut self, capacity: usize) {
        self.used += capacity;
        self.most_used = self.most_used.max(self.used);
    }

    /// The most that may be used and kept: a little over what ever was used, so that the small buffers of
    /// one operation need not go for those of the next.
    fn limit(&self) -> usize {
        self.most_used + self.most_used / 64
    }

    /// Takes out what has to go for `bytes` fresh ones to stay within the limit.
    fn surplus_for(&mut self, bytes: usize) -> Vec<Memory> {
        let mut surplus = Vec::new();
        while self.kept > 0 && self.used + self.kept > self.limit() {
            // The next smaller ones most likely served the same purpose in a smaller batch.
            let smaller = self.by_capacity.range(..bytes).next_back().map(|(&at, _)| at);
            let Some(capacity) = smaller.or_else(|| self.by_capacity.keys().next_back().copied())
            else {
                break;
            };
            surplus.extend(self.take(capacity));
        }
        surplus
    }
}

/// Initialized bytes, aligned for any number.
enum Memory {
    Heap(Vec<u64>),
    Mapped(Piece),
}

impl Memory {
    /// Bytes it holds.
    fn capacity(&self) -> usize {
        self.bytes().len()
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Self::Heap(data) => bytemuck::cast_slice(data),
            Self::Mapped(piece) => piece,
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Heap(data) => bytemuck::cast_slice_mut(data),
            Self::Mapped(piece) => piece,
        }
    }
}

/// glibc keeps what was freed below anything that lives on.
fn trim_heap() {
    #[cfg(all(target_os = "linux", target_env = "gnu", not(miri)))]
    // SAFETY: the function takes no pointer and may be called by any thread at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Where a buffer's numbers lie.
enum Place<E> {
    /// In a vector of their own.
    Own(Vec<E>),
    /// In memory that goes back to where it came from.
    Kept(Memory, Arc<Store>),
}

/// A fixed-length run of numbers whose memory returns to its pool when it is dropped.
pub struct Buffer<E: Pod> {
    place: Place<E>,
    len: usize,
}

impl<E: Pod + std::fmt::Debug> std::fmt::Debug for Buffer<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

/// Rounds up so that sizes within a thirty-second of each other share a class.
fn size_class(bytes: usize) -> usize {
    let step = 1 << (usize::BITS - 1 - bytes.leading_zeros() - 5);
    bytes.div_ceil(step) * step
}

impl<E: Pod> Buffer<E> {
    /// Returns a buffer of `len` numbers whose contents are unspecified: zeros, or whatever its last user
    /// left.
    ///
    /// The smallest kept memory of up to twice the size serves. If none does, what is kept is given back
    /// as far as fresh memory would make the whole grow beyond the most ever in use, so that batches of
    /// changing size do not pile up buffers of every size.
    pub fn scratch(len: usize) -> Self {
        let bytes = len * size_of::<E>();
        if bytes < SMALLEST_KEPT {
            return Self { place: Place::Own(vec![E::zeroed(); len]), len };
        }
        let store = pool::current().store.clone();
        let memory = store.take(size_class(bytes));
        Self { place: Place::Kept(memory, store), len }
    }

    /// Returns a buffer of `len` zeros.
    pub fn zeros(len: usize) -> Self {
        let mut buffer = Self::scratch(len);
        buffer.fill(E::zeroed());
        buffer
    }
}

impl<E: Pod> From<Vec<E>> for Buffer<E> {
    fn from(data: Vec<E>) -> Self {
        let len = data.len();
        Self { place: Place::Own(data), len }
    }
}

impl<E: Pod> Deref for Buffer<E> {
    type Target = [E];
    fn deref(&self) -> &[E] {
        match &self.place {
            Place::Own(data) => data,
            Place::Kept(memory, _) => {
                bytemuck::cast_slice(&memory.bytes()[..self.len * size_of::<E>()])
            }
        }
    }
}

impl<E: Pod> DerefMut for Buffer<E> {
    fn deref_mut(&mut self) -> &mut [E] {
        match &mut self.place {
            Place::Own(data) => data,
            Place::Kept(memory, _) => {
                bytemuck::cast_slice_mut(&mut memory.bytes_mut()[..self.len * size_of::<E>()])
            }
        }
    }
}

impl<E: Pod> Clone for Buffer<E> {
    fn clone(&self) -> Self {
        let mut copy = Self::scratch(self.len);
        copy.copy_from_slice(self);
        copy
    }
}

impl<E: Pod> Drop for Buffer<E> {
    fn drop(&mut self) {
        if let Place::Kept(memory, store) =
            std::mem::replace(&mut self.place, Place::Own(Vec::new()))
        {
            store.put(memory);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::Pool;

    #[test]
    fn classes_waste_at_most_a_thirty_second() {
        let step = if cfg!(miri) { 3001 } else { 37 };
        for bytes in (SMALLEST_KEPT..800_000).step_by(step) {
            let class = size_class(bytes);
            assert!(class >= bytes && class <= bytes + bytes / 32 + 1, "{bytes} -> {class}");
            assert_eq!(size_class(class), class, "a class is its own class");
            assert!(class.is_multiple_of(size_of::<u64>()));
        }
    }

    #[test]
    fn kept_memory_does_not_pile_up() {
        let store = Store::default();
        let unit_bytes = if cfg!(miri) { 400 } else { 40_000 };
        let mut held = Vec::new();
        // Batches of changing size, each of two large and two small buffers held at once.
        for step in [7_usize, 3, 20, 12, 40, 5, 39, 1, 41, 17] {
            for unit in [3_usize, 1, 8, 8] {
                held.push(store.take(size_class(step * unit * unit_bytes)));
                let lists = store.lists();
                assert!(lists.used + lists.kept <= lists.limit());
            }
            held.drain(..).for_each(|memory| store.put(memory));
        }
        let lists = store.lists();
        let kept: usize =
            lists.by_capacity.iter().map(|(capacity, list)| capacity * list.len()).sum();
        assert_eq!(kept, lists.kept);
        assert!(lists.most_used <= 41 * 20 * unit_bytes * 33 / 32 * 2, "{}", lists.most_used);
    }

    #[test]
    fn zeros_are_zero_after_reuse() {
        Pool::new(1).enter(|| {
            let mut buffer = Buffer::<f64>::scratch(10_000);
            buffer.fill(3.0);
            drop(buffer);
            assert!(Buffer::<f64>::zeros(10_001).iter().all(|&x| x == 0.0));
        });
    }

    #[test]
    fn a_buffer_returns_to_the_pool_it_came_from() {
        let pool = Pool::new(1);
        let kept = |pool: &Pool| pool.enter(|| pool::current().store.lists().kept);
        let buffer = pool.enter(|| Buffer::<f32>::scratch(5_000));
        let outlives = pool.enter(|| Buffer::<f32>::from(vec![1.0; 3]).clone());
        let late = pool.enter(|| Buffer::<f32>::zeros(5_000));
        assert_eq!(kept(&pool), 0);
        let other = Pool::new(1);
        other.enter(|| drop(buffer));
        assert_eq!((kept(&pool), kept(&other)), (size_class(20_000), 0));
        pool.release_kept();
        assert_eq!(kept(&pool), 0);
        drop(pool);
        assert_eq!(&*outlives, [1.0; 3]);
        assert!(late.iter().all(|&x| x == 0.0));
    }
}
