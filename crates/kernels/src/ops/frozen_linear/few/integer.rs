//! Products of packed weights with a few rows of activations, in whole numbers.
//!
//! A packed weight is a scale times small whole numbers, block by block. Rounding the activations of
//! a block to 16 bits, with a scale of their own, makes the sum over the block one of whole numbers,
//! `Σ q_i x_i`, which a processor does sixteen or more at a time; widening every weight to `f32`
//! first takes three times as long. The rounding is `1/65278` of the largest activation of the block
//! at most.
//!
//! The sum over a block is exact, and blocks are added one after the other. So every way of
//! multiplying gives the same bits, and a row of activations gives the same whatever rows are beside
//! it. [`portable`] says what is computed; [`wide`] does it with the wider instructions of x86. It
//! multiplies eight rows of the weight, a lane of a vector each, so that what is done once for a block
//! (scales, additions of `f32`) is done for eight at a time, and lays the eight out once for up to
//! [`TOGETHER`] rows of activations.

use super::{Rows, rows_ahead};
use crate::block::BlockFormat;
use crate::simd::{self, vectorize};
use std::ops::Range;

/// Numbers of a block.
const BLOCK: usize = 32;

/// Rows of the weight that are multiplied together.
pub(super) const EIGHT: usize = 8;

/// Most rows of activations that are multiplied together.
const TOGETHER: usize = 16;

/// Where in a block of a format its parts are.
#[derive(Clone, Copy)]
struct Layout {
    /// Bytes of a block.
    bytes: usize,
    /// Where the quants start; the scale is at 0.
    quants: usize,
    /// Two quants a byte, without a sign.
    nibbles: bool,
    /// Where the number is that is added to each, and what it is multiplied by.
    offset: Option<(usize, f32)>,
}

const fn layout(format: BlockFormat) -> Option<Layout> {
    Some(match format {
        BlockFormat::Q8_0 => Layout { bytes: 34, quants: 2, nibbles: false, offset: None },
        BlockFormat::Q4_0 => {
            Layout { bytes: 18, quants: 2, nibbles: true, offset: Some((0, -8.0)) }
        }
        BlockFormat::Q4_1 => Layout { bytes: 20, quants: 4, nibbles: true, offset: Some((2, 1.0)) },
        _ => return None,
    })
}

/// Rows of activations, rounded to 16 bits.
pub(crate) struct Rounded {
    layout: Layout,
    /// Blocks of a row.
    blocks: usize,
    /// `[blocks, rows]`, so that what is multiplied by a block of the weight lies together.
    values: Vec<Values>,
    /// As `values`.
    factors: Vec<Factors>,
}

/// The values of a block.
#[derive(Clone, Copy)]
struct Values {
    /// `256 · high + low`, both with a sign.
    high: [i8; BLOCK],
    low: [i8; BLOCK],
    /// The values; of every four first those at 0 and 2, then those at 1 and 3.
    whole: [i16; BLOCK],
}

/// What belongs to the values of a block.
#[derive(Clone, Copy)]
struct Factors {
    /// What they are multiplied by. Not finite where an activation is not, so that it is not lost.
    scale: f32,
    /// Their sum, times the scale.
    sum: f32,
    /// Their sum.
    whole: i32,
}

impl Rounded {
    /// `x: [rows, inputs]` for weights of `format`; none if their products are not done this way.
    pub(crate) fn new(format: BlockFormat, x: &[f32], inputs: usize) -> Option<Self> {
        let layout = layout(format)?;
        let (of_rows, _) = x.as_chunks::<BLOCK>();
        let blocks = inputs / BLOCK;
        let rows = of_rows.len() / blocks.max(1);
        let none = Values { high: [0; BLOCK], low: [0; BLOCK], whole: [0; BLOCK] };
        let mut rounded = Self {
            layout,
            blocks,
            values: vec![none; of_rows.len()],
            factors: vec![Factors { scale: 0.0, sum: 0.0, whole: 0 }; of_rows.len()],
        };
        vectorize(
            #[inline(always)]
            || {
                for (row, of_row) in of_rows.chunks_exact(blocks.max(1)).enumerate() {
                    for (at, block) in of_row.iter().enumerate() {
                        let (values, factors) = round(block);
                        rounded.values[at * rows + row] = Values::new(&values);
                        rounded.factors[at * rows + row] = factors;
                    }
                }
            },
        );
        Some(rounded)
    }

    /// Adds the products with rows `range` of a weight whose bytes are `weight` to
    /// `out: [range, rows]`.
    pub(crate) fn add_products(
        &self,
        weight: &[u8],
        range: Range<usize>,
        rows: usize,
        out: &mut [f32],
    ) {
        #[cfg(target_arch = "x86_64")]
        #[allow(unsafe_code)]
        if wide::available() {
            // SAFETY: the processor has the instructions.
            return unsafe { wide::add_products(self, weight, range, rows, out) };
        }
        portable::add_products(self, weight, range, rows, out);
    }
}

