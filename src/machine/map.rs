//! A picture of a guest's memory: how much of it is what, in a number of cells. It is for people to look at, and takes
//! nothing away from the next snapshot: what is read of KVM's log goes into the bits that devices set.
//!
//! What a page is to the host, `/proc/self/pagemap` tells without touching it (Linux's
//! `Documentation/admin-guide/mm/pagemap.rst`). The guest runs on meanwhile, so that pages of one picture are not of one
//! instant.

use std::fs::File;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::{Error, Machine, lock};
use crate::mem::{Dirty, PAGE, Ram};

/// Entries of the page map that are read at once.
const ENTRIES: usize = 4096;
/// In an entry: the page is there; it is swapped out; it is a file's; nobody else has it mapped.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_FILE: u64 = 1 << 61;
const EXCLUSIVE: u64 = 1 << 56;

/// The picture.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryMap {
    /// The size of a page in bytes.
    pub page: u64,
    /// How many pages a cell stands for; the last may have fewer.
    pub cell_pages: u64,
    /// Whether there is a snapshot to compare with. If not, all that the guest has touched counts as changed.
    pub since_snapshot: bool,
    /// The cells, in the order of guest addresses. RAM that is not plugged in is left out.
    pub cells: Vec<Cell>,
}

/// How many pages of a cell are what. Each is counted once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "[u32; 5]", into = "[u32; 5]")]
pub struct Cell {
    /// Never touched, or given back: the host has given nothing, and they read as zeros.
    pub zero: u32,
    /// Not touched since the machine woke: still only in the snapshot's files, if they are not zeros.
    pub asleep: u32,
    /// As in the snapshot, and in the host's memory once for all who have them: a file's that clones share, or those
    /// that a snapshot which is being written holds still.
    pub shared: u32,
    /// The machine's own, and as they were in its last snapshot.
    pub clean: u32,
    /// Changed since then: what the next snapshot of memory has to write.
    pub changed: u32,
}

impl From<[u32; 5]> for Cell {
    fn from([zero, asleep, shared, clean, changed]: [u32; 5]) -> Cell {
        Cell { zero, asleep, shared, clean, changed }
    }
}

impl From<Cell> for [u32; 5] {
    fn from(cell: Cell) -> [u32; 5] {
        [cell.zero, cell.asleep, cell.shared, cell.clean, cell.changed]
    }
}

impl Cell {
    /// Counts a page by its entry, by whether it changed, and by whether its region is all anonymous. Without a
    /// snapshot to compare with, whatever is there has changed.
    fn count(&mut self, entry: u64, changed: Option<bool>, anonymous: bool) {
        let kind = if entry & (PRESENT | SWAPPED) == 0 {
            // What was given back has changed, and is not read from the snapshot again.
            if anonymous || changed == Some(true) { &mut self.zero } else { &mut self.asleep }
        } else if changed != Some(false) {
            &mut self.changed
        } else if entry & OF_FILE != 0 || entry & (PRESENT | EXCLUSIVE) == PRESENT {
            &mut self.shared
        } else {
            &mut self.clean
        };
        *kind += 1;
    }
}

impl Machine {
    /// A picture of memory in at most `cells` cells.
    pub fn memory_map(&self, cells: u32) -> Result<MemoryMap, Error> {
        let since_snapshot = self.absorb_log()?;
        let parts: Vec<(&Ram, u64)> = self.mem.iter().map(|region| (region, self.pages_of(region))).collect();
        let pages: u64 = parts.iter().map(|(_, pages)| pages).sum();
        let cell_pages = pages.div_ceil(u64::from(cells.max(1))).max(1);
        let mut map = MemoryMap { page: PAGE, cell_pages, since_snapshot, cells: Vec::new() };
        let pagemap = File::open("/proc/self/pagemap").map_err(Error::Host)?;
        let mut counted = 0;
        for (region, pages) in parts {
            each_entry(&pagemap, region, pages, |page, entry| {
                if counted % cell_pages == 0 {
                    map.cells.push(Cell::default());
                }
                counted += 1;
                let changed = since_snapshot.then(|| region.bitmap().dirty_at((page * PAGE) as usize));
                if let Some(cell) = map.cells.last_mut() {
                    cell.count(entry, changed, region.is_anonymous());
                }
            })
            .map_err(Error::Host)?;
        }
        Ok(map)
    }

