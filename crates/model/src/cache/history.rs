//! What adapters remember of the tokens of a sequence: for some layers, sums over all tokens so far.

use crate::site::Site;
use std::collections::BTreeMap;
use std::ops::Range;

/// Rows that room is made for at a time.
const GROWTH: usize = 64;

/// Sums over the tokens so far, one row for every token, by layer. A row for each, and not the last alone, so
/// that tokens can be taken back, and a sequence's beginning be used for another.
#[derive(Clone, Default)]
pub(crate) struct History(BTreeMap<Site, Sums>);

/// The sum over all tokens, and how many these are, by layer.
pub(crate) type Reached = BTreeMap<Site, (Vec<f64>, usize)>;

#[derive(Clone)]
struct Sums {
    width: usize,
    rows: Vec<f64>,
}

impl Sums {
    fn len(&self) -> usize {
        self.rows.len() / self.width
    }

    fn append(&mut self, rows: &[f64]) {
        let wanted = (self.rows.len() + rows.len()).next_multiple_of(GROWTH * self.width);
        if wanted > self.rows.capacity() {
            self.rows.reserve_exact(wanted - self.rows.len());
        }
        self.rows.extend_from_slice(rows);
    }
}

impl History {
    /// Puts `rows`, `[T, width]` row by row, in the place of what it has of a layer.
    pub(crate) fn set(&mut self, site: Site, width: usize, rows: Vec<f64>) {
        self.0.insert(site, Sums { width: width.max(1), rows });
    }

    /// The last row of a layer, and the number of rows.
    pub(crate) fn last(&self, site: Site) -> Option<(&[f64], usize)> {
        let sums = self.0.get(&site).filter(|sums| !sums.rows.is_empty())?;
        Some((&sums.rows[sums.rows.len() - sums.width..], sums.len()))
    }

    /// The last rows.
    pub(crate) fn reached(&self) -> Reached {
        let last = |&site: &Site| self.last(site).map(|(sum, count)| (site, (sum.to_vec(), count)));
        self.0.keys().filter_map(last).collect()
    }

    /// Appends those of the tokens that follow.
    pub(crate) fn append(&mut self, other: &Self) {
        for (&site, sums) in &other.0 {
            let own = Sums { width: sums.width, rows: Vec::new() };
            self.0.entry(site).or_insert(own).append(&sums.rows);
        }
    }

    /// Forgets all but the first `tokens`.
    pub(crate) fn truncate(&mut self, tokens: usize) {
        for sums in self.0.values_mut() {
            sums.rows.truncate(tokens * sums.width);
        }
    }

    /// Copies the rows of some tokens; none if it does not have them.
    pub(crate) fn part(&self, tokens: Range<usize>) -> Option<Self> {
        let of = |(&site, sums): (&Site, &Sums)| {
            let rows = sums.rows.get(tokens.start * sums.width..tokens.end * sums.width)?;
            Some((site, Sums { width: sums.width, rows: rows.to_vec() }))
        };
        self.0.iter().map(of).collect::<Option<_>>().map(Self)
    }

    /// Numbers of one token.
    pub(crate) fn per_token(&self) -> usize {
        self.0.values().map(|sums| sums.width).sum()
    }

    /// Counts the bytes it occupies.
    pub(crate) fn bytes(&self) -> usize {
        self.0.values().map(|sums| sums.rows.capacity() * size_of::<f64>()).sum()
    }

    /// Counts the bytes that `tokens` tokens occupy, of `per_token` numbers each.
    pub(crate) fn bytes_of(tokens: usize, per_token: usize) -> usize {
        tokens.next_multiple_of(GROWTH) * per_token * size_of::<f64>()
    }
}
