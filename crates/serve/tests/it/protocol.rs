//! What clients of OpenAI's protocol send, and what they read.

use crate::support::{Running, ask, folder, options};
use hydralora_kernels::DType;
use hydralora_model::adapter::{NoAdapter, Pass};
use hydralora_model::{Decoder, ModelSource, Packed};
use hydralora_run::{ends, likeliest, start_ids};
use serde_json::{Value, json};

const PROMPT: &str = "Once upon a time, there was a";

/// What the model writes greedily, a token at a time and by nothing but its decoder.
fn continued(prompt: &str, tokens: usize) -> String {
    let source = ModelSource::open(&folder()).unwrap();
    let decoder = Decoder::load(&source.config, &source.weights, DType::F32).unwrap();
    let tokenizer = &source.tokenizer;
    let end_ids = ends::end_ids(tokenizer, None, &[], &[]).unwrap();
    let mut ids = start_ids(tokenizer, prompt).unwrap();
    let read = ids.len();
    let mut cache = decoder.new_cache();
    while ids.len() < read + tokens {
        let new = &ids[cache.len()..];
        let offsets = [0, new.len()];
        let batch = Packed { tokens: new, offsets: &offsets };
        let caches = std::slice::from_mut(&mut cache);
        let hidden = decoder.extend(batch, caches, &NoAdapter, &Pass::inference()).unwrap();
        let last = offsets[1] - 1;
        let next = likeliest(&decoder.logits_with(&NoAdapter, &hidden, &[last]));
        if end_ids.contains(&next) {
            break;
        }
        ids.push(next);
    }
    let [before, all] = [&ids[..read], &ids[..]].map(|ids| tokenizer.decode(ids, true).unwrap());
    all.strip_prefix(before.as_str()).unwrap().to_owned()
}

#[test]
fn a_text_is_continued_whole_and_in_pieces() {
    let server = Running::new(options());
    let expected = continued(PROMPT, 24);
    let body = json!({"model": "stories", "prompt": PROMPT, "max_tokens": 24, "temperature": 0});
    let answer = server.post("/v1/completions", &body).json();
    assert_eq!(answer["choices"][0]["text"], expected, "{answer}");
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert_eq!(answer["object"], "text_completion");
    assert_eq!(answer["usage"]["completion_tokens"], 24);
    let prompt_tokens = answer["usage"]["prompt_tokens"].as_u64().unwrap();
    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    streamed["stream_options"] = json!({"include_usage": true});
    let pieces = server.post("/v1/completions", &streamed).pieces();
    let (last, texts) = pieces.split_last().unwrap();
    let text: String = texts.iter().filter_map(|p| p["choices"][0]["text"].as_str()).collect();
    assert_eq!(text, expected);
    assert!(texts.len() > 5, "{} pieces", texts.len());
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["prompt_tokens"], prompt_tokens);
    assert_eq!(last["usage"]["total_tokens"], prompt_tokens + 24);
    let finished = texts.iter().rev().find(|p| !p["choices"][0]["finish_reason"].is_null());
    assert_eq!(finished.unwrap()["choices"][0]["finish_reason"], "length");
}

#[test]
fn several_prompts_are_answered_in_their_order() {
    let server = Running::new(options());
    let prompts = [PROMPT, "The dog", "One day, a girl"];
    let ids: Vec<Value> = prompts
        .iter()
        .map(|prompt| server.post("/tokenize", &json!({"prompt": prompt})).json()["tokens"].clone())
        .collect();
    for prompt in [json!(prompts), json!(ids)] {
        let body = json!({"prompt": prompt, "max_tokens": 8, "temperature": 0, "n": 2});
        let answer = server.post("/v1/completions", &body).json();
        let choices = answer["choices"].as_array().unwrap();
        assert_eq!(choices.len(), 6);
        for (index, choice) in choices.iter().enumerate() {
            assert_eq!(choice["index"], index);
            assert_eq!(choice["text"], continued(prompts[index / 2], 8));
        }
        assert_eq!(answer["usage"]["completion_tokens"], 48);
    }
}

