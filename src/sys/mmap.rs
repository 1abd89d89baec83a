//! Memory mappings that are unmapped when their owner goes.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::AtomicU64;

/// Huge pages are 2 MiB on x86-64; guest memory is aligned to them on both sides.
pub const HUGE_PAGE: usize = 2 << 20;

/// The unit of mappings on x86-64, in bytes.
const PAGE: usize = 4096;

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
        self.prefer_huge_pages_in(0, self.len);
    }

    /// Asks for huge pages in the `len` bytes from `at` on. Does nothing when they are not pages of this mapping.
    pub fn prefer_huge_pages_in(&self, at: usize, len: usize) {
        self.advise(at, len, libc::MADV_HUGEPAGE);
    }

    /// Asks for small pages there, also on a host that gives huge ones to whoever did not ask.
    pub fn avoid_huge_pages_in(&self, at: usize, len: usize) {
        self.advise(at, len, libc::MADV_NOHUGEPAGE);
    }

    fn advise(&self, at: usize, len: usize, advice: libc::c_int) {
        let Ok(start) = self.pages(at, len) else { return };
        // SAFETY: the range is in this mapping; advice about huge pages changes no contents. A kernel without
        // transparent huge pages refuses, and small pages do as well.
        unsafe { libc::madvise(start.cast(), len, advice) };
    }

    /// Puts a private view of a file in place of the `len` bytes from `at` on: what the file has from
    /// `offset` on, read when it is touched. Writing never reaches the file. The caller has seen that the file
    /// is long enough, and nobody may shorten it: what lies beyond its end kills the process that touches it.
    pub fn map_file(&self, at: usize, len: usize, file: &File, offset: u64) -> io::Result<()> {
        let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        self.replace(at, len, 0, file.as_raw_fd(), offset)
    }

    /// Puts fresh zeros in place of the `len` bytes from `at` on, whatever is mapped there.
    pub fn map_zeros(&self, at: usize, len: usize) -> io::Result<()> {
        self.replace(at, len, libc::MAP_ANONYMOUS, -1, 0)
    }

    /// Gives the `len` bytes from `at` on back to the host. Where memory is anonymous they read as zeros then.
    pub fn forget(&self, at: usize, len: usize) -> io::Result<()> {
        let start = self.pages(at, len)?;
        // SAFETY: the range is in this mapping, which nobody holds Rust references into; that its contents
        // change is what is asked for.
        let result = unsafe { libc::madvise(start.cast(), len, libc::MADV_DONTNEED) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    fn replace(&self, at: usize, len: usize, flags: libc::c_int, fd: libc::c_int, offset: i64) -> io::Result<()> {
        let start = self.pages(at, len)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE | flags;
        // SAFETY: the range is in this mapping, so that nothing of anybody else's is replaced; it stays
        // readable and writable memory of the same length, which `drop` unmaps as before.
        let result = unsafe { libc::mmap(start.cast(), len, libc::PROT_READ | libc::PROT_WRITE, flags, fd, offset) };
        if result == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// The address of `at`, if the `len` bytes from there on are pages of this mapping.
    fn pages(&self, at: usize, len: usize) -> io::Result<*mut u8> {
        let inside = at.checked_add(len).is_some_and(|end| end <= self.len);
        if !inside || len == 0 || !at.is_multiple_of(PAGE) || !len.is_multiple_of(PAGE) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(self.as_ptr().wrapping_add(at))
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

/// A page of numbers that this process shares with the children that it forks afterwards.
#[derive(Debug)]
pub struct Shared(NonNull<[AtomicU64; Shared::WORDS]>);

// SAFETY: the page holds nothing but atomics, which may be reached from everywhere, and belongs to no thread.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    const WORDS: usize = PAGE / size_of::<AtomicU64>();

    /// A page of zeros.
    pub fn new() -> io::Result<Shared> {
        let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing.
        let start = unsafe { libc::mmap(ptr::null_mut(), PAGE, access, flags, -1, 0) };
        match NonNull::new(start.cast()) {
            Some(page) if start != libc::MAP_FAILED => Ok(Shared(page)),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// The numbers.
    pub fn words(&self) -> &[AtomicU64; Shared::WORDS] {
        // SAFETY: the mapping is a page that is as long and as aligned as the array, lives as long as `self`,
        // and was filled with zeros, which are valid atomics.
        unsafe { self.0.as_ref() }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: the page was mapped by the constructor and is owned by this value alone.
        unsafe { libc::munmap(self.0.as_ptr().cast(), PAGE) };
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::atomic::Ordering;

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
    #[test]
    fn files_and_zeros_take_the_place_of_pages_and_writing_does_not_reach_the_file() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 2 * PAGE]).unwrap();
        let mapping = Mapping::anonymous(4 * PAGE).unwrap();
        mapping.map_file(PAGE, 2 * PAGE, &file, 0).unwrap();
        // SAFETY: all within the mapping, which only this test knows.
        let (at, put) = unsafe {
            let start = mapping.as_ptr();
            (move |at: usize| start.add(at).read_volatile(), move |at: usize| start.add(at).write_volatile(9))
        };
        assert_eq!([0, PAGE, 3 * PAGE - 1, 3 * PAGE].map(at), [0, 7, 7, 0]);
        put(PAGE);
        assert_eq!(std::os::unix::fs::FileExt::read_at(&file, &mut [0], 0).unwrap(), 1);
        mapping.forget(PAGE, PAGE).unwrap();
        assert_eq!(at(PAGE), 7, "the file was not written, and forgetting shows it again");
        mapping.map_zeros(PAGE, PAGE).unwrap();
        put(0);
        mapping.forget(0, PAGE).unwrap();
        assert_eq!([0, PAGE, 2 * PAGE].map(at), [0, 0, 7]);
        for (start, len) in [(1, PAGE), (0, 1), (0, 0), (0, 5 * PAGE), (4 * PAGE, PAGE), (usize::MAX & !4095, PAGE)] {
            assert!(mapping.map_zeros(start, len).is_err() && mapping.forget(start, len).is_err());
            assert!(mapping.map_file(start, len, &file, 0).is_err());
        }
    }

    #[test]
    fn shared_numbers_begin_at_zero() {
        let shared = Shared::new().unwrap();
        assert!(shared.words().iter().all(|word| word.load(Ordering::SeqCst) == 0));
    }
}
