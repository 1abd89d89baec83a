//! Folders in which things are made before they appear under their names.
//!
//! A maker holds a lock on its folder's twin, `NAME.lock`, for as long as it lives. Sweeping removes folders
//! whose lock is free; it and the making of new folders exclude each other, so that a folder which is not
//! locked *yet* is never taken for one that is not locked *any more*.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{Error, Store};
use crate::sys::files::{self, At, names_in, private_dir};
use crate::sys::lock::{FileLock, is_locked};
use crate::sys::space;

const LOCK: &str = "lock";

/// A folder of one's own, which goes away with this value unless it was published.
#[derive(Debug)]
pub struct Staging {
    dir: PathBuf,
    lock: PathBuf,
    _held: FileLock,
}

impl Staging {
    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Lets the folder appear as `destination`, with everything in it on the disk.
    pub(super) fn publish(&self, destination: &Path) -> Result<(), files::Error> {
        files::publish_dir(&self.dir, destination)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // After a publication there is nothing at `dir`. What cannot be removed now is swept later.
        let _ = fs::remove_dir_all(&self.dir);
        let _ = fs::remove_file(&self.lock);
    }
}

impl Store {
    /// A new empty folder in which to make something, on the same filesystem as everything that is kept.
    pub fn stage(&self) -> Result<Staging, Error> {
        let _guard = self.guard()?;
        let name = files::unique_name();
        let lock = self.staging(&format!("{name}.{LOCK}"));
        let held = FileLock::exclusive(&lock)?;
        let staging = Staging { dir: self.staging(&name), lock, _held: held };
        private_dir(&staging.dir)?;
        Ok(staging)
    }

    /// Removes what makers that are gone have left behind. Returns how many there were. A program that a killed
    /// maker had started may still be writing for a moment; what it fills is left to the next sweep.
    pub fn sweep(&self) -> Result<usize, Error> {
        let _guard = self.guard()?;
        let mut swept = 0;
        for left in self.abandoned()? {
            if left.is_dir() {
                match fs::remove_dir_all(&left) {
                    Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {}
                    other => {
                        other.at("remove", &left)?;
                        swept += 1;
                    }
                }
            } else {
                fs::remove_file(&left).at("remove", &left)?;
            }
        }
        Ok(swept)
    }

    /// What a sweep would remove: how many things, and how many bytes the files that nobody else has take.
    pub fn leftovers(&self) -> Result<(usize, u64), Error> {
        let _guard = self.guard()?;
        let folders: Vec<_> = self.abandoned()?.into_iter().filter(|left| left.is_dir()).collect();
        let bytes = folders.iter().map(|folder| space::taken_by(folder));
        Ok((folders.len(), bytes.fold(0, u64::saturating_add)))
    }

    /// Folders whose makers are gone, and locks without one.
    fn abandoned(&self) -> Result<Vec<PathBuf>, Error> {
        let mut abandoned = Vec::new();
        for name in names_in(&self.folder("staging"))? {
            let lock = match name.strip_suffix(&format!(".{LOCK}")) {
                Some(_) => self.staging(&name),
                None => self.staging(&format!("{name}.{LOCK}")),
            };
            if !is_locked(&lock)? {
                abandoned.push(self.staging(&name));
            }
        }
        Ok(abandoned)
    }

    fn staging(&self, name: &str) -> PathBuf {
        self.folder("staging").join(name)
    }

    fn guard(&self) -> Result<FileLock, Error> {
        Ok(FileLock::exclusive(&self.staging(".guard"))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::home::Home;

    #[test]
    fn only_what_a_dead_maker_left_is_swept() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&Home::at(dir.path()).unwrap()).unwrap();
        let alive = store.stage().unwrap();
        fs::write(alive.dir().join("half"), "x").unwrap();
        // A maker that was killed: its lock is free and its folder is there.
        let dead = store.staging("1-2-3");
        fs::create_dir(&dead).unwrap();
        fs::write(dead.join("half"), "x").unwrap();
        fs::write(store.staging("1-2-3.lock"), "").unwrap();
        fs::write(store.staging("4-5-6.lock"), "").unwrap();
        let (left, bytes) = store.leftovers().unwrap();
        assert!(left == 1 && bytes > 0 && dead.exists());
        assert_eq!(store.sweep().unwrap(), 1);
        assert!(alive.dir().join("half").exists() && !dead.exists());
        drop(alive);
        assert_eq!(names_in(&store.folder("staging")).unwrap(), [""; 0]);
    }
}
