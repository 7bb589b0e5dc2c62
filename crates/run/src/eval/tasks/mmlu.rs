//! MMLU (Hendrycks et al., arXiv 2009.03300): four answers, the likeliest letter counts.
//!
//! The prompt is lm-evaluation-harness's: a line about the subject, the first examples of `dev`,
//! then `{question}\nA. …\nB. …\nC. …\nD. …\nAnswer:`; compared are the log-likelihoods of
//! ` A` to ` D`. No examples unless asked for. The mean of a group weighs subjects by size.
//!
//! Files are `test/SUBJECT_test.csv` and `dev/SUBJECT_dev.csv`, with the header
//! `question,choice0,choice1,choice2,choice3,answer` and answers 0–3, or, as first published,
//! without one and with answers A–D; or `SUBJECT/test-*.parquet` and `SUBJECT/dev-*.parquet`, as in
//! the hub's `cais/mmlu`.

use crate::eval::error::{Error, Result};
use crate::eval::prompt::{Prompt, Reader};
use crate::eval::task::{
    Answer, Family, Files, Group, Info, Item, Metric, Opened, Remote, Score, Settings, Task, Work,
    largest, locate_split, object, shards,
};
use serde::Deserialize;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// The letters of the answers.
pub(super) const LETTERS: [&str; 4] = ["A", "B", "C", "D"];

/// Category and its subjects.
pub(super) const CATEGORIES: &[(&str, &[&str])] = &[
    (
        "stem",
        &[
            "abstract_algebra",
            "anatomy",
            "astronomy",
            "college_biology",
            "college_chemistry",
            "college_computer_science",
            "college_mathematics",
            "college_physics",
            "computer_security",
            "conceptual_physics",
            "electrical_engineering",
            "elementary_mathematics",
            "high_school_biology",
            "high_school_chemistry",
            "high_school_computer_science",
            "high_school_mathematics",
            "high_school_physics",
            "high_school_statistics",
            "machine_learning",
        ],
    ),
    (
        "humanities",
        &[
            "formal_logic",
            "high_school_european_history",
            "high_school_us_history",
            "high_school_world_history",
            "international_law",
            "jurisprudence",
            "logical_fallacies",
            "moral_disputes",
            "moral_scenarios",
            "philosophy",
            "prehistory",
            "professional_law",
            "world_religions",
        ],
    ),
    (
        "social_sciences",
        &[
            "econometrics",
            "high_school_geography",
            "high_school_government_and_politics",
            "high_school_macroeconomics",
            "high_school_microeconomics",
            "high_school_psychology",
            "human_sexuality",
            "professional_psychology",
            "public_relations",
            "security_studies",
            "sociology",
            "us_foreign_policy",
        ],
    ),
    (
        "other",
        &[
            "business_ethics",
            "clinical_knowledge",
            "college_medicine",
            "global_facts",
            "human_aging",
            "management",
            "marketing",
            "medical_genetics",
            "miscellaneous",
            "nutrition",
            "professional_accounting",
            "professional_medicine",
            "virology",
        ],
    ),
];

/// The subsets that HydraLoRA's paper reports.
pub(super) const SUBSETS: &[(&str, &[&str])] = &[
    ("medical", &["clinical_knowledge", "professional_medicine", "college_medicine"]),
    ("law", &["professional_law", "international_law"]),
];

/// The harness's prompts and letters.
pub(crate) static FAMILY: Mmlu = Mmlu;

pub(crate) struct Mmlu;

impl Family for Mmlu {
    fn names(&self) -> Vec<String> {
        names("mmlu")
    }

    fn remote(&self, name: &str, settings: &Settings) -> Option<Remote> {
        Some(remote("mmlu", name, settings))
    }

    fn summary(&self) -> &'static str {
        "MMLU, 57 subjects: the likeliest letter, as lm-evaluation-harness asks"
    }

    fn open(&self, name: &str, settings: &Settings, _: &Reader<'_>) -> Result<Opened> {
        open("mmlu", name, settings, |name, subject, folder| {
            Ok(Box::new(Subject::open(name, subject, folder, settings)?))
        })
    }
}

