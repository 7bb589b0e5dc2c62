//! A frozen linear layer and its updates in one pass over the rows, in `f32`.
//!
//! A block of rows is multiplied by `[A; W_g]`, gated, and then by `W₀` and the heads together: the
//! heads are `N·r` more steps of the base product's inner loop, and the result is written once.
//! Where a block holds rows of several updates, each runs with its own heads through one panel of
//! `W₀` before any runs through the next, so that `W₀` is read once for all of them.

use super::softmax::softmax;
use super::{
    AdaptedLayer, AdaptedOutput, LowRank, Output, Parent, Parents, Plan, Route, backward, is_plain,
};
use crate::buffer::Buffer;
use crate::dense;
use crate::element::DType;
use crate::graph::Var;
use crate::matmul::Write;
use crate::ops::frozen_linear::FrozenLinear;
use crate::simd::add_scaled;
use crate::tensor::Tensor;
use crate::tile::{Left, Right, Segment, multiply, panel_width};
use hydralora_runtime::{each_mut, for_each};
use std::ops::Range;

/// Whether this kernel can compute `layer`.
pub(super) fn can(x: &Var, layer: &AdaptedLayer<'_>, plans: &[Plan]) -> bool {
    is_plain(x, layer, plans) && !dense::are_few(x.value().rows())
}

/// Applies a layer with one update of all rows.
pub(super) fn adapted(x: &Var, frozen: &FrozenLinear, update: &LowRank<'_>, plan: Plan) -> Output {
    let _part = crate::profile::part("adapted_linear");
    let (y, mut low_rank) = forward(x.value(), frozen, &[(0..plan.tokens, &plan)]);
    let Inner { z, gates } = low_rank.remove(0);
    let none = Var::constant(Tensor::empty(DType::F32));
    let parents = Parent::all(x, None, update, &none);
    let kept =
        backward::Kept { frozen: frozen.clone(), plan, x: x.save(), z, gates: gates.clone() };
    let y = Var::computed(y, &parents, move |dy, parents| {
        let _part = crate::profile::part("adapted_linear backward");
        kept.backward(&dy, Parents(parents));
    });
    Output { y, gates }
}

/// Applies a layer with an update for each of several ranges of rows, without a graph.
pub(super) fn by_rows(x: &Var, layer: &AdaptedLayer<'_>, plans: &[Plan]) -> AdaptedOutput {
    let _part = crate::profile::part("adapted_linear");
    let ranges = layer.updates.iter().map(|(range, _)| range.clone());
    let updates: Vec<_> = ranges.zip(plans).collect();
    let (y, low_rank) = forward(x.value(), layer.frozen, &updates);
    let gates = low_rank.into_iter().map(|inner| inner.gates).collect();
    AdaptedOutput { y: Var::constant(y), gates }
}

/// What an update computes on the way to its heads.
struct Inner {
    /// `[T, z_cols]`.
    z: Tensor,
    /// `[T, N]`, if gates differ by token.
    gates: Option<Tensor>,
}

/// `y: [T, out]`, and what each update computed on the way.
fn forward(
    x: &Tensor,
    frozen: &FrozenLinear,
    updates: &[(Range<usize>, &Plan)],
) -> (Tensor, Vec<Inner>) {
    let (tokens, inputs, outputs) = (x.rows(), frozen.in_features(), frozen.out_features());
    crate::profile::product(tokens, inputs, outputs);
    let weight = frozen.dense_f32();
    let packed_weight = dense::packed_transpose(&weight, inputs);
    let packed: Vec<Packed<'_>> =
        updates.iter().map(|(rows, plan)| Packed::new(rows.clone(), plan)).collect();
    let layer = Base {
        x: x.data::<f32>(),
        inputs,
        outputs,
        weight: Right::packed(&packed_weight, inputs),
        bias: frozen.bias().map(|bias| bias.data::<f32>()),
    };

    let mut y = Buffer::scratch(tokens * outputs);
    let rooms = |cols: fn(&Plan) -> usize| -> Vec<Buffer<f32>> {
        updates.iter().map(|(_, plan)| Buffer::scratch(plan.tokens * cols(plan))).collect()
    };
    let (mut z, mut gates) = (rooms(|plan| plan.z_cols), rooms(Plan::gate_cols));
    let blocks = dense::blocks(tokens);
    let mut rest: Vec<[&mut [f32]; 2]> =
        z.iter_mut().zip(&mut gates).map(|(z, gates)| [&mut z[..], &mut gates[..]]).collect();
    let mut tasks: Vec<Task<'_>> = (dense::cut(&mut y, outputs, &blocks).into_iter().zip(&blocks))
        .map(|(y, block)| Task { first: block.start, y, pieces: pieces(block, &packed, &mut rest) })
        .collect();
    for_each(each_mut(&mut tasks), |_, task| task.run(&layer));
    drop(tasks);

    let inner = (updates.iter().zip(z.into_iter().zip(gates)))
        .map(|((_, plan), (z, gates))| {
            let gates = plan.routed().then(|| Tensor::new(gates, [plan.tokens, plan.experts]));
            Inner { z: Tensor::new(z, [plan.tokens, plan.z_cols]), gates }
        })
        .collect();
    (Tensor::new(y, [tokens, outputs]), inner)
}

