//! The update on [`gemm`], generic over `f32` and `f64`: the definition that finite differences check,
//! and what computes a mask for every expert and a few rows with gradients.

use super::softmax::{softmax, softmax_backward};
use super::{LowRank, Mask, Output, Parent, Parents, Plan, Route};
use crate::buffer::Buffer;
use crate::dispatch;
use crate::graph::{Saved, Var};
use crate::matmul::{Mat, MatMut, Threads, Write, gemm};
use crate::ops::dropout::{self, Dropout};
use crate::ops::product::{column_sums, product};
use crate::simd::{rows_per_task, vectorize};
use crate::tensor::{Tensor, TensorElement};
use hydralora_runtime::{chunks_mut, for_each};

/// Adds the update to `y0: [T, out]`, in its storage when nobody else holds it.
pub(super) fn update(x: &Var, y0: Var, update: &LowRank<'_>, plan: Plan) -> Output {
    let (mut y, base) = y0.take();
    let (z, scores) = plan.z_and_scores(x.value());
    let gates = match &plan.route {
        Route::Constant(_) => None,
        Route::Given(gates) => Some(gates.clone()),
        Route::Input(_) | Route::LowRank(_) => scores.map(|scores| plan.gates_of(scores)),
    };
    dispatch!(y.dtype(), |E| {
        let h = plan.mixed::<E>(&z, gates.as_ref());
        gemm(
            MatMut::new(y.data_mut::<E>(), plan.tokens, plan.outputs),
            Mat::new(&h, plan.tokens, plan.h_cols()),
            Mat::new(plan.b.data::<E>(), plan.outputs, plan.h_cols()).t(),
            plan.scale as E,
            Write::Add,
            Threads::All,
        );
    });
    let none = Var::constant(Tensor::empty(y.dtype()));
    let parents = Parent::all(x, Some(&base), update, &none);
    let kept = Kept { x: x.save(), z, gates: gates.clone(), plan };
    let y = Var::computed(y, &parents, move |dy, parents| kept.backward(dy, Parents(parents)));
    Output { y, gates }
}

impl Plan {
    /// `z: [T, z_cols]`, and the router's scores `[T, N]` if there is a router.
    fn z_and_scores(&self, x: &Tensor) -> (Tensor, Option<Tensor>) {
        match &self.route {
            // The router reads the undropped input, so it can share the product with A only without
            // a mask.
            Route::Input(router) if self.mask == Mask::None => {
                let (z, scores) = product_pair(x, &self.a, &router.weight);
                (z, Some(scores))
            }
            Route::Input(router) => (self.low_rank_input(x), Some(product(x, &router.weight))),
            Route::LowRank(router) => {
                let z = self.low_rank_input(x);
                let scores = product(&z, &router.weight);
                (z, Some(scores))
            }
            Route::Constant(_) | Route::Given(_) => (self.low_rank_input(x), None),
        }
    }

    fn gates_of(&self, mut scores: Tensor) -> Tensor {
        let bias = self.router().and_then(|router| router.bias.as_ref());
        dispatch!(scores.dtype(), |E| {
            let bias = bias.map(|bias| bias.data::<E>());
            softmax(scores.data_mut::<E>(), bias, self.experts);
        });
        scores
    }

    /// `z` from the dropped input: `[T, z_cols]`.
    fn low_rank_input(&self, x: &Tensor) -> Tensor {
        dispatch!(x.dtype(), |E| {
            let mut z = Buffer::<E>::scratch(self.tokens * self.z_cols);
            for part in self.z_parts() {
                let (first, count) = (part.columns.start, part.columns.len());
                let dropped = dropout::maybe(part.dropout, x);
                gemm(
                    // Without tokens there is no column to start at.
                    MatMut::strided(
                        z.get_mut(first..).unwrap_or_default(),
                        self.tokens,
                        count,
                        self.z_cols,
                    ),
                    Mat::new(dropped.data::<E>(), self.tokens, self.inputs),
                    self.a_rows::<E>(part.a_first, count).t(),
                    1.0,
                    Write::Set,
                    Threads::All,
                );
            }
            Tensor::new(z, [self.tokens, self.z_cols])
        })
    }

