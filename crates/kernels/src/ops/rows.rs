//! Moving rows and columns about: learned rows put before packed sequences and taken out again,
//! ranges of columns, columns side by side.

use crate::buffer::Buffer;
use crate::dispatch;
use crate::graph::Var;
use crate::simd;
use crate::tensor::Tensor;
use std::ops::Range;

/// Offsets of packed sequences after `lead` rows were put before each that `starts` marks.
pub fn lead_offsets(offsets: &[usize], lead: usize, starts: &[bool]) -> Vec<usize> {
    assert_eq!(offsets.len(), starts.len() + 1, "one mark per sequence");
    let added = starts.iter().scan(0, |added, &start| {
        *added += if start { lead } else { 0 };
        Some(*added)
    });
    std::iter::once(0).chain(added).zip(offsets).map(|(added, offset)| offset + added).collect()
}

/// Puts the rows of `lead: [p, d]` before every sequence of `x: [T, d]` that `starts` marks.
///
/// # Panics
/// If the extents disagree.
pub fn prepend_rows(lead: &Var, x: &Var, offsets: &[usize], starts: &[bool]) -> Var {
    let (count, width) = (lead.value().rows(), x.value().cols());
    assert_eq!(lead.value().cols(), width, "the leading rows have another width");
    assert_eq!(offsets.last(), Some(&x.value().rows()), "offsets end at the rows");
    let all = lead_offsets(offsets, count, starts);
    let rows = all.last().copied().unwrap_or(0);
    let value = dispatch!(x.value().dtype(), |E| {
        let mut out = Vec::<E>::with_capacity(rows * width);
        for (w, &start) in offsets.windows(2).zip(starts) {
            if start {
                out.extend_from_slice(lead.value().data::<E>());
            }
            out.extend_from_slice(&x.value().data::<E>()[w[0] * width..w[1] * width]);
        }
        Tensor::new(out, [rows, width])
    });
    let (offsets, starts) = (offsets.to_vec(), starts.to_vec());
    Var::computed(value, &[lead, x], move |gradient, parents| {
        if parents.needs(0) {
            let mut sum = Tensor::zeros(gradient.dtype(), [count, width]);
            dispatch!(gradient.dtype(), |E| {
                let sum = sum.data_mut::<E>();
                for (first, _) in all.iter().zip(&starts).filter(|(_, start)| **start) {
                    simd::add_scaled(1.0, &gradient.data::<E>()[first * width..][..sum.len()], sum);
                }
            });
            parents.add(0, sum);
        }
        if parents.needs(1) {
            parents.add(1, without_lead(&gradient, count, &offsets, &starts));
        }
    })
}

/// Takes the first `lead` rows out of every packed sequence of `x` that `starts` marks; `offsets`
/// are those of the rows that stay.
///
/// # Panics
/// If the extents disagree.
pub fn drop_rows(x: &Var, lead: usize, offsets: &[usize], starts: &[bool]) -> Var {
    let value = without_lead(x.value(), lead, offsets, starts);
    let (offsets, starts) = (offsets.to_vec(), starts.to_vec());
    let shape = x.value().shape().to_vec();
    Var::computed(value, &[x], move |gradient, parents| {
        let width = gradient.cols();
        let all = lead_offsets(&offsets, lead, &starts);
        let mut out = Tensor::zeros(gradient.dtype(), shape);
        dispatch!(gradient.dtype(), |E| {
            let out = out.data_mut::<E>();
            for (w, end) in offsets.windows(2).zip(&all[1..]) {
                let len = w[1] - w[0];
                out[(end - len) * width..end * width]
                    .copy_from_slice(&gradient.data::<E>()[w[0] * width..w[1] * width]);
            }
        });
        parents.add(0, out);
    })
}

fn without_lead(x: &Tensor, lead: usize, offsets: &[usize], starts: &[bool]) -> Tensor {
    let all = lead_offsets(offsets, lead, starts);
    assert_eq!(all.last(), Some(&x.rows()), "offsets end at the rows");
    let (rows, width) = (offsets.last().copied().unwrap_or(0), x.cols());
    dispatch!(x.dtype(), |E| {
        let mut out = Vec::<E>::with_capacity(rows * width);
        for (w, end) in offsets.windows(2).zip(&all[1..]) {
            let len = w[1] - w[0];
            out.extend_from_slice(&x.data::<E>()[(end - len) * width..end * width]);
        }
        Tensor::new(out, [rows, width])
    })
}