/// The frozen layer and its input.
struct Base<'a> {
    x: &'a [f32],
    inputs: usize,
    outputs: usize,
    weight: Right<'a>,
    bias: Option<&'a [f32]>,
}

impl Base<'_> {
    fn rows(&self, rows: &Range<usize>) -> &[f32] {
        &self.x[rows.start * self.inputs..rows.end * self.inputs]
    }
}

/// An update with its matrices as [`multiply`] reads them.
struct Packed<'a> {
    rows: Range<usize>,
    plan: &'a Plan,
    /// `[A; W_g]`.
    down: Buffer<f32>,
    /// `W_g` by itself where the input of `A` is dropped.
    router: Option<Buffer<f32>>,
    /// The heads.
    up: Buffer<f32>,
}

impl<'a> Packed<'a> {
    fn new(rows: Range<usize>, plan: &'a Plan) -> Self {
        crate::profile::product(plan.tokens, plan.inputs, plan.zs_cols());
        crate::profile::product(plan.tokens, plan.h_cols(), plan.outputs);
        let stacked = plan.stacked();
        let down = dense::packed_transpose(&stacked, plan.inputs);
        let router = plan
            .shared_mask()
            .map(|_| dense::packed_transpose(&stacked[plan.a.len()..], plan.inputs));
        let up = dense::packed_transpose(plan.b.data::<f32>(), plan.h_cols());
        Self { rows, plan, down, router, up }
    }

    /// Computes `z`, gates and `h` of some rows of the input: `x: [rows, in]`, the first of them row
    /// `first` of those that get this update.
    fn mixed(&self, first: usize, x: &[f32], z: &mut [f32], gates: &mut [f32]) -> Buffer<f32> {
        let plan = self.plan;
        let (inputs, zs_cols) = (plan.inputs, plan.zs_cols());
        let count = x.len() / inputs;
        let mut zs = Buffer::<f32>::scratch(count * zs_cols);
        let down = |x: &[f32], right: &[f32], cols: usize, out: &mut [f32]| {
            let (left, right) = (Left::rows(x, inputs), Right::packed(right, inputs));
            let segment = Segment { left, right, depth: inputs };
            multiply(&[segment], count, cols, out, zs_cols, Write::Set);
        };
        // The scores are computed from the input as it is, `z` from what dropout leaves of it.
        match (plan.dropped(first, x), &self.router) {
            (Some(dropped), Some(router)) => {
                down(&dropped, &self.down, plan.z_cols, &mut zs);
                if plan.s_cols() > 0 {
                    down(x, router, plan.s_cols(), &mut zs[plan.z_cols..]);
                }
            }
            _ => down(x, &self.down, zs_cols, &mut zs),
        }
        plan.gate(first, &zs, z, gates);
        let mut h = Buffer::scratch(count * plan.h_cols());
        plan.mix(plan.scale as f32, z, gates, &mut h);
        h
    }
}

/// Consecutive rows of a block with one update or none.
struct Piece<'a> {
    rows: Range<usize>,
    update: Option<Updated<'a>>,
}

/// The update of a piece, and where its results go.
struct Updated<'a> {
    packed: &'a Packed<'a>,
    z: &'a mut [f32],
    gates: &'a mut [f32],
}

impl<'a> Piece<'a> {
    /// Computes what the update needs before its heads.
    fn mixed(self, base: &Base<'_>) -> Mixed<'a> {
        let Self { rows, update } = self;
        let heads = update.map(|Updated { packed, z, gates }| {
            let first = rows.start - packed.rows.start;
            Heads { packed, h: packed.mixed(first, base.rows(&rows), z, gates) }
        });
        Mixed { rows, heads }
    }
}

/// A piece whose update is computed up to its heads.
struct Mixed<'a> {
    rows: Range<usize>,
    heads: Option<Heads<'a>>,
}

/// An update's heads and `h: [rows, N·r]`.
struct Heads<'a> {
    packed: &'a Packed<'a>,
    h: Buffer<f32>,
}

/// Cuts a block where updates begin and end. Takes the room for their results from the start of
/// `rest`, so blocks have to come in order.
fn pieces<'a>(
    block: &Range<usize>,
    packed: &'a [Packed<'a>],
    rest: &mut [[&'a mut [f32]; 2]],
) -> Vec<Piece<'a>> {
    let (mut pieces, mut free) = (Vec::new(), block.start);
    for (packed, [z, gates]) in packed.iter().zip(rest) {
        let rows = packed.rows.start.max(block.start)..packed.rows.end.min(block.end);
        if rows.is_empty() {
            continue;
        }
        if free < rows.start {
            pieces.push(Piece { rows: free..rows.start, update: None });
        }
        free = rows.end;
        let z = take_first(z, rows.len() * packed.plan.z_cols);
        let gates = take_first(gates, rows.len() * packed.plan.gate_cols());
        pieces.push(Piece { rows, update: Some(Updated { packed, z, gates }) });
    }
    if free < block.end {
        pieces.push(Piece { rows: free..block.end, update: None });
    }
    pieces
}

