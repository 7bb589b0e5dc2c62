//! How a file names and cuts the tensors of a [`LowRankAdapter`](super::LowRankAdapter): every `A` and
//! every head on its own.

use super::{HeadNames, LowRankSpec};
use hydralora_kernels::{Tensor, dispatch};
use hydralora_model::adapter::Site;

pub(super) fn head_name(spec: &LowRankSpec, site: Site, head: usize) -> String {
    match spec.names {
        HeadNames::Single => format!("{site}.lora_B.weight"),
        HeadNames::Numbered => format!("{site}.lora_B{head}.weight"),
    }
}

/// Names of the start values that were taken out of the weight.
pub(super) fn start_names(site: Site) -> [String; 2] {
    ["A", "B"].map(|part| format!("{site}.lora_{part}_start.weight"))
}

pub(super) fn a_name(spec: &LowRankSpec, site: Site, expert: usize) -> String {
    if spec.own_a {
        format!("{site}.lora_A{expert}.weight")
    } else {
        format!("{site}.lora_A.weight")
    }
}

/// Rows `first .. first + count` of `m`.
pub(crate) fn rows(m: &Tensor, first: usize, count: usize) -> Tensor {
    let width = m.cols();
    dispatch!(m.dtype(), |E| {
        Tensor::new(m.data::<E>()[first * width..(first + count) * width].to_vec(), [count, width])
    })
}

pub(crate) fn set_rows(m: &mut Tensor, first: usize, from: &Tensor) {
    let from = from.to_dtype(m.dtype());
    let start = first * m.cols();
    dispatch!(m.dtype(), |E| {
        m.data_mut::<E>()[start..start + from.len()].copy_from_slice(from.data::<E>());
    });
}

/// Columns `head · rank ..` of `b: [out, N·r]` as `[out, r]`.
pub(crate) fn head_columns(b: &Tensor, head: usize, rank: usize) -> Tensor {
    let width = b.cols();
    dispatch!(b.dtype(), |E| {
        let columns: Vec<E> = b
            .data::<E>()
            .chunks_exact(width)
            .flat_map(|row| row[head * rank..(head + 1) * rank].iter().copied())
            .collect();
        Tensor::new(columns, [b.rows(), rank])
    })
}

pub(crate) fn set_head_columns(b: &mut Tensor, head: usize, rank: usize, columns: &Tensor) {
    let columns = columns.to_dtype(b.dtype());
    let width = b.cols();
    dispatch!(b.dtype(), |E| {
        let rows = b.data_mut::<E>().chunks_exact_mut(width);
        for (row, from) in rows.zip(columns.data::<E>().chunks_exact(rank)) {
            row[head * rank..(head + 1) * rank].copy_from_slice(from);
        }
    });
}
