//! `memory.index`: what of guest memory is in the file `memory` beside it, and where.
//!
//! All numbers are little endian.
//!
//! ```text
//!  0  magic "CATNAPMI"
//!  8  version (u32): 1          12  page size (u32): 4096
//! 16  number of regions (u32)   20  zero (u32)
//! 24  number of runs (u64)
//! 32  regions: start, length (u64 each), guest-physical
//!  …  runs: address, length, offset (u64 each)
//! ```
//!
//! Everything is page-aligned. Runs are sorted, do not overlap, and each lies inside one region. An offset of
//! all ones is a run of zeros; other runs lie in `memory` one behind the other, in the order of the index, and
//! `memory` holds nothing else. So each byte of the file has exactly one address, and its length is known.
//!
//! A *full* index covers its regions; a *difference* only what changed since the snapshot before.

mod resolve;

use std::path::Path;

use super::Error;
use crate::sys::files;

pub use resolve::{MAX_CHAIN, Piece, Source, resolve};

/// The name of the file with the contents of memory.
pub const DATA: &str = "memory";
/// The name of the index.
pub const INDEX: &str = "memory.index";
/// The unit of everything, in bytes.
pub const PAGE: u64 = 4096;
/// The length of what comes before the regions.
pub const HEADER: u64 = 32;

const MAGIC: [u8; 8] = *b"CATNAPMI";
const VERSION: u32 = 1;
const ZEROS: u64 = u64::MAX;
const REGION_LENGTH: u64 = 16;
const RUN_LENGTH: u64 = 24;
const MAX_REGIONS: usize = 64;
/// The most memory, all regions together: as much as a machine can have.
const MAX_MEMORY: u64 = 1 << 44;
/// The longest index that is read, in bytes. In the worst case, every second page changed, that is 170 GiB.
pub const MAX_LENGTH: u64 = 512 << 20;

/// The longest index that a full memory can have with so many bytes of data. Runs of data have a page at least; between
/// them, and where regions begin and end, zeros are one run.
pub fn longest_full(data: u64) -> u64 {
    let (pages, regions) = (data / PAGE, MAX_REGIONS as u64);
    let runs = pages.saturating_mul(2).saturating_add(2 * regions);
    runs.saturating_mul(RUN_LENGTH).saturating_add(HEADER + regions * REGION_LENGTH).min(MAX_LENGTH)
}

/// A range of guest-physical addresses that is RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// The first address.
    pub start: u64,
    /// In bytes.
    pub length: u64,
}

/// Consecutive pages of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first guest-physical address.
    pub address: u64,
    /// In bytes.
    pub length: u64,
    /// Where the bytes begin in `memory`; none when they are zeros.
    pub offset: Option<u64>,
}

/// An index that keeps all the rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Index {
    regions: Vec<Region>,
    runs: Vec<Run>,
}

/// The bytes before the regions, for one who writes an index piece by piece.
pub fn header(regions: u32, runs: u64) -> [u8; HEADER as usize] {
    let mut bytes = [0; HEADER as usize];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[12..16].copy_from_slice(&(PAGE as u32).to_le_bytes());
    bytes[16..20].copy_from_slice(&regions.to_le_bytes());
    bytes[24..].copy_from_slice(&runs.to_le_bytes());
    bytes
}

impl Region {
    /// As it stands in an index.
    pub fn to_bytes(self) -> [u8; REGION_LENGTH as usize] {
        let mut bytes = [0; REGION_LENGTH as usize];
        bytes[..8].copy_from_slice(&self.start.to_le_bytes());
        bytes[8..].copy_from_slice(&self.length.to_le_bytes());
        bytes
    }

    /// One past the last address. Of a region whose index was checked.
    fn end(self) -> u64 {
        self.start + self.length
    }
}

impl Run {
    /// As it stands in an index.
    pub fn to_bytes(self) -> [u8; RUN_LENGTH as usize] {
        let mut bytes = [0; RUN_LENGTH as usize];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.length.to_le_bytes());
        bytes[16..].copy_from_slice(&self.offset.unwrap_or(ZEROS).to_le_bytes());
        bytes
    }
}

