//! A frozen linear layer and its low-rank update in one pass over the rows:
//!
//! ```text
//! y = x W₀ᵀ + b₀ + s · [B_1 … B_N] (w_1 z, …, w_N z)      z = A x',  w = softmax(W_g x + b_g)
//! ```
//!
//! A block of rows is multiplied by `[A; W_g]`, gated, and then by `W₀` and the heads together: the
//! heads are `N·r` more steps of the base product's inner loop, and the result is written once.
//! Backward the same holds for `dx = [dy | dz | ds] · [W₀; A; W_g]`, while the block of `dy` that
//! gives `dh = dy B` is still in cache. The sums over rows, `dB = dyᵀ h` and `[dA; dW_g] = [dz | ds]ᵀ x`,
//! follow by columns of the result, so that no thread holds a part of another's sum.
//!
//! Computed so in `f32`; in `f64`, and with a dropout mask of its own for every expert,
//! [`gated_low_rank`] on top of the frozen layer gives the same.

mod backward;
mod few;

pub use few::adapted_linears;

use crate::buffer::Buffer;
use crate::dense;
use crate::element::DType;
use crate::graph::Var;
use crate::matmul::Write;
use crate::ops::dropout::Dropout;
use crate::ops::frozen_linear::FrozenLinear;
use crate::ops::gated_low_rank::{Gate, LowRank, Mask, Output, gated_low_rank};
use crate::simd::vectorize;
use crate::tensor::Tensor;
use crate::tile::{Left, Right, Segment, multiply};
use rayon::prelude::*;
use std::ops::Range;

/// The layer `frozen` with the update `p`, applied to `x: [T, in]`.
///
/// # Panics
/// If the shapes of the tensors disagree.
pub fn adapted_linear(x: &Var, frozen: &FrozenLinear, p: &LowRank<'_>) -> Output {
    on_device!(low_rank::adapted_linear(x, frozen, p));
    if few::is_few(x, frozen, Some(p)) {
        return few::few(x, &[(frozen, Some(*p))]).remove(0);
    }
    let few = x.value().rows() < dense::FEWEST_ROWS;
    if x.value().dtype() != DType::F32 || own_masks(p) || few {
        return gated_low_rank(x, frozen.forward(x), p);
    }
    let _part = crate::profile::part("adapted_linear");
    let plan = Plan::new(x, frozen, p);
    let none = Var::constant(Tensor::empty(DType::F32));
    let (gate_weight, gate_bias, given) = match p.gate {
        Gate::Input { weight, bias } | Gate::LowRank { weight, bias } => (Some(weight), bias, None),
        Gate::Given(gates) => (None, None, Some(gates)),
        Gate::One | Gate::Uniform => (None, None, None),
    };
    let (y, z, gates) = plan.forward(x.value());
    let parents = [
        x,
        p.a,
        p.b,
        gate_weight.unwrap_or(&none),
        gate_bias.unwrap_or(&none),
        given.unwrap_or(&none),
    ];
    let (saved_x, saved_gates) = (x.save(), gates.clone());
    let y = Var::computed(y, &parents, move |dy, parents| {
        let _part = crate::profile::part("adapted_linear backward");
        plan.backward(&saved_x, &z, saved_gates.as_ref(), &dy, parents);
    });
    Output { y, gates }
}

/// Whether every expert drops inputs of its own.
fn own_masks(p: &LowRank<'_>) -> bool {
    p.num_experts > 1 && matches!(p.mask, Mask::PerExpert(_))
}

/// Where the gates come from, without the tensors' identities.
#[derive(Clone)]
enum Route {
    Constant(f32),
    Input { weight: Tensor, bias: Option<Tensor> },
    LowRank { weight: Tensor, bias: Option<Tensor> },
    Given(Tensor),
}

/// Extents and tensors of one call.
struct Plan {
    frozen: FrozenLinear,
    a: Tensor,
    b: Tensor,
    route: Route,
    scale: f32,
    mask: Option<Dropout>,
    inputs: usize,
    outputs: usize,
    experts: usize,
    /// Columns of `z` per expert.
    rank: usize,
    /// Columns of `z`: `rank`, or `experts · rank` when every expert has its own `A`.
    z_cols: usize,
    /// Columns of the router's scores that are computed from the input together with `z`.
    s_cols: usize,
}

/// The rows of one block and what lies beside them.
struct Rows<'a> {
    range: &'a Range<usize>,
    x: &'a [f32],
}

