//! GGUF's tensor names as Hugging Face's and back, and the row order of its rotary projections.

use super::layout::{Heads, Layout};
use crate::gguf::GgufFile;

/// How a family's tensors are named and ordered in a GGUF file.
#[derive(Debug)]
pub struct GgufNames {
    /// `general.architecture`, which also starts the names of its metadata.
    pub architecture: &'static str,
    /// Parts of a layer, in groups.
    parts: &'static [Parts],
    /// Tensors of a layer whose whole names are given: GGUF's, after the layer's number, and Hugging
    /// Face's.
    tensors: Parts,
    /// Tensors outside the layers, beside embedding, last norm and output layer.
    outside: Parts,
    /// Whether sizes may be lists with a number for every layer; the family checks them.
    pub by_layer: bool,
    /// How files call a tokenizer whose tokens are pieces of text, `llama` or one that lists merges.
    pub pieces: &'static str,
    /// Whether files of the architecture can say how far attention reaches.
    pub windowed: bool,
    /// Whether the rows of a query or key head are ordered as pairs `(0, d/2, 1, d/2+1, …)`, because
    /// the rotation there acts on neighbours.
    pub interleaved: bool,
}

/// GGUF's name of tokenizers whose merges follow from scores.
pub(crate) const SENTENCE_PIECE: &str = "llama";

/// Tensors outside the layers: GGUF's name and Hugging Face's.
const OUTSIDE: Parts = &[
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
];

/// Some parts of a layer: GGUF's name and Hugging Face's.
pub(super) type Parts = &'static [(&'static str, &'static str)];

/// The norms of Llama's layer.
pub(super) const NORMS: Parts =
    &[("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")];
/// The projections of attention.
pub(super) const ATTENTION: Parts = &[
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
];
/// Norms of queries and keys.
pub(super) const QUERY_KEY_NORMS: Parts =
    &[("attn_q_norm", "self_attn.q_norm"), ("attn_k_norm", "self_attn.k_norm")];
/// The gated feed-forward block.
pub(super) const FEED_FORWARD: Parts =
    &[("ffn_gate", "mlp.gate_proj"), ("ffn_up", "mlp.up_proj"), ("ffn_down", "mlp.down_proj")];
/// The same with gate and up-projection in one.
pub(super) const FUSED_FEED_FORWARD: Parts =
    &[("ffn_up", "mlp.gate_up_proj"), ("ffn_down", "mlp.down_proj")];

/// Most architectures' layers.
const PARTS: &[Parts] = &[NORMS, ATTENTION, QUERY_KEY_NORMS, FEED_FORWARD];

impl GgufNames {
    /// Files of the architecture `llama`.
    pub const LLAMA: GgufNames = GgufNames::new("llama").interleaving();

    /// Names the parts of a layer as most architectures do, with rows as Hugging Face orders them.
    pub const fn new(architecture: &'static str) -> Self {
        Self {
            architecture,
            parts: PARTS,
            tensors: &[],
            outside: &[],
            by_layer: false,
            pieces: SENTENCE_PIECE,
            windowed: false,
            interleaved: false,
        }
    }

    pub(super) const fn interleaving(self) -> Self {
        Self { interleaved: true, ..self }
    }

    /// Says that files can describe a window.
    pub(super) const fn windowed(self) -> Self {
        Self { windowed: true, ..self }
    }

    /// Names the parts of a layer otherwise.
    pub(super) const fn parts(self, parts: &'static [Parts]) -> Self {
        Self { parts, ..self }
    }

    /// Names tensors of a layer that are neither weight nor bias of a part.
    pub(super) const fn tensors(self, tensors: Parts) -> Self {
        Self { tensors, ..self }
    }

    /// Names tensors outside the layers.
    pub(super) const fn outside(self, outside: Parts) -> Self {
        Self { outside, ..self }
    }

    /// Says how files call a tokenizer of pieces that lists its merges.
    pub(super) const fn pieces(self, pieces: &'static str) -> Self {
        Self { pieces, ..self }
    }

