//! MMLU as OpenCompass's PPL mode asks it without examples (`mmlu_ppl`, with a `ZeroRetriever`),
//! which is how HydraLoRA's paper measured.
//!
//! Each answer's whole text, `…about  {subject}.\n\n{question}\nA. …\nD. …\nAnswer: {letter}`
//! (two spaces, as there), is scored by its mean loss `−Σ log p / n` over its `n` tokens, of which
//! the first has no prediction; the least loss counts.

use super::mmlu::{self, LETTERS};
use crate::eval::error::{Error, Result};
use crate::eval::prompt::{Prompt, Reader};
use crate::eval::task::{
    Answer, Family, Files, Info, Item, Metric, Opened, Remote, Score, Settings, Task, Work,
    largest, object,
};
use serde_json::json;
use std::path::Path;

/// OpenCompass's prompts and mean losses.
pub(crate) static FAMILY: MmluPpl = MmluPpl;

pub(crate) struct MmluPpl;

impl Family for MmluPpl {
    fn names(&self) -> Vec<String> {
        mmlu::names("mmlu_ppl")
    }

    fn remote(&self, name: &str, settings: &Settings) -> Option<Remote> {
        Some(mmlu::remote("mmlu_ppl", name, &Settings { shots: None, ..settings.clone() }))
    }

    fn summary(&self) -> &'static str {
        "MMLU without examples: the least mean loss, as OpenCompass's PPL mode asks"
    }

    fn open(&self, name: &str, settings: &Settings, reader: &Reader<'_>) -> Result<Opened> {
        reader.refuse_template(name, "compares whole texts, of which none is an answer")?;
        settings.examples(name, 0, 0)?;
        if reader.template.is_some() {
            return Err(Error::Option {
                option: "apply-chat-template",
                message: format!("`{name}` compares plain texts; leave the template out"),
            });
        }
        mmlu::open("mmlu_ppl", name, settings, |name, subject, folder| {
            Ok(Box::new(Subject::open(name, subject, folder, settings)?))
        })
    }
}

struct Subject {
    info: Info,
    items: Vec<Item>,
}

impl Subject {
    fn open(name: String, subject: &str, folder: &Path, settings: &Settings) -> Result<Self> {
        let mut files = Files::default();
        let questions = mmlu::questions(&name, folder, subject, "test", &mut files)?;
        let hint = format!(
            "The following are multiple choice questions (with answers) about  {}.\n\n",
            subject.replace('_', " ")
        );
        let original = questions.len();
        let asked = questions.into_iter().take(settings.limit.unwrap_or(usize::MAX));
        let items = asked
            .enumerate()
            .map(|(id, question)| {
                let [a, b, c, d] = &question.choices;
                let stem =
                    format!("{hint}{}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer: ", question.text);
                Item {
                    id,
                    record: question.record(),
                    work: Work::Whole(
                        LETTERS.iter().map(|letter| format!("{stem}{letter}")).collect(),
                    ),
                    prompt: Prompt::plain(stem),
                    target: LETTERS[question.answer].to_owned(),
                }
            })
            .collect();
        let config = json!({
            "dataset_name": subject,
            "doc_to_choice": LETTERS,
            "scoring": "least mean loss of the whole text",
        });
        let info = Info {
            name,
            version: 1.0,
            shots: 0,
            output_type: "loglikelihood",
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
        let Answer::Whole(losses) = answer else { return Ok(Vec::new()) };
        let chosen = LETTERS[largest(losses.iter().map(|loss| -loss))];
        Ok(vec![Score::of(chosen == item.target, chosen)])
    }
}
