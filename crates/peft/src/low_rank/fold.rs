//! What DoRA, and what a start took out of the weight (PiSSA, R-LoRA), come to as a change of the base's
//! weight beside the update.

use super::LowRankAdapter;
use super::start::Pair;
use crate::merge::{Factors, Gates, Merge};
use hydralora_model::adapter::{Pass, Site};

impl LowRankAdapter {
    /// The change at `site`, with routed heads weighed as `gates` says.
    pub(super) fn fold(&self, site: Site, gates: &Gates) -> Merge<'_> {
        let Some(layer) = self.layers.get(&site) else { return Merge::Unchanged };
        let update = self.low_rank(layer, &Pass::inference());
        let factors = match Factors::of(site, &update, gates) {
            Ok(factors) => Factors { beside: self.taken_out(site).map(Pair::values), ..factors },
            Err(why) => return Merge::Refused(why),
        };
        match &layer.magnitude {
            None => Merge::Delta(Box::new(factors)),
            Some(magnitude) => Merge::Map(Box::new(move |weight| magnitude.fold(weight, &factors))),
        }
    }
}
