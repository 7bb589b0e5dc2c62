//! What other programs of the field call the things of a recipe: PEFT, transformers and TRL,
//! LLaMA-Factory, Axolotl, mlx-lm. A name of theirs is answered by ours.

use super::keys;
use serde_json::{Map, Value};

/// Where all of it is listed.
pub(crate) const GUIDE: &str = "docs/recipes.md, \"Names of other programs\"";

/// What a name of another program means here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// It is this option; where methods differ, the first that the method has.
    Is(&'static [&'static str]),
    /// It is said in another way, or there is nothing to say.
    Say(&'static str),
}

/// A short sentence about an unknown `key` of `section` (`train`, `data.train[0]`, or empty for the top
/// level); none where nothing is known of it. `own` are the options that the section has.
pub(super) fn answer(section: &str, key: &str, own: &[&str]) -> Option<String> {
    let plain = plain(key);
    let kind = section.split('[').next().unwrap_or_default();
    // Another spelling of a name of ours is more likely that than a name of another program.
    if let Some(same) = own.iter().find(|own| **own == plain) {
        return Some(format!("did you mean `{same}`?"));
    }
    let Some(found) = known(kind, &plain) else {
        // Words that stand in several places are no hint.
        let elsewhere =
            Some(&plain).filter(|key| !["path", "name", "init"].contains(&key.as_str()));
        let option = elsewhere.and_then(|key| own_option(key))?;
        return Some(match option.split_once('.') {
            Some((of, _)) if of == kind => OF_OTHER_METHODS.to_owned(),
            _ => format!("here it is `{option}`"),
        });
    };
    let options = match found {
        Answer::Say(text) => return Some(text.to_owned()),
        Answer::Is(options) => options,
    };
    let here = |option: &&&str| match option.rsplit_once('.') {
        Some((of, name)) => of == kind && own.contains(&name),
        None => false,
    };
    let option = options.iter().find(here).or(options.first())?;
    Some(match option.strip_prefix(kind).and_then(|rest| rest.strip_prefix('.')) {
        Some(name) if name == plain => OF_OTHER_METHODS.to_owned(),
        Some(name) if !own.contains(&name) => format!("it is `{name}` of other methods"),
        Some(name) => format!("here it is `{name}`"),
        None => format!("here it is `{option}`"),
    })
}

/// What is said of an option that stands in the right section, under another method.
const OF_OTHER_METHODS: &str = "it is one of other methods";

/// Where an option of ours stands, as `train.seed`.
fn own_option(key: &str) -> Option<String> {
    let sections = keys::sections();
    // `path` and `dtype` are the model's; words that sections share are likelier the training's.
    let first = ["train", "model", "data", "method"];
    let mut of_section = first.into_iter().filter_map(|name| {
        let own = sections.iter().find(|(section, _)| *section == name);
        own.filter(|(_, keys)| keys.iter().any(|own| own == key)).map(|_| format!("{name}.{key}"))
    });
    of_section.next()
}

/// The option of a recipe that `word` stands for wherever it is written, as `train.learning_rate`.
pub(crate) fn option(word: &str) -> Option<String> {
    let plain = plain(word);
    if let Some(found) = own_option(&plain) {
        return Some(found);
    }
    if plain == "output" {
        return Some(plain);
    }
    match known("", &plain)? {
        Answer::Is(options) => options.first().map(|&option| option.to_owned()),
        Answer::Say(_) => None,
    }
}

