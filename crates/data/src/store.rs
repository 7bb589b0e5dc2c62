//! Encoded examples, held in memory or in a cache file that is read at places.
//!
//! A cache file holds the examples of one source in file order:
//!
//! ```text
//! magic        16 bytes
//! tokens       u32 little-endian each; the highest bit says that the token is trained
//! index        64 bytes an example, see `Entry`
//! footer       JSON: key, counts, domain names
//! footer size  u64
//! magic        16 bytes
//! ```
//!
//! It is written under another name and renamed, so that it is there whole or not at all. What
//! it was made from is its `key`: hash of the files, the tokenizer, the template and every setting
//! that decides about tokens. Which examples are for validation or left out as duplicates is not
//! in it, so that a change of those finds the cache again.

use std::collections::BTreeMap;
use std::io::{BufWriter, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fs_err::File;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3, xxh3_64, xxh3_128};

use hydralora_files::NewFile;

use crate::encode::{Example, IGNORE_LABEL, Seen};
use crate::error::{Error, Result};
use crate::record::Record;
use crate::report::{Dropped, TurnCounts};

const MAGIC: &[u8; 16] = b"hydralora tok  1";
/// The bit of a stored token that says it is trained.
const TRAINED: u32 = 1 << 31;
const ENTRY_BYTES: usize = 64;

/// What is known of an example without its tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Its first token's number among all tokens of the part.
    pub(crate) offset: u64,
    pub(crate) length: u32,
    /// Tokens that are predicted and trained.
    pub(crate) label_tokens: u32,
    /// Index into the part's domain names.
    pub(crate) domain: u32,
    pub(crate) row: u32,
    /// Hash of the tokens.
    pub(crate) tokens_hash: u128,
    /// Hash of tokens and labels.
    pub(crate) labels_hash: u64,
    /// Hash of the normalised text, see `dedup`.
    pub(crate) text_hash: u128,
}

