//! Parallel loops over parts of slices. Which thread computes a part never changes a result.

use crate::pool;
use crate::team::Share;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Mutex;

/// Something that is cut into parts, one an index.
///
/// # Safety
/// Parts of different indices below [`count`](Self::count) may be held at the same time by different
/// threads.
pub unsafe trait Parts: Sync {
    /// One part.
    type Part: Send;

    /// Number of parts.
    fn count(&self) -> usize;

    /// Returns part `index`.
    ///
    /// # Safety
    /// `index` is below [`count`](Self::count) and no part of this index was taken before.
    unsafe fn part(&self, index: usize) -> Self::Part;
}

/// Chunks of `size` elements that may be written, the last one perhaps shorter.
///
/// # Panics
/// If `size` is zero.
pub fn chunks_mut<T: Send>(data: &mut [T], size: usize) -> ChunksMut<'_, T> {
    assert!(size > 0, "chunks have at least one element");
    ChunksMut { start: data.as_mut_ptr(), len: data.len(), size, data: PhantomData }
}

/// See [`chunks_mut`].
pub struct ChunksMut<'a, T> {
    start: *mut T,
    len: usize,
    size: usize,
    data: PhantomData<&'a mut [T]>,
}

// SAFETY: it gives every thread other elements, which may go there.
unsafe impl<T: Send> Sync for ChunksMut<'_, T> {}

// SAFETY: chunks of different indices do not overlap.
unsafe impl<'a, T: Send> Parts for ChunksMut<'a, T> {
    type Part = &'a mut [T];

    fn count(&self) -> usize {
        self.len.div_ceil(self.size)
    }

    unsafe fn part(&self, index: usize) -> &'a mut [T] {
        let first = index * self.size;
        let len = self.size.min(self.len - first);
        // SAFETY: the chunk lies within the slice, which stays borrowed for `'a`, and is given out once.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(first), len) }
    }
}

/// Chunks of `size` elements that are read, the last one perhaps shorter.
///
/// # Panics
/// If `size` is zero.
pub fn chunks<T: Sync>(data: &[T], size: usize) -> Chunks<'_, T> {
    assert!(size > 0, "chunks have at least one element");
    Chunks { data, size }
}

/// See [`chunks`].
pub struct Chunks<'a, T> {
    data: &'a [T],
    size: usize,
}

// SAFETY: parts are only read.
unsafe impl<'a, T: Sync> Parts for Chunks<'a, T> {
    type Part = &'a [T];

    fn count(&self) -> usize {
        self.data.len().div_ceil(self.size)
    }

    unsafe fn part(&self, index: usize) -> &'a [T] {
        let first = index * self.size;
        &self.data[first..self.data.len().min(first + self.size)]
    }
}

/// Single elements that may be written.
pub fn each_mut<T: Send>(data: &mut [T]) -> EachMut<'_, T> {
    EachMut(chunks_mut(data, 1))
}

/// See [`each_mut`].
pub struct EachMut<'a, T>(ChunksMut<'a, T>);

// SAFETY: as for `ChunksMut`.
unsafe impl<'a, T: Send> Parts for EachMut<'a, T> {
    type Part = &'a mut T;

    fn count(&self) -> usize {
        self.0.len
    }

    unsafe fn part(&self, index: usize) -> &'a mut T {
        // SAFETY: the index is below the slice's length and given out once.
        unsafe { &mut *self.0.start.add(index) }
    }
}

// SAFETY: parts are only read.
unsafe impl<'a, T: Sync> Parts for &'a [T] {
    type Part = &'a T;

    fn count(&self) -> usize {
        self.len()
    }

    unsafe fn part(&self, index: usize) -> &'a T {
        &self[index]
    }
}

// SAFETY: an index is nobody's memory.
unsafe impl Parts for Range<usize> {
    type Part = usize;

    fn count(&self) -> usize {
        self.len()
    }

    unsafe fn part(&self, index: usize) -> usize {
        self.start + index
    }
}

