//! Everything at once for a while: answers, streams, callers that leave, idle and slow ones, adapters that
//! are replaced, nonsense. Every request gets one answer or one error, and what it should be does not change.
//!
//! `HYDRALORA_SOAK_SECONDS` says for how long (4); from 60 on with a thousand idle connections and two
//! hundred slow readers.

use crate::support::{Answer, Drawn, Running, adapter, connect, options, receive, send};
use hydralora_run::engine::EngineOptions;
use hydralora_serve::{AdapterLimits, Options};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const CALLERS: u64 = 12;
const PROMPTS: [&str; 4] = ["Once upon a time", "The dog", "Lily and Tom went", "One day"];
const JSON: &[(&str, &str)] = &[("content-type", "application/json")];

/// What came of the requests, by kind.
#[derive(Default, Debug)]
struct Counts {
    whole: usize,
    streamed: usize,
    refused: usize,
    left: usize,
    nonsense: usize,
    replaced: usize,
}

fn seconds() -> u64 {
    let asked = std::env::var("HYDRALORA_SOAK_SECONDS");
    asked.map_or(4, |text| text.parse().expect("HYDRALORA_SOAK_SECONDS: seconds"))
}

fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.map_or(0, |kib| kib * 1024)
}

fn asked(model: &str, prompt: &str, stream: bool) -> Value {
    json!({"model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0, "stream": stream})
}

fn text(answer: &Answer) -> String {
    answer.json()["choices"][0]["text"].as_str().unwrap().to_owned()
}

/// One answer, or one error of a kind that may be: there was no room, or the adapter is not loaded.
fn is_one_answer(answer: &Answer) -> bool {
    let is_whole = answer.status == 200 && answer.json()["choices"].as_array().is_some();
    let is_error = [404, 429].contains(&answer.status) && answer.json()["error"].is_object();
    assert!(is_whole || is_error, "{answer:?}");
    is_whole
}

/// The text of a stream, which ends once.
fn streamed_text(answer: &Answer) -> String {
    let ends = answer.body.matches("data: [DONE]").count();
    assert_eq!(ends, 1, "{answer:?}");
    answer.pieces().iter().filter_map(|piece| piece["choices"][0]["text"].as_str()).collect()
}

struct Soak<'a> {
    server: &'a Running,
    /// What the base answers, prompt by prompt.
    expected: &'a [String],
    over: &'a AtomicBool,
    counts: &'a Mutex<Counts>,
}

impl Soak<'_> {
    fn count(&self, what: impl FnOnce(&mut Counts)) {
        what(&mut self.counts.lock().unwrap());
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    /// Asks in all ways, one after the other, until it is over.
    fn call(&self, number: u64) {
        let mut drawn = Drawn(number);
        while !self.is_over() {
            let at = drawn.below(PROMPTS.len() as u64) as usize;
            let prompt = PROMPTS[at];
            match drawn.below(8) {
                0 | 1 => {
                    let answer =
                        self.server.post("/v1/completions", &asked("stories", prompt, false));
                    let whole = is_one_answer(&answer);
                    if whole {
                        assert_eq!(text(&answer), self.expected[at]);
                    }
                    self.count(|c| if whole { c.whole += 1 } else { c.refused += 1 });
                }
                2 => {
                    let answer =
                        self.server.post("/v1/completions", &asked("changing", prompt, false));
                    let whole = is_one_answer(&answer);
                    self.count(|c| if whole { c.whole += 1 } else { c.refused += 1 });
                }
                3 | 4 => {
                    let answer =
                        self.server.post("/v1/completions", &asked("stories", prompt, true));
                    if answer.status == 200 {
                        assert_eq!(streamed_text(&answer), self.expected[at]);
                        self.count(|c| c.streamed += 1);
                    } else {
                        assert!(!is_one_answer(&answer));
                        self.count(|c| c.refused += 1);
                    }
                }
                5 => self.leave(prompt, &mut drawn),
                6 => self.nonsense(&mut drawn),
                _ => {
                    let many = json!({"model": "stories", "prompt": PROMPTS, "n": 2, "max_tokens": 3,
                        "temperature": 1, "seed": drawn.below(9)});
                    let answer = self.server.post("/v1/completions", &many);
                    let whole = is_one_answer(&answer);
                    if whole {
                        let choices = answer.json()["choices"].as_array().map(Vec::len);
                        assert_eq!(choices, Some(2 * PROMPTS.len()));
                    }
                    self.count(|c| if whole { c.whole += 1 } else { c.refused += 1 });
                }
            }
        }
    }

    /// Leaves before the answer is there: in the middle of the request, at once, or after some bytes.
    fn leave(&self, prompt: &str, drawn: &mut Drawn) {
        let body =
            json!({"model": "stories", "prompt": prompt, "max_tokens": 400, "ignore_eos": true,
            "stream": true})
            .to_string();
        let mut client = connect(self.server.address);
        match drawn.below(3) {
            0 => {
                let head = "POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-type: application/json\r\n";
                let _ = write!(client, "{head}content-length: {}\r\n\r\n", body.len());
                let _ = client.write_all(&body.as_bytes()[..body.len() / 2]);
            }
            1 => send(&mut client, "POST", "/v1/completions", JSON, &body),
            _ => {
                send(&mut client, "POST", "/v1/completions", JSON, &body);
                let mut some = [0; 200];
                let _ = client.read(&mut some);
            }
        }
        drop(client);
        self.count(|c| c.left += 1);
    }

    fn nonsense(&self, drawn: &mut Drawn) {
        let bodies = [
            "{",
            "{\"prompt\": 5}",
            "{\"prompt\": [99999999]}",
            "{\"prompt\": \"a\", \"colour\": 1}",
            "{\"prompt\": \"a\", \"max_tokens\": -1}",
            "\u{0}\u{1}",
            "{\"prompt\": \"a\", \"max_tokens\": 1e300}",
        ];
        let body = bodies[drawn.below(bodies.len() as u64) as usize];
        let answer = self.server.send("/v1/completions", body);
        assert_eq!(answer.status, 400, "{body}: {answer:?}");
        assert!(answer.json()["error"]["message"].is_string(), "{answer:?}");
        self.count(|c| c.nonsense += 1);
    }

    /// Loads, replaces and unloads an adapter.
    fn replace(&self) {
        let mut number = 0_usize;
        while !self.is_over() {
            number += 1;
            let folder = ["plain", "routed"][number % 2];
            let body = json!({"lora_name": "changing", "lora_path": folder, "load_inplace": true});
            let loaded = self.server.post("/v1/load_lora_adapter", &body);
            assert!([200, 429].contains(&loaded.status), "{loaded:?}");
            if number.is_multiple_of(5) {
                let body = json!({"lora_name": "changing"});
                let gone = self.server.post("/v1/unload_lora_adapter", &body);
                assert!([200, 404].contains(&gone.status), "{gone:?}");
            }
            self.count(|c| c.replaced += 1);
            std::thread::sleep(Duration::from_millis(30));
        }
    }

    /// Readers that take a few bytes at a time, all of them kept by one thread.
    fn dawdle(&self, count: usize) {
        let body =
            json!({"model": "stories", "prompt": "Once", "max_tokens": 100, "ignore_eos": true,
            "stream": true})
            .to_string();
        let begin = || {
            let mut client = connect(self.server.address);
            client.set_nonblocking(false).unwrap();
            send(&mut client, "POST", "/v1/completions", JSON, &body);
            client.set_nonblocking(true).unwrap();
            client
        };
        let mut clients: Vec<TcpStream> = (0..count).map(|_| begin()).collect();
        while !self.is_over() {
            for client in &mut clients {
                let mut some = [0; 64];
                if matches!(client.read(&mut some), Ok(0)) {
                    *client = begin();
                }
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Waits for what has to come, however busy the machine is.
fn becomes_idle(server: &Running) {
    let is_zero = |name: &str| {
        let text = server.get("/metrics").body;
        let line = text.lines().find(|line| line.starts_with(&format!("{name}{{")));
        line.unwrap().rsplit(' ').next().unwrap().parse::<f64>().unwrap() == 0.0
    };
    while !is_zero("vllm:num_requests_running") || !is_zero("vllm:num_requests_waiting") {
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn adapters(root: &Path) {
    adapter(&root.join("plain"), "lora", 1);
    adapter(&root.join("routed"), "hydralora", 2);
}

#[test]
fn everything_at_once_disturbs_nobody() {
    let seconds = seconds();
    let (idle, slow) = if seconds >= 60 { (1000, 200) } else { (50, 10) };
    let root = tempfile::tempdir().unwrap();
    adapters(root.path());
    let limits =
        AdapterLimits { root: Some(root.path().to_path_buf()), ..AdapterLimits::default() };
    let options = Options { adapters: limits, max_connections: 2000, ..options() };
    // So few bytes that they are full soon, texts give way to each other, and what grows after that leaks.
    let engine =
        EngineOptions { max_waiting: 300, cache_bytes: 16 << 20, ..EngineOptions::default() };
    let mut server = Running::with(options, engine);
    let expected: Vec<String> = PROMPTS
        .iter()
        .map(|prompt| text(&server.post("/v1/completions", &asked("stories", prompt, false))))
        .collect();
    let (over, counts) = (AtomicBool::new(false), Mutex::default());
    let soak = Soak { server: &server, expected: &expected, over: &over, counts: &counts };
    let idle: Vec<TcpStream> = (0..idle).map(|_| connect(server.address)).collect();
    let grown = std::thread::scope(|scope| {
        for number in 0..CALLERS {
            let soak = &soak;
            scope.spawn(move || soak.call(number + 1));
        }
        scope.spawn(|| soak.replace());
        scope.spawn(|| soak.dawdle(slow));
        let started = Instant::now();
        let mut halfway = None;
        while started.elapsed() < Duration::from_secs(seconds) {
            std::thread::sleep(Duration::from_millis(100));
            if halfway.is_none() && started.elapsed() * 2 > Duration::from_secs(seconds) {
                halfway = Some(resident_bytes());
            }
        }
        over.store(true, Ordering::Relaxed);
        resident_bytes().saturating_sub(halfway.unwrap_or(u64::MAX))
    });
    drop(idle);
    becomes_idle(&server);
    let counts = counts.into_inner().unwrap();
    println!("{counts:?} in {seconds} s; resident memory {} MB more than halfway", grown >> 20);
    for number in [counts.whole, counts.streamed, counts.left, counts.nonsense, counts.replaced] {
        assert!(number > 0, "{counts:?}");
    }
    assert!(grown < 64 << 20, "resident memory grew by {grown} bytes in the second half");
    for (prompt, expected) in PROMPTS.iter().zip(&expected) {
        let mut client = connect(server.address);
        send(
            &mut client,
            "POST",
            "/v1/completions",
            JSON,
            &asked("stories", prompt, false).to_string(),
        );
        assert_eq!(&text(&receive(client)), expected);
    }
    assert!(server.drain());
}
