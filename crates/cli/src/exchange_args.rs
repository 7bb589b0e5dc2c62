//! The command line of merging, exporting, importing and composing.

use crate::adapter;
use clap::{Args, ValueEnum};
use std::path::PathBuf;

/// At which values the gates of a routed adapter are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum GateChoice {
    /// 1/N for each of N heads.
    Uniform,
}

#[derive(Debug, Args)]
pub(crate) struct GateArguments {
    /// Hold a router's gates at their mean over the texts of this data file; a quarter of its
    /// records is kept apart to measure what that costs in loss.
    #[arg(long, value_name = "FILE")]
    pub(crate) calibration: Option<PathBuf>,
    /// Hold a router's gates at these values, measuring nothing.
    #[arg(long, value_enum, conflicts_with = "calibration")]
    pub(crate) gate: Option<GateChoice>,
    /// The domain whose update is taken, for an adapter that has one for each.
    #[arg(long, value_name = "NAME")]
    pub(crate) domain: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ModelFormat {
    /// A Hugging Face folder.
    Hf,
    /// A GGUF file.
    Gguf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum NumberFormat {
    F32,
    F16,
    Bf16,
    #[value(name = "q8_0")]
    Q8,
}

#[derive(Debug, Args)]
pub(crate) struct MergeArguments {
    /// Base model: a folder, a .gguf file, or a known name [default: the adapter's].
    #[arg(long)]
    pub(crate) model: Option<String>,
    /// Adapter folder, or its run's.
    #[arg(long, value_parser = adapter::folder)]
    pub(crate) adapter: PathBuf,
    /// Folder or file to write.
    #[arg(long)]
    pub(crate) out: PathBuf,
    /// What to write [default: gguf if `--out` ends in .gguf, else hf].
    #[arg(long, value_enum)]
    pub(crate) format: Option<ModelFormat>,
    /// Number format of the matrices; q8_0 in a GGUF file only.
    #[arg(long, value_enum, default_value = "f16")]
    pub(crate) dtype: NumberFormat,
    #[command(flatten)]
    pub(crate) gates: GateArguments,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ExportForm {
    /// A plain LoRA folder for PEFT and vLLM.
    Lora,
    /// A plain LoRA file for llama.cpp.
    LoraGguf,
    /// A folder as HydraLoRA's published code saves it.
    HydraloraOfficial,
}

#[derive(Debug, Args)]
pub(crate) struct ExportArguments {
    /// Adapter folder, or its run's.
    #[arg(long, value_parser = adapter::folder)]
    pub(crate) adapter: PathBuf,
    /// What to write.
    #[arg(long = "as", value_enum)]
    pub(crate) form: ExportForm,
    /// Folder or file to write.
    #[arg(long)]
    pub(crate) out: PathBuf,
    /// Base model; for `--calibration` and `lora-gguf` it is the adapter's where this is left out.
    #[arg(long)]
    pub(crate) model: Option<String>,
    /// Add up the heads of a shared A: the same update in rank r instead of N·r.
    #[arg(long)]
    pub(crate) compact: bool,
    #[command(flatten)]
    pub(crate) gates: GateArguments,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ImportForm {
    /// Separately trained LoRAs, to become the heads of a HydraLoRA.
    Lora,
    /// A checkpoint of HydraLoRA's (or LoRAMoE's) published code.
    HydraloraOfficial,
}

#[derive(Debug, Args)]
pub(crate) struct ImportArguments {
    /// What the adapters are.
    #[arg(long = "from", value_enum)]
    pub(crate) form: ImportForm,
    /// Adapter folders, or their runs'.
    #[arg(required = true, value_parser = adapter::folder)]
    pub(crate) adapters: Vec<PathBuf>,
    /// Folder to write.
    #[arg(long)]
    pub(crate) out: PathBuf,
    /// Base model; with it the layers are checked and the base is recorded.
    #[arg(long)]
    pub(crate) model: Option<String>,
    /// Seed of the fresh router.
    #[arg(long, default_value_t = 41)]
    pub(crate) seed: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum How {
    /// The mean of the updates, exactly.
    Average,
    /// The weighted sum of the updates, exactly.
    TaskArithmetic,
    /// The weighted sums of all A and of all B.
    Linear,
    /// Trim to the largest numbers, elect signs, average what agrees.
    Ties,
    /// Drop at random and rescale, then as linear.
    DareLinear,
    /// Drop at random and rescale, then elect signs.
    DareTies,
    /// Weights found on a few examples, without gradients.
    Lorahub,
}

#[derive(Debug, Args)]
pub(crate) struct ComposeArguments {
    /// LoRA folders, or their runs'.
    #[arg(required = true, value_parser = adapter::folder)]
    pub(crate) adapters: Vec<PathBuf>,
    /// How they are put together.
    #[arg(long, value_enum)]
    pub(crate) how: How,
    /// Folder to write.
    #[arg(long)]
    pub(crate) out: PathBuf,
    /// A weight for each adapter [default: 1/n].
    #[arg(long, value_delimiter = ',', allow_negative_numbers = true)]
    pub(crate) weights: Option<Vec<f64>>,
    /// Share of the numbers that ties and dare keep.
    #[arg(long, default_value_t = 0.5)]
    pub(crate) density: f64,
    /// Rank of an exact way's result, cut by singular value decomposition [default: the sum of all].
    #[arg(long)]
    pub(crate) rank: Option<usize>,
    /// Seed of dare's draws.
    #[arg(long, default_value_t = 41)]
    pub(crate) seed: u64,
    /// Base model, for lorahub.
    #[arg(long)]
    pub(crate) model: Option<String>,
    /// A few examples, for lorahub.
    #[arg(long)]
    pub(crate) data: Option<PathBuf>,
    /// Most evaluations of lorahub's search.
    #[arg(long, default_value_t = hydralora_peft::compose::lorahub::BUDGET)]
    pub(crate) budget: usize,
}
