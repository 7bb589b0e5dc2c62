//! Memory for activations, kept between steps.
//!
//! A training step allocates and frees gigabytes of activations. Handed back to the operating
//! system, each of those pages is zeroed and faulted in again on the next step, which costs as much
//! as the element-wise work itself. So a dropped [`Buffer`] goes to a free list and the next request
//! of its size class takes it from there, contents and all. What is in use and what is kept together
//! never exceed the most that was ever in use at once by more than a sixty-fourth.

use crate::element::Element;
use crate::region::Piece;
use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::sync::Mutex;

/// Buffers below this many elements are left to the allocator.
const SMALLEST_KEPT: usize = 1 << 8;

/// Free memory of one element type.
pub struct FreeList<E>(Mutex<Lists<E>>);

/// What is kept, and the count of what is in use.
struct Lists<E> {
    by_capacity: BTreeMap<usize, Vec<Memory<E>>>,
    /// Numbers in `by_capacity`.
    kept: usize,
    /// Numbers in buffers handed out.
    used: usize,
    /// The most that `used` has been.
    most_used: usize,
}

impl<E: Element> FreeList<E> {
    /// An empty list.
    #[allow(clippy::new_without_default)]
    pub const fn new() -> Self {
        Self(Mutex::new(Lists { by_capacity: BTreeMap::new(), kept: 0, used: 0, most_used: 0 }))
    }

    fn lists(&self) -> std::sync::MutexGuard<'_, Lists<E>> {
        // A panic elsewhere cannot leave the lists half-changed.
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl<E: Element> Lists<E> {
    /// Takes out a kept buffer of that capacity.
    fn take(&mut self, capacity: usize) -> Option<Memory<E>> {
        let list = self.by_capacity.get_mut(&capacity)?;
        let data = list.pop()?;
        if list.is_empty() {
            self.by_capacity.remove(&capacity);
        }
        self.kept -= capacity;
        Some(data)
    }

    /// The smallest kept buffer that holds `len` and is not wastefully large.
    fn fitting(&mut self, len: usize) -> Option<Memory<E>> {
        let capacity = *self.by_capacity.range(len..=2 * len).next()?.0;
        self.take(capacity)
    }

    /// Keeps a buffer that was in use.
    fn put(&mut self, data: Memory<E>) {
        let capacity = data.len();
        self.used -= capacity;
        self.kept += capacity;
        self.by_capacity.entry(capacity).or_default().push(data);
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

    /// Takes out what has to go for `len` fresh numbers to stay within the limit.
    fn surplus_for(&mut self, len: usize) -> Vec<Memory<E>> {
        let mut surplus = Vec::new();
        while self.kept > 0 && self.used + self.kept > self.limit() {
            // The next smaller ones most likely served the same purpose in a smaller batch.
            let smaller = self.by_capacity.range(..len).next_back().map(|(&capacity, _)| capacity);
            let Some(capacity) = smaller.or_else(|| self.by_capacity.keys().next_back().copied())
            else {
                break;
            };
            surplus.extend(self.take(capacity));
        }
        surplus
    }
}

/// Element types that have a free list.
pub trait Pooled: Element {
    /// The list that buffers of this type come from and return to.
    fn free_list() -> &'static FreeList<Self>;
}

macro_rules! pooled {
    ($type:ty, $list:ident) => {
        static $list: FreeList<$type> = FreeList::new();
        impl Pooled for $type {
            fn free_list() -> &'static FreeList<$type> {
                &$list
            }
        }
    };
}
pooled!(f32, FREE_F32);
pooled!(f64, FREE_F64);

/// Fewest bytes that are asked of the system itself.
const SMALLEST_MAPPED: usize = 1 << 20;

/// Where a buffer's numbers lie.
enum Memory<E> {
    Heap(Vec<E>),
    Mapped(Piece),
}

impl<E: Element> Memory<E> {
    /// Zeros.
    fn zeroed(len: usize) -> Self {
        let bytes = len * size_of::<E>();
        if bytes >= SMALLEST_MAPPED
            && let Some(piece) = Piece::zeroed(bytes)
        {
            return Self::Mapped(piece);
        }
        Self::Heap(vec![E::ZERO; len])
    }

    /// Numbers it holds.
    fn len(&self) -> usize {
        match self {
            Self::Heap(data) => data.len(),
            Self::Mapped(piece) => piece.len() / size_of::<E>(),
        }
    }

    fn as_slice(&self) -> &[E] {
        match self {
            Self::Heap(data) => data,
            Self::Mapped(piece) => bytemuck::cast_slice(piece),
        }
    }

