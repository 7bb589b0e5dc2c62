//! All rows of a corpus of which only a sample is held: read once more, each put into the cluster
//! whose centre is nearest, and counted. Features and centres are those of the sample.

use super::corpus::{Corpus, cut, read_texts};
use super::features::Terms;
use crate::config::SourceConfig;
use crate::error::Result;
use hydralora_cluster::{Centres, Matrix, normalize};
use rayon::prelude::*;
use std::path::PathBuf;

/// Texts, and bytes of texts, that are taken apart at a time.
const BATCH_TEXTS: usize = 16_384;
const BATCH_BYTES: usize = 16 << 20;

/// Where the rows of a corpus come from.
#[derive(Debug, Clone)]
pub(super) struct Origin {
    pub(super) sources: Vec<SourceConfig>,
    pub(super) base_dir: PathBuf,
}

/// How all rows fall into the clusters.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Totals {
    /// Rows of each cluster and domain: `[clusters][domains]`.
    pub(super) table: Vec<Vec<usize>>,
    /// Rows without a word that counts.
    pub(super) blank: usize,
}

/// Reads all of `origin` and counts it.
///
/// # Errors
/// When a file can no longer be read.
pub(super) fn count(
    origin: &Origin,
    corpus: &Corpus,
    terms: &Terms,
    centres: &Matrix,
) -> Result<Totals> {
    let mut counter = Counter {
        terms,
        centres: Centres::new(centres),
        texts: Vec::new(),
        domains: Vec::new(),
        bytes: 0,
        totals: Totals {
            table: vec![vec![0; corpus.domain_names().len()]; centres.rows()],
            blank: 0,
        },
    };
    read_texts(&origin.sources, &origin.base_dir, &mut |text, domain| {
        // A file that changed in between may bring a domain that was not there.
        if let Some(domain) = corpus.domain_number(domain) {
            counter.add(cut(text), domain);
        }
        Ok(())
    })?;
    counter.flush();
    Ok(counter.totals)
}

struct Counter<'a> {
    terms: &'a Terms,
    centres: Centres<'a>,
    texts: Vec<String>,
    domains: Vec<u32>,
    bytes: usize,
    totals: Totals,
}

impl Counter<'_> {
    fn add(&mut self, text: String, domain: u32) {
        self.bytes += text.len();
        self.texts.push(text);
        self.domains.push(domain);
        if self.texts.len() == BATCH_TEXTS || self.bytes >= BATCH_BYTES {
            self.flush();
        }
    }

    fn flush(&mut self) {
        let Terms { vocabulary, basis, .. } = self.terms;
        let mut rows = vocabulary.project(&self.texts, basis);
        let width = rows.width.max(1);
        let clusters: Vec<Option<u32>> = (rows.data.par_chunks_exact_mut(width))
            .map(|row| normalize(row).then(|| self.centres.nearest(row).0))
            .collect();
        for (cluster, &domain) in clusters.iter().zip(&self.domains) {
            match cluster {
                Some(cluster) => self.totals.table[*cluster as usize][domain as usize] += 1,
                None => self.totals.blank += 1,
            }
        }
        self.texts.clear();
        self.domains.clear();
        self.bytes = 0;
    }
}
