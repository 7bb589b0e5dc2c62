//! Memory for activations, kept between steps.
//!
//! A training step allocates and frees gigabytes of activations. Handed back to the operating
//! system, each of those pages is zeroed and faulted in again on the next step, which costs as much
//! as the element-wise work itself. So a dropped [`Buffer`] goes to a free list and the next request
//! of its size class takes it from there, contents and all.

use crate::element::Element;
use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::sync::Mutex;

/// Buffers below this many elements are left to the allocator.
const SMALLEST_KEPT: usize = 1 << 12;

/// Free memory of one element type, by capacity.
pub struct FreeList<E>(Mutex<BTreeMap<usize, Vec<Vec<E>>>>);

impl<E> FreeList<E> {
    /// An empty list.
    #[allow(clippy::new_without_default)]
    pub const fn new() -> Self {
        Self(Mutex::new(BTreeMap::new()))
    }

    fn lists(&self) -> std::sync::MutexGuard<'_, BTreeMap<usize, Vec<Vec<E>>>> {
        // A panic elsewhere cannot leave the map half-changed.
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
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

/// Fewest bytes worth asking for large pages.
const SMALLEST_LARGE: usize = 1 << 20;

/// `len` zeros; a long run on large pages where the system has them, which take fewer faults to touch
/// and fewer look-ups to read.
pub fn zeroed<T: bytemuck::Zeroable + Clone>(len: usize) -> Vec<T> {
    let data = vec![T::zeroed(); len];
    if size_of_val(data.as_slice()) >= SMALLEST_LARGE {
        ask_for_large_pages(&data);
    }
    data
}

/// Tells the system that `data`, not touched yet, may lie on large pages.
#[allow(unsafe_code)]
fn ask_for_large_pages<T>(data: &[T]) {
    #[cfg(target_os = "linux")]
    {
        const PAGE: usize = 1 << 12;
        let range = data.as_ptr_range();
        let first = range.start.addr().next_multiple_of(PAGE);
        let end = range.end.addr() / PAGE * PAGE;
        if first < end {
            let start = range.start.cast::<libc::c_void>().with_addr(first);
            // SAFETY: whole pages inside a live allocation; the advice changes how the system backs
            // them and never what they hold. A refusal costs nothing.
            unsafe { libc::madvise(start.cast_mut(), end - first, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = data;
}

/// Hands all memory that is kept for reuse back to the allocator: after work whose sizes will not come
/// again.
pub fn release_kept() {
    fn empty<E: Pooled>() {
        drop(std::mem::take(&mut *E::free_list().lists()));
    }
    empty::<f32>();
    empty::<f64>();
}

/// A fixed-length run of numbers that returns to the free list when dropped.
pub struct Buffer<E: Pooled> {
    data: Vec<E>,
    len: usize,
}

/// Takes a kept buffer of that capacity.
fn take<E>(lists: &mut BTreeMap<usize, Vec<Vec<E>>>, capacity: Option<usize>) -> Option<Vec<E>> {
    let capacity = capacity?;
    let list = lists.get_mut(&capacity)?;
    let data = list.pop();
    if list.is_empty() {
        lists.remove(&capacity);
    }
    data
}

/// Rounds up so that lengths within an eighth of each other share a class.
fn size_class(len: usize) -> usize {
    if len < SMALLEST_KEPT {
        return len;
    }
    let step = 1 << (usize::BITS - 1 - len.leading_zeros() - 3);
    len.div_ceil(step) * step
}

impl<E: Pooled> Buffer<E> {
    /// A buffer whose contents are unspecified: zeros, or whatever its last user left.
    ///
    /// The smallest kept buffer of up to twice the length serves. If none does, as much of what is
    /// kept is given back as is about to be taken, so that batches of changing size do not pile up
    /// buffers of every size.
    pub fn scratch(len: usize) -> Self {
        let class = size_class(len);
        if class < SMALLEST_KEPT {
            return Self { data: vec![E::ZERO; class], len };
        }
        let mut surplus = Vec::new();
        {
            let mut lists = E::free_list().lists();
            let fitting = lists.range(class..=2 * class).next().map(|(&capacity, _)| capacity);
            if let Some(data) = take(&mut lists, fitting) {
                return Self { data, len };
            }
            let mut given_back = 0;
            while given_back < class {
                // The next smaller ones most likely served the same purpose in a smaller batch.
                let smaller = lists.range(..class).next_back().map(|(&capacity, _)| capacity);
                let Some(data) = take(&mut lists, smaller) else { break };
                given_back += data.len();
                surplus.push(data);
            }
        }
        drop(surplus);
        Self { data: zeroed(class), len }
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
        Self { data, len }
    }
}

impl<E: Pooled> Deref for Buffer<E> {
    type Target = [E];
    fn deref(&self) -> &[E] {
        &self.data[..self.len]
    }
}

impl<E: Pooled> DerefMut for Buffer<E> {
    fn deref_mut(&mut self) -> &mut [E] {
        &mut self.data[..self.len]
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
        if capacity >= SMALLEST_KEPT && size_class(capacity) == capacity {
            let data = std::mem::take(&mut self.data);
            E::free_list().lists().entry(capacity).or_default().push(data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_waste_at_most_an_eighth() {
        for len in (SMALLEST_KEPT..200_000).step_by(37) {
            let class = size_class(len);
            assert!(class >= len && class <= len + len / 8 + 1, "{len} -> {class}");
            assert_eq!(size_class(class), class, "a class is its own class");
        }
    }

    #[test]
    fn kept_memory_does_not_pile_up() {
        // f64 buffers of this size are this test's own.
        let held = || {
            let lists = f64::free_list().lists();
            lists.range(1 << 20..).map(|(capacity, list)| capacity * list.len()).sum::<usize>()
        };
        for step in 0..40 {
            drop(Buffer::<f64>::scratch((1 << 20) + step * (1 << 17)));
        }
        assert!(held() <= 8 << 20, "{} numbers are kept for one at a time", held());
    }

    #[test]
    fn zeros_are_zero_after_reuse() {
        let mut buffer = Buffer::<f64>::scratch(10_000);
        buffer.fill(3.0);
        drop(buffer);
        assert!(Buffer::<f64>::zeros(10_001).iter().all(|&x| x == 0.0));
    }
}
