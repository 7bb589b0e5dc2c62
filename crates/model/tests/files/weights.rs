//! Tensors out of safetensors folders and GGUF files, and damaged ones.

use crate::{copied_stories, fixture};
use hydralora_kernels::block::{BlockFormat, dequantize, quantize};
use hydralora_model::gguf::{GgufWriter, Value};
use hydralora_model::{Error, Weights};
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use std::collections::HashMap;
use std::path::Path;

const EMBEDDING: &str = "model.embed_tokens.weight";

fn numbers(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|i| (((i * 37 + seed * 101) % 997) as f32 - 498.0) / 250.0).collect()
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn save(path: &Path, tensors: &[(&str, Dtype, &[usize], Vec<u8>)]) {
    let views: Vec<_> = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| {
            (*name, TensorView::new(*dtype, shape.to_vec(), bytes).unwrap())
        })
        .collect();
    serialize_to_file(views, None, path).unwrap();
}

#[test]
fn tensors_are_used_once_and_checked() {
    let weights = Weights::open(&fixture("stories260K")).unwrap();
    let all = weights.unused();
    assert_eq!(all.len(), weights.names().count());
    let view = weights.get(EMBEDDING).unwrap();
    assert_eq!((view.format, view.shape.as_slice()), (BlockFormat::F32, [512, 64].as_slice()));
    assert_eq!(weights.unused(), all, "looking is not using");
    let values = weights.take_f32(EMBEDDING, &[512, 64]).unwrap();
    assert_eq!(bytes(&values), view.bytes.as_ref());
    assert_eq!(weights.unused().len(), all.len() - 1);
    assert!(!weights.unused().contains(&EMBEDDING.to_owned()));

    let error = weights.take_f32(EMBEDDING, &[64, 512]).unwrap_err();
    assert!(error.to_string().contains("has shape [512, 64], expected [64, 512]"), "{error}");
    let error = weights.take("model.layers.0.self_attn.qproj.weight", &[1]).unwrap_err();
    let Error::MissingTensor { nearest, .. } = &error else { panic!("{error}") };
    assert_eq!(nearest[0], "model.layers.0.self_attn.q_proj.weight");
}

#[test]
fn every_plain_format_widens() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let halves: Vec<f32> = vec![0.5, -1.25, 3.0, 65504.0];
    let double: Vec<u8> = halves.iter().flat_map(|&v| f64::from(v).to_le_bytes()).collect();
    let encoded = |format| {
        let mut out = Vec::new();
        quantize(format, &halves[..3], &mut out);
        out
    };
    save(
        &path,
        &[
            ("f64", Dtype::F64, &[4], double),
            ("f32", Dtype::F32, &[2, 2], bytes(&halves)),
            ("f16", Dtype::F16, &[3], encoded(BlockFormat::F16)),
            ("bf16", Dtype::BF16, &[3], encoded(BlockFormat::BF16)),
            ("empty", Dtype::F32, &[0, 4], vec![]),
            ("scalar", Dtype::F32, &[], bytes(&[7.0])),
        ],
    );
    let weights = Weights::open(&path).unwrap();
    assert_eq!(weights.take_f32("f64", &[4]).unwrap()[..], halves);
    assert_eq!(weights.take_f32("f32", &[2, 2]).unwrap()[..], halves);
    assert_eq!(weights.take_f32("f16", &[3]).unwrap()[..], halves[..3]);
    assert_eq!(weights.take_f32("bf16", &[3]).unwrap()[..], halves[..3]);
    assert_eq!(weights.take_f32("empty", &[0, 4]).unwrap()[..], [0.0; 0]);
    assert_eq!(weights.take_f32("scalar", &[]).unwrap()[..], [7.0]);
    save(&path, &[("i64", Dtype::I64, &[1], vec![0; 8])]);
    let error = Weights::open(&path).unwrap_err().to_string();
    assert!(
        error.contains("`i64` has type I64, which is not supported; supported are F64, F32"),
        "{error}"
    );
}

#[test]
fn large_tensors_widen_in_parts_as_in_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    let values = numbers(70 * 32 * 100, 1);
    let mut packed = Vec::new();
    quantize(BlockFormat::Q8_0, &values, &mut packed);
    let mut whole = vec![0.0; values.len()];
    dequantize(BlockFormat::Q8_0, &packed, &mut whole);
    GgufWriter::new().tensor("t", BlockFormat::Q8_0, &[100, 70 * 32], packed).write(&path).unwrap();
    let weights = Weights::open(&path).unwrap();
    assert!(weights.take_f32("t", &[100, 70 * 32]).unwrap()[..] == whole);
}

/// Reorders the rows of each head as llama.cpp's conversion does:
/// `reshape(heads, 2, dim / 2, cols).swapaxes(1, 2)`.
fn interleave(values: &[f32], heads: usize, head_dim: usize, cols: usize) -> Vec<f32> {
    let mut out = Vec::new();
    for head in 0..heads {
        for pair in 0..head_dim / 2 {
            for half in 0..2 {
                let row = head * head_dim + half * head_dim / 2 + pair;
                out.extend_from_slice(&values[row * cols..(row + 1) * cols]);
            }
        }
    }
    out
}

