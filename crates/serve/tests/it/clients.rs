//! Clients that leave, dawdle, or send nothing; and the end.

use crate::support::{Running, connect, options, receive, send};
use hydralora_run::engine::EngineOptions;
use hydralora_serve::{Options, Server};
use serde_json::json;
use std::io::{Read, Write};
use std::time::{Duration, Instant};

/// A long text to write.
fn long(stream: bool) -> String {
    json!({"prompt": "Once", "max_tokens": 480, "temperature": 0, "ignore_eos": true,
        "stream": stream, "n": 4})
    .to_string()
}

const JSON: &[(&str, &str)] = &[("content-type", "application/json")];

fn running(server: &Running) -> String {
    let text = server.get("/metrics").body;
    let line = text.lines().find(|line| line.starts_with("vllm:num_requests_running{"));
    line.unwrap().rsplit(' ').next().unwrap().to_owned()
}

/// Waits until nothing is computed any more.
fn becomes_idle(server: &Running) {
    let started = Instant::now();
    while running(server) != "0.0" && running(server) != "0" {
        assert!(started.elapsed() < Duration::from_secs(20), "still {}", running(server));
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn who_leaves_is_not_answered_further() {
    let server = Running::new(options());
    for stream in [true, false] {
        let mut client = connect(server.address);
        send(&mut client, "POST", "/v1/completions", JSON, &long(stream));
        if stream {
            let mut some = [0; 64];
            client.read_exact(&mut some).unwrap();
        } else {
            std::thread::sleep(Duration::from_millis(100));
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
    let header_time = Duration::from_millis(300);
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
    let started = Instant::now();
    kept.read_to_end(&mut all).unwrap();
    assert!(started.elapsed() < Duration::from_secs(10));
    assert!(all.starts_with(b"HTTP/1.1 200"));
}

#[test]
fn who_reads_nothing_is_given_up() {
    let request_time = Duration::from_millis(1500);
    let server = Running::new(Options { request_time, ..options() });
    let mut client = connect(server.address);
    send(&mut client, "POST", "/v1/completions", JSON, &long(true));
    let body = json!({"prompt": "Once", "max_tokens": 2});
    assert_eq!(server.post("/v1/completions", &body).status, 200);
    becomes_idle(&server);
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
    let engine = EngineOptions { max_batch: 1, max_waiting: 2, ..EngineOptions::default() };
    let server = Running::with(options(), engine);
    let answer =
        server.post("/v1/completions", &json!({"prompt": "Once", "max_tokens": 400, "n": 9}));
    answer.fault(429, None);
    assert_eq!(answer.header("retry-after"), Some("1"));
    becomes_idle(&server);
    let body = json!({"prompt": "Once", "max_tokens": 2});
    assert_eq!(server.post("/v1/completions", &body).status, 200);
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
    std::thread::sleep(Duration::from_millis(50));
    if let Ok(mut probe) = std::net::TcpStream::connect(address) {
        send(&mut probe, "GET", "/health", &[], "");
        let mut text = String::new();
        let _ = probe.read_to_string(&mut text);
        assert!(text.is_empty() || text.starts_with("HTTP/1.1 503"), "{text}");
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
