//! HumanEval (Chen et al., arXiv 2107.03374): programs that have to pass their tests.
//!
//! As lm-evaluation-harness's `humaneval`: the prompt alone, up to `\nclass`, `\ndef`, `\n#`, `\nif`
//! or `\nprint` or 1,024 tokens; prompt and completion are a program, which passes if its tests end
//! without an exception within 3 s. The tests call it from a process of their own, where it cannot
//! answer for them; they see what the prompt defines and the function asked for. One greedy program gives `pass@1`; with `--repeats N`
//! programs are drawn at a temperature of 0.2 and the likeliest tokens that reach 0.95, and
//! `pass@k` is estimated without bias for `k` = 1, 10 and 100 up to `N`.
//!
//! `humaneval_instruct`, version 4 there, asks for the program as one asks an assistant: the problem in a
//! code fence, and an answer that already holds an opened fence with the prompt. Where the model closes
//! the fence the program ends. It is meant for a chat template, behind which the answer's beginning stands.
//!
//! The file is `HumanEval.jsonl`, packed or not, or `openai_humaneval/test-*.parquet` as in the hub's
//! `openai/openai_humaneval`. Programs run in a [sandbox](crate::eval::sandbox), and only if that was allowed.

use crate::eval::error::{Error, Result};
use crate::eval::metrics::pass_at_k;
use crate::eval::prompt::{Prompt, Reader};
use crate::eval::sandbox::{Limits, Sandbox, Trial, Verdict};
use crate::eval::task::{
    Answer, Family, Files, Info, Item, Metric, Opened, Remote, Score, Settings, Task, Work,
    locate_split, object,
};
use serde::Deserialize;
use serde_json::json;
use std::num::NonZero;

/// The task that asks as one asks an assistant.
const INSTRUCT: &str = "humaneval_instruct";
/// Opens and closes code in an answer.
const FENCE: &str = "```";
const STOPS: [&str; 5] = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"];
const EXPECTED: &str = "an object with the texts `task_id`, `prompt`, `test` and `entry_point`";

/// The only member of its family.
pub(crate) static FAMILY: HumanEvalFamily = HumanEvalFamily;

pub(crate) struct HumanEvalFamily;

impl Family for HumanEvalFamily {
    fn names(&self) -> Vec<String> {
        ["humaneval", INSTRUCT].map(str::to_owned).to_vec()
    }

    fn remote(&self, _: &str, _: &Settings) -> Option<Remote> {
        let splits = vec![("openai_humaneval".to_owned(), "test")];
        Some(Remote { repository: "openai/openai_humaneval", revision: "main", splits })
    }

    fn summary(&self) -> &'static str {
        "HumanEval: programs run against their tests (needs --allow-code-execution)"
    }

    fn open(&self, name: &str, settings: &Settings, reader: &Reader<'_>) -> Result<Opened> {
        let instruct = name == INSTRUCT;
        if !instruct {
            reader.refuse_template(
                name,
                "continues a program, and an answer in a conversation is no continuation: it explains, \
                 or stands in a code fence; `humaneval_instruct` asks for one",
            )?;
        }
        if !settings.allow_code_execution {
            return Err(Error::Option {
                option: "allow-code-execution",
                message: format!(
                    "is not given; `{name}` runs programs that the model writes, in a sandbox"
                ),
            });
        }
        settings.examples(name, 0, 0)?;
        let sandbox = Sandbox::new(Limits::default())?;
        let folders = [settings.data.join("humaneval"), settings.data.clone()];
        let names = ["HumanEval.jsonl", "HumanEval.jsonl.gz"];
        let places = folders.iter().flat_map(|folder| names.map(|name| folder.join(name)));
        let hub = folders.each_ref().map(|folder| folder.join("openai_humaneval"));
        let file = locate_split(name, "HumanEval.jsonl", places.collect(), &hub, "test")?;
        let mut files = Files::default();
        let (problems, original) = files.objects::<Problem>(&file, EXPECTED, settings.limit)?;
        let repeats = settings.repeats.unwrap_or(1).max(1);
        let temperature = settings.temperature.unwrap_or(if repeats == 1 { 0.0 } else { 0.2 });
        if repeats > 1 && temperature == 0.0 {
            return Err(Error::Option {
                option: "temperature",
                message: format!("is 0, at which all {repeats} programs are the same"),
            });
        }
        let top_p = if temperature == 0.0 { 1.0 } else { 0.95 };
        let max_new_tokens = settings.new_tokens(1024)?;
        let mut stops = STOPS.map(str::to_owned).to_vec();
        // What follows a closing fence would be cut off anyway.
        stops.extend(instruct.then(|| FENCE.to_owned()));
        let mut tests = Vec::new();
        let mut items = Vec::new();
        for (id, (record, problem)) in problems.into_iter().enumerate() {
            let prompt = if instruct {
                instruction(&problem.prompt)
            } else {
                Prompt::plain(problem.prompt.as_str())
            };
            tests.push(Tests {
                prompt: problem.prompt,
                code: format!("{}\ncheck({})", problem.test, problem.entry_point),
                entry_point: problem.entry_point,
            });
            items.push(Item {
                id,
                record,
                prompt,
                work: Work::Write {
                    stops: stops.clone(),
                    max_new_tokens,
                    repeats,
                    temperature,
                    top_p,
                },
                target: problem.task_id,
            });
        }
        let counts: Vec<usize> = [1, 10, 100].into_iter().filter(|k| *k <= repeats).collect();
        let config = json!({
            "generation_kwargs": {
                "until": stops, "do_sample": temperature > 0.0, "temperature": temperature,
                "top_p": top_p, "max_gen_toks": max_new_tokens, "seed": settings.seed,
            },
            "repeats": repeats,
            "unsafe_code": true,
            "sandbox": {"seconds": Limits::default().seconds, "memory": Limits::default().memory,
                "memory_of_all": sandbox.has_group()},
        });
        let metric = |k: &usize| Metric::new(format!("pass@{k}"), "create_test");
        let info = Info {
            name: name.to_owned(),
            version: if instruct { 4.0 } else { 1.0 },
            shots: 0,
            output_type: "generate_until",
            metrics: counts.iter().map(metric).collect(),
            config: object(config),
            data: files.hashes,
            original,
        };
        let task = HumanEval { info, items, tests, counts, sandbox };
        Ok(Opened { tasks: vec![Box::new(task)], groups: Vec::new() })
    }
}

