//! The per-sample log: one JSON object a line, written as answers come in, from which an
//! interrupted run goes on.
//!
//! Only one process has a log open. The first line says which run it belongs to. A line whose prompt is no longer asked is not used.

use super::error::{Error, Result};
use super::task::{Answer, Item, Metric, Score};
use fs_err::{File, OpenOptions};
use hydralora_files::Lock;
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Model, task, record.
type Key = (String, String, usize);

/// An open log.
pub struct Log {
    path: PathBuf,
    file: File,
    _lock: Lock,
    known: HashMap<Key, (String, Value)>,
}

impl Log {
    /// Opens `path`, reading what an earlier run with the same `fingerprint` left there.
    ///
    /// # Errors
    /// If the file belongs to another run or is no log, which is then as it was, or if another
    /// process has it open.
    pub fn open(path: &Path, fingerprint: &Value) -> Result<Self> {
        let fault = |message: String| Error::Log { path: path.to_path_buf(), message };
        let foreign = || fault("is no log of samples; name another file".to_owned());
        let lock = Lock::file(path)?;
        let bytes = if path.exists() { hydralora_files::read(path)? } else { Vec::new() };
        let header = line_of(&json!({"run": fingerprint}));
        // A run that was killed, or found the disk full, may have left half a line, cut inside a
        // character. Of a file without a whole line only that can be told which begins as ours.
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        if whole == 0 && !header.as_bytes().starts_with(&bytes) {
            return Err(foreign());
        }
        let mut lines = bytes[..whole].split_inclusive(|byte| *byte == b'\n').enumerate();
        let mut known = HashMap::new();
        let mut fresh = true;
        if let Some((_, first)) = lines.next() {
            let found: Value = serde_json::from_slice(first).map_err(|_| foreign())?;
            let Some(run) = found.get("run") else { return Err(foreign()) };
            if run != fingerprint {
                let message = "belongs to a run with another model, adapter, template or seed; \
                               remove it or name another file";
                return Err(fault(message.to_owned()));
            }
            fresh = false;
        }
        for (index, line) in lines {
            let row: Value = serde_json::from_slice(line)
                .map_err(|error| Error::malformed(path, Some(index + 1), error.to_string()))?;
            let text = |key: &str| row[key].as_str().map(str::to_owned);
            if let (Some(model), Some(task), Some(id), Some(prompt)) =
                (text("model"), text("task"), row["doc_id"].as_u64(), text("prompt_hash"))
            {
                known.insert((model, task, id as usize), (prompt, row["scores"].clone()));
            }
        }
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        if whole < bytes.len() {
            file.set_len(whole as u64)?;
        }
        let mut log = Self { path: path.to_path_buf(), file, _lock: lock, known };
        if fresh {
            log.write(&json!({"run": fingerprint}))?;
        }
        Ok(log)
    }

    fn write(&mut self, row: &Value) -> Result<()> {
        Ok(self.file.write_all(line_of(row).as_bytes())?)
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

fn line_of(row: &Value) -> String {
    format!("{row}\n")
}
