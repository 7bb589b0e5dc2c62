//! The low-rank update, and the small trained networks beside it. The formulas are those of
//! [`gated_low_rank`](crate::ops::gated_low_rank), step by step.

use super::product::Matrix;
use super::{Device, DeviceBuffer, Kernel, bits, device_of, pointwise};
use crate::graph::{ParentGradients, Saved, Var};
use crate::ops::dropout::Dropout;
use crate::ops::frozen_linear::FrozenLinear;
use crate::ops::gated_low_rank::{Gate, LowRank, Mask, Output, gated_low_rank};
use crate::tensor::Tensor;
use std::ops::Range;

const fn kernel(name: &'static str) -> Kernel {
    Kernel {
        source: concat!(
            include_str!("shaders/element.wgsl"),
            include_str!("shaders/low_rank.wgsl")
        ),
        name,
    }
}
const GATES: Kernel = kernel("gates");
const GATES_BACKWARD: Kernel = kernel("gates_backward");
const MIX: Kernel = kernel("mix");
const MIX_BACKWARD: Kernel = kernel("mix_backward");
const MIX_BACKWARD_GATES: Kernel = kernel("mix_backward_gates");

/// A frozen layer with its update: one after the other.
pub(crate) fn adapted_linear(x: &Var, frozen: &FrozenLinear, p: &LowRank<'_>) -> Option<Output> {
    if frozen.placed().is_none() {
        x.value().device()?;
    }
    Some(gated_low_rank(x, frozen.forward(x), p))
}

/// A product on the device, `left · right`, of whole tensors.
fn times(device: &Device, left: Matrix<'_>, right: Matrix<'_>) -> Tensor {
    let shape = [left.row_count(), right.col_count()];
    device.product(left, right, 1.0, None).tensor(shape)
}

/// Adds `left · right` to the gradient of parent `index`, on top of what it has already.
fn add_product(
    device: &Device,
    parents: &mut ParentGradients<'_>,
    index: usize,
    left: Matrix<'_>,
    right: Matrix<'_>,
) {
    let carried = parents.take(index);
    let shape = [left.row_count(), right.col_count()];
    let sum = device.product(left, right, 1.0, carried.as_ref());
    parents.add(index, sum.tensor(shape));
}

impl Device {
    /// The softmax of every row of `scores + bias`.
    fn gates(&self, scores: &Tensor, bias: Option<&Tensor>) -> Tensor {
        let (tokens, experts) = (scores.rows(), scores.cols());
        let given = [tokens, experts, 0, 0, 0, usize::from(bias.is_some())].map(|n| n as u32);
        let scores_here = self.holding(scores);
        let bias = bias.map_or_else(|| scores_here.clone(), |bias| self.holding(bias));
        let [out] = self.each(&GATES, &given, &[&scores_here, &bias], [scores.len()], tokens);
        out.tensor([tokens, experts])
    }

    /// The gradient of those scores from that of the gates.
    fn gates_backward(&self, gradient: &Tensor, gates: &Tensor) -> Tensor {
        let given = [gates.rows() as u32, gates.cols() as u32];
        let inputs = [&self.holding(gradient), &self.holding(gates)];
        let [out] = self.each(&GATES_BACKWARD, &given, &inputs, [gates.len()], gates.rows());
        out.tensor(gates.shape())
    }
}

/// Extents of one call, and the gate where there is no router.
#[derive(Clone, Copy)]
struct Shape {
    tokens: usize,
    inputs: usize,
    outputs: usize,
    experts: usize,
    /// Columns of `z` an expert reads, and all of them.
    rank: usize,
    z_cols: usize,
    /// Rows of `A`.
    a_rows: usize,
    constant: f64,
}

impl Shape {
    fn h_cols(self) -> usize {
        self.experts * self.rank
    }

    fn parameters(self, routed: bool) -> [u32; 6] {
        let sizes = [self.tokens, self.experts, self.rank, self.z_cols].map(|size| size as u32);
        let [tokens, experts, rank, z_cols] = sizes;
        [tokens, experts, rank, z_cols, bits(self.constant), u32::from(routed)]
    }

