//! Tokenizers out of folders: special tokens, templates, streams, saving, and what is refused.

use crate::{copied_stories, fixture, replace};
use hydralora_model::gguf::{Array, GgufWriter, Value};
use hydralora_model::{Error, GgufFile, TokenStream, TokenText, Tokenizer};
use proptest::prelude::*;
use std::fs;

fn stories() -> Tokenizer {
    Tokenizer::from_folder(&fixture("stories260K"), &[2]).unwrap()
}

#[test]
fn special_tokens_are_recognised_and_left_out_on_request() {
    let tokenizer = stories();
    assert_eq!(
        (tokenizer.vocab_size(), tokenizer.bos(), tokenizer.eos()),
        (512, Some((1, "<s>")), Some((2, "</s>")))
    );
    let ids = tokenizer.encode("<s>Hi</s>").unwrap();
    assert_eq!((ids[0], ids[ids.len() - 1]), (1, 2));
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "Hi");
    assert_eq!(tokenizer.token_to_id("</s>"), Some(2));
    assert_eq!(tokenizer.id_to_token(1).as_deref(), Some("<s>"));
    assert_eq!((tokenizer.token_to_id("no such token"), tokenizer.id_to_token(512)), (None, None));
    assert_eq!(tokenizer.decode(&[512, u32::MAX], false).unwrap(), "");
    assert!(tokenizer.encode("").unwrap().is_empty());
}

#[test]
fn gemma_4_lists_its_merges() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    let mut tokens: Vec<String> =
        ["<unk>", "<bos>", "a", "b", "\u{2581}", "ab", "\u{2581}ab"].map(str::to_owned).to_vec();
    tokens.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
    let kinds = [2, 3, 1, 1, 1, 1, 1].into_iter().chain([6; 256]).collect();
    let merges = vec!["a b".to_owned(), "\u{2581} ab".to_owned()];
    GgufWriter::new()
        .metadata("tokenizer.ggml.model", Value::String("gemma4".into()))
        .metadata("tokenizer.ggml.tokens", Value::Array(Array::String(tokens)))
        .metadata("tokenizer.ggml.token_type", Value::Array(Array::I32(kinds)))
        .metadata("tokenizer.ggml.merges", Value::Array(Array::String(merges)))
        .metadata("tokenizer.ggml.bos_token_id", Value::U32(1))
        .write(&path)
        .unwrap();
    let tokenizer = Tokenizer::from_gguf(&GgufFile::open(&path).unwrap()).unwrap();
    let ids = tokenizer.encode("ab ab\nba").unwrap();
    assert_eq!(ids, [5, 6, 7 + 10, 3, 2]);
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "ab ab\nba");
    assert!(tokenizer.add_bos());
}

#[test]
fn byte_ranges_cover_the_text() {
    let tokenizer = stories();
    let text = "One day, <s> a  big ☃";
    let tokens = tokenizer.encode_with_offsets(text).unwrap();
    let ids: Vec<u32> = tokens.iter().map(|(id, _)| *id).collect();
    assert_eq!(ids, tokenizer.encode(text).unwrap());
    let mut end = 0;
    for (id, range) in &tokens {
        assert!(
            range.start <= end && range.end >= end && text.get(range.clone()).is_some(),
            "{id} {range:?}"
        );
        end = range.end;
    }
    assert_eq!(end, text.len());
    let special = tokens.iter().find(|(id, _)| *id == 1).unwrap();
    assert_eq!(&text[special.1.clone()], "<s>");
    // The three bytes of the last character are three tokens on one range.
    let last = &tokens[tokens.len() - 3..];
    assert!(last.iter().all(|(_, range)| &text[range.clone()] == "☃"), "{last:?}");
}

