//! Records → token ids and labels.
//!
//! Which tokens are trained is decided on the text: spans of bytes are marked, and a token is
//! trained when **any** of its bytes lies in a marked span (so that a token that holds the last
//! space of the prompt and the first letter of the answer is trained).
//!
//! * **Chat.** The template renders the whole conversation to a text `F`. For the assistant's turn
//!   `i`, `P` is the rendering of the messages before it with the generation prompt, `Q` that of
//!   the messages up to and with it, without its trailing whitespace. If `P` begins `Q` and both
//!   begin `F`, the span is `len(P)..len(Q)`: the answer and the template's end-of-turn token, but
//!   not the line break after that. Where the template writes the generation prompt differently
//!   from the turn's own header, the span begins at the answer's first character instead.
//!   A turn for which this fails — a template that drops the reasoning of earlier turns rewrites
//!   them when another turn follows — is not trained, and counted; with such a template the last
//!   turn is the one that stays. A conversation without any trainable turn is an error.
//! * **Completion.** `prompt + completion` is encoded as one text, then the end-of-text token is
//!   appended. The span is the completion with the end-of-text token.
//! * **Text.** The text with the end-of-text token; all of it is trained.
//!
//! The start-of-text token is put first if the tokenizer adds one to every text and the text does
//! not begin with it already; it is never doubled. Special tokens written in a record's text are
//! recognised as such.

use std::ops::Range;

use serde_json::{Map, Value};

use crate::config::Overlong;
use crate::error::{Error, Result};
use crate::record::{Body, Message, Record};
use crate::report::DropReason;
use crate::template::ChatTemplate;

/// The label of a token that is not trained.
pub const IGNORE_LABEL: u32 = u32::MAX;

/// A tokenizer, as far as data need one.
pub trait TextEncoder: Send + Sync {
    /// Token ids, each with its range of bytes in `text`. Special tokens written in the text are
    /// recognised; none are added.
    ///
    /// # Errors
    /// A message for people, when the text cannot be encoded.
    fn encode(&self, text: &str) -> std::result::Result<Vec<(u32, Range<usize>)>, String>;
    /// The start-of-text token: id and text.
    fn bos_token(&self) -> Option<(u32, &str)>;
    /// The end-of-text token: id and text.
    fn eos_token(&self) -> Option<(u32, &str)>;
    /// Whether the model's own tokenizer starts every text with the start-of-text token.
    fn add_bos(&self) -> bool;
}

/// One sequence to train on. `labels[i]` is `tokens[i]` where that token is trained and
/// [`IGNORE_LABEL`] elsewhere: not shifted, [`Batch`](crate::Batch) does that.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// Token ids, at least two.
    pub tokens: Vec<u32>,
    /// As many labels as tokens.
    pub labels: Vec<u32>,
    /// Index into [`Dataset::domains`](crate::Dataset::domains).
    pub domain: u32,
    /// Index into [`DataReport::sources`](crate::DataReport::sources): training files first.
    pub source: u32,
    /// The record's number in its file, from 0.
    pub row: u32,
}

impl Example {
    /// How many tokens are predicted and trained; the first token of a sequence has no predecessor
    /// to be predicted from.
    pub fn label_tokens(&self) -> usize {
        label_tokens(&self.labels)
    }
}

fn label_tokens(labels: &[u32]) -> usize {
    labels.iter().skip(1).filter(|&&label| label != IGNORE_LABEL).count()
}

/// How records become tokens.
#[derive(Clone, Copy)]
pub struct EncodeOptions<'a> {
    /// The tokenizer.
    pub encoder: &'a dyn TextEncoder,
    /// The template of conversations.
    pub template: Option<&'a ChatTemplate>,
    /// The most tokens of one sequence.
    pub max_seq_len: usize,
    /// Whether prompts are trained too.
    pub train_on_prompt: bool,
    /// What happens to longer records.
    pub overlong: Overlong,
}

