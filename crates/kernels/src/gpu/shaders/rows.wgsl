// Whole rows: moved about, normalised, summed up.

struct Parameters {
    rows: u32,
    cols: u32,
    epsilon: f32,
    carries: u32,
}

@group(0) @binding(0) var<uniform> p: Parameters;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> weight: array<f32>;
@group(0) @binding(3) var<storage, read> gradient: array<f32>;
@group(0) @binding(4) var<storage, read> carried: array<f32>;
@group(0) @binding(2) var<storage, read> sources: array<u32>;
@group(0) @binding(2) var<storage, read> inverses: array<f32>;
@group(0) @binding(8) var<storage, read_write> out: array<f32>;

const GROUP = 64u;
const NONE = 0xffffffffu;

// Row i is row sources[i] of x, or zeros.
@compute @workgroup_size(256)
fn gather_rows(here: Invocation) {
    let i = element(here);
    if i >= p.rows * p.cols {
        return;
    }
    let source = sources[i / p.cols];
    var value = 0.0;
    if source != NONE {
        value = x[source * p.cols + i % p.cols];
    }
    out[i] = value;
}

fn inverse_rms(row: u32, index: u32) -> f32 {
    var squares = 0.0;
    for (var i = index; i < p.cols; i += 64u) {
        let value = x[row * p.cols + i];
        squares += value * value;
    }
    let mean = sum_of_group(index, squares) / f32(p.cols);
    return 1.0 / sqrt(mean + p.epsilon);
}

@compute @workgroup_size(64)
fn rms_norm(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) index: u32,
) {
    let row = group.y * groups.x + group.x;
    if row >= p.rows {
        return;
    }
    let inverse = inverse_rms(row, index);
    for (var i = index; i < p.cols; i += 64u) {
        out[row * p.cols + i] = x[row * p.cols + i] * inverse * weight[i];
    }
}

// One number a row, for the gradient of the weight.
@compute @workgroup_size(64)
fn inverse_rms_of_rows(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) index: u32,
) {
    let row = group.y * groups.x + group.x;
    if row >= p.rows {
        return;
    }
    let inverse = inverse_rms(row, index);
    if index == 0u {
        out[row] = inverse;
    }
}

@compute @workgroup_size(64)
fn rms_norm_backward(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) index: u32,
) {
    let row = group.y * groups.x + group.x;
    if row >= p.rows {
        return;
    }
    let first = row * p.cols;
    let inverse = inverse_rms(row, index);
    var products = 0.0;
    for (var i = index; i < p.cols; i += 64u) {
        products += gradient[first + i] * weight[i] * x[first + i] * inverse;
    }
    let mean = sum_of_group(index, products) / f32(p.cols);
    for (var i = index; i < p.cols; i += 64u) {
        let normed = x[first + i] * inverse;
        var value = (gradient[first + i] * weight[i] - normed * mean) * inverse;
        if p.carries != 0u {
            value += carried[first + i];
        }
        out[first + i] = value;
    }
}

@compute @workgroup_size(64)
fn rms_norm_weight_gradient(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) index: u32,
) {
    let col = group.x * 64u + index;
    if col >= p.cols {
        return;
    }
    var sum = 0.0;
    for (var row = 0u; row < p.rows; row++) {
        let at = row * p.cols + col;
        sum += gradient[at] * x[at] * inverses[row];
    }
    out[col] = sum;
}

@compute @workgroup_size(64)
fn column_sums(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) index: u32,
) {
    let col = group.x * 64u + index;
    if col >= p.cols {
        return;
    }
    var sum = 0.0;
    for (var row = 0u; row < p.rows; row++) {
        sum += x[row * p.cols + col];
    }
    out[col] = sum;
}