impl Index {
    /// An index of these regions and runs, if they keep the rules.
    pub fn new(regions: Vec<Region>, runs: Vec<Run>) -> Result<Index, Error> {
        let index = Index { regions, runs };
        index.check().map_err(|why| Error::Unsound { path: INDEX.into(), why })?;
        Ok(index)
    }

    /// Reads and checks the index in a snapshot's folder.
    pub fn read(dir: &Path) -> Result<Index, Error> {
        let path = dir.join(INDEX);
        Index::parse(&files::read_bounded(&path, MAX_LENGTH)?, &path)
    }

    /// Checks the bytes of an index; `path` is for messages.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Index, Error> {
        parse(bytes).map_err(|why| Error::Unsound { path: path.into(), why })
    }

    /// The bytes of `memory.index`.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = header(self.regions.len() as u32, self.runs.len() as u64).to_vec();
        self.regions.iter().for_each(|region| bytes.extend(region.to_bytes()));
        self.runs.iter().for_each(|run| bytes.extend(run.to_bytes()));
        bytes
    }

    /// Where RAM is, sorted.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// What is known of it, sorted.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Whether every byte of the regions is known, so that no other snapshot is needed.
    pub fn is_full(&self) -> bool {
        // Runs do not overlap and stay in the regions, so that comparing the sums is enough.
        self.data_length() + self.zero_length() == self.regions.iter().map(|region| region.length).sum::<u64>()
    }

    /// The exact length of `memory`: the bytes in runs of data, with the zeros among them.
    pub fn data_length(&self) -> u64 {
        self.runs.iter().filter(|run| run.offset.is_some()).map(|run| run.length).sum()
    }

    /// The bytes in runs of zeros, which take no room in `memory`.
    pub fn zero_length(&self) -> u64 {
        self.runs.iter().filter(|run| run.offset.is_none()).map(|run| run.length).sum()
    }

    fn check(&self) -> Result<(), String> {
        check_regions(&self.regions)?;
        let mut regions = self.regions.iter().copied();
        let mut region = regions.next().ok_or("there is no region")?;
        let (mut free_from, mut in_file) = (0, 0);
        for run in &self.runs {
            check_range("run", run.address, run.length)?;
            if run.address < free_from {
                return Err(format!("the run at {:#x} overlaps the one before or is out of order", run.address));
            }
            free_from = run.address + run.length;
            while region.end() <= run.address {
                region = regions.next().ok_or_else(|| format!("the run at {:#x} is in no region", run.address))?;
            }
            if run.address < region.start || free_from > region.end() {
                return Err(format!("the run at {:#x} does not lie inside one region", run.address));
            }
            if let Some(offset) = run.offset {
                if offset != in_file {
                    return Err(format!("the run at {:#x} does not follow the one before in the file", run.address));
                }
                // No overflow: the runs are distinct parts of the regions, whose sum is bounded.
                in_file += run.length;
            }
        }
        Ok(())
    }
}

fn check_regions(regions: &[Region]) -> Result<(), String> {
    if regions.is_empty() || regions.len() > MAX_REGIONS {
        return Err(format!("it has {} regions, and must have 1 to {MAX_REGIONS}", regions.len()));
    }
    let (mut free_from, mut total) = (0, 0);
    for region in regions {
        check_range("region", region.start, region.length)?;
        if region.start < free_from {
            return Err(format!("the region at {:#x} overlaps the one before or is out of order", region.start));
        }
        free_from = region.end();
        // No overflow: the regions are distinct parts of the address space.
        total += region.length;
    }
    if total > MAX_MEMORY {
        return Err(format!("its regions have {total} bytes, more than {MAX_MEMORY}"));
    }
    Ok(())
}

