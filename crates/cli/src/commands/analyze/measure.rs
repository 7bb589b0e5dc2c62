//! From opened adapters to the report.

use super::gates::GateMeasures;
use super::open::Opened;
use super::report::{
    AdapterReport, Compared, FORMAT, Group, PairReport, Point, Report, SitePair, SiteReport,
    Summary, mean,
};
use crate::failure::bad_input;
use hydralora_data::heads::places;
use hydralora_kernels::Tensor;
use hydralora_model::adapter::Site;
use hydralora_peft::analysis::{Factor, HeadMeasures, Likeness, SiteWeights, coordinates};
use rayon::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

/// Matrices on the map.
const MOST_POINTS: usize = 600;
/// Seed of the map's start.
const MAP_SEED: u64 = 41;

/// Everything about `opened`.
///
/// # Errors
/// If two of them differ in the widths of a layer, or none of several share a layer.
pub(super) fn measure(opened: &[Opened]) -> anyhow::Result<Report> {
    let sites: BTreeSet<Site> =
        opened.iter().flat_map(|adapter| adapter.weights.keys().copied()).collect();
    sites.iter().try_for_each(|&site| same_widths(opened, site))?;
    let pairs: Vec<[usize; 2]> = (0..opened.len())
        .flat_map(|first| (first + 1..opened.len()).map(move |second| [first, second]))
        .collect();
    let shared = |&[first, second]: &[usize; 2]| -> Vec<Site> {
        let own = opened[first].weights.keys();
        own.copied().filter(|site| opened[second].weights.contains_key(site)).collect()
    };
    if !pairs.is_empty() && pairs.iter().all(|pair| shared(pair).is_empty()) {
        let names: Vec<String> =
            opened.iter().map(|adapter| adapter.path.display().to_string()).collect();
        return Err(bad_input(format!(
            "{}: no layer is in two of them; expected adapters that change the same layers",
            names.join(", ")
        )));
    }
    let found: Vec<OfSite> = sites.par_iter().map(|&site| of_site(opened, &pairs, site)).collect();
    let mut report = Report {
        format: FORMAT,
        adapters: (opened.iter().enumerate())
            .map(|(at, adapter)| {
                adapter_report(adapter, found.iter().filter_map(|f| f.own[at].as_ref()))
            })
            .collect(),
        pairs: (pairs.iter().enumerate())
            .map(|(at, pair)| pair_report(opened, pair, at, &found))
            .collect(),
        groups: Vec::new(),
        notes: Vec::new(),
        map: map(opened, &sites),
    };
    report.groups = groups(&report);
    report.notes = notes(opened, &report);
    Ok(report)
}

/// Refuses layers of other widths.
fn same_widths(opened: &[Opened], site: Site) -> anyhow::Result<()> {
    let widths =
        |weights: &SiteWeights| Some([weights.b.first()?.rows(), weights.a.first()?.cols()]);
    let mut known: Option<(&Opened, [usize; 2])> = None;
    for adapter in opened {
        let Some(own) = adapter.weights.get(&site).and_then(widths) else { continue };
        match known {
            Some((first, widths)) if widths != own => {
                return Err(bad_input(format!(
                    "{} and {}: {site} is {widths:?} and {own:?}; expected adapters of models of the \
                     same dimensions",
                    first.path.display(),
                    adapter.path.display()
                )));
            }
            _ => known = Some((adapter, own)),
        }
    }
    Ok(())
}

/// A layer's measures.
struct OfSite {
    /// By adapter.
    own: Vec<Option<(SiteReport, [f64; 2])>>,
    /// By pair.
    pairs: Vec<Option<SitePair>>,
}

/// An adapter's factors at a layer, ready to be compared.
struct Ready {
    a: Vec<Factor>,
    b: Vec<Factor>,
    /// Of `A − A₀`.
    change: Option<Vec<Factor>>,
}

