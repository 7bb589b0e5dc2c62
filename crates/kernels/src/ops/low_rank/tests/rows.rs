//! Layers whose updates belong to ranges of rows, as in a batch of several adapters.

use super::number;
use crate::block::{BlockFormat, quantize};
use crate::check;
use crate::dense;
use crate::element::DType;
use crate::graph::Var;
use crate::ops::dropout::Dropout;
use crate::ops::frozen_linear::{FrozenLinear, FrozenWeight};
use crate::ops::low_rank::{AdaptedLayer, AdaptedOutput, Gate, LowRank, Mask, adapted_linears};
use crate::tensor::Tensor;
use std::ops::Range;

/// Long enough for the kernels of long rows, and a whole number of packed blocks.
const INPUTS: usize = 288;
/// More than a panel, and no whole number of them.
const OUTPUTS: usize = 101;

/// An adapter's tensors: `A`, `B`, router weight and bias.
struct Tensors {
    rank: usize,
    experts: usize,
    kind: &'static str,
    v: Vec<Var>,
    /// Gates of every row there can be.
    gates: Tensor,
}

impl Tensors {
    fn new(rank: usize, experts: usize, own_a: bool, kind: &'static str) -> Self {
        let z_cols = if own_a { experts * rank } else { rank };
        let reads = if kind == "low-rank" { z_cols } else { INPUTS };
        let shapes: [&[usize]; 5] = [
            &[z_cols, INPUTS],
            &[OUTPUTS, experts * rank],
            &[experts, reads],
            &[experts],
            &[300, experts],
        ];
        let mut v: Vec<Var> = check::inputs(&shapes)
            .iter()
            .map(|v| Var::constant(v.value().to_dtype(DType::F32)))
            .collect();
        let gates = v.pop().unwrap().into_value();
        Self { rank, experts, kind, v, gates }
    }

    /// The given gates of `count` rows.
    fn given(&self, rows: &Range<usize>) -> Var {
        let gates = &self.gates.data::<f32>()[rows.start * self.experts..rows.end * self.experts];
        Var::constant(Tensor::new(gates.to_vec(), [rows.len(), self.experts]))
    }

    fn update<'a>(&'a self, given: &'a Var) -> LowRank<'a> {
        let gate = match self.kind {
            "one" => Gate::One,
            "input" => Gate::Input { weight: &self.v[2], bias: Some(&self.v[3]) },
            "low-rank" => Gate::LowRank { weight: &self.v[2], bias: None },
            "given" => Gate::Given(given),
            other => panic!("{other}"),
        };
        let scale = 1.0 / self.rank as f64;
        let (a, b, num_experts) = (&self.v[0], &self.v[1], self.experts);
        LowRank { a, b, num_experts, gate, scale, mask: Mask::None }
    }
}

fn adapters() -> [Tensors; 4] {
    [
        Tensors::new(3, 1, false, "one"),
        Tensors::new(2, 4, false, "input"),
        Tensors::new(5, 3, true, "low-rank"),
        Tensors::new(4, 2, false, "given"),
    ]
}

fn layers() -> [FrozenLinear; 3] {
    let weight: Vec<f32> = (0..OUTPUTS * INPUTS).map(number).collect();
    let packed = |format| {
        let mut bytes = Vec::new();
        quantize(format, &weight, &mut bytes);
        let (shape, dtype) = ([OUTPUTS, INPUTS], DType::F32);
        let weight = FrozenWeight::Blocks { format, bytes: bytes.into(), shape, dtype };
        FrozenLinear::new(weight, None)
    };
    let bias = Tensor::new((0..OUTPUTS).map(number).collect::<Vec<_>>(), [OUTPUTS]);
    let dense = FrozenWeight::Dense(Tensor::new(weight.clone(), [OUTPUTS, INPUTS]));
    [FrozenLinear::new(dense, Some(bias)), packed(BlockFormat::Q8_0), packed(BlockFormat::Q4_0)]
}

