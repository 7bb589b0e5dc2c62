//! Rows of keys or values as they are stored: as computed, in half precision, or as whole numbers with a
//! factor.

use half::f16;
use half::slice::HalfFloatSliceExt;
use hydralora_kernels::{DType, Element, Tensor, TensorElement, dispatch};
use std::borrow::Cow;
use std::ops::Range;

/// Numbers that share a factor in [`CacheDType::Q8`].
const GROUP: usize = 32;

/// How keys and values are stored. They are computed with as numbers of the decoder's type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CacheDType {
    /// As computed, in single precision (or double, if the decoder computes in it).
    #[default]
    F32,
    /// In half precision: half the bytes, each number off by at most 2⁻¹¹ of itself.
    F16,
    /// In 8 bits, with a factor for every 32 numbers: 9/32 of the bytes, each number off by at most
    /// 1/254 of the largest of its 32.
    Q8,
}

impl CacheDType {
    /// Returns its name in options: `f32`, `f16` or `q8`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Q8 => "q8",
        }
    }

    /// Counts the bytes of a row of `width` numbers of `dtype`.
    pub(super) fn row_bytes(self, dtype: DType, width: usize) -> usize {
        match self {
            Self::F32 => width * dtype.size(),
            Self::F16 => width * size_of::<f16>(),
            Self::Q8 => width + width.div_ceil(GROUP) * size_of::<f32>(),
        }
    }
}

/// Room for rows of `width` numbers.
#[derive(Clone)]
pub(super) struct Rows {
    width: usize,
    stored: Stored,
}

#[derive(Clone)]
enum Stored {
    Wide(Tensor),
    Half(DType, Vec<f16>),
    /// Codes, and a factor for every group of a row.
    Whole(DType, Vec<i8>, Vec<f32>),
}

impl Rows {
    /// Makes room for `capacity` rows.
    pub(super) fn new(of: CacheDType, dtype: DType, capacity: usize, width: usize) -> Self {
        let stored = match of {
            CacheDType::F32 => Stored::Wide(Tensor::zeros(dtype, [capacity, width])),
            CacheDType::F16 => Stored::Half(dtype, vec![f16::ZERO; capacity * width]),
            CacheDType::Q8 => {
                let groups = capacity * width.div_ceil(GROUP);
                Stored::Whole(dtype, vec![0; capacity * width], vec![0.0; groups])
            }
        };
        Self { width, stored }
    }

    pub(super) fn width(&self) -> usize {
        self.width
    }

    pub(super) fn dtype(&self) -> DType {
        match &self.stored {
            Stored::Wide(rows) => rows.dtype(),
            Stored::Half(dtype, _) | Stored::Whole(dtype, ..) => *dtype,
        }
    }

    pub(super) fn stored_as(&self) -> CacheDType {
        match &self.stored {
            Stored::Wide(_) => CacheDType::F32,
            Stored::Half(..) => CacheDType::F16,
            Stored::Whole(..) => CacheDType::Q8,
        }
    }

    /// Rows there is room for.
    pub(super) fn capacity(&self) -> usize {
        match &self.stored {
            Stored::Wide(rows) => rows.rows(),
            Stored::Half(_, numbers) => numbers.len().checked_div(self.width).unwrap_or(0),
            Stored::Whole(_, codes, _) => codes.len().checked_div(self.width).unwrap_or(0),
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.capacity() * self.stored_as().row_bytes(self.dtype(), self.width)
    }

    /// Copies some rows to the beginning of room for `capacity` rows.
    pub(super) fn copied(&self, rows: Range<usize>, capacity: usize) -> Self {
        let mut copy = Self::new(self.stored_as(), self.dtype(), capacity, self.width);
        copy.copy_from(0, self, rows);
        copy
    }

    /// Overwrites the rows from `at` on with `rows` of `other`, which stores them alike.
    ///
    /// # Panics
    /// If it does not, or there is no room.
    pub(super) fn copy_from(&mut self, at: usize, other: &Self, rows: Range<usize>) {
        let to = |per_row: usize| at * per_row..(at + rows.len()) * per_row;
        let from = |per_row: usize| rows.start * per_row..rows.end * per_row;
        let (width, groups) = (self.width, self.width.div_ceil(GROUP));
        match (&mut self.stored, &other.stored) {
            (Stored::Wide(own), Stored::Wide(other)) => dispatch!(own.dtype(), |E| {
                own.data_mut::<E>()[to(width)].copy_from_slice(&other.data::<E>()[from(width)]);
            }),
            (Stored::Half(_, own), Stored::Half(_, other)) => {
                own[to(width)].copy_from_slice(&other[from(width)]);
            }
            (Stored::Whole(_, own, factors), Stored::Whole(_, other, others)) => {
                own[to(width)].copy_from_slice(&other[from(width)]);
                factors[to(groups)].copy_from_slice(&others[from(groups)]);
            }
            _ => panic!("rows are stored alike"),
        }
    }

    /// Moves rows to the beginning.
    pub(super) fn move_down(&mut self, rows: Range<usize>) {
        let (width, groups) = (self.width, self.width.div_ceil(GROUP));
        let of = |per_row: usize| rows.start * per_row..rows.end * per_row;
        match &mut self.stored {
            Stored::Wide(own) => dispatch!(own.dtype(), |E| {
                own.data_mut::<E>().copy_within(of(width), 0);
            }),
            Stored::Half(_, own) => own.copy_within(of(width), 0),
            Stored::Whole(_, own, factors) => {
                own.copy_within(of(width), 0);
                factors.copy_within(of(groups), 0);
            }
        }
    }

    /// Stores numbers, row-major, from row `at` on.
    pub(super) fn write<E: TensorElement>(&mut self, at: usize, numbers: &[E]) {
        let (first, width) = (at * self.width, self.width);
        match &mut self.stored {
            Stored::Wide(own) => {
                own.data_mut::<E>()[first..first + numbers.len()].copy_from_slice(numbers);
            }
            Stored::Half(_, own) => {
                let own = &mut own[first..first + numbers.len()];
                match E::DTYPE {
                    DType::F32 => own.convert_from_f32_slice(bytemuck::cast_slice(numbers)),
                    DType::F64 => own.convert_from_f64_slice(bytemuck::cast_slice(numbers)),
                }
            }
            Stored::Whole(_, own, factors) => {
                let own = own[first..first + numbers.len()].chunks_mut(width);
                let factors = factors[at * width.div_ceil(GROUP)..].iter_mut();
                let mut factors = factors;
                for (codes, row) in own.zip(numbers.chunks(width)) {
                    for (codes, group) in codes.chunks_mut(GROUP).zip(row.chunks(GROUP)) {
                        let factor = whole(group, codes);
                        if let Some(place) = factors.next() {
                            *place = factor;
                        }
                    }
                }
            }
        }
    }

    /// The first `rows` rows as numbers.
    pub(super) fn read<E: TensorElement>(&self, rows: usize) -> Cow<'_, [E]> {
        let used = rows * self.width;
        match &self.stored {
            Stored::Wide(own) => Cow::Borrowed(&own.data::<E>()[..used]),
            Stored::Half(_, own) => {
                let mut numbers = vec![E::ZERO; used];
                match E::DTYPE {
                    DType::F32 => {
                        own[..used].convert_to_f32_slice(bytemuck::cast_slice_mut(&mut numbers));
                    }
                    DType::F64 => {
                        own[..used].convert_to_f64_slice(bytemuck::cast_slice_mut(&mut numbers));
                    }
                }
                Cow::Owned(numbers)
            }
            Stored::Whole(_, own, factors) => {
                let mut numbers = vec![E::ZERO; used];
                let rows = numbers.chunks_mut(self.width).zip(own[..used].chunks(self.width));
                let factors = factors.chunks(self.width.div_ceil(GROUP));
                for ((row, codes), factors) in rows.zip(factors) {
                    let groups = row.chunks_mut(GROUP).zip(codes.chunks(GROUP)).zip(factors);
                    for ((group, codes), &factor) in groups {
                        for (number, &code) in group.iter_mut().zip(codes) {
                            *number = E::from_f64(f64::from(f32::from(code) * factor));
                        }
                    }
                }
                Cow::Owned(numbers)
            }
        }
    }

