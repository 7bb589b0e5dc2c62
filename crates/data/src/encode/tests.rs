use std::path::PathBuf;

use super::*;
use crate::byte_encoder::ByteEncoder;
use crate::error::Location;

fn record(body: Body) -> Record {
    let location = Location { path: PathBuf::from("x.jsonl"), line: 3, record: None };
    Record { location, row: 2, body, domain: None, variables: Map::new(), unread: Vec::new() }
}

fn encoder() -> ByteEncoder {
    ByteEncoder::new(&["<|im_start|>", "<|im_end|>", "<|eot_id|>"]).with_eos("</s>")
}

fn options<'a>(encoder: &'a ByteEncoder, template: Option<&'a ChatTemplate>) -> EncodeOptions<'a> {
    EncodeOptions {
        encoder,
        template,
        max_seq_len: 10_000,
        train_on_prompt: false,
        overlong: Overlong::Truncate,
        turns: Turns::Each,
        special_tokens: SpecialTokens::Read,
    }
}

/// The sequences of a record and what was seen of it.
fn kept(record: &Record, options: &EncodeOptions<'_>) -> (Vec<Sequence>, Seen) {
    match encode_record(record, options).unwrap() {
        Encoded::Kept { sequences, seen } => (sequences, seen),
        dropped => panic!("{dropped:?}"),
    }
}

/// The whole text of a sequence and the trained parts of it.
fn shown(sequence: &Sequence, encoder: &ByteEncoder) -> (String, String) {
    let Sequence { tokens, labels, .. } = sequence;
    assert_eq!(tokens.len(), labels.len());
    let mut parts = String::new();
    let mut inside = false;
    for (&token, &label) in tokens.iter().zip(labels) {
        assert!(label == token || label == IGNORE_LABEL);
        if label == token {
            if !inside && !parts.is_empty() {
                parts.push('¦');
            }
            parts.push_str(&encoder.decode(&[token]));
        }
        inside = label == token;
    }
    (encoder.decode(tokens), parts)
}

/// The same of a record that is one sequence.
fn trained(body: Body, encoder: &ByteEncoder, options: &EncodeOptions<'_>) -> (String, String) {
    let (sequences, _) = kept(&record(body), options);
    assert_eq!(sequences.len(), 1);
    shown(&sequences[0], encoder)
}

/// The trained parts of each sequence of a conversation.
fn parts(messages: Vec<Message>, template: &ChatTemplate, turns: Turns) -> (Vec<String>, Seen) {
    let encoder = encoder();
    let options = EncodeOptions { turns, ..options(&encoder, Some(template)) };
    let (sequences, seen) = kept(&record(Body::Chat(messages)), &options);
    (sequences.iter().map(|sequence| shown(sequence, &encoder).1).collect(), seen)
}

fn dialogue() -> Vec<Message> {
    vec![
        Message::system("S"),
        Message::user("A?"),
        Message::assistant("one"),
        Message::user("B?"),
        Message::assistant("two"),
    ]
}

#[test]
fn every_template_trains_all_answers_with_their_end_and_nothing_else() {
    for (name, expected) in [
        ("alpaca", "one</s>¦two</s>"),
        ("chatml", "one<|im_end|>¦two<|im_end|>"),
        ("gemma", "one<end_of_turn>¦two<end_of_turn>"),
        ("llama2", " one </s>¦ two </s>"),
        ("llama3", "one<|eot_id|>¦two<|eot_id|>"),
        ("mistral", " one</s>¦ two</s>"),
        ("phi3", "one<|end|>¦two<|end|>"),
        ("plain", "one</s>¦two</s>"),
        ("vicuna", " one</s>¦ two</s>"),
        ("zephyr", "one</s>¦two</s>"),
    ] {
        let template = ChatTemplate::builtin(name).unwrap();
        let encoder = encoder();
        let mut options = options(&encoder, Some(&template));
        let (_, parts) = trained(Body::Chat(dialogue()), &encoder, &options);
        assert_eq!(parts, expected, "{name}");
        options.train_on_prompt = true;
        let (text, parts) = trained(Body::Chat(dialogue()), &encoder, &options);
        assert_eq!(text, parts, "{name}");
    }
}