impl Values {
    #[inline(always)]
    fn new(values: &[i16; BLOCK]) -> Self {
        let mut new = Self { high: [0; BLOCK], low: [0; BLOCK], whole: [0; BLOCK] };
        for at in 0..BLOCK {
            new.low[at] = values[at] as i8;
            new.high[at] = ((values[at] - i16::from(new.low[at])) >> 8) as i8;
        }
        for at in (0..BLOCK).step_by(4) {
            let of_four = [values[at], values[at + 2], values[at + 1], values[at + 3]];
            new.whole[at..at + 4].copy_from_slice(&of_four);
        }
        new
    }
}

/// Rounds a block.
#[inline(always)]
fn round(block: &[f32; BLOCK]) -> ([i16; BLOCK], Factors) {
    /// Added to a number below 2²² it leaves the nearest whole number in the low bits.
    const SHIFT: f32 = 12_582_912.0;
    /// Whose bytes, both with a sign, are 127.
    const LARGEST: f32 = 32_639.0;
    // Without their signs numbers are in the order of their bits, infinity and what is no number last;
    // and the largest of whole numbers may be looked for in any order, several at a time.
    let mut peak = 0;
    for x in block {
        peak = x.abs().to_bits().max(peak);
    }
    let peak = f32::from_bits(peak);
    let inverse = if peak > f32::MIN_POSITIVE { LARGEST / peak } else { 0.0 };
    let (mut values, mut sum) = ([0; BLOCK], 0);
    for (value, x) in values.iter_mut().zip(block) {
        let whole = (x * inverse + SHIFT).to_bits() as i32 - SHIFT.to_bits() as i32;
        *value = whole as i16;
        sum += i32::from(*value);
    }
    let scale = peak / LARGEST;
    (values, Factors { scale, sum: sum as f32 * scale, whole: sum })
}

mod portable {
    use super::*;
    use crate::block::half_at;

    /// As [`Rounded::add_products`].
    pub(super) fn add_products(
        x: &Rounded,
        weight: &[u8],
        range: Range<usize>,
        rows: usize,
        out: &mut [f32],
    ) {
        let weight = Rows::whole(weight, x.blocks * x.layout.bytes);
        for (at, out) in range.zip(out.chunks_exact_mut(rows)) {
            let [of_weight] = weight.group(at, 1, at + 1);
            for (row, out) in out.iter_mut().enumerate() {
                *out += product(x, of_weight, rows, row);
            }
        }
    }

