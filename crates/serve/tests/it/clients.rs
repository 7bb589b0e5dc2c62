//! Clients that leave, dawdle, or send nothing; and the end.

use crate::support::{Running, connect, options, receive, send};
use hydralora_run::engine::EngineOptions;
use hydralora_serve::{Options, Server};
use serde_json::json;
use std::io::{Read, Write};
use std::time::Duration;

/// A long text to write.
fn long(stream: bool) -> String {
    json!({"prompt": "Once", "max_tokens": 480, "temperature": 0, "ignore_eos": true,
        "stream": stream, "n": 4})
    .to_string()
}

const JSON: &[(&str, &str)] = &[("content-type", "application/json")];

/// A number among the metrics.
fn metric(server: &Running, name: &str) -> f64 {
    let text = server.get("/metrics").body;
    let line = text.lines().find(|line| line.starts_with(&format!("{name}{{")));
    line.unwrap().rsplit(' ').next().unwrap().parse().unwrap()
}

/// Waits until that is so, however long a busy machine takes.
fn until(so: impl Fn() -> bool) {
    while !so() {
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Waits until nothing is computed any more.
fn becomes_idle(server: &Running) {
    until(|| metric(server, "vllm:num_requests_running") == 0.0);
}

#[test]
fn who_leaves_is_not_answered_further() {
    let server = Running::new(options());
    for stream in [true, false] {
        let before = metric(&server, "vllm:prompt_tokens_total");
        let mut client = connect(server.address);
        send(&mut client, "POST", "/v1/completions", JSON, &long(stream));
        if stream {
            let mut some = [0; 64];
            client.read_exact(&mut some).unwrap();
        } else {
            until(|| metric(&server, "vllm:prompt_tokens_total") > before);
        }
        drop(client);
        becomes_idle(&server);
    }
    let metrics = server.get("/metrics").body;
    let aborted = metrics.lines().find(|line| line.contains("finished_reason=\"abort\""));
    assert!(aborted.is_some(), "{metrics}");
    let body = json!({"prompt": "Once", "max_tokens": 2});
    assert_eq!(server.post("/v1/completions", &body).status, 200);
}

#[test]
fn slow_heads_and_idle_connections_disturb_nobody() {
    let header_time = Duration::from_secs(2);
    let options = Options { header_time, max_connections: 8, ..options() };
    let server = Running::new(options);
    let mut slow: Vec<_> = (0..7).map(|_| connect(server.address)).collect();
    for (number, client) in slow.iter_mut().enumerate() {
        if number % 2 == 0 {
            client.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: t").unwrap();
        }
    }
    let body = json!({"prompt": "Once", "max_tokens": 2});
    assert_eq!(server.post("/v1/completions", &body).status, 200);
    // They are closed, so that their places are free again.
    for client in &mut slow {
        let mut rest = Vec::new();
        let _ = client.read_to_end(&mut rest);
    }
    let mut kept = connect(server.address);
    kept.write_all(b"GET /health HTTP/1.1\r\nhost: t\r\n\r\n").unwrap();
    let mut all = Vec::new();
    // The server closes it, or this would not end.
    kept.read_to_end(&mut all).unwrap();
    assert!(all.starts_with(b"HTTP/1.1 200"));
}

#[test]
fn who_reads_nothing_is_given_up() {
    let request_time = Duration::from_millis(1500);
    let server = Running::new(Options { request_time, ..options() });
    let mut client = connect(server.address);
    send(&mut client, "POST", "/v1/completions", JSON, &long(true));
    becomes_idle(&server);
    // On a busy machine even this may take longer than a request may.
    let body = json!({"prompt": "Once", "max_tokens": 2});
    until(|| server.post("/v1/completions", &body).status == 200);
    drop(client);
}

#[test]
fn an_answer_that_takes_too_long_is_ended() {
    let request_time = Duration::from_millis(1);
    let server = Running::new(Options { request_time, ..options() });
    let answer = server.send("/v1/completions", &long(false));
    answer.fault(504, None);
    let streamed = server.send("/v1/completions", &long(true));
    assert!(streamed.body.contains("request_timeout"), "{streamed:?}");
    becomes_idle(&server);
}

#[test]
fn a_full_queue_says_when_to_come_again() {
    let engine = EngineOptions { max_batch: 1, max_waiting: 6, ..EngineOptions::default() };
    let server = Running::with(options(), engine);
    let body = json!({"prompt": "Once", "max_tokens": 480, "temperature": 0, "ignore_eos": true,
        "stream": true, "n": 6});
    // As many as may wait, which take long one after the other; those that ask meanwhile are too many.
    let mut clients = Vec::new();
    let full = loop {
        let mut client = connect(server.address);
        send(&mut client, "POST", "/v1/completions", JSON, &body.to_string());
        let mut status = [0; 12];
        client.read_exact(&mut status).unwrap();
        match &status {
            b"HTTP/1.1 200" => clients.push(client),
            _ => break (status, client),
        }
    };
    let (status, mut client) = full;
    assert_eq!(&status, b"HTTP/1.1 429");
    let mut rest = String::new();
    client.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("retry-after: 1\r\n") && rest.contains("queue_full"), "{rest}");
    drop(clients);
    until(|| metric(&server, "vllm:num_requests_waiting") == 0.0);
    let body = json!({"prompt": "Once", "max_tokens": 2});
    assert_eq!(server.post("/v1/completions", &body).status, 200);
}

#[test]
fn what_never_has_room_to_wait_is_refused_for_good() {
    let engine = EngineOptions { max_waiting: 2, ..EngineOptions::default() };
    let server = Running::with(options(), engine);
    let ask = |prompt: serde_json::Value, n: usize| {
        server.post("/v1/completions", &json!({"prompt": prompt, "max_tokens": 1, "n": n}))
    };
    for (answer, field) in [
        (ask(json!("Once"), 3), "n"),
        (ask(json!(["Once", "The", "A"]), 1), "prompt"),
        (ask(json!([[5], [6]]), 2), "prompt"),
    ] {
        let message = answer.fault(400, Some(field));
        assert!(message.contains("lets 2 wait (--max-waiting)"), "{message}");
        assert_eq!(answer.header("retry-after"), None);
    }
    let chat = json!({"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "n": 3});
    server.post("/v1/chat/completions", &chat).fault(400, Some("n"));
    assert_eq!(ask(json!(["Once", "The"]), 1).status, 200);
    assert_eq!(ask(json!("Once"), 2).status, 200);
}

#[test]
fn what_is_in_work_ends_before_the_server_does() {
    let mut server = Running::new(options());
    let address = server.address;
    let mut client = connect(address);
    send(&mut client, "POST", "/v1/completions", JSON, &long(true));
    let mut first = [0; 16];
    client.read_exact(&mut first).unwrap();
    let draining = std::thread::spawn(move || {
        let whole = server.drain();
        (whole, server)
    });
    // It says that it ends as long as it is still there.
    while let Ok(mut probe) = std::net::TcpStream::connect(address) {
        send(&mut probe, "GET", "/health", &[], "");
        let mut text = String::new();
        let _ = probe.read_to_string(&mut text);
        // The thread that drains may not have begun.
        if text.starts_with("HTTP/1.1 200") {
            continue;
        }
        assert!(text.is_empty() || text.starts_with("HTTP/1.1 503"), "{text}");
        break;
    }
    let mut rest = String::new();
    client.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("data: [DONE]"), "{rest}");
    let (whole, _server) = draining.join().unwrap();
    assert!(whole);
    assert!(std::net::TcpStream::connect(address).is_err());
}

#[test]
fn it_says_that_it_is_not_there_yet() {
    let server = Server::bind(options(), "127.0.0.1", 0).unwrap();
    let ask = |path: &str| {
        let mut client = connect(server.address());
        send(&mut client, "GET", path, &[], "");
        receive(client)
    };
    ask("/health").fault(503, None);
    let answer = ask("/v1/models");
    answer.fault(503, None);
    assert!(answer.header("retry-after").is_some());
    assert_eq!(ask("/metrics").status, 200);
    assert!(server.drain());
}

#[test]
fn many_at_once_get_what_each_alone_gets() {
    let server = Running::new(options());
    let prompts = ["Once", "The dog", "A girl", "One day", "Tom", "Lily", "The sun", "It was"];
    let body = |prompt: &str| json!({"prompt": prompt, "max_tokens": 24, "temperature": 0});
    let alone: Vec<_> = prompts
        .iter()
        .map(|prompt| server.post("/v1/completions", &body(prompt)).json()["choices"].clone())
        .collect();
    let server = &server;
    std::thread::scope(|scope| {
        let all: Vec<_> = prompts
            .iter()
            .map(|prompt| scope.spawn(move || server.post("/v1/completions", &body(prompt)).json()))
            .collect();
        for (asked, expected) in all.into_iter().zip(&alone) {
            assert_eq!(&asked.join().unwrap()["choices"], expected);
        }
    });
}
