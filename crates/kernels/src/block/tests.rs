use super::tables::UNEVEN;
use super::*;
use crate::element::DType;
use crate::ops::frozen_linear::{FrozenLinear, FrozenWeight};
use crate::tensor::Tensor;
use half::f16;

fn formats() -> impl Iterator<Item = BlockFormat> {
    TABLE.iter().map(|row| row.0)
}

fn widened(format: BlockFormat, bytes: &[u8]) -> Vec<f32> {
    let mut out = vec![f32::NAN; bytes.len() / format.block_bytes() * format.block_len()];
    dequantize(format, bytes, &mut out);
    out
}

/// Where in a block its numbers of half precision are.
fn halves(format: BlockFormat) -> &'static [usize] {
    match format {
        BlockFormat::Q4_1 | BlockFormat::Q5_1 | BlockFormat::Q4_K | BlockFormat::Q5_K => &[0, 2],
        BlockFormat::Q2_K => &[80, 82],
        BlockFormat::Q3_K => &[108],
        BlockFormat::Q6_K => &[208],
        BlockFormat::F64 | BlockFormat::F32 | BlockFormat::BF16 => &[],
        BlockFormat::Q8_K | BlockFormat::MXFP4 => &[],
        _ => &[0],
    }
}

/// Blocks of any bits but for the scales, which are of the size weights need.
fn random_blocks(format: BlockFormat, count: usize) -> Vec<u8> {
    let mut state = 88172645463325252_u64 + u64::from(format.ggml_id());
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u32
    };
    let mut bytes = Vec::new();
    for _ in 0..count {
        let mut block: Vec<u8> = (0..format.block_bytes()).map(|_| random() as u8).collect();
        let mut small = || (random() % 2001) as f32 / 1000.0 - 1.0;
        for &at in halves(format) {
            block[at..at + 2].copy_from_slice(&f16::from_f32(small() * 0.06).to_le_bytes());
        }
        match format {
            BlockFormat::F64 | BlockFormat::F32 | BlockFormat::BF16 => {
                block.clear();
                quantize(format, &[small()], &mut block);
            }
            BlockFormat::Q8_K => block[..4].copy_from_slice(&(small() * 0.06).to_le_bytes()),
            BlockFormat::MXFP4 => block[0] = 116 + block[0] % 16,
            _ => {}
        }
        bytes.extend(block);
    }
    bytes
}

