//! The low-rank update of LoRA, HydraLoRA and their relatives, added to a base product:
//!
//! ```text
//! z = A x                       [r]        (or r per expert when every expert has its own A)
//! w = softmax(W_g x + b_g)      [N]        one gate per token, or 1 without a router
//! y = y0 + s · [B_1 … B_N] (w_1 z, …, w_N z)
//! ```
//!
//! HydraLoRA, arXiv 2404.19245, equations 3 and 4. It is computed as two skinny products and one
//! product with the concatenated heads, written into the storage of `y0`; never as N products.

use crate::buffer::Buffer;
use crate::dispatch;
use crate::element::Element;
use crate::graph::{Saved, Var};
use crate::matmul::{Mat, MatMut, Threads, Write, gemm};
use crate::ops::dropout::{self, Dropout};
use crate::simd::{self, rows_per_task, vectorize};
use crate::tensor::{Tensor, TensorElement};
use rayon::prelude::*;

/// Where the gates come from.
#[derive(Clone, Copy)]
pub enum Gate<'a> {
    /// No router: every expert has weight 1 (plain LoRA, or an ungated sum of heads).
    One,
    /// The same weight `1/N` for every expert.
    Uniform,
    /// `softmax(W x + b)` of this layer's own input, `W: [N, in]`, `b: [N]`.
    Input {
        /// `[N, in]`.
        weight: &'a Var,
        /// `[N]`.
        bias: Option<&'a Var>,
    },
    /// `softmax(W z + b)` of the low-rank activation, `W: [N, r]`, `b: [N]`.
    LowRank {
        /// `[N, r]` (`[N, N·r]` when every expert has its own A).
        weight: &'a Var,
        /// `[N]`.
        bias: Option<&'a Var>,
    },
    /// Gates `[T, N]` computed elsewhere, as by one router for a whole block.
    Given(&'a Var),
}

/// Which dropout mask the input of `A` gets.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Mask {
    /// None.
    #[default]
    None,
    /// One mask for all experts.
    Shared(Dropout),
    /// A mask of its own for every expert, as the official code draws them.
    PerExpert(Dropout),
}

/// The trainable tensors and constants of one update.
#[derive(Clone, Copy)]
pub struct LowRank<'a> {
    /// `[r, in]`, or `[N·r, in]` when every expert has its own.
    pub a: &'a Var,
    /// `[out, N·r]`: the heads side by side.
    pub b: &'a Var,
    /// Number of experts `N`.
    pub num_experts: usize,
    /// Where the gates come from.
    pub gate: Gate<'a>,
    /// The factor `s`, `alpha / r` for LoRA.
    pub scale: f64,
    /// Dropout on the input of `A`; the router sees the input as it is.
    pub mask: Mask,
}

/// What the update gives.
pub struct Output {
    /// `[T, out]`.
    pub y: Var,
    /// The gates `[T, N]` that were used, for routing statistics; none without a router.
    pub gates: Option<Tensor>,
}

/// Extents of one call.
#[derive(Clone, Copy)]
struct Shape {
    tokens: usize,
    inputs: usize,
    outputs: usize,
    experts: usize,
    /// Columns of `z` per expert.
    rank: usize,
    /// Columns of `z`: `rank`, or `experts · rank` when `z` differs by expert.
    z_cols: usize,
}

impl Shape {
    fn h_cols(self) -> usize {
        self.experts * self.rank
    }
    /// First column of expert `e` in `z`.
    fn z_start(self, expert: usize) -> usize {
        if self.z_cols == self.rank { 0 } else { expert * self.rank }
    }
}

/// The scale and kind of a router, without its tensors.
#[derive(Clone, Copy, PartialEq)]
enum Routing {
    Constant(f64),
    Input,
    LowRank,
    Given,
}

