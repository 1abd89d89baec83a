//! A memory mapping that is unmapped when its owner goes.

use std::io;
use std::ptr::{self, NonNull};

/// Huge pages are 2 MiB on x86-64; guest memory is aligned to them on both sides.
pub const HUGE_PAGE: usize = 2 << 20;

/// A private, writable mapping of whole pages that begins on a huge-page boundary.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is plain memory that belongs to no thread; those who read and write it through
// `as_ptr` see to their own ordering (guest memory is only touched by volatile accesses).
unsafe impl Send for Mapping {}
// SAFETY: as above; `&Mapping` gives nothing but the address and the length.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of zeros (a multiple of the page size), which take host memory only when touched.
    pub fn anonymous(len: usize) -> io::Result<Mapping> {
        // mmap promises page alignment only, so take one huge page more and give the ends back.
        let reserve = len.checked_add(HUGE_PAGE).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                reserve,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let head = (start as usize).next_multiple_of(HUGE_PAGE) - start as usize;
        // SAFETY: head < HUGE_PAGE, so that head + len lies within the reserve; both ranges that are
        // given back lie inside the mapping just made, and nobody has their address.
        unsafe {
            let aligned = start.byte_add(head);
            if head > 0 {
                libc::munmap(start, head);
            }
            if head < HUGE_PAGE {
                libc::munmap(aligned.byte_add(len), HUGE_PAGE - head);
            }
            Ok(Mapping { start: NonNull::new_unchecked(aligned.cast()), len })
        }
    }

    /// Asks for huge pages: fewer faults, and `fork` copies 512 times fewer page-table entries.
    pub fn prefer_huge_pages(&self) {
        // SAFETY: the range is this mapping; advice changes no contents. A kernel without
        // transparent huge pages refuses, and small pages do as well.
        unsafe { libc::madvise(self.start.as_ptr().cast(), self.len, libc::MADV_HUGEPAGE) };
    }

    /// The first byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// The length in bytes.
    pub fn size(&self) -> usize {
        self.len
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by the constructor and is owned by this value alone.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_is_aligned_zeroed_and_writable_to_its_last_byte() {
        for len in [4096, HUGE_PAGE, HUGE_PAGE + 4096] {
            let mapping = Mapping::anonymous(len).unwrap();
            mapping.prefer_huge_pages();
            assert!((mapping.as_ptr() as usize).is_multiple_of(HUGE_PAGE));
            // SAFETY: the last byte of a mapping of `len` bytes that only this test knows.
            unsafe {
                let last = mapping.as_ptr().add(len - 1);
                assert_eq!(last.read_volatile(), 0);
                last.write_volatile(1);
            }
        }
    }
}
