//! GSM8K, grade-school mathematics, training split.
//!
//! The known checksums are those of the whole `train.jsonl` and of a 5,978-record part of it.

use super::{NamedSource, Shape};

pub(super) static SOURCE: NamedSource = NamedSource {
    name: "gsm8k",
    title: "GSM8K, grade-school mathematics, training split",
    licence: "MIT",
    homepage: "https://github.com/openai/grade-school-math",
    domain: "math",
    repository: "openai/gsm8k",
    revision: "main",
    remote: "main/train-*.parquet",
    local: &[
        "gsm8k/train.jsonl",
        "gsm8k/main/train-*.parquet",
        "grade-school-math/grade_school_math/data/train.jsonl",
    ],
    known: &[
        "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
        "98efa727000a499bd033fa4def79387798ad69d2d576def5c8d7ddb611562777",
    ],
    shapes: &[Shape {
        format: "alpaca",
        fields: &[("instruction", "question"), ("output", "answer")],
    }],
};
