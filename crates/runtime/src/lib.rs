//! What computing stands on: threads, the order in which memory is prefetched, activation memory.
//!
//! A [`Pool`] is owned by whoever computes: the command line, a session, a server. Inside of
//! [`Pool::enter`] the loops of this crate ([`for_each`], [`map`], [`join`]) run on its threads and
//! [`Buffer`](buffer::Buffer)s come from its memory; a thread that entered none uses a pool of all
//! processors. Loops are safe to nest (the inner one runs on its own thread) and to start from any number
//! of threads at once. Nothing here knows what is computed.
//!
//! ```
//! use hydralora_runtime::{Pool, chunks, chunks_mut, for_each};
//!
//! let (x, mut y) = (vec![1.0_f32; 1000], vec![2.0_f32; 1000]);
//! Pool::new(2).enter(|| {
//!     for_each((chunks_mut(&mut y, 64), chunks(&x, 64)), |_, (y, x)| {
//!         y.iter_mut().zip(x).for_each(|(y, x)| *y += x);
//!     });
//! });
//! assert_eq!(y, [3.0; 1000]);
//! ```

pub mod buffer;
mod early;
mod loops;
mod pool;
mod prefetch;
mod region;
mod sync;
mod team;
#[cfg(all(test, not(loom)))]
mod tests;

pub use early::Early;
pub use loops::{
    Chunks, ChunksMut, EachMut, Parts, chunks, chunks_mut, each_mut, for_each, for_each_in_order,
    join, map, map_in_order,
};
pub use pool::{Pool, announce, available, release_kept, threads};
pub use prefetch::{LINE_BYTES, Stream};
