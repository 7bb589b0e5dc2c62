//! The command line.

use crate::adapter;
use crate::energy::EnergyArguments;
use crate::exchange_args::{ComposeArguments, ExportArguments, ImportArguments, MergeArguments};
use crate::recipe::{ModelDtype, names};
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Args, Parser, Subcommand, ValueEnum};
use hydralora_data::heads::{DIMENSIONS, Rule};
use std::ops::RangeInclusive;
use std::path::PathBuf;

/// Fine-tunes and evaluates language models with HydraLoRA, and with what it is compared with.
#[derive(Debug, Parser)]
#[command(version, about, arg_required_else_help = true)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options of every command.
#[derive(Clone, Copy, Debug, Args)]
#[command(next_help_heading = "Options of every command")]
pub(crate) struct Global {
    /// What to compute on: cpu, gpu (the best one found), vulkan, metal, dx12 or gl; a GPU needs a
    /// build with the feature `gpu`.
    #[arg(long, global = true, value_enum, default_value_t = Device::Cpu, hide_possible_values = true)]
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
    /// Stop, as after Ctrl-C, when stdin ends: for programs that start this one.
    #[arg(long, global = true, hide = true)]
    pub(crate) stop_on_eof: bool,
}

/// What to say of an argument of `train` or `check` that is an option of the recipe, as `--lr 1e-4`.
pub(crate) fn recipe_option(
    error: &clap::Error,
    given: impl Iterator<Item = String>,
) -> Option<String> {
    let given: Vec<String> = given.collect();
    let command = given.iter().find(|word| ["train", "check"].contains(&word.as_str()))?;
    if error.kind() != ErrorKind::UnknownArgument {
        return None;
    }
    let Some(ContextValue::String(argument)) = error.get(ContextKind::InvalidArg) else {
        return None;
    };
    let argument = argument.split(['=', ' ']).next()?;
    let option = names::option(argument)?;
    let value = given.iter().enumerate().find_map(|(at, word)| {
        let rest = word.strip_prefix(argument)?;
        match rest.strip_prefix('=') {
            Some(value) => Some(value.to_owned()),
            None if rest.is_empty() => {
                given.get(at + 1).filter(|next| !next.starts_with("--")).cloned()
            }
            None => None,
        }
    });
    let value = value.unwrap_or_else(|| "VALUE".to_owned());
    Some(format!(
        "`{argument}` is no argument of `{command}`; the recipe says it, and for one command \
         `--set {option}={value}` does"
    ))
}

/// What models compute on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Device {
    /// All cores
    Cpu,
    /// The best GPU found, through whatever leads to it
    Gpu,
    /// A GPU through Vulkan
    Vulkan,
    /// A GPU through Metal
    Metal,
    /// A GPU through Direct3D 12
    Dx12,
    /// A GPU through OpenGL
    Gl,
}

/// How `value` is written on the command line.
pub(crate) fn spelling(value: &impl ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Fine-tune a small model on bundled data and compare HydraLoRA with LoRA
    Quickstart(QuickstartArguments),
    /// Get a base model
    Model(ModelArguments),
    /// List the model families that load, what was checked of each, and the memory that sizes take
    Models,
    /// Write a recipe to begin with
    Init(InitArguments),
    /// Print the JSON schema of recipes, for editors
    Schema,
    /// Print the script that lets a shell complete commands, options and their values
    Completions(crate::commands::shell::CompletionsArguments),
    /// Write man pages
    Man(crate::commands::shell::ManArguments),
    /// Print the guide's command reference
    #[command(hide = true)]
    Reference,
    /// Fine-tune as a recipe says
    Train(TrainArguments),
    /// Do everything but the training: all faults at once, the plan, a sample of tokens
    Check(CheckArguments),
    /// Find out how many experts a data set needs
    Heads(HeadsArguments),
    /// Continue a prompt, or each of a file
    Generate(GenerateArguments),
    /// Talk to a model
    Chat(ChatArguments),
    /// Answer requests over HTTP, as clients of OpenAI's protocol send them
    Serve(Box<crate::commands::serve::ServeArguments>),
    /// Score a model, and adapters on it, on benchmarks
    Eval(Box<crate::commands::eval::EvalArguments>),
    /// Show a model's or an adapter's parameters
    Inspect(InspectArguments),
    /// Compare trained adapters' weights, and say what each consists of
    Analyze(crate::commands::analyze::AnalyzeArguments),
    /// Measure speed against this machine's matrix-product rate
    Bench(BenchArguments),
    /// Fold an adapter into its base model
    Merge(MergeArguments),
    /// Write an adapter in another program's form
    Export(ExportArguments),
    /// Make an adapter of others, or of another program's
    Import(ImportArguments),
    /// Make one LoRA out of several
    Compose(ComposeArguments),
    /// Run a grid of recipes as cells on disk, test what differs, and report it
    Study(crate::commands::study::StudyArguments),
}