/// Number `i` of a block by itself, from where its bits are.
fn number(format: BlockFormat, b: &[u8], i: usize) -> f32 {
    let half = |at: usize| f16::from_le_bytes([b[at], b[at + 1]]).to_f32();
    // `width` bits of the block read as one long number, from bit `bit` of byte `byte` on.
    let bits = |byte: usize, bit: usize, width: usize| -> f32 {
        let one = |at: usize| u32::from(b[at / 8]) >> (at % 8) & 1;
        (0..width).map(|k| one(byte * 8 + bit + k) << k).sum::<u32>() as f32
    };
    let signed = |at: usize| f32::from(b[at] as i8);
    let of_32 = |byte: usize| bits(byte + i % 16, i / 16 * 4, 4);
    // Of the scales of six bits: those of the first four parts lie together, the other ones' lower
    // four bits in the four bytes after, the upper two above the first ones.
    let six = || {
        let s = i / 32;
        if s < 4 {
            (bits(4 + s, 0, 6), bits(8 + s, 0, 6))
        } else {
            (bits(8 + s, 0, 4) + 16.0 * bits(s, 6, 2), bits(8 + s, 4, 4) + 16.0 * bits(4 + s, 6, 2))
        }
    };
    match format {
        BlockFormat::F64 => f64::from_le_bytes(b.try_into().unwrap()) as f32,
        BlockFormat::F32 => f32::from_le_bytes(b.try_into().unwrap()),
        BlockFormat::F16 => half(0),
        BlockFormat::BF16 => half::bf16::from_le_bytes([b[0], b[1]]).to_f32(),
        BlockFormat::Q4_0 => half(0) * (of_32(2) - 8.0),
        BlockFormat::Q4_1 => half(0) * of_32(4) + half(2),
        BlockFormat::Q5_0 => half(0) * (of_32(6) + 16.0 * bits(2, i, 1) - 16.0),
        BlockFormat::Q5_1 => half(0) * (of_32(8) + 16.0 * bits(4, i, 1)) + half(2),
        BlockFormat::Q8_0 => half(0) * signed(2 + i),
        BlockFormat::Q8_1 => half(0) * signed(4 + i),
        BlockFormat::Q2_K => {
            let q = bits(16 + i / 128 * 32 + i % 32, i / 32 % 4 * 2, 2);
            half(80) * bits(i / 16, 0, 4) * q - half(82) * bits(i / 16, 4, 4)
        }
        BlockFormat::Q3_K => {
            let q = bits(32 + i / 128 * 32 + i % 32, i / 32 % 4 * 2, 2);
            let q = q + 4.0 * bits(i % 32, i / 32, 1) - 4.0;
            let s = i / 16;
            let scale = bits(96 + s % 8, s / 8 * 4, 4) + 16.0 * bits(104 + s % 4, s / 4 * 2, 2);
            half(108) * (scale - 32.0) * q
        }
        BlockFormat::Q4_K => {
            let (scale, offset) = six();
            let q = bits(16 + i / 64 * 32 + i % 32, i / 32 % 2 * 4, 4);
            half(0) * scale * q - half(2) * offset
        }
        BlockFormat::Q5_K => {
            let (scale, offset) = six();
            let q = bits(48 + i / 64 * 32 + i % 32, i / 32 % 2 * 4, 4);
            half(0) * scale * (q + 16.0 * bits(16 + i % 32, i / 32, 1)) - half(2) * offset
        }
        BlockFormat::Q6_K => {
            let low = bits(i / 128 * 64 + i % 64, i / 64 % 2 * 4, 4);
            let high = bits(128 + i / 128 * 32 + i % 32, i / 32 % 4 * 2, 2);
            half(208) * signed(192 + i / 16) * (low + 16.0 * high - 32.0)
        }
        BlockFormat::Q8_K => f32::from_le_bytes(b[..4].try_into().unwrap()) * signed(4 + i),
        BlockFormat::IQ4_NL => half(0) * f32::from(UNEVEN[of_32(2) as usize]),
        BlockFormat::IQ4_XS => {
            let s = i / 32;
            let scale = bits(4 + s / 2, s % 2 * 4, 4) + 16.0 * bits(2, s * 2, 2) - 32.0;
            let q = bits(8 + s * 16 + i % 16, i % 32 / 16 * 4, 4);
            half(0) * scale * f32::from(UNEVEN[q as usize])
        }
        BlockFormat::MXFP4 => {
            // A sign, two bits of exponent and one of mantissa, as the format's name says.
            let at =
                |bit: usize, width: usize| f64::from(bits(1 + i % 16, i / 16 * 4 + bit, width));
            let (fraction, exponent) = (at(0, 1) / 2.0, at(1, 2));
            let magnitude = if exponent == 0.0 {
                fraction
            } else {
                (1.0 + fraction) * f64::powf(2.0, exponent - 1.0)
            };
            let sign = 1.0 - 2.0 * at(3, 1);
            (sign * magnitude * f64::powi(2.0, i32::from(b[0]) - 127)) as f32
        }
    }
}

#[test]
fn every_format_has_a_row() {
    for &(format, id, len, bytes) in TABLE {
        assert_eq!(BlockFormat::from_ggml(id), Some(format));
        assert_eq!((format.block_len(), format.block_bytes()), (len, bytes));
    }
    assert_eq!(BlockFormat::from_ggml(4), None);
}

#[test]
fn every_number_is_what_its_bits_say() {
    for format in formats() {
        let bytes = random_blocks(format, 5);
        let found = widened(format, &bytes);
        for (at, &found) in found.iter().enumerate() {
            let block = at / format.block_len();
            let bytes = &bytes[block * format.block_bytes()..][..format.block_bytes()];
            let expected = number(format, bytes, at % format.block_len());
            assert!(expected.is_finite(), "{format} number {at}");
            assert_eq!(found, expected, "{format} number {at}");
        }
    }
}

#[test]
fn powers_of_two_reach_from_the_least_to_the_largest() {
    for exponent in 0..=255 {
        let mut block = [0x21_u8; 17];
        block[0] = exponent;
        for (i, found) in widened(BlockFormat::MXFP4, &block).into_iter().enumerate() {
            assert_eq!(found, number(BlockFormat::MXFP4, &block, i), "2^({exponent} - 128)");
        }
    }
}

