//! `/v1/responses`: the same conversations as items. Nothing is kept between requests.

use super::conversation::{Answering, Calling, Conversation, Format};
use super::now;
use crate::app::App;
use crate::ask::{events, in_time};
use crate::body;
use crate::choice::{Choice, NamedCall, Said, failed, id, routing_json};
use crate::error::ApiError;
use crate::error::Json;
use crate::loaded::{Loaded, Target};
use crate::stream::{Broken, Pieces, respond};
use crate::types::{
    ChatMessage, Common, Content, FunctionCall, Input, Item, ResponseRequest, ToolCall, ToolChoice,
};
use axum::body::Body;
use axum::extract::State;
use axum::http::Request;
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use hydralora_data::Message;
use hydralora_run::engine::Finish;
use serde_json::{Map, Value, json};
use std::sync::Arc;

pub(crate) async fn responses(
    State(app): State<Arc<App>>,
    request: Request<Body>,
) -> Result<Response, ApiError> {
    let loaded = app.loaded()?;
    let in_flight = app.begin()?;
    let mut request: ResponseRequest = body::json(&app, request).await?;
    let common = request.raw().checked(loaded.vocabulary)?;
    if common.choices != 1 {
        return Err(ApiError::field("n", "expected 1; a response is one answer"));
    }
    let target = loaded.target(request.model.as_deref(), request.adapter.as_deref())?;
    refuse_kept(&request)?;
    let frame = Frame::new(&target, &request, &common);
    let conversation = conversation(request)?;
    let answering = conversation.ask(&app, &loaded, &target, &common).await?;
    if common.stream {
        let write = move |pieces: Pieces| async move {
            let mut stream = Stream { frame: &frame, pieces: &pieces, number: 0 };
            stream.write(&loaded, &common, answering).await
        };
        return Ok(respond(&app, in_flight, write, |error| {
            let inner = &error.to_json()["error"];
            let piece = json!({
                "type": "error",
                "code": inner["code"],
                "message": inner["message"],
                "param": inner["param"],
            });
            (Some("error"), piece)
        }));
    }
    let whole = in_time(&app, whole(&loaded, &frame, &common, answering)).await?;
    Ok(Json(whole).into_response())
}

/// Refuses what would need something kept.
fn refuse_kept(request: &ResponseRequest) -> Result<(), ApiError> {
    let refuse =
        |field: &str, message: &str| Err(ApiError::field(field, message).coded("unsupported"));
    if request.previous_response_id.is_some() {
        let message = "responses are not kept here; send the turns so far as `input`";
        return refuse("previous_response_id", message);
    }
    if request.conversation.is_some() {
        return refuse("conversation", "conversations are not kept here; send them as `input`");
    }
    if request.prompt.is_some() {
        return refuse("prompt", "prompts are not kept here; send them as `input`");
    }
    if request.background == Some(true) {
        return refuse("background", "responses are not kept here, so none can be fetched later");
    }
    if request.truncation.as_deref().is_some_and(|kind| kind != "disabled") {
        return refuse("truncation", "turns are not left out here; expected \"disabled\"");
    }
    if request.max_tool_calls.is_some() {
        return refuse("max_tool_calls", "tools are not run here, but by whoever asks");
    }
    if request.top_logprobs.is_some_and(|top| top > 0) {
        return refuse("top_logprobs", "is told by /v1/chat/completions and /v1/completions");
    }
    Ok(())
}

fn conversation(request: ResponseRequest) -> Result<Conversation, ApiError> {
    let mut messages: Vec<Message> = request.instructions.iter().map(Message::system).collect();
    match &request.input {
        Input::Text(text) => messages.push(Message::user(text)),
        Input::Items(items) => {
            for turn in turns(items)? {
                messages.push(turn.to_message(messages.len())?);
            }
        }
    }
    let format = match request.text.and_then(|text| text.format) {
        None => Format::Text,
        Some(format) => Format::of(&format.kind, format.schema, "text.format")?,
    };
    let tools = request.tools.unwrap_or_default();
    Ok(Conversation {
        messages,
        tools: tools.iter().map(|tool| tool.to_tool()).collect(),
        calling: Calling::of(request.tool_choice.as_ref())?,
        format,
        one_call: request.parallel_tool_calls == Some(false),
        arguments: request.chat_template_kwargs,
        documents: None,
        reasoning_effort: request.reasoning.and_then(|options| options.effort),
        max_tokens: request.max_output_tokens,
        max_field: "max_output_tokens",
        top_logprobs: None,
    })
}

