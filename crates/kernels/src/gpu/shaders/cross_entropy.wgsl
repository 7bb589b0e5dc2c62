// One workgroup a row of logits: in their place factor · (softmax − onehot), and what the loss is
// made of.

struct Parameters {
    rows: u32,
    cols: u32,
    factor: f32,
}

@group(0) @binding(0) var<uniform> p: Parameters;
@group(0) @binding(1) var<storage, read> targets: array<u32>;
@group(0) @binding(8) var<storage, read_write> logits: array<f32>;
// Σ exp(logit − peak), and the wanted logit − peak.
@group(0) @binding(9) var<storage, read_write> found: array<vec2<f32>>;

const GROUP = 256u;

@compute @workgroup_size(256)
fn softmax_loss(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) index: u32,
) {
    let row = group.y * groups.x + group.x;
    if row >= p.rows {
        return;
    }
    let first = row * p.cols;
    var highest = -3.4e38;
    for (var i = index; i < p.cols; i += 256u) {
        highest = max(highest, logits[first + i]);
    }
    let peak = max_of_group(index, highest);
    let wanted = logits[first + targets[row]] - peak;
    workgroupBarrier();
    var sum = 0.0;
    for (var i = index; i < p.cols; i += 256u) {
        let value = exp(logits[first + i] - peak);
        logits[first + i] = value;
        sum += value;
    }
    let total = sum_of_group(index, sum);
    for (var i = index; i < p.cols; i += 256u) {
        var value = logits[first + i] * (p.factor / total);
        if i == targets[row] {
            value -= p.factor;
        }
        logits[first + i] = value;
    }
    if index == 0u {
        found[row] = vec2<f32>(total, wanted);
    }
}
