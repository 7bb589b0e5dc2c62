//! Lawyer-Instruct, legal questions and answers.

use super::{NamedSource, Shape};

pub(super) static SOURCE: NamedSource = NamedSource {
    name: "lawyer-instruct",
    title: "Lawyer-Instruct, legal questions and answers",
    licence: "Apache-2.0 by its card",
    homepage: "https://huggingface.co/datasets/Alignment-Lab-AI/Lawyer-Instruct",
    domain: "law",
    repository: "Alignment-Lab-AI/Lawyer-Instruct",
    revision: "main",
    remote: "*.json*",
    local: &["lawyer-instruct/*.json", "lawyer-instruct/*.jsonl"],
    known: &[],
    shapes: &[Shape { format: "alpaca", fields: &[] }],
};