/// As lm-evaluation-harness asks for log-likelihoods, and reads them.
#[test]
fn prompts_are_scored_as_they_are() {
    let server = Running::new(options());
    let ids = server.post("/tokenize", &json!({"prompt": PROMPT})).json()["tokens"].clone();
    let count = ids.as_array().unwrap().len();
    let body = json!({
        "model": "stories", "prompt": [ids], "temperature": 0, "max_tokens": 1, "logprobs": 1,
        "seed": 1234, "echo": true,
    });
    let answer = server.post("/v1/completions", &body).json();
    let told = &answer["choices"][0]["logprobs"];
    let logprobs = told["token_logprobs"].as_array().unwrap();
    assert_eq!(logprobs.len(), count + 1, "{told}");
    assert!(logprobs[0].is_null() && told["top_logprobs"][0].is_null());
    assert!(logprobs[1..].iter().all(|value| value.as_f64().unwrap() <= 0.0));
    for (own, top) in logprobs.iter().zip(told["top_logprobs"].as_array().unwrap()).skip(1) {
        let most = top.as_object().unwrap().values().filter_map(Value::as_f64);
        assert!(most.fold(f64::NEG_INFINITY, f64::max) >= own.as_f64().unwrap());
    }
    // What the model itself says of these tokens.
    let source = ModelSource::open(&folder()).unwrap();
    let decoder = Decoder::load(&source.config, &source.weights, DType::F32).unwrap();
    let tokens: Vec<u32> = serde_json::from_value(body["prompt"][0].clone()).unwrap();
    let mut cache = decoder.new_cache();
    let offsets = [0, tokens.len()];
    let batch = Packed { tokens: &tokens, offsets: &offsets };
    let pass = Pass::inference();
    let caches = std::slice::from_mut(&mut cache);
    let hidden = decoder.extend(batch, caches, &NoAdapter, &pass).unwrap();
    for at in 1..tokens.len() {
        let logits = decoder.logits_with(&NoAdapter, &hidden, &[at - 1]).to_f64();
        let sum: f64 = logits.iter().map(|logit| logit.exp()).sum();
        let expected = logits[tokens[at] as usize] - sum.ln();
        let found = logprobs[at].as_f64().unwrap();
        assert!((found - expected).abs() < 1e-4, "token {at}: {found}, expected {expected}");
    }
    // A token that ends the text is told too: the one that is cut off is not of the prompt.
    let mut ending = body.clone();
    ending["return_tokens_as_token_ids"] = json!(true);
    let first = server.post("/v1/completions", &ending).json();
    let next = first["choices"][0]["logprobs"]["tokens"][count].as_str().unwrap().to_owned();
    let next: u32 = next.strip_prefix("token_id:").unwrap().parse().unwrap();
    ending["stop_token_ids"] = json!([next]);
    let ended = server.post("/v1/completions", &ending).json();
    let (ended, whole) = (&ended["choices"][0], &first["choices"][0]);
    assert_eq!(ended["logprobs"], whole["logprobs"]);
    assert_eq!(ended["finish_reason"], "stop");
    let (text, longer) = (ended["text"].as_str().unwrap(), whole["text"].as_str().unwrap());
    assert!(text.ends_with(PROMPT) && longer.len() > text.len() && longer.starts_with(text));
    // Without a token behind it, the same of the prompt alone.
    let mut alone = body.clone();
    alone["max_tokens"] = json!(0);
    let alone = server.post("/v1/completions", &alone).json();
    let choice = &alone["choices"][0];
    assert_eq!(choice["logprobs"]["token_logprobs"].as_array().unwrap().len(), count);
    assert_eq!(alone["usage"]["completion_tokens"], 0);
}

