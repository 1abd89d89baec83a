//! Guest memory: where RAM lies in the guest's physical address space, and the mapping behind it.

pub mod layout;
mod ram;

use std::io;

use vm_memory::{GuestAddress, GuestRegionCollection};

pub use ram::Ram;

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
