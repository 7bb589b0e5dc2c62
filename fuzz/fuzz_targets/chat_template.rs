//! The source of a chat template.
#![no_main]

use hydralora_data::{ChatTemplate, Message};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|source: &str| {
    let Ok(template) = ChatTemplate::from_source_at("fuzzed", source, 1_700_000_000) else {
        return;
    };
    let conversation = [
        Message::system("Be short."),
        Message::user("Was ist größer, <b>1</b> oder 2?\n"),
        Message::assistant("2"),
        Message::user(""),
    ];
    for (messages, prompt) in
        [(&conversation[..], true), (&conversation[..3], false), (&conversation[..0], true)]
    {
        let _ = template.render(messages, prompt, "<s>", "</s>");
    }
});