/// Adds the update to `y0: [T, out]`, in its storage when nobody else holds it.
///
/// # Panics
/// If the shapes of the tensors disagree.
pub fn gated_low_rank(x: &Var, y0: Var, p: &LowRank<'_>) -> Output {
    let _part = crate::profile::part("gated_low_rank");
    let shape = shape_of(x, &y0, p);
    on_device!(low_rank::update(x, &y0, p, shape.z_cols));
    let (routing, gate_weight, gate_bias, given) = match p.gate {
        Gate::One => (Routing::Constant(1.0), None, None, None),
        Gate::Uniform => (Routing::Constant(1.0 / shape.experts as f64), None, None, None),
        Gate::Input { weight, bias } => (Routing::Input, Some(weight), bias, None),
        Gate::LowRank { weight, bias } => (Routing::LowRank, Some(weight), bias, None),
        Gate::Given(gates) => (Routing::Given, None, None, Some(gates)),
    };
    let (mut y, y0) = y0.take();
    let (a, b) = (p.a.value().clone(), p.b.value().clone());
    let gate_weight_value = gate_weight.map(|v| v.value().clone());

    // The router reads the undropped input, so it can share the product with A only without a mask.
    let fused = routing == Routing::Input && p.mask == Mask::None && shape.z_cols == a.rows();
    let (z, gates) = {
        let x = x.value();
        let (z, scores) = match (&gate_weight_value, routing) {
            (Some(weight), Routing::Input) if fused => {
                let (z, scores) = product_pair(x, &a, weight);
                (z, Some(scores))
            }
            (Some(weight), Routing::Input) => {
                (low_rank_input(x, &a, shape, p.mask), Some(product(x, weight)))
            }
            (Some(weight), _) => {
                let z = low_rank_input(x, &a, shape, p.mask);
                let scores = product(&z, weight);
                (z, Some(scores))
            }
            (None, _) => (low_rank_input(x, &a, shape, p.mask), None),
        };
        let gates = scores
            .map(|scores| softmax(scores, gate_bias.map(Var::value)))
            .or_else(|| given.map(|gates| gates.value().clone()));
        (z, gates)
    };
    dispatch!(y.dtype(), |E| {
        let h = mixed::<E>(&z, gates.as_ref(), routing, shape);
        gemm(
            MatMut::new(y.data_mut::<E>(), shape.tokens, shape.outputs),
            Mat::new(&h, shape.tokens, shape.h_cols()),
            Mat::new(b.data::<E>(), shape.outputs, shape.h_cols()).t(),
            p.scale as E,
            Write::Add,
            Threads::All,
        );
    });

    let none = Var::constant(Tensor::empty(y.dtype()));
    let parents = [
        x,
        &y0,
        p.a,
        p.b,
        gate_weight.unwrap_or(&none),
        gate_bias.unwrap_or(&none),
        given.unwrap_or(&none),
    ];
    let saved = SavedForBackward {
        x: x.save(),
        z,
        gates: gates.clone(),
        a,
        b,
        gate_weight: gate_weight_value,
        routing,
        scale: p.scale,
        mask: p.mask,
        shape,
    };
    let y = Var::computed(y, &parents, move |dy, parents| saved.backward(dy, parents));
    Output { y, gates }
}

/// `softmax(W x + b)` as a value of its own, for a router that serves several layers:
/// `x: [T, in]`, `weight: [N, in]`, `bias: [N]`, giving `[T, N]`.
pub fn router_gates(x: &Var, weight: &Var, bias: Option<&Var>) -> Var {
    on_device!(low_rank::router_gates(x, weight, bias));
    let gates = softmax(product(x.value(), weight.value()), bias.map(Var::value));
    let (saved_x, saved_weight, saved_gates) = (x.save(), weight.value().clone(), gates.clone());
    let none = Var::constant(Tensor::empty(gates.dtype()));
    Var::computed(gates, &[x, weight, bias.unwrap_or(&none)], move |gradient, parents| {
        dispatch!(gradient.dtype(), |E| {
            let mut ds = gradient;
            softmax_backward(ds.data_mut::<E>(), &saved_gates);
            let (tokens, experts, inputs) = (ds.rows(), ds.cols(), saved_weight.cols());
            if parents.needs(2) {
                parents.add(2, column_sums::<E>(ds.data::<E>(), experts));
            }
            let ds = Mat::new(ds.data::<E>(), tokens, experts);
            if parents.needs(1) {
                let x = saved_x.get();
                let x = Mat::new(x.data::<E>(), tokens, inputs);
                add_product(parents, 1, [experts, inputs], ds.t(), x);
            }
            if parents.needs(0) {
                let weight = Mat::new(saved_weight.data::<E>(), experts, inputs);
                add_product(parents, 0, [tokens, inputs], ds, weight);
            }
        });
    })
}

