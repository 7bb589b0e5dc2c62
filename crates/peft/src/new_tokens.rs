//! Rows of tokens that a vocabulary did not have before.

use crate::low_rank::{EMBEDDING, HEAD};
use hydralora_kernels::{Element, Tensor, dispatch};
use hydralora_model::Decoder;
use serde_json::{Map, Value, json};

/// The option that lists the tokens whose rows are trained.
const OPTION: &str = "trainable_token_indices";
/// The rows of the embedding in it.
const OF_EMBEDDING: &str = "embed_tokens";
/// Rows that are read at a time for their mean.
const CHUNK: usize = 1024;

/// The options of a method, as a recipe writes them, with the rows of the tokens `ids` among what is
/// trained, at the embedding and at the output layer, which `tied` says are one; none where the method
/// trains no rows. What is trained whole is left alone.
pub fn with_trained_rows(
    options: &Map<String, Value>,
    ids: &[u32],
    tied: bool,
) -> Option<Map<String, Value>> {
    let listed = options.get(OPTION)?;
    let mut options = options.clone();
    let saved: Vec<&str> = options
        .get("modules_to_save")
        .and_then(Value::as_array)
        .map_or_else(Vec::new, |keys| keys.iter().filter_map(Value::as_str).collect());
    let is_saved = |end: &str| saved.iter().any(|key| !key.is_empty() && end.ends_with(key));
    let mut embedding: Vec<Value> = Vec::new();
    let mut head: Option<Vec<Value>> = None;
    match listed {
        Value::Array(ids) => embedding.clone_from(ids),
        Value::Object(each) => {
            for (module, ids) in each {
                let ids = ids.as_array().cloned().unwrap_or_default();
                if module == HEAD { head = Some(ids) } else { embedding = ids }
            }
        }
        _ => {}
    }
    let kept_tied = options.get("ensure_weight_tying") == Some(&json!(true));
    // A tied output layer follows the embedding's rows, and a copy of it only where that is asked for.
    let apart = match is_saved(EMBEDDING) {
        true => !(tied && kept_tied),
        false => !tied || head.is_some(),
    };
    let add = |list: &mut Vec<Value>| {
        for id in ids {
            let id = json!(id);
            if !list.contains(&id) {
                list.push(id);
            }
        }
    };
    if !is_saved(EMBEDDING) {
        add(&mut embedding);
    }
    if apart && !is_saved(HEAD) {
        add(head.get_or_insert_default());
    }
    let rows = match head {
        Some(head) => {
            let parts = [(OF_EMBEDDING, embedding), (HEAD, head)];
            let parts = parts.into_iter().filter(|(_, ids)| !ids.is_empty());
            parts.map(|(module, ids)| (module.to_owned(), json!(ids))).collect()
        }
        None if embedding.is_empty() => Value::Null,
        None => json!(embedding),
    };
    options.insert(OPTION.to_owned(), rows);
    Some(options)
}

/// The mean of the rows of the matrix of that name in a checkpoint, those of the tokens `new` left
/// out: where `transformers` lets rows of new tokens start.
pub(crate) fn mean_row(decoder: &Decoder, name: &str, new: &[u32]) -> Option<Vec<f64>> {
    let rows = decoder.config().vocab_size;
    let old: Vec<u32> = (0..rows as u32).filter(|id| !new.contains(id)).collect();
    let mut sum: Vec<f64> = Vec::new();
    for ids in old.chunks(CHUNK) {
        let values = decoder.rows_of(name, ids)?;
        let width = values.cols();
        sum.resize(width, 0.0);
        dispatch!(values.dtype(), |E| {
            for row in values.data::<E>().chunks_exact(width.max(1)) {
                sum.iter_mut().zip(row).for_each(|(sum, value)| *sum += value.to_f64());
            }
        });
    }
    let count = old.len().max(1) as f64;
    Some(sum.into_iter().map(|sum| sum / count).collect())
}

/// Puts `row` in place of the rows `at` of `matrix`.
pub(crate) fn put_rows(matrix: &mut Tensor, at: impl Iterator<Item = usize>, row: &[f64]) {
    let width = matrix.cols();
    let row = Tensor::from_f64(matrix.dtype(), row, [1, width]);
    dispatch!(matrix.dtype(), |E| {
        let (row, values) = (row.data::<E>(), matrix.data_mut::<E>());
        at.for_each(|at| values[at * width..][..width].copy_from_slice(row));
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(options: Value, tied: bool) -> Value {
        let options = options.as_object().unwrap();
        with_trained_rows(options, &[7, 8], tied).unwrap()[OPTION].clone()
    }

    #[test]
    fn rows_are_trained_wherever_nothing_else_trains_them() {
        let plain = json!({OPTION: null, "modules_to_save": []});
        assert_eq!(rows(plain.clone(), true), json!([7, 8]));
        assert_eq!(rows(plain, false), json!({"embed_tokens": [7, 8], "lm_head": [7, 8]}));
        assert_eq!(rows(json!({OPTION: [8, 2]}), true), json!([8, 2, 7]));
        assert_eq!(
            rows(json!({OPTION: {"model.embed_tokens": [2], "lm_head": [3]}}), true),
            json!({"embed_tokens": [2, 7, 8], "lm_head": [3, 7, 8]})
        );
        let saved = |modules: Value, kept: bool| json!({OPTION: null, "modules_to_save": modules, "ensure_weight_tying": kept});
        let both = json!(["embed_tokens", "lm_head"]);
        assert_eq!(rows(saved(both, false), false), Value::Null);
        let one = json!(["embed_tokens"]);
        assert_eq!(rows(saved(one.clone(), true), true), Value::Null);
        assert_eq!(rows(saved(one.clone(), false), true), json!({"lm_head": [7, 8]}));
        assert_eq!(rows(saved(one, false), false), json!({"lm_head": [7, 8]}));
        // A plain list is of the embedding.
        assert_eq!(rows(saved(json!(["lm_head"]), false), false), json!([7, 8]));
        assert!(with_trained_rows(&Map::new(), &[7], true).is_none(), "no option, no rows");
    }
}
