//! The model that is served: its decoder's limits, its tokenizer, its template, its adapters.

use crate::adapters::{Adapters, Ready};
use crate::error::ApiError;
use crate::forms::Forms;
use crate::pieces::Pieces;
use crate::worker::Worker;
use hydralora_data::{ChatTemplate, Message, THINKING, template_argument_fault};
use hydralora_model::Tokenizer;
use hydralora_run::{ends, start_ids};
use serde_json::{Map, Value};
use std::sync::Arc;

/// Everything that requests are answered with.
pub(crate) struct Loaded {
    pub(crate) name: String,
    /// Where it came from, as far as callers are told.
    pub(crate) root: String,
    pub(crate) fingerprint: String,
    pub(crate) created: u64,
    pub(crate) context: usize,
    pub(crate) vocabulary: usize,
    /// Answers that may wait at a time.
    pub(crate) max_waiting: usize,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) template: Option<ChatTemplate>,
    pub(crate) end_ids: Arc<[u32]>,
    /// Tokens of which the base knows nothing.
    pub(crate) added: Arc<[u32]>,
    pub(crate) adapters: Adapters,
    pub(crate) pieces: Pieces,
    pub(crate) forms: Forms,
    pub(crate) worker: Worker,
}

/// Whom a request asks: the base, or an adapter on it.
#[derive(Clone)]
pub(crate) struct Target {
    /// The name to answer under.
    pub(crate) name: String,
    pub(crate) adapter: Option<Arc<Ready>>,
    pub(crate) template: Option<ChatTemplate>,
    pub(crate) end_ids: Arc<[u32]>,
    /// Tokens that it does not write.
    pub(crate) barred: Arc<[u32]>,
}

impl Loaded {
    /// Finds whom `model` means: the base, an adapter, or an adapter as `base:adapter`. `adapter`
    /// names one beside it.
    ///
    /// # Errors
    /// If there is none of that name.
    pub(crate) fn target(
        &self,
        model: Option<&str>,
        adapter: Option<&str>,
    ) -> Result<Target, ApiError> {
        let (model, within) = match model {
            None | Some("") => (self.name.as_str(), None),
            Some(model) => match model.strip_prefix(self.name.as_str()) {
                Some("") => (model, None),
                Some(rest) if rest.starts_with(':') => (self.name.as_str(), Some(&rest[1..])),
                _ => (model, None),
            },
        };
        let named = match (model == self.name, within.or(adapter)) {
            (true, None) => None,
            (true, Some(name)) => Some(name),
            (false, None) => Some(model),
            (false, Some(name)) if name == model => Some(name),
            (false, Some(_)) => return Err(ApiError::no_model(model)),
        };
        let Some(name) = named else {
            return Ok(Target {
                name: self.name.clone(),
                adapter: None,
                template: self.template.clone(),
                end_ids: Arc::clone(&self.end_ids),
                barred: Arc::clone(&self.added),
            });
        };
        let ready = self.adapters.get(name).ok_or_else(|| ApiError::no_model(name))?;
        Ok(Target {
            name: name.to_owned(),
            template: ready.template.clone(),
            end_ids: Arc::clone(&ready.end_ids),
            barred: Arc::default(),
            adapter: Some(ready),
        })
    }

    /// Token ids of a text, with the model's first token if `add_special` says so.
    pub(crate) fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, ApiError> {
        let ids = match add_special {
            true => start_ids(&self.tokenizer, text),
            false => self.tokenizer.encode(text),
        };
        // The tokenizer's own words name its file.
        ids.map_err(|_| ApiError::invalid("the text cannot be cut into tokens of this model"))
    }

    /// Checks that there can be room for as many answers as a request asks for, which wait all together
    /// at first. `field` is what asks for them.
    ///
    /// # Errors
    /// If they are more than may wait.
    pub(crate) fn can_wait(&self, answers: usize, field: &str) -> Result<(), ApiError> {
        let most = self.max_waiting;
        if answers <= most {
            return Ok(());
        }
        let message = format!(
            "asks for {answers} answers at a time; this server lets {most} wait (--max-waiting), \
             so ask for fewer in one request"
        );
        Err(ApiError::field(field, message).coded("too_many_answers"))
    }

    /// Checks token ids that were given as such.
    pub(crate) fn ids(&self, field: &str, ids: &[i64]) -> Result<Vec<u32>, ApiError> {
        let most = self.vocabulary;
        let checked = ids.iter().enumerate().map(|(at, &id)| {
            let known = u32::try_from(id).ok().filter(|id| (*id as usize) < most);
            known.ok_or_else(|| {
                let message = format!("is {id}; the vocabulary has the tokens 0 to {}", most - 1);
                ApiError::field(format!("{field}[{at}]"), message)
            })
        });
        checked.collect()
    }
}

/// What a conversation is rendered with.
#[derive(Default)]
pub(crate) struct Variables {
    pub(crate) tools: Option<Vec<Value>>,
    pub(crate) documents: Option<Vec<Value>>,
    pub(crate) reasoning_effort: Option<String>,
}

impl Target {
    /// The chat template with a request's arguments.
    ///
    /// # Errors
    /// If there is none, or an argument is none that a template may have.
    pub(crate) fn template(
        &self,
        arguments: Option<&Map<String, Value>>,
    ) -> Result<ChatTemplate, ApiError> {
        let template = self.template.clone().ok_or_else(|| {
            let message = "this model has no chat template; /v1/completions continues texts";
            ApiError::invalid(message).coded("no_chat_template")
        })?;
        let Some(arguments) = arguments else { return Ok(template) };
        let mut given = Map::new();
        for (name, value) in arguments {
            if let Some(fault) = template_argument_fault(name) {
                let field = format!("chat_template_kwargs.{name}");
                return Err(ApiError::field(field, fault));
            }
            // Models name the switch in two ways.
            let name = match THINKING.contains(&name.as_str()) && !template.reads(name) {
                true => template.thinking().to_owned(),
                false => name.clone(),
            };
            given.insert(name, value.clone());
        }
        Ok(template.with_arguments(&given))
    }
}

/// The text of a conversation as `template` writes it.
///
/// # Errors
/// If the template refuses it.
pub(crate) fn render(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
    variables: &Variables,
    generate: bool,
) -> Result<String, ApiError> {
    let [bos, eos] = ends::marks(tokenizer);
    let mut named = Map::new();
    if let Some(tools) = &variables.tools {
        named.insert("tools".to_owned(), Value::from(tools.clone()));
    }
    if let Some(documents) = &variables.documents {
        named.insert("documents".to_owned(), Value::from(documents.clone()));
    }
    if let Some(effort) = &variables.reasoning_effort {
        named.insert("reasoning_effort".to_owned(), Value::from(effort.as_str()));
    }
    // Few templates know a developer.
    let mut messages = messages.to_vec();
    if !template.source().contains("developer") {
        for message in messages.iter_mut().filter(|message| message.role == "developer") {
            message.role = "system".to_owned();
        }
    }
    let messages = template.adapt(&messages, &named, &bos, &eos);
    template
        .render_with(&messages, &named, generate, &bos, &eos)
        .map_err(|error| ApiError::field("messages", error).coded("chat_template"))
}
