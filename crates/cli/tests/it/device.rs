//! `--device`: what a build without GPUs says, and with one the same results.

use crate::support::{Place, model};

const NAMES: [&str; 5] = ["gpu", "vulkan", "metal", "dx12", "gl"];

#[cfg(not(feature = "gpu"))]
#[test]
fn a_device_this_build_cannot_use_is_refused() {
    let place = Place::new();
    let base = model().display().to_string();
    for name in NAMES {
        let ran = place.run(&["inspect", "--model", &base, "--device", name]);
        assert_eq!(ran.code, Some(2), "{}", ran.stderr);
        let wanted = format!("error: --device {name}: this build computes on the CPU alone");
        assert!(ran.stderr.contains(&wanted), "{}", ran.stderr);
        assert!(ran.stderr.contains("cargo build --release --features gpu"), "{}", ran.stderr);
    }
    place.succeed(&["inspect", "--model", &base, "--device", "cpu"]);
}

#[cfg(feature = "gpu")]
mod on_a_gpu {
    use super::*;
    use serde_json::Value;

    fn json(text: &str) -> Value {
        serde_json::from_str(text).unwrap()
    }

    /// The name of the device that tests run on.
    fn device() -> Option<String> {
        hydralora_kernels::check::device()?;
        Some(std::env::var("HYDRALORA_GPU").unwrap_or_else(|_| "gpu".to_owned()))
    }

    #[test]
    fn a_device_that_is_not_there_is_refused() {
        let place = Place::new();
        let base = model().display().to_string();
        // No machine has Metal and Direct3D, nor a driver that a made-up file names.
        let hidden = [("VK_DRIVER_FILES", "/nowhere.json"), ("VK_ICD_FILENAMES", "/nowhere.json")];
        let mut refused = 0;
        for name in NAMES {
            let ran = place.run_in(&hidden, &["inspect", "--model", &base, "--device", name]);
            if ran.code != Some(0) {
                assert_eq!(ran.code, Some(2), "{}", ran.stderr);
                // Another way to a GPU may be there whose driver does not open it.
                let nothing = format!("error: --device {name}: no GPU adapter for `{name}` here");
                let closed = format!("error: --device {name}: cannot open the GPU ");
                let told = [nothing, closed].iter().any(|wanted| ran.stderr.contains(wanted));
                assert!(told, "{}", ran.stderr);
                refused += 1;
            }
        }
        assert!(refused > 0);
    }

    #[test]
    fn every_command_works_on_the_device() {
        let Some(device) = device() else { return };
        let place = Place::new();
        let base = model().display().to_string();
        let on = |device: &str, arguments: &[&str]| {
            let ran = place.succeed(&[arguments, &["--device", device]].concat());
            assert_eq!(ran.stderr.contains("computing on "), device != "cpu", "{}", ran.stderr);
            ran
        };
        let losses = |device: &str| -> Vec<f64> {
            let few = ["train.max_steps=4", "train.eval_every=2", "train.save_every=2"];
            let set = few.iter().flat_map(|change| ["--set", change]);
            on(device, &["train", "recipe.yaml"].into_iter().chain(set).collect::<Vec<_>>());
            let lines = place.read("run/metrics.jsonl");
            std::fs::rename(place.path("run"), place.path(&format!("run-{device}"))).unwrap();
            lines.lines().filter_map(|line| json(line)["loss"].as_f64()).collect()
        };
        let (here, there) = (losses("cpu"), losses(&device));
        assert!(!here.is_empty());
        assert_eq!(here.len(), there.len());
        for (here, there) in here.iter().zip(&there) {
            assert!((here - there).abs() < 1e-3 * here, "{here} on the CPU, {there} there");
        }
        let adapter = format!("run-{device}/adapter");
        let text = |device: &str| {
            let arguments = ["generate", "--model", &base, "--adapter", &adapter, "--prompt"];
            let more = ["Sky 3?", "--max-new-tokens", "12", "--json"];
            json(&on(device, &[&arguments[..], &more].concat()).stdout)["text"].clone()
        };
        assert_eq!(text(&device), text("cpu"));
        for arguments in [
            &["inspect", "--model", &base, "--logits", "Sky", "--json"][..],
            &[
                "bench",
                "decode",
                "--model",
                &base,
                "--dtype",
                "f32",
                "--prompt",
                "8",
                "--new-tokens",
                "2",
            ],
            &[
                "bench",
                "train",
                "--model",
                &base,
                "--batches",
                "1",
                "--batch-size",
                "2",
                "--seq-len",
                "16",
            ],
        ] {
            on(&device, arguments);
        }
    }
}
