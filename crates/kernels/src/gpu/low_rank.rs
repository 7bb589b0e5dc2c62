//! The low-rank update, and the small trained networks beside it. The formulas are those of
//! [`low_rank`](crate::ops::low_rank), step by step.

use super::product::Matrix;
use super::{Device, DeviceBuffer, Kernel, bits, device_of, pointwise};
use crate::graph::{ParentGradients, Saved, Var};
use crate::ops::dropout::Dropout;
use crate::ops::low_rank::{LowRank, Output, Parent, Parents, Plan, Route, Router};
use crate::tensor::Tensor;

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

/// `x` under a mask.
fn dropped(x: &Tensor, mask: Option<Dropout>) -> Tensor {
    let mut x = x.clone();
    if let Some(mask) = mask.filter(|mask| mask.probability > 0.0) {
        pointwise::dropout(&mut x, mask).expect("it lies on the device");
    }
    x
}

/// Everything the backward needs.
struct Kept {
    device: Device,
    plan: Plan,
    x: Saved,
    z: Tensor,
    gates: Option<Tensor>,
}

/// Adds the update to `y0`, if there is a device to do it on.
pub(crate) fn update(x: &Var, y0: &Var, update: &LowRank<'_>, plan: &Plan) -> Option<Output> {
    let h_len = plan.tokens * plan.h_cols();
    let device = device_of(&[x.value(), y0.value(), &plan.a, &plan.b], &[h_len])?;
    // Held there once, for the way back too.
    let (here, plan) = (x.value().to_device(&device), plan.on(&device));

    let z = low_rank_input(&device, &here, &plan);
    let gates = match &plan.route {
        Route::Constant(_) => None,
        Route::Given(gates) => Some(gates.clone()),
        Route::Input(router) => Some(router_of(&device, &here, router)),
        Route::LowRank(router) => Some(router_of(&device, &z, router)),
    };
    let h = mixed(&device, &z, gates.as_ref(), &plan);
    let (h, heads) = (device.holding(&h), device.holding(&plan.b));
    let heads = Matrix::new(&heads, plan.outputs, plan.h_cols()).t();
    let h = Matrix::new(&h, plan.tokens, plan.h_cols());
    let y = device.product(h, heads, plan.scale, Some(y0.value())).tensor(y0.value().shape());

    let none = Var::constant(Tensor::zeros(y.dtype(), [0]));
    let parents = Parent::all(x, Some(y0), update, &none);
    let kept = Kept { device, plan, x: x.save(), z, gates: gates.clone() };
    let y = Var::computed(y, &parents, move |dy, parents| kept.backward(dy, Parents(parents)));
    Some(Output { y, gates })
}

impl Plan {
    /// The same with its tensors on `device`.
    fn on(&self, device: &Device) -> Self {
        let router = |router: &Router| Router {
            weight: router.weight.to_device(device),
            bias: router.bias.as_ref().map(|bias| bias.to_device(device)),
        };
        let route = match &self.route {
            Route::Constant(gate) => Route::Constant(*gate),
            Route::Input(reads_x) => Route::Input(router(reads_x)),
            Route::LowRank(reads_z) => Route::LowRank(router(reads_z)),
            Route::Given(gates) => Route::Given(gates.to_device(device)),
        };
        let (a, b) = (self.a.to_device(device), self.b.to_device(device));
        Self { a, b, route, ..self.clone() }
    }

    /// The parameters of the kernels that mix.
    fn parameters(&self) -> [u32; 6] {
        let sizes = [self.tokens, self.experts, self.rank, self.z_cols].map(|size| size as u32);
        let [tokens, experts, rank, z_cols] = sizes;
        [tokens, experts, rank, z_cols, bits(self.constant_gate()), u32::from(self.routed())]
    }
}

fn product(device: &Device, x: &Tensor, m: &Tensor) -> Tensor {
    let (left, right) = (device.holding(x), device.holding(m));
    let right = Matrix::new(&right, m.rows(), m.cols()).t();
    times(device, Matrix::new(&left, x.rows(), x.cols()), right)
}

/// The gates of a router that reads `read`.
fn router_of(device: &Device, read: &Tensor, router: &Router) -> Tensor {
    device.gates(&product(device, read, &router.weight), router.bias.as_ref())
}

fn low_rank_input(device: &Device, x: &Tensor, plan: &Plan) -> Tensor {
    let a = device.holding(&plan.a);
    let a = Matrix::new(&a, plan.a.rows(), plan.inputs);
    let z = DeviceBuffer::room(device, plan.tokens * plan.z_cols);
    for part in plan.z_parts() {
        let x = device.holding(&dropped(x, part.dropout));
        let x = Matrix::new(&x, plan.tokens, plan.inputs);
        let a = a.rows(part.a_first, part.columns.len()).t();
        device.product_into(&z, part.columns.start, plan.z_cols, x, a, 1.0, false);
    }
    z.tensor([plan.tokens, plan.z_cols])
}

fn mixed(device: &Device, z: &Tensor, gates: Option<&Tensor>, plan: &Plan) -> Tensor {
    let len = plan.tokens * plan.h_cols();
    let z = device.holding(z);
    let gates = gates.map_or_else(|| z.clone(), |gates| device.holding(gates));
    let [h] = device.each(&MIX, &plan.parameters(), &[&z, &gates], [len], len);
    h.tensor([plan.tokens, plan.h_cols()])
}

