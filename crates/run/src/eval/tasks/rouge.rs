//! Written answers compared with references by ROUGE-L (Lin, 2004), over any file of prompts and
//! answers.
//!
//! `--tasks rouge:FILE`: the last answer of a record is asked for, greedily, as `exact` asks. Scores are
//! the F-measures of Google's package `rouge_score` without stemming (its stemmer is NLTK's variant of
//! Porter's, which no kept crate has). Words are runs of `a` to `z` and `0` to `9` in lower case.
//! `rougeL` is twice the longest common subsequence of both texts' words by the number of all their
//! words; `rougeLsum` takes lines for sentences: of each reference line, the words in a longest common
//! subsequence with any line of the answer, each word counted as often as both texts have it.
//! Of several references, the one that scores highest counts.
//!
//! A record may have its references in a list of texts, `references`, beside or in place of an answer;
//! the outputs of an instance of Natural Instructions are references too.

use super::exact::{records, written};
use super::loss::record_files;
use crate::eval::error::{Error, Result};
use crate::eval::prompt::{Prompt, Reader};
use crate::eval::task::{
    Answer, Family, Files, Info, Item, Metric, Opened, Score, Settings, Task, Work,
};
use hydralora_data::{SourceConfig, without_reasoning};
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::path::Path;

/// The field with several right answers.
const REFERENCES: &str = "references";

/// The only member of its family.
pub(crate) static FAMILY: RougeFamily = RougeFamily;

pub(crate) struct RougeFamily;

impl Family for RougeFamily {
    fn names(&self) -> Vec<String> {
        vec!["rouge".to_owned()]
    }

    fn takes_file(&self) -> bool {
        true
    }

    fn summary(&self) -> &'static str {
        "ROUGE-L of written answers, over any file of prompts and answers: rouge:FILE"
    }

    fn open(&self, name: &str, settings: &Settings, _: &Reader<'_>) -> Result<Opened> {
        settings.examples(name, 0, 0)?;
        let mut opened = Opened::default();
        for path in record_files(name, &settings.data, "records as for training")? {
            let (items, references) = questions(&path)?;
            let breaks = references.iter().flatten().any(|text| text.contains('\n'));
            let metrics = ["rougeL", "rougeLsum"].map(|name| Metric::new(name, "none")).to_vec();
            let (info, items) = written(name, &path, metrics, items, breaks, settings)?;
            opened.tasks.push(Box::new(Rouge { info, items, references }));
        }
        Ok(opened)
    }
}

/// The questions of a file, with the references of each.
fn questions(path: &Path) -> Result<(Vec<Item>, Vec<Vec<String>>)> {
    let mut source = SourceConfig::new(path);
    let (listed, plain) = listed(path, &mut source)?;
    let mut items = match plain {
        Some(prompts) => (prompts.into_iter().enumerate())
            .map(|(id, prompt)| Item {
                id,
                record: json!({"row": id}),
                prompt: Prompt::plain(prompt),
                work: Work::Whole(Vec::new()),
                target: String::new(),
            })
            .collect(),
        None => records(&source)?,
    };
    let mut all = Vec::new();
    for item in &mut items {
        let own = listed.get(item.id).cloned().flatten();
        let references = own.unwrap_or_else(|| vec![item.target.clone()]);
        let tidy = references.iter().map(|text| without_reasoning(text).trim().to_owned());
        let references: Vec<String> = tidy.collect();
        item.target = match &references[..] {
            [only] => only.clone(),
            several => json!(several).to_string(),
        };
        all.push(references);
    }
    Ok((items, all))
}

/// References by record, where a record lists them, and the prompts of a file of nothing but prompts
/// and references.
type Listed = (Vec<Option<Vec<String>>>, Option<Vec<String>>);

fn listed(path: &Path, source: &mut SourceConfig) -> Result<Listed> {
    let bytes = hydralora_files::read(path)?;
    if let Ok(Value::Object(document)) = serde_json::from_slice(&bytes)
        && let Some(Value::Array(instances)) = document.get("Instances")
    {
        source.format = "natural-instructions".to_owned();
        let outputs = instances.iter().map(|instance| texts(&instance["output"])).collect();
        return Ok((outputs, None));
    }
    let (mut found, mut prompts, mut bare) = (Vec::new(), Vec::new(), false);
    let mut take = |record: Map<String, Value>| {
        let own = match record.get(REFERENCES) {
            None | Some(Value::Null) => None,
            Some(list) => Some(texts(list).ok_or_else(|| {
                format!("`{REFERENCES}`: expected a list of texts, one or more of them")
            })?),
        };
        let prompt = record.get("prompt").and_then(Value::as_str).map(str::to_owned);
        // A prompt, references, and nothing that the formats of training take for an answer.
        let answers = ["response", "completion", "output", "messages", "conversations"];
        let alone = own.is_some() && !answers.iter().any(|answer| record.contains_key(*answer));
        if alone && prompt.is_none() {
            return Err("`prompt` is missing; expected a text beside `references`".to_owned());
        }
        if !found.is_empty() && alone != bare {
            return Err(format!(
                "some records have `{REFERENCES}` alone and others an answer; expected one kind in a file"
            ));
        }
        bare = alone;
        found.push(own);
        prompts.push(prompt.unwrap_or_default());
        Ok(())
    };
    match Files::default().rows(path, &mut take) {
        Err(fault @ Error::Malformed { .. }) => Err(fault),
        // A file whose records are no objects, or damaged, is refused in the words of its format.
        Err(_) => Ok((Vec::new(), None)),
        Ok(()) => Ok((found, bare.then_some(prompts))),
    }
}