/// All names under `prefix`: everything, categories, subsets, subjects.
pub(super) fn names(prefix: &str) -> Vec<String> {
    let parts = CATEGORIES.iter().chain(SUBSETS).map(|(name, _)| *name);
    let parts = parts.chain(subjects()).map(|part| format!("{prefix}_{part}"));
    std::iter::once(prefix.to_owned()).chain(parts).collect()
}

fn subjects() -> impl Iterator<Item = &'static str> {
    CATEGORIES.iter().flat_map(|(_, subjects)| subjects.iter().copied())
}

/// The subjects behind `name` where they form groups, with the groups' names.
fn groups(prefix: &str, name: &str) -> Vec<(&'static str, &'static [&'static str])> {
    match part(prefix, name) {
        None => CATEGORIES.to_vec(),
        Some(part) => {
            let mut groups = CATEGORIES.iter().chain(SUBSETS);
            groups.find(|(name, _)| *name == part).copied().into_iter().collect()
        }
    }
}

fn part<'a>(prefix: &str, name: &'a str) -> Option<&'a str> {
    name.strip_prefix(prefix).and_then(|part| part.strip_prefix('_'))
}

/// Where the hub has the subjects behind `name`.
pub(super) fn remote(prefix: &str, name: &str, settings: &Settings) -> Remote {
    let grouped = groups(prefix, name);
    let subjects: Vec<&str> = match part(prefix, name).filter(|_| grouped.is_empty()) {
        Some(subject) => vec![subject],
        None => grouped.into_iter().flat_map(|(_, subjects)| subjects.iter().copied()).collect(),
    };
    let mut wanted = vec!["test"];
    wanted.extend(settings.shots.is_some_and(|shots| shots > 0).then_some("dev"));
    let splits = subjects
        .into_iter()
        .flat_map(|subject| wanted.iter().map(move |split| (subject.to_owned(), *split)));
    Remote { repository: "cais/mmlu", revision: "main", splits: splits.collect() }
}

/// Opens the subjects behind `name` with `of_subject`, and the groups they form.
pub(super) fn open(
    prefix: &str,
    name: &str,
    settings: &Settings,
    of_subject: impl Fn(String, &str, &Path) -> Result<Box<dyn Task>>,
) -> Result<Opened> {
    let folder = folder(name, settings)?;
    let part = part(prefix, name);
    let named = |part: &str| format!("{prefix}_{part}");
    let whole = groups(prefix, name);
    if let (true, Some(subject)) = (whole.is_empty(), part) {
        let tasks = vec![of_subject(named(subject), subject, &folder)?];
        return Ok(Opened { tasks, groups: Vec::new() });
    }
    let mut opened = Opened::default();
    let mut all_absent = Vec::new();
    for (group, subjects) in whole {
        let (mut members, mut absent) = (Vec::new(), Vec::new());
        for subject in subjects {
            // A folder may hold only some of the subjects; what is there is scored.
            if has(&folder, subject) {
                members.push(named(subject));
                opened.tasks.push(of_subject(named(subject), subject, &folder)?);
            } else {
                absent.push(named(subject));
            }
        }
        all_absent.extend_from_slice(&absent);
        if !members.is_empty() {
            opened.groups.push(Group { name: named(group), members, absent });
        }
    }
    if opened.tasks.is_empty() {
        return Err(Error::MissingData {
            task: name.to_owned(),
            what: "file SUBJECT_test.csv of its subjects".to_owned(),
            looked: vec![folder.join("test")],
        });
    }
    if part.is_none() {
        let members = opened.tasks.iter().map(|task| task.info().name.clone()).collect();
        let name = prefix.to_owned();
        opened.groups.insert(0, Group { name, members, absent: all_absent });
    }
    Ok(opened)
}

fn folder(name: &str, settings: &Settings) -> Result<PathBuf> {
    let places = [settings.data.join("mmlu/test"), settings.data.join("test")];
    let folders = [settings.data.join("mmlu"), settings.data.clone()];
    let found = folders.into_iter().zip(&places).find(|(folder, test)| {
        test.exists() || subjects().any(|subject| !shards(&folder.join(subject), "test").is_empty())
    });
    found.map(|(folder, _)| folder).ok_or_else(|| Error::MissingData {
        task: name.to_owned(),
        what: "folder `test` with SUBJECT_test.csv files".to_owned(),
        looked: places.to_vec(),
    })
}

