//! Rank classification over any file of questions with options: the likeliest option counts, as T0
//! (arXiv 2110.08207) and FLAN (arXiv 2109.01652) evaluate.
//!
//! As lm-evaluation-harness's output type `multiple_choice`: compared are the options'
//! log-likelihoods behind the prompt and a delimiter, summed over their tokens (`acc`) and divided by
//! the number of characters of the option's text, without the delimiter (`acc_norm`); the first of
//! equal ones counts. Examples are drawn from the same file and domain by Python's generator,
//! seeded with `--seed`, afresh for every record: one more than wanted, less the question itself.
//!
//! A record is `{prompt, choices, answer}` with optional `domain` and `target_delimiter`, in any layout
//! that training reads. Where records name domains, each is a task and their mean is a group.

use super::loss::record_files;
use crate::eval::error::{Error, Result};
use crate::eval::prompt::{Prompt, Reader};
use crate::eval::python_random::PythonRandom;
use crate::eval::task::{
    Answer, Family, Files, Group, Info, Item, Metric, Opened, Score, Settings, Task, Work, largest,
    object,
};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// Names of the field with the question.
const PROMPTS: [&str; 5] = ["prompt", "question", "input", "query", "context"];
/// Names of the field with the options.
const OPTIONS: [&str; 3] = ["choices", "options", "endings"];
/// Names of the field with the right answer.
const ANSWERS: [&str; 4] = ["answer", "label", "gold", "answerKey"];
/// Between a prompt and an option.
const DELIMITER: &str = " ";

/// The only member of its family.
pub(crate) static FAMILY: ChoicesFamily = ChoicesFamily;

pub(crate) struct ChoicesFamily;

impl Family for ChoicesFamily {
    fn names(&self) -> Vec<String> {
        vec!["choices".to_owned()]
    }

    fn takes_file(&self) -> bool {
        true
    }

    fn summary(&self) -> &'static str {
        "the likeliest of each record's options, over any file of them: choices:FILE"
    }

    fn open(&self, name: &str, settings: &Settings, _: &Reader<'_>) -> Result<Opened> {
        let mut opened = Opened::default();
        for path in record_files(name, &settings.data, "records with a prompt, options, an answer")?
        {
            let mut files = Files::default();
            let questions = questions(&path, &mut files)?;
            let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            let whole = format!("{name}_{stem}");
            if questions.iter().all(|question| question.domain.is_none()) {
                let task = Choices::new(whole, None, questions, &files, settings)?;
                opened.tasks.push(Box::new(task));
                continue;
            }
            let mut domains: BTreeMap<String, Vec<Question>> = BTreeMap::new();
            for question in questions {
                // As in training, what names no domain has that of its file.
                let domain = question.domain.clone().unwrap_or_else(|| stem.clone());
                domains.entry(domain).or_default().push(question);
            }
            let mut members = Vec::new();
            for (domain, questions) in domains {
                let task = format!("{whole}_{domain}");
                members.push(task.clone());
                let task = Choices::new(task, Some(&domain), questions, &files, settings)?;
                opened.tasks.push(Box::new(task));
            }
            opened.groups.push(Group { name: whole, members, absent: Vec::new() });
        }
        Ok(opened)
    }
}

/// The questions of a file, which must hold one at least.
fn questions(path: &Path, files: &mut Files) -> Result<Vec<Question>> {
    let mut questions = Vec::new();
    files.rows(path, &mut |record| {
        questions.push(Question::read(record)?);
        Ok(())
    })?;
    if questions.is_empty() {
        let message = "is empty; expected records with a prompt, options and an answer";
        return Err(Error::malformed(path, None, message));
    }
    Ok(questions)
}

/// One question.
#[derive(Clone, Debug, PartialEq)]
struct Question {
    record: Map<String, Value>,
    text: String,
    options: Vec<String>,
    /// Index of the right option.
    answer: usize,
    delimiter: String,
    domain: Option<String>,
}

