//! Where a run's numbers go: a line per event in `metrics.jsonl`, and TensorBoard.

use crate::error::Result;
use crate::event::{Event, Sink};
use crate::routing::Routing;
use serde_json::{Value, json};
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Name of the metrics file in a run's folder.
pub const METRICS_FILE: &str = "metrics.jsonl";

/// Appends to `metrics.jsonl`.
pub struct MetricsFile {
    path: PathBuf,
    file: File,
    resume: bool,
}

impl MetricsFile {
    /// Opens the file of a run, empty for a new one. What a resumed run finds beyond its checkpoint
    /// is cut when it starts.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn open(folder: &Path, resume: bool) -> Result<Self> {
        let path = folder.join(METRICS_FILE);
        if !resume {
            fs::write(&path, b"")?;
        }
        let file = OpenOptions::new().create(true).append(true).open(&path)?;
        Ok(Self { path, file, resume })
    }

    fn cut_after(&mut self, step: usize) -> Result<()> {
        let kept: Vec<Value> = read_metrics(&self.path)?
            .into_iter()
            .filter(|row| row["step"].as_u64().is_some_and(|at| at as usize <= step))
            .collect();
        let text: String = kept.iter().map(|row| format!("{row}\n")).collect();
        hydralora_model::durable::write_file(&self.path, text.as_bytes())?;
        self.file = OpenOptions::new().append(true).open(&self.path)?;
        Ok(())
    }
}

/// The rows of a metrics file. A last line that a crash cut short is left out.
///
/// # Errors
/// If the file cannot be read.
pub fn read_metrics(path: &Path) -> Result<Vec<Value>> {
    let lines = BufReader::new(File::open(path)?).lines();
    let mut rows = Vec::new();
    for line in lines {
        rows.extend(serde_json::from_str(&line?).ok());
    }
    Ok(rows)
}

impl Sink for MetricsFile {
    fn record(&mut self, event: &Event) -> Result<()> {
        let row = match event {
            Event::Started { step, .. } if self.resume => return self.cut_after(*step),
            Event::Started { .. } | Event::Saved { .. } => return Ok(()),
            Event::Step(metrics) => serde_json::to_value(metrics).unwrap_or_default(),
            Event::Evaluated { step, evaluation, best } => json!({
                "step": step, "valid_loss": evaluation.loss, "best": best,
                "valid_label_tokens": evaluation.label_tokens, "domains": evaluation.domains,
                "gate_entropy": evaluation.routing.as_ref().and_then(Routing::entropy),
                "gate_spread": evaluation.routing.as_ref().map(Routing::specialisation),
                "router_movement": evaluation.router_movement,
            }),
        };
        writeln!(self.file, "{row}")?;
        Ok(self.file.flush()?)
    }
}

/// Writes a TensorBoard event file: records framed as TFRecord (length, masked CRC-32C, payload,
/// masked CRC-32C), each an `Event` message with scalar summaries.
pub struct TensorBoard {
    file: File,
}

impl TensorBoard {
    /// A new event file in `folder`.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn create(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let name = format!("events.out.tfevents.{:010}.{}", now.as_secs(), std::process::id());
        let mut board = Self { file: File::create(folder.join(name))? };
        let mut event = Vec::new();
        double_field(1, now.as_secs_f64(), &mut event);
        bytes_field(3, b"brain.Event:2", &mut event);
        board.write(&event)?;
        Ok(board)
    }

    fn scalars(&mut self, step: usize, scalars: &[(String, f64)]) -> Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let event = scalar_event(now.as_secs_f64(), step as u64, scalars);
        self.write(&event)
    }

    fn write(&mut self, event: &[u8]) -> Result<()> {
        self.file.write_all(&frame(event))?;
        Ok(self.file.flush()?)
    }
}

impl Sink for TensorBoard {
    fn record(&mut self, event: &Event) -> Result<()> {
        match event {
            Event::Step(metrics) => self.scalars(
                metrics.step,
                &[
                    ("train/loss".to_owned(), metrics.loss),
                    ("train/learning_rate".to_owned(), metrics.learning_rate),
                    ("train/grad_norm".to_owned(), metrics.grad_norm),
                    ("train/tokens_per_s".to_owned(), metrics.tokens_per_s),
                ],
            ),
            Event::Evaluated { step, evaluation, .. } => {
                let mut scalars = vec![("valid/loss".to_owned(), evaluation.loss)];
                scalars.extend(
                    evaluation.domains.iter().map(|d| (format!("valid/loss_{}", d.domain), d.loss)),
                );
                self.scalars(*step, &scalars)
            }
            Event::Started { .. } | Event::Saved { .. } => Ok(()),
        }
    }
}

fn scalar_event(wall_time: f64, step: u64, scalars: &[(String, f64)]) -> Vec<u8> {
    let mut summary = Vec::new();
    for (tag, value) in scalars {
        let mut entry = Vec::new();
        bytes_field(1, tag.as_bytes(), &mut entry);
        entry.push(2 << 3 | 5);
        entry.extend((*value as f32).to_le_bytes());
        bytes_field(1, &entry, &mut summary);
    }
    let mut event = Vec::new();
    double_field(1, wall_time, &mut event);
    event.push(2 << 3);
    varint(step, &mut event);
    bytes_field(5, &summary, &mut event);
    event
}

fn varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 128 {
        out.push(value as u8 | 128);
        value >>= 7;
    }
    out.push(value as u8);
}

fn double_field(field: u8, value: f64, out: &mut Vec<u8>) {
    out.push(field << 3 | 1);
    out.extend(value.to_le_bytes());
}

fn bytes_field(field: u8, bytes: &[u8], out: &mut Vec<u8>) {
    out.push(field << 3 | 2);
    varint(bytes.len() as u64, out);
    out.extend(bytes);
}

fn frame(payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u64).to_le_bytes();
    let mut out = length.to_vec();
    out.extend(masked_crc(&length).to_le_bytes());
    out.extend(payload);
    out.extend(masked_crc(payload).to_le_bytes());
    out
}

fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xA282_EAD8)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that `torch.utils.tensorboard` writes for the same event.
    #[test]
    fn a_scalar_event_has_the_reference_bytes() {
        let event = scalar_event(1.5, 300, &[("loss".to_owned(), 0.25)]);
        let expected: [u8; 27] = [
            0x09, 0, 0, 0, 0, 0, 0, 0xF8, 0x3F, 0x10, 0xAC, 0x02, 0x2A, 13, 0x0A, 11, 0x0A, 4,
            b'l', b'o', b's', b's', 0x15, 0, 0, 0x80, 0x3E,
        ];
        assert_eq!(event, expected);
        let framed = frame(&event);
        assert_eq!(framed.len(), 8 + 4 + 27 + 4);
        // CRC-32C's check value, masked as TensorFlow does.
        assert_eq!(
            masked_crc(b"123456789"),
            0xE306_9283_u32.rotate_right(15).wrapping_add(0xA282_EAD8)
        );
    }
}
