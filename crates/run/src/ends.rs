//! Where answers end, for everybody who asks: generation, chat, scoring, adapter folders and merged
//! models.
//!
//! A model's own configuration names the tokens at which any text ends. Which token ends an answer is
//! said by the chat template in force, which need not be the model's: a small conversation is put
//! through it, and what it writes after the answer is looked up in the vocabulary. What was trained
//! last of every answer, and what an adapter's folder names, count too.

use hydralora_data::{ChatTemplate, Message};
use hydralora_model::{END_OF_TURN, Tokenizer};
use serde_json::{Map, json};

/// A text that no template writes by itself.
const PROBE: &str = "Quartz lantern";
/// The name of a tool that is called.
const TOOL: &str = "quartz_lantern";

/// What a template writes after an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AnswerEnd {
    /// A token of its own, at which generation stops.
    Token(u32),
    /// What looks like a special token and is none of the vocabulary.
    NoToken(String),
    /// Another text, at which nothing stops.
    Text(String),
    /// Nothing.
    Nothing,
}

/// The texts of the tokens that begin and end a text; empty where there is none.
pub fn marks(tokenizer: &Tokenizer) -> [String; 2] {
    let text =
        |token: Option<(u32, &str)>| token.map_or(String::new(), |(_, text)| text.to_owned());
    [text(tokenizer.bos()), text(tokenizer.eos())]
}

fn render(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
    messages: &[Message],
    generate: bool,
) -> Option<String> {
    let [bos, eos] = marks(tokenizer);
    template.render_with(messages, &Map::new(), generate, &bos, &eos).ok()
}

/// Conversations whose last turn is an answer of `PROBE`; templates refuse some.
fn probes() -> Vec<Vec<Message>> {
    let answer = || Message::assistant(PROBE);
    let mut reasoned = answer();
    reasoned.fields.insert("reasoning_content".to_owned(), json!("So it is."));
    vec![
        vec![Message::user("Which?"), answer()],
        vec![Message::system("Be brief."), Message::user("Which?"), answer()],
        vec![Message::user("Which?"), reasoned],
    ]
}

/// Conversations whose last turn calls a tool.
fn calls() -> Vec<Vec<Message>> {
    let arguments = [json!({"where": "here"}), json!("{\"where\": \"here\"}")];
    let call = |arguments| {
        let mut message = Message::assistant("");
        let function = json!({"name": TOOL, "arguments": arguments});
        let call = json!([{"id": "abcdefghi", "type": "function", "function": function}]);
        message.fields.insert("tool_calls".to_owned(), call);
        message.fields.insert("content".to_owned(), json!(null));
        vec![Message::user("Which?"), message]
    };
    arguments.into_iter().map(call).collect()
}

/// What `template` writes after an answer; none if it refuses every conversation that is tried.
///
/// # Errors
/// If a text cannot be encoded.
pub fn answer_end(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
) -> crate::Result<Option<AnswerEnd>> {
    for messages in probes() {
        let Some(text) = render(tokenizer, template, &messages, false) else { continue };
        let Some(at) = text.rfind(PROBE) else { continue };
        let after = text[at + PROBE.len()..].trim();
        if after.is_empty() {
            return Ok(Some(AnswerEnd::Nothing));
        }
        let ids = tokenizer.encode(after)?;
        let spaces =
            |id: &u32| tokenizer.decode(&[*id], false).is_ok_and(|text| text.trim().is_empty());
        let first = ids.iter().find(|id| tokenizer.is_added(**id) || !spaces(id));
        if let Some(&id) = first.filter(|id| ends_text(tokenizer, **id)) {
            return Ok(Some(AnswerEnd::Token(id)));
        }
        let line = after.lines().next().unwrap_or_default().to_owned();
        return Ok(Some(match special_looking(&line).first() {
            Some(token) if line.starts_with(token) => AnswerEnd::NoToken((*token).to_owned()),
            _ => AnswerEnd::Text(line),
        }));
    }
    Ok(None)
}

fn ends_text(tokenizer: &Tokenizer, id: u32) -> bool {
    tokenizer.is_added(id) || tokenizer.text_end_ids().contains(&id)
}

/// The tokens at which an answer ends that `template` writes, those that the template itself names
/// first, then those of the model's configuration. `named` are the texts of more, as an adapter's
/// folder names them, and `trained` the tokens that were trained last of answers; of both those that
/// are special count. Without a template, where any text ends.
///
/// # Errors
/// If a text cannot be encoded.
pub fn end_ids(
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    named: &[String],
    trained: &[u32],
) -> crate::Result<Vec<u32>> {
    let mut ids: Vec<u32> = Vec::new();
    let mut add = |id: u32| {
        if !ids.contains(&id) {
            ids.push(id);
        }
    };
    if let Some(template) = template {
        if let Some(AnswerEnd::Token(id)) = answer_end(tokenizer, template)? {
            add(id);
        }
        for messages in calls() {
            let Some(text) = render(tokenizer, template, &messages, false) else { continue };
            let last = tokenizer.encode(text.trim_end())?.last().copied();
            if let Some(id) = last.filter(|id| text.contains(TOOL) && ends_text(tokenizer, *id)) {
                add(id);
            }
        }
        // Some are written in turns that the probes lack; but one that stands inside an answer, as
        // between its reasoning and its text, ends nothing.
        let inside = inside_answers(tokenizer, template)?;
        for token in END_OF_TURN.iter().filter(|token| template.source().contains(**token)) {
            if let Some(id) = tokenizer.token_to_id(token).filter(|id| !inside.contains(id)) {
                add(id);
            }
        }
    }
    let known = named.iter().filter_map(|token| tokenizer.token_to_id(token));
    let trained = trained.iter().copied().filter(|id| ends_text(tokenizer, *id));
    known.chain(trained).chain(tokenizer.text_end_ids().iter().copied()).for_each(add);
    Ok(ids)
}

