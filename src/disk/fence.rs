//! The order in which a disk is written, which a power cut must not break.
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
//!
//! A layer that was sealed is never written again. Nothing above would try to; should it all the same, the write
//! is an error here and not a change of a snapshot.

use std::fs;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Mutex;

use super::freed::Freed;
use crate::sys::lock;

/// What a disk writes as a whole or not at all, in bytes.
const SECTOR: usize = 512;
/// The first of a file, in which the header lies.
pub(super) type Sector = [u8; SECTOR];

/// What was written since the last fence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unsynced {
    Nothing,
    Tables,
    Others,
    /// A fence failed: what is on the disk is not known any more.
    Lost,
    /// Everything is on the disk and stays as it is.
    Sealed,
}

/// The fences of a file, for whoever owns the disk.
#[derive(Debug)]
pub(super) struct Fence {
    /// The same open file, to sync it: imago's type offers only the slower fsync.
    file: fs::File,
    identity: Identity,
    /// Where the L2 tables lie.
    tables: Range<u64>,
    unsynced: Mutex<Unsynced>,
    freed: Freed,
    #[cfg(test)]
    tape: Option<super::tests::Tape>,
}

/// Which file it is, whatever its names: device and inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity(u64, u64);

impl Identity {
    pub(super) fn of(metadata: &fs::Metadata) -> Identity {
        Identity(metadata.dev(), metadata.ino())
    }
}

impl Fence {
    /// The fences of an open file whose L2 tables lie in `tables`.
    pub(super) fn new(file: fs::File, tables: Range<u64>) -> io::Result<Fence> {
        Ok(Fence {
            identity: Identity::of(&file.metadata()?),
            #[cfg(test)]
            tape: super::tests::Recorder::tape(&file),
            file,
            tables,
            unsynced: Mutex::new(Unsynced::Nothing),
            freed: Freed::default(),
        })
    }

    /// Which file it is.
    pub(super) fn identity(&self) -> Identity {
        self.identity
    }

    /// The clusters of this file that wait to be given back.
    pub(super) fn freed(&self) -> &Freed {
        &self.freed
    }

    /// Makes all that was written durable, and refuses every write from now on. The lock on the file, which says
    /// that someone writes to it, goes.
    pub(super) fn seal(&self) -> io::Result<()> {
        let mut unsynced = self.unsynced.lock().map_err(|_| poisoned())?;
        self.fence(&mut unsynced)?;
        *unsynced = Unsynced::Sealed;
        lock::unlock(&self.file)
    }

    /// Reads the file's first sector, lets `change` change it, and makes that durable.
    pub(super) fn change_header(&self, change: impl FnOnce(&mut Sector) -> io::Result<()>) -> io::Result<()> {
        let mut sector = [0; SECTOR];
        self.file.read_exact_at(&mut sector, 0)?;
        change(&mut sector)?;
        self.before_write(0, SECTOR as u64)?;
        #[cfg(test)]
        self.record(super::tests::Event::Write(0, sector.into()));
        self.file.write_all_at(&sector, 0)?;
        self.fence(&mut *self.unsynced.lock().map_err(|_| poisoned())?)
    }

    /// Makes all that was written durable, and gives back what is free.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.fence(&mut *self.unsynced.lock().map_err(|_| poisoned())?)?;
        self.freed.give_back(&self.file, |_range| {
            #[cfg(test)]
            self.record(super::tests::Event::zeroes(_range.start, _range.end - _range.start));
        });
        Ok(())
    }

    /// Puts a fence where one is needed before a write.
    pub(super) fn before_write(&self, offset: u64, length: u64) -> io::Result<()> {
        let kind = if self.tables.contains(&offset) { Unsynced::Tables } else { Unsynced::Others };
        let mut unsynced = self.unsynced.lock().map_err(|_| poisoned())?;
        if *unsynced == Unsynced::Sealed {
            return Err(io::Error::new(io::ErrorKind::ReadOnlyFilesystem, "the layer is sealed"));
        }
        if *unsynced != Unsynced::Nothing && *unsynced != kind {
            self.fence(&mut unsynced)?;
        }
        *unsynced = kind;
        self.freed.used(offset..offset.saturating_add(length));
        Ok(())
    }

    fn fence(&self, unsynced: &mut Unsynced) -> io::Result<()> {
        match *unsynced {
            Unsynced::Nothing | Unsynced::Sealed => return Ok(()),
            Unsynced::Lost => return Err(io::Error::other("an earlier write was lost")),
            Unsynced::Tables | Unsynced::Others => {}
        }
        *unsynced = Unsynced::Lost;
        self.file.sync_data()?;
        #[cfg(test)]
        self.record(super::tests::Event::Fence);
        *unsynced = Unsynced::Nothing;
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn record(&self, event: super::tests::Event) {
        if let Some(tape) = &self.tape {
            tape.record(event);
        }
    }
}

fn poisoned() -> io::Error {
    io::Error::other("a thread died while it wrote to this disk")
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
        let disk = Fence { file: OwnedFd::from(writer).into(), ..Fence::new(file, 0..0).unwrap() };
        disk.sync().unwrap(); // Nothing was written, so there is nothing to sync.
        disk.before_write(0, 512).unwrap();
        assert_eq!(disk.sync().unwrap_err().kind(), io::ErrorKind::InvalidInput);
        let disk = Fence { file: fs::File::open(dir.path().join("d")).unwrap(), ..disk };
        assert!(disk.sync().unwrap_err().to_string().contains("an earlier write was lost"));
        assert!(disk.before_write(0, 512).is_err());
        assert!(disk.seal().is_err());
    }

    #[test]
    fn what_is_sealed_is_not_written_again() {
        let disk = Fence::new(tempfile::tempfile().unwrap(), 0..0).unwrap();
        disk.before_write(0, 512).unwrap();
        disk.seal().unwrap();
        assert_eq!(disk.before_write(0, 512).unwrap_err().kind(), io::ErrorKind::ReadOnlyFilesystem);
        assert!(disk.change_header(|_| Ok(())).is_err());
        disk.sync().unwrap();
    }
}
