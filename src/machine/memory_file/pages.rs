//! Which pages of guest memory are zeros. All of it is for the forked child: see [`super::scribe`].

use std::os::fd::RawFd;

use crate::mem::PAGE;

/// Entries of `/proc/self/pagemap`, of 8 bytes each, that are read at once.
pub(super) const ENTRIES: usize = 512;
/// In such an entry: the page is there (bit 63) or swapped out (bit 62). Linux's
/// `Documentation/admin-guide/mm/pagemap.rst`.
const TOUCHED: u64 = 3 << 62;

/// Whether the page at this address, one of guest memory's, is all zeros.
pub(super) fn is_zero(page: usize) -> bool {
    // SAFETY: the address is of a page in a span, which is mapped and aligned. This is the child's own copy of
    // it, which nobody changes: the child has one thread, and the guest runs on in its parent.
    let words = unsafe { &*(page as *const [u64; PAGE as usize / 8]) };
    words.chunks_exact(16).all(|words| words.iter().fold(0, |all, word| all | word) == 0)
}

/// Which pages of this process the host never gave memory to.
pub(super) struct Pagemap<'a> {
    fd: RawFd,
    entries: &'a mut [u64; ENTRIES],
    /// The page of the first entry.
    first: usize,
    /// How many entries were read.
    count: usize,
}

impl Pagemap<'_> {
    /// Opens the child's own; where it cannot be had, every page counts as touched and is looked at.
    pub(super) fn open(entries: &mut [u64; ENTRIES]) -> Pagemap<'_> {
        // SAFETY: the name is a C string that lives for ever.
        let fd = unsafe { libc::open(c"/proc/self/pagemap".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC) };
        Pagemap { fd, entries, first: 0, count: 0 }
    }

    /// Whether the page at this address, of private anonymous memory, was never written or swapped out.
    pub(super) fn untouched(&mut self, page: usize) -> bool {
        let number = page / PAGE as usize;
        if !(self.first..self.first + self.count).contains(&number) {
            let length = size_of_val(self.entries);
            // SAFETY: the buffer is writable memory of this length; any bytes are valid numbers.
            let read = unsafe { libc::pread(self.fd, self.entries.as_mut_ptr().cast(), length, number as i64 * 8) };
            (self.first, self.count) = (number, usize::try_from(read).unwrap_or(0) / size_of::<u64>());
        }
        let entry = self.entries.get(number - self.first).filter(|_| number - self.first < self.count);
        entry.is_some_and(|entry| entry & TOUCHED == 0)
    }
}
