//! GGUF files: what is written is what is read, and damaged ones are refused.

use hydralora_kernels::block::BlockFormat;
use hydralora_model::gguf::{Array, GgufFile, GgufWriter, Value};
use hydralora_model::{Error, Tokenizer, Weights};
use proptest::prelude::*;
use std::path::Path;

fn array() -> impl Strategy<Value = Array> {
    use proptest::collection::vec;
    let leaf = prop_oneof![
        vec(any::<u8>(), 0..6).prop_map(Array::U8),
        vec(any::<i8>(), 0..6).prop_map(Array::I8),
        vec(any::<u16>(), 0..6).prop_map(Array::U16),
        vec(any::<i16>(), 0..6).prop_map(Array::I16),
        vec(any::<u32>(), 0..6).prop_map(Array::U32),
        vec(any::<i32>(), 0..6).prop_map(Array::I32),
        vec(any::<u64>(), 0..6).prop_map(Array::U64),
        vec(any::<i64>(), 0..6).prop_map(Array::I64),
        vec(-1e30f32..1e30, 0..6).prop_map(Array::F32),
        vec(-1e300f64..1e300, 0..6).prop_map(Array::F64),
        vec(any::<bool>(), 0..6).prop_map(Array::Bool),
        vec(".{0,8}", 0..6).prop_map(Array::String),
    ];
    leaf.prop_recursive(3, 12, 4, |inner| vec(inner, 0..4).prop_map(Array::Array))
}

fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i8>().prop_map(Value::I8),
        any::<u16>().prop_map(Value::U16),
        any::<i16>().prop_map(Value::I16),
        any::<u32>().prop_map(Value::U32),
        any::<i32>().prop_map(Value::I32),
        any::<u64>().prop_map(Value::U64),
        any::<i64>().prop_map(Value::I64),
        (-1e30f32..1e30).prop_map(Value::F32),
        (-1e300f64..1e300).prop_map(Value::F64),
        any::<bool>().prop_map(Value::Bool),
        ".{0,12}".prop_map(Value::String),
        array().prop_map(Value::Array),
    ]
}

