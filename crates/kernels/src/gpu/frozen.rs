//! Products with weights that never change.

use super::product::Matrix;
use super::{Device, DeviceBuffer, fits};
use crate::block::BlockFormat;
use crate::element::DType;
use crate::ops::frozen_linear::{FrozenLinear, FrozenWeight};
use crate::tensor::Tensor;
use std::sync::{Arc, OnceLock};

/// Most elements of a packed weight that are widened at a time.
const WIDENED: usize = 4 << 20;

/// A weight's place on a device.
pub(crate) struct Placed {
    device: Device,
    /// The whole weight there, in as many pieces as the device needs, from its first use in a product
    /// on. A packed weight has none: it is widened piece by piece where it is used.
    kept: Option<OnceLock<Vec<Piece>>>,
}

impl Placed {
    pub(super) fn device(&self) -> &Device {
        &self.device
    }
}

/// Some rows of a weight.
struct Piece {
    first: usize,
    rows: usize,
    buffer: DeviceBuffer,
}

impl FrozenLinear {
    /// The same layer with a place on `device`, where it computes from then on. Plain numbers are
    /// copied there once, packed ones widened and copied whenever they are used. A layer of `f64`
    /// stays on the host.
    #[must_use]
    pub fn to_device(&self, device: &Device) -> Self {
        if self.dtype() != DType::F32 {
            return self.clone();
        }
        let plain = match self.weight() {
            FrozenWeight::Dense(_) => true,
            FrozenWeight::Blocks { format, .. } => *format == BlockFormat::F32,
        };
        let kept = plain.then(OnceLock::new);
        self.placed_at(Some(Arc::new(Placed { device: device.clone(), kept })))
    }

    /// Copies pieces of at most so many elements to the device.
    fn in_pieces(&self, device: &Device, most: usize, mut take: impl FnMut(Piece)) {
        let (all, cols) = (self.out_features(), self.in_features());
        let step = (most / cols.max(1)).max(1);
        for first in (0..all).step_by(step) {
            let rows = step.min(all - first);
            let buffer = DeviceBuffer::upload(device, &self.dense_rows(first, rows));
            take(Piece { first, rows, buffer });
        }
    }

    /// Shows all pieces in order.
    fn each_piece(&self, device: &Device, mut show: impl FnMut(&Piece)) {
        let placed = self.placed().filter(|placed| placed.device == *device);
        match placed.and_then(|placed| Some((&placed.device, placed.kept.as_ref()?))) {
            Some((device, kept)) => {
                let copy = || {
                    let mut pieces = Vec::new();
                    self.in_pieces(device, device.largest(), |piece| pieces.push(piece));
                    pieces
                };
                kept.get_or_init(copy).iter().for_each(show);
            }
            None => self.in_pieces(device, WIDENED.min(device.largest()), |piece| show(&piece)),
        }
    }

    /// Where a product with `given` runs: on the layer's device, or else on that of what is given.
    fn site(&self, given: &Tensor, results: usize) -> Option<Device> {
        let device = match (self.placed(), given.device()) {
            (Some(placed), _) => placed.device.clone(),
            (None, Some(device)) => device.clone(),
            (None, None) => return None,
        };
        let fit = given.dtype() == DType::F32
            && self.in_features() > 0
            && fits(&device, given.len())
            && fits(&device, results);
        fit.then_some(device)
    }
}

/// `x Wᵀ + b`.
pub(crate) fn apply(layer: &FrozenLinear, x: &Tensor) -> Option<Tensor> {
    let (rows, inner, cols) = (x.rows(), layer.in_features(), layer.out_features());
    let device = layer.site(x, rows * cols)?;
    let x_here = device.holding(x);
    let out = DeviceBuffer::room(&device, rows * cols);
    layer.each_piece(&device, |piece| {
        let left = Matrix::new(&x_here, rows, inner);
        let right = Matrix::new(&piece.buffer, piece.rows, inner).t();
        device.product_into(&out, piece.first, cols, left, right, 1.0, false);
    });
    let y = out.tensor([rows, cols]);
    match layer.bias() {
        Some(bias) => super::pointwise::add_columns(&y, bias),
        None => Some(y),
    }
}

/// `dy W`, added to `carried`.
pub(crate) fn input_gradient(
    layer: &FrozenLinear,
    gradient: &Tensor,
    carried: Option<&Tensor>,
) -> Option<Tensor> {
    let (rows, inner, cols) = (gradient.rows(), layer.in_features(), layer.out_features());
    let device = layer.site(gradient, rows * inner)?;
    let gradient = device.holding(gradient);
    let out = device.sum_from(rows * inner, carried);
    let mut adds = carried.is_some();
    layer.each_piece(&device, |piece| {
        let left = Matrix::new(&gradient, rows, cols).columns(piece.first, piece.rows);
        let right = Matrix::new(&piece.buffer, piece.rows, inner);
        device.product_into(&out, 0, inner, left, right, 1.0, adds);
        adds = true;
    });
    Some(out.tensor([rows, inner]))
}

/// Rows of the weight, looked up on the host.
pub(crate) fn gather(layer: &FrozenLinear, ids: &[u32]) -> Option<Tensor> {
    let device = &layer.placed()?.device;
    Some(layer.placed_at(None).gather(ids).to_device(device))
}
