//! Single rows of the embedding or of the output layer, trained in place of the base's.

use super::{EMBEDDING, HEAD};
use crate::error::Fault;
use crate::trainable::{Role, Trainable};
use hydralora_kernels::ops::elementwise::add;
use hydralora_kernels::ops::embedding::embedding;
use hydralora_kernels::ops::frozen_linear::FrozenLinear;
use hydralora_kernels::ops::linear::linear;
use hydralora_kernels::ops::rows::join_rows;
use hydralora_kernels::{Tensor, Var};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::OnceLock;

/// PEFT's `trainable_token_indices`: token ids of the embedding, or by module.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub(crate) enum TokenIndices {
    /// Of the embedding.
    Embedding(Vec<u32>),
    /// Of each of these modules.
    Each(BTreeMap<String, Vec<u32>>),
}

impl TokenIndices {
    /// The ids of an end.
    pub(crate) fn of(&self, end: &str) -> &[u32] {
        match self {
            Self::Embedding(ids) if end == EMBEDDING => ids,
            Self::Embedding(_) => &[],
            Self::Each(each) => {
                let mut found = each.iter().filter(|(module, _)| end_of(module) == Some(end));
                found.next().map_or(&[], |(_, ids)| ids)
            }
        }
    }

    /// The ends that some rows of are trained.
    pub(crate) fn ends(&self) -> Vec<&'static str> {
        [EMBEDDING, HEAD].into_iter().filter(|end| !self.of(end).is_empty()).collect()
    }

    /// What makes no sense whatever the model is.
    pub(crate) fn faults(&self) -> Vec<String> {
        let modules = match self {
            Self::Embedding(_) => Vec::new(),
            Self::Each(each) => each.keys().collect(),
        };
        let mut faults: Vec<String> = modules
            .into_iter()
            .filter(|module| end_of(module).is_none())
            .map(|module| format!("`{module}` has no tokens; expected embed_tokens or lm_head"))
            .collect();
        if self.ends().is_empty() && faults.is_empty() {
            faults.push("names no token; expected token ids".to_owned());
        }
        for end in self.ends() {
            let mut ids = self.of(end).to_vec();
            ids.sort_unstable();
            if let Some(twice) = ids.windows(2).find(|pair| pair[0] == pair[1]) {
                faults.push(format!("names token {} twice", twice[0]));
            }
        }
        faults
    }

    /// Makes sure that a vocabulary of that size has all of them.
    pub(super) fn check(&self, vocabulary: usize) -> Result<(), Fault> {
        let ends = self.ends();
        let mut ids = ends.iter().flat_map(|end| self.of(end));
        match ids.find(|&&id| id as usize >= vocabulary) {
            None => Ok(()),
            Some(id) => {
                let message = format!("token {id} is not below the vocabulary's {vocabulary}");
                Err(Fault::new("method.trainable_token_indices", message))
            }
        }
    }
}

/// The end that a module's name means.
fn end_of(module: &str) -> Option<&'static str> {
    match module {
        "embed_tokens" | EMBEDDING => Some(EMBEDDING),
        HEAD => Some(HEAD),
        _ => None,
    }
}

/// The name of an end's rows in a file.
pub(super) fn name_of(end: &str) -> String {
    format!("{end}.token_adapter.trainable_tokens_delta")
}

/// Rows that are trained.
pub(super) struct Rows {
    pub(super) ids: Vec<u32>,
    /// `[k, hidden]`, in the order of the ids.
    pub(super) values: Trainable,
    places: BTreeMap<u32, usize>,
    /// The base's rows, negative, and which row is which token's: `[vocabulary, k]`.
    base: OnceLock<[Var; 2]>,
}

impl Rows {
    pub(super) fn new(end: &str, ids: Vec<u32>, values: Tensor) -> Self {
        let places = ids.iter().enumerate().map(|(at, &id)| (id, at)).collect();
        let values = Trainable::new(name_of(end), Role::Weight, values);
        Self { ids, values, places, base: OnceLock::new() }
    }

    /// `h: [T, hidden]` with the rows of these tokens replaced.
    pub(super) fn embed(&self, h: Var, tokens: &[u32]) -> Var {
        self.embed_with(self.values.var(), h, tokens)
    }

