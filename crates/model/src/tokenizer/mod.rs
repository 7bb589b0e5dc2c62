//! Text to token ids and back, as the model's own tokenizer does it.

mod added;
mod from_folder;
mod from_gguf;
mod from_sentence_piece;
mod from_tekken;
mod growth;
mod sentence_piece;
mod stream;
mod to_gguf;
mod words;

pub use added::AddedToken;
pub use stream::{TokenStream, TokenText};

use crate::error::{Error, Result};
use crate::gguf::GgufFile;
use serde_json::{Map, Value, json};
use std::fmt;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use tokenizers::PostProcessorWrapper;

/// The tokenizer's description in a model folder.
const TOKENIZER_FILE: &str = "tokenizer.json";
/// Its special tokens and chat template.
const CONFIG_FILE: &str = "tokenizer_config.json";
/// Tokens that end a turn in the chat templates of the supported families.
pub const END_OF_TURN: &[&str] =
    &["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>"];

/// A special token: its id and its text.
type Special = (u32, String);

/// A tokenizer with the special tokens and the chat template that belong to it.
#[derive(Clone)]
pub struct Tokenizer {
    path: PathBuf,
    inner: tokenizers::Tokenizer,
    /// Taken out of `inner`: it would trim the spaces off the byte ranges.
    post_processor: Option<PostProcessorWrapper>,
    vocab_size: usize,
    /// Rows of the embedding that texts are for; as many as there are tokens if none.
    rows: Option<usize>,
    bos: Option<Special>,
    eos: Option<Special>,
    pad: Option<Special>,
    /// Those of `end_ids` that no template names.
    text_end_ids: Vec<u32>,
    end_ids: Vec<u32>,
    add_bos: bool,
    chat_template: Option<String>,
    /// Texts of special tokens.
    special: Vec<String>,
}

/// What a file says beside the vocabulary itself.
#[derive(Default)]
struct Extras {
    bos: Option<Special>,
    eos: Option<Special>,
    pad: Option<Special>,
    end_ids: Vec<u32>,
    add_bos: Option<bool>,
    chat_template: Option<String>,
}

impl Tokenizer {
    /// Reads `tokenizer.json`, or where there is none `tekken.json` or `tokenizer.model`, and the
    /// files beside it; `config_end_ids` are the tokens at which
    /// the model's configuration says a text ends.
    ///
    /// # Errors
    /// If there is none of them, a file is malformed, or one names a special token that the
    /// vocabulary lacks.
    pub fn from_folder(folder: &Path, config_end_ids: &[u32]) -> Result<Self> {
        from_folder::read(folder, config_end_ids)
    }

    /// Builds the tokenizer a GGUF file describes.
    ///
    /// # Errors
    /// If its kind or its rule for cutting words is not supported, it lacks what that kind needs,
    /// or it names a special token that the vocabulary lacks.
    pub fn from_gguf(file: &GgufFile) -> Result<Self> {
        from_gguf::build(file)
    }

    fn assemble(path: &Path, mut inner: tokenizers::Tokenizer, extras: Extras) -> Result<Self> {
        growth::check(path, &inner)?;
        // A file may ask for truncation or padding, of any length; whole texts are needed here.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| Error::tokenizer(path, error.to_string()))?;
        let vocab_size = inner.get_vocab_size(true);
        for &id in &extras.end_ids {
            if inner.id_to_token(id).is_none() {
                return Err(missing(path, "an end token", &id.to_string(), vocab_size));
            }
        }
        let mut end_ids = extras.end_ids;
        let eos = match (extras.eos, end_ids.first()) {
            (None, Some(&id)) => inner.id_to_token(id).map(|text| (id, text)),
            (eos, _) => eos,
        };
        end_ids.extend(eos.as_ref().map(|(id, _)| *id));
        end_ids.sort_unstable();
        end_ids.dedup();
        let text_end_ids = end_ids.clone();
        let template = extras.chat_template.as_deref().unwrap_or_default();
        let in_template = END_OF_TURN.iter().filter(|token| template.contains(**token));
        end_ids.extend(in_template.filter_map(|token| inner.token_to_id(token)));
        end_ids.sort_unstable();
        end_ids.dedup();
        let add_bos = extras.add_bos.unwrap_or_else(|| {
            // Newer files say it only through the post-processor.
            let encoded = guarded(path, || inner.encode_fast("a", true)).ok();
            let first = encoded.and_then(|encoded| encoded.get_ids().first().copied());
            extras.bos.as_ref().is_some_and(|(id, _)| first == Some(*id))
        });
        let added = inner.get_added_vocabulary().get_added_tokens_decoder();
        let special =
            added.values().filter(|token| token.special && !token.content.trim().is_empty());
        let mut special: Vec<String> = special.map(|token| token.content.clone()).collect();
        // The longest that fits counts.
        special.sort_by(|a, b| b.len().cmp(&a.len()).then(a.cmp(b)));
        let post_processor = inner.get_post_processor().cloned();
        inner.with_post_processor(None::<PostProcessorWrapper>);
        Ok(Self {
            path: path.to_path_buf(),
            inner,
            post_processor,
            vocab_size,
            rows: None,
            bos: extras.bos,
            eos,
            pad: extras.pad,
            text_end_ids,
            end_ids,
            add_bos,
            chat_template: extras.chat_template,
            special,
        })
    }

