//! Where snapshots, names and machines are kept.
//!
//! ```text
//! data/snapshots/DIGEST/{snapshot.json, …}   never changed once it is there
//! data/verified/DIGEST                       stamps of the files when their digests were last checked
//! data/arrived/DIGEST                        that the snapshot came from elsewhere
//! data/names/NAME                            the digest that a name stands for
//! data/keys/NAME.public, NAME.secret         keys that sign, and keys that are known
//! data/machines/NAME/{machine.json, root.qcow2, root-N.qcow2 …, lock, run.json}
//! data/arriving/DIGEST/…                     what is being pulled, piece by piece
//! data/staging/…                             what is being made; swept when its maker is gone
//! ```
//!
//! Whatever appears in the first four appears by a rename, whole and synced.

mod aside;
mod chains;
mod family;
mod keys;
mod links;
mod machines;
mod merge;
mod names;
mod removal;
mod run;
mod snapshots;
mod staging;
#[cfg(test)]
pub mod testing;
mod transient;
mod usage;
mod verify;

use std::path::{Path, PathBuf};

pub use aside::Aside;
pub use family::{Dependent, Family};
pub use keys::Key;
pub use machines::Machine;
pub use merge::Each;
pub use removal::Alone;
pub use run::{Condition, RunLock};
pub use snapshots::{Listed, Snapshot};
pub use staging::{Reserved, Staging};
pub use usage::{Sizes, Usage};
pub use verify::Seen;

use crate::snapshot::{self, Digest};
use crate::spec::Name;
use crate::sys::files::{self, At, private_dir};
use crate::sys::home::Home;
use crate::sys::space;

/// Why the store cannot do what it is asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be used.
    #[error(transparent)]
    File(#[from] files::Error),
    /// A manifest is not sound.
    #[error(transparent)]
    Manifest(#[from] snapshot::Error),
    /// A disk could not be made.
    #[error(transparent)]
    Disk(#[from] crate::disk::Error),
    /// Nothing that could be a name or a digest.
    #[error("`{0}` names no snapshot: write a name, name@tag, or sha256: and some digits")]
    Reference(String),
    /// No such snapshot.
    #[error("there is no snapshot {0}")]
    NoSnapshot(String),
    /// Several snapshots have digests that begin like this.
    #[error("several snapshots begin with {0}: write more digits")]
    Ambiguous(String),
    /// What is being made needs a snapshot that is not there.
    #[error("the snapshot {0}, which it builds on, is not there any more")]
    Gone(Digest),
    /// Something depends on the snapshot.
    #[error("{of} is needed: {}", clauses(of, by))]
    Needed {
        /// A name of the snapshot, or the beginning of its digest.
        of: String,
        /// What depends on it.
        by: Vec<Dependent>,
        /// All that would have to go before it does: these, what depends on them, and so on.
        above: Vec<Dependent>,
    },
    /// A file of a snapshot is not what its manifest says.
    #[error("{path} is damaged: {why}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The name stands for a snapshot already.
    #[error("there is a snapshot {0} already")]
    SnapshotTaken(String),
    /// Somebody else is fetching it.
    #[error("another catnap is fetching {0}")]
    Arriving(Digest),
    /// No such key.
    #[error("there is no key {0}")]
    NoKey(Name),
    /// The name is taken.
    #[error("there is a key {0} already")]
    KeyTaken(Name),
    /// Only its owner can sign with it.
    #[error("the key {0} is somebody else's: nobody can sign with it here")]
    NotOwnKey(Name),
    /// No such machine.
    #[error("there is no machine {0}")]
    NoMachine(Name),
    /// The name is taken.
    #[error("a machine {0} is there already")]
    MachineTaken(Name),
    /// A machine's file cannot be read.
    #[error("{path} is not a machine's: {why}")]
    BadMachine {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A disk cannot become smaller than the snapshot's.
    #[error("a disk of {wanted} bytes is smaller than the snapshot's, which has {least}")]
    DiskTooSmall {
        /// The size that was asked for, in bytes.
        wanted: u64,
        /// The snapshot's, in bytes.
        least: u64,
    },
    /// The machine's monitor lives.
    #[error("the machine {0} is running")]
    Running(Name),
    /// The filesystem is too full.
    #[error("{needed} bytes are needed in {path}, and {free} are free")]
    NoRoom {
        /// Where.
        path: PathBuf,
        /// In bytes.
        needed: u64,
        /// In bytes.
        free: u64,
    },
}

/// The longest list of dependents in a message.
const MAX_CLAUSES: usize = 5;

fn clauses(of: &str, by: &[Dependent]) -> String {
    let mut clauses: Vec<_> = by.iter().take(MAX_CLAUSES).map(|dependent| dependent.clause(of)).collect();
    if by.len() > MAX_CLAUSES {
        clauses.push(format!("and {} more need it", by.len() - MAX_CLAUSES));
    }
    clauses.join("; ")
}

/// All that is kept.
#[derive(Clone, Debug)]
pub struct Store {
    home: Home,
}

impl Store {
    /// Opens the store, making its folders when they are missing.
    pub fn open(home: &Home) -> Result<Store, Error> {
        let store = Store { home: home.clone() };
        for folder in ["snapshots", "verified", "arrived", "names", "keys", "machines", "arriving", "staging"] {
            private_dir(&store.folder(folder))?;
        }
        Ok(store)
    }

    /// The folders in which everything is kept.
    pub fn home(&self) -> &Home {
        &self.home
    }

    /// The folder that no disk's backing file may leave.
    pub fn root(&self) -> &Path {
        &self.home.data
    }

    /// Refuses to begin what needs more room than there is.
    pub fn check_room(&self, needed: u64) -> Result<(), Error> {
        let path = self.root();
        match space::free(path).at("look at", path)? {
            free if free < needed => Err(Error::NoRoom { path: path.into(), needed, free }),
            _ => Ok(()),
        }
    }

    fn folder(&self, name: &str) -> PathBuf {
        self.home.data.join(name)
    }
}
