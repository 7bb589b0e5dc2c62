//! The model's tokenizer as the data crate wants it.

pub(crate) use hydralora_run::ModelEncoder;