#[derive(Debug, Args)]
pub(crate) struct QuickstartArguments {
    /// Folder for the data, both runs and the report.
    #[arg(long, default_value = "runs/quickstart")]
    pub(crate) out: PathBuf,
    /// Repeat it: the folder's earlier quickstart is replaced, once the new one is whole.
    #[arg(long)]
    pub(crate) force: bool,
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
    /// Write a model of random weights as a GGUF file, to try out a size
    Random {
        /// The dimensions, as `hydralora models` lists them: qwen3-8b, ….
        #[arg(long)]
        shape: String,
        /// Number format of the matrices.
        #[arg(long, default_value = "q4_0", value_parser = ["f32", "f16", "bf16", "q8_0", "q4_0"])]
        format: String,
        /// Seed of the weights.
        #[arg(long, default_value_t = 0)]
        seed: u64,
        /// The file.
        #[arg(long)]
        to: PathBuf,
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
#[command(after_help = "Examples:
  hydralora init recipe.yaml --data law.jsonl math.jsonl
  hydralora init lora.yaml --method lora --model path/of/a/model --data train.jsonl")]
pub(crate) struct InitArguments {
    /// The recipe to write; it must not be there yet.
    #[arg(default_value = "recipe.yaml")]
    pub(crate) recipe: PathBuf,
    /// Files to train on, from the recipe's folder on; each is a domain.
    #[arg(long, num_args = 1.., default_value = "train.jsonl")]
    pub(crate) data: Vec<String>,
    /// Base model: a folder, a .gguf file, a known name or a hub id.
    #[arg(long, default_value = "smollm2-135m")]
    pub(crate) model: String,
    /// The method.
    #[arg(long, default_value = "hydralora")]
    pub(crate) method: String,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  hydralora train recipe.yaml
  hydralora train recipe.yaml --set train.learning_rate=1e-4 --set output=runs/slower
  hydralora train recipe.yaml --resume")]
pub(crate) struct TrainArguments {
    #[command(flatten)]
    pub(crate) recipe: RecipeArguments,
    /// Go on from the newest checkpoint in the output folder.
    #[arg(long)]
    pub(crate) resume: bool,
    #[command(flatten)]
    pub(crate) energy: EnergyArguments,
}

#[derive(Debug, Args)]
pub(crate) struct CheckArguments {
    #[command(flatten)]
    pub(crate) recipe: RecipeArguments,
}

/// What the rows to cluster are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum FeatureChoice {
    /// Words, weighed by TF-IDF.
    Tfidf,
    /// A base model's mean hidden state.
    Model,
}

/// What chooses the number of clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum RuleChoice {
    /// The knee of the squared error (Kneedle).
    Elbow,
    /// The largest mean silhouette.
    Silhouette,
    /// The gap statistic.
    Gap,
    /// The most clusters that two halves of the data agree on (prediction strength).
    Stability,
}

impl From<RuleChoice> for Rule {
    fn from(choice: RuleChoice) -> Self {
        match choice {
            RuleChoice::Elbow => Rule::Elbow,
            RuleChoice::Silhouette => Rule::Silhouette,
            RuleChoice::Gap => Rule::Gap,
            RuleChoice::Stability => Rule::Stability,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct HeadsArguments {
    /// Data files, or names of data sources; each is a domain, unless --domain-field names one.
    #[arg(required = true)]
    pub(crate) data: Vec<PathBuf>,
    /// Format of the files.
    #[arg(long, default_value = "auto")]
    pub(crate) format: String,
    /// The field that holds a record's domain.
    #[arg(long)]
    pub(crate) domain_field: Option<String>,
    /// A field of the format and its name in the files, as in `--field output=answer`; may be repeated.
    #[arg(long = "field", value_name = "FIELD=NAME", value_parser = field)]
    pub(crate) fields: Vec<(String, String)>,
    /// Read only the first so many records of each file.
    #[arg(long, value_parser = at_least_one)]
    pub(crate) limit: Option<usize>,
    /// What to cluster.
    #[arg(long, value_enum, default_value_t = FeatureChoice::Tfidf)]
    pub(crate) features: FeatureChoice,
    /// Base model whose hidden states are the features.
    #[arg(long)]
    pub(crate) model: Option<String>,
    /// The layer whose input is taken; the number of layers for the final state [default: half].
    #[arg(long)]
    pub(crate) layer: Option<usize>,
    /// Dimensions the features are reduced to.
    #[arg(long, default_value_t = DIMENSIONS, value_parser = dimensions)]
    pub(crate) dimensions: usize,
    /// Fewest clusters to try.
    #[arg(long, default_value_t = 1, value_parser = clusters)]
    pub(crate) k_min: usize,
    /// Most clusters to try; the time grows with its square.
    #[arg(long, default_value_t = 10, value_parser = clusters)]
    pub(crate) k_max: usize,
    /// How often the choice is repeated.
    #[arg(long, default_value_t = 15, value_parser = at_least_one)]
    pub(crate) seeds: usize,
    /// Seed of all randomness.
    #[arg(long, default_value_t = 41)]
    pub(crate) seed: u64,
    /// Whose choice counts.
    #[arg(long, value_enum, default_value_t = RuleChoice::Stability)]
    pub(crate) rule: RuleChoice,
    /// Folder for heads.json, heads.html and the pictures.
    #[arg(long)]
    pub(crate) out: Option<PathBuf>,
}

fn dimensions(text: &str) -> Result<usize, String> {
    number_in(2..=256, text)
}

fn clusters(text: &str) -> Result<usize, String> {
    number_in(1..=256, text)
}

fn number_in(range: RangeInclusive<usize>, text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|number| range.contains(number));
    number.ok_or_else(|| format!("expected {} to {}", range.start(), range.end()))
}

fn at_least_one(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|number| *number > 0);
    number.ok_or_else(|| "expected a whole number, at least 1".to_owned())
}

fn field(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((ours, theirs)) if !ours.is_empty() && !theirs.is_empty() => {
            Ok((ours.to_owned(), theirs.to_owned()))
        }
        _ => Err("expected a field of the format, `=`, and its name in the files".to_owned()),
    }
}

#[derive(Debug, Args)]
pub(crate) struct ModelChoice {
    /// Base model: a folder, a .gguf file, or a known name [default: the adapter's].
    #[arg(long, required_unless_present = "adapter")]
    pub(crate) model: Option<String>,
    /// Adapter folder, or its run's.
    #[arg(long, value_parser = adapter::folder)]
    pub(crate) adapter: Option<PathBuf>,
    /// The text's domain, for an adapter that has an update for each.
    #[arg(long, value_name = "NAME", requires = "adapter")]
    pub(crate) domain: Option<String>,
    /// Type or packing to hold the weights in; `stored` is what the file has.
    #[arg(long, default_value = "f32")]
    pub(crate) dtype: ModelDtype,
}

#[derive(Debug, Args)]
pub(crate) struct SamplingArguments {
    /// Most tokens to write.
    #[arg(long, default_value_t = 256)]
    pub(crate) max_new_tokens: usize,
    /// Tokens that an answer has at least.
    #[arg(long, default_value_t = 0)]
    pub(crate) min_new_tokens: usize,
    /// Divides the logits; 0 takes the likeliest token.
    #[arg(long, default_value_t = 0.0)]
    pub(crate) temperature: f64,
    /// Draw from the likeliest this many tokens; 0 for all.
    #[arg(long, default_value_t = 0)]
    pub(crate) top_k: usize,
    /// Draw from the likeliest tokens that together reach this probability.
    #[arg(long, default_value_t = 1.0)]
    pub(crate) top_p: f64,
    /// Draw from tokens at least this many times as probable as the likeliest.
    #[arg(long, default_value_t = 0.0)]
    pub(crate) min_p: f64,
    /// Makes tokens of the prompt and of the text so far less likely; 1 does not.
    #[arg(long, default_value_t = 1.0)]
    pub(crate) repetition_penalty: f64,
    /// Taken off a token's logit for every time that the text holds it already: -2 to 2.
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    pub(crate) frequency_penalty: f64,
    /// Taken off a token's logit once if the text holds it already: -2 to 2.
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    pub(crate) presence_penalty: f64,
    /// Seed of the draws.
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Text at which an answer ends, and which is left out; may be given several times.
    #[arg(long = "stop", value_name = "TEXT")]
    pub(crate) stops: Vec<String>,
}

/// Arguments of the chat template.
#[derive(Debug, Default, PartialEq, Eq, Args)]
pub(crate) struct TemplateArguments {
    /// Whether the model reasons before it answers, where its chat template can switch that; by
    /// default as the adapter was trained, else as the template has it.
    #[arg(long, value_enum, value_name = "on|off", hide_possible_values = true)]
    pub(crate) thinking: Option<Switch>,
    /// Argument of the chat template, in JSON or else a text; may be given several times.
    #[arg(long = "template-arg", value_name = "KEY=VALUE")]
    pub(crate) template_args: Vec<String>,
}

/// Yes or no.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Switch {
    On,
    Off,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  hydralora generate --model smollm2-135m --prompt 'Name a river.'
  hydralora generate --model smollm2-135m --adapter runs/mine/adapter --prompts questions.jsonl > answers.jsonl
  cat letter.txt | hydralora generate --model smollm2-135m --system 'Answer politely.' --prompt -")]
pub(crate) struct GenerateArguments {
    #[command(flatten)]
    pub(crate) model: ModelChoice,
    /// The prompt, or `-` to read it from stdin; put through the chat template unless `--raw`.
    #[arg(long, required_unless_present = "prompts")]
    pub(crate) prompt: Option<String>,
    /// A file of prompts, answered several at a time, one JSON line each: a text file has a prompt a
    /// line, a .jsonl file records with `prompt` or `messages`.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt", "json"])]
    pub(crate) prompts: Option<PathBuf>,
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
    pub(crate) template: TemplateArguments,
    #[command(flatten)]
    pub(crate) sampling: SamplingArguments,
    #[command(flatten)]
    pub(crate) energy: EnergyArguments,
}

#[derive(Debug, Args)]
pub(crate) struct ChatArguments {
    #[command(flatten)]
    pub(crate) model: ModelChoice,
    /// System message.
    #[arg(long)]
    pub(crate) system: Option<String>,
    #[command(flatten)]
    pub(crate) template: TemplateArguments,
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
    /// Adapter folder, or its run's.
    #[arg(long, value_parser = adapter::folder)]
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
    /// The text's domain, for an adapter that has an update for each.
    #[arg(long, value_name = "NAME", requires_all = ["adapter", "logits"])]
    pub(crate) domain: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct BenchArguments {
    #[command(subcommand)]
    pub(crate) what: BenchWhat,
}

#[derive(Debug, Subcommand)]
pub(crate) enum BenchWhat {
    /// Training steps of several methods in turn on the same batches
    Train(BenchTrainArguments),
    /// Prefill and decoding
    Decode(BenchDecodeArguments),
    /// Many requests at once
    Engine(BenchEngineArguments),
    /// Single operations at a model's shapes
    Kernels(BenchKernelsArguments),
}

#[derive(Clone, Debug, Args)]
pub(crate) struct BenchTrainArguments {
    /// Base model: a folder, a .gguf file, or a known name.
    #[arg(long, default_value = "smollm2-135m", conflicts_with = "shape")]
    pub(crate) model: String,
    /// Random weights of these dimensions instead, as `hydralora models` lists them.
    #[arg(long)]
    pub(crate) shape: Option<String>,
    /// Type or packing the weights are held in.
    #[arg(long, default_value = "f32")]
    pub(crate) dtype: ModelDtype,
    /// Methods by their recipe names, or as `{name: lora, use_dora: true}`, parted by commas; `base` is
    /// the frozen model's own forward and backward.
    #[arg(long, default_value = "base,lora,hydralora")]
    pub(crate) method: Vec<String>,
    /// Rank of each of HydraLoRA's heads; `lora` gets rank times experts.
    #[arg(long, default_value_t = 4)]
    pub(crate) rank: usize,
    /// HydraLoRA's heads.
    #[arg(long, default_value_t = 4)]
    pub(crate) num_experts: usize,
    /// Padded batches of token ids to train on (JSON); made-up ones without.
    #[arg(long)]
    pub(crate) tokens: Option<PathBuf>,
    /// Made-up batches.
    #[arg(long, default_value_t = 4)]
    pub(crate) batches: usize,
    /// Sequences of a made-up batch.
    #[arg(long, default_value_t = 8)]
    pub(crate) batch_size: usize,
    /// Tokens of a made-up sequence.
    #[arg(long, default_value_t = 256)]
    pub(crate) seq_len: usize,
    /// Steps on each batch, of which the fastest counts.
    #[arg(long, default_value_t = 1)]
    pub(crate) repeat: usize,
    /// Keep only the layers' inputs for the way back.
    #[arg(long)]
    pub(crate) gradient_checkpointing: bool,
    /// Where several methods are compared, do not run each in a process of its own to measure memory.
    #[arg(long)]
    pub(crate) no_memory: bool,
    /// Take the largest of the batches alone, to measure memory.
    #[arg(long, hide = true)]
    pub(crate) largest_batch_only: bool,
    #[command(flatten)]
    pub(crate) energy: EnergyArguments,
}

#[derive(Debug, Args)]
pub(crate) struct BenchDecodeArguments {
    /// Base model: a folder, a .gguf file, or a known name.
    #[arg(long, default_value = "smollm2-135m")]
    pub(crate) model: String,
    /// Types or packings the weights are held in, one run each.
    #[arg(long, value_delimiter = ',', default_value = "f32,bf16,q8_0,q4_0")]
    pub(crate) dtype: Vec<ModelDtype>,
    /// Tokens of the prompt.
    #[arg(long, default_value_t = 512)]
    pub(crate) prompt: usize,
    /// Tokens decoded one by one after a prompt of 64.
    #[arg(long, default_value_t = 128)]
    pub(crate) new_tokens: usize,
    /// Leave the HydraLoRA adapter (r = 4, N = 4 on the feed-forward layers) out.
    #[arg(long)]
    pub(crate) no_adapter: bool,
    #[command(flatten)]
    pub(crate) energy: EnergyArguments,
}

#[derive(Debug, Args)]
pub(crate) struct BenchEngineArguments {
    /// Base model: a folder, a .gguf file, or a known name.
    #[arg(long, default_value = "smollm2-135m")]
    pub(crate) model: String,
    /// Types or packings the weights are held in, one run each.
    #[arg(long, value_delimiter = ',', default_value = "f32,q8_0")]
    pub(crate) dtype: Vec<ModelDtype>,
    /// Numbers of requests at once.
    #[arg(long, value_delimiter = ',', default_value = "1,4,16")]
    pub(crate) requests: Vec<usize>,
    /// Numbers of HydraLoRA adapters (r = 4, N = 4 on the feed-forward layers) that the requests have in
    /// turn; 0 for the base.
    #[arg(long, value_delimiter = ',', default_value = "0,1,4")]
    pub(crate) adapters: Vec<usize>,
    /// Tokens of each prompt.
    #[arg(long, default_value_t = 64)]
    pub(crate) prompt: usize,
    /// Tokens of each text.
    #[arg(long, default_value_t = 64)]
    pub(crate) new_tokens: usize,
    #[command(flatten)]
    pub(crate) energy: EnergyArguments,
}

#[derive(Debug, Args)]
pub(crate) struct BenchKernelsArguments {
    /// Tokens of the batch.
    #[arg(long, default_value_t = 1600)]
    pub(crate) tokens: usize,
    /// Width of the hidden state.
    #[arg(long, default_value_t = 576)]
    pub(crate) hidden_size: usize,
    /// Width of the feed-forward block.
    #[arg(long, default_value_t = 1536)]
    pub(crate) intermediate_size: usize,
    /// Length of the sequences in attention.
    #[arg(long, default_value_t = 200)]
    pub(crate) seq_len: usize,
    #[command(flatten)]
    pub(crate) energy: EnergyArguments,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_of_the_recipe_are_no_arguments() {
        for (given, expected) in [
            ("train x.yaml --lr 1e-4", Some("`--set train.learning_rate=1e-4` does")),
            ("train x.yaml --lr=1e-4", Some("`--set train.learning_rate=1e-4` does")),
            ("check x.yaml --epochs", Some("`--set train.epochs=VALUE` does")),
            ("train --max_seq_length 512 x.yaml", Some("`--set data.max_seq_len=512` does")),
            ("train x.yaml --frobnicate 3", None),
            ("generate --lr 1e-4 --model m --prompt p", None),
            ("train", None),
        ] {
            let words = || std::iter::once("hydralora").chain(given.split(' ')).map(str::to_owned);
            let error = Arguments::try_parse_from(words()).unwrap_err();
            let advice = recipe_option(&error, words());
            let said = advice.as_deref().unwrap_or_default();
            assert!(said.ends_with(expected.unwrap_or_default()), "{given}: {said}");
            assert_eq!(advice.is_some(), expected.is_some(), "{given}");
        }
    }
}
