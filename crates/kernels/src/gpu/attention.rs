//! Causal attention.

use super::{DeviceBuffer, Kernel, bits, device_of};
use crate::graph::Var;
use crate::ops::attention::{AttentionConfig, Span, visible};

const fn kernel(name: &'static str) -> Kernel {
    Kernel {
        source: concat!(
            include_str!("shaders/reduce.wgsl"),
            include_str!("shaders/attention.wgsl")
        ),
        name,
    }
}
const ATTENTION: Kernel = kernel("attention");
const KNOWN: Kernel = kernel("attention_known");
const QUERIES_BACKWARD: Kernel = kernel("attention_queries_backward");
const KEYS_BACKWARD: Kernel = kernel("attention_keys_backward");

/// Widest head the kernels hold.
const LARGEST_DIM: usize = 256;

/// Of every query row the key rows it sees: first and end.
fn keys_seen(spans: &[Span], window: Option<usize>) -> Vec<[u32; 2]> {
    let of_span = |span: &Span| {
        let (first, past) = (span.keys.start, span.keys.len() - span.queries.len());
        (0..span.queries.len()).map(move |row| {
            let seen = visible(row, past, window);
            [(first + seen.start) as u32, (first + seen.end) as u32]
        })
    };
    spans.iter().flat_map(of_span).collect()
}

/// Of every key row the query rows that see it, none for a key outside all spans. Nothing if a key
/// belongs to two spans, as the queries then are no single range.
fn queries_seeing(spans: &[Span], window: Option<usize>, keys: usize) -> Option<Vec<[u32; 2]>> {
    let mut all = vec![[0, 0]; keys];
    let mut taken = vec![false; keys];
    for span in spans {
        let past = span.keys.len() - span.queries.len();
        for (at, key) in span.keys.clone().enumerate() {
            if std::mem::replace(&mut taken[key], true) {
                return None;
            }
            // Query `row` sees keys up to `past + row`, `window` of them.
            let first = at.saturating_sub(past);
            let end = window.map_or(span.queries.len(), |window| {
                (at + window).saturating_sub(past).min(span.queries.len())
            });
            if first < end {
                all[key] = [first, end].map(|row| (span.queries.start + row) as u32);
            }
        }
    }
    Some(all)
}

/// Attention with its gradients, without a soft cap. The caller has checked that the shapes agree.
pub(crate) fn causal_attention(
    q: &Var,
    k: &Var,
    v: &Var,
    spans: &[Span],
    config: AttentionConfig,
) -> Option<Var> {
    let (rows, keys) = (q.value().rows(), k.value().rows());
    let (heads, dim) = (config.num_heads, config.head_dim);
    let device = device_of(&[q.value(), k.value(), v.value()], &[2 * rows * heads])?;
    let seeing = queries_seeing(spans, config.window, keys)?;
    if dim > LARGEST_DIM || config.softcap.is_some() {
        return None;
    }
    let parameters = move |rows: usize| {
        let sizes = [rows, heads, config.num_key_value_heads, dim].map(|size| size as u32);
        let [rows, heads, key_heads, dim] = sizes;
        [rows, heads, key_heads, dim, bits(config.scale)]
    };
    let grid = |rows: usize, heads: usize| {
        let [width, height, _] = device.spread(rows);
        [width, height, heads as u32]
    };
    let (query_grid, key_grid) = (grid(rows, heads), grid(keys, config.num_key_value_heads));
    let [queries, key_rows, values] = [q, k, v].map(|var| device.holding(var.value()));
    let seen = keys_seen(spans, config.window);
    let seen = DeviceBuffer::upload(&device, seen.as_flattened());
    let [out, log_sums] = device.compute(
        &ATTENTION,
        &parameters(rows),
        &[&queries, &key_rows, &values, &seen],
        [rows * heads * dim, rows * heads],
        query_grid,
    );
    let shapes = [q, k, v].map(|var| var.value().shape().to_vec());
    let value = out.clone().tensor(q.value().shape());
    Some(Var::computed(value, &[q, k, v], move |gradient, parents| {
        let _part = crate::profile::part("attention backward");
        let gradient = device.holding(&gradient);
        let inputs = [&out, &log_sums, &gradient];
        let [known] =
            device.compute(&KNOWN, &parameters(rows), &inputs, [2 * rows * heads], query_grid);
        let [query_shape, key_shape, value_shape] = shapes;
        if parents.needs(0) {
            let inputs = [&queries, &key_rows, &values, &seen, &gradient, &known];
            let [dq] = device.compute(
                &QUERIES_BACKWARD,
                &parameters(rows),
                &inputs,
                [rows * heads * dim],
                query_grid,
            );
            parents.add(0, dq.tensor(query_shape));
        }
        if parents.needs(1) || parents.needs(2) {
            let seeing = DeviceBuffer::upload(&device, seeing.as_flattened());
            let inputs = [&queries, &key_rows, &values, &seeing, &gradient, &known];
            let len = keys * config.num_key_value_heads * dim;
            let [dk, dv] =
                device.compute(&KEYS_BACKWARD, &parameters(keys), &inputs, [len, len], key_grid);
            parents.add(1, dk.tensor(key_shape));
            parents.add(2, dv.tensor(value_shape));
        }
    }))
}
