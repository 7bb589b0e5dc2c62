//! `a + b`, `factor · a`, and products with a learned vector along rows or columns.

use crate::buffer::Buffer;
use crate::dispatch;
use crate::graph::Var;
use crate::simd::{rows_per_task, vectorize};
use crate::tensor::{Tensor, TensorElement};
use hydralora_runtime::{chunks_mut, for_each};

/// `a + b` for equal shapes. Works in the storage of `b` when nobody else holds it, so pass the
/// freshly computed operand second.
pub fn add(a: &Var, b: Var) -> Var {
    let _part = crate::profile::part("add");
    let (mut sum, b) = b.take();
    sum.add_assign(a.value());
    Var::computed(sum, &[a, &b], |gradient, parents| {
        parents.add(1, gradient.clone());
        parents.add(0, gradient);
    })
}

/// `factor · a`.
pub fn scale(a: &Var, factor: f64) -> Var {
    let scaled = |tensor: &Tensor| {
        let mut out = tensor.clone();
        out.scale(factor);
        out
    };
    Var::computed(scaled(a.value()), &[a], move |gradient, parents| {
        let mut gradient = gradient;
        gradient.scale(factor);
        parents.add(0, gradient);
    })
}

/// `y_tj = x_tj · l_j` for `x: [T, n]` and `l` of `n` elements under any shape.
///
/// # Panics
/// If the widths differ.
pub fn scale_columns(x: &Var, l: &Var) -> Var {
    assert_eq!(x.value().cols(), l.value().len(), "one factor per column");
    let (saved_x, factors) = (x.save(), l.value().clone());
    let y = times_columns(x.value().clone(), &factors);
    Var::computed(y, &[x, l], move |gradient, parents| {
        if parents.needs(1) {
            let x = saved_x.get();
            let sums = dispatch!(gradient.dtype(), |E| {
                let mut sums = Buffer::<E>::zeros(factors.len());
                add_column_products(gradient.data::<E>(), x.data::<E>(), &mut sums);
                Tensor::new(sums, factors.shape())
            });
            parents.add(1, sums);
        }
        if parents.needs(0) {
            parents.add(0, times_columns(gradient, &factors));
        }
    })
}

/// [`scale_columns`] in the storage of `x` when nobody else holds it. What is kept for the gradient of
/// `l` is the result, which its reader keeps as well more often than not, and `x = y / l`; a factor
/// that is exactly zero gets no gradient.
///
/// # Panics
/// If the widths differ.
pub fn scale_columns_in_place(x: Var, l: &Var) -> Var {
    assert_eq!(x.value().cols(), l.value().len(), "one factor per column");
    let (y, x) = x.take();
    let factors = l.value().clone();
    let y = times_columns(y, &factors);
    let saved = l.needs_grad().then(|| y.clone());
    Var::computed(y, &[&x, l], move |gradient, parents| {
        if let Some(saved) = saved.filter(|_| parents.needs(1)) {
            let sums = dispatch!(gradient.dtype(), |E| {
                let mut sums = Buffer::<E>::zeros(factors.len());
                add_column_products(gradient.data::<E>(), saved.data::<E>(), &mut sums);
                for (sum, &l) in sums.iter_mut().zip(factors.data::<E>()) {
                    *sum = if l == 0.0 { 0.0 } else { *sum / l };
                }
                Tensor::new(sums, factors.shape())
            });
            parents.add(1, sums);
        }
        if parents.needs(0) {
            parents.add(0, times_columns(gradient, &factors));
        }
    })
}

/// `y_tj = x_tj + b_j` for a constant `shift: [n]`, in the storage of `x` when nobody else holds it.
///
/// # Panics
/// If the widths differ.
pub fn shift_columns(x: Var, shift: &Tensor) -> Var {
    let (mut y, x) = x.take();
    assert_eq!(y.cols(), shift.len(), "one shift per column");
    dispatch!(y.dtype(), |E| {
        for row in y.data_mut::<E>().chunks_exact_mut(shift.len().max(1)) {
            crate::simd::add_scaled(1.0, shift.data::<E>(), row);
        }
    });
    Var::computed(y, &[&x], |gradient, parents| parents.add(0, gradient))
}