#[test]
fn a_conversation_is_answered_whole_and_in_pieces() {
    let server = Running::new(options());
    let body = json!({
        "model": "stories", "temperature": 0, "max_completion_tokens": 20, "user": "somebody",
        "messages": [{"role": "system", "content": "Tell stories."},
            {"role": "user", "content": [{"type": "text", "text": "Once upon a time"}]}],
    });
    let answer = server.post("/v1/chat/completions", &body).json();
    let choice = &answer["choices"][0];
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(choice["message"]["role"], "assistant");
    let text = choice["message"]["content"].as_str().unwrap();
    assert_eq!(text, continued("system: Tell stories.\nuser: Once upon a time\n", 20).trim_start());
    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    streamed["logprobs"] = json!(true);
    streamed["top_logprobs"] = json!(2);
    let answer = server.post("/v1/chat/completions", &streamed);
    assert_eq!(answer.header("content-type"), Some("text/event-stream"));
    let pieces = answer.pieces();
    assert_eq!(pieces[0]["choices"][0]["delta"]["role"], "assistant");
    let deltas = pieces.iter().map(|piece| &piece["choices"][0]);
    let said: String = deltas.clone().filter_map(|c| c["delta"]["content"].as_str()).collect();
    assert_eq!(said, text);
    let told: Vec<&Value> =
        deltas.filter_map(|c| c["logprobs"]["content"].as_array()).flatten().collect();
    assert_eq!(told.len(), 20);
    assert!(told.iter().all(|t| t["top_logprobs"].as_array().unwrap().len() == 2));
    assert!(told.iter().all(|t| t["logprob"] == t["top_logprobs"][0]["logprob"]));
}

#[test]
fn a_seed_decides_and_several_answers_differ() {
    let server = Running::new(options());
    let body = json!({
        "prompt": PROMPT, "max_tokens": 16, "temperature": 1.2, "n": 3, "seed": 5, "top_k": 40,
        "min_p": 0.01, "repetition_penalty": 1.1,
    });
    let texts = |body: &Value| -> Vec<String> {
        let answer = server.post("/v1/completions", body).json();
        let choices = answer["choices"].as_array().unwrap();
        choices.iter().map(|choice| choice["text"].as_str().unwrap().to_owned()).collect()
    };
    let first = texts(&body);
    assert_eq!(texts(&body), first);
    assert!(first[0] != first[1] && first[1] != first[2]);
    let mut other = body.clone();
    other["seed"] = json!(6);
    assert_ne!(texts(&other)[0], first[0]);
}

/// Tokens of a text and their log-probabilities.
fn told(choice: &Value) -> Vec<(String, f64)> {
    let logprobs = &choice["logprobs"];
    let tokens = logprobs["tokens"].as_array().unwrap().iter();
    let numbers = logprobs["token_logprobs"].as_array().unwrap().iter();
    tokens
        .map(|t| t.as_str().unwrap().to_owned())
        .zip(numbers.map(|n| n.as_f64().unwrap()))
        .collect()
}

#[test]
fn what_changes_the_draws_leaves_log_probabilities_as_they_are() {
    let server = Running::new(options());
    let ask = |more: Value| {
        let mut body = json!({
            "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "logprobs": 1,
            "return_tokens_as_token_ids": true,
        });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        told(&server.post("/v1/completions", &body).json()["choices"][0])
    };
    let id = |token: &str| token.strip_prefix("token_id:").unwrap().to_owned();
    let plain = ask(json!({}));
    let off = json!({
        "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "min_tokens": 0,
        "repetition_penalty": 1,
    });
    assert_eq!(ask(off), plain);
    // The first token, forbidden, gives way to another, and is told as likely as ever.
    let barred = ask(json!({"logit_bias": {id(&plain[0].0): -100}}));
    assert_ne!(barred[0].0, plain[0].0);
    assert!(barred[0].1 < plain[0].1);
    // Forced, every token is the same, however unlikely.
    let forced = ask(json!({"logit_bias": {"300": 100}}));
    assert!(forced.iter().all(|(token, logprob)| token == "token_id:300" && *logprob < -0.5));
    // What was written counts, more and more; what was read does not.
    let repeats = |told: &[(String, f64)]| {
        let mut tokens: Vec<&str> = told.iter().map(|(token, _)| token.as_str()).collect();
        tokens.sort_unstable();
        tokens.dedup();
        told.len() - tokens.len()
    };
    let biased = json!({"300": 12});
    let frequency = ask(json!({"logit_bias": biased, "frequency_penalty": 2}));
    let presence = ask(json!({"logit_bias": biased, "presence_penalty": 2}));
    let rewarded = ask(json!({"logit_bias": biased, "frequency_penalty": -2}));
    assert!(repeats(&frequency) < repeats(&presence), "{frequency:?} {presence:?}");
    assert!(repeats(&presence) <= repeats(&rewarded), "{presence:?} {rewarded:?}");
    assert_eq!(frequency[0], presence[0]);
    // Chats and responses take them too.
    for (path, field) in [("/v1/chat/completions", "messages"), ("/v1/responses", "input")] {
        let mut body = json!({
            "temperature": 0, "logit_bias": {"300": 100}, "frequency_penalty": 0.5, "min_tokens": 2,
            "presence_penalty": 0.5,
        });
        let most = if field == "input" { "max_output_tokens" } else { "max_tokens" };
        body[most] = json!(4);
        body[field] = json!([{"role": "user", "content": "a"}]);
        let answer = server.post(path, &body).json();
        let text = match field {
            "input" => &answer["output"][0]["content"][0]["text"],
            _ => &answer["choices"][0]["message"]["content"],
        };
        let piece = server.post("/detokenize", &json!({"tokens": [300, 300, 300, 300]})).json();
        assert_eq!(
            text.as_str().unwrap().trim(),
            piece["prompt"].as_str().unwrap().trim(),
            "{answer}"
        );
        body["min_tokens"] = json!(5);
        server.post(path, &body).fault(400, Some("min_tokens"));
    }
}

