//! How much space snapshots take, and how much of it they share.
//!
//! Successive snapshots of a machine share files by hard links: the same inode in several folders. What is
//! counted are the blocks that the filesystem has given to a file, not its length, for most files have holes.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;

use serde::Serialize;

use super::{Error, Store};
use crate::snapshot::Digest;
use crate::sys::files::{At, names_in};
use crate::sys::space;

/// The space that the snapshots of a store take, as found at one moment.
#[derive(Debug, Default)]
pub struct Usage {
    files: HashMap<(u64, u64), File>,
    of: BTreeMap<Digest, Sizes>,
}

/// The space of one snapshot, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Sizes {
    /// Of files that no other snapshot has.
    #[serde(rename = "own_bytes")]
    pub own: u64,
    /// Of files that other snapshots have too.
    #[serde(rename = "shared_bytes")]
    pub shared: u64,
}

/// A file under all of its names.
#[derive(Debug)]
struct File {
    bytes: u64,
    /// How many names it has, inside and outside of snapshots.
    links: u64,
    /// The snapshots that have it, once for each name.
    holders: Vec<Digest>,
}

impl Store {
    /// Looks at every file of every snapshot.
    pub fn usage(&self) -> Result<Usage, Error> {
        let mut usage = Usage::default();
        for digest in self.digests()? {
            usage.of.insert(digest, Sizes::default());
            let dir = self.snapshot_dir(&digest);
            for name in names_in(&dir)? {
                let path = dir.join(name);
                let metadata = match fs::symlink_metadata(&path) {
                    // Removed while we looked.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    other => other.at("find", &path)?,
                };
                let file = usage.files.entry((metadata.dev(), metadata.ino())).or_insert_with(|| File {
                    bytes: space::taken(&metadata),
                    links: metadata.nlink(),
                    holders: Vec::new(),
                });
                file.holders.push(digest);
            }
        }
        usage.sum();
        Ok(usage)
    }
}

impl Usage {
    fn sum(&mut self) {
        for file in self.files.values() {
            let holders: BTreeSet<_> = file.holders.iter().collect();
            for digest in &holders {
                let sizes = self.of.entry(**digest).or_default();
                let sum = if holders.len() == 1 { &mut sizes.own } else { &mut sizes.shared };
                *sum = sum.saturating_add(file.bytes);
            }
        }
    }

    /// The space of a snapshot; nothing when it was not there.
    pub fn of(&self, digest: &Digest) -> Sizes {
        self.of.get(digest).copied().unwrap_or_default()
    }

    /// How many bytes would become free if all of these went: those of files that nobody else has, neither
    /// another snapshot nor a machine.
    pub fn freed_by(&self, going: &BTreeSet<Digest>) -> u64 {
        let freed = self.files.values().filter(|file| {
            let going = file.holders.iter().filter(|holder| going.contains(holder)).count() as u64;
            going > 0 && going == file.links
        });
        freed.fold(0, |sum, file| sum.saturating_add(file.bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::{Kind, MANIFEST};
    use crate::store::testing::{Made, store};

    #[test]
    fn a_linked_file_is_shared_and_is_freed_with_its_last_name() {
        let (dir, store) = store();
        let one = Made::new(Kind::Crash, "anna@one").file("big", &[7; 100_000]).publish(&store);
        let two = Made::new(Kind::Crash, "anna@two").link(&one, "big").file("small", &[1; 5000]).publish(&store);
        let blocks = |path: &std::path::Path| space::taken(&fs::metadata(path).unwrap());
        let big = blocks(&one.dir.join("big"));
        let own = |snapshot: &crate::store::Snapshot| blocks(&snapshot.dir.join(MANIFEST));
        assert!(big >= 100_000);
        let usage = store.usage().unwrap();
        assert_eq!(usage.of(&one.digest), Sizes { own: own(&one), shared: big });
        assert_eq!(usage.of(&two.digest), Sizes { own: own(&two) + blocks(&two.dir.join("small")), shared: big });
        assert_eq!(usage.freed_by(&[one.digest].into()), own(&one));
        let both = [one.digest, two.digest].into();
        assert_eq!(usage.freed_by(&both), usage.of(&one.digest).own + usage.of(&two.digest).own + big);
        // A machine that has it too keeps it.
        fs::hard_link(one.dir.join("big"), dir.path().join("data/machines/big")).unwrap();
        let usage = store.usage().unwrap();
        assert_eq!(usage.freed_by(&both), usage.of(&one.digest).own + usage.of(&two.digest).own);
        assert_eq!(usage.of(&crate::snapshot::Digest::of(b"")), Sizes::default());
    }
}