fn gguf_with_projections(path: &Path, architecture: &str) -> (Vec<f32>, Vec<f32>) {
    let (heads, kv_heads, head_dim, cols) = (4, 2, 6, 32);
    let (q, k) = (numbers(heads * head_dim * cols, 2), numbers(kv_heads * head_dim * cols, 3));
    let bias = numbers(heads * head_dim, 4);
    let (q_stored, k_stored, bias_stored) = if architecture == "llama" {
        (
            interleave(&q, heads, head_dim, cols),
            interleave(&k, kv_heads, head_dim, cols),
            interleave(&bias, heads, head_dim, 1),
        )
    } else {
        (q.clone(), k.clone(), bias.clone())
    };
    let mut q_packed = Vec::new();
    quantize(BlockFormat::Q8_0, &q_stored, &mut q_packed);
    GgufWriter::new()
        .metadata("general.architecture", Value::String(architecture.into()))
        .metadata(format!("{architecture}.attention.head_count"), Value::U32(heads as u32))
        .metadata(format!("{architecture}.attention.head_count_kv"), Value::U32(kv_heads as u32))
        .tensor("blk.0.attn_q.weight", BlockFormat::Q8_0, &[heads * head_dim, cols], q_packed)
        .tensor("blk.0.attn_q.bias", BlockFormat::F32, &[heads * head_dim], bytes(&bias_stored))
        .tensor(
            "blk.0.attn_k.weight",
            BlockFormat::F32,
            &[kv_heads * head_dim, cols],
            bytes(&k_stored),
        )
        .tensor("blk.11.ffn_down.weight", BlockFormat::F32, &[2, 3], bytes(&numbers(6, 5)))
        .tensor("token_embd.weight", BlockFormat::F32, &[1, 1], bytes(&[1.0]))
        .tensor("output_norm.weight", BlockFormat::F32, &[1], bytes(&[1.0]))
        .tensor("output.weight", BlockFormat::F32, &[1, 1], bytes(&[1.0]))
        .tensor("rope_freqs.weight", BlockFormat::F32, &[3], bytes(&[1.0; 3]))
        .tensor("blk.0.unheard_of.weight", BlockFormat::F32, &[1], bytes(&[1.0]))
        .write(path)
        .unwrap();
    (q, k)
}

#[test]
fn gguf_names_and_rows_become_hugging_faces() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    for architecture in ["llama", "qwen2"] {
        let (q, k) = gguf_with_projections(&path, architecture);
        let weights = Weights::open(&path).unwrap();
        let names: Vec<_> = weights.names().collect();
        assert_eq!(
            names,
            [
                "blk.0.unheard_of.weight",
                "lm_head.weight",
                "model.embed_tokens.weight",
                "model.layers.0.self_attn.k_proj.weight",
                "model.layers.0.self_attn.q_proj.bias",
                "model.layers.0.self_attn.q_proj.weight",
                "model.layers.11.mlp.down_proj.weight",
                "model.norm.weight",
                "rope_freqs.weight",
            ]
        );
        let found = weights.take_f32("model.layers.0.self_attn.k_proj.weight", &[12, 32]).unwrap();
        assert!(found[..] == k);
        // Quantised rows move whole: what comes back is what was stored, in the other order.
        let name = "model.layers.0.self_attn.q_proj.weight";
        let mut packed = Vec::new();
        quantize(BlockFormat::Q8_0, &q, &mut packed);
        let mut expected = vec![0.0; q.len()];
        dequantize(BlockFormat::Q8_0, &packed, &mut expected);
        assert!(weights.get(name).unwrap().bytes == packed);
        assert!(weights.take_f32(name, &[24, 32]).unwrap()[..] == expected);
        let bias = weights.take_f32("model.layers.0.self_attn.q_proj.bias", &[24]).unwrap();
        assert_eq!(bias[..], numbers(24, 4));
        let unused = weights.unused();
        assert!(unused.contains(&"blk.0.unheard_of.weight".to_owned()));
        assert!(!unused.contains(&"rope_freqs.weight".to_owned()));
    }
}

#[test]
fn heads_that_cannot_share_the_rows_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    for heads in [0u32, 3] {
        GgufWriter::new()
            .metadata("general.architecture", Value::String("llama".into()))
            .metadata("llama.attention.head_count", Value::U32(heads))
            .tensor("blk.0.attn_q.weight", BlockFormat::F32, &[4, 1], vec![0; 16])
            .write(&path)
            .unwrap();
        let error = Weights::open(&path).unwrap_err().to_string();
        assert!(error.contains(&format!("4 rows, which {heads} heads")), "{error}");
    }
}

