//! Removing snapshots, and only those that nothing needs.
//!
//! Whoever makes something that needs a snapshot holds the store's lock beside others while it appears, and
//! looks whether what it needs is still there; whoever removes holds it alone while looking for dependents. So
//! nothing is ever removed from under something that is just being made.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::PathBuf;

use super::{Error, Store};
use crate::snapshot::{Digest, Manifest};
use crate::sys::files::{At, sync_dir};
use crate::sys::lock::FileLock;

/// The right to remove: as long as this lives, nothing appears that could need a snapshot.
#[derive(Debug)]
pub struct Alone<'a> {
    store: &'a Store,
    _held: FileLock,
}

impl Store {
    /// Waits for the right to remove. Whoever has it must not publish anything.
    pub fn alone(&self) -> Result<Alone<'_>, Error> {
        Ok(Alone { store: self, _held: FileLock::exclusive(&self.removal_lock())? })
    }

    /// Removes a snapshot with its files, also one whose files cannot be read, and every name it has. Refused
    /// when anything depends on it.
    pub fn remove_snapshot(&self, digest: &Digest) -> Result<(), Error> {
        self.alone()?.remove(digest)
    }

    /// Waits for the right to make something that needs a snapshot.
    pub(super) fn beside_others(&self) -> Result<FileLock, Error> {
        Ok(FileLock::shared(&self.removal_lock())?)
    }

    /// Checks, by someone who is [`Store::beside_others`], that all that the manifest needs is there.
    pub(super) fn check_needs(&self, manifest: &Manifest) -> Result<(), Error> {
        match manifest.needs().find(|(digest, _)| !self.snapshot_dir(digest).is_dir()) {
            None => Ok(()),
            Some((gone, _)) => Err(Error::Gone(gone)),
        }
    }

    fn removal_lock(&self) -> PathBuf {
        self.folder("snapshots").join(".lock")
    }
}

impl Alone<'_> {
    /// As [`Store::remove_snapshot`].
    pub fn remove(&self, digest: &Digest) -> Result<(), Error> {
        let store = self.store;
        let family = store.family()?;
        let by = family.dependents(digest);
        if !by.is_empty() {
            let of = family.get(digest).map_or_else(|| digest.to_string(), super::Listed::name);
            return Err(Error::Needed { of, by, above: family.above(digest, &BTreeSet::new()) });
        }
        for (name, _) in store.names()?.iter().filter(|(_, named)| named == digest) {
            store.remove_name(name)?;
        }
        // It disappears at once and as a whole; what follows may take its time or be swept later.
        let (dir, away) = (store.snapshot_dir(digest), store.stage()?);
        fs::rename(&dir, away.dir().join("removed")).at("remove", &dir)?;
        sync_dir(&store.folder("snapshots"))?;
        for note in [store.stamps_path(digest), store.arrived_path(digest)] {
            match fs::remove_file(&note) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                other => other.at("remove", &note)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::Kind;
    use crate::store::testing::{Made, spec, store};
    use crate::sys::files::names_in;

    #[test]
    fn what_something_depends_on_stays_and_the_refusal_names_it() {
        let (dir, store) = store();
        let kitten = Made::new(Kind::Clean, "kitten").disk(None).publish(&store);
        let monday = Made::new(Kind::Live, "anna@monday").disk(Some(&kitten)).memory(None).publish(&store);
        let tuesday = Made::new(Kind::Live, "anna@tuesday").memory(Some(&monday)).publish(&store);
        store.create_machine(&spec("ben"), &kitten).unwrap();
        let said = store.remove_snapshot(&monday.digest).unwrap_err().to_string();
        assert!(said.contains("anna@monday") && said.contains("the memory of anna@tuesday"), "{said}");
        let said = store.remove_snapshot(&kitten.digest).unwrap_err().to_string();
        assert!(said.contains("a disk of anna@monday") && said.contains("the machine ben"), "{said}");
        for digest in [tuesday.digest, monday.digest] {
            store.remove_snapshot(&digest).unwrap();
        }
        store.remove_machine(&"ben".parse().unwrap()).unwrap();
        store.remove_snapshot(&kitten.digest).unwrap();
        for folder in ["snapshots", "names", "verified", "arrived", "staging"] {
            assert_eq!(names_in(&dir.path().join("data").join(folder)).unwrap(), [""; 0], "{folder}");
        }
    }

    #[test]
    fn nothing_appears_that_needs_what_is_gone() {
        let (_dir, store) = store();
        let kitten = Made::new(Kind::Clean, "kitten").disk(None).publish(&store);
        let orphan = Made::new(Kind::Crash, "anna@x").disk(Some(&kitten));
        store.remove_snapshot(&kitten.digest).unwrap();
        assert!(matches!(orphan.try_publish(&store), Err(Error::Gone(digest)) if digest == kitten.digest));
        assert!(matches!(store.create_machine(&spec("ben"), &kitten), Err(Error::Gone(_))));
        assert_eq!(store.list().unwrap().len() + store.machines().unwrap().len(), 0);
        assert_eq!(store.sweep().unwrap(), 0);
    }

    #[test]
    fn makers_wait_for_whoever_removes() {
        let (_dir, store) = store();
        let alone = store.alone().unwrap();
        assert!(FileLock::try_shared(&store.removal_lock()).unwrap().is_none());
        drop(alone);
        let one = store.beside_others().unwrap();
        let two = store.beside_others().unwrap();
        assert!(FileLock::try_exclusive(&store.removal_lock()).unwrap().is_none());
        drop((one, two));
    }
}