/// What became of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Encoded {
    /// Tokens and labels.
    Kept {
        /// Token ids.
        tokens: Vec<u32>,
        /// As many labels.
        labels: Vec<u32>,
        /// How many tokens were cut off the end.
        lost: usize,
        /// How many turns of the assistant could not be located and are not trained.
        untrained_turns: usize,
        /// Whether the template writes nothing after the last answer, so that the model does not
        /// learn to stop.
        endless: bool,
    },
    /// Nothing to train on.
    Dropped {
        /// Why.
        reason: DropReason,
        /// How many tokens were cut off the end before that was found.
        lost: usize,
    },
}

/// A text with what is to be trained of it.
struct Marked {
    text: String,
    spans: Vec<Range<usize>>,
    untrained_turns: usize,
    endless: bool,
    append_eos: bool,
}

impl Marked {
    /// A text without a template, trained from byte `start` on.
    fn plain(text: String, start: usize) -> Self {
        let spans = std::iter::once(start..text.len()).collect();
        Self { text, spans, untrained_turns: 0, endless: false, append_eos: true }
    }
}

/// Encodes one record.
///
/// # Errors
/// When a conversation has no template or the template refuses it, when the tokenizer fails or
/// lacks the end-of-text token that a completion needs. The error names the record.
pub fn encode_record(record: &Record, options: &EncodeOptions<'_>) -> Result<Encoded> {
    let dropped = |reason| Ok(Encoded::Dropped { reason, lost: 0 });
    let fail = |message: String| Error::Encode { location: record.location.clone(), message };
    let marked = match &record.body {
        Body::Chat(messages) => {
            let answers = || messages.iter().filter(|message| message.is_assistant());
            if answers().next().is_none() || answers().any(Message::is_blank) {
                return dropped(DropReason::EmptyAnswer);
            }
            let template = options
                .template
                .ok_or_else(|| Error::NoTemplate { path: record.location.path.clone() })?;
            mark_chat(messages, &record.variables, template, options.encoder)
                .map_err(|error| fail(error.to_string()))?
        }
        Body::Completion { prompt, completion } => {
            if completion.trim().is_empty() {
                return dropped(DropReason::EmptyAnswer);
            }
            Marked::plain(format!("{prompt}{completion}"), prompt.len())
        }
        Body::Text(text) => {
            if text.trim().is_empty() {
                return dropped(DropReason::EmptyText);
            }
            Marked::plain(text.clone(), 0)
        }
    };

    let (mut tokens, mut labels) = tokenize(&marked, options).map_err(fail)?;
    let mut lost = 0;
    if tokens.len() > options.max_seq_len {
        if options.overlong == Overlong::Drop {
            return dropped(DropReason::TooLong);
        }
        lost = tokens.len() - options.max_seq_len;
        tokens.truncate(options.max_seq_len);
        labels.truncate(options.max_seq_len);
    }
    if label_tokens(&labels) == 0 {
        return Ok(Encoded::Dropped { reason: DropReason::NoLabel, lost });
    }
    Ok(Encoded::Kept {
        tokens,
        labels,
        lost,
        untrained_turns: marked.untrained_turns,
        endless: marked.endless,
    })
}

fn tokenize(
    marked: &Marked,
    options: &EncodeOptions<'_>,
) -> std::result::Result<(Vec<u32>, Vec<u32>), String> {
    let encoder = options.encoder;
    let bos = encoder.bos_token().map(|(id, _)| id);
    let encoded = encoder.encode(&marked.text)?;
    let trained = |range: &Range<usize>| {
        options.train_on_prompt
            || marked.spans.iter().any(|span| range.start < span.end && range.end > span.start)
    };
    let mut tokens = Vec::with_capacity(encoded.len() + 2);
    let mut labels = Vec::with_capacity(encoded.len() + 2);
    let mut push = |token: u32, is_trained: bool| {
        tokens.push(token);
        labels.push(if is_trained { token } else { IGNORE_LABEL });
    };

    // However many start-of-text tokens template and text begin with, one is kept.
    let leading = encoded.iter().take_while(|(token, _)| Some(*token) == bos).count();
    if let Some(bos) = bos
        && (leading > 0 || encoder.add_bos())
    {
        let whole = marked.spans.first().is_some_and(|span| *span == (0..marked.text.len()));
        push(bos, options.train_on_prompt || whole);
    }
    for (token, range) in &encoded[leading..] {
        push(*token, trained(range));
    }
    if marked.append_eos {
        let Some((eos, _)) = encoder.eos_token() else {
            return Err("the tokenizer has no end-of-text token, without which the model cannot \
                        learn to stop; use a chat template instead"
                .to_owned());
        };
        if encoded.len() == leading || encoded.last().is_some_and(|(token, _)| *token != eos) {
            push(eos, true);
        }
    }
    Ok((tokens, labels))
}