impl Entry {
    fn to_bytes(self) -> [u8; ENTRY_BYTES] {
        let mut bytes = [0; ENTRY_BYTES];
        bytes[..8].copy_from_slice(&self.offset.to_le_bytes());
        let small = [self.length, self.label_tokens, self.domain, self.row];
        for (place, value) in bytes[8..24].chunks_exact_mut(4).zip(small) {
            place.copy_from_slice(&value.to_le_bytes());
        }
        bytes[24..40].copy_from_slice(&self.tokens_hash.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.labels_hash.to_le_bytes());
        bytes[48..].copy_from_slice(&self.text_hash.to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Self {
        let number = |range: std::ops::Range<usize>| {
            let mut wide = [0; 16];
            wide[..range.len()].copy_from_slice(&bytes[range]);
            u128::from_le_bytes(wide)
        };
        Self {
            offset: number(0..8) as u64,
            length: number(8..12) as u32,
            label_tokens: number(12..16) as u32,
            domain: number(16..20) as u32,
            row: number(20..24) as u32,
            tokens_hash: number(24..40),
            labels_hash: number(40..48) as u64,
            text_hash: number(48..64),
        }
    }
}

/// What became of the records of a source that are not examples, and of those that are.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(crate) struct Counts {
    pub(crate) format: String,
    pub(crate) records: usize,
    pub(crate) dropped: Dropped,
    pub(crate) truncated: usize,
    pub(crate) tokens_lost: usize,
    pub(crate) turns: TurnCounts,
    pub(crate) endless: usize,
    /// Records whose texts write out special tokens, and how many those are.
    pub(crate) special: [usize; 2],
    /// Records by the name of a field that nobody reads.
    pub(crate) unread: BTreeMap<String, usize>,
    /// Records by the name of a field that the chat template does not write.
    pub(crate) unwritten: BTreeMap<String, usize>,
    /// Answers by the token that was trained last of them.
    pub(crate) ends: BTreeMap<u32, usize>,
}

/// Most names and tokens that are counted one by one.
const MOST_NAMES: usize = 256;

impl Counts {
    /// Counts what was seen of a record.
    pub(crate) fn see(&mut self, record: &Record, seen: &Seen) {
        self.turns.add(seen);
        self.endless += usize::from(seen.endless);
        self.special[0] += usize::from(seen.special_in_text > 0);
        self.special[1] += seen.special_in_text;
        for (names, counted) in
            [(&record.unread, &mut self.unread), (&seen.unwritten, &mut self.unwritten)]
        {
            for name in names {
                if counted.len() < MOST_NAMES || counted.contains_key(name) {
                    *counted.entry(name.clone()).or_default() += 1;
                }
            }
        }
        for token in &seen.ends {
            if self.ends.len() < MOST_NAMES || self.ends.contains_key(token) {
                *self.ends.entry(*token).or_default() += 1;
            }
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Footer {
    key: String,
    tokens: u64,
    examples: u64,
    index_hash: u64,
    domains: Vec<String>,
    counts: Counts,
}

/// The examples of one source.
#[derive(Debug)]
pub(crate) struct Part {
    /// Names that `Entry::domain` indexes.
    pub(crate) domains: Vec<String>,
    pub(crate) counts: Counts,
    /// How many examples there are.
    pub(crate) examples: usize,
    data: Data,
}

#[derive(Debug)]
enum Data {
    Memory { tokens: Vec<u32>, entries: Vec<Entry> },
    Disk { file: std::fs::File, path: PathBuf, tokens: u64, index: u64 },
}

impl Part {
    /// The examples from `first` on, in blocks.
    pub(crate) fn for_each(&self, visit: &mut dyn FnMut(usize, &Entry)) -> Result<()> {
        match &self.data {
            Data::Memory { entries, .. } => {
                entries.iter().enumerate().for_each(|(index, entry)| visit(index, entry));
            }
            Data::Disk { index, .. } => {
                const BLOCK: usize = 4096;
                let mut bytes = vec![0; BLOCK * ENTRY_BYTES];
                for first in (0..self.examples).step_by(BLOCK) {
                    let count = BLOCK.min(self.examples - first);
                    let block = &mut bytes[..count * ENTRY_BYTES];
                    self.read_at(index + (first * ENTRY_BYTES) as u64, block)?;
                    for (at, entry) in block.chunks_exact(ENTRY_BYTES).enumerate() {
                        visit(first + at, &Entry::from_bytes(entry));
                    }
                }
            }
        }
        Ok(())
    }

    /// What is known of an example.
    pub(crate) fn entry(&self, number: usize) -> Result<Entry> {
        match &self.data {
            Data::Memory { entries, .. } => Ok(entries[number]),
            Data::Disk { index, .. } => {
                let mut bytes = [0; ENTRY_BYTES];
                self.read_at(index + (number * ENTRY_BYTES) as u64, &mut bytes)?;
                Ok(Entry::from_bytes(&bytes))
            }
        }
    }

    /// Tokens and labels of an example.
    fn sequence(&self, entry: &Entry) -> Result<(Vec<u32>, Vec<u32>)> {
        let length = entry.length as usize;
        let mut stored = Vec::with_capacity(length);
        match &self.data {
            Data::Memory { tokens, .. } => {
                let start = entry.offset as usize;
                stored.extend_from_slice(&tokens[start..start + length]);
            }
            Data::Disk { path, .. } => {
                let mut bytes = vec![0; length * 4];
                self.read_at(MAGIC.len() as u64 + entry.offset * 4, &mut bytes)?;
                if xxh3_64(&bytes) != entry.labels_hash {
                    let message = "the cache has been damaged; delete it to have it made anew";
                    return Err(Error::Cache { path: path.clone(), message: message.to_owned() });
                }
                let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |w, &b| w << 8 | u32::from(b));
                stored.extend(bytes.chunks_exact(4).map(word));
            }
        }
        let label = |&token: &u32| {
            if token & TRAINED == 0 { IGNORE_LABEL } else { token & !TRAINED }
        };
        let labels = stored.iter().map(label).collect();
        stored.iter_mut().for_each(|token| *token &= !TRAINED);
        Ok((stored, labels))
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let Data::Disk { file, path, .. } = &self.data else { return Ok(()) };
        read_exact_at(file, bytes, offset)
            .map_err(|error| Error::Cache { path: path.clone(), message: error.to_string() })
    }

    /// Opens a cache file made from what `key` stands for; `None` if there is none that is whole.
    pub(crate) fn open(path: &Path, key: &str) -> Result<Option<Self>> {
        match hydralora_files::open(path) {
            Ok(file) => Ok(Self::from_file(file, path, key)),
            Err(error)
                if [ErrorKind::NotFound, ErrorKind::NotADirectory].contains(&error.kind()) =>
            {
                Ok(None)
            }
            Err(error) => {
                Err(Error::Cache { path: path.to_path_buf(), message: error.to_string() })
            }
        }
    }

    fn from_file(mut file: std::fs::File, path: &Path, key: &str) -> Option<Self> {
        let size = file.metadata().ok()?.len();
        let magic = MAGIC.len() as u64;
        let mut tail = [0; 24];
        file.seek(SeekFrom::Start(size.checked_sub(24)?)).ok()?;
        file.read_exact(&mut tail).ok()?;
        let footer_bytes = u64::from_le_bytes(tail[..8].try_into().ok()?);
        if &tail[8..] != MAGIC || footer_bytes > size.saturating_sub(24 + magic) {
            return None;
        }
        let footer_at = size - 24 - footer_bytes;
        file.seek(SeekFrom::Start(footer_at)).ok()?;
        let mut footer = Vec::new();
        Read::by_ref(&mut file).take(footer_bytes).read_to_end(&mut footer).ok()?;
        let footer: Footer = serde_json::from_slice(&footer).ok()?;
        let index = footer.tokens.checked_mul(4)?.checked_add(magic)?;
        let index_bytes = footer.examples.checked_mul(ENTRY_BYTES as u64)?;
        if footer.key != key || index.checked_add(index_bytes)? != footer_at {
            return None;
        }
        let part = Self {
            domains: footer.domains,
            counts: footer.counts,
            examples: usize::try_from(footer.examples).ok()?,
            data: Data::Disk { file, path: path.to_path_buf(), tokens: footer.tokens, index },
        };
        let mut hash = Xxh3::new();
        let mut sound = true;
        part.for_each(&mut |_, entry| {
            hash.update(&entry.to_bytes());
            let end = entry.offset.checked_add(u64::from(entry.length));
            sound &= end.is_some_and(|end| end <= footer.tokens);
            sound &= (entry.domain as usize) < part.domains.len();
        })
        .ok()?;
        (sound && hash.digest() == footer.index_hash).then_some(part)
    }

    /// Bytes on disk; 0 when in memory.
    pub(crate) fn disk_bytes(&self) -> u64 {
        match &self.data {
            Data::Memory { .. } => 0,
            Data::Disk { tokens, .. } => tokens * 4 + (self.examples * ENTRY_BYTES) as u64,
        }
    }
}

#[cfg(unix)]
fn read_exact_at(file: &std::fs::File, bytes: &mut [u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, offset)
}

#[cfg(windows)]
fn read_exact_at(
    file: &std::fs::File,
    mut bytes: &mut [u8],
    mut offset: u64,
) -> std::io::Result<()> {
    while !bytes.is_empty() {
        let read = std::os::windows::fs::FileExt::seek_read(file, bytes, offset)?;
        if read == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        bytes = &mut bytes[read..];
        offset += read as u64;
    }
    Ok(())
}

/// Collects the examples of one source.
pub(crate) struct PartWriter {
    domains: Vec<String>,
    tokens: u64,
    examples: usize,
    bytes: Vec<u8>,
    sink: Sink,
}

enum Sink {
    Memory {
        tokens: Vec<u32>,
        entries: Vec<Entry>,
    },
    Disk {
        file: BufWriter<NewFile>,
        index: BufWriter<std::fs::File>,
        hash: Box<Xxh3>,
        path: PathBuf,
    },
}

impl PartWriter {
    /// Into memory.
    pub(crate) fn memory() -> Self {
        Self::new(Sink::Memory { tokens: Vec::new(), entries: Vec::new() })
    }

    /// Into a cache file, which appears when it is finished.
    ///
    /// # Errors
    /// When the folder cannot be made or written to.
    pub(crate) fn disk(path: &Path) -> Result<Self> {
        let folder = path.parent().unwrap_or(Path::new("."));
        let writer = (|| {
            std::fs::create_dir_all(folder)?;
            let mut file = BufWriter::with_capacity(1 << 20, NewFile::create(path)?);
            file.write_all(MAGIC)?;
            let index = BufWriter::with_capacity(1 << 20, tempfile::tempfile_in(folder)?);
            let hash = Box::new(Xxh3::new());
            Ok(Sink::Disk { file, index, hash, path: path.to_path_buf() })
        })();
        Ok(Self::new(writer.map_err(|error| unwritable(path, &error))?))
    }

    fn new(sink: Sink) -> Self {
        Self { domains: Vec::new(), tokens: 0, examples: 0, bytes: Vec::new(), sink }
    }

    /// Adds an example.
    ///
    /// # Errors
    /// When it cannot be written, or a token id does not fit into 31 bits.
    pub(crate) fn push(&mut self, example: &NewExample<'_>) -> Result<()> {
        let NewExample { tokens, labels, domain, row, text_hash } = *example;
        if tokens.iter().any(|token| token & TRAINED != 0) {
            return Err(Error::Batching("token ids must be below 2^31".to_owned()));
        }
        let number = match self.domains.iter().position(|known| known == domain) {
            Some(number) => number,
            None => {
                self.domains.push(domain.to_owned());
                self.domains.len() - 1
            }
        };
        self.bytes.clear();
        self.bytes.extend(tokens.iter().flat_map(|token| token.to_le_bytes()));
        let tokens_hash = xxh3_128(&self.bytes);
        for (place, label) in self.bytes.chunks_exact_mut(4).zip(labels) {
            place[3] |= if *label == IGNORE_LABEL { 0 } else { 0x80 };
        }
        let entry = Entry {
            offset: self.tokens,
            length: tokens.len() as u32,
            label_tokens: labels.iter().skip(1).filter(|&&l| l != IGNORE_LABEL).count() as u32,
            domain: number as u32,
            row,
            tokens_hash,
            labels_hash: xxh3_64(&self.bytes),
            text_hash,
        };
        match &mut self.sink {
            Sink::Memory { tokens: all, entries } => {
                let flag = |(&token, &label): (&u32, &u32)| {
                    if label == IGNORE_LABEL { token } else { token | TRAINED }
                };
                all.extend(tokens.iter().zip(labels).map(flag));
                entries.push(entry);
            }
            Sink::Disk { file, index, hash, path } => {
                let bytes = entry.to_bytes();
                hash.update(&bytes);
                let written = file.write_all(&self.bytes).and_then(|()| index.write_all(&bytes));
                written.map_err(|error| unwritable(path, &error))?;
            }
        }
        self.tokens += tokens.len() as u64;
        self.examples += 1;
        Ok(())
    }

    /// The part, once all examples are in.
    ///
    /// # Errors
    /// When the cache file cannot be written or read back.
    pub(crate) fn finish(self, counts: Counts, key: &str) -> Result<Part> {
        let (path, written) = match self.sink {
            Sink::Memory { tokens, entries } => {
                let data = Data::Memory { tokens, entries };
                return Ok(Part { domains: self.domains, counts, examples: self.examples, data });
            }
            Sink::Disk { mut file, mut index, hash, path } => {
                let footer = Footer {
                    key: key.to_owned(),
                    tokens: self.tokens,
                    examples: self.examples as u64,
                    index_hash: hash.digest(),
                    domains: self.domains,
                    counts,
                };
                let written = (|| {
                    index.flush()?;
                    let mut index = index.into_inner().map_err(|error| error.into_error())?;
                    index.seek(SeekFrom::Start(0))?;
                    std::io::copy(&mut index, &mut file)?;
                    let footer = serde_json::to_vec(&footer)?;
                    file.write_all(&footer)?;
                    file.write_all(&(footer.len() as u64).to_le_bytes())?;
                    file.write_all(MAGIC)?;
                    file.into_inner().map_err(|error| error.into_error())?.finish()
                })();
                (path, written)
            }
        };
        written.map_err(|error| unwritable(&path, &error))?;
        Part::open(&path, key)?.ok_or_else(|| {
            let message = "what was written cannot be read back; is the disk in order?".to_owned();
            Error::Cache { path, message }
        })
    }
}

fn unwritable(path: &Path, error: &std::io::Error) -> Error {
    Error::Cache { path: path.to_path_buf(), message: format!("cannot be written: {error}") }
}

/// An example to be stored.
#[derive(Clone, Copy)]
pub(crate) struct NewExample<'a> {
    pub(crate) tokens: &'a [u32],
    pub(crate) labels: &'a [u32],
    pub(crate) domain: &'a str,
    pub(crate) row: u32,
    pub(crate) text_hash: u128,
}

/// A list of examples, in memory or on disk. Copies are cheap: they share what they list.
#[derive(Debug, Clone, Default)]
pub struct Examples {
    parts: Vec<Listed>,
    /// For each example, its number in its part.
    numbers: Vec<u32>,
    lengths: Vec<u32>,
}

/// A part of a list.
#[derive(Debug, Clone)]
struct Listed {
    part: Arc<Part>,
    /// From the part's domains to those of the data set.
    domains: Vec<u32>,
    source: u32,
    /// How many examples the list has up to the end of this part.
    end: usize,
}

impl Examples {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.numbers.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.numbers.is_empty()
    }

