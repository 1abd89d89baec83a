//! Snapshots as one file, to be handed on: what travels in it, how it is written and read, and which secrets are
//! inside. Or in pieces, in a [`registry`].
//!
//! ```text
//! frame  frame  frame …        each: a skippable zstd frame of 12 bytes that tells the length of the frame behind
//!                              it, and that frame, with a checksum, for 4 MiB of the content; the last for less
//! [signature]  before the first frame, see signed.rs
//! snapshot.json  kernel  initrd  root.qcow2  …        the content: a tar archive
//! ```
//!
//! So `zstd -dc FILE | tar x` takes it apart as well, while we work at many frames at once. There is only one right
//! archive of a snapshot: the manifest comes first, and it tells which entries follow, in which order, and every bit
//! of their heads. A reader need not decide what a strange entry may mean: it refuses it.

mod export;
mod frames;
mod import;
pub mod registry;
pub mod secrets;
mod signed;
#[cfg(test)]
mod tests;

use std::io;

pub use export::Outgoing;
pub use import::{Arrived, Naming, import};
pub use signed::Trust;

use crate::oci;
use crate::snapshot::{self, KeyError, Manifest, PublicKey};
use crate::store;
use crate::sys::files;
use crate::sys::process;

/// What the names of archives end in.
pub const SUFFIX: &str = ".catnap";

/// The unit of a tar archive, in bytes (POSIX.1-2017, pax, "ustar Interchange Format").
const BLOCK: usize = 512;
/// The most threads that compress or decompress; each has up to three frames in hand.
const MAX_THREADS: usize = 8;

/// Why an archive cannot be written or taken.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is not as it must be.
    #[error("the archive is refused: {0}")]
    Refused(String),
    /// It cannot be read.
    #[error("the archive cannot be read: {0}")]
    Read(io::Error),
    /// It cannot be written.
    #[error("the archive cannot be written: {0}")]
    Write(io::Error),
    /// A file could not be used.
    #[error(transparent)]
    File(#[from] files::Error),
    /// The store refused.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The name that it would get stands for another snapshot.
    #[error("there is another snapshot {0} already")]
    Taken(String),
    /// The name in it is none that a snapshot can have.
    #[error("the archive's snapshot is called `{}`, which cannot be a name here", .0.escape_debug())]
    BadName(String),
    /// The registry does not do what is wanted.
    #[error(transparent)]
    Registry(#[from] oci::Error),
    /// What is in a registry is not as it must be.
    #[error("{what} is refused: {why}")]
    Unfit {
        /// Where it is.
        what: String,
        /// What is wrong with it.
        why: String,
    },
    /// It would be more than a manifest in a registry can list.
    #[error("it would be more than {chunks} chunks of up to {of} bytes, and no registry takes that")]
    Large {
        /// As many can be.
        chunks: usize,
        /// The bytes of one, at most.
        of: u64,
    },
    /// It is signed, and not by that key or not for this snapshot.
    #[error("the snapshot is refused: {0}")]
    Signature(KeyError),
    /// Nobody who is known here stands for it.
    #[error("the snapshot is refused: {}", unknown(.0))]
    Unknown(Option<PublicKey>),
    /// The user wants it no more.
    #[error("interrupted")]
    Interrupted,
}

fn unknown(key: &Option<PublicKey>) -> String {
    match key {
        None => "it is not signed".into(),
        Some(key) => format!("it is signed by a key that is not known here, {key}"),
    }
}

impl Error {
    fn refused(why: impl Into<String>) -> Error {
        Error::Refused(why.into())
    }

    /// What went wrong while reading: our own words, an end that came too early, or the host's trouble.
    fn reading(error: io::Error) -> Error {
        match error.kind() {
            _ if error.get_ref().is_some_and(|inner| inner.is::<frames::Stopped>()) => Error::Interrupted,
            io::ErrorKind::InvalidData => Error::Refused(error.to_string()),
            io::ErrorKind::UnexpectedEof => Error::refused("it is cut off"),
            _ => Error::Read(error),
        }
    }
}

impl From<snapshot::Error> for Error {
    fn from(error: snapshot::Error) -> Error {
        match error {
            later @ snapshot::Error::Later { .. } => Error::Store(later.into()),
            other => Error::Refused(other.to_string()),
        }
    }
}

/// How far something is.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// What is being done.
    pub what: &'a str,
    /// Bytes of `total` that are done.
    pub done: u64,
    /// All bytes; none when nobody knows yet.
    pub total: Option<u64>,
}

/// Is told how it goes on.
pub type Watch<'a> = &'a mut dyn FnMut(Progress<'_>);

/// The head of a file's entry. All there is to know of it is in the manifest.
fn head(name: &str, size: u64, manifest: &Manifest) -> Result<tar::Header, Error> {
    let mut head = tar::Header::new_ustar();
    // The names in a manifest are short and plain.
    head.set_path(name).map_err(Error::Write)?;
    head.set_entry_type(tar::EntryType::Regular);
    head.set_mode(0o644);
    head.set_uid(0);
    head.set_gid(0);
    head.set_mtime(manifest.created);
    head.set_size(size);
    head.set_cksum();
    Ok(head)
}

/// The zeros that follow a file of this size, up to a whole block.
fn padding(size: u64) -> usize {
    (size.wrapping_neg() % BLOCK as u64) as usize
}

/// How many threads compress or decompress here.
fn threads() -> usize {
    process::cpus().min(MAX_THREADS)
}
