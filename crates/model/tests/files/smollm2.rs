//! The tokenizer and the configuration in SmolLM2's GGUF file against the model's own.
//! `tests/fixtures/smollm2/golden.py` makes the lines and their ids.

use crate::fixture;
use hydralora_model::{ModelSource, TokenStream, hub};
use std::path::PathBuf;
use std::sync::OnceLock;

/// The GGUF file, if it can be had.
fn file() -> Option<PathBuf> {
    static FILE: OnceLock<Option<PathBuf>> = OnceLock::new();
    FILE.get_or_init(|| {
        if let Some(path) = std::env::var_os("HYDRALORA_SMOLLM2_GGUF") {
            return Some(path.into());
        }
        hub::resolve("smollm2-135m", &mut |line| eprintln!("{line}"))
            .inspect_err(|error| hydralora_testing::skip("smollm2", error))
            .ok()
    })
    .clone()
}

#[test]
fn the_tokenizer_is_the_models_own() {
    let Some(path) = file() else { return };
    let source = ModelSource::open(&path).unwrap();
    let tokenizer = &source.tokenizer;
    assert_eq!(tokenizer.vocab_size(), 49152);
    assert_eq!(tokenizer.bos(), Some((1, "<|im_start|>")));
    assert_eq!(tokenizer.eos(), Some((2, "<|im_end|>")));
    assert_eq!(tokenizer.pad(), Some((2, "<|im_end|>")));
    assert_eq!((tokenizer.end_ids(), tokenizer.add_bos()), ([2].as_slice(), false));
    assert!(tokenizer.chat_template().unwrap().contains("<|im_start|>assistant"));

    let rows = std::fs::read(fixture("smollm2/tokens.json")).unwrap();
    let rows: Vec<(String, Vec<u32>)> = serde_json::from_slice(&rows).unwrap();
    assert!(rows.len() >= 1200, "{} lines", rows.len());
    let saved = tempfile::tempdir().unwrap();
    tokenizer.save(saved.path()).unwrap();
    let reread = hydralora_model::Tokenizer::from_folder(saved.path(), &[]).unwrap();
    assert_eq!((reread.bos(), reread.end_ids()), (tokenizer.bos(), tokenizer.end_ids()));
    for (line, ids) in rows {
        assert_eq!(tokenizer.encode(&line).unwrap(), ids, "{line:?}");
        assert_eq!(reread.encode(&line).unwrap(), ids, "{line:?}");
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), line);
        let ranges = tokenizer.encode_with_offsets(&line).unwrap();
        assert!(ranges.iter().map(|(id, _)| id).eq(&ids), "{line:?}");
        let (mut at, mut stream, mut text) =
            (0, TokenStream::with_special(tokenizer), String::new());
        for (id, range) in ranges {
            assert!(
                range.start <= at && at <= range.end && line.get(range.clone()).is_some(),
                "{line:?} {range:?}"
            );
            at = range.end;
            text += &stream.push(id).unwrap();
        }
        assert_eq!(at, line.len(), "{line:?}");
        assert_eq!(text + &stream.finish().unwrap(), line);
    }
}

#[test]
fn the_configuration_is_the_published_one() {
    let Some(path) = file() else { return };
    let source = ModelSource::open(&path).unwrap();
    let config = &source.config;
    assert_eq!(
        (config.hidden_size, config.intermediate_size, config.num_hidden_layers),
        (576, 1536, 30)
    );
    assert_eq!(
        (config.num_attention_heads, config.num_key_value_heads, config.head_dim),
        (9, 3, 64)
    );
    assert_eq!((config.rms_norm_eps, config.rope.theta), (1e-5, 100000.0));
    assert!(config.tie_word_embeddings && !config.attention_bias);
    assert_eq!(source.weights.names().count(), 272);
    assert_eq!(config.bos_token_id, Some(1));
    assert_eq!(config.eos_token_ids, [2]);
}

#[test]
fn very_long_runs_are_encoded_whole() {
    let Some(path) = file() else { return };
    let tokenizer = ModelSource::open(&path).unwrap().tokenizer;
    for unit in [" ", "\n", "a", "7", "é", "\u{1F600}"] {
        let text = unit.repeat(100_000);
        let ids = tokenizer.encode(&text).unwrap();
        assert!(tokenizer.decode(&ids, false).unwrap() == text, "{unit:?}");
    }
}
