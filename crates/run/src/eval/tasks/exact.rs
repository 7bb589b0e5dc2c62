//! Written answers compared with the right ones, over any file of prompts and answers.
//!
//! `--tasks exact:FILE`, in any of the formats that training reads: the last answer of a record is
//! asked for, greedily, and compared without reasoning and surrounding spaces (`none`), and also in lower case
//! without punctuation and repeated spaces (`normalised`). Where no answer of the file has a line
//! break, writing ends at the first one.

use super::loss::record_files;
use crate::eval::error::{Error, Result};
use crate::eval::prompt::{Conversation, Prompt, Reader};
use crate::eval::task::{
    Answer, Family, Info, Item, Metric, Opened, Score, Settings, Task, Work, hex, object,
};
use hydralora_data::{Body, SourceConfig, read_source, without_reasoning};
use serde_json::json;
use std::path::Path;

/// The only member of its family.
pub(crate) static FAMILY: ExactFamily = ExactFamily;

pub(crate) struct ExactFamily;

impl Family for ExactFamily {
    fn names(&self) -> Vec<String> {
        vec!["exact".to_owned()]
    }

    fn takes_file(&self) -> bool {
        true
    }

    fn summary(&self) -> &'static str {
        "written answers that equal the right ones, over any file of prompts: exact:FILE"
    }

    fn open(&self, name: &str, settings: &Settings, _: &Reader<'_>) -> Result<Opened> {
        settings.examples(name, 0, 0)?;
        let mut opened = Opened::default();
        for path in record_files(name, &settings.data, "records as for training")? {
            let metrics = ["none", "normalised"].map(|f| Metric::new("exact_match", f)).to_vec();
            let items = records(&SourceConfig::new(&path))?;
            let breaks = items.iter().any(|item| item.target.contains('\n'));
            let (info, items) = written(name, &path, metrics, items, breaks, settings)?;
            opened.tasks.push(Box::new(Exact { info, items }));
        }
        Ok(opened)
    }
}

/// What a file's questions ask for: texts written greedily, at most `--limit` of them. Behind plain
/// prompts they end at the first line break unless a right answer `breaks` lines.
pub(super) fn written(
    name: &str,
    path: &Path,
    metrics: Vec<Metric>,
    mut items: Vec<Item>,
    breaks: bool,
    settings: &Settings,
) -> Result<(Info, Vec<Item>)> {
    let max_new_tokens = settings.new_tokens(256)?;
    let plain = items.iter().all(|item| item.prompt.conversation.is_none());
    let stops: Vec<String> = (plain && !breaks).then(|| "\n".to_owned()).into_iter().collect();
    let info = Info {
        name: format!("{name}_{}", path.file_stem().unwrap_or_default().to_string_lossy()),
        version: 1.0,
        shots: 0,
        output_type: "generate_until",
        metrics,
        config: object(json!({
            "generation_kwargs": {
                "until": stops, "do_sample": false, "temperature": 0.0,
                "max_gen_toks": max_new_tokens,
            },
        })),
        data: [(path.display().to_string(), hex(&hydralora_files::read(path)?))].into(),
        original: items.len(),
    };
    items.truncate(settings.limit.unwrap_or(usize::MAX));
    for item in &mut items {
        item.work = Work::Write {
            stops: stops.clone(),
            max_new_tokens,
            repeats: 1,
            temperature: 0.0,
            top_p: 1.0,
        };
    }
    Ok((info, items))
}

/// The questions of a file; how they are asked is filled in later.
pub(super) fn records(source: &SourceConfig) -> Result<Vec<Item>> {
    let mut items = Vec::new();
    for record in read_source(source, Path::new(""))?.records {
        let missing = || {
            let expected = "has no answer; expected a prompt and an answer";
            Error::malformed(&record.location.path, Some(record.location.line), expected)
        };
        let (prompt, target) = match &record.body {
            Body::Completion { prompt, completion } => {
                (Prompt::plain(prompt.clone()), completion.clone())
            }
            Body::Chat(turns) => {
                let last = turns.iter().rposition(|turn| turn.is_assistant());
                let last = last.filter(|last| *last > 0).ok_or_else(missing)?;
                let variables = record.variables.clone();
                let conversation = Some(Conversation { turns: turns[..last].to_vec(), variables });
                (Prompt { conversation, ..Prompt::plain("") }, turns[last].content.clone())
            }
            Body::Text(_) => return Err(missing()),
        };
        items.push(Item {
            id: items.len(),
            record: json!({"row": record.row}),
            prompt,
            work: Work::Whole(Vec::new()),
            target: without_reasoning(&target).trim().to_owned(),
        });
    }
    Ok(items)
}

struct Exact {
    info: Info,
    items: Vec<Item>,
}

/// Lower case, without punctuation, with single spaces.
fn plain(text: &str) -> String {
    let kept: String = text.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
    kept.split_whitespace().collect::<Vec<_>>().join(" ")
}

impl Task for Exact {
    fn info(&self) -> &Info {
        &self.info
    }

    fn items(&self) -> &[Item] {
        &self.items
    }

    fn score(&self, item: &Item, answer: &Answer) -> Result<Vec<Score>> {
        let text = answer.texts().first().map_or("", String::as_str);
        let text = without_reasoning(text).trim();
        let normalised = plain(text);
        Ok(vec![
            Score::of(text == item.target, text),
            Score::of(normalised == plain(&item.target), normalised),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normalising_drops_case_punctuation_and_spaces() {
        assert_eq!(plain("  The  cat, sat.\n"), "the cat sat");
        assert_eq!(plain("..."), "");
    }
}