#[derive(Deserialize)]
struct Problem {
    task_id: String,
    prompt: String,
    test: String,
    entry_point: String,
}

/// The problem as an assistant is asked, and the beginning of its answer.
fn instruction(program: &str) -> Prompt {
    let ask = "Write a solution to the following problem and make sure that it passes the tests:";
    let answer = "Here is the completed function:";
    Prompt {
        question: format!("{ask}\n{FENCE}python\n{program}\n{FENCE}\n"),
        answer_start: format!("{answer}\n{FENCE}python\n{program}\n"),
        ..Prompt::default()
    }
}

/// What a program has to pass.
struct Tests {
    /// What the program begins with.
    prompt: String,
    code: String,
    entry_point: String,
}

struct HumanEval {
    info: Info,
    items: Vec<Item>,
    tests: Vec<Tests>,
    /// The `k` of each metric.
    counts: Vec<usize>,
    sandbox: Sandbox,
}

impl HumanEval {
    fn verdicts(&self, item: &Item, completions: &[String]) -> Result<Vec<Verdict>> {
        let tests = &self.tests[item.id];
        let verdict = |completion: &String| {
            self.sandbox.check(&Trial {
                shared: &tests.prompt,
                program: &format!("{}{completion}\n", tests.prompt),
                entry_point: &tests.entry_point,
                tests: &tests.code,
            })
        };
        let workers = std::thread::available_parallelism().map_or(1, NonZero::get);
        let share = completions.len().div_ceil(workers).max(1);
        let parts: Vec<Result<Vec<Verdict>>> = std::thread::scope(|scope| {
            let running: Vec<_> = completions
                .chunks(share)
                .map(|part| scope.spawn(move || part.iter().map(verdict).collect()))
                .collect();
            let failed = || Err(Error::Sandbox("a thread of the sandbox died".to_owned()));
            running.into_iter().map(|thread| thread.join().unwrap_or_else(|_| failed())).collect()
        });
        let parts: Vec<Vec<Verdict>> = parts.into_iter().collect::<Result<_>>()?;
        Ok(parts.concat())
    }
}

impl Task for HumanEval {
    fn info(&self) -> &Info {
        &self.info
    }

    fn items(&self) -> &[Item] {
        &self.items
    }

    fn score(&self, item: &Item, answer: &Answer) -> Result<Vec<Score>> {
        let verdicts = self.verdicts(item, answer.texts())?;
        let right = verdicts.iter().filter(|verdict| **verdict == Verdict::Passed).count();
        let words: Vec<&str> = verdicts
            .iter()
            .map(|verdict| match verdict {
                Verdict::Passed => "passed",
                Verdict::Failed(why) => why,
            })
            .collect();
        Ok(self
            .counts
            .iter()
            .map(|&k| Score {
                value: pass_at_k(verdicts.len(), right, k),
                weight: 1.0,
                filtered: words.join("; "),
            })
            .collect())
    }
}
