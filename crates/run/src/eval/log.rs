//! The per-sample log: one JSON object a line, written as answers come in, from which an
//! interrupted run goes on.
//!
//! The first line says which run it belongs to. A line whose prompt is no longer asked is not used.

use super::error::{Error, Result};
use super::task::{Answer, Item, Metric, Score};
use fs_err::{File, OpenOptions};
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Model, task, record.
type Key = (String, String, usize);

/// An open log.
pub struct Log {
    path: PathBuf,
    file: File,
    known: HashMap<Key, (String, Value)>,
}

impl Log {
    /// Opens `path`, reading what an earlier run with the same `fingerprint` left there.
    ///
    /// # Errors
    /// If the file belongs to another run or is no log.
    pub fn open(path: &Path, fingerprint: &Value) -> Result<Self> {
        let fault = |message: String| Error::Log { path: path.to_path_buf(), message };
        let text = if path.exists() { fs_err::read_to_string(path)? } else { String::new() };
        // A run that was killed may have left half a line.
        let whole = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
        let mut lines = whole.lines().enumerate();
        let mut known = HashMap::new();
        let mut fresh = true;
        if let Some((_, first)) = lines.next() {
            let header: Value = serde_json::from_str(first)
                .map_err(|_| fault("is no log of samples; name another file".to_owned()))?;
            if header.get("run") != Some(fingerprint) {
                let message = "belongs to a run with another model, adapter, template or seed; \
                               remove it or name another file";
                return Err(fault(message.to_owned()));
            }
            fresh = false;
        }
        for (index, line) in lines {
            let row: Value = serde_json::from_str(line)
                .map_err(|error| Error::malformed(path, Some(index + 1), error.to_string()))?;
            let text = |key: &str| row[key].as_str().map(str::to_owned);
            if let (Some(model), Some(task), Some(id), Some(prompt)) =
                (text("model"), text("task"), row["doc_id"].as_u64(), text("prompt_hash"))
            {
                known.insert((model, task, id as usize), (prompt, row["scores"].clone()));
            }
        }
        let mut file = OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
        file.set_len(whole.len() as u64)?;
        file.seek(SeekFrom::End(0))?;
        let mut log = Self { path: path.to_path_buf(), file, known };
        if fresh {
            log.write(&json!({"run": fingerprint}))?;
        }
        Ok(log)
    }

    fn write(&mut self, row: &Value) -> Result<()> {
        let mut line = row.to_string();
        line.push('\n');
        self.file.write_all(line.as_bytes())?;
        Ok(())
    }

    /// The logged scores of a record, if it was asked the same then.
    pub(crate) fn scores(
        &self,
        model: &str,
        task: &str,
        id: usize,
        prompt_hash: &str,
        metrics: &[Metric],
    ) -> Option<Vec<Score>> {
        let (prompt, scores) = self.known.get(&(model.to_owned(), task.to_owned(), id))?;
        if prompt != prompt_hash {
            return None;
        }
        metrics
            .iter()
            .map(|metric| {
                let score = scores.get(metric.key())?;
                Some(Score {
                    value: score["value"].as_f64()?,
                    weight: score["weight"].as_f64()?,
                    filtered: score["filtered"].as_str()?.to_owned(),
                })
            })
            .collect()
    }

    /// Adds a scored record.
    pub(crate) fn add(
        &mut self,
        model: &str,
        task: &str,
        item: &Item,
        prompt_hash: &str,
        answer: &Answer,
        scores: &[(Metric, Score)],
    ) -> Result<()> {
        let scores: Map<String, Value> = scores
            .iter()
            .map(|(metric, score)| {
                let Score { value, weight, filtered } = score;
                let value = json!({"value": value, "weight": weight, "filtered": filtered});
                (metric.key(), value)
            })
            .collect();
        self.write(&json!({
            "model": model,
            "task": task,
            "doc_id": item.id,
            "doc": item.record,
            "target": item.target,
            "prompt_hash": prompt_hash,
            "resps": answer.to_json(),
            "scores": scores,
        }))
    }

    /// Flushes to disk.
    ///
    /// # Errors
    /// Whatever the file system says.
    pub fn sync(&self) -> Result<()> {
        Ok(self.file.sync_all()?)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}
