//! How much room a filesystem has left, and how much of it things take.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The unit of `st_blocks`, in bytes, whatever the filesystem's own blocks are (stat(2)).
const BLOCK: u64 = 512;

/// The bytes that this user can still write to the filesystem that has `path`.
pub fn free(path: &Path) -> io::Result<u64> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: `statvfs` is plain integers, for which all zeros are valid.
    let mut stat: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: the path ends with a zero, and the kernel fills the structure that the pointer names.
    match unsafe { libc::statvfs(path.as_ptr(), &mut stat) } {
        0 => Ok(stat.f_bavail.saturating_mul(stat.f_frsize)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The bytes that the filesystem has given to a file: its holes take none.
pub fn taken(file: &fs::Metadata) -> u64 {
    file.blocks().saturating_mul(BLOCK)
}

/// The bytes that would become free if this folder went with all that is in it. Files with names elsewhere would
/// stay; what cannot be looked at counts for nothing.
pub fn taken_by(folder: &Path) -> u64 {
    let (mut sum, mut folders) = (0u64, vec![folder.to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            match entry.metadata() {
                Ok(found) if found.is_dir() => folders.push(entry.path()),
                Ok(found) if found.nlink() == 1 => sum = sum.saturating_add(taken(&found)),
                _ => {}
            }
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filesystem_without_blocks_has_no_room_and_others_have() {
        assert_eq!(free(Path::new("/proc")).unwrap(), 0);
        assert!(free(&std::env::temp_dir()).unwrap() > 0);
        assert!(free(Path::new("/no/such/path")).is_err());
    }

    #[test]
    fn a_folder_takes_what_is_in_it_and_nowhere_else() {
        let dir = tempfile::tempdir().unwrap();
        let (inside, file) = (dir.path().join("a/b"), dir.path().join("a/b/file"));
        fs::create_dir_all(&inside).unwrap();
        fs::write(&file, [7; 50_000]).unwrap();
        assert!(taken_by(dir.path()) >= 50_000);
        fs::File::create(inside.join("hole")).unwrap().set_len(1 << 30).unwrap();
        assert!(taken_by(dir.path()) < 1 << 20);
        fs::hard_link(&file, dir.path().join("elsewhere")).unwrap();
        assert_eq!(taken_by(&dir.path().join("a")), 0);
        assert_eq!(taken_by(&dir.path().join("missing")), 0);
    }
}