impl Plan {
    fn new(x: &Var, frozen: &FrozenLinear, p: &LowRank<'_>) -> Self {
        let (inputs, outputs, experts) =
            (frozen.in_features(), frozen.out_features(), p.num_experts);
        let (a, b) = (p.a.value().clone(), p.b.value().clone());
        assert!(experts > 0, "at least one expert");
        assert_eq!(x.value().cols(), inputs, "input has another width than the layer");
        assert_eq!(a.cols(), inputs, "A has another input width");
        assert_eq!(b.rows(), outputs, "B has another output width");
        assert_eq!(b.cols() % experts, 0, "B is a whole number of heads");
        let rank = b.cols() / experts;
        let z_cols = a.rows();
        assert!(z_cols == rank || z_cols == experts * rank, "A has {z_cols} rows for rank {rank}");
        let value = |bias: Option<&Var>| bias.map(|bias| bias.value().clone());
        let route = match p.gate {
            Gate::One => Route::Constant(1.0),
            Gate::Uniform => Route::Constant(1.0 / experts as f32),
            Gate::Input { weight, bias } => {
                assert_eq!(weight.value().shape(), [experts, inputs], "the router's shape");
                Route::Input { weight: weight.value().clone(), bias: value(bias) }
            }
            Gate::LowRank { weight, bias } => {
                assert_eq!(weight.value().shape(), [experts, z_cols], "the router's shape");
                Route::LowRank { weight: weight.value().clone(), bias: value(bias) }
            }
            Gate::Given(gates) => {
                assert_eq!(gates.value().shape(), [x.value().rows(), experts], "the gates' shape");
                Route::Given(gates.value().clone())
            }
        };
        let mask = match p.mask {
            Mask::None => None,
            Mask::Shared(dropout) | Mask::PerExpert(dropout) => {
                Some(dropout).filter(|dropout| dropout.probability > 0.0)
            }
        };
        let s_cols = if matches!(route, Route::Input { .. }) { experts } else { 0 };
        Self {
            frozen: frozen.clone(),
            a,
            b,
            route,
            scale: p.scale as f32,
            mask,
            inputs,
            outputs,
            experts,
            rank,
            z_cols,
            s_cols,
        }
    }

    fn h_cols(&self) -> usize {
        self.experts * self.rank
    }

    /// Columns of `z` and of scores from the input, side by side.
    fn zs_cols(&self) -> usize {
        self.z_cols + self.s_cols
    }

    fn z_start(&self, expert: usize) -> usize {
        if self.z_cols == self.rank { 0 } else { expert * self.rank }
    }

    fn routed(&self) -> bool {
        !matches!(self.route, Route::Constant(_))
    }

    /// The gate of every expert where none is computed or given.
    fn constant_gate(&self) -> f32 {
        match self.route {
            Route::Constant(weight) => weight,
            _ => 1.0,
        }
    }

    /// `[A; W_g]`, or `A` alone when the router reads something else: `[zs_cols, in]`.
    fn stacked(&self) -> Buffer<f32> {
        let mut out = Buffer::scratch(self.zs_cols() * self.inputs);
        out[..self.a.len()].copy_from_slice(self.a.data::<f32>());
        if let Route::Input { weight, .. } = &self.route {
            out[self.a.len()..].copy_from_slice(weight.data::<f32>());
        }
        out
    }

    /// The rows' input with dropout.
    fn dropped(&self, rows: &Rows<'_>) -> Option<Buffer<f32>> {
        let dropout = self.mask?;
        let mut out = Buffer::scratch(rows.x.len());
        out.copy_from_slice(rows.x);
        dropout.apply_at(&mut out, rows.range.start * self.inputs);
        Some(out)
    }

