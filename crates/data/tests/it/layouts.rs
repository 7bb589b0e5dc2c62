//! The same records in every layout and compression, whole and damaged.

use std::io::Write;
use std::path::{Path, PathBuf};

use hydralora_data::{Body, Error, Message, SourceConfig, SourceRecords, read_source};
use proptest::prelude::*;

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

fn fixture(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures")).join(name)
}

fn questions() -> Vec<(String, String)> {
    (0..40)
        .map(|n| (format!("What is {n} plus {n}?"), format!("It is {0}, naïvely “{0}”.", 2 * n)))
        .collect()
}

fn jsonl() -> Vec<u8> {
    let line = |(question, answer): &(String, String)| {
        format!("{}\n", serde_json::json!({"question": question, "answer": answer}))
    };
    questions().iter().map(line).collect::<String>().into_bytes()
}

fn csv(separator: u8) -> Vec<u8> {
    let mut writer = csv::WriterBuilder::new().delimiter(separator).from_writer(Vec::new());
    writer.write_record(["id", "question", "answer"]).unwrap();
    for (number, (question, answer)) in questions().into_iter().enumerate() {
        writer.write_record([number.to_string(), question, answer]).unwrap();
    }
    writer.into_inner().unwrap()
}

fn source(path: impl Into<PathBuf>) -> SourceConfig {
    let mut source = SourceConfig::new(path);
    source.fields.insert("prompt".to_owned(), "question".to_owned());
    source.fields.insert("response".to_owned(), "answer".to_owned());
    source
}

fn read(name: &str, bytes: &[u8]) -> Result<SourceRecords, Error> {
    let folder = tempfile::tempdir().unwrap();
    fs_err::write(folder.path().join(name), bytes).unwrap();
    read_source(&source(name), folder.path())
}

/// The message about a file, without the folder's name.
fn message(name: &str, bytes: &[u8]) -> String {
    let error = read(name, bytes).expect_err("the input is wrong").to_string();
    let end = error.find(name).unwrap();
    error[end..].to_owned()
}

fn expected() -> Vec<Body> {
    let chat = |(question, answer): (String, String)| {
        Body::Chat(vec![Message::user(question), Message::assistant(answer)])
    };
    questions().into_iter().map(chat).collect()
}

fn bodies(source: &SourceRecords) -> Vec<Body> {
    source.records.iter().map(|record| record.body.clone()).collect()
}

