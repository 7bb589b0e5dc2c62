//! Held-out loss in nats per answer token, one task a domain, over any file that training reads.
//!
//! `--tasks loss:FILE`, or `--tasks loss --data FILE-or-folder`. Which tokens count is what training
//! would count: answers, not prompts. Records longer than the context lose their end.

use crate::encoder::ModelEncoder;
use crate::eval::error::{Error, Result};
use crate::eval::prompt::{Prompt, Reader};
use crate::eval::task::{
    Answer, Family, Group, Info, Item, Metric, Opened, Score, Settings, Task, Work, hex, object,
};
use hydralora_data::{DataConfig, Dataset, SourceConfig};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The only member of its family.
pub(crate) static FAMILY: LossFamily = LossFamily;

pub(crate) struct LossFamily;

impl Family for LossFamily {
    fn names(&self) -> Vec<String> {
        vec!["loss".to_owned()]
    }

    fn takes_file(&self) -> bool {
        true
    }

    fn summary(&self) -> &'static str {
        "loss per answer token and domain, over any training file: loss:FILE"
    }

    fn open(&self, name: &str, settings: &Settings, reader: &Reader<'_>) -> Result<Opened> {
        settings.examples(name, 0, 0)?;
        let mut data = BTreeMap::new();
        let mut sources = Vec::new();
        for path in record_files(name, &settings.data, "records as for training")? {
            data.insert(path.display().to_string(), hex(&hydralora_files::read(&path)?));
            sources.push(SourceConfig::new(path));
        }
        let config = DataConfig {
            train: sources,
            valid_fraction: 0.0,
            max_seq_len: settings.context,
            ..DataConfig::default()
        };
        let encoder = ModelEncoder(reader.tokenizer);
        let template = reader.template.or(reader.record_template);
        let dataset = Dataset::load(&config, Path::new(""), &encoder, template, settings.seed)?;
        let mut tasks: Vec<DomainLoss> = (dataset.domains.iter())
            .map(|domain| DomainLoss {
                info: Info {
                    name: format!("loss_{domain}"),
                    version: 1.0,
                    shots: 0,
                    output_type: "loglikelihood",
                    metrics: vec![Metric {
                        higher_is_better: false,
                        ..Metric::new("loss", "none")
                    }],
                    config: object(json!({
                        "domain": domain,
                        "unit": "nats per answer token",
                        "max_seq_len": settings.context,
                        "chat_template": dataset.template.as_ref().map(|t| t.source()),
                    })),
                    data: data.clone(),
                    original: 0,
                },
                items: Vec::new(),
            })
            .collect();
        for example in dataset.train.iter() {
            let example = example?;
            let task = &mut tasks[example.domain as usize];
            task.info.original += 1;
            if settings.limit.is_some_and(|limit| task.items.len() >= limit) {
                continue;
            }
            task.items.push(Item {
                id: task.items.len(),
                record: json!({"source": example.source, "row": example.row}),
                prompt: Prompt::plain(""),
                work: Work::Loss { tokens: example.tokens, labels: example.labels },
                target: String::new(),
            });
        }
        tasks.retain(|task| !task.items.is_empty());
        let members = tasks.iter().map(|task| task.info.name.clone()).collect();
        Ok(Opened {
            tasks: tasks.into_iter().map(|task| Box::new(task) as Box<dyn Task>).collect(),
            groups: vec![Group { name: name.to_owned(), members, absent: Vec::new() }],
        })
    }
}

/// The file, or the files of records in the folder, at `path`.
pub(super) fn record_files(task: &str, path: &Path, records: &str) -> Result<Vec<PathBuf>> {
    if path.is_file() {
        return Ok(vec![path.to_path_buf()]);
    }
    let mut files = Vec::new();
    if path.is_dir() {
        for entry in fs_err::read_dir(path)? {
            let path = entry?.path();
            if path.extension().is_some_and(|ending| ending == "jsonl" || ending == "json") {
                files.push(path);
            }
        }
        files.sort();
    }
    if files.is_empty() {
        let what = match path.to_str() {
            Some("") => "no file is named".to_owned(),
            _ => format!("{} is no file and no folder with .jsonl or .json files", path.display()),
        };
        let message = format!("`{task}`: {what}; expected `{task}:FILE`, {records}");
        return Err(Error::Option { option: "tasks", message });
    }
    Ok(files)
}

struct DomainLoss {
    info: Info,
    items: Vec<Item>,
}

impl Task for DomainLoss {
    fn info(&self) -> &Info {
        &self.info
    }

    fn items(&self) -> &[Item] {
        &self.items
    }

    fn score(&self, _: &Item, answer: &Answer) -> Result<Vec<Score>> {
        let Answer::Loss(sum, tokens) = answer else { return Ok(Vec::new()) };
        let weight = *tokens as f64;
        Ok(vec![Score { value: sum / weight.max(1.0), weight, filtered: String::new() }])
    }
}