    fn forward(&self, x: &Tensor) -> (Tensor, Tensor, Option<Tensor>) {
        let tokens = x.rows();
        let (inputs, outputs, h_cols, zs_cols) =
            (self.inputs, self.outputs, self.h_cols(), self.zs_cols());
        crate::profile::product(tokens, inputs, outputs + zs_cols);
        crate::profile::product(tokens, h_cols, outputs);
        let weight = self.frozen.dense_f32();
        let packed_weight = dense::packed_transpose(&weight, inputs);
        let stacked = self.stacked();
        let packed_down = dense::packed_transpose(&stacked, inputs);
        // The scores are computed from the input as it is, `z` from what dropout leaves of it.
        let packed_router =
            self.mask.map(|_| dense::packed_transpose(&stacked[self.a.len()..], inputs));
        let packed_up = dense::packed_transpose(self.b.data::<f32>(), h_cols);
        let bias = self.frozen.bias().map(|bias| bias.data::<f32>());

        let x = x.data::<f32>();
        let mut y = Buffer::scratch(tokens * outputs);
        let mut z = Buffer::scratch(tokens * self.z_cols);
        let mut gates = Buffer::scratch(if self.routed() { tokens * self.experts } else { 0 });
        let blocks = dense::blocks(tokens);
        let gate_cols = if self.routed() { self.experts } else { 0 };
        dense::cut(&mut y, outputs, &blocks)
            .into_par_iter()
            .zip(dense::cut(&mut z, self.z_cols, &blocks))
            .zip(dense::cut(&mut gates, gate_cols, &blocks))
            .zip(&blocks)
            .for_each(|(((y, z), gates), block)| {
                let count = block.len();
                let rows = Rows { range: block, x: &x[block.start * inputs..block.end * inputs] };
                let mut zs = Buffer::<f32>::scratch(count * zs_cols);
                let down = |x: &[f32], right: &[f32], cols: usize, out: &mut [f32]| {
                    let left = Left::rows(x, inputs);
                    let right = Right::packed(right, inputs);
                    let segment = Segment { left, right, depth: inputs };
                    multiply(&[segment], count, cols, out, zs_cols, Write::Set);
                };
                match (self.dropped(&rows), &packed_router) {
                    (Some(dropped), Some(router)) => {
                        down(&dropped, &packed_down, self.z_cols, &mut zs);
                        if self.s_cols > 0 {
                            down(rows.x, router, self.s_cols, &mut zs[self.z_cols..]);
                        }
                    }
                    _ => down(rows.x, &packed_down, zs_cols, &mut zs),
                }
                self.gate(block, &zs, z, gates);
                let h = self.mixed(z, gates);
                let base = Segment {
                    left: Left::rows(rows.x, inputs),
                    right: Right::packed(&packed_weight, inputs),
                    depth: inputs,
                };
                let update = Segment {
                    left: Left::rows(&h, h_cols),
                    right: Right::packed(&packed_up, h_cols),
                    depth: h_cols,
                };
                multiply(&[base, update], count, outputs, y, outputs, Write::Set);
                if let Some(bias) = bias {
                    for y in y.chunks_exact_mut(outputs) {
                        crate::simd::add_scaled(1.0, bias, y);
                    }
                }
            });
        let gates = self.routed().then(|| Tensor::new(gates, [tokens, self.experts]));
        (Tensor::new(y, [tokens, outputs]), Tensor::new(z, [tokens, self.z_cols]), gates)
    }

    /// Takes `z` and the scores apart and turns scores into gates.
    fn gate(&self, block: &Range<usize>, zs: &[f32], z: &mut [f32], gates: &mut [f32]) {
        let zs_cols = self.zs_cols();
        for (z, zs) in z.chunks_exact_mut(self.z_cols).zip(zs.chunks_exact(zs_cols)) {
            z.copy_from_slice(&zs[..self.z_cols]);
        }
        let bias = match &self.route {
            Route::Constant(_) => return,
            Route::Given(given) => {
                let rows = block.start * self.experts..block.end * self.experts;
                gates.copy_from_slice(&given.data::<f32>()[rows]);
                return;
            }
            Route::Input { bias, .. } => {
                for (w, zs) in gates.chunks_exact_mut(self.experts).zip(zs.chunks_exact(zs_cols)) {
                    w.copy_from_slice(&zs[self.z_cols..]);
                }
                bias
            }
            Route::LowRank { weight, bias } => {
                let weight = weight.data::<f32>();
                for (w, z) in gates.chunks_exact_mut(self.experts).zip(z.chunks_exact(self.z_cols))
                {
                    for (w, row) in w.iter_mut().zip(weight.chunks_exact(self.z_cols)) {
                        *w = row.iter().zip(z).map(|(a, b)| a * b).sum();
                    }
                }
                bias
            }
        };
        let bias = bias.as_ref().map(|bias| bias.data::<f32>());
        vectorize(
            #[inline(always)]
            || {
                for w in gates.chunks_exact_mut(self.experts) {
                    if let Some(bias) = bias {
                        crate::simd::axpy(1.0, bias, w);
                    }
                    let peak = w.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
                    let mut sum = 0.0;
                    for w in w.iter_mut() {
                        *w = crate::element::Element::exp(*w - peak);
                        sum += *w;
                    }
                    for w in w.iter_mut() {
                        *w /= sum;
                    }
                }
            },
        );
    }

    /// `s · (w_1 z_1, …, w_N z_N)` row by row: `[rows, N·r]`.
    fn mixed(&self, z: &[f32], gates: &[f32]) -> Buffer<f32> {
        let mut h = Buffer::scratch(z.len() / self.z_cols * self.h_cols());
        self.mix(z, gates, &mut h);
        h
    }

