//! Which linear layers a method changes.

use crate::error::{Error, Result};
use crate::low_rank::{EMBEDDING, HEAD};
use hydralora_model::adapter::{Kind, Site, SiteShape};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Targets as a recipe gives them: one entry or a list. An entry is a preset (`qv`, `ffn`,
/// `attention`, `all`), the end of a layer's name (`q_proj`, `mlp.up_proj`), or a pattern with `*`
/// over whole names (`model.layers.1?.*`: `*` stands for any text, `?` for one character).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Targets {
    /// A single entry.
    One(String),
    /// Several entries; a layer is a target if any matches.
    Many(Vec<String>),
}

impl Default for Targets {
    /// No layer.
    fn default() -> Self {
        Targets::Many(Vec::new())
    }
}

/// The presets and what they stand for.
pub const PRESETS: &[(&str, Kind)] = &[
    ("qv", Kind::QUERY.and(Kind::VALUE)),
    ("ffn", Kind::FEED_FORWARD),
    ("attention", Kind::ATTENTION),
    ("all", Kind::ALL),
];

impl Targets {
    /// The entries.
    pub fn entries(&self) -> &[String] {
        match self {
            Targets::One(entry) => std::slice::from_ref(entry),
            Targets::Many(entries) => entries,
        }
    }

    /// The layers of `sites` that are meant, in order.
    ///
    /// # Errors
    /// If an entry matches nothing.
    pub fn select(&self, sites: &[SiteShape]) -> Result<Vec<SiteShape>> {
        for entry in self.entries() {
            if !sites.iter().any(|shape| matches(entry, shape)) {
                return Err(Error::TargetMatchesNothing {
                    target: entry.clone(),
                    names: modules(sites).join(", "),
                });
            }
        }
        Ok(sites.iter().copied().filter(|shape| self.contain(shape)).collect())
    }

    /// The entries without those that name the embedding or the output layer.
    pub(crate) fn layers(&self) -> Targets {
        let of_layer = |entry: &&String| end_of(entry).is_none();
        Targets::Many(self.entries().iter().filter(of_layer).cloned().collect())
    }

    /// The ends that entries name.
    pub(crate) fn ends(&self) -> Vec<&'static str> {
        self.entries().iter().filter_map(|entry| end_of(entry)).collect()
    }

    /// Whether an entry names that end.
    pub(crate) fn name_end(&self, end: &str) -> bool {
        self.ends().contains(&end)
    }

    /// Whether any entry means this layer.
    pub(crate) fn contain(&self, shape: &SiteShape) -> bool {
        self.entries().iter().any(|entry| matches(entry, shape))
    }
}

/// The embedding or the output layer, where that is what an entry names.
fn end_of(entry: &str) -> Option<&'static str> {
    match entry {
        "embed_tokens" | EMBEDDING => Some(EMBEDDING),
        HEAD => Some(HEAD),
        _ => None,
    }
}

/// The last parts of the layers' names, each once, in order.
pub(crate) fn modules(sites: &[SiteShape]) -> Vec<&'static str> {
    let mut found = Vec::new();
    for shape in sites {
        let module = shape.site.linear.module();
        if !found.contains(&module) {
            found.push(module);
        }
    }
    found
}

fn matches(entry: &str, shape: &SiteShape) -> bool {
    let site = shape.site;
    if let Some((_, kind)) = PRESETS.iter().find(|(name, _)| *name == entry) {
        return site.kind().overlaps(*kind);
    }
    let name = site.to_string();
    if entry.contains(['*', '?']) {
        return glob(entry.as_bytes(), name.as_bytes());
    }
    name.strip_suffix(entry).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// The shortest list of names that means just these layers to PEFT.
pub(crate) fn module_names(sites: &[Site], all: &[SiteShape]) -> Vec<String> {
    let module = |site: &Site| (site.linear.order, site.linear.module());
    let used: BTreeSet<_> = sites.iter().map(module).collect();
    let meant = all.iter().filter(|shape| used.contains(&module(&shape.site))).count();
    if meant == sites.len() {
        used.into_iter().map(|(_, module)| module.to_owned()).collect()
    } else {
        sites.iter().map(ToString::to_string).collect()
    }
}

/// Whether `text` matches `pattern`, where `*` stands for any text and `?` for one character.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    // After a mismatch the last `*` is made to swallow one character more.
    let (mut p, mut t, mut retry) = (0, 0, None);
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                retry = Some((p + 1, t));
                p += 1;
            }
            Some(&c) if c == b'?' || c == text[t] => {
                p += 1;
                t += 1;
            }
            _ => match retry {
                Some((after, from)) => {
                    p = after;
                    t = from + 1;
                    retry = Some((after, from + 1));
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|&c| c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;
    use hydralora_model::adapter::Site;
    use hydralora_model::family::kit::LLAMA_LINEARS;

    fn sites() -> Vec<SiteShape> {
        (0..12)
            .flat_map(|layer| LLAMA_LINEARS.iter().map(move |linear| Site { layer, linear }))
            .map(|site| SiteShape { site, in_features: 4, out_features: 4 })
            .collect()
    }

    fn count(entries: &[&str]) -> usize {
        Targets::Many(entries.iter().map(ToString::to_string).collect())
            .select(&sites())
            .unwrap()
            .len()
    }

    #[test]
    fn presets_names_and_patterns_select_layers() {
        assert_eq!(count(&["qv"]), 24);
        assert_eq!(count(&["ffn"]), 36);
        assert_eq!(count(&["attention"]), 48);
        assert_eq!(count(&["all"]), 84);
        assert_eq!(count(&["down_proj", "mlp.up_proj"]), 24);
        assert_eq!(count(&["model.layers.1.*"]), 7);
        assert_eq!(count(&["model.layers.1?.mlp.*"]), 6);
        assert_eq!(count(&["*.q_proj", "q_proj"]), 12);
        assert_eq!(count(&["model.layers.3.self_attn.k_proj"]), 1);
    }

    #[test]
    fn an_entry_that_matches_nothing_is_named() {
        for entry in ["proj", "w1", "model.layers.99.*", ""] {
            let error = Targets::One(entry.to_owned()).select(&sites()).unwrap_err().to_string();
            assert!(error.contains(&format!("`{entry}`")) && error.contains("q_proj"), "{error}");
        }
    }
}
