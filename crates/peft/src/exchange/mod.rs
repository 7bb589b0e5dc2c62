//! Adapters in other programs' forms, and adapters made of others.

mod gguf;
mod hydralora;
mod lora;
mod official;
pub mod pickle;

pub use gguf::write_gguf;
pub use hydralora::hydralora_from;
pub use lora::{Lora, Pair, read_loras};
pub use official::write_official;

use crate::trainable::TensorMap;
use hydralora_kernels::Tensor;
use hydralora_model::adapter::{Site, SiteShape};
use std::collections::BTreeMap;

/// The layers that an adapter's tensors belong to, with the widths those tensors have.
pub fn shapes_in(tensors: &TensorMap) -> Vec<SiteShape> {
    let mut found: BTreeMap<Site, [usize; 2]> = BTreeMap::new();
    for (name, tensor) in tensors {
        let Some(site) = crate::io::site_of(name) else { continue };
        let [inputs, outputs] = found.entry(site).or_insert([1, 1]);
        let Some(part) = name.strip_prefix(&format!("{site}.")) else { continue };
        let [rows, cols] = [tensor.rows(), tensor.cols()];
        if part.starts_with("lora_A") {
            *inputs = cols;
        } else if part.starts_with("lora_B") {
            *outputs = rows;
        } else if part == "ia3_l" {
            (*inputs, *outputs) = (cols, rows);
        }
    }
    found
        .into_iter()
        .map(|(site, [in_features, out_features])| SiteShape { site, in_features, out_features })
        .collect()
}

/// `Σ_i factors[i] · tensors[i]`, computed in double precision.
pub(crate) fn weighted_sum(tensors: &[&Tensor], factors: &[f64]) -> Tensor {
    let mut sum = vec![0.0; tensors[0].len()];
    for (tensor, factor) in tensors.iter().zip(factors) {
        for (sum, value) in sum.iter_mut().zip(tensor.to_f64()) {
            *sum += factor * value;
        }
    }
    Tensor::from_f64(tensors[0].dtype(), &sum, tensors[0].shape())
}
