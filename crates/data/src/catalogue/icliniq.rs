//! iCliniq-10k, questions to doctors, as ChatDoctor collected them.

use super::{NamedSource, Shape};

pub(super) static SOURCE: NamedSource = NamedSource {
    name: "icliniq",
    title: "iCliniq-10k, questions to doctors, as ChatDoctor collected them",
    licence: "academic research only, by the README of ChatDoctor",
    homepage: "https://github.com/Kent0n-Li/ChatDoctor",
    domain: "medical",
    repository: "wangrongsheng/icliniq-10k-en",
    revision: "main",
    remote: "*.json",
    local: &["icliniq/*.json"],
    known: &[],
    shapes: &[
        Shape { format: "alpaca", fields: &[] },
        Shape {
            format: "prompt-response",
            fields: &[("prompt", "input"), ("response", "answer_icliniq")],
        },
    ],
};
