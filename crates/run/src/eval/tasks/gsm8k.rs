//! GSM8K (Cobbe et al., arXiv 2110.14168): the number a worked solution ends with.
//!
//! As lm-evaluation-harness's `gsm8k` version 3: `Question: …\nAnswer:` behind five solved
//! questions drawn from `train.jsonl` afresh for every record (by Python's generator, seeded with
//! `--seed`), greedy, up to `Question:`, `</s>` or `<|im_end|>` or 256 tokens. Two readings count:
//! `strict-match`, the first `#### number`, and `flexible-extract`, the last number of any form.
//! Files are `test.jsonl` and `train.jsonl`, or `main/test-*.parquet` and `main/train-*.parquet` as in
//! the hub's `openai/gsm8k`. Both sides lose `,`, `$`, all up to `#### ` and a final full stop, and case.

use crate::eval::error::Result;
use crate::eval::filter::{Pick, extract, normalise, pattern};
use crate::eval::prompt::{Prompt, Reader};
use crate::eval::python_random::PythonRandom;
use crate::eval::task::{
    Answer, Family, Files, Info, Item, Metric, Opened, Remote, Score, Settings, Task, Work,
    locate_split, object,
};
use fancy_regex::Regex;
use serde::{Deserialize, Deserializer};
use serde_json::json;

const STOPS: [&str; 3] = ["Question:", "</s>", "<|im_end|>"];
const STRICT: &str = r"#### (\-?[0-9\.\,]+)";
const FLEXIBLE: &str = r"(-?[$0-9.,]{2,})|(-?[0-9]+)";
const IGNORED: [&str; 4] = [",", r"\$", r"(?s).*#### ", r"\.$"];
const EXPECTED: &str = "an object with the texts `question` and `answer`";

/// The only member of its family.
pub(crate) static FAMILY: Gsm8kFamily = Gsm8kFamily;

pub(crate) struct Gsm8kFamily;

impl Family for Gsm8kFamily {
    fn names(&self) -> Vec<String> {
        vec!["gsm8k".to_owned()]
    }

    fn remote(&self, _: &str, settings: &Settings) -> Option<Remote> {
        let mut splits = vec![("main".to_owned(), "test")];
        if settings.shots != Some(0) {
            splits.push(("main".to_owned(), "train"));
        }
        Some(Remote { repository: "openai/gsm8k", revision: "main", splits })
    }

    fn summary(&self) -> &'static str {
        "GSM8K: grade-school mathematics, strict and flexible reading of the answer"
    }

    fn open(&self, name: &str, settings: &Settings, _: &Reader<'_>) -> Result<Opened> {
        let folders = [settings.data.join("gsm8k"), settings.data.clone()];
        let located = |split: &str| {
            let file = format!("{split}.jsonl");
            let places = folders.each_ref().map(|folder| folder.join(&file)).to_vec();
            let hub = folders.each_ref().map(|folder| folder.join("main"));
            locate_split(name, &file, places, &hub, split)
        };
        let mut files = Files::default();
        let (questions, original) =
            files.objects::<Problem>(&located("test")?, EXPECTED, settings.limit)?;
        let own = settings.shots.unwrap_or(5);
        let train = if own == 0 {
            Vec::new()
        } else {
            files.objects::<Problem>(&located("train")?, EXPECTED, None)?.0
        };
        let shots = settings.examples(name, 5, train.len())?;
        let max_new_tokens = settings.new_tokens(256)?;
        let mut random = PythonRandom::new(settings.seed);
        let items = questions
            .into_iter()
            .enumerate()
            .map(|(id, (record, problem))| {
                let drawn = random.sample(train.len(), shots);
                let examples = drawn.into_iter().map(|index| {
                    let example = &train[index].1;
                    (example.prompt(), example.answer.clone())
                });
                Item {
                    id,
                    record,
                    prompt: Prompt {
                        description: String::new(),
                        shots: examples.collect(),
                        question: problem.prompt(),
                        answer_delimiter: " ".into(),
                        ..Prompt::default()
                    },
                    work: Work::Write {
                        stops: STOPS.map(str::to_owned).to_vec(),
                        max_new_tokens,
                        repeats: 1,
                        temperature: 0.0,
                        top_p: 1.0,
                    },
                    target: problem.answer,
                }
            })
            .collect();
        let config = json!({
            "generation_kwargs": {
                "until": STOPS, "do_sample": false, "temperature": 0.0, "max_gen_toks": max_new_tokens,
            },
            "filter_list": [
                {"name": "strict-match", "regex_pattern": STRICT, "group_select": 0},
                {"name": "flexible-extract", "regex_pattern": FLEXIBLE, "group_select": -1},
            ],
            "regexes_to_ignore": IGNORED,
            "ignore_case": true,
            "fewshot_config": {"sampler": "default", "split": "train", "seed": settings.seed},
        });
        let info = Info {
            name: name.to_owned(),
            version: 3.0,
            shots,
            output_type: "generate_until",
            metrics: vec![
                Metric::new("exact_match", "strict-match"),
                Metric::new("exact_match", "flexible-extract"),
            ],
            config: object(config),
            data: files.hashes,
            original,
        };
        let task = Gsm8k { info, items, reading: Reading::new() };
        Ok(Opened { tasks: vec![Box::new(task)], groups: Vec::new() })
    }
}

