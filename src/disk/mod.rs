//! Disks: raw and qcow2 files behind one trait.
//!
//! [`open`] opens a chain of files: one that may be written on top, and below it whatever it was made over,
//! read-only. What a chain may look like is decided here ([`header`], [`chain`]); reading and writing is
//! imago's; that what a guest flushed survives a power cut is [`fence`]'s, together with the way in which
//! [`layout`] makes new files.
//!
//! A machine that runs gets a new top for a snapshot of what it wrote so far ([`swap`]); [`layers`] tells which
//! files have become its own in this way, and [`flatten`] makes one of many.
//!
//! A [`medium`] is a disk of another kind: raw, in the host's memory, and in no snapshot.

mod chain;
mod clusters;
mod compare;
mod fence;
mod fenced;
mod flatten;
mod fold;
mod freed;
mod header;
mod image;
mod layers;
mod layout;
mod medium;
mod reader;
mod swap;
#[cfg(test)]
mod tests;
mod wiping;

use std::io;
use std::path::{Path, PathBuf};

use vm_memory::VolatileSlice;
use vm_memory::bitmap::{AtomicBitmap, BS};

pub use chain::{Access, MAX_LAYERS, chain_files, depth, open};
pub use compare::{Changes, compare};
pub use flatten::{Flattened, Reach, flatten};
pub use fold::{fold, read_data};
pub use header::Header;
pub use layers::{OwnLayers, own_layers, tidy};
pub use layout::{CLUSTER, create_from_raw, create_overlay};
pub use medium::{Gone, Mark, Medium};
pub use reader::Reader;
pub use swap::{Prepared, prepare};
pub use wiping::Wiping;

use crate::sys::files;

/// A piece of guest memory that a transfer reads from or writes to; writing marks its pages dirty.
pub type Buffer<'a> = VolatileSlice<'a, BS<'a, AtomicBitmap>>;

/// A disk as a block device sees it. Offsets and lengths are in bytes.
///
/// Every transfer is whole: a short read or write is an error. Requests that reach beyond `len()` are
/// refused with `InvalidInput` and touch nothing.
pub trait Disk: Send {
    /// The disk's size as the guest sees it, a multiple of 512.
    fn len(&self) -> u64;

    /// Whether the disk has no bytes at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads from `offset` on into the buffers, in their order.
    fn read(&mut self, into: &[Buffer<'_>], offset: u64) -> io::Result<()>;

    /// Writes the buffers, in their order, from `offset` on.
    fn write(&mut self, from: &[Buffer<'_>], offset: u64) -> io::Result<()>;

    /// Makes everything written so far durable: returns after `fdatasync` of every file that changed.
    fn flush(&mut self) -> io::Result<()>;

    /// The guest no longer needs these bytes; they read as zeros or as before, and space may be freed.
    fn discard(&mut self, offset: u64, length: u64) -> io::Result<()>;

    /// These bytes read as zeros from now on; with `unmap`, space may be freed.
    fn write_zeroes(&mut self, offset: u64, length: u64, unmap: bool) -> io::Result<()>;

    /// Puts a new, empty top over everything that was written so far. Takes no time and touches no file: what was
    /// written and not flushed is as volatile as before. When it is refused, nothing has changed.
    fn swap(&mut self, prepared: &mut Prepared) -> Result<(), Error> {
        Err(Error::refused(prepared.layer(), "only qcow2 disks have layers"))
    }

    /// Makes the layers that a swap left behind durable and immutable, at the cost of one flush. After a failure
    /// they are not; reads and writes go on, and it can be tried again.
    fn seal(&mut self) -> Result<(), Error> {
        Ok(())
    }

    /// Reads through the one flattened layer from now on and no longer through those that it was made of, also
    /// the next time that the disk is opened. Costs one write and a flush of it.
    fn adopt(&mut self, flattened: &mut Flattened) -> Result<(), Error> {
        Err(Error::refused(flattened.layer(), "only qcow2 disks have layers"))
    }
}

/// How a disk's bytes lie in its file. Always told, never guessed: a guest that owns a raw disk can make it
/// look like a qcow2 that is backed by any file of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// As they are.
    Raw,
    /// QEMU's copy-on-write format, version 3.
    Qcow2,
}

impl Format {
    /// The name that QEMU's tools use too.
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        }
    }

    /// The format of that name.
    pub fn from_name(name: &str) -> Option<Format> {
        [Format::Raw, Format::Qcow2].into_iter().find(|format| format.name() == name)
    }
}

/// Why a disk cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be used.
    #[error(transparent)]
    File(#[from] files::Error),
    /// Someone else has it open.
    #[error("{0} is in use by another machine or program")]
    InUse(PathBuf),
    /// A tmpfs is too small.
    #[error("{path} cannot be made: its tmpfs has {room} bytes left, and {wanted} are wanted")]
    NoRoom {
        /// The file.
        path: PathBuf,
        /// Bytes that are wanted.
        wanted: u64,
        /// Bytes that are left.
        room: u64,
    },
    /// One more file would make the chain too long.
    #[error("{0} has too many layers: more than {MAX_LAYERS} files would back each other")]
    TooManyLayers(PathBuf),
    /// The file is not what it should be, or uses what we do not take.
    #[error("{path} cannot be used as a disk: {why}")]
    Refused {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

impl Error {
    fn refused(path: &Path, why: impl Into<String>) -> Error {
        Error::Refused { path: path.into(), why: why.into() }
    }
}