    fn embed_with(&self, values: &Var, h: Var, tokens: &[u32]) -> Var {
        let own = |(row, id): (usize, &u32)| {
            self.places.get(id).map_or(row, |at| tokens.len() + at) as u32
        };
        let rows: Vec<u32> = tokens.iter().enumerate().map(own).collect();
        embedding(&join_rows(&[h, values.clone()]), &rows)
    }

    /// What to add to the logits of `layer`, as `z: [T, k]` and `B: [vocabulary, k]`:
    /// `z = (D − W[ids]) h`, and `B` puts each at its token.
    pub(super) fn output(&self, hidden: &Var, layer: &FrozenLinear) -> [Var; 2] {
        self.output_with(self.values.var(), hidden, layer)
    }

    fn output_with(&self, values: &Var, hidden: &Var, layer: &FrozenLinear) -> [Var; 2] {
        let [less, place] = self.base.get_or_init(|| {
            let mut less = layer.gather(&self.ids);
            less.scale(-1.0);
            let (vocabulary, width) = (layer.out_features(), self.ids.len());
            let mut place = vec![0.0; vocabulary * width];
            for (at, &id) in self.ids.iter().enumerate() {
                place[id as usize * width + at] = 1.0;
            }
            let place = Tensor::from_f64(layer.dtype(), &place, [vocabulary, width]);
            [Var::constant(less), Var::constant(place)]
        });
        let change = add(values, less.clone());
        [linear(hidden, &change, None), place.clone()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hydralora_kernels::check::{gradients, inputs};

    #[test]
    fn rows_take_the_place_of_the_bases() {
        let v = inputs(&[&[6, 3], &[2, 3]]);
        let layer = FrozenLinear::dense(v[0].value().clone());
        let rows = Rows::new(EMBEDDING, vec![4, 1], v[1].value().clone());
        let tokens = [1, 0, 4, 1];
        let h = rows.embed(Var::constant(layer.gather(&tokens)), &tokens).value().to_f64();
        let (base, own) = (v[0].value().to_f64(), v[1].value().to_f64());
        assert_eq!(h, [&own[3..6], &base[0..3], &own[0..3], &own[3..6]].concat());
        let x = inputs(&[&[2, 3]]).remove(0);
        let [z, b] = rows.output(&x, &layer);
        let mut logits = layer.apply(x.value());
        logits.add_assign(linear(&z, &b, None).value());
        let mut changed = base.clone();
        changed[12..15].copy_from_slice(&own[0..3]);
        changed[3..6].copy_from_slice(&own[3..6]);
        let changed = Tensor::from_f64(v[0].value().dtype(), &changed, [6, 3]);
        let wanted = FrozenLinear::dense(changed).apply(x.value()).to_f64();
        for (got, want) in logits.to_f64().iter().zip(wanted) {
            assert!((got - want).abs() < 1e-12);
        }
    }

    #[test]
    fn gradients_reach_the_rows_from_both_ends() {
        let table = inputs(&[&[6, 3]]).remove(0).value().clone();
        let layer = FrozenLinear::dense(table);
        let tokens = [1, 0, 4, 1];
        gradients(&[&[2, 3]], |v| {
            let rows = Rows::new(EMBEDDING, vec![4, 1], v[0].value().clone());
            let h = rows.embed_with(&v[0], Var::constant(layer.gather(&tokens)), &tokens);
            let [z, b] = rows.output_with(&v[0], &h, &layer);
            linear(&z, &b, None)
        });
    }

    #[test]
    fn tokens_are_checked() {
        let read =
            |value: serde_json::Value| -> TokenIndices { serde_json::from_value(value).unwrap() };
        let list = read(serde_json::json!([3, 5]));
        assert_eq!((list.of(EMBEDDING), list.of(HEAD)), (&[3, 5][..], &[][..]));
        assert!(list.faults().is_empty() && list.check(6).is_ok());
        assert!(list.check(5).unwrap_err().message.contains("token 5"));
        let each = read(serde_json::json!({"embed_tokens": [1], "lm_head": [2]}));
        assert_eq!((each.of(EMBEDDING), each.of(HEAD)), (&[1][..], &[2][..]));
        for (value, says) in [
            (serde_json::json!([2, 2]), "token 2 twice"),
            (serde_json::json!([]), "no token"),
            (serde_json::json!({"wte": [1]}), "`wte`"),
        ] {
            let faults = read(value).faults();
            assert!(faults.iter().any(|fault| fault.contains(says)), "{faults:?}");
        }
    }
}