/// The given rows of `x: [T, d]`, in order; one may be given several times, and then gathers their
/// gradients.
///
/// # Panics
/// If a row is not below `T`.
pub fn take_rows(x: &Var, rows: &[usize]) -> Var {
    let value = select_rows(x.value(), rows);
    let (rows, shape) = (rows.to_vec(), x.value().shape().to_vec());
    Var::computed(value, &[x], move |gradient, parents| {
        parents.add(0, spread_rows(&gradient, &rows, &shape));
    })
}

/// Zeros of the given shape, to whose `rows` those of `x` are added in order.
fn spread_rows(x: &Tensor, rows: &[usize], shape: &[usize]) -> Tensor {
    // The device writes, which is the same where no row is met twice.
    if all_differ(rows) {
        on_device!(rows::scatter(x, rows, shape));
    }
    let width = x.cols();
    let mut out = Tensor::zeros(x.dtype(), shape);
    dispatch!(x.dtype(), |E| {
        let out = out.data_mut::<E>();
        for (&row, from) in rows.iter().zip(x.data::<E>().chunks_exact(width.max(1))) {
            simd::add_scaled(1.0, from, &mut out[row * width..(row + 1) * width]);
        }
    });
    out
}

fn all_differ(rows: &[usize]) -> bool {
    let ascending = rows.windows(2).all(|two| two[0] < two[1]);
    ascending || {
        let mut sorted = rows.to_vec();
        sorted.sort_unstable();
        sorted.windows(2).all(|two| two[0] < two[1])
    }
}

/// The given rows of `x: [T, d]`, in order.
pub fn select_rows(x: &Tensor, rows: &[usize]) -> Tensor {
    on_device!(rows::select(x, rows));
    let cols = x.cols();
    dispatch!(x.dtype(), |E| {
        let mut out = Buffer::<E>::scratch(rows.len() * cols);
        for (out, &row) in out.chunks_exact_mut(cols.max(1)).zip(rows) {
            out.copy_from_slice(&x.data::<E>()[row * cols..(row + 1) * cols]);
        }
        Tensor::new(out, [rows.len(), cols])
    })
}

/// Puts the rows of all `parts: [T_i, d]` one after the other, giving `[Σ T_i, d]`.
///
/// # Panics
/// If there is no part, or if the widths differ.
pub fn join_rows(parts: &[Var]) -> Var {
    let (width, dtype) = (parts[0].value().cols(), parts[0].value().dtype());
    let heights: Vec<usize> = parts.iter().map(|part| part.value().rows()).collect();
    let rows = heights.iter().sum();
    assert!(parts.iter().all(|part| part.value().cols() == width), "rows of different widths");
    let value = dispatch!(dtype, |E| {
        let mut out = Vec::<E>::with_capacity(rows * width);
        parts.iter().for_each(|part| out.extend_from_slice(part.value().data::<E>()));
        Tensor::new(out, [rows, width])
    });
    let parents: Vec<&Var> = parts.iter().collect();
    Var::computed(value, &parents, move |gradient, parents| {
        let mut first = 0;
        for (index, height) in heights.into_iter().enumerate() {
            let rows: Vec<usize> = (first..first + height).collect();
            first += height;
            if parents.needs(index) {
                parents.add(index, select_rows(&gradient, &rows));
            }
        }
    })
}

/// Columns `range` of `x: [T, n]`.
///
/// # Panics
/// If the range reaches past the columns.
pub fn columns(x: &Var, range: Range<usize>) -> Var {
    columns_of_each(x, x.value().cols(), range)
}

