//! The rules by which byte-level tokenizers cut a text into words, under the names that GGUF files
//! give them in `tokenizer.ggml.pre`.

use serde_json::Value;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{Result, SplitDelimiterBehavior};

/// A rule and what comes with it.
pub(super) struct Rule {
    cut: Cut,
    /// Whether a word that is a token skips the merges.
    pub(super) ignore_merges: bool,
    /// Whether texts begin with the first token where the file does not say.
    pub(super) add_bos: bool,
}

enum Cut {
    /// By GPT-2's expression.
    Gpt2,
    /// Each digit alone, the rest by GPT-2's expression.
    DigitsThenGpt2,
    /// By these expressions, one after the other.
    Split(&'static [&'static str]),
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

const LLAMA3: &[&str] = &[
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
];

const QWEN2: &[&str] = &[
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
];

const QWEN35: &[&str] = &[
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
];

const TEKKEN: &[&str] = &[
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
];

const UNNAMED: &[&str] = &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"];

const FALCON: &[&str] = &[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"];

/// All names, in the order a message lists them.
const NAMES: &[(&[&str], Rule)] = &[
    (&["default"], plain(Cut::Split(UNNAMED))),
    (&["gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais", "trillion"], plain(Cut::Gpt2)),
    (
        &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"],
        plain(Cut::DigitsThenGpt2),
    ),
    (&["qwen2", "stablelm2", "deepseek-r1-qwen", "hunyuan"], plain(Cut::Split(QWEN2))),
    (&["qwen35"], plain(Cut::Split(QWEN35))),
    (
        &["llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"],
        Rule { cut: Cut::Split(LLAMA3), ignore_merges: true, add_bos: true },
    ),
    (&["smaug-bpe", "dbrx", "chatglm-bpe", "glm4"], plain(Cut::Split(LLAMA3))),
    (&["tekken"], Rule { cut: Cut::Split(TEKKEN), ignore_merges: true, add_bos: true }),
    (&["falcon"], plain(Cut::Split(FALCON))),
];

const fn plain(cut: Cut) -> Rule {
    Rule { cut, ignore_merges: false, add_bos: false }
}

/// The rule of this name.
pub(super) fn find(name: &str) -> Option<&'static Rule> {
    NAMES.iter().find(|(names, _)| names.contains(&name)).map(|(_, rule)| rule)
}

/// The first name whose rule is `pre_tokenizer`, a step of the `tokenizers` crate in JSON.
pub(super) fn name_of(pre_tokenizer: &Value, ignore_merges: bool) -> Option<&'static str> {
    let wanted = steps(pre_tokenizer);
    let same = |rule: &Rule| {
        let built = rule.pre_tokenizer().ok().and_then(|step| serde_json::to_value(step).ok());
        built.is_some_and(|built| steps(&built) == wanted)
    };
    let mut alike = NAMES.iter().filter(|(_, rule)| same(rule));
    let first = alike.clone().next();
    alike.find(|(_, rule)| rule.ignore_merges == ignore_merges).or(first).map(|row| row.0[0])
}

/// The steps of a rule, without the settings that do not decide where words end.
fn steps(pre_tokenizer: &Value) -> Vec<String> {
    let one = |step: &Value| match step["type"].as_str() {
        Some("Split") => {
            let invert = step["invert"] == true;
            format!("split {} {} {invert}", step["pattern"]["Regex"], step["behavior"])
        }
        Some("Digits") => format!("digits {}", step["individual_digits"]),
        Some("ByteLevel") => {
            let [prefix, regex] = [("add_prefix_space", false), ("use_regex", true)]
                .map(|(key, default)| step[key].as_bool().unwrap_or(default));
            format!("bytes {prefix} {regex}")
        }
        _ => format!("other {step}"),
    };
    match pre_tokenizer["pretokenizers"].as_array() {
        Some(several) => several.iter().map(one).collect(),
        None => vec![one(pre_tokenizer)],
    }
}

