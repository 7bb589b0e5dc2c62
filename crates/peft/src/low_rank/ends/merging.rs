//! What becomes of the base's tensors when they take in what is trained beside the layers.

use super::{EMBEDDING, EndPair, Ends, EndsSpec, HEAD, transposed, weight_of};
use crate::merge::Factors;
use crate::trainable::Trainable;
use crate::tuned::Beside;
use hydralora_kernels::{DType, Tensor};
use serde_json::json;

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

    /// What is trained beside the layers as the folder of a plain LoRA holds it; none with pairs at the
    /// ends, which would take the size and the scale of the layers' pairs.
    pub(in crate::low_rank) fn as_of_lora(&self) -> Option<Beside> {
        if self.embedding.is_some() || self.head.is_some() {
            return None;
        }
        let mut beside = Beside::default();
        self.export(&|trainable| trainable.parameter.value().clone(), &mut beside.tensors);
        self.to_file(&mut beside.tensors);
        beside.tensors.values_mut().for_each(|tensor| *tensor = tensor.to_dtype(DType::F32));
        let EndsSpec { modules_to_save, tokens, ensure_weight_tying, .. } = &self.spec;
        if !self.copies.is_empty() {
            beside.config.insert("modules_to_save".to_owned(), json!(modules_to_save));
            beside.config.insert("ensure_weight_tying".to_owned(), json!(ensure_weight_tying));
        }
        if let Some(tokens) = tokens.as_ref().filter(|_| self.rows().next().is_some()) {
            beside.config.insert("trainable_token_indices".to_owned(), json!(tokens));
        }
        Some(beside)
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
