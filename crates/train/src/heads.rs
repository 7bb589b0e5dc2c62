//! Whether heads differ and routers route, in a few numbers that are cheap enough for a run's metrics.

use crate::movement::RouterStart;
use crate::routing::Routing;
use hydralora_peft::analysis::{SiteHeads, heads};
use hydralora_peft::{TensorMap, Tuned};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// From this mean cosine on the heads of a layer count as copies of each other.
pub const COPIES: f64 = 0.95;
/// The step after which a run says whether its heads are copies.
pub const LOOKED_AT_AFTER: usize = 100;
/// A run that ends before says so at its end, if it had this many steps.
const LEAST_STEPS: usize = 30;

/// What heads and routers do, the mean over layers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HeadSummary {
    /// Layers with several heads.
    pub layers: usize,
    /// Those of them whose heads are copies: a mean cosine of [`COPIES`] and more.
    pub layers_of_copies: usize,
    /// Mean cosine of two heads; none while they are zero.
    pub cosine: Option<f64>,
    /// Effective rank of a layer's heads side by side.
    pub rank: Option<f64>,
    /// What it could be at most.
    pub full_rank: f64,
    /// Share of the update's energy that differences between heads carry under the gates at hand; none
    /// where these are not known.
    pub difference_share: Option<f64>,
    /// Heads that get less than a tenth of an even share in every domain; none without gates.
    pub dead_heads: Option<usize>,
    /// Heads in all.
    pub heads: usize,
}

impl HeadSummary {
    /// Sums up an adapter's tensors, by their names in its file, and the gates that were seen; none
    /// where no layer has several heads.
    pub fn of(tensors: TensorMap, routing: Option<&Routing>) -> Option<Self> {
        let sites = heads(tensors);
        if sites.is_empty() {
            return None;
        }
        let gates: BTreeMap<&str, _> = routing.map_or_else(BTreeMap::new, |routing| {
            routing.sites.iter().map(|site| (site.site.as_str(), site)).collect()
        });
        let share = |(site, heads): (&_, &SiteHeads)| {
            let site = gates.get(ToString::to_string(site).as_str())?;
            heads.difference_share(&site.products)
        };
        let cosines = || sites.values().filter_map(|site| site.cosine);
        Some(Self {
            layers: sites.len(),
            layers_of_copies: cosines().filter(|cosine| *cosine >= COPIES).count(),
            cosine: mean(cosines()),
            rank: mean(sites.values().filter_map(|site| site.rank)),
            full_rank: mean(sites.values().map(|site| site.full_rank as f64)).unwrap_or(0.0),
            difference_share: mean(sites.iter().filter_map(share)),
            dead_heads: routing.map(|routing| routing.sites.iter().map(|s| s.dead_heads()).sum()),
            heads: sites.values().map(|site| site.num_heads).sum(),
        })
    }

    /// The same of a live adapter; none for one that is the model itself, whose weights are too many to look
    /// at.
    pub(crate) fn of_live(tuned: &dyn Tuned, routing: Option<&Routing>) -> Option<Self> {
        let small = tuned.as_whole_model().is_none();
        small.then(|| Self::of(tuned.tensors(), routing)).flatten()
    }

    /// Says it in one line.
    pub fn in_words(&self) -> String {
        let (Some(cosine), Some(rank)) = (self.cosine, self.rank) else {
            return format!("{} in {} layers, all zero", self.heads, self.layers);
        };
        let mut words = format!(
            "cosine {cosine:.3}, effective rank {rank:.1} of {:.0} side by side, copies in {} of {} layers",
            self.full_rank, self.layers_of_copies, self.layers
        );
        if let Some(share) = self.difference_share {
            words += &format!(", differences carry {:.2} % of the update", 100.0 * share);
        }
        if let Some(dead) = self.dead_heads {
            words += &format!(", {dead} of {} dead", self.heads);
        }
        words
    }

    /// Says so if the heads of at least half of the layers are copies.
    fn warning(&self, step: usize) -> Option<String> {
        if 2 * self.layers_of_copies < self.layers || self.layers_of_copies == 0 {
            return None;
        }
        let share = self.difference_share.map_or_else(String::new, |share| {
            format!("; their differences carry {:.2} % of the update", 100.0 * share)
        });
        Some(format!(
            "after {step} steps the heads of {} of {} layers are copies of each other (cosine {COPIES} and \
             more{share}), so these train like one LoRA. What helps is a router that tells inputs apart from \
             the first step: method.router_init: layer_centroids with router_gain: 10, or router_guide: \
             clusters, and train.router_learning_rate_ratio: 10",
            self.layers_of_copies, self.layers
        ))
    }
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let values: Vec<f64> = values.collect();
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

/// What a step's metrics say of routers and heads.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RouterMetrics {
    /// Mean entropy of a token's gates over that of even ones.
    pub gate_entropy: Option<f64>,
    /// How far the gates of the domains at hand differ.
    pub gate_spread: f64,
    /// Distance of the routers from their start, over its norm.
    pub router_movement: Option<f64>,
    /// The heads.
    pub heads: Option<HeadSummary>,
}

impl RouterMetrics {
    /// Measures `tuned` under the gates that were seen.
    pub(crate) fn of(tuned: &dyn Tuned, routing: &Routing, start: Option<&RouterStart>) -> Self {
        Self {
            gate_entropy: routing.entropy(),
            gate_spread: routing.specialisation(),
            router_movement: start.and_then(|start| start.distance(tuned)),
            heads: HeadSummary::of_live(tuned, Some(routing)),
        }
    }

    /// What is to be told after `step` of `total`.
    pub(crate) fn warning(&self, step: usize, total: usize) -> Option<String> {
        let at_end = step == total && (LEAST_STEPS..LOOKED_AT_AFTER).contains(&total);
        if step != LOOKED_AT_AFTER && !at_end {
            return None;
        }
        self.heads.as_ref()?.warning(step)
    }
}

/// Steps between two looks at routers and heads, so that these cost less than a hundredth of the run.
const EVERY: usize = 10;

/// Whether routers and heads are looked at in `step` of `total`, counted from 1.
pub(crate) fn looks_at(step: usize, total: usize) -> bool {
    step == 1 || step.is_multiple_of(EVERY) || step == total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_told_once_and_only_where_half_of_the_layers_have_them() {
        let with = |layers_of_copies: usize| RouterMetrics {
            gate_entropy: None,
            gate_spread: 0.0,
            router_movement: None,
            heads: Some(HeadSummary {
                layers: 9,
                layers_of_copies,
                difference_share: Some(0.0005),
                ..HeadSummary::default()
            }),
        };
        assert_eq!(with(4).warning(100, 400), None);
        let told = with(5).warning(100, 400).unwrap();
        for part in ["after 100 steps", "5 of 9 layers", "0.05 %", "layer_centroids", "ratio: 10"] {
            assert!(told.contains(part), "{told}");
        }
        for (step, total, tells) in
            [(99, 400, false), (400, 400, false), (60, 60, true), (50, 60, false), (20, 20, false)]
        {
            assert_eq!(with(9).warning(step, total).is_some(), tells, "{step} of {total}");
        }
        assert_eq!(RouterMetrics { heads: None, ..with(9) }.warning(100, 400), None);
        assert!(looks_at(1, 7) && looks_at(7, 7) && looks_at(10, 70) && !looks_at(11, 70));
    }
}