/// All names, for messages.
pub(super) fn known() -> String {
    NAMES.iter().flat_map(|(names, _)| names.iter().copied()).collect::<Vec<_>>().join(", ")
}

impl Rule {
    /// The rule as a step of the `tokenizers` crate.
    pub(super) fn pre_tokenizer(&self) -> Result<PreTokenizerWrapper> {
        let bytes = |use_regex: bool| ByteLevel::new(false, false, use_regex).into();
        Ok(match self.cut {
            Cut::Gpt2 => bytes(true),
            Cut::DigitsThenGpt2 => {
                Sequence::new(vec![Digits::new(true).into(), bytes(true)]).into()
            }
            Cut::Split(patterns) => {
                let mut steps = Vec::new();
                for pattern in patterns {
                    let pattern = SplitPattern::Regex((*pattern).to_owned());
                    let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?;
                    steps.push(split.into());
                }
                steps.push(bytes(false));
                Sequence::new(steps).into()
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    fn cut(rule: &str, text: &str) -> Vec<String> {
        let mut pieces = PreTokenizedString::from(text);
        find(rule).unwrap().pre_tokenizer().unwrap().pre_tokenize(&mut pieces).unwrap();
        let splits = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
        splits.into_iter().map(|(_, (start, end), _)| text[start..end].to_owned()).collect()
    }

    #[test]
    fn every_rule_compiles_and_keeps_all_bytes() {
        let text = "It's 12345 déjà-vu's\n\n  Ωmega\t`x`+=3;  日本語 ½ «ok» I'LL \r\n end  ";
        for (names, _) in NAMES {
            for name in *names {
                assert_eq!(cut(name, text).concat(), text, "{name}");
            }
        }
        assert!(find("unheard-of").is_none());
    }

    #[test]
    fn a_rule_in_json_has_its_name() {
        for (names, rule) in NAMES {
            let json = serde_json::to_value(rule.pre_tokenizer().unwrap()).unwrap();
            let found = name_of(&json, rule.ignore_merges).unwrap();
            // Two names may stand for one rule; then the first does.
            let same = find(found).unwrap();
            let again = serde_json::to_value(same.pre_tokenizer().unwrap()).unwrap();
            assert_eq!(steps(&again), steps(&json), "{names:?} came back as {found}");
            assert_eq!(same.ignore_merges, rule.ignore_merges, "{names:?} came back as {found}");
        }
        let other = serde_json::json!({"type": "Whitespace"});
        assert_eq!(name_of(&other, false), None);
    }

    #[test]
    fn digits_contractions_and_spaces_differ_by_rule() {
        assert_eq!(cut("smollm", "a  12 I'LL"), ["a", "  ", "1", "2", " I", "'", "LL"]);
        assert_eq!(cut("gpt-2", "a  12 I'LL"), ["a", " ", " 12", " I", "'", "LL"]);
        assert_eq!(cut("llama-bpe", "a  12345 I'LL"), ["a", " ", " ", "123", "45", " I", "'LL"]);
        assert_eq!(cut("qwen2", "a 12\n\nb"), ["a", " ", "1", "2", "\n\n", "b"]);
        // A vowel sign of Devanagari is a mark, part of its word for the newer rule alone.
        assert_eq!(cut("qwen35", "\u{915}\u{93f} 1"), ["\u{915}\u{93f}", " ", "1"]);
        assert_eq!(cut("qwen2", "\u{915}\u{93f}"), ["\u{915}", "\u{93f}"]);
        assert_eq!(cut("default", "x+=12345"), ["x", "+=", "123", "45"]);
        assert_eq!(cut("falcon", "`a` 1234"), ["`", "a", "`", " ", "123", "4"]);
        assert_eq!(cut("tekken", "HelloWorld 42"), ["Hello", "World", " ", "4", "2"]);
    }
}
