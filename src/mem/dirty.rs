//! Which pages changed since somebody last asked.
//!
//! Pages change in two ways that do not know of each other: vCPUs write, which KVM logs, and devices write,
//! which sets bits in the regions' bitmaps. Only both together are everything that changed.

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::{Error, GuestMemory, PAGE, Ram};

/// A range of guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// The first address.
    pub start: u64,
    /// In bytes.
    pub length: u64,
}

/// The pages of a guest that changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dirty {
    /// In the order of the guest's regions.
    regions: Vec<Pages>,
}

/// One bit for each page of a region, the lowest of the first word for the first page; none behind its end.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Pages {
    start: u64,
    words: Vec<u64>,
}

impl Dirty {
    /// Takes what changed: the bits that devices set, which are clear from now on, and KVM's `logs`, one for
    /// each region in the same order, as KVM_GET_DIRTY_LOG gives them. Neither vCPUs nor devices may run.
    ///
    /// When it fails, no device's bit is lost; the logs can be given again.
    pub fn take(mem: &GuestMemory, logs: &[Vec<u64>]) -> Result<Dirty, Error> {
        for (n, region) in mem.iter().enumerate() {
            let words = region.len().div_ceil(PAGE).div_ceil(64);
            if logs.get(n).is_none_or(|log| (log.len() as u64) < words) {
                return Err(Error::Log { start: region.start_addr().0 });
            }
        }
        let regions = mem.iter().zip(logs).map(|(region, log)| {
            let mut words = region.dirty().get_and_reset();
            // A log may be longer than its region, and its last word may say something of pages behind the end.
            words.iter_mut().zip(log).for_each(|(word, logged)| *word |= logged);
            let in_last = region.len().div_ceil(PAGE) % 64;
            if let Some(last) = words.last_mut().filter(|_| in_last != 0) {
                *last &= (1 << in_last) - 1;
            }
            Pages { start: region.start_addr().0, words }
        });
        Ok(Dirty { regions: regions.collect() })
    }

    /// Moves what KVM noted of one region, as KVM_GET_DIRTY_LOG gave it, into the bits that devices set. Nothing is
    /// lost by looking at a log then: what is there is taken the next time. vCPUs and devices may run.
    pub fn absorb(region: &Ram, log: Vec<u64>) {
        // A log may be longer than its region.
        let words = region.len().div_ceil(PAGE).div_ceil(64) as usize;
        let pages = Pages { start: 0, words: log.into_iter().take(words).collect() };
        pages.each_range(|range| region.bitmap().mark_dirty(range.start as usize, range.length as usize));
    }

    /// Forgets what devices changed: for whoever is about to write all of memory.
    pub fn forget(mem: &GuestMemory) {
        mem.iter().for_each(|region| drop(region.dirty().get_and_reset()));
    }

    /// Puts everything back into the bits of the same guest's regions, so that it is taken again the next time.
    /// For a snapshot that failed.
    pub fn put_back(&self, mem: &GuestMemory) {
        for (region, pages) in mem.iter().zip(&self.regions) {
            pages.each_range(|range| {
                region.bitmap().mark_dirty((range.start - pages.start) as usize, range.length as usize)
            });
        }
    }

    /// The changed pages as ranges that are as long as can be, sorted, each inside one region.
    pub fn ranges(&self) -> Vec<Range> {
        let mut ranges = Vec::new();
        self.regions.iter().for_each(|pages| pages.each_range(|range| ranges.push(range)));
        ranges
    }

    /// How many pages changed.
    pub fn count(&self) -> u64 {
        self.regions.iter().flat_map(|pages| &pages.words).map(|word| u64::from(word.count_ones())).sum()
    }
}