/// Format, shape and bytes of a tensor.
fn tensor() -> impl Strategy<Value = (BlockFormat, Vec<usize>, Vec<u8>)> {
    use BlockFormat::*;
    let format = prop::sample::select(vec![
        F64, F32, F16, BF16, Q8_0, Q8_1, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K,
        Q8_K, IQ4_NL, IQ4_XS, MXFP4,
    ]);
    (format, prop::collection::vec(0usize..4, 0..3), 0usize..3, any::<u8>()).prop_map(
        |(format, mut shape, blocks, fill)| {
            shape.push(blocks * format.block_len());
            let bytes = format.bytes_for(shape.iter().product());
            let bytes = (0..bytes).map(|i| fill.wrapping_add(i as u8)).collect();
            (format, shape, bytes)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn what_is_written_is_read(
        metadata in prop::collection::btree_map("[a-z.]{0,12}", value(), 0..6),
        tensors in prop::collection::btree_map("[a-z.0-9]{0,12}", tensor(), 0..5),
        alignment in prop::sample::select(vec![None, Some(1u32), Some(8), Some(64)]),
        cut in any::<prop::sample::Index>(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.gguf");
        let mut writer = GgufWriter::new();
        if let Some(alignment) = alignment {
            writer.metadata("general.alignment", Value::U32(alignment));
        }
        for (key, value) in &metadata {
            writer.metadata(key, value.clone());
        }
        for (name, (format, shape, bytes)) in &tensors {
            writer.tensor(name, *format, shape, bytes);
        }
        writer.write(&path).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let file = GgufFile::parse(&bytes, &path).unwrap();
        prop_assert_eq!(file.version(), 3);
        for (key, value) in &metadata {
            prop_assert_eq!(file.get(key), Some(value));
        }
        prop_assert_eq!(file.metadata().len(), metadata.len() + usize::from(alignment.is_some()));
        prop_assert_eq!(file.tensors().len(), tensors.len());
        for (name, (format, shape, expected)) in &tensors {
            let found = file.tensor(name).unwrap();
            prop_assert_eq!((&found.format, &found.shape), (format, shape));
            prop_assert_eq!(&bytes[found.range.clone()], expected.as_slice());
            prop_assert_eq!(found.range.start % alignment.unwrap_or(32) as usize, 0);
        }
        // A shorter file never panics; it is refused unless only padding is gone.
        let used = file.tensors().iter().map(|tensor| tensor.range.end).max().unwrap_or(bytes.len());
        let cut = cut.index(bytes.len());
        if GgufFile::parse(&bytes[..cut], &path).is_ok() {
            prop_assert!(tensors.is_empty() || cut >= used);
        }
    }

    #[test]
    fn damaged_bytes_never_panic(
        at in any::<prop::sample::Index>(),
        damage in prop::collection::vec(any::<u8>(), 1..12),
    ) {
        let mut bytes = sample();
        let at = at.index(bytes.len());
        for (byte, new) in bytes[at..].iter_mut().zip(damage) {
            *byte = new;
        }
        let _ = GgufFile::parse(&bytes, Path::new("x.gguf"));
    }

    #[test]
    fn any_bytes_never_panic(tail in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(tail);
        let _ = GgufFile::parse(&bytes, Path::new("x.gguf"));
    }
}

fn sample() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    GgufWriter::new()
        .metadata("general.architecture", Value::String("llama".into()))
        .metadata("a.list", Value::Array(Array::String(vec!["x".into(), "yz".into()])))
        .metadata(
            "a.nest",
            Value::Array(Array::Array(vec![Array::U8(vec![1, 2]), Array::Bool(vec![true])])),
        )
        .tensor("t", BlockFormat::Q8_0, &[2, 32], vec![1; 68])
        .write(&path)
        .unwrap();
    std::fs::read(path).unwrap()
}

fn parse(bytes: &[u8]) -> Result<GgufFile, Error> {
    GgufFile::parse(bytes, Path::new("m.gguf"))
}

#[test]
fn what_is_wrong_is_said() {
    let good = sample();
    parse(&good).unwrap();
    let changed = |at: usize, new: &[u8]| {
        let mut bytes = good.clone();
        bytes[at..at + new.len()].copy_from_slice(new);
        parse(&bytes).unwrap_err().to_string()
    };
    assert_eq!(changed(0, b"GGML"), "m.gguf: not a GGUF file: it does not start with `GGUF`");
    assert!(changed(4, &[1, 0, 0, 0]).contains("version 1 is not supported"));
    assert!(changed(4, &[0, 0, 0, 3]).contains("big endian"));
    assert!(changed(4, &[9, 0, 0, 0]).contains("version 9 is not supported"));
    // Counts and lengths beyond the file.
    assert!(changed(8, &[255; 8]).contains("not a whole GGUF file"));
    assert!(changed(16, &[255; 8]).contains("not a whole GGUF file"));
    assert!(changed(24, &[255; 8]).contains("not a whole GGUF file"));
    let end = good.len();
    for cut in [0, 3, 7, 20, 60, end - 68] {
        assert!(parse(&good[..cut]).is_err(), "cut at {cut}");
    }
    let error = parse(&good[..good.len() - 64]).unwrap_err();
    assert!(matches!(&error, Error::Truncated { what, .. } if what == "tensor `t`"), "{error}");
}

#[test]
fn an_unknown_number_format_is_named() {
    let mut bytes = sample();
    let name = bytes.windows(9).position(|w| w == b"\x01\0\0\0\0\0\0\0t").unwrap();
    let format = name + 9 + 4 + 16;
    assert_eq!(bytes[format], 8);
    for (number, called) in [
        (4, "Q4_2"),
        (16, "IQ2_XXS"),
        (26, "I32"),
        (31, "Q4_0_4_4"),
        (34, "TQ1_0"),
        (38, "IQ4_NL_8_8"),
        (40, "NVFP4"),
        (77, "number 77"),
    ] {
        bytes[format] = number;
        let error = parse(&bytes).unwrap_err();
        assert!(
            matches!(&error, Error::UnknownDtype { name, dtype, .. } if name == "t" && dtype == called),
            "{error}"
        );
        assert!(error.to_string().contains("Q4_K"), "{error}");
    }
}

#[test]
fn an_unwritable_file_is_refused_and_nothing_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    let refused = |writer: &GgufWriter<'_>, message: &str| {
        let error = writer.write(&path).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    };
    let mut twice = GgufWriter::new();
    twice.metadata("k", Value::Bool(true)).metadata("k", Value::Bool(false));
    refused(&twice, "`k` is given twice");
    let mut twice = GgufWriter::new();
    twice.tensor("t", BlockFormat::F32, &[1], vec![0; 4]).tensor(
        "t",
        BlockFormat::F32,
        &[1],
        vec![0; 4],
    );
    refused(&twice, "`t` is given twice");
    let mut short = GgufWriter::new();
    short.tensor("t", BlockFormat::F32, &[2], vec![0; 4]);
    refused(&short, "do not fit the format F32");
    let mut partial = GgufWriter::new();
    partial.tensor("t", BlockFormat::Q8_0, &[2, 16], vec![0; 34]);
    refused(&partial, "do not fit the format Q8_0");
    let mut odd = GgufWriter::new();
    odd.metadata("general.alignment", Value::U32(3));
    refused(&odd, "power of two");
    let nowhere = folder.path().join("no/such/folder/x.gguf");
    let error = GgufWriter::new().write(&nowhere).unwrap_err().to_string();
    assert!(error.contains("no/such/folder"), "{error}");
}