#[test]
fn a_text_has_as_many_tokens_as_it_has_to() {
    let server = Running::new(options());
    let whole = continued(PROMPT, 40);
    let stop = whole.split(' ').nth(3).unwrap();
    let ask = |min: usize, more: Value| {
        let mut body =
            json!({"prompt": PROMPT, "max_tokens": 30, "temperature": 0, "min_tokens": min});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.post("/v1/completions", &body).json()
    };
    let tokens = |answer: &Value| answer["usage"]["completion_tokens"].as_u64().unwrap();
    let first = server.post("/tokenize", &json!({"prompt": whole, "add_special_tokens": false}));
    let ends = json!({"stop_token_ids": [first.json()["tokens"][1]]});
    assert!(tokens(&ask(0, ends.clone())) < 3);
    let longer = ask(12, ends);
    assert!(tokens(&longer) >= 12, "{longer}");
    let ends = json!({"stop": stop});
    let (short, long) = (ask(0, ends.clone()), ask(20, ends));
    assert!(tokens(&short) < 20 && tokens(&long) >= 20, "{short} {long}");
    assert!(long["choices"][0]["text"].as_str().unwrap().contains(stop));
}

#[test]
fn stops_end_a_text_and_are_no_part_of_it() {
    let server = Running::new(options());
    let whole = continued(PROMPT, 40);
    let stop = whole.split(' ').nth(5).unwrap();
    for stops in [json!(stop), json!(["never comes", stop])] {
        let body = json!({"prompt": PROMPT, "max_tokens": 40, "temperature": 0, "stop": stops});
        let answer = server.post("/v1/completions", &body).json();
        let choice = &answer["choices"][0];
        assert_eq!(choice["text"], whole.split_once(stop).unwrap().0);
        assert_eq!(choice["finish_reason"], "stop");
    }
}

#[test]
fn answers_have_the_form_that_is_asked() {
    let server = Running::new(options());
    let schema = json!({
        "type": "object", "required": ["size", "kind"], "additionalProperties": false,
        "properties": {"size": {"type": "integer"}, "kind": {"enum": ["dog", "cat"]}},
    });
    let body = json!({
        "messages": [{"role": "user", "content": "Which?"}], "temperature": 0.8, "seed": 3,
        "max_tokens": 120,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    });
    let answer = server.post("/v1/chat/completions", &body).json();
    let choice = &answer["choices"][0];
    let text = choice["message"]["content"].as_str().unwrap();
    if choice["finish_reason"] == "stop" {
        let value: Value = serde_json::from_str(text).unwrap();
        assert!(
            value["size"].is_i64() && ["dog", "cat"].map(Some).contains(&value["kind"].as_str())
        );
    }
    assert!(text.trim_start().starts_with("{\"size\""), "{answer}");
    let mut broken = body.clone();
    broken["response_format"]["json_schema"]["schema"] = json!({"type": "colour"});
    server.post("/v1/chat/completions", &broken).fault(400, Some("response_format"));
}

