//! `hydralora generate`: continue one prompt.

use crate::adapter::base_of;
use crate::args::{GenerateArguments, Global, ModelChoice, SamplingArguments};
use crate::domain;
use crate::failure::bad_input;
use crate::plan::{Base, encode_chat, open_base_of};
use crate::ui::{result, say};
use hydralora_data::{ChatTemplate, Message};
use hydralora_model::adapter::{Adapter, NoAdapter};
use hydralora_peft::io::LoadedAdapter;
use hydralora_run::{Generator, Sampling};
use serde_json::json;
use std::io::Write;
use std::process::ExitCode;
use std::time::Instant;

pub(crate) fn run(global: &Global, arguments: &GenerateArguments) -> anyhow::Result<ExitCode> {
    let sampling = sampling(&arguments.sampling)?;
    let opened = Opened::new(&arguments.model)?;
    let tokenizer = opened.base.tokenizer();
    let prompt = if arguments.raw {
        let mut ids = tokenizer.encode(&arguments.prompt)?;
        if let Some((bos, _)) = tokenizer.bos().filter(|_| tokenizer.add_bos()) {
            ids.insert(0, bos);
        }
        ids
    } else {
        let template = opened.template(global, arguments.base_template)?.ok_or_else(|| {
            bad_input("the model has no chat template; use --raw to continue the prompt as it is")
        })?;
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

/// A base model and, possibly, an adapter on it.
pub(crate) struct Opened {
    pub(crate) base: Base,
    pub(crate) loaded: Option<LoadedAdapter>,
}

impl Opened {
    pub(crate) fn new(choice: &ModelChoice) -> anyhow::Result<Self> {
        let adapter = choice.adapter.as_deref();
        let spec = match (&choice.model, adapter) {
            (given, Some(adapter)) => base_of(given.as_deref(), adapter)?,
            (Some(given), None) => given.clone(),
            (None, None) => return Err(bad_input("expected --model, --adapter or both")),
        };
        let base = open_base_of(&spec, choice.dtype, adapter.as_slice())?;
        let mut loaded = adapter.map(|folder| base.load_adapter(folder)).transpose()?;
        if let Some(loaded) = &mut loaded {
            domain::choose(loaded.tuned.as_mut(), choice.domain.as_deref())?;
        }
        Ok(Self { base, loaded })
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
        }
    }

    /// The template the adapter was trained with; without one, the model's own.
    pub(crate) fn template(
        &self,
        global: &Global,
        prefer_base: bool,
    ) -> anyhow::Result<Option<ChatTemplate>> {
        let own = self.base.template()?;
        let metadata = self.loaded.as_ref().and_then(|loaded| loaded.metadata.as_ref());
        let trained = metadata.and_then(|metadata| metadata.chat_template.as_deref());
        let Some(trained) = trained else { return Ok(own) };
        if prefer_base {
            if own.as_ref().is_some_and(|own| own.source() != trained) {
                say(global, "note: the adapter was trained with another chat template");
            }
            return Ok(own);
        }
        Ok(Some(ChatTemplate::from_source("of the adapter", trained)?))
    }
}
