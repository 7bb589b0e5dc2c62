//! Mistral's `tekken.json`: tokens as bytes in the order of their merges, and a rule for words.

use super::from_folder::Read;
use super::sentence_piece::MergeBudget;
use super::{Special, guarded};
use crate::error::{Error, Result};
use serde::Deserialize;
use std::collections::{HashMap, HashSet};
use std::path::Path;
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel as Bytes;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

/// No file has more special tokens; published ones have 1,000.
const MAX_SPECIAL: usize = 1 << 16;

/// The first special tokens of files that do not list them.
const SPECIAL: &[&str] = &[
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
];

#[derive(Deserialize)]
struct File {
    config: Config,
    vocab: Vec<Token>,
    #[serde(default)]
    special_tokens: Option<Vec<SpecialToken>>,
}

#[derive(Deserialize)]
struct Config {
    pattern: String,
    default_vocab_size: usize,
    default_num_special_tokens: usize,
}

#[derive(Deserialize)]
struct Token {
    #[serde(default)]
    rank: Option<usize>,
    token_bytes: String,
}

#[derive(Deserialize)]
struct SpecialToken {
    rank: usize,
    token_str: String,
}

pub(super) fn read(path: &Path, bytes: &[u8]) -> Result<Read> {
    let file: File = serde_json::from_slice(bytes)
        .map_err(|fault| Error::Json { path: path.to_path_buf(), fault })?;
    guarded(path, || build(&file).map_err(Into::into))
}

fn build(file: &File) -> std::result::Result<Read, String> {
    let special = special_tokens(file)?;
    let kept = file.config.default_vocab_size.checked_sub(special.len());
    let kept = kept.filter(|&kept| kept <= file.vocab.len()).ok_or_else(|| {
        format!(
            "{} tokens and {} special ones for a vocabulary of {}",
            file.vocab.len(),
            special.len(),
            file.config.default_vocab_size
        )
    })?;
    let tokens: Vec<Vec<u8>> = file.vocab[..kept]
        .iter()
        .enumerate()
        .map(|(rank, token)| {
            if token.rank.is_some_and(|own| own != rank) {
                return Err(format!("vocab[{rank}].rank: expected {rank}"));
            }
            let bytes = base64(&token.token_bytes).filter(|bytes| !bytes.is_empty());
            bytes.ok_or_else(|| format!("vocab[{rank}].token_bytes: expected base64"))
        })
        .collect::<std::result::Result<_, _>>()?;
    let ranks: HashMap<&[u8], usize> =
        tokens.iter().enumerate().map(|(rank, bytes)| (bytes.as_slice(), rank)).collect();
    if ranks.len() != tokens.len()
        || (0..=255).any(|byte: u8| !ranks.contains_key([byte].as_slice()))
    {
        return Err("expected distinct tokens, and one for every byte".to_owned());
    }

    let letters = byte_letters();
    let text = |bytes: &[u8]| bytes.iter().map(|&byte| letters[byte as usize]).collect::<String>();
    let mut vocabulary: HashMap<String, u32> =
        HashMap::with_capacity(file.config.default_vocab_size);
    for (id, token) in special.iter().enumerate() {
        vocabulary.insert(token.clone(), id as u32);
    }
    for (rank, bytes) in tokens.iter().enumerate() {
        // A special token's text never comes out of merges: it is cut out of the text before.
        vocabulary.entry(text(bytes)).or_insert((special.len() + rank) as u32);
    }
    // The pair is joined whose union comes first, however the union is cut.
    let lengths: HashSet<usize> = tokens.iter().map(Vec::len).collect();
    let mut budget = MergeBudget::new(tokens.iter().map(Vec::len).sum());
    let mut merges = Vec::new();
    for bytes in &tokens {
        // Looking up every cut of a token as long as the file would take forever.
        let as_long = |at: &usize| lengths.contains(at) && lengths.contains(&(bytes.len() - at));
        let mut cuts: Vec<(usize, usize, usize)> = (1..bytes.len())
            .filter(as_long)
            .filter_map(|at| Some((*ranks.get(&bytes[..at])?, *ranks.get(&bytes[at..])?, at)))
            .collect();
        cuts.sort_unstable();
        budget.take(bytes.len().saturating_mul(cuts.len()))?;
        merges.extend(cuts.iter().map(|&(_, _, at)| (text(&bytes[..at]), text(&bytes[at..]))));
    }

    let wrong = |error: tokenizers::Error| error.to_string();
    let model = BPE::builder()
        .vocab_and_merges(vocabulary.into_iter().collect::<HashMap<_, _, _>>(), merges)
        .ignore_merges(true)
        .build()
        .map_err(wrong)?;
    let pattern = SplitPattern::Regex(file.config.pattern.clone());
    let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
        .map_err(|error| format!("config.pattern: {error}"))?;
    let mut inner = tokenizers::Tokenizer::new(model);
    inner
        .with_pre_tokenizer(Some(Sequence::new(vec![
            split.into(),
            Bytes::new(false, false, false).into(),
        ])))
        .with_decoder(Some(ByteLevel::default()));
    let added = special.iter().map(|text| AddedToken::from(text.clone(), true).normalized(false));
    inner.add_special_tokens(added.collect::<Vec<_>>()).map_err(wrong)?;
    let named = |text: &str| -> Option<Special> {
        special.iter().position(|known| known == text).map(|id| (id as u32, text.to_owned()))
    };
    Ok(Read { inner, bos: named("<s>"), eos: named("</s>"), add_bos: Some(true) })
}

