//! `hydralora bench`: speed against this machine's measured matrix-product rate.

mod train;

use crate::args::{BenchArguments, BenchWhat, Global};
use hydralora_kernels::matmul::{Mat, MatMut, Threads, Write, gemm};
use std::process::ExitCode;
use std::time::Instant;

pub(crate) fn run(global: &Global, arguments: &BenchArguments) -> anyhow::Result<ExitCode> {
    match &arguments.what {
        BenchWhat::Train(command) => train::run(global, command),
        _ => todo!(),
    }
}

/// Numbers that are neither zero nor denormal, the same every time.
fn numbers(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 7919 + 13) % 1009) as f32 / 504.5 - 1.0).collect()
}

/// Seconds of the fastest of `runs` calls.
fn fastest(runs: usize, mut body: impl FnMut()) -> f64 {
    (0..runs.max(1))
        .map(|_| {
            let started = Instant::now();
            body();
            started.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min)
}

/// Rate in floating-point operations per second of `x Wᵀ` with `x: [rows, inner]` and
/// `W: [cols, inner]` in `f32` on all threads, the best of a few runs.
fn product_rate(rows: usize, inner: usize, cols: usize) -> f64 {
    let (x, w) = (numbers(rows * inner), numbers(cols * inner));
    let mut out = vec![0.0_f32; rows * cols];
    let seconds = fastest(4, || {
        gemm(
            MatMut::new(&mut out, rows, cols),
            Mat::new(&x, rows, inner),
            Mat::new(&w, cols, inner).t(),
            1.0,
            Write::Set,
            Threads::All,
        );
    });
    2.0 * rows as f64 * inner as f64 * cols as f64 / seconds
}

/// The middle of `values`; 0 for none.
fn median(values: &mut [f64]) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}
