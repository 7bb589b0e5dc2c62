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
use tokenizers::{PreTokenizerWrapper, Result, Tokenizer};

/// The kinds of piece, with the numbers of SentencePiece and of GGUF.
pub(super) const NORMAL: u64 = 1;
pub(super) const UNKNOWN: u64 = 2;
pub(super) const CONTROL: u64 = 3;
pub(super) const USER_DEFINED: u64 = 4;
pub(super) const BYTE: u64 = 6;

/// What SentencePiece writes for a space.
const SPACE: &str = "\u{2581}";

/// A vocabulary and how texts are brought to its form.
pub(super) struct Pieces<'a> {
    pub(super) tokens: &'a [String],
    pub(super) kinds: &'a [u64],
    pub(super) scores: &'a [f64],
    /// Whether the likeliest pieces are taken, not the best merges.
    pub(super) unigram: bool,
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

impl Pieces<'_> {
    /// The tokenizer without its special tokens.
    pub(super) fn build(&self) -> Result<Tokenizer> {
        let unknown = self.kinds.iter().position(|&kind| kind == UNKNOWN);
        let mut inner = if self.unigram {
            let pieces = self.tokens.iter().cloned().zip(self.scores.iter().copied()).collect();
            Tokenizer::new(Unigram::from(pieces, unknown, self.byte_fallback)?)
        } else {
            let ids = vocabulary(self.tokens).into_iter().map(|(text, id)| (text.to_owned(), id));
            let mut model = BPE::builder()
                .vocab_and_merges(ids.collect::<HashMap<_, _, _>>(), self.merges())
                .byte_fallback(self.byte_fallback)
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
            for (runs, one) in [("^ +| +$", ""), (" {2,}", " ")] {
                let runs = ReplacePattern::Regex(runs.to_owned());
                normalizers.push(Replace::new(runs, one)?.into());
            }
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
        inner.with_normalizer(Some(Sequence::new(normalizers)))?;
        inner
            .with_pre_tokenizer(None::<PreTokenizerWrapper>)
            .with_decoder(Some(DecoderSequence::new(decoders)));
        Ok(inner)
    }

    /// SentencePiece always joins the neighbours whose union has the best score. So every way to
    /// cut a piece into two known pieces is a merge, and the piece's score is the merge's rank.
    fn merges(&self) -> Vec<(String, String)> {
        let ids = vocabulary(self.tokens);
        let joinable = |id: usize| !matches!(self.kinds[id], UNKNOWN | CONTROL | BYTE);
        let part = |text: &str| ids.get(text).map(|&id| id as usize).filter(|&id| joinable(id));
        // Looking up every cut of a piece as long as the file would take forever.
        let joinable_lengths: HashSet<usize> =
            (self.tokens.iter().enumerate().filter(|(id, _)| joinable(*id)))
                .map(|(_, token)| token.len())
                .collect();
        let mut merges = Vec::new();
        for (id, piece) in self.tokens.iter().enumerate().filter(|(id, _)| joinable(*id)) {
            for (at, _) in piece.char_indices().skip(1) {
                let (left, right) = piece.split_at(at);
                let as_long = |part: &str| joinable_lengths.contains(&part.len());
                let known = |text: &str| part(text).is_some();
                if as_long(left) && as_long(right) && known(left) && known(right) {
                    merges.push((self.scores[id], id, left, right));
                }
            }
        }
        merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        merges.into_iter().map(|(_, _, left, right)| (left.to_owned(), right.to_owned())).collect()
    }
}