#[test]
fn a_tool_has_to_be_called_if_one_is_named() {
    let server = Running::new(options());
    let tool = |name: &str| {
        let parameters = json!({"type": "object", "additionalProperties": false,
            "properties": {"big": {"type": "boolean"}}, "required": ["big"]});
        json!({"type": "function", "function": {"name": name, "parameters": parameters}})
    };
    let mut body = json!({
        "messages": [{"role": "user", "content": "Which?"}], "temperature": 0, "max_tokens": 100,
        "tools": [tool("find_dog"), tool("find_cat")],
        "tool_choice": {"type": "function", "function": {"name": "find_cat"}},
    });
    let answer = server.post("/v1/chat/completions", &body).json();
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls", "{answer}");
    let call = &choice["message"]["tool_calls"][0];
    assert_eq!(call["function"]["name"], "find_cat");
    let arguments: Value =
        serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
    assert!(arguments["big"].is_boolean());
    assert!(choice["message"]["content"].is_null());
    body["stream"] = json!(true);
    let pieces = server.post("/v1/chat/completions", &body).pieces();
    let calls = pieces.iter().filter_map(|p| p["choices"][0]["delta"]["tool_calls"].as_array());
    let calls: Vec<&Value> = calls.flatten().collect();
    assert_eq!(calls.len(), 1);
    assert_eq!(calls[0]["function"]["name"], "find_cat");
    body["tool_choice"] = json!({"type": "function", "function": {"name": "find_cow"}});
    server.post("/v1/chat/completions", &body).fault(400, Some("tool_choice"));
}

#[test]
fn responses_are_answered_whole_and_in_events() {
    let server = Running::new(options());
    let body = json!({
        "model": "stories", "instructions": "Tell stories.", "temperature": 0, "store": true,
        "max_output_tokens": 20,
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "Once upon a time"}]}],
    });
    let answer = server.post("/v1/responses", &body).json();
    assert_eq!(answer["object"], "response");
    assert_eq!(answer["status"], "incomplete");
    assert_eq!(answer["store"], false);
    let text = answer["output"][0]["content"][0]["text"].as_str().unwrap();
    assert_eq!(text, continued("system: Tell stories.\nuser: Once upon a time\n", 20).trim_start());
    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    let answer = server.post("/v1/responses", &streamed);
    let events: Vec<Value> = answer
        .body
        .lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .map(|piece| serde_json::from_str(piece).unwrap())
        .collect();
    let kinds: Vec<&str> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    assert_eq!(
        kinds[..4],
        [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
        ]
    );
    assert_eq!(
        kinds[kinds.len() - 4..],
        [
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.incomplete",
        ]
    );
    for (number, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], number);
    }
    let deltas = events.iter().filter(|event| event["type"] == "response.output_text.delta");
    let said: String = deltas.filter_map(|event| event["delta"].as_str()).collect();
    assert_eq!(said, text);
    assert_eq!(events.last().unwrap()["response"]["output"][0]["content"][0]["text"], text);
    for (field, value) in [("previous_response_id", json!("resp_1")), ("background", json!(true))] {
        let mut kept = body.clone();
        kept[field] = value;
        server.post("/v1/responses", &kept).fault(400, Some(field));
    }
}

