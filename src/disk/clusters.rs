//! Sets of clusters: which parts of a disk some of its layers have data for.

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use imago::{FormatAccess, ShallowMapping};

use super::chain::open_sealed_alone;
use super::fenced::Fenced;
use super::header::{Header, MAX_SIZE};
use super::layout::{CLUSTER, l2_tables};
use super::{Error, Format};
use crate::sys::files::At;

/// A set of clusters of [`CLUSTER`] bytes, a bit for each: at most 32 MiB for the largest disk.
pub(super) struct Clusters(Vec<u64>);

impl Clusters {
    /// The empty set, for a disk of `size` bytes.
    pub(super) fn of(size: u64) -> Clusters {
        Clusters(vec![0; size.min(MAX_SIZE).div_ceil(CLUSTER).div_ceil(64) as usize])
    }

    /// Adds every cluster that has a byte of `start..end`; what lies beyond the disk is left out.
    pub(super) fn add(&mut self, start: u64, end: u64) {
        let last = end.div_ceil(CLUSTER).min(self.0.len() as u64 * 64);
        for cluster in start / CLUSTER..last {
            self.0[cluster as usize / 64] |= 1 << (cluster % 64);
        }
    }

    /// How many there are.
    pub(super) fn count(&self) -> u64 {
        self.0.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Where they lie, in ascending order of their offsets.
    pub(super) fn offsets(&self) -> impl Iterator<Item = u64> + '_ {
        let words = self.0.iter().enumerate().filter(|(_, word)| **word != 0);
        words
            .flat_map(|(at, word)| (0..64).filter(move |bit| word >> bit & 1 == 1).map(move |bit| at as u64 * 64 + bit))
            .map(|cluster| cluster * CLUSTER)
    }

    /// Adds what the file at `path` itself holds, data or zeros, whatever it lies over. Gives its size. Refuses
    /// tables that lead to nowhere: a damaged layer must not be copied as if it were whole.
    pub(super) fn add_layer(&mut self, path: &Path, format: Format) -> Result<u64, Error> {
        let layer = open_sealed_alone(path, format)?;
        let data = data_of(path, format)?;
        let (mut at, size) = (0, layer.size());
        while at < size {
            let (mapping, length) = layer
                .get_shallow_mapping(at, size - at)
                .map_err(|error| Error::refused(path, format!("a table of it is damaged: {error}")))?;
            if length == 0 {
                break;
            }
            match mapping {
                ShallowMapping::Zero { explicit: false, .. } | ShallowMapping::Eof { .. } => {}
                ShallowMapping::Zero { .. } => self.add(at, at.saturating_add(length)),
                ShallowMapping::Raw { offset, .. } if data.contains(&offset) => {
                    self.add(at, at.saturating_add(length));
                }
                _ => return Err(Error::refused(path, format!("a table of it is damaged, for what is at {at}"))),
            }
            at = at.saturating_add(length);
        }
        Ok(size)
    }
}

/// Where in its file a layer can have data: not where our files have their tables.
fn data_of(path: &Path, format: Format) -> Result<Range<u64>, Error> {
    let file = File::open(path).at("open", path)?;
    let end = file.metadata().at("open", path)?.len();
    let tables = match format {
        Format::Raw => None,
        Format::Qcow2 => l2_tables(&file, &Header::of(&file, path)?).at("read", path)?,
    };
    Ok(tables.map_or(0, |tables| tables.end)..end)
}

/// Reads a cluster, or as much as `into` has, at `offset`; what lies beyond the end of the disk is zeros.
pub(super) fn read_cluster(
    disk: &FormatAccess<Fenced>,
    offset: u64,
    into: &mut [u8],
    path: &Path,
) -> Result<(), Error> {
    Ok(disk.read(into, offset).at("read", path)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_has_what_was_added_and_nothing_beyond_the_disk() {
        let mut set = Clusters::of(200 * CLUSTER);
        set.add(CLUSTER - 1, CLUSTER + 1);
        set.add(5 * CLUSTER, 5 * CLUSTER);
        set.add(199 * CLUSTER, u64::MAX);
        let offsets: Vec<_> = set.offsets().filter(|offset| *offset < 200 * CLUSTER).map(|at| at / CLUSTER).collect();
        assert_eq!(offsets, [0, 1, 199]);
        assert_eq!(Clusters::of(u64::MAX).0.len(), 4 << 20);
    }
}