    /// The product of a row of the weight with one of `rows` of `x`.
    fn product(x: &Rounded, weight: &[u8], rows: usize, row: usize) -> f32 {
        let layout = x.layout;
        let (mut sum, mut offset) = (0.0_f32, 0.0_f32);
        for (at, block) in weight.chunks_exact(layout.bytes).enumerate() {
            let (values, factors) = (&x.values[at * rows + row], &x.factors[at * rows + row]);
            let value = |at: usize| 256 * i32::from(values.high[at]) + i32::from(values.low[at]);
            let quants = &block[layout.quants..];
            let quant = |at: usize| match (layout.nibbles, at < BLOCK / 2) {
                (false, _) => i32::from(quants[at] as i8),
                (true, true) => i32::from(quants[at] & 15),
                (true, false) => i32::from(quants[at - BLOCK / 2] >> 4),
            };
            let whole: i32 = (0..BLOCK).map(|at| quant(at) * value(at)).sum();
            sum = (half_at(block, 0) * factors.scale).mul_add(whole as f32, sum);
            if let Some((at, factor)) = layout.offset {
                offset = half_at(block, at).mul_add(factor * factors.sum, offset);
            }
        }
        sum + offset
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
mod wide;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{dequantize, quantize};

    const FORMATS: [BlockFormat; 3] = [BlockFormat::Q8_0, BlockFormat::Q4_0, BlockFormat::Q4_1];

    fn numbers(len: usize, seed: usize) -> Vec<f32> {
        (0..len).map(|i| (((i + seed) * 7919 + 13) % 1009) as f32 / 504.5 - 1.0).collect()
    }

    fn packed(format: BlockFormat, outputs: usize, inputs: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        quantize(format, &numbers(outputs * inputs, 5), &mut bytes);
        bytes
    }

    #[test]
    fn products_are_those_of_the_widened_weight_within_the_rounding() {
        for (format, (outputs, inputs, rows)) in
            FORMATS.into_iter().flat_map(|f| [(7, 96, 1), (4, 32, 3), (1, 64, 2)].map(|s| (f, s)))
        {
            let (weight, x) = (packed(format, outputs, inputs), numbers(rows * inputs, 77));
            let mut wide = vec![0.0; outputs * inputs];
            dequantize(format, &weight, &mut wide);
            let mut out = vec![0.0; outputs * rows];
            let rounded = Rounded::new(format, &x, inputs).unwrap();
            rounded.add_products(&weight, 0..outputs, rows, &mut out);
            for (at, &got) in out.iter().enumerate() {
                let (o, row) = (at / rows, at % rows);
                let terms = wide[o * inputs..][..inputs].iter().zip(&x[row * inputs..]);
                let terms: Vec<f64> = terms.map(|(w, x)| f64::from(w * x)).collect();
                let (sum, size) =
                    (terms.iter().sum::<f64>(), terms.iter().map(|t| t.abs()).sum::<f64>());
                assert!((f64::from(got) - sum).abs() < 3e-5 * size, "{format} {at}: {got} {sum}");
            }
        }
    }

    #[test]
    fn all_ways_give_the_same_bits_and_rows_do_not_depend_on_others() {
        const OUTPUTS: usize = 11;
        const INPUTS: usize = 576;
        // Of the largest quants, and of activations that round to the largest, too.
        let rows_of_x = [1, 2, 15, TOGETHER, TOGETHER + 1, 3 * TOGETHER + 5];
        let inputs = |rows: usize| {
            let mut x = numbers(rows * INPUTS, 3);
            x[..INPUTS].fill(if rows.is_multiple_of(2) { 1.0 } else { -1.0 });
            x
        };
        for (format, (fill, rows)) in FORMATS
            .into_iter()
            .flat_map(|f| [0xFF, 0x80, 0x7F].map(|fill| (f, fill)))
            .flat_map(|(f, fill)| rows_of_x.map(|rows| (f, (fill, rows))))
        {
            let mut weight = packed(format, OUTPUTS, INPUTS);
            let layout = layout(format).unwrap();
            for block in weight[..4 * INPUTS / BLOCK * layout.bytes].chunks_exact_mut(layout.bytes)
            {
                block[layout.quants..].fill(fill);
            }
            let x = inputs(rows);
            let rounded = Rounded::new(format, &x, INPUTS).unwrap();
            let mut expected = vec![0.0; OUTPUTS * rows];
            portable::add_products(&rounded, &weight, 0..OUTPUTS, rows, &mut expected);
            let bits = |numbers: &[f32]| numbers.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            for (row, x) in x.chunks_exact(INPUTS).enumerate() {
                let alone = Rounded::new(format, x, INPUTS).unwrap();
                let mut got = [0.0; OUTPUTS];
                alone.add_products(&weight, 0..OUTPUTS, 1, &mut got);
                let beside: Vec<f32> = expected.iter().skip(row).step_by(rows).copied().collect();
                assert_eq!(bits(&got), bits(&beside), "{format} row {row} of {rows}");
            }
            #[cfg(target_arch = "x86_64")]
            for way in wide::dot::ALL {
                if wide::available() && wide::has(way) {
                    let mut got = vec![0.0; OUTPUTS * rows];
                    // SAFETY: the processor has the instructions.
                    #[allow(unsafe_code)]
                    unsafe {
                        wide::add_products_by(way, &rounded, &weight, 0..OUTPUTS, rows, &mut got);
                    }
                    assert_eq!(bits(&got), bits(&expected), "{format} way {way} of {rows} rows");
                }
            }
        }
    }

    #[test]
    fn rounding_keeps_zeros_and_what_is_not_finite() {
        let mut x = numbers(96, 1);
        x[..32].fill(0.0);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            x[40] = bad;
            for format in FORMATS {
                let weight = packed(format, 1, 96);
                let rounded = Rounded::new(format, &x, 96).unwrap();
                assert_eq!((rounded.factors[0].scale, rounded.factors[0].sum), (0.0, 0.0));
                let mut out = [0.0];
                rounded.add_products(&weight, 0..1, 1, &mut out);
                assert!(!out[0].is_finite(), "{format} {bad}");
            }
        }
        for largest in [1e-30, 1.0, 1e30] {
            let x = numbers(32, 9).iter().map(|x| x * largest).collect::<Vec<_>>();
            let rounded = Rounded::new(BlockFormat::Q8_0, &x, 32).unwrap();
            let peak = x.iter().fold(0.0_f32, |peak, x| peak.max(x.abs()));
            for (at, x) in x.iter().enumerate() {
                let Values { high, low, whole } = &rounded.values[0];
                let value = 256 * i16::from(high[at]) + i16::from(low[at]);
                assert_eq!(value, whole[at / 4 * 4 + [0, 2, 1, 3][at % 4]]);
                let back = f32::from(value) * rounded.factors[0].scale;
                assert!((back - x).abs() <= peak / 65_200.0, "{x} {back}");
            }
        }
    }
}
