//! The number types a tensor can hold, as one trait the kernels are written against.
//!
//! Models train and run in `f32`; `f64` exists so that every formula can be checked by finite
//! differences and against a double-precision reference without a second implementation.

use bytemuck::Pod;
use std::fmt::{Debug, Display};
use std::iter::Sum;
use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub, SubAssign};

/// Element type of a [`Tensor`](crate::Tensor).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// 32-bit IEEE float.
    F32,
    /// 64-bit IEEE float.
    F64,
}

impl DType {
    /// Size of one element in bytes.
    pub fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F64 => 8,
        }
    }
}

impl Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::F64 => "f64",
        })
    }
}

/// A floating-point number the kernels can compute with.
pub trait Element:
    Pod
    + Send
    + Sync
    + Debug
    + Display
    + PartialOrd
    + Default
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + SubAssign
    + MulAssign
    + Sum
{
    /// The run-time tag of this type.
    const DTYPE: DType;
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// -∞.
    const NEG_INFINITY: Self;

    /// Rounds a double to this type.
    fn from_f64(value: f64) -> Self;
    /// Widens to a double.
    fn to_f64(self) -> f64;
    /// `self * a + b` with one rounding.
    fn mul_add(self, a: Self, b: Self) -> Self;
    /// `e^self`; the `f32` version is branch-free, so that loops over it vectorise.
    fn exp(self) -> Self;
    /// `tanh(self)`; the `f32` version is as free of branches as its `exp`.
    fn tanh(self) -> Self;
    /// Square root.
    fn sqrt(self) -> Self;
    /// The larger of two numbers.
    fn max(self, other: Self) -> Self;
    /// Neither infinite nor NaN.
    fn is_finite(self) -> bool;
}

/// `q` and `s`, a power of two, so that `e^x = s (1 + q)`: range reduction to `|r| <= ln2/2` and a
/// polynomial of degree 6. For `x` in `[-87.33654, 88]`.
#[inline(always)]
fn exp_parts(x: f32) -> (f32, f32) {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    // Adding and subtracting 1.5 * 2^23 rounds to the nearest integer without a call.
    const ROUND: f32 = 12_582_912.0;
    let shifted = x.mul_add(LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = (-n).mul_add(LN2_HI, x);
    let r = (-n).mul_add(LN2_LO, r);
    let mut p = 1.987_569_1e-4_f32;
    p = p.mul_add(r, 1.398_2e-3);
    p = p.mul_add(r, 8.333_452e-3);
    p = p.mul_add(r, 4.166_579_6e-2);
    p = p.mul_add(r, 1.666_666_5e-1);
    p = p.mul_add(r, 0.5);
    let bits = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let scale = f32::from_bits(bits.wrapping_add(127).wrapping_shl(23) as u32);
    (p.mul_add(r * r, r), scale)
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const NEG_INFINITY: Self = f32::NEG_INFINITY;

    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        value as f32
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        f32::mul_add(self, a, b)
    }
    /// Within 2 ulp of the exact value for arguments in `[-87, 88]`, 0 or the largest power of two
    /// range's end outside it.
    #[inline(always)]
    fn exp(self) -> Self {
        let underflow = self < -87.336_54;
        let x = if self > 88.0 { 88.0 } else { self };
        let x = if x < -87.336_54 { -87.336_54 } else { x };
        let (less_one, scale) = exp_parts(x);
        let y = less_one + 1.0;
        if underflow { 0.0 } else { y * scale }
    }
    /// `(e^2x − 1) / (e^2x + 1)` of the magnitude, the numerator without cancellation: within 4 ulp.
    #[inline(always)]
    fn tanh(self) -> Self {
        // Where the result rounds to one.
        const END: f32 = 9.5;
        let magnitude = self.abs();
        let magnitude = if magnitude > END { END } else { magnitude };
        let (less_one, scale) = exp_parts(magnitude + magnitude);
        let above_one = scale.mul_add(less_one, scale - 1.0);
        (above_one / (above_one + 2.0)).copysign(self)
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        f32::sqrt(self)
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        if self > other { self } else { other }
    }
    #[inline(always)]
    fn is_finite(self) -> bool {
        f32::is_finite(self)
    }
}

impl Element for f64 {
    const DTYPE: DType = DType::F64;
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const NEG_INFINITY: Self = f64::NEG_INFINITY;

    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        value
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        f64::mul_add(self, a, b)
    }
    #[inline(always)]
    fn exp(self) -> Self {
        f64::exp(self)
    }
    #[inline(always)]
    fn tanh(self) -> Self {
        f64::tanh(self)
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        f64::sqrt(self)
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        if self > other { self } else { other }
    }
    #[inline(always)]
    fn is_finite(self) -> bool {
        f64::is_finite(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp_over_its_range() {
        let mut worst = 0.0_f64;
        for i in -870_000..880_000 {
            let x = i as f32 * 1e-4;
            let exact = f64::from(x).exp();
            let ulp = f64::from(f32::EPSILON) * exact;
            worst = worst.max((f64::from(Element::exp(x)) - exact).abs() / ulp);
        }
        assert!(worst < 2.0, "worst error {worst} ulp");
    }

    #[test]
    fn tanh_is_within_four_ulp() {
        let mut worst = 0.0_f64;
        let mut check = |x: f32| {
            let exact = f64::from(x).tanh();
            let error = (f64::from(Element::tanh(x)) - exact).abs();
            worst = worst.max(error / (f64::from(f32::EPSILON) * exact.abs()));
            assert_eq!(Element::tanh(-x), -Element::tanh(x));
        };
        (1..200_000).for_each(|i| check(i as f32 * 5e-5));
        (-120..0).for_each(|exponent| check(1.3 * 2.0_f32.powi(exponent)));
        assert!(worst < 4.0, "worst error {worst} ulp");
    }

    #[test]
    fn tanh_handles_the_ends() {
        for x in [9.5_f32, 100.0, f32::MAX, f32::INFINITY] {
            assert_eq!([Element::tanh(x), Element::tanh(-x)], [1.0, -1.0]);
        }
        assert_eq!(Element::tanh(-0.0_f32).to_bits(), (-0.0_f32).to_bits());
        assert!(Element::tanh(f32::NAN).is_nan());
    }

    #[test]
    fn exp_handles_the_ends() {
        assert_eq!(Element::exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(Element::exp(-1000.0_f32), 0.0);
        assert_eq!(Element::exp(0.0_f32), 1.0);
        assert!(Element::exp(f32::NAN).is_nan());
    }
}
