// Causal attention of packed sequences with grouped heads. A workgroup has one query and head (or,
// for the gradients of keys and values, one key and its head) and takes the keys (the queries) 64 at
// a time, so nothing grows with the square of the length.

struct Parameters {
    // Query rows, or key rows for the gradients of keys and values.
    rows: u32,
    heads: u32,
    key_heads: u32,
    dim: u32,
    scale: f32,
}

@group(0) @binding(0) var<uniform> p: Parameters;
@group(0) @binding(1) var<storage, read> queries: array<f32>;
@group(0) @binding(2) var<storage, read> keys: array<f32>;
@group(0) @binding(3) var<storage, read> values: array<f32>;
// Of every query the keys it sees, or of every key the queries that see it: first and end.
@group(0) @binding(4) var<storage, read> seen: array<vec2<u32>>;
@group(0) @binding(5) var<storage, read> gradient: array<f32>;
// Of every query and head: the log-sum-exp of its scores, and Σ output · gradient.
@group(0) @binding(6) var<storage, read> known: array<vec2<f32>>;
@group(0) @binding(1) var<storage, read> output: array<f32>;
@group(0) @binding(2) var<storage, read> log_sums: array<f32>;
@group(0) @binding(3) var<storage, read> output_gradient: array<f32>;
@group(0) @binding(8) var<storage, read_write> out: array<f32>;
@group(0) @binding(9) var<storage, read_write> out_b: array<f32>;
@group(0) @binding(8) var<storage, read_write> out_known: array<vec2<f32>>;

const GROUP = 64u;
const LOWEST = -3.0e38;
const LARGEST_DIM = 256u;

var<workgroup> own: array<f32, LARGEST_DIM>;
var<workgroup> own_b: array<f32, LARGEST_DIM>;
var<workgroup> weights: array<f32, 64>;
var<workgroup> weights_b: array<f32, 64>;
@compute @workgroup_size(64)
fn attention(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) index: u32,
) {
    let row = group.y * groups.x + group.x;
    if row >= p.rows {
        return;
    }
    let head = group.z;
    let first = (row * p.heads + head) * p.dim;
    let key_width = p.key_heads * p.dim;
    let key_start = head / (p.heads / p.key_heads) * p.dim;
    for (var d = index; d < p.dim; d += 64u) {
        own[d] = queries[first + d];
    }
    workgroupBarrier();
    let range = seen[row];
    var peak = LOWEST;
    var total = 0.0;
    var sums: array<f32, 4>;
    for (var tile = range.x; tile < range.y; tile += 64u) {
        let key = tile + index;
        var score = LOWEST;
        if key < range.y {
            let at = key * key_width + key_start;
            score = 0.0;
            for (var d = 0u; d < p.dim; d++) {
                score += own[d] * keys[at + d];
            }
            score *= p.scale;
        }
        let higher = max(peak, max_of_group(index, score));
        let shrink = exp(peak - higher);
        var weight = 0.0;
        if key < range.y {
            weight = exp(score - higher);
        }
        weights[index] = weight;
        total = total * shrink + sum_of_group(index, weight);
        peak = higher;
        let count = min(64u, range.y - tile);
        for (var i = 0u; i < 4u; i++) {
            let d = index + 64u * i;
            if d < p.dim {
                var sum = sums[i] * shrink;
                for (var j = 0u; j < count; j++) {
                    sum += weights[j] * values[(tile + j) * key_width + key_start + d];
                }
                sums[i] = sum;
            }
        }
        workgroupBarrier();
    }
    for (var i = 0u; i < 4u; i++) {
        let d = index + 64u * i;
        if d < p.dim {
            out[first + d] = sums[i] / total;
        }
    }
    if index == 0u {
        out_b[row * p.heads + head] = peak + log(total);
    }
}

@compute @workgroup_size(64)
fn attention_known(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) index: u32,
) {
    let row = group.y * groups.x + group.x;
    if row >= p.rows {
        return;
    }
    let at = row * p.heads + group.z;
    var along = 0.0;
    for (var d = index; d < p.dim; d += 64u) {
        along += output[at * p.dim + d] * output_gradient[at * p.dim + d];
    }
    let sum = sum_of_group(index, along);
    if index == 0u {
        out_known[at] = vec2<f32>(log_sums[at], sum);
    }
}

