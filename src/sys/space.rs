//! How much room a filesystem has left.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filesystem_without_blocks_has_no_room_and_others_have() {
        assert_eq!(free(Path::new("/proc")).unwrap(), 0);
        assert!(free(&std::env::temp_dir()).unwrap() > 0);
        assert!(free(Path::new("/no/such/path")).is_err());
    }
}
