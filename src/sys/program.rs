//! The memory of this very program.

use std::ffi::{c_int, c_void};
use std::io;

/// The unit of mappings on x86-64, in bytes.
const PAGE: usize = 4096;

/// Lets go of the pages of the program that nobody can write: its code and constants. Most of what a start needs is
/// not needed again; what is, comes back page by page from the page cache. Gives the bytes that the program spans.
pub fn give_back_text() -> io::Result<usize> {
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    // SAFETY: `note` is called before this returns, with the pointer to `ranges`, which nobody else uses meanwhile.
    unsafe { libc::dl_iterate_phdr(Some(note), (&raw mut ranges).cast()) };
    for &(start, length) in &ranges {
        // SAFETY: the range lies in a segment of this program that is mapped from its file and was never writable, so
        // that the same bytes are found again by the next access.
        if unsafe { libc::madvise(start as *mut c_void, length, libc::MADV_DONTNEED) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(ranges.iter().map(|(_, length)| length).sum())
}

/// Notes the whole pages of the segments of the first object, which is the program, that cannot be written.
unsafe extern "C" fn note(info: *mut libc::dl_phdr_info, _size: usize, ranges: *mut c_void) -> c_int {
    // SAFETY: the caller, libc, gives a valid description; what is behind `ranges` is the caller's of libc.
    let (info, ranges) = unsafe { (&*info, &mut *ranges.cast::<Vec<(usize, usize)>>()) };
    // SAFETY: `dlpi_phdr` leads to `dlpi_phnum` program headers, which stay as long as the program.
    let headers = unsafe { std::slice::from_raw_parts(info.dlpi_phdr, usize::from(info.dlpi_phnum)) };
    for header in headers.iter().filter(|it| it.p_type == libc::PT_LOAD && it.p_flags & libc::PF_W == 0) {
        let start = (info.dlpi_addr + header.p_vaddr) as usize;
        // A segment that ends in the middle of a page has that to itself: the loader maps whole pages.
        let first = start - start % PAGE;
        ranges.push((first, (start + header.p_memsz as usize).next_multiple_of(PAGE) - first));
    }
    1 // no more objects
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resident_text() -> usize {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut text = false;
        let mut sum = 0;
        for line in smaps.lines() {
            let words: Vec<_> = line.split_whitespace().collect();
            match words[..] {
                [_, rights, _, _, _, path] => text = rights == "r-xp" && path.starts_with('/'),
                ["Rss:", kib, _] if text => sum += kib.parse::<usize>().unwrap(),
                _ => {}
            }
        }
        sum << 10
    }

    #[test]
    fn code_is_let_go_and_comes_back() {
        let before = resident_text();
        assert!(give_back_text().unwrap() >= before, "the program is not all there");
        let after = resident_text();
        assert!(after < before, "{before} bytes of code, and {after} after they were given back");
    }
}