    /// Moves KVM's log into the bits; says whether they tell what changed since a snapshot.
    fn absorb_log(&self) -> Result<bool, Error> {
        let log = lock(&self.log);
        if !log.on {
            return Ok(false);
        }
        for (slot, region) in self.mem.iter().enumerate() {
            // One after the other: what is read of one is safe before another can fail.
            Dirty::absorb(region, self.vm.take_dirty_log(slot, region)?);
        }
        // While a snapshot is taken, pages are compared with that one.
        Ok(self.tracking.try_lock().map_or(true, |tracking| tracking.base.is_some()))
    }

    /// How many pages of a region the guest can have.
    fn pages_of(&self, region: &Ram) -> u64 {
        let pluggable = self.shape.pluggable().is_some_and(|(start, _)| start == region.start_addr());
        let length = match self.devices.memory.as_ref().filter(|_| pluggable) {
            Some(device) => lock(device).device().reach(),
            None => region.len(),
        };
        length.min(region.len()) / PAGE
    }
}

/// Gives the number and the page map's entry of each of a region's first pages.
fn each_entry(pagemap: &File, region: &Ram, pages: u64, mut give: impl FnMut(u64, u64)) -> std::io::Result<()> {
    let first = region.mapping().as_ptr() as u64 / PAGE;
    let mut bytes = vec![0; ENTRIES * size_of::<u64>()];
    for begin in (0..pages).step_by(ENTRIES) {
        let count = (pages - begin).min(ENTRIES as u64) as usize;
        let chunk = &mut bytes[..count * size_of::<u64>()];
        pagemap.read_exact_at(chunk, (first + begin) * size_of::<u64>() as u64)?;
        for (page, entry) in (begin..).zip(chunk.chunks_exact(size_of::<u64>())) {
            give(page, u64::from_ne_bytes(entry.try_into().unwrap_or_default()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::mem::from_ranges;

    #[test]
    fn each_page_is_counted_once_as_what_it_is() {
        let count = |entry, changed, anonymous| {
            let mut cell = Cell::default();
            cell.count(entry, changed, anonymous);
            <[u32; 5]>::from(cell)
        };
        assert_eq!(count(0, None, true), [1, 0, 0, 0, 0]);
        assert_eq!(count(0, Some(true), false), [1, 0, 0, 0, 0]);
        assert_eq!(count(0, Some(false), false), [0, 1, 0, 0, 0]);
        assert_eq!(count(PRESENT | OF_FILE | EXCLUSIVE, Some(false), false), [0, 0, 1, 0, 0]);
        assert_eq!(count(PRESENT, Some(false), true), [0, 0, 1, 0, 0]);
        assert_eq!(count(PRESENT | EXCLUSIVE, Some(false), true), [0, 0, 0, 1, 0]);
        assert_eq!(count(SWAPPED, Some(false), true), [0, 0, 0, 1, 0]);
        assert_eq!(count(PRESENT | EXCLUSIVE, Some(true), true), [0, 0, 0, 0, 1]);
        assert_eq!(count(PRESENT | EXCLUSIVE, None, true), [0, 0, 0, 0, 1]);
    }

    #[test]
    fn the_hosts_page_map_tells_which_pages_are_there() {
        let mem = from_ranges(&[(GuestAddress(0), 2 * ENTRIES as u64 * PAGE + PAGE)]).unwrap();
        let region = mem.iter().next().unwrap();
        region.mapping().avoid_huge_pages_in(0, region.mapping().size());
        let touched = [0, ENTRIES as u64 - 1, ENTRIES as u64, 2 * ENTRIES as u64];
        touched.iter().for_each(|page| mem.write_slice(&[7], GuestAddress(page * PAGE)).unwrap());
        let (pagemap, mut present, mut seen) = (File::open("/proc/self/pagemap").unwrap(), Vec::new(), 0);
        each_entry(&pagemap, region, region.len() / PAGE, |page, entry| {
            seen += 1;
            if entry & PRESENT != 0 {
                assert_eq!(entry & (OF_FILE | EXCLUSIVE), EXCLUSIVE);
                present.push(page);
            }
        })
        .unwrap();
        assert_eq!((present, seen), (touched.to_vec(), 2 * ENTRIES + 1));
    }
}