    /// The tokens of each.
    pub fn lengths(&self) -> &[u32] {
        &self.lengths
    }

    /// An example, its tokens read from where they are kept; panics when there is no such example.
    ///
    /// # Errors
    /// When a cache file can no longer be read.
    pub fn get(&self, index: usize) -> Result<Example> {
        let listed = &self.parts[self.part_of(index)];
        let entry = listed.part.entry(self.numbers[index] as usize)?;
        let (tokens, labels) = listed.part.sequence(&entry)?;
        let domain = listed.domains[entry.domain as usize];
        Ok(Example { tokens, labels, domain, source: listed.source, row: entry.row })
    }

    /// The source and the row of an example, without reading its tokens; panics when there is no
    /// such example.
    ///
    /// # Errors
    /// When a cache file can no longer be read.
    pub fn place(&self, index: usize) -> Result<(u32, u32)> {
        let listed = &self.parts[self.part_of(index)];
        let entry = listed.part.entry(self.numbers[index] as usize)?;
        Ok((listed.source, entry.row))
    }

    /// Each example in turn.
    pub fn iter(&self) -> impl Iterator<Item = Result<Example>> + '_ {
        (0..self.len()).map(|index| self.get(index))
    }

    /// The source of an example; panics when there is no such example.
    pub(crate) fn source(&self, index: usize) -> u32 {
        self.parts[self.part_of(index)].source
    }

