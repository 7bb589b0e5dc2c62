//! Answers that have to have a form: JSON, JSON of a schema, a call of a tool.

use crate::ask::MakeConstraint;
use crate::calls::CallForm;
use crate::error::ApiError;
use crate::pieces::Pieces;
use hydralora_run::engine::Constraint;
use llguidance::api::TopLevelGrammar;
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use toktrie::{TokRxInfo, TokTrie, TokenId, TokenizerEnv};

/// The vocabulary as the library of grammars sees it.
struct Vocabulary(TokTrie);

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.0
    }

    fn tokenize_bytes(&self, s: &[u8]) -> Vec<TokenId> {
        self.0.greedy_tokenize(s)
    }

    /// Cutting greedily is not how the model's own tokenizer cuts, so that no tokens are forced.
    fn tokenize_is_canonical(&self) -> bool {
        false
    }
}

/// Makes constraints.
pub(crate) struct Forms {
    end_ids: Vec<u32>,
    /// Made when one is first asked for: it takes a while for large vocabularies.
    factory: OnceLock<Result<ParserFactory, String>>,
}

impl Forms {
    /// For a model whose answers end with one of `end_ids`.
    pub(crate) fn new(end_ids: &[u32]) -> Self {
        Self { end_ids: end_ids.to_vec(), factory: OnceLock::new() }
    }

    fn factory(&self, pieces: &Pieces) -> Result<&ParserFactory, ApiError> {
        let make = || {
            let words = pieces.words();
            let eos = self.end_ids.first().copied().unwrap_or(0);
            let info = TokRxInfo::new(words.len() as u32, eos);
            let trie = TokTrie::from(&info, &words).with_eos_tokens(&self.end_ids);
            let environment: toktrie::TokEnv = Arc::new(Vocabulary(trie));
            let mut factory =
                ParserFactory::new_simple(&environment).map_err(|error| error.to_string())?;
            factory.quiet();
            factory.limits_mut().verbose_errors = false;
            Ok(factory)
        };
        let made = self.factory.get_or_init(make);
        made.as_ref().map_err(|_| {
            let message = "answers of a given form cannot be had with this model's vocabulary";
            ApiError::invalid(message).coded("unsupported")
        })
    }

    /// An answer that is JSON of this schema.
    ///
    /// # Errors
    /// If the schema is none, or asks for what cannot be held to.
    pub(crate) fn json(
        &self,
        pieces: &Pieces,
        schema: Value,
        field: &str,
    ) -> Result<MakeConstraint, ApiError> {
        self.grammar(pieces, TopLevelGrammar::from_json_schema(plain_spaces(schema)), field)
    }

    /// An answer that is a call of one of `tools`, as `form` writes it.
    ///
    /// # Errors
    /// If a tool's schema asks for what cannot be held to.
    pub(crate) fn call(
        &self,
        pieces: &Pieces,
        tools: &[Value],
        form: Option<&CallForm>,
    ) -> Result<MakeConstraint, ApiError> {
        let one = |tool: &Value| {
            let function = &tool["function"];
            let parameters = match &function["parameters"] {
                object @ Value::Object(_) => object.clone(),
                _ => json!({"type": "object"}),
            };
            json!({
                "type": "object",
                "properties": {"name": {"const": function["name"]}, "arguments": parameters},
                "required": ["name", "arguments"],
                "additionalProperties": false,
            })
        };
        let schema = plain_spaces(json!({"anyOf": tools.iter().map(one).collect::<Vec<_>>()}));
        let grammar = match form.map_or(("", ""), |form| form.around) {
            ("", "") => TopLevelGrammar::from_json_schema(schema),
            (before, behind) => {
                let (before, behind) = (json!(before), json!(behind));
                let lark = format!("start: {before} call {behind}\ncall: %json {schema}\n");
                TopLevelGrammar::from_lark(lark)
            }
        };
        self.grammar(pieces, grammar, "tools")
    }

    fn grammar(
        &self,
        pieces: &Pieces,
        grammar: TopLevelGrammar,
        field: &str,
    ) -> Result<MakeConstraint, ApiError> {
        let parser = self.factory(pieces)?.create_parser(grammar);
        let parser = parser.map_err(|error| {
            let message = format!("answers cannot be held to this schema: {error}");
            ApiError::field(field, message).coded("invalid_schema")
        })?;
        // It is made once, and every answer gets one of its own.
        let first = Mutex::new(Matcher::new(Ok(parser)));
        Ok(Box::new(move || {
            let matcher = first.lock().unwrap_or_else(PoisonError::into_inner).deep_clone();
            Box::new(Held { matcher })
        }))
    }
}

/// A schema whose JSON has a space behind commas and colons, and no other: a small model that may write
/// any number of spaces sometimes writes nothing else.
fn plain_spaces(mut schema: Value) -> Value {
    if let Value::Object(fields) = &mut schema {
        let options = json!({
            "whitespace_flexible": false, "item_separator": ", ", "key_separator": ": ",
        });
        fields.insert("x-guidance".to_owned(), options);
    }
    schema
}

/// An answer that is held to a grammar.
struct Held {
    matcher: Matcher,
}

impl Constraint for Held {
    fn allow(&mut self, allowed: &mut [u64]) -> Result<(), String> {
        let mask = self.matcher.compute_mask_or_eos().map_err(|error| error.to_string())?;
        let words = mask.as_slice().chunks(2);
        for (word, halves) in allowed.iter_mut().zip(words) {
            let high = halves.get(1).copied().unwrap_or(0);
            *word = u64::from(halves[0]) | u64::from(high) << 32;
        }
        Ok(())
    }

    fn accept(&mut self, token: u32) -> Result<(), String> {
        self.matcher.consume_token(token).map_err(|error| error.to_string())
    }

    fn is_done(&self) -> bool {
        self.matcher.is_stopped()
    }
}
