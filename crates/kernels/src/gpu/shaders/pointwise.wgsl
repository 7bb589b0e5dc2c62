// Element by element.

struct Parameters {
    len: u32,
    // Extent of the last dimension, and of a head in it.
    cols: u32,
    head: u32,
    factor: f32,
    // Of a dropout mask.
    seed_low: u32,
    seed_high: u32,
    threshold: u32,
}

@group(0) @binding(0) var<uniform> p: Parameters;
@group(0) @binding(1) var<storage, read> a: array<f32>;
@group(0) @binding(2) var<storage, read> b: array<f32>;
@group(0) @binding(3) var<storage, read> c: array<f32>;
@group(0) @binding(8) var<storage, read_write> out: array<f32>;
@group(0) @binding(9) var<storage, read_write> out_b: array<f32>;

// a + b
@compute @workgroup_size(256)
fn add(here: Invocation) {
    let i = element(here);
    if i < p.len {
        out[i] = a[i] + b[i];
    }
}

// a · factor
@compute @workgroup_size(256)
fn scale(here: Invocation) {
    let i = element(here);
    if i < p.len {
        out[i] = a[i] * p.factor;
    }
}

// a + b by column
@compute @workgroup_size(256)
fn add_columns(here: Invocation) {
    let i = element(here);
    if i < p.len {
        out[i] = a[i] + b[i % p.cols];
    }
}

// a · b by column
@compute @workgroup_size(256)
fn times_columns(here: Invocation) {
    let i = element(here);
    if i < p.len {
        out[i] = a[i] * b[i % p.cols];
    }
}

fn sigmoid(x: f32) -> f32 {
    // Of a smaller x it is no normal number, and e^-x would become infinite.
    return 1.0 / (1.0 + exp(-max(x, -87.0)));
}

// silu(a) · b
@compute @workgroup_size(256)
fn swiglu(here: Invocation) {
    let i = element(here);
    if i < p.len {
        out[i] = a[i] * sigmoid(a[i]) * b[i];
    }
}

// Gradients of a and b, c being that of the result.
@compute @workgroup_size(256)
fn swiglu_backward(here: Invocation) {
    let i = element(here);
    if i < p.len {
        let s = sigmoid(a[i]);
        out[i] = c[i] * b[i] * s * (1.0 + a[i] * (1.0 - s));
        out_b[i] = c[i] * a[i] * s;
    }
}

// Rotates every head of a by factor · the angles in b: cosines, then sines.
@compute @workgroup_size(256)
fn rope(here: Invocation) {
    let i = element(here);
    if i >= p.len {
        return;
    }
    let half = p.head / 2u;
    let angles = i / p.cols * p.head;
    let at = i % p.cols % p.head;
    if at < half {
        out[i] = a[i] * b[angles + at] - a[i + half] * p.factor * b[angles + half + at];
    } else {
        out[i] = a[i] * b[angles + at - half] + a[i - half] * p.factor * b[angles + at];
    }
}

// 64-bit numbers: low half, high half.

fn add_wide(x: vec2<u32>, y: vec2<u32>) -> vec2<u32> {
    let low = x.x + y.x;
    return vec2<u32>(low, x.y + y.y + select(0u, 1u, low < x.x));
}

fn multiply_wide(x: vec2<u32>, y: vec2<u32>) -> vec2<u32> {
    let x0 = x.x & 0xffffu;
    let x1 = x.x >> 16u;
    let y0 = y.x & 0xffffu;
    let y1 = y.x >> 16u;
    let low = x0 * y0;
    let middle = x1 * y0 + (low >> 16u);
    let rest = x0 * y1 + (middle & 0xffffu);
    let high = x1 * y1 + (middle >> 16u) + (rest >> 16u);
    return vec2<u32>(x.x * y.x, high + x.x * y.y + x.y * y.x);
}

// x ^ (x >> by), 0 < by < 32
fn xor_shifted(x: vec2<u32>, by: u32) -> vec2<u32> {
    return vec2<u32>(x.x ^ ((x.x >> by) | (x.y << (32u - by))), x.y ^ (x.y >> by));
}

// a under the mask that the CPU draws for the same seed.
@compute @workgroup_size(256)
fn dropout(here: Invocation) {
    let i = element(here);
    if i >= p.len {
        return;
    }
    var z = vec2<u32>(p.seed_low ^ i, p.seed_high);
    z = add_wide(z, vec2<u32>(0x7f4a7c15u, 0x9e3779b9u));
    z = multiply_wide(xor_shifted(z, 30u), vec2<u32>(0x1ce4e5b9u, 0xbf58476du));
    z = multiply_wide(xor_shifted(z, 27u), vec2<u32>(0x133111ebu, 0x94d049bbu));
    z = xor_shifted(z, 31u);
    out[i] = a[i] * select(p.factor, 0.0, z.y < p.threshold);
}