/// `ds = w ⊙ (dw − Σ w dw)` row by row, in place of `dw`.
fn softmax_backward<E: TensorElement>(dw: &mut [E], gates: &Tensor) {
    let experts = gates.cols();
    for (d, w) in dw.chunks_exact_mut(experts).zip(gates.data::<E>().chunks_exact(experts)) {
        let mean: E = d.iter().zip(w).map(|(&d, &w)| d * w).sum();
        for (d, &w) in d.iter_mut().zip(w) {
            *d = w * (*d - mean);
        }
    }
}

/// The sum over all rows: `[cols]`.
pub(crate) fn column_sums<E: TensorElement>(rows: &[E], cols: usize) -> Tensor {
    let mut sums = Buffer::<E>::zeros(cols);
    for row in rows.chunks_exact(cols) {
        simd::add_scaled(E::ONE, row, &mut sums);
    }
    Tensor::new(sums, [cols])
}

fn shape_of(x: &Var, y0: &Var, p: &LowRank<'_>) -> Shape {
    let (x, y0, a, b) = (x.value(), y0.value(), p.a.value(), p.b.value());
    let experts = p.num_experts;
    assert!(experts > 0, "at least one expert");
    assert_eq!(a.cols(), x.cols(), "A has another input width");
    assert_eq!(b.rows(), y0.cols(), "B has another output width");
    assert_eq!(x.rows(), y0.rows(), "input and base product differ in tokens");
    assert_eq!(b.cols() % experts, 0, "B is a whole number of heads");
    let rank = b.cols() / experts;
    let own_a = a.rows() == experts * rank && experts > 1;
    assert!(own_a || a.rows() == rank, "A has {} rows for rank {rank}", a.rows());
    let z_cols = if own_a || (experts > 1 && matches!(p.mask, Mask::PerExpert(_))) {
        experts * rank
    } else {
        rank
    };
    Shape { tokens: x.rows(), inputs: x.cols(), outputs: y0.cols(), experts, rank, z_cols }
}

/// `x Mᵀ`.
pub(crate) fn product(x: &Tensor, m: &Tensor) -> Tensor {
    let (rows, inner, cols) = (x.rows(), x.cols(), m.rows());
    assert_eq!(m.cols(), inner, "the weight has another input width");
    dispatch!(x.dtype(), |E| {
        let mut out = Buffer::<E>::scratch(rows * cols);
        gemm(
            MatMut::new(&mut out, rows, cols),
            Mat::new(x.data::<E>(), rows, inner),
            Mat::new(m.data::<E>(), cols, inner).t(),
            1.0,
            Write::Set,
            Threads::All,
        );
        Tensor::new(out, [rows, cols])
    })
}

/// `x Aᵀ` and `x Gᵀ` as one product with the rows stacked.
fn product_pair(x: &Tensor, a: &Tensor, g: &Tensor) -> (Tensor, Tensor) {
    let both = stack(a, g);
    let all = product(x, &both);
    let (a_cols, cols) = (a.rows(), both.rows());
    dispatch!(x.dtype(), |E| {
        let (mut z, mut s) = (
            Buffer::<E>::scratch(x.rows() * a_cols),
            Buffer::<E>::scratch(x.rows() * (cols - a_cols)),
        );
        for ((all, z), s) in all
            .data::<E>()
            .chunks_exact(cols)
            .zip(z.chunks_exact_mut(a_cols))
            .zip(s.chunks_exact_mut(cols - a_cols))
        {
            z.copy_from_slice(&all[..a_cols]);
            s.copy_from_slice(&all[a_cols..]);
        }
        (Tensor::new(z, [x.rows(), a_cols]), Tensor::new(s, [x.rows(), cols - a_cols]))
    })
}

