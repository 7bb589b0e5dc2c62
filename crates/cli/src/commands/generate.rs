//! `hydralora generate`: continue one prompt.

use crate::args::{
    GenerateArguments, Global, ModelChoice, SamplingArguments, Switch, TemplateArguments,
};
use crate::domain;
use crate::failure::bad_input;
use crate::in_force::{InForce, idle_note};
use crate::plan::{Base, encode_chat, open_base};
use crate::ui::{result, say};
use hydralora_data::{ChatTemplate, Message, THINKING, template_argument_fault};
use hydralora_model::adapter::{Adapter, NoAdapter};
use hydralora_peft::io::LoadedAdapter;
use hydralora_run::{Generator, Sampling, start_ids};
use serde_json::{Map, Value, json};
use std::io::Write;
use std::process::ExitCode;
use std::time::Instant;

pub(crate) fn run(global: &Global, arguments: &GenerateArguments) -> anyhow::Result<ExitCode> {
    let sampling = sampling(&arguments.sampling)?;
    let opened = Opened::new(global, &arguments.model, arguments.base_template)?;
    let tokenizer = opened.base.tokenizer();
    let prompt = if arguments.raw {
        if arguments.template != TemplateArguments::default() {
            return Err(bad_input(
                "--thinking and --template-arg: are for the chat template, which --raw leaves out",
            ));
        }
        start_ids(tokenizer, &arguments.prompt)?
    } else {
        let template = opened.in_force.template.clone().ok_or_else(|| {
            bad_input("the model has no chat template; use --raw to continue the prompt as it is")
        })?;
        let template = with_arguments(global, template, &arguments.template)?;
        let system = arguments.system.iter().map(Message::system);
        let messages: Vec<Message> = system.chain([Message::user(&arguments.prompt)]).collect();
        encode_chat(tokenizer, &template, &messages)?
    };
    if prompt.is_empty() {
        return Err(bad_input("--prompt: is empty; expected a text"));
    }
    let started = Instant::now();
    let stream = !global.json;
    let generation = opened.generator().generate(
        &prompt,
        &mut opened.base.decoder.new_cache(),
        sampling,
        arguments.sampling.max_new_tokens,
        &mut |piece| !stream || print_piece(piece),
    )?;
    if stream {
        print_piece("\n");
    } else {
        let json = json!({
            "text": generation.text,
            "finish": format!("{:?}", generation.finish).to_lowercase(),
            "prompt_tokens": prompt.len(),
            "new_tokens": generation.tokens.len(),
            "seconds": started.elapsed().as_secs_f64(),
        });
        result(global, &json, "")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Prints without a line's end; false when nobody reads any more.
pub(crate) fn print_piece(piece: &str) -> bool {
    let mut out = std::io::stdout().lock();
    out.write_all(piece.as_bytes()).and_then(|()| out.flush()).is_ok()
}

/// The sampling options, checked.
pub(crate) fn sampling(arguments: &SamplingArguments) -> anyhow::Result<Sampling> {
    let sampling = Sampling {
        temperature: arguments.temperature,
        top_k: arguments.top_k,
        top_p: arguments.top_p,
        seed: arguments.seed,
    };
    let faults: Vec<String> = sampling
        .faults()
        .into_iter()
        .map(|(option, message)| format!("--{option}: {message}"))
        .collect();
    if faults.is_empty() { Ok(sampling) } else { Err(bad_input(faults.join("\n"))) }
}

/// The template with the arguments of the command line over those it has. One that its source
/// does not name is noted: it changes nothing.
pub(crate) fn with_arguments(
    global: &Global,
    template: ChatTemplate,
    arguments: &TemplateArguments,
) -> anyhow::Result<ChatTemplate> {
    let mut given = Map::new();
    for argument in &arguments.template_args {
        let Some((name, value)) = argument.split_once('=') else {
            return Err(bad_input(format!("--template-arg {argument}: expected KEY=VALUE")));
        };
        if let Some(fault) = template_argument_fault(name) {
            return Err(bad_input(format!("--template-arg {name}: {fault}")));
        }
        let value = serde_json::from_str(value).unwrap_or_else(|_| Value::from(value));
        given.insert(name.to_owned(), value);
    }
    if let Some(thinking) = arguments.thinking {
        if given.contains_key(THINKING) {
            return Err(bad_input(format!("--thinking: --template-arg gives {THINKING} too")));
        }
        given.insert(THINKING.to_owned(), Value::from(thinking == Switch::On));
    }
    for name in given.keys().filter(|name| !template.reads(name)) {
        say(global, format!("note: the chat template does not use `{name}`"));
    }
    Ok(template.with_arguments(&given))
}

/// A base model and, possibly, an adapter on it.
pub(crate) struct Opened {
    pub(crate) base: Base,
    pub(crate) loaded: Option<LoadedAdapter>,
    /// The template the adapter was trained with or else the model's own, and where answers end.
    pub(crate) in_force: InForce,
}

impl Opened {
    pub(crate) fn new(
        global: &Global,
        choice: &ModelChoice,
        prefer_base: bool,
    ) -> anyhow::Result<Self> {
        let base = open_base(&choice.model, choice.dtype)?;
        let mut loaded =
            choice.adapter.as_deref().map(|folder| base.load_adapter(folder)).transpose()?;
        if let Some(loaded) = &mut loaded {
            domain::choose(loaded.tuned.as_mut(), choice.domain.as_deref())?;
        }
        let metadata = loaded.as_ref().and_then(|loaded| loaded.metadata.as_ref());
        let in_force = InForce::of(&base.source, metadata, prefer_base)?;
        let idle = loaded.as_ref().and_then(|loaded| idle_note(loaded.tuned.as_ref()));
        for note in in_force.notes.iter().chain(&idle) {
            say(global, note);
        }
        Ok(Self { base, loaded, in_force })
    }

    /// The adapter, or none.
    pub(crate) fn adapter(&self) -> &dyn Adapter {
        self.loaded.as_ref().map_or(&NoAdapter, |loaded| loaded.tuned.as_adapter())
    }

    pub(crate) fn generator(&self) -> Generator<'_> {
        Generator {
            decoder: &self.base.decoder,
            tokenizer: self.base.tokenizer(),
            adapter: self.adapter(),
            end_ids: &self.in_force.end_ids,
        }
    }
}
