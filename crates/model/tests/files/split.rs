//! GGUF models in several files.

use crate::fixture;
use crate::source::write_gguf;
use hydralora_model::gguf::{GgufFile, GgufWriter, Value};
use hydralora_model::{Error, ModelSource};
use std::fs;
use std::path::{Path, PathBuf};

/// What is written into the metadata of a part; tests change it.
#[derive(Clone)]
struct Marks {
    number: Option<Value>,
    count: Option<Value>,
    tensors: Option<Value>,
    name: Option<&'static str>,
}

fn part(folder: &Path, number: usize, count: usize) -> PathBuf {
    folder.join(format!("stories-{number:05}-of-{count:05}.gguf"))
}

/// The small model in files of so many tensors, the rest in the last one.
fn write_split(folder: &Path, sizes: &[usize], change: impl Fn(usize, &mut Marks)) {
    let whole = folder.join("whole");
    write_gguf(&whole, |_| {});
    let bytes = fs::read(&whole).unwrap();
    fs::remove_file(&whole).unwrap();
    let file = GgufFile::parse(&bytes, &whole).unwrap();
    let count = sizes.len() + 1;
    let mut rest = file.tensors();
    for at in 0..count {
        let (these, after) = rest.split_at(sizes.get(at).copied().unwrap_or(rest.len()));
        rest = after;
        let mut marks = Marks {
            number: Some(Value::U16(at as u16)),
            count: Some(Value::U16(count as u16)),
            tensors: Some(Value::I32(file.tensors().len() as i32)),
            name: None,
        };
        change(at, &mut marks);
        let mut writer = GgufWriter::new();
        if at == 0 {
            for (key, value) in file.metadata() {
                writer.metadata(key, value.clone());
            }
        } else {
            // Every file has its own alignment.
            writer.metadata("general.alignment", Value::U32(64));
            if let Some(name) = marks.name {
                writer.metadata("general.name", Value::String(name.to_owned()));
            }
        }
        for (key, value) in [
            ("split.no", marks.number),
            ("split.count", marks.count),
            ("split.tensors.count", marks.tensors),
        ] {
            if let Some(value) = value {
                writer.metadata(key, value);
            }
        }
        for tensor in these {
            let bytes = &bytes[tensor.range.clone()];
            writer.tensor(&tensor.name, tensor.format, &tensor.shape, bytes);
        }
        writer.write(&part(folder, at + 1, count)).unwrap();
    }
}

#[test]
fn all_files_of_a_model_are_found_from_any() {
    let place = tempfile::tempdir().unwrap();
    let whole = place.path().join("stories.gguf");
    write_gguf(&whole, |_| {});
    let whole = ModelSource::open(&whole).unwrap();
    // The first file may hold the metadata alone.
    for (at, sizes) in [&[5, 9][..], &[0, 20], &[20]].into_iter().enumerate() {
        let folder = place.path().join(format!("split{at}"));
        fs::create_dir(&folder).unwrap();
        write_split(&folder, sizes, |_, _| {});
        let count = sizes.len() + 1;
        let mut paths: Vec<PathBuf> = (1..=count).map(|n| part(&folder, n, count)).collect();
        paths.push(folder.clone());
        for path in paths {
            let split = ModelSource::open(&path).unwrap();
            assert_eq!(split.config, whole.config);
            assert_eq!(split.identity.fingerprint, whole.identity.fingerprint);
            let name = if path == folder { format!("split{at}") } else { "stories".to_owned() };
            assert_eq!(split.identity.name, name);
            for name in whole.weights.names() {
                let (shape, _) = whole.weights.describe(name).unwrap();
                let (a, b) = (&whole.weights, &split.weights);
                assert!(
                    a.take_f32(name, shape).unwrap()[..] == b.take_f32(name, shape).unwrap()[..],
                    "{name}"
                );
            }
            let text = "Once upon a time";
            assert_eq!(
                split.tokenizer.encode(text).unwrap(),
                whole.tokenizer.encode(text).unwrap()
            );
        }
    }
}

