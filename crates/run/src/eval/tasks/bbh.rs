//! BIG-Bench Hard (Suzgun et al., arXiv 2210.09261): 27 tasks, three worked examples each.
//!
//! As lm-evaluation-harness asks: `bbh_cot_fewshot` lets the model think step by step (greedy, up
//! to `</s>`, `Q`, a blank line or 1,024 tokens) and reads what stands between `the answer is ` and
//! the line's last character; `bbh_fewshot` gives the examples' answers alone and compares the text
//! as it is (`none`), to which `stripped` adds the comparison without surrounding spaces.
//!
//! Files are the authors' `bbh/TASK.json` (or `tasks/TASK.json`), or `TASK/test-*.parquet` as in the
//! hub's `lukaemon/bbh`; tasks without a file are left out. The prompts are the authors'
//! `cot-prompts/TASK.txt`, from a folder beside the files or else the published ones, which are part
//! of the program.

use crate::eval::error::{Error, Result};
use crate::eval::filter::{INVALID, Pick, extract, pattern};
use crate::eval::prompt::{Prompt, Reader};
use crate::eval::task::{
    Answer, Family, Files, Group, Info, Item, Metric, Opened, Remote, Score, Settings, Task, Work,
    hex, locate_split, object, shards,
};
use fancy_regex::Regex;
use serde::Deserialize;
use serde_json::json;
use std::path::{Path, PathBuf};

macro_rules! tasks {
    ($($task:ident),* $(,)?) => {
        /// Every task, with its prompt file as published.
        const TASKS: [(&str, &str); 27] = [$((
            stringify!($task),
            include_str!(concat!("../../../data/bbh-prompts/", stringify!($task), ".txt")),
        )),*];
    };
}

tasks! {
    boolean_expressions,
    causal_judgement,
    date_understanding,
    disambiguation_qa,
    dyck_languages,
    formal_fallacies,
    geometric_shapes,
    hyperbaton,
    logical_deduction_five_objects,
    logical_deduction_seven_objects,
    logical_deduction_three_objects,
    movie_recommendation,
    multistep_arithmetic_two,
    navigate,
    object_counting,
    penguins_in_a_table,
    reasoning_about_colored_objects,
    ruin_names,
    salient_translation_error_detection,
    snarks,
    sports_understanding,
    temporal_sequences,
    tracking_shuffled_objects_five_objects,
    tracking_shuffled_objects_seven_objects,
    tracking_shuffled_objects_three_objects,
    web_of_lies,
    word_sorting,
}

const STOPS: [&str; 3] = ["</s>", "Q", "\n\n"];
const ANSWER: &str = "(?<=the answer is )(.*)(?=.)";
const STEPS: &str = "A: Let's think step by step.";
const EXPECTED: &str = "an object with `examples`, a list of objects with the texts `input` and \
                        `target`";

/// With and without a chain of thought.
pub(crate) static FAMILY: Bbh = Bbh;

pub(crate) struct Bbh;

/// The two ways of asking: name, whether the model thinks first, version.
const WAYS: [(&str, bool, f64); 2] = [("bbh_cot_fewshot", true, 4.0), ("bbh_fewshot", false, 2.0)];

impl Family for Bbh {
    fn names(&self) -> Vec<String> {
        let of_way = |(way, ..): (&str, bool, f64)| {
            let parts = TASKS.iter().map(move |(task, _)| format!("{way}_{task}"));
            std::iter::once(way.to_owned()).chain(parts).collect::<Vec<_>>()
        };
        WAYS.into_iter().flat_map(of_way).collect()
    }

    fn summary(&self) -> &'static str {
        "BIG-Bench Hard, 27 tasks behind three examples, with or without a chain of thought"
    }

    fn remote(&self, name: &str, _: &Settings) -> Option<Remote> {
        let (_, one) = split(name);
        let wanted = TASKS.iter().filter(|(task, _)| one.is_none_or(|one| one == *task));
        let splits = wanted.map(|(task, _)| ((*task).to_owned(), "test")).collect();
        Some(Remote { repository: "lukaemon/bbh", revision: "main", splits })
    }

    fn open(&self, name: &str, settings: &Settings, _: &Reader<'_>) -> Result<Opened> {
        let ((way, thinks, version), one) = split(name);
        let folders = [settings.data.join("bbh"), settings.data.clone()];
        let within = |folder: &PathBuf| [folder.join("tasks"), folder.join("bbh"), folder.clone()];
        let mut places = folders.iter().flat_map(within);
        let Some(place) = places.find(|place| TASKS.iter().any(|(task, _)| has(place, task)))
        else {
            return Err(Error::MissingData {
                task: name.to_owned(),
                what: "TASK.json files".to_owned(),
                looked: folders.iter().map(|folder| folder.join("tasks")).collect(),
            });
        };
        let mut prompts = folders.iter().map(|folder| folder.join("cot-prompts"));
        let prompts = prompts.find(|folder| folder.exists());
        let mut opened = Opened::default();
        let mut absent = Vec::new();
        for (task, published) in TASKS {
            let wanted = one.map_or_else(|| has(&place, task), |one| one == task);
            if !wanted {
                absent.push(format!("{way}_{task}"));
                continue;
            }
            let single = vec![place.join(format!("{task}.json"))];
            let paths = locate_split(name, "examples", single, &[place.join(task)], "test")?;
            let file = format!("{task}.txt");
            let prompt = match &prompts {
                Some(folder) => PromptText::File(folder.join(file)),
                None => PromptText::Published(file, published),
            };
            let named = format!("{way}_{task}");
            let source = Source { paths, prompt };
            opened.tasks.push(Box::new(source.open(named, thinks, version, settings)?));
        }
        if one.is_none() {
            let members = opened.tasks.iter().map(|task| task.info().name.clone()).collect();
            opened.groups.push(Group { name: way.to_owned(), members, absent });
        }
        Ok(opened)
    }
}

