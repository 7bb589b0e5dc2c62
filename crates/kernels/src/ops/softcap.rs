//! `y = c · tanh(x / c)`: numbers stay within `±c`, and small ones nearly as they were (logits and
//! attention scores of Gemma 2, arXiv 2408.00118).

use crate::buffer::Buffer;
use crate::dispatch;
use crate::element::Element;
use crate::simd::vectorize;
use crate::tensor::{Tensor, TensorElement};
use hydralora_runtime::{chunks_mut, for_each};

/// Elements per task.
const CHUNK: usize = 1 << 14;

/// Caps logits of any shape: `cap · tanh(x / cap)`, in their storage when nobody else holds it. A cap
/// counts as `1e-30` below that and as `1e30` above it.
///
/// # Panics
/// If the cap is not positive.
pub fn softcap(mut logits: Tensor, cap: f64) -> Tensor {
    let _part = crate::profile::part("softcap");
    dispatch!(logits.dtype(), |E| {
        let cap = Softcap::<E>::new(cap, 1.0);
        for_each(chunks_mut(logits.data_mut::<E>(), CHUNK), |_, logits| cap.apply(logits));
    });
    logits
}

/// `c · tanh(f x / c)` for numbers that lack a factor `f`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Softcap<E> {
    cap: E,
    /// `f / c`.
    factor: E,
    /// `1 / c`.
    inverse: E,
}

impl<E: Element> Softcap<E> {
    /// Prepares a cap for numbers that lack `factor`.
    ///
    /// # Panics
    /// If the cap is not positive.
    pub(crate) fn new(cap: f64, factor: f64) -> Self {
        assert!(cap > 0.0, "a soft cap is positive, not {cap}");
        // With room below the ends of `f32`: further out no softmax sees a difference.
        let cap = cap.clamp(1e-30, 1e30);
        let [cap, factor, inverse] = [cap, factor / cap, 1.0 / cap].map(E::from_f64);
        Self { cap, factor, inverse }
    }

    /// Caps `values`, for use inside of a [`vectorize`]d loop.
    #[inline(always)]
    pub(crate) fn apply_inline(self, values: &mut [E]) {
        for x in values {
            *x = self.cap * (*x * self.factor).tanh();
        }
    }

    /// Caps `values`.
    pub(crate) fn apply(self, values: &mut [E]) {
        vectorize(
            #[inline(always)]
            || self.apply_inline(values),
        );
    }

    /// `1 − tanh²`, the derivative by `f x`, from what came out.
    #[inline(always)]
    pub(crate) fn slope(self, capped: E) -> E {
        let tanh = capped * self.inverse;
        (-tanh).mul_add(tanh, E::ONE)
    }
}

impl<E: TensorElement> Softcap<E> {
    /// [`slope`](Self::slope) of every number.
    pub(crate) fn slopes(self, capped: &[E]) -> Buffer<E> {
        let mut slopes = Buffer::<E>::scratch(capped.len());
        vectorize(
            #[inline(always)]
            || {
                for (slope, &capped) in slopes.iter_mut().zip(capped) {
                    *slope = self.slope(capped);
                }
            },
        );
        slopes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::element::DType;

    #[test]
    fn values_are_those_of_the_definition() {
        let values: Vec<f64> = (-200..200).map(|i| f64::from(i) * 0.37).collect();
        for cap in [0.5, 30.0, 50.0] {
            let expected: Vec<f64> = values.iter().map(|x| cap * (x / cap).tanh()).collect();
            for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::F64, 1e-15)] {
                let got = softcap(Tensor::from_f64(dtype, &values, [20, 20]), cap);
                assert_eq!(got.shape(), [20, 20]);
                for (got, expected) in got.to_f64().iter().zip(&expected) {
                    assert!((got - expected).abs() <= tolerance * cap.max(expected.abs()));
                }
            }
        }
        assert_eq!(softcap(Tensor::zeros(DType::F32, [0, 3]), 30.0).shape(), [0, 3]);
    }

    #[test]
    fn slopes_match_finite_differences() {
        let (cap, factor, step) = (3.0, 0.7, 1e-6);
        let softcap = Softcap::<f64>::new(cap, factor);
        let x: Vec<f64> = (-20..20).map(|i| f64::from(i) * 0.5).collect();
        let mut moved = [0.0, step, -step].map(|step| x.iter().map(|x| x + step).collect());
        moved.iter_mut().for_each(|x: &mut Vec<f64>| softcap.apply(x));
        let [at, up, down] = moved;
        for ((slope, up), down) in softcap.slopes(&at).iter().zip(&up).zip(&down) {
            assert!((slope * factor - (up - down) / (2.0 * step)).abs() < 1e-8);
        }
    }

    #[test]
    fn extreme_caps_and_logits_stay_finite() {
        let logits = [-f32::MAX, -1e4, -1.0, 0.0, 1e-3, 88.0, f32::MAX];
        for cap in [f64::MIN_POSITIVE, 1e-20, 1.0, 1e20, f64::MAX] {
            let capped = softcap(Tensor::new(logits.to_vec(), [7]), cap);
            assert!(capped.is_finite(), "{cap}: {capped:?}");
            let slopes = Softcap::<f32>::new(cap, 1.0).slopes(capped.data::<f32>());
            assert!(slopes.iter().all(|slope| (-1e-6..=1.0).contains(slope)), "{cap}");
        }
        let infinite = Tensor::new(vec![f32::NEG_INFINITY, f32::INFINITY, f32::NAN], [3]);
        let capped = softcap(infinite, 30.0).to_f32();
        assert_eq!(capped[..2], [-30.0, 30.0]);
        assert!(capped[2].is_nan());
    }

    #[test]
    #[should_panic(expected = "positive")]
    fn a_cap_of_zero_is_refused() {
        softcap(Tensor::zeros(DType::F32, [1]), 0.0);
    }
}
