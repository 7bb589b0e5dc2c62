//! What the base model makes of texts on the way: mean hidden states as features, and mean inputs of
//! its layers as directions for a router.

use crate::Result;
use hydralora_kernels::ops::frozen_linear::FrozenLinear;
use hydralora_kernels::{Tensor, Var, no_grad};
use hydralora_model::adapter::{Adapter, CustomLinear, Kind, Pass, Site, Update};
use hydralora_model::{Decoder, Packed, Tokenizer};
use std::collections::BTreeMap;
use std::mem::take;
use std::sync::{Mutex, PoisonError};

/// Tokens of a text that [`mean_hidden`] reads.
pub const MOST_TOKENS: usize = 256;
/// Tokens of a batch.
const BATCH_TOKENS: usize = 4_096;
/// Texts that are held as tokens at a time, so that memory does not grow with the corpus.
const TEXTS_AT_A_TIME: usize = 512;

/// The frozen base alone, with a gradient down to the first feed-forward block, as far as adapters on
/// the feed-forward layers need one: what training costs without any method.
pub struct BaseAlone;

impl Adapter for BaseAlone {
    fn rows_stand_alone(&self) -> bool {
        true
    }

    fn update(&self, site: Site, _rows: usize, _: &Pass<'_>) -> Update<'_> {
        match site.layer == 0 && site.kind().overlaps(Kind::GATE) {
            true => Update::Custom(self),
            false => Update::None,
        }
    }
}

impl CustomLinear for BaseAlone {
    fn forward(
        &self,
        _site: Site,
        x: &Var,
        frozen: &FrozenLinear,
        _block_gates: Option<&Var>,
        _pass: &Pass<'_>,
    ) -> Var {
        frozen.forward(&Var::leaf(x.value().clone()))
    }
}

/// The linear layer that reads the input of decoder layer `layer` after its norm; none where there is
/// no such layer.
fn first_of(decoder: &Decoder, layer: usize) -> Option<Site> {
    decoder.sites().into_iter().map(|shape| shape.site).find(|site| site.layer == layer)
}

/// Sees the inputs of some linear layers go by and adds them up by group, without changing anything.
#[derive(Default)]
struct Watch {
    sites: Vec<Site>,
    groups: usize,
    /// The group of every token of the batch in flight.
    of_token: Vec<u32>,
    sums: Mutex<BTreeMap<Site, Vec<f64>>>,
}

impl Watch {
    /// What was added up so far, `[groups, in]` by layer; the next sums start from zero.
    fn take_sums(&mut self) -> BTreeMap<Site, Vec<f64>> {
        take(self.sums.get_mut().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Adapter for Watch {
    fn update(&self, site: Site, _rows: usize, _: &Pass<'_>) -> Update<'_> {
        if self.sites.contains(&site) { Update::Custom(self) } else { Update::None }
    }
}

impl CustomLinear for Watch {
    fn forward(
        &self,
        site: Site,
        x: &Var,
        frozen: &FrozenLinear,
        _block_gates: Option<&Var>,
        _pass: &Pass<'_>,
    ) -> Var {
        let width = x.value().cols();
        let mut sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        let sums = sums.entry(site).or_insert_with(|| vec![0.0; self.groups * width]);
        add_rows(x.value(), &self.of_token, sums);
        frozen.forward(x)
    }
}

/// The group of a token that is in none.
const NO_GROUP: u32 = u32::MAX;

/// Adds each row of `rows: [T, width]` to the sum of its group in `sums: [groups, width]`.
fn add_rows(rows: &Tensor, groups: &[u32], sums: &mut [f64]) {
    let width = rows.cols();
    let rows = rows.to_f64();
    let grouped = rows.chunks_exact(width).zip(groups).filter(|(_, group)| **group != NO_GROUP);
    for (row, &group) in grouped {
        let start = group as usize * width;
        for (sum, value) in sums[start..start + width].iter_mut().zip(row) {
            *sum += value;
        }
    }
}

/// Is given the sequences of a batch, what was seen of it, and its final hidden states.
type Visit<'a> = dyn FnMut(&[usize], &mut Watch, &Tensor) + 'a;

/// Runs packed sequences through the decoder, `watch` looking on, and lets `visit` see each batch.
/// `group` gives the group of a token from its sequence's place in the batch, that one's index, and its
/// own place in it.
fn run(
    decoder: &Decoder,
    sequences: &[&[u32]],
    watch: &mut Watch,
    group: &dyn Fn(usize, usize, usize) -> u32,
    visit: &mut Visit<'_>,
) -> Result<()> {
    let _guard = no_grad();
    let mut first = 0;
    while first < sequences.len() {
        let (mut tokens, mut offsets, mut members) = (Vec::new(), vec![0], Vec::new());
        watch.of_token.clear();
        while first < sequences.len()
            && (members.is_empty() || tokens.len() + sequences[first].len() <= BATCH_TOKENS)
        {
            let sequence = sequences[first];
            if !sequence.is_empty() {
                tokens.extend_from_slice(sequence);
                offsets.push(tokens.len());
                let place = members.len();
                watch.of_token.extend((0..sequence.len()).map(|at| group(place, first, at)));
            }
            members.push(first);
            first += 1;
        }
        if tokens.is_empty() {
            continue;
        }
        let packed = Packed { tokens: &tokens, offsets: &offsets };
        let hidden = decoder.hidden(packed, watch, &Pass::inference())?;
        visit(&members, watch, hidden.value());
    }
    Ok(())
}

/// Computes mean hidden states `[texts, hidden_size]` of the first [`MOST_TOKENS`] tokens of every text:
/// what enters decoder layer `layer` after its norm, or the final hidden state where `layer` is their
/// number. The row of an empty text is zero. `progress` is told how many texts are done.
///
/// # Errors
/// If a text cannot be encoded or the model fails.
pub fn mean_hidden(
    decoder: &Decoder,
    tokenizer: &Tokenizer,
    texts: &[String],
    layer: usize,
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<f32>> {
    let config = decoder.config();
    let width = config.hidden_size;
    let limit = MOST_TOKENS.min(config.max_position_embeddings);
    let site = first_of(decoder, layer);
    let mut watch = Watch { sites: site.into_iter().collect(), ..Watch::default() };
    let mut features = vec![0.0_f32; texts.len() * width];
    let parts = features.chunks_mut(TEXTS_AT_A_TIME * width).zip(texts.chunks(TEXTS_AT_A_TIME));
    let mut done = 0;
    for (features, texts) in parts {
        let mut sequences = Vec::with_capacity(texts.len());
        for text in texts {
            let mut ids = tokenizer.encode(text)?;
            ids.truncate(limit);
            sequences.push(ids);
        }
        let slices: Vec<&[u32]> = sequences.iter().map(Vec::as_slice).collect();
        watch.groups = texts.len();
        let group = |place: usize, _: usize, _: usize| place as u32;
        run(decoder, &slices, &mut watch, &group, &mut |members, watch, hidden| {
            let mut sums = vec![0.0; watch.groups * width];
            match site {
                Some(site) => sums = watch.take_sums().remove(&site).unwrap_or(sums),
                None => add_rows(hidden, &watch.of_token, &mut sums),
            }
            for (&member, sums) in members.iter().zip(sums.chunks_exact(width)) {
                let count = slices[member].len().max(1) as f64;
                let row = &mut features[member * width..(member + 1) * width];
                for (out, sum) in row.iter_mut().zip(sums) {
                    *out = (sum / count) as f32;
                }
            }
        })?;
        done += texts.len();
        progress(done);
    }
    Ok(features)
}

/// Computes the mean input of every site per group, `[groups, in]`, over all tokens of `sequences`, each
/// of which belongs to one of the `groups`.
///
/// # Errors
/// If the model fails.
pub fn mean_inputs(
    decoder: &Decoder,
    sites: &[Site],
    sequences: &[(&[u32], u32)],
    groups: usize,
) -> Result<BTreeMap<Site, Vec<f64>>> {
    let tokens: Vec<&[u32]> = sequences.iter().map(|(tokens, _)| *tokens).collect();
    let mut counts = vec![0.0_f64; groups];
    for (tokens, group) in sequences {
        counts[*group as usize] += tokens.len() as f64;
    }
    let mut watch = Watch { sites: sites.to_vec(), groups, ..Watch::default() };
    let group = |_: usize, index: usize, _: usize| sequences[index].1;
    run(decoder, &tokens, &mut watch, &group, &mut |_, _, _| {})?;
    let mut sums = watch.take_sums();
    for sums in sums.values_mut() {
        let width = sums.len() / groups;
        for (sums, count) in sums.chunks_exact_mut(width).zip(&counts) {
            sums.iter_mut().for_each(|sum| *sum /= count.max(1.0));
        }
    }
    Ok(sums)
}

/// What of the inputs of layers is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sampled {
    /// The mean over the tokens of each sequence.
    Records,
    /// This many tokens of each sequence, evenly spread; not the first, which is the same everywhere.
    Tokens(usize),
}

/// Numbers that are held at a time, so that memory does not grow with the layers.
const NUMBERS_AT_A_TIME: usize = 1 << 25;

/// Gives the inputs of every site for `sequences` to `visit`, as `[rows, in]` with their width, one site
/// after the other.
///
/// # Errors
/// If the model or `visit` fails.
pub fn sampled_inputs<E: From<hydralora_model::Error>>(
    decoder: &Decoder,
    sites: &[(Site, usize)],
    sequences: &[&[u32]],
    sampled: Sampled,
    visit: &mut dyn FnMut(Site, Vec<f32>, usize) -> std::result::Result<(), E>,
) -> std::result::Result<(), E> {
    // The row of each token that is looked at, and the tokens of each row.
    let mut tokens_of: Vec<f64> = Vec::new();
    let mut rows: Vec<Vec<u32>> = Vec::with_capacity(sequences.len());
    for sequence in sequences {
        let mut of_sequence = vec![NO_GROUP; sequence.len()];
        match sampled {
            Sampled::Records => {
                of_sequence.fill(tokens_of.len() as u32);
                if !sequence.is_empty() {
                    tokens_of.push(sequence.len() as f64);
                }
            }
            Sampled::Tokens(most) => {
                let from = sequence.len().saturating_sub(1);
                let taken = most.min(from);
                for nth in 0..taken {
                    of_sequence[1 + nth * from / taken] = tokens_of.len() as u32;
                    tokens_of.push(1.0);
                }
            }
        }
        rows.push(of_sequence);
    }
    let group = |_: usize, index: usize, at: usize| rows[index][at];
    let mut left = sites;
    while !left.is_empty() {
        let mut numbers = 0;
        let fits = left.iter().take_while(|(_, width)| {
            numbers += width * tokens_of.len();
            numbers <= NUMBERS_AT_A_TIME
        });
        let (now, later) = left.split_at(fits.count().max(1));
        left = later;
        let watched = now.iter().map(|(site, _)| *site).collect();
        let mut watch = Watch { sites: watched, groups: tokens_of.len(), ..Watch::default() };
        run(decoder, sequences, &mut watch, &group, &mut |_, _, _| {})?;
        for (site, sums) in watch.take_sums() {
            let width = sums.len() / tokens_of.len().max(1);
            let means = sums.chunks_exact(width.max(1)).zip(&tokens_of);
            let means =
                means.flat_map(|(sums, count)| sums.iter().map(move |s| (s / count) as f32));
            visit(site, means.collect(), width)?;
        }
    }
    Ok(())
}
