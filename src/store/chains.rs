//! What snapshots are to each other: which memory lies over which, and which file a disk lies over.

use super::{Error, Machine, Snapshot, Store};
use crate::snapshot::{Digest, MANIFEST, Role};
use crate::sys::files::{self, read_bounded, write_atomically};

/// The longest chain of memories, as in `snapshot::Index::resolve`.
const MAX_CHAIN: usize = 64;
/// In a machine's folder: the digest of its last snapshot.
const LAST: &str = "snapshot";
/// A digest, its newline, and room for a hand-edited file.
const MAX_LAST: u64 = 128;

impl Store {
    /// Refuses a name that stands for something, or cannot be one.
    pub fn check_free(&self, name: &str) -> Result<(), Error> {
        match self.lookup(name) {
            Ok(_) => Err(Error::SnapshotTaken(name.into())),
            Err(Error::NoSnapshot(_)) => Ok(()),
            Err(other) => Err(other),
        }
    }

    /// The snapshots whose memories, laid over each other, are the memory of `snapshot`: the full one first.
    pub fn memory_chain(&self, snapshot: &Snapshot) -> Result<Vec<Snapshot>, Error> {
        let mut chain = vec![snapshot.clone()];
        loop {
            let top = &chain[chain.len() - 1];
            let damaged = |why: &str| Error::Damaged { path: top.dir.join(MANIFEST), why: why.into() };
            let memory = top.manifest.memory.as_ref().ok_or_else(|| damaged("it has no memory"))?;
            let Some(parent) = memory.parent else { break };
            if chain.len() == MAX_CHAIN {
                return Err(damaged("its memory lies over too many others"));
            }
            // A digest covers those below it, so a chain cannot be a loop.
            chain.push(self.load(&parent)?);
        }
        chain.reverse();
        Ok(chain)
    }

    /// The snapshot and every other one whose files it needs: those that its memory or a disk lies over.
    pub fn needed_by(&self, snapshot: &Snapshot) -> Result<Vec<Snapshot>, Error> {
        let mut needed = vec![snapshot.clone()];
        let mut next = 0;
        while let Some(one) = needed.get(next).map(|one| one.manifest.clone()) {
            let below = one.disks.iter().filter_map(|disk| disk.backing.as_ref()).map(|backing| backing.snapshot);
            for digest in below.chain(one.memory.and_then(|memory| memory.parent)) {
                if !needed.iter().any(|known| known.digest == digest) {
                    needed.push(self.load(&digest)?);
                }
            }
            next += 1;
        }
        Ok(needed)
    }

    /// The bytes of the one file of `snapshot` that has this role, checked against its digest.
    pub fn read_checked(&self, snapshot: &Snapshot, role: Role, limit: u64) -> Result<Vec<u8>, Error> {
        let missing = || Error::Damaged { path: snapshot.dir.join(MANIFEST), why: format!("it has no {role:?}") };
        let file = snapshot.manifest.file(role).ok_or_else(missing)?;
        let path = snapshot.dir.join(&file.name);
        let bytes = match read_bounded(&path, limit) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::Damaged { path, why: "it is missing".into() });
            }
            other => other?,
        };
        match Digest::of(&bytes) {
            found if found == file.digest => Ok(bytes),
            found => Err(Error::Damaged { path, why: format!("its digest is {found} in place of {}", file.digest) }),
        }
    }
}

impl Machine {
    /// What its next snapshot follows: its last one, or the one that it was made from.
    pub fn last_snapshot(&self) -> Result<String, Error> {
        match read_bounded(&self.dir.join(LAST), MAX_LAST) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(self.spec.image.clone()),
            other => Ok(String::from_utf8_lossy(&other?).trim().into()),
        }
    }

    /// Notes that the machine has a snapshot.
    pub fn set_last_snapshot(&self, digest: &Digest) -> Result<(), files::Error> {
        write_atomically(&self.dir.join(LAST), format!("{digest}\n").as_bytes())
    }
}
