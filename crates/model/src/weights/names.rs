//! GGUF's tensor names as Hugging Face's, and the row order of its rotary projections.

use crate::gguf::GgufFile;

/// Parts of a layer: GGUF's name and Hugging Face's.
const PARTS: &[(&str, &str)] = &[
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// The Hugging Face name of a GGUF tensor; names this crate does not know stay as they are.
pub(super) fn from_gguf(name: &str) -> String {
    match name {
        "token_embd.weight" => return "model.embed_tokens.weight".to_owned(),
        "output_norm.weight" => return "model.norm.weight".to_owned(),
        "output.weight" => return "lm_head.weight".to_owned(),
        _ => {}
    }
    let block = || {
        let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
        let layer: usize = layer.parse().ok()?;
        let (part, kind) = rest.rsplit_once('.')?;
        let (_, part) = PARTS.iter().find(|(known, _)| *known == part)?;
        matches!(kind, "weight" | "bias").then(|| format!("model.layers.{layer}.{part}.{kind}"))
    };
    block().unwrap_or_else(|| name.to_owned())
}

/// The GGUF name of a Hugging Face tensor, if it has one.
pub fn to_gguf(name: &str) -> Option<String> {
    match name {
        "model.embed_tokens.weight" => return Some("token_embd.weight".to_owned()),
        "model.norm.weight" => return Some("output_norm.weight".to_owned()),
        "lm_head.weight" => return Some("output.weight".to_owned()),
        _ => {}
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (part, kind) = rest.rsplit_once('.')?;
    let (stored, _) = PARTS.iter().find(|(_, known)| *known == part)?;
    Some(format!("blk.{layer}.{stored}.{kind}"))
}

/// Number of heads whose rows the file interleaves in the tensor `name`, if it does.
///
/// Files of the architecture `llama` order the rows of a query or key head as pairs
/// `(0, d/2, 1, d/2+1, …)`, because the rotation there acts on neighbours.
pub(super) fn interleaved_heads(file: &GgufFile, name: &str) -> Option<usize> {
    if file.get("general.architecture")?.as_str()? != "llama" {
        return None;
    }
    let heads = || file.get("llama.attention.head_count")?.as_u64();
    let heads = match name.strip_prefix("blk.")?.split('.').nth(1)? {
        "attn_q" => heads(),
        "attn_k" => file.get("llama.attention.head_count_kv").and_then(|v| v.as_u64()).or(heads()),
        _ => None,
    };
    heads?.try_into().ok()
}

/// Where row `row` of a projection of `heads` heads and `rows` rows lies in an interleaved file.
pub fn interleaved_row(row: usize, rows: usize, heads: usize) -> usize {
    let head_dim = rows / heads;
    let (head, within) = (row / head_dim, row % head_dim);
    let half = head_dim / 2;
    head * head_dim + within % half * 2 + within / half
}