    /// The columns of `z` that are computed from one dropped input, with the rows of `A` for them and
    /// the mask that drops it.
    fn parts(self, mask: Mask) -> Vec<(Range<usize>, usize, Option<Dropout>)> {
        let whole = |dropout| vec![(0..self.z_cols, 0, dropout)];
        match mask {
            Mask::None => whole(None),
            Mask::Shared(dropout) => whole(Some(dropout)),
            Mask::PerExpert(dropout) if self.experts == 1 => whole(Some(dropout)),
            Mask::PerExpert(dropout) => (0..self.experts)
                .map(|expert| {
                    let columns = expert * self.rank..(expert + 1) * self.rank;
                    let a_first = if self.a_rows == self.rank { 0 } else { columns.start };
                    (columns, a_first, Some(dropout.stream(expert as u64)))
                })
                .collect(),
        }
    }
}

/// `x` under a mask.
fn dropped(x: &Tensor, mask: Option<Dropout>) -> Tensor {
    let mut x = x.clone();
    if let Some(mask) = mask.filter(|mask| mask.probability > 0.0) {
        pointwise::dropout(&mut x, mask).expect("it lies on the device");
    }
    x
}

/// What a router reads.
#[derive(Clone, Copy, PartialEq)]
enum Reads {
    Nothing,
    Input,
    LowRank,
    Given,
}

/// Everything the backward needs.
struct Kept {
    device: Device,
    x: Saved,
    z: Tensor,
    gates: Option<Tensor>,
    a: Tensor,
    b: Tensor,
    router: Option<Tensor>,
    reads: Reads,
    scale: f64,
    mask: Mask,
    shape: Shape,
}

/// `y0` and the update. The caller has checked that the shapes agree.
pub(crate) fn update(x: &Var, y0: &Var, p: &LowRank<'_>, z_cols: usize) -> Option<Output> {
    let (a, b) = (p.a.value(), p.b.value());
    let shape = Shape {
        tokens: x.value().rows(),
        inputs: x.value().cols(),
        outputs: y0.value().cols(),
        experts: p.num_experts,
        rank: b.cols() / p.num_experts,
        z_cols,
        a_rows: a.rows(),
        constant: if matches!(p.gate, Gate::Uniform) { 1.0 / p.num_experts as f64 } else { 1.0 },
    };
    let h_len = shape.tokens * shape.h_cols();
    let device = device_of(&[x.value(), y0.value(), a, b], &[h_len])?;
    let (reads, router, bias, given) = match p.gate {
        Gate::One | Gate::Uniform => (Reads::Nothing, None, None, None),
        Gate::Input { weight, bias } => (Reads::Input, Some(weight), bias, None),
        Gate::LowRank { weight, bias } => (Reads::LowRank, Some(weight), bias, None),
        Gate::Given(gates) => (Reads::Given, None, None, Some(gates)),
    };
    // Held there once, for the way back too.
    let [here, a, b] = [x.value(), a, b].map(|tensor| tensor.to_device(&device));
    let router_value = router.map(|router| router.value().to_device(&device));

    let z = low_rank_input(&device, &here, &a, p.mask, shape);
    let scores = router_value.as_ref().map(|router| {
        let read = if reads == Reads::LowRank { &z } else { &here };
        product(&device, read, router)
    });
    let gates = scores
        .map(|scores| device.gates(&scores, bias.map(Var::value)))
        .or_else(|| given.map(|gates| gates.value().to_device(&device)));
    let h = mixed(&device, &z, gates.as_ref(), shape);
    let (h, heads) = (device.holding(&h), device.holding(&b));
    let heads = Matrix::new(&heads, shape.outputs, shape.h_cols()).t();
    let h = Matrix::new(&h, shape.tokens, shape.h_cols());
    let y = device.product(h, heads, p.scale, Some(y0.value())).tensor(y0.value().shape());

    let none = Var::constant(Tensor::zeros(y.dtype(), [0]));
    let parents =
        [x, y0, p.a, p.b, router.unwrap_or(&none), bias.unwrap_or(&none), given.unwrap_or(&none)];
    let kept = Kept {
        device,
        x: x.save(),
        z,
        gates: gates.clone(),
        a,
        b,
        router: router_value,
        reads,
        scale: p.scale,
        mask: p.mask,
        shape,
    };
    let y = Var::computed(y, &parents, move |dy, parents| kept.backward(dy, parents));
    Some(Output { y, gates })
}

fn product(device: &Device, x: &Tensor, m: &Tensor) -> Tensor {
    let (left, right) = (device.holding(x), device.holding(m));
    let right = Matrix::new(&right, m.rows(), m.cols()).t();
    times(device, Matrix::new(&left, x.rows(), x.cols()), right)
}

