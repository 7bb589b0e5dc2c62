//! GenMedGPT-5k, dialogues of ChatDoctor made with ChatGPT.
//!
//! The known checksum is that of a 4,361-record part.

use super::{NamedSource, Shape};

pub(super) static SOURCE: NamedSource = NamedSource {
    name: "chatdoctor",
    title: "GenMedGPT-5k, dialogues of ChatDoctor made with ChatGPT",
    licence: "Apache-2.0 by its LICENSE; its README allows academic research only, no commercial or clinical use",
    homepage: "https://github.com/Kent0n-Li/ChatDoctor",
    domain: "medical",
    repository: "wangrongsheng/GenMedGPT-5k-en",
    revision: "main",
    remote: "*.json",
    local: &["chatdoctor/*.json"],
    known: &["0675f2b9e0c1909a177aeefbe71c4f8c0f16bd81fc7f2559cd0beed4c8d45885"],
    shapes: &[Shape { format: "alpaca", fields: &[] }],
};