fn mark_chat(
    messages: &[Message],
    variables: &Map<String, Value>,
    template: &ChatTemplate,
    encoder: &dyn TextEncoder,
) -> Result<Marked> {
    let bos = encoder.bos_token().map_or("", |(_, text)| text);
    let eos = encoder.eos_token().map_or("", |(_, text)| text);
    let render = |messages: &[Message], generate: bool| {
        template.render_with(messages, variables, generate, bos, eos)
    };
    let text = render(messages, false)?;
    let mut spans = Vec::new();
    let mut untrained_turns = 0;
    let mut endless = false;
    for (index, message) in messages.iter().enumerate() {
        if !message.is_assistant() {
            continue;
        }
        match turn_span(&text, messages, index, &render) {
            Some(span) => {
                let said = message.content.trim_end();
                endless = !said.is_empty() && text[span.clone()].ends_with(said);
                spans.push(span);
            }
            None => untrained_turns += 1,
        }
    }
    if spans.is_empty() {
        return Err(Error::TemplateRender {
            name: template.name().to_owned(),
            line: None,
            message: "no turn of the assistant can be found in the rendered conversation: the \
                      template writes earlier turns differently once later ones follow; expected \
                      a template whose output for the first messages begins its output for all"
                .to_owned(),
        });
    }
    Ok(Marked { text, spans, untrained_turns, endless, append_eos: false })
}