impl Kept {
    fn backward(&self, dy: Tensor, mut parents: Parents<'_, '_>) {
        let _part = crate::profile::part("gated_low_rank backward");
        let (device, plan) = (&self.device, &self.plan);
        let dy_here = device.holding(&dy);
        let dy_here = Matrix::new(&dy_here, plan.tokens, plan.outputs);
        if parents.needs(Parent::B) {
            let h = mixed(device, &self.z, self.gates.as_ref(), plan);
            let h = device.holding(&h);
            let h = Matrix::new(&h, plan.tokens, plan.h_cols());
            let db = device.product(dy_here.t(), h, plan.scale, None);
            parents.add(Parent::B, db.tensor(plan.b.shape()));
        }
        if parents.need_below_heads() {
            let b = device.holding(&plan.b);
            let b = Matrix::new(&b, plan.outputs, plan.h_cols());
            let dh = device.product(dy_here, b, plan.scale, None);
            self.below(&dh, &mut parents);
        }
        parents.add(Parent::Base, dy);
    }

    /// From the gradient of the mixture to everything it was made of.
    fn below(&self, dh: &DeviceBuffer, parents: &mut Parents<'_, '_>) {
        let (device, plan) = (&self.device, &self.plan);
        let given = plan.parameters();
        let gates = self.gates.as_ref().map(|gates| device.holding(gates));
        let z_len = plan.tokens * plan.z_cols;
        let inputs = [dh, gates.as_ref().unwrap_or(dh)];
        let [dz] = device.each(&MIX_BACKWARD, &given, &inputs, [z_len], z_len);
        let mut dz = dz.tensor([plan.tokens, plan.z_cols]);
        if let Some(gates) = &self.gates {
            let inputs = [dh, &device.holding(&self.z)];
            let len = gates.len();
            let [dw] = device.each(&MIX_BACKWARD_GATES, &given, &inputs, [len], len);
            let dw = dw.tensor(gates.shape());
            match plan.router() {
                None => parents.add(Parent::Gates, dw),
                Some(router) => {
                    let ds = device.gates_backward(&dw, gates);
                    self.router_gradients(router, &ds, &mut dz, parents);
                }
            }
        }
        let dz = device.holding(&dz);
        let dz = Matrix::new(&dz, plan.tokens, plan.z_cols);
        if parents.needs(Parent::A) {
            self.a_gradient(dz, parents);
        }
        if parents.needs(Parent::X) {
            self.input_gradient(dz, parents);
        }
    }

    /// Into the router and what it reads, from the gradient of its scores.
    fn router_gradients(
        &self,
        router: &Router,
        ds: &Tensor,
        dz: &mut Tensor,
        parents: &mut Parents<'_, '_>,
    ) {
        let (device, plan) = (&self.device, &self.plan);
        if parents.needs(Parent::RouterBias) {
            parents.add(Parent::RouterBias, device.column_sums(ds));
        }
        let reads_z = matches!(plan.route, Route::LowRank(_));
        let read = router.weight.cols();
        let ds = device.holding(ds);
        let ds = Matrix::new(&ds, plan.tokens, plan.experts);
        if parents.needs(Parent::RouterWeight) {
            let source = if reads_z { self.z.clone() } else { self.x.get() };
            let source = device.holding(&source);
            let dw = times(device, ds.t(), Matrix::new(&source, plan.tokens, read));
            parents.add(Parent::RouterWeight, dw);
        }
        let weight = device.holding(&router.weight);
        let weight = Matrix::new(&weight, plan.experts, read);
        if reads_z {
            *dz = device.product(ds, weight, 1.0, Some(dz)).tensor(dz.shape());
        } else if parents.needs(Parent::X) {
            add_product(device, parents.0, Parent::X as usize, ds, weight);
        }
    }

    fn a_gradient(&self, dz: Matrix<'_>, parents: &mut Parents<'_, '_>) {
        let (device, plan) = (&self.device, &self.plan);
        let x = self.x.get().to_device(device);
        let parts = plan.z_parts();
        // Experts with one `A` between them add up in it.
        let shared = parts.len() > 1 && plan.a.rows() == plan.rank;
        let da = DeviceBuffer::room(device, plan.a.len());
        for (index, part) in parts.into_iter().enumerate() {
            let x = device.holding(&dropped(&x, part.dropout));
            let x = Matrix::new(&x, plan.tokens, plan.inputs);
            let dz = dz.columns(part.columns.start, part.columns.len()).t();
            let start = part.a_first * plan.inputs;
            device.product_into(&da, start, plan.inputs, dz, x, 1.0, shared && index > 0);
        }
        parents.add(Parent::A, da.tensor(plan.a.shape()));
    }

    fn input_gradient(&self, dz: Matrix<'_>, parents: &mut Parents<'_, '_>) {
        let (device, plan) = (&self.device, &self.plan);
        let a = device.holding(&plan.a);
        let a = Matrix::new(&a, plan.a.rows(), plan.inputs);
        for part in plan.z_parts() {
            let dz = dz.columns(part.columns.start, part.columns.len());
            let a = a.rows(part.a_first, part.columns.len());
            match part.dropout {
                None => add_product(device, parents.0, Parent::X as usize, dz, a),
                Some(_) => {
                    let dx = dropped(&times(device, dz, a), part.dropout);
                    parents.add(Parent::X, dx);
                }
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