#[test]
fn files_that_do_not_make_a_model_are_refused_by_name() {
    type Change = fn(usize, &mut Marks);
    let cases: [(Change, &str, &str); 10] = [
        (
            |at, marks| marks.count = (at != 1).then_some(Value::U16(3)),
            "stories-00002-of-00003.gguf: split.count: missing; expected 3",
            "the second says nothing",
        ),
        (
            |at, marks| marks.count = Some(Value::U16(if at == 1 { 4 } else { 3 })),
            "stories-00002-of-00003.gguf: split.count: is 4; expected 3",
            "the second is of another count",
        ),
        (
            |at, marks| marks.number = Some(Value::U16([0, 2, 1][at])),
            "stories-00002-of-00003.gguf: split.no: its metadata says that it is another part than part 2",
            "two are swapped",
        ),
        (
            |at, marks| marks.number = (at != 2).then_some(Value::U16(at as u16)),
            "stories-00003-of-00003.gguf: split.no: expected a number below split.count, 3",
            "the third has no number",
        ),
        (
            |at, marks| marks.number = Some(Value::U16(if at == 2 { 3 } else { at as u16 })),
            "stories-00003-of-00003.gguf: split.no: expected a number below split.count, 3",
            "the third has a number too large",
        ),
        (
            |_, marks| marks.tensors = Some(Value::I32(49)),
            "stories-00001-of-00003.gguf: split.tensors.count: is 49, the 3 parts hold ",
            "a tensor is missing",
        ),
        (
            |at, marks| marks.tensors = Some(Value::I32(if at == 2 { 49 } else { 48 })),
            "stories-00003-of-00003.gguf: split.tensors.count: is 49, but 48 in ",
            "the third is of a larger model",
        ),
        (
            |at, marks| marks.name = (at == 1).then_some("another"),
            "stories-00002-of-00003.gguf: general.name: is `another`, but `stories260K` in ",
            "the second is of another model",
        ),
        (
            |_, marks| marks.count = Some(Value::String("3".to_owned())),
            "split.count: expected an unsigned integer",
            "a count that is none",
        ),
        (
            |_, marks| marks.number = None,
            "stories-00001-of-00003.gguf: split.no: expected a number below split.count, 3",
            "no numbers",
        ),
    ];
    for (change, expected, what) in cases {
        let folder = tempfile::tempdir().unwrap();
        write_split(folder.path(), &[5, 9], change);
        let error = ModelSource::open(&part(folder.path(), 1, 3)).unwrap_err().to_string();
        assert!(error.contains(expected), "{what}: {error}");
    }
}

#[test]
fn a_file_that_is_missing_is_named() {
    for gone in 1..=3 {
        let folder = tempfile::tempdir().unwrap();
        write_split(folder.path(), &[5, 9], |_, _| {});
        fs::remove_file(part(folder.path(), gone, 3)).unwrap();
        let kept = part(folder.path(), 1 + gone % 3, 3);
        let expected =
            format!("part {gone} of 3 is missing: there is no `stories-0000{gone}-of-00003.gguf`");
        for path in [kept.as_path(), folder.path()] {
            let error = ModelSource::open(path).unwrap_err().to_string();
            assert!(error.contains(&expected), "{error}");
        }
    }
}

#[test]
fn a_file_under_another_name_says_what_it_should_be_called() {
    let folder = tempfile::tempdir().unwrap();
    write_split(folder.path(), &[5, 9], |_, _| {});
    for name in ["stories.gguf", "stories-00001-of-00003.gguf", "stories-00002-of-00004.gguf"] {
        let other = folder.path().join("elsewhere");
        fs::create_dir_all(&other).unwrap();
        let path = other.join(name);
        fs::copy(part(folder.path(), 2, 3), &path).unwrap();
        let error = ModelSource::open(&path).unwrap_err().to_string();
        assert!(error.contains("this is part 2 of a model in 3 files"), "{error}");
        assert!(error.contains("expected `NAME-00002-of-00003.gguf`"), "{error}");
    }
}

#[test]
fn a_tensor_in_two_files_and_a_damaged_file_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    write_split(folder.path(), &[5, 9], |_, marks| marks.tensors = None);
    let (first, second) = (part(folder.path(), 1, 3), part(folder.path(), 2, 3));
    let whole = fs::read(&second).unwrap();
    fs::write(&second, &whole[..whole.len() - 1000]).unwrap();
    let error = ModelSource::open(&first).unwrap_err();
    assert!(matches!(&error, Error::Truncated { path, .. } if *path == second), "{error}");
    fs::write(&second, "not GGUF").unwrap();
    let error = ModelSource::open(&first).unwrap_err().to_string();
    assert!(error.contains("00002-of-00003.gguf: not a GGUF file"), "{error}");
    // The second file with a tensor that the first has too.
    let bytes = fs::read(&first).unwrap();
    let tensor = &GgufFile::parse(&bytes, &first).unwrap().tensors()[0].clone();
    GgufWriter::new()
        .metadata("split.no", Value::U16(1))
        .metadata("split.count", Value::U16(3))
        .tensor(&tensor.name, tensor.format, &tensor.shape, &bytes[tensor.range.clone()])
        .write(&second)
        .unwrap();
    let error = ModelSource::open(&first).unwrap_err().to_string();
    assert!(error.contains("occurs twice: in "), "{error}");
    assert!(error.contains("00001-of-00003.gguf and in "), "{error}");
}

#[test]
fn a_folder_of_a_split_model_and_another_file_has_to_be_named() {
    let folder = tempfile::tempdir().unwrap();
    write_split(folder.path(), &[5, 9], |_, _| {});
    fs::write(folder.path().join("mmproj.gguf"), "").unwrap();
    let error = ModelSource::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("4 .gguf files here; name one of them"), "{error}");
    ModelSource::open(&part(folder.path(), 1, 3)).unwrap();
}

#[test]
fn a_model_in_one_file_may_say_so() {
    let folder = tempfile::tempdir().unwrap();
    write_split(folder.path(), &[], |_, _| {});
    let source = ModelSource::open(folder.path()).unwrap();
    let original = ModelSource::open(&fixture("stories260K")).unwrap();
    assert_eq!(source.config, original.config);
}