/// Whole pages, at least one, that end before the address space does.
fn check_range(what: &str, start: u64, length: u64) -> Result<(), String> {
    let aligned = start.is_multiple_of(PAGE) && length.is_multiple_of(PAGE);
    if !aligned || length == 0 || start.checked_add(length).is_none() {
        return Err(format!("the {what} at {start:#x} with {length:#x} bytes is not a range of pages"));
    }
    Ok(())
}

fn parse(bytes: &[u8]) -> Result<Index, String> {
    let mut rest = bytes;
    if take(&mut rest)? != MAGIC {
        return Err("it is not an index of guest memory".into());
    }
    let version = take_u32(&mut rest)?;
    if version != VERSION {
        return Err(format!("it is of version {version}, and this catnap reads version {VERSION}"));
    }
    let (page, region_count, reserved) = (take_u32(&mut rest)?, take_u32(&mut rest)?, take_u32(&mut rest)?);
    if u64::from(page) != PAGE || reserved != 0 {
        return Err(format!("its pages have {page} bytes, or a reserved field is set"));
    }
    let run_count = take_u64(&mut rest)?;
    // The counts are believed only when they explain every byte: so nothing large is allocated for small files.
    let of_regions = u64::from(region_count) * REGION_LENGTH;
    let length = run_count.checked_mul(RUN_LENGTH).and_then(|of_runs| of_runs.checked_add(of_regions));
    if length != Some(rest.len() as u64) {
        return Err(format!("it has {} bytes, which is not what its counts say", bytes.len()));
    }
    let mut regions = Vec::with_capacity(region_count as usize);
    for _ in 0..region_count {
        regions.push(Region { start: take_u64(&mut rest)?, length: take_u64(&mut rest)? });
    }
    let mut runs = Vec::with_capacity(run_count as usize);
    for _ in 0..run_count {
        let (address, length, offset) = (take_u64(&mut rest)?, take_u64(&mut rest)?, take_u64(&mut rest)?);
        runs.push(Run { address, length, offset: (offset != ZEROS).then_some(offset) });
    }
    let index = Index { regions, runs };
    index.check()?;
    Ok(index)
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], String> {
    let (taken, left) = rest.split_first_chunk().ok_or("it is cut off")?;
    *rest = left;
    Ok(*taken)
}

fn take_u32(rest: &mut &[u8]) -> Result<u32, String> {
    take(rest).map(u32::from_le_bytes)
}