    /// Rows that lie there as numbers, for fetching them ahead; none if they are stored otherwise.
    pub(super) fn as_numbers(&self) -> &[f32] {
        match &self.stored {
            Stored::Wide(rows) if rows.dtype() == DType::F32 => rows.data::<f32>(),
            _ => &[],
        }
    }
}

/// Rounds numbers to `codes`, whole ones from −127 to 127, and gives their factor.
fn whole<E: Element>(numbers: &[E], codes: &mut [i8]) -> f32 {
    let size = numbers.iter().map(|number| number.to_f64().abs() as f32).fold(0.0, f32::max);
    let factor = size / 127.0;
    let inverse = if factor > 0.0 { factor.recip() } else { 0.0 };
    for (code, number) in codes.iter_mut().zip(numbers) {
        // A cast keeps to the type's bounds.
        *code = (number.to_f64() as f32 * inverse).round_ties_even() as i8;
    }
    factor
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(len: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 7919 + 13) % 1009) as f32 / 252.0 - 2.0).collect()
    }

    #[test]
    fn stored_numbers_are_off_by_no_more_than_is_said() {
        // A width that is no multiple of the group.
        let (width, rows) = (80, 9);
        let given = numbers(width * rows);
        for of in [CacheDType::F32, CacheDType::F16, CacheDType::Q8] {
            let mut stored = Rows::new(of, DType::F32, rows + 3, width);
            let (first, rest) = given.split_at(4 * width);
            stored.write(0, first);
            stored.write(4, rest);
            let read = stored.read::<f32>(rows);
            for (row, expected) in read.chunks(width).zip(given.chunks(width)) {
                for (group, expected) in row.chunks(GROUP).zip(expected.chunks(GROUP)) {
                    let size = expected.iter().map(|x| x.abs()).fold(0.0, f32::max);
                    for (found, expected) in group.iter().zip(expected) {
                        let allowed = match of {
                            CacheDType::F32 => 0.0,
                            CacheDType::F16 => expected.abs() / 2048.0,
                            CacheDType::Q8 => size / 253.9,
                        };
                        assert!((found - expected).abs() <= allowed, "{of:?} {found} {expected}");
                    }
                }
            }
            let copy = stored.copied(2..7, 11);
            assert_eq!(copy.read::<f32>(5)[..], read[2 * width..7 * width]);
            stored.move_down(3..9);
            assert_eq!(stored.read::<f32>(6)[..], copy_of(&given, of, width)[3 * width..]);
        }
    }

    fn copy_of(given: &[f32], of: CacheDType, width: usize) -> Vec<f32> {
        let mut stored = Rows::new(of, DType::F32, given.len() / width, width);
        stored.write(0, given);
        stored.read::<f32>(given.len() / width).into_owned()
    }

    #[test]
    fn bytes_are_those_that_are_said() {
        for (of, expected) in
            [(CacheDType::F32, 512), (CacheDType::F16, 256), (CacheDType::Q8, 144)]
        {
            let rows = Rows::new(of, DType::F32, 10, 128);
            assert_eq!((rows.bytes(), rows.capacity(), rows.width()), (10 * expected, 10, 128));
            assert_eq!(of.row_bytes(DType::F32, 128), expected);
        }
    }
}
