//! Where a machine's media may lie: folders for which a tmpfs can be hoped. Whether one is there shows when a file
//! is made; here it is only known where to look, and where to sweep.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Error, Machine};
use crate::snapshot::Digest;
use crate::sys::files::{At, private_dir};

/// Where Linux has a tmpfs for everybody, of half the host's memory if nothing else was said.
const SHARED: &str = "/dev/shm";
/// A medium that one machine gives to another is taken over within this time, or not at all.
const HANDOVER: Duration = Duration::from_secs(600);

impl Machine {
    /// The folders in which its media may be made, the best first; all of them exist from now on, and only their owner
    /// can use them.
    pub fn media_folders(&self) -> Vec<PathBuf> {
        // Another machine that leaves may remove the folder above just when it is there.
        let made = |folder: &PathBuf| (0..3).any(|_| private_dir(folder).is_ok());
        let usable = |folder: &PathBuf| made(folder) && folder.parent().is_some_and(is_private);
        candidates(&self.runtime).into_iter().filter(usable).collect()
    }

    /// Removes what is empty of its folders in places that all users share.
    pub fn leave_media_folders(&self) {
        leave(&self.runtime);
    }

    /// Removes media that a monitor left behind when it was killed, for ever. The caller holds the machine's lock.
    pub fn sweep_media(&self) -> Result<(), Error> {
        for folder in candidates(&self.runtime) {
            sweep(&folder, |name, _| name.ends_with(".disk"))?;
            if let Some(above) = folder.parent() {
                sweep(above, |name, age| name.starts_with(".given-") && age > HANDOVER)?;
            }
        }
        Ok(())
    }
}

/// The folder of a machine's sockets, and one of its own among those of all users. Named after the former, so that
/// two homes with machines of one name do not meet.
pub(super) fn candidates(runtime: &Path) -> Vec<PathBuf> {
    // SAFETY: geteuid touches no memory.
    let user = unsafe { libc::geteuid() };
    let home = runtime.parent().unwrap_or(runtime);
    let home = Digest::of(home.as_os_str().as_encoded_bytes()).hex();
    let shared = Path::new(SHARED).join(format!("catnap-{user}-{}", &home[..16]));
    let name = runtime.file_name().unwrap_or_default();
    vec![runtime.to_owned(), shared.join(name)]
}

/// Removes what is empty of a machine's folders in places that all users share.
pub(super) fn leave(runtime: &Path) {
    for folder in candidates(runtime).iter().filter(|folder| *folder != runtime) {
        // Where something is left, as a medium that was given away, the folders stay.
        let _ = fs::remove_dir(folder);
        let _ = folder.parent().map(fs::remove_dir);
    }
}

/// Whether a folder is ours alone: anybody could have made one of that name in a place for everybody.
fn is_private(folder: &Path) -> bool {
    // SAFETY: as above.
    let user = unsafe { libc::geteuid() };
    fs::symlink_metadata(folder).is_ok_and(|it| it.is_dir() && it.uid() == user && it.mode() & 0o077 == 0)
}

/// Removes the files in a folder of whose names and ages (since they were last moved or written) `which` says so.
fn sweep(folder: &Path, which: impl Fn(&str, Duration) -> bool) -> Result<(), Error> {
    if !is_private(folder) {
        return Ok(());
    }
    for entry in fs::read_dir(folder).at("read", folder)? {
        let path = entry.at("read", folder)?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let age = fs::symlink_metadata(&path).map_or(0, |it| u64::try_from(it.ctime()).unwrap_or(0));
        let now = std::time::UNIX_EPOCH.elapsed().map_or(0, |now| now.as_secs());
        if which(name, Duration::from_secs(now.saturating_sub(age))) {
            match fs::remove_file(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                other => other.at("remove", &path)?,
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Store;
    use crate::store::testing::spec;
    use crate::sys::home::Home;

    #[test]
    fn media_have_private_folders_and_what_is_left_behind_is_swept() {
        let dir = tempfile::tempdir().unwrap();
        let runtime = dir.path().join("run/anna");
        let [own, shared]: [PathBuf; 2] = candidates(&runtime).try_into().unwrap();
        assert_eq!(own, runtime);
        assert!(shared.starts_with(SHARED) && shared.ends_with("anna"));
        assert_ne!(candidates(&dir.path().join("other/anna"))[1], shared);

        private_dir(&own).unwrap();
        let given = dir.path().join("run/.given-0123-4");
        for file in [own.join("bay0.disk"), own.join("control.sock"), given.clone()] {
            fs::write(file, "x").unwrap();
        }
        let machine = Machine { spec: spec("anna"), dir: dir.path().into(), logs: dir.path().into(), runtime };
        fs::set_permissions(dir.path().join("run"), std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        machine.sweep_media().unwrap();
        assert!(!own.join("bay0.disk").exists() && own.join("control.sock").exists());
        assert!(given.exists(), "it may still be wanted");
        let folders = machine.media_folders();
        assert_eq!(folders, [own.clone(), shared.clone()]);
        machine.leave_media_folders();
        assert!(own.exists() && !shared.exists() && !shared.parent().unwrap().exists());
    }

    #[test]
    fn a_folder_that_others_can_use_is_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&Home::at(dir.path()).unwrap()).unwrap();
        assert!(store.root().is_dir());
        fs::set_permissions(dir.path().join("run"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let runtime = dir.path().join("run/anna");
        let machine = Machine { spec: spec("anna"), dir: dir.path().into(), logs: dir.path().into(), runtime };
        let folders = machine.media_folders();
        assert!(folders.iter().all(|folder| folder.starts_with(SHARED)), "{folders:?}");
        machine.leave_media_folders();
    }
}
