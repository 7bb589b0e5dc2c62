//! What a person reads when a file or a recipe is wrong.

use hydralora_data::{DataConfig, Dataset, Error, SourceConfig};
use insta::assert_snapshot;

use crate::{config, encoder, folder, load};

/// The message about one file, with the folder's name taken out.
fn message(name: &str, content: impl AsRef<[u8]>) -> String {
    message_with(name, content, |_| {})
}

fn message_with(
    name: &str,
    content: impl AsRef<[u8]>,
    change: impl FnOnce(&mut DataConfig),
) -> String {
    let folder = folder(&[(name, content.as_ref())]);
    let mut config = config(&[name]);
    change(&mut config);
    let error = load(&config, folder.path()).expect_err("the input is wrong");
    error.to_string().replace(&format!("{}/", folder.path().display()), "")
}

#[test]
fn a_broken_line_is_named() {
    let content = "{\"instruction\": \"a\", \"output\": \"b\"}\n\n{\"instruction\": \"a\" \"output\": \"b\"}\n";
    assert_snapshot!(message("x.jsonl", content), @r#"
    x.jsonl: line 3: not valid JSON at line 3, column 21: expected `,` or `}`
      in: {"instruction": "a" "output": "b"}
    "#);
}

#[test]
fn an_object_over_several_lines_is_explained() {
    assert_snapshot!(message("x.jsonl", "{\n  \"text\": \"a\"\n}\n"), @r#"
    x.jsonl: line 1: not valid JSON at line 1, column 1: the line ends inside the record; JSON lines hold one whole object on each line
      in: {
    "#);
}

#[test]
fn a_broken_record_of_an_array_is_named_by_number_and_line() {
    let content = "[\n  {\"text\": \"a\"},\n  {\n    \"text\": nope\n  }\n]";
    assert_snapshot!(message("x.json", content), @r#"
    x.json: record 2 (line 3): not valid JSON at line 4, column 14: expected ident
      in: {     "text": nope   }
    "#);
}

#[test]
fn arrays_that_do_not_end_or_hold_no_objects() {
    assert_snapshot!(message("x.json", "[{\"text\": \"a\"}\n"), @r#"
    x.json: record 1 (line 1): not valid JSON at line 2, column 1: expected `,` or `]`, found the end of the file
      in: {"text": "a"}
    "#);
    assert_snapshot!(message("x.json", "[{\"text\": \"a\"},\n"), @r#"
    x.json: record 2 (line 2): not valid JSON at line 2, column 1: the file ends inside the array
      in:
    "#);
    assert_snapshot!(message("x.json", "[{\"text\": \"a\"},\n 12]"), @r#"
    x.json: record 2 (line 2): not valid JSON at line 2, column 2: expected an object `{…}`, found `1`
      in: 12]
    "#);
    assert_snapshot!(message("x.json", "[{\"text\": \"a\"} {\"text\": \"b\"}]"), @r#"
    x.json: record 1 (line 1): not valid JSON at line 1, column 16: expected `,` or `]` after the record, found `{`
      in: {"text": "a"}
    "#);
    assert_snapshot!(message("x.json", "[{\"text\": \"a\"}]\n{\"text\": \"b\"}"), @r#"x.json: line 2: expected the end of the file after the array, found {"text": "b"}"#);
}

#[test]
fn a_missing_field_is_named_with_those_that_are_there() {
    let content = "{\"instruction\": \"a\", \"output\": \"b\"}\n{\"instruction\": \"a\", \"outputs\": \"b\"}\n";
    assert_snapshot!(message("x.jsonl", content), @r#"
    x.jsonl: line 2: field `output`: expected a string, found no such field among [instruction, outputs]; is it `outputs`?
      in: {"instruction": "a", "outputs": "b"}
    "#);
}

#[test]
fn a_field_of_the_wrong_kind_is_named() {
    let content = "[{\"instruction\": \"a\",\n \"output\": 42}]";
    assert_snapshot!(message("x.json", content), @r#"
    x.json: record 1 (line 1): field `output`: expected a string, found the number 42
      in: {"instruction": "a",  "output": 42}
    "#);
}

#[test]
fn an_unknown_role_is_named() {
    let content = "{\"messages\": [{\"role\": \"human\", \"content\": \"a\"}]}";
    assert_snapshot!(message("x.jsonl", content), @r#"
    x.jsonl: line 1: field `messages[0].role`: expected one of system, user, assistant, tool, developer, found "human"
      in: {"messages": [{"role": "human", "content": "a"}]}
    "#);
}

#[test]
fn a_line_that_is_no_object_is_named() {
    assert_snapshot!(message("x.jsonl", "{\"text\": \"a\"}\n\"b\"\n"), @r#"
    x.jsonl: line 2: field `(the whole record)`: expected an object, found the string "b"
      in: "b"
    "#);
}

#[test]
fn unknown_fields_do_not_tell_a_format() {
    assert_snapshot!(message("x.jsonl", "{\"question\": \"a\", \"answer\": \"b\"}"), @r#"x.jsonl: cannot tell the format: the first record has the fields [question, answer]; the formats need messages (messages), sharegpt (conversations), alpaca (instruction, output), prompt-response (prompt, response), natural-instructions (definition, input, output), completion (prompt, completion), text (text); set `format`, or map your names with `fields`, such as {instruction: question, output: answer}, or with `--field instruction=question --field output=answer` where the command takes it"#);
}

#[test]
fn files_of_other_kinds_are_recognised() {
    assert_snapshot!(message("x.jsonl", b"PK\x03\x04"), @"x.jsonl: the file is a zip archive; unpack it first (a workbook of Excel is one too: save it as CSV)");
    assert_snapshot!(message("x.jsonl", b"<html>"), @"x.jsonl: the file is a web page, as a download that was refused leaves; fetch the file itself");
    assert_snapshot!(message("x.bin", b"\0\x01\x02"), @"x.bin: expected JSON lines, a JSON array, CSV with a header that names the fields, or Parquet for format auto, found a file whose first bytes are no text; plain text files need `format: text`");
    assert_snapshot!(message("x.jsonl", b"\xff\xfe{\x00"), @r#"x.jsonl: the file is UTF-16; save it as UTF-8"#);
    assert_snapshot!(message("x.jsonl", b"\xff\xfe\0\0{\0\0\0"), @"x.jsonl: the file is UTF-32; save it as UTF-8");
    assert_snapshot!(message("x.jsonl", b"{\0\"\0t\0"), @"x.jsonl: the file is UTF-16 without a byte order mark, by its zero bytes; save it as UTF-8");
    assert_snapshot!(message("x.jsonl", b"\0{\0\"\0t"), @"x.jsonl: the file is UTF-16 without a byte order mark, by its zero bytes; save it as UTF-8");
    assert_snapshot!(message("x.jsonl", b"k\xf6nnen"), @"x.jsonl: expected JSON lines, a JSON array, CSV with a header that names the fields, or Parquet for format auto, found a file that is no UTF-8 text (its byte 2 is 0xf6); plain text files need `format: text`");
    assert_snapshot!(message("x.jsonl.gz", b"4\x8f\x00"), @"x.jsonl.gz: expected JSON lines, a JSON array, CSV with a header that names the fields, or Parquet for format auto, found a file that is no UTF-8 text (its byte 2 is 0x8f), and not compressed as its ending .gz says; plain text files need `format: text`");
    assert_snapshot!(message("x.jsonl.gz", "text"), @"x.jsonl.gz: expected JSON lines, a JSON array, CSV with a header that names the fields, or Parquet for format auto, found a file that begins with `t`, and not compressed as its ending .gz says; plain text files need `format: text`");
}

#[test]
fn a_quote_that_is_never_closed_does_not_swallow_the_rest() {
    assert_snapshot!(message("x.csv", "text,domain\n\"a\nb\",c\nd,\"e\nf,g\nh,i\n"), @"x.csv: line 4: a field begins with a quote that is never closed; expected one more, and two for a quote inside a quoted field");
    // Quotes that are text, doubled quotes, and a quoted last field without a line break.
    let fine = "text\n5\" pipe\n\"he said \"\"no\"\"\"\r\n\"last\nline\"";
    let folder = folder(&[("x.csv", fine.as_bytes())]);
    load(&config(&["x.csv"]), folder.path()).unwrap();
}

#[test]
fn bad_utf8_is_named_by_line_and_byte() {
    assert_snapshot!(message("x.jsonl", b"{\"text\": \"a\"}\n{\"text\": \"\xe9\"}\n"), @r#"x.jsonl: line 2, byte 11 of the line: not valid UTF-8 (found 0xe9); save the file as UTF-8"#);
}

#[test]
fn files_without_records_are_refused() {
    for (name, content) in
        [("x.jsonl", ""), ("x.jsonl", "\u{feff}\n \n"), ("x.json", "[ ]"), ("x.txt", "\n\n")]
    {
        assert_eq!(message(name, content), format!("{name}: the file holds no record"));
    }
}

#[test]
fn files_of_which_nothing_is_left_are_refused() {
    let content =
        "{\"instruction\": \"a\", \"output\": \"\"}\n{\"instruction\": \"a\", \"output\": \" \"}\n";
    assert_snapshot!(message("x.jsonl", content), @r#"x.jsonl: none of the 2 record(s) can be trained on: 2 with an empty answer"#);
    let content = "{\"instruction\": \"a\", \"output\": \"b\"}";
    let short = message_with("x.jsonl", content, |config| config.max_seq_len = 5);
    assert_snapshot!(short, @r#"x.jsonl: none of the 1 record(s) can be trained on: 1 with nothing to train within max_seq_len"#);
}

#[test]
fn conversations_need_a_template_that_takes_them() {
    let content = "{\"instruction\": \"a\", \"output\": \"b\"}";
    let none = message_with("x.jsonl", content, |config| config.template = None);
    assert_snapshot!(none, @r#"x.jsonl: the records are conversations and the model brings no chat template; set `data.template` to a jinja file or one of: alpaca, chatml, gemma, llama2, llama3, mistral, phi3, plain, vicuna, zephyr"#);
    let content = "{\"messages\": [{\"role\": \"tool\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}";
    let refused = message_with("x.jsonl", content, |config| {
        config.template = Some("gemma".to_owned());
    });
    assert_snapshot!(refused, @r#"x.jsonl: line 1: chat template gemma, line 13: turns must be user and assistant, after at most one system prompt; found tool"#);
}

#[test]
fn a_system_prompt_without_conversation_is_refused() {
    let refused = message_with("x.jsonl", "{\"text\": \"a\"}", |config| {
        config.train[0].system = Some("Be brief.".to_owned());
    });
    assert_snapshot!(refused, @r#"x.jsonl: `system` is set, but the records are in format text and have no conversation"#);
}

#[test]
fn all_faults_of_a_configuration_come_at_once() {
    let folder = folder(&[("a.jsonl", b"{\"text\": \"a\"}"), ("bad.jinja", b"{% if %}")]);
    let mut config = config(&["a.jsonl", "missing.jsonl", "sub"]);
    fs_err::create_dir(folder.path().join("sub")).unwrap();
    config.train[0].weight = 0.0;
    config.train[0].limit = Some(0);
    config.train[0].fields.insert("text".to_owned(), String::new());
    config.train[1].weight = f64::INFINITY;
    config.train[1].format = "alpacca".to_owned();
    config.train[1].domain = Some(" ".to_owned());
    config.train[2].format = "completion".to_owned();
    config.train[2].fields.insert("completions".to_owned(), "answer".to_owned());
    config.train[2].system = Some("Be brief.".to_owned());
    config.valid.push(SourceConfig { weight: 2.0, ..SourceConfig::new("a.jsonl") });
    config.valid_fraction = 1.0;
    config.max_seq_len = 0;
    config.template = Some("chatlm".to_owned());
    let error = load(&config, folder.path()).unwrap_err();
    let text = error.to_string().replace(&folder.path().display().to_string(), "DIR");
    assert_snapshot!(text, @r#"
    the data configuration has 14 fault(s):
      data.train[0].weight: must be a finite number above 0, is 0
      data.train[0].limit: must be at least 1, is 0
      data.train[0].fields.text: names no field of the file
      data.train[1].path: there is no file DIR/missing.jsonl
      data.train[1].weight: must be a finite number above 0, is inf
      data.train[1].domain: is empty; leave it out for the file's name
      data.train[1].format: unknown format `alpacca`; did you mean `alpaca`? known: auto, messages, sharegpt, alpaca, prompt-response, natural-instructions, cloze, completion, text
      data.train[2].path: DIR/sub: the folder holds no data file; expected names that end in parquet, json, jsonl, ndjson, csv, tsv
      data.train[2].fields.completions: unknown field of format completion `completions`; did you mean `completion`? known: prompt, completion, domain
      data.train[2].system: format completion has no conversations to give a system prompt
      data.valid[0].weight: weights count for training only; every validation record is scored once
      data.valid_fraction: must be at least 0 and below 1, is 1
      data.max_seq_len: must be at least 2 (a token and the one it predicts), is 0
      data.template: unknown chat template `chatlm`; did you mean `chatml`? known: alpaca, chatml, gemma, llama2, llama3, mistral, phi3, plain, vicuna, zephyr; nor is there a file DIR/chatlm
    "#);

    config = DataConfig { template: Some("bad.jinja".to_owned()), ..DataConfig::default() };
    config.valid_fraction = f64::NAN;
    let error = Dataset::load(&config, folder.path(), &encoder(), None, 0).unwrap_err();
    let Error::Config(faults) = &error else { panic!("{error}") };
    let paths: Vec<&str> = faults.iter().map(|fault| fault.path.as_str()).collect();
    assert_eq!(paths, ["data.train", "data.valid_fraction", "data.template"]);
}
