//! `/tokenize`, `/detokenize`, `/tokenizer_info`.

use crate::app::App;
use crate::ask::aside;
use crate::body;
use crate::error::ApiError;
use crate::error::Json;
use crate::loaded::{Variables, render};
use crate::types::{DetokenizeRequest, TokenizeRequest};
use axum::body::Body;
use axum::extract::State;
use axum::http::Request;
use hydralora_run::ends;
use serde_json::{Value, json};
use std::sync::Arc;

pub(crate) async fn tokenize(
    State(app): State<Arc<App>>,
    request: Request<Body>,
) -> Result<Json, ApiError> {
    let loaded = app.loaded()?;
    let request: TokenizeRequest = body::json(&app, request).await?;
    let target = loaded.target(request.model.as_deref(), None)?;
    let done = aside(&app, move || {
        let ids = match (&request.prompt, &request.messages) {
            (Some(prompt), None) => {
                loaded.encode(prompt, request.add_special_tokens.unwrap_or(true))?
            }
            (None, Some(messages)) => {
                let template = target.template(request.chat_template_kwargs.as_ref())?;
                let messages = messages.iter().enumerate();
                let messages: Result<Vec<_>, _> =
                    messages.map(|(number, message)| message.to_message(number)).collect();
                let tools = request.tools.as_ref().map(|tools| {
                    let one = |tool: &crate::types::Tool| {
                        json!({"type": tool.kind, "function": tool.function})
                    };
                    tools.iter().map(one).collect()
                });
                let variables = Variables { tools, ..Variables::default() };
                let generate = request.add_generation_prompt.unwrap_or(true);
                let tokenizer = &loaded.tokenizer;
                let text = render(tokenizer, &template, &messages?, &variables, generate)?;
                // The same tokens that an answer would be asked with.
                loaded.encode(&text, request.add_special_tokens.unwrap_or(true))?
            }
            _ => {
                let message = "expected either `prompt` or `messages`";
                return Err(ApiError::field("prompt", message));
            }
        };
        let mut answer = json!({
            "count": ids.len(),
            "max_model_len": loaded.context,
            "tokens": ids,
        });
        let strings = request.return_token_strs.unwrap_or(false);
        let name = |id: &u32| loaded.tokenizer.id_to_token(*id).unwrap_or_default();
        answer["token_strs"] = if strings { ids.iter().map(name).collect() } else { Value::Null };
        Ok(answer)
    });
    Ok(Json(done.await?))
}

pub(crate) async fn detokenize(
    State(app): State<Arc<App>>,
    request: Request<Body>,
) -> Result<Json, ApiError> {
    let loaded = app.loaded()?;
    let request: DetokenizeRequest = body::json(&app, request).await?;
    loaded.target(request.model.as_deref(), None)?;
    let ids = loaded.ids("tokens", &request.tokens)?;
    let done = aside(&app, move || {
        let text = loaded.tokenizer.decode(&ids, false);
        text.map_err(|_| ApiError::field("tokens", "cannot be written as a text"))
    });
    Ok(Json(json!({"prompt": done.await?})))
}

/// What programs that render conversations themselves need to know.
pub(crate) async fn tokenizer_info(State(app): State<Arc<App>>) -> Result<Json, ApiError> {
    let loaded = app.loaded()?;
    let tokenizer = &loaded.tokenizer;
    let [bos, eos] = ends::marks(tokenizer);
    let text = |text: String| if text.is_empty() { Value::Null } else { json!(text) };
    Ok(Json(json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": loaded.context,
        "vocab_size": tokenizer.vocab_size(),
        "bos_token": text(bos),
        "eos_token": text(eos),
        "pad_token": tokenizer.pad().map(|(_, text)| text),
        "add_bos_token": tokenizer.add_bos(),
        "chat_template": loaded.template.as_ref().map(|template| template.source_with_arguments()),
    })))
}
