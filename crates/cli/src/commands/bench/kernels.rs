//! `hydralora bench kernels`: single operations, forward and backward, at a model's shapes.

use super::numbers;
use crate::args::{BenchKernelsArguments, Device, Global};
use crate::energy::{Meter, Work};
use crate::failure::bad_input;
use crate::ui::{result, say, table};
use hydralora_kernels::ops::attention::{AttentionConfig, causal_attention, spans};
use hydralora_kernels::ops::cross_entropy::linear_cross_entropy;
use hydralora_kernels::ops::frozen_linear::FrozenLinear;
use hydralora_kernels::ops::low_rank::{Gate, LowRank, Mask, adapted_linear};
use hydralora_kernels::ops::rms_norm::rms_norm;
use hydralora_kernels::ops::rope::{Frequencies, Pairs, RopeTable, rope};
use hydralora_kernels::ops::swiglu::swiglu;
use hydralora_kernels::{DType, Tensor, Var};
use serde::Serialize;
use serde_json::json;
use std::process::ExitCode;
use std::time::Instant;

/// Rows of the output layer in the cross-entropy's measurement.
const VOCABULARY: usize = 49_152;
const HEAD_DIM: usize = 64;

#[derive(Serialize)]
struct Row {
    operation: String,
    forward_ms: f64,
    backward_ms: f64,
    /// Of both ways together; none for operations that are no products.
    gflops_per_s: Option<f64>,
}

fn tensor(rows: usize, cols: usize) -> Tensor {
    Tensor::new(numbers(rows * cols), [rows, cols])
}

/// Times `run` forward, and backward from a gradient equal to its value; the fastest of several.
fn time(name: impl Into<String>, flops: f64, run: impl Fn() -> Var) -> Row {
    let (mut forward, mut backward) = (f64::INFINITY, f64::INFINITY);
    for _ in 0..6 {
        let started = Instant::now();
        let y = run();
        forward = forward.min(started.elapsed().as_secs_f64());
        let seed = y.value().clone();
        let started = Instant::now();
        y.backward_from(seed);
        backward = backward.min(started.elapsed().as_secs_f64());
    }
    Row {
        operation: name.into(),
        forward_ms: forward * 1e3,
        backward_ms: backward * 1e3,
        gflops_per_s: (flops > 0.0).then(|| flops / (forward + backward) / 1e9),
    }
}