impl Pages {
    fn each_range(&self, mut give: impl FnMut(Range)) {
        let mut open: Option<Range> = None;
        for (n, &word) in self.words.iter().enumerate() {
            let mut rest = word;
            let mut bit = 0;
            while rest != 0 {
                bit += rest.trailing_zeros();
                rest >>= rest.trailing_zeros();
                let ones = rest.trailing_ones();
                let start = self.start + (n as u64 * 64 + u64::from(bit)) * PAGE;
                let length = u64::from(ones) * PAGE;
                match &mut open {
                    Some(range) if range.start + range.length == start => range.length += length,
                    other => other.replace(Range { start, length }).into_iter().for_each(&mut give),
                }
                bit += ones;
                rest = rest.checked_shr(ones).unwrap_or(0);
            }
        }
        open.into_iter().for_each(give);
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::mem::from_ranges;

    const HIGH: u64 = 1 << 32;

    /// 200 pages, and 64 pages above the hole.
    fn memory() -> GuestMemory {
        from_ranges(&[(GuestAddress(0), 200 * PAGE), (GuestAddress(HIGH), 64 * PAGE)]).unwrap()
    }

    fn clean() -> Vec<Vec<u64>> {
        vec![vec![0; 4], vec![0; 1]]
    }

    fn pages(start: u64, count: u64) -> Range {
        Range { start, length: count * PAGE }
    }

    #[test]
    fn what_vcpus_and_devices_wrote_is_one_set_and_taken_once() {
        let mem = memory();
        mem.write_slice(&[1; 3], GuestAddress(5 * PAGE - 1)).unwrap();
        mem.write_slice(&[1], GuestAddress(HIGH + 63 * PAGE)).unwrap();
        let mut logs = clean();
        logs[0][0] = 1 << 6 | 1 << 63;
        logs[0][1] = u64::MAX;
        logs[0][2] = 1;
        logs[1][0] = 1;
        let dirty = Dirty::take(&mem, &logs).unwrap();
        let expected = [pages(4 * PAGE, 3), pages(63 * PAGE, 66), pages(HIGH, 1), pages(HIGH + 63 * PAGE, 1)];
        assert_eq!(dirty.ranges(), expected);
        assert_eq!(dirty.count(), 71);
        assert_eq!(Dirty::take(&mem, &clean()).unwrap().count(), 0);

        dirty.put_back(&mem);
        mem.write_slice(&[1], GuestAddress(0)).unwrap();
        let again = Dirty::take(&mem, &clean()).unwrap();
        assert_eq!((again.count(), &again.ranges()[1..]), (72, &expected[..]));
    }

    #[test]
    fn a_log_that_was_looked_at_is_taken_the_next_time() {
        let mem = memory();
        mem.write_slice(&[1], GuestAddress(2 * PAGE)).unwrap();
        let logs = [vec![1 << 63, 1, 0, u64::MAX, u64::MAX], vec![u64::MAX << 62]];
        mem.iter().zip(&logs).for_each(|(region, log)| Dirty::absorb(region, log.clone()));
        mem.iter().zip(&logs).for_each(|(region, log)| Dirty::absorb(region, log.clone()));
        let dirty = Dirty::take(&mem, &clean()).unwrap();
        let expected = [pages(2 * PAGE, 1), pages(63 * PAGE, 2), pages(192 * PAGE, 8), pages(HIGH + 62 * PAGE, 2)];
        assert_eq!(dirty.ranges(), expected);
        assert_eq!(Dirty::take(&mem, &clean()).unwrap().count(), 0);
    }

    #[test]
    fn a_logs_tail_behind_the_region_is_nothing() {
        let logs = vec![vec![u64::MAX; 9], vec![u64::MAX; 2]];
        let dirty = Dirty::take(&memory(), &logs).unwrap();
        assert_eq!(dirty.ranges(), [pages(0, 200), pages(HIGH, 64)]);
        assert_eq!(dirty.count(), 264);
    }

    #[test]
    fn a_missing_or_short_log_is_an_error_and_loses_nothing() {
        let mem = memory();
        mem.write_slice(&[1], GuestAddress(0)).unwrap();
        for logs in [vec![], vec![vec![0; 4]], vec![vec![0; 3], vec![0; 1]], vec![vec![0; 4], vec![]]] {
            assert!(matches!(Dirty::take(&mem, &logs), Err(Error::Log { .. })), "{logs:?}");
        }
        assert_eq!(Dirty::take(&mem, &clean()).unwrap().ranges(), [pages(0, 1)]);
    }

    #[test]
    fn ranges_are_those_of_the_bits() {
        let mut seed = 5u64;
        for _ in 0..500 {
            let mut words = || {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                [0, u64::MAX, seed, seed & (seed << 7), seed | (seed >> 9)][(seed >> 33) as usize % 5]
            };
            let set = Pages { start: PAGE, words: (0..6).map(|_| words()).collect() };
            let mut bits = vec![false; 6 * 64];
            let mut end = 0;
            set.each_range(|range| {
                assert!(range.length > 0 && (range.start > end || end == 0), "sorted, with gaps between");
                end = range.start + range.length;
                bits[(range.start / PAGE - 1) as usize..(end / PAGE - 1) as usize].fill(true);
            });
            let expected: Vec<bool> = (0..6 * 64).map(|bit| set.words[bit / 64] >> (bit % 64) & 1 == 1).collect();
            assert_eq!(bits, expected);
        }
    }
}
