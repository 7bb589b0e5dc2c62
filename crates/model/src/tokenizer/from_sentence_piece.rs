//! SentencePiece's `tokenizer.model`: a protocol buffer of pieces, of how they were trained and of
//! how texts are normalized (`sentencepiece_model.proto`).

use super::from_folder::Read;
use super::sentence_piece::{BYTE, CONTROL, NORMAL, Pieces, UNKNOWN, USER_DEFINED, table_fits};
use super::{Special, guarded};
use crate::error::{Error, Result};
use std::path::Path;
use tokenizers::AddedToken;

/// The kinds of piece that have a meaning here; unused ones, of restricted vocabularies, have none.
const READ: [u64; 5] = [NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE];

/// A field of a message.
enum Field<'a> {
    Number(u64),
    Single(f32),
    Bytes(&'a [u8]),
}

/// The fields of a message, each with its number.
struct Message<'a>(&'a [u8]);

impl<'a> Message<'a> {
    fn varint(&mut self) -> Option<u64> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.0.split_first()?;
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, len: u64) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(usize::try_from(len).ok()?)?;
        self.0 = rest;
        Some(taken)
    }

    /// The next field, `None` at the end or where the bytes are no message.
    fn field(&mut self) -> Option<(u64, Field<'a>)> {
        let key = self.varint()?;
        let value = match key & 7 {
            0 => Field::Number(self.varint()?),
            1 => Field::Bytes(self.take(8)?),
            2 => {
                let len = self.varint()?;
                Field::Bytes(self.take(len)?)
            }
            5 => Field::Single(f32::from_le_bytes(self.take(4)?.try_into().ok()?)),
            _ => return None,
        };
        Some((key >> 3, value))
    }

    /// All fields; `None` where the bytes are no message.
    fn fields(mut self) -> Option<Vec<(u64, Field<'a>)>> {
        let mut fields = Vec::new();
        while !self.0.is_empty() {
            fields.push(self.field()?);
        }
        Some(fields)
    }
}

/// What is needed of a model, with the defaults of the format.
struct Model<'a> {
    tokens: Vec<String>,
    kinds: Vec<u64>,
    scores: Vec<f64>,
    /// 1 is unigram, 2 is BPE.
    kind: u64,
    byte_fallback: bool,
    bos: i64,
    eos: i64,
    prefix: bool,
    collapse: bool,
    escape: bool,
    suffix: bool,
    replaced: &'a [u8],
}

impl<'a> Model<'a> {
    fn parse(bytes: &'a [u8]) -> Option<Self> {
        let mut model = Self {
            tokens: Vec::new(),
            kinds: Vec::new(),
            scores: Vec::new(),
            kind: 1,
            byte_fallback: false,
            bos: 1,
            eos: 2,
            prefix: true,
            collapse: true,
            escape: true,
            suffix: false,
            replaced: &[],
        };
        for (number, field) in Message(bytes).fields()? {
            match (number, field) {
                (1, Field::Bytes(piece)) => model.piece(piece)?,
                (2, Field::Bytes(trainer)) => model.trainer(trainer)?,
                (3, Field::Bytes(normalizer)) => model.normalizer(normalizer)?,
                _ => {}
            }
        }
        (!model.tokens.is_empty()).then_some(model)
    }

    fn piece(&mut self, bytes: &[u8]) -> Option<()> {
        let (mut text, mut score, mut kind) = (None, 0.0, NORMAL);
        for (number, field) in Message(bytes).fields()? {
            match (number, field) {
                (1, Field::Bytes(bytes)) => text = Some(std::str::from_utf8(bytes).ok()?),
                (2, Field::Single(number)) => score = f64::from(number),
                (3, Field::Number(number)) => kind = number,
                _ => {}
            }
        }
        self.tokens.push(text?.to_owned());
        self.scores.push(score);
        self.kinds.push(kind);
        Some(())
    }

    fn trainer(&mut self, bytes: &[u8]) -> Option<()> {
        for (number, field) in Message(bytes).fields()? {
            let Field::Number(value) = field else { continue };
            match number {
                3 => self.kind = value,
                24 => self.suffix = value != 0,
                35 => self.byte_fallback = value != 0,
                // Negative where there is none.
                41 => self.bos = value as i64,
                42 => self.eos = value as i64,
                _ => {}
            }
        }
        Some(())
    }

