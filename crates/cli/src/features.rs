//! What the base model makes of texts: mean hidden states as features, and mean inputs of its layers
//! as directions for a router.

use crate::args::Global;
use crate::plan::Base;
use crate::ui::say;
use hydralora_data::{Example, Examples};
use hydralora_kernels::Var;
use hydralora_kernels::ops::frozen_linear::FrozenLinear;
use hydralora_kernels::{Tensor, no_grad};
use hydralora_model::adapter::{Adapter, Pass, Site};
use hydralora_model::durable::write_file;
use hydralora_model::family::kit::Q_PROJ;
use hydralora_model::hub::Hub;
use hydralora_model::{Decoder, Packed};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::Mutex;

/// Tokens of a text that are read.
const MOST_TOKENS: usize = 256;
/// Tokens of a batch.
const BATCH_TOKENS: usize = 4_096;
/// Training sequences whose layer inputs are averaged for a router's start.
const ROUTER_SEQUENCES: usize = 256;

/// Sees the inputs of some linear layers go by and adds them up by group, without changing anything.
struct Watch {
    sites: Vec<Site>,
    groups: usize,
    /// The group of every token of the batch in flight.
    of_token: Vec<u32>,
    sums: Mutex<BTreeMap<Site, Vec<f64>>>,
}

impl Adapter for Watch {
    fn linear(&self, site: Site, x: &Var, frozen: &FrozenLinear, _: &Pass<'_>) -> Var {
        if self.sites.contains(&site) {
            let width = x.value().cols();
            let mut sums = self.sums.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            let sums = sums.entry(site).or_insert_with(|| vec![0.0; self.groups * width]);
            add_rows(x.value(), &self.of_token, sums);
        }
        frozen.forward(x)
    }
}

fn add_rows(rows: &Tensor, groups: &[u32], sums: &mut [f64]) {
    let width = rows.cols();
    for (row, &group) in rows.to_f64().chunks_exact(width).zip(groups) {
        let start = group as usize * width;
        for (sum, value) in sums[start..start + width].iter_mut().zip(row) {
            *sum += value;
        }
    }
}

/// Is given the sequences of a batch, what was seen of it, and its final hidden states.
type Visit<'a> = dyn FnMut(&[usize], &mut Watch, &Tensor) -> anyhow::Result<()> + 'a;

/// Runs packed sequences through the decoder; `visit` is given the sequences of each batch, the
/// groups of their tokens (numbered within the batch) and the final hidden states.
fn run(
    decoder: &Decoder,
    sequences: &[&[u32]],
    watch: &mut Watch,
    group: &dyn Fn(usize, usize) -> u32,
    visit: &mut Visit<'_>,
) -> anyhow::Result<()> {
    let _guard = no_grad();
    let mut first = 0;
    while first < sequences.len() {
        let (mut tokens, mut offsets, mut members) = (Vec::new(), vec![0], Vec::new());
        watch.of_token.clear();
        while first < sequences.len()
            && (members.is_empty() || tokens.len() + sequences[first].len() <= BATCH_TOKENS)
        {
            let sequence = sequences[first];
            let number = group(members.len(), first);
            if !sequence.is_empty() {
                tokens.extend_from_slice(sequence);
                offsets.push(tokens.len());
                watch.of_token.extend(std::iter::repeat_n(number, sequence.len()));
            }
            members.push(first);
            first += 1;
        }
        if tokens.is_empty() {
            continue;
        }
        let packed = Packed { tokens: &tokens, offsets: &offsets };
        let hidden = decoder.hidden(packed, watch, &Pass::inference())?;
        visit(&members, watch, hidden.value())?;
    }
    Ok(())
}

