//! Limits that the operating system sets to a process, and those that it sets to itself.

use std::io;

/// Raises the number of files that this process may have open as far as it can without privileges, and
/// returns it. The usual soft limit of 1024 exists for programs that use `select`, and is too low for a
/// monitor with thousands of connections.
pub fn raise_open_files() -> io::Result<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to a live `rlimit`, which the call fills.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: as above; the call only reads it.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(limit.rlim_cur)
}

/// From now on, all threads take memory from one heap. By default glibc gives each thread a heap of its own at its
/// first allocation, which costs four system calls and some pages; a monitor's threads allocate too little to be
/// in each other's way. Call it before starting threads.
pub fn one_heap() {
    // SAFETY: the call only changes a setting of the allocator; an allocator that does not know it says so, and
    // all stays as it was.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}