fn low_rank_input(device: &Device, x: &Tensor, a: &Tensor, mask: Mask, shape: Shape) -> Tensor {
    let a = device.holding(a);
    let a = Matrix::new(&a, shape.a_rows, shape.inputs);
    let z = DeviceBuffer::room(device, shape.tokens * shape.z_cols);
    for (columns, a_first, dropout) in shape.parts(mask) {
        let x = device.holding(&dropped(x, dropout));
        let x = Matrix::new(&x, shape.tokens, shape.inputs);
        let a = a.rows(a_first, columns.len()).t();
        device.product_into(&z, columns.start, shape.z_cols, x, a, 1.0, false);
    }
    z.tensor([shape.tokens, shape.z_cols])
}

fn mixed(device: &Device, z: &Tensor, gates: Option<&Tensor>, shape: Shape) -> Tensor {
    let len = shape.tokens * shape.h_cols();
    let given = shape.parameters(gates.is_some());
    let z = device.holding(z);
    let gates = gates.map_or_else(|| z.clone(), |gates| device.holding(gates));
    let [h] = device.each(&MIX, &given, &[&z, &gates], [len], len);
    h.tensor([shape.tokens, shape.h_cols()])
}

impl Kept {
    fn backward(&self, dy: Tensor, parents: &mut ParentGradients<'_>) {
        let _part = crate::profile::part("gated_low_rank backward");
        let (device, shape) = (&self.device, self.shape);
        let dy_here = device.holding(&dy);
        let dy_here = Matrix::new(&dy_here, shape.tokens, shape.outputs);
        if parents.needs(3) {
            let h = mixed(device, &self.z, self.gates.as_ref(), shape);
            let h = device.holding(&h);
            let h = Matrix::new(&h, shape.tokens, shape.h_cols());
            let db = device.product(dy_here.t(), h, self.scale, None);
            parents.add(3, db.tensor(self.b.shape()));
        }
        if [0, 2, 4, 5, 6].iter().any(|&parent| parents.needs(parent)) {
            let b = device.holding(&self.b);
            let b = Matrix::new(&b, shape.outputs, shape.h_cols());
            let dh = device.product(dy_here, b, self.scale, None);
            self.below(&dh, parents);
        }
        parents.add(1, dy);
    }

    /// From the gradient of the mixture to everything it was made of.
    fn below(&self, dh: &DeviceBuffer, parents: &mut ParentGradients<'_>) {
        let (device, shape) = (&self.device, self.shape);
        let given = shape.parameters(self.gates.is_some());
        let gates = self.gates.as_ref().map(|gates| device.holding(gates));
        let z_len = shape.tokens * shape.z_cols;
        let inputs = [dh, gates.as_ref().unwrap_or(dh)];
        let [dz] = device.each(&MIX_BACKWARD, &given, &inputs, [z_len], z_len);
        let mut dz = dz.tensor([shape.tokens, shape.z_cols]);
        if let Some(gates) = &self.gates {
            let inputs = [dh, &device.holding(&self.z)];
            let len = gates.len();
            let [dw] = device.each(&MIX_BACKWARD_GATES, &given, &inputs, [len], len);
            let dw = dw.tensor(gates.shape());
            if self.reads == Reads::Given {
                parents.add(6, dw);
            } else {
                self.router_backward(&device.gates_backward(&dw, gates), &mut dz, parents);
            }
        }
        let dz = device.holding(&dz);
        let dz = Matrix::new(&dz, shape.tokens, shape.z_cols);
        if parents.needs(2) {
            self.a_gradient(dz, parents);
        }
        if parents.needs(0) {
            self.input_gradient(dz, parents);
        }
    }

    /// Into the router and what it reads, from the gradient of its scores.
    fn router_backward(&self, ds: &Tensor, dz: &mut Tensor, parents: &mut ParentGradients<'_>) {
        let (device, shape) = (&self.device, self.shape);
        if parents.needs(5) {
            parents.add(5, device.column_sums(ds));
        }
        let router = self.router.as_ref().expect("a routed update has a router");
        let read = router.cols();
        let ds = device.holding(ds);
        let ds = Matrix::new(&ds, shape.tokens, shape.experts);
        if parents.needs(4) {
            let source = if self.reads == Reads::LowRank { self.z.clone() } else { self.x.get() };
            let source = device.holding(&source);
            let dw = times(device, ds.t(), Matrix::new(&source, shape.tokens, read));
            parents.add(4, dw);
        }
        let router = device.holding(router);
        let router = Matrix::new(&router, shape.experts, read);
        if self.reads == Reads::LowRank {
            *dz = device.product(ds, router, 1.0, Some(dz)).tensor(dz.shape());
        } else if parents.needs(0) {
            add_product(device, parents, 0, ds, router);
        }
    }