fn of_site(opened: &[Opened], pairs: &[[usize; 2]], site: Site) -> OfSite {
    let several = opened.len() > 1;
    let mut ready: Vec<Option<Ready>> = Vec::new();
    let mut own = Vec::new();
    for adapter in opened {
        let Some(weights) = adapter.weights.get(&site) else {
            ready.push(None);
            own.push(None);
            continue;
        };
        let initial = adapter.initial.as_ref().ok().and_then(|initial| initial.get(&site));
        let changes: Option<Vec<(Tensor, f64)>> = initial.map(|initial| {
            weights.a.iter().zip(initial).map(|(now, before)| change(now, before)).collect()
        });
        ready.push(several.then(|| {
            Ready {
                a: weights.a.iter().map(Factor::of_a).collect(),
                b: weights.b.iter().map(Factor::of_b).collect(),
                change: changes.as_ref().map(|changes| {
                    changes.iter().map(|(change, _)| Factor::of_a(change)).collect()
                }),
            }
        }));
        let moved = changes.and_then(|changes| mean(changes.iter().map(|(_, moved)| Some(*moved))));
        own.push(Some(site_report(adapter, site, weights, moved)));
    }
    let compare = |&[first, second]: &[usize; 2]| {
        let (first, second) = (ready[first].as_ref()?, ready[second].as_ref()?);
        let a_change = match (&first.change, &second.change) {
            (Some(first), Some(second)) => Some(Likeness::across(first, second)),
            _ => None,
        };
        let compared = Compared {
            a: Likeness::across(&first.a, &second.a),
            b: Likeness::across(&first.b, &second.b),
            a_change,
        };
        Some(SitePair {
            site: site.to_string(),
            layer: site.layer,
            projection: site.linear.module().to_owned(),
            compared,
        })
    };
    OfSite { pairs: pairs.iter().map(compare).collect(), own }
}

/// `A − A₀`, and its norm over that of `A₀`.
fn change(now: &Tensor, before: &Tensor) -> (Tensor, f64) {
    let values: Vec<f64> =
        now.to_f64().iter().zip(before.to_f64()).map(|(now, before)| now - before).collect();
    let change = Tensor::from_f64(hydralora_kernels::DType::F64, &values, now.shape());
    let moved = change.norm() / before.norm().max(f64::MIN_POSITIVE);
    (change, moved)
}

/// With the energy of the heads' updates, and the part of it in which they differ.
fn site_report(
    adapter: &Opened,
    site: Site,
    weights: &SiteWeights,
    a_change: Option<f64>,
) -> (SiteReport, [f64; 2]) {
    let name = site.to_string();
    let heads = HeadMeasures::of(weights);
    let gates = adapter.routing.as_ref().and_then(|routing| {
        let found = routing.sites.iter().find(|found| found.site == name)?;
        Some(GateMeasures::of(&routing.domains, found))
    });
    let energy = heads.as_ref().and_then(|heads| Some([heads.energy, heads.difference_share?]));
    let energy = energy.map_or([0.0; 2], |[energy, share]| [energy, energy * share]);
    let report = SiteReport {
        site: name,
        layer: site.layer,
        projection: site.linear.module().to_owned(),
        update: weights.update.as_ref().ok().cloned(),
        heads,
        gates,
        a_change,
    };
    (report, energy)
}

fn adapter_report<'a>(
    adapter: &Opened,
    sites: impl Iterator<Item = &'a (SiteReport, [f64; 2])>,
) -> AdapterReport {
    let sites: Vec<&(SiteReport, [f64; 2])> = sites.collect();
    let mut projections: BTreeMap<String, Vec<&(SiteReport, [f64; 2])>> = BTreeMap::new();
    for site in &sites {
        projections.entry(site.0.projection.clone()).or_default().push(site);
    }
    let most = |pick: fn(&SiteWeights) -> usize| adapter.weights.values().map(pick).max();
    let overall = summary(&sites);
    let mut missing = BTreeMap::new();
    if overall.effective_rank.is_none() {
        let reason = adapter.weights.values().find_map(|weights| weights.update.clone().err());
        let zero = "the update is zero, as it is before training".to_owned();
        missing.insert("effective_rank", reason.unwrap_or(zero));
    }
    if let Err(reason) = &adapter.initial {
        missing.insert("a_change", reason.clone());
    }
    if overall.head_cka.is_none() && sites.iter().all(|site| site.0.heads.is_none()) {
        missing.insert("heads", "every layer has one head alone".to_owned());
    }
    if sites.iter().all(|site| site.0.gates.is_none()) {
        let reason = match &adapter.routing {
            None => "there is no routing.json beside the adapter",
            Some(_) => "routing.json names none of its layers",
        };
        missing.insert("gates", reason.to_owned());
    }
    AdapterReport {
        name: adapter.name.clone(),
        path: adapter.path.display().to_string(),
        method: adapter.method.to_owned(),
        base_model: adapter.base_model.clone(),
        seed: adapter.seed,
        label: adapter.label.clone(),
        layers: sites.len(),
        num_a: most(|weights| weights.a.len()).unwrap_or(0),
        num_b: most(|weights| weights.b.len()).unwrap_or(0),
        overall,
        by_projection: projections
            .into_iter()
            .map(|(projection, sites)| (projection, summary(&sites)))
            .collect(),
        sites: sites.into_iter().map(|(report, _)| report.clone()).collect(),
        missing,
    }
}