#[derive(Deserialize)]
struct Problem {
    question: String,
    #[serde(deserialize_with = "with_result")]
    answer: String,
}

/// A worked solution; without the result that answers are compared with, no answer could be right.
fn with_result<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let answer = String::deserialize(deserializer)?;
    if answer.contains("#### ") {
        Ok(answer)
    } else {
        Err(serde::de::Error::custom("the answer does not end in `#### ` and its result"))
    }
}

impl Problem {
    fn prompt(&self) -> String {
        format!("Question: {}\nAnswer:", self.question)
    }
}

/// How an answer is read.
struct Reading {
    strict: Regex,
    flexible: Regex,
    ignored: [Regex; 4],
}

impl Reading {
    fn new() -> Self {
        Self { strict: pattern(STRICT), flexible: pattern(FLEXIBLE), ignored: IGNORED.map(pattern) }
    }

    fn scores(&self, text: &str, target: &str) -> Vec<Score> {
        let target = normalise(&self.ignored, target);
        [(&self.strict, Pick::First), (&self.flexible, Pick::Last)]
            .into_iter()
            .map(|(pattern, pick)| {
                let read = extract(pattern, pick, text);
                Score::of(normalise(&self.ignored, &read) == target, read)
            })
            .collect()
    }
}

struct Gsm8k {
    info: Info,
    items: Vec<Item>,
    reading: Reading,
}

impl Task for Gsm8k {
    fn info(&self) -> &Info {
        &self.info
    }

    fn items(&self) -> &[Item] {
        &self.items
    }

    fn score(&self, item: &Item, answer: &Answer) -> Result<Vec<Score>> {
        let text = answer.texts().first().map_or("", String::as_str);
        Ok(self.reading.scores(text, &item.target))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strict_and_flexible_readings_differ_where_they_should() {
        let reading = Reading::new();
        let values = |text: &str, target: &str| -> Vec<f64> {
            reading.scores(text, target).iter().map(|score| score.value).collect()
        };
        let target = "48+24 = <<48+24=72>>72 clips.\n#### 1,072";
        assert_eq!(values("So 1072.\n#### 1072", target), [1.0, 1.0]);
        assert_eq!(values("So the answer is $1,072.", target), [0.0, 1.0]);
        assert_eq!(values("#### 1,072\n\nThat is 3 more.", target), [1.0, 0.0]);
        assert_eq!(values("#### 1,072.", target), [1.0, 1.0]);
        assert_eq!(values("no number", target), [0.0, 0.0]);
        assert_eq!(reading.scores("no number", target)[0].filtered, "[invalid]");
    }

    #[test]
    fn an_answer_without_a_result_is_refused() {
        let read = |answer: &str| {
            serde_json::from_value::<Problem>(json!({"question": "How many?", "answer": answer}))
        };
        assert!(read("6 + 6\n#### 12").is_ok());
        let fault = read("6 + 6 = 12").err().map(|fault| fault.to_string()).unwrap_or_default();
        assert!(fault.contains("does not end in `#### `"), "{fault}");
    }
}
