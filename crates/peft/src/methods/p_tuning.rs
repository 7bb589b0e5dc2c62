//! P-tuning: embeddings before every sequence, made by a small network that is trained with its
//! input table: an MLP, or a bidirectional LSTM and an MLP.
//!
//! Liu et al., arXiv 2103.10385; the networks are PEFT's. After training only what the network made
//! is kept.

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

/// The network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum EncoderKind {
    /// Three linear layers with ReLU between them.
    #[default]
    Mlp,
    /// A bidirectional LSTM and two linear layers with ReLU between them.
    Lstm,
    /// None: what it once made is trained on directly.
    None,
}

/// Options of P-tuning in a recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Options {
    /// Number `p` of embeddings.
    num_virtual_tokens: usize,
    /// The network: `mlp`, `lstm` or `none`.
    encoder: EncoderKind,
    /// Its width; the model's if not given.
    encoder_hidden_size: Option<usize>,
    /// Layers of the LSTM.
    encoder_num_layers: usize,
    #[serde(skip, default = "every_layer")]
    targets: Targets,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            num_virtual_tokens: 20,
            encoder: EncoderKind::Mlp,
            encoder_hidden_size: None,
            encoder_num_layers: 2,
            targets: every_layer(),
        }
    }
}

impl Options {}

impl Described for Options {
    const NAME: &'static str = "p-tuning";
    const SUMMARY: &'static str =
        "embeddings before every sequence, made by a small trained network";
    const PEFT_TYPE: &'static str = "P_TUNING";

    fn faults(&self) -> Vec<Fault> {
        let mut faults = check_sizes(self.num_virtual_tokens, self.encoder_hidden_size);
        if self.encoder == EncoderKind::Lstm && self.encoder_num_layers == 0 {
            faults.push(Fault::new("method.encoder_num_layers", "is 0; expected at least 1"));
        }
        faults
    }

    // The encoder's dropout matters only while the encoder is trained, and a file has none.
    fn from_peft(config: &Map<String, Value>) -> Result<Self, Vec<Fault>> {
        let mut config = config.clone();
        if let Some(Value::String(kind)) = config.get_mut("encoder_reparameterization_type") {
            kind.make_ascii_lowercase();
        }
        from_file(
            &config,
            &[
                ("encoder_hidden_size", "encoder_hidden_size"),
                ("encoder_num_layers", "encoder_num_layers"),
                ("encoder_reparameterization_type", "encoder"),
            ],
        )
    }
}

impl MethodOptions for Options {
    fn to_recipe(&self) -> Map<String, Value> {
        to_map(self)
    }

    fn to_peft(&self) -> Map<String, Value> {
        let mut config = common_config("P_TUNING", self.num_virtual_tokens);
        let kind = if self.encoder == EncoderKind::Lstm { "LSTM" } else { "MLP" };
        config.insert("encoder_reparameterization_type".to_owned(), json!(kind));
        config.insert("encoder_hidden_size".to_owned(), json!(self.encoder_hidden_size));
        config.insert("encoder_num_layers".to_owned(), json!(self.encoder_num_layers));
        config.insert("encoder_dropout".to_owned(), json!(0.0));
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

    fn as_stored(&self) -> Option<Box<dyn MethodOptions>> {
        Some(Box::new(Options { encoder: EncoderKind::None, ..self.clone() }))
    }

    fn build(&self, sites: &[SiteShape], dtype: DType, seed: u64) -> Box<dyn Tuned> {
        let width = Widths::of(sites).hidden;
        let hidden = self.encoder_hidden_size.unwrap_or(width);
        let spec = VirtualSpec {
            num_virtual_tokens: self.num_virtual_tokens,
            place: Place::Prompt,
            encoder: match self.encoder {
                EncoderKind::Mlp => Encoder::Mlp { hidden },
                EncoderKind::Lstm => Encoder::Lstm { hidden, num_layers: self.encoder_num_layers },
                EncoderKind::None => Encoder::Table,
            },
            table_width: width,
            width,
            start: Start::Normal,
        };
        let plain = Options { encoder: EncoderKind::None, ..self.clone() };
        let (options, plain) = (Box::new(self.clone()), Box::new(plain));
        Box::new(VirtualTokens::new(options, Some(plain), spec, dtype, seed))
    }
}