#[test]
fn quants_at_their_ends_give_known_numbers() {
    use BlockFormat::*;
    let (one, two, half): ([u8; 2], [u8; 2], [u8; 2]) = ([0, 0x3C], [0, 0x40], [0, 0x38]);
    let single = 2.0_f32.to_le_bytes();
    // Format; every byte of the block; those that are set otherwise; every number.
    type Case<'a> = (BlockFormat, u8, &'a [(usize, &'a [u8])], f32);
    let low_scales: &[u8] = &[0; 16];
    let high_scales: &[u8] = &[0xFF; 16];
    let cases: &[Case<'_>] = &[
        (Q4_0, 0x00, &[(0, &two)], -16.0),
        (Q4_0, 0xFF, &[(0, &two)], 14.0),
        (Q4_1, 0x00, &[(0, &two), (2, &half)], 0.5),
        (Q4_1, 0xFF, &[(0, &two), (2, &half)], 30.5),
        (Q5_0, 0x00, &[(0, &two)], -32.0),
        (Q5_0, 0xFF, &[(0, &two)], 30.0),
        (Q5_1, 0x00, &[(0, &two), (2, &half)], 0.5),
        (Q5_1, 0xFF, &[(0, &two), (2, &half)], 62.5),
        (Q8_0, 0x80, &[(0, &two)], -256.0),
        (Q8_0, 0x7F, &[(0, &two)], 254.0),
        // The sum of the quants plays no part.
        (Q8_1, 0x80, &[(0, &half), (2, &one)], -64.0),
        (Q8_1, 0x7F, &[(0, &half), (2, &two)], 63.5),
        (Q2_K, 0x00, &[(0, &[0xF1; 16]), (80, &two), (82, &half)], -7.5),
        (Q2_K, 0xFF, &[(0, &[0xF1; 16]), (80, &two), (82, &half)], -1.5),
        (Q2_K, 0xFF, &[(80, &two), (82, &half)], 82.5),
        (Q3_K, 0x00, &[(108, &two)], 256.0),
        (Q3_K, 0xFF, &[(96, &low_scales[..12]), (108, &two)], -192.0),
        (Q3_K, 0x00, &[(96, &high_scales[..12]), (108, &two)], -248.0),
        (Q3_K, 0xFF, &[(108, &two)], 186.0),
        (Q4_K, 0x00, &[(0, &two), (2, &half), (4, &high_scales[..12])], -31.5),
        (Q4_K, 0xFF, &[(0, &two), (2, &half)], 1858.5),
        (Q4_K, 0xFF, &[(0, &two), (2, &half), (4, &low_scales[..12])], 0.0),
        (Q5_K, 0x00, &[(0, &two), (2, &half), (4, &high_scales[..12])], -31.5),
        (Q5_K, 0xFF, &[(0, &two), (2, &half)], 3874.5),
        (Q6_K, 0x00, &[(192, &[0x80; 16]), (208, &two)], 8192.0),
        (Q6_K, 0xFF, &[(192, &[0x80; 16]), (208, &two)], -7936.0),
        (Q6_K, 0xFF, &[(192, &[0x7F; 16]), (208, &two)], 7874.0),
        (Q8_K, 0x80, &[(0, &single)], -256.0),
        (Q8_K, 0x7F, &[(0, &single)], 254.0),
        (IQ4_NL, 0x00, &[(0, &two)], -254.0),
        (IQ4_NL, 0x88, &[(0, &two)], 2.0),
        (IQ4_NL, 0xFF, &[(0, &two)], 226.0),
        (IQ4_XS, 0x00, &[(0, &two)], 8128.0),
        (IQ4_XS, 0xFF, &[(0, &two)], 7006.0),
        (IQ4_XS, 0xFF, &[(0, &two), (2, &low_scales[..6])], -7232.0),
        (MXFP4, 0x00, &[(0, &[128])], 0.0),
        (MXFP4, 0x77, &[(0, &[128])], 12.0),
        (MXFP4, 0xFF, &[(0, &[126])], -3.0),
        (MXFP4, 0x11, &[(0, &[127])], 0.5),
    ];
    for &(format, fill, set, expected) in cases {
        let mut block = vec![fill; format.block_bytes()];
        for (at, bytes) in set {
            block[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        let found = widened(format, &block);
        assert_eq!(found, vec![expected; format.block_len()], "{format} of {fill:#04x}");
    }
}

#[test]
fn a_block_is_widened_as_if_it_were_alone() {
    for format in formats() {
        let bytes = random_blocks(format, 4);
        let alone = bytes.chunks_exact(format.block_bytes()).flat_map(|b| widened(format, b));
        assert_eq!(widened(format, &bytes), alone.collect::<Vec<_>>(), "{format}");
        assert!(widened(format, &[]).is_empty(), "{format}");
    }
}

#[test]
fn a_scale_that_is_not_finite_is_found_in_any_block() {
    let set = |block: &mut [u8], at: usize, bytes: &[u8]| {
        block[at..at + bytes.len()].copy_from_slice(bytes);
    };
    for format in formats() {
        let good = random_blocks(format, 40);
        assert!(is_finite(format, &good), "{format}");
        assert!(is_finite(format, &[]), "{format}");
        let mut places: Vec<(usize, Vec<u8>)> = Vec::new();
        for bad in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
            match format {
                BlockFormat::F64 => places.push((0, f64::from(bad).to_le_bytes().to_vec())),
                BlockFormat::F32 | BlockFormat::Q8_K => {
                    places.push((0, bad.to_le_bytes().to_vec()))
                }
                BlockFormat::BF16 => {
                    places.push((0, half::bf16::from_f32(bad).to_le_bytes().to_vec()));
                }
                // The largest power, times the largest quant.
                BlockFormat::MXFP4 => places.push((0, vec![255, 0x77])),
                _ => {}
            }
            let bytes = f16::from_f32(bad).to_le_bytes().to_vec();
            places.extend(halves(format).iter().map(|&at| (at, bytes.clone())));
        }
        assert!(!places.is_empty(), "{format}");
        for (at, bytes) in places {
            for block in [0, 1, 39] {
                let mut bad = good.clone();
                set(&mut bad, block * format.block_bytes() + at, &bytes);
                assert!(!is_finite(format, &bad), "{format}, byte {at} of block {block}");
            }
        }
    }
    // A scale of zero times infinity is none either, whatever the quants are.
    let mut zeros = vec![0; 84];
    set(&mut zeros, 82, &f16::INFINITY.to_le_bytes());
    assert!(!is_finite(BlockFormat::Q2_K, &zeros));
}

#[test]
fn a_layer_computes_with_every_format_as_it_is_stored() {
    let (outputs, inputs) = (40, 512);
    for format in formats() {
        let bytes = random_blocks(format, outputs * inputs / format.block_len());
        let wide = widened(format, &bytes);
        for dtype in [DType::F32, DType::F64] {
            let stored = FrozenLinear::new(
                FrozenWeight::Blocks {
                    format,
                    bytes: bytes.clone().into(),
                    shape: [outputs, inputs],
                    dtype,
                },
                None,
            );
            let dense = Tensor::new(wide.clone(), [outputs, inputs]).to_dtype(dtype);
            let dense = FrozenLinear::dense(dense);
            let agree = |what: &str, found: &Tensor, expected: &Tensor| {
                assert_eq!(found.shape(), expected.shape());
                let (found, expected) = (found.to_f64(), expected.to_f64());
                let largest = expected.iter().fold(0.0_f64, |largest, v| largest.max(v.abs()));
                assert!(largest > 0.0, "{format}");
                for (found, expected) in found.iter().zip(&expected) {
                    let error = (found - expected).abs() / largest;
                    assert!(error < 1e-4, "{what} of {format} in {dtype:?}: {error}");
                }
            };
            for rows in [1, 2, 5, 64] {
                let some = |width: usize| {
                    let value = |i: usize| ((i * 37 + 11) % 101) as f64 / 50.0 - 1.0;
                    let values: Vec<f64> = (0..rows * width).map(value).collect();
                    Tensor::from_f64(dtype, &values, [rows, width])
                };
                let (x, gradient) = (some(inputs), some(outputs));
                agree("product", &stored.apply(&x), &dense.apply(&x));
                agree(
                    "gradient",
                    &stored.input_gradient(&gradient, None),
                    &dense.input_gradient(&gradient, None),
                );
            }
            let ids = [39, 0, 7];
            assert_eq!(stored.gather(&ids).to_f64(), dense.gather(&ids).to_f64(), "{format}");
        }
    }
}

fn of_hex(text: &serde_json::Value) -> Vec<u8> {
    let text = text.as_str().unwrap();
    (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap()).collect()
}

/// `tests/golden/blocks.py` makes the file with the `gguf` package's own widening. The package knows
/// no widening of the formats that GGML rounds activations to.
#[test]
fn widening_matches_the_reference_bit_for_bit() {
    let golden: serde_json::Value =
        serde_json::from_str(include_str!("../../tests/golden/blocks.json")).unwrap();
    let cases = golden.as_array().unwrap();
    assert_eq!(cases.len(), TABLE.len() - 3, "all formats but F64, Q8_1 and Q8_K");
    for case in cases {
        let format = BlockFormat::from_ggml(case["type"].as_u64().unwrap() as u32).unwrap();
        let expected = of_hex(&case["values"]);
        let expected = expected.as_chunks::<4>().0;
        let found = widened(format, &of_hex(&case["bytes"]));
        assert_eq!(found.len(), expected.len());
        for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
            assert_eq!(found.to_le_bytes(), *expected, "{format} number {i}");
        }
    }
}

#[test]
fn narrowing_matches_the_reference_byte_for_byte() {
    let golden: serde_json::Value =
        serde_json::from_str(include_str!("../../tests/golden/quantize.json")).unwrap();
    let numbers = |value: &serde_json::Value| -> Vec<f64> {
        value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
    };
    let values: Vec<f32> = numbers(&golden["values"]).iter().map(|&v| v as f32).collect();
    let cases = golden["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 6);
    for case in cases {
        let format = BlockFormat::from_ggml(case["type"].as_u64().unwrap() as u32).unwrap();
        let mut bytes = Vec::new();
        quantize(format, &values, &mut bytes);
        let expected: Vec<u8> = numbers(&case["bytes"]).iter().map(|&v| v as u8).collect();
        assert_eq!(bytes, expected, "{format}");
    }
}

#[test]
fn narrowed_numbers_come_back_within_a_rounding_step() {
    let values: Vec<f32> = (0..256).map(|i| ((i * 73 % 256) as f32 - 100.0) / 37.0).collect();
    let step = |format| match format {
        BlockFormat::F32 | BlockFormat::F64 => 0.0,
        BlockFormat::F16 => 5e-4,
        BlockFormat::BF16 => 4e-3,
        // Half a step of the widest block, and the scale's own rounding to 16 bits.
        BlockFormat::Q8_0 => 4.25 / 127.0 * 0.51 + 4.25 * 5e-4,
        BlockFormat::Q4_1 => 6.92 / 15.0 * 0.51 + 6.92 * 5e-4,
        _ => 4.25 / 8.0 * 1.01 + 4.25 * 5e-4,
    };
    for format in [
        BlockFormat::F64,
        BlockFormat::F32,
        BlockFormat::F16,
        BlockFormat::BF16,
        BlockFormat::Q8_0,
        BlockFormat::Q4_0,
        BlockFormat::Q4_1,
    ] {
        let mut bytes = Vec::new();
        quantize(format, &values, &mut bytes);
        assert_eq!(bytes.len(), format.bytes_for(values.len()));
        let mut back = vec![0.0; values.len()];
        dequantize(format, &bytes, &mut back);
        for (&found, &expected) in back.iter().zip(&values) {
            let scale = if matches!(format, BlockFormat::F16 | BlockFormat::BF16) {
                expected.abs()
            } else {
                1.0
            };
            assert!(
                (found - expected).abs() <= step(format) * scale,
                "{format}: {expected} {found}"
            );
        }
        let mut zeros = Vec::new();
        quantize(format, &[0.0; 32], &mut zeros);
        let mut back = vec![1.0; 32];
        dequantize(format, &zeros, &mut back);
        assert_eq!(back, [0.0; 32], "{format}");
    }
}

#[test]
#[should_panic(expected = "can be read, not written")]
fn formats_that_are_only_read_say_so() {
    quantize(BlockFormat::IQ4_XS, &[0.0; 256], &mut Vec::new());
}
