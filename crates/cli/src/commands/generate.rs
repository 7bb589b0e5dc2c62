//! `hydralora generate`: continue a prompt, or a file of them.

use crate::adapter::base_of;
use crate::args::{
    GenerateArguments, Global, ModelChoice, SamplingArguments, Switch, TemplateArguments,
};
use crate::domain;
use crate::energy::{Meter, Work};
use crate::failure::bad_input;
use crate::in_force::{InForce, idle_note};
use crate::plan::{Base, encode_chat, open_base_of};
use crate::ui::{print, result, say};
use anyhow::Context;
use hydralora_data::{ChatTemplate, Message, THINKING, template_argument_fault};
use hydralora_model::Tokenizer;
use hydralora_model::adapter::{Adapter, NoAdapter};
use hydralora_peft::io::LoadedAdapter;
use hydralora_run::{Generation, Generator, Request, Sampling, start_ids};
use serde_json::{Map, Value, json};
use std::io::Read;
use std::process::ExitCode;

pub(crate) fn run(global: &Global, arguments: &GenerateArguments) -> anyhow::Result<ExitCode> {
    let sampling = sampling(&arguments.sampling)?;
    if arguments.raw && arguments.template != TemplateArguments::default() {
        return Err(bad_input(
            "--thinking and --template-arg: are for the chat template, which --raw leaves out",
        ));
    }
    if arguments.raw && arguments.system.is_some() {
        return Err(bad_input("--system: is for the chat template, which --raw leaves out"));
    }
    let asked = Asked::read(arguments)?;
    let opened = Opened::new(global, &arguments.model, arguments.base_template)?;
    let prompter = Prompter::new(global, &opened, arguments)?;
    match asked {
        Asked::One(prompt) => {
            let ids = prompter.encode(&prompt)?;
            let request = Request {
                prompt: &ids,
                sampling,
                max_new_tokens: arguments.sampling.max_new_tokens,
                stops: &arguments.sampling.stops,
                continues: prompter.continues(),
            };
            one(global, arguments, &opened, request)
        }
        Asked::File(prompts) => {
            super::batch::run(global, arguments, &opened, &prompter, &prompts, sampling)
        }
    }?;
    Ok(ExitCode::SUCCESS)
}

/// What was asked, read before a model is opened.
enum Asked {
    One(Asking),
    File(Vec<Asking>),
}

/// A prompt.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Asking {
    Text(String),
    Messages(Vec<Message>),
}

impl Asked {
    fn read(arguments: &GenerateArguments) -> anyhow::Result<Self> {
        if let Some(path) = &arguments.prompts {
            return Ok(Self::File(super::batch::read(path, arguments.raw)?));
        }
        let prompt = match arguments.prompt.as_deref() {
            Some("-") => from_stdin()?,
            other => other.unwrap_or_default().to_owned(),
        };
        if prompt.is_empty() {
            return Err(bad_input("--prompt: is empty; expected a text"));
        }
        Ok(Self::One(Asking::Text(prompt)))
    }
}

/// All of stdin but the line break that ends it.
fn from_stdin() -> anyhow::Result<String> {
    let mut bytes = Vec::new();
    std::io::stdin().lock().read_to_end(&mut bytes).context("--prompt -: cannot read stdin")?;
    let mut text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        bad_input(format!("--prompt -: byte {at} of stdin is not valid UTF-8"))
    })?;
    if text.ends_with('\n') {
        text.truncate(text.len() - 1);
    }
    Ok(text)
}

/// Makes token ids of prompts.
pub(crate) struct Prompter<'a> {
    tokenizer: &'a Tokenizer,
    /// None for prompts that are continued as they are.
    template: Option<ChatTemplate>,
    system: Option<Message>,
}

impl<'a> Prompter<'a> {
    fn new(
        global: &Global,
        opened: &'a Opened,
        arguments: &GenerateArguments,
    ) -> anyhow::Result<Self> {
        let tokenizer = opened.base.tokenizer();
        if arguments.raw {
            return Ok(Self { tokenizer, template: None, system: None });
        }
        let template = opened.in_force.template.clone().ok_or_else(|| {
            bad_input("the model has no chat template; use --raw to continue the prompt as it is")
        })?;
        let template = Some(with_arguments(global, template, &arguments.template)?);
        Ok(Self { tokenizer, template, system: arguments.system.as_ref().map(Message::system) })
    }

    /// Whether what is written goes on with the prompt, and is no answer to it.
    pub(crate) fn continues(&self) -> bool {
        self.template.is_none()
    }

    /// Token ids of a prompt, ready to be answered.
    pub(crate) fn encode(&self, prompt: &Asking) -> anyhow::Result<Vec<u32>> {
        match (&self.template, prompt) {
            (None, Asking::Text(text)) => Ok(start_ids(self.tokenizer, text)?),
            (None, Asking::Messages(_)) => {
                Err(bad_input("`messages` are for the chat template, which --raw leaves out"))
            }
            (Some(template), prompt) => {
                let asked = match prompt {
                    Asking::Text(text) => vec![Message::user(text)],
                    Asking::Messages(messages) => messages.clone(),
                };
                let messages: Vec<Message> = self.system.iter().cloned().chain(asked).collect();
                encode_chat(self.tokenizer, template, &messages)
            }
        }
    }
}

