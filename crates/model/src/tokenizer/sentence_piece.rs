//! SentencePiece's pieces, rebuilt for the `tokenizers` crate.

use std::collections::{HashMap, HashSet};
use tokenizers::decoders::DecoderWrapper;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as DecoderSequence;
use tokenizers::decoders::strip::Strip as StripDecoder;
use tokenizers::models::bpe::BPE;
use tokenizers::models::unigram::Unigram;
use tokenizers::normalizers::precompiled::Precompiled;
use tokenizers::normalizers::replace::ReplacePattern;
use tokenizers::normalizers::{NormalizerWrapper, Prepend, Replace, Sequence};
use tokenizers::pre_tokenizers::sequence::Sequence as Cuts;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{PreTokenizerWrapper, Result, SplitDelimiterBehavior, Tokenizer};

/// The kinds of piece, with the numbers of SentencePiece and of GGUF.
pub(super) const NORMAL: u64 = 1;
pub(super) const UNKNOWN: u64 = 2;
pub(super) const CONTROL: u64 = 3;
pub(super) const USER_DEFINED: u64 = 4;
pub(super) const BYTE: u64 = 6;

/// How many bytes all merges together may have: so many times the vocabulary's own, and some more.
/// Published vocabularies stay below 10 times; runs of one letter, of every length, would fill
/// the memory.
const MERGES_PER_BYTE: usize = 64;
const MERGES_FLOOR: usize = 1 << 24;

/// What SentencePiece writes for a space.
const SPACE: &str = "\u{2581}";

/// A vocabulary and how texts are brought to its form.
pub(super) struct Pieces<'a> {
    pub(super) tokens: &'a [String],
    pub(super) kinds: &'a [u64],
    pub(super) scores: &'a [f64],
    /// The merges in order, where a file lists them; else they follow from the scores.
    pub(super) listed: Option<Vec<(String, String)>>,
    /// Whether the likeliest pieces are taken, not the best merges.
    pub(super) unigram: bool,
    /// Whether user-defined pieces are taken out of the text before the others are formed; else the
    /// caller makes tokens of them that stand outside the vocabulary.
    pub(super) cut_user_defined: bool,
    /// Whether unknown characters become their bytes.
    pub(super) byte_fallback: bool,
    /// Whether a space is put before every text.
    pub(super) prefix: bool,
    /// Whether runs of spaces become one, and those at the ends none.
    pub(super) collapse: bool,
    /// SentencePiece's compiled table of replaced characters; empty for none.
    pub(super) replaced: &'a [u8],
}

/// Tokens and their ids. Where a text occurs twice the first id holds.
pub(super) fn vocabulary(tokens: &[String]) -> HashMap<&str, u32> {
    let mut ids = HashMap::with_capacity(tokens.len());
    for (id, token) in tokens.iter().enumerate() {
        ids.entry(token.as_str()).or_insert(id as u32);
    }
    ids
}

/// Whether a compiled table of replaced characters is as long as it says: the library reserves
/// memory for what it says. A table begins with the length of its first part in bytes.
pub(super) fn table_fits(table: &[u8]) -> bool {
    let Some((head, rest)) = table.split_first_chunk::<4>() else { return table.is_empty() };
    u32::from_le_bytes(*head) as usize <= rest.len()
}

/// How many bytes of merges are left; an error where a vocabulary wants more of them than any
/// that was trained.
pub(super) struct MergeBudget(usize);

impl MergeBudget {
    /// For a vocabulary of `bytes` bytes.
    pub(super) fn new(bytes: usize) -> Self {
        Self(bytes.saturating_mul(MERGES_PER_BYTE).saturating_add(MERGES_FLOOR))
    }

    /// Takes a merge into a token of `len` bytes.
    pub(super) fn take(&mut self, len: usize) -> std::result::Result<(), String> {
        let left = self.0.checked_sub(len);
        self.0 = left.ok_or("its tokens can be cut in two in too many ways to be a vocabulary")?;
        Ok(())
    }
}

