//! Every operation that has a version for a graphics device gives there what it gives on the CPU,
//! gradients included; every other one still works on tensors that lie there.
//!
//! `HYDRALORA_GPU` names the backend (`vulkan`, `gl`, …). Without an adapter the tests say so and pass;
//! `HYDRALORA_REQUIRE=gpu` makes that a failure.

use hydralora_kernels::block::{self, BlockFormat};
use hydralora_kernels::check::{self, device};
use hydralora_kernels::gpu::Device;
use hydralora_kernels::ops::activation::Activation;
use hydralora_kernels::ops::attention::{AttentionConfig, Span, causal_attention, spans};
use hydralora_kernels::ops::cross_entropy::{linear_cross_entropy, trained_cross_entropy};
use hydralora_kernels::ops::dropout::{Dropout, dropout};
use hydralora_kernels::ops::elementwise::{add, scale, scale_columns, scale_rows};
use hydralora_kernels::ops::frozen_linear::{FrozenLinear, FrozenWeight};
use hydralora_kernels::ops::linear::linear;
use hydralora_kernels::ops::low_rank::{
    Gate, LowRank, Mask, adapted_linear, gated_low_rank, router_gates,
};
use hydralora_kernels::ops::rms_norm::rms_norm;
use hydralora_kernels::ops::rope::{Frequencies, Pairs, RopeTable, rope};
use hydralora_kernels::ops::rows::{columns, drop_rows, join_columns, prepend_rows, take_rows};
use hydralora_kernels::ops::swiglu::{gated, sigmoid_gate, swiglu};
use hydralora_kernels::ops::{activation, embedding};
use hydralora_kernels::{DType, Gradients, Tensor, Var};

/// Largest error in norm, relative.
const TOLERANCE: f64 = 1e-5;

fn values(shapes: &[&[usize]]) -> Vec<Tensor> {
    check::inputs(shapes).iter().map(|v| v.value().to_dtype(DType::F32)).collect()
}

fn close(what: &str, got: &Tensor, expected: &Tensor) {
    assert_eq!(got.shape(), expected.shape(), "{what}");
    let (got, expected) = (got.to_f64(), expected.to_f64());
    let norm = expected.iter().map(|x| x * x).sum::<f64>().sqrt();
    let error = got.iter().zip(&expected).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
    // What cancels out to nearly nothing is as exact as its parts.
    let floor = 1e-2 * (expected.len() as f64).sqrt();
    assert!(error <= TOLERANCE * norm.max(floor), "{what}: off by {error} of {norm}");
}

/// What ought to lie on the device afterwards.
#[derive(Clone, Copy, PartialEq)]
enum Stays {
    /// Result and gradients: the operation ran there.
    There,
    /// Nothing is asked: it fell back.
    Anywhere,
}

/// Runs `f` on the host and with all inputs on the device and compares the results and the gradients
/// of all inputs; one that gets none on the host must get none there.
fn agrees(
    what: &str,
    stays: Stays,
    shapes: &[&[usize]],
    f: impl Fn(&[Var], Option<&Device>) -> Var,
) {
    let Some(there) = device() else { return };
    let run = |device: Option<&Device>| {
        let leaves: Vec<Var> = values(shapes)
            .into_iter()
            .map(|value| Var::leaf(device.map_or_else(|| value.clone(), |d| value.to_device(d))))
            .collect();
        let y = f(&leaves, device);
        let seed = values(&[&[1], y.value().shape()]).remove(1);
        let seed = device.map_or_else(|| seed.clone(), |device| seed.to_device(device));
        let gradients = y.backward_from(seed);
        (y, leaves, gradients)
    };
    let (host, device) = (run(None), run(Some(&there)));
    close(what, device.0.value(), host.0.value());
    let stayed = |tensor: &Tensor, what: &str| {
        let asked = stays == Stays::There && !tensor.is_empty();
        assert!(!asked || tensor.device().is_some(), "{what} came back to the host");
    };
    stayed(device.0.value(), what);
    for index in 0..shapes.len() {
        let what = format!("{what}: gradient of input {index}");
        let of = |run: &(Var, Vec<Var>, Gradients)| run.2.get(&run.1[index]).cloned();
        match (of(&device), of(&host)) {
            (Some(got), Some(expected)) => {
                close(&what, &got, &expected);
                stayed(&got, &what);
            }
            (None, None) => {}
            (got, expected) => panic!("{what}: {got:?}, on the host {expected:?}"),
        }
    }
}