/// Items as turns: calls that follow one another are one turn's.
fn turns(items: &[Item]) -> Result<Vec<ChatMessage>, ApiError> {
    let mut turns: Vec<ChatMessage> = Vec::new();
    for (number, item) in items.iter().enumerate() {
        let at = |field: &str| format!("input[{number}].{field}");
        let missing = |field: &str| ApiError::field(at(field), "is missing");
        match (item.kind.as_deref(), item.role.as_deref()) {
            (None | Some("message"), Some(role)) => {
                let content = item.content.clone().ok_or_else(|| missing("content"))?;
                turns.push(Item::turn(role, Some(Content::Text(content.text(&at("content"))?))));
            }
            (None | Some("message"), None) => return Err(missing("role")),
            (Some("function_call"), _) => {
                let name = item.name.clone().ok_or_else(|| missing("name"))?;
                let arguments = item.arguments.clone().ok_or_else(|| missing("arguments"))?;
                let function = FunctionCall { name, arguments: json!(arguments) };
                let call = ToolCall { id: item.call_id.clone(), function };
                match turns.last_mut().filter(|turn| turn.role == "assistant") {
                    Some(turn) => turn.tool_calls.get_or_insert_default().push(call),
                    None => {
                        let turn = Item::turn("assistant", None);
                        turns.push(ChatMessage { tool_calls: Some(vec![call]), ..turn });
                    }
                }
            }
            (Some("function_call_output"), _) => {
                let output = item.output.clone().ok_or_else(|| missing("output"))?;
                let text = Content::Text(output.text(&at("output"))?);
                let call = item.call_id.clone().ok_or_else(|| missing("call_id"))?;
                let turn = Item::turn("tool", Some(text));
                turns.push(ChatMessage { tool_call_id: Some(call), ..turn });
            }
            // What the model thought earlier; templates take it out of earlier turns anyway.
            (Some("reasoning"), _) => {}
            (Some(other), _) => {
                let message = format!("is {other:?}; such items are not understood here");
                return Err(ApiError::field(at("type"), message).coded("unsupported"));
            }
        }
    }
    Ok(turns)
}

/// What a response says of its request.
struct Frame {
    id: String,
    created: u64,
    fields: Map<String, Value>,
}

impl Frame {
    fn new(target: &Target, request: &ResponseRequest, common: &Common) -> Self {
        let mut fields = Map::new();
        let mut put = |name: &str, value: Value| drop(fields.insert(name.to_owned(), value));
        put("model", json!(target.name));
        if let Some(ready) = &target.adapter {
            put("adapter_generation", json!(ready.generation));
        }
        put("instructions", json!(request.instructions));
        put("max_output_tokens", json!(request.max_output_tokens));
        put("metadata", Value::Object(request.metadata.clone().unwrap_or_default()));
        put("parallel_tool_calls", json!(request.parallel_tool_calls.unwrap_or(true)));
        put("previous_response_id", Value::Null);
        put("store", json!(false));
        put("temperature", json!(common.sampling.temperature));
        put("top_p", json!(common.sampling.top_p));
        put("truncation", json!("disabled"));
        let kind = request.text.as_ref().and_then(|text| text.format.as_ref());
        let kind = kind.map_or("text", |format| format.kind.as_str());
        put("text", json!({"format": {"type": kind}}));
        let choice = match &request.tool_choice {
            None => json!("auto"),
            Some(ToolChoice::Mode(mode)) => json!(mode),
            Some(ToolChoice::Tool(tool)) => json!({"type": tool.kind, "name": tool.name()}),
        };
        put("tool_choice", choice);
        let tools = request.tools.iter().flatten().map(|tool| {
            let mut entry = Map::new();
            entry.insert("type".to_owned(), json!(tool.kind));
            entry.extend(tool.function.clone());
            Value::Object(entry)
        });
        put("tools", tools.collect());
        Self { id: id("resp_"), created: now(), fields }
    }

