//! Flan v2 as LoRAHub published it, or tasks of Super-NaturalInstructions.
//!
//! Each task is a domain of its own.

use super::{NamedSource, Shape};

pub(super) static SOURCE: NamedSource = NamedSource {
    name: "flan-v2",
    title: "Flan v2 as LoRAHub published it, or tasks of Super-NaturalInstructions",
    licence: "not stated for the collection; each task has its own",
    homepage: "https://huggingface.co/datasets/lorahub/flanv2",
    domain: "multi-task",
    repository: "lorahub/flanv2",
    revision: "main",
    remote: "*.json",
    local: &["flanv2/*.json", "superni/*/train.json", "natural-instructions/tasks/*.json"],
    known: &[],
    shapes: &[
        Shape { format: "natural-instructions", fields: &[("domain", "task")] },
        Shape {
            format: "completion",
            fields: &[("prompt", "inputs"), ("completion", "targets"), ("domain", "task")],
        },
        Shape { format: "completion", fields: &[("prompt", "inputs"), ("completion", "targets")] },
    ],
};
