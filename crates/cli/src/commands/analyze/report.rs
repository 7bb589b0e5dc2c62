//! What was found, as `analysis.json` holds it. Its fields are documented in `docs/analysis.md`.

use super::gates::GateMeasures;
use hydralora_peft::analysis::{HeadMeasures, Likeness, Spectrum};
use serde::Serialize;
use std::collections::BTreeMap;

/// Version of the file.
pub(super) const FORMAT: u32 = 1;

/// All of it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) format: u32,
    pub(crate) adapters: Vec<AdapterReport>,
    /// Every two adapters.
    pub(crate) pairs: Vec<PairReport>,
    /// Means over pairs that are alike in how `A` began and, in a study, in their labels.
    pub(crate) groups: Vec<Group>,
    /// What the reader has to know.
    pub(crate) notes: Vec<String>,
    pub(crate) map: Vec<Point>,
}

/// An adapter, and what it consists of.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct AdapterReport {
    pub(crate) name: String,
    pub(crate) path: String,
    pub(crate) method: String,
    pub(crate) base_model: String,
    /// The recorded seed of its start.
    pub(crate) seed: Option<u64>,
    /// In a study, its label on the compared axis.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) label: Option<String>,
    pub(crate) layers: usize,
    /// `A` and `B` of a layer, at most.
    pub(crate) num_a: usize,
    pub(crate) num_b: usize,
    pub(crate) overall: Summary,
    pub(crate) by_projection: BTreeMap<String, Summary>,
    pub(crate) sites: Vec<SiteReport>,
    /// Why some measure is missing, by its name.
    pub(crate) missing: BTreeMap<&'static str, String>,
}

/// Means over layers. What no layer has is none.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Summary {
    pub(crate) effective_rank: Option<f64>,
    pub(crate) update_norm: Option<f64>,
    /// Share of the differences between heads in their updates' energy, all layers' energy together.
    pub(crate) difference_share: Option<f64>,
    pub(crate) head_cosine: Option<f64>,
    pub(crate) head_cka: Option<f64>,
    pub(crate) head_angle_cosine: Option<f64>,
    pub(crate) head_update_cosine: Option<f64>,
    /// Mean entropy of a token's gates over that of even ones.
    pub(crate) gate_entropy: Option<f64>,
    /// Mean distance of two domains' mean gates in a layer.
    pub(crate) gate_distance: Option<f64>,
    /// `‖A − A₀‖ / ‖A₀‖`.
    pub(crate) a_change: Option<f64>,
}

/// A layer of an adapter.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct SiteReport {
    pub(crate) site: String,
    pub(crate) layer: usize,
    pub(crate) projection: String,
    pub(crate) update: Option<Spectrum>,
    pub(crate) heads: Option<HeadMeasures>,
    pub(crate) gates: Option<GateMeasures>,
    pub(crate) a_change: Option<f64>,
}

/// How alike two adapters are, in a layer or on the mean of several.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Compared {
    pub(crate) a: Likeness,
    pub(crate) b: Likeness,
    /// Of `A − A₀`, where both starts are known.
    pub(crate) a_change: Option<Likeness>,
}

impl Compared {
    /// The means over `all`.
    pub(crate) fn mean<'a>(all: impl IntoIterator<Item = &'a Self>) -> Self {
        let all: Vec<&Self> = all.into_iter().collect();
        let changes: Vec<&Likeness> = all.iter().filter_map(|c| c.a_change.as_ref()).collect();
        Self {
            a: Likeness::mean(all.iter().map(|c| &c.a)),
            b: Likeness::mean(all.iter().map(|c| &c.b)),
            a_change: (!changes.is_empty()).then(|| Likeness::mean(changes)),
        }
    }

    /// The parts by their names.
    pub(crate) fn parts(&self) -> Vec<(&'static str, Likeness)> {
        let changes = self.a_change.map(|change| ("change of A", change));
        [("A", self.a), ("B", self.b)].into_iter().chain(changes).collect()
    }
}

/// Two adapters.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct PairReport {
    pub(crate) first: String,
    pub(crate) second: String,
    /// Whether all `A` that are compared began as the same numbers; none where that is not known.
    pub(crate) began_equal: Option<bool>,
    #[serde(flatten)]
    pub(crate) overall: Compared,
    pub(crate) by_projection: BTreeMap<String, Compared>,
    /// Layers that both have.
    pub(crate) layers: usize,
    pub(crate) sites: Vec<SitePair>,
    /// Layers that only one of them has.
    pub(crate) left_out: Vec<String>,
}

/// Two adapters in a layer.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct SitePair {
    pub(crate) site: String,
    pub(crate) layer: usize,
    pub(crate) projection: String,
    #[serde(flatten)]
    pub(crate) compared: Compared,
}

/// Pairs that are alike in how `A` began and, in a study, in whether their labels are the same.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Group {
    pub(crate) began_equal: Option<bool>,
    pub(crate) same_label: Option<bool>,
    pub(crate) pairs: usize,
    #[serde(flatten)]
    pub(crate) mean: Compared,
}

/// A matrix on the map.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Point {
    pub(crate) adapter: usize,
    /// `A` or `B`.
    pub(crate) part: &'static str,
    /// Its number among those of the layer.
    pub(crate) number: usize,
    pub(crate) site: String,
    pub(crate) x: f32,
    pub(crate) y: f32,
}

/// The mean of what there is.
pub(crate) fn mean(values: impl IntoIterator<Item = Option<f64>>) -> Option<f64> {
    let found: Vec<f64> = values.into_iter().flatten().collect();
    (!found.is_empty()).then(|| found.iter().sum::<f64>() / found.len() as f64)
}
