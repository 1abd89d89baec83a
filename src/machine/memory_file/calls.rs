//! System calls on files that neither allocate nor lock, for the forked child: see [`super::scribe`].
//! Each gives the errno when it fails.

use std::io;
use std::os::fd::RawFd;

/// Writes all of the bytes from `offset` on.
pub(super) fn write(fd: RawFd, mut from: *const u8, mut length: usize, mut offset: u64) -> Result<(), i32> {
    while length > 0 {
        // SAFETY: the kernel only reads the bytes, and says so itself when they are not there.
        let written = unsafe { libc::pwrite(fd, from.cast(), length, offset as libc::off_t) };
        match usize::try_from(written) {
            Ok(0) => return Err(libc::EIO),
            Ok(written) => {
                from = from.wrapping_add(written);
                length = length.saturating_sub(written);
                offset += written as u64;
            }
            Err(_) => match errno() {
                libc::EINTR => {}
                errno => return Err(errno),
            },
        }
    }
    Ok(())
}

pub(super) fn truncate(fd: RawFd, length: u64) -> Result<(), i32> {
    retried(|| {
        // SAFETY: it changes only the file.
        unsafe { libc::ftruncate(fd, length as libc::off_t) }
    })
}

pub(super) fn sync(fd: RawFd) -> Result<(), i32> {
    retried(|| {
        // SAFETY: it changes nothing.
        unsafe { libc::fsync(fd) }
    })
}

/// Repeats a call that a signal interrupted.
fn retried(call: impl Fn() -> libc::c_int) -> Result<(), i32> {
    loop {
        if call() == 0 {
            return Ok(());
        }
        match errno() {
            libc::EINTR => {}
            errno => return Err(errno),
        }
    }
}

fn errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}
