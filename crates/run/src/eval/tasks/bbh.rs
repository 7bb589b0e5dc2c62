//! BIG-Bench Hard (Suzgun et al., arXiv 2210.09261): 27 tasks, three worked examples each.
//!
//! As lm-evaluation-harness asks: `bbh_cot_fewshot` lets the model think step by step (greedy, up
//! to `</s>`, `Q`, a blank line or 1,024 tokens) and reads what stands between `the answer is ` and
//! the line's last character; `bbh_fewshot` gives the examples' answers alone and compares the text
//! as it is (`none`), to which `stripped` adds the comparison without surrounding spaces.
//!
//! Files are the authors' `bbh/TASK.json` (or `tasks/TASK.json`) and `cot-prompts/TASK.txt`; tasks
//! without a file are left out.

use crate::eval::error::{Error, Result};
use crate::eval::filter::{INVALID, Pick, extract, pattern};
use crate::eval::prompt::{Prompt, Reader};
use crate::eval::task::{
    Answer, Family, Files, Group, Info, Item, Metric, Opened, Score, Settings, Task, Work, locate,
    object,
};
use fancy_regex::Regex;
use serde::Deserialize;
use serde_json::json;
use std::path::{Path, PathBuf};

/// Every task.
const TASKS: [&str; 27] = [
    "boolean_expressions",
    "causal_judgement",
    "date_understanding",
    "disambiguation_qa",
    "dyck_languages",
    "formal_fallacies",
    "geometric_shapes",
    "hyperbaton",
    "logical_deduction_five_objects",
    "logical_deduction_seven_objects",
    "logical_deduction_three_objects",
    "movie_recommendation",
    "multistep_arithmetic_two",
    "navigate",
    "object_counting",
    "penguins_in_a_table",
    "reasoning_about_colored_objects",
    "ruin_names",
    "salient_translation_error_detection",
    "snarks",
    "sports_understanding",
    "temporal_sequences",
    "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects",
    "tracking_shuffled_objects_three_objects",
    "web_of_lies",
    "word_sorting",
];

const STOPS: [&str; 3] = ["</s>", "Q", "\n\n"];
const ANSWER: &str = "(?<=the answer is )(.*)(?=.)";
const STEPS: &str = "A: Let's think step by step.";
const EXPECTED: &str = "an object with `examples`, a list of objects with the texts `input` and \
                        `target`";

/// With and without a chain of thought.
pub(crate) static FAMILY: Bbh = Bbh;

pub(crate) struct Bbh;

/// The two ways of asking: name, whether the model thinks first, version.
const WAYS: [(&str, bool, f64); 2] =
    [("bbh_cot_fewshot", true, 4.0), ("bbh_fewshot", false, 2.0)];

impl Family for Bbh {
    fn names(&self) -> Vec<String> {
        let of_way = |(way, ..): (&str, bool, f64)| {
            let parts = TASKS.iter().map(move |task| format!("{way}_{task}"));
            std::iter::once(way.to_owned()).chain(parts).collect::<Vec<_>>()
        };
        WAYS.into_iter().flat_map(of_way).collect()
    }

    fn summary(&self) -> &'static str {
        "BIG-Bench Hard, 27 tasks behind three examples, with or without a chain of thought"
    }

    fn open(&self, name: &str, settings: &Settings, _: &Reader<'_>) -> Result<Opened> {
        let (way, thinks, version) =
            WAYS.into_iter().find(|(way, ..)| name.starts_with(way)).unwrap_or(WAYS[0]);
        let folders = [settings.data.join("bbh"), settings.data.clone()];
        let inside: Vec<PathBuf> = (folders.iter())
            .flat_map(|folder| [folder.join("tasks"), folder.join("bbh"), folder.clone()])
            .filter(|folder| TASKS.iter().any(|task| folder.join(format!("{task}.json")).exists()))
            .collect();
        let Some(tasks) = inside.first() else {
            return Err(Error::MissingData {
                task: name.to_owned(),
                what: "TASK.json files".to_owned(),
                looked: folders.iter().map(|folder| folder.join("tasks")).collect(),
            });
        };
        let places: Vec<PathBuf> = folders.iter().map(|f| f.join("cot-prompts")).collect();
        let prompts = locate(name, "folder `cot-prompts`", places)?;
        let one = name.strip_prefix(way).and_then(|part| part.strip_prefix('_'));
        let mut opened = Opened::default();
        for task in TASKS.into_iter().filter(|task| one.is_none_or(|one| one == *task)) {
            let file = tasks.join(format!("{task}.json"));
            if one.is_none() && !file.exists() {
                continue;
            }
            let file = locate(name, "examples", vec![file])?;
            let source = Source { file, prompt: prompts.join(format!("{task}.txt")) };
            let named = format!("{way}_{task}");
            opened.tasks.push(Box::new(source.open(named, thinks, version, settings)?));
        }
        if one.is_none() {
            let members = opened.tasks.iter().map(|task| task.info().name.clone()).collect();
            opened.groups.push(Group { name: way.to_owned(), members });
        }
        Ok(opened)
    }
}

#[derive(Deserialize)]
struct Questions {
    examples: Vec<Question>,
}

#[derive(Deserialize)]
struct Question {
    input: String,
    target: String,
}

/// The description and the worked examples of a prompt file: question, reasoning.
#[derive(Debug, PartialEq, Eq)]
struct Worked {
    description: String,
    examples: Vec<(String, String)>,
}

