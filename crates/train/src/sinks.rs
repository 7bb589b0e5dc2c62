//! Where a run's numbers go: a line per event in `metrics.jsonl` and in `metrics.csv`, and TensorBoard.

mod table;

use crate::error::Result;
use crate::event::{Event, Sink};
use crate::heads::HeadSummary;
use crate::routing::Routing;
use serde_json::{Value, json};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};
pub use table::{COLUMNS, Columns};

/// Name of the metrics file in a run's folder.
pub const METRICS_FILE: &str = "metrics.jsonl";

/// Name of the same as a table.
pub const METRICS_TABLE: &str = "metrics.csv";

/// Appends to `metrics.jsonl` and `metrics.csv`, from when the run starts or goes on: one that is refused
/// before changes nothing.
pub struct MetricsFile {
    path: PathBuf,
    table: PathBuf,
    columns: Columns,
    files: Option<[File; 2]>,
    resume: bool,
}

impl MetricsFile {
    /// The files of a run in `folder`: empty for a new one, without what lies beyond its checkpoint
    /// for one that goes on.
    pub fn new(folder: &Path, resume: bool, columns: Columns) -> Self {
        let (path, table) = (folder.join(METRICS_FILE), folder.join(METRICS_TABLE));
        Self { path, table, columns, files: None, resume }
    }

    /// Opens the files with the rows up to `step`. The table is made anew from them: whatever became of
    /// it, it says what they say.
    fn open(&mut self, step: usize) -> Result<()> {
        let (mut kept, mut table) = (Vec::new(), self.columns.head());
        if self.resume && self.path.exists() {
            for line in lines(&hydralora_files::read(&self.path)?) {
                let row: Option<Value> = serde_json::from_slice(line).ok();
                let early =
                    |row: &Value| row["step"].as_u64().is_some_and(|at| at as usize <= step);
                if let Some(row) = row.filter(early) {
                    kept.extend_from_slice(line);
                    kept.push(b'\n');
                    table += &self.columns.row(&row);
                }
            }
        }
        hydralora_files::write_file(&self.path, &kept)?;
        hydralora_files::write_file(&self.table, table.as_bytes())?;
        let append = |path: &Path| OpenOptions::new().append(true).open(path);
        self.files = Some([append(&self.path)?, append(&self.table)?]);
        Ok(())
    }
}

/// The lines of a file, as bytes: a crash may have cut one inside a character.
fn lines(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    bytes.split(|byte| *byte == b'\n')
}

/// The rows of a metrics file. A line that a crash cut short is left out.
///
/// # Errors
/// If the file cannot be read.
pub fn read_metrics(path: &Path) -> Result<Vec<Value>> {
    let bytes = hydralora_files::bytes_of(path).map_err(|error| naming(&error, path))?;
    Ok(lines(&bytes).filter_map(|line| serde_json::from_slice(line).ok()).collect())
}

fn naming(error: &io::Error, path: &Path) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

impl Sink for MetricsFile {
    fn record(&mut self, event: &Event) -> Result<()> {
        let mut row = match event {
            Event::Started { step, .. } => return self.open(*step),
            Event::Saved { .. } | Event::Note(_) => return Ok(()),
            Event::Step(metrics) => serde_json::to_value(metrics).unwrap_or_default(),
            Event::Evaluated { step, evaluation, best } => json!({
                "step": step, "valid_loss": evaluation.loss, "best": best,
                "valid_label_tokens": evaluation.label_tokens, "domains": evaluation.domains,
                "gate_entropy": evaluation.routing.as_ref().and_then(Routing::entropy),
                "gate_spread": evaluation.routing.as_ref().map(Routing::specialisation),
                "gate_entropy_by_domain":
                    evaluation.routing.as_ref().map(Routing::domain_entropy),
                "gate_entropy_by_layer": evaluation.routing.as_ref().map(Routing::layer_entropy),
                "router_movement": evaluation.router_movement,
                "heads": evaluation.heads,
            }),
        };
        if let Event::Evaluated { evaluation, .. } = event
            && !evaluation.sets.is_empty()
        {
            row["sets"] = json!(evaluation.sets);
        }
        let Some([file, table]) = &mut self.files else { return Ok(()) };
        // In one piece, so that a crash cuts a line rather than several.
        let written = file.write_all(format!("{row}\n").as_bytes());
        written.map_err(|error| naming(&error, &self.path))?;
        let written = table.write_all(self.columns.row(&row).as_bytes());
        Ok(written.map_err(|error| naming(&error, &self.table))?)
    }
}

/// Writes a TensorBoard event file: records framed as TFRecord (length, masked CRC-32C, payload,
/// masked CRC-32C), each an `Event` message with scalar summaries. The file is made when there is
/// something to write.
pub struct TensorBoard {
    folder: PathBuf,
    file: Option<File>,
}

impl TensorBoard {
    /// A new event file in `folder`.
    pub fn new(folder: &Path) -> Self {
        Self { folder: folder.to_path_buf(), file: None }
    }