fn plain(out: usize, inputs: usize, bias: bool) -> FrozenLinear {
    let mut weight = values(&[&[1], &[1], &[1], &[out, inputs], &[out]]);
    let bias = bias.then(|| weight.remove(4));
    FrozenLinear::new(FrozenWeight::Dense(weight.remove(3)), bias)
}

fn on(layer: &FrozenLinear, device: Option<&Device>) -> FrozenLinear {
    device.map_or_else(|| layer.clone(), |device| layer.to_device(device))
}

#[test]
fn frozen_layers() {
    for (rows, inputs, out) in [(1, 1, 1), (3, 5, 7), (65, 64, 130), (200, 577, 301), (17, 1024, 3)]
    {
        for bias in [false, true] {
            let layer = plain(out, inputs, bias);
            let what = format!("{rows} {inputs} {out} {bias}");
            agrees(&what, Stays::There, &[&[rows, inputs]], |v, device| {
                on(&layer, device).forward(&v[0])
            });
            // A second use adds to the gradient there is.
            agrees(&what, Stays::There, &[&[rows, inputs]], |v, device| {
                let layer = on(&layer, device);
                add(&layer.forward(&v[0]), layer.forward(&v[0]))
            });
        }
    }
    let layer = plain(3, 5, true);
    // An input from the host goes where the weight is.
    if let Some(device) = device() {
        let x = Var::leaf(values(&[&[4, 5]]).remove(0));
        let y = layer.to_device(&device).forward(&x);
        assert_eq!(y.value().device(), Some(&device));
        close("from the host", y.value(), layer.forward(&x).value());
    }
}

#[test]
fn packed_layers() {
    for format in [BlockFormat::Q8_0, BlockFormat::Q4_0, BlockFormat::F16, BlockFormat::F32] {
        let (out, inputs) = (70, 64);
        let weight = values(&[&[out, inputs]]).remove(0);
        let mut bytes = Vec::new();
        block::quantize(format, weight.data::<f32>(), &mut bytes);
        let (bytes, shape, dtype) = (bytes.into(), [out, inputs], DType::F32);
        let layer = FrozenLinear::new(FrozenWeight::Blocks { format, bytes, shape, dtype }, None);
        agrees(&format.to_string(), Stays::There, &[&[33, inputs]], |v, device| {
            on(&layer, device).forward(&v[0])
        });
        agrees(&format.to_string(), Stays::Anywhere, &[&[1, 1]], |v, device| {
            add(&Var::constant(on(&layer, device).gather(&[69, 0, 3]).reshape([192, 1])), {
                let column = vec![1.0_f32; 192];
                linear(&Var::constant(Tensor::new(column, [192, 1])), &v[0], None)
            })
        });
    }
}

#[test]
fn what_does_not_fit_is_split_or_stays_on_the_host() {
    let Some(device) = device() else { return };
    let layer = plain(301, 40, true);
    let x = Var::leaf(values(&[&[20, 40]]).remove(0));
    let seed = values(&[&[20, 301]]).remove(0);
    let expected = layer.forward(&x);
    let gradient = expected.backward_from(seed.clone());
    // Weight in pieces of 150 rows; and nothing but single rows.
    for (largest, there) in [(301 * 20, true), (1000, false)] {
        let layer = layer.to_device(&device.limited_to(largest));
        let y = layer.forward(&x);
        assert_eq!(y.value().device().is_some(), there);
        close("pieces", y.value(), expected.value());
        let got = y.backward_from(seed.clone());
        close("gradient through pieces", got.get(&x).unwrap(), gradient.get(&x).unwrap());
    }
    let labels: Vec<u32> = (0..20).map(|row| row * 13 % 301).collect();
    let loss = |layer: &FrozenLinear| {
        let found = linear_cross_entropy(&x, layer, &labels, u32::MAX, 0.5, None);
        let gradient = found.loss.backward().take(&x).unwrap();
        (found.loss.value().clone(), gradient)
    };
    let expected = loss(&layer);
    for largest in [301 * 3, 800, 300] {
        let got = loss(&layer.to_device(&device.limited_to(largest)));
        close("loss", &got.0, &expected.0);
        close("gradient of the loss", &got.1, &expected.1);
    }
}

