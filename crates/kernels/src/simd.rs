//! Running plain loops with the widest vector instructions of the machine.
//!
//! The kernels are ordinary Rust loops over slices. [`vectorize`] compiles such a loop once per
//! instruction set (baseline, AVX2 + FMA, AVX-512, NEON) and picks one at run time, so one source
//! serves every processor. Reductions keep [`LANES`] partial sums, because a compiler may not
//! reorder floating-point additions by itself.

use crate::element::Element;
use hydralora_runtime::{chunks, chunks_mut, for_each};

/// Partial sums of a reduction.
pub const LANES: usize = 16;

pub(crate) use hydralora_runtime::LINE_BYTES;

/// Elements per task of an element-wise operation; fixed, so that results do not depend on the
/// number of threads.
const CHUNK: usize = 1 << 14;

/// Runs `body`, compiled for the best instruction set this processor has.
///
/// Only what is inlined into `body` benefits: mark the closure and its helpers `#[inline(always)]`.
#[inline(always)]
pub fn vectorize<R>(body: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(body)
}

/// Where memory that is called for goes.
enum Cache {
    /// To the first cache.
    First,
    /// To the first cache, and nowhere once it is pushed out of there.
    FirstAlone,
}

/// Calls for the memory `distance` bytes past the start of `data`, which may be past its end. The
/// processor's own prefetching stops at the end of each page.
#[inline(always)]
pub(crate) fn fetch<T>(data: &[T], distance: usize) {
    call_for(data.as_ptr().cast::<i8>().wrapping_add(distance), Cache::First);
}

/// [`fetch`] for what is read once and should not push anything out of the larger caches.
#[inline(always)]
pub(crate) fn fetch_once<T>(data: &[T], distance: usize) {
    call_for(data.as_ptr().cast::<i8>().wrapping_add(distance), Cache::FirstAlone);
}

#[inline(always)]
#[allow(unsafe_code)]
fn call_for(address: *const i8, cache: Cache) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_NTA, _MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch reads nothing and never faults, whatever the address.
        unsafe {
            match cache {
                Cache::First => _mm_prefetch::<_MM_HINT_T0>(address),
                Cache::FirstAlone => _mm_prefetch::<_MM_HINT_NTA>(address),
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (address, cache);
}

/// Partial sums that are taken side by side: one alone would wait for each addition before the next.
const TOGETHER: usize = 4;

/// `Σ a_i b_i`.
#[inline(always)]
pub fn dot<E: Element>(a: &[E], b: &[E]) -> E {
    dot_with(a, b, |_| {})
}

/// [`dot`] that calls for the memory `distance` bytes past `a` on its way.
#[inline(always)]
pub(crate) fn dot_fetching(a: &[f32], b: &[f32], distance: usize) -> f32 {
    dot_with(a, b, |lines| lines.iter().for_each(|line| fetch_once(line, distance)))
}

/// [`dot`] that shows `pass` what it multiplies of `a` next, up to four times [`LANES`] numbers; those
/// past the last whole [`LANES`] it does not.
#[inline(always)]
fn dot_with<E: Element>(a: &[E], b: &[E], pass: impl Fn(&[[E; LANES]])) -> E {
    let len = a.len().min(b.len());
    let (a, b) = (&a[..len], &b[..len]);
    let mut many = [[E::ZERO; LANES]; TOGETHER];
    let (a_many, a_rest) = a.as_chunks::<{ TOGETHER * LANES }>();
    let (b_many, b_rest) = b.as_chunks::<{ TOGETHER * LANES }>();
    for (a, b) in a_many.iter().zip(b_many) {
        pass(a.as_chunks().0);
        for (part, sums) in many.iter_mut().enumerate() {
            for lane in 0..LANES {
                let at = part * LANES + lane;
                sums[lane] = a[at].mul_add(b[at], sums[lane]);
            }
        }
    }
    let [mut sums, second, third, fourth] = many;
    let (a_blocks, a_rest) = a_rest.as_chunks::<LANES>();
    let (b_blocks, b_rest) = b_rest.as_chunks::<LANES>();
    pass(a_blocks);
    for (a, b) in a_blocks.iter().zip(b_blocks) {
        for lane in 0..LANES {
            sums[lane] = a[lane].mul_add(b[lane], sums[lane]);
        }
    }
    for lane in 0..LANES {
        sums[lane] = (sums[lane] + second[lane]) + (third[lane] + fourth[lane]);
    }
    let mut total = fold(sums);
    for (&a, &b) in a_rest.iter().zip(b_rest) {
        total = a.mul_add(b, total);
    }
    total
}

/// `Σ a_i` of numbers that are read once, their memory called for ahead of time.
#[inline(always)]
pub fn sum_once(a: &[f32]) -> f32 {
    /// Bytes ahead.
    const AHEAD: usize = 2048;
    sum_with(a, |x| x, |block| fetch_once(block, AHEAD))
}

/// `Σ a_i`, the four quarters of `a` read side by side.
#[inline(always)]
pub fn sum_quarters(a: &[f32]) -> f32 {
    let quarter = a.len() / TOGETHER / LANES * LANES;
    let mut sums = [[0.0; LANES]; TOGETHER];
    for first in (0..quarter).step_by(LANES) {
        for (part, sums) in sums.iter_mut().enumerate() {
            let block = &a[part * quarter + first..][..LANES];
            for lane in 0..LANES {
                sums[lane] += block[lane];
            }
        }
    }
    a[TOGETHER * quarter..].iter().chain(&sums.map(fold)).sum()
}

/// `Σ f(a_i)`.
#[inline(always)]
pub fn sum_map<E: Element>(a: &[E], f: impl Fn(E) -> E) -> E {
    sum_with(a, f, |_| {})
}

/// [`sum_map`] that shows `pass` what it adds next.
#[inline(always)]
fn sum_with<E: Element>(a: &[E], f: impl Fn(E) -> E, pass: impl Fn(&[E; LANES])) -> E {
    let mut sums = [E::ZERO; LANES];
    let (blocks, rest) = a.as_chunks::<LANES>();
    for block in blocks {
        pass(block);
        for lane in 0..LANES {
            sums[lane] += f(block[lane]);
        }
    }
    rest.iter().fold(fold(sums), |total, &x| total + f(x))
}

/// The largest element, -∞ for none.
#[inline(always)]
pub fn max<E: Element>(a: &[E]) -> E {
    let mut best = [E::NEG_INFINITY; LANES];
    let (blocks, rest) = a.as_chunks::<LANES>();
    for block in blocks {
        for lane in 0..LANES {
            best[lane] = block[lane].max(best[lane]);
        }
    }
    let best = std::hint::black_box(best);
    best.iter().chain(rest).fold(E::NEG_INFINITY, |best, &x| x.max(best))
}

/// `y += factor * x`, for use inside of a [`vectorize`]d loop.
#[inline(always)]
pub fn axpy<E: Element>(factor: E, x: &[E], y: &mut [E]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = factor.mul_add(x, *y);
    }
}

