//! The frozen base model: files, tokenizer, decoder, cache, and the seam for adapters.
//!
//! Nothing in this crate trains, and it knows no fine-tuning method.

#![deny(unsafe_code)]

pub mod adapter;
mod cache;
mod config;
mod config_json;
mod decoder;
mod error;
pub mod family;
pub mod gguf;
pub mod hub;
mod pointer;
pub mod save;
pub mod shapes;
mod site;
pub mod source;
mod tokenizer;
mod weights;

pub use cache::{Cache, CacheBlock, CacheDType};
pub use config::{
    Arithmetic, Fields, Keys, LayerEmbeddings, LinearAttention, ModelConfig, QueryScaling,
    RopeConfig, RopeScaling,
};
pub use decoder::tree::{Run, Tree};
pub use decoder::{Added, Decoder, Held, IGNORE_LABEL, Packed, Trained};
pub use error::{Error, Result};
pub use family::{Layout, Numbers, Order, interleaved_row};
pub use gguf::GgufFile;
pub use pointer::lfs_pointer;
pub use source::{ModelIdentity, ModelSource};
pub use tokenizer::{AddedToken, END_OF_TURN, TokenStream, TokenText, Tokenizer};
pub use weights::{TensorView, Weights};
