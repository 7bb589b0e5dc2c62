// Where an invocation stands. Kernels with barriers take these apart: what comes out of a structure
// does not count as the same for a whole workgroup.

struct Invocation {
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) index: u32,
}

// Of kernels with one invocation an element, 256 a workgroup, workgroups counted along two dimensions.
fn element(here: Invocation) -> u32 {
    return (here.group.y * here.groups.x + here.group.x) * 256u + here.index;
}
