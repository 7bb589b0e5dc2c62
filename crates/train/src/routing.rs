//! How a router spreads tokens over its experts, by layer and domain.

use hydralora_kernels::Tensor;
use hydralora_model::adapter::{GateObserver, Site};
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::collections::BTreeMap;

/// One layer and domain: the sum of each expert's gate, the sum of the tokens' entropies, and the number of
/// tokens.
type GateSum = (Vec<f64>, f64, f64);

/// Sums gates while batches pass.
pub struct RoutingLog {
    num_domains: usize,
    /// Domain of every token of the batch in flight.
    rows: RefCell<Vec<u32>>,
    /// Per site, one sum per domain.
    sums: RefCell<BTreeMap<Site, Vec<GateSum>>>,
}

impl RoutingLog {
    /// An empty log.
    pub fn new(num_domains: usize) -> Self {
        Self { num_domains, rows: RefCell::default(), sums: RefCell::default() }
    }

    /// Says which domain each token of the next batch belongs to.
    pub fn next_batch(&self, domains: Vec<u32>) {
        self.rows.replace(domains);
    }

    /// The means so far; none if no router reported.
    pub fn summary(&self, domains: &[String]) -> Option<Routing> {
        let sums = self.sums.borrow();
        if sums.is_empty() {
            return None;
        }
        let sites = sums
            .iter()
            .map(|(site, per_domain)| SiteRouting {
                site: site.to_string(),
                layer: site.layer,
                mean_gate: per_domain
                    .iter()
                    .map(|(sum, _, count)| sum.iter().map(|s| s / count.max(1.0)).collect())
                    .collect(),
                entropy: {
                    let tokens: f64 = per_domain.iter().map(|(_, _, count)| count).sum();
                    let sum: f64 = per_domain.iter().map(|(_, entropy, _)| entropy).sum();
                    Some(sum / tokens.max(1.0))
                },
            })
            .collect();
        Some(Routing { domains: domains.to_vec(), sites })
    }
}

impl GateObserver for RoutingLog {
    fn observe(&self, site: Site, gates: &Tensor) {
        let rows = self.rows.borrow();
        let experts = gates.cols();
        let mut sums = self.sums.borrow_mut();
        let per_domain = sums
            .entry(site)
            .or_insert_with(|| vec![(vec![0.0; experts], 0.0, 0.0); self.num_domains]);
        for (gates, &domain) in gates.to_f64().chunks_exact(experts).zip(rows.iter()) {
            let (sum, entropy, count) = &mut per_domain[domain as usize];
            let even = (experts as f64).ln().max(f64::MIN_POSITIVE);
            let of = |gate: &f64| if *gate > 0.0 { -gate * gate.ln() } else { 0.0 };
            *entropy += gates.iter().map(of).sum::<f64>() / even;
            for (sum, gate) in sum.iter_mut().zip(gates) {
                *sum += gate;
            }
            *count += 1.0;
        }
    }
}

/// Mean gates of an adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Routing {
    /// Names of the domains, in the order of the rows below.
    pub domains: Vec<String>,
    /// One entry per routed layer.
    pub sites: Vec<SiteRouting>,
}

/// Mean gates of one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SiteRouting {
    /// The layer's checkpoint name.
    pub site: String,
    /// Index of its decoder layer.
    pub layer: usize,
    /// `[domain][expert]`, every row summing to 1.
    pub mean_gate: Vec<Vec<f64>>,
    /// Mean entropy of a token's gates over that of even ones, 0 to 1; none in files of earlier builds.
    #[serde(default)]
    pub entropy: Option<f64>,
}

impl Routing {
    /// The mean over layers of the gates' entropy, 1 for even gates and 0 for one expert a token.
    pub fn entropy(&self) -> Option<f64> {
        let found: Vec<f64> = self.sites.iter().filter_map(|site| site.entropy).collect();
        (!found.is_empty()).then(|| found.iter().sum::<f64>() / found.len() as f64)
    }

    /// How far the domains' gates differ: the mean of the layers' spreads, 0 when all domains are
    /// routed alike.
    pub fn specialisation(&self) -> f64 {
        self.sites.iter().map(SiteRouting::spread).sum::<f64>() / self.sites.len().max(1) as f64
    }
}

impl SiteRouting {
    /// The largest difference between two domains in the share of one expert.
    pub fn spread(&self) -> f64 {
        let experts = self.mean_gate.first().map_or(0, Vec::len);
        (0..experts)
            .map(|expert| {
                let shares = self.mean_gate.iter().map(|gates| gates[expert]);
                let (low, high) = shares.fold((f64::INFINITY, 0.0_f64), |(low, high), share| {
                    (low.min(share), high.max(share))
                });
                high - low
            })
            .fold(0.0, f64::max)
    }
}
