//! Every kernel forward and backward at SmolLM2-135M's widths, 1,600 tokens in sequences of 200:
//! `cargo bench -p hydralora-kernels --bench kernels -- NAME`.

use criterion::measurement::WallTime;
use criterion::{
    BatchSize, BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main,
};
use hydralora_kernels::block::{self, BlockFormat};
use hydralora_kernels::ops::attention::{AttentionConfig, causal_attention, spans};
use hydralora_kernels::ops::cross_entropy::linear_cross_entropy;
use hydralora_kernels::ops::delta_net::{
    DeltaConfig, DeltaState, causal_conv, conv_step, delta_step, gated_delta_rule_joined,
    gated_rms_norm,
};
use hydralora_kernels::ops::frozen_linear::{FrozenLinear, FrozenWeight};
use hydralora_kernels::ops::low_rank::{Gate, LowRank, Mask, adapted_linear};
use hydralora_kernels::ops::rms_norm::rms_norm;
use hydralora_kernels::ops::rope::{Frequencies, Pairs, RopeTable, rope};
use hydralora_kernels::ops::swiglu::swiglu;
use hydralora_kernels::{DType, Tensor, Var, few_rows};
use std::hint::black_box;

const TOKENS: usize = 1600;
const SEQ_LEN: usize = 200;
const HIDDEN: usize = 576;
const KEY_VALUE: usize = 192;
const INTERMEDIATE: usize = 1536;
const HEAD_DIM: usize = 64;
const VOCABULARY: usize = 49_152;
const LABELS: usize = 700;

fn numbers(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7919 + 13) % 1009) as f32 / 504.5 - 1.0).collect()
}

fn tensor(rows: usize, cols: usize) -> Tensor {
    Tensor::new(numbers(rows * cols), [rows, cols])
}

fn leaf(rows: usize, cols: usize) -> Var {
    Var::leaf(tensor(rows, cols))
}

/// Times `run`, and its backward from a gradient equal to its value.
fn both(group: &mut BenchmarkGroup<'_, WallTime>, name: &str, run: impl Fn() -> Var) {
    group.bench_function(format!("{name}/forward"), |b| b.iter(|| black_box(run())));
    group.bench_function(format!("{name}/backward"), |b| {
        b.iter_batched(
            || {
                let y = run();
                let seed = y.value().clone();
                (y, seed)
            },
            |(y, seed)| black_box(y.backward_from(seed)),
            BatchSize::PerIteration,
        );
    });
}

fn group<'a>(c: &'a mut Criterion, name: &str, rows: usize) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(name);
    group.sample_size(20).throughput(Throughput::Elements(rows as u64));
    group
}

fn frozen(c: &mut Criterion) {
    let mut group = group(c, "frozen_linear", TOKENS);
    for (inputs, outputs) in [(HIDDEN, HIDDEN), (HIDDEN, INTERMEDIATE), (INTERMEDIATE, HIDDEN)] {
        let x = leaf(TOKENS, inputs);
        let layer = FrozenLinear::dense(tensor(outputs, inputs));
        both(&mut group, &format!("{inputs}x{outputs}"), || layer.forward(&x));
    }
    let x = leaf(TOKENS, HIDDEN);
    for format in [BlockFormat::Q8_0, BlockFormat::Q4_0] {
        let layer = packed(format, HIDDEN, INTERMEDIATE);
        both(&mut group, &format!("{HIDDEN}x{INTERMEDIATE} {format}"), || layer.forward(&x));
    }
}

fn packed(format: BlockFormat, inputs: usize, outputs: usize) -> FrozenLinear {
    let mut bytes = Vec::new();
    block::quantize(format, &numbers(inputs * outputs), &mut bytes);
    let shape = [outputs, inputs];
    FrozenLinear::new(
        FrozenWeight::Blocks { format, bytes: bytes.into(), shape, dtype: DType::F32 },
        None,
    )
}

/// Few rows, as in decoding: the weight is read once.
fn few(c: &mut Criterion) {
    let _few = few_rows(64);
    for rows in [1, 4, 16, 64] {
        let mut group = group(c, &format!("frozen_linear, few rows, {rows}"), rows);
        let x = tensor(rows, HIDDEN);
        let dense = FrozenLinear::dense(tensor(VOCABULARY, HIDDEN));
        group.bench_function("F32", |b| b.iter(|| black_box(dense.apply(&x))));
        for format in [BlockFormat::BF16, BlockFormat::Q8_0, BlockFormat::Q4_0, BlockFormat::Q4_1] {
            let layer = packed(format, HIDDEN, VOCABULARY);
            group.bench_function(format.to_string(), |b| b.iter(|| black_box(layer.apply(&x))));
        }
    }
}

fn adapted(c: &mut Criterion) {
    let mut group = group(c, "adapted_linear", TOKENS);
    for (inputs, outputs) in [(HIDDEN, INTERMEDIATE), (INTERMEDIATE, HIDDEN)] {
        let (x, layer) = (leaf(TOKENS, inputs), FrozenLinear::dense(tensor(outputs, inputs)));
        for (rank, experts) in [(16, 1), (4, 4)] {
            let (a, b) = (leaf(rank, inputs), leaf(outputs, rank * experts));
            let router = leaf(experts, inputs);
            let gate = match experts {
                1 => Gate::One,
                _ => Gate::Input { weight: &router, bias: None },
            };
            let p =
                LowRank { a: &a, b: &b, num_experts: experts, gate, scale: 1.0, mask: Mask::None };
            let name = format!("{inputs}x{outputs} r{rank} N{experts}");
            both(&mut group, &name, || adapted_linear(&x, &layer, &p).y);
        }
    }
}