#[test]
fn the_start_token_is_added_where_missing_and_never_doubled() {
    let llama3 = ChatTemplate::builtin("llama3").unwrap();
    let chatml = ChatTemplate::builtin("chatml").unwrap();
    let greedy = ChatTemplate::from_source(
        "greedy",
        "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
    )
    .unwrap();
    for (template, add_bos, expected) in [
        (&llama3, true, 1),
        (&llama3, false, 1),
        (&chatml, true, 1),
        (&chatml, false, 0),
        (&greedy, true, 1),
        (&greedy, false, 1),
    ] {
        let encoder = encoder().with_bos("<s>", add_bos);
        let options = options(&encoder, Some(template));
        let (text, parts) = trained(Body::Chat(dialogue()), &encoder, &options);
        let found = text.matches("<s>").count();
        assert_eq!(found, expected, "{} {add_bos}: {text}", template.name());
        assert_eq!(text.starts_with("<s>"), expected == 1);
        assert!(!parts.contains("<s>"));
    }
    let encoder = encoder().with_bos("<s>", true);
    let options = options(&encoder, None);
    for text in ["abc", "<s>abc"] {
        let (text, parts) = trained(Body::Text(text.into()), &encoder, &options);
        assert_eq!(text, "<s>abc</s>");
        assert_eq!(parts, "<s>abc</s>");
    }
    let body = Body::Completion { prompt: "<s>ab".into(), completion: "c".into() };
    assert_eq!(trained(body, &encoder, &options), ("<s>abc</s>".into(), "c</s>".into()));
}

#[test]
fn completions_and_texts_end_once() {
    let encoder = encoder();
    let options = options(&encoder, None);
    let body = Body::Completion { prompt: "Q: ".into(), completion: "x</s>".into() };
    assert_eq!(trained(body, &encoder, &options), ("Q: x</s>".into(), "x</s>".into()));
    let (text, parts) = trained(Body::Text("ab".into()), &encoder, &options);
    assert_eq!((text.as_str(), parts.as_str()), ("ab</s>", "ab</s>"));
    let endless = ByteEncoder::new(&[]);
    let options = super::tests::options(&endless, None);
    let error = encode_record(&record(Body::Text("ab".into())), &options).unwrap_err();
    assert!(error.to_string().starts_with("x.jsonl: line 3: the tokenizer has no end-of-text"));
}

/// Tokens of two bytes, so that one can straddle the border of prompt and answer.
struct Pairs;

impl TextEncoder for Pairs {
    fn encode(&self, text: &str) -> std::result::Result<Vec<(u32, Range<usize>)>, String> {
        let ends = (0..text.len()).step_by(2).map(|start| start..(start + 2).min(text.len()));
        Ok(ends.zip(0..).map(|(range, id)| (id, range)).collect())
    }
    fn bos_token(&self) -> Option<(u32, &str)> {
        None
    }
    fn eos_token(&self) -> Option<(u32, &str)> {
        Some((99, "$"))
    }
    fn add_bos(&self) -> bool {
        false
    }
}

#[test]
fn an_answer_continues_the_tokens_of_its_prompt() {
    let options = EncodeOptions {
        encoder: &Pairs,
        template: None,
        max_seq_len: 100,
        train_on_prompt: false,
        overlong: Overlong::Truncate,
        turns: Turns::Each,
        special_tokens: SpecialTokens::Read,
    };
    // Together they would be `ab cd e`; the prompt is asked as `ab c`.
    let body = Body::Completion { prompt: "abc".into(), completion: "de".into() };
    let (sequences, _) = kept(&record(body), &options);
    assert_eq!(sequences[0].tokens, [0, 1, 0, 99]);
    assert_eq!(sequences[0].labels, [IGNORE_LABEL, IGNORE_LABEL, 0, 99]);
}

/// Reasoning is kept in the last turn only, and the generation prompt opens some.
const THINKER: &str = "{% for m in messages %}<{{ m.role }}>\
    {{ m.content if loop.last else m.content.split('</think>')[-1] }}{{ eos_token }}\n\
    {% endfor %}{% if add_generation_prompt %}<assistant><think>{% endif %}";