    fn part_of(&self, index: usize) -> usize {
        assert!(index < self.len(), "there is no example {index} of {}", self.len());
        self.parts.partition_point(|listed| listed.end <= index)
    }

    /// Adds the examples of a part that `numbers` lists.
    pub(crate) fn add(
        &mut self,
        part: &Arc<Part>,
        domains: Vec<u32>,
        source: u32,
        listed: &[(u32, u32)],
    ) {
        self.numbers.extend(listed.iter().map(|(number, _)| number));
        self.lengths.extend(listed.iter().map(|(_, length)| length));
        let end = self.numbers.len();
        self.parts.push(Listed { part: part.clone(), domains, source, end });
    }
}

impl From<Vec<Example>> for Examples {
    fn from(examples: Vec<Example>) -> Self {
        let mut list = Self::default();
        for run in examples.chunk_by(|a, b| a.source == b.source) {
            let mut tokens = Vec::new();
            let mut entries = Vec::new();
            let mut domains: Vec<u32> = Vec::new();
            for example in run {
                let domain = domains.iter().position(|&d| d == example.domain);
                let domain = domain.unwrap_or_else(|| {
                    domains.push(example.domain);
                    domains.len() - 1
                });
                entries.push(Entry {
                    offset: tokens.len() as u64,
                    length: example.tokens.len() as u32,
                    label_tokens: example.label_tokens() as u32,
                    domain: domain as u32,
                    row: example.row,
                    tokens_hash: 0,
                    labels_hash: 0,
                    text_hash: 0,
                });
                let flag = |(&token, &label): (&u32, &u32)| {
                    if label == IGNORE_LABEL { token & !TRAINED } else { token | TRAINED }
                };
                tokens.extend(example.tokens.iter().zip(&example.labels).map(flag));
            }
            let listed: Vec<(u32, u32)> =
                entries.iter().enumerate().map(|(n, entry)| (n as u32, entry.length)).collect();
            let part = Part {
                domains: vec![String::new(); domains.len()],
                counts: Counts::default(),
                examples: entries.len(),
                data: Data::Memory { tokens, entries },
            };
            list.add(&Arc::new(part), domains, run[0].source, &listed);
        }
        list
    }
}

