//! Guest memory: where RAM lies in the guest's physical address space, and the mapping behind it.

mod dirty;
pub mod layout;
mod ram;
mod restore;

use std::io;

use vm_memory::{GuestAddress, GuestRegionCollection};

pub use dirty::{Dirty, Range};
pub use ram::Ram;
pub use restore::{Piece, Source, restore};

/// The unit in which memory is mapped, known to be dirty, and saved, in bytes.
pub const PAGE: u64 = 4096;

/// All of a guest's RAM, mapped privately into the monitor.
///
/// Cloning it clones a reference: every device holds one. Each write that goes through it sets a bit in
/// the region's bitmap, so pages that devices changed are known just as well as the pages that vCPUs
/// changed (which KVM's own dirty log has).
pub type GuestMemory = GuestRegionCollection<Ram>;

/// RAM could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host gave no address space.
    #[error("{size} bytes of guest memory cannot be mapped: {source}")]
    Map {
        /// How much was asked for.
        size: u64,
        /// What mmap said.
        source: io::Error,
    },
    /// The regions overlap or are out of order.
    #[error("guest memory regions do not fit together: {0}")]
    Regions(#[from] vm_memory::GuestRegionCollectionError),
    /// Saved memory is not a description of all of RAM.
    #[error("saved memory does not fit: {0}")]
    Pieces(String),
    /// A file with saved memory is shorter than what it should hold.
    #[error("file {file} of saved memory has {length} bytes, and {needed} are needed")]
    TooShort {
        /// Its place among the files.
        file: usize,
        /// How long it is, in bytes.
        length: u64,
        /// How long it must be at least.
        needed: u64,
    },
    /// A file with saved memory cannot be read or mapped.
    #[error("file {file} of saved memory cannot be used: {source}")]
    File {
        /// Its place among the files.
        file: usize,
        /// What the call said.
        source: io::Error,
    },
    /// A log of changed pages is missing, or does not cover its region.
    #[error("the log of changed pages for the memory at {start:#x} is missing or too short")]
    Log {
        /// Where the region begins.
        start: u64,
    },
}

/// Maps fresh RAM of `size` bytes where a cold boot wants it: see [`layout::ram`].
pub fn allocate(size: u64) -> Result<GuestMemory, Error> {
    from_ranges(&layout::ram(size))
}

/// Maps fresh RAM at the given guest addresses, with lengths in bytes.
pub fn from_ranges(ranges: &[(GuestAddress, u64)]) -> Result<GuestMemory, Error> {
    let regions = ranges
        .iter()
        .map(|&(start, size)| Ram::anonymous(start, size).map_err(|source| Error::Map { size, source }))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(GuestMemory::from_regions(regions)?)
}
