//! Clusters of the training data, from which routers start and by which they are guided.

use crate::plan::Plan;
use crate::recipe::Recipe;
use anyhow::Context;
use hydralora_data::heads::{Assignment, Corpus, DIMENSIONS, Features, centroids, partition};
use hydralora_data::{DataReport, Example, Examples};
use hydralora_model::adapter::Site;
use hydralora_peft::{ClustersOf, RouterStart};
use hydralora_run::probe::{Sampled, mean_inputs, sampled_inputs};
use std::collections::BTreeMap;

/// Training sequences whose layer inputs are looked at for a router's start.
const SEQUENCES: usize = 256;
/// Tokens of each where single tokens are clustered.
const TOKENS: usize = 4;

/// The clusters that training texts fall into by their words.
pub(crate) struct Clusters {
    /// The number of the first record of each source.
    first: Vec<usize>,
    assignment: Assignment,
}

impl Clusters {
    fn new(report: &DataReport, assignment: Assignment) -> Self {
        let mut first = vec![0];
        for source in &report.sources {
            first.push(first[first.len() - 1] + source.records);
        }
        Self { first, assignment }
    }

    /// The cluster of a record; none for one that holds no word that counts.
    pub(crate) fn of(&self, source: u32, row: u32) -> Option<u32> {
        self.assignment.of(self.first.get(source as usize)? + row as usize)
    }
}

/// Some of the examples, evenly spread, each with the cluster that `cluster_of` its source and row says
/// it belongs to; those of no cluster are left out.
fn clustered_examples(
    examples: &Examples,
    cluster_of: &dyn Fn(u32, u32) -> Option<u32>,
) -> anyhow::Result<Vec<(Example, u32)>> {
    let mut known: Vec<(usize, u32)> = Vec::new();
    for index in 0..examples.len() {
        let (source, row) = examples.place(index)?;
        known.extend(cluster_of(source, row).map(|cluster| (index, cluster)));
    }
    let every = known.len().div_ceil(SEQUENCES).max(1);
    let read = |(index, cluster)| Ok((examples.get(index)?, cluster));
    known.into_iter().step_by(every).map(read).collect()
}

fn cluster_texts(recipe: &Recipe, clusters: usize) -> anyhow::Result<Assignment> {
    let corpus = Corpus::read(&recipe.data.train, &recipe.base)?;
    let seed = recipe.train.seed;
    let features = Features::tfidf(&corpus, DIMENSIONS, seed)?;
    Ok(partition(&features, &corpus, clusters, seed)?)
}

impl Plan {
    /// Finds the clusters of the training texts, where the recipe has a use for them: in a run that goes on
    /// only to guide the routers, in a new one to start them too.
    pub(crate) fn find_clusters(&mut self, fresh: bool) -> anyhow::Result<()> {
        let method = &self.recipe.method;
        let start = method.router_start().filter(|start| fresh && start.of == ClustersOf::Texts);
        let (wanted, option) = match (method.guide_clusters(), start) {
            (Some(clusters), _) => (clusters, "method.router_guide: clusters"),
            (None, Some(start)) => (start.clusters, "method.router_init: centroids"),
            (None, None) => return Ok(()),
        };
        let assignment = match &self.heads {
            Some(heads) => heads.assignment.clone(),
            None => cluster_texts(&self.recipe, wanted).context(option)?,
        };
        self.clusters = Some(Clusters::new(&self.dataset.report, assignment));
        Ok(())
    }

    /// Starts the routers from clusters of the training data, where the recipe says so.
    pub(crate) fn start_routers(&mut self) -> anyhow::Result<()> {
        let Some(start) = self.recipe.method.router_start() else { return Ok(()) };
        let Some(routed) = self.tuned.as_routed() else { return Ok(()) };
        let sites = routed.router_inputs();
        let means = match start.of {
            ClustersOf::Texts => self.means_of_texts(start, &sites)?,
            ClustersOf::Records => self.centroids(start, &sites, Sampled::Records)?,
            ClustersOf::Tokens => self.centroids(start, &sites, Sampled::Tokens(TOKENS))?,
        };
        if let Some(routed) = self.tuned.as_routed_mut() {
            routed.start_routers(&means);
        }
        Ok(())
    }

    /// The mean input of each site over the tokens of each cluster of texts.
    fn means_of_texts(
        &self,
        start: RouterStart,
        sites: &[Site],
    ) -> anyhow::Result<BTreeMap<Site, Vec<f64>>> {
        let Some(clusters) = &self.clusters else { return Ok(BTreeMap::new()) };
        let examples = clustered_examples(&self.dataset.train, &|s, row| clusters.of(s, row))?;
        let sequences: Vec<(&[u32], u32)> =
            examples.iter().map(|(example, cluster)| (&example.tokens[..], *cluster)).collect();
        Ok(mean_inputs(&self.base.decoder, sites, &sequences, start.clusters)?)
    }

    /// The centres of clusters of each site's own inputs.
    fn centroids(
        &self,
        start: RouterStart,
        sites: &[Site],
        sampled: Sampled,
    ) -> anyhow::Result<BTreeMap<Site, Vec<f64>>> {
        let widths = self.base.decoder.sites().into_iter().map(|of| (of.site, of.in_features));
        let widths: Vec<(Site, usize)> = widths.filter(|(site, _)| sites.contains(site)).collect();
        let examples = clustered_examples(&self.dataset.train, &|_, _| Some(0))?;
        let sequences: Vec<&[u32]> =
            examples.iter().map(|(example, _)| &example.tokens[..]).collect();
        let (k, seed) = (start.clusters, self.recipe.train.seed);
        let mut found = BTreeMap::new();
        let mut visit = |site: Site, rows: Vec<f32>, width: usize| -> anyhow::Result<()> {
            let centres = centroids(rows, width, k, seed)
                .context("method.router_init: clusters of the layers' inputs")?;
            found.insert(site, centres);
            Ok(())
        };
        sampled_inputs(&self.base.decoder, &widths, &sequences, sampled, &mut visit)?;
        Ok(found)
    }
}