#[test]
fn floats_mean_their_shortest_decimal() {
    assert_eq!(Value::F32(1e-5).as_f64(), Some(1e-5));
    assert_eq!(Value::F32(1e-6).as_f64(), Some(1e-6));
    assert_eq!(Value::F32(500000.0).as_f64(), Some(500000.0));
    assert_eq!(Value::F64(0.1).as_f64(), Some(0.1));
    assert_eq!(Value::U32(8).as_f64(), Some(8.0));
}

#[test]
fn rows_that_have_no_order_by_heads_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    for (heads, format, shape, message) in [
        (1 << 63, BlockFormat::F32, &[4, 4][..], "heads of even width cannot share"),
        (2, BlockFormat::Q8_0, &[64], "whose numbers cannot be put in order"),
    ] {
        let bytes = vec![0; format.bytes_for(shape.iter().product())];
        GgufWriter::new()
            .metadata("general.architecture", Value::String("llama".into()))
            .metadata("llama.attention.head_count", Value::U64(heads))
            .tensor("blk.0.attn_q.weight", format, shape, bytes)
            .write(&path)
            .unwrap();
        let error = Weights::open(&path).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
}

#[test]
fn a_token_as_long_as_the_file_takes_no_time() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    let tokens = ["<unk>".to_owned(), "a".to_owned(), "aa".to_owned(), "a".repeat(1 << 20)];
    GgufWriter::new()
        .metadata("tokenizer.ggml.model", Value::String("llama".into()))
        .metadata("tokenizer.ggml.tokens", Value::Array(Array::String(tokens.to_vec())))
        .metadata("tokenizer.ggml.scores", Value::Array(Array::F32(vec![0.0; 4])))
        .metadata("tokenizer.ggml.token_type", Value::Array(Array::I32(vec![2, 1, 1, 1])))
        .write(&path)
        .unwrap();
    let tokenizer = Tokenizer::from_gguf(&GgufFile::open(&path).unwrap()).unwrap();
    assert_eq!(tokenizer.vocab_size(), 4);
}