    /// Token ids of `text`. Special tokens written in the text are recognised; none is added.
    ///
    /// # Errors
    /// If the text cannot be encoded.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = guarded(&self.path, || self.inner.encode_fast(text, false))?;
        self.check_rows(encoding.get_ids())?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Notes that the embedding has `rows` rows: published folders have tokens beyond them that no
    /// text of the model's training used, and a text that uses one has no meaning.
    pub(crate) fn with_rows(mut self, rows: usize) -> Self {
        self.rows = Some(rows);
        self
    }

    fn check_rows(&self, ids: &[u32]) -> Result<()> {
        let Some(rows) = self.rows else { return Ok(()) };
        match ids.iter().find(|&&id| id as usize >= rows) {
            Some(&id) => {
                let token = self.id_to_token(id).unwrap_or_default();
                let message = format!(
                    "a text uses the token {id} ({token:?}), which has no row in the embedding of \
                     {rows}"
                );
                Err(Error::tokenizer(&self.path, message))
            }
            None => Ok(()),
        }
    }

    /// Token ids with the bytes of `text` each stands for. Tokens that share a character all
    /// have that character's bytes.
    ///
    /// # Errors
    /// If the text cannot be encoded.
    pub fn encode_with_offsets(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>> {
        let encoding = guarded(&self.path, || self.inner.encode(text, false))?;
        self.check_rows(encoding.get_ids())?;
        let pairs = encoding.get_ids().iter().zip(encoding.get_offsets());
        Ok(pairs.map(|(&id, &(start, end))| (id, start..end)).collect())
    }

    /// Text of `ids`; special tokens are left out on request. Ids without a token, as padded
    /// vocabularies have them, stand for nothing.
    ///
    /// # Errors
    /// If the ids cannot be decoded.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        guarded(&self.path, || self.inner.decode(ids, skip_special))
    }

    /// The id of a token by its text.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The text of a token, as the vocabulary writes it.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Number of tokens, special ones included.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The token every text begins with, if the model has one.
    pub fn bos(&self) -> Option<(u32, &str)> {
        self.bos.as_ref().map(|(id, text)| (*id, text.as_str()))
    }

    /// The token that ends a text.
    pub fn eos(&self) -> Option<(u32, &str)> {
        self.eos.as_ref().map(|(id, text)| (*id, text.as_str()))
    }

    /// The token that fills a batch.
    pub fn pad(&self) -> Option<(u32, &str)> {
        self.pad.as_ref().map(|(id, text)| (*id, text.as_str()))
    }

    /// All tokens at which generation stops, in ascending order: those the configuration names and
    /// those with which the chat template ends a turn.
    pub fn end_ids(&self) -> &[u32] {
        &self.end_ids
    }

    /// Those of them at which any text ends, by the configuration, in ascending order. Where answers
    /// end that a chat template writes is `hydralora_run::ends`' to say.
    pub fn text_end_ids(&self) -> &[u32] {
        &self.text_end_ids
    }

    /// Whether a token is one that was added to the vocabulary to be recognised whole, as those that
    /// end a turn are; the ones that begin and end a text count too.
    pub fn is_added(&self, id: u32) -> bool {
        let marks = [&self.bos, &self.eos, &self.pad];
        marks.iter().any(|mark| mark.as_ref().is_some_and(|(mark, _)| *mark == id))
            || self.inner.get_added_vocabulary().get_added_tokens_decoder().contains_key(&id)
    }