fn attention(c: &mut Criterion) {
    let mut group = group(c, "causal_attention", TOKENS);
    let config = AttentionConfig {
        num_heads: HIDDEN / HEAD_DIM,
        num_key_value_heads: KEY_VALUE / HEAD_DIM,
        head_dim: HEAD_DIM,
        scale: 0.125,
        window: None,
        softcap: None,
    };
    let (q, k, v) = (leaf(TOKENS, HIDDEN), leaf(TOKENS, KEY_VALUE), leaf(TOKENS, KEY_VALUE));
    for seq_len in [SEQ_LEN, TOKENS] {
        let offsets: Vec<usize> = (0..=TOKENS).step_by(seq_len).collect();
        let spans = spans(&offsets);
        both(&mut group, &seq_len.to_string(), || causal_attention(&q, &k, &v, &spans, config));
    }
}

/// Gated DeltaNet at the widths of Qwen3.5-0.8B: one sequence, and one token of it.
fn delta_net(c: &mut Criterion) {
    const ROWS: usize = 512;
    let config = DeltaConfig {
        num_key_heads: 16,
        num_value_heads: 16,
        key_head_dim: 128,
        value_head_dim: 128,
    };
    let (width, heads, offsets) = (config.joined_width(), config.num_value_heads, [0, ROWS]);
    let gates = |rows: usize| {
        let scaled = |factor: f64, shift: f64| {
            let numbers = numbers(rows * heads);
            let numbers: Vec<f32> =
                numbers.iter().map(|&x| (factor * f64::from(x) + shift) as f32).collect();
            Tensor::new(numbers, [rows, heads])
        };
        [scaled(0.1, -0.1), scaled(0.5, 0.5)]
    };
    let mut group = group(c, "delta net", ROWS);
    let (x, weight) = (leaf(ROWS, width), Var::constant(tensor(width, 4)));
    both(&mut group, "convolution", || causal_conv(&x, &weight, &[], &offsets));
    let [decay, beta] = gates(ROWS).map(Var::leaf);
    both(&mut group, "rule", || gated_delta_rule_joined(&x, &decay, &beta, config, &offsets, &[]));
    let (x, gate) = (leaf(ROWS, config.value_width()), leaf(ROWS, config.value_width()));
    let scale = Var::constant(Tensor::new(vec![1.0_f32; 128], [128]));
    both(&mut group, "gated norm", || gated_rms_norm(&x, &scale, &gate, 1e-6));
    let (x, [decay, beta]) = (tensor(1, width), gates(1));
    let mut state = DeltaState::new(DType::F32, config, 4);
    group.bench_function("one token", |b| {
        b.iter(|| {
            let qkv = conv_step(&x, weight.value(), &[0, 1], &mut [&mut state]);
            black_box(delta_step(&qkv, &decay, &beta, config, &[0, 1], &mut [&mut state]))
        });
    });
}

fn elementwise(c: &mut Criterion) {
    let mut group = group(c, "elementwise", TOKENS);
    let x = leaf(TOKENS, HIDDEN);
    let weight = Var::constant(Tensor::new(numbers(HIDDEN), [HIDDEN]));
    both(&mut group, "rms_norm", || rms_norm(&x, &weight, 1e-5));
    let (gate, up) = (leaf(TOKENS, INTERMEDIATE), leaf(TOKENS, INTERMEDIATE));
    both(&mut group, "swiglu", || swiglu(&gate, &up));
    let positions: Vec<u32> = (0..TOKENS as u32).collect();
    let frequencies: Vec<f64> =
        (0..HEAD_DIM / 2).map(|i| 1e4_f64.powf(-2.0 * i as f64 / HEAD_DIM as f64)).collect();
    let table =
        RopeTable::new(DType::F32, &positions, 2 * frequencies.len(), Pairs::Halves, |_| {
            Frequencies { inverse: &frequencies, factor: 1.0 }
        });
    both(&mut group, "rope", || rope(x.clone(), &table));
}

fn cross_entropy(c: &mut Criterion) {
    let mut group = group(c, "linear_cross_entropy", LABELS);
    let head = FrozenLinear::dense(tensor(VOCABULARY, HIDDEN));
    let x = leaf(LABELS, HIDDEN);
    let labels: Vec<u32> = (0..LABELS).map(|t| (t * 7919 % VOCABULARY) as u32).collect();
    // The gradient is formed on the way forward.
    group.bench_function("forward and gradient", |b| {
        b.iter(|| {
            black_box(
                linear_cross_entropy(&x, &head, &labels, u32::MAX, 1e-3, None).loss.backward(),
            )
        });
    });
}

criterion_group!(benches, frozen, few, adapted, attention, delta_net, elementwise, cross_entropy);
criterion_main!(benches);
