//! Results in the layout of lm-evaluation-harness, with what is needed to get them again.

use super::error::{Error, Result};
use super::metrics::{Weighted, mean, pooled_stderr, stderr};
use super::task::{Group, Metric, Settings, Task};
use super::{Base, Scores, Subject};
use serde_json::{Map, Value, json};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// One number of the table.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// Task or group.
    pub task: String,
    /// Whether it is a group.
    pub group: bool,
    /// `acc,none` and the like.
    pub metric: String,
    /// The mean.
    pub value: f64,
    /// Its standard error, if there are two records or more.
    pub stderr: Option<f64>,
    /// Records.
    pub records: usize,
    /// Examples before each question.
    pub shots: usize,
}

/// What one task's records scored under one metric.
struct Column {
    task: String,
    metric: Metric,
    scores: Vec<Weighted>,
    shots: usize,
}

/// Results of one model.
pub struct Results {
    /// The model's name.
    pub name: String,
    /// Every number, groups first.
    pub lines: Vec<Line>,
    columns: Vec<Column>,
    sections: Map<String, Value>,
}

impl Results {
    pub(super) fn new(subject: &Subject<'_>, base: Base<'_>, settings: &Settings) -> Self {
        let mut config = json!({
            "model": subject.name,
            "identity": subject.identity,
            "dtype": base.decoder.dtype().to_string(),
            "limit": settings.limit,
            "seed": settings.seed,
            "end_tokens": base
                .end_ids
                .iter()
                .filter_map(|&id| base.reader.tokenizer.id_to_token(id))
                .collect::<Vec<_>>(),
        });
        if let (Value::Object(config), Value::Object(reading)) =
            (&mut config, base.reader.describe())
        {
            config.extend(reading);
        }
        let mut sections = Map::new();
        for key in [
            "results",
            "groups",
            "group_subtasks",
            "group_subtasks_absent",
            "configs",
            "versions",
            "n-shot",
            "higher_is_better",
            "n-samples",
        ] {
            sections.insert(key.to_owned(), json!({}));
        }
        sections.insert("config".to_owned(), config);
        sections.insert("scores".to_owned(), json!({}));
        Self { name: subject.name.clone(), lines: Vec::new(), columns: Vec::new(), sections }
    }

    fn set(&mut self, section: &str, key: &str, value: Value) {
        self.sections[section][key] = value;
    }

    pub(super) fn add(&mut self, task: &dyn Task, scores: Scores, first_prompt: String) {
        let info = task.info();
        let name = info.name.as_str();
        let mut results = json!({"alias": name, "sample_len": task.items().len()});
        let mut raw = json!({});
        raw["doc_id"] = task.items().iter().map(|item| item.id).collect();
        let mut better = json!({});
        for (index, metric) in info.metrics.iter().enumerate() {
            let column: Vec<Weighted> = scores
                .iter()
                .map(|scores| Weighted { value: scores[index].value, weight: scores[index].weight })
                .collect();
            results[metric.key()] = json!(mean(&column));
            results[metric.stderr_key()] = stderr(&column).map_or(json!("N/A"), |e| json!(e));
            better[&metric.name] = json!(metric.higher_is_better);
            raw[metric.key()] = column.iter().map(|score| score.value).collect();
            if column.iter().any(|score| score.weight != 1.0) {
                raw["weight"] = column.iter().map(|score| score.weight).collect();
            }
            self.columns.push(Column {
                task: name.to_owned(),
                metric: metric.clone(),
                scores: column,
                shots: info.shots,
            });
        }
        let mut config = json!({
            "task": name,
            "output_type": info.output_type,
            "num_fewshot": info.shots,
            "metric_list": info
                .metrics
                .iter()
                .map(|m| json!({"metric": m.name, "filter": m.filter,
                                "higher_is_better": m.higher_is_better}))
                .collect::<Vec<_>>(),
            "first_prompt": first_prompt,
            "data_sha256": info.data,
            "metadata": {"version": info.version},
        });
        if let Value::Object(config) = &mut config {
            config.extend(info.config.clone());
        }
        self.set("results", name, results);
        self.set("configs", name, config);
        self.set("versions", name, json!(info.version));
        self.set("n-shot", name, json!(info.shots));
        self.set("higher_is_better", name, better);
        let counts = json!({"original": info.original, "effective": task.items().len()});
        self.set("n-samples", name, counts);
        self.set("scores", name, raw);
    }

    pub(super) fn finish(&mut self, groups: &[Group], elapsed: Duration) {
        let mut lines = Vec::new();
        for group in groups {
            let members = json!(group.members);
            self.set("group_subtasks", &group.name, members);
            if !group.absent.is_empty() {
                self.set("group_subtasks_absent", &group.name, json!(group.absent));
            }
            let mut entry = json!({"alias": group.name});
            let of_group = |column: &&Column| group.members.contains(&column.task);
            let columns: Vec<&Column> = self.columns.iter().filter(of_group).collect();
            let mut metrics: Vec<&Metric> = columns.iter().map(|column| &column.metric).collect();
            metrics.dedup_by(|a, b| a.key() == b.key());
            let mut keys: Vec<&Metric> = Vec::new();
            for metric in metrics {
                if !keys.iter().any(|known| known.key() == metric.key()) {
                    keys.push(metric);
                }
            }
            for metric in keys {
                let parts: Vec<&&Column> =
                    columns.iter().filter(|column| column.metric == *metric).collect();
                let all: Vec<Weighted> =
                    parts.iter().flat_map(|column| column.scores.iter().copied()).collect();
                let error = if all.iter().all(|score| score.weight == 1.0) {
                    let of_part =
                        |part: &&&Column| Some((stderr(&part.scores)?, part.scores.len()));
                    let parts: Option<Vec<_>> = parts.iter().map(of_part).collect();
                    parts.and_then(|parts| pooled_stderr(&parts))
                } else {
                    stderr(&all)
                };
                entry[metric.key()] = json!(mean(&all));
                entry[metric.stderr_key()] = error.map_or(json!("N/A"), |error| json!(error));
                lines.push(Line {
                    task: group.name.clone(),
                    group: true,
                    metric: metric.key(),
                    value: mean(&all),
                    stderr: error,
                    records: all.len(),
                    shots: parts.first().map_or(0, |part| part.shots),
                });
            }
            self.set("results", &group.name, entry.clone());
            self.set("groups", &group.name, entry);
        }
        lines.extend(self.columns.iter().map(|column| Line {
            task: column.task.clone(),
            group: false,
            metric: column.metric.key(),
            value: mean(&column.scores),
            stderr: stderr(&column.scores),
            records: column.scores.len(),
            shots: column.shots,
        }));
        self.lines = lines;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.sections.insert("date".to_owned(), json!(now.as_secs_f64()));
        self.sections.insert(
            "total_evaluation_time_seconds".to_owned(),
            json!(format!("{:.3}", elapsed.as_secs_f64())),
        );
        self.sections.insert("hydralora_version".to_owned(), json!(env!("CARGO_PKG_VERSION")));
    }

    /// Adds a section of what was measured beside the scores.
    pub fn note(&mut self, section: &str, value: Value) {
        self.sections.insert(section.to_owned(), value);
    }

    /// The results file.
    pub fn to_json(&self) -> Value {
        Value::Object(self.sections.clone())
    }

    /// Writes the results file, whole or not at all.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn save(&self, path: &Path) -> Result<()> {
        let text = format!("{:#}\n", self.to_json());
        hydralora_files::write_file(path, text.as_bytes()).map_err(Error::Io)
    }
}
