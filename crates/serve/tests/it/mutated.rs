//! Requests that were damaged in many ways: each is answered, or refused in words.

use crate::client::{ADDRESSES, stands, stands_raw};
use crate::support::{Drawn, Running, adapter, options};
use hydralora_run::engine::EngineOptions;
use hydralora_serve::{AdapterLimits, Log, Options};
use serde_json::{Map, Value, json};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const BODIES: usize = 3000;

/// Bodies that are right, with their addresses.
fn seeds() -> Vec<(String, Value)> {
    serde_json::from_str(include_str!("../fixtures/bodies.json")).unwrap()
}

/// A value that is seldom what is expected.
fn odd(drawn: &mut Drawn) -> Value {
    let deep = || (0..60).fold(json!(1), |inner, _| json!([inner]));
    match drawn.below(20) {
        0 => Value::Null,
        1 => json!(true),
        2 => json!(-1),
        3 => json!(0),
        4 => json!(u64::MAX),
        5 => json!(i64::MIN),
        6 => json!(1e308),
        7 => json!(-0.0),
        8 => json!(""),
        9 => json!("\u{0}\u{202e}\u{fffd}"),
        10 => json!("../../etc"),
        11 => json!("a".repeat(3000)),
        12 => json!([]),
        13 => json!({}),
        14 => json!([null, 1, "a", [], {}]),
        15 => deep(),
        16 => json!({"type": "function", "name": "f", "function": {"name": "g"}}),
        17 => json!({"type": "object", "$ref": "#"}),
        18 => json!({"anyOf": [{"type": "string", "pattern": "(a|b)*c{3,9}"}, {"const": 1}]}),
        _ => json!(drawn.below(700)),
    }
}

/// How many values there are in one, itself among them.
fn count(value: &Value) -> u64 {
    let inner: u64 = match value {
        Value::Array(all) => all.iter().map(count).sum(),
        Value::Object(all) => all.values().map(count).sum(),
        _ => 0,
    };
    1 + inner
}

/// Changes the value at a place, counted as [`count`] does.
fn change(value: &mut Value, at: &mut u64, drawn: &mut Drawn) {
    if *at > 0 {
        *at -= 1;
        let inner: Vec<&mut Value> = match value {
            Value::Array(all) => all.iter_mut().collect(),
            Value::Object(all) => all.values_mut().collect(),
            _ => Vec::new(),
        };
        for one in inner {
            let here = count(one);
            if *at < here {
                return change(one, at, drawn);
            }
            *at -= here;
        }
        return;
    }
    match (drawn.below(4), value) {
        (0, Value::Object(all)) if !all.is_empty() => {
            let gone = drawn.below(all.len() as u64) as usize;
            let name = all.keys().nth(gone).cloned().unwrap();
            all.remove(&name);
        }
        (1, Value::Object(all)) => {
            let names = ["type", "name", "content", "prompt", "n", "logit_bias", "colour", "\u{0}"];
            let name = names[drawn.below(names.len() as u64) as usize];
            all.insert(name.to_owned(), odd(drawn));
        }
        (2, Value::Array(all)) if !all.is_empty() => {
            let again = all[drawn.below(all.len() as u64) as usize].clone();
            (0..1 + drawn.below(80)).for_each(|_| all.push(again.clone()));
        }
        (3, value @ (Value::String(_) | Value::Number(_))) => *value = json!([value.take()]),
        (_, value) => *value = odd(drawn),
    }
}

/// Damages bytes, up to four times.
fn damage(bytes: &mut Vec<u8>, drawn: &mut Drawn) {
    for _ in 0..=drawn.below(3) {
        let at = drawn.below(bytes.len() as u64 + 1) as usize;
        let length = (drawn.below(9) as usize).min(bytes.len() - at);
        match drawn.below(4) {
            0 => drop(bytes.drain(at..at + length)),
            1 => {
                let again = bytes[at..at + length].to_vec();
                bytes.splice(at..at, again);
            }
            2 => bytes.truncate(at),
            _ => bytes.insert(at, drawn.below(256) as u8),
        }
    }
}

#[test]
fn damaged_requests_are_answered_or_refused_in_words() {
    let place = tempfile::tempdir().unwrap();
    adapter(&place.path().join("law"), "hydralora", 1);
    let faults = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&faults);
    let options = Options {
        request_time: Duration::from_millis(10),
        adapters: AdapterLimits {
            root: Some(place.path().to_path_buf()),
            ..AdapterLimits::default()
        },
        log: Log::new(move |line| kept.lock().unwrap().push(line.to_owned())),
        ..options()
    };
    let engine = EngineOptions { max_waiting: 4, ..EngineOptions::default() };
    let server = Running::with(options, engine);
    let (mut drawn, seeds) = (Drawn(7), seeds());
    for known in ADDRESSES {
        assert!(seeds.iter().any(|(address, _)| address == known), "{known} has no body");
    }
    let mut statuses = Map::new();
    for (address, body) in &seeds {
        let status = stands(server.address, address, body.to_string().as_bytes());
        assert!([200, 404, 409, 504].contains(&status), "{status} {body}");
    }
    for number in 0..BODIES {
        let (address, seed) = &seeds[drawn.below(seeds.len() as u64) as usize];
        let mut body = seed.clone();
        for _ in 0..=drawn.below(2) {
            let mut at = drawn.below(count(&body));
            change(&mut body, &mut at, &mut drawn);
        }
        let mut bytes = body.to_string().into_bytes();
        if number % 4 == 0 {
            damage(&mut bytes, &mut drawn);
        }
        let status = stands(server.address, address, &bytes);
        let seen = statuses.entry(status.to_string()).or_insert(json!(0));
        *seen = json!(seen.as_u64().unwrap() + 1);
        if number % 10 == 0 {
            let length = bytes.len();
            let head = format!(
                "POST {address} HTTP/1.1\r\nhost: t\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
            );
            let mut raw = [head.into_bytes(), bytes].concat();
            damage(&mut raw, &mut drawn);
            stands_raw(server.address, &raw);
        }
    }
    let faults: Vec<String> = faults.lock().unwrap().clone();
    assert!(faults.iter().all(|line| !line.contains("fault")), "{faults:?}");
    // Both were met often.
    for status in ["200", "400"] {
        let seen = statuses.get(status).and_then(Value::as_u64).unwrap_or(0);
        assert!(seen > BODIES as u64 / 50, "{statuses:?}");
    }
    assert_eq!(server.get("/health").status, 200);
}
