//! Calls of tools as a template expects them.
//!
//! Chat APIs write a call's arguments as JSON text, most templates take an object and write its JSON
//! themselves or ask for parts of it; some join the text with others. Both forms are in data, and so is the older
//! `function_call`. A conversation keeps what the record says, but where the template refuses that or would
//! put quotes around JSON text, it gets the other form: what is asked and what is trained alike.

use std::borrow::Cow;

use serde_json::{Map, Value, json};

use super::ChatTemplate;
use crate::record::Message;

impl ChatTemplate {
    /// The messages with their calls in the form that the template expects. `transformers` renders what
    /// it is given, and leaves this to its callers.
    pub fn adapt<'m>(
        &self,
        messages: &'m [Message],
        variables: &Map<String, Value>,
        bos: &str,
        eos: &str,
    ) -> Cow<'m, [Message]> {
        let calls = |message: &Message| {
            ["tool_calls", "function_call"].iter().any(|name| message.fields.contains_key(*name))
        };
        if !messages.iter().any(calls) {
            return Cow::Borrowed(messages);
        }
        let mut own = messages.to_vec();
        if !self.reads("function_call") {
            own.iter_mut().for_each(list_older);
        }
        let render =
            |messages: &[Message]| self.render_with(messages, variables, false, bos, eos).ok();
        let written = render(&own);
        if let Some(other) = otherwise(&own, written.as_deref())
            && render(&other).is_some()
        {
            return Cow::Owned(other);
        }
        if written.is_some() {
            return Cow::Owned(own);
        }
        // It may take every turn to have a text, and an empty one says the same as none.
        let mut texts = own.clone();
        texts.iter_mut().for_each(|message| drop(message.fields.shift_remove("content")));
        let other = otherwise(&texts, None);
        let found = std::iter::once(texts).chain(other).find(|texts| render(texts).is_some());
        Cow::Owned(found.unwrap_or(own))
    }
}

/// Where a call keeps its arguments.
fn arguments(call: &mut Value) -> Option<&mut Value> {
    let own = call.get("function").is_none_or(|function| !function.is_object());
    let function = if own { call } else { call.get_mut("function")? };
    function.get_mut("arguments")
}

/// Gives a turn that calls by the older `function_call` the newer list.
fn list_older(message: &mut Message) {
    let function = message.fields.get("function_call").filter(|call| call.is_object());
    if let Some(function) = function.filter(|_| !message.fields.contains_key("tool_calls")) {
        let list = json!([{"type": "function", "function": function}]);
        message.fields.insert("tool_calls".to_owned(), list);
    }
}

/// The messages with arguments in the other form, where `written`, what the template made of this one,
/// shows that it is not the one it expects; none if they stay as they are.
fn otherwise(messages: &[Message], written: Option<&str>) -> Option<Vec<Message>> {
    let mut messages = messages.to_vec();
    let mut changed = false;
    let calls = messages
        .iter_mut()
        .filter_map(|message| message.fields.get_mut("tool_calls")?.as_array_mut())
        .flatten();
    for arguments in calls.filter_map(arguments) {
        match arguments {
            Value::String(text) => {
                let Ok(object) = serde_json::from_str::<Map<String, Value>>(text) else { continue };
                let quoted = Value::String(text.clone()).to_string();
                // Without quotes it is what the template joins; where it is nowhere, its parts are asked for.
                let is_wrong =
                    |written: &str| written.contains(&quoted) || !written.contains(text.as_str());
                if !object.is_empty() && written.is_none_or(is_wrong) {
                    *arguments = Value::Object(object);
                    changed = true;
                }
            }
            Value::Object(_) if written.is_none() => {
                *arguments = Value::String(arguments.to_string());
                changed = true;
            }
            _ => {}
        }
    }
    changed.then_some(messages)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(source: &str, call: &Value) -> String {
        let mut message = Message::assistant("");
        message.fields = call.as_object().unwrap().clone();
        let template = ChatTemplate::from_source("calls", source).unwrap();
        let messages = [Message::user("a"), message];
        let messages = template.adapt(&messages, &Map::new(), "", "");
        template.render(&messages, false, "", "").unwrap()
    }

    #[test]
    fn arguments_may_be_text_or_an_object() {
        const JSON: &str = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.name }} \
            {{ c.function.arguments | tojson }}{% endfor %}{% endfor %}";
        const TEXT: &str = "{% for m in messages %}{% for c in m.tool_calls or [] %}\
            {{ c.function.name + ' ' + c.function.arguments }}{% endfor %}{% endfor %}";
        const PAIRS: &str = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.name }}\
            {% for k, v in c.function.arguments.items() %} {{ k }}={{ v }}{% endfor %}{% endfor %}{% endfor %}";
        const PART: &str = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.name }} \
            {{ c.function.arguments.a }}{% endfor %}{% endfor %}";
        let object = json!({"tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]});
        let text = json!({"tool_calls": [{"function": {"name": "f", "arguments": "{\"a\": 1}"}}]});
        let older = json!({"function_call": {"name": "f", "arguments": "{\"a\": 1}"}});
        for call in [&object, &text, &older] {
            assert_eq!(written(JSON, call), "f {\"a\": 1}", "{call}");
            assert_eq!(written(TEXT, call).replace(' ', ""), "f{\"a\":1}", "{call}");
            assert_eq!(written(PAIRS, call), "f a=1", "{call}");
            assert_eq!(written(PART, call), "f 1", "{call}");
        }
        // A template that joins texts gets one.
        let joined = "{% for m in messages %}{{ m.content + '!' }}{% endfor %}";
        let mut silent = object.clone();
        silent["content"] = Value::Null;
        assert_eq!(written(joined, &silent), "a!!");
        // What is no JSON stays as it is.
        let words = json!({"tool_calls": [{"function": {"name": "f", "arguments": "all of it"}}]});
        assert_eq!(written(JSON, &words), "f \"all of it\"");
    }
}
