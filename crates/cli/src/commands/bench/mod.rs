//! `hydralora bench`: speed against this machine's measured matrix-product rate.

mod decode;
mod engine;
mod kernels;
mod methods;
mod train;

use crate::args::{BenchArguments, BenchWhat, Global};
use hydralora_kernels::Tensor;
use hydralora_kernels::ops::frozen_linear::FrozenLinear;
use std::process::ExitCode;
use std::time::Instant;

pub(crate) fn run(global: &Global, arguments: &BenchArguments) -> anyhow::Result<ExitCode> {
    match &arguments.what {
        BenchWhat::Train(command) => train::run(global, command),
        BenchWhat::Decode(command) => decode::run(global, command),
        BenchWhat::Engine(command) => engine::run(global, command),
        BenchWhat::Kernels(command) => kernels::run(global, command),
    }
}

/// Numbers that are neither zero nor denormal, the same every time.
fn numbers(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7919 + 13) % 1009) as f32 / 504.5 - 1.0).collect()
}

/// Floating-point operations and the seconds they took.
#[derive(Clone, Copy, Default)]
struct Timed {
    flops: f64,
    seconds: f64,
}

impl Timed {
    /// Operations per second.
    fn rate(self) -> f64 {
        self.flops / self.seconds
    }
}

impl std::ops::AddAssign for Timed {
    fn add_assign(&mut self, more: Self) {
        self.flops += more.flops;
        self.seconds += more.seconds;
    }
}

/// Times `x Wᵀ` with `x: [rows, inner]` and `W: [cols, inner]` in `f32` on all threads, for long enough
/// to be sustained: processors clock higher for the first milliseconds than they can keep up.
fn time_product(rows: usize, inner: usize, cols: usize) -> Timed {
    let x = Tensor::new(numbers(rows * inner), [rows, inner]);
    let layer = FrozenLinear::dense(Tensor::new(numbers(cols * inner), [cols, inner]));
    let started = Instant::now();
    let mut runs = 0;
    while started.elapsed().as_secs_f64() < 0.15 || runs < 2 {
        std::hint::black_box(layer.apply(&x));
        runs += 1;
    }
    let flops = 2.0 * rows as f64 * inner as f64 * cols as f64 * f64::from(runs);
    Timed { flops, seconds: started.elapsed().as_secs_f64() }
}

/// The middle of `values`; 0 for none.
fn median(values: &mut [f64]) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}
