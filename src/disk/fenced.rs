//! The file under a disk, which keeps the order that a power cut must not break.
//!
//! imago writes tables and data in an order in which a *killed* process leaves a sound file behind: the
//! kernel has every write up to the last. A power cut leaves any subset of what was written since the last
//! `fdatasync`, and then an L2 entry can be there whose refcount or whose data is not. So an L2 table, which
//! is what makes data appear and disappear, is written with a fence on both sides:
//!
//! ```text
//! data, refcounts …  | fdatasync |  L2 tables  | fdatasync |  data, refcounts …
//! ```
//!
//! The left fence: data and refcounts are on the disk before an entry leads to them, also the neighbours in
//! the same cluster that were copied from below. The right fence: an entry is gone from the disk before its
//! cluster is counted as free or given to someone else. Both are `fdatasync`; where nothing was written in
//! between, none is made, so a flush costs one or two.
//!
//! An `fdatasync` that fails may have lost writes for good, and the next one would succeed all the same. So
//! after a failure every later one fails too: the guest is never told that its data is safe when it is not.

use std::fmt;
use std::fs;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use imago::{Storage, file::File};

use super::freed::Freed;

/// What was written since the last fence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unsynced {
    Nothing,
    Tables,
    Others,
    /// A fence failed: what is on the disk is not known any more.
    Lost,
}

/// A file with fences around the writes to `tables`.
#[derive(Debug)]
pub(super) struct Fenced {
    file: File,
    /// The same open file, to sync it: imago's type offers only the slower fsync.
    same: fs::File,
    /// Where the L2 tables lie.
    tables: Range<u64>,
    unsynced: Mutex<Unsynced>,
    freed: Arc<Freed>,
    #[cfg(test)]
    pub(super) recorder: Option<super::tests::Recorder>,
}

impl Fenced {
    /// Wraps an open file whose L2 tables lie in `tables` (nowhere, for one that is only read or is raw).
    pub(super) fn new(file: fs::File, tables: Range<u64>) -> io::Result<Fenced> {
        Ok(Fenced {
            same: file.try_clone()?,
            file: file.try_into()?,
            tables,
            unsynced: Mutex::new(Unsynced::Nothing),
            freed: Arc::default(),
            #[cfg(test)]
            recorder: super::tests::Recorder::current(),
        })
    }

    /// The clusters of this file that wait to be given back.
    pub(super) fn freed(&self) -> Arc<Freed> {
        Arc::clone(&self.freed)
    }

    /// Puts a fence where one is needed before a write.
    fn before_write(&self, offset: u64, length: u64) -> io::Result<()> {
        let kind = if self.tables.contains(&offset) { Unsynced::Tables } else { Unsynced::Others };
        let mut unsynced = self.unsynced.lock().map_err(|_| poisoned())?;
        if *unsynced != Unsynced::Nothing && *unsynced != kind {
            self.fence(&mut unsynced)?;
        }
        *unsynced = kind;
        self.freed.used(offset..offset.saturating_add(length));
        Ok(())
    }

    fn fence(&self, unsynced: &mut Unsynced) -> io::Result<()> {
        match *unsynced {
            Unsynced::Nothing => return Ok(()),
            Unsynced::Lost => return Err(io::Error::other("an earlier write was lost")),
            Unsynced::Tables | Unsynced::Others => {}
        }
        *unsynced = Unsynced::Lost;
        self.same.sync_data()?;
        #[cfg(test)]
        self.record(super::tests::Event::Fence);
        *unsynced = Unsynced::Nothing;
        Ok(())
    }

    #[cfg(test)]
    fn record(&self, event: super::tests::Event) {
        if let Some(recorder) = &self.recorder {
            recorder.record(event);
        }
    }
}

fn poisoned() -> io::Error {
    io::Error::other("a thread died while it wrote to this disk")
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
        self.before_write(offset, bufv.len())?;
        #[cfg(test)]
        self.record(super::tests::Event::write(&bufv, offset));
        // SAFETY: as above.
        unsafe { self.file.pure_writev(bufv, offset) }
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.before_write(offset, length)?;
        #[cfg(test)]
        self.record(super::tests::Event::zeroes(offset, length));
        // SAFETY: as above.
        unsafe { self.file.pure_write_zeroes(offset, length) }
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.before_write(offset, length)?;
        #[cfg(test)]
        self.record(super::tests::Event::zeroes(offset, length));
        // SAFETY: as above.
        unsafe { self.file.pure_write_allocated_zeroes(offset, length) }
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.before_write(offset, length)?;
        #[cfg(test)]
        self.record(super::tests::Event::zeroes(offset, length));
        // SAFETY: as above.
        unsafe { self.file.pure_discard(offset, length) }
    }

    fn flush(&self) -> io::Result<()> {
        self.file.flush()
    }

    fn sync(&self) -> io::Result<()> {
        self.fence(&mut *self.unsynced.lock().map_err(|_| poisoned())?)?;
        self.freed.give_back(&self.same, |_range| {
            #[cfg(test)]
            self.record(super::tests::Event::zeroes(_range.start, _range.end - _range.start));
        });
        Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;

    #[test]
    fn after_a_failed_sync_no_later_one_pretends_that_all_is_well() {
        let dir = tempfile::tempdir().unwrap();
        let file = fs::File::options().read(true).write(true).create_new(true).open(dir.path().join("d")).unwrap();
        // A pipe cannot be synced, so it stands for a disk that fails.
        let (_reader, writer) = io::pipe().unwrap();
        let disk = Fenced { same: OwnedFd::from(writer).into(), ..Fenced::new(file, 0..0).unwrap() };
        disk.sync().unwrap(); // Nothing was written, so there is nothing to sync.
        disk.before_write(0, 512).unwrap();
        assert_eq!(disk.sync().unwrap_err().kind(), io::ErrorKind::InvalidInput);
        let disk = Fenced { same: fs::File::open(dir.path().join("d")).unwrap(), ..disk };
        assert!(disk.sync().unwrap_err().to_string().contains("an earlier write was lost"));
        assert!(disk.before_write(0, 512).is_err());
    }
}