/// Reasoning is taken out of every turn.
const CUTS: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}\
    {{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
/// The same behind a prompt that opens it.
const CUTS_AND_OPENS: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}\
    {{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant><think>\n{% endif %}";
/// The system prompt stands in the last turn, where that is the user's.
const LAST_USER: &str = "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}\
    {% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}{% for m in rest %}\
    {% if m.role == 'user' %}{% if loop.last and system is defined %}[{{ system }} {{ m.content }}]\
    {% else %}[{{ m.content }}]{% endif %}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}";
/// Reasoning has a field, is kept in the last turn and ends with a token of its own.
const CHANNELS: &str = "{% for m in messages %}{% if m.role == 'assistant' %}\
    {% if m.thinking and loop.last %}<a|analysis>{{ m.thinking }}<|eot_id|>{% endif %}<a|final>{{ m.content }}\
    {{ '<|im_end|>' if loop.last and not add_generation_prompt else '<|eot_id|>' }}\
    {% else %}<{{ m.role }}>{{ m.content }}<|eot_id|>{% endif %}{% endfor %}\
    {% if add_generation_prompt %}{% endif %}";
/// An empty reasoning stands in a turn without any.
const EMPTIED: &str = "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}\
    <think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}{{ eos_token }}\
    {% endfor %}{% if add_generation_prompt %}<assistant>\
    {% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}";

fn reasoned(reasoning: &str, text: &str) -> Message {
    let mut message = Message::assistant(text);
    message.fields.insert("reasoning_content".into(), reasoning.into());
    message
}

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::from_source("test", source).unwrap()
}

#[test]
fn answers_that_a_template_writes_differently_later_have_sequences_of_their_own() {
    let messages = vec![
        Message::user("A"),
        Message::assistant("<think>a</think>one"),
        Message::user("B"),
        Message::assistant("<think>b</think>two"),
    ];
    let (each, seen) = parts(messages.clone(), &template(THINKER), Turns::Each);
    assert_eq!(each, ["a</think>one</s>", "b</think>two</s>"]);
    assert_eq!((seen.untrained_turns, seen.further_sequences), (0, 1));
    let (last, seen) = parts(messages, &template(THINKER), Turns::Last);
    assert_eq!(last, ["b</think>two</s>"]);
    assert_eq!((seen.untrained_turns, seen.further_sequences), (0, 0));
    // Where earlier turns stay as they are, one sequence holds all.
    let chatml = ChatTemplate::builtin("chatml").unwrap();
    assert_eq!(parts(dialogue(), &chatml, Turns::Each).0, ["one<|im_end|>¦two<|im_end|>"]);
    assert_eq!(parts(dialogue(), &chatml, Turns::Last).0, ["two<|im_end|>"]);
}

#[test]
fn reasoning_that_a_template_cuts_is_trained_behind_the_prompt_as_asked() {
    let with = |answer: Message| vec![Message::user("17*3?"), answer];
    let own = "<think>30+21</think>51";
    for (source, answer, expected, counts) in [
        (CUTS, Message::assistant(own), "<think>30+21</think>51</s>", [0, 1, 0]),
        (CUTS, Message::assistant("51"), "51</s>", [0, 0, 0]),
        (CUTS, reasoned("30+21", "51"), "<think>\n30+21\n</think>\n\n51</s>", [0, 1, 0]),
        (CUTS_AND_OPENS, Message::assistant(own), "30+21</think>51</s>", [1, 1, 0]),
        (CUTS_AND_OPENS, Message::assistant("51"), "\n</think>\n\n51</s>", [1, 0, 0]),
        (CUTS_AND_OPENS, reasoned("30+21", "51"), "30+21\n</think>\n\n51</s>", [1, 1, 0]),
        (THINKER, Message::assistant(own), "30+21</think>51</s>", [0, 0, 0]),
        (
            CHANNELS,
            reasoned("30+21", "51"),
            "<a|analysis>30+21<|eot_id|><a|final>51<|im_end|>",
            [0, 0, 0],
        ),
        (EMPTIED, reasoned("30+21", "51"), "<think>\n30+21\n</think>\n\n51</s>", [0, 0, 0]),
        (EMPTIED, Message::assistant(own), "<think>30+21</think>51</s>", [0, 0, 0]),
        // No place for it, and no tags to make one.
        (LAST_USER, reasoned("30+21", "51"), "51</s>", [0, 0, 1]),
    ] {
        let (found, seen) = parts(with(answer.clone()), &template(source), Turns::Each);
        assert_eq!(found, [expected], "{source} {answer:?}");
        let found = [seen.moved_turns, seen.restored_reasoning, seen.left_out_reasoning];
        assert_eq!(found, counts, "{source} {answer:?}");
    }
    // Asked not to reason, the model is not trained to.
    let off = serde_json::json!({"enable_thinking": false});
    let quick = template(EMPTIED).with_arguments(off.as_object().unwrap());
    for answer in [reasoned("30+21", "51"), Message::assistant(own)] {
        let (found, seen) = parts(with(answer), &quick, Turns::Each);
        assert_eq!((found, seen.left_out_reasoning), (vec!["51</s>".to_owned()], 1));
    }
}

#[test]
fn a_system_prompt_that_moves_stands_where_it_is_asked() {
    let template = template(LAST_USER);
    let encoder = encoder();
    let options = options(&encoder, Some(&template));
    let (sequences, seen) = kept(&record(Body::Chat(dialogue())), &options);
    let found: Vec<_> = sequences.iter().map(|sequence| shown(sequence, &encoder)).collect();
    let expected = [("[S A?]one</s>", "one</s>"), ("[A?]one</s>[S B?]two</s>", "two</s>")];
    assert_eq!(found, expected.map(|(text, parts)| (text.to_owned(), parts.to_owned())));
    assert_eq!((seen.moved_turns, seen.untrained_turns), (2, 0));
}

#[test]
fn answers_that_are_not_to_be_trained_are_context() {
    let marked = |name: &str, value: serde_json::Value| {
        let mut messages = dialogue();
        messages[2].fields.insert(name.into(), value);
        messages
    };
    let chatml = ChatTemplate::builtin("chatml").unwrap();
    for (name, value) in [
        ("weight", serde_json::json!(0)),
        ("weight", serde_json::json!(0.0)),
        ("train", serde_json::json!(false)),
        ("mask", serde_json::json!(0)),
        ("loss", serde_json::json!(false)),
    ] {
        let (found, seen) = parts(marked(name, value), &chatml, Turns::Each);
        assert_eq!((found, seen.masked_turns), (vec!["two<|im_end|>".to_owned()], 1), "{name}");
    }
    let (found, _) = parts(marked("weight", serde_json::json!(1)), &chatml, Turns::Each);
    assert_eq!(found, ["one<|im_end|>¦two<|im_end|>"]);
    let encoder = encoder();
    let mut options = options(&encoder, Some(&chatml));
    let mut none = marked("weight", serde_json::json!(0));
    none[4].fields.insert("train".into(), false.into());
    let dropped = Encoded::Dropped { reason: DropReason::Masked, lost: 0 };
    assert_eq!(encode_record(&record(Body::Chat(none)), &options).unwrap(), dropped);
    // With prompts, all but that answer.
    options.train_on_prompt = true;
    let body = Body::Chat(marked("weight", serde_json::json!(0)));
    let (_, parts) = trained(body, &encoder, &options);
    assert!(parts.contains("A?") && parts.contains("two") && !parts.contains("one"), "{parts}");
}

#[test]
fn calls_are_trained_and_silence_is_not() {
    let source = "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}{% for c in m.tool_calls or [] %}\
        !{{ c.function.name }} {{ c.function.arguments }}{% endfor %}{{ eos_token }}{% endfor %}\
        {% if add_generation_prompt %}<assistant>{% endif %}";
    let mut calling = Message::assistant("");
    let call = serde_json::json!([{"function": {"name": "look", "arguments": "{\"a\": 1}"}}]);
    calling.fields.insert("tool_calls".into(), call);
    let messages =
        vec![Message::user("A"), calling, Message::new("tool", "21"), Message::assistant("one")];
    let (found, seen) = parts(messages.clone(), &template(source), Turns::Each);
    assert_eq!(found, ["!look {\"a\": 1}</s>¦one</s>"]);
    assert!(seen.unwritten.is_empty());
    // Without a place for calls the turn would be its end alone.
    let chatml = ChatTemplate::builtin("chatml").unwrap();
    let (found, seen) = parts(messages, &chatml, Turns::Each);
    assert_eq!(found, ["one<|im_end|>"]);
    assert_eq!((seen.untrained_turns, seen.unwritten), (1, vec!["tool_calls".to_owned()]));
}

#[test]
fn fields_that_a_template_does_not_write_are_named() {
    let mut messages = dialogue();
    messages[1].fields.insert("name".into(), "Ann".into());
    messages[1].fields.insert("mood".into(), "glad".into());
    messages[1].fields.insert("id".into(), "7".into());
    let named =
        "{% for m in messages %}<{{ m.name or m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}";
    assert_eq!(parts(messages.clone(), &template(named), Turns::Each).1.unwritten, ["mood"]);
    let all = "{% for m in messages %}{{ m | tojson }}{{ eos_token }}{% endfor %}";
    assert!(parts(messages, &template(all), Turns::Each).1.unwritten.is_empty());
}

/// The prompts that the answers of a conversation are asked with, as tokens.
fn asked(messages: &[Message], template: &ChatTemplate, encoder: &ByteEncoder) -> Vec<Vec<u32>> {
    let answers = messages.iter().enumerate().filter(|(_, message)| message.is_assistant());
    let prompt = |(index, _): (usize, &Message)| {
        let text = template.render(&messages[..index], true, "<s>", "</s>").unwrap();
        encode_start(encoder, &text).unwrap().into_iter().map(|(id, _)| id).collect()
    };
    answers.map(prompt).collect()
}

/// For random conversations and every template, each answer that is trained stands behind the very tokens
/// it is asked with, is whole with its reasoning, and none is missing.
#[test]
fn what_is_trained_begins_with_what_is_asked() {
    use rand::{RngExt, SeedableRng};
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(7);
    let words = ["cat", "dog\n", " sun", "a  b", "\n\nline", "né", "17*3", "</b>", "x: y"];
    let mut sources = vec![THINKER, CUTS, CUTS_AND_OPENS, LAST_USER, CHANNELS, EMPTIED];
    sources
        .extend(["chatml", "plain", "llama3", "llama2", "alpaca", "vicuna", "zephyr", "mistral"]);
    let (mut answers, mut several) = (0, 0);
    for round in 0..400 {
        let source = sources[round % sources.len()];
        let template = ChatTemplate::builtin(source).unwrap_or_else(|_| template(source));
        let mut messages = Vec::new();
        if random.random_bool(0.5) {
            messages.push(Message::system("Rules apply."));
        }
        let text = |random: &mut rand_chacha::ChaCha8Rng, name: &str| {
            let count = random.random_range(1..4);
            let parts = (0..count).map(|_| words[random.random_range(0..words.len())]);
            let parts: String = parts.collect();
            format!("{name}{}", parts.trim_end())
        };
        for turn in 0..random.random_range(1..4) {
            messages.push(Message::user(text(&mut random, "q")));
            let answer = text(&mut random, &format!("answer {turn} "));
            let reasoning = text(&mut random, &format!("thought {turn} "));
            let mut message = match random.random_range(0..3) {
                0 => reasoned(&reasoning, &answer),
                1 => Message::assistant(format!("<think>{reasoning}</think>{answer}")),
                _ => Message::assistant(answer),
            };
            if random.random_bool(0.2) {
                message.fields.insert("weight".into(), 0.into());
            }
            messages.push(message);
        }
        let encoder = encoder().with_bos("<s>", random.random_bool(0.5));
        let options = options(&encoder, Some(&template));
        let wanted: Vec<&Message> = messages.iter().filter(|m| m.is_assistant()).collect();
        if wanted.iter().all(|message| !message.is_trained()) {
            continue;
        }
        let (sequences, seen) = kept(&record(Body::Chat(messages.clone())), &options);
        let mut prompts = asked(&messages, &template, &encoder).into_iter().zip(&wanted);
        several += seen.further_sequences;
        let mut runs = Vec::new();
        for Sequence { tokens, labels, .. } in &sequences {
            let trained = |at: usize| labels[at] != IGNORE_LABEL;
            let starts = (1..tokens.len()).filter(|&at| trained(at) && !trained(at - 1));
            for start in starts {
                let end = (start..tokens.len()).find(|&at| !trained(at)).unwrap_or(tokens.len());
                runs.push((&tokens[..start], encoder.decode(&tokens[start..end])));
            }
        }
        for (prefix, answer) in runs {
            let (prompt, message) =
                prompts.by_ref().find(|(_, message)| message.is_trained()).unwrap();
            assert_eq!(encoder.decode(prefix), encoder.decode(&prompt), "{source} {messages:?}");
            assert_eq!(prefix, prompt);
            let text = message.content.rsplit("</think>").next().unwrap().trim();
            assert!(answer.contains(text), "{source}: {answer} of {message:?}");
            if seen.left_out_reasoning == 0 {
                let thought = message.reasoning().unwrap_or_else(|| {
                    let before = message.content.split("</think>").next().unwrap();
                    before.trim_start_matches("<think>")
                });
                assert!(answer.contains(thought.trim()), "{source}: {answer} of {message:?}");
            }
            answers += 1;
        }
        assert!(prompts.all(|(_, message)| !message.is_trained()), "{source} {messages:?}");
        assert_eq!(seen.untrained_turns, 0);
    }
    assert!(answers > 500 && several > 50, "{answers} {several}");
}

#[test]
fn conversations_may_begin_with_the_assistant() {
    let template = ChatTemplate::from_source(
        "strict",
        "{% if not messages %}{{ raise_exception('empty') }}{% endif %}\
         {% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}\
         {% if add_generation_prompt %}[assistant]{% endif %}",
    )
    .unwrap();
    let encoder = encoder();
    let options = options(&encoder, Some(&template));
    let messages = vec![Message::assistant("hi"), Message::user("A"), Message::assistant("one")];
    assert_eq!(trained(Body::Chat(messages), &encoder, &options).1, "hi</s>¦one</s>");
}

#[test]
fn a_template_without_answers_is_refused() {
    let template = ChatTemplate::from_source("count", "{{ messages | length }}").unwrap();
    let encoder = encoder();
    let options = options(&encoder, Some(&template));
    let messages = vec![Message::user("A"), Message::assistant("one"), Message::user("again")];
    let error = encode_record(&record(Body::Chat(messages)), &options).unwrap_err();
    let message = error.to_string();
    assert!(message.starts_with("x.jsonl: line 3: chat template count: no turn"), "{message}");
}

#[test]
fn endless_templates_are_noticed() {
    let source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}\
                  {% if add_generation_prompt %}assistant: {% endif %}";
    let template = ChatTemplate::from_source("endless", source).unwrap();
    let encoder = encoder();
    let options = options(&encoder, Some(&template));
    let (_, seen) = kept(&record(Body::Chat(dialogue())), &options);
    assert!(seen.endless && seen.untrained_turns == 0);
    // The prompt ends in a space, so `assistant: ` fits; the line break after is not trained.
    assert_eq!(trained(Body::Chat(dialogue()), &encoder, &options).1, "one¦two");
}

#[test]
fn long_records_are_cut_or_dropped_and_counted() {
    let encoder = encoder();
    let template = ChatTemplate::builtin("plain").unwrap();
    let mut options = options(&encoder, Some(&template));
    let messages = vec![Message::user("12345"), Message::assistant("abcde")];
    // "12345\n" + "abcde</s>" + "\n": 13 tokens.
    let encode = |options: &EncodeOptions<'_>| {
        encode_record(&record(Body::Chat(messages.clone())), options).unwrap()
    };
    options.max_seq_len = 8;
    let Encoded::Kept { sequences, .. } = encode(&options) else { panic!("dropped") };
    let Sequence { tokens, labels, lost } = &sequences[0];
    assert_eq!(encoder.decode(tokens), "12345\nab");
    assert_eq!((label_tokens(labels), *lost), (2, 5));
    options.max_seq_len = 6;
    assert_eq!(encode(&options), Encoded::Dropped { reason: DropReason::NoLabel, lost: 7 });
    options.overlong = Overlong::Drop;
    assert_eq!(encode(&options), Encoded::Dropped { reason: DropReason::TooLong, lost: 0 });
    options.max_seq_len = 13;
    assert!(matches!(encode(&options), Encoded::Kept { .. }));
}

