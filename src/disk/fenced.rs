//! The file under a disk as imago sees it, with fences around what it writes.

use std::fmt;
use std::fs;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use imago::{Storage, file::File};

use super::fence::Fence;

/// A file as imago reads and writes it, with fences around the writes to its L2 tables.
#[derive(Debug)]
pub(super) struct Fenced {
    file: File,
    fence: Arc<Fence>,
}

impl Fenced {
    /// Wraps an open file whose L2 tables lie in `tables` (nowhere, for one that is only read or is raw).
    pub(super) fn new(file: fs::File, tables: Range<u64>) -> io::Result<Fenced> {
        let fence = Arc::new(Fence::new(file.try_clone()?, tables)?);
        Ok(Fenced { file: file.try_into()?, fence })
    }

    /// The fences of this file.
    pub(super) fn fence(&self) -> Arc<Fence> {
        Arc::clone(&self.fence)
    }
}

impl fmt::Display for Fenced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.file.fmt(f)
    }
}

// The methods marked unsafe ask the caller to keep to the alignments below, which are the inner file's own,
// and to keep overlapping requests apart, which does not become harder by passing them on.
impl Storage for Fenced {
    fn mem_align(&self) -> usize {
        self.file.mem_align()
    }

    fn req_align(&self) -> usize {
        self.file.req_align()
    }

    fn zero_align(&self) -> usize {
        self.file.zero_align()
    }

    fn discard_align(&self) -> usize {
        self.file.discard_align()
    }

    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }

    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        // SAFETY: the caller's promises are the ones that the inner file asks for.
        unsafe { self.file.pure_readv(bufv, offset) }
    }

    unsafe fn pure_writev(&self, bufv: IoVector<'_>, offset: u64) -> io::Result<()> {
        self.fence.before_write(offset, bufv.len())?;
        #[cfg(test)]
        self.fence.record(super::tests::Event::write(&bufv, offset));
        // SAFETY: as above.
        unsafe { self.file.pure_writev(bufv, offset) }
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.fence.before_write(offset, length)?;
        #[cfg(test)]
        self.fence.record(super::tests::Event::zeroes(offset, length));
        // SAFETY: as above.
        unsafe { self.file.pure_write_zeroes(offset, length) }
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.fence.before_write(offset, length)?;
        #[cfg(test)]
        self.fence.record(super::tests::Event::zeroes(offset, length));
        // SAFETY: as above.
        unsafe { self.file.pure_write_allocated_zeroes(offset, length) }
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.fence.before_write(offset, length)?;
        #[cfg(test)]
        self.fence.record(super::tests::Event::zeroes(offset, length));
        // SAFETY: as above.
        unsafe { self.file.pure_discard(offset, length) }
    }

    fn flush(&self) -> io::Result<()> {
        self.file.flush()
    }

    fn sync(&self) -> io::Result<()> {
        self.fence.sync()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        // SAFETY: as above.
        unsafe { self.file.invalidate_cache() }
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        self.file.get_storage_helper()
    }

    fn resize(&self, new_size: u64, mode: PreallocateMode) -> io::Result<()> {
        self.file.resize(new_size, mode)
    }
}