#[test]
fn norms_and_activations() {
    for shape in [[1, 1], [3, 7], [5, 577], [130, 64]] {
        let what = format!("{shape:?}");
        agrees(&what, Stays::There, &[&shape, &[shape[1]]], |v, _| rms_norm(&v[0], &v[1], 1e-5));
        agrees(&what, Stays::There, &[&shape, &[shape[1]]], |v, _| {
            let once = rms_norm(&v[0], &v[1], 1e-5);
            add(&once, rms_norm(&v[0], &v[1], 1e-5))
        });
        agrees(&what, Stays::There, &[&shape, &shape], |v, _| swiglu(&v[0], &v[1]));
        agrees(&what, Stays::There, &[&shape], |v, _| add(&v[0], v[0].clone()));
        agrees(&what, Stays::There, &[&shape], |v, _| scale(&v[0], -1.5));
    }
    agrees("nothing", Stays::Anywhere, &[&[0, 4], &[0, 4]], |v, _| swiglu(&v[0], &v[1]));
    agrees("large", Stays::There, &[&[300, 1000], &[300, 1000]], |v, _| swiglu(&v[0], &v[1]));
    if let Some(device) = device() {
        let gate = Tensor::new(vec![-1e4_f32, -90.0, 0.0, 90.0, 1e4], [5]).to_device(&device);
        let y = swiglu(&Var::constant(gate), &Var::constant(Tensor::new(vec![1.0_f32; 5], [5])));
        assert!(y.value().is_finite(), "{:?}", y.value().to_f64());
        assert_eq!(y.value().to_f64()[4], 1e4);
    }
}

#[test]
fn rotations() {
    let of_row = |_| Frequencies { inverse: &[1.0, 0.1, 0.03, 0.001], factor: 1.0 };
    let table = RopeTable::new(DType::F32, &[0, 1, 7, 300], 8, Pairs::Halves, of_row);
    agrees("rope", Stays::There, &[&[4, 24]], |v, _| rope(v[0].clone(), &table));
}

#[test]
fn rows_are_moved() {
    agrees("take", Stays::There, &[&[5, 3]], |v, _| take_rows(&v[0], &[4, 0, 2]));
    agrees("take none", Stays::Anywhere, &[&[5, 3]], |v, _| take_rows(&v[0], &[]));
}

#[test]
fn dropout_masks_are_those_of_the_host() {
    let mask = Dropout { probability: 0.4, seed: 0xfedc_ba98_7654_3210 };
    agrees("dropout", Stays::There, &[&[37, 100]], |v, _| dropout(&v[0], mask));
    if let Some(device) = device() {
        let x = Tensor::new(vec![1.0_f32; 70_000], [70_000]);
        assert_eq!(mask.apply(&x).to_f64(), mask.apply(&x.to_device(&device)).to_f64());
    }
}

#[test]
fn small_networks() {
    for (rows, inputs, out) in [(1, 1, 1), (40, 33, 5)] {
        let shapes: [&[usize]; 3] = [&[rows, inputs], &[out, inputs], &[out]];
        agrees("linear", Stays::There, &shapes, |v, _| linear(&v[0], &v[1], Some(&v[2])));
        agrees("gates", Stays::There, &shapes, |v, _| router_gates(&v[0], &v[1], Some(&v[2])));
        agrees("no bias", Stays::There, &shapes[..2], |v, _| {
            add(&linear(&v[0], &v[1], None), router_gates(&v[0], &v[1], None))
        });
    }
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

fn update<'a>(v: &'a [Var], kind: &str, num_experts: usize, mask: Mask) -> LowRank<'a> {
    LowRank { a: &v[1], b: &v[2], num_experts, gate: gate(kind, v), scale: 1.7, mask }
}

#[test]
fn low_rank_updates() {
    const RANK: usize = 3;
    let dropout = Dropout { probability: 0.3, seed: 11 };
    let masks = [Mask::None, Mask::Shared(dropout), Mask::PerExpert(dropout)];
    for kind in ["one", "uniform", "input", "input+bias", "low-rank", "given"] {
        for (tokens, experts, own_a) in
            [(1, 1, false), (70, 1, false), (70, 4, false), (70, 4, true)]
        {
            for mask in masks {
                let what = format!("{kind} {tokens} {experts} {own_a} {mask:?}");
                let a_rows = if own_a { experts * RANK } else { RANK };
                let own_z = own_a || (experts > 1 && matches!(mask, Mask::PerExpert(_)));
                let router = match kind {
                    "low-rank" => [experts, if own_z { experts * RANK } else { RANK }],
                    "given" => [tokens, experts],
                    _ => [experts, 37],
                };
                let b = [51, experts * RANK];
                let shapes: [&[usize]; 6] =
                    [&[tokens, 37], &[a_rows, 37], &b, &router, &[experts], &[tokens, 51]];
                agrees(&what, Stays::There, &shapes, |v, _| {
                    // The input is read again behind it: its gradient is a sum.
                    let y = gated_low_rank(&v[0], v[5].clone(), &update(v, kind, experts, mask)).y;
                    add(&y, plain(51, 37, false).forward(&v[0]))
                });
                let layer = plain(51, 37, true);
                agrees(&what, Stays::There, &shapes[..5], |v, device| {
                    adapted_linear(&v[0], &on(&layer, device), &update(v, kind, experts, mask)).y
                });
            }
        }
    }
}

