//! How the rows of a pass follow each other, for adapters that look at all tokens of a sequence so far.

use super::Pass;
use crate::cache::{History, Reached};
use crate::decoder::tree::Run as TreeRun;
use crate::site::Site;
use hydralora_kernels::Var;
use hydralora_kernels::ops::running_mean::{Run, running_mean};
use std::ops::Range;

/// The runs of tokens that make up a pass.
#[derive(Default)]
pub(crate) struct Order {
    spans: Vec<Span>,
    /// Whether what the pass brings is wanted, by later runs or by a cache.
    keeps: bool,
}

/// Neighbouring rows of a sequence.
#[derive(Default)]
struct Span {
    rows: Range<usize>,
    /// The span whose last row comes before the first of this one.
    follows: Option<usize>,
    /// What came before the pass.
    before: Reached,
    /// What the pass brought.
    new: History,
}

impl Span {
    fn of(bounds: &[usize]) -> Self {
        Self { rows: bounds[0]..bounds[1], ..Self::default() }
    }
}

impl Order {
    /// Whole sequences.
    pub(crate) fn packed(offsets: &[usize]) -> Self {
        Self { spans: offsets.windows(2).map(Span::of).collect(), keeps: false }
    }

    /// Sequences behind what each of them has reached.
    pub(crate) fn behind(offsets: &[usize], before: Vec<Reached>) -> Self {
        let spans = offsets.windows(2).zip(before);
        let spans = spans.map(|(bounds, before)| Span { before, ..Span::of(bounds) });
        Self { spans: spans.collect(), keeps: true }
    }

    /// The runs of a tree, those without a parent behind what was reached.
    pub(crate) fn tree(rows: &[Range<usize>], runs: &[TreeRun], before: &Reached) -> Self {
        let span = |(rows, run): (&Range<usize>, &TreeRun)| Span {
            rows: rows.clone(),
            follows: run.parent,
            before: if run.parent.is_none() { before.clone() } else { Reached::new() },
            new: History::default(),
        };
        Self { spans: rows.iter().zip(runs).map(span).collect(), keeps: true }
    }

    /// What the pass brought, for every span.
    pub(crate) fn into_histories(self) -> impl Iterator<Item = History> {
        self.spans.into_iter().map(|span| span.new)
    }

    /// The sum and number of what comes before a span.
    fn start_of(&self, span: usize, site: Site) -> Option<(Vec<f64>, usize)> {
        let Some(parent) = self.spans[span].follows else {
            return self.spans[span].before.get(&site).cloned();
        };
        let before = self.start_of(parent, site).map_or(0, |(_, count)| count);
        let (sum, count) = self.spans[parent].new.last(site)?;
        Some((sum.to_vec(), before + count))
    }

    /// The means so far of `x: [T, N]`, the rows `rows` of the pass.
    fn running_mean(&mut self, site: Site, x: &Var, rows: &Range<usize>) -> Var {
        let within = |span: &Span| rows.start <= span.rows.start && span.rows.end <= rows.end;
        let chosen: Vec<usize> =
            (0..self.spans.len()).filter(|&at| within(&self.spans[at])).collect();
        let width = x.value().cols();
        // A run may follow another of the pass, so they are computed one after the other.
        if chosen.iter().any(|&at| self.spans[at].follows.is_some()) {
            return self.one_by_one(site, x, rows, &chosen);
        }
        let run = |&at: &usize| {
            let own = &self.spans[at].rows;
            let rows = own.start - rows.start..own.end - rows.start;
            Run { rows, before: self.start_of(at, site) }
        };
        let runs: Vec<Run> = chosen.iter().map(run).collect();
        let (means, sums) = running_mean(x, &runs);
        if self.keeps {
            for (&at, run) in chosen.iter().zip(&runs) {
                let own = sums[run.rows.start * width..run.rows.end * width].to_vec();
                self.spans[at].new.set(site, width, own);
            }
        }
        means
    }

    fn one_by_one(&mut self, site: Site, x: &Var, rows: &Range<usize>, chosen: &[usize]) -> Var {
        let width = x.value().cols();
        let parts = chosen.iter().map(|&at| {
            let own = self.spans[at].rows.clone();
            let part: Vec<usize> = (own.start - rows.start..own.end - rows.start).collect();
            let x = hydralora_kernels::ops::rows::take_rows(x, &part);
            let run = Run { rows: 0..own.len(), before: self.start_of(at, site) };
            let (means, sums) = running_mean(&x, &[run]);
            self.spans[at].new.set(site, width, sums);
            means
        });
        super::joined(parts.collect())
    }
}

impl Pass<'_> {
    /// Says how the rows of this pass follow each other.
    pub(crate) fn follow(&self, order: Order) {
        self.rows.take();
        self.order.replace(order);
    }

    /// Takes what was noted while the pass ran.
    pub(crate) fn take_order(&self) -> Order {
        self.order.take()
    }

    /// Says which rows of the pass what follows is computed of.
    pub(crate) fn at_rows(&self, rows: &Range<usize>) {
        self.rows.replace(Some(rows.clone()));
    }

    /// Computes, for each row of `x: [T, N]`, the mean over the tokens of its sequence so far, itself
    /// included, those of earlier passes too. `x` are the rows that the adapter is given at `site`.
    pub fn running_mean(&self, site: Site, x: &Var) -> Var {
        let mut order = self.order.borrow_mut();
        let count = x.value().rows();
        if order.spans.is_empty() {
            *order = Order::packed(&[0, count]);
        }
        let rows = self.rows.borrow().clone().unwrap_or(0..count);
        order.running_mean(site, x, &rows)
    }
}