    fn json(&self, status: &str, output: Vec<Value>, choice: Option<&Choice>) -> Value {
        let mut whole = Map::new();
        whole.insert("id".to_owned(), json!(self.id));
        whole.insert("object".to_owned(), json!("response"));
        whole.insert("created_at".to_owned(), json!(self.created));
        whole.insert("status".to_owned(), json!(status));
        whole.insert("error".to_owned(), Value::Null);
        let incomplete = (status == "incomplete").then(|| json!({"reason": "max_output_tokens"}));
        whole.insert("incomplete_details".to_owned(), json!(incomplete));
        whole.extend(self.fields.clone());
        whole.insert("output".to_owned(), output.into());
        let usage = choice.map(|choice| {
            let usage = choice.usage();
            json!({
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": choice.reasoning_tokens},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            })
        });
        whole.insert("usage".to_owned(), json!(usage));
        Value::Object(whole)
    }
}

/// How a response ended, in a word.
fn status(choice: &Choice) -> &'static str {
    match &choice.end {
        Some(end) if end.finish == Finish::Length => "incomplete",
        _ => "completed",
    }
}

fn text_part(text: &str) -> Value {
    json!({"type": "output_text", "text": text, "annotations": []})
}

fn message_item(id: &str, status: &str, content: Vec<Value>) -> Value {
    json!({"id": id, "type": "message", "status": status, "role": "assistant", "content": content})
}

fn reasoning_item(id: &str, text: &str) -> Value {
    let content = json!([{"type": "reasoning_text", "text": text}]);
    json!({"id": id, "type": "reasoning", "summary": [], "content": content})
}

fn call_item(item: &str, status: &str, call: &NamedCall, arguments: &str) -> Value {
    json!({
        "id": item,
        "type": "function_call",
        "status": status,
        "call_id": call.id,
        "name": call.call.name,
        "arguments": arguments,
    })
}

async fn whole(
    loaded: &Loaded,
    frame: &Frame,
    common: &Common,
    answering: Answering,
) -> Result<Value, ApiError> {
    let Answering { jobs, mut choices } = answering;
    let mut events = events(jobs);
    while let Some((number, event)) = events.next().await {
        choices[number].take(event)?;
    }
    let choice = choices.pop().filter(|choice| choice.end.is_some()).ok_or_else(failed)?;
    let status = status(&choice);
    let mut output = Vec::new();
    if !choice.reasoning.is_empty() {
        output.push(reasoning_item(&id("rs_"), &choice.reasoning));
    }
    if !choice.content.is_empty() || choice.calls.is_empty() {
        output.push(message_item(&id("msg_"), status, vec![text_part(&choice.content)]));
    }
    let calls = choice.calls.iter();
    output.extend(calls.map(|call| call_item(&id("fc_"), "completed", call, &call.call.arguments)));
    let mut answer = frame.json(status, output, Some(&choice));
    if common.routing {
        answer["hydralora"] = json!({"routing": routing_json(&loaded.pieces, &choice.gates)});
    }
    Ok(answer)
}

/// A stream of numbered events.
struct Stream<'a> {
    frame: &'a Frame,
    pieces: &'a Pieces,
    number: usize,
}

/// An item that is being written.
struct Open {
    id: String,
    text: String,
    reasoning: bool,
}