#[test]
fn blank_answers_and_texts_are_dropped() {
    let encoder = encoder();
    let template = ChatTemplate::builtin("plain").unwrap();
    let options = options(&encoder, Some(&template));
    let reason = |body: Body| match encode_record(&record(body), &options).unwrap() {
        Encoded::Dropped { reason, lost: 0 } => reason,
        other => panic!("{other:?}"),
    };
    let chat = |answer: &str| Body::Chat(vec![Message::user("a"), Message::assistant(answer)]);
    assert_eq!(reason(chat("")), DropReason::EmptyAnswer);
    assert_eq!(reason(chat(" \n")), DropReason::EmptyAnswer);
    assert_eq!(reason(Body::Chat(vec![Message::user("a")])), DropReason::EmptyAnswer);
    let completion = Body::Completion { prompt: "a".into(), completion: " ".into() };
    assert_eq!(reason(completion), DropReason::EmptyAnswer);
    assert_eq!(reason(Body::Text("\t".into())), DropReason::EmptyText);
}

/// Conversations as a released model's template may be asked to write them.
fn conversations() -> Vec<(&'static str, Vec<Message>)> {
    let calling = || {
        let mut message = Message::assistant("");
        let function = serde_json::json!({"name": "look_up", "arguments": {"where": "Bonn"}});
        let calls =
            serde_json::json!([{"id": "abcdefghi", "type": "function", "function": function}]);
        message.fields.insert("tool_calls".into(), calls);
        message.fields.insert("content".into(), serde_json::Value::Null);
        message
    };
    let result = || {
        let mut message = Message::new("tool", "21");
        message.fields.insert("tool_call_id".into(), "abcdefghi".into());
        message.fields.insert("name".into(), "look_up".into());
        message
    };
    let (system, user) = (|| Message::system("Be brief."), Message::user);
    let answer = Message::assistant;
    vec![
        ("plain", vec![user("What is 2+2?"), answer("It is 4.")]),
        ("system", vec![system(), user("What is 2+2?"), answer("It is 4.")]),
        (
            "several",
            vec![
                system(),
                user("What is 2+2?"),
                answer("It is 4."),
                user("Sure?"),
                answer("Quite."),
            ],
        ),
        ("reasoned", vec![user("17*3?"), reasoned("17*3 is 30+21.", "It is 51.")]),
        ("inside", vec![user("17*3?"), answer("<think>\n17*3 is 30+21.\n</think>\n\nIt is 51.")]),
        (
            "reasoned twice",
            vec![
                system(),
                user("17*3?"),
                reasoned("17*3 is 30+21.", "It is 51."),
                user("And 18*3?"),
                reasoned("Three more.", "It is 54."),
            ],
        ),
        ("calls", vec![user("Weather?"), calling(), result(), answer("21 degrees.")]),
    ]
}

