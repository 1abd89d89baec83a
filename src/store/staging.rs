//! Folders in which things are made before they appear under their names.
//!
//! A maker holds a lock on its folder's twin, `NAME.lock`, for as long as it lives. Sweeping removes folders
//! whose lock is free; it and the making of new folders exclude each other, so that a folder which is not
//! locked *yet* is never taken for one that is not locked *any more*.
//!
//! What arrives piece by piece has a folder that is known by its digest, and may outlive its maker: whoever comes next
//! goes on there. Nobody trusts what is in it, so it need not be whole.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::{Error, Store};
use crate::snapshot::Digest;
use crate::sys::files::{self, At, names_in, private_dir};
use crate::sys::lock::{FileLock, is_locked};
use crate::sys::space;

const LOCK: &str = "lock";
const ARRIVING: &str = "arriving";
/// How long what has arrived in part waits for the rest.
const PATIENCE: Duration = Duration::from_secs(7 * 86400);

/// How long ago a small file was begun whose writer will not finish it any more.
const WRITTEN: Duration = Duration::from_secs(600);

/// A folder of one's own, which goes away with this value unless it was published, or is to be kept.
#[derive(Debug)]
pub struct Staging {
    dir: PathBuf,
    lock: PathBuf,
    kept: bool,
    _held: FileLock,
}

impl Staging {
    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether the folder stays when this value goes; only for those of [`Store::stage_arriving`].
    pub fn keep(&mut self, keep: bool) {
        self.kept = keep;
    }

    /// Lets the folder appear as `destination`, with everything in it on the disk.
    pub(super) fn publish(&self, destination: &Path) -> Result<(), files::Error> {
        files::publish_dir(&self.dir, destination)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        // After a publication there is nothing at `dir`. What cannot be removed now is swept later.
        let _ = fs::remove_dir_all(&self.dir);
        let _ = fs::remove_file(&self.lock);
    }
}