impl Question {
    /// Takes a record apart, or says which of its fields is wrong.
    fn read(record: Map<String, Value>) -> Result<Self, String> {
        let (name, value) = only(&record, &PROMPTS, "the question")?;
        let text = text(name, value)?.to_owned();
        let (name, value) = only(&record, &OPTIONS, "the options")?;
        let options = Options::read(name, value)?;
        let answers: Vec<(&str, usize)> = present(&record, &ANSWERS)
            .map(|(name, value)| Ok((name, options.resolve(name, value)?)))
            .collect::<Result<_, String>>()?;
        let Some(&(first, answer)) = answers.first() else {
            return Err(missing(&record, &ANSWERS, "the answer"));
        };
        if let Some((other, found)) = answers.iter().find(|(_, found)| *found != answer) {
            return Err(format!(
                "`{first}` names option {answer} and `{other}` option {found}, counted from 0; keep one of them"
            ));
        }
        let optional = |name: &'static str| {
            let value = record.get(name).filter(|value| !value.is_null());
            value.map(|value| text_of(name, value)).transpose()
        };
        let delimiter = optional("target_delimiter")?.unwrap_or_else(|| DELIMITER.to_owned());
        let domain = optional("domain")?.filter(|domain| !domain.is_empty());
        Ok(Self { text, options: options.texts, answer, delimiter, domain, record })
    }

    /// Whether `other` asks the same, so that its answer would give this one's away.
    fn is_asked_by(&self, other: &Self) -> bool {
        self.text == other.text
            && self.options.len() == other.options.len()
            && self.options.iter().all(|option| other.options.contains(option))
    }
}

/// The fields of these names that hold something.
fn present<'a>(
    record: &'a Map<String, Value>,
    names: &'static [&'static str],
) -> impl Iterator<Item = (&'static str, &'a Value)> {
    let of = |name: &&'static str| Some((*name, record.get(*name).filter(|v| !v.is_null())?));
    names.iter().filter_map(of)
}

fn missing(record: &Map<String, Value>, names: &[&str], what: &str) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
    let found: Vec<&str> = record.keys().map(String::as_str).collect();
    format!(
        "`{}` is missing; expected {what} under one of {}; the record has [{}]",
        names[0],
        quoted.join(", "),
        found.join(", ")
    )
}

/// The only field of these names, or the first of several that hold the same.
fn only<'a>(
    record: &'a Map<String, Value>,
    names: &'static [&'static str],
    what: &str,
) -> Result<(&'static str, &'a Value), String> {
    let mut found = present(record, names);
    let (name, value) = found.next().ok_or_else(|| missing(record, names, what))?;
    match found.find(|(_, other)| *other != value) {
        None => Ok((name, value)),
        Some((other, _)) => {
            Err(format!("`{name}` and `{other}` may both be {what}; keep one of them"))
        }
    }
}

fn text<'a>(name: &str, value: &'a Value) -> Result<&'a str, String> {
    value.as_str().ok_or_else(|| format!("`{name}` is {}; expected a text", kind(value)))
}

fn text_of(name: &str, value: &Value) -> Result<String, String> {
    text(name, value).map(str::to_owned)
}

/// A JSON value in words; of a long text its beginning.
fn kind(value: &Value) -> String {
    const SHOWN: usize = 60;
    match value {
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
        Value::String(text) => match text.char_indices().nth(SHOWN) {
            Some((end, _)) => json!(format!("{}…", &text[..end])).to_string(),
            None => value.to_string(),
        },
        other => other.to_string(),
    }
}

/// A record's options.
struct Options {
    texts: Vec<String>,
    /// What the record calls each, where it says so.
    labels: Option<Vec<String>>,
}