/// The texts of the special tokens, which have the first ids.
fn special_tokens(file: &File) -> std::result::Result<Vec<String>, String> {
    let count = file.config.default_num_special_tokens;
    if count > file.config.default_vocab_size.min(MAX_SPECIAL) {
        let message = format!("{count} is more than the vocabulary has, or than {MAX_SPECIAL}");
        return Err(format!("config.default_num_special_tokens: {message}"));
    }
    let mut texts: Vec<String> = (0..count).map(|id| format!("<SPECIAL_{id}>")).collect();
    match &file.special_tokens {
        Some(listed) => {
            for token in listed {
                let text = texts.get_mut(token.rank).ok_or_else(|| {
                    format!("special_tokens: rank {} is beyond {count}", token.rank)
                })?;
                text.clone_from(&token.token_str);
            }
        }
        None => texts.iter_mut().zip(SPECIAL).for_each(|(text, known)| *text = (*known).to_owned()),
    }
    let distinct: HashSet<&String> = texts.iter().collect();
    if distinct.len() != texts.len() {
        return Err("special_tokens: expected every text once".to_owned());
    }
    if let Some(rank) = texts.iter().position(String::is_empty) {
        return Err(format!("special_tokens: the token {rank} has no text"));
    }
    Ok(texts)
}

/// The letters that stand for bytes in byte-level vocabularies: printable bytes for themselves,
/// the others, in order, for the letters from U+0100 on.
fn byte_letters() -> [char; 256] {
    let mut next = 0x100_u32;
    std::array::from_fn(|byte| {
        let byte = byte as u32;
        let letter = match byte {
            0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => byte,
            _ => {
                next += 1;
                next - 1
            }
        };
        char::from_u32(letter).unwrap_or('\u{fffd}')
    })
}

