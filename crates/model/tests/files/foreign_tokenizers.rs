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

/// Compares a folder's tokenizer, and what is written of it as `tokenizer.json`.
fn compare(folder: &Path) {
    let tokenizer = Tokenizer::from_folder(folder, &[]).unwrap();
    compare_one(folder, &tokenizer);
    let copy = tempfile::tempdir().unwrap();
    tokenizer.save(copy.path()).unwrap();
    compare_one(folder, &Tokenizer::from_folder(copy.path(), &[]).unwrap());
}

fn compare_one(folder: &Path, tokenizer: &Tokenizer) {
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
    assert_eq!(tokenizer.vocab_size(), 1240);
    assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some((1, "<s>")), Some((2, "</s>"))));
    assert!(tokenizer.add_bos());
    let text = "[INST] It's naïve 😀[/INST]";
    let ids = tokenizer.encode(text).unwrap();
    assert_eq!((ids[0], ids[ids.len() - 1]), (3, 4));
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
}

#[test]
fn models_of_sentencepiece_give_what_it_gives() {
    for name in ["bpe", "bpe-defined", "unigram", "unigram-rules"] {
        compare(&fixture("tokenizers").join(format!("sentencepiece-{name}")));
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

/// Cut off at many places and with single bytes changed, a file is read or refused.
#[test]
fn damaged_files_end_in_an_error_or_a_tokenizer() {
    for (folder, file) in [
        ("sentencepiece-bpe-defined", "tokenizer.model"),
        ("sentencepiece-unigram-rules", "tokenizer.model"),
        ("tekken", "tekken.json"),
    ] {
        let whole = fs::read(fixture("tokenizers").join(folder).join(file)).unwrap();
        let copy = tempfile::tempdir().unwrap();
        let mut state = 1_u64;
        let mut draw = |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) as usize % below
        };
        let mut refused = 0;
        for round in 0..60 {
            let mut bytes = whole.clone();
            match round % 3 {
                0 => bytes.truncate(draw(whole.len())),
                // The end holds what is not a piece.
                1 => bytes[whole.len() - 1 - draw(400)] = draw(256) as u8,
                _ => bytes[draw(whole.len())] = draw(256) as u8,
            }
            fs::write(copy.path().join(file), bytes).unwrap();
            match Tokenizer::from_folder(copy.path(), &[]) {
                Ok(tokenizer) => {
                    let _ = tokenizer.encode("the model ½ Ａ reads <tool> (a 日本");
                }
                Err(_) => refused += 1,
            }
        }
        assert!((20..60).contains(&refused), "{folder}: {refused}");
    }
}

#[test]
fn a_table_of_replaced_characters_that_is_cut_off_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let source = fixture("tokenizers/sentencepiece-unigram-rules");
    Tokenizer::from_folder(&source, &[]).unwrap().save(folder.path()).unwrap();
    let path = folder.path().join("tokenizer.json");
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    json["normalizer"]["normalizers"][0]["precompiled_charsmap"] = "////fw==".into();
    fs::write(&path, json.to_string()).unwrap();
    let error = Tokenizer::from_folder(folder.path(), &[]).unwrap_err().to_string();
    assert!(error.contains("precompiled_charsmap is cut off"), "{error}");
}

/// A GGUF file says which pieces are taken out of a text whole, and cannot say more of a normalizer
/// than that spaces are written as U+2581.
#[test]
fn what_a_gguf_file_can_say_of_pieces_is_written() {
    let open = |name: &str| {
        let folder = fixture("tokenizers").join(format!("sentencepiece-{name}"));
        Tokenizer::from_folder(&folder, &[]).unwrap()
    };
    let defined = open("bpe-defined");
    let metadata = defined.gguf_metadata(defined.vocab_size(), None, "llama").unwrap();
    let kinds = metadata.iter().find(|(key, _)| key == "tokenizer.ggml.token_type").unwrap();
    let hydralora_model::gguf::Value::Array(hydralora_model::gguf::Array::I32(kinds)) = &kinds.1
    else {
        panic!("{kinds:?}");
    };
    let whole: Vec<String> = (0..kinds.len())
        .filter(|id| kinds[*id] == 4)
        .filter_map(|id| defined.id_to_token(id as u32))
        .collect();
    assert_eq!(whole, ["<tool>", "(a", "(a !"]);
    let plain = open("bpe");
    assert!(plain.gguf_metadata(plain.vocab_size(), None, "llama").is_ok());
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