impl Options {
    /// Reads texts, texts with labels in two lists, or objects with both.
    fn read(name: &str, value: &Value) -> Result<Self, String> {
        const EXPECTED: &str =
            "expected a list of texts, or `{\"text\": [\"…\"], \"label\": [\"…\"]}`";
        let list = |name: &str, value: &Value| {
            let items = value.as_array().ok_or_else(|| {
                let found = if value.is_null() { "missing".to_owned() } else { kind(value) };
                format!("`{name}` is {found}; {EXPECTED}")
            })?;
            let texts = items.iter().enumerate();
            texts.map(|(at, item)| text_of(&format!("{name}[{at}]"), item)).collect()
        };
        let (texts, labels): (Vec<String>, Option<Vec<String>>) = match value {
            Value::Object(both) => {
                let labels = both.get("label").filter(|labels| !labels.is_null());
                let labels = labels.map(|labels| list(&format!("{name}.label"), labels));
                let texts = both.get("text").unwrap_or(&Value::Null);
                (list(&format!("{name}.text"), texts)?, labels.transpose()?)
            }
            Value::Array(items) if items.iter().any(Value::is_object) => {
                let part = |key: &str| -> Result<Vec<String>, String> {
                    let of = |(at, item): (usize, &Value)| {
                        text_of(&format!("{name}[{at}].{key}"), &item[key])
                    };
                    items.iter().enumerate().map(of).collect()
                };
                (part("text")?, Some(part("label")?))
            }
            other => (list(name, other)?, None),
        };
        if texts.len() < 2 {
            let count = if texts.is_empty() { "no option" } else { "one option" };
            return Err(format!("`{name}` has {count}; expected two or more"));
        }
        if let Some(at) = texts.iter().position(String::is_empty) {
            return Err(format!("`{name}[{at}]` is empty; expected a text"));
        }
        distinct(name, "options", &texts)?;
        if let Some(labels) = &labels {
            if labels.len() != texts.len() {
                let (some, all) = (labels.len(), texts.len());
                return Err(format!(
                    "`{name}` has {all} texts and {some} labels; expected as many"
                ));
            }
            distinct(name, "labels", labels)?;
        }
        Ok(Self { texts, labels })
    }

    /// The option that an answer names: a number is an index from 0; a text is a label, the text of an
    /// option, or, where options have no such label, a letter or an index. An answer that names two is
    /// refused.
    fn resolve(&self, name: &str, value: &Value) -> Result<usize, String> {
        let count = self.texts.len();
        let label = |text: &str| self.labels.as_ref()?.iter().position(|label| label == text);
        let index = |text: &str| text.parse().ok().filter(|index| *index < count);
        let mut found: Vec<(usize, &str)> = Vec::new();
        match value {
            Value::Number(number) => {
                // Tables of numbers with gaps hold whole numbers as 2.0.
                let whole = number.as_f64().filter(|value| value.fract() == 0.0);
                let text = whole.map_or(String::new(), |value| format!("{value}"));
                found.extend(label(&text).map(|at| (at, "a label")));
                found.extend(index(&text).map(|at| (at, "an index")));
            }
            Value::String(text) => {
                let text = text.trim();
                found.extend(label(text).map(|at| (at, "a label")));
                let same = |(_, option): &(usize, &String)| option.trim() == text;
                let texts = self.texts.iter().enumerate().filter(same);
                found.extend(texts.map(|(at, _)| (at, "the text")));
                if self.labels.is_none() || found.is_empty() {
                    found.extend(letter(text).filter(|at| *at < count).map(|at| (at, "a letter")));
                    found.extend(index(text).map(|at| (at, "an index")));
                }
            }
            _ => {}
        }
        let Some(&(chosen, how)) = found.first() else {
            let last = count - 1;
            let letters = (b'A' + last.min(25) as u8) as char;
            let shown = kind(value);
            return Err(format!(
                "`{name}` is {shown}, which names none of the {count} options; expected 0 to {last}, A to \
                 {letters}, a label, or an option's text"
            ));
        };
        match found.iter().find(|(other, _)| *other != chosen) {
            None => Ok(chosen),
            Some((other, why)) => Err(format!(
                "`{name}` is {}, which is {how} of option {chosen} and {why} of option {other}, counted \
                 from 0; write the option's text or its index so that it names one",
                kind(value)
            )),
        }
    }
}

fn letter(text: &str) -> Option<usize> {
    match text.as_bytes() {
        [letter] if letter.is_ascii_alphabetic() => {
            Some(usize::from(letter.to_ascii_uppercase() - b'A'))
        }
        _ => None,
    }
}

/// Refuses a list that says one thing twice.
fn distinct(name: &str, what: &str, texts: &[String]) -> Result<(), String> {
    for (at, text) in texts.iter().enumerate() {
        if let Some(first) = texts[..at].iter().position(|earlier| earlier == text) {
            return Err(format!(
                "`{name}`: {what} {first} and {at}, counted from 0, are both {}; expected each once",
                kind(&json!(text))
            ));
        }
    }
    Ok(())
}

