//! What becomes of the base's tensors when they take in what is trained beside the layers.

use super::{EMBEDDING, EndPair, Ends, HEAD, transposed, weight_of};
use crate::merge::Factors;
use crate::trainable::Trainable;
use hydralora_kernels::{DType, Tensor};

impl Ends {
    /// What becomes of the tensor `name`, in `f32`. A tied output layer comes as the embedding's weight.
    pub(in crate::low_rank) fn merge(&self, name: &str, mut tensor: Tensor) -> Tensor {
        let wide = |trainable: &Trainable| trainable.parameter.value().to_dtype(DType::F32);
        if let Some(copy) = self.copies.get(name) {
            return wide(copy);
        }
        let Some(end) = [EMBEDDING, HEAD].into_iter().find(|end| weight_of(end) == name) else {
            return tensor;
        };
        if let Some(brought) = self.base_of(end) {
            tensor = brought.weight.value().to_dtype(DType::F32);
        }
        let (pair, rows) = match end == EMBEDDING {
            true => (&self.embedding, self.embedding_rows.as_ref()),
            false => {
                let followed = self.embedding_rows.as_ref().filter(|_| self.is_tied == Some(true));
                (&self.head, self.head_rows.as_ref().or(followed))
            }
        };
        if let Some(rows) = rows {
            let (values, width) = (wide(&rows.values), tensor.cols());
            for (&id, row) in rows.ids.iter().zip(values.data::<f32>().chunks_exact(width)) {
                tensor.data_mut::<f32>()[id as usize * width..][..width].copy_from_slice(row);
            }
        }
        if let Some(pair) = pair {
            tensor.add_assign(&product(pair, end == EMBEDDING));
        }
        tensor
    }

    /// Whether a tied output layer is no longer the embedding.
    pub(in crate::low_rank) fn unties(&self) -> bool {
        if self.is_tied != Some(true) {
            return false;
        }
        let copied = |end: &str| self.copies.contains_key(&weight_of(end));
        let copies = copied(HEAD) || (copied(EMBEDDING) && !self.spec.ensure_weight_tying);
        let pairs = self.embedding.is_some() || self.head.is_some();
        copies || pairs || self.head_rows.is_some()
    }

    /// What is trained beside the layers, in words, if anything is.
    pub(in crate::low_rank) fn in_words(&self) -> Option<String> {
        let mut parts = Vec::new();
        if !self.copies.is_empty() {
            let names: Vec<&str> = self.copies.keys().map(String::as_str).take(3).collect();
            parts.push(format!("whole tensors ({}, …)", names.join(", ")));
        }
        if self.embedding.is_some() || self.head.is_some() {
            parts.push(format!("a pair at {}", self.targets().join(" and ")));
        }
        if self.rows().next().is_some() {
            parts.push("rows of tokens".to_owned());
        }
        if !self.brought.is_empty() {
            parts.push("weights of the base".to_owned());
        }
        (!parts.is_empty()).then(|| parts.join(", "))
    }
}

/// `s B A` as `[out, in]`; at the embedding `s (B A)ᵀ`, a row for every token.
fn product(pair: &EndPair, at_embedding: bool) -> Tensor {
    let [a, b] = [&pair.a, &pair.b].map(|part| part.parameter.value().to_dtype(DType::F32));
    let (a, b) = if at_embedding { (transposed(&b), a) } else { (a, b) };
    Factors { a, b, scale: pair.scale, num_experts: 1, beside: None }.product()
}
