//! databricks-dolly-15k, instructions written by people.
//!
//! The second known checksum is that of a 120-record sample already put into a template.

use super::{NamedSource, Shape};

pub(super) static SOURCE: NamedSource = NamedSource {
    name: "dolly-15k",
    title: "databricks-dolly-15k, instructions written by people",
    licence: "CC BY-SA 3.0",
    homepage: "https://huggingface.co/datasets/databricks/databricks-dolly-15k",
    domain: "general",
    repository: "databricks/databricks-dolly-15k",
    revision: "bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a",
    remote: "databricks-dolly-15k.jsonl",
    local: &["dolly/databricks-dolly-15k.jsonl", "dolly/*.jsonl", "dolly-15k/*.jsonl"],
    known: &[
        "2df9083338b4abd6bceb5635764dab5d833b393b55759dffb0959b6fcbf794ec",
        "d9c16a545b4238e8424dc63b46b847787b7eb6ee20b77e698369814c5001b8a5",
    ],
    shapes: &[
        Shape {
            format: "alpaca",
            fields: &[("input", "context"), ("output", "response"), ("domain", "category")],
        },
        Shape { format: "completion", fields: &[("completion", "answer")] },
    ],
};