    fn normalizer(&mut self, bytes: &'a [u8]) -> Option<()> {
        for (number, field) in Message(bytes).fields()? {
            match (number, field) {
                (2, Field::Bytes(table)) => self.replaced = table,
                (3, Field::Number(value)) => self.prefix = value != 0,
                (4, Field::Number(value)) => self.collapse = value != 0,
                (5, Field::Number(value)) => self.escape = value != 0,
                _ => {}
            }
        }
        Some(())
    }

    fn special(&self, id: i64) -> Option<Special> {
        let id = u32::try_from(id).ok()?;
        Some((id, self.tokens.get(id as usize)?.clone()))
    }
}

pub(super) fn read(path: &Path, bytes: &[u8]) -> Result<Read> {
    let fault = |message: &str| Error::tokenizer(path, message);
    let model = Model::parse(bytes).ok_or_else(|| fault("is no SentencePiece model"))?;
    let unigram = match model.kind {
        1 => true,
        2 => false,
        _ => return Err(fault("is a model of words or characters; expected BPE or unigram")),
    };
    if let Some(id) = model.kinds.iter().position(|kind| !READ.contains(kind)) {
        return Err(fault(&format!(
            "piece {id} is of the kind {}, which is not read",
            model.kinds[id]
        )));
    }
    if !table_fits(model.replaced) {
        return Err(fault("its table of replaced characters is cut off"));
    }
    if !model.escape || model.suffix {
        return Err(fault("treats white space in a way that is not supported"));
    }
    let pieces = Pieces {
        tokens: &model.tokens,
        kinds: &model.kinds,
        scores: &model.scores,
        listed: None,
        unigram,
        cut_user_defined: true,
        byte_fallback: model.byte_fallback && model.kinds.contains(&BYTE),
        prefix: model.prefix,
        collapse: model.collapse,
        replaced: model.replaced,
    };
    let mut inner = guarded(path, || pieces.build())?;
    let added: Vec<AddedToken> = model
        .tokens
        .iter()
        .zip(&model.kinds)
        .filter(|(text, kind)| !text.is_empty() && [UNKNOWN, CONTROL].contains(*kind))
        .map(|(text, _)| AddedToken::from(text.clone(), true).normalized(false))
        .collect();
    inner
        .add_special_tokens(added)
        .map_err(|error| fault(&format!("its special tokens: {error}")))?;
    if inner.get_vocab_size(true) != model.tokens.len() {
        return Err(fault("lists a piece twice"));
    }
    let (bos, eos) = (model.special(model.bos), model.special(model.eos));
    Ok(Read { inner, add_bos: Some(bos.is_some()), bos, eos })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_are_no_model_are_refused() {
        let hostile: &[&[u8]] = &[
            b"",
            b"\0",
            b"not a model",
            // A piece that says it is longer than the file.
            &[0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f, 1],
            // A number without an end.
            &[0xff; 20],
            // A piece without a text.
            &[0x0a, 2, 0x18, 1],
            // A piece of a kind that does not exist.
            &[0x0a, 5, 0x0a, 1, b'a', 0x18, 9],
            // A table that says it is longer than the file.
            &[0x0a, 3, 0x0a, 1, b'a', 0x1a, 7, 0x12, 5, 0xff, 0xff, 0xff, 0xff, 1],
        ];
        for bytes in hostile {
            assert!(read(Path::new("tokenizer.model"), bytes).is_err(), "{bytes:?}");
        }
    }

    #[test]
    fn special_ids_that_are_no_pieces_name_none() {
        // Unigram, with the start at the id 7 and the end at −1.
        let minus_one = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1];
        let trainer = [&[0xc8, 2, 7, 0xd0, 2][..], &minus_one].concat();
        let piece = [0x0a, 5, 0x0a, 1, b'a', 0x18, 2];
        let bytes = [&piece[..], &[0x12, trainer.len() as u8], &trainer].concat();
        let read = read(Path::new("tokenizer.model"), &bytes).unwrap();
        assert_eq!((read.bos, read.eos, read.add_bos), (None, None, Some(false)));
    }

    #[test]
    fn pieces_that_can_be_cut_in_endless_ways_are_refused() {
        let mut bytes = vec![0x12, 2, 0x18, 2];
        for len in 1..2000_usize {
            let varint = |n: usize| [0x80 | (n & 0x7f) as u8, (n >> 7) as u8];
            let text = [&[0x0a][..], &varint(len), &vec![b'a'; len]].concat();
            bytes.extend([&[0x0a][..], &varint(text.len()), &text].concat());
        }
        let error = read(Path::new("tokenizer.model"), &bytes).err().unwrap().to_string();
        assert!(error.contains("too many ways"), "{error}");
    }
}