/// What is wrong with how a conversation is trained, and how many answers are.
fn judged(
    name: &str,
    messages: &[Message],
    template: &ChatTemplate,
) -> std::result::Result<usize, String> {
    let specials = ["<|im_end|>", "<|im_start|>", "<|eot_id|>", "<|end|>", "<|return|>", "[/INST]"];
    let encoder = ByteEncoder::new(&specials).with_eos("</s>").with_bos("<s>", true);
    let options = options(&encoder, Some(template));
    // A template may refuse a conversation, or want its texts in parts; then there is nothing to train.
    let Ok(text) = template.render(messages, false, "<s>", "</s>") else { return Ok(0) };
    let last = without_reasoning(&messages[messages.len() - 1].content).trim();
    if !text.contains(last) {
        return match encode_record(&record(Body::Chat(messages.to_vec())), &options) {
            Err(_) => Ok(0),
            other => Err(format!("{name}: without its text: {other:?}")),
        };
    }
    let encoded = encode_record(&record(Body::Chat(messages.to_vec())), &options);
    let (sequences, seen) = match encoded {
        Ok(Encoded::Kept { sequences, seen }) => (sequences, seen),
        other => return Err(format!("{name}: {other:?}")),
    };
    let mut wanted = messages.iter().enumerate().filter(|(_, message)| message.is_assistant());
    let (mut trained, mut missing) = (0, 0);
    for Sequence { tokens, labels, .. } in &sequences {
        let is_label = |at: usize| labels[at] != IGNORE_LABEL;
        for start in (1..tokens.len()).filter(|&at| is_label(at) && !is_label(at - 1)) {
            let end = (start..tokens.len()).find(|&at| !is_label(at)).unwrap_or(tokens.len());
            let answer = encoder.decode(&tokens[start..end]);
            let Some((mut index, mut message)) = wanted.next() else {
                return Err(format!("{name}: one answer too many: {answer:?}"));
            };
            // One that the template writes nothing of is left out.
            if missing < seen.untrained_turns && message.content.is_empty() {
                missing += 1;
                (index, message) = wanted.next().unwrap();
            }
            let prompt = template.render(&messages[..index], true, "<s>", "</s>");
            let Ok(prompt) = prompt else { continue };
            let prompt: Vec<u32> =
                encode_start(&encoder, &prompt).unwrap().into_iter().map(|(id, _)| id).collect();
            if tokens[..start] != prompt {
                let (found, asked) = (encoder.decode(&tokens[..start]), encoder.decode(&prompt));
                return Err(format!("{name}: trained behind {found:?}\n asked with {asked:?}"));
            }
            let text = without_reasoning(&message.content).trim();
            let said = if text.is_empty() { "look_up" } else { text };
            if !answer.contains(said) {
                return Err(format!("{name}: {said:?} is not in {answer:?}"));
            }
            let thought = "17*3 is 30+21.";
            let thinks = message.content.contains(thought) || message.reasoning() == Some(thought);
            if thinks && seen.left_out_reasoning == 0 && !answer.contains(thought) {
                return Err(format!("{name}: the reasoning is not in {answer:?}"));
            }
            trained += 1;
        }
    }
    match wanted.count() + missing {
        missing if missing == seen.untrained_turns => Ok(trained),
        missing => Err(format!("{name}: {missing} answer(s) are missing")),
    }
}