/// Mean hidden states `[texts, hidden_size]` of the first tokens of every text: what enters decoder
/// layer `layer` after its norm, or the final hidden state where `layer` is their number. The row of
/// an empty text is zero. Kept in the cache, by model, layer and texts.
///
/// # Errors
/// If there is no such layer, or the model or the cache fails.
pub(crate) fn mean_hidden(
    global: &Global,
    base: &Base,
    texts: &[String],
    layer: usize,
) -> anyhow::Result<Vec<f32>> {
    let decoder = &base.decoder;
    let width = decoder.config().hidden_size;
    let path = cache_path(base, texts, layer);
    if let Some(kept) = read_cache(&path, texts.len() * width) {
        say(global, format!("features from {}", path.display()));
        return Ok(kept);
    }
    let limit = MOST_TOKENS.min(decoder.config().max_position_embeddings);
    let site = Site { layer, linear: &Q_PROJ };
    let last = layer == decoder.config().num_hidden_layers;
    let mut watch = Watch {
        sites: if last { Vec::new() } else { vec![site] },
        groups: 0,
        of_token: Vec::new(),
        sums: Mutex::default(),
    };
    let mut features = vec![0.0_f32; texts.len() * width];
    let started = std::time::Instant::now();
    let mut shown = 0;
    // Tokens of some texts at a time, so that memory does not grow with the corpus.
    for (part, texts) in texts.chunks(512).enumerate() {
        let mut sequences = Vec::with_capacity(texts.len());
        for text in texts {
            let mut ids = base.tokenizer().encode(text)?;
            ids.truncate(limit);
            sequences.push(ids);
        }
        let slices: Vec<&[u32]> = sequences.iter().map(Vec::as_slice).collect();
        watch.groups = texts.len();
        let group = |place: usize, _: usize| place as u32;
        run(decoder, &slices, &mut watch, &group, &mut |members, watch, hidden| {
            let mut sums = vec![0.0; texts.len() * width];
            if last {
                add_rows(hidden, &watch.of_token, &mut sums);
            } else {
                let seen = watch.sums.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner());
                sums = seen.remove(&site).unwrap_or(sums);
            }
            for (place, &member) in members.iter().enumerate() {
                let count = sequences[member].len().max(1) as f64;
                let at = (part * 512 + member) * width;
                for (out, sum) in features[at..at + width].iter_mut().zip(&sums[place * width..]) {
                    *out = (sum / count) as f32;
                }
            }
            Ok(())
        })?;
        let done = part * 512 + texts.len();
        if started.elapsed().as_secs() / 20 > shown {
            shown = started.elapsed().as_secs() / 20;
            say(global, format!("{done} of {} texts read by the model", features.len() / width));
        }
    }
    let bytes: Vec<u8> = features.iter().flat_map(|value| value.to_le_bytes()).collect();
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    write_file(&path, &bytes)?;
    Ok(features)
}

fn cache_path(base: &Base, texts: &[String], layer: usize) -> PathBuf {
    let mut hash = Sha256::new();
    hash.update(&base.source.identity.fingerprint);
    hash.update(format!(" {layer} {MOST_TOKENS} {:?}\n", base.decoder.dtype()));
    for text in texts {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
    }
    let name: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Hub::from_environment().cache.join("features").join(format!("{name}.f32"))
}

/// Features kept earlier; none if there are none or they are not whole.
fn read_cache(path: &std::path::Path, values: usize) -> Option<Vec<f32>> {
    let bytes = fs::read(path).ok()?;
    let (numbers, rest) = bytes.as_chunks::<4>();
    if numbers.len() != values || !rest.is_empty() {
        return None;
    }
    Some(numbers.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
}

/// Mean input of every site per cluster, `[clusters, in]`, over some of the `examples`; `cluster_of`
/// says which cluster an example belongs to, if any.
///
/// # Errors
/// If the model fails.
pub(crate) fn mean_inputs(
    decoder: &Decoder,
    sites: &[Site],
    examples: &Examples,
    clusters: usize,
    cluster_of: &dyn Fn(u32, u32) -> Option<u32>,
) -> anyhow::Result<BTreeMap<Site, Vec<f64>>> {
    let mut known: Vec<(usize, u32)> = Vec::new();
    for index in 0..examples.len() {
        let (source, row) = examples.place(index)?;
        known.extend(cluster_of(source, row).map(|cluster| (index, cluster)));
    }
    let every = known.len().div_ceil(ROUTER_SEQUENCES).max(1);
    let read = |(index, cluster)| Ok((examples.get(index)?, cluster));
    let chosen: Vec<(Example, u32)> =
        known.into_iter().step_by(every).map(read).collect::<anyhow::Result<_>>()?;
    let slices: Vec<&[u32]> = chosen.iter().map(|(example, _)| example.tokens.as_slice()).collect();
    let mut counts = vec![0.0_f64; clusters];
    for (example, cluster) in &chosen {
        counts[*cluster as usize] += example.tokens.len() as f64;
    }
    let mut watch = Watch {
        sites: sites.to_vec(),
        groups: clusters,
        of_token: Vec::new(),
        sums: Mutex::default(),
    };
    let group = |_: usize, index: usize| chosen[index].1;
    run(decoder, &slices, &mut watch, &group, &mut |_, _, _| Ok(()))?;
    let mut sums = watch.sums.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    for sums in sums.values_mut() {
        let width = sums.len() / clusters;
        for (sums, count) in sums.chunks_exact_mut(width).zip(&counts) {
            sums.iter_mut().for_each(|sum| *sum /= count.max(1.0));
        }
    }
    Ok(sums)
}
