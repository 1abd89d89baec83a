//! Files that are there as a whole or not at all, also after a power cut.
//!
//! A rename is atomic for whoever looks, but after a power cut it is only there when the folder was synced,
//! and the new content only when the file was synced *before* the rename. Hence the order everywhere here:
//! write, fsync the file, rename, fsync the folder. Only [`write_soon`] leaves the syncing for later.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// An operation on a file that failed, with its path.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing} {path}: {source}")]
pub struct Error {
    /// What was tried, such as `open`.
    pub doing: &'static str,
    /// The file or folder.
    pub path: PathBuf,
    /// Why it failed.
    #[source]
    pub source: io::Error,
}

impl Error {
    /// The kind of the underlying error.
    pub fn kind(&self) -> io::ErrorKind {
        self.source.kind()
    }
}

/// Tells an I/O error what was being done, and to which path.
pub trait At<T> {
    /// Wraps the error, if it is one.
    fn at(self, doing: &'static str, path: &Path) -> Result<T, Error>;
}

impl<T> At<T> for io::Result<T> {
    fn at(self, doing: &'static str, path: &Path) -> Result<T, Error> {
        self.map_err(|source| Error { doing, path: path.into(), source })
    }
}

/// Puts `bytes` at `path` in place of whatever is there. Readers see the old file or the new one.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    replace(path, bytes, File::sync_all)?;
    sync_parent(path)
}

/// The same for what is a note of this moment and may wait: it is on the disk when the kernel gets round to it, or after
/// [`settle`]. Until then a power cut leaves the old file, the new one, or an empty one.
pub fn write_soon(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    replace(path, bytes, |_| Ok(()))
}

/// Has what [`write_soon`] put there on the disk.
pub fn settle(path: &Path) -> Result<(), Error> {
    sync_file(path)?;
    sync_parent(path)
}

fn replace(path: &Path, bytes: &[u8], sync: fn(&File) -> io::Result<()>) -> Result<(), Error> {
    let temporary = path.with_file_name(format!(".{}", unique_name()));
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(bytes)?;
        sync(&file)?;
        fs::rename(&temporary, path)
    })();
    if written.is_err() {
        // What made the writing fail is the error to report; the remains are hidden and harmless.
        let _ = fs::remove_file(&temporary);
    }
    written.at("write", path)
}

/// What [`write_atomically`] and [`write_soon`] left in a folder when they were killed at it, at least `age` ago. Nobody looks at it.
pub fn unfinished(dir: &Path, age: Duration) -> Result<Vec<PathBuf>, Error> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).at("read", dir)? {
        let entry = entry.at("read", dir)?;
        let ours = entry.file_name().to_str().and_then(|name| name.strip_prefix('.')).is_some_and(is_unique_name);
        let changed = entry.metadata().and_then(|metadata| metadata.modified());
        // One that goes away just now was not left.
        let old = changed.is_ok_and(|changed| changed.elapsed().is_ok_and(|elapsed| elapsed >= age));
        found.extend((ours && old).then(|| entry.path()));
    }
    Ok(found)
}

/// Makes a folder that was filled beside its destination appear there, with everything in it on the disk.
/// `AlreadyExists` when something is there already.
pub fn publish_dir(filled: &Path, destination: &Path) -> Result<(), Error> {
    sync_tree(filled)?;
    // rename(2) puts a folder in place of an empty one only; what we publish is never empty.
    fs::rename(filled, destination)
        .map_err(|error| match error.kind() {
            io::ErrorKind::DirectoryNotEmpty => io::ErrorKind::AlreadyExists.into(),
            _ => error,
        })
        .at("make", destination)?;
    sync_parent(destination)
}

/// Syncs what is in a file, not its name in the folder.
pub fn sync_file(path: &Path) -> Result<(), Error> {
    File::open(path).and_then(|file| file.sync_all()).at("sync", path)
}

/// Syncs a folder: the names in it, not what is in the files.
pub fn sync_dir(path: &Path) -> Result<(), Error> {
    File::open(path).and_then(|dir| dir.sync_all()).at("sync", path)
}

fn sync_parent(path: &Path) -> Result<(), Error> {
    path.parent().map_or(Ok(()), sync_dir)
}

/// Syncs every file and folder of a tree. Links and special files have no content of their own.
fn sync_tree(dir: &Path) -> Result<(), Error> {
    // The kernel begins to write all of it: then there is one commit of the filesystem's journal to wait for, and not
    // one for each file.
    each_in_tree(dir, &mut |path, is_dir| {
        if !is_dir {
            begin_to_write(path);
        }
        Ok(())
    })?;
    each_in_tree(dir, &mut |path, is_dir| if is_dir { sync_dir(path) } else { sync_file(path) })
}