/// Splits the first `count` elements off `rest`.
fn take_first<'a>(rest: &mut &'a mut [f32], count: usize) -> &'a mut [f32] {
    let (first, after) = std::mem::take(rest).split_at_mut(count);
    *rest = after;
    first
}

/// A block of rows.
struct Task<'a> {
    /// The first row.
    first: usize,
    /// `[rows, out]`.
    y: &'a mut [f32],
    pieces: Vec<Piece<'a>>,
}

impl Task<'_> {
    fn run(&mut self, base: &Base<'_>) {
        let (first, y, pieces) = (self.first, &mut *self.y, std::mem::take(&mut self.pieces));
        let (inputs, outputs) = (base.inputs, base.outputs);
        // One piece runs through all panels of the weight by itself.
        let step = if pieces.len() == 1 { outputs } else { panel_width() };
        let mixed: Vec<Mixed<'_>> = pieces.into_iter().map(|piece| piece.mixed(base)).collect();
        for column in (0..outputs).step_by(step.max(1)) {
            let cols = step.min(outputs - column);
            for Mixed { rows, heads } in &mixed {
                let left = Left::rows(base.rows(rows), inputs);
                let right = from_column(base.weight, column);
                let base = Segment { left, right, depth: inputs };
                let out = &mut y[(rows.start - first) * outputs + column..];
                let mut product = |segments: &[Segment<'_>]| {
                    multiply(segments, rows.len(), cols, out, outputs, Write::Set);
                };
                match heads {
                    None => product(&[base]),
                    Some(Heads { packed, h }) => {
                        let depth = packed.plan.h_cols();
                        let right = from_column(Right::packed(&packed.up, depth), column);
                        product(&[base, Segment { left: Left::rows(h, depth), right, depth }]);
                    }
                }
            }
        }
        if let Some(bias) = base.bias {
            y.chunks_exact_mut(outputs).for_each(|y| add_scaled(1.0, bias, y));
        }
    }
}

/// The right-hand side without the panels before `column`, where one begins.
fn from_column(right: Right<'_>, column: usize) -> Right<'_> {
    Right { data: &right.data[column / panel_width() * right.panel_stride..], ..right }
}

impl Plan {
    /// Columns of the router's scores that are computed from the input together with `z`.
    pub(super) fn s_cols(&self) -> usize {
        if matches!(self.route, Route::Input(_)) { self.experts } else { 0 }
    }

    /// Columns of `z` and of scores from the input, side by side.
    pub(super) fn zs_cols(&self) -> usize {
        self.z_cols + self.s_cols()
    }

    /// `[A; W_g]`, or `A` alone when the router reads something else: `[zs_cols, in]`.
    pub(super) fn stacked(&self) -> Buffer<f32> {
        let mut out = Buffer::scratch(self.zs_cols() * self.inputs);
        out[..self.a.len()].copy_from_slice(self.a.data::<f32>());
        if let Route::Input(router) = &self.route {
            out[self.a.len()..].copy_from_slice(router.weight.data::<f32>());
        }
        out
    }

    /// The shared mask applied to `x: [rows, in]`, whose first row is row `first` of the update's.
    pub(super) fn dropped(&self, first: usize, x: &[f32]) -> Option<Buffer<f32>> {
        let dropout = self.shared_mask()?;
        let mut out = Buffer::scratch(x.len());
        out.copy_from_slice(x);
        dropout.apply_at(&mut out, first * self.inputs);
        Some(out)
    }

    /// Takes `z` and the scores of rows from `first` on apart and turns scores into gates.
    pub(super) fn gate(&self, first: usize, zs: &[f32], z: &mut [f32], gates: &mut [f32]) {
        let zs_cols = self.zs_cols();
        for (z, zs) in z.chunks_exact_mut(self.z_cols).zip(zs.chunks_exact(zs_cols)) {
            z.copy_from_slice(&zs[..self.z_cols]);
        }
        let router = match &self.route {
            Route::Constant(_) => return,
            Route::Given(given) => {
                let given = &given.data::<f32>()[first * self.experts..];
                gates.copy_from_slice(&given[..gates.len()]);
                return;
            }
            Route::Input(router) => {
                for (w, zs) in gates.chunks_exact_mut(self.experts).zip(zs.chunks_exact(zs_cols)) {
                    w.copy_from_slice(&zs[self.z_cols..]);
                }
                router
            }
            Route::LowRank(router) => {
                let weight = router.weight.data::<f32>();
                for (w, z) in gates.chunks_exact_mut(self.experts).zip(z.chunks_exact(self.z_cols))
                {
                    for (w, row) in w.iter_mut().zip(weight.chunks_exact(self.z_cols)) {
                        *w = row.iter().zip(z).map(|(a, b)| a * b).sum();
                    }
                }
                router
            }
        };
        let bias = router.bias.as_ref().map(|bias| bias.data::<f32>());
        softmax(gates, bias, self.experts);
    }
}