    /// Says that sizes may be lists with a number for every layer.
    pub(super) const fn by_layer(self) -> Self {
        Self { by_layer: true, ..self }
    }

    fn all_parts(&self) -> impl Iterator<Item = &'static (&'static str, &'static str)> {
        self.parts.iter().copied().flatten()
    }

    /// All tensors outside the layers.
    fn all_outside(&self) -> impl Iterator<Item = &'static (&'static str, &'static str)> {
        OUTSIDE.iter().chain(self.outside)
    }

    /// Translates a GGUF tensor's name; one that is not known stays as it is.
    pub fn to_hugging_face(&self, name: &str) -> String {
        if let Some((_, outside)) = self.all_outside().find(|(known, _)| *known == name) {
            return (*outside).to_owned();
        }
        let block = || {
            let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
            let layer: usize = layer.parse().ok()?;
            if let Some((_, whole)) = self.tensors.iter().find(|(known, _)| *known == rest) {
                return Some(format!("model.layers.{layer}.{whole}"));
            }
            let (part, kind) = rest.rsplit_once('.')?;
            let (_, part) = self.all_parts().find(|(known, _)| *known == part)?;
            matches!(kind, "weight" | "bias").then(|| format!("model.layers.{layer}.{part}.{kind}"))
        };
        block().unwrap_or_else(|| name.to_owned())
    }

    /// Translates a Hugging Face tensor's name, if it has one in GGUF.
    pub fn in_gguf(&self, name: &str) -> Option<String> {
        if let Some((stored, _)) = self.all_outside().find(|(_, known)| *known == name) {
            return Some((*stored).to_owned());
        }
        let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
        if let Some((stored, _)) = self.tensors.iter().find(|(_, known)| *known == rest) {
            return Some(format!("blk.{layer}.{stored}"));
        }
        let (part, kind) = rest.rsplit_once('.')?;
        let (stored, _) = self.all_parts().find(|(_, known)| *known == part)?;
        Some(format!("blk.{layer}.{stored}.{kind}"))
    }
}

/// Tells what the tensors of `file` are: Hugging Face's name of one, and how it differs.
pub(crate) fn from_gguf(file: &GgufFile) -> impl Fn(&str) -> (String, Layout) {
    let architecture = file.get("general.architecture").and_then(|value| value.as_str());
    let family = architecture.and_then(super::find_gguf);
    let names = family.map_or(&GgufNames::LLAMA, |family| family.gguf());
    let heads = Heads::of_file(file, names.architecture);
    let count = |key: &str| file.get(&format!("{}.{key}", names.architecture))?.as_u64();
    let layers = count("block_count").unwrap_or(u64::MAX);
    let layers = layers.saturating_sub(count(NEXT_LAYERS).unwrap_or(0));
    move |name| {
        let layer = name.strip_prefix("blk.").and_then(|rest| rest.split('.').next());
        if layer.and_then(|layer| layer.parse::<u64>().ok()).is_some_and(|layer| layer >= layers) {
            return (format!("mtp.{name}"), Layout::default());
        }
        let name = names.to_hugging_face(name);
        let layout = family.map(|family| Layout::of(family, &name, &heads)).unwrap_or_default();
        (name, layout)
    }
}

/// Metadata that counts the layers, last in a file, that only predict tokens after the next one.
pub(crate) const NEXT_LAYERS: &str = "nextn_predict_layers";

/// What `family` adds to the tensor `name` where it multiplies; GGUF files hold the sum.
pub(crate) fn shift_of(family: &dyn super::Family, name: &str) -> f64 {
    let Some(module) = name.strip_suffix(".weight").filter(|module| module.ends_with("norm"))
    else {
        return 0.0;
    };
    let inside = module.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
    family.norm_shift(inside.map_or("norm", |(_, inside)| inside))
}

/// Gives where row `row` of a projection of `heads` heads and `rows` rows lies in an interleaved file.
pub fn interleaved_row(row: usize, rows: usize, heads: usize) -> usize {
    let head_dim = rows / heads;
    let (head, within) = (row / head_dim, row % head_dim);
    let half = head_dim / 2;
    head * head_dim + within % half * 2 + within / half
}