#[test]
fn texts_become_tokens_and_tokens_texts() {
    let server = Running::new(options());
    let body = json!({"prompt": PROMPT, "add_special_tokens": false, "return_token_strs": true});
    let plain = server.post("/tokenize", &body).json();
    let with = server.post("/tokenize", &json!({"prompt": PROMPT})).json();
    assert_eq!(with["count"].as_u64().unwrap(), plain["count"].as_u64().unwrap() + 1);
    assert_eq!(plain["token_strs"].as_array().unwrap().len() as u64, plain["count"]);
    let back = server.post("/detokenize", &json!({"tokens": plain["tokens"]})).json();
    assert_eq!(back["prompt"].as_str().unwrap().trim_start(), PROMPT);
    let chat = json!({"messages": [{"role": "user", "content": "a"}]});
    assert!(server.post("/tokenize", &chat).json()["count"].as_u64().unwrap() > 2);
    assert!(server.get("/tokenizer_info").json()["eos_token"].is_string());
    server.post("/detokenize", &json!({"tokens": [1, 512]})).fault(400, Some("tokens[1]"));
    server.post("/detokenize", &json!({"tokens": [-1]})).fault(400, Some("tokens[0]"));
    server.post("/tokenize", &json!({})).fault(400, Some("prompt"));
}

#[test]
fn what_makes_no_sense_is_refused_by_name() {
    let server = Running::new(options());
    let completion = |field: &str, value: Value| {
        let mut body = json!({"model": "stories", "prompt": PROMPT, "max_tokens": 2});
        body[field] = value;
        server.post("/v1/completions", &body)
    };
    for (field, value) in [
        ("temperature", json!(-1)),
        ("temperature", json!("hot")),
        ("top_p", json!(0)),
        ("top_k", json!(-2)),
        ("min_p", json!(2)),
        ("repetition_penalty", json!(0)),
        ("n", json!(0)),
        ("n", json!(100_000)),
        ("max_tokens", json!(-1)),
        ("max_tokens", json!(100_000)),
        ("max_tokens", json!(1.5)),
        ("prompt", json!([])),
        ("prompt", json!([[]])),
        ("prompt", json!({"text": "a"})),
        ("prompt", json!(["a", 1])),
        ("logprobs", json!(1000)),
        ("stop", json!(3)),
        ("suffix", json!("x")),
        ("best_of", json!(4)),
        ("presence_penalty", json!(2.5)),
        ("frequency_penalty", json!(-2.01)),
        ("logit_bias", json!({"512": 1})),
        ("logit_bias", json!({"+5": 1})),
        ("logit_bias", json!({"-1": 1})),
        ("logit_bias", json!([5])),
        ("min_tokens", json!(3)),
        ("min_tokens", json!(-1)),
        ("colour", json!("red")),
    ] {
        let answer = completion(field, value.clone());
        assert_eq!(answer.status, 400, "{field} {value}: {answer:?}");
        let error = answer.json()["error"].clone();
        assert_eq!(error["param"], field, "{value}: {error}");
    }
    let range = "expected -2 to 2";
    assert!(completion("presence_penalty", json!(-3)).body.contains(range));
    let range = "is 100.5; expected -100 to 100";
    assert!(
        completion("logit_bias", json!({"5": 100.5}))
            .fault(400, Some("logit_bias.5"))
            .contains(range)
    );
    completion("logit_bias", json!({"5": "x"})).fault(400, Some("logit_bias.5"));
    completion("prompt", json!([1, 2, 512])).fault(400, Some("prompt[2]"));
    completion("prompt", json!([[1], [-4]])).fault(400, Some("prompt[1][0]"));
    completion("model", json!("nobody")).fault(404, Some("model"));
    completion("hydralora", json!({"rooting": true})).fault(400, Some("hydralora.rooting"));
    let long = completion("prompt", json!("word ".repeat(2000)));
    assert_eq!(long.json()["error"]["code"], "context_length_exceeded", "{long:?}");
    for harmless in ["user", "metadata", "service_tier", "safety_identifier"] {
        assert_eq!(completion(harmless, json!("a")).status, 200, "{harmless}");
    }
    let chat =
        |messages: Value| server.post("/v1/chat/completions", &json!({"messages": messages}));
    chat(json!([])).fault(400, Some("messages"));
    chat(json!([{"role": "king", "content": "a"}])).fault(400, Some("messages[0].role"));
    chat(json!([{"role": "user"}])).fault(400, Some("messages[0].content"));
    chat(json!([{"role": "user", "content": "a", "mood": 1}])).fault(400, Some("messages[0].mood"));
    let picture = json!([{"type": "image_url", "image_url": {"url": "x"}}]);
    chat(json!([{"role": "user", "content": picture}]))
        .fault(400, Some("messages[0].content[0].type"));
}