    /// `count` rows of `A` from row `first` on.
    fn a_rows<E: TensorElement>(&self, first: usize, count: usize) -> Mat<'_, E> {
        let rows = first * self.inputs..(first + count) * self.inputs;
        Mat::new(&self.a.data::<E>()[rows], count, self.inputs)
    }

    /// `h = (w_1 z, …, w_N z)`: `[T, N·r]`.
    fn mixed<E: TensorElement>(&self, z: &Tensor, gates: Option<&Tensor>) -> Buffer<E> {
        let (h_cols, z_cols, gate_cols) = (self.h_cols(), self.z_cols, self.gate_cols());
        let mut h = Buffer::<E>::scratch(self.tokens * h_cols);
        let z = z.data::<E>();
        let gates = gates.map_or(&[][..], |gates| gates.data::<E>());
        let task = rows_per_task(h_cols);
        for_each(chunks_mut(&mut h, task * h_cols), |index, h| {
            let (first, count) = (index * task, h.len() / h_cols);
            let z = &z[first * z_cols..(first + count) * z_cols];
            let gates = &gates[first * gate_cols..(first + count) * gate_cols];
            vectorize(
                #[inline(always)]
                || self.mix(E::ONE, z, gates, h),
            );
        });
        h
    }
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
    dispatch!(a.dtype(), |E| {
        let mut out = Buffer::<E>::scratch(a.len() + b.len());
        out[..a.len()].copy_from_slice(a.data::<E>());
        out[a.len()..].copy_from_slice(b.data::<E>());
        Tensor::new(out, [a.rows() + b.rows(), a.cols()])
    })
}

/// Everything the backward needs. `h` is not kept: it is one pass over `z` and the gates.
struct Kept {
    plan: Plan,
    x: Saved,
    z: Tensor,
    gates: Option<Tensor>,
}

impl Kept {
    fn backward(&self, dy: Tensor, mut parents: Parents<'_, '_>) {
        let _part = crate::profile::part("gated_low_rank backward");
        dispatch!(dy.dtype(), |E| self.backward_in::<E>(&dy, &mut parents));
        parents.add(Parent::Base, dy);
    }

    fn backward_in<E: TensorElement>(&self, dy: &Tensor, parents: &mut Parents<'_, '_>) {
        let plan = &self.plan;
        let dy = Mat::new(dy.data::<E>(), plan.tokens, plan.outputs);
        if parents.needs(Parent::B) {
            parents.add(Parent::B, self.b_gradient(dy));
        }
        if !parents.need_below_heads() {
            return;
        }
        let (mut dz, dgates) = self.through_heads(dy);
        match &plan.route {
            Route::Constant(_) => {}
            Route::Given(gates) => parents.add(Parent::Gates, Tensor::new(dgates, gates.shape())),
            Route::Input(_) | Route::LowRank(_) => {
                self.router_gradients::<E>(dgates, &mut dz, parents);
            }
        }
        if parents.needs(Parent::A) {
            parents.add(Parent::A, self.a_gradient::<E>(&dz));
        }
        if parents.needs(Parent::X) {
            self.input_gradient::<E>(&dz, parents);
        }
    }

    /// `dB = s dyᵀ h`.
    fn b_gradient<E: TensorElement>(&self, dy: Mat<'_, E>) -> Tensor {
        let plan = &self.plan;
        let h = plan.mixed::<E>(&self.z, self.gates.as_ref());
        let mut db = Buffer::<E>::scratch(plan.b.len());
        gemm(
            MatMut::new(&mut db, plan.outputs, plan.h_cols()),
            dy.t(),
            Mat::new(&h, plan.tokens, plan.h_cols()),
            E::from_f64(plan.scale),
            Write::Set,
            Threads::All,
        );
        Tensor::new(db, plan.b.shape())
    }

    /// `dz: [T, z_cols]` and, if gates differ by token, their gradient `[T, N]`.
    fn through_heads<E: TensorElement>(&self, dy: Mat<'_, E>) -> (Buffer<E>, Buffer<E>) {
        let plan = &self.plan;
        let mut dh = Buffer::<E>::scratch(plan.tokens * plan.h_cols());
        gemm(
            MatMut::new(&mut dh, plan.tokens, plan.h_cols()),
            dy,
            Mat::new(plan.b.data::<E>(), plan.outputs, plan.h_cols()),
            E::from_f64(plan.scale),
            Write::Set,
            Threads::All,
        );
        let mut dz = Buffer::<E>::zeros(plan.tokens * plan.z_cols);
        let mut dgates = Buffer::<E>::scratch(plan.tokens * plan.gate_cols());
        let gates = self.gates.as_ref().map_or(&[][..], |gates| gates.data::<E>());
        let rows = (self.z.data::<E>(), gates);
        plan.unmix(E::ONE, &dh, rows, (&mut dz, plan.z_cols), &mut dgates);
        (dz, dgates)
    }

