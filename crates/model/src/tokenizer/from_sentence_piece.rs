//! SentencePiece's `tokenizer.model`: a protocol buffer of pieces, of how they were trained and of
//! how texts are normalized (`sentencepiece_model.proto`).

use super::Special;
use super::from_folder::Read;
use super::sentence_piece::{BYTE, CONTROL, NORMAL, Pieces, UNKNOWN, USER_DEFINED};
use crate::error::{Error, Result};
use std::path::Path;
use tokenizers::AddedToken;

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
    if !model.escape || model.suffix {
        return Err(fault("treats white space in a way that is not supported"));
    }
    let pieces = Pieces {
        tokens: &model.tokens,
        kinds: &model.kinds,
        scores: &model.scores,
        unigram,
        byte_fallback: model.byte_fallback && model.kinds.contains(&BYTE),
        prefix: model.prefix,
        collapse: model.collapse,
        replaced: model.replaced,
    };
    let mut inner = pieces.build().map_err(|error| fault(&error.to_string()))?;
    let added: Vec<AddedToken> = model
        .tokens
        .iter()
        .zip(&model.kinds)
        .filter(|(text, kind)| !text.is_empty() && [UNKNOWN, CONTROL, USER_DEFINED].contains(*kind))
        .map(|(text, kind)| AddedToken::from(text.clone(), *kind != USER_DEFINED).normalized(false))
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
        ];
        for bytes in hostile {
            assert!(read(Path::new("tokenizer.model"), bytes).is_err(), "{bytes:?}");
        }
    }
}
