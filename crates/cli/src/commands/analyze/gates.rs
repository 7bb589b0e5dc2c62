//! What `routing.json` says of the routers: how even a token's gates are, and how far domains differ.
//!
//! All of it is taken within a layer first. The heads of different layers have no common order, so gates
//! averaged over layers come out even whatever the routers do.

use hydralora_train::SiteRouting;
use serde::Serialize;

/// A layer's gates.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct GateMeasures {
    /// Mean entropy of a token's gates over that of even ones, 0 to 1; none in files of earlier builds.
    pub(crate) entropy: Option<f64>,
    /// The same of the domains' mean gates, on the mean of the domains.
    pub(crate) mean_gate_entropy: Option<f64>,
    /// Mean total variation, `½ Σ_i |p_i − q_i|`, between two domains' mean gates.
    pub(crate) distance: Option<f64>,
    /// That of every two domains.
    pub(crate) distances: Vec<DomainDistance>,
}

/// Two domains in a layer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct DomainDistance {
    pub(crate) first: String,
    pub(crate) second: String,
    /// 0 where both are routed alike, 1 where they share no expert.
    pub(crate) distance: f64,
}

impl GateMeasures {
    /// Measures the gates of a layer; domains of which no token was seen are left out.
    pub(crate) fn of(domains: &[String], site: &SiteRouting) -> Self {
        let seen: Vec<(&String, &Vec<f64>)> = domains
            .iter()
            .zip(&site.mean_gate)
            .filter(|(_, gates)| gates.iter().sum::<f64>() > 0.5)
            .collect();
        let mut distances = Vec::new();
        for (at, (first, p)) in seen.iter().enumerate() {
            for (second, q) in &seen[at + 1..] {
                let distance = 0.5 * p.iter().zip(*q).map(|(p, q)| (p - q).abs()).sum::<f64>();
                distances.push(DomainDistance {
                    first: (*first).clone(),
                    second: (*second).clone(),
                    distance,
                });
            }
        }
        let entropies = seen.iter().map(|(_, gates)| relative_entropy(gates));
        Self {
            entropy: site.entropy,
            mean_gate_entropy: super::report::mean(entropies),
            distance: super::report::mean(distances.iter().map(|d| Some(d.distance))),
            distances,
        }
    }
}

/// The entropy of gates over that of even ones; none for a single expert.
fn relative_entropy(gates: &[f64]) -> Option<f64> {
    let of = |gate: &f64| if *gate > 0.0 { -gate * gate.ln() } else { 0.0 };
    (gates.len() > 1).then(|| gates.iter().map(of).sum::<f64>() / (gates.len() as f64).ln())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_are_between_the_domains_that_were_seen() {
        let domains = ["a", "b", "never", "c"].map(str::to_owned);
        let site = SiteRouting {
            site: "model.layers.0.self_attn.q_proj".to_owned(),
            layer: 0,
            mean_gate: vec![vec![1.0, 0.0], vec![0.0, 1.0], vec![0.0, 0.0], vec![0.5, 0.5]],
            entropy: Some(0.25),
            ..SiteRouting::default()
        };
        let found = GateMeasures::of(&domains, &site);
        let pairs: Vec<(&str, &str, f64)> = found
            .distances
            .iter()
            .map(|d| (d.first.as_str(), d.second.as_str(), d.distance))
            .collect();
        assert_eq!(pairs, [("a", "b", 1.0), ("a", "c", 0.5), ("b", "c", 0.5)]);
        assert!((found.distance.unwrap() - 2.0 / 3.0).abs() < 1e-12);
        assert!((found.mean_gate_entropy.unwrap() - 1.0 / 3.0).abs() < 1e-12);
        assert_eq!(found.entropy, Some(0.25));
    }
}