    /// Through the softmax into the router and what it reads.
    fn router_gradients<E: TensorElement>(
        &self,
        mut ds: Buffer<E>,
        dz: &mut Buffer<E>,
        parents: &mut Parents<'_, '_>,
    ) {
        let plan = &self.plan;
        let (Some(router), Some(gates)) = (plan.router(), &self.gates) else { return };
        softmax_backward(&mut ds, gates.data::<E>(), plan.experts);
        if parents.needs(Parent::RouterBias) {
            parents.add(Parent::RouterBias, column_sums::<E>(&ds, plan.experts));
        }
        let reads_z = matches!(plan.route, Route::LowRank(_));
        let ds = Mat::new(&ds, plan.tokens, plan.experts);
        let read = router.weight.cols();
        if parents.needs(Parent::RouterWeight) {
            let source = if reads_z { self.z.clone() } else { self.x.get() };
            let mut out = Buffer::<E>::scratch(router.weight.len());
            gemm(
                MatMut::new(&mut out, plan.experts, read),
                ds.t(),
                Mat::new(source.data::<E>(), plan.tokens, read),
                E::ONE,
                Write::Set,
                Threads::All,
            );
            parents.add(Parent::RouterWeight, Tensor::new(out, router.weight.shape()));
        }
        let weight = Mat::new(router.weight.data::<E>(), plan.experts, read);
        if reads_z {
            let dz = MatMut::new(dz, plan.tokens, plan.z_cols);
            gemm(dz, ds, weight, E::ONE, Write::Add, Threads::All);
        } else if parents.needs(Parent::X) {
            parents.add_product(Parent::X, [plan.tokens, plan.inputs], ds, weight);
        }
    }

    /// `dA = dzᵀ x'`, with `x'` the dropped input.
    fn a_gradient<E: TensorElement>(&self, dz: &[E]) -> Tensor {
        let plan = &self.plan;
        let x = self.x.get();
        let mut da = Buffer::<E>::zeros(plan.a.len());
        for part in plan.z_parts() {
            let count = part.columns.len();
            let dropped = dropout::maybe(part.dropout, &x);
            gemm(
                MatMut::new(&mut da[part.a_first * plan.inputs..], count, plan.inputs),
                plan.z_columns(dz, part.columns.start, count).t(),
                Mat::new(dropped.data::<E>(), plan.tokens, plan.inputs),
                E::ONE,
                Write::Add,
                Threads::All,
            );
        }
        Tensor::new(da, plan.a.shape())
    }

    /// `dx += mask ⊙ (dz A)`.
    fn input_gradient<E: TensorElement>(&self, dz: &[E], parents: &mut Parents<'_, '_>) {
        let plan = &self.plan;
        let extent = [plan.tokens, plan.inputs];
        for part in plan.z_parts() {
            let count = part.columns.len();
            let dz = plan.z_columns(dz, part.columns.start, count);
            let a = plan.a_rows::<E>(part.a_first, count);
            match part.dropout {
                None => parents.add_product(Parent::X, extent, dz, a),
                Some(dropout) => parents.add(Parent::X, masked(extent, dropout, dz, a)),
            }
        }
    }
}

impl Plan {
    /// `count` columns of `dz: [T, z_cols]` from column `first` on.
    fn z_columns<'a, E: TensorElement>(
        &self,
        dz: &'a [E],
        first: usize,
        count: usize,
    ) -> Mat<'a, E> {
        Mat::strided(dz.get(first..).unwrap_or_default(), self.tokens, count, self.z_cols)
    }
}

/// `mask ⊙ (dz A)`.
fn masked<E: TensorElement>(
    extent: [usize; 2],
    dropout: Dropout,
    dz: Mat<'_, E>,
    a: Mat<'_, E>,
) -> Tensor {
    let mut dx = Buffer::<E>::scratch(extent[0] * extent[1]);
    gemm(MatMut::new(&mut dx, extent[0], extent[1]), dz, a, E::ONE, Write::Set, Threads::All);
    let mut dx = Tensor::new(dx, extent);
    dropout.apply_in_place(&mut dx);
    dx
}
