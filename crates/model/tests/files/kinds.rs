//! GGUF files that hold no dense text model are refused as what they are.

use hydralora_kernels::block::BlockFormat;
use hydralora_model::gguf::{Array, GgufFile, GgufWriter, Value};
use hydralora_model::{Error, ModelSource, Weights};
use std::path::{Path, PathBuf};

fn text(text: &str) -> Value {
    Value::String(text.to_owned())
}

fn file(folder: &Path, metadata: &[(&str, Value)], tensors: &[&str]) -> PathBuf {
    let path = folder.join("x.gguf");
    let mut writer = GgufWriter::new();
    for (key, value) in metadata {
        writer.metadata(*key, value.clone());
    }
    for name in tensors {
        writer.tensor(*name, BlockFormat::F32, &[2, 4], vec![0; 32]);
    }
    writer.write(&path).unwrap();
    path
}

#[test]
fn what_a_file_holds_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let architecture = |name: &str| ("general.architecture", text(name));
    let kind = |name: &str| ("general.type", text(name));
    let model = ["token_embd.weight", "blk.0.attn_q.weight"];
    let tokens = ("tokenizer.ggml.tokens", Value::Array(Array::String(vec!["a".to_owned()])));
    for (metadata, tensors, expected) in [
        (
            vec![architecture("qwen3moe"), ("qwen3moe.expert_count", Value::U32(128))],
            &model[..],
            "a mixture of experts (`qwen3moe`, 128 experts a layer)",
        ),
        (
            vec![architecture("gpt-oss"), ("gpt-oss.expert_count", Value::U32(32))],
            &model,
            "a mixture of experts (`gpt-oss`, 32 experts a layer)",
        ),
        (
            vec![architecture("llama")],
            &["token_embd.weight", "blk.3.ffn_up_exps.weight"],
            "a mixture of experts (it has a tensor `blk.3.ffn_up_exps.weight`)",
        ),
        (
            vec![architecture("clip"), kind("mmproj")],
            &["v.blk.0.attn_q.weight"],
            "a vision or audio projector (mmproj)",
        ),
        (vec![architecture("clip")], &["mm.0.weight"], "a vision or audio projector (mmproj)"),
        (vec![kind("mmproj")], &["mm.0.weight"], "a vision or audio projector (mmproj)"),
        (
            vec![architecture("llama"), kind("adapter"), ("adapter.type", text("lora"))],
            &["blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"],
            "a LoRA adapter, not a model",
        ),
        (
            vec![architecture("llama")],
            &["blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"],
            "a LoRA adapter, not a model",
        ),
        (
            vec![kind("adapter"), ("adapter.type", text("other"))],
            &model,
            "an adapter of type `other`",
        ),
        (vec![architecture("controlvector")], &["direction.1"], "a control vector"),
        (
            vec![kind("imatrix")],
            &["blk.0.attn_q.weight.in_sum2", "blk.0.attn_q.weight.counts"],
            "an importance matrix",
        ),
        (
            vec![],
            &["blk.0.attn_q.weight.in_sum2", "blk.0.attn_q.weight.counts"],
            "an importance matrix",
        ),
        (vec![architecture("llama"), tokens.clone()], &[], "a vocabulary alone"),
        (vec![architecture("llama"), kind("vocab"), tokens], &model, "a vocabulary alone"),
        (vec![architecture("llama")], &[], "a file without a tensor"),
        (vec![architecture("eagle3")], &["fc.weight"], "a draft head (`eagle3`)"),
        (vec![architecture("gemma4-assistant")], &model, "a draft head (`gemma4-assistant`)"),
        (vec![architecture("qwen35_mtp")], &model, "a draft head (`qwen35_mtp`)"),
        (
            vec![architecture("qwen35"), ("qwen35.nextn_predict_layers", Value::U32(1))],
            &["token_embd.weight", "blk.24.attn_q.weight", "blk.24.nextn.eh_proj.weight"],
            "a draft head (`qwen35`)",
        ),
    ] {
        let path = file(folder.path(), &metadata, tensors);
        let error = ModelSource::open(&path).unwrap_err();
        assert!(matches!(error, Error::NotTextModel { .. }), "{expected}: {error}");
        let error = error.to_string();
        assert!(error.contains(&format!("x.gguf: this is {expected}")), "{error}");
    }
}

#[test]
fn a_dense_model_is_none_of_these() {
    let folder = tempfile::tempdir().unwrap();
    for (metadata, tensors) in [
        (vec![], &["a"][..]),
        (
            vec![("general.architecture", text("llama")), ("llama.expert_count", Value::U32(0))],
            &["token_embd.weight", "blk.0.attn_q.weight"],
        ),
        // A layer that drafts the next token may come with a model.
        (
            vec![("general.type", text("model")), ("general.architecture", text("qwen35"))],
            &["blk.0.attn_q.weight", "blk.1.nextn.eh_proj.weight"],
        ),
        // Values of a type that says nothing.
        (
            vec![("general.type", Value::U32(1)), ("general.architecture", Value::Bool(true))],
            &["token_embd.weight"],
        ),
    ] {
        let path = file(folder.path(), &metadata, tensors);
        assert_eq!(Weights::open(&path).unwrap().names().count(), tensors.len());
    }
}

#[test]
fn a_kind_is_said_before_an_unknown_number_format() {
    let folder = tempfile::tempdir().unwrap();
    let experts =
        [("general.architecture", text("qwen3moe")), ("qwen3moe.expert_count", Value::U32(128))];
    let path = file(folder.path(), &experts, &["t"]);
    let mut bytes = std::fs::read(&path).unwrap();
    let name = bytes.windows(9).position(|w| w == b"\x01\0\0\0\0\0\0\0t").unwrap();
    bytes[name + 9 + 4 + 16] = 18;
    let error = GgufFile::parse(&bytes, &path).unwrap_err().to_string();
    assert!(error.contains("a mixture of experts"), "{error}");
}