impl Stream<'_> {
    async fn send(&mut self, kind: &str, fields: Value) -> Result<(), Broken> {
        let mut event = Map::new();
        event.insert("type".to_owned(), json!(kind));
        event.insert("sequence_number".to_owned(), json!(self.number));
        self.number += 1;
        if let Value::Object(fields) = fields {
            event.extend(fields);
        }
        self.pieces.event(kind, &Value::Object(event)).await?;
        Ok(())
    }

    async fn write(
        &mut self,
        loaded: &Loaded,
        common: &Common,
        answering: Answering,
    ) -> Result<(), Broken> {
        let Answering { jobs, mut choices } = answering;
        let begun = self.frame.json("in_progress", Vec::new(), None);
        self.send("response.created", json!({"response": begun})).await?;
        self.send("response.in_progress", json!({"response": begun})).await?;
        let mut output: Vec<Value> = Vec::new();
        let mut open: Option<Open> = None;
        let mut events = events(jobs);
        while let Some((_, event)) = events.next().await {
            for said in choices[0].take(event)? {
                match said {
                    Said::Content(text) => {
                        self.text(&mut open, &mut output, &text, false).await?;
                    }
                    Said::Reasoning(text) => {
                        self.text(&mut open, &mut output, &text, true).await?;
                    }
                    Said::Call(call) => {
                        self.close(&mut open, &mut output, "completed").await?;
                        self.call(&mut output, &call).await?;
                    }
                }
            }
        }
        let choice = choices.pop().filter(|choice| choice.end.is_some());
        let choice = choice.ok_or_else(failed)?;
        let status = status(&choice);
        if output.is_empty() && open.is_none() {
            self.text(&mut open, &mut output, "", false).await?;
        }
        self.close(&mut open, &mut output, status).await?;
        let mut answer = self.frame.json(status, output, Some(&choice));
        if common.routing {
            answer["hydralora"] = json!({"routing": routing_json(&loaded.pieces, &choice.gates)});
        }
        self.send(&format!("response.{status}"), json!({"response": answer})).await
    }

    /// Adds to the item that is open, or opens one of the kind.
    async fn text(
        &mut self,
        open: &mut Option<Open>,
        output: &mut Vec<Value>,
        text: &str,
        reasoning: bool,
    ) -> Result<(), Broken> {
        if open.as_ref().is_some_and(|open| open.reasoning != reasoning) {
            self.close(open, output, "completed").await?;
        }
        let index = output.len();
        if open.is_none() {
            let id = id(if reasoning { "rs_" } else { "msg_" });
            let item = match reasoning {
                true => json!({"id": id, "type": "reasoning", "summary": [], "content": []}),
                false => message_item(&id, "in_progress", Vec::new()),
            };
            let added = json!({"output_index": index, "item": item});
            self.send("response.output_item.added", added).await?;
            if !reasoning {
                let part = json!({
                    "item_id": id, "output_index": index, "content_index": 0, "part": text_part(""),
                });
                self.send("response.content_part.added", part).await?;
            }
            *open = Some(Open { id, text: String::new(), reasoning });
        }
        let Some(open) = open else { return Ok(()) };
        if text.is_empty() {
            return Ok(());
        }
        open.text += text;
        let mut delta = json!({
            "item_id": open.id, "output_index": index, "content_index": 0, "delta": text,
        });
        if reasoning {
            return self.send("response.reasoning_text.delta", delta).await;
        }
        delta["logprobs"] = json!([]);
        self.send("response.output_text.delta", delta).await
    }

    /// Closes the item that is open.
    async fn close(
        &mut self,
        open: &mut Option<Open>,
        output: &mut Vec<Value>,
        status: &str,
    ) -> Result<(), Broken> {
        let Some(Open { id, text, reasoning }) = open.take() else { return Ok(()) };
        let index = output.len();
        let place = json!({"item_id": id, "output_index": index, "content_index": 0});
        let with = |name: &str, value: Value| {
            let mut fields = place.clone();
            fields[name] = value;
            fields
        };
        let item = if reasoning {
            let done = with("text", json!(text));
            self.send("response.reasoning_text.done", done).await?;
            reasoning_item(&id, &text)
        } else {
            let mut done = with("text", json!(text));
            done["logprobs"] = json!([]);
            self.send("response.output_text.done", done).await?;
            let part = with("part", text_part(&text));
            self.send("response.content_part.done", part).await?;
            message_item(&id, status, vec![text_part(&text)])
        };
        output.push(item.clone());
        let done = json!({"output_index": index, "item": item});
        self.send("response.output_item.done", done).await
    }

    /// Writes a call, which is known as a whole.
    async fn call(&mut self, output: &mut Vec<Value>, call: &NamedCall) -> Result<(), Broken> {
        let (index, item) = (output.len(), id("fc_"));
        let begun = call_item(&item, "in_progress", call, "");
        let added = json!({"output_index": index, "item": begun});
        self.send("response.output_item.added", added).await?;
        let arguments = &call.call.arguments;
        let delta = json!({"item_id": item, "output_index": index, "delta": arguments});
        self.send("response.function_call_arguments.delta", delta).await?;
        let done = json!({
            "item_id": item, "output_index": index, "name": call.call.name, "arguments": arguments,
        });
        self.send("response.function_call_arguments.done", done).await?;
        let whole = call_item(&item, "completed", call, arguments);
        output.push(whole.clone());
        let done = json!({"output_index": index, "item": whole});
        self.send("response.output_item.done", done).await
    }
}