#[test]
fn attention_over_packed_sequences() {
    let config = |heads, key_heads, head_dim, window| AttentionConfig {
        num_heads: heads,
        num_key_value_heads: key_heads,
        head_dim,
        scale: 0.3,
        window,
        softcap: None,
    };
    let cases = [
        (config(1, 1, 2, None), spans(&[0, 1])),
        (config(4, 2, 8, None), spans(&[0, 3, 3, 140])),
        (config(9, 3, 64, None), spans(&[0, 70, 71])),
        (config(2, 1, 80, Some(5)), spans(&[0, 9, 30])),
        (config(2, 2, 200, Some(70)), spans(&[0, 150])),
        // Learned keys before the queries, and keys that nobody sees.
        (
            config(4, 2, 8, None),
            vec![Span { queries: 0..5, keys: 0..8 }, Span { queries: 5..7, keys: 9..14 }],
        ),
        (
            config(4, 2, 8, Some(3)),
            vec![Span { queries: 0..5, keys: 0..8 }, Span { queries: 5..7, keys: 9..14 }],
        ),
    ];
    for (config, spans) in cases {
        let rows = spans.last().unwrap().queries.end;
        let keys = spans.last().unwrap().keys.end + 1;
        let width = config.num_heads * config.head_dim;
        let key_width = config.num_key_value_heads * config.head_dim;
        let shapes: [&[usize]; 3] = [&[rows, width], &[keys, key_width], &[keys, key_width]];
        let what = format!("{config:?} {spans:?}");
        agrees(&what, Stays::There, &shapes, |v, _| {
            causal_attention(&v[0], &v[1], &v[2], &spans, config)
        });
    }
    // Too wide a head, keys that two sequences share, and capped scores: on the host.
    let wide = config(1, 1, 300, None);
    agrees("wide", Stays::Anywhere, &[&[4, 300], &[4, 300], &[4, 300]], |v, _| {
        causal_attention(&v[0], &v[1], &v[2], &spans(&[0, 4]), wide)
    });
    let capped = AttentionConfig { softcap: Some(0.5), ..config(4, 2, 8, Some(5)) };
    agrees("capped", Stays::Anywhere, &[&[9, 32], &[9, 16], &[9, 16]], |v, _| {
        causal_attention(&v[0], &v[1], &v[2], &spans(&[0, 2, 9]), capped)
    });
    let shared = [Span { queries: 0..2, keys: 0..3 }, Span { queries: 2..4, keys: 1..5 }];
    agrees("shared", Stays::Anywhere, &[&[4, 4], &[5, 4], &[5, 4]], |v, _| {
        causal_attention(&v[0], &v[1], &v[2], &shared, config(2, 2, 2, None))
    });
}

