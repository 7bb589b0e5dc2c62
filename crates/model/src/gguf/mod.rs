//! GGUF files: typed metadata, a list of tensors, then the tensors' bytes.
//!
//! ```text
//! "GGUF"  version u32  tensor count u64  metadata count u64
//! metadata: key string, type u32, value            string: length u64, bytes
//! tensors:  name string, rank u32, extents u64…, format u32, offset u64
//! padding to `general.alignment`, then the tensors at their offsets
//! ```
//!
//! All numbers are little endian. Extents come innermost first; here shapes are outermost first,
//! `[out, in]`, as elsewhere in this crate.

pub(crate) mod kind;
mod reader;
mod types;
mod value;
mod writer;

pub use reader::{GgufFile, GgufTensor};
pub use value::{Array, Value};
pub use writer::GgufWriter;

use std::path::Path;

/// Whether `path` is a GGUF file that this program wrote, and may therefore replace.
pub fn is_ours(path: &Path) -> bool {
    GgufFile::open(path).is_ok_and(|file| file.get(VERSION_KEY).is_some())
}

/// First bytes of a file.
const MAGIC: &[u8; 4] = b"GGUF";
/// Key of the version of this program that wrote a file.
pub(crate) const VERSION_KEY: &str = "hydralora.version";
/// Key of the alignment of tensor offsets.
const ALIGNMENT_KEY: &str = "general.alignment";
/// Alignment where the file does not say.
const DEFAULT_ALIGNMENT: u64 = 32;
/// Most dimensions a tensor may have.
const MAX_RANK: usize = 4;
/// Formats that can be read, for messages.
pub(crate) const SUPPORTED_FORMATS: &str = "F64, F32, F16, BF16, Q8_0, Q8_1, Q4_0, Q4_1, Q5_0, \
     Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, Q8_K, IQ4_NL, IQ4_XS and MXFP4";