fn table(folder: &Path, subject: &str, split: &str) -> PathBuf {
    folder.join(format!("{split}/{subject}_{split}.csv"))
}

fn has(folder: &Path, subject: &str) -> bool {
    table(folder, subject, "test").exists() || !shards(&folder.join(subject), "test").is_empty()
}

/// The questions of one split of a subject, in whichever layout it is there.
pub(super) fn questions(
    name: &str,
    folder: &Path,
    subject: &str,
    split: &str,
    files: &mut Files,
) -> Result<Vec<Question>> {
    let what = if split == "test" { "questions" } else { "examples" };
    let places = vec![table(folder, subject, split)];
    let paths = locate_split(name, what, places, &[folder.join(subject)], split)?;
    if let [path] = &paths[..]
        && path.extension().is_some_and(|ending| ending == "csv")
    {
        return read(path, files);
    }
    let (rows, _) = files.objects::<Row>(&paths, Row::EXPECTED, None)?;
    rows.into_iter()
        .enumerate()
        .map(|(index, (_, row))| {
            if row.answer >= LETTERS.len() {
                let message =
                    format!("row {}: the answer is {}; expected 0 to 3", index + 1, row.answer);
                return Err(Error::malformed(&paths[0], None, message));
            }
            Ok(Question { text: row.question, choices: row.choices, answer: row.answer })
        })
        .collect()
}

/// A question as the hub has it.
#[derive(Deserialize)]
struct Row {
    question: String,
    choices: [String; 4],
    answer: usize,
}

impl Row {
    const EXPECTED: &str = "the text `question`, four `choices` and an `answer` of 0 to 3";
}

/// One question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Question {
    pub(super) text: String,
    pub(super) choices: [String; 4],
    /// Index of the right choice.
    pub(super) answer: usize,
}

impl Question {
    /// As the harness asks it.
    fn prompt(&self) -> String {
        let [a, b, c, d] = &self.choices;
        format!("{}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:", self.text.trim())
    }

    pub(super) fn record(&self) -> Value {
        json!({"question": self.text, "choices": self.choices, "answer": self.answer})
    }
}

/// Reads a file of questions in either layout.
pub(super) fn read(path: &Path, files: &mut Files) -> Result<Vec<Question>> {
    let text = files.read(path)?;
    let mut reader = csv::ReaderBuilder::new()
        .has_headers(false)
        .flexible(true)
        .from_reader(text.trim_start_matches('\u{feff}').as_bytes());
    let mut questions = Vec::new();
    for record in reader.records() {
        let line_of = |position: Option<&csv::Position>| position.map(|p| p.line() as usize);
        let record = record.map_err(|error| {
            Error::malformed(path, line_of(error.position()), error.to_string())
        })?;
        let line = line_of(record.position());
        let layout = "expected a question, four choices and an answer";
        let [text, choices @ .., answer] = &record.iter().collect::<Vec<_>>()[..] else {
            return Err(Error::malformed(path, line, format!("has one column; {layout}")));
        };
        let Ok(choices) = <[&str; 4]>::try_from(choices) else {
            let message = format!("has {} columns; {layout} (six columns)", record.len());
            return Err(Error::malformed(path, line, message));
        };
        if questions.is_empty() && *text == "question" && *answer == "answer" {
            continue;
        }
        let answer = answer.trim();
        let index = LETTERS.iter().position(|letter| *letter == answer);
        let index = index.or_else(|| answer.parse().ok().filter(|index| *index < LETTERS.len()));
        let index = index.ok_or_else(|| {
            let message = format!("the answer is `{answer}`; expected A, B, C or D, or 0 to 3");
            Error::malformed(path, line, message)
        })?;
        let choices = choices.map(str::to_owned);
        questions.push(Question { text: (*text).to_owned(), choices, answer: index });
    }
    if questions.is_empty() {
        return Err(Error::malformed(path, None, "holds no question"));
    }
    Ok(questions)
}