pub(crate) fn run(global: &Global, arguments: &BenchKernelsArguments) -> anyhow::Result<ExitCode> {
    let (tokens, hidden, inner) =
        (arguments.tokens, arguments.hidden_size, arguments.intermediate_size);
    if [tokens, hidden, inner, arguments.seq_len].contains(&0) || hidden % (3 * HEAD_DIM) != 0 {
        return Err(bad_input(format!(
            "--tokens, --intermediate-size and --seq-len: expected at least 1; --hidden-size: expected a multiple of {}",
            3 * HEAD_DIM
        )));
    }
    if global.device != Device::Cpu {
        say(global, "single operations are measured on the CPU");
    }
    let meter = Meter::start(global, &arguments.energy);
    let mark = meter.mark();
    let product = |a: usize, b: usize| 2.0 * tokens as f64 * a as f64 * b as f64;
    let leaf = |rows: usize, cols: usize| Var::leaf(tensor(rows, cols));
    let mut rows = Vec::new();
    for (inputs, outputs) in
        [(hidden, hidden), (hidden, hidden / 3), (hidden, inner), (inner, hidden)]
    {
        let x = leaf(tokens, inputs);
        let layer = FrozenLinear::dense(tensor(outputs, inputs));
        let flops = 2.0 * product(inputs, outputs);
        rows.push(time(format!("frozen_linear {inputs} → {outputs}"), flops, || {
            layer.forward(&x)
        }));
        if outputs == hidden / 3 || inputs == outputs {
            continue;
        }
        for (rank, experts) in [(16, 1), (4, 4)] {
            let (a, b) = (leaf(rank, inputs), leaf(outputs, rank * experts));
            let router = leaf(experts, inputs);
            let gate = match experts {
                1 => Gate::One,
                _ => Gate::Input { weight: &router, bias: None },
            };
            let p =
                LowRank { a: &a, b: &b, num_experts: experts, gate, scale: 1.0, mask: Mask::None };
            let down = if experts == 1 { rank } else { rank + experts };
            let flops = flops + 3.0 * (product(inputs, down) + product(rank * experts, outputs));
            let name = format!("adapted_linear {inputs} → {outputs}, r {rank}, N {experts}");
            rows.push(time(name, flops, || adapted_linear(&x, &layer, &p).y));
        }
    }
    let heads = hidden / HEAD_DIM;
    let config = AttentionConfig {
        num_heads: heads,
        num_key_value_heads: heads / 3,
        head_dim: HEAD_DIM,
        scale: 0.125,
        window: None,
        softcap: None,
    };
    let mut offsets: Vec<usize> = (0..tokens).step_by(arguments.seq_len).collect();
    offsets.push(tokens);
    let spans = spans(&offsets);
    let (q, k, v) = (leaf(tokens, hidden), leaf(tokens, hidden / 3), leaf(tokens, hidden / 3));
    let pairs: f64 =
        spans.iter().map(|s| (s.queries.len() * (s.queries.len() + 1) / 2) as f64).sum();
    let flops = 7.0 * 2.0 * pairs * hidden as f64;
    let name = format!("causal_attention, {heads} heads, sequences of {}", arguments.seq_len);
    rows.push(time(name, flops, || causal_attention(&q, &k, &v, &spans, config)));

    let x = leaf(tokens, hidden);
    let weight = Var::constant(Tensor::new(numbers(hidden), [hidden]));
    rows.push(time("rms_norm", 0.0, || rms_norm(&x, &weight, 1e-5)));
    let (gate, up) = (leaf(tokens, inner), leaf(tokens, inner));
    rows.push(time("swiglu", 0.0, || swiglu(&gate, &up)));
    let positions: Vec<u32> = (0..tokens as u32).collect();
    let frequencies: Vec<f64> =
        (0..HEAD_DIM / 2).map(|i| 1e4_f64.powf(-2.0 * i as f64 / HEAD_DIM as f64)).collect();
    let table_of_angles =
        RopeTable::new(DType::F32, &positions, 2 * frequencies.len(), Pairs::Halves, |_| {
            Frequencies { inverse: &frequencies, factor: 1.0 }
        });
    rows.push(time("rope", 0.0, || rope(x.clone(), &table_of_angles)));
    let head = FrozenLinear::dense(tensor(VOCABULARY, hidden));
    let labels: Vec<u32> = (0..tokens).map(|t| (t * 7919 % VOCABULARY) as u32).collect();
    let flops = 2.0 * product(hidden, VOCABULARY);
    rows.push(time(format!("linear_cross_entropy {hidden} → {VOCABULARY}"), flops, || {
        linear_cross_entropy(&x, &head, &labels, u32::MAX, 1e-3, None).loss
    }));

    let energy = meter.energy(meter.since(&mark), Work::default());
    let mut lines =
        vec![["operation", "forward, ms", "backward, ms", "GFLOP/s"].map(str::to_owned).to_vec()];
    for row in &rows {
        lines.push(vec![
            row.operation.clone(),
            format!("{:.3}", row.forward_ms),
            format!("{:.3}", row.backward_ms),
            row.gflops_per_s.map_or_else(String::new, |rate| format!("{rate:.0}")),
        ]);
    }
    let json = json!({
        "tokens": tokens,
        "threads": hydralora_runtime::threads(),
        "operations": rows,
        "energy": energy,
    });
    result(global, &json, &table(&lines))?;
    energy.say_if_known(global);
    Ok(ExitCode::SUCCESS)
}