fn take_u64(rest: &mut &[u8]) -> Result<u64, String> {
    take(rest).map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const REGIONS: [Region; 2] = [Region { start: 0, length: 16 * PAGE }, Region { start: 1 << 32, length: 8 * PAGE }];

    fn run(address: u64, pages: u64, offset: Option<u64>) -> Run {
        Run { address, length: pages * PAGE, offset: offset.map(|page| page * PAGE) }
    }

    fn full() -> Index {
        let runs = vec![run(0, 4, Some(0)), run(4 * PAGE, 12, None), run(1 << 32, 8, Some(4))];
        Index::new(REGIONS.to_vec(), runs).unwrap()
    }

    fn parse(bytes: &[u8]) -> Result<Index, String> {
        Index::parse(bytes, Path::new(INDEX)).map_err(|error| error.to_string())
    }

    #[test]
    fn an_index_survives_and_knows_its_sizes() {
        let index = full();
        assert_eq!(parse(&index.to_bytes()), Ok(index.clone()));
        assert!(index.is_full());
        assert_eq!((index.data_length(), index.zero_length()), (12 * PAGE, 12 * PAGE));
        let difference = Index::new(REGIONS.to_vec(), vec![run(2 * PAGE, 1, Some(0))]).unwrap();
        assert_eq!(parse(&difference.to_bytes()), Ok(difference.clone()));
        assert!(!difference.is_full());
        assert_eq!(Index::new(REGIONS.to_vec(), Vec::new()).unwrap().data_length(), 0);
    }

    #[test]
    fn the_bytes_are_those_of_the_description() {
        let bytes = full().to_bytes();
        assert_eq!(bytes.len(), 32 + 2 * 16 + 3 * 24);
        assert_eq!(&bytes[..20], b"CATNAPMI\x01\0\0\0\0\x10\0\0\x02\0\0\0");
        assert_eq!(&bytes[20..32], [0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(&bytes[48..56], [0, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(&bytes[64 + 24 + 16..64 + 48], [0xff; 8]);
    }

    #[test]
    fn what_breaks_a_rule_is_refused() {
        let far = u64::MAX - PAGE + 1;
        let bad: [&[Run]; 10] = [
            &[run(1, 1, None)],
            &[run(0, 0, None)],
            &[run(PAGE, 1, None), run(0, 1, None)],
            &[run(0, 2, None), run(PAGE, 1, None)],
            &[run(15 * PAGE, 2, None)],
            &[run(16 * PAGE, 1, None)],
            &[run(2 << 32, 1, None)],
            &[run(far, 1, None)],
            &[run(0, 1, Some(1))],
            &[run(0, 1, Some(0)), run(PAGE, 1, Some(0))],
        ];
        for runs in bad {
            assert!(Index::new(REGIONS.to_vec(), runs.to_vec()).is_err(), "{runs:?}");
        }
        let pages = |start, length| Region { start, length };
        let bad: [&[Region]; 7] = [
            &[],
            &[pages(0, 0)],
            &[pages(0, 1)],
            &[pages(far, PAGE)],
            &[pages(PAGE, PAGE), pages(0, PAGE)],
            &[pages(0, 2 * PAGE), pages(PAGE, PAGE)],
            &[pages(0, MAX_MEMORY + PAGE)],
        ];
        for regions in bad {
            assert!(Index::new(regions.to_vec(), Vec::new()).is_err(), "{regions:?}");
        }
    }

    #[test]
    fn counts_that_the_bytes_do_not_bear_out_are_not_believed() {
        for (regions, runs) in [(0, 0), (2, 2), (2, u64::MAX), (u32::MAX, 3), (2, u64::MAX / 24 + 4), (5, 1)] {
            let mut bytes = full().to_bytes();
            bytes[..32].copy_from_slice(&header(regions, runs));
            assert!(parse(&bytes).is_err(), "{regions} {runs}");
        }
        for length in 0..full().to_bytes().len() {
            assert!(parse(&full().to_bytes()[..length]).is_err(), "{length}");
        }
    }

    /// SplitMix64: small, and the same in every run.
    pub(super) fn random(state: &mut u64) -> u64 {
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    #[test]
    fn mangled_bytes_never_panic_and_what_is_accepted_keeps_the_rules() {
        let mut seed = 1;
        let mut accepted = 0;
        for _ in 0..20_000 {
            let mut bytes = full().to_bytes();
            for _ in 0..=random(&mut seed) % 3 {
                let at = random(&mut seed) as usize % bytes.len().max(1);
                match random(&mut seed) % 8 {
                    0 => bytes.truncate(at),
                    1 => bytes.extend_from_slice(&random(&mut seed).to_le_bytes()[..at % 9]),
                    // Whole pages, so that alignment alone does not refuse everything.
                    2..=4 if at + 8 <= bytes.len() => {
                        let at = at & !7;
                        let pages = (random(&mut seed) % 20) << 12;
                        bytes[at..at + 8].copy_from_slice(&pages.to_le_bytes());
                    }
                    _ if at < bytes.len() => bytes[at] ^= 1 << (random(&mut seed) % 8),
                    _ => {}
                }
            }
            let Ok(index) = parse(&bytes) else { continue };
            accepted += 1;
            assert_eq!(index.check(), Ok(()));
            assert_eq!(index.to_bytes(), bytes);
            if let Ok(pieces) = resolve(&[&full(), &index]) {
                let covered: u64 = pieces.iter().map(|piece| piece.length).sum();
                assert_eq!(covered, 24 * PAGE);
            }
        }
        assert!(accepted > 100, "only {accepted} were accepted");
    }
}