/// The rows of `a`, then those of `b`.
fn stack(a: &Tensor, b: &Tensor) -> Tensor {
    assert_eq!(a.cols(), b.cols(), "A and the router differ in input width");
    dispatch!(a.dtype(), |E| {
        let mut out = Buffer::<E>::scratch(a.len() + b.len());
        out[..a.len()].copy_from_slice(a.data::<E>());
        out[a.len()..].copy_from_slice(b.data::<E>());
        Tensor::new(out, [a.rows() + b.rows(), a.cols()])
    })
}

/// `z` from the dropped input: `[T, z_cols]`.
fn low_rank_input(x: &Tensor, a: &Tensor, shape: Shape, mask: Mask) -> Tensor {
    match mask {
        Mask::None => product(x, a),
        Mask::Shared(dropout) => product(&dropout::maybe(Some(dropout), x), a),
        Mask::PerExpert(dropout) if shape.experts == 1 => {
            product(&dropout::maybe(Some(dropout), x), a)
        }
        Mask::PerExpert(dropout) => dispatch!(x.dtype(), |E| {
            let mut z = Buffer::<E>::scratch(shape.tokens * shape.z_cols);
            for expert in 0..shape.experts {
                let dropped = dropout.stream(expert as u64).apply(x);
                gemm(
                    MatMut::strided(
                        &mut z[expert * shape.rank..],
                        shape.tokens,
                        shape.rank,
                        shape.z_cols,
                    ),
                    Mat::new(dropped.data::<E>(), shape.tokens, shape.inputs),
                    expert_rows::<E>(a, shape, expert).t(),
                    1.0,
                    Write::Set,
                    Threads::All,
                );
            }
            Tensor::new(z, [shape.tokens, shape.z_cols])
        }),
    }
}

/// The rows of `A` that expert `e` uses.
fn expert_rows<E: TensorElement>(a: &Tensor, shape: Shape, expert: usize) -> Mat<'_, E> {
    let first = if a.rows() == shape.rank { 0 } else { expert * shape.rank };
    Mat::new(
        &a.data::<E>()[first * shape.inputs..(first + shape.rank) * shape.inputs],
        shape.rank,
        shape.inputs,
    )
}

/// Row-wise softmax of `scores + bias`, in place.
fn softmax(mut scores: Tensor, bias: Option<&Tensor>) -> Tensor {
    let cols = scores.cols();
    dispatch!(scores.dtype(), |E| {
        let bias = bias.map(|bias| bias.data::<E>());
        for row in scores.data_mut::<E>().chunks_exact_mut(cols) {
            if let Some(bias) = bias {
                simd::axpy(1.0, bias, row);
            }
            let peak = row.iter().fold(E::NEG_INFINITY, |best, &s| if s > best { s } else { best });
            let mut sum = 0.0;
            for s in row.iter_mut() {
                *s = Element::exp(*s - peak);
                sum += *s;
            }
            for s in row.iter_mut() {
                *s /= sum;
            }
        }
    });
    scores
}

