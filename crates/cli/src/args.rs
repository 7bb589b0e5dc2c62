//! The command line.

use crate::exchange_args::{ComposeArguments, ExportArguments, ImportArguments, MergeArguments};
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

/// Fine-tunes, evaluates and serves language models with HydraLoRA.
#[derive(Debug, Parser)]
#[command(version, about, arg_required_else_help = true)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options of every command.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Where to compute.
    #[arg(long, global = true, value_enum, default_value_t = Device::Cpu)]
    pub(crate) device: Device,
    /// Threads to use [default: all cores].
    #[arg(long, global = true, value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) threads: Option<u16>,
    /// Print one JSON document on stdout; everything for people goes to stderr.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Print nothing but results and errors.
    #[arg(long, global = true)]
    pub(crate) quiet: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Device {
    Cpu,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Fine-tune a small model on bundled data and compare HydraLoRA with LoRA
    Quickstart(QuickstartArguments),
    /// Get a base model
    Model(ModelArguments),
    /// Fine-tune as a recipe says
    Train(TrainArguments),
    /// Do everything but the training: all faults at once, the plan, a sample of tokens
    Check(CheckArguments),
    /// Continue a prompt
    Generate(GenerateArguments),
    /// Talk to a model
    Chat(ChatArguments),
    /// Show a model's or an adapter's parameters
    Inspect(InspectArguments),
    /// Fold an adapter into its base model
    Merge(MergeArguments),
    /// Write an adapter in another program's form
    Export(ExportArguments),
    /// Make an adapter of others, or of another program's
    Import(ImportArguments),
    /// Make one LoRA out of several
    Compose(ComposeArguments),
}

#[derive(Debug, Args)]
pub(crate) struct QuickstartArguments {
    /// Folder for the data, both runs and the report.
    #[arg(long, default_value = "runs/quickstart")]
    pub(crate) out: PathBuf,
    /// Optimizer steps of each of the two runs.
    #[arg(long, default_value_t = 60)]
    pub(crate) max_steps: usize,
    /// Base model: a folder, a .gguf file, or a known name.
    #[arg(long, default_value = "smollm2-135m")]
    pub(crate) model: String,
}

#[derive(Debug, Args)]
pub(crate) struct ModelArguments {
    #[command(subcommand)]
    pub(crate) action: ModelAction,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ModelAction {
    /// Download a model, or find it in the cache, and print where it is
    Get {
        /// A known name (smollm2-135m) or a hub id (organisation/name).
        name: String,
        /// Copy it to this folder too.
        #[arg(long)]
        to: Option<PathBuf>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct RecipeArguments {
    /// The recipe.
    pub(crate) recipe: PathBuf,
    /// Change a value of the recipe, as in `--set train.learning_rate=1e-4`.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct TrainArguments {
    #[command(flatten)]
    pub(crate) recipe: RecipeArguments,
    /// Go on from the newest checkpoint in the output folder.
    #[arg(long)]
    pub(crate) resume: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CheckArguments {
    #[command(flatten)]
    pub(crate) recipe: RecipeArguments,
}

#[derive(Debug, Args)]
pub(crate) struct ModelChoice {
    /// Base model: a folder, a .gguf file, or a known name.
    #[arg(long)]
    pub(crate) model: String,
    /// Adapter folder.
    #[arg(long)]
    pub(crate) adapter: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct SamplingArguments {
    /// Most tokens to write.
    #[arg(long, default_value_t = 256)]
    pub(crate) max_new_tokens: usize,
    /// Divides the logits; 0 takes the likeliest token.
    #[arg(long, default_value_t = 0.0)]
    pub(crate) temperature: f64,
    /// Draw from the likeliest this many tokens; 0 for all.
    #[arg(long, default_value_t = 0)]
    pub(crate) top_k: usize,
    /// Draw from the likeliest tokens that together reach this probability.
    #[arg(long, default_value_t = 1.0)]
    pub(crate) top_p: f64,
    /// Seed of the draws.
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
}

#[derive(Debug, Args)]
pub(crate) struct GenerateArguments {
    #[command(flatten)]
    pub(crate) model: ModelChoice,
    /// The prompt; put through the chat template unless `--raw`.
    #[arg(long)]
    pub(crate) prompt: String,
    /// System message before the prompt.
    #[arg(long)]
    pub(crate) system: Option<String>,
    /// Continue the prompt as it is, without the chat template.
    #[arg(long)]
    pub(crate) raw: bool,
    /// Use the base model's chat template although the adapter was trained with another.
    #[arg(long)]
    pub(crate) base_template: bool,
    #[command(flatten)]
    pub(crate) sampling: SamplingArguments,
}

#[derive(Debug, Args)]
pub(crate) struct ChatArguments {
    #[command(flatten)]
    pub(crate) model: ModelChoice,
    /// System message.
    #[arg(long)]
    pub(crate) system: Option<String>,
    #[command(flatten)]
    pub(crate) sampling: SamplingArguments,
}

/// Models whose dimensions are known without their files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Dimensions {
    #[value(name = "llama2-7b")]
    Llama2Of7B,
}

#[derive(Debug, Args)]
pub(crate) struct InspectArguments {
    /// Base model: a folder, a .gguf file, or a known name.
    #[arg(long)]
    pub(crate) model: Option<String>,
    /// Adapter folder.
    #[arg(long)]
    pub(crate) adapter: Option<PathBuf>,
    /// The paper's parameter counts, on LLaMA2-7B's dimensions or those of `--model`.
    #[arg(long)]
    pub(crate) table: bool,
    /// Dimensions for `--table`.
    #[arg(long, value_enum, requires = "table", conflicts_with = "model")]
    pub(crate) dims: Option<Dimensions>,
    /// Print the logits after this text (put before no template), with the adapter on.
    #[arg(long, value_name = "TEXT", requires = "model")]
    pub(crate) logits: Option<String>,
}
