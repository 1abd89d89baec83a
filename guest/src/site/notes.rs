//! Anna's notes, on a disk that does not last.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

/// The most that is shown, in bytes.
const MAX_NOTES: u64 = 16 << 10;

/// What is to be seen of the transient disk.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Notes {
    /// Nothing is mounted.
    NoDisk,
    /// A disk is mounted, without notes.
    None,
    /// A disk was there, and what was on it did not survive.
    Lost,
    /// The notes.
    Some(String),
    /// The disk does not answer as it should.
    Unreadable(String),
}

/// Reads the notes at `path`, when a disk is mounted on its folder. A file at `lost` says that there were others.
pub(super) fn read(path: &Path, lost: &Path) -> Notes {
    match look(path) {
        Notes::None | Notes::NoDisk if lost.exists() => Notes::Lost,
        notes => notes,
    }
}

fn look(path: &Path) -> Notes {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let device = |path: &Path| fs::metadata(path).map(|meta| meta.dev());
    let above = folder.parent().unwrap_or(Path::new("/"));
    match (device(folder), device(above)) {
        (Ok(here), Ok(above)) if here == above => Notes::NoDisk,
        (Err(error), _) if error.kind() != std::io::ErrorKind::NotFound => Notes::Unreadable(error.to_string()),
        (Err(_), _) => Notes::NoDisk,
        _ => read_file(path),
    }
}

fn read_file(path: &Path) -> Notes {
    // A pipe in the place of the file would block without the flag; it is no file, so it is not read.
    let file = File::options().read(true).custom_flags(nix::libc::O_NONBLOCK).open(path);
    let mut text = Vec::new();
    let read = file.and_then(|file| match file.metadata()?.is_file() {
        true => file.take(MAX_NOTES).read_to_end(&mut text),
        false => Err(std::io::Error::other("not a file")),
    });
    match read {
        Ok(_) => Notes::Some(String::from_utf8_lossy(&text).trim_end().into()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Notes::None,
        Err(error) => Notes::Unreadable(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_mounted_disk_has_notes() {
        let none = Path::new("/no/such/file");
        let read = |path: &Path| read(path, none);
        // /proc is mounted everywhere, and its version is one line of text.
        assert!(matches!(read(Path::new("/proc/version")), Notes::Some(text) if text.starts_with("Linux version")));
        assert_eq!(read(Path::new("/proc/no-notes")), Notes::None);
        assert!(matches!(read(Path::new("/proc/self")), Notes::Unreadable(_)));
        assert_eq!(read(Path::new("/etc/hostname")), Notes::NoDisk);
        assert_eq!(read(Path::new("/no/such/folder/notes.txt")), Notes::NoDisk);
        let lost = |path| super::read(Path::new(path), Path::new("/etc/hostname"));
        assert_eq!([lost("/proc/no-notes"), lost("/no/such/folder/notes.txt")], [Notes::Lost, Notes::Lost]);
        assert!(matches!(lost("/proc/version"), Notes::Some(_)), "new notes count for more than old ones");
    }
}