fn summary(sites: &[&(SiteReport, [f64; 2])]) -> Summary {
    let of_update = |pick: fn(&hydralora_peft::analysis::Spectrum) -> Option<f64>| {
        mean(sites.iter().map(|(site, _)| site.update.as_ref().and_then(pick)))
    };
    let of_heads = |pick: fn(&HeadMeasures) -> Option<f64>| {
        mean(sites.iter().map(|(site, _)| site.heads.as_ref().and_then(pick)))
    };
    let of_gates = |pick: fn(&GateMeasures) -> Option<f64>| {
        mean(sites.iter().map(|(site, _)| site.gates.as_ref().and_then(pick)))
    };
    let [energy, apart] =
        sites.iter().fold([0.0; 2], |[energy, apart], (_, own)| [energy + own[0], apart + own[1]]);
    Summary {
        effective_rank: of_update(|update| update.effective_rank),
        update_norm: of_update(|update| Some(update.norm)),
        difference_share: (energy > 0.0).then(|| apart / energy),
        head_cosine: of_heads(|heads| heads.b.cosine),
        head_cka: of_heads(|heads| heads.b.cka),
        head_angle_cosine: of_heads(|heads| heads.b.angle_cosine),
        head_update_cosine: of_heads(|heads| heads.update_cosine),
        gate_entropy: of_gates(|gates| gates.entropy),
        gate_distance: of_gates(|gates| gates.distance),
        a_change: mean(sites.iter().map(|(site, _)| site.a_change)),
    }
}

fn pair_report(
    opened: &[Opened],
    &[first, second]: &[usize; 2],
    at: usize,
    found: &[OfSite],
) -> PairReport {
    let (first, second) = (&opened[first], &opened[second]);
    let sites: Vec<SitePair> = found.iter().filter_map(|found| found.pairs[at].clone()).collect();
    let mut projections: BTreeMap<String, Vec<&Compared>> = BTreeMap::new();
    for site in &sites {
        projections.entry(site.projection.clone()).or_default().push(&site.compared);
    }
    let lone =
        first.weights.keys().chain(second.weights.keys()).filter(|site| {
            !(first.weights.contains_key(site) && second.weights.contains_key(site))
        });
    PairReport {
        first: first.name.clone(),
        second: second.name.clone(),
        began_equal: began_equal(first, second),
        overall: Compared::mean(sites.iter().map(|site| &site.compared)),
        by_projection: projections
            .into_iter()
            .map(|(projection, all)| (projection, Compared::mean(all)))
            .collect(),
        layers: sites.len(),
        left_out: lone.map(ToString::to_string).collect(),
        sites,
    }
}

/// Whether the `A` of two adapters began as the same numbers: as drawn again, or else as far as the
/// recorded seeds say.
fn began_equal(first: &Opened, second: &Opened) -> Option<bool> {
    match (&first.initial, &second.initial) {
        (Ok(one), Ok(other)) => {
            let mut shared =
                one.iter().filter_map(|(site, a)| Some((a, other.get(site)?))).peekable();
            shared.peek()?;
            Some(shared.all(|(one, other)| {
                let values = |all: &[Tensor]| all.iter().map(Tensor::to_f64).collect::<Vec<_>>();
                values(one) == values(other)
            }))
        }
        _ => match (first.seed, second.seed) {
            (Some(one), Some(other)) if one != other => Some(false),
            _ => None,
        },
    }
}