    /// Where special tokens are written out in a text, in bytes.
    pub fn special_in(&self, text: &str) -> Vec<Range<usize>> {
        let mut first = [false; 256];
        for token in &self.special {
            first[usize::from(token.as_bytes()[0])] = true;
        }
        let (bytes, mut found, mut at) = (text.as_bytes(), Vec::new(), 0);
        while let Some(next) = bytes[at..].iter().position(|byte| first[usize::from(*byte)]) {
            at += next;
            let fits = |token: &&String| bytes[at..].starts_with(token.as_bytes());
            match self.special.iter().find(fits) {
                Some(token) => {
                    found.push(at..at + token.len());
                    at += token.len();
                }
                None => at += 1,
            }
        }
        found
    }

    /// Whether the model expects every text to begin with its first token.
    pub fn add_bos(&self) -> bool {
        self.add_bos
    }

    /// The model's own chat template, as Jinja source.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// Writes `tokenizer.json` and `tokenizer_config.json` into the existing folder `folder`, as
    /// Hugging Face's libraries read them.
    ///
    /// # Errors
    /// If the file system refuses; each file is written whole or not at all.
    pub fn save(&self, folder: &Path) -> Result<()> {
        for (name, bytes) in self.files()? {
            hydralora_files::write_file(&folder.join(name), &bytes)?;
        }
        Ok(())
    }

    /// Gives the files that [`save`](Self::save) writes: their names and contents.
    ///
    /// # Errors
    /// If the tokenizer has no form as JSON.
    pub fn files(&self) -> Result<Vec<(&'static str, Vec<u8>)>> {
        let mut whole = self.inner.clone();
        whole.with_post_processor(self.post_processor.clone());
        let text = whole.to_string(true).map_err(|error| self.fault(&error))?;
        let whole = text.into_bytes();
        let mut config = Map::new();
        let token = |special: &Option<Special>| special.as_ref().map(|(_, text)| json!(text));
        for (key, value) in [
            ("tokenizer_class", Some(json!("PreTrainedTokenizerFast"))),
            ("bos_token", token(&self.bos)),
            ("eos_token", token(&self.eos)),
            ("pad_token", token(&self.pad)),
            ("add_bos_token", Some(json!(self.add_bos))),
            ("clean_up_tokenization_spaces", Some(json!(false))),
            ("chat_template", self.chat_template.as_ref().map(|template| json!(template))),
        ] {
            config.extend(value.map(|value| (key.to_owned(), value)));
        }
        let text = format!("{:#}\n", Value::Object(config));
        Ok(vec![(TOKENIZER_FILE, whole), (CONFIG_FILE, text.into_bytes())])
    }

    /// The tokenizer as the metadata of a GGUF file for a model with `rows` embeddings, with
    /// `template` instead of its own chat template if one is given. `pieces` is what the architecture's
    /// files call a tokenizer of pieces, see [`GgufNames`](crate::family::GgufNames).
    ///
    /// # Errors
    /// If GGUF has no form for its kind, or a token lies beyond the embeddings.
    pub fn gguf_metadata(
        &self,
        rows: usize,
        template: Option<&str>,
        pieces: &str,
    ) -> Result<Vec<(String, crate::gguf::Value)>> {
        to_gguf::metadata(self, rows, template, pieces)
    }

    fn fault(&self, error: &tokenizers::Error) -> Error {
        Error::tokenizer(&self.path, error.to_string())
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("path", &self.path)
            .field("vocab_size", &self.vocab_size)
            .field("bos", &self.bos)
            .field("eos", &self.eos)
            .field("end_ids", &self.end_ids)
            .finish_non_exhaustive()
    }
}

/// What the library gives. It trusts the parts of a file to fit each other, and panics where they
/// do not.
fn guarded<T>(path: &Path, action: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(action)) {
        Ok(result) => result.map_err(|error| Error::tokenizer(path, error.to_string())),
        Err(_) => Err(Error::tokenizer(path, "its parts contradict each other")),
    }
}

/// The error of a special token that `path` names and the vocabulary lacks.
fn missing(path: &Path, role: &str, token: &str, vocab_size: usize) -> Error {
    Error::MissingSpecialToken {
        path: path.to_path_buf(),
        role: role.to_owned(),
        token: token.to_owned(),
        vocab_size,
    }
}
