//! Models written again: the same logits and tokens, whatever the form.

use crate::fixture;
use hydralora_kernels::block::BlockFormat;
use hydralora_kernels::{DType, Tensor};
use hydralora_model::save::Saving;
use hydralora_model::{Decoder, ModelSource, Packed};
use std::path::Path;

fn stories() -> std::path::PathBuf {
    fixture("stories260K")
}

const TEXT: &str = "Once upon a time, Zoë had 3 kites. \"Up!\" she said\n";

fn saving<'a>(
    source: &'a ModelSource,
    format: BlockFormat,
    edit: &'a dyn Fn(&str, Tensor) -> Tensor,
) -> Saving<'a> {
    Saving { source, format, chat_template: None, end_ids: &[], name: "again", edit, untie: false }
}

fn logits(source: &ModelSource) -> Vec<f64> {
    let decoder = Decoder::load(&source.config, &source.weights, DType::F32).unwrap();
    let tokens = source.tokenizer.encode(TEXT).unwrap();
    let packed = Packed { tokens: &tokens, offsets: &[0, tokens.len()] };
    decoder.last_logits(packed).unwrap().to_f64()
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    let largest = a.iter().fold(0.0_f64, |m, x| m.max(x.abs()));
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max) / largest
}

fn kept(_: &str, tensor: Tensor) -> Tensor {
    tensor
}

#[test]
fn a_folder_and_a_gguf_file_become_either_and_stay_the_same() {
    let place = tempfile::tempdir().unwrap();
    for from in [stories(), stories().join("stories260K.gguf")] {
        let source = ModelSource::open(&from).unwrap();
        let wanted = logits(&source);
        let ids = source.tokenizer.encode(TEXT).unwrap();
        for (format, limit) in
            [(BlockFormat::F32, 0.0), (BlockFormat::F16, 2e-3), (BlockFormat::BF16, 2e-2)]
        {
            let folder = place.path().join("folder");
            saving(&source, format, &kept).folder(&folder).unwrap();
            let file = place.path().join("file.gguf");
            saving(&source, format, &kept).gguf(&file).unwrap();
            for out in [&folder, &file] {
                let again = ModelSource::open(out).unwrap();
                let error = distance(&wanted, &logits(&again));
                assert!(error <= limit, "{} as {format}: {error}", out.display());
                assert_eq!(again.tokenizer.encode(TEXT).unwrap(), ids);
                assert_eq!(again.tokenizer.decode(&ids, false).unwrap(), TEXT);
                assert_eq!(again.tokenizer.bos(), source.tokenizer.bos());
                assert_eq!(again.tokenizer.end_ids(), source.tokenizer.end_ids());
                assert_eq!(again.tokenizer.add_bos(), source.tokenizer.add_bos());
                assert_eq!(again.config, source.config);
            }
        }
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mode = |name: &str| {
                std::fs::metadata(place.path().join(name)).unwrap().permissions().mode()
            };
            assert_eq!(mode("folder/model.safetensors"), mode("folder/config.json"));
            assert_eq!(mode("file.gguf"), mode("folder/config.json"));
        }
        let file = place.path().join("small.gguf");
        saving(&source, BlockFormat::Q8_0, &kept).gguf(&file).unwrap();
        let again = ModelSource::open(&file).unwrap();
        let (_, format) = again.weights.describe("model.layers.0.mlp.up_proj.weight").unwrap();
        assert_eq!(format, BlockFormat::Q8_0);
        // Rows of 172 are no whole number of blocks.
        let (_, format) = again.weights.describe("model.layers.0.mlp.down_proj.weight").unwrap();
        assert_eq!(format, BlockFormat::F16);
        let error = distance(&wanted, &logits(&again));
        assert!(error < 3e-2, "{error}");
    }
}

#[test]
fn edits_and_the_chat_template_are_written() {
    let place = tempfile::tempdir().unwrap();
    let source = ModelSource::open(&stories()).unwrap();
    let name = "model.layers.1.self_attn.q_proj.weight";
    let edit = |found: &str, mut tensor: Tensor| {
        if found == name {
            tensor.data_mut::<f32>()[5] = 42.0;
        }
        tensor
    };
    let template = "{{ messages[0].content }}";
    let saving =
        Saving { chat_template: Some(template), ..saving(&source, BlockFormat::F32, &edit) };
    let (folder, file) = (place.path().join("folder"), place.path().join("file.gguf"));
    saving.folder(&folder).unwrap();
    saving.gguf(&file).unwrap();
    for out in [&folder, &file] {
        let again = ModelSource::open(out).unwrap();
        assert_eq!(again.weights.take_f32(name, &[64, 64]).unwrap()[5], 42.0);
        assert_eq!(again.tokenizer.chat_template(), Some(template));
        assert_ne!(again.identity.fingerprint, source.identity.fingerprint);
    }
}

#[test]
fn numbers_that_do_not_fit_leave_nothing_behind() {
    let place = tempfile::tempdir().unwrap();
    let source = ModelSource::open(&stories()).unwrap();
    let spoil = |value: f32| {
        move |name: &str, mut tensor: Tensor| {
            if name.ends_with("0.mlp.up_proj.weight") {
                tensor.data_mut::<f32>()[0] = value;
            }
            tensor
        }
    };
    for (value, format, words) in [
        (1e5, BlockFormat::F16, "beyond half precision"),
        (f32::NAN, BlockFormat::F32, "not finite"),
        (f32::INFINITY, BlockFormat::BF16, "not finite"),
    ] {
        let edit = spoil(value);
        let saving = saving(&source, format, &edit);
        let folder = saving.folder(&place.path().join("folder")).unwrap_err().to_string();
        let file = saving.gguf(&place.path().join("file.gguf")).unwrap_err().to_string();
        for error in [folder, file] {
            assert!(error.contains("layers.0.mlp.up_proj.weight"), "{error}");
            assert!(error.contains(words), "{error}");
        }
    }
    let error = saving(&source, BlockFormat::Q8_0, &kept).folder(&place.path().join("folder"));
    assert!(error.unwrap_err().to_string().contains("no format of safetensors"));
    assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 0, "nothing is left");
    let missing = saving(&source, BlockFormat::F32, &kept).gguf(Path::new("/nonexistent/x.gguf"));
    assert!(missing.unwrap_err().to_string().contains("/nonexistent/x.gguf"));
}