#[test]
fn a_saved_tokenizer_is_the_same() {
    let folder = copied_stories();
    let config = folder.path().join("tokenizer_config.json");
    fs::write(&config, r#"{"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": "<unk>", "add_bos_token": true, "chat_template": [{"name": "tool", "template": "x"}, {"name": "default", "template": "{{ 'é' }}</s>"}]}"#).unwrap();
    let first = Tokenizer::from_folder(folder.path(), &[]).unwrap();
    assert_eq!((first.pad(), first.chat_template()), (Some((0, "<unk>")), Some("{{ 'é' }}</s>")));
    let saved = tempfile::tempdir().unwrap();
    first.save(saved.path()).unwrap();
    assert_eq!(fs::read_dir(saved.path()).unwrap().count(), 2);
    let second = Tokenizer::from_folder(saved.path(), &[]).unwrap();
    assert_eq!(
        (
            first.bos(),
            first.eos(),
            first.pad(),
            first.add_bos(),
            first.end_ids(),
            first.chat_template()
        ),
        (
            second.bos(),
            second.eos(),
            second.pad(),
            second.add_bos(),
            second.end_ids(),
            second.chat_template()
        ),
    );
    let text = "Lily said: \"héllo\"  <s> 42\n";
    assert_eq!(first.encode(text).unwrap(), second.encode(text).unwrap());
    let error = first.save(&saved.path().join("absent")).unwrap_err().to_string();
    assert!(error.contains("absent"), "{error}");
}

#[test]
fn end_tokens_come_from_every_place_that_names_them() {
    let folder = copied_stories();
    let open = |ids: &[u32]| Tokenizer::from_folder(folder.path(), ids).unwrap();
    fs::write(folder.path().join("generation_config.json"), r#"{"eos_token_id": [7, 2]}"#).unwrap();
    assert_eq!(open(&[5]).end_ids(), [2, 5, 7]);
    // A template's end of turn counts where the vocabulary has it.
    let vocabulary = folder.path().join("tokenizer.json");
    let text = fs::read_to_string(&vocabulary).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let added = json["added_tokens"].as_array_mut().unwrap();
    added.push(serde_json::json!({"id": 512, "content": "<|im_end|>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}));
    fs::write(&vocabulary, json.to_string()).unwrap();
    assert_eq!(open(&[]).end_ids(), [2, 7]);
    fs::write(folder.path().join("chat_template.jinja"), "{{ m }}<|im_end|><|eot_id|>").unwrap();
    assert_eq!(open(&[]).end_ids(), [2, 7, 512]);
    assert_eq!(open(&[]).chat_template(), Some("{{ m }}<|im_end|><|eot_id|>"));
}

#[test]
fn a_special_token_outside_the_vocabulary_is_an_error() {
    let folder = copied_stories();
    let open = |ids: &[u32]| Tokenizer::from_folder(folder.path(), ids).unwrap_err();
    let error = open(&[512]);
    assert!(
        matches!(&error, Error::MissingSpecialToken { token, vocab_size: 512, .. } if token == "512"),
        "{error}"
    );
    let config = folder.path().join("tokenizer_config.json");
    replace(&config, "</s>", "<|im_end|>");
    let error = open(&[]).to_string();
    assert!(
        error.contains(
            "tokenizer_config.json: eos_token is `<|im_end|>`, which is not in the vocabulary of 512"
        ),
        "{error}"
    );
}

#[test]
fn missing_and_malformed_files_are_named() {
    let folder = copied_stories();
    let open = || Tokenizer::from_folder(folder.path(), &[]).unwrap_err();
    fs::write(folder.path().join("generation_config.json"), "{\"eos_token_id\": \"x\"}").unwrap();
    assert!(open().to_string().contains("generation_config.json: eos_token_id"), "{}", open());
    fs::write(folder.path().join("generation_config.json"), "[1]").unwrap();
    assert!(
        open().to_string().contains("generation_config.json: expected an object"),
        "{}",
        open()
    );
    fs::write(folder.path().join("tokenizer_config.json"), "{\n\"bos_token\": }").unwrap();
    let error = open().to_string();
    assert!(error.contains("tokenizer_config.json") && error.contains("line 2"), "{error}");
    let description = folder.path().join("tokenizer.json");
    fs::write(&description, "{\"version\": \"1.0\"}").unwrap();
    assert!(matches!(open(), Error::Tokenizer { .. }), "{}", open());
    assert!(open().to_string().contains("tokenizer.json"), "{}", open());
    fs::remove_file(description).unwrap();
    assert!(matches!(open(), Error::MissingTokenizer { .. }), "{}", open());
    fs::write(folder.path().join("tokenizer.model"), "").unwrap();
    assert!(open().to_string().contains("tokenizer.model"), "{}", open());
}

#[test]
fn padding_that_a_file_asks_for_is_left_out() {
    let folder = copied_stories();
    let padding = r#""padding": {"strategy": {"Fixed": 1099511627776}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"}"#;
    replace(&folder.path().join("tokenizer.json"), r#""padding": null"#, padding);
    replace(&folder.path().join("tokenizer_config.json"), "add_bos_token", "another_key");
    let tokenizer = Tokenizer::from_folder(folder.path(), &[]).unwrap();
    assert_eq!(tokenizer.encode("Hi").unwrap(), stories().encode("Hi").unwrap());
}

#[test]
fn parts_that_contradict_each_other_are_an_error() {
    let folder = copied_stories();
    let path = folder.path().join("tokenizer.json");
    let mut json: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    // Longer than the tokens it is taken off when merges are read.
    json["model"]["continuing_subword_prefix"] = "a long prefix".into();
    fs::write(&path, json.to_string()).unwrap();
    let error = Tokenizer::from_folder(folder.path(), &[]).unwrap_err().to_string();
    assert!(
        error.contains("tokenizer.json: tokenizer: its parts contradict each other"),
        "{error}"
    );
}

#[test]
fn a_stream_holds_back_characters_that_are_not_whole() {
    let tokenizer = stories();
    let ids = tokenizer.encode("a ☃!").unwrap();
    let mut stream = TokenStream::new(&tokenizer);
    let parts: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    assert!(parts.iter().all(|part| !part.contains('\u{FFFD}')), "{parts:?}");
    assert_eq!(parts.concat(), "a ☃!");
    assert_eq!(stream.finish().unwrap(), "");
    // A text that ends inside a character says so only at the end.
    let cut = ids.len() - 2;
    let mut stream = TokenStream::new(&tokenizer);
    let text: String = ids[..cut].iter().map(|&id| stream.push(id).unwrap()).collect();
    assert_eq!(text, "a ");
    assert!(stream.finish().unwrap().starts_with('\u{FFFD}'));
    // Special tokens inside a text do not make the decoder trim what follows.
    let ids =
        tokenizer.encode("One<s>").unwrap().into_iter().chain(tokenizer.encode("two").unwrap());
    let ids: Vec<u32> = ids.collect();
    for (mut stream, skip) in
        [(TokenStream::new(&tokenizer), true), (TokenStream::with_special(&tokenizer), false)]
    {
        let mut text: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        text += &stream.finish().unwrap();
        assert_eq!(text, tokenizer.decode(&ids, skip).unwrap());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn every_text_comes_back(text in "\\PC{0,24}") {
        let tokenizer = stories();
        // The pieces' own mark of a space, and special tokens, are not plain text.
        let text = text.replace(['\u{2581}', '<'], "");
        let ids = tokenizer.encode(&text).unwrap();
        prop_assert_eq!(&tokenizer.decode(&ids, true).unwrap(), &text);
        let mut stream = TokenStream::new(&tokenizer);
        let mut streamed = String::new();
        for id in ids {
            streamed += &stream.push(id).unwrap();
        }
        streamed += &stream.finish().unwrap();
        prop_assert_eq!(streamed, text);
    }

    #[test]
    fn a_text_cut_anywhere_goes_on_as_it_was(text in "\\PC{0,24}", cut in 0.0..1.0) {
        let tokenizer = stories();
        let text = text.replace(['\u{2581}', '<'], "");
        let ids = tokenizer.encode(&text).unwrap();
        let (before, after) = ids.split_at((ids.len() as f64 * cut) as usize);
        let written = written_after(&tokenizer, before, after);
        prop_assert!(text.ends_with(&written), "{:?} of {:?}", written, text);
        let begun = tokenizer.decode(before, true).unwrap();
        if !begun.contains('\u{FFFD}') {
            prop_assert_eq!(begun + &written, text);
        }
    }

    #[test]
    fn any_ids_stream_as_they_decode(ids in prop::collection::vec(0u32..520, 0..24)) {
        let tokenizer = stories();
        let mut stream = TokenStream::new(&tokenizer);
        let mut streamed = String::new();
        for &id in &ids {
            streamed += &stream.push(id).unwrap();
        }
        streamed += &stream.finish().unwrap();
        // The decoder judges a run of byte tokens as a whole: one that is no text at its end takes
        // back what was handed out.
        let whole = tokenizer.decode(&ids, true).unwrap();
        if !whole.contains('\u{FFFD}') {
            prop_assert_eq!(streamed, whole);
        }
    }
}

/// What a stream behind `before` makes of `ids`.
fn written_after(tokenizer: &Tokenizer, before: &[u32], ids: &[u32]) -> String {
    let mut stream = TokenText::after(tokenizer, before);
    let mut text: String = ids.iter().map(|&id| stream.push(tokenizer, id).unwrap()).collect();
    text += &stream.finish(tokenizer).unwrap();
    text
}

#[test]
fn what_follows_a_text_keeps_its_space() {
    let tokenizer = stories();
    let ids = |text: &str| tokenizer.encode(text).unwrap();
    let (start, word) = (tokenizer.bos().unwrap().0, ids("time"));
    assert_eq!(written_after(&tokenizer, &ids("Once upon a"), &word), " time");
    // Nothing but marks is no text; behind a text they are none either.
    for marks in [vec![], vec![start], vec![start; 40]] {
        assert_eq!(written_after(&tokenizer, &marks, &word), "time");
        let behind = [ids("Once upon a"), marks].concat();
        assert_eq!(written_after(&tokenizer, &behind, &word), " time");
    }
    // A character that the text before left unfinished comes with its last byte.
    let snowman = ids("a ☃!");
    for cut in 1..snowman.len() {
        let text = written_after(&tokenizer, &snowman[..cut], &snowman[cut..]);
        assert!("a ☃!".ends_with(&text) && !text.contains('\u{FFFD}'), "{cut}: {text:?}");
    }
}

#[test]
fn replacements_that_would_fill_the_memory_are_refused() {
    let double = r#"{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}"#;
    let many = vec![double; 40].join(",");
    let long = double.replace("aa", &"b".repeat(1 << 20));
    let sequence =
        |kind: &str, parts: &str| format!(r#"{{"type": "Sequence", "{kind}": [{parts}]}}"#);
    for (part, value) in [
        ("normalizer", sequence("normalizers", &many)),
        ("decoder", sequence("decoders", &many)),
        ("normalizer", long),
    ] {
        let folder = copied_stories();
        let path = folder.path().join("tokenizer.json");
        let mut file: serde_json::Value =
            serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        file[part] = serde_json::from_str(&value).unwrap();
        fs::write(&path, file.to_string()).unwrap();
        let error = Tokenizer::from_folder(folder.path(), &[2]).unwrap_err().to_string();
        assert!(error.contains(&format!("its {part} could make a text")), "{error}");
    }
}
