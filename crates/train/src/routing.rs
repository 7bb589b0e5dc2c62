//! How a router spreads tokens over its experts, by layer and domain.

use crate::error::Result;
use crate::ranks::Team;
use hydralora_kernels::Tensor;
use hydralora_model::adapter::{GateObserver, Site};
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::collections::BTreeMap;

/// One layer and domain: the sum of each expert's gate, the sum of the tokens' entropies, and the number of
/// tokens.
type GateSum = (Vec<f64>, f64, f64);

/// One layer: a sum for each domain, and that of the products of every two gates, `[N · N]`.
#[derive(Default)]
struct SiteSum {
    domains: Vec<GateSum>,
    products: Vec<f64>,
}

/// The domains of the rows of the batch in flight.
#[derive(Default)]
struct Rows {
    /// Of every token.
    all: Vec<u32>,
    /// Of the tokens with a label alone, which are all that the last block of a training pass computes.
    labelled: Vec<u32>,
}

/// Sums gates while batches pass.
pub struct RoutingLog {
    num_domains: usize,
    rows: RefCell<Rows>,
    sums: RefCell<BTreeMap<Site, SiteSum>>,
}

impl RoutingLog {
    /// An empty log.
    pub fn new(num_domains: usize) -> Self {
        Self { num_domains, rows: RefCell::default(), sums: RefCell::default() }
    }

    /// Says which domain each token of the next batch belongs to.
    pub fn next_batch(&self, domains: Vec<u32>) {
        self.rows.replace(Rows { all: domains, labelled: Vec::new() });
    }

    /// The same for a batch that is trained on, of whose tokens those at `labelled` predict another.
    pub fn next_training_batch(&self, domains: Vec<u32>, labelled: impl Iterator<Item = usize>) {
        let labelled = labelled.filter_map(|at| domains.get(at).copied()).collect();
        self.rows.replace(Rows { all: domains, labelled });
    }

    /// Adds what other ranks saw. Of these, one that saw nothing is left with nothing.
    ///
    /// # Errors
    /// If another rank cannot go on.
    pub(crate) fn add_up(&self, team: &Team<'_>) -> Result<()> {
        if team.size() == 1 {
            return Ok(());
        }
        let mut sums = self.sums.borrow_mut();
        let mut all: Vec<f64> = Vec::new();
        for site in sums.values() {
            for (gates, entropy, count) in &site.domains {
                all.extend(gates);
                all.extend([entropy, count]);
            }
            all.extend(&site.products);
        }
        let most = team.agree("gates", Ok(all.len()))?.into_iter().max();
        all.resize(most.unwrap_or(0), 0.0);
        team.sum(&mut all)?;
        let mut all = all.into_iter();
        let mut next = |into: &mut f64| *into = all.next().unwrap_or(0.0);
        for site in sums.values_mut() {
            for (gates, entropy, count) in &mut site.domains {
                gates.iter_mut().for_each(&mut next);
                next(entropy);
                next(count);
            }
            site.products.iter_mut().for_each(&mut next);
        }
        Ok(())
    }

    /// The means so far; none if no router reported.
    pub fn summary(&self, domains: &[String]) -> Option<Routing> {
        let sums = self.sums.borrow();
        if sums.is_empty() {
            return None;
        }
        let sites = sums.iter().map(|(site, sum)| {
            let tokens: f64 = sum.domains.iter().map(|(_, _, count)| count).sum();
            let entropy: f64 = sum.domains.iter().map(|(_, entropy, _)| entropy).sum();
            let over =
                |sum: &Vec<f64>, count: f64| sum.iter().map(|s| s / count.max(1.0)).collect();
            let of_domain = |(_, entropy, count): &GateSum| (*count > 0.0).then(|| entropy / count);
            SiteRouting {
                site: site.to_string(),
                layer: site.layer,
                mean_gate: sum.domains.iter().map(|(sum, _, count)| over(sum, *count)).collect(),
                entropy: Some(entropy / tokens.max(1.0)),
                domain_entropy: sum.domains.iter().map(of_domain).collect(),
                products: over(&sum.products, tokens),
            }
        });
        Some(Routing { domains: domains.to_vec(), sites: sites.collect() })
    }
}