    fn create(folder: &Path) -> io::Result<File> {
        fs::create_dir_all(folder)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // TensorBoard reads every file with this beginning; the number tells those of one second.
        let named = |number: usize| {
            let (now, process) = (now.as_secs(), std::process::id());
            folder.join(format!("events.out.tfevents.{now:010}.{process}.{number}"))
        };
        let fresh = |path: PathBuf| OpenOptions::new().write(true).create_new(true).open(path);
        let mut file = (0..).map(named).map(fresh).find(|made| {
            !made.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::AlreadyExists)
        });
        let mut file = file.take().unwrap_or_else(|| Err(io::ErrorKind::AlreadyExists.into()))?;
        let mut event = Vec::new();
        double_field(1, now.as_secs_f64(), &mut event);
        bytes_field(3, b"brain.Event:2", &mut event);
        file.write_all(&frame(&event))?;
        Ok(file)
    }

    fn scalars(&mut self, step: usize, scalars: &[(String, f64)]) -> Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let event = scalar_event(now.as_secs_f64(), step as u64, scalars);
        self.write(&event)
    }

    fn write(&mut self, event: &[u8]) -> Result<()> {
        let written = (|| {
            let file = match &mut self.file {
                Some(file) => file,
                none => none.insert(Self::create(&self.folder)?),
            };
            file.write_all(&frame(event))
        })();
        Ok(written.map_err(|error| naming(&error, &self.folder))?)
    }
}

impl Sink for TensorBoard {
    fn record(&mut self, event: &Event) -> Result<()> {
        match event {
            Event::Step(metrics) => {
                let mut scalars = vec![
                    ("train/loss".to_owned(), metrics.loss),
                    ("train/learning_rate".to_owned(), metrics.learning_rate),
                    ("train/grad_norm".to_owned(), metrics.grad_norm),
                    ("train/tokens_per_s".to_owned(), metrics.tokens_per_s),
                ];
                scalars.extend(metrics.routers.iter().flat_map(|found| {
                    let own = [
                        ("train/gate_entropy", found.gate_entropy),
                        ("train/gate_spread", Some(found.gate_spread)),
                        ("train/router_movement", found.router_movement),
                    ];
                    named(&own).chain(of_heads("train", found.heads.as_ref())).collect::<Vec<_>>()
                }));
                self.scalars(metrics.step, &scalars)
            }
            Event::Evaluated { step, evaluation, .. } => {
                let mut scalars = vec![("valid/loss".to_owned(), evaluation.loss)];
                scalars.extend(
                    evaluation.domains.iter().map(|d| (format!("valid/loss_{}", d.domain), d.loss)),
                );
                // A set may be called like a domain.
                let of_set = evaluation.sets.iter();
                scalars.extend(of_set.map(|of| (format!("valid_{}/loss", of.set), of.loss)));
                if let Some(routing) = &evaluation.routing {
                    let own = [
                        ("valid/gate_entropy", routing.entropy()),
                        ("valid/gate_spread", Some(routing.specialisation())),
                        ("valid/router_movement", evaluation.router_movement),
                    ];
                    scalars.extend(named(&own));
                    let of_domain = routing.domain_entropy().into_iter();
                    scalars.extend(of_domain.map(|(domain, entropy)| {
                        (format!("valid/gate_entropy_{domain}"), entropy)
                    }));
                }
                scalars.extend(of_heads("valid", evaluation.heads.as_ref()));
                self.scalars(*step, &scalars)
            }
            Event::Started { .. } | Event::Saved { .. } | Event::Note(_) => Ok(()),
        }
    }
}

/// Those of the values that are known.
fn named(values: &[(&str, Option<f64>)]) -> impl Iterator<Item = (String, f64)> {
    values.iter().filter_map(|(name, value)| Some(((*name).to_owned(), (*value)?)))
}

fn of_heads(part: &str, heads: Option<&HeadSummary>) -> Vec<(String, f64)> {
    let Some(heads) = heads else { return Vec::new() };
    let values = [
        ("head_cosine", heads.cosine),
        ("head_rank", heads.rank),
        ("difference_share", heads.difference_share),
        ("dead_heads", heads.dead_heads.map(|count| count as f64)),
    ];
    named(&values).map(|(name, value)| (format!("{part}/{name}"), value)).collect()
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

    #[test]
    fn a_line_cut_inside_a_character_costs_that_line_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(METRICS_FILE);
        let row = |step: usize| format!("{{\"step\":{step},\"domains\":\"字\"}}\n");
        let mut bytes = (row(1) + &row(2)).into_bytes();
        bytes.truncate(bytes.len() - 5);
        assert!(std::str::from_utf8(&bytes).is_err());
        fs::write(&path, &bytes).unwrap();
        assert_eq!(read_metrics(&path).unwrap().len(), 1);
        let table = folder.path().join(METRICS_TABLE);
        fs::write(&table, "torn,").unwrap();
        let mut metrics = MetricsFile::new(folder.path(), true, Columns::default());
        assert_eq!(fs::read(&path).unwrap(), bytes, "nothing changes before the run goes on");
        metrics.record(&Event::Started { step: 5, total_steps: 9 }).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), row(1));
        // The table is made of what is left, whatever became of it.
        let table = fs::read_to_string(&table).unwrap();
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines.len(), 2, "{table}");
        assert!(lines[0].starts_with("event,step,") && lines[1].starts_with("step,1,"), "{table}");
    }

    #[test]
    fn event_files_of_one_second_have_names_of_their_own() {
        let folder = tempfile::tempdir().unwrap();
        for _ in 0..3 {
            TensorBoard::new(folder.path()).scalars(1, &[("loss".to_owned(), 1.0)]).unwrap();
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3);
        drop(TensorBoard::new(&folder.path().join("unused")));
        assert!(!folder.path().join("unused").exists());
    }

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
