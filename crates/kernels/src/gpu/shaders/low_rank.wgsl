// Gates, and what they weigh.

struct Parameters {
    tokens: u32,
    experts: u32,
    // Columns of z an expert reads, and all of them.
    rank: u32,
    z_cols: u32,
    // The gate of every expert where there is no router.
    constant: f32,
    routed: u32,
}

@group(0) @binding(0) var<uniform> p: Parameters;
@group(0) @binding(1) var<storage, read> a: array<f32>;
@group(0) @binding(2) var<storage, read> b: array<f32>;
@group(0) @binding(8) var<storage, read_write> out: array<f32>;

// The softmax of every row of the scores a, the biases b added if there are any.
@compute @workgroup_size(256)
fn gates(here: Invocation) {
    let token = element(here);
    if token >= p.tokens {
        return;
    }
    let first = token * p.experts;
    var peak = -3.4e38;
    for (var e = 0u; e < p.experts; e++) {
        var score = a[first + e];
        if p.routed != 0u {
            score += b[e];
        }
        out[first + e] = score;
        peak = max(peak, score);
    }
    var sum = 0.0;
    for (var e = 0u; e < p.experts; e++) {
        let value = exp(out[first + e] - peak);
        out[first + e] = value;
        sum += value;
    }
    for (var e = 0u; e < p.experts; e++) {
        out[first + e] = out[first + e] / sum;
    }
}

// Through that softmax: a is the gradient of the gates b.
@compute @workgroup_size(256)
fn gates_backward(here: Invocation) {
    let token = element(here);
    if token >= p.tokens {
        return;
    }
    let first = token * p.experts;
    var mean = 0.0;
    for (var e = 0u; e < p.experts; e++) {
        mean += a[first + e] * b[first + e];
    }
    for (var e = 0u; e < p.experts; e++) {
        out[first + e] = b[first + e] * (a[first + e] - mean);
    }
}

fn z_start(expert: u32) -> u32 {
    return select(expert * p.rank, 0u, p.z_cols == p.rank);
}

// (w_1 z, …, w_N z) of z = a and w = b.
@compute @workgroup_size(256)
fn mix(here: Invocation) {
    let i = element(here);
    let cols = p.experts * p.rank;
    if i >= p.tokens * cols {
        return;
    }
    let token = i / cols;
    let expert = i % cols / p.rank;
    var gate = p.constant;
    if p.routed != 0u {
        gate = b[token * p.experts + expert];
    }
    out[i] = gate * a[token * p.z_cols + z_start(expert) + i % p.rank];
}

// The gradient of z from that of the mixture, a, and the gates b.
@compute @workgroup_size(256)
fn mix_backward(here: Invocation) {
    let i = element(here);
    if i >= p.tokens * p.z_cols {
        return;
    }
    let token = i / p.z_cols;
    let col = i % p.z_cols;
    var first = 0u;
    var end = p.experts;
    if p.z_cols != p.rank {
        first = col / p.rank;
        end = first + 1u;
    }
    var sum = 0.0;
    for (var expert = first; expert < end; expert++) {
        var gate = p.constant;
        if p.routed != 0u {
            gate = b[token * p.experts + expert];
        }
        sum += gate * a[(token * p.experts + expert) * p.rank + col % p.rank];
    }
    out[i] = sum;
}

// The gradient of the gates from that of the mixture, a, and z = b.
@compute @workgroup_size(256)
fn mix_backward_gates(here: Invocation) {
    let i = element(here);
    if i >= p.tokens * p.experts {
        return;
    }
    let z = i / p.experts * p.z_cols + z_start(i % p.experts);
    var sum = 0.0;
    for (var j = 0u; j < p.rank; j++) {
        sum += a[i * p.rank + j] * b[z + j];
    }
    out[i] = sum;
}
