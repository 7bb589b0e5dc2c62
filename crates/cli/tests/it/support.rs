//! A folder with a recipe and data, and the binary to run in it.

use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use tempfile::TempDir;

/// The trained 260K-parameter model.
pub(crate) fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/fixtures/stories260K")
}

/// A folder of its own for one test.
pub(crate) struct Place(TempDir);

/// What a run printed and how it ended.
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Place {
    /// A folder with `recipe.yaml` and two small domains.
    pub(crate) fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        let domain = |name: &str, lines: &[(&str, &str)]| {
            let text: String = (0..24)
                .map(|i| {
                    let (question, answer) = lines[i % lines.len()];
                    format!("{{\"instruction\": \"{question} {i}?\", \"output\": \"{answer}\"}}\n")
                })
                .collect();
            place.write(&format!("{name}.jsonl"), &text);
        };
        domain("animals", &[("Who barks", "The big dog barks."), ("Who purrs", "A cat purrs.")]);
        domain("colours", &[("Sky", "The sky is blue."), ("Grass", "Grass is green.")]);
        place
            .write("recipe.yaml", RECIPE.replace("MODEL", &model().display().to_string()).as_str());
        place
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    pub(crate) fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    /// The trained model with zeros added to its FFN from 172 to 192 wide, in the folder `name`: the
    /// same function, with rows that quantised blocks of 32 divide.
    pub(crate) fn widened_model(&self, name: &str) -> PathBuf {
        const OLD: usize = 172;
        const NEW: usize = 192;
        let bytes = fs::read(model().join("model.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let widened: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
            .tensors()
            .into_iter()
            .map(|(name, tensor)| {
                let (mut shape, mut data) = (tensor.shape().to_vec(), tensor.data().to_vec());
                if let [rows, OLD] = shape[..] {
                    data = data.chunks_exact(OLD * 4).flat_map(padded_row::<{ NEW * 4 }>).collect();
                    shape = vec![rows, NEW];
                } else if let [OLD, columns] = shape[..] {
                    data.resize(NEW * columns * 4, 0);
                    shape = vec![NEW, columns];
                }
                (name, shape, data)
            })
            .collect();
        let views = widened.iter().map(|(name, shape, data)| {
            (name, TensorView::new(Dtype::F32, shape.clone(), data).unwrap())
        });
        let folder = self.path(name);
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("model.safetensors"), serialize(views, None).unwrap()).unwrap();
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            fs::copy(model().join(file), folder.join(file)).unwrap();
        }
        let config = fs::read_to_string(model().join("config.json")).unwrap();
        let (old, new) = (OLD.to_string(), NEW.to_string());
        fs::write(folder.join("config.json"), config.replace(&old, &new)).unwrap();
        folder
    }

    /// The trained model with more tokens behind its 512, each recognised whole, in the folder `name`.
    pub(crate) fn model_with_tokens(&self, name: &str, tokens: &[&str]) -> PathBuf {
        let bytes = fs::read(model().join("model.safetensors")).unwrap();
        let stored = SafeTensors::deserialize(&bytes).unwrap();
        let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = stored
            .tensors()
            .into_iter()
            .map(|(name, tensor)| {
                let (mut shape, mut data) = (tensor.shape().to_vec(), tensor.data().to_vec());
                if name == "model.embed_tokens.weight" {
                    shape[0] += tokens.len();
                    let width = shape[1];
                    let small = |at: usize| ((at * 37 % 101) as f32 / 101.0 - 0.5) * 0.05;
                    let new = (0..tokens.len() * width).flat_map(|at| small(at).to_le_bytes());
                    data.extend(new.collect::<Vec<u8>>());
                }
                (name, shape, data)
            })
            .collect();
        let views = tensors.iter().map(|(name, shape, data)| {
            (name, TensorView::new(Dtype::F32, shape.clone(), data).unwrap())
        });
        let folder = self.path(name);
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("model.safetensors"), serialize(views, None).unwrap()).unwrap();
        fs::copy(model().join("tokenizer_config.json"), folder.join("tokenizer_config.json"))
            .unwrap();
        let read = |file: &str| -> serde_json::Value {
            serde_json::from_str(&fs::read_to_string(model().join(file)).unwrap()).unwrap()
        };
        let mut config = read("config.json");
        config["vocab_size"] = (512 + tokens.len()).into();
        fs::write(folder.join("config.json"), config.to_string()).unwrap();
        let mut tokenizer = read("tokenizer.json");
        let added = tokenizer["added_tokens"].as_array_mut().unwrap();
        for (id, token) in (512..).zip(tokens) {
            added.push(serde_json::json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true,
            }));
        }
        fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
        folder
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hydralora"));
        command.args(arguments).current_dir(self.0.path()).stdin(Stdio::null());
        command.env("HYDRALORA_CACHE", self.path("cache")).env("HF_HUB_OFFLINE", "1");
        command.env("HF_HUB_CACHE", self.path("shared"));
        command.env_remove("HYDRALORA_DATA_DIR");
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Ran {
        ran(self.command(arguments).output().unwrap())
    }

    /// Runs with other values of environment variables.
    pub(crate) fn run_in(&self, environment: &[(&str, &str)], arguments: &[&str]) -> Ran {
        let mut command = self.command(arguments);
        ran(command.envs(environment.iter().copied()).output().unwrap())
    }

    pub(crate) fn run_with_input(&self, arguments: &[&str], input: &str) -> Ran {
        self.write("stdin.txt", input);
        let mut command = self.command(arguments);
        command.stdin(fs::File::open(self.path("stdin.txt")).unwrap());
        ran(command.output().unwrap())
    }

    pub(crate) fn start(&self, arguments: &[&str]) -> Child {
        self.command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Runs and insists on success.
    pub(crate) fn succeed(&self, arguments: &[&str]) -> Ran {
        let ran = self.run(arguments);
        assert_eq!(ran.code, Some(0), "{arguments:?}\n{}\n{}", ran.stdout, ran.stderr);
        ran
    }
}

fn padded_row<const BYTES: usize>(row: &[u8]) -> [u8; BYTES] {
    let mut padded = [0; BYTES];
    padded[..row.len()].copy_from_slice(row);
    padded
}

pub(crate) fn ran(output: Output) -> Ran {
    Ran {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

const RECIPE: &str = "\
model: {path: MODEL}
data:
  train:
    - {path: animals.jsonl, domain: animals}
    - {path: colours.jsonl, domain: colours, weight: 1.0}
  template: plain
  valid_fraction: 0.2
  max_seq_len: 128
method: {name: hydralora, rank: 2, alpha: 16, num_experts: 3, dropout: 0.1, targets: ffn}
train: {batch_size: 4, epochs: 20, max_steps: 20, learning_rate: 1.0e-2, eval_every: 10, save_every: 5}
output: run
";
