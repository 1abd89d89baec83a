//! The root filesystem grows with its disk, mounted as it is.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::libc;
use nix::sys::statvfs::fstatvfs;

use super::console::say;
use crate::facts;

/// `_IOW('f', 16, __u64)` of fs/ext4/ext4.h: the argument is the wanted number of blocks.
const EXT4_IOC_RESIZE_FS: libc::Ioctl = 0x4008_6610;

/// Lets the root filesystem fill its disk. Does nothing when it does, or cannot be grown.
pub(super) fn root() {
    match try_root() {
        // ENOTTY: not ext4. EROFS: mounted read-only. EBUSY: somebody else is at it.
        Err(error) if !matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EROFS | libc::EBUSY)) => {
            say(&format!("the root filesystem does not grow: {error}"));
        }
        _ => {}
    }
}

fn try_root() -> io::Result<()> {
    let root = File::open("/")?;
    let block = fstatvfs(&root)?.block_size();
    // A root without a disk, such as an initramfs, is as large as it is.
    let Some(disk) = facts::root_disk_bytes() else { return Ok(()) };
    let blocks = disk.checked_div(block).unwrap_or(0);
    // SAFETY: the kernel reads eight bytes through the pointer, which are those of `blocks`.
    match unsafe { libc::ioctl(root.as_raw_fd(), EXT4_IOC_RESIZE_FS, &blocks) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