/// Does something to every plain file and folder of a tree, folders after what is in them.
fn each_in_tree(dir: &Path, each: &mut dyn FnMut(&Path, bool) -> Result<(), Error>) -> Result<(), Error> {
    for entry in fs::read_dir(dir).at("read", dir)? {
        let entry = entry.at("read", dir)?;
        let kind = entry.file_type().at("read", &entry.path())?;
        if kind.is_dir() {
            each_in_tree(&entry.path(), each)?;
        } else if kind.is_file() {
            each(&entry.path(), false)?;
        }
    }
    each(dir, true)
}

/// What cannot be begun is done, or fails, when it is synced.
fn begin_to_write(path: &Path) {
    if let Ok(file) = File::open(path) {
        // SAFETY: the descriptor is open; the call reads nothing of ours. A length of 0 means to the end.
        unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
    }
}

/// Makes a folder that only its owner can use, and its parents where they are missing.
pub fn private_dir(path: &Path) -> Result<(), Error> {
    // Mostly it is there, and asking takes half as long as trying.
    if path.is_dir() {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(0o700).create(path).at("make", path)
}

/// Takes away the permission to write, so that nobody changes by mistake what must stay as it is.
pub fn make_read_only(path: &Path) -> Result<(), Error> {
    fs::set_permissions(path, Permissions::from_mode(0o444)).at("protect", path)
}

/// Reads a file that should be small: `InvalidData` when it has more than `limit` bytes.
pub fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>, Error> {
    let read = |file: File| {
        // As much room as it needs: otherwise it is read in pieces that begin with 32 bytes.
        let expected = file.metadata()?.len().min(limit) + 1;
        let mut bytes = Vec::with_capacity(usize::try_from(expected).unwrap_or_default());
        file.take(limit + 1).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = File::open(path).and_then(read).at("read", path)?;
    if bytes.len() as u64 > limit {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("longer than {limit} bytes"))).at("read", path);
    }
    Ok(bytes)
}

/// The entries' names of a folder, sorted; none when the folder is missing. Hidden ones and names that are
/// not UTF-8 are nothing of ours and left out.
pub fn names_in(dir: &Path) -> Result<Vec<String>, Error> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.at("read", dir)?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.at("read", dir)?.file_name();
        names.extend(name.into_string().ok().filter(|name| !name.starts_with('.')));
    }
    names.sort();
    Ok(names)
}

/// A name that no other process and no earlier call uses for something that still exists.
pub fn unique_name() -> String {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let nanos = std::time::UNIX_EPOCH.elapsed().map_or(0, |elapsed| elapsed.as_nanos() as u64);
    format!("{}-{:x}-{}", std::process::id(), nanos, COUNTER.fetch_add(1, Ordering::Relaxed))
}

fn is_unique_name(name: &str) -> bool {
    let parts: Vec<_> = name.split('-').collect();
    parts.len() == 3 && parts.iter().all(|part| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_left_long_ago_is_unfinished() {
        let dir = tempfile::tempdir().unwrap();
        let left = dir.path().join(format!(".{}", unique_name()));
        for path in [&left, &dir.path().join(".guard"), &dir.path().join(unique_name())] {
            fs::write(path, "x").unwrap();
        }
        assert_eq!(unfinished(dir.path(), Duration::from_secs(60)).unwrap(), [] as [PathBuf; 0]);
        assert_eq!(unfinished(dir.path(), Duration::ZERO).unwrap(), [left]);
    }

    #[test]
    fn a_file_is_replaced_as_a_whole_and_nothing_stays_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("name");
        write_atomically(&path, b"one").unwrap();
        write_atomically(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        write_soon(&path, b"three").unwrap();
        settle(&path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"three");
        // A folder of that name cannot be replaced by a file: an error, and no remains.
        fs::create_dir(dir.path().join("taken")).unwrap();
        let error = write_atomically(&dir.path().join("taken"), b"x").unwrap_err();
        assert!(error.to_string().contains("taken"), "{error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn publishing_never_replaces_a_folder_that_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b, there) = (dir.path().join("a"), dir.path().join("b"), dir.path().join("there"));
        for filled in [&a, &b] {
            fs::create_dir(filled).unwrap();
            fs::write(filled.join("who"), filled.to_str().unwrap()).unwrap();
        }
        publish_dir(&a, &there).unwrap();
        assert_eq!(publish_dir(&b, &there).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read_to_string(there.join("who")).unwrap(), a.to_str().unwrap());
        assert!(b.exists());
    }

    #[test]
    fn a_file_that_should_be_small_is_not_read_when_it_is_large() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs::write(&path, [7; 10]).unwrap();
        assert_eq!(read_bounded(&path, 10).unwrap(), [7; 10]);
        assert_eq!(read_bounded(&path, 9).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
