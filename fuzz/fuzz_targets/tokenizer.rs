//! `tokenizer.json` and the files beside it.
#![no_main]

use hydralora_fuzz::{only_uncaught_panics_count, with_files};
use hydralora_model::{TokenStream, Tokenizer};
use libfuzzer_sys::fuzz_target;

const NAMES: &[&str] = &[
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
];

fuzz_target!(|data: &[u8]| {
    only_uncaught_panics_count();
    with_files(data, NAMES, |folder| {
        let Ok(tokenizer) = Tokenizer::from_folder(folder, &[1]) else { return };
        let text = " Once upon <s>a time,\n\n ünd 123 \u{1F600}";
        if let Ok(ids) = tokenizer.encode(text) {
            let _ = tokenizer.decode(&ids, true);
            let mut stream = TokenStream::new(&tokenizer);
            for id in ids {
                let _ = stream.push(id);
            }
            let _ = stream.finish();
        }
        let _ = tokenizer.encode_with_offsets(text);
        for pieces in ["llama", "gemma4"] {
            let _ = tokenizer.gguf_metadata(tokenizer.vocab_size(), None, pieces);
        }
        let _ = tokenizer.save(folder);
    });
});