/// The bytes of a text in base64.
pub(super) fn base64(text: &str) -> Option<Vec<u8>> {
    let digits = text.trim_end_matches('=').bytes().map(|digit| match digit {
        b'A'..=b'Z' => Some(digit - b'A'),
        b'a'..=b'z' => Some(digit - b'a' + 26),
        b'0'..=b'9' => Some(digit - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    });
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut held, mut bits) = (0_u32, 0);
    for digit in digits {
        held = (held << 6 | u32::from(digit?)) & 0xfff;
        bits += 6;
        if bits >= 8 {
            bits -= 8;
            bytes.push((held >> bits) as u8);
        }
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_read() {
        for (text, bytes) in [("", &b""[..]), ("Zg==", b"f"), ("Zm8=", b"fo"), ("Zm9v", b"foo")] {
            assert_eq!(base64(text).unwrap(), bytes);
        }
        assert_eq!(base64("/+8"), Some(vec![0xff, 0xef]));
        assert_eq!(base64("Z!"), None);
    }

    #[test]
    fn files_that_contradict_themselves_are_refused() {
        let fault = |json: &str| match read(Path::new("tekken.json"), json.as_bytes()) {
            Err(error) => error.to_string(),
            Ok(_) => panic!("{json}"),
        };
        let config = |size, special| {
            format!(
                r#"{{"config": {{"pattern": "a", "default_vocab_size": {size},
                "default_num_special_tokens": {special}}}, "vocab": [{{"token_bytes": "YQ=="}}]}}"#
            )
        };
        assert!(fault("{}").contains("config"));
        assert!(fault(&config(2, 3)).contains("default_num_special_tokens"));
        assert!(fault(&config(9, 1)).contains("1 tokens and 1 special ones"));
        assert!(fault(&config(2, 1)).contains("one for every byte"));
        // No memory is asked for that the file's size does not justify.
        let huge = config(usize::MAX, usize::MAX - 1);
        assert!(fault(&huge).contains("default_num_special_tokens"), "{}", fault(&huge));
        let ranked = config(2, 1).replace(r#"{"token_bytes""#, r#"{"rank": 7, "token_bytes""#);
        assert!(fault(&ranked).contains("vocab[0].rank: expected 0"));
        let listed = |tokens: &str| {
            config(3, 2)
                .replace(r#", "vocab""#, &format!(r#", "special_tokens": [{tokens}], "vocab""#))
        };
        let twice = r#"{"rank": 0, "token_str": "a"}, {"rank": 1, "token_str": "a"}"#;
        assert!(fault(&listed(twice)).contains("every text once"));
        assert!(fault(&listed(r#"{"rank": 1, "token_str": ""}"#)).contains("token 1 has no text"));
        assert!(fault(&listed(r#"{"rank": 9, "token_str": "a"}"#)).contains("rank 9 is beyond 2"));
        assert!(fault(&listed(r#"{"rank": -1, "token_str": "a"}"#)).contains("-1"));
    }

    #[test]
    fn tokens_that_can_be_cut_in_endless_ways_are_refused() {
        let letters: Vec<String> = (0..=255_u8)
            .map(|byte| vec![byte])
            .chain((2..2000).map(|len| vec![b'a'; len]))
            .map(|token| format!(r#"{{"token_bytes": "{}"}}"#, encoded(&token)))
            .collect();
        let file = format!(
            r#"{{"config": {{"pattern": "a", "default_vocab_size": {}, "default_num_special_tokens": 1}},
            "vocab": [{}]}}"#,
            letters.len() + 1,
            letters.join(", ")
        );
        let error = read(Path::new("tekken.json"), file.as_bytes()).err().unwrap().to_string();
        assert!(error.contains("too many ways"), "{error}");
    }

    /// Bytes in base64.
    fn encoded(bytes: &[u8]) -> String {
        const DIGITS: &[u8; 64] =
            b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let digit = |bits: u32| char::from(DIGITS[(bits & 63) as usize]);
        let triple = |part: &[u8]| {
            let bits = part.iter().fold(0, |bits, &byte| bits << 8 | u32::from(byte));
            let bits = bits << (8 * (3 - part.len()));
            let count = part.len() + 1;
            [18, 12, 6, 0]
                .into_iter()
                .take(count)
                .map(move |at| digit(bits >> at))
                .collect::<String>()
        };
        bytes.chunks(3).map(triple).collect()
    }
}