/// `h = (w_1 z_1, …, w_N z_N)`: `[T, N·r]`.
fn mixed<E: TensorElement>(
    z: &Tensor,
    gates: Option<&Tensor>,
    routing: Routing,
    shape: Shape,
) -> Buffer<E> {
    let mut h = Buffer::<E>::scratch(shape.tokens * shape.h_cols());
    let constant = match routing {
        Routing::Constant(weight) => E::from_f64(weight),
        _ => E::ONE,
    };
    let gates = gates.map(|gates| gates.data::<E>());
    let task = rows_per_task(shape.h_cols());
    h.par_chunks_mut(task * shape.h_cols()).enumerate().for_each(|(index, h)| {
        vectorize(
            #[inline(always)]
            || {
                for (row, h) in h.chunks_exact_mut(shape.h_cols()).enumerate() {
                    let token = index * task + row;
                    let z = &z.data::<E>()[token * shape.z_cols..(token + 1) * shape.z_cols];
                    for (expert, h) in h.chunks_exact_mut(shape.rank).enumerate() {
                        let w =
                            gates.map_or(constant, |gates| gates[token * shape.experts + expert]);
                        let start = shape.z_start(expert);
                        for (h, &z) in h.iter_mut().zip(&z[start..start + shape.rank]) {
                            *h = w * z;
                        }
                    }
                }
            },
        );
    });
    h
}

/// Everything the backward needs. `h` is not kept: it is one pass over `z` and the gates.
struct SavedForBackward {
    x: Saved,
    z: Tensor,
    gates: Option<Tensor>,
    a: Tensor,
    b: Tensor,
    gate_weight: Option<Tensor>,
    routing: Routing,
    scale: f64,
    mask: Mask,
    shape: Shape,
}

impl SavedForBackward {
    fn backward(&self, dy: Tensor, parents: &mut crate::graph::ParentGradients<'_>) {
        let _part = crate::profile::part("gated_low_rank backward");
        dispatch!(dy.dtype(), |E| self.backward_in::<E>(&dy, parents));
        parents.add(1, dy);
    }

    fn backward_in<E: TensorElement>(
        &self,
        dy: &Tensor,
        parents: &mut crate::graph::ParentGradients<'_>,
    ) {
        let shape = self.shape;
        let (tokens, h_cols) = (shape.tokens, shape.h_cols());
        let scale = E::from_f64(self.scale);
        let dy = Mat::new(dy.data::<E>(), tokens, shape.outputs);
        if parents.needs(3) {
            let h = mixed::<E>(&self.z, self.gates.as_ref(), self.routing, shape);
            let mut db = Buffer::<E>::scratch(self.b.len());
            gemm(
                MatMut::new(&mut db, shape.outputs, h_cols),
                dy.t(),
                Mat::new(&h, tokens, h_cols),
                scale,
                Write::Set,
                Threads::All,
            );
            parents.add(3, Tensor::new(db, self.b.shape()));
        }
        let wanted = [0, 2, 4, 5, 6].iter().any(|&parent| parents.needs(parent));
        if !wanted {
            return;
        }
        let mut dh = Buffer::<E>::scratch(tokens * h_cols);
        gemm(
            MatMut::new(&mut dh, tokens, h_cols),
            dy,
            Mat::new(self.b.data::<E>(), shape.outputs, h_cols),
            scale,
            Write::Set,
            Threads::All,
        );
        let (mut dz, dw) = self.unmix::<E>(&dh);

        if let (Some(gates), Some(dw)) = (&self.gates, dw) {
            if self.routing == Routing::Given {
                parents.add(6, Tensor::new(dw, gates.shape()));
            } else {
                self.router_backward::<E>(gates, dw, &mut dz, parents);
            }
        }
        let x = (parents.needs(2) || self.mask != Mask::None).then(|| self.x.get());
        if parents.needs(2) {
            let x = x.as_ref().expect("saved for the gradient of A");
            parents.add(2, self.a_gradient::<E>(x, &dz));
        }
        if parents.needs(0) {
            self.input_gradient::<E>(&dz, parents);
        }
    }