/// Where the assistant's turn `index` stands in `text`, the whole conversation's rendering.
fn turn_span(
    text: &str,
    messages: &[Message],
    index: usize,
    render: &dyn Fn(&[Message], bool) -> Result<String>,
) -> Option<Range<usize>> {
    let through = if index + 1 == messages.len() {
        text.to_owned()
    } else {
        render(&messages[..=index], false).ok()?
    };
    let through = through.trim_end();
    if !text.starts_with(through) {
        return None;
    }
    let begins = |prompt: &String| through.starts_with(prompt.as_str());
    let start = match render(&messages[..index], true).ok().filter(begins) {
        Some(prompt) => prompt.len(),
        None => {
            // A template may refuse to render no message at all; then the answer is looked for
            // from the start.
            let before = match render(&messages[..index], false) {
                Ok(before) => Some(before).filter(begins)?.len(),
                Err(_) if index == 0 => 0,
                Err(_) => return None,
            };
            // What a turn says before its text, reasoning, is looked for too.
            let said = messages[index].reasoning().unwrap_or_default();
            let texts = [said, &messages[index].content];
            let found = texts.map(|text| Some(text.trim()).filter(|text| !text.is_empty()));
            let found = found.into_iter().flatten();
            before + found.filter_map(|text| through[before..].find(text)).min()?
        }
    };
    (start < through.len()).then_some(start..through.len())
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::byte_encoder::ByteEncoder;
    use crate::error::Location;

    fn record(body: Body) -> Record {
        let location = Location { path: PathBuf::from("x.jsonl"), line: 3, record: None };
        Record { location, row: 2, body, domain: None, variables: Map::new() }
    }

    fn encoder() -> ByteEncoder {
        ByteEncoder::new(&["<|im_start|>", "<|im_end|>", "<|eot_id|>"]).with_eos("</s>")
    }

    fn options<'a>(
        encoder: &'a ByteEncoder,
        template: Option<&'a ChatTemplate>,
    ) -> EncodeOptions<'a> {
        EncodeOptions {
            encoder,
            template,
            max_seq_len: 10_000,
            train_on_prompt: false,
            overlong: Overlong::Truncate,
        }
    }

    /// The whole text and the trained parts of it.
    fn trained(body: Body, encoder: &ByteEncoder, options: &EncodeOptions<'_>) -> (String, String) {
        let Encoded::Kept { tokens, labels, .. } = encode_record(&record(body), options).unwrap()
        else {
            panic!("dropped")
        };
        assert_eq!(tokens.len(), labels.len());
        let mut parts = String::new();
        let mut inside = false;
        for (&token, &label) in tokens.iter().zip(&labels) {
            assert!(label == token || label == IGNORE_LABEL);
            if label == token {
                if !inside && !parts.is_empty() {
                    parts.push('¦');
                }
                parts.push_str(&encoder.decode(&[token]));
            }
            inside = label == token;
        }
        (encoder.decode(&tokens), parts)
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
    fn a_token_that_holds_part_of_the_answer_is_trained() {
        let options = EncodeOptions {
            encoder: &Pairs,
            template: None,
            max_seq_len: 100,
            train_on_prompt: false,
            overlong: Overlong::Truncate,
        };
        let body = Body::Completion { prompt: "abc".into(), completion: "de".into() };
        let Encoded::Kept { tokens, labels, .. } = encode_record(&record(body), &options).unwrap()
        else {
            panic!("dropped")
        };
        assert_eq!(tokens, [0, 1, 2, 99]);
        assert_eq!(labels, [IGNORE_LABEL, 1, 2, 99]);
    }

    #[test]
    fn templates_that_rewrite_earlier_turns_train_the_last() {
        // Like reasoning models: `<think>` parts are kept in the last turn only, and the
        // generation prompt opens one.
        let source = "{% for m in messages %}<{{ m.role }}>\
            {{ m.content if loop.last else m.content.split('</think>')[-1] }}{{ eos_token }}\n\
            {% endfor %}{% if add_generation_prompt %}<assistant><think>{% endif %}";
        let template = ChatTemplate::from_source("thinker", source).unwrap();
        let encoder = encoder();
        let options = options(&encoder, Some(&template));
        let messages = vec![
            Message::user("A"),
            Message::assistant("<think>a</think>one"),
            Message::user("B"),
            Message::assistant("<think>b</think>two"),
        ];
        let encoded = encode_record(&record(Body::Chat(messages.clone())), &options).unwrap();
        assert!(matches!(encoded, Encoded::Kept { untrained_turns: 1, endless: false, .. }));
        let (text, parts) = trained(Body::Chat(messages), &encoder, &options);
        assert!(text.contains("<assistant>one</s>"), "{text}");
        // The generation prompt begins the turn, so its `<think>` is not trained.
        assert_eq!(parts, "b</think>two</s>");
        // Without reasoning the prompt does not fit, and the answer alone is marked.
        let plain = vec![Message::user("A"), Message::assistant("one")];
        assert_eq!(trained(Body::Chat(plain), &encoder, &options).1, "one</s>");
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
        let messages =
            vec![Message::assistant("hi"), Message::user("A"), Message::assistant("one")];
        assert_eq!(trained(Body::Chat(messages), &encoder, &options).1, "hi</s>¦one</s>");
    }

    #[test]
    fn a_template_without_prefixes_is_refused() {
        let template =
            ChatTemplate::from_source("count", "{{ messages | length }}{{ messages[-1].content }}")
                .unwrap();
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
        let encoded = encode_record(&record(Body::Chat(dialogue())), &options).unwrap();
        assert!(matches!(encoded, Encoded::Kept { endless: true, untrained_turns: 0, .. }));
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
        let Encoded::Kept { tokens, labels, lost, .. } = encode(&options) else {
            panic!("dropped")
        };
        assert_eq!(encoder.decode(&tokens), "12345\nab");
        assert_eq!((label_tokens(&labels), lost), (2, 5));
        options.max_seq_len = 6;
        assert_eq!(encode(&options), Encoded::Dropped { reason: DropReason::NoLabel, lost: 7 });
        options.overlong = Overlong::Drop;
        assert_eq!(encode(&options), Encoded::Dropped { reason: DropReason::TooLong, lost: 0 });
        options.max_seq_len = 13;
        assert!(matches!(encode(&options), Encoded::Kept { lost: 0, .. }));
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
}
