// Sums and maxima over the GROUP invocations of a workgroup, all of which have to take part.

var<workgroup> partial: array<f32, GROUP>;

fn sum_of_group(index: u32, value: f32) -> f32 {
    partial[index] = value;
    workgroupBarrier();
    for (var half = GROUP / 2u; half > 0u; half /= 2u) {
        if index < half {
            partial[index] += partial[index + half];
        }
        workgroupBarrier();
    }
    let sum = partial[0];
    workgroupBarrier();
    return sum;
}

fn max_of_group(index: u32, value: f32) -> f32 {
    partial[index] = value;
    workgroupBarrier();
    for (var half = GROUP / 2u; half > 0u; half /= 2u) {
        if index < half {
            partial[index] = max(partial[index], partial[index + half]);
        }
        workgroupBarrier();
    }
    let peak = partial[0];
    workgroupBarrier();
    return peak;
}