/// Added tokens that stand in an answer before its end.
fn inside_answers(tokenizer: &Tokenizer, template: &ChatTemplate) -> crate::Result<Vec<u32>> {
    let mut inside = Vec::new();
    for messages in probes() {
        let [prompt, whole] = [(&messages[..messages.len() - 1], true), (&messages[..], false)]
            .map(|(messages, generate)| render(tokenizer, template, messages, generate));
        let (Some(prompt), Some(whole)) = (prompt, whole) else { continue };
        let Some(answer) = whole.strip_prefix(&prompt) else { continue };
        let said = answer.rfind(PROBE).unwrap_or(0);
        inside.extend(tokenizer.encode(&answer[..said])?);
    }
    Ok(inside)
}

/// Parts of a text that are written as special tokens are.
fn special_looking(text: &str) -> Vec<&str> {
    const LONGEST: usize = 48;
    const WHOLE: [&str; 8] =
        ["<start_of_turn>", "<end_of_turn>", "<|turn>", "<turn|>", "<s>", "</s>", "<bos>", "<eos>"];
    let mut found: Vec<&str> = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find(['<', '[']) {
        let here = &rest[at..];
        let pairs = [("<|", "|>"), ("<\u{ff5c}", "\u{ff5c}>"), ("[|", "|]")];
        let pair = pairs.iter().find_map(|(open, close)| {
            let inner = here.strip_prefix(open)?;
            let length = inner.find(close).filter(|length| *length > 0)?;
            let token = &here[..open.len() + length + close.len()];
            let plain = token.len() <= LONGEST && !token.contains(char::is_whitespace);
            (plain && !token[1..].contains(['<', '['])).then_some(token)
        });
        let whole =
            || WHOLE.iter().find_map(|token| here.starts_with(token).then(|| &here[..token.len()]));
        // `<end_of_utterance>`: words joined by lines, as no markup of a text is.
        let joined = || {
            let inner = here.strip_prefix('<')?;
            let length = inner.find('>').filter(|length| *length + 2 <= LONGEST)?;
            let word = &inner[..length];
            let is_name = word.chars().all(|c| c.is_ascii_lowercase() || c == '_');
            let says = ["end_of", "start_of", "begin_of", "eos", "eot"]
                .iter()
                .any(|at| word.starts_with(at));
            (is_name && says && word.contains('_')).then(|| &here[..length + 2])
        };
        let token = pair.or_else(whole).or_else(joined);
        found.extend(token);
        rest = &here[token.map_or(1, str::len)..];
    }
    found
}

/// What a template writes in a small conversation that looks like special tokens and is none of the
/// vocabulary: such a template was made for another model.
pub fn missing_tokens(tokenizer: &Tokenizer, template: &ChatTemplate) -> Vec<String> {
    let mut missing: Vec<String> = Vec::new();
    for messages in probes() {
        let turns = [(&messages[..], false), (&messages[..messages.len() - 1], true)];
        for (messages, generate) in turns {
            let text = render(tokenizer, template, messages, generate).unwrap_or_default();
            for token in special_looking(&text) {
                let known = tokenizer.token_to_id(token).is_some();
                if !known && !missing.iter().any(|found| found == token) {
                    missing.push(token.to_owned());
                }
            }
        }
    }
    missing
}

/// What is wrong with a template for the model of this tokenizer, if it cannot end an answer with one of
/// its tokens; else what a person should know of it.
///
/// # Errors
/// If a text cannot be encoded.
pub fn template_fault(
    tokenizer: &Tokenizer,
    template: &ChatTemplate,
) -> crate::Result<(Option<String>, Option<String>)> {
    let name = template.name();
    let missing = missing_tokens(tokenizer, template);
    let listed = missing.join(", ");
    Ok(match answer_end(tokenizer, template)? {
        Some(AnswerEnd::NoToken(end)) => {
            let all = if listed.is_empty() { end.clone() } else { listed };
            let fault = format!(
                "the template {name} ends answers with {end} and writes {all}, which the model's \
                 vocabulary lacks, so that nothing it writes could end there; expected a template of \
                 this model, or one that needs no such tokens, as plain, alpaca and vicuna"
            );
            (Some(fault), None)
        }
        _ if !missing.is_empty() => {
            let note = format!(
                "the chat template {name} writes {listed}, which the model's vocabulary lacks; the \
                 model reads them letter by letter"
            );
            (None, Some(note))
        }
        Some(AnswerEnd::Text(end)) => {
            let note = format!(
                "the chat template {name} ends answers with {end:?}, which is no token; nothing stops \
                 there"
            );
            (None, Some(note))
        }
        _ => (None, None),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn special_tokens_are_told_by_how_they_are_written() {
        let text =
            "a<|im_end|>b<\u{ff5c}User\u{ff5c}> <end_of_turn></s> if a <| b |> c <x> <turn|> <||>";
        assert_eq!(
            special_looking(text),
            ["<|im_end|>", "<\u{ff5c}User\u{ff5c}>", "<end_of_turn>", "</s>", "<turn|>"]
        );
        let text =
            "[|assistant|]a[|endofturn|] b<end_of_utterance> [|] <end_> [| no |] <br> <end_ x>";
        assert_eq!(special_looking(text), ["[|assistant|]", "[|endofturn|]", "<end_of_utterance>"]);
        assert!(special_looking("no < such > thing <").is_empty());
    }
}