/// Released models' templates are not part of the repository.
#[test]
fn templates_of_a_named_folder_train_as_they_ask() {
    let Some(folder) = std::env::var_os("HYDRALORA_TEMPLATES_DIR") else {
        return hydralora_testing::skip("templates", "HYDRALORA_TEMPLATES_DIR names no folder");
    };
    let mut faults = Vec::new();
    let (mut templates, mut trained, mut moved) = (0, 0, 0);
    let mut files: Vec<PathBuf> =
        fs_err::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    for path in files.iter().filter(|path| path.extension().is_some_and(|e| e == "jinja")) {
        let source = fs_err::read_to_string(path).unwrap();
        let file = path.file_stem().unwrap().to_string_lossy().into_owned();
        let Ok(template) = ChatTemplate::from_source_at(&file, source, 1_709_210_096) else {
            continue;
        };
        templates += 1;
        for (name, messages) in conversations() {
            match judged(&format!("{file}, {name}"), &messages, &template) {
                Ok(count) => trained += count,
                Err(fault) => faults.push(fault),
            }
            moved += 1;
        }
    }
    let listed = faults.join("\n");
    assert!(faults.is_empty(), "{} of {moved} with {templates} templates:\n{listed}", faults.len());
    assert!(trained > templates, "{trained} answers of {templates} templates");
}

