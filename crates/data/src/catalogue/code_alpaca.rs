//! CodeAlpaca-20k, instructions for code.
//!
//! The known checksums are those of parts of 1,613 and 3,628 records.

use super::{NamedSource, Shape};

pub(super) static SOURCE: NamedSource = NamedSource {
    name: "code-alpaca",
    title: "CodeAlpaca-20k, instructions for code",
    licence: "CC BY-NC 4.0 by its DATA_LICENSE",
    homepage: "https://github.com/sahil280114/codealpaca",
    domain: "code",
    repository: "HuggingFaceH4/CodeAlpaca_20K",
    revision: "main",
    remote: "data/train-*.parquet",
    local: &["codealpaca/*.json", "code-alpaca/*.json"],
    known: &[
        "2daca5da1291f83fed3220791950b94e3caf1f8370d12b6fd45622ccb4723d1b",
        "4666bfa83c2da28fb523f96f9aa7d3d2a6f2ff7e306f128ba2befe9717134a9e",
    ],
    shapes: &[
        Shape { format: "prompt-response", fields: &[("response", "completion")] },
        Shape { format: "alpaca", fields: &[] },
    ],
};
