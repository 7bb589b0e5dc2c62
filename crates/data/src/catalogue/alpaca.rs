//! Stanford Alpaca, 52k instructions.
//!
//! The known checksum is that of a 799-record sample.

use super::{NamedSource, Shape};

pub(super) static SOURCE: NamedSource = NamedSource {
    name: "alpaca",
    title: "Stanford Alpaca, 52k instructions",
    licence: "CC BY-NC 4.0",
    homepage: "https://huggingface.co/datasets/tatsu-lab/alpaca",
    domain: "general",
    repository: "tatsu-lab/alpaca",
    revision: "main",
    remote: "data/train-*.parquet",
    local: &["alpaca/*.json"],
    known: &["632fb117298c139efaadfc0b5e80479564c35e3bd221fa2f954da012dec85ed2"],
    shapes: &[Shape { format: "alpaca", fields: &[] }],
};