impl FromIterator<Example> for Examples {
    fn from_iter<I: IntoIterator<Item = Example>>(examples: I) -> Self {
        examples.into_iter().collect::<Vec<_>>().into()
    }
}

/// The SHA-256 of a file, and its bytes.
pub(crate) fn hash_file(path: &Path) -> Result<(String, u64)> {
    use sha2::{Digest, Sha256};
    hydralora_files::expect_file(path)?;
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut bytes = 0;
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        hash.update(&buffer[..read]);
        bytes += read as u64;
    }
    Ok((hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect(), bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(mut writer: PartWriter, key: &str) -> Part {
        for row in 0..5000_u32 {
            let tokens: Vec<u32> = (0..row % 7 + 2).map(|at| row * 10 + at).collect();
            let mut labels = tokens.clone();
            labels[0] = IGNORE_LABEL;
            let domain = ["law", "math"][row as usize % 2];
            let text_hash = u128::from(row);
            let example = NewExample { tokens: &tokens, labels: &labels, domain, row, text_hash };
            writer.push(&example).unwrap();
        }
        let counts = Counts { format: "text".to_owned(), records: 5000, ..Counts::default() };
        writer.finish(counts, key).unwrap()
    }

    fn list(part: Part) -> Examples {
        let mut listed = Vec::new();
        part.for_each(&mut |number, entry| listed.push((number as u32, entry.length))).unwrap();
        let mut examples = Examples::default();
        examples.add(&Arc::new(part), vec![3, 4], 7, &listed);
        examples
    }

    #[test]
    fn disk_and_memory_hold_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/cache.tokens");
        let memory = list(fill(PartWriter::memory(), ""));
        let disk = list(fill(PartWriter::disk(&path).unwrap(), "key"));
        assert_eq!(memory.len(), 5000);
        assert_eq!(memory.lengths(), disk.lengths());
        for index in [0, 1, 4095, 4096, 4999] {
            assert_eq!(memory.get(index).unwrap(), disk.get(index).unwrap());
        }
        let example = disk.get(4097).unwrap();
        assert_eq!((example.domain, example.source, example.row), (4, 7, 4097));
        assert_eq!(example.labels[0], IGNORE_LABEL);
        assert_eq!(example.labels[1..], example.tokens[1..]);
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        assert!(Part::open(&path, "key").unwrap().is_some());
        assert!(Part::open(&path, "other").unwrap().is_none(), "made from something else");
    }

    #[test]
    fn a_damaged_cache_is_not_used() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cache.tokens");
        fill(PartWriter::disk(&path).unwrap(), "key");
        let whole = std::fs::read(&path).unwrap();
        for cut in [0, 10, 24, 1000, whole.len() - 1] {
            std::fs::write(&path, &whole[..cut]).unwrap();
            assert!(Part::open(&path, "key").unwrap().is_none(), "cut at {cut}");
        }
        let index = whole.len() - 24 - 400 - 1000 * ENTRY_BYTES;
        let mut spoiled = whole.clone();
        spoiled[index] ^= 1;
        std::fs::write(&path, &spoiled).unwrap();
        assert!(Part::open(&path, "key").unwrap().is_none(), "the index is checked");
        let mut spoiled = whole;
        spoiled[20] ^= 1;
        std::fs::write(&path, &spoiled).unwrap();
        let examples = list(Part::open(&path, "key").unwrap().unwrap());
        let error = examples.get(0).unwrap_err().to_string();
        assert!(error.contains("damaged"), "{error}");
        assert!(examples.get(9).is_ok());
    }

    #[test]
    fn an_unfinished_cache_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        drop(PartWriter::disk(&folder.path().join("cache.tokens")).unwrap());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
