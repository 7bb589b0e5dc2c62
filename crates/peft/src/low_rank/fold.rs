//! The family of LoRA as a change of the base's weight: `s Σ_i w_i B_i A`, less what a start took out of
//! the weight (PiSSA, R-LoRA), and with DoRA the rows of the sum rescaled.

use super::start::Pair;
use super::{LowRankAdapter, Mixing};
use crate::merge::{Factors, Gates, Merge};
use hydralora_kernels::Tensor;
use hydralora_model::adapter::Site;

const PER_TOKEN: &str = "its heads are weighed anew for every token, by a router that reads the token, \
                         so no single matrix does what they do together";

impl LowRankAdapter {
    /// The update at `site`, with routed heads weighed as `gates` says.
    pub(super) fn fold(&self, site: Site, gates: &Gates) -> Merge<'_> {
        let Some(layer) = self.layers.get(&site) else { return Merge::Unchanged };
        let experts = self.spec.num_experts;
        let even = || vec![1.0 / experts as f64; experts];
        let weights = match (self.spec.mixing, gates) {
            (Mixing::Sum, _) => vec![1.0; experts],
            (Mixing::Mean, _) | (Mixing::Routed(_), Gates::Uniform) => even(),
            (Mixing::Routed(_), Gates::PerToken) => return Merge::Refused(PER_TOKEN.to_owned()),
            (Mixing::Routed(_), Gates::Fixed(found)) => match found.get(&site) {
                Some(weights) if weights.len() == experts => weights.clone(),
                Some(weights) => {
                    let count = weights.len();
                    return Merge::Refused(format!("{site} has {experts} heads, not {count}"));
                }
                None => return Merge::Refused(format!("no gates are known for {site}")),
            },
        };
        let b = layer.b.parameter.value();
        let rank = self.spec.rank;
        let values: Vec<f64> = b
            .to_f64()
            .iter()
            .enumerate()
            .map(|(at, value)| value * weights[at % b.cols() / rank])
            .collect();
        let factors = Factors {
            a: layer.a.parameter.value().clone(),
            b: Tensor::from_f64(b.dtype(), &values, b.shape()),
            scale: self.spec.scale,
            num_experts: experts,
            beside: self.taken_out(site).map(Pair::values),
        };
        match &layer.magnitude {
            None => Merge::Delta(Box::new(factors)),
            Some(magnitude) => Merge::Map(Box::new(move |weight| magnitude.fold(weight, &factors))),
        }
    }
}