#[test]
fn broken_requests_are_told_what_is_wrong() {
    let options = hydralora_serve::Options { max_body_bytes: 4096, ..options() };
    let server = Running::new(options);
    for broken in
        ["", "{", "{\"prompt\": }", "nonsense", "{\"prompt\": \"a\"} {}", "\u{feff}{}", "[]"]
    {
        let message = server.send("/v1/completions", broken).fault(400, None);
        assert!(!message.is_empty());
    }
    let large = format!("{{\"prompt\": \"{}\"}}", "a".repeat(5000));
    server.send("/v1/completions", &large).fault(413, None);
    let address = server.address;
    ask(address, "POST", "/v1/completions", &[("content-type", "text/plain")], "{}")
        .fault(415, None);
    ask(address, "POST", "/v1/completions", &[], "{}").fault(415, None);
    server.get("/v1/completions").fault(405, None);
    server.get("/nowhere").fault(404, None);
    server.get("/v1/models/nobody").fault(404, Some("model"));
    assert_eq!(server.get("/v1/models/stories").json()["id"], "stories");
    assert_eq!(server.get("/health").status, 200);
    assert!(server.get("/version").json()["version"].is_string());
}

#[test]
fn keys_are_asked_for() {
    let key = hydralora_serve::ApiKey::new;
    let keys = vec![key("correct horse"), key("battery staple")];
    let server = Running::new(hydralora_serve::Options { keys, ..options() });
    let with =
        |header: &str| ask(server.address, "GET", "/v1/models", &[("authorization", header)], "");
    assert_eq!(with("Bearer correct horse").status, 200);
    assert_eq!(with("bearer battery staple").status, 200);
    for wrong in
        ["Bearer wrong", "Bearer ", "Basic correct horse", "correct horse", "Bearer correct hors"]
    {
        with(wrong).fault(401, None);
    }
    let answer = server.get("/v1/models");
    answer.fault(401, None);
    assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
    assert_eq!(server.get("/health").status, 200);
    assert_eq!(server.get("/").status, 200);
}

#[test]
fn other_sites_may_ask_only_if_they_are_named() {
    let asking = |server: &Running, origin: &str| {
        let answer = ask(server.address, "GET", "/version", &[("origin", origin)], "");
        answer.header("access-control-allow-origin").map(str::to_owned)
    };
    assert_eq!(asking(&Running::new(options()), "https://a.example"), None);
    let named = vec!["https://a.example".to_owned()];
    let server = Running::new(hydralora_serve::Options { cors_origins: named, ..options() });
    assert_eq!(asking(&server, "https://a.example").as_deref(), Some("https://a.example"));
    assert_eq!(asking(&server, "https://b.example"), None);
}

#[test]
fn metrics_have_the_names_that_gateways_read() {
    let server = Running::new(options());
    server.post("/v1/completions", &json!({"prompt": PROMPT, "max_tokens": 3}));
    let text = server.get("/metrics").body;
    for line in [
        "vllm:num_requests_waiting{model_name=\"stories\"} 0",
        "vllm:num_requests_running{model_name=\"stories\"} 0",
        "vllm:kv_cache_usage_perc{model_name=\"stories\"} ",
        "vllm:lora_requests_info{max_lora=\"32\",running_lora_adapters=\"\",waiting_lora_adapters=\"\"} ",
        "vllm:prompt_tokens_total{model_name=\"stories\"} ",
        "vllm:generation_tokens_total{model_name=\"stories\"} 3",
        "vllm:time_to_first_token_seconds_count{model_name=\"stories\"} 1",
        "vllm:inter_token_latency_seconds_count{model_name=\"stories\"} 2",
        "vllm:e2e_request_latency_seconds_bucket{model_name=\"stories\",le=\"+Inf\"} 1",
        "vllm:request_success_total{model_name=\"stories\",finished_reason=\"length\"} 1",
        "hydralora_adapters_loaded 0",
    ] {
        assert!(text.lines().any(|found| found.starts_with(line)), "{line} in\n{text}");
    }
}