fn shards(folder: &Path) -> HashMap<&'static str, &'static str> {
    let tensor =
        |name: &'static str, seed: usize| (name, Dtype::F32, [2usize, 2], bytes(&numbers(4, seed)));
    for (file, parts) in [
        ("model-00001-of-00002.safetensors", vec![tensor("a", 1), tensor("b", 2)]),
        ("model-00002-of-00002.safetensors", vec![tensor("c", 3)]),
    ] {
        let parts: Vec<_> =
            parts.iter().map(|(n, d, s, b)| (*n, *d, s.as_slice(), b.clone())).collect();
        save(&folder.join(file), &parts);
    }
    let map = HashMap::from([
        ("a", "model-00001-of-00002.safetensors"),
        ("b", "model-00001-of-00002.safetensors"),
        ("c", "model-00002-of-00002.safetensors"),
    ]);
    write_index(folder, &map);
    map
}

fn write_index(folder: &Path, map: &HashMap<&str, &str>) {
    let index = serde_json::json!({"metadata": {"total_size": 48}, "weight_map": map});
    std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

#[test]
fn shards_read_as_one() {
    let folder = tempfile::tempdir().unwrap();
    shards(folder.path());
    let weights = Weights::open(folder.path()).unwrap();
    assert_eq!(weights.names().collect::<Vec<_>>(), ["a", "b", "c"]);
    for (name, seed) in [("a", 1), ("b", 2), ("c", 3)] {
        assert_eq!(weights.take_f32(name, &[2, 2]).unwrap()[..], numbers(4, seed));
    }
    assert!(weights.unused().is_empty());
}

#[test]
fn shards_that_do_not_fit_the_index_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let error = || Weights::open(folder.path()).unwrap_err();
    let mut map = shards(folder.path());
    map.insert("d", "model-00002-of-00002.safetensors");
    write_index(folder.path(), &map);
    let found = error();
    assert!(matches!(&found, Error::MissingFromShard { name, .. } if name == "d"), "{found}");

    map.insert("d", "model-00003-of-00002.safetensors");
    write_index(folder.path(), &map);
    let found = error();
    assert!(
        matches!(&found, Error::MissingShard { shard, .. } if shard.contains("00003")),
        "{found}"
    );

    map.insert("d", "../model.safetensors");
    write_index(folder.path(), &map);
    assert!(error().to_string().contains("a file name without a folder"), "{}", error());

    map.remove("d");
    write_index(folder.path(), &map);
    save(
        &folder.path().join("model-00002-of-00002.safetensors"),
        &[("c", Dtype::F32, &[1], bytes(&[1.0])), ("a", Dtype::F32, &[1], bytes(&[1.0]))],
    );
    let found = error();
    assert!(matches!(&found, Error::DuplicateTensor { name, .. } if name == "a"), "{found}");

    std::fs::write(folder.path().join("model.safetensors.index.json"), "{\"weight_map\": [1]}")
        .unwrap();
    assert!(matches!(error(), Error::Json { .. }), "{}", error());
}

#[test]
fn a_truncated_file_says_how_much_is_missing() {
    let folder = copied_stories();
    let path = folder.path().join("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    for cut in [0, 5, 8, 100, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&path, &whole[..cut]).unwrap();
        let error = Weights::open(folder.path()).unwrap_err();
        let Error::Truncated { expected, found, .. } = &error else {
            panic!("cut at {cut}: {error}")
        };
        assert_eq!(*found, cut as u64);
        assert!(*expected > *found);
        if cut > whole.len() / 4 {
            assert_eq!(*expected, whole.len() as u64);
        }
    }
    std::fs::write(&path, [whole.as_slice(), b"more"].concat()).unwrap();
    let error = Weights::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("bytes follow the last tensor"), "{error}");
}

#[test]
fn a_damaged_header_is_refused() {
    let folder = copied_stories();
    let path = folder.path().join("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    let text = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let at = whole.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
        let mut bytes = whole.clone();
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        std::fs::write(&path, bytes).unwrap();
        Weights::open(folder.path()).unwrap_err().to_string()
    };
    let error = text("\"F32\"", "\"Q32\"");
    assert!(error.contains("model.safetensors") && error.contains("Q32"), "{error}");
    let error = text("\"shape\":[", "\"shape\":{");
    assert!(error.contains("not a valid safetensors file"), "{error}");
    let mut bytes = whole;
    bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    let error = Weights::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("header too large"), "{error}");
}

#[test]
fn a_folder_without_weights_says_what_was_expected() {
    let folder = tempfile::tempdir().unwrap();
    let error = Weights::open(folder.path()).unwrap_err().to_string();
    assert!(
        error.contains("expected model.safetensors or model.safetensors.index.json"),
        "{error}"
    );
    std::fs::write(folder.path().join("pytorch_model.bin"), "").unwrap();
    let error = Weights::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("pickled weights"), "{error}");
    let error = Weights::open(&folder.path().join("x.gguf")).unwrap_err().to_string();
    assert!(error.contains("x.gguf"), "{error}");
    let error = Weights::open(&folder.path().join("pytorch_model.bin")).unwrap_err().to_string();
    assert!(error.contains("not a GGUF file"), "{error}");
}