    /// `dz` and, when there are gates, `dw`, from the gradient of `h`.
    fn unmix<E: TensorElement>(&self, dh: &[E]) -> (Buffer<E>, Option<Buffer<E>>) {
        let shape = self.shape;
        let mut dz = Buffer::<E>::zeros(shape.tokens * shape.z_cols);
        let constant = match self.routing {
            Routing::Constant(weight) => E::from_f64(weight),
            _ => E::ONE,
        };
        let gates = self.gates.as_ref().map(|gates| gates.data::<E>());
        let mut dw = gates.map(|gates| Buffer::<E>::scratch(gates.len()));
        let z = self.z.data::<E>();
        for token in 0..shape.tokens {
            let z = &z[token * shape.z_cols..(token + 1) * shape.z_cols];
            let dz = &mut dz[token * shape.z_cols..(token + 1) * shape.z_cols];
            for expert in 0..shape.experts {
                let first = token * shape.h_cols() + expert * shape.rank;
                let dh = &dh[first..first + shape.rank];
                let start = shape.z_start(expert);
                let w = gates.map_or(constant, |gates| gates[token * shape.experts + expert]);
                let mut sum = E::ZERO;
                for i in 0..shape.rank {
                    sum += dh[i] * z[start + i];
                    dz[start + i] += w * dh[i];
                }
                if let Some(dw) = &mut dw {
                    dw[token * shape.experts + expert] = sum;
                }
            }
        }
        (dz, dw)
    }

    /// Through the softmax (`ds = w ⊙ (dw − Σ w dw)`) into the router and what it reads.
    fn router_backward<E: TensorElement>(
        &self,
        gates: &Tensor,
        dw: Buffer<E>,
        dz: &mut Buffer<E>,
        parents: &mut crate::graph::ParentGradients<'_>,
    ) {
        let shape = self.shape;
        let mut ds = dw;
        softmax_backward::<E>(&mut ds, gates);
        if parents.needs(5) {
            parents.add(5, column_sums::<E>(&ds, shape.experts));
        }
        let weight = self.gate_weight.as_ref().expect("a routed update has a router");
        let ds = Mat::new(&ds, shape.tokens, shape.experts);
        let read = weight.cols();
        if parents.needs(4) {
            let source = match self.routing {
                Routing::LowRank => self.z.clone(),
                _ => self.x.get(),
            };
            let mut out = Buffer::<E>::scratch(weight.len());
            gemm(
                MatMut::new(&mut out, shape.experts, read),
                ds.t(),
                Mat::new(source.data::<E>(), shape.tokens, read),
                E::ONE,
                Write::Set,
                Threads::All,
            );
            parents.add(4, Tensor::new(out, weight.shape()));
        }
        let weight = Mat::new(weight.data::<E>(), shape.experts, read);
        if self.routing == Routing::LowRank {
            gemm(
                MatMut::new(dz, shape.tokens, shape.z_cols),
                ds,
                weight,
                E::ONE,
                Write::Add,
                Threads::All,
            );
        } else if parents.needs(0) {
            add_product(parents, 0, [shape.tokens, shape.inputs], ds, weight);
        }
    }

    /// `dA = dzᵀ x'`, with `x'` the dropped input.
    fn a_gradient<E: TensorElement>(&self, x: &Tensor, dz: &[E]) -> Tensor {
        let shape = self.shape;
        let mut da = Buffer::<E>::zeros(self.a.len());
        let mut one = |dropped: &Tensor, z_start: usize, z_cols: usize, a_first: usize| {
            gemm(
                MatMut::new(&mut da[a_first * shape.inputs..], z_cols, shape.inputs),
                Mat::strided(&dz[z_start..], shape.tokens, z_cols, shape.z_cols).t(),
                Mat::new(dropped.data::<E>(), shape.tokens, shape.inputs),
                E::ONE,
                Write::Add,
                Threads::All,
            );
        };
        if shape.tokens > 0 {
            match self.mask {
                Mask::PerExpert(dropout) if shape.experts > 1 => {
                    for expert in 0..shape.experts {
                        let start = expert * shape.rank;
                        let a_first = if self.a.rows() == shape.rank { 0 } else { start };
                        one(&dropout.stream(expert as u64).apply(x), start, shape.rank, a_first);
                    }
                }
                Mask::PerExpert(dropout) | Mask::Shared(dropout) => {
                    one(&dropout::maybe(Some(dropout), x), 0, shape.z_cols, 0);
                }
                Mask::None => one(x, 0, shape.z_cols, 0),
            }
        }
        Tensor::new(da, self.a.shape())
    }

