//! Prefix tuning: `p` learned keys and values before those of every sequence, in every layer.
//!
//! Li & Liang, arXiv 2101.00190. With `projection` they are made by a small network,
//! `W₂ tanh(W₁ E + b₁) + b₂`, of which only the result is kept after training. Keys are learned as
//! they are used, without rotation, and tokens keep positions `p`, `p + 1`, …, as in PEFT.

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

/// What the keys and values start from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum Init {
    /// Normally distributed numbers.
    #[default]
    Random,
    /// Zeros.
    Zero,
}

/// Options of prefix tuning in a recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Options {
    /// Number `p` of learned positions.
    num_virtual_tokens: usize,
    /// Whether a small network makes them.
    projection: bool,
    /// The network's width; that of the keys if not given.
    encoder_hidden_size: Option<usize>,
    /// What the learned table starts from: `random` or `zero`.
    init: Init,
    #[serde(skip, default = "every_layer")]
    targets: Targets,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            num_virtual_tokens: 20,
            projection: false,
            encoder_hidden_size: None,
            init: Init::Random,
            targets: every_layer(),
        }
    }
}

impl Options {}

impl Described for Options {
    const NAME: &'static str = "prefix-tuning";
    const SUMMARY: &'static str = "learned keys and values before every sequence in every layer";
    const PEFT_TYPE: &'static str = "PREFIX_TUNING";

    fn faults(&self) -> Vec<Fault> {
        check_sizes(self.num_virtual_tokens, self.encoder_hidden_size)
    }

    fn from_peft(config: &Map<String, Value>) -> Result<Self, Vec<Fault>> {
        from_file(
            config,
            &[("encoder_hidden_size", "encoder_hidden_size"), ("prefix_projection", "projection")],
        )
    }
}

impl MethodOptions for Options {
    fn to_recipe(&self) -> Map<String, Value> {
        to_map(self)
    }

    fn to_peft(&self) -> Map<String, Value> {
        let mut config = common_config("PREFIX_TUNING", self.num_virtual_tokens);
        config.insert("prefix_projection".to_owned(), json!(self.projection));
        config.insert("encoder_hidden_size".to_owned(), json!(self.encoder_hidden_size));
        config
    }

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn whole_model(&self) -> bool {
        true
    }

    fn stored_numbers(&self, sites: &[SiteShape]) -> usize {
        let Widths { key_value, layers, .. } = Widths::of(sites);
        product(&[self.num_virtual_tokens, 2, layers.max(1), key_value.max(1)])
    }

    fn as_stored(&self) -> Option<Box<dyn MethodOptions>> {
        Some(Box::new(Options { projection: false, ..self.clone() }))
    }

    fn build(&self, sites: &[SiteShape], dtype: DType, seed: u64) -> Box<dyn Tuned> {
        let Widths { key_value, layers, .. } = Widths::of(sites);
        let width = 2 * layers * key_value;
        let hidden = self.encoder_hidden_size.unwrap_or(key_value);
        let spec = VirtualSpec {
            num_virtual_tokens: self.num_virtual_tokens,
            place: Place::Prefix(key_value),
            encoder: if self.projection { Encoder::Projection { hidden } } else { Encoder::Table },
            table_width: if self.projection { key_value } else { width },
            width,
            start: if self.init == Init::Zero { Start::Zero } else { Start::Normal },
        };
        let plain = Options { projection: false, ..self.clone() };
        let (options, plain) = (Box::new(self.clone()), Box::new(plain));
        Box::new(VirtualTokens::new(options, Some(plain), spec, dtype, seed))
    }
}
