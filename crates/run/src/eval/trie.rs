//! Sequences by their common beginnings.
//!
//! Sorted sequences become a tree whose nodes are runs of tokens that all sequences below share.
//! Beginnings shorter than [`SMALLEST_SHARED`] tokens are not shared: computing them again costs
//! less than keeping another branch.

/// Tokens a run needs to be shared.
const SMALLEST_SHARED: usize = 16;

/// Length of the common beginning of two sequences.
pub(crate) fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// A run of tokens: those of sequence `of` at `start..end`.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) of: usize,
    pub(crate) start: usize,
    pub(crate) end: usize,
    pub(crate) parent: Option<usize>,
    pub(crate) children: Vec<usize>,
    /// Tokens in this node and all below it.
    pub(crate) weight: usize,
}

/// The tree over some sequences.
#[derive(Debug, Default)]
pub(crate) struct Trie {
    pub(crate) nodes: Vec<Node>,
    pub(crate) roots: Vec<usize>,
    /// The node in which each sequence ends.
    pub(crate) last: Vec<usize>,
}

impl Trie {
    /// The tree over `sequences`, each of more than `skip` tokens; the first `skip`, the same in
    /// all, are left out.
    pub(crate) fn new(sequences: &[&[u32]], skip: usize) -> Self {
        let mut order: Vec<usize> = (0..sequences.len()).collect();
        order.sort_by(|&a, &b| sequences[a].cmp(sequences[b]));
        let mut trie = Self { last: vec![0; sequences.len()], ..Self::default() };
        if !order.is_empty() {
            trie.add(sequences, &order, skip, None);
        }
        for index in (0..trie.nodes.len()).rev() {
            let weight = trie.nodes[index].weight;
            if let Some(parent) = trie.nodes[index].parent {
                trie.nodes[parent].weight += weight;
            }
        }
        trie
    }

    fn push(&mut self, of: usize, start: usize, end: usize, parent: Option<usize>) -> usize {
        let index = self.nodes.len();
        let weight = end - start;
        self.nodes.push(Node { of, start, end, parent, children: Vec::new(), weight });
        match parent {
            Some(parent) => self.nodes[parent].children.push(index),
            None => self.roots.push(index),
        }
        index
    }

    /// Adds the sequences in `order`, which are sorted and agree up to `start` at least.
    fn add(&mut self, sequences: &[&[u32]], order: &[usize], start: usize, parent: Option<usize>) {
        let (first, last) = (order[0], order[order.len() - 1]);
        let shared = common(sequences[first], sequences[last]);
        let identical = sequences[last].len() == shared;
        let (mut from, mut below) = (start, parent);
        if identical || shared - start >= SMALLEST_SHARED {
            let node = self.push(first, start, shared, parent);
            (from, below) = (shared, Some(node));
        }
        // Sequences that end here come first.
        let ending = order.iter().take_while(|&&s| sequences[s].len() == shared).count();
        if ending > 0 {
            let node = match below.filter(|_| from == shared && from > start) {
                Some(node) => node,
                None => self.push(first, from, shared, below),
            };
            order[..ending].iter().for_each(|&s| self.last[s] = node);
        }
        let mut rest = &order[ending..];
        while let Some(&head) = rest.first() {
            let token = sequences[head][shared];
            let len = rest.iter().take_while(|&&s| sequences[s][shared] == token).count();
            self.add(sequences, &rest[..len], from, below);
            rest = &rest[len..];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn spelt(trie: &Trie, sequences: &[&[u32]], sequence: usize) -> Vec<u32> {
        let mut chain = Vec::new();
        let mut at = Some(trie.last[sequence]);
        while let Some(index) = at {
            chain.push(index);
            at = trie.nodes[index].parent;
        }
        let runs = chain.iter().rev().map(|&index| &trie.nodes[index]);
        runs.flat_map(|node| sequences[node.of][node.start..node.end].to_vec()).collect()
    }

    #[test]
    fn long_beginnings_are_shared_once() {
        let prefix: Vec<u32> = (0..40).collect();
        let with = |tail: &[u32]| [&prefix[..], tail].concat();
        let all = [with(&[7, 8]), with(&[7, 9]), with(&[]), with(&[5]), with(&[7, 8])];
        let all: Vec<&[u32]> = all.iter().map(Vec::as_slice).collect();
        let trie = Trie::new(&all, 0);
        assert_eq!(trie.roots.len(), 1);
        assert_eq!(trie.nodes[0].weight, 40 + 2 + 2 + 1);
        assert_eq!(trie.last[0], trie.last[4]);
        for (index, sequence) in all.iter().enumerate() {
            assert_eq!(spelt(&trie, &all, index), *sequence);
        }
    }

    proptest! {
        #[test]
        fn every_sequence_is_spelt_by_its_branch(
            tails in prop::collection::vec(prop::collection::vec(0_u32..3, 1..40), 1..20),
            shared in 0_usize..30,
        ) {
            let all: Vec<Vec<u32>> =
                tails.into_iter().map(|tail| [vec![1; shared], tail].concat()).collect();
            let all: Vec<&[u32]> = all.iter().map(Vec::as_slice).collect();
            for skip in [0, shared] {
                let trie = Trie::new(&all, skip);
                for (index, sequence) in all.iter().enumerate() {
                    prop_assert_eq!(spelt(&trie, &all, index), sequence[skip..].to_vec());
                }
            }
        }
    }
}
