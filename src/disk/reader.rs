//! Reading anywhere in a disk that nobody writes to.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use imago::FormatAccess;

use super::chain::open_sealed;
use super::clusters::read_cluster;
use super::fenced::Fenced;
use super::{Error, Format};

/// A disk of a snapshot, with everything below it.
pub struct Reader {
    disk: Arc<FormatAccess<Fenced>>,
    path: PathBuf,
}

impl Reader {
    /// Opens the disk at `top`, none of whose files may lie outside of `root`.
    pub fn open(top: &Path, format: Format, root: &Path) -> Result<Reader, Error> {
        Ok(Reader { disk: open_sealed(top, format, root)?, path: top.into() })
    }

    /// The disk's size as the guest sees it, in bytes.
    pub fn size(&self) -> u64 {
        self.disk.size()
    }

    /// Fills `into` with what is at `offset`; beyond the end of the disk there are zeros.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        read_cluster(&self.disk, offset, into, &self.path)
    }
}