impl GateObserver for RoutingLog {
    fn observe(&self, site: Site, gates: &Tensor) {
        let rows = self.rows.borrow();
        let experts = gates.cols();
        let mut sums = self.sums.borrow_mut();
        let sum = sums.entry(site).or_insert_with(|| SiteSum {
            domains: vec![(vec![0.0; experts], 0.0, 0.0); self.num_domains],
            products: vec![0.0; experts * experts],
        });
        let even = (experts as f64).ln().max(f64::MIN_POSITIVE);
        let rows = if gates.rows() == rows.all.len() { &rows.all } else { &rows.labelled };
        for (gates, &domain) in gates.to_f64().chunks_exact(experts).zip(rows) {
            let (means, entropy, count) = &mut sum.domains[domain as usize];
            let of = |gate: &f64| if *gate > 0.0 { -gate * gate.ln() } else { 0.0 };
            *entropy += gates.iter().map(of).sum::<f64>() / even;
            for (sum, gate) in means.iter_mut().zip(gates) {
                *sum += gate;
            }
            *count += 1.0;
            for (products, gate) in sum.products.chunks_exact_mut(experts).zip(gates) {
                for (product, other) in products.iter_mut().zip(gates) {
                    *product += gate * other;
                }
            }
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
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SiteRouting {
    /// The layer's checkpoint name.
    pub site: String,
    /// Index of its decoder layer.
    pub layer: usize,
    /// `[domain][expert]`, every row summing to 1, or zero where no token of the domain was seen.
    pub mean_gate: Vec<Vec<f64>>,
    /// Mean entropy of a token's gates over that of even ones, 0 to 1; none in files of earlier builds.
    #[serde(default)]
    pub entropy: Option<f64>,
    /// The same for every domain; empty in files of earlier builds, none for domains without a token.
    #[serde(default)]
    pub domain_entropy: Vec<Option<f64>>,
    /// `[N · N]`: the mean over tokens of the product of every two gates; empty in files of earlier builds.
    #[serde(default)]
    pub products: Vec<f64>,
}

impl Routing {
    /// The mean over layers of the gates' entropy, 1 for even gates and 0 for one expert a token.
    pub fn entropy(&self) -> Option<f64> {
        let found: Vec<f64> = self.sites.iter().filter_map(|site| site.entropy).collect();
        (!found.is_empty()).then(|| found.iter().sum::<f64>() / found.len() as f64)
    }

    /// The same for every domain that was seen, by its name.
    pub fn domain_entropy(&self) -> BTreeMap<String, f64> {
        let mean = |(at, name): (usize, &String)| {
            let found = self.sites.iter().filter_map(|site| *site.domain_entropy.get(at)?);
            let found: Vec<f64> = found.collect();
            (!found.is_empty())
                .then(|| (name.clone(), found.iter().sum::<f64>() / found.len() as f64))
        };
        self.domains.iter().enumerate().filter_map(mean).collect()
    }

    /// The entropy of the gates by decoder layer, the mean over its routed projections.
    pub fn layer_entropy(&self) -> BTreeMap<usize, f64> {
        let mut sums: BTreeMap<usize, (f64, f64)> = BTreeMap::new();
        for (layer, entropy) in self.sites.iter().filter_map(|s| Some((s.layer, s.entropy?))) {
            let (sum, count) = sums.entry(layer).or_default();
            *sum += entropy;
            *count += 1.0;
        }
        sums.into_iter().map(|(layer, (sum, count))| (layer, sum / count)).collect()
    }

    /// How far the domains' gates differ: the mean of the layers' spreads, 0 when all domains are
    /// routed alike.
    pub fn specialisation(&self) -> f64 {
        self.sites.iter().map(SiteRouting::spread).sum::<f64>() / self.sites.len().max(1) as f64
    }
}

/// Gates of a domain of which no token was seen are all zero.
const SEEN: f64 = 0.5;
/// A head whose gate is below this part of an even share in every domain is dead.
const DEAD: f64 = 0.1;

impl SiteRouting {
    /// The mean gates of the domains of which tokens were seen.
    pub fn seen(&self) -> impl Iterator<Item = &Vec<f64>> + Clone {
        self.mean_gate.iter().filter(|gates| gates.iter().sum::<f64>() > SEEN)
    }

    /// The number of heads that get less than a tenth of an even share in every domain.
    pub fn dead_heads(&self) -> usize {
        let experts = self.mean_gate.first().map_or(0, Vec::len);
        let least = DEAD / experts.max(1) as f64;
        (0..experts).filter(|&expert| self.seen().all(|gates| gates[expert] < least)).count()
    }

    /// The largest difference between two domains in the share of one expert.
    pub fn spread(&self) -> f64 {
        let experts = self.mean_gate.first().map_or(0, Vec::len);
        (0..experts)
            .map(|expert| {
                let shares = self.seen().map(|gates| gates[expert]);
                let (low, high) = shares.fold((f64::INFINITY, 0.0_f64), |(low, high), share| {
                    (low.min(share), high.max(share))
                });
                high - low
            })
            .fold(0.0, f64::max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hydralora_kernels::DType;
    use hydralora_model::family::kit::LLAMA_LINEARS;

    #[test]
    fn domains_without_a_token_count_for_nothing_and_labelled_rows_find_their_domain() {
        let log = RoutingLog::new(3);
        // Two tokens of the first domain, two of the third; the last block computes the second and fourth.
        log.next_training_batch(vec![0, 0, 2, 2], [1, 3].into_iter());
        let gates = |values: &[f64]| Tensor::from_f64(DType::F64, values, [values.len() / 2, 2]);
        let site = |layer| Site { layer, linear: LLAMA_LINEARS[0] };
        log.observe(site(0), &gates(&[1.0, 0.0, 0.5, 0.5, 0.75, 0.25, 0.75, 0.25]));
        log.observe(site(1), &gates(&[1.0, 0.0, 0.97, 0.03]));
        let names = ["a", "b", "c"].map(str::to_owned);
        let found = log.summary(&names).unwrap();
        let [first, last] = &found.sites[..] else { panic!("two layers") };
        assert_eq!(first.mean_gate, [vec![0.75, 0.25], vec![0.0, 0.0], vec![0.75, 0.25]]);
        assert_eq!((first.spread(), first.dead_heads()), (0.0, 0));
        assert_eq!((first.domain_entropy[0], first.domain_entropy[1]), (Some(0.5), None));
        let wanted = (1.0 + 0.25 + 2.0 * 0.5625) / 4.0;
        assert!((first.products[0] - wanted).abs() < 1e-12);
        assert_eq!(last.mean_gate, [vec![1.0, 0.0], vec![0.0, 0.0], vec![0.97, 0.03]]);
        assert_eq!(last.dead_heads(), 1);
        assert!((last.spread() - 0.03).abs() < 1e-12);
        let of_domain = found.domain_entropy();
        assert!(of_domain.keys().eq(["a", "c"]) && (of_domain["a"] - 0.25).abs() < 1e-12);
        assert_eq!(found.layer_entropy().len(), 2);
    }
}