#[test]
fn losses() {
    const IGNORE: u32 = u32::MAX;
    for (rows, hidden, vocabulary) in [(1, 1, 1), (5, 4, 11), (450, 20, 1003)] {
        let head = plain(vocabulary, hidden, false);
        let label = |t: u32| if t % 4 == 3 { IGNORE } else { t * 37 % vocabulary as u32 };
        let labels: Vec<u32> = (0..rows as u32).map(label).collect();
        let what = format!("{rows} {hidden} {vocabulary}");
        agrees(&what, Stays::Anywhere, &[&[rows, hidden]], |v, device| {
            let found = linear_cross_entropy(&v[0], &on(&head, device), &labels, IGNORE, 0.7, None);
            scale(&found.loss, 1.5)
        });
        agrees(&what, Stays::Anywhere, &[&[rows, hidden]], |v, device| {
            let found = linear_cross_entropy(&v[0], &on(&head, device), &labels, IGNORE, 0.7, None);
            let losses: Vec<f32> = found.token_losses.iter().map(|&loss| loss as f32).collect();
            assert_eq!(found.rows, (0..rows).filter(|t| t % 4 != 3).collect::<Vec<_>>());
            let count = losses.len();
            add(&Var::constant(Tensor::new(losses, [count])), {
                Var::constant(Tensor::zeros(DType::F32, [count]))
            })
        });
        // One whose logits are capped and one that is trained are computed on the host.
        agrees(&what, Stays::Anywhere, &[&[rows, hidden]], |v, device| {
            let head = on(&head, device);
            linear_cross_entropy(&v[0], &head, &labels, IGNORE, 0.7, Some(1.5)).loss
        });
        agrees(&what, Stays::Anywhere, &[&[rows, hidden], &[vocabulary, hidden]], |v, _| {
            trained_cross_entropy(&v[0], &v[1], &labels, IGNORE, 0.7, None).loss
        });
    }
    let none = plain(5, 3, false);
    agrees("no labels", Stays::Anywhere, &[&[2, 3]], |v, device| {
        linear_cross_entropy(&v[0], &on(&none, device), &[IGNORE, IGNORE], IGNORE, 1.0, None).loss
    });
}

#[test]
fn operations_without_a_version_fall_back() {
    agrees("columns", Stays::Anywhere, &[&[6, 3], &[3], &[6]], |v, _| {
        scale_rows(&scale_columns(&v[0], &v[1]), &v[2])
    });
    agrees("activations", Stays::Anywhere, &[&[6, 3]], |v, _| {
        activation::tanh(&activation::relu(&v[0]))
    });
    for activation in [Activation::Silu, Activation::GeluTanh] {
        agrees("gates", Stays::Anywhere, &[&[6, 3], &[6, 3]], |v, _| {
            let gate = activation::activate(&v[0], activation);
            sigmoid_gate(&gated(&gate, &v[1], activation), &v[0])
        });
    }
    agrees("joined", Stays::Anywhere, &[&[4, 5]], |v, _| {
        join_columns(&columns(&v[0], 2..5), &columns(&v[0], 0..3))
    });
    let (offsets, starts) = ([0, 2, 2, 5], [true, false, true]);
    agrees("prepended", Stays::Anywhere, &[&[2, 3], &[5, 3]], |v, _| {
        drop_rows(&prepend_rows(&v[0], &v[1], &offsets, &starts), 2, &offsets, &starts)
    });
    agrees("embedding", Stays::Anywhere, &[&[5, 3]], |v, _| {
        embedding::embedding(&v[0], &[4, 0, 4, 2])
    });
}

#[test]
fn tensors_come_back_when_they_are_changed() {
    let Some(device) = device() else { return };
    let host = values(&[&[7, 3]]).remove(0);
    let there = host.to_device(&device);
    assert_eq!(there.device(), Some(&device));
    assert_eq!(there.data::<f32>(), host.data::<f32>());
    assert_eq!(there.norm(), host.norm());
    let mut changed = there.clone();
    changed.data_mut::<f32>()[0] = 5.0;
    assert!(changed.device().is_none());
    assert_eq!(there.data::<f32>(), host.data::<f32>());
    assert_eq!(changed.data::<f32>()[0], 5.0);
    let copy = host.clone().reshape([21]).to_device(&device).reshape([3, 7]);
    assert_eq!(copy.data::<f32>(), host.data::<f32>());
    // Neither empty ones nor doubles go there.
    assert!(Tensor::zeros(DType::F32, [0, 3]).to_device(&device).device().is_none());
    assert!(Tensor::zeros(DType::F64, [3]).to_device(&device).device().is_none());
    device.finish().unwrap();
}

#[test]
fn results_repeat_exactly() {
    let Some(device) = device() else { return };
    let run = || {
        let config = AttentionConfig {
            num_heads: 4,
            num_key_value_heads: 2,
            head_dim: 8,
            scale: 0.3,
            window: None,
            softcap: None,
        };
        let v: Vec<Var> = values(&[&[90, 32], &[90, 16], &[90, 16]])
            .iter()
            .map(|value| Var::leaf(value.to_device(&device)))
            .collect();
        let y = causal_attention(&v[0], &v[1], &v[2], &spans(&[0, 40, 90]), config);
        let y = plain(50, 32, true).forward(&y);
        let gradients = y.backward_from(y.value().clone());
        v.iter().flat_map(|leaf| gradients.get(leaf).unwrap().to_f32()).collect::<Vec<f32>>()
    };
    assert_eq!(run(), run());
}