@compute @workgroup_size(64)
fn attention_queries_backward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) index: u32,
) {
    let row = group.y * groups.x + group.x;
    if row >= p.rows {
        return;
    }
    let head = group.z;
    let first = (row * p.heads + head) * p.dim;
    let key_width = p.key_heads * p.dim;
    let key_start = head / (p.heads / p.key_heads) * p.dim;
    for (var d = index; d < p.dim; d += 64u) {
        own[d] = queries[first + d];
        own_b[d] = gradient[first + d];
    }
    workgroupBarrier();
    let range = seen[row];
    let of_row = known[row * p.heads + head];
    var sums: array<f32, 4>;
    for (var tile = range.x; tile < range.y; tile += 64u) {
        let key = tile + index;
        if key < range.y {
            let at = key * key_width + key_start;
            var score = 0.0;
            var wanted = 0.0;
            for (var d = 0u; d < p.dim; d++) {
                score += own[d] * keys[at + d];
                wanted += own_b[d] * values[at + d];
            }
            weights[index] = exp(p.scale * score - of_row.x) * (wanted - of_row.y);
        }
        workgroupBarrier();
        let count = min(64u, range.y - tile);
        for (var i = 0u; i < 4u; i++) {
            let d = index + 64u * i;
            if d < p.dim {
                var sum = sums[i];
                for (var j = 0u; j < count; j++) {
                    sum += weights[j] * keys[(tile + j) * key_width + key_start + d];
                }
                sums[i] = sum;
            }
        }
        workgroupBarrier();
    }
    for (var i = 0u; i < 4u; i++) {
        let d = index + 64u * i;
        if d < p.dim {
            out[first + d] = p.scale * sums[i];
        }
    }
}

@compute @workgroup_size(64)
fn attention_keys_backward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) index: u32,
) {
    let row = group.y * groups.x + group.x;
    if row >= p.rows {
        return;
    }
    let first = (row * p.key_heads + group.z) * p.dim;
    let width = p.heads * p.dim;
    let heads_of_key = p.heads / p.key_heads;
    for (var d = index; d < p.dim; d += 64u) {
        own[d] = keys[first + d];
        own_b[d] = values[first + d];
    }
    workgroupBarrier();
    let range = seen[row];
    var sums: array<f32, 4>;
    var sums_b: array<f32, 4>;
    for (var of_key = 0u; of_key < heads_of_key; of_key++) {
        let head = group.z * heads_of_key + of_key;
        for (var tile = range.x; tile < range.y; tile += 64u) {
            let query = tile + index;
            if query < range.y {
                let at = query * width + head * p.dim;
                let of_query = known[query * p.heads + head];
                var score = 0.0;
                var wanted = 0.0;
                for (var d = 0u; d < p.dim; d++) {
                    score += own[d] * queries[at + d];
                    wanted += own_b[d] * gradient[at + d];
                }
                let weight = exp(p.scale * score - of_query.x);
                weights[index] = weight * (wanted - of_query.y);
                weights_b[index] = weight;
            }
            workgroupBarrier();
            let count = min(64u, range.y - tile);
            for (var i = 0u; i < 4u; i++) {
                let d = index + 64u * i;
                if d < p.dim {
                    var sum = sums[i];
                    var sum_b = sums_b[i];
                    for (var j = 0u; j < count; j++) {
                        let at = (tile + j) * width + head * p.dim + d;
                        sum += weights[j] * queries[at];
                        sum_b += weights_b[j] * gradient[at];
                    }
                    sums[i] = sum;
                    sums_b[i] = sum_b;
                }
            }
            workgroupBarrier();
        }
    }
    for (var i = 0u; i < 4u; i++) {
        let d = index + 64u * i;
        if d < p.dim {
            out[first + d] = p.scale * sums[i];
            out_b[first + d] = sums_b[i];
        }
    }
}