/// `y_ij = e_i · m_ij` for `m: [r, n]` and `e` of `r` elements under any shape.
///
/// # Panics
/// If the heights differ.
pub fn scale_rows(m: &Var, e: &Var) -> Var {
    assert_eq!(m.value().rows(), e.value().len(), "one factor per row");
    let (saved, factors) = (m.value().clone(), e.value().clone());
    let y = times_rows(saved.clone(), &factors);
    Var::computed(y, &[m, e], move |gradient, parents| {
        if parents.needs(1) {
            let width = saved.cols().max(1);
            let sums = dispatch!(gradient.dtype(), |E| {
                let pairs = gradient.data::<E>().chunks(width).zip(saved.data::<E>().chunks(width));
                let sums: Vec<E> = pairs.map(|(g, m)| crate::simd::dot(g, m)).collect();
                Tensor::new(sums, factors.shape())
            });
            parents.add(1, sums);
        }
        if parents.needs(0) {
            parents.add(0, times_rows(gradient, &factors));
        }
    })
}

fn times_columns(mut x: Tensor, factors: &Tensor) -> Tensor {
    on_device!(pointwise::times_columns(&x, factors));
    let width = factors.len().max(1);
    dispatch!(x.dtype(), |E| {
        let factors = factors.data::<E>();
        let rows = chunks_mut(x.data_mut::<E>(), rows_per_task(width) * width);
        for_each(rows, |_, rows| {
            vectorize(
                #[inline(always)]
                || {
                    for row in rows.chunks_exact_mut(width) {
                        for (x, &l) in row.iter_mut().zip(factors) {
                            *x *= l;
                        }
                    }
                },
            );
        });
    });
    x
}

fn times_rows(mut m: Tensor, factors: &Tensor) -> Tensor {
    let width = m.cols().max(1);
    dispatch!(m.dtype(), |E| {
        let factors = factors.data::<E>();
        for (row, &e) in m.data_mut::<E>().chunks_mut(width).zip(factors) {
            for m in row {
                *m *= e;
            }
        }
    });
    m
}

/// `sums_j += Σ_t a_tj b_tj`.
fn add_column_products<E: TensorElement>(a: &[E], b: &[E], sums: &mut [E]) {
    let width = sums.len().max(1);
    vectorize(
        #[inline(always)]
        || {
            for (a, b) in a.chunks_exact(width).zip(b.chunks_exact(width)) {
                for ((sum, &a), &b) in sums.iter_mut().zip(a).zip(b) {
                    *sum += a * b;
                }
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check;

    #[test]
    fn gradients_match_finite_differences() {
        check::gradients(&[&[2, 3], &[2, 3]], |x| add(&scale(&x[0], -1.5), x[1].clone()));
        check::gradients(&[&[4]], |x| add(&x[0], x[0].clone()));
        let shift = check::inputs(&[&[3]])[0].value().clone();
        check::gradients(&[&[4, 3]], |x| shift_columns(scale(&x[0], 2.0), &shift));
        let moved = shift_columns(Var::constant(Tensor::zeros(shift.dtype(), [2, 3])), &shift);
        assert_eq!(moved.value().to_f64(), shift.to_f64().repeat(2));
    }

    #[test]
    fn learned_factors_match_finite_differences() {
        check::gradients(&[&[4, 3], &[3, 1]], |x| scale_columns(&x[0], &x[1]));
        check::gradients(&[&[4, 3], &[1, 3]], |x| {
            scale_columns(&scale_columns(&x[0], &x[1]), &x[1])
        });
        check::gradients(&[&[4, 3], &[1, 3]], |x| {
            let once = scale_columns_in_place(scale(&x[0], 2.0), &x[1]);
            scale_columns_in_place(once, &x[1])
        });
        check::gradients(&[&[4, 3], &[4, 1]], |x| scale_rows(&x[0], &x[1]));
        check::gradients(&[&[0, 3], &[3]], |x| scale_columns(&x[0], &x[1]));
        check::f32_agrees(&[&[300, 70], &[70]], 1e-5, |x| scale_columns(&x[0], &x[1]));
    }
}