/// Examples for the question `id`, drawn as the harness draws from the records that it asks: none
/// asks the same.
fn examples<'a>(
    random: &mut PythonRandom,
    questions: &'a [Question],
    id: usize,
    shots: usize,
) -> Option<Vec<&'a Question>> {
    if shots == 0 {
        return Some(Vec::new());
    }
    let other = |at: &usize| !questions[id].is_asked_by(&questions[*at]);
    let drawn = random.sample(questions.len(), shots + 1);
    let mut kept: Vec<usize> = drawn.into_iter().filter(other).take(shots).collect();
    if kept.len() < shots {
        // Of a file that asks something twice, both were drawn.
        let pool: Vec<usize> = (0..questions.len()).filter(other).collect();
        if pool.len() < shots {
            return None;
        }
        kept = random.sample(pool.len(), shots).into_iter().map(|at| pool[at]).collect();
    }
    Some(kept.into_iter().map(|at| &questions[at]).collect())
}

struct Choices {
    info: Info,
    items: Vec<Item>,
}

impl Choices {
    fn new(
        name: String,
        domain: Option<&str>,
        questions: Vec<Question>,
        files: &Files,
        settings: &Settings,
    ) -> Result<Self> {
        let shots = settings.examples(&name, 0, questions.len() - 1)?;
        let mut random = PythonRandom::new(settings.seed);
        let mut items = Vec::new();
        for (id, question) in
            questions.iter().enumerate().take(settings.limit.unwrap_or(usize::MAX))
        {
            let drawn = examples(&mut random, &questions, id, shots);
            let drawn = drawn.ok_or_else(|| Error::Option {
                option: "shots",
                message: format!("is {shots}; `{name}` has fewer that ask something else"),
            })?;
            let of = |example: &Question| {
                (example.text.clone(), example.options[example.answer].clone())
            };
            items.push(Item {
                id,
                record: Value::Object(question.record.clone()),
                prompt: Prompt {
                    description: String::new(),
                    shots: drawn.into_iter().map(of).collect(),
                    question: question.text.clone(),
                    answer_delimiter: question.delimiter.clone().into(),
                    ..Prompt::default()
                },
                work: Work::Choices {
                    delimiter: question.delimiter.clone().into(),
                    choices: question.options.clone(),
                },
                target: question.options[question.answer].clone(),
            });
        }
        let delimiters: Vec<&str> = questions.iter().map(|q| q.delimiter.as_str()).collect();
        let same = delimiters.iter().all(|delimiter| *delimiter == delimiters[0]);
        let config = json!({
            "domain": domain,
            "target_delimiter": if same { delimiters[0] } else { "each record's own" },
            "fewshot_delimiter": "\n\n",
            "fewshot_config": {"sampler": "default", "split": "the same", "seed": settings.seed},
        });
        let info = Info {
            name,
            version: 1.0,
            shots,
            output_type: "multiple_choice",
            metrics: ["acc", "acc_norm"].map(|metric| Metric::new(metric, "none")).to_vec(),
            config: object(config),
            data: files.hashes.clone(),
            original: questions.len(),
        };
        Ok(Self { info, items })
    }
}

impl Task for Choices {
    fn info(&self) -> &Info {
        &self.info
    }

    fn items(&self) -> &[Item] {
        &self.items
    }

