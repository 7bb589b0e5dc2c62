//! What a text is to the clustering: a row of unit length in few dimensions.

use super::corpus::Corpus;
use crate::error::{Error, Result};
use hydralora_cluster::{
    Matrix, Random, SparseRows, Vocabulary, normalize, project, truncated_svd,
};
use rayon::prelude::*;

/// Rows that the dimensions are found on; all others are only projected.
const FIT_ROWS: usize = 20_000;
/// Most terms of the vocabulary.
const MOST_TERMS: usize = 20_000;

/// Rows to cluster.
#[derive(Debug)]
pub struct Features {
    /// `[rows, dimensions]`, each of length 1.
    pub(super) rows: Matrix,
    /// The text of each row.
    pub(super) origin: Vec<usize>,
    /// Texts without a row: empty, or without a word that counts.
    pub(super) blank: usize,
    pub(super) terms: Option<Terms>,
    pub(super) kind: &'static str,
}

/// The vocabulary, and the terms of a sample of rows.
#[derive(Debug)]
pub(super) struct Terms {
    pub(super) vocabulary: Vocabulary,
    /// From terms to dimensions: `[terms, dimensions]`.
    pub(super) basis: Matrix,
    /// Terms of some rows …
    pub(super) sparse: SparseRows,
    /// … and which those are.
    pub(super) sample: Vec<usize>,
}

impl Features {
    /// TF-IDF of stemmed words, reduced to `dimensions` by latent semantic analysis.
    ///
    /// # Errors
    /// If no text holds a word.
    pub fn tfidf(corpus: &Corpus, dimensions: usize, seed: u64) -> Result<Self> {
        let vocabulary = Vocabulary::build(&corpus.texts, MOST_TERMS);
        let fit = Random::new(seed, 4).sample(corpus.texts.len(), FIT_ROWS);
        let chosen: Vec<&str> = fit.iter().map(|&text| corpus.texts[text].as_str()).collect();
        let sparse = vocabulary.rows(&chosen);
        let basis = truncated_svd(&sparse, dimensions, seed);
        let (rows, origin) = unit_rows(vocabulary.project(&corpus.texts, &basis))?;
        let blank = corpus.len() - origin.len();
        // From texts to rows: a text in the sample may have no row.
        let mut kept = SparseRows::default();
        let mut sample = Vec::new();
        for (at, text) in fit.iter().enumerate() {
            if let Ok(row) = origin.binary_search(text) {
                kept.push(sparse.row(at));
                sample.push(row);
            }
        }
        kept.width = sparse.width;
        let terms = Some(Terms { vocabulary, basis, sparse: kept, sample });
        Ok(Self { rows, origin, blank, terms, kind: "tfidf" })
    }

    /// Rows `[texts, width]` from elsewhere, such as a model's mean hidden states: centred, and
    /// reduced to `dimensions` by principal component analysis. A row that is all zero stands for
    /// an empty text.
    ///
    /// # Errors
    /// If `values` is not whole rows, a value is not finite, or all rows are zero.
    pub fn dense(values: Vec<f32>, width: usize, dimensions: usize, seed: u64) -> Result<Self> {
        if width == 0 || !values.len().is_multiple_of(width) {
            let found = format!("{} values for rows of {width}", values.len());
            return Err(Error::Features(found));
        }
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            let message = format!("row {} holds {}", at / width + 1, values[at]);
            return Err(Error::Features(message));
        }
        let given = Matrix { data: values, width };
        let total = given.rows();
        let origin: Vec<usize> =
            (0..total).filter(|&row| given.row(row).iter().any(|value| *value != 0.0)).collect();
        let mut rows = if origin.len() == total { given } else { given.select(&origin) };
        let mean = rows.mean();
        rows.data.par_chunks_exact_mut(width).for_each(|row| {
            row.iter_mut().zip(&mean).for_each(|(value, mean)| *value -= mean);
        });
        let fit = Random::new(seed, 4).sample(rows.rows(), FIT_ROWS);
        let basis = truncated_svd(&rows.select(&fit), dimensions, seed);
        let (rows, kept) = unit_rows(project(&rows, &basis))?;
        let origin: Vec<usize> = kept.iter().map(|&row| origin[row]).collect();
        Ok(Self { rows, blank: total - origin.len(), origin, terms: None, kind: "model" })
    }

    /// How many rows there are to cluster.
    pub fn len(&self) -> usize {
        self.origin.len()
    }

    /// Whether there is none; the constructors refuse that.
    pub fn is_empty(&self) -> bool {
        self.origin.is_empty()
    }

    /// How many dimensions a row has.
    pub fn dimensions(&self) -> usize {
        self.rows.width
    }
}

/// Rows scaled to length 1 without those of no length, and which they were.
fn unit_rows(mut rows: Matrix) -> Result<(Matrix, Vec<usize>)> {
    if rows.width == 0 {
        return Err(Error::NoFeatures);
    }
    let kept: Vec<bool> = rows.data.par_chunks_exact_mut(rows.width).map(normalize).collect();
    let origin: Vec<usize> = (0..kept.len()).filter(|&row| kept[row]).collect();
    if origin.is_empty() {
        return Err(Error::NoFeatures);
    }
    let rows = if origin.len() == kept.len() { rows } else { rows.select(&origin) };
    Ok((rows, origin))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_without_words_have_no_row() {
        let mut corpus = Corpus::default();
        for text in ["cats purr", "", "dogs bark", "the of and", " \n", "dogs and cats"] {
            corpus.push(text.to_owned(), "a");
        }
        let features = Features::tfidf(&corpus, 8, 0).unwrap();
        assert_eq!(features.origin, [0, 2, 5]);
        assert_eq!(features.blank, 3);
        let terms = features.terms.unwrap();
        assert_eq!(terms.sample, [0, 1, 2]);
        assert_eq!(terms.sparse.rows(), 3);
        let mut empty = Corpus::default();
        empty.push("…".to_owned(), "a");
        assert!(matches!(Features::tfidf(&empty, 8, 0), Err(Error::NoFeatures)));
        assert!(matches!(Features::tfidf(&Corpus::default(), 8, 0), Err(Error::NoFeatures)));
    }

    #[test]
    fn dense_rows_are_checked() {
        assert!(matches!(Features::dense(vec![1.0; 5], 2, 4, 0), Err(Error::Features(_))));
        assert!(matches!(Features::dense(vec![], 0, 4, 0), Err(Error::Features(_))));
        let error = Features::dense(vec![1.0, 2.0, f32::NAN, 0.0], 2, 4, 0).unwrap_err();
        assert!(error.to_string().contains("row 2 holds NaN"), "{error}");
        assert!(matches!(Features::dense(vec![0.0; 6], 2, 4, 0), Err(Error::NoFeatures)));
        let features = Features::dense(vec![1.0, 2.0, 0.0, 0.0, 5.0, 1.0], 2, 4, 0).unwrap();
        assert_eq!(features.origin, [0, 2]);
    }
}