/// What a method of another name is here: the method whose options it has, and how it is asked for.
pub(super) fn method(name: &str) -> Option<(Option<&'static str>, &'static str)> {
    const PREFERENCES: &str = "preference and reward training are not here; every method trains on the answers of records";
    let found = match plain(name).as_str() {
        "qlora" => (Some("lora"), "it is `name: lora` with `model.dtype: q4_0`"),
        "dora" => (Some("lora"), "it is `name: lora` with `use_dora: true`"),
        "rslora" => (Some("lora"), "it is `name: lora` with `use_rslora: true`"),
        "pissa" => (Some("lora"), "it is `name: lora` with `init_lora_weights: pissa`"),
        "lora+" | "loraplus" | "lora_plus" => {
            (Some("lora"), "it is `name: lora` with `train.b_learning_rate_ratio: 16`")
        }
        "rlora" | "r_lora" => (
            Some("hydralora"),
            "it is `name: hydralora` with `init_lora_weights: rlora` and `dropout_mask: per_expert`",
        ),
        "hydra" | "hydra_lora" => (Some("hydralora"), "it is `name: hydralora`"),
        "moelora" | "moe_lora" | "mole" | "lora_moe" => {
            (Some("loramoe"), "here it is `name: loramoe`")
        }
        "mtllora" | "multitask_lora" => (Some("mtl-lora"), "here it is `name: mtl-lora`"),
        "fft" | "full_finetune" | "full_finetuning" | "full_fine_tuning" | "finetune"
        | "fine_tune" | "freeze" | "none" => (Some("full"), "it is `name: full`"),
        "prompt" | "prompt_tuning_lora" => (Some("prompt-tuning"), "it is `name: prompt-tuning`"),
        "ptuning" | "p_tuning_v1" => (Some("p-tuning"), "it is `name: p-tuning`"),
        "prefix" | "p_tuning_v2" | "ptuning_v2" => {
            (Some("prefix-tuning"), "it is `name: prefix-tuning`")
        }
        "sft" | "pt" | "pretrain" | "pretraining" | "causal_lm" => (
            None,
            "every method trains on records' answers (`data.train_on_prompt` for all of the text); \
             expected lora, hydralora or another method",
        ),
        "dpo" | "orpo" | "grpo" | "ppo" | "kto" | "rm" | "rlhf" | "simpo" | "cpo" | "ipo"
        | "rloo" | "gspo" | "reward" | "reward_trainer" => (None, PREFERENCES),
        "vera" | "loha" | "lokr" | "oft" | "boft" | "galore" | "longlora" | "qalora" | "olora"
        | "loftq" | "xlora" | "randlora" | "apollo" | "badam" | "lisa" => {
            (None, "this method is not here; expected lora, hydralora or another method")
        }
        _ => return None,
    };
    Some(found)
}

/// Names of one program's configuration that no other has, and which of them have to be there.
struct Program {
    name: &'static str,
    needed: &'static str,
    marks: &'static [&'static str],
}

const PROGRAMS: [Program; 4] = [
    Program {
        name: "an Axolotl configuration",
        needed: "base_model",
        marks: &["datasets", "adapter", "sequence_len", "micro_batch_size", "load_in_4bit"],
    },
    Program {
        name: "a LLaMA-Factory configuration",
        needed: "model_name_or_path",
        marks: &["stage", "finetuning_type", "cutoff_len", "do_train", "lora_target"],
    },
    Program {
        name: "arguments of transformers or TRL",
        needed: "model_name_or_path",
        marks: &["use_peft", "dataset_name", "per_device_train_batch_size", "output_dir"],
    },
    Program {
        name: "an mlx-lm configuration",
        needed: "model",
        marks: &["lora_parameters", "iters", "fine_tune_type", "lora_layers", "steps_per_eval"],
    },
];

/// Whose configuration these top-level keys are, if they are another program's.
pub(super) fn program(sections: &Map<String, Value>) -> Option<&'static str> {
    if ["model", "data", "method", "train"].iter().any(|name| {
        sections.get(*name).is_some_and(|section| section.is_object() || section.is_array())
    }) {
        return None;
    }
    let has = |key: &&str| sections.contains_key(*key);
    let is = |program: &&Program| has(&program.needed) && program.marks.iter().any(&has);
    PROGRAMS.iter().find(is).map(|program| program.name)
}

/// A key as it is compared: in lower case, with underscores, and without the dashes of an argument.
fn plain(key: &str) -> String {
    key.trim_start_matches('-').to_lowercase().replace('-', "_")
}

