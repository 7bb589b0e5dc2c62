//! Prompt tuning: `p` learned embeddings before every sequence.
//!
//! Lester et al., arXiv 2104.08691. They start from normally distributed numbers, as in PEFT, from
//! the embeddings of random tokens, or from those of a text.

use crate::described::Described;
use crate::error::{Fault, Result};
use crate::method::{MethodOptions, product};
use crate::options::to_map;
use crate::targets::Targets;
use crate::tuned::Tuned;
use crate::virtual_tokens::{
    Encoder, Place, Start, VirtualSpec, VirtualTokens, Widths, check_sizes, common_config,
    every_layer, from_file,
};
use hydralora_kernels::DType;
use hydralora_model::adapter::SiteShape;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// What the embeddings start from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum Init {
    /// Normally distributed numbers.
    #[default]
    Random,
    /// Embeddings of random tokens.
    Vocab,
    /// Embeddings of `init_text`.
    Text,
}

/// Options of prompt tuning in a recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Options {
    /// Number `p` of learned embeddings.
    num_virtual_tokens: usize,
    /// What they start from: `random`, `vocab` or `text`.
    init: Init,
    /// The text of `init: text`.
    init_text: Option<String>,
    #[serde(skip, default = "every_layer")]
    targets: Targets,
}

impl Default for Options {
    fn default() -> Self {
        Self { num_virtual_tokens: 20, init: Init::Random, init_text: None, targets: every_layer() }
    }
}

impl Options {}

impl Described for Options {
    const NAME: &'static str = "prompt-tuning";
    const SUMMARY: &'static str = "learned embeddings before every sequence";
    const PEFT_TYPE: &'static str = "PROMPT_TUNING";

    fn faults(&self) -> Vec<Fault> {
        let mut faults = check_sizes(self.num_virtual_tokens, None);
        let text = self.init_text.as_deref().is_some_and(|text| !text.trim().is_empty());
        if self.init == Init::Text && !text {
            faults.push(Fault::new("method.init_text", "is missing; `init: text` needs it"));
        }
        if self.init != Init::Text && self.init_text.is_some() {
            faults.push(Fault::new("method.init_text", "is used only with `init: text`"));
        }
        faults
    }

    // A file's tokens are learned; what they once started from no longer matters.
    fn from_peft(config: &Map<String, Value>) -> Result<Self, Vec<Fault>> {
        from_file(config, &[])
    }
}

impl MethodOptions for Options {
    fn to_recipe(&self) -> Map<String, Value> {
        to_map(self)
    }

    fn to_peft(&self) -> Map<String, Value> {
        let mut config = common_config("PROMPT_TUNING", self.num_virtual_tokens);
        config.insert("prompt_tuning_init".to_owned(), json!("RANDOM"));
        config.insert("prompt_tuning_init_text".to_owned(), Value::Null);
        config.insert("tokenizer_name_or_path".to_owned(), Value::Null);
        config
    }

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn whole_model(&self) -> bool {
        true
    }

    fn stored_numbers(&self, sites: &[SiteShape]) -> usize {
        product(&[self.num_virtual_tokens, Widths::of(sites).hidden.max(1)])
    }

    fn build(&self, sites: &[SiteShape], dtype: DType, seed: u64) -> Box<dyn Tuned> {
        let hidden = Widths::of(sites).hidden;
        let spec = VirtualSpec {
            num_virtual_tokens: self.num_virtual_tokens,
            place: Place::Prompt,
            encoder: Encoder::Table,
            table_width: hidden,
            width: hidden,
            start: match (self.init, &self.init_text) {
                (Init::Vocab, _) => Start::Vocabulary,
                (Init::Text, Some(text)) => Start::Text(text.clone()),
                _ => Start::Normal,
            },
        };
        Box::new(VirtualTokens::new(Box::new(self.clone()), None, spec, dtype, seed))
    }
}
