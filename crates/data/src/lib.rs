//! Files → records → token ids, labels and domain → packed batches.
//!
//! The crate knows no tensor and no model. Text reaches token ids through [`TextEncoder`], which
//! the caller implements over the model's own tokenizer; everything after that is numbers.
//!
//! | step | type | module |
//! | --- | --- | --- |
//! | the `data:` section of a recipe | [`DataConfig`], [`SourceConfig`] | `config` |
//! | a data set known by name | [`NamedSource`] | `catalogue` |
//! | a file, decompressed and cut into records | [`Record`] | `input`, `layout`, `format`, `source` |
//! | a conversation as the model reads it | [`ChatTemplate`] | `template` |
//! | token ids and labels | [`Example`] | `encode` |
//! | the same in memory or on disk | [`Examples`] | `store` |
//! | repeated records, benchmark questions | [`OverlapReport`] | `dedup`, `overlap` |
//! | all sources, split and reported | [`Dataset`], [`DataReport`] | `dataset`, `report` |
//! | what one step computes on | [`Batch`], [`Sampler`] | `batch` |
//! | how many clusters the texts form | [`heads::find_heads`] | [`heads`] |
//!
//! ```
//! use hydralora_data::{Batch, ByteEncoder, DataConfig, Dataset, Sampler, SourceConfig};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let folder = std::env::temp_dir().join(format!("hydralora-data-doc-{}", std::process::id()));
//! std::fs::create_dir_all(&folder)?;
//! std::fs::write(
//!     folder.join("sums.jsonl"),
//!     "{\"instruction\": \"1 + 1\", \"output\": \"2\"}\n{\"instruction\": \"2 + 2\", \"output\": \"4\"}\n",
//! )?;
//! let config = DataConfig {
//!     train: vec![SourceConfig::new("sums.jsonl")],
//!     valid_fraction: 0.0,
//!     template: Some("chatml".to_owned()),
//!     ..DataConfig::default()
//! };
//! let encoder = ByteEncoder::new(&["<|im_start|>", "<|im_end|>"]).with_eos("<|im_end|>");
//! let dataset = Dataset::load(&config, &folder, &encoder, None, 7)?;
//! let sampler = Sampler::new(&dataset.train, &dataset.report.weights(), 8, None, 7, true)?;
//! for indices in sampler.epoch(0).iter() {
//!     let examples: Vec<_> = indices.map(|i| dataset.train.get(i)).collect::<Result<_, _>>()?;
//!     let batch = Batch::pack(&examples.iter().collect::<Vec<_>>());
//!     assert_eq!(batch.sequences(), 2);
//!     assert_eq!(batch.label_tokens, 4); // a digit and `<|im_end|>`, twice
//! }
//! # std::fs::remove_dir_all(&folder)?;
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod batch;
mod byte_encoder;
mod catalogue;
mod config;
mod dataset;
mod dedup;
mod encode;
mod error;
mod foreign;
mod format;
pub mod heads;
mod input;
mod layout;
mod overlap;
pub mod picture;
mod record;
mod report;
mod rows;
mod sets;
mod shown;
mod source;
mod splits;
mod store;
mod strftime;
mod suggest;
mod template;

pub use batch::{Batch, Batches, Sampler, valid_batches};
pub use byte_encoder::ByteEncoder;
pub use catalogue::{Fetch, NamedSource, Shape, locate, named_sources};
pub use config::{
    AddToken, DataConfig, Dedup, Fault, Mixing, Overlong, SourceConfig, SpecialTokens, THINKING,
    Turns, template_argument_fault,
};
pub use dataset::{Dataset, LoadOptions};
pub use encode::{
    EncodeOptions, Encoded, Example, IGNORE_LABEL, Seen, Sequence, TextEncoder, encode_record,
    encode_start, without_reasoning,
};
pub use error::{Error, Location, Result};
pub use format::format_names;
pub use overlap::{Overlap, OverlapReport};
pub use record::{Body, Message, Record};
pub use report::{DataReport, DropReason, Dropped, FileReport, SourceReport, Split, TurnCounts};
pub use rows::read_rows;
pub use sets::Sets;
pub use shown::{escape_markup, shown};
pub use source::{SourceRecords, read_source};
pub use store::Examples;
pub use template::{ChatTemplate, builtin_template_names};
