//! Models with the tokens that a recipe or an adapter adds to their vocabulary.

use crate::failure::bad_input;
use crate::plan::check_base;
use crate::recipe::Recipe;
use anyhow::Context;
use hydralora_model::{AddedToken, ModelSource};
use hydralora_peft::io::{self, Metadata};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::Path;

/// What an adapter needs of its base beyond what it has on disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Growth {
    tokens: Vec<AddedToken>,
    /// The fewest rows of the embedding.
    rows: usize,
}

/// Adds the tokens of `data.add_tokens` to `source`, has the method train their rows, and gives the
/// tokens that the model has not been trained with.
pub(crate) fn add_of_recipe(
    source: &mut ModelSource,
    recipe: &mut Recipe,
) -> anyhow::Result<Vec<u32>> {
    let asked = &recipe.data.add_tokens;
    if asked.is_empty() {
        return Ok(Vec::new());
    }
    for (index, token) in asked.iter().enumerate() {
        if let Some(id) = source.tokenizer.token_to_id(&token.text) {
            return Err(bad_input(format!(
                "data.add_tokens[{index}]: {:?} is a token of the model already, {id}; leave it out, and \
                 list {id} in method.trainable_token_indices if its row is to be trained",
                token.text
            )));
        }
    }
    let before = source.config.vocab_size;
    let texts: Vec<(String, bool)> =
        asked.iter().map(|token| (token.text.clone(), token.special)).collect();
    let added = source.add_tokens(&texts, 0).context("data.add_tokens")?;
    // Tokens that a folder lists without a row get one here, and it has to be learnt too.
    let rows = (before..source.config.vocab_size).map(|id| id as u32);
    let new: BTreeSet<u32> = added.iter().map(|token| token.id).chain(rows).collect();
    let new = Vec::from_iter(new);
    recipe.train_rows(&new, source.config.tie_word_embeddings)?;
    Ok(new)
}

/// Adds to `source` what the adapters in `folders` need.
///
/// # Errors
/// If one was trained on another model, or they need different things.
pub(crate) fn add_of_adapters(source: &mut ModelSource, folders: &[&Path]) -> anyhow::Result<()> {
    let mut first: Option<(&Path, Growth)> = None;
    for folder in folders {
        check_base(source, folder)?;
        let growth = growth_of(source, folder)?;
        match &first {
            None => first = Some((folder, growth)),
            Some((_, wanted)) if *wanted == growth => {}
            Some((other, _)) => {
                return Err(bad_input(format!(
                    "{} and {} are for vocabularies with different added tokens; use each in a run of its \
                     own",
                    other.display(),
                    folder.display()
                )));
            }
        }
    }
    let Some((folder, Growth { tokens, rows })) = first else { return Ok(()) };
    if tokens.is_empty() && rows <= source.config.vocab_size {
        return Ok(());
    }
    let texts: Vec<(String, bool)> =
        tokens.iter().map(|token| (token.content.clone(), token.special)).collect();
    let given = source.add_tokens(&texts, rows).with_context(|| folder.display().to_string())?;
    if let Some((wanted, given)) = tokens.iter().zip(&given).find(|(wanted, given)| wanted != given)
    {
        return Err(bad_input(format!(
            "{}: adds the token {:?} as {}, and to this model's tokenizer it would be {}; expected the \
             model it was trained on",
            folder.display(),
            wanted.content,
            wanted.id,
            given.id
        )));
    }
    Ok(())
}

/// [`add_of_adapters`] for one or none.
pub(crate) fn add_of_adapter(
    source: &mut ModelSource,
    folder: Option<&Path>,
) -> anyhow::Result<()> {
    add_of_adapters(source, folder.as_slice())
}

/// Refuses an adapter that was trained with another vocabulary than `source` has by now, when nothing can
/// be added to it any more.
pub(crate) fn check_added(source: &ModelSource, folder: &Path) -> anyhow::Result<()> {
    const ADVICE: &str =
        "what a server's vocabulary is, the adapters decide that it begins with (--adapter)";
    let Growth { tokens, rows } = growth_of(source, folder)?;
    if let Some(token) = tokens.iter().find(|token| !source.added.contains(token)) {
        let content = &token.content;
        return Err(bad_input(format!("the adapter adds the token {content:?}; {ADVICE}")));
    }
    let known = source.config.vocab_size;
    if rows > known {
        return Err(bad_input(format!(
            "the adapter's vocabulary has {rows} rows, and this server's {known}; {ADVICE}"
        )));
    }
    let is_own = own_metadata(folder)?.is_some();
    if let Some(token) = source.added.iter().find(|token| is_own && !tokens.contains(token)) {
        let content = &token.content;
        return Err(bad_input(format!(
            "the adapter was trained without the token {content:?}, which this server has; {ADVICE}"
        )));
    }
    Ok(())
}

/// What an adapter of ours says of itself; of a folder of another program the metadata say nothing of
/// added tokens.
fn own_metadata(folder: &Path) -> anyhow::Result<Option<Metadata>> {
    Ok(io::read_metadata(folder)?.filter(|metadata| !metadata.base_fingerprint.is_empty()))
}

fn growth_of(source: &ModelSource, folder: &Path) -> anyhow::Result<Growth> {
    match own_metadata(folder)? {
        Some(metadata) => Ok(Growth { tokens: metadata.added_tokens, rows: 0 }),
        None => growth_of_other(source, folder),
    }
}

/// What a folder of another program needs: its tensors say how many rows the embedding has, its
/// tokenizer which tokens they are.
fn growth_of_other(source: &ModelSource, folder: &Path) -> anyhow::Result<Growth> {
    let path = folder.join("tokenizer.json");
    if !path.is_file() {
        return Ok(Growth::default());
    }
    let shown = path.display();
    let bytes =
        hydralora_files::bytes_of(&path).map_err(|error| bad_input(format!("{shown}: {error}")))?;
    let json: Value = serde_json::from_slice(&bytes)
        .map_err(|error| bad_input(format!("{shown}: not valid JSON: {error}")))?;
    let listed = json["added_tokens"].as_array().map_or(&[][..], Vec::as_slice);
    let mut tokens: Vec<AddedToken> = listed
        .iter()
        .filter_map(|token| serde_json::from_value(token.clone()).ok())
        .filter(|token: &AddedToken| source.tokenizer.token_to_id(&token.content).is_none())
        .collect();
    tokens.sort_by_key(|token| token.id);
    let rows = io::vocabulary_of(folder)?;
    // A tokenizer may list tokens that nobody trained a row for.
    let trained = io::trained_tokens(folder)?;
    let has_row = |token: &AddedToken| {
        (token.id as usize) < source.config.vocab_size.max(rows) || trained.contains(&token.id)
    };
    tokens.retain(has_row);
    Ok(Growth { tokens, rows })
}
