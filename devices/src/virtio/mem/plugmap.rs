//! Which blocks of the region are plugged. Pure arithmetic.

use std::ops::Range;

const BITS: usize = u64::BITS as usize;

/// What a range of blocks is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plugged {
    All,
    None,
    Mixed,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PlugMap {
    words: Vec<u64>,
    blocks: usize,
    plugged: usize,
}

impl PlugMap {
    /// A map of `blocks` blocks, none plugged.
    pub(super) fn new(blocks: usize) -> Self {
        Self {
            words: vec![0; blocks.div_ceil(BITS)],
            blocks,
            plugged: 0,
        }
    }

    /// The map of `blocks` blocks that gave these [`words`](Self::words). `None` if they are of
    /// another number of blocks.
    pub(super) fn from_words(blocks: usize, words: &[u64]) -> Option<Self> {
        let spare = words.len().checked_mul(BITS)?.checked_sub(blocks)?;
        let last = words.last().copied().unwrap_or(0);
        if spare >= BITS
            || (spare > 0 && last.leading_zeros() < u32::try_from(spare).expect("less than 64"))
        {
            return None;
        }
        let plugged = words.iter().map(|word| word.count_ones() as usize).sum();
        Some(Self {
            words: words.to_vec(),
            blocks,
            plugged,
        })
    }

    /// A bit for each block, the first in the lowest bit.
    pub(super) fn words(&self) -> &[u64] {
        &self.words
    }

    pub(super) fn blocks(&self) -> usize {
        self.blocks
    }

    /// How many blocks are plugged.
    pub(super) fn plugged(&self) -> usize {
        self.plugged
    }

    /// `range` must lie within the map, and is mixed with nothing if it is empty.
    pub(super) fn state(&self, range: Range<usize>) -> Plugged {
        let len = range.len();
        match range.filter(|&block| self.has(block)).count() {
            0 => Plugged::None,
            count if count == len => Plugged::All,
            _ => Plugged::Mixed,
        }
    }

    pub(super) fn set(&mut self, range: Range<usize>, plugged: bool) {
        for block in range {
            if self.has(block) != plugged {
                self.words[block / BITS] ^= 1 << (block % BITS);
                self.plugged = if plugged {
                    self.plugged + 1
                } else {
                    self.plugged - 1
                };
            }
        }
    }

    /// The longest runs of plugged blocks, in order.
    pub(super) fn runs(&self) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        for block in (0..self.blocks).filter(|&block| self.has(block)) {
            match runs.last_mut() {
                Some(run) if run.end == block => run.end += 1,
                _ => runs.push(block..block + 1),
            }
        }
        runs
    }

    fn has(&self, block: usize) -> bool {
        self.words[block / BITS] & 1 << (block % BITS) != 0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// The model is a list of booleans.
        #[test]
        fn the_map_is_a_list_of_booleans(
            blocks in 1..200usize,
            steps in prop::collection::vec((any::<usize>(), any::<usize>(), any::<bool>()), 0..40),
        ) {
            let mut map = PlugMap::new(blocks);
            let mut model = vec![false; blocks];
            for (a, b, plugged) in steps {
                let (a, b) = (a % blocks, b % (blocks + 1));
                let range = a.min(b)..a.max(b);
                map.set(range.clone(), plugged);
                model[range].fill(plugged);
                let count = model.iter().filter(|&&block| block).count();
                prop_assert_eq!(map.plugged(), count);
                let expected = match (count, count == blocks) {
                    (0, _) => Plugged::None,
                    (_, true) => Plugged::All,
                    _ => Plugged::Mixed,
                };
                prop_assert_eq!(map.state(0..blocks), expected);
                let listed: Vec<_> = map.runs().into_iter().flatten().collect();
                let expected: Vec<_> = (0..blocks).filter(|&block| model[block]).collect();
                prop_assert_eq!(listed, expected);
                prop_assert!(map.runs().windows(2).all(|two| two[0].end < two[1].start));
                prop_assert_eq!(PlugMap::from_words(blocks, map.words()), Some(map.clone()));
            }
        }
    }

    #[test]
    fn words_of_another_size_or_with_bits_past_the_end_are_refused() {
        assert!(PlugMap::from_words(70, &[0]).is_none());
        assert!(PlugMap::from_words(70, &[0, 0, 0]).is_none());
        assert!(PlugMap::from_words(70, &[0, 1 << 6]).is_none());
        assert!(PlugMap::from_words(70, &[0, 1 << 5]).is_some());
    }
}