fn one(
    global: &Global,
    arguments: &GenerateArguments,
    opened: &Opened,
    request: Request<'_>,
) -> anyhow::Result<()> {
    let (stream, prompt) = (!global.json, request.prompt);
    let meter = Meter::start(global, &arguments.energy);
    let mark = meter.mark();
    let mut shown = Shown::default();
    let mut watch = |piece: &str| !stream || shown.piece(piece);
    let generation = opened.generator(false).generate(request, &mut watch)?;
    let Generation { text, tokens, finish, prompt_seconds, decode_seconds } = generation;
    let work = Work { tokens: Some(tokens.len()), answers: Some(1) };
    let energy = meter.energy(meter.since(&mark), work);
    if stream {
        shown.piece("\n");
        shown.end()?;
        say(global, rates(prompt.len(), prompt_seconds, tokens.len(), decode_seconds));
        energy.say_if_known(global);
        return Ok(());
    }
    let json = json!({
        "text": text,
        "finish": finish.name(),
        "prompt_tokens": prompt.len(),
        "new_tokens": tokens.len(),
        "seconds": prompt_seconds + decode_seconds,
        "prompt_seconds": prompt_seconds,
        "decode_seconds": decode_seconds,
        "energy": energy,
    });
    result(global, &json, "")
}

/// How fast it went, in words.
fn rates(prompt: usize, prompt_seconds: f64, new: usize, decode_seconds: f64) -> String {
    // The prompt's pass gives the first token.
    let rate = new.saturating_sub(1) as f64 / decode_seconds.max(1e-9);
    format!(
        "[{prompt} tokens of prompt in {prompt_seconds:.2} s, {new} new in {decode_seconds:.2} s: \
         {rate:.1} tokens/s]"
    )
}

/// A text that is printed as it comes.
#[derive(Default)]
pub(crate) struct Shown {
    /// What kept it from being printed.
    failed: Option<anyhow::Error>,
    /// Whether nobody reads any more.
    closed: bool,
}

impl Shown {
    /// Prints a piece; false when there is no use in going on.
    pub(crate) fn piece(&mut self, piece: &str) -> bool {
        if self.failed.is_some() || self.closed {
            return false;
        }
        match print(piece) {
            Ok(read) => self.closed = !read,
            Err(error) => self.failed = Some(error),
        }
        self.failed.is_none() && !self.closed
    }

    /// Whether all could be printed, or was wanted no longer.
    ///
    /// # Errors
    /// If a piece could not be printed although somebody may be reading.
    pub(crate) fn end(&mut self) -> anyhow::Result<()> {
        self.failed.take().map_or(Ok(()), Err)
    }
}

/// The sampling options, checked.
pub(crate) fn sampling(arguments: &SamplingArguments) -> anyhow::Result<Sampling> {
    let sampling = Sampling {
        temperature: arguments.temperature,
        top_k: arguments.top_k,
        top_p: arguments.top_p,
        min_p: arguments.min_p,
        repetition_penalty: arguments.repetition_penalty,
        frequency_penalty: arguments.frequency_penalty,
        presence_penalty: arguments.presence_penalty,
        min_new_tokens: arguments.min_new_tokens,
        seed: arguments.seed,
    };
    let faults = sampling.faults().into_iter();
    let mut faults: Vec<String> =
        faults.map(|(option, message)| format!("--{option}: {message}")).collect();
    if arguments.stops.iter().any(String::is_empty) {
        faults.push("--stop: is empty; expected a text".to_owned());
    }
    let (least, most) = (arguments.min_new_tokens, arguments.max_new_tokens);
    if least > most {
        let message = format!("is {least}; expected at most --max-new-tokens, {most}");
        faults.push(format!("--min-new-tokens: {message}"));
    }
    if faults.is_empty() { Ok(sampling) } else { Err(bad_input(faults.join("\n"))) }
}

/// The template with the arguments of the command line over those it has. One that its source does
/// not name is noted.
pub(crate) fn with_arguments(
    global: &Global,
    template: ChatTemplate,
    arguments: &TemplateArguments,
) -> anyhow::Result<ChatTemplate> {
    note_unused(global, &template, arguments)?;
    let given = given_arguments(&template, arguments)?;
    Ok(template.with_arguments(&given))
}

/// Notes what the command line gives and `template` does not name.
pub(crate) fn note_unused(
    global: &Global,
    template: &ChatTemplate,
    arguments: &TemplateArguments,
) -> anyhow::Result<()> {
    let given = given_arguments(template, arguments)?;
    for name in given.keys().filter(|name| !template.reads(name)) {
        say(global, format!("note: the chat template does not use `{name}`"));
    }
    Ok(())
}

/// What the command line gives `template`.
pub(crate) fn given_arguments(
    template: &ChatTemplate,
    arguments: &TemplateArguments,
) -> anyhow::Result<Map<String, Value>> {
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
        if let Some(name) = THINKING.into_iter().find(|name| given.contains_key(*name)) {
            return Err(bad_input(format!("--thinking: --template-arg gives {name} too")));
        }
        given.insert(template.thinking().to_owned(), Value::from(thinking == Switch::On));
    }
    Ok(given)
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

    /// What writes texts; with `keeps_beginnings` it does not read again what texts have in common.
    pub(crate) fn generator(&self, keeps_beginnings: bool) -> Generator<'_> {
        let (decoder, tokenizer) = (&self.base.decoder, self.base.tokenizer());
        let end_ids = &self.in_force.end_ids;
        Generator::new(decoder, tokenizer, self.adapter(), end_ids, keeps_beginnings)
    }
}