    /// `dx += mask ⊙ (dz A)`.
    fn input_gradient<E: TensorElement>(
        &self,
        dz: &[E],
        parents: &mut crate::graph::ParentGradients<'_>,
    ) {
        let shape = self.shape;
        let extent = [shape.tokens, shape.inputs];
        let all = Mat::new(dz, shape.tokens, shape.z_cols);
        let a = Mat::new(self.a.data::<E>(), self.a.rows(), shape.inputs);
        let masked = |dropout: Dropout, dz: Mat<'_, E>, a: Mat<'_, E>| {
            let mut dx = Buffer::<E>::scratch(shape.tokens * shape.inputs);
            let out = MatMut::new(&mut dx, shape.tokens, shape.inputs);
            gemm(out, dz, a, E::ONE, Write::Set, Threads::All);
            let mut dx = Tensor::new(dx, extent);
            dropout.apply_in_place(&mut dx);
            dx
        };
        match self.mask {
            Mask::None => add_product(parents, 0, extent, all, a),
            Mask::PerExpert(dropout) if shape.experts > 1 => {
                for expert in 0..shape.experts {
                    let dz = Mat::strided(
                        dz.get(expert * shape.rank..).unwrap_or_default(),
                        shape.tokens,
                        shape.rank,
                        shape.z_cols,
                    );
                    let a = expert_rows::<E>(&self.a, shape, expert);
                    parents.add(0, masked(dropout.stream(expert as u64), dz, a));
                }
            }
            Mask::PerExpert(dropout) | Mask::Shared(dropout) => {
                parents.add(0, masked(dropout, all, a));
            }
        }
    }
}

