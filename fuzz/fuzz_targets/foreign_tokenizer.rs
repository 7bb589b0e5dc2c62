//! `tekken.json`, or else a model of SentencePiece.
#![no_main]

use hydralora_fuzz::{only_uncaught_panics_count, with_files};
use hydralora_model::Tokenizer;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    only_uncaught_panics_count();
    let Some((kind, file)) = data.split_first() else { return };
    let name = if kind % 2 == 0 { "tokenizer.model" } else { "tekken.json" };
    with_files(file, &[name], |folder| {
        let Ok(tokenizer) = Tokenizer::from_folder(folder, &[]) else { return };
        if let Ok(ids) = tokenizer.encode(" Once upon <s>a  time,\n\n ünd ½ 123 \u{1F600}") {
            let _ = tokenizer.decode(&ids, true);
        }
        let _ = tokenizer.gguf_metadata(tokenizer.vocab_size(), None);
        let _ = tokenizer.save(folder);
    });
});