#[test]
fn every_layout_and_compression_gives_the_same_records() {
    let lines = jsonl();
    let array =
        format!("[{}]", String::from_utf8(lines.clone()).unwrap().trim().replace('\n', ","));
    let two_members = [gzip(&lines[..1000]), gzip(&lines[1000..])].concat();
    let two_frames = [zstd(&lines[..1000]), zstd(&lines[1000..])].concat();
    for (name, bytes) in [
        ("x.jsonl", lines.clone()),
        ("x.json", array.clone().into_bytes()),
        ("x.jsonl.gz", gzip(&lines)),
        ("x.jsonl.zst", zstd(&lines)),
        ("members.jsonl.gz", two_members),
        ("frames.jsonl.zst", two_frames),
        // Names that do not say what they are.
        ("x.bin", gzip(array.as_bytes())),
        ("no-ending", lines.clone()),
        ("misnamed.jsonl.gz", lines.clone()),
        ("x.csv", csv(b',')),
        ("semicolon.csv", csv(b';')),
        ("x.tsv", csv(b'\t')),
        ("x.csv.gz", gzip(&csv(b','))),
        ("x.tsv.zst", zstd(&csv(b'\t'))),
        ("table", csv(b',')),
        ("bom.csv", [&b"\xef\xbb\xbf"[..], &csv(b',')].concat()),
    ] {
        let found = read(name, &bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(found.format, "prompt-response", "{name}");
        assert_eq!(bodies(&found), expected(), "{name}");
    }
}

#[cfg(feature = "parquet")]
#[test]
fn parquet_is_read_in_every_compression() {
    for compression in ["snappy", "zstd", "gzip", "lz4", "none"] {
        let path = fixture(&format!("qa-{compression}.parquet"));
        let found = read_source(&source(&path), Path::new("")).unwrap();
        assert_eq!(bodies(&found), expected(), "{compression}");
        assert_eq!(found.records[17].location.to_string(), format!("{}: row 18", path.display()));
    }
    let mut nested = SourceConfig::new(fixture("messages.parquet"));
    nested.fields.insert("domain".to_owned(), "domain".to_owned());
    let found = read_source(&nested, Path::new("")).unwrap();
    assert_eq!(found.format, "messages");
    assert_eq!(bodies(&found), expected()[..6]);
    assert_eq!(found.records[5].domain.as_deref(), Some("sums"));
    let limited = SourceConfig { limit: Some(3), ..nested };
    assert_eq!(read_source(&limited, Path::new("")).unwrap().records.len(), 3);
}

#[cfg(feature = "parquet")]
#[test]
fn parquet_that_is_cut_or_packed_is_explained() {
    let whole = fs_err::read(fixture("qa-snappy.parquet")).unwrap();
    let cut = message("x.parquet", &whole[..whole.len() / 2]);
    assert!(cut.starts_with("x.parquet: the Parquet file is damaged after row 0: "), "{cut}");
    let packed = message("x.parquet.gz", &gzip(&whole));
    assert!(packed.contains("a Parquet file inside a gzip stream"), "{packed}");
    let mut wrong = source(fixture("qa-zstd.parquet"));
    wrong.format = "prompt-response".to_owned();
    wrong.fields.insert("response".to_owned(), "answr".to_owned());
    let error = read_source(&wrong, Path::new("")).unwrap_err().to_string();
    let end = "row 1: field `answr`: expected a string, found no such field among [question, answer, id]; is it `answer`?";
    assert!(error.lines().next().unwrap().ends_with(end), "{error}");
}

#[test]
fn damaged_streams_say_where_they_end() {
    let line = |n: usize| format!("{{\"question\": \"{n}?\", \"answer\": \"{}\"}}\n", n * n);
    let lines = (0..20_000).map(line).collect::<String>().into_bytes();
    for (name, packed, what) in
        [("x.jsonl.gz", gzip(&lines), "gzip"), ("x.jsonl.zst", zstd(&lines), "zstd")]
    {
        let error = message(name, &packed[..packed.len() * 3 / 4]);
        let begin = format!("{name}: the {what} stream is damaged after line ");
        assert!(error.starts_with(&begin) && error.ends_with(": it ends too early"), "{error}");
        let line: usize = error[begin.len()..].split(':').next().unwrap().parse().unwrap();
        assert!((1..20_000).contains(&line), "{error}");
    }
    let mut spoiled = gzip(&lines);
    let middle = spoiled.len() / 2;
    spoiled[middle..middle + 8].fill(0xff);
    let error = message("x.jsonl.gz", &spoiled);
    assert!(error.contains("x.jsonl.gz: "), "{error}");
    let csv = csv(b',').repeat(100);
    let packed = gzip(&csv);
    let error = message("x.csv.gz", &packed[..packed.len() / 2]);
    assert!(error.contains("the gzip stream is damaged after line"), "{error}");
}

#[test]
fn faults_of_a_table_name_line_and_field() {
    let error = message("x.csv", b"question,answer\n\"a\nb\",c\nd,e,f\n");
    assert_eq!(
        error,
        "x.csv: line 4: expected 2 fields as in the header, found 3; fields that hold the separator \
         or a line break need quotes"
    );
    let error = message("x.csv", b"question,answer\na,\xe9\n");
    assert_eq!(
        error,
        "x.csv: line 2: field `answer`: expected UTF-8, found the byte 0xe9 at place 1; save the \
         file as UTF-8"
    );
    let error = message("x.csv", b"question,question\na,b\n");
    assert_eq!(error, "x.csv: line 1: the header names the field `question` twice");
    let error = message("x.csv", b"a,b\n1,2\n");
    assert!(error.contains("cannot tell the format: the first record has the fields [a, b]"));
    assert_eq!(message("x.csv", b"question,answer\n"), "x.csv: the file holds no record");
}

#[test]
fn quotes_that_a_backslash_escapes_are_told_from_damage() {
    let escaped = "a quote inside a quoted field follows a backslash";
    for text in [
        "question,answer\na,b\n\"say \\\"hi\\\" now\",c\n",
        "question,answer\na,b\n\"ends in \\\"hi\\\"\",c\nd,e\n",
        "question,answer\na,b\n\"one \\\", two\",c\n",
    ] {
        let error = message("x.csv", text.as_bytes());
        assert!(error.starts_with("x.csv: line 3: ") && error.contains(escaped), "{text}{error}");
    }
    // A backslash is a character like any other.
    let text = "question,answer\n\"C:\\dir\\\",\"a \\ \"\"b\"\"\"\n";
    let records = read("x.csv", text.as_bytes()).unwrap();
    let expected = Body::Chat(vec![
        hydralora_data::Message::user("C:\\dir\\"),
        hydralora_data::Message::assistant("a \\ \"b\""),
    ]);
    assert_eq!(bodies(&records), [expected]);
}

#[test]
fn files_of_other_kinds_are_called_by_their_name() {
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n";
    for (name, bytes, expected) in [
        ("x.jsonl", pointer.as_bytes(), "Git LFS pointer"),
        ("x.parquet", pointer.as_bytes(), "Git LFS pointer"),
        ("x.arrow", b"ARROW1\0\0abc", "Arrow file"),
        ("x.arrow", b"\xff\xff\xff\xff\x10\x03\0\0", "Arrow file"),
        ("x.json", b"<!DOCTYPE html><html>", "web page"),
        ("x.jsonl", b"PK\x03\x04abcd", "zip archive"),
    ] {
        let error = message(name, bytes);
        assert!(error.contains(expected) && !error.contains("damaged"), "{error}");
    }
}

#[test]
fn absurdly_long_records_are_refused_without_being_held() {
    let long = vec![b'a'; 70 << 20];
    for (name, start) in [
        ("x.jsonl.gz", &b"{\"question\": \"a\", \"answer\": \"b\"}\n{\"question\": \""[..]),
        ("x.json.gz", b"[{\"question\": \"a\", \"answer\": \"b\"},\n{\"question\": \""),
        ("x.csv.gz", b"question,answer\n\""),
    ] {
        let error = message(name, &gzip(&[start, &long].concat()));
        assert!(
            error.starts_with(&format!("{name}: line 2: a record of more than 16 MiB")),
            "{name}: {error}"
        );
    }
}

#[test]
fn files_that_unpack_to_far_more_than_they_are_are_refused() {
    // 120 MiB, each record small enough, of some hundred KiB.
    let record = |answer: &str| format!("{{\"question\": \"a\", \"answer\": \"{answer}\"}}\n");
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    for _ in 0..120 {
        encoder.write_all(record(&"b".repeat(1 << 20)).as_bytes()).unwrap();
    }
    let many = encoder.finish().unwrap();
    assert!(many.len() < 200 << 10);
    let error = message("x.jsonl.gz", &many);
    assert!(error.contains("x.jsonl.gz: its records hold more than"), "{error}");
    assert!(error.contains("over 200 times its size"), "{error}");
    // Text shrinks, too, but not so.
    let ordinary =
        (0..20_000).map(|n| record(&format!("number {n} of many {}", n * 7919 % 10_007)));
    let ordinary = gzip(ordinary.collect::<String>().as_bytes());
    assert_eq!(read("x.jsonl.gz", &ordinary).unwrap().records.len(), 20_000);

    let header = (0..5000).map(|n| format!("f{n}")).collect::<Vec<_>>().join(",");
    let error = message("x.csv", format!("{header}\n").as_bytes());
    assert!(error.contains("line 1: a header of 5000 fields; expected at most 4096"), "{error}");
}

#[test]
fn an_earlier_fault_is_reported_before_a_later_one() {
    let lines = "{\"question\": \"a\", \"answer\": \"b\"}\n{\"question\": 1, \"answer\": \"b\"}\n";
    let mut bytes = lines.as_bytes().to_vec();
    bytes.extend(b"{\"question\": \"\xff\"}\n");
    let error = message("x.jsonl", &bytes);
    assert!(error.starts_with("x.jsonl: line 2: field `question`"), "{error}");
}

/// Whatever happens to a file, there are records or a message about it.
fn survives(name: &str, bytes: &[u8]) {
    match read(name, bytes) {
        Ok(found) => assert!(!found.records.is_empty()),
        Err(error) => assert!(error.to_string().contains(name), "{error}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn spoiled_bytes_are_refused_politely(
        at in any::<prop::sample::Index>(),
        with in prop::collection::vec(any::<u8>(), 1..6),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let parquet = fs_err::read(fixture("qa-snappy.parquet")).unwrap();
        for (name, mut bytes) in [
            ("x.jsonl", jsonl()),
            ("x.json", format!("[{}]", String::from_utf8(jsonl()).unwrap().trim().replace('\n', ",")).into_bytes()),
            ("x.csv", csv(b',')),
            ("x.tsv", csv(b'\t')),
            ("x.jsonl.gz", gzip(&jsonl())),
            ("x.jsonl.zst", zstd(&jsonl())),
            ("x.parquet", parquet),
        ] {
            let start = at.index(bytes.len());
            for (place, byte) in bytes[start..].iter_mut().zip(&with) {
                *place = *byte;
            }
            if let Some(cut) = &cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            survives(name, &bytes);
        }
    }

    #[test]
    fn foreign_bytes_of_any_name_are_refused_politely(
        bytes in prop::collection::vec(any::<u8>(), 0..300),
        magic in prop::sample::select(vec![
            &b""[..], b"PAR1", b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"\xef\xbb\xbf", b"[{\"a\": ", b"a,b\n",
        ]),
    ) {
        let bytes = [magic, &bytes].concat();
        for name in ["x.jsonl", "x.json", "x.csv", "x.tsv", "x.parquet", "x.gz", "x.zst", "x"] {
            survives(name, &bytes);
        }
    }

    /// Fields of any text come back from CSV as they were.
    #[test]
    fn tables_quote_what_they_must(
        rows in prop::collection::vec(("[a-z,;\"\\n\\r\\té ]{0,20}", "[a-z,;\"\\n\\té ]{1,20}"), 1..8),
        separator in prop::sample::select(vec![b',', b'\t']),
    ) {
        let mut writer = csv::WriterBuilder::new().delimiter(separator).from_writer(Vec::new());
        writer.write_record(["question", "answer"]).unwrap();
        for (question, answer) in &rows {
            writer.write_record([question, answer]).unwrap();
        }
        let name = if separator == b'\t' { "x.tsv" } else { "x.csv" };
        let found = read(name, &writer.into_inner().unwrap()).unwrap();
        let chat = |(q, a): &(String, String)| Body::Chat(vec![Message::user(q), Message::assistant(a)]);
        prop_assert_eq!(bodies(&found), rows.iter().map(chat).collect::<Vec<_>>());
    }
}
