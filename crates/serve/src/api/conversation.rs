//! Conversations that are to be answered, however they were sent.

use crate::answer::{Shape, Thinking};
use crate::app::App;
use crate::ask::{Ask, MakeConstraint, aside, room, submit};
use crate::calls::CallForm;
use crate::choice::{Choice, Marks, marks};
use crate::error::ApiError;
use crate::loaded::{Loaded, Target, Variables, render};
use crate::types::{Common, Tool, ToolChoice};
use crate::worker::Job;
use hydralora_data::Message;
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// The form that an answer has to have.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) enum Format {
    /// Any.
    #[default]
    Text,
    /// JSON of a schema.
    Json(Value),
}

impl Format {
    /// The form of this kind, with its schema where one was given. `field` is for messages about it.
    pub(crate) fn of(kind: &str, schema: Option<Value>, field: &str) -> Result<Self, ApiError> {
        match (kind, schema) {
            ("text", _) => Ok(Self::Text),
            ("json_object", _) => Ok(Self::Json(json!({"type": "object"}))),
            ("json_schema", Some(schema)) => Ok(Self::Json(schema)),
            ("json_schema", None) => Err(ApiError::field(field, "the schema is missing")),
            (other, _) => {
                let message = format!("is {other:?}; expected text, json_object or json_schema");
                Err(ApiError::field(format!("{field}.type"), message))
            }
        }
    }
}

/// Whether tools are called.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Calling {
    /// As the model likes.
    #[default]
    Auto,
    /// Not at all.
    Never,
    /// One of them, whichever.
    Must,
    /// This one.
    Named(String),
}

impl Calling {
    /// What a request says.
    pub(crate) fn of(choice: Option<&ToolChoice>) -> Result<Self, ApiError> {
        let mode = match choice {
            None => "auto",
            Some(ToolChoice::Mode(mode)) => mode.as_str(),
            Some(ToolChoice::Tool(tool)) if tool.kind == "function" => {
                let missing = || ApiError::field("tool_choice.name", "is missing");
                return Ok(Self::Named(tool.name().ok_or_else(missing)?.to_owned()));
            }
            Some(ToolChoice::Tool(tool)) => {
                let message = format!("is {:?}; expected \"function\"", tool.kind);
                return Err(ApiError::field("tool_choice.type", message));
            }
        };
        match mode {
            "auto" => Ok(Self::Auto),
            "none" => Ok(Self::Never),
            "required" => Ok(Self::Must),
            other => {
                let message = format!("is {other:?}; expected auto, none, required or a function");
                Err(ApiError::field("tool_choice", message))
            }
        }
    }
}

/// A conversation, and how it is to be answered.
pub(crate) struct Conversation {
    pub(crate) messages: Vec<Message>,
    pub(crate) tools: Vec<Tool>,
    pub(crate) calling: Calling,
    pub(crate) format: Format,
    pub(crate) one_call: bool,
    pub(crate) arguments: Option<Map<String, Value>>,
    pub(crate) documents: Option<Vec<Value>>,
    pub(crate) reasoning_effort: Option<String>,
    pub(crate) max_tokens: Option<usize>,
    /// The field that said so.
    pub(crate) max_field: &'static str,
    pub(crate) top_logprobs: Option<usize>,
}

/// A conversation that the engine answers.
pub(crate) struct Answering {
    pub(crate) jobs: Vec<Job>,
    pub(crate) choices: Vec<Choice>,
}

/// What was made of a conversation.
struct Prompt {
    ids: Vec<u32>,
    shape: Shape,
    marks: Marks,
    constraint: Option<MakeConstraint>,
}