/// One subject's task.
struct Subject {
    info: Info,
    items: Vec<Item>,
}

impl Subject {
    fn open(name: String, subject: &str, folder: &Path, settings: &Settings) -> Result<Self> {
        let mut files = Files::default();
        let questions = questions(&name, folder, subject, "test", &mut files)?;
        let examples = match settings.shots {
            None | Some(0) => Vec::new(),
            Some(_) => self::questions(&name, folder, subject, "dev", &mut files)?,
        };
        let shots = settings.examples(&name, 0, examples.len())?;
        let shots_of = examples[..shots]
            .iter()
            .map(|example| (example.prompt(), LETTERS[example.answer].to_owned()));
        let prompt = Prompt {
            description: format!(
                "The following are multiple choice questions (with answers) about {}.\n\n",
                subject.replace('_', " ")
            ),
            shots: shots_of.collect(),
            question: String::new(),
            answer_delimiter: " ".into(),
            ..Prompt::default()
        };
        let original = questions.len();
        let asked = questions.into_iter().take(settings.limit.unwrap_or(usize::MAX));
        let items = asked
            .enumerate()
            .map(|(id, question)| Item {
                id,
                record: question.record(),
                prompt: Prompt { question: question.prompt(), ..prompt.clone() },
                work: Work::Choices {
                    delimiter: " ".into(),
                    choices: LETTERS.map(str::to_owned).to_vec(),
                },
                target: LETTERS[question.answer].to_owned(),
            })
            .collect();
        let config = json!({
            "dataset_name": subject,
            "doc_to_choice": LETTERS,
            "target_delimiter": " ",
            "fewshot_config": {"sampler": "first_n", "split": "dev"},
        });
        let info = Info {
            name,
            version: 1.0,
            shots,
            output_type: "multiple_choice",
            metrics: vec![Metric::new("acc", "none")],
            config: object(config),
            data: files.hashes,
            original,
        };
        Ok(Self { info, items })
    }
}

impl Task for Subject {
    fn info(&self) -> &Info {
        &self.info
    }

    fn items(&self) -> &[Item] {
        &self.items
    }

    fn score(&self, item: &Item, answer: &Answer) -> Result<Vec<Score>> {
        let Answer::Choices(scored) = answer else { return Ok(Vec::new()) };
        let chosen = LETTERS[largest(scored.iter().map(|scored| scored.log_likelihood))];
        Ok(vec![Score::of(chosen == item.target, chosen)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Vec<Question>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x_test.csv");
        std::fs::write(&path, text).unwrap();
        read(&path, &mut Files::default())
    }

    #[test]
    fn there_are_57_subjects_in_four_categories() {
        assert_eq!(subjects().count(), 57);
        for (_, subset) in SUBSETS {
            assert!(subset.iter().all(|name| subjects().any(|subject| subject == *name)));
        }
    }

    #[test]
    fn both_layouts_give_the_same_questions() {
        let rows = "\"What, then?\",1,2,\"a \"\"b\"\"\",4";
        let header = "question,choice0,choice1,choice2,choice3,answer\n";
        let with = parsed(&format!("{header}{rows},2\n")).unwrap();
        let without = parsed(&format!("{rows},C\n")).unwrap();
        assert_eq!(with, without);
        assert_eq!(with[0].choices[2], "a \"b\"");
        assert_eq!(with[0].prompt(), "What, then?\nA. 1\nB. 2\nC. a \"b\"\nD. 4\nAnswer:");
    }

    #[test]
    fn wrong_rows_are_named() {
        let message = |text: &str| parsed(text).unwrap_err().to_string();
        let out_of_range = message("a,1,2,3,4,A\nb,1,2,3,4,E\n");
        assert!(out_of_range.contains("line 2: the answer is `E`"), "{out_of_range}");
        assert!(message("a,1,2,3,4,4\n").contains("expected A, B, C or D, or 0 to 3"));
        assert!(message("a,1,2,A\n").contains("has 4 columns"));
        assert!(message("").contains("holds no question"));
    }
}
