//! The loss through a frozen output layer.

use super::{DeviceBuffer, Kernel, bits, fits, frozen, rows};
use crate::graph::Var;
use crate::ops::cross_entropy::{CHUNK_ROWS, CrossEntropy};
use crate::ops::frozen_linear::FrozenLinear;
use crate::tensor::Tensor;

const SOFTMAX_LOSS: Kernel = Kernel {
    source: concat!(
        include_str!("shaders/reduce.wgsl"),
        include_str!("shaders/cross_entropy.wgsl")
    ),
    name: "softmax_loss",
};

/// Cross-entropy of the rows of `hidden` that are `labelled`, as many at a time as the device can
/// hold logits of.
pub(crate) fn linear_cross_entropy(
    hidden: &Var,
    head: &FrozenLinear,
    labels: &[u32],
    labelled: &[usize],
    factor: f64,
) -> Option<CrossEntropy> {
    let h = hidden.value();
    let device = match (head.placed(), h.device()) {
        (Some(placed), _) => placed.device().clone(),
        (None, Some(device)) => device.clone(),
        (None, None) => return None,
    };
    let vocabulary = head.out_features();
    if labelled.is_empty() || !fits(&device, vocabulary) || !fits(&device, h.len()) {
        return None;
    }
    let h = h.to_device(&device);
    let step = CHUNK_ROWS.min(device.largest() / vocabulary);
    let wanted = hidden.needs_grad();
    let mut token_losses = Vec::with_capacity(labelled.len());
    let mut gradients = Vec::new();
    for chunk in labelled.chunks(step) {
        let targets: Vec<u32> = chunk.iter().map(|&row| labels[row]).collect();
        let targets = DeviceBuffer::upload(&device, &targets);
        let logits = frozen::apply(head, &rows::select(&h, chunk)?)?;
        let logits_here = device.holding(&logits);
        let found = DeviceBuffer::room(&device, 2 * chunk.len());
        let given = [chunk.len() as u32, vocabulary as u32, bits(factor)];
        // The logits are this loop's own: nobody sees them change.
        let changed = [logits_here.raw(), found.raw()];
        let grid = device.spread(chunk.len());
        device.run(&SOFTMAX_LOSS, &given, &[targets.raw()], &changed, grid);
        let losses = found.host().chunks_exact(2).map(|of_row| {
            let (sum, wanted) = (f64::from(of_row[0]), f64::from(of_row[1]));
            sum.ln() - wanted
        });
        token_losses.extend(losses);
        if wanted {
            gradients.push(frozen::input_gradient(head, &logits, None)?);
        }
    }
    let total = factor * token_losses.iter().sum::<f64>();
    let (kept_rows, shape) = (labelled.to_vec(), h.shape().to_vec());
    let loss = Var::computed(Tensor::scalar(h.dtype(), total), &[hidden], move |seed, parents| {
        let seed = seed.item();
        let mut sum: Option<Tensor> = None;
        for (chunk, gradient) in kept_rows.chunks(step).zip(&gradients) {
            let placed =
                rows::scatter(gradient, chunk, &shape).expect("it fits, as the input does");
            match &mut sum {
                Some(sum) => sum.add_assign(&placed),
                None => sum = Some(placed),
            }
        }
        if let Some(mut sum) = sum {
            if seed != 1.0 {
                sum.scale(seed);
            }
            parents.add(0, sum);
        }
    });
    Some(CrossEntropy { loss, rows: labelled.to_vec(), token_losses })
}
