//! Tokenizers beside their own implementations, on lines of many scripts:
//! `fixtures/tokenizers/references.py` says what made the expectations.

use crate::fixture;
use hydralora_model::{Error, Tokenizer};
use std::fs;
use std::path::Path;

fn hash(ids: &[u32]) -> String {
    let bytes = ids.iter().flat_map(|id| id.to_le_bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{} {hash:016x}", ids.len())
}

fn lines() -> Vec<String> {
    let text = fs::read(fixture("tokenizers").join("lines.json")).unwrap();
    serde_json::from_slice(&text).unwrap()
}

fn compare(folder: &Path) {
    let tokenizer = Tokenizer::from_folder(folder, &[]).unwrap();
    let expected = fs::read_to_string(folder.join("expected.txt")).unwrap();
    let lines = lines();
    assert_eq!(expected.lines().count(), lines.len());
    let mut wrong = Vec::new();
    for (line, expected) in lines.iter().zip(expected.lines()) {
        let ids = tokenizer.encode(line).unwrap();
        if hash(&ids) != expected {
            let pieces: Vec<_> = ids.iter().map(|&id| tokenizer.id_to_token(id)).collect();
            wrong.push(format!("{line:?}: {expected}, found {} of {pieces:?}", hash(&ids)));
        }
    }
    let few = &wrong[..wrong.len().min(5)];
    assert!(wrong.is_empty(), "{}: {} differ:\n{}", folder.display(), wrong.len(), few.join("\n"));
}

#[test]
fn qwens_rule_and_merges_give_what_bpe_qwen_gives() {
    compare(&fixture("tokenizers/qwen"));
}

#[test]
fn tekken_files_give_what_mistral_common_gives() {
    let folder = fixture("tokenizers/tekken");
    compare(&folder);
    let tokenizer = Tokenizer::from_folder(&folder, &[]).unwrap();
    assert_eq!(tokenizer.vocab_size(), 2500);
    assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some((1, "<s>")), Some((2, "</s>"))));
    assert!(tokenizer.add_bos());
    let text = "[INST] It's naïve 😀[/INST]";
    let ids = tokenizer.encode(text).unwrap();
    assert_eq!((ids[0], ids[ids.len() - 1]), (3, 4));
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
}

#[test]
fn models_of_sentencepiece_give_what_it_gives() {
    for name in ["sentencepiece-bpe", "sentencepiece-unigram"] {
        compare(&fixture("tokenizers").join(name));
    }
    let tokenizer = Tokenizer::from_folder(&fixture("tokenizers/sentencepiece-bpe"), &[]).unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some((1, "<s>")), Some((2, "</s>"))));
    let text = "  a\tb 日本 <x>";
    let ids = tokenizer.encode(text).unwrap();
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
}

/// Whole vocabularies, which are too large for the repository: folders of the same form.
#[test]
fn tokenizers_of_a_named_folder_agree() {
    let Some(folder) = std::env::var_os("HYDRALORA_TOKENIZERS_DIR") else {
        hydralora_testing::skip("tokenizers", "HYDRALORA_TOKENIZERS_DIR names no folder");
        return;
    };
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.join("expected.txt").exists() {
            compare(&path);
        }
    }
}

#[test]
fn a_file_that_is_not_read_is_named() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("vocab.json"), "{}").unwrap();
    let message = match Tokenizer::from_folder(folder.path(), &[]) {
        Err(Error::MissingTokenizer { message, .. }) => message,
        other => panic!("{other:?}"),
    };
    assert!(message.starts_with("expected tokenizer.json or tekken.json or tokenizer.model;"));
    assert!(message.contains("vocab.json alone is not read"), "{message}");
}