impl Worked {
    /// Reads a file of three parts: a canary above a line of dashes, the description, examples
    /// `Q: …\nA: Let's think step by step.\n…` apart by blank lines.
    fn parse(path: &Path, text: &str) -> Result<Self> {
        let fault = |message: &str| Error::malformed(path, None, message);
        let text = text.split_once("-----\n").map_or(text, |(_, text)| text).trim_end();
        let mut parts = text.split("\n\nQ: ");
        let description = parts.next().unwrap_or_default();
        let mut examples = Vec::new();
        for part in parts {
            let (question, reasoning) = part.split_once(&format!("\n{STEPS}")).ok_or_else(|| {
                fault("an example lacks the line `A: Let's think step by step.`")
            })?;
            examples.push((question.to_owned(), reasoning.trim_start().to_owned()));
        }
        if examples.is_empty() {
            return Err(fault("holds no example; expected `Q: …` and `A: …` behind a blank line"));
        }
        Ok(Self { description: format!("{description}\n\n"), examples })
    }
}

/// The files of one task.
struct Source {
    file: PathBuf,
    prompt: PathBuf,
}

impl Source {
    fn open(self, name: String, thinks: bool, version: f64, settings: &Settings) -> Result<Asked> {
        let mut files = Files::default();
        let text = files.read(&self.file)?;
        let questions: Questions = serde_json::from_str(&text).map_err(|error| {
            let message = format!("{error}; expected {EXPECTED}");
            Error::malformed(&self.file, Some(error.line()), message)
        })?;
        let worked = Worked::parse(&self.prompt, &files.read(&self.prompt)?)?;
        let shots = settings.examples(&name, worked.examples.len(), worked.examples.len())?;
        let max_new_tokens = settings.new_tokens(if thinks { 1024 } else { 256 })?;
        let reading = pattern(ANSWER);
        let asked = |question: &str| match thinks {
            true => format!("Q: {question}\n{STEPS}\n"),
            false => format!("Q: {question}\nA:"),
        };
        let examples = worked.examples.iter().take(shots).map(|(question, reasoning)| {
            let answer = match thinks {
                true => reasoning.clone(),
                false => extract(&reading, Pick::Last, reasoning),
            };
            if answer == INVALID {
                let message = "an example does not say `the answer is …`";
                return Err(Error::malformed(&self.prompt, None, message));
            }
            Ok((asked(question), answer))
        });
        let prompt = Prompt {
            description: worked.description.clone(),
            shots: examples.collect::<Result<_>>()?,
            question: String::new(),
            answer_delimiter: if thinks { "" } else { " " },
            conversation: None,
        };
        let original = questions.examples.len();
        let limit = settings.limit.unwrap_or(usize::MAX);
        let items = (questions.examples.into_iter().take(limit).enumerate())
            .map(|(id, question)| Item {
                id,
                record: json!({"input": question.input, "target": question.target}),
                prompt: Prompt { question: asked(&question.input), ..prompt.clone() },
                work: Work::Write {
                    stops: STOPS.map(str::to_owned).to_vec(),
                    max_new_tokens,
                    repeats: 1,
                    temperature: 0.0,
                    top_p: 1.0,
                },
                target: question.target,
            })
            .collect();
        let filters = match thinks {
            true => json!([{"name": "get-answer", "regex_pattern": ANSWER, "group_select": 0}]),
            false => json!([{"name": "none"}, {"name": "stripped"}]),
        };
        let config = json!({
            "generation_kwargs": {
                "until": STOPS, "do_sample": false, "temperature": 0.0, "max_gen_toks": max_new_tokens,
            },
            "filter_list": filters,
            "fewshot_config": {"sampler": "first_n"},
        });
        let filters = if thinks { vec!["get-answer"] } else { vec!["none", "stripped"] };
        let info = Info {
            name,
            version,
            shots,
            output_type: "generate_until",
            metrics: filters.into_iter().map(|f| Metric::new("exact_match", f)).collect(),
            config: object(config),
            data: files.hashes,
            original,
        };
        Ok(Asked { info, items, reading: thinks.then_some(reading) })
    }
}

struct Asked {
    info: Info,
    items: Vec<Item>,
    /// How the answer is found in a chain of thought.
    reading: Option<Regex>,
}

impl Task for Asked {
    fn info(&self) -> &Info {
        &self.info
    }

    fn items(&self) -> &[Item] {
        &self.items
    }

    fn score(&self, item: &Item, answer: &Answer) -> Result<Vec<Score>> {
        let text = answer.texts().first().map_or("", String::as_str);
        Ok(match &self.reading {
            Some(reading) => {
                let read = extract(reading, Pick::First, text);
                vec![Score::of(read == item.target, read)]
            }
            None => [text, text.trim()]
                .map(|read| Score::of(read == item.target, read))
                .to_vec(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_is_what_follows_up_to_the_last_character() {
        let reading = pattern(ANSWER);
        let read = |text: &str| extract(&reading, Pick::First, text);
        assert_eq!(read("So the answer is (B).\nQ"), "(B)");
        assert_eq!(read("so the answer is Yes. Really."), "Yes. Really");
        assert_eq!(read("the answer is 5"), "", "one character is the one that is left out");
        assert_eq!(read("the answer is \nso the answer is no."), "no");
        assert_eq!(read("I do not know"), INVALID);
    }

    #[test]
    fn prompt_files_are_taken_apart() {
        let text = "canary\n-----\nFind it.\n\nQ: One?\nOptions:\n\n- a\nA: Let's think step by \
                    step.\nHm. So the answer is a.\n\nQ: Two?\nA: Let's think step by step. So the \
                    answer is b.\n";
        let worked = Worked::parse(Path::new("x"), text).unwrap();
        assert_eq!(worked.description, "Find it.\n\n");
        assert_eq!(worked.examples[0].0, "One?\nOptions:\n\n- a");
        assert_eq!(worked.examples[1].1, "So the answer is b.");
        assert!(Worked::parse(Path::new("x"), "nothing").is_err());
    }
}
