//! The one place where updates are applied: to all rows of a batch, or to each row that of its own
//! adapter while the base's weight is read once.

use super::{Adapter, Adapters, LowRankUpdate, Pass, Side, Site, Update};
use hydralora_kernels::Var;
use hydralora_kernels::ops::elementwise::{scale_columns, scale_columns_in_place};
use hydralora_kernels::ops::frozen_linear::FrozenLinear;
use hydralora_kernels::ops::linear::linear;
use hydralora_kernels::ops::low_rank::{AdaptedLayer, AdaptedOutput, adapted_linears};
use hydralora_kernels::ops::rows::{join_rows, take_rows};
use std::ops::Range;

/// Applies layers that read the same input `x: [T, in]`, each with what the adapters of its rows add.
pub(crate) fn linears(
    adapters: &Adapters<'_>,
    layers: &[(Site, &FrozenLinear)],
    x: &Var,
    pass: &Pass<'_>,
) -> Vec<Var> {
    let groups: Vec<Group<'_>> =
        adapters.groups(x.value().rows()).map(|group| Group::new(group, layers, x, pass)).collect();
    // Layers that only low-rank updates change, or none, are computed together.
    let plain = |at: usize| groups.iter().all(|group| group.updates[at].is_plain());
    if (0..layers.len()).all(plain) {
        let all: Vec<AdaptedLayer<'_>> =
            layers.iter().enumerate().map(|(at, (_, frozen))| layer(&groups, at, frozen)).collect();
        let outputs = adapted_linears(x, &all).into_iter().enumerate();
        return outputs
            .map(|(at, output)| report(&groups, at, layers[at].0, output, pass))
            .collect();
    }
    let one = |(at, (site, frozen)): (usize, &(Site, &FrozenLinear))| match &groups[..] {
        [all] if !plain(at) => all.other(at, *site, x, frozen, pass),
        _ => {
            let mut output = adapted_linears(x, &[layer(&groups, at, frozen)]);
            let y = report(&groups, at, *site, output.remove(0), pass);
            if plain(at) { y } else { with_others(&groups, at, *site, y, x, frozen, pass) }
        }
    };
    layers.iter().enumerate().map(one).collect()
}

/// The rows of one adapter, and what it adds to each layer.
struct Group<'a> {
    rows: Range<usize>,
    updates: Vec<Resolved<'a>>,
}

/// An update and the gates that are known beforehand.
struct Resolved<'a> {
    update: Update<'a>,
    gates: Option<Var>,
    block_gates: Option<Var>,
}

impl<'a> Group<'a> {
    fn new(
        (number, rows, adapter): (usize, Range<usize>, &'a dyn Adapter),
        layers: &[(Site, &FrozenLinear)],
        x: &Var,
        pass: &Pass<'_>,
    ) -> Self {
        pass.at_rows(&rows);
        let whole = rows == (0..x.value().rows());
        let own = (!whole).then(|| some_rows(x, &rows));
        let x = own.as_ref().unwrap_or(x);
        let resolve = |(site, _): &(Site, &FrozenLinear)| {
            // A block's gates may be for a later layer of it.
            let block_gates = adapter.shares_in_block(*site, pass).then(|| {
                let compute = || adapter.of_block(*site, x, pass);
                pass.shared_by(number, site.layer, site.linear.block(), compute)
            });
            let update = adapter.update(*site, x.value().rows(), pass);
            let gates = match &update {
                Update::LowRank(update) => {
                    update.gates_beforehand(*site, x, block_gates.as_ref(), pass)
                }
                _ => None,
            };
            Resolved { update, gates, block_gates }
        };
        Self { rows, updates: layers.iter().map(resolve).collect() }
    }

    /// Layer `at` with an update that is no low-rank one, for the group's rows `x`.
    fn other(&self, at: usize, site: Site, x: &Var, frozen: &FrozenLinear, pass: &Pass<'_>) -> Var {
        pass.at_rows(&self.rows);
        self.updates[at].other(site, x, frozen, pass)
    }
}

impl Resolved<'_> {
    fn is_plain(&self) -> bool {
        matches!(self.update, Update::None | Update::LowRank(_))
    }

    /// A layer with an update that is no low-rank one, for all rows of `x`.
    fn other(&self, site: Site, x: &Var, frozen: &FrozenLinear, pass: &Pass<'_>) -> Var {
        match &self.update {
            Update::Scale(Side::Input, factors) => frozen.forward(&scale_columns(x, factors)),
            Update::Scale(Side::Output, factors) => {
                scale_columns_in_place(frozen.forward(x), factors)
            }
            Update::Replace(weight, bias) => linear(x, weight, *bias),
            Update::Custom(custom) => {
                custom.forward(site, x, frozen, self.block_gates.as_ref(), pass)
            }
            Update::None | Update::LowRank(_) => frozen.forward(x),
        }
    }
}

/// Layer `at` as the kernels see it: the frozen one with the low-rank updates of all groups.
fn layer<'a>(groups: &'a [Group<'_>], at: usize, frozen: &'a FrozenLinear) -> AdaptedLayer<'a> {
    let low_rank = |group: &'a Group<'_>| {
        let Resolved { update, gates, .. } = &group.updates[at];
        let Update::LowRank(update): &Update<'_> = update else { return None };
        let update: &LowRankUpdate = update;
        Some((group.rows.clone(), update.under(gates.as_ref())))
    };
    AdaptedLayer { frozen, updates: groups.iter().filter_map(low_rank).collect() }
}

/// Shows the gates of every update to whoever observes the pass.
fn report(
    groups: &[Group<'_>],
    at: usize,
    site: Site,
    output: AdaptedOutput,
    pass: &Pass<'_>,
) -> Var {
    let updated =
        groups.iter().filter(|group| matches!(group.updates[at].update, Update::LowRank(_)));
    for (_, gates) in updated.zip(&output.gates) {
        if let Some(gates) = gates {
            pass.report_gates(site, gates);
        }
    }
    output.y
}

/// `y` with the rows of groups whose update is no low-rank one computed by themselves.
fn with_others(
    groups: &[Group<'_>],
    at: usize,
    site: Site,
    y: Var,
    x: &Var,
    frozen: &FrozenLinear,
    pass: &Pass<'_>,
) -> Var {
    let (mut pieces, mut done) = (Vec::new(), 0);
    for group in groups.iter().filter(|group| !group.updates[at].is_plain()) {
        let rows = &group.rows;
        pieces.push(some_rows(&y, &(done..rows.start)));
        pieces.push(group.other(at, site, &some_rows(x, rows), frozen, pass));
        done = rows.end;
    }
    pieces.push(some_rows(&y, &(done..y.value().rows())));
    join_rows(&pieces)
}

fn some_rows(x: &Var, rows: &Range<usize>) -> Var {
    take_rows(x, &rows.clone().collect::<Vec<_>>())
}

/// Joins values computed for each group of rows by itself.
pub(crate) fn joined(parts: Vec<Var>) -> Var {
    let mut parts = parts;
    if parts.len() == 1 { parts.remove(0) } else { join_rows(&parts) }
}