/// A list of texts that has one at least.
fn texts(value: &Value) -> Option<Vec<String>> {
    let texts = value.as_array()?.iter().map(|text| text.as_str().map(str::to_owned));
    texts.collect::<Option<Vec<String>>>().filter(|texts| !texts.is_empty())
}

/// The words of a text.
fn words(text: &str) -> Vec<String> {
    let lower = text.to_lowercase();
    let parts = lower.split(|c: char| !(c.is_ascii_lowercase() || c.is_ascii_digit()));
    parts.filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

/// Length of the longest common subsequence, and, a bit for each pair of words, whether what comes before
/// both shares more with all of `a` up to there than with all of `b`. Bits, because a reference may be a
/// book.
fn longest(a: &[String], b: &[String]) -> (usize, Vec<u64>) {
    let mut bits = vec![0; (a.len() * b.len()).div_ceil(64)];
    let (mut above, mut here) = (vec![0; b.len() + 1], vec![0; b.len() + 1]);
    for (i, left) in a.iter().enumerate() {
        for (j, right) in b.iter().enumerate() {
            here[j + 1] = match left == right {
                true => above[j] + 1,
                false => above[j + 1].max(here[j]),
            };
            let at = i * b.len() + j;
            bits[at / 64] |= u64::from(here[j] > above[j + 1]) << (at % 64);
        }
        std::mem::swap(&mut above, &mut here);
    }
    (above[b.len()], bits)
}

/// Marks the words of `reference` in one longest common subsequence with `answer`: the one that is found
/// from the end, where both ways are as long with the earlier word of the reference.
fn mark(reference: &[String], answer: &[String], marked: &mut [bool]) {
    let (_, bits) = longest(reference, answer);
    let (mut i, mut j) = (reference.len(), answer.len());
    while i > 0 && j > 0 {
        let at = (i - 1) * answer.len() + j - 1;
        if reference[i - 1] == answer[j - 1] {
            marked[i - 1] = true;
            (i, j) = (i - 1, j - 1);
        } else if bits[at / 64] >> (at % 64) & 1 == 1 {
            j -= 1;
        } else {
            i -= 1;
        }
    }
}

/// The harmonic mean of `hits` by the words of either side; 0 without hits.
fn f_measure(hits: usize, reference: usize, answer: usize) -> f64 {
    if hits == 0 {
        return 0.0;
    }
    let (precision, recall) = (hits as f64 / answer as f64, hits as f64 / reference as f64);
    2.0 * precision * recall / (precision + recall)
}

/// F-measure of the longest common subsequence of words.
pub(crate) fn rouge_l(reference: &str, answer: &str) -> f64 {
    let (reference, answer) = (words(reference), words(answer));
    let (hits, _) = longest(&reference, &answer);
    f_measure(hits, reference.len(), answer.len())
}

/// F-measure of the union of longest common subsequences of lines.
pub(crate) fn rouge_l_sum(reference: &str, answer: &str) -> f64 {
    let lines = |text: &str| -> Vec<Vec<String>> { text.split('\n').map(words).collect() };
    let (reference, answer) = (lines(reference), lines(answer));
    fn counts(lines: &[Vec<String>]) -> HashMap<&str, usize> {
        let mut counts = HashMap::new();
        for word in lines.iter().flatten() {
            *counts.entry(word.as_str()).or_insert(0) += 1;
        }
        counts
    }
    let mut left = [counts(&reference), counts(&answer)];
    let [in_reference, in_answer] = left.each_ref().map(|counts| counts.values().sum());
    let mut hits = 0;
    for line in &reference {
        let mut marked = vec![false; line.len()];
        answer.iter().for_each(|own| mark(line, own, &mut marked));
        for (word, _) in line.iter().zip(&marked).filter(|(_, marked)| **marked) {
            // A word that lines of both share counts once for each time that it is there.
            if left.iter().all(|counts| counts.get(word.as_str()).is_some_and(|&n| n > 0)) {
                hits += 1;
                left.iter_mut().filter_map(|c| c.get_mut(word.as_str())).for_each(|n| *n -= 1);
            }
        }
    }
    f_measure(hits, in_reference, in_answer)
}

struct Rouge {
    info: Info,
    items: Vec<Item>,
    /// Of each item, by its number.
    references: Vec<Vec<String>>,
}

impl Task for Rouge {
    fn info(&self) -> &Info {
        &self.info
    }

    fn items(&self) -> &[Item] {
        &self.items
    }

    fn score(&self, item: &Item, answer: &Answer) -> Result<Vec<Score>> {
        let text = answer.texts().first().map_or("", String::as_str);
        let text = without_reasoning(text).trim();
        let score = |measure: fn(&str, &str) -> f64| {
            let references = self.references[item.id].iter();
            let value = references.map(|reference| measure(reference, text)).fold(0.0, f64::max);
            Score { value, weight: 1.0, filtered: text.to_owned() }
        };
        Ok(vec![score(rouge_l), score(rouge_l_sum)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Deserialize)]
    struct Case {
        references: Vec<String>,
        answer: String,
        rouge_l: f64,
        rouge_l_sum: f64,
    }

    #[test]
    fn scores_are_those_of_google_s_package() {
        let text = include_str!("../../../tests/fixtures/rouge.json");
        let cases: Vec<Case> = serde_json::from_str(text).unwrap();
        assert!(cases.len() >= 200);
        for case in &cases {
            for (measure, expected) in
                [(rouge_l as fn(&str, &str) -> f64, case.rouge_l), (rouge_l_sum, case.rouge_l_sum)]
            {
                let best = case.references.iter().map(|text| measure(text, &case.answer));
                let best = best.fold(0.0, f64::max);
                let (references, answer) = (&case.references, &case.answer);
                assert!(
                    (best - expected).abs() < 1e-12,
                    "{best} {expected} {references:?} {answer:?}"
                );
            }
        }
        let differ = cases.iter().filter(|case| case.rouge_l != case.rouge_l_sum).count();
        let middling = cases.iter().filter(|case| case.rouge_l > 0.0 && case.rouge_l < 1.0).count();
        assert!(differ > 30 && middling > 100, "{differ} {middling}");
    }

    #[test]
    fn known_sentences_score_as_in_the_paper() {
        // Lin (2004), section 3.1: "police kill the gunman" has 3 of 4 words in common order.
        let reference = "police killed the gunman";
        assert!((rouge_l(reference, "police kill the gunman") - 0.75).abs() < 1e-12);
        assert!((rouge_l(reference, "the gunman kill police") - 0.5).abs() < 1e-12);
        // Section 3.2: lines w1 w2 w6 w7 w8 and w1 w3 w8 w9 w5 share four words with w1 w2 w3 w4 w5.
        let lines = "w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5";
        let expected = f_measure(4, 5, 10);
        assert!((rouge_l_sum("w1 w2 w3 w4 w5", lines) - expected).abs() < 1e-12);
        assert_eq!(rouge_l("", ""), 0.0);
        assert_eq!(rouge_l("été", "日本"), 0.0);
    }

    #[test]
    fn references_come_from_lists_answers_and_instances() {
        let folder = tempfile::tempdir().unwrap();
        let found = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            questions(&path).map(|(items, references)| {
                let chat = items.iter().map(|item| item.prompt.conversation.is_some());
                (references, chat.collect::<Vec<_>>())
            })
        };
        let (references, chat) = found(
            "answers.jsonl",
            "{\"prompt\": \"a\", \"response\": \" b \"}\n\
             {\"prompt\": \"c\", \"response\": \"d\", \"references\": [\"e\", \"<think>x</think>f\"]}\n",
        )
        .unwrap();
        assert_eq!(references, [vec!["b"], vec!["e", "f"]]);
        assert_eq!(chat, [true, true]);
        let (references, chat) =
            found("listed.json", r#"[{"prompt": "a", "references": ["b", "c"]}]"#).unwrap();
        assert_eq!((references, chat), (vec![vec!["b".to_owned(), "c".to_owned()]], vec![false]));
        let (references, chat) = found(
            "task.json",
            "{\"Definition\": [\"Add.\"],\n \"Instances\": [{\"input\": \"1 1\", \"output\": [\"2\", \"two\"]}]}",
        )
        .unwrap();
        assert_eq!((references, chat), (vec![vec!["2".to_owned(), "two".to_owned()]], vec![true]));
        for (text, expected) in [
            (
                "{\"prompt\": \"a\", \"references\": []}",
                "line 1: `references`: expected a list of texts",
            ),
            ("{\"prompt\": \"a\", \"references\": \"b\"}", "`references`: expected a list"),
            ("{\"references\": [\"b\"]}", "line 1: `prompt` is missing"),
            (
                "{\"prompt\": \"a\", \"references\": [\"b\"]}\n{\"prompt\": \"a\", \"response\": \"b\"}",
                "line 2: some records have `references` alone",
            ),
            ("{\"text\": \"a\"}", "has no answer"),
            ("", "x.jsonl"),
            ("{\"prompt\": \"a\"}", "x.jsonl"),
        ] {
            let error = found("x.jsonl", text).err().unwrap();
            assert!(error.to_string().contains(expected), "{text}: {error}");
            assert!(error.is_bad_input(), "{text}");
        }
    }
}
