//! LoRA: `y = W0 x + s · B A x`, `s = alpha / r` or, rank-stabilised, `alpha / √r`.
//!
//! Hu et al., arXiv 2106.09685; the rank-stabilised scale is from Kalajdzievski, arXiv 2312.03732.
//! `A` starts Kaiming-uniform, `B` at zero, so that training starts from the base model.

use crate::error::{Fault, Result};
use crate::low_rank::{DropoutMask, HeadNames, LowRankAdapter, LowRankSpec, Mixing};
use crate::method::{Method, MethodOptions, Tuned, read_section};
use crate::options::{if_sound, LoraConfigKeys, check_common, scale};
use crate::targets::Targets;
use hydralora_kernels::DType;
use hydralora_model::adapter::SiteShape;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

pub(super) struct Lora;
pub(super) static METHOD: Lora = Lora;

/// Options of LoRA in a recipe.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Options {
    /// Rank `r` of the update.
    rank: usize,
    /// Numerator of the scale.
    alpha: f64,
    /// Scale by `alpha / √r` instead of `alpha / r`.
    use_rslora: bool,
    /// Dropout probability on the input of `A`.
    dropout: f64,
    /// The layers to change.
    targets: Targets,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            rank: 8,
            alpha: 16.0,
            use_rslora: false,
            dropout: 0.0,
            targets: Targets::One("all".to_owned()),
        }
    }
}

impl Method for Lora {
    fn name(&self) -> &'static str {
        "lora"
    }

    fn summary(&self) -> &'static str {
        "one low-rank pair A, B per layer (the common baseline)"
    }

    fn claims(&self, config: &Map<String, Value>) -> bool {
        config.get("peft_type") == Some(&json!("LORA")) && !config.contains_key("lora_nums")
    }

    fn defaults(&self) -> Map<String, Value> {
        Options::default().to_recipe()
    }

    fn read_recipe(&self, section: &Map<String, Value>) -> Result<Box<dyn MethodOptions>, Vec<Fault>> {
        let options: Options = read_section("method", section, &self.defaults())?;
        let faults = check_common(options.rank, options.alpha, options.dropout, &options.targets);
        if_sound(options, faults)
    }

    fn read_peft(&self, config: &Map<String, Value>) -> Result<Box<dyn MethodOptions>, Vec<Fault>> {
        let keys = LoraConfigKeys::read(config)?;
        // These starts change the base's own weights, which a folder does not hold.
        let started = config.get("init_lora_weights").and_then(Value::as_str).unwrap_or_default();
        if ["pissa", "olora", "corda", "loftq"].iter().any(|name| started.starts_with(name)) {
            let message = format!("`{started}` is not supported here; convert it to a LoRA first");
            return Err(vec![Fault::new("init_lora_weights", message)]);
        }
        Ok(Box::new(Options {
            rank: keys.rank,
            alpha: keys.alpha,
            use_rslora: keys.use_rslora,
            dropout: keys.dropout,
            targets: keys.targets,
        }))
    }
}

impl MethodOptions for Options {
    fn to_recipe(&self) -> Map<String, Value> {
        crate::options::to_map(self)
    }

    fn to_peft(&self) -> Map<String, Value> {
        LoraConfigKeys {
            rank: self.rank,
            alpha: self.alpha,
            use_rslora: self.use_rslora,
            dropout: self.dropout,
            targets: self.targets.clone(),
        }
        .write("LORA")
    }

    fn targets(&self) -> &Targets {
        &self.targets
    }

    fn build(&self, sites: &[SiteShape], dtype: DType, seed: u64) -> Box<dyn Tuned> {
        let spec = LowRankSpec {
            rank: self.rank,
            num_experts: 1,
            own_a: false,
            scale: scale(self.alpha, self.rank, self.use_rslora),
            dropout: self.dropout,
            dropout_mask: DropoutMask::Shared,
            mixing: Mixing::Sum,
            names: HeadNames::Single,
        };
        Box::new(LowRankAdapter::new(Box::new(self.clone()), spec, sites, dtype, seed))
    }
}