    fn as_mut_slice(&mut self) -> &mut [E] {
        match self {
            Self::Heap(data) => data,
            Self::Mapped(piece) => bytemuck::cast_slice_mut(piece),
        }
    }
}

/// Hands all memory that is kept for reuse, here or by the allocator, back to the system: after work
/// whose sizes will not come again.
pub fn release_kept() {
    fn empty<E: Pooled>() {
        let kept = {
            let mut lists = E::free_list().lists();
            lists.kept = 0;
            std::mem::take(&mut lists.by_capacity)
        };
        drop(kept);
    }
    empty::<f32>();
    empty::<f64>();
    trim_heap();
}

/// glibc keeps what was freed below anything that lives on.
#[allow(unsafe_code)]
fn trim_heap() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: the function takes no pointer and may be called by any thread at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// A fixed-length run of numbers that returns to the free list when dropped.
pub struct Buffer<E: Pooled> {
    data: Memory<E>,
    len: usize,
}

impl<E: Pooled> std::fmt::Debug for Buffer<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

/// Rounds up so that lengths within a thirty-second of each other share a class.
fn size_class(len: usize) -> usize {
    if len < SMALLEST_KEPT {
        return len;
    }
    let step = 1 << (usize::BITS - 1 - len.leading_zeros() - 5);
    len.div_ceil(step) * step
}

/// Whether memory of this capacity goes to the free list when it is dropped.
fn is_kept(capacity: usize) -> bool {
    capacity >= SMALLEST_KEPT && size_class(capacity) == capacity
}

impl<E: Pooled> Buffer<E> {
    /// A buffer whose contents are unspecified: zeros, or whatever its last user left.
    ///
    /// The smallest kept buffer of up to twice the length serves. If none does, what is kept is given
    /// back as far as the fresh one would make memory grow beyond the most ever in use, so that batches
    /// of changing size do not pile up buffers of every size.
    pub fn scratch(len: usize) -> Self {
        let class = size_class(len);
        if class < SMALLEST_KEPT {
            return Self { data: Memory::Heap(vec![E::ZERO; class]), len };
        }
        let surplus = {
            let mut lists = E::free_list().lists();
            if let Some(data) = lists.fitting(class) {
                lists.count_used(data.len());
                return Self { data, len };
            }
            lists.count_used(class);
            lists.surplus_for(class)
        };
        drop(surplus);
        Self { data: Memory::zeroed(class), len }
    }

    /// A buffer of zeros.
    pub fn zeros(len: usize) -> Self {
        let mut buffer = Self::scratch(len);
        buffer.fill(E::ZERO);
        buffer
    }
}

impl<E: Pooled> From<Vec<E>> for Buffer<E> {
    fn from(data: Vec<E>) -> Self {
        let len = data.len();
        if is_kept(len) {
            E::free_list().lists().count_used(len);
        }
        Self { data: Memory::Heap(data), len }
    }
}

impl<E: Pooled> Deref for Buffer<E> {
    type Target = [E];
    fn deref(&self) -> &[E] {
        &self.data.as_slice()[..self.len]
    }
}

impl<E: Pooled> DerefMut for Buffer<E> {
    fn deref_mut(&mut self) -> &mut [E] {
        &mut self.data.as_mut_slice()[..self.len]
    }
}

impl<E: Pooled> Clone for Buffer<E> {
    fn clone(&self) -> Self {
        let mut copy = Self::scratch(self.len);
        copy.copy_from_slice(self);
        copy
    }
}

impl<E: Pooled> Drop for Buffer<E> {
    fn drop(&mut self) {
        let capacity = self.data.len();
        if is_kept(capacity) {
            let data = std::mem::replace(&mut self.data, Memory::Heap(Vec::new()));
            E::free_list().lists().put(data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_waste_at_most_a_thirty_second() {
        for len in (SMALLEST_KEPT..200_000).step_by(37) {
            let class = size_class(len);
            assert!(class >= len && class <= len + len / 32 + 1, "{len} -> {class}");
            assert_eq!(size_class(class), class, "a class is its own class");
        }
    }

    #[test]
    fn kept_memory_does_not_pile_up() {
        let mut lists = FreeList::<f64>::new().0.into_inner().unwrap();
        let mut held: Vec<Memory<f64>> = Vec::new();
        // Batches of changing size, each of two large and two small buffers held at once.
        for step in [7_usize, 3, 20, 12, 40, 5, 39, 1, 41, 17] {
            for unit in [3_usize, 1, 8, 8] {
                let class = size_class(step * unit * 5_000);
                let data = lists.fitting(class);
                lists.count_used(data.as_ref().map_or(class, Memory::len));
                drop(lists.surplus_for(class));
                held.push(data.unwrap_or_else(|| Memory::zeroed(class)));
                assert!(lists.used + lists.kept <= lists.limit());
            }
            for data in held.drain(..) {
                lists.put(data);
            }
        }
        let kept: usize =
            lists.by_capacity.iter().map(|(capacity, list)| capacity * list.len()).sum();
        assert_eq!(kept, lists.kept);
        assert!(lists.most_used <= 41 * 20 * 5_000 * 33 / 32 * 2, "{}", lists.most_used);
    }

    #[test]
    fn zeros_are_zero_after_reuse() {
        let mut buffer = Buffer::<f64>::scratch(10_000);
        buffer.fill(3.0);
        drop(buffer);
        assert!(Buffer::<f64>::zeros(10_001).iter().all(|&x| x == 0.0));
    }
}
