//! Training data of T0 (P3), sampled by prompt template.

use super::{NamedSource, Shape};

pub(super) static SOURCE: NamedSource = NamedSource {
    name: "t0",
    title: "Training data of T0 (P3), sampled by prompt template",
    licence: "of each data set its own",
    homepage: "https://huggingface.co/datasets/bigscience/P3",
    domain: "multi-task",
    repository: "",
    revision: "main",
    remote: "",
    local: &["t0/*.jsonl"],
    known: &[],
    shapes: &[Shape { format: "completion", fields: &[] }],
};