/// A name's way of asking, and its task if it is not the whole group's.
fn split(name: &str) -> ((&'static str, bool, f64), Option<&str>) {
    let way = WAYS.into_iter().find(|(way, ..)| name.starts_with(way)).unwrap_or(WAYS[0]);
    (way, name.strip_prefix(way.0).and_then(|part| part.strip_prefix('_')))
}

/// Whether `folder` has the questions of `task`.
fn has(folder: &Path, task: &str) -> bool {
    folder.join(format!("{task}.json")).exists() || !shards(&folder.join(task), "test").is_empty()
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
            let (question, reasoning) = part
                .split_once(&format!("\n{STEPS}"))
                .ok_or_else(|| fault("an example lacks the line `A: Let's think step by step.`"))?;
            examples.push((question.to_owned(), reasoning.trim_start().to_owned()));
        }
        if examples.is_empty() {
            return Err(fault("holds no example; expected `Q: …` and `A: …` behind a blank line"));
        }
        Ok(Self { description: format!("{description}\n\n"), examples })
    }
}

/// Where a task's prompt file is.
enum PromptText {
    File(PathBuf),
    /// Part of the program: its name and text.
    Published(String, &'static str),
}

impl PromptText {
    fn path(&self) -> &Path {
        match self {
            Self::File(path) => path,
            Self::Published(name, _) => Path::new(name),
        }
    }

    fn read(&self, files: &mut Files) -> Result<String> {
        match self {
            Self::File(path) => files.read(path),
            Self::Published(name, text) => {
                files.hashes.insert(name.clone(), hex(text.as_bytes()));
                Ok((*text).to_owned())
            }
        }
    }
}

/// The files of one task.
struct Source {
    paths: Vec<PathBuf>,
    prompt: PromptText,
}

impl Source {
    fn questions(&self, files: &mut Files) -> Result<Vec<Question>> {
        match &self.paths[..] {
            [path] if path.extension().is_some_and(|ending| ending == "json") => {
                let text = files.read(path)?;
                let questions: Questions = serde_json::from_str(&text).map_err(|error| {
                    let message = format!("{error}; expected {EXPECTED}");
                    Error::malformed(path, Some(error.line()), message)
                })?;
                Ok(questions.examples)
            }
            paths => {
                let expected = "the texts `input` and `target`";
                let rows = files.objects::<Question>(paths, expected, None)?.0;
                Ok(rows.into_iter().map(|(_, question)| question).collect())
            }
        }
    }

    fn open(self, name: String, thinks: bool, version: f64, settings: &Settings) -> Result<Asked> {
        let mut files = Files::default();
        let questions = self.questions(&mut files)?;
        let worked = Worked::parse(self.prompt.path(), &self.prompt.read(&mut files)?)?;
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
                return Err(Error::malformed(self.prompt.path(), None, message));
            }
            Ok((asked(question), answer))
        });
        let prompt = Prompt {
            description: worked.description.clone(),
            shots: examples.collect::<Result<_>>()?,
            question: String::new(),
            answer_delimiter: if thinks { "" } else { " " }.into(),
            ..Prompt::default()
        };
        let original = questions.len();
        let limit = settings.limit.unwrap_or(usize::MAX);
        let items = (questions.into_iter().take(limit).enumerate())
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
            None => [text, text.trim()].map(|read| Score::of(read == item.target, read)).to_vec(),
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
    fn the_published_prompts_have_three_examples_with_answers() {
        let reading = pattern(ANSWER);
        for (task, text) in TASKS {
            let worked = Worked::parse(Path::new(task), text).unwrap();
            assert_eq!(worked.examples.len(), 3, "{task}");
            for (question, reasoning) in &worked.examples {
                assert!(!question.is_empty() && question.trim() == question, "{task}");
                assert_ne!(extract(&reading, Pick::Last, reasoning), INVALID, "{task}");
            }
        }
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
