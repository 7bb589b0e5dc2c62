//! Qwen3.5 and Gemma 4 by command, from a GGUF file as llama.cpp's converter writes it and from a folder:
//! adapters, merged models and adapter files for llama.cpp.

use crate::support::{Place, Ran};
use hydralora_kernels::Tensor;
use hydralora_kernels::block::BlockFormat;
use hydralora_model::save::Saving;
use hydralora_model::{GgufFile, ModelSource};
use serde_json::Value;
use std::path::{Path, PathBuf};

const NAMES: [&str; 2] = ["qwen35", "gemma4"];

fn converted(name: &str) -> String {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/fixtures/llama_cpp");
    fixtures.join(format!("{name}.gguf")).display().to_string()
}

/// The same model as a folder.
fn folder_of(place: &Place, file: &str) -> String {
    let source = ModelSource::open(Path::new(file)).unwrap();
    let saving = Saving {
        source: &source,
        name: "small",
        edit: &|_, tensor: Tensor| tensor,
        format: BlockFormat::F32,
        chat_template: None,
        untie: false,
        end_ids: &[],
    };
    let folder = place.path("folder");
    saving.folder(&folder).unwrap();
    folder.display().to_string()
}

fn train(place: &Place, model: &str, targets: &str, run: &str) -> String {
    let set = [
        format!("model.path={model}"),
        format!("output={run}"),
        format!("method={{name: lora, rank: 2, alpha: 4, targets: {targets}}}"),
        "train.max_steps=3".to_owned(),
    ];
    let mut arguments = vec!["train", "recipe.yaml", "--quiet"];
    set.iter().for_each(|set| arguments.extend(["--set", set]));
    place.succeed(&arguments);
    format!("{run}/adapter")
}

fn logits(place: &Place, model: &str, adapter: Option<&str>) -> Value {
    let mut arguments = vec!["inspect", "--model", model, "--logits", "The cat", "--json"];
    adapter.iter().for_each(|adapter| arguments.extend(["--adapter", adapter]));
    let Ran { stdout, .. } = place.succeed(&arguments);
    let found: Value = serde_json::from_str(&stdout).unwrap();
    found["logits"]["last"].clone()
}

struct File {
    bytes: Vec<u8>,
    parsed: GgufFile,
}

impl File {
    fn read(path: PathBuf) -> Self {
        let bytes = std::fs::read(&path).unwrap();
        Self { parsed: GgufFile::parse(&bytes, &path).unwrap(), bytes }
    }

    fn numbers(&self, name: &str) -> (Vec<usize>, Vec<f32>) {
        let tensor = self.parsed.tensor(name).unwrap_or_else(|| panic!("no {name}"));
        let floats = self.bytes[tensor.range.clone()].as_chunks::<4>().0.iter();
        (tensor.shape.clone(), floats.map(|bytes| f32::from_le_bytes(*bytes)).collect())
    }
}

#[test]
fn an_adapter_fits_file_and_folder() {
    for name in NAMES {
        let place = Place::new();
        let file = converted(name);
        let folder = folder_of(&place, &file);
        let of_file = train(&place, &file, "all", "run-file");
        let of_folder = train(&place, &folder, "all", "run-folder");
        let weights = |adapter: &str| {
            std::fs::read(place.path(adapter).join("adapter_model.safetensors")).unwrap()
        };
        assert_eq!(weights(&of_file), weights(&of_folder), "{name}");
        let expected = logits(&place, &file, Some(&of_file));
        assert_ne!(expected, logits(&place, &file, None), "{name}: nothing was learned");
        assert_eq!(logits(&place, &folder, Some(&of_folder)), expected, "{name}");
        if name == "gemma4" {
            let export = ["export", "--adapter", &of_file, "--as", "lora-gguf"];
            let ran = place.run(&[&export[..], &["--model", &file, "--out", "a.gguf"]].concat());
            assert_eq!(ran.code, Some(2), "{}", ran.stderr);
            assert!(ran.stderr.contains("per_layer_model_projection"), "{}", ran.stderr);
            assert!(!place.path("a.gguf").exists());
        }
    }
}

/// What an adapter file for llama.cpp adds to a matrix of the base file gives that of the merged file.
#[test]
fn adapter_files_change_files_as_merging_does() {
    for name in NAMES {
        let place = Place::new();
        let file = converted(name);
        let folder = folder_of(&place, &file);
        let targets = "[\"model.layers.*\"]";
        let adapter = train(&place, &file, targets, "run");
        let of_folder = train(&place, &folder, targets, "run-folder");
        let export = ["export", "--adapter", &adapter, "--as", "lora-gguf", "--model", &file];
        place.succeed(&[&export[..], &["--out", "adapter.gguf"]].concat());
        for (base, adapter, out, dtype) in [
            (&file, &adapter, "merged.gguf", "f32"),
            (&folder, &of_folder, "of-folder.gguf", "f32"),
            (&folder, &of_folder, "half.gguf", "f16"),
            (&folder, &of_folder, "small.gguf", "q8_0"),
        ] {
            let merge = ["merge", "--model", base, "--adapter", adapter, "--dtype", dtype];
            place.succeed(&[&merge[..], &["--out", out]].concat());
        }
        let path = |name: &str| place.path(name).display().to_string();
        let expected = logits(&place, &path("merged.gguf"), None);
        assert_eq!(logits(&place, &path("of-folder.gguf"), None), expected, "{name}");
        let distance = |found: &Value| {
            let all = |value: &Value| -> Vec<f64> {
                value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
            };
            let (found, expected) = (all(found), all(&expected));
            let largest = expected.iter().fold(0.0_f64, |m, x| m.max(x.abs()));
            let off = found.iter().zip(&expected).map(|(a, b)| (a - b).abs());
            off.fold(0.0, f64::max) / largest
        };
        for (model, limit) in [("half.gguf", 1e-2), ("small.gguf", 2e-1)] {
            let off = distance(&logits(&place, &path(model), None));
            assert!(off < limit && off > 0.0, "{name}: {model} is off by {off}");
        }

        let [base, lora, merged] =
            [PathBuf::from(&file), place.path("adapter.gguf"), place.path("merged.gguf")]
                .map(File::read);
        let mut compared = 0;
        for tensor in lora.parsed.tensors() {
            let Some(of) = tensor.name.strip_suffix(".lora_a") else { continue };
            let ([rank, width], a) =
                (&lora.numbers(&tensor.name).0[..], lora.numbers(&tensor.name).1)
            else {
                panic!("{} has another shape", tensor.name)
            };
            let (_, b) = lora.numbers(&format!("{of}.lora_b"));
            let ((_, before), (_, after)) = (base.numbers(of), merged.numbers(of));
            let mut largest: f32 = 0.0;
            for (at, (before, after)) in before.iter().zip(&after).enumerate() {
                let (row, column) = (at / width, at % width);
                let change: f32 =
                    (0..*rank).map(|r| b[row * rank + r] * a[r * width + column]).sum();
                // The scale is alpha 4 by rank 2.
                assert!(
                    (before + 2.0 * change - after).abs() < 1e-5,
                    "{name}: {of} at {row}, {column}"
                );
                largest = largest.max(change.abs());
            }
            assert!(largest > 1e-4, "{name}: {of} does not change");
            compared += 1;
        }
        assert!(compared > 20, "{name}: {compared} matrices");
    }
}
