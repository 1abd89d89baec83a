//! Filesystems that live in memory, told from others by what the kernel says of an open file: a path may promise
//! anything.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// `TMPFS_MAGIC` of include/uapi/linux/magic.h.
const MAGIC: libc::__fsword_t = 0x0102_1994;

/// How many bytes can still be written to the tmpfs on which a file or folder is; `None` when it is on none.
///
/// One that was mounted without a limit says that it has no blocks at all; it has room for as much as there is.
pub fn room(file: &File) -> io::Result<Option<u64>> {
    // SAFETY: `statfs` is plain integers, for which all zeros are valid.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open, and the kernel fills the structure that the pointer names.
    if unsafe { libc::fstatfs(file.as_raw_fd(), &mut stat) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(match stat.f_type {
        MAGIC if stat.f_blocks == 0 => Some(u64::MAX),
        MAGIC => Some(stat.f_bavail.saturating_mul(u64::try_from(stat.f_bsize).unwrap_or(0))),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_tmpfs_is_a_tmpfs() {
        assert_eq!(room(&File::open("/proc").unwrap()).unwrap(), None);
        assert!(room(&File::open("/dev/shm").unwrap()).unwrap().is_some_and(|room| room > 0));
    }
}
