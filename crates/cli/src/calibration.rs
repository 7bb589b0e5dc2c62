//! A data file on which gates and losses are measured.

use crate::device::placed;
use crate::encoder::ModelEncoder;
use crate::exchange_args::GateArguments;
use crate::failure::bad_input;
use hydralora_data::{ChatTemplate, DataConfig, Dataset, Examples, SourceConfig};
use hydralora_kernels::DType;
use hydralora_model::adapter::{Adapter, SiteShape};
use hydralora_model::{Decoder, ModelSource};
use hydralora_peft::io::Metadata;
use hydralora_peft::merge::{Gates, MergePlan};
use hydralora_peft::{Error, Tuned};
use hydralora_train::evaluate;
use serde_json::{Value, json};
use std::path::Path;

/// Share of the records that is kept apart for losses.
const HELD_OUT: f64 = 0.25;
/// Longest sequence that is measured.
const MAX_SEQ_LEN: usize = 1024;

/// The decoder of `source` in `f32`.
pub(crate) fn open_decoder(source: &ModelSource) -> anyhow::Result<Decoder> {
    Ok(placed(Decoder::load(&source.config, &source.weights, DType::F32)?))
}

/// Records to measure on, some of them kept apart.
pub(crate) struct Measured {
    dataset: Dataset,
}

impl Measured {
    /// Reads `file` as `source`'s tokens, through the adapter's chat template or else the model's.
    pub(crate) fn read(
        file: &Path,
        source: &ModelSource,
        metadata: Option<&Metadata>,
        held_out: bool,
    ) -> anyhow::Result<Self> {
        let of_adapter = metadata.and_then(|metadata| metadata.chat_template.as_deref());
        let template = match (of_adapter, source.tokenizer.chat_template()) {
            (Some(text), _) => Some(ChatTemplate::from_source("of the adapter", text)?),
            (None, Some(text)) => Some(ChatTemplate::from_source("of the model", text)?),
            (None, None) => None,
        };
        let config = DataConfig {
            template_arguments: metadata
                .map_or_else(Default::default, |metadata| metadata.template_arguments.clone()),
            train: vec![SourceConfig::new(file)],
            valid_fraction: if held_out { HELD_OUT } else { 0.0 },
            max_seq_len: MAX_SEQ_LEN.min(source.config.max_position_embeddings),
            // Plain text is the only form left where nobody names one.
            template: template.is_none().then(|| "plain".to_owned()),
            ..DataConfig::default()
        };
        let encoder = ModelEncoder(&source.tokenizer);
        let dataset = Dataset::load(&config, Path::new("."), &encoder, template.as_ref(), 0)?;
        if held_out && dataset.valid.is_empty() {
            let count = dataset.train.len();
            return Err(bad_input(format!(
                "{}: has {count} records, too few to keep a quarter of them apart; expected at least 4",
                file.display()
            )));
        }
        Ok(Self { dataset })
    }

    /// Tokens of the records that are not kept apart.
    pub(crate) fn tokens(&self) -> usize {
        self.dataset.train.lengths().iter().map(|&length| length as usize).sum()
    }

    /// Mean gates of every routed layer over those tokens; none if the adapter does not route.
    pub(crate) fn gates(&self, decoder: &Decoder, tuned: &dyn Tuned) -> anyhow::Result<Gates> {
        let domains = &self.dataset.domains;
        let found = evaluate(decoder, tuned.as_adapter(), &self.dataset.train, domains)?;
        let Some(routing) = found.routing else { return Ok(Gates::PerToken) };
        let of_site = |site: &hydralora_train::SiteRouting| {
            let gates = site.mean_gate.first()?.clone();
            Some((site.site.parse().ok()?, gates))
        };
        Ok(Gates::Fixed(routing.sites.iter().filter_map(of_site).collect()))
    }

    /// Loss on the records kept apart.
    pub(crate) fn held_out_loss(
        &self,
        decoder: &Decoder,
        adapter: &dyn Adapter,
    ) -> anyhow::Result<f64> {
        self.loss(decoder, adapter, &self.dataset.valid)
    }

    /// Loss on the records that are not kept apart.
    pub(crate) fn own_loss(&self, decoder: &Decoder, adapter: &dyn Adapter) -> anyhow::Result<f64> {
        self.loss(decoder, adapter, &self.dataset.train)
    }

    fn loss(
        &self,
        decoder: &Decoder,
        adapter: &dyn Adapter,
        examples: &Examples,
    ) -> anyhow::Result<f64> {
        Ok(evaluate(decoder, adapter, examples, &self.dataset.domains)?.loss)
    }
}

/// What holding the gates still costs.
pub(crate) struct Cost {
    pub(crate) adapted: f64,
    pub(crate) fixed: f64,
}

impl Cost {
    pub(crate) fn json(&self) -> Value {
        json!({
            "adapted": self.adapted, "fixed": self.fixed, "difference": self.fixed - self.adapted,
        })
    }

    /// A line for people, `fixed` called `name`.
    pub(crate) fn line(&self, name: &str) -> String {
        format!(
            "held-out loss  adapted {:.4}  {name} {:.4}  difference {:+.4}",
            self.adapted,
            self.fixed,
            self.fixed - self.adapted
        )
    }
}

/// The gates asked for without measuring.
pub(crate) fn chosen_gates(arguments: &GateArguments) -> Gates {
    if arguments.gate.is_some() { Gates::Uniform } else { Gates::PerToken }
}

/// Adds to a refusal what would help against it.
pub(crate) fn with_advice(error: Error, tuned: &dyn Tuned, all: &[SiteShape]) -> anyhow::Error {
    let routed = matches!(error, Error::CannotMerge { .. })
        && MergePlan::new(tuned, all, &Gates::Uniform).is_ok();
    if !routed {
        return error.into();
    }
    bad_input(format!(
        "{error}. Hold the gates still instead: --model with --calibration FILE takes their mean over a \
         file's texts and says what that costs in loss; --gate uniform takes 1/N each"
    ))
}