impl Conversation {
    /// Puts it through the template and hands it to the engine.
    ///
    /// # Errors
    /// If the model's template or context, or the queue, does not take it.
    pub(crate) async fn ask(
        self,
        app: &App,
        loaded: &Arc<Loaded>,
        target: &Target,
        common: &Common,
    ) -> Result<Answering, ApiError> {
        loaded.can_wait(common.choices, "n")?;
        let (max_tokens, max_field, one_call) = (self.max_tokens, self.max_field, self.one_call);
        let top_logprobs = self.top_logprobs;
        let (own, whom, shared) = (Arc::clone(loaded), target.clone(), common.clone());
        let prepared = aside(app, move || {
            let prompt = self.prompt(&own, &whom)?;
            let length = prompt.ids.len();
            let least = shared.sampling.min_new_tokens;
            let max_new_tokens = room(&own, length, max_tokens, max_field, usize::MAX, least)?;
            let ask = Ask {
                prompt: prompt.ids,
                target: &whom,
                common: &shared,
                max_new_tokens,
                top_logprobs,
                prompt_logprobs: None,
                continues: false,
                constraint: prompt.constraint.as_ref(),
            };
            Ok((ask.requests(), length, prompt.shape, prompt.marks))
        });
        let (requests, length, shape, marks) = prepared.await?;
        let jobs = submit(loaded, requests).await?;
        let choice = |_: &Job| Choice::new(shape, Arc::clone(&marks), one_call, length);
        let choices = jobs.iter().map(choice).collect();
        Ok(Answering { jobs, choices })
    }

    fn prompt(&self, loaded: &Loaded, target: &Target) -> Result<Prompt, ApiError> {
        if self.messages.is_empty() {
            return Err(ApiError::field("messages", "is empty; expected a turn at least"));
        }
        let template = target.template(self.arguments.as_ref())?;
        let tools = self.tools()?;
        let offered = self.calling != Calling::Never && !tools.is_empty();
        if offered && !template.reads("tools") {
            let message = "this model's chat template knows no tools";
            return Err(ApiError::field("tools", message).coded("unsupported"));
        }
        let variables = Variables {
            tools: offered.then(|| tools.clone()),
            documents: self.documents.clone(),
            reasoning_effort: self.reasoning_effort.clone(),
        };
        let tokenizer = &loaded.tokenizer;
        let text = render(tokenizer, &template, &self.messages, &variables, true)?;
        let ids = loaded.encode(&text, true)?;
        let form = CallForm::of(&template);
        let forced: Vec<Value> = match &self.calling {
            Calling::Must => tools,
            Calling::Named(name) => {
                tools.into_iter().filter(|tool| tool["function"]["name"] == **name).collect()
            }
            Calling::Auto | Calling::Never => Vec::new(),
        };
        let is_forced = matches!(self.calling, Calling::Must | Calling::Named(_));
        if is_forced && forced.is_empty() {
            let message = "there is no such tool in `tools`";
            return Err(ApiError::field("tool_choice", message));
        }
        let constraint: Option<MakeConstraint> = match (&self.format, is_forced) {
            (Format::Json(_), true) => {
                let message = "an answer of a given form calls no tools";
                return Err(ApiError::field("tool_choice", message));
            }
            (Format::Json(schema), false) => {
                Some(loaded.forms.json(&loaded.pieces, schema.clone(), "response_format")?)
            }
            (Format::Text, true) => Some(loaded.forms.call(&loaded.pieces, &forced, form)?),
            (Format::Text, false) => None,
        };
        // An answer that is held to a form has no room for reasoning.
        let reasoning = Thinking::of(template.source()).filter(|_| constraint.is_none());
        let shape = Shape {
            reasoning,
            begun: reasoning.is_some_and(|thinking| thinking.is_begun(&text)),
            calls: form.filter(|_| offered && self.format == Format::Text),
            only_call: is_forced,
        };
        let marks = marks(tokenizer, shape);
        Ok(Prompt { ids, shape, marks, constraint })
    }

    /// The tools as templates read them.
    fn tools(&self) -> Result<Vec<Value>, ApiError> {
        let one = |(number, tool): (usize, &Tool)| {
            if tool.kind != "function" {
                let message = format!("is {:?}; only functions can be called here", tool.kind);
                let field = format!("tools[{number}].type");
                return Err(ApiError::field(field, message).coded("unsupported"));
            }
            let name = tool.function.get("name").and_then(Value::as_str);
            if name.is_none_or(str::is_empty) {
                let field = format!("tools[{number}].function.name");
                return Err(ApiError::field(field, "expected a text"));
            }
            Ok(json!({"type": "function", "function": tool.function}))
        };
        self.tools.iter().enumerate().map(one).collect()
    }
}