/// Adds `lhs · rhs` to the gradient of parent `index`, in place if it has one already.
pub(crate) fn add_product<E: TensorElement>(
    parents: &mut crate::graph::ParentGradients<'_>,
    index: usize,
    extent: [usize; 2],
    lhs: Mat<'_, E>,
    rhs: Mat<'_, E>,
) {
    let carried = parents.take(index);
    let write = if carried.is_some() { Write::Add } else { Write::Set };
    let mut sum =
        carried.unwrap_or_else(|| Tensor::new(Buffer::<E>::scratch(extent[0] * extent[1]), extent));
    let out = MatMut::new(sum.data_mut::<E>(), extent[0], extent[1]);
    gemm(out, lhs, rhs, E::ONE, write, Threads::All);
    parents.add(index, sum);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check;

    const TOKENS: usize = 5;
    const INPUTS: usize = 7;
    const OUTPUTS: usize = 6;
    const RANK: usize = 2;

    /// Shapes: x, y0, A, B, router weight, router bias.
    fn run(experts: usize, own_a: bool, masks: &[Mask], kind: &str) {
        let a_rows = if own_a { experts * RANK } else { RANK };
        for &mask in masks {
            let z_cols = if own_a || (experts > 1 && matches!(mask, Mask::PerExpert(_))) {
                experts * RANK
            } else {
                RANK
            };
            let router = match kind {
                "low-rank" => [experts, z_cols],
                "given" => [TOKENS, experts],
                _ => [experts, INPUTS],
            };
            let shapes: [&[usize]; 6] = [
                &[TOKENS, INPUTS],
                &[TOKENS, OUTPUTS],
                &[a_rows, INPUTS],
                &[OUTPUTS, experts * RANK],
                &router,
                &[experts],
            ];
            check::gradients(&shapes, |v| {
                let gate = match kind {
                    "one" => Gate::One,
                    "uniform" => Gate::Uniform,
                    "input" => Gate::Input { weight: &v[4], bias: None },
                    "input+bias" => Gate::Input { weight: &v[4], bias: Some(&v[5]) },
                    "low-rank" => Gate::LowRank { weight: &v[4], bias: Some(&v[5]) },
                    "given" => Gate::Given(&v[4]),
                    _ => unreachable!(),
                };
                let p =
                    LowRank { a: &v[2], b: &v[3], num_experts: experts, gate, scale: 1.7, mask };
                gated_low_rank(&v[0], v[1].clone(), &p).y
            });
        }
    }

    fn masks() -> [Mask; 3] {
        let dropout = Dropout { probability: 0.3, seed: 11 };
        [Mask::None, Mask::Shared(dropout), Mask::PerExpert(dropout)]
    }

    #[test]
    fn gradients_match_finite_differences_for_every_gate_and_mask() {
        for kind in ["one", "uniform", "input", "input+bias", "low-rank", "given"] {
            for (experts, own_a) in [(1, false), (3, false), (3, true)] {
                run(experts, own_a, &masks(), kind);
            }
        }
    }

    #[test]
    fn router_gates_match_finite_differences_and_sum_to_one() {
        check::gradients(&[&[4, 5], &[3, 5], &[3]], |v| router_gates(&v[0], &v[1], Some(&v[2])));
        check::gradients(&[&[4, 5], &[3, 5]], |v| router_gates(&v[0], &v[1], None));
        let v = check::inputs(&[&[4, 5], &[3, 5]]);
        for row in router_gates(&v[0], &v[1], None).value().to_f64().chunks(3) {
            assert!((row.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        }
    }

    /// The definition, token by token and head by head.
    #[test]
    fn forward_matches_the_loop_over_heads() {
        let shapes: [&[usize]; 5] = [
            &[TOKENS, INPUTS],
            &[TOKENS, OUTPUTS],
            &[RANK, INPUTS],
            &[OUTPUTS, 3 * RANK],
            &[3, INPUTS],
        ];
        let v = check::inputs(&shapes);
        let p = LowRank {
            a: &v[2],
            b: &v[3],
            num_experts: 3,
            gate: Gate::Input { weight: &v[4], bias: None },
            scale: 2.0,
            mask: Mask::None,
        };
        let out = gated_low_rank(&v[0], v[1].clone(), &p);
        let [x, y0, a, b, g] = [0, 1, 2, 3, 4].map(|i: usize| v[i].value().to_f64());
        let got = out.y.value().to_f64();
        for t in 0..TOKENS {
            let x = &x[t * INPUTS..(t + 1) * INPUTS];
            let dot = |row: &[f64]| row.iter().zip(x).map(|(a, b)| a * b).sum::<f64>();
            let scores: Vec<f64> = g.chunks(INPUTS).map(|row| dot(row).exp()).collect();
            let total: f64 = scores.iter().sum();
            let z: Vec<f64> = a.chunks(INPUTS).map(dot).collect();
            for o in 0..OUTPUTS {
                let mut y = y0[t * OUTPUTS + o];
                for e in 0..3 {
                    for i in 0..RANK {
                        y += 2.0 * scores[e] / total * b[o * 3 * RANK + e * RANK + i] * z[i];
                    }
                }
                assert!((y - got[t * OUTPUTS + o]).abs() < 1e-12);
            }
        }
    }

    #[test]
    fn no_tokens_give_no_rows_and_zero_gradients() {
        let shapes: [&[usize]; 5] = [&[0, 4], &[0, 3], &[2, 4], &[3, 4], &[2, 4]];
        let v = check::leaves(&shapes);
        let p = LowRank {
            a: &v[2],
            b: &v[3],
            num_experts: 2,
            gate: Gate::Input { weight: &v[4], bias: None },
            scale: 1.0,
            mask: Mask::None,
        };
        let y = gated_low_rank(&v[0], v[1].clone(), &p).y;
        assert_eq!(y.value().shape(), [0, 3]);
    }
}
