//! The models that may be asked, and the adapters among them.

use super::now;
use crate::adapters::{Expected, Ready};
use crate::app::App;
use crate::ask::aside;
use crate::body;
use crate::error::ApiError;
use crate::error::Json;
use crate::loaded::Loaded;
use crate::types::{LoadRequest, UnloadRequest};
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::Request;
use serde_json::{Value, json};
use std::sync::Arc;

fn base_card(loaded: &Loaded) -> Value {
    json!({
        "id": loaded.name,
        "object": "model",
        "created": loaded.created,
        "owned_by": "hydralora",
        "root": loaded.root,
        "parent": null,
        "max_model_len": loaded.context,
    })
}

fn adapter_card(loaded: &Loaded, ready: &Ready) -> Value {
    json!({
        "id": ready.name,
        "object": "model",
        "created": ready.created,
        "owned_by": "hydralora",
        "root": ready.root(),
        "parent": loaded.name,
        "max_model_len": loaded.context,
        "adapter_generation": ready.generation,
        "hydralora": {"method": ready.method(), "routed": ready.routed()},
    })
}

pub(crate) async fn models(State(app): State<Arc<App>>) -> Result<Json, ApiError> {
    let loaded = app.loaded()?;
    let all = loaded.adapters.all();
    let cards = all.iter().map(|ready| adapter_card(&loaded, ready));
    let data: Vec<Value> = std::iter::once(base_card(&loaded)).chain(cards).collect();
    Ok(Json(json!({"object": "list", "data": data})))
}

pub(crate) async fn model(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
) -> Result<Json, ApiError> {
    let loaded = app.loaded()?;
    let target = loaded.target(Some(&name), None)?;
    Ok(Json(match &target.adapter {
        Some(ready) => adapter_card(&loaded, ready),
        None => base_card(&loaded),
    }))
}

pub(crate) async fn adapters(State(app): State<Arc<App>>) -> Result<Json, ApiError> {
    let loaded = app.loaded()?;
    let data: Vec<Value> = loaded.adapters.all().iter().map(|ready| ready.to_json()).collect();
    let limits = &loaded.adapters.limits;
    Ok(Json(json!({
        "object": "list",
        "data": data,
        "limits": {"adapters": limits.count, "rank": limits.rank, "bytes": limits.bytes},
        "loading": limits.root.is_some(),
    })))
}

pub(crate) async fn load_adapter(
    State(app): State<Arc<App>>,
    request: Request<Body>,
) -> Result<Json, ApiError> {
    let loaded = app.loaded()?;
    let _in_flight = app.begin()?;
    let request: LoadRequest = body::json(&app, request).await?;
    if let Some(base) = request.base_model_name.as_ref().filter(|base| **base != loaded.name) {
        return Err(ApiError::no_model(base).of_field("base_model_name"));
    }
    let done = aside(&app, move || {
        let expected = Expected {
            replace: request.load_inplace.unwrap_or(false),
            generation: request.expected_generation,
        };
        let LoadRequest { lora_name, lora_path, domain, .. } = &request;
        loaded.adapters.load_asked(lora_name, lora_path, domain.as_deref(), expected)
    });
    let ready = done.await?;
    let mut answer = ready.to_json();
    answer["status"] = json!("loaded");
    answer["loaded_at"] = json!(now());
    Ok(Json(answer))
}

pub(crate) async fn unload_adapter(
    State(app): State<Arc<App>>,
    request: Request<Body>,
) -> Result<Json, ApiError> {
    let loaded = app.loaded()?;
    let request: UnloadRequest = body::json(&app, request).await?;
    let ready = loaded.adapters.unload(&request.lora_name, request.expected_generation)?;
    let mut answer = ready.to_json();
    answer["status"] = json!("unloaded");
    Ok(Json(answer))
}
