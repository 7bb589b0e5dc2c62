//! US legal terms to fill in, of LegalLAMA.

use super::{NamedSource, Shape};

pub(super) static SOURCE: NamedSource = NamedSource {
    name: "us-terms",
    title: "US legal terms to fill in, of LegalLAMA",
    licence: "CC BY-NC-SA 4.0",
    homepage: "https://huggingface.co/datasets/lexlms/legal_lama",
    domain: "law",
    repository: "lexlms/legal_lama",
    revision: "main",
    remote: "us_terms.jsonl",
    local: &["us-terms/us_terms.jsonl", "legal_lama/us_terms.jsonl"],
    known: &[],
    shapes: &[Shape { format: "cloze", fields: &[] }],
};