    fn score(&self, item: &Item, answer: &Answer) -> Result<Vec<Score>> {
        let (Answer::Choices(scored), Work::Choices { choices, .. }) = (answer, &item.work) else {
            return Ok(Vec::new());
        };
        let sums = scored.iter().map(|scored| scored.log_likelihood);
        let means = sums.clone().zip(choices).map(|(sum, text)| sum / text.chars().count() as f64);
        let chosen = [largest(sums), largest(means)].map(|at| &choices[at]);
        Ok(chosen.map(|chosen| Score::of(*chosen == item.target, chosen.as_str())).to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::engine::Scored;

    fn read(record: Value) -> Result<Question, String> {
        Question::read(object(record))
    }

    fn answer(options: Value, answer: Value) -> Result<usize, String> {
        read(json!({"prompt": "?", "choices": options, "answer": answer})).map(|q| q.answer)
    }

    #[test]
    fn the_usual_spellings_give_the_same_question() {
        let wanted = read(json!({"prompt": "Sky?", "choices": ["red", "blue"], "answer": 1}));
        let same = |record: Value| {
            let question = read(record.clone()).unwrap_or_else(|fault| panic!("{record}: {fault}"));
            let wanted = wanted.as_ref().unwrap();
            assert_eq!(
                (&question.text, &question.options, question.answer, &*question.delimiter),
                (&wanted.text, &wanted.options, 1, " "),
                "{record}"
            );
        };
        for prompt in PROMPTS {
            for options in OPTIONS {
                for answer in ANSWERS {
                    for right in
                        [json!(1), json!("1"), json!(1.0), json!("B"), json!("b"), json!("blue")]
                    {
                        same(json!({prompt: "Sky?", options: ["red", "blue"], answer: right}));
                    }
                }
            }
        }
        // AI2's ARC and CommonsenseQA, and CommonsenseQA as first published.
        let two = json!({"text": ["red", "blue"], "label": ["A", "B"]});
        same(json!({"question": "Sky?", "choices": two, "answerKey": "B"}));
        let two = json!({"text": ["red", "blue"], "label": ["1", "2"]});
        same(json!({"question": "Sky?", "choices": two, "answerKey": "2"}));
        let two = json!([{"text": "red", "label": "A"}, {"text": "blue", "label": "B"}]);
        same(json!({"question": "Sky?", "choices": two, "answerKey": "B"}));
        // HellaSwag says everything twice, and a field of null says nothing.
        same(
            json!({"query": "Sky?", "question": "Sky?", "input": null, "choices": ["red", "blue"],
                    "endings": ["red", "blue"], "label": "1", "gold": 1}),
        );
    }

    #[test]
    fn what_could_be_read_in_two_ways_is_refused() {
        let fault = |result: Result<usize, String>, expected: &str| {
            let fault = result.unwrap_err();
            assert!(fault.contains(expected), "{fault}");
        };
        fault(
            answer(json!(["B", "A"]), json!("A")),
            "the text of option 1 and a letter of option 0",
        );
        fault(answer(json!(["3", "4", "1"]), json!("1")), "an index of option 1");
        assert_eq!(answer(json!(["3", "4", "1"]), json!(1)), Ok(1), "a number is an index");
        assert_eq!(answer(json!(["0", "1"]), json!("1")), Ok(1), "both say the same");
        let numbered = json!({"text": ["a", "b"], "label": ["1", "2"]});
        fault(answer(numbered.clone(), json!(1)), "a label of option 0 and an index of option 1");
        assert_eq!(answer(numbered, json!("1")), Ok(0), "a label comes before an index");
        fault(
            answer(json!(["no ", "no"]), json!("no")),
            "the text of option 0 and the text of option 1",
        );
        fault(
            read(json!({"question": "a", "context": "b", "choices": ["x", "y"], "answer": 0}))
                .map(|q| q.answer),
            "`question` and `context` may both be the question",
        );
        fault(
            read(json!({"prompt": "a", "choices": ["x", "y"], "answer": 0, "label": 1}))
                .map(|q| q.answer),
            "`answer` names option 0 and `label` option 1",
        );
    }

    #[test]
    fn wrong_records_name_the_field_and_what_was_expected() {
        let cases = [
            (
                json!({"choices": ["x", "y"], "answer": 0}),
                "`prompt` is missing; expected the question",
            ),
            (
                json!({"prompt": "?", "answer": 0}),
                "`choices` is missing; expected the options under one of",
            ),
            (
                json!({"prompt": "?", "choices": ["x", "y"]}),
                "`answer` is missing; expected the answer",
            ),
            (
                json!({"prompt": 7, "choices": ["x", "y"], "answer": 0}),
                "`prompt` is 7; expected a text",
            ),
            (json!({"prompt": "?", "choices": "xy", "answer": 0}), "expected a list of texts, or"),
            (
                json!({"prompt": "?", "choices": {"label": ["A"]}, "answer": 0}),
                "`choices.text` is missing",
            ),
            (
                json!({"prompt": "?", "choices": ["x", 2], "answer": 0}),
                "`choices[1]` is 2; expected a text",
            ),
            (json!({"prompt": "?", "choices": [], "answer": 0}), "`choices` has no option"),
            (
                json!({"prompt": "?", "options": ["x"], "answer": 0}),
                "`options` has one option; expected two",
            ),
            (json!({"prompt": "?", "choices": ["x", ""], "answer": 0}), "`choices[1]` is empty"),
            (
                json!({"prompt": "?", "choices": ["x", "y", "x"], "answer": 0}),
                "options 0 and 2, counted from 0, are both \"x\"",
            ),
            (
                json!({"prompt": "?", "choices": ["x", "y"], "answer": 2}),
                "`answer` is 2, which names none of the 2 options; expected 0 to 1, A to B",
            ),
            (json!({"prompt": "?", "choices": ["x", "y"], "answer": -1}), "expected 0 to 1"),
            (json!({"prompt": "?", "choices": ["x", "y"], "answer": 0.5}), "expected 0 to 1"),
            (json!({"prompt": "?", "choices": ["x", "y"], "answer": "C"}), "`answer` is \"C\""),
            (json!({"prompt": "?", "choices": ["x", "y"], "answer": [0]}), "`answer` is a list"),
            (json!({"prompt": "?", "choices": ["x", "y"], "answer": true}), "`answer` is true"),
            (
                json!({"prompt": "?", "choices": {"text": ["x", "y"], "label": ["A"]}, "answer": 0}),
                "2 texts and 1 labels",
            ),
            (
                json!({"prompt": "?", "choices": ["x", "y"], "answer": 0, "domain": 3}),
                "`domain` is 3; expected a text",
            ),
            (
                json!({"prompt": "?", "choices": ["x", "y"], "answer": 0, "target_delimiter": 3}),
                "`target_delimiter` is 3",
            ),
        ];
        for (record, expected) in cases {
            let fault = read(record.clone()).unwrap_err();
            assert!(fault.contains(expected), "{record}: {fault}");
        }
    }

    fn task(options: &[&str], right: usize) -> Choices {
        let record = json!({"prompt": "?", "choices": options, "answer": right});
        let settings = Settings {
            data: "".into(),
            shots: None,
            limit: None,
            seed: 1,
            repeats: None,
            temperature: None,
            max_new_tokens: None,
            allow_code_execution: false,
            context: 64,
        };
        let questions = vec![read(record).unwrap()];
        Choices::new("choices_x".to_owned(), None, questions, &Files::default(), &settings).unwrap()
    }

    #[test]
    fn the_first_of_equal_options_counts_and_characters_divide() {
        let chosen = |options: &[&str], sums: &[f64]| {
            let task = task(options, 0);
            let scored = sums.iter().map(|&log_likelihood| Scored {
                log_likelihood,
                greedy: false,
                tokens: 1,
            });
            let scores = task.score(&task.items[0], &Answer::Choices(scored.collect())).unwrap();
            assert!(scores.iter().all(|s| (s.value == 1.0) == (s.filtered == options[0])));
            [scores[0].filtered.clone(), scores[1].filtered.clone()]
        };
        // -3/1 against -4/10: the shorter is likelier, the longer likelier a character.
        assert_eq!(chosen(&["x", "elephants!"], &[-3.0, -4.0]), ["x", "elephants!"]);
        assert_eq!(chosen(&["ab", "cd"], &[-3.0, -3.0]), ["ab", "ab"], "the first of equal sums");
        assert_eq!(
            chosen(&["abcd", "cd"], &[-4.0, -2.0]),
            ["cd", "abcd"],
            "the first of equal means"
        );
        // Four bytes are two characters: by bytes the first would be first, -3/4 against -2/2.
        assert_eq!(chosen(&["éé", "cd"], &[-3.0, -2.0])[1], "cd");
    }

    #[test]
    fn no_question_is_its_own_example() {
        let ask =
            |text: &str| read(json!({"prompt": text, "choices": ["x", "y"], "answer": 0})).unwrap();
        let mut questions: Vec<Question> =
            (0..6).map(|number| ask(&format!("{number}?"))).collect();
        questions.push(Question { options: vec!["y".into(), "x".into()], ..ask("0?") });
        let mut random = PythonRandom::new(1234);
        for id in (0..questions.len()).cycle().take(70) {
            let drawn = examples(&mut random, &questions, id, 4).unwrap();
            assert_eq!(drawn.len(), 4);
            assert!(drawn.iter().all(|example| example.text != questions[id].text));
            let mut texts: Vec<&str> = drawn.iter().map(|q| q.text.as_str()).collect();
            texts.sort_unstable();
            texts.dedup();
            assert!(texts.len() >= 3, "each record once");
        }
        assert!(examples(&mut random, &questions, 0, 6).is_none(), "five others and itself twice");
        assert_eq!(examples(&mut random, &questions, 1, 6).unwrap().len(), 6);
    }
}