    /// [`mixed`](Self::mixed) into `h`.
    fn mix(&self, z: &[f32], gates: &[f32], h: &mut [f32]) {
        let (h_cols, rank) = (self.h_cols(), self.rank);
        let constant = self.constant_gate();
        for (row, (h, z)) in h.chunks_exact_mut(h_cols).zip(z.chunks_exact(self.z_cols)).enumerate()
        {
            for (expert, h) in h.chunks_exact_mut(rank).enumerate() {
                let gate = gates.get(row * self.experts + expert).copied().unwrap_or(constant);
                let start = self.z_start(expert);
                for (h, &z) in h.iter_mut().zip(&z[start..start + rank]) {
                    *h = self.scale * gate * z;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check;

    const INPUTS: usize = 37;
    const OUTPUTS: usize = 51;
    const RANK: usize = 3;
    const TOKENS: usize = 250;

    fn frozen(bias: bool) -> FrozenLinear {
        use crate::ops::frozen_linear::FrozenWeight;
        let value = |i: usize| ((i * 37 + 11) % 101) as f32 / 50.0 - 1.0;
        let weight: Vec<f32> = (0..OUTPUTS * INPUTS).map(value).collect();
        let bias =
            bias.then(|| Tensor::new((0..OUTPUTS).map(value).collect::<Vec<_>>(), [OUTPUTS]));
        FrozenLinear::new(FrozenWeight::Dense(Tensor::new(weight, [OUTPUTS, INPUTS])), bias)
    }

    fn gate<'a>(kind: &str, v: &'a [Var]) -> Gate<'a> {
        match kind {
            "one" => Gate::One,
            "uniform" => Gate::Uniform,
            "input" => Gate::Input { weight: &v[3], bias: None },
            "input+bias" => Gate::Input { weight: &v[3], bias: Some(&v[4]) },
            "low-rank" => Gate::LowRank { weight: &v[3], bias: Some(&v[4]) },
            "given" => Gate::Given(&v[3]),
            other => panic!("{other}"),
        }
    }

    fn leaves(kind: &str, experts: usize, own_a: bool) -> Vec<Var> {
        let z_cols = if own_a { experts * RANK } else { RANK };
        let router = match kind {
            "low-rank" => [experts, z_cols],
            "given" => [TOKENS, experts],
            _ => [experts, INPUTS],
        };
        let shapes: [&[usize]; 5] =
            [&[TOKENS, INPUTS], &[z_cols, INPUTS], &[OUTPUTS, experts * RANK], &router, &[experts]];
        check::inputs(&shapes).iter().map(|v| Var::leaf(v.value().to_dtype(DType::F32))).collect()
    }

    fn close(what: &str, got: &Tensor, expected: &Tensor) {
        let (got, expected) = (got.to_f64(), expected.to_f64());
        let off: f64 = got.iter().zip(&expected).map(|(a, b)| (a - b).powi(2)).sum();
        let norm: f64 = expected.iter().map(|b| b * b).sum();
        assert!(off.sqrt() <= 1e-5 * norm.sqrt(), "{what}: {off} of {norm}");
    }

    #[test]
    fn one_pass_agrees_with_the_two_operations() {
        let dropout = Dropout { probability: 0.3, seed: 11 };
        for kind in ["one", "uniform", "input", "input+bias", "low-rank", "given"] {
            for (experts, own_a) in [(1, false), (3, false), (3, true)] {
                for mask in [Mask::None, Mask::Shared(dropout)] {
                    let what = format!("{kind} {experts} {own_a} {mask:?}");
                    let v = leaves(kind, experts, own_a);
                    let p = LowRank {
                        a: &v[1],
                        b: &v[2],
                        num_experts: experts,
                        gate: gate(kind, &v),
                        scale: 1.7,
                        mask,
                    };
                    let layer = frozen(kind == "given");
                    let one = adapted_linear(&v[0], &layer, &p);
                    let two = gated_low_rank(&v[0], layer.forward(&v[0]), &p);
                    close(&what, one.y.value(), two.y.value());
                    if let (Some(one), Some(two)) = (&one.gates, &two.gates) {
                        close(&what, one, two);
                    }
                    let seed = two.y.value().clone();
                    let one = one.y.backward_from(seed.clone());
                    let two = two.y.backward_from(seed);
                    for (index, leaf) in v.iter().enumerate() {
                        match (one.get(leaf), two.get(leaf)) {
                            (Some(one), Some(two)) => close(&format!("{what}: {index}"), one, two),
                            (one, two) => {
                                assert_eq!(one.is_some(), two.is_some(), "{what}: {index}")
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_few_rows_agree_with_many() {
        for kind in ["one", "input+bias", "low-rank"] {
            let v = leaves(kind, 3, false);
            let v: Vec<Var> = v.iter().map(Var::detach).collect();
            let p = LowRank {
                a: &v[1],
                b: &v[2],
                num_experts: 3,
                gate: gate(kind, &v),
                scale: 1.7,
                mask: Mask::None,
            };
            let layer = frozen(true);
            let many = adapted_linear(&v[0], &layer, &p).y.value().to_f64();
            for rows in [1, 5] {
                let x = v[0].value().data::<f32>()[..rows * INPUTS].to_vec();
                let x = Var::constant(Tensor::new(x, [rows, INPUTS]));
                let few = adapted_linear(&x, &layer, &p).y.value().to_f64();
                for (few, many) in few.iter().zip(&many) {
                    assert!((few - many).abs() < 1e-4, "{kind}: {few} {many}");
                }
            }
        }
    }

    #[test]
    fn several_layers_at_once_agree_with_each_by_itself() {
        use crate::block::{BlockFormat, quantize};
        use crate::ops::frozen_linear::FrozenWeight;
        let v: Vec<Var> = leaves("input+bias", 3, false).iter().map(Var::detach).collect();
        let update = |scale: f64| LowRank {
            a: &v[1],
            b: &v[2],
            num_experts: 3,
            gate: gate("input+bias", &v),
            scale,
            mask: Mask::None,
        };
        let mut bytes = Vec::new();
        let numbers: Vec<f32> = (0..OUTPUTS * INPUTS).map(|i| (i % 13) as f32 - 6.0).collect();
        quantize(BlockFormat::F32, &numbers, &mut bytes);
        let packed = FrozenWeight::Blocks {
            format: BlockFormat::F32,
            bytes: bytes.into(),
            shape: [OUTPUTS, INPUTS],
            dtype: DType::F32,
        };
        let frozen = [frozen(true), frozen(false), FrozenLinear::new(packed, None)];
        let layers =
            [(&frozen[0], Some(update(1.7))), (&frozen[1], None), (&frozen[2], Some(update(-0.3)))];
        for rows in [0, 1, 5, dense::FEWEST_ROWS] {
            let x = v[0].value().data::<f32>()[..rows * INPUTS].to_vec();
            let x = Var::constant(Tensor::new(x, [rows, INPUTS]));
            for threads in [1, 3] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let together =
                    || crate::team::together(Vec::new(), || adapted_linears(&x, &layers));
                for ((layer, update), at_once) in layers.iter().zip(pool.install(together)) {
                    let (y, gates) = match update {
                        Some(update) => {
                            let one = adapted_linear(&x, layer, update);
                            (one.y, one.gates)
                        }
                        None => (layer.forward(&x), None),
                    };
                    assert_eq!(at_once.y.value().to_f32(), y.value().to_f32());
                    assert_eq!(at_once.gates.map(|g| g.to_f32()), gates.map(|g| g.to_f32()));
                }
            }
        }
    }

    #[test]
    fn gradients_join_what_the_input_has_already() {
        let v = leaves("input", 3, false);
        let p = LowRank {
            a: &v[1],
            b: &v[2],
            num_experts: 3,
            gate: gate("input", &v),
            scale: 1.0,
            mask: Mask::None,
        };
        let layer = frozen(false);
        let twice = |one: bool| {
            let run = || match one {
                true => adapted_linear(&v[0], &layer, &p).y,
                false => gated_low_rank(&v[0], layer.forward(&v[0]), &p).y,
            };
            let sum = crate::ops::elementwise::add(&run(), run());
            sum.backward_from(sum.value().clone())
        };
        let (one, two) = (twice(true), twice(false));
        for leaf in &v[..4] {
            close("twice", one.get(leaf).unwrap(), two.get(leaf).unwrap());
        }
    }

    #[test]
    fn results_do_not_depend_on_the_number_of_threads() {
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let v = leaves("input+bias", 3, false);
                let p = LowRank {
                    a: &v[1],
                    b: &v[2],
                    num_experts: 3,
                    gate: gate("input+bias", &v),
                    scale: 1.0,
                    mask: Mask::Shared(Dropout { probability: 0.2, seed: 3 }),
                };
                let y = adapted_linear(&v[0], &frozen(false), &p).y;
                let gradients = y.backward_from(y.value().clone());
                let all: Vec<Vec<f32>> =
                    v.iter().map(|leaf| gradients.get(leaf).unwrap().to_f32()).collect();
                (y.value().to_f32(), all)
            })
        };
        assert_eq!(run(1), run(3));
    }
}
