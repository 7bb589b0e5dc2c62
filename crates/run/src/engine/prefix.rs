//! Beginnings that are known already.
//!
//! Keys and values are kept by blocks of neighbouring tokens. A block's name is a hash of the adapter's
//! content, of all tokens up to its end and of nothing else: what two adapters of one name computed is never
//! mixed up, and what one adapter computed under two names is shared. What may be used again:
//!
//! - keys and values, those of learned positions before the first token with the first block;
//! - those of windowed layers as long as they were held when a block was full;
//! - of a decoder with layers that keep a state, only whole sequences ([`Cache::block`] gives nothing of
//!   it), since a state is that of the last token: those that were finished, and those that had read
//!   what another request begins with;
//! - nothing where rotations depend on how long a sequence is, since the same tokens then have other keys.

use super::pass::{FEWEST, PART};
use super::request::ServedAdapter;
use hydralora_model::{Cache, CacheBlock};
use sha2::{Digest, Sha256};
use std::collections::HashMap;

/// Tokens of a block: as many as prompts are read by, so that what is left is read by the same parts.
pub(super) const BLOCK: usize = PART;

/// Names a block.
type Name = [u8; 32];

/// The blocks that are kept, those in use lately.
#[derive(Default)]
pub(super) struct Prefixes {
    blocks: HashMap<Name, Kept>,
    /// Sequences of a decoder with layers that keep a state.
    wholes: Vec<Whole>,
    bytes: usize,
    /// Counts uses.
    clock: u64,
}

struct Whole {
    adapter: Option<[u8; 32]>,
    cache: Cache,
    used: u64,
}

struct Kept {
    block: CacheBlock,
    /// When it was used last. Those before it in a sequence were used no earlier.
    used: u64,
    /// Which block of its sequence it is.
    place: usize,
}

/// The blocks of one sequence, as far as they were kept.
#[derive(Clone, Default)]
pub(super) struct Chain {
    names: Vec<Name>,
    /// Whether a block could not be taken, so that none behind it is.
    broken: bool,
}

impl Chain {
    /// Names the block of `tokens` behind those of the chain.
    fn next(&self, adapter: Option<&ServedAdapter<'_>>, tokens: &[u32]) -> Name {
        let mut hash = Sha256::new();
        match (self.names.last(), adapter) {
            (Some(name), _) => hash.update(name),
            (None, Some(adapter)) => {
                hash.update([1]);
                hash.update(adapter.hash());
            }
            (None, None) => hash.update([0]),
        }
        tokens.iter().for_each(|token| hash.update(token.to_le_bytes()));
        hash.finalize().into()
    }

    /// Whether the blocks behind are kept too as they fill.
    pub(super) fn goes_on(&self) -> bool {
        !self.broken
    }

    /// Tokens of its blocks.
    pub(super) fn len(&self) -> usize {
        self.names.len() * BLOCK
    }
}

impl Prefixes {
    /// Bytes of all blocks.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The known blocks that `tokens` begin with, which count as used. So much is left to read that the
    /// same kernels read it as would read all of it.
    pub(super) fn find(&mut self, adapter: Option<&ServedAdapter<'_>>, tokens: &[u32]) -> Chain {
        self.clock += 1;
        let mut chain = Chain::default();
        let most = tokens.len().saturating_sub(FEWEST);
        for tokens in tokens[..most].chunks_exact(BLOCK) {
            let name = chain.next(adapter, tokens);
            let Some(kept) = self.blocks.get_mut(&name) else { break };
            kept.used = self.clock;
            chain.names.push(name);
        }
        chain
    }

    /// Puts the blocks of `chain` that are still kept into `cache`, an empty one, and leaves these in it;
    /// `tokens` are those of its sequence.
    pub(super) fn fill(&self, chain: &mut Chain, tokens: &[u32], cache: &mut Cache) {
        for (at, name) in chain.names.iter().enumerate() {
            let Some(kept) = self.blocks.get(name) else {
                chain.names.truncate(at);
                return;
            };
            cache.append(&kept.block, &tokens[at * BLOCK..(at + 1) * BLOCK]);
        }
    }