/// Columns `range` of every `width` neighbouring columns of `x: [T, n · width]`, giving
/// `[T, n · range.len()]`.
///
/// # Panics
/// If the range reaches past `width`, or the columns are no whole number of such stretches.
pub fn columns_of_each(x: &Var, width: usize, range: Range<usize>) -> Var {
    let (rows, cols, taken) = (x.value().rows(), x.value().cols(), range.len());
    assert!(range.end <= width, "columns out of range");
    assert!(cols.is_multiple_of(width.max(1)), "columns are stretches of {width}");
    let value = dispatch!(x.value().dtype(), |E| {
        let mut out = Buffer::<E>::scratch(x.value().len() / width.max(1) * taken);
        let from = x.value().data::<E>().chunks_exact(width.max(1));
        for (out, from) in out.chunks_exact_mut(taken.max(1)).zip(from) {
            out.copy_from_slice(&from[range.clone()]);
        }
        Tensor::new(out, [rows, cols / width.max(1) * taken])
    });
    Var::computed(value, &[x], move |gradient, parents| {
        // Many ranges of one table add up in one tensor.
        let mut sum =
            parents.take(0).unwrap_or_else(|| Tensor::zeros(gradient.dtype(), [rows, cols]));
        dispatch!(gradient.dtype(), |E| {
            let sums = sum.data_mut::<E>().chunks_exact_mut(width.max(1));
            for (sum, from) in sums.zip(gradient.data::<E>().chunks_exact(taken.max(1))) {
                simd::add_scaled(1.0, from, &mut sum[range.clone()]);
            }
        });
        parents.add(0, sum);
    })
}

/// The same numbers under another shape.
///
/// # Panics
/// If the shape has another number of elements.
pub fn reshape(x: &Var, shape: &[usize]) -> Var {
    let from = x.value().shape().to_vec();
    Var::computed(x.value().clone().reshape(shape), &[x], move |gradient, parents| {
        parents.add(0, gradient.reshape(from));
    })
}

/// `[a | b]` for `a: [T, m]` and `b: [T, n]`.
///
/// # Panics
/// If the heights differ.
pub fn join_columns(a: &Var, b: &Var) -> Var {
    let (rows, left, right) = (a.value().rows(), a.value().cols(), b.value().cols());
    assert_eq!(rows, b.value().rows(), "columns of different heights");
    let value = dispatch!(a.value().dtype(), |E| {
        let mut out = Vec::<E>::with_capacity(rows * (left + right));
        for row in 0..rows {
            out.extend_from_slice(&a.value().data::<E>()[row * left..(row + 1) * left]);
            out.extend_from_slice(&b.value().data::<E>()[row * right..(row + 1) * right]);
        }
        Tensor::new(out, [rows, left + right])
    });
    Var::computed(value, &[a, b], move |gradient, parents| {
        for (index, range) in [(0, 0..left), (1, left..left + right)] {
            let part = columns(&Var::constant(gradient.clone()), range);
            parents.add(index, part.into_value());
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check;

    #[test]
    fn taken_rows_send_their_gradients_home() {
        check::gradients(&[&[5, 3]], |x| take_rows(&x[0], &[4, 0, 2]));
        check::gradients(&[&[5, 3]], |x| take_rows(&x[0], &[4, 0, 4, 2, 4]));
        check::gradients(&[&[2, 3]], |x| take_rows(&x[0], &[1, 1]));
    }

    #[test]
    fn gradients_match_finite_differences() {
        let (offsets, starts) = ([0, 2, 2, 5], [true, false, true]);
        check::gradients(&[&[2, 3], &[5, 3]], |v| prepend_rows(&v[0], &v[1], &offsets, &starts));
        check::gradients(&[&[9, 3]], |v| drop_rows(&v[0], 2, &offsets, &starts));
        check::gradients(&[&[4, 5]], |v| columns(&v[0], 1..3));
        check::gradients(&[&[3, 8]], |v| columns_of_each(&v[0], 4, 1..3));
        check::gradients(&[&[3, 4]], |v| columns(&reshape(&v[0], &[2, 6]), 2..5));
        check::gradients(&[&[4, 5]], |v| {
            join_columns(&columns(&v[0], 2..5), &columns(&v[0], 0..3))
        });
        check::gradients(&[&[2, 3], &[0, 3], &[4, 3]], join_rows);
    }

    #[test]
    fn what_was_put_before_can_be_taken_out() {
        let v = check::inputs(&[&[2, 3], &[5, 3]]);
        let (offsets, starts) = ([0, 2, 5], [true, true]);
        let both = prepend_rows(&v[0], &v[1], &offsets, &starts);
        assert_eq!(lead_offsets(&offsets, 2, &starts), [0, 4, 9]);
        let rows = both.value().to_f64();
        assert_eq!(rows[..6], v[0].value().to_f64());
        assert_eq!(rows[12..18], v[0].value().to_f64());
        let back = drop_rows(&both, 2, &offsets, &starts);
        assert_eq!(back.value().to_f64(), v[1].value().to_f64());
    }
}
