use std::ops::Range;

use serde::{Deserialize, Serialize};

/// Which blocks of the region are plugged: a bit each, the first block being bit 0 of the first word.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Blocks(Vec<u64>);

const BITS: usize = u64::BITS as usize;

impl Blocks {
    /// `count` blocks, none of them plugged.
    pub fn unplugged(count: usize) -> Blocks {
        Blocks(vec![0; count.div_ceil(BITS)])
    }

    /// Whether these are the bits of `count` blocks, and no others are set. For bits from a file.
    pub fn fits(&self, count: usize) -> bool {
        let Blocks(words) = self;
        let spare = words.len() * BITS - count.min(words.len() * BITS);
        words.len() == count.div_ceil(BITS) && words.last().is_none_or(|last| last.leading_zeros() as usize >= spare)
    }

    /// How many are plugged.
    pub fn plugged(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// How many there are up to the last that is plugged.
    pub fn reach(&self) -> usize {
        let last = self.0.iter().enumerate().rev().find(|(_, word)| **word != 0);
        last.map_or(0, |(n, word)| (n + 1) * BITS - word.leading_zeros() as usize)
    }

    /// How many of `range`, which must lie within, are plugged.
    pub fn plugged_in(&self, range: Range<usize>) -> usize {
        range.filter(|&block| self.0[block / BITS] & 1 << (block % BITS) != 0).count()
    }

    /// Plugs or unplugs all of `range`, which must lie within.
    pub fn set(&mut self, range: Range<usize>, plugged: bool) {
        for block in range {
            let bit = 1 << (block % BITS);
            match plugged {
                true => self.0[block / BITS] |= bit,
                false => self.0[block / BITS] &= !bit,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_counted_and_found_across_words() {
        let mut blocks = Blocks::unplugged(130);
        assert!(blocks.fits(130));
        blocks.set(60..70, true);
        blocks.set(129..130, true);
        blocks.set(63..65, false);
        assert_eq!((blocks.plugged(), blocks.reach()), (9, 130));
        assert_eq!(Blocks::unplugged(130).reach(), 0);
        assert_eq!(blocks.plugged_in(62..66), 2);
        assert_eq!([60..63, 65..70, 129..130].map(|range| blocks.plugged_in(range)), [3, 5, 1]);
    }

    #[test]
    fn bits_of_another_region_do_not_fit() {
        assert!(Blocks::default().fits(0));
        assert!(!Blocks::default().fits(1));
        assert!(Blocks(vec![u64::MAX]).fits(64));
        assert!(!Blocks(vec![u64::MAX]).fits(63));
        assert!(Blocks(vec![u64::MAX, 1]).fits(65));
        assert!(!Blocks(vec![u64::MAX, 2]).fits(65));
        assert!(!Blocks(vec![0, 0]).fits(64));
        assert!(!Blocks(vec![0]).fits(0));
        assert!(!Blocks(vec![0]).fits(usize::MAX));
    }
}