    /// Keeps the full blocks of `cache` behind those of `chain`, as long as `room` bytes are enough for
    /// all that is kept.
    pub(super) fn keep(
        &mut self,
        chain: &mut Chain,
        adapter: Option<&ServedAdapter<'_>>,
        of_sequence: &[u32],
        cache: &Cache,
        room: usize,
    ) {
        if chain.broken || chain.len() + BLOCK > cache.len() {
            return;
        }
        self.clock += 1;
        for name in &chain.names {
            match self.blocks.get_mut(name) {
                Some(kept) => kept.used = self.clock,
                None => chain.broken = true,
            }
        }
        while !chain.broken && chain.len() + BLOCK <= cache.len() {
            let tokens = chain.len()..chain.len() + BLOCK;
            let name = chain.next(adapter, &of_sequence[tokens.clone()]);
            if let Some(kept) = self.blocks.get_mut(&name) {
                kept.used = self.clock;
                chain.names.push(name);
                continue;
            }
            let block = cache.block(tokens).filter(|block| block.bytes() <= room);
            let Some(block) = block else {
                chain.broken = true;
                return;
            };
            self.shrink_to(room - block.bytes());
            // What had to go may be what it stands behind.
            if chain.names.last().is_some_and(|name| !self.blocks.contains_key(name)) {
                chain.broken = true;
                return;
            }
            self.bytes += block.bytes();
            let (used, place) = (self.clock, chain.names.len());
            self.blocks.insert(name, Kept { block, used, place });
            chain.names.push(name);
        }
    }

    /// The longest whole sequence that is known and that `tokens` begin with; as much is left to read, and
    /// it counts as used.
    pub(super) fn find_whole(
        &mut self,
        adapter: Option<&ServedAdapter<'_>>,
        tokens: &[u32],
    ) -> Option<Cache> {
        self.clock += 1;
        let hash = adapter.map(ServedAdapter::hash);
        let fits = |whole: &&mut Whole| {
            let held = whole.cache.tokens();
            let fits = held.len() + FEWEST <= tokens.len() && tokens.starts_with(held);
            fits && whole.adapter.as_ref() == hash
        };
        let longest = self.wholes.iter_mut().filter(fits).max_by_key(|whole| whole.cache.len())?;
        longest.used = self.clock;
        Some(longest.cache.clone())
    }

    /// Keeps a whole sequence, if `room` bytes are enough for all that is kept.
    pub(super) fn keep_whole(
        &mut self,
        adapter: Option<&ServedAdapter<'_>>,
        cache: Cache,
        room: usize,
    ) {
        self.clock += 1;
        let (bytes, adapter) = (cache.bytes(), adapter.map(|adapter| *adapter.hash()));
        let same =
            |whole: &&mut Whole| whole.adapter == adapter && whole.cache.tokens() == cache.tokens();
        if let Some(known) = self.wholes.iter_mut().find(same) {
            known.used = self.clock;
        } else if bytes <= room && !cache.is_empty() {
            self.shrink_to(room - bytes);
            self.bytes += bytes;
            self.wholes.push(Whole { adapter, cache, used: self.clock });
        }
    }

    /// Lets go of what was used longest ago, the last blocks of a sequence first, until no more than
    /// `bytes` are left.
    pub(super) fn shrink_to(&mut self, bytes: usize) {
        while self.bytes > bytes {
            let order = |(_, kept): &(&Name, &Kept)| (kept.used, std::cmp::Reverse(kept.place));
            let oldest = self.wholes.iter().enumerate().min_by_key(|(_, whole)| whole.used);
            if let Some((at, _)) = oldest {
                self.bytes -= self.wholes.swap_remove(at).cache.bytes();
                continue;
            }
            let Some((&name, _)) = self.blocks.iter().min_by_key(order) else { return };
            if let Some(kept) = self.blocks.remove(&name) {
                self.bytes -= kept.block.bytes();
            }
        }
    }
}