fn groups(report: &Report) -> Vec<Group> {
    let label = |name: &str| {
        report.adapters.iter().find(|adapter| adapter.name == name).and_then(|a| a.label.clone())
    };
    let mut sorted: BTreeMap<(Option<bool>, Option<bool>), Vec<&PairReport>> = BTreeMap::new();
    for pair in report.pairs.iter().filter(|pair| pair.layers > 0) {
        let same_label =
            label(&pair.first).zip(label(&pair.second)).map(|(first, second)| first == second);
        sorted.entry((pair.began_equal, same_label)).or_default().push(pair);
    }
    sorted
        .into_iter()
        .rev()
        .map(|((began_equal, same_label), pairs)| Group {
            began_equal,
            same_label,
            pairs: pairs.len(),
            mean: Compared::mean(pairs.iter().map(|pair| &pair.overall)),
        })
        .collect()
}

fn notes(opened: &[Opened], report: &Report) -> Vec<String> {
    let mut notes = Vec::new();
    let bases: BTreeSet<&str> = opened
        .iter()
        .map(|adapter| adapter.fingerprint.as_str())
        .filter(|fingerprint| !fingerprint.is_empty())
        .collect();
    if bases.len() > 1 {
        notes.push(
            "the adapters were trained on different base models of the same dimensions".to_owned(),
        );
    }
    let equal = report.pairs.iter().filter(|pair| pair.began_equal == Some(true)).count();
    if equal > 0 {
        let which = match (report.pairs.len(), equal) {
            (1, _) => "A of both began equal".to_owned(),
            (all, equal) if all == equal => "A of all adapters began equal".to_owned(),
            (all, equal) => format!("A of {equal} of {all} pairs began equal"),
        };
        notes.push(format!(
            "{which}, drawn from the same seed: similarity of A is expected, and says nothing of what \
             was learned; look at the change of A"
        ));
    }
    let unknown = report.pairs.iter().filter(|pair| pair.began_equal.is_none()).count();
    if unknown > 0 {
        notes.push(format!(
            "of {unknown} of {} pairs it is not known whether A began equal, which alone makes A alike",
            report.pairs.len()
        ));
    }
    for pair in report.pairs.iter().filter(|pair| !pair.left_out.is_empty()) {
        let shown: Vec<&str> = pair.left_out.iter().take(4).map(String::as_str).collect();
        let more = match pair.left_out.len() - shown.len() {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        notes.push(format!(
            "{} and {} are compared in the {} layers that both change; left out: {}{more}",
            pair.first,
            pair.second,
            pair.layers,
            shown.join(", ")
        ));
    }
    notes
}

/// A place for every `A` and `B` of as many layers, evenly spread, as there is room for.
fn map(opened: &[Opened], sites: &BTreeSet<Site>) -> Vec<Point> {
    let matrices_at = |site: &Site| -> usize {
        let counts = opened.iter().filter_map(|adapter| adapter.weights.get(site));
        counts.map(|weights| weights.a.len() + weights.b.len()).sum()
    };
    let all: usize = sites.iter().map(matrices_at).sum();
    let step = all.div_ceil(MOST_POINTS).max(1);
    let mut points = Vec::new();
    let mut matrices: Vec<(usize, &Tensor)> = Vec::new();
    for site in sites.iter().step_by(step) {
        for (adapter, opened) in opened.iter().enumerate() {
            let Some(weights) = opened.weights.get(site) else { continue };
            for (kind, (part, all)) in
                [("A", &weights.a), ("B", &weights.b)].into_iter().enumerate()
            {
                for (number, matrix) in all.iter().enumerate() {
                    // What was not trained has no direction.
                    if matrix.norm() > 0.0 && points.len() < MOST_POINTS {
                        matrices.push((kind, matrix));
                        let site = site.to_string();
                        points.push(Point { adapter, part, number, site, x: 0.0, y: 0.0 });
                    }
                }
            }
        }
    }
    // What may lie together are the matrices of one kind in a layer, and of its neighbours.
    let of_layer = sites.iter().map(matrices_at).max().unwrap_or(0);
    let neighbours = of_layer.clamp(5, 30);
    let found = places(&coordinates(&matrices), matrices.len(), neighbours, MAP_SEED);
    if found.len() != points.len() {
        return Vec::new();
    }
    for (point, [x, y]) in points.iter_mut().zip(found) {
        (point.x, point.y) = (x, y);
    }
    points
}
