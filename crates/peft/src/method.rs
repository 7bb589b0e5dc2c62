//! What a fine-tuning method is: an entry of the registry, and its options.

use crate::error::{Fault, Result};
use crate::targets::Targets;
use crate::tuned::Tuned;
use hydralora_kernels::DType;
use hydralora_model::adapter::SiteShape;
use schemars::Schema;
use serde_json::{Map, Value};

/// An entry of the registry.
pub trait Method: Sync {
    /// The name in a recipe, `method.name`.
    fn name(&self) -> &'static str;
    /// One line for `--help` and the docs.
    fn summary(&self) -> &'static str;
    /// Whether an `adapter_config.json` describes this method.
    fn claims(&self, config: &Map<String, Value>) -> bool;
    /// The method's options as a recipe gives them, all of them spelt out.
    fn defaults(&self) -> Map<String, Value>;
    /// The JSON schema of those options.
    fn schema(&self) -> Schema;
    /// Reads the options of a recipe's `method` section, without `name`.
    ///
    /// # Errors
    /// Every wrong option.
    fn read_recipe(
        &self,
        section: &Map<String, Value>,
    ) -> Result<Box<dyn MethodOptions>, Vec<Fault>>;
    /// Reads the options out of an `adapter_config.json`.
    ///
    /// # Errors
    /// Every option that is wrong or not supported here.
    fn read_peft(&self, config: &Map<String, Value>) -> Result<Box<dyn MethodOptions>, Vec<Fault>>;
}

/// What routers start from, for [`Routed::start_routers`](crate::Routed::start_routers).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouterStart {
    /// The number of clusters.
    pub clusters: usize,
    /// What the clusters are of.
    pub of: ClustersOf,
}

/// What is clustered for a router's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClustersOf {
    /// The training texts by their words: the same clusters for all layers.
    Texts,
    /// In each layer, the mean inputs of the training records.
    Records,
    /// In each layer, the inputs of single tokens.
    Tokens,
}

/// Options of one method, checked.
pub trait MethodOptions: Send + Sync {
    /// As a recipe writes them, without `name`.
    fn to_recipe(&self) -> Map<String, Value>;
    /// As an `adapter_config.json` holds them, `peft_type` included.
    fn to_peft(&self) -> Map<String, Value>;
    /// Which layers the method changes.
    fn targets(&self) -> &Targets;
    /// Whether [`build`](Self::build) needs the shapes of all layers of the model, because the
    /// method's tensors belong to no single layer.
    fn whole_model(&self) -> bool {
        false
    }
    /// Whether its tensors are the layers' own weights, under their names.
    fn replaces_weights(&self) -> bool {
        false
    }
    /// The fewest numbers that a file of such an adapter on `sites` holds, as far as these options
    /// decide it.
    fn stored_numbers(&self, sites: &[SiteShape]) -> usize {
        let _ = sites;
        0
    }
    /// What a file of such an adapter can be built from, where that is less than what trains it.
    fn as_stored(&self) -> Option<Box<dyn MethodOptions>> {
        None
    }
    /// The layers of `sites` that the method changes, in order.
    ///
    /// # Errors
    /// If a target matches nothing.
    fn select(&self, sites: &[SiteShape]) -> Result<Vec<SiteShape>> {
        self.targets().select(sites)
    }
    /// Checks what the options say of single layers, for the layers `sites` that they choose.
    ///
    /// # Errors
    /// If something is said of no layer.
    fn check_layers(&self, sites: &[SiteShape]) -> Result<()> {
        let _ = sites;
        Ok(())
    }
    /// Checks the options against the domains of a run's data.
    ///
    /// # Errors
    /// If they cannot be had of these.
    fn check_domains(&self, domains: &[String]) -> Result<()> {
        let _ = domains;
        Ok(())
    }
    /// What the routers start from; none where they start at random.
    fn router_start(&self) -> Option<RouterStart> {
        None
    }
    /// The number of clusters of the training texts that guide the routers in training; none where they
    /// are not guided, or by something else. A run then says of every sequence which cluster it is of
    /// ([`Pass::in_clusters`](hydralora_model::adapter::Pass::in_clusters)).
    fn guide_clusters(&self) -> Option<usize> {
        None
    }
    /// A fresh adapter on `sites`, its tensors drawn from `seed`.
    fn build(&self, sites: &[SiteShape], dtype: DType, seed: u64) -> Box<dyn Tuned>;
}

/// The product of extents that a file names, which may be anything.
pub(crate) fn product(extents: &[usize]) -> usize {
    extents.iter().fold(1, |product, extent| product.saturating_mul(*extent))
}