/// Rows in turn with adapters 0, none, 1, 2, 3 and 1 until `total` is reached, so many at a time.
fn assigned(total: usize, lens: &[usize]) -> Vec<(Range<usize>, Option<usize>)> {
    let adapters = [Some(0), None, Some(1), Some(2), Some(3), Some(1)];
    let mut first = 0;
    let turns = adapters.into_iter().cycle().zip(lens.iter().cycle());
    turns
        .map_while(|(adapter, len)| {
            let rows = first..(first + len).min(total);
            first = rows.end;
            (!rows.is_empty()).then_some((rows, adapter))
        })
        .collect()
}

fn input(rows: usize) -> Vec<f32> {
    (0..rows * INPUTS).map(|i| number(i * 7 + 3)).collect()
}

fn numbers(output: &AdaptedOutput) -> (Vec<f32>, Vec<Option<Vec<f32>>>) {
    let gates = output.gates.iter().map(|gates| gates.as_ref().map(Tensor::to_f32));
    (output.y.value().to_f32(), gates.collect())
}

/// Compares a batch with each of its ranges by itself: bit for bit, if the same kernel computes both.
fn compare(total: usize, lens: &[usize]) {
    let (adapters, layers, x) = (adapters(), layers(), input(total));
    let assigned = assigned(total, lens);
    let given: Vec<Option<Var>> = assigned
        .iter()
        .map(|(rows, adapter)| adapter.map(|adapter| adapters[adapter].given(rows)))
        .collect();
    let updates: Vec<(Range<usize>, LowRank<'_>)> = assigned
        .iter()
        .zip(&given)
        .filter_map(|((rows, adapter), given)| {
            Some((rows.clone(), adapters[(*adapter)?].update(given.as_ref()?)))
        })
        .collect();
    let all = Var::constant(Tensor::new(x.clone(), [total, INPUTS]));
    // One layer has no update at all beside those that have several.
    let described =
        [0, 1, 2, 0].map(|at: usize| AdaptedLayer { frozen: &layers[at], updates: vec![] });
    let mut described: Vec<AdaptedLayer<'_>> = described.into();
    described[..3].iter_mut().for_each(|layer| layer.updates.clone_from(&updates));
    for threads in [1, 3] {
        let pool = hydralora_runtime::Pool::new(threads);
        let together = || adapted_linears(&all, &described);
        let batch: Vec<_> = pool.enter(together).iter().map(numbers).collect();
        let mut number_of_update = 0;
        for (rows, adapter) in &assigned {
            let same_kernel = dense::are_few(total) || !dense::are_few(rows.len());
            let x = x[rows.start * INPUTS..rows.end * INPUTS].to_vec();
            let x = Var::constant(Tensor::new(x, [rows.len(), INPUTS]));
            for (at, layer) in described.iter().enumerate() {
                let adapter = adapter.filter(|_| at < 3).map(|adapter| &adapters[adapter]);
                let given = adapter.map(|adapter| adapter.given(rows));
                let update = adapter.zip(given.as_ref()).map(|(a, given)| a.update(given));
                let alone = [AdaptedLayer::new(layer.frozen, rows.len(), update)];
                let (alone, gates) = numbers(&adapted_linears(&x, &alone)[0]);
                let what = format!("rows {rows:?} of {total}, layer {at}, {threads} threads");
                let y = &batch[at].0[rows.start * OUTPUTS..rows.end * OUTPUTS];
                if same_kernel {
                    assert_eq!(y, alone, "{what}");
                    if update.is_some() {
                        assert_eq!(batch[at].1[number_of_update], gates[0], "{what}");
                    }
                } else {
                    for (batch, alone) in y.iter().zip(&alone) {
                        assert!((batch - alone).abs() < 2e-3, "{what}: {batch} {alone}");
                    }
                }
            }
            number_of_update += usize::from(adapter.is_some());
        }
    }
}

#[test]
fn a_batch_of_several_adapters_is_decoded_as_each_by_itself() {
    for total in 1..=dense::FEWEST_ROWS - 1 {
        compare(total, &[1]);
        compare(total, &[1, 1, 2, 3, 1]);
        compare(total, &[4, 2, 5]);
    }
    let most = 64;
    let _guard = crate::few_rows(most);
    for total in [16, 31, 48, most] {
        compare(total, &[1]);
        compare(total, &[1, 1, 2, 3, 1, 16, 7]);
    }
}

#[test]
fn a_batch_of_several_adapters_is_prefilled_as_each_by_itself() {
    compare(16, &[1, 2, 3]);
    compare(47, &[16, 31]);
    compare(130, &[17, 1, 16, 33, 5, 20, 40]);
    compare(300, &[100, 16, 90, 50]);
    compare(250, &[250]);
}

#[test]
fn updates_of_ranges_of_rows_have_gradients() {
    let shapes: [&[usize]; 8] =
        [&[6, 3], &[2, 3], &[4, 2], &[2, 3], &[4, 4], &[2, 3], &[2], &[3, 2]];
    let weight: Vec<f64> = (0..12).map(|i| f64::from(number(i))).collect();
    let frozen = FrozenLinear::dense(Tensor::from_f64(DType::F64, &weight, [4, 3]));
    let dropout = Dropout { probability: 0.3, seed: 11 };
    check::gradients(&shapes, |v| {
        let update =
            |a, b, num_experts, gate, mask| LowRank { a, b, num_experts, gate, scale: 1.3, mask };
        let router = Gate::Input { weight: &v[5], bias: Some(&v[6]) };
        let given = Gate::Given(&v[7]);
        let layer = AdaptedLayer {
            frozen: &frozen,
            updates: vec![
                (0..2, update(&v[1], &v[2], 1, Gate::One, Mask::Shared(dropout))),
                (3..3, update(&v[1], &v[2], 1, Gate::One, Mask::None)),
                (3..6, update(&v[3], &v[4], 2, given, Mask::PerExpert(dropout))),
            ],
        };
        let first = adapted_linears(&v[0], &[layer]).remove(0).y;
        let layer = AdaptedLayer {
            frozen: &frozen,
            updates: vec![(1..6, update(&v[3], &v[4], 2, router, Mask::None))],
        };
        let second = adapted_linears(&v[0], &[layer]).remove(0).y;
        crate::ops::elementwise::add(&first, second)
    });
}

#[test]
fn with_and_without_gradients_agree() {
    let (adapters, layers, total) = (adapters(), layers(), 60);
    let given = adapters[3].given(&(0..20));
    let updates = vec![
        (0..17, adapters[1].update(&given)),
        (20..40, adapters[3].update(&given)),
        (40..60, adapters[2].update(&given)),
    ];
    let layer = AdaptedLayer { frozen: &layers[0], updates };
    let x = Tensor::new(input(total), [total, INPUTS]);
    let run = |x: Var| numbers(&adapted_linears(&x, std::slice::from_ref(&layer))[0]).0;
    let (with, without) = (run(Var::leaf(x.clone())), run(Var::constant(x)));
    for (with, without) in with.iter().zip(&without) {
        assert!((with - without).abs() < 1e-3, "{with} {without}");
    }
}

#[test]
#[should_panic(expected = "out of order")]
fn overlapping_rows_are_refused() {
    let (adapters, layers) = (adapters(), layers());
    let given = adapters[0].given(&(0..2));
    let updates = vec![(0..2, adapters[0].update(&given)), (1..3, adapters[1].update(&given))];
    let x = Var::constant(Tensor::new(input(4), [4, INPUTS]));
    let _ = adapted_linears(&x, &[AdaptedLayer { frozen: &layers[0], updates }]);
}