/// A name that is kept for somebody.
#[derive(Debug)]
pub struct Reserved {
    store: Store,
    path: PathBuf,
    _held: FileLock,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        // Beside the guard nobody has opened the file and not locked it yet. Without it, the file is swept later.
        if let Ok(_guard) = self.store.guard() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Store {
    /// A new empty folder in which to make something, on the same filesystem as everything that is kept.
    pub fn stage(&self) -> Result<Staging, Error> {
        let _guard = self.guard()?;
        let name = files::unique_name();
        let lock = self.staging(&format!("{name}.{LOCK}"));
        let held = FileLock::exclusive(&lock)?;
        let staging = Staging { dir: self.staging(&name), lock, kept: false, _held: held };
        private_dir(&staging.dir)?;
        Ok(staging)
    }

    /// Keeps a name for a snapshot that is being made: nobody else gets it meanwhile.
    pub fn reserve(&self, name: &str) -> Result<Reserved, Error> {
        self.name_path(name)?;
        let _guard = self.guard()?;
        let path = self.staging(&format!("name-{name}.{LOCK}"));
        match FileLock::try_exclusive(&path)? {
            Some(held) => Ok(Reserved { store: self.clone(), path, _held: held }),
            None => Err(Error::SnapshotTaken(name.into())),
        }
    }

    /// The folder in which the snapshot with this digest arrives, perhaps with a part of it from an earlier time.
    pub fn stage_arriving(&self, digest: &Digest) -> Result<Staging, Error> {
        let _guard = self.guard()?;
        let dir = self.folder(ARRIVING).join(digest.hex());
        let lock = dir.with_extension(LOCK);
        let held = FileLock::try_exclusive(&lock)?.ok_or(Error::Arriving(*digest))?;
        private_dir(&dir)?;
        Ok(Staging { dir, lock, kept: false, _held: held })
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
        for left in self.unfinished()? {
            // Its writer may be there after all, and remove it first.
            swept += usize::from(fs::remove_file(&left).is_ok());
        }
        Ok(swept)
    }

    /// Small files that were being written when their writer was killed, wherever some are.
    fn unfinished(&self) -> Result<Vec<PathBuf>, Error> {
        let machines = self.folder("machines");
        let own = names_in(&machines)?.into_iter().map(|name| machines.join(name));
        let folders = ["names", "verified", "arrived", "keys"].map(|name| self.folder(name)).into_iter().chain(own);
        let mut left = Vec::new();
        for folder in folders.filter(|folder| folder.is_dir()) {
            left.extend(files::unfinished(&folder, WRITTEN)?);
        }
        Ok(left)
    }

    /// What a sweep would remove: how many things, and how many bytes the files that nobody else has take.
    pub fn leftovers(&self) -> Result<(usize, u64), Error> {
        let _guard = self.guard()?;
        let folders: Vec<_> = self.abandoned()?.into_iter().filter(|left| left.is_dir()).collect();
        let bytes = folders.iter().map(|folder| space::taken_by(folder));
        Ok((folders.len(), bytes.fold(0, u64::saturating_add)))
    }

    /// Folders whose makers are gone, and locks without one. What arrives has some time to go on.
    fn abandoned(&self) -> Result<Vec<PathBuf>, Error> {
        let mut abandoned = Vec::new();
        for folder in ["staging", ARRIVING].map(|name| self.folder(name)) {
            for name in names_in(&folder)? {
                let lock = match name.strip_suffix(&format!(".{LOCK}")) {
                    Some(_) => folder.join(&name),
                    None => folder.join(format!("{name}.{LOCK}")),
                };
                let path = folder.join(&name);
                let may_wait = folder.ends_with(ARRIVING) && !is_old(&path);
                if !may_wait && !is_locked(&lock)? {
                    abandoned.push(path);
                }
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

/// Whether nothing has appeared in a folder for long.
fn is_old(path: &Path) -> bool {
    let changed = fs::metadata(path).and_then(|metadata| metadata.modified());
    changed.is_ok_and(|changed| SystemTime::now().duration_since(changed).is_ok_and(|age| age > PATIENCE))
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
        let half_a_name = store.folder("names").join(".7-8-9");
        fs::write(&half_a_name, "x").unwrap();
        let old = SystemTime::now() - WRITTEN - Duration::from_secs(60);
        fs::File::open(&half_a_name).unwrap().set_modified(old).unwrap();
        let (left, bytes) = store.leftovers().unwrap();
        assert!(left == 1 && bytes > 0 && dead.exists());
        assert_eq!(store.sweep().unwrap(), 2);
        assert!(alive.dir().join("half").exists() && !dead.exists() && !half_a_name.exists());
        drop(alive);
        assert_eq!(names_in(&store.folder("staging")).unwrap(), [""; 0]);
    }

    #[test]
    fn what_has_arrived_in_part_waits_for_the_rest_and_not_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&Home::at(dir.path()).unwrap()).unwrap();
        let digest = Digest::of(b"x");
        let mut one = store.stage_arriving(&digest).unwrap();
        assert!(matches!(store.stage_arriving(&digest), Err(Error::Arriving(known)) if known == digest));
        let path = one.dir().to_owned();
        fs::write(path.join("half"), "x").unwrap();
        one.keep(true);
        drop(one);
        assert_eq!(store.sweep().unwrap(), 0);
        let mut two = store.stage_arriving(&digest).unwrap();
        assert!(two.dir().join("half").exists());
        let old = SystemTime::now() - PATIENCE - Duration::from_secs(60);
        fs::File::open(&path).unwrap().set_modified(old).unwrap();
        assert_eq!(store.sweep().unwrap(), 0, "somebody is at it");
        two.keep(true);
        drop(two);
        assert_eq!((store.leftovers().unwrap().0, store.sweep().unwrap()), (1, 1));
        drop(store.stage_arriving(&digest).unwrap());
        assert!(!path.exists() && names_in(&store.folder(ARRIVING)).unwrap().is_empty());
    }

    #[test]
    fn a_name_is_kept_for_one_at_a_time() {
        let (_dir, store) = crate::store::testing::store();
        let held = store.reserve("anna@a").unwrap();
        assert!(matches!(store.reserve("anna@a"), Err(Error::SnapshotTaken(_))));
        assert_eq!(store.sweep().unwrap(), 0);
        drop((store.reserve("anna@b").unwrap(), held));
        drop(store.reserve("anna@a").unwrap());
        assert_eq!(names_in(&store.folder("staging")).unwrap(), Vec::<String>::new());
        for bad in ["../x", "", "a@b@c", "a/b"] {
            assert!(matches!(store.reserve(bad), Err(Error::Reference(_))), "{bad}");
        }
    }
}
