// c (+)= scale · a b for strided a: [rows, inner], b: [inner, cols] and c with contiguous rows.
//
// A workgroup computes a 64 × 64 tile of c, each invocation 4 × 4 of it, from slices of a and b that
// are 16 deep and lie in workgroup memory.

struct Parameters {
    rows: u32,
    cols: u32,
    inner: u32,
    accumulate: u32,
    a_start: u32,
    a_row: u32,
    a_col: u32,
    b_start: u32,
    b_row: u32,
    b_col: u32,
    c_start: u32,
    c_row: u32,
    scale: f32,
}

@group(0) @binding(0) var<uniform> p: Parameters;
@group(0) @binding(1) var<storage, read> a: array<f32>;
@group(0) @binding(2) var<storage, read> b: array<f32>;
@group(0) @binding(8) var<storage, read_write> c: array<f32>;

const TILE = 64u;
const DEPTH = 16u;

var<workgroup> left: array<f32, 1024>;
var<workgroup> right: array<f32, 1024>;

@compute @workgroup_size(16, 16)
fn product(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_id) local: vec3<u32>,
    @builtin(local_invocation_index) index: u32,
) {
    let first_row = group.y * TILE;
    let first_col = group.x * TILE;
    var sums: array<vec4<f32>, 4>;
    for (var first = 0u; first < p.inner; first += DEPTH) {
        for (var i = index; i < TILE * DEPTH; i += 256u) {
            let row = first_row + i / DEPTH;
            let step = first + i % DEPTH;
            var value = 0.0;
            if row < p.rows && step < p.inner {
                value = a[p.a_start + row * p.a_row + step * p.a_col];
            }
            left[(i % DEPTH) * TILE + i / DEPTH] = value;
        }
        for (var i = index; i < TILE * DEPTH; i += 256u) {
            // Along the direction in which b is contiguous.
            var depth = i / TILE;
            var across = i % TILE;
            if p.b_row == 1u {
                depth = i % DEPTH;
                across = i / DEPTH;
            }
            let col = first_col + across;
            let step = first + depth;
            var value = 0.0;
            if col < p.cols && step < p.inner {
                value = b[p.b_start + step * p.b_row + col * p.b_col];
            }
            right[depth * TILE + across] = value;
        }
        workgroupBarrier();
        for (var step = 0u; step < DEPTH; step++) {
            let l = step * TILE + local.y * 4u;
            let r = step * TILE + local.x * 4u;
            let across = vec4<f32>(right[r], right[r + 1u], right[r + 2u], right[r + 3u]);
            sums[0] += left[l] * across;
            sums[1] += left[l + 1u] * across;
            sums[2] += left[l + 2u] * across;
            sums[3] += left[l + 3u] * across;
        }
        workgroupBarrier();
    }
    for (var i = 0u; i < 4u; i++) {
        let row = first_row + local.y * 4u + i;
        for (var j = 0u; j < 4u; j++) {
            let col = first_col + local.x * 4u + j;
            if row < p.rows && col < p.cols {
                let at = p.c_start + row * p.c_row + col;
                var value = p.scale * sums[i][j];
                if p.accumulate != 0u {
                    value += c[at];
                }
                c[at] = value;
            }
        }
    }
}
