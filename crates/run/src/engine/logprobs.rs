//! How likely tokens are.

use super::request::TokenLogprobs;
use hydralora_kernels::{Element, Tensor, dispatch};

/// How likely `token` is by row `row` of `logits: [rows, vocab_size]`, and the `top` likeliest.
pub(super) fn of_token(logits: &Tensor, row: usize, token: u32, top: usize) -> TokenLogprobs {
    let width = logits.cols();
    let row: Vec<f64> = dispatch!(logits.dtype(), |E| {
        logits.data::<E>()[row * width..(row + 1) * width].iter().map(|&x| x.to_f64()).collect()
    });
    let peak = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let normaliser = peak + row.iter().map(|logit| (logit - peak).exp()).sum::<f64>().ln();
    let chosen = row[token as usize];
    let likelier =
        |(id, logit): (usize, &f64)| *logit > chosen || (*logit == chosen && id < token as usize);
    let rank = 1 + row.iter().enumerate().filter(|entry| likelier(*entry)).count();
    let by_rank = |&a: &usize, &b: &usize| row[b].total_cmp(&row[a]).then(a.cmp(&b));
    let mut order: Vec<usize> = (0..width).collect();
    let top = top.min(width);
    if top > 0 && top < width {
        order.select_nth_unstable_by(top - 1, by_rank);
    }
    order.truncate(top);
    order.sort_unstable_by(by_rank);
    let top = order.into_iter().map(|id| (id as u32, row[id] - normaliser)).collect();
    TokenLogprobs { token, logprob: chosen - normaliser, rank, top }
}
