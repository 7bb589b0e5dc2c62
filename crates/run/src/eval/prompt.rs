//! From a question and examples to what the model reads.

use super::error::{Error, Result};
use crate::start_ids;
use hydralora_data::{ChatTemplate, Message};
use hydralora_model::Tokenizer;
use serde_json::{Map, Value, json};
use std::borrow::Cow;

/// A conversation that is to be answered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Conversation {
    /// Its turns.
    pub turns: Vec<Message>,
    /// What the record shows the template beside them, such as tools.
    pub variables: Map<String, Value>,
}

/// A question behind examples.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prompt {
    /// What comes first: the task's description.
    pub description: String,
    /// Questions with their answers.
    pub shots: Vec<(String, String)>,
    /// The question to answer.
    pub question: String,
    /// Between a question and its answer.
    pub answer_delimiter: Cow<'static, str>,
    /// A conversation that takes the place of all of this, for records that are one.
    pub conversation: Option<Conversation>,
    /// What the answer begins with: the model goes on from there, behind a chat template too.
    pub answer_start: String,
}

impl Prompt {
    /// A prompt that is just this text.
    pub fn plain(question: impl Into<String>) -> Self {
        Self { question: question.into(), ..Self::default() }
    }

    /// Description, examples apart by a blank line, question, the answer's beginning.
    fn text(&self) -> String {
        let shots: String = (self.shots.iter())
            .map(|(question, answer)| format!("{question}{}{answer}\n\n", self.answer_delimiter))
            .collect();
        format!("{}{shots}{}{}", self.description, self.question, self.answer_start)
    }

    /// The description as the system's message, each example as a turn.
    fn messages(&self) -> Vec<Message> {
        if let Some(conversation) = &self.conversation {
            return conversation.turns.clone();
        }
        let system = (!self.description.is_empty()).then(|| Message::system(&self.description));
        let shots = self
            .shots
            .iter()
            .flat_map(|(question, answer)| [Message::user(question), Message::assistant(answer)]);
        system.into_iter().chain(shots).chain([Message::user(&self.question)]).collect()
    }
}

/// How prompts become token ids.
#[derive(Clone, Copy)]
pub struct Reader<'a> {
    /// The model's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// The chat template to put prompts through, if they are.
    pub template: Option<&'a ChatTemplate>,
    /// The template of records that are conversations.
    pub record_template: Option<&'a ChatTemplate>,
}

impl Reader<'_> {
    /// The text of a prompt.
    ///
    /// # Errors
    /// If the template refuses it, or there is none for a conversation.
    pub fn render(&self, prompt: &Prompt) -> Result<String> {
        let template = match &prompt.conversation {
            None => self.template,
            Some(_) => Some(self.template.or(self.record_template).ok_or_else(|| {
                let message = "the records are conversations and the model has no chat template; \
                               use records with `prompt` and `completion`";
                Error::Option { option: "tasks", message: message.to_owned() }
            })?),
        };
        let Some(template) = template else { return Ok(prompt.text()) };
        let text =
            |token: Option<(u32, &str)>| token.map_or(String::new(), |(_, text)| text.to_owned());
        let (bos, eos) = (text(self.tokenizer.bos()), text(self.tokenizer.eos()));
        let none = Map::new();
        let variables = prompt.conversation.as_ref().map_or(&none, |asked| &asked.variables);
        let messages = prompt.messages();
        let messages = template.adapt(&messages, variables, &bos, &eos);
        let asked = template.render_with(&messages, variables, true, &bos, &eos)?;
        Ok(asked + &prompt.answer_start)
    }

    /// Refuses to put the prompts of a task through a chat template, which would score something else.
    ///
    /// # Errors
    /// If they were to be.
    pub(crate) fn refuse_template(&self, task: &str, why: &str) -> Result<()> {
        if self.template.is_none() {
            return Ok(());
        }
        let message = format!("`{task}` {why}; score it without, or in a run of its own");
        Err(Error::Option { option: "apply-chat-template", message })
    }

    /// Between a prompt and the answers that are compared; nothing behind a chat template.
    pub fn delimiter<'a>(&self, delimiter: &'a str) -> &'a str {
        if self.template.is_some() { "" } else { delimiter }
    }

    /// Token ids of a text that starts a sequence: behind the start token, where the model wants
    /// one and the text does not begin with it.
    ///
    /// # Errors
    /// If the text cannot be encoded.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(start_ids(self.tokenizer, text)?)
    }

    /// Token ids of a context and of what continues it, encoded together: spaces at the context's
    /// end belong to the continuation, and the continuation is what follows the context's own
    /// tokens.
    ///
    /// # Errors
    /// If a text cannot be encoded, or there is no token to continue.
    pub fn encode_pair(&self, context: &str, continuation: &str) -> Result<(Vec<u32>, Vec<u32>)> {
        let bare = context.trim_end();
        let continuation = format!("{}{continuation}", &context[bare.len()..]);
        let mut whole = self.encode(&format!("{bare}{continuation}"))?;
        let mut context = self.encode(bare)?;
        if context.is_empty() {
            context.push(self.start()?);
            whole.splice(0..0, [context[0]]);
        }
        if whole.len() <= context.len() {
            // The two grew together so much that nothing follows the context's own tokens.
            context.clone_from(&whole);
            context.truncate(whole.len().saturating_sub(1).max(1));
        }
        let continuation = whole.split_off(context.len().min(whole.len()));
        Ok((context, continuation))
    }

    /// Token ids of a text to continue: the start or end token where there is no other.
    ///
    /// # Errors
    /// As [`encode_pair`](Self::encode_pair).
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>> {
        let ids = self.encode(text)?;
        if ids.is_empty() { Ok(vec![self.start()?]) } else { Ok(ids) }
    }

    /// The token before a text that has nothing before it.
    fn start(&self) -> Result<u32> {
        let token = self.tokenizer.bos().or(self.tokenizer.eos());
        token.map(|(id, _)| id).ok_or_else(|| Error::Option {
            option: "model",
            message: "its tokenizer has neither a start nor an end token, and a prompt is empty; \
                      expected one of them"
                .to_owned(),
        })
    }

    /// How texts begin, for the record.
    pub fn describe(&self) -> Value {
        let mut described = json!({
            "add_bos_token": self.tokenizer.add_bos(),
            "bos_token": self.tokenizer.bos().map(|(_, text)| text),
            "chat_template": self.template.map(|template| template.source()),
        });
        if let Some(template) = self.template.filter(|template| !template.arguments().is_empty()) {
            described["template_arguments"] = json!(template.arguments());
        }
        described
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn examples_stand_between_description_and_question() {
        let prompt = Prompt {
            description: "About sums.\n\n".to_owned(),
            shots: vec![("1+1?".to_owned(), "2".to_owned()), ("1+2?".to_owned(), "3".to_owned())],
            question: "2+2?".to_owned(),
            answer_delimiter: " ".into(),
            ..Prompt::default()
        };
        assert_eq!(prompt.text(), "About sums.\n\n1+1? 2\n\n1+2? 3\n\n2+2?");
        let roles: Vec<String> = prompt.messages().into_iter().map(|turn| turn.role).collect();
        assert_eq!(roles, ["system", "user", "assistant", "user", "assistant", "user"]);
        assert_eq!(Prompt::plain("x").messages().len(), 1);
    }
}