    fn a_gradient(&self, dz: Matrix<'_>, parents: &mut ParentGradients<'_>) {
        let (device, shape) = (&self.device, self.shape);
        let x = self.x.get().to_device(device);
        let parts = shape.parts(self.mask);
        // Experts with one `A` between them add up in it.
        let shared = parts.len() > 1 && shape.a_rows == shape.rank;
        let da = DeviceBuffer::room(device, shape.a_rows * shape.inputs);
        for (index, (columns, a_first, dropout)) in parts.into_iter().enumerate() {
            let x = device.holding(&dropped(&x, dropout));
            let x = Matrix::new(&x, shape.tokens, shape.inputs);
            let dz = dz.columns(columns.start, columns.len()).t();
            let start = a_first * shape.inputs;
            device.product_into(&da, start, shape.inputs, dz, x, 1.0, shared && index > 0);
        }
        parents.add(2, da.tensor(self.a.shape()));
    }

    fn input_gradient(&self, dz: Matrix<'_>, parents: &mut ParentGradients<'_>) {
        let (device, shape) = (&self.device, self.shape);
        let a = device.holding(&self.a);
        let a = Matrix::new(&a, shape.a_rows, shape.inputs);
        for (columns, a_first, dropout) in shape.parts(self.mask) {
            let dz = dz.columns(columns.start, columns.len());
            let a = a.rows(a_first, columns.len());
            if dropout.is_none() {
                add_product(device, parents, 0, dz, a);
            } else {
                parents.add(0, dropped(&times(device, dz, a), dropout));
            }
        }
    }
}

/// `x Wᵀ + b`, all three trained.
pub(crate) fn linear(x: &Var, weight: &Var, bias: Option<&Var>) -> Option<Var> {
    let (rows, cols) = (x.value().rows(), weight.value().rows());
    let device = device_of(&[x.value(), weight.value()], &[rows * cols])?;
    let kept_weight = weight.value().to_device(&device);
    let mut y = product(&device, x.value(), &kept_weight);
    if let Some(bias) = bias {
        y = pointwise::add_columns(&y, bias.value())?;
    }
    let none = Var::constant(Tensor::zeros(y.dtype(), [0]));
    let kept_x = x.save();
    Some(Var::computed(y, &[x, weight, bias.unwrap_or(&none)], move |dy, parents| {
        through_product(&device, &dy, &kept_x, &kept_weight, parents);
    }))
}

/// `softmax(x Wᵀ + b)`.
pub(crate) fn router_gates(x: &Var, weight: &Var, bias: Option<&Var>) -> Option<Var> {
    let (rows, cols) = (x.value().rows(), weight.value().rows());
    let device = device_of(&[x.value(), weight.value()], &[rows * cols])?;
    let kept_weight = weight.value().to_device(&device);
    let scores = product(&device, x.value(), &kept_weight);
    let gates = device.gates(&scores, bias.map(Var::value));
    let none = Var::constant(Tensor::zeros(gates.dtype(), [0]));
    let (kept_x, kept_gates) = (x.save(), gates.clone());
    Some(Var::computed(gates, &[x, weight, bias.unwrap_or(&none)], move |dw, parents| {
        let ds = device.gates_backward(&dw, &kept_gates);
        through_product(&device, &ds, &kept_x, &kept_weight, parents);
    }))
}

/// The gradients of input, weight and bias from that of `x Wᵀ + b`.
fn through_product(
    device: &Device,
    dy: &Tensor,
    x: &Saved,
    weight: &Tensor,
    parents: &mut ParentGradients<'_>,
) {
    if parents.needs(2) {
        parents.add(2, device.column_sums(dy));
    }
    let (rows, outputs, inputs) = (dy.rows(), dy.cols(), weight.cols());
    let dy = device.holding(dy);
    let dy = Matrix::new(&dy, rows, outputs);
    if parents.needs(1) {
        let x = device.holding(&x.get());
        add_product(device, parents, 1, dy.t(), Matrix::new(&x, rows, inputs));
    }
    if parents.needs(0) {
        let weight = device.holding(weight);
        add_product(device, parents, 0, dy, Matrix::new(&weight, outputs, inputs));
    }
}
