//! What a router does, by layer and domain.
//!
//! The numbers of the experts are arbitrary in every layer, so nothing is averaged over layers by an
//! expert's number. What can be compared is how far the domains' gates lie apart.

use super::chart::{Chart, Series, Style};
use super::escape;
use crate::heads::HeadSummary;
use crate::routing::Routing;
use std::collections::BTreeMap;
use std::fmt::Write;

/// From here on a layer counts as telling domains apart.
const APART: f64 = 0.2;
/// Below this, gates differ no more than by chance.
const EVEN: f64 = 0.05;

impl Routing {
    /// The spread of the gates by decoder layer, the mean over its routed projections: 0 where all
    /// domains are routed alike, 1 where each has an expert of its own.
    pub fn spread_by_layer(&self) -> BTreeMap<usize, f64> {
        let mut sums: BTreeMap<usize, (f64, f64)> = BTreeMap::new();
        for site in &self.sites {
            let (sum, count) = sums.entry(site.layer).or_default();
            *sum += site.spread();
            *count += 1.0;
        }
        sums.into_iter().map(|(layer, (sum, count))| (layer, sum / count)).collect()
    }

    /// Says in words what the gates show.
    pub fn in_words(&self) -> String {
        let spread = self.spread_by_layer();
        let apart = spread.values().filter(|spread| **spread >= APART).count();
        let (low, high) = spread.values().fold((f64::INFINITY, 0.0_f64), |(low, high), value| {
            (low.min(*value), high.max(*value))
        });
        let range = format!("spread {low:.3} to {high:.3} over {} layers", spread.len());
        if high < EVEN {
            format!("{range}: the router sends all domains through the heads alike")
        } else if apart == 0 {
            format!("{range}: the router tells the domains apart a little")
        } else {
            format!(
                "{range}: the router tells the domains apart in {apart} of {} layers",
                spread.len()
            )
        }
    }

    /// How far a domain's gates lie from the mean over domains: half the sum of absolute differences,
    /// the mean over a layer's routed projections, as `[layer][domain]`.
    fn distances(&self) -> BTreeMap<usize, Vec<f64>> {
        let mut sums: BTreeMap<usize, (Vec<f64>, f64)> = BTreeMap::new();
        for site in &self.sites {
            let (domains, seen) = (site.mean_gate.len(), site.seen().count());
            let (sum, count) = sums.entry(site.layer).or_insert_with(|| (vec![0.0; domains], 0.0));
            for (sum, gates) in sum.iter_mut().zip(&site.mean_gate) {
                if gates.iter().all(|gate| *gate == 0.0) {
                    continue;
                }
                let apart = gates.iter().enumerate().map(|(expert, gate)| {
                    let all = site.seen().map(|gates| gates[expert]);
                    (gate - all.sum::<f64>() / seen as f64).abs()
                });
                *sum += apart.sum::<f64>() / 2.0;
            }
            *count += 1.0;
        }
        let mean = |(sum, count): (Vec<f64>, f64)| sum.into_iter().map(|s| s / count).collect();
        sums.into_iter().map(|(layer, sum)| (layer, mean(sum))).collect()
    }
}

/// The section of the report.
pub(super) fn section(routing: &Routing, heads: Option<&HeadSummary>) -> String {
    let spread: Vec<(f64, f64)> = routing
        .spread_by_layer()
        .into_iter()
        .map(|(layer, spread)| (layer as f64, spread))
        .collect();
    let chart = Chart {
        name: "Spread of the gates over the domains, by layer",
        x_title: "decoder layer",
        y_title: "spread of the gates",
        from_zero: true,
        series: vec![Series {
            name: "largest difference between two domains in one expert's share".to_owned(),
            color: "var(--a)",
            points: spread,
            style: Style::Dots,
        }],
    };
    let entropy: Vec<(f64, f64)> = routing
        .layer_entropy()
        .into_iter()
        .map(|(layer, entropy)| (layer as f64, entropy))
        .collect();
    let entropies = Chart {
        name: "Entropy of a token's gates over that of even ones, by layer",
        x_title: "decoder layer",
        y_title: "entropy of gates",
        from_zero: true,
        series: vec![Series {
            name: "mean over tokens: 1 for even gates, 0 for one head a token".to_owned(),
            color: "var(--b)",
            points: entropy,
            style: Style::Dots,
        }],
    };
    let mut words = format!("<p>{}.</p>", escape(&routing.in_words()));
    if let Some(heads) = heads {
        let _ = write!(words, "<p>heads: {}.</p>", escape(&heads.in_words()));
    }
    let of_domain = routing.domain_entropy();
    if !of_domain.is_empty() {
        let each = of_domain.iter().map(|(domain, entropy)| format!("{domain} {entropy:.3}"));
        let each: Vec<String> = each.collect();
        let _ = write!(words, "<p>entropy of gates: {}.</p>", escape(&each.join(", ")));
    }
    format!("{words}{}{}{}", chart.draw(), entropies.draw(), grid(routing))
}

/// One cell a layer and domain.
fn grid(routing: &Routing) -> String {
    let distances = routing.distances();
    let largest = distances.values().flatten().copied().fold(1e-6, f64::max);
    let mut html = String::from(
        "<details><summary>Which layers tell which domain from the others</summary>\
         <div class=\"scroll\"><table class=\"grid\"><tr><th>layer</th>",
    );
    for domain in &routing.domains {
        let _ = write!(html, "<th>{}</th>", escape(domain));
    }
    html.push_str("</tr>");
    for (layer, of_layer) in &distances {
        let _ = write!(html, "<tr><th>{layer}</th>");
        for (domain, distance) in routing.domains.iter().zip(of_layer) {
            let domain = escape(domain);
            let _ = write!(
                html,
                "<td title=\"layer {layer}, {domain}: {distance:.3}\"><i style=\"background:\
                 color-mix(in srgb,var(--a) {:.0}%,transparent)\"></i></td>",
                6.0 + 94.0 * distance / largest
            );
        }
        html.push_str("</tr>");
    }
    let _ = write!(
        html,
        "</table></div><p class=\"legend\">distance of a domain's mean gates from those of all domains: 0 \
         <span class=\"scale\"></span> {largest:.3}</p></details>"
    );
    html
}