impl Pieces<'_> {
    /// The tokenizer without its special tokens.
    pub(super) fn build(mut self) -> Result<Tokenizer> {
        let unknown = self.kinds.iter().position(|&kind| kind == UNKNOWN);
        let mut inner = if self.unigram {
            let pieces = self.tokens.iter().cloned().zip(self.scores.iter().copied()).collect();
            Tokenizer::new(Unigram::from(pieces, unknown, self.byte_fallback)?)
        } else {
            let merges = match self.listed.take() {
                Some(listed) => listed,
                None => self.merges()?,
            };
            let ids = vocabulary(self.tokens).into_iter().map(|(text, id)| (text.to_owned(), id));
            let mut model = BPE::builder()
                .vocab_and_merges(ids.collect::<HashMap<_, _, _>>(), merges)
                .byte_fallback(self.byte_fallback)
                .ignore_merges(self.cut_user_defined && self.kinds.contains(&USER_DEFINED))
                .fuse_unk(true);
            if let Some(unknown) = unknown {
                model = model.unk_token(self.tokens[unknown].clone());
            }
            Tokenizer::new(model.build()?)
        };
        let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
        if !self.replaced.is_empty() {
            normalizers.push(Precompiled::from(self.replaced)?.into());
        }
        if self.collapse {
            // Of white space only the space itself counts.
            normalizers.push(replace(r"\A +", "")?);
            normalizers.push(replace(" {2,}", " ")?);
        }
        let mut decoders: Vec<DecoderWrapper> = vec![
            Replace::new(SPACE, " ")?.into(),
            ByteFallback::default().into(),
            Fuse::default().into(),
        ];
        if self.prefix {
            normalizers.push(Prepend::new(SPACE.to_owned()).into());
            decoders.push(StripDecoder::new(' ', 1, 0).into());
        }
        normalizers.push(Replace::new(" ", SPACE)?.into());
        if self.collapse {
            // At the end a written U+2581 goes like a space.
            normalizers.push(replace("\u{2581}+\\z", "")?);
        }
        inner.with_normalizer(Some(Sequence::new(normalizers)))?;
        let cuts = self.cuts()?;
        inner
            .with_pre_tokenizer((!cuts.is_empty()).then(|| Cuts::new(cuts)))
            .with_decoder(Some(DecoderSequence::new(decoders)));
        Ok(inner)
    }

    /// Where a text is cut before pieces are formed.
    fn cuts(&self) -> Result<Vec<PreTokenizerWrapper>> {
        let mut cuts = Vec::new();
        let pieces = self.tokens.iter().zip(self.kinds);
        let mut defined: Vec<&str> = pieces
            .filter(|(text, kind)| **kind == USER_DEFINED && !text.is_empty())
            .map(|(text, _)| text.as_str())
            .collect();
        if self.cut_user_defined && !defined.is_empty() {
            // The longest that fits counts.
            defined.sort_by_key(|text| std::cmp::Reverse(text.len()));
            let any: Vec<_> = defined.iter().map(|text| fancy_regex::escape(text)).collect();
            cuts.push(cut(&any.join("|"), SplitDelimiterBehavior::Isolated)?);
        }
        if self.unigram && self.byte_fallback {
            // A text that spells out the name of a byte's piece is not that byte.
            let named = "<(?=0x[0-9A-F]{2}>)";
            cuts.push(cut(named, SplitDelimiterBehavior::MergedWithPrevious)?);
        }
        Ok(cuts)
    }

    /// SentencePiece always joins the neighbours whose union has the best score. So every way to
    /// cut a piece into two known pieces is a merge, and the piece's score is the merge's rank.
    fn merges(&self) -> Result<Vec<(String, String)>> {
        let ids = vocabulary(self.tokens);
        let joinable = |id: usize| match self.kinds[id] {
            UNKNOWN | CONTROL | BYTE => false,
            USER_DEFINED => !self.cut_user_defined,
            _ => true,
        };
        let part = |text: &str| ids.get(text).map(|&id| id as usize).filter(|&id| joinable(id));
        // Looking up every cut of a piece as long as the file would take forever.
        let joinable_lengths: HashSet<usize> =
            (self.tokens.iter().enumerate().filter(|(id, _)| joinable(*id)))
                .map(|(_, token)| token.len())
                .collect();
        let mut budget = MergeBudget::new(self.tokens.iter().map(String::len).sum());
        let mut merges = Vec::new();
        for (id, piece) in self.tokens.iter().enumerate().filter(|(id, _)| joinable(*id)) {
            for (at, _) in piece.char_indices().skip(1) {
                let (left, right) = piece.split_at(at);
                let as_long = |part: &str| joinable_lengths.contains(&part.len());
                let known = |text: &str| part(text).is_some();
                if as_long(left) && as_long(right) && known(left) && known(right) {
                    budget.take(piece.len())?;
                    merges.push((self.scores[id], id, left, right));
                }
            }
        }
        merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let texts = |(_, _, left, right): (f64, usize, &str, &str)| (left.into(), right.into());
        Ok(merges.into_iter().map(texts).collect())
    }
}

fn replace(pattern: &str, by: &str) -> Result<NormalizerWrapper> {
    Ok(Replace::new(ReplacePattern::Regex(pattern.to_owned()), by)?.into())
}

fn cut(pattern: &str, behavior: SplitDelimiterBehavior) -> Result<PreTokenizerWrapper> {
    Ok(Split::new(SplitPattern::Regex(pattern.to_owned()), behavior, false)?.into())
}