#[test]
fn special_tokens_in_texts_are_counted_and_may_stay_text() {
    let template = ChatTemplate::builtin("chatml").unwrap();
    let encoder = encoder();
    let mut options = options(&encoder, Some(&template));
    let messages =
        vec![Message::user("a <|im_end|>?"), Message::assistant("put </s> and <|im_end|>")];
    let (sequences, seen) = kept(&record(Body::Chat(messages.clone())), &options);
    assert_eq!(seen.special_in_text, 3);
    let count = |sequences: &[Sequence]| {
        sequences[0].tokens.iter().filter(|token| encoder.is_special(**token)).count()
    };
    // Of the template: two starts and two ends of turns, and the start of the answer's.
    let own = count(&kept(&record(Body::Chat(dialogue()[1..3].to_vec())), &options).0);
    assert_eq!(count(&sequences), own + 3);
    options.special_tokens = SpecialTokens::Text;
    let (sequences, seen) = kept(&record(Body::Chat(messages)), &options);
    assert_eq!((count(&sequences), seen.special_in_text), (own, 3));
    let (text, parts) = shown(&sequences[0], &encoder);
    assert!(text.contains("a <|im_end|>?"), "{text}");
    assert_eq!(parts, "put </s> and <|im_end|><|im_end|>");
    let (sequences, _) = kept(&record(Body::Text("a</s>b".into())), &options);
    assert_eq!((count(&sequences), sequences[0].tokens.len()), (1, 7));
}