/// [`axpy`] as a loop of its own, with the widest instructions.
pub fn add_scaled<E: Element>(factor: E, x: &[E], y: &mut [E]) {
    vectorize(
        #[inline(always)]
        || axpy(factor, x, y),
    );
}

/// The sum of partial sums.
#[inline(always)]
pub(crate) fn fold<E: Element>(sums: [E; LANES]) -> E {
    // Seeing the order of these additions, the compiler would keep the sums of the loop before it
    // in registers of two lanes.
    let mut sums = std::hint::black_box(sums);
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
        width /= 2;
    }
    sums[0]
}

/// Runs `body` over matching chunks of `out` and `input` on all threads.
pub fn for_each_chunk<E: Element>(
    out: &mut [E],
    input: &[E],
    body: impl Fn(&mut [E], &[E]) + Sync + Send,
) {
    assert_eq!(out.len(), input.len());
    for_each((chunks_mut(out, CHUNK), chunks(input, CHUNK)), |_, (out, input)| {
        vectorize(
            #[inline(always)]
            || body(out, input),
        )
    });
}

/// Rows per task for rows of `cols` elements.
pub fn rows_per_task(cols: usize) -> usize {
    (CHUNK / cols.max(1)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reductions_match_plain_sums_at_every_length() {
        for len in 0..70 {
            let a: Vec<f64> = (0..len).map(|i| f64::from(i) * 0.5 - 7.0).collect();
            let b: Vec<f64> = (0..len).map(|i| 1.0 / (1.0 + f64::from(i))).collect();
            let expected: f64 = a.iter().zip(&b).map(|(a, b)| a * b).sum();
            assert!((dot(&a, &b) - expected).abs() < 1e-12);
            assert!((sum_map(&a, |x| x * x) - a.iter().map(|x| x * x).sum::<f64>()).abs() < 1e-9);
            assert_eq!(max(&a), a.iter().copied().fold(f64::NEG_INFINITY, f64::max));
        }
        for len in [0, 1, 63, 64, 65, 1000] {
            let a: Vec<f32> = (0..len).map(|i| i as f32 - 7.0).collect();
            let expected = len as f32 * (len as f32 - 15.0) / 2.0;
            assert_eq!([sum_quarters(&a), sum_once(&a)], [expected; 2]);
        }
    }
}