/// What is known of `key` in a section of that kind (`data.train` for an entry of the list).
fn known(section: &str, key: &str) -> Option<Answer> {
    use Answer::{Is, Say};
    let entry = matches!(section, "data.train" | "data.valid");
    let found = match key {
        // Words whose meaning depends on where they stand.
        "type" | "ds_type" | "formatting" | "conversation" if entry => Is(&["format"]),
        "file" | "file_name" | "data_files" | "data_path" | "dataset" | "dataset_name"
        | "hf_hub_url"
            if entry =>
        {
            Is(&["path"])
        }
        "subset" | "config" | "config_name" | "dataset_config" if entry => Is(&["name"]),
        "max_samples" | "num_samples" | "n" if entry => Is(&["limit"]),
        "ratio" | "sampling_prob" | "probability" | "interleave_prob" if entry => Is(&["weight"]),
        "field"
        | "field_messages"
        | "message_field_role"
        | "message_property_mappings"
        | "field_instruction"
        | "field_output"
        | "prompt_feature"
        | "completion_feature"
        | "chat_feature"
        | "tags"
        | "mapping"
            if entry =>
        {
            Say("here it is `fields`, as {output: answer}: from the format's name to the file's")
        }
        "path" | "file" | "files" if section == "data" => {
            Say("here it is `train`, a list such as [{path: FILE}]")
        }
        "weight" | "domain" | "format" | "fields" | "columns" | "source" | "limit" | "system"
            if section == "data" =>
        {
            Say("it belongs to an entry of `train`, as [{path: FILE, …}]")
        }
        "name" | "id" if section == "model" => Is(&["model.path"]),
        "type" | "method" | "kind" if section == "method" => Is(&["method.name"]),

        "lr" | "learning_rate" => Is(&["train.learning_rate"]),
        "num_train_epochs" | "num_epochs" | "n_epochs" | "epoch" | "epochs" => {
            Is(&["train.epochs"])
        }
        "max_steps" | "iters" | "max_iters" | "num_steps" | "steps" => Is(&["train.max_steps"]),
        "per_device_train_batch_size"
        | "micro_batch_size"
        | "train_batch_size"
        | "bs"
        | "batch"
        | "batch_size" => Is(&["train.batch_size"]),
        "per_device_eval_batch_size" | "eval_batch_size" | "val_batches" => {
            Say("held-out records are scored whatever their number; leave it out")
        }
        "gradient_accumulation_steps"
        | "grad_accumulation_steps"
        | "gradient_accumulation"
        | "accumulation_steps"
        | "accumulate_grad_batches"
        | "grad_accum" => Is(&["train.grad_accumulation"]),
        "lr_scheduler_type" | "lr_scheduler" | "lr_schedule" | "scheduler" | "scheduler_type" => {
            Is(&["train.schedule"])
        }
        "cosine_min_lr_ratio" | "min_lr_ratio" | "min_lr_rate" => {
            Is(&["train.min_learning_rate_ratio"])
        }
        "lr_scheduler_kwargs" | "lr_decay_steps" => Say(
            "the constants of a schedule are `train.min_learning_rate_ratio`, `schedule_power` (of \
             polynomial) and `decay_ratio` (of wsd)",
        ),
        "warmup" | "num_warmup_steps" | "warmup_iters" => Is(&["train.warmup_steps"]),
        "warmup_ratio" => Is(&["train.warmup_ratio"]),
        "warmup_steps" => Is(&["train.warmup_steps"]),
        "weight_decay" | "wd" => Is(&["train.weight_decay"]),
        "adam_beta1" => Is(&["train.beta1"]),
        "adam_beta2" => Is(&["train.beta2"]),
        "adam_epsilon" | "eps" | "adam_eps" => Is(&["train.epsilon"]),
        "muon_momentum" => Is(&["train.momentum"]),
        "max_grad_norm" | "gradient_clipping" | "grad_clip" | "clip_grad_norm" | "max_norm" => {
            Is(&["train.max_grad_norm"])
        }
        "random_seed" | "data_seed" => Is(&["train.seed"]),
        "loraplus_lr_ratio" | "lora_plus_lr_ratio" | "loraplus_lambda" => {
            Is(&["train.b_learning_rate_ratio"])
        }
        "gradient_checkpointing"
        | "grad_checkpoint"
        | "use_gradient_checkpointing"
        | "activation_checkpointing" => Is(&["train.gradient_checkpointing"]),
        "gradient_checkpointing_kwargs" => {
            Say("here it is `train.gradient_checkpointing: true` alone; leave it out")
        }
        "save_steps"
        | "save_interval"
        | "saves_per_epoch"
        | "save_freq"
        | "checkpoint_interval" => Is(&["train.save_every"]),
        "eval_steps" | "evals_per_epoch" | "steps_per_eval" | "eval_interval"
        | "val_check_interval" => Is(&["train.eval_every"]),
        "save_strategy" => Say("here it is a number of steps, `train.save_every`"),
        "eval_strategy" | "evaluation_strategy" | "do_eval" => {
            Say("here it is a number of steps, `train.eval_every`")
        }
        "save_total_limit" | "max_checkpoints" => Is(&["train.keep_checkpoints"]),
        "early_stopping" | "patience" => Is(&["train.early_stopping_patience"]),
        "metric_for_best_model" | "best_metric" => Is(&["train.best_set"]),
        "load_best_model_at_end" => Say("the best adapter is always kept, in `best/` of the run"),
        "resume_from_checkpoint" | "auto_resume_from_checkpoints" | "resume" => {
            Say("here it is an argument: `hydralora train RECIPE --resume`")
        }

        "r" | "lora_r" | "lora_rank" | "rank" => Is(&["method.rank", "method.init_r"]),
        "lora_alpha" | "alpha" => Is(&["method.alpha"]),
        "lora_dropout" | "dropout" => Is(&["method.dropout"]),
        "target_modules" | "lora_target" | "lora_target_modules" | "targets" => {
            Is(&["method.targets"])
        }
        "lora_target_linear" => Say("here it is `method.targets: all`"),
        "lora_layers" | "num_layers" | "layers_to_transform" | "lora_layers_to_transform" => {
            Say("here it is said by `method.targets`, as [\"model.layers.1?.*\"]")
        }
        "scale" | "scaling" => Say("here the scale is `method.alpha` / `method.rank`"),
        "lora_parameters" => Say("here they are `method`: rank, alpha, dropout, targets"),
        "num_heads" | "lora_num" | "lora_nums" | "num_loras" | "experts" | "heads"
        | "n_experts" | "num_expert" | "num_experts" => Is(&["method.num_experts"]),
        "top_k" | "num_experts_per_tok" => Is(&["method.router_top_k"]),
        "router_aux_loss_coef" | "aux_loss_coef" | "blc_weight" => Is(&["method.balance_weight"]),
        "router_z_loss_coef" | "z_loss_coef" | "router_z_loss" | "z_loss_weight" => {
            Is(&["method.router_z_weight"])
        }
        "num_virtual_tokens" => Is(&["method.num_virtual_tokens"]),
        "modules_to_save" | "lora_modules_to_save" | "additional_target" => {
            Is(&["method.modules_to_save"])
        }
        "use_dora" | "peft_use_dora" => Is(&["method.use_dora"]),
        "use_rslora" | "peft_use_rslora" => Is(&["method.use_rslora"]),
        "init_lora_weights" | "peft_init_lora_weights" | "pissa_init" => {
            Is(&["method.init_lora_weights"])
        }
        "bias" | "lora_bias" | "fan_in_fan_out" | "task_type" | "inference_mode" => {
            Say("no method here needs it; leave it out")
        }
        "type" | "peft_type" | "adapter" | "adapter_type" | "finetuning_type"
        | "fine_tune_type" | "train_type" | "use_peft" => Is(&["method.name"]),

        "adapter_name_or_path"
        | "lora_model_dir"
        | "resume_adapter_file"
        | "init_adapter"
        | "adapter_path"
        | "adapters"
        | "warm_start" => Is(&["method.init_from"]),

        "max_length" | "cutoff_len" | "sequence_len" | "max_seq_length" | "model_max_length"
        | "block_size" | "context_length" | "seq_len" | "max_len" | "max_seq_len" => {
            Is(&["data.max_seq_len"])
        }
        "packing"
        | "sample_packing"
        | "eval_sample_packing"
        | "pack_dataset"
        | "pad_to_sequence_len"
        | "group_by_length"
        | "neat_packing"
        | "padding_free" => Say("batches hold no padding here in any case; leave it out"),
        "train_on_inputs" | "train_on_prompt" => Is(&["data.train_on_prompt"]),
        "mask_prompt" | "completion_only_loss" | "assistant_only_loss" | "roles_to_train" => {
            Say("only answers are trained unless `data.train_on_prompt: true`; leave it out")
        }
        "mask_history" => {
            Say("to train the last answer of a conversation alone it is `data.turns: last`")
        }
        "train_on_eos" => Say("the token that ends an answer is trained with it; leave it out"),
        "message_field_training" | "message_field_training_detail" => Say(
            "a turn says it itself, by `train`, `training` or `weight` of 0 or false (docs/data.md); leave it out",
        ),
        "chat_template" | "template" => Is(&["data.template"]),
        "default_system" => Say("it is `system` of an entry of `data.train`"),
        "datasets" | "dataset" | "dataset_name" | "dataset_path" | "train_file" | "train_data"
        | "train_files" | "train_dataset" | "data_path" | "data_files" | "data"
        | "dataset_mixer" => Say("here it is `data.train`, a list such as [{path: FILE}]"),
        "dataset_dir" | "dataset_config" | "dataset_prepared_path" => {
            Say("here the files themselves are named, in `data.train`; leave it out")
        }
        "val_set_size"
        | "val_size"
        | "validation_split"
        | "valid_split"
        | "test_size"
        | "eval_split_ratio"
        | "validation_split_percentage" => Is(&["data.valid_fraction"]),
        "validation_file" | "eval_dataset" | "test_datasets" | "val_data" | "eval_file" => Say(
            "here it is `data.valid`, a list such as [{path: FILE}], or a mapping of sets' names to such \
                 lists",
        ),
        "mix_strategy" | "interleave_probs" => Is(&["data.mixing"]),
        "max_samples" => Say("here it is `limit` of an entry of `data.train`"),

        "base_model"
        | "model_name_or_path"
        | "model_name"
        | "pretrained_model_name_or_path"
        | "model_id"
        | "base_model_name_or_path"
        | "model_path"
        | "model" => Is(&["model.path"]),
        "bf16" | "bfloat16" => Say(
            "here it is `model.dtype: bf16`, how the frozen weights are held; it computes in f32",
        ),
        "fp16" | "float16" | "pure_fp16" => Say(
            "here it is `model.dtype: f16`, how the frozen weights are held; it computes in f32",
        ),
        "tf32" | "amp" => Say("it computes in f32 here; leave it out"),
        "torch_dtype" | "precision" | "dtype" => Is(&["model.dtype"]),
        "load_in_4bit"
        | "quantization_bit"
        | "bnb_4bit_quant_type"
        | "quantization"
        | "quantization_config"
        | "use_bnb_nested_quant" => {
            Say("here it is `model.dtype: q4_0` (4 bits) or `q8_0` (8 bits)")
        }
        "load_in_8bit" => Say("here it is `model.dtype: q8_0`"),
        "bnb_4bit_compute_dtype" | "bnb_4bit_use_double_quant" | "double_quantization" => {
            Say("here `model.dtype: q4_0` says all; leave it out")
        }

        "optim" | "optimizer" | "optimizer_name" => Is(&["train.optimizer"]),
        "optim_args" | "optimizer_params" | "optimizer_config" => {
            Say("here an optimizer's options stand beside `train.optimizer`, as `momentum`")
        }
        "use_muon" => Say("here it is `train.optimizer: muon`"),
        "use_adafactor" | "adafactor" => Say("here it is `train.optimizer: adafactor`"),
        "report_to"
        | "logging_dir"
        | "run_name"
        | "wandb_project"
        | "wandb_entity"
        | "wandb_run_id"
        | "wandb_name"
        | "wandb_watch"
        | "wandb_log_model"
        | "wandb"
        | "mlflow_tracking_uri"
        | "use_tensorboard"
        | "plot_loss" => {
            Say("metrics.jsonl, TensorBoard's files and a report are always written; leave it out")
        }
        "logging_steps" | "steps_per_report" | "log_interval" | "logging_strategy"
        | "logging_first_step" | "log_every" => Say("every step is recorded here; leave it out"),
        "output_dir" | "save_path" | "adapter_file" | "save_dir" => Is(&["output"]),
        "overwrite_output_dir" | "overwrite_cache" => {
            Say("a run is never written over; choose another `output`")
        }
        "do_train" | "train" | "stage" | "do_predict" => {
            Say("`hydralora train` trains on records' answers; leave it out")
        }
        "rl" | "reward_model" | "pref_beta" | "pref_loss" | "dpo_beta" => {
            Say("preference and reward training are not here")
        }
        "special_tokens"
        | "additional_special_tokens"
        | "new_special_tokens"
        | "add_special_tokens" => {
            Say("the model's are known; tokens that it does not have go into `data.add_tokens`")
        }
        "tokenizer"
        | "tokenizer_name"
        | "tokenizer_name_or_path"
        | "tokenizer_type"
        | "model_type"
        | "tokenizer_config"
        | "is_llama_derived_model" => {
            Say("the tokenizer and the model's type come with the model; leave it out")
        }
        "dataloader_num_workers"
        | "preprocessing_num_workers"
        | "dataset_num_proc"
        | "dataset_processes"
        | "num_proc" => Say("here it is the argument `--threads`; leave it out"),
        "deepspeed"
        | "fsdp"
        | "fsdp_config"
        | "ddp"
        | "ddp_timeout"
        | "ddp_find_unused_parameters"
        | "local_rank"
        | "world_size" => Say("it trains on one machine here; leave it out"),
        "flash_attention"
        | "flash_attn"
        | "xformers_attention"
        | "sdp_attention"
        | "attn_implementation"
        | "use_cache"
        | "trust_remote_code"
        | "use_fast_tokenizer"
        | "use_liger_kernel"
        | "enable_liger_kernel"
        | "use_unsloth"
        | "torch_compile"
        | "low_cpu_mem_usage"
        | "device_map"
        | "remove_unused_columns"
        | "strict"
        | "seed_all" => Say("there is nothing to choose here; leave it out"),
        "neftune_noise_alpha" => Say("noise on embeddings is not here"),
        "push_to_hub" | "hub_model_id" | "hub_token" | "hub_strategy" => {
            Say("nothing is uploaded here; leave it out")
        }
        _ => return None,
    };
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Every option that an answer names is one.
    #[test]
    fn answers_name_options_that_there_are() {
        let sections = keys::sections();
        let source = include_str!("names.rs");
        let (table, _) = source.split_once("mod tests").unwrap();
        let mut count = 0;
        for part in table.split('"').chain(table.split('`')) {
            let Some((section, rest)) = part.split_once('.') else { continue };
            let Some((_, keys)) = sections.iter().find(|(name, _)| *name == section) else {
                continue;
            };
            let key: String =
                rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            // Names of layers begin likewise.
            assert!(keys.contains(&key) || key == "layers", "{part}");
            count += 1;
        }
        assert!(count > 60, "{count}");
        for name in ["qlora", "dora", "rlora", "fft", "ptuning", "prefix", "lora_moe"] {
            let (method, _) = super::method(name).unwrap();
            assert!(hydralora_peft::methods::find(method.unwrap()).is_ok(), "{name}");
        }
    }

    #[test]
    fn names_of_the_field_are_answered_with_ours() {
        let train = ["learning_rate", "epochs"];
        for (section, key, expected) in [
            ("train", "lr", "here it is `learning_rate`"),
            ("method", "lr", "here it is `train.learning_rate`"),
            ("", "lora_r", "here it is `method.rank`"),
            ("train", "Learning-Rate", "did you mean `learning_rate`?"),
            ("data.train[3]", "type", "here it is `format`"),
            ("method", "num_experts", "it is one of other methods"),
            ("method", "num_heads", "it is `num_experts` of other methods"),
            ("method", "gate", "it is one of other methods"),
            ("", "output_dir", "here it is `output`"),
            ("data", "seed", "here it is `train.seed`"),
        ] {
            let own = if section == "data.train[3]" { &["format"][..] } else { &train[..] };
            assert_eq!(answer(section, key, own).as_deref(), Some(expected), "{section} {key}");
        }
        assert_eq!(answer("train", "frobnicate", &train), None);
        assert_eq!(answer("method", "r", &["init_r"]).as_deref(), Some("here it is `init_r`"));
        for (word, expected) in [
            ("--lr", "train.learning_rate"),
            ("--learning-rate", "train.learning_rate"),
            ("--max_seq_len", "data.max_seq_len"),
            ("--rank", "method.rank"),
            ("--dtype", "model.dtype"),
            ("--output", "output"),
            ("--seed", "train.seed"),
        ] {
            assert_eq!(option(word).as_deref(), Some(expected), "{word}");
        }
        assert_eq!(option("--frobnicate"), None);
    }

    #[test]
    fn files_of_other_programs_are_told_by_their_keys() {
        let of = |value: Value| program(value.as_object().unwrap());
        assert_eq!(of(json!({"model": {"path": "m"}, "data": {}})), None);
        assert_eq!(of(json!({"model": {"path": "m"}, "base_model": "x", "datasets": []})), None);
        let axolotl = of(json!({"base_model": "x", "datasets": [], "micro_batch_size": 2}));
        assert_eq!(axolotl, Some("an Axolotl configuration"));
        let factory = of(json!({"model_name_or_path": "x", "stage": "sft", "template": "qwen"}));
        assert_eq!(factory, Some("a LLaMA-Factory configuration"));
        let mlx = of(json!({"model": "x", "data": "folder", "iters": 10}));
        assert_eq!(mlx, Some("an mlx-lm configuration"));
        assert_eq!(of(json!({"base_model": "x"})), None);
    }
}