/// Zipped: as many parts as the shortest has.
macro_rules! zipped {
    ($($name:ident $at:tt),*) => {
        // SAFETY: every member keeps its promise.
        unsafe impl<$($name: Parts),*> Parts for ($($name,)*) {
            type Part = ($($name::Part,)*);

            fn count(&self) -> usize {
                [$(self.$at.count()),*].into_iter().min().unwrap_or(0)
            }

            unsafe fn part(&self, index: usize) -> Self::Part {
                // SAFETY: the caller's promise holds for every member.
                unsafe { ($(self.$at.part(index),)*) }
            }
        }
    };
}
zipped!(A 0, B 1);
zipped!(A 0, B 1, C 2);
zipped!(A 0, B 1, C 2, D 3);
zipped!(A 0, B 1, C 2, D 3, F 4);

/// Runs `body(index, part)` for every part, on all threads of the current pool.
///
/// # Panics
/// If `body` panics on any thread.
pub fn for_each<P: Parts>(parts: P, body: impl Fn(usize, P::Part) + Sync) {
    shared_out(&parts, Share::Runs, body);
}

/// [`for_each`] with the parts handed out in order, one at a time: for parts sorted by work, the most
/// first, so that no thread is left with a long one at the end.
///
/// # Panics
/// If `body` panics on any thread.
pub fn for_each_in_order<P: Parts>(parts: P, body: impl Fn(usize, P::Part) + Sync) {
    shared_out(&parts, Share::Queue, body);
}

/// Returns `body(index, part)` of every part, in the parts' order.
///
/// # Panics
/// If `body` panics on any thread.
pub fn map<P: Parts, R: Send>(parts: P, body: impl Fn(usize, P::Part) -> R + Sync) -> Vec<R> {
    collected(parts, Share::Runs, body)
}

/// [`map`] that hands out parts as [`for_each_in_order`] does.
///
/// # Panics
/// If `body` panics on any thread.
pub fn map_in_order<P: Parts, R: Send>(
    parts: P,
    body: impl Fn(usize, P::Part) -> R + Sync,
) -> Vec<R> {
    collected(parts, Share::Queue, body)
}

/// Runs `a` and `b`, at the same time if a thread is free.
///
/// # Panics
/// If one of them panics.
pub fn join<A: Send, B: Send>(
    a: impl FnOnce() -> A + Send,
    b: impl FnOnce() -> B + Send,
) -> (A, B) {
    let (a, b) = (Mutex::new((Some(a), None)), Mutex::new((Some(b), None)));
    fn do_side<R>(side: &Mutex<(Option<impl FnOnce() -> R>, Option<R>)>) {
        if let Ok(mut side) = side.lock()
            && let Some(body) = side.0.take()
        {
            side.1 = Some(body());
        }
    }
    pool::run(2, Share::Queue, &|index| if index == 0 { do_side(&a) } else { do_side(&b) });
    let done = (a.into_inner().map(|side| side.1), b.into_inner().map(|side| side.1));
    match done {
        (Ok(Some(a)), Ok(Some(b))) => (a, b),
        // A panic of either side has left `run` already.
        _ => unreachable!("both sides were run"),
    }
}

fn shared_out<P: Parts>(parts: &P, share: Share, body: impl Fn(usize, P::Part) + Sync) {
    pool::run(parts.count(), share, &|index| {
        // SAFETY: a loop gives out every index below the count once.
        body(index, unsafe { parts.part(index) });
    });
}

fn collected<P: Parts, R: Send>(
    parts: P,
    share: Share,
    body: impl Fn(usize, P::Part) -> R + Sync,
) -> Vec<R> {
    let mut results: Vec<Option<R>> = (0..parts.count()).map(|_| None).collect();
    shared_out(&(each_mut(&mut results), parts), share, |index, (result, part)| {
        *result = Some(body(index, part));
    });
    results.into_iter().flatten().collect()
}
