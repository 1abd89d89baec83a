//! Saved memory, put back lazily.
//!
//! Long pieces of files are mapped privately: their pages are read when the guest touches them, and the cost of
//! a restore does not grow with RAM. But each mapping has a price too, and the kernel a limit for their number
//! (`vm.max_map_count`, 65530), so that pages that lie scattered are read into place. A long piece that is
//! only interrupted by short ones is one mapping, and the short ones are put over it:
//!
//! ```text
//! pieces   ├── file 0 ──┤ file 1 ├───── file 0 ─────┤ zeros ├─ file 0 ─┤         zeros          ├─ file 0 ─┤
//! mapped   ├────────────────────── file 0 ────────────────────────────┤                        ├─ file 0 ─┤
//! patched               ├ read ──┤                 ├ clear ┤
//! ```

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::AsRawFd;

use vm_memory::{GuestAddress, GuestMemoryRegion};

use super::{Error, GuestMemory, PAGE, Ram};
use crate::sys::mmap::{HUGE_PAGE, Mapping};

/// What is shorter than this is read, not mapped, in bytes: some page faults and mappings fewer for a little
/// reading ahead.
const LONG: u64 = 64 << 10;
/// The longest interruption of a mapping, in bytes, that is patched over it.
const BRIDGE: u64 = 64 << 10;
/// The most mappings of files. Each may leave one of anonymous memory behind it; an eighth of what the kernel
/// allows leaves room for everything else.
const MAX_EXTENTS: usize = 8192;
/// The most buffers of one call (IOV_MAX in Linux's `uio.h`).
const MAX_BUFFERS: usize = 1024;

/// Consecutive pages of saved memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The first guest-physical address.
    pub address: u64,
    /// In bytes.
    pub length: u64,
    /// Where the contents are.
    pub source: Source,
}

/// Where the contents of a piece are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// They are zeros.
    Zeros,
    /// They are in one of the files.
    File {
        /// Which.
        file: usize,
        /// Where they begin in it.
        offset: u64,
    },
}

/// A part of a file to be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Extent {
    address: u64,
    length: u64,
    file: usize,
    offset: u64,
}

/// How a region is put together.
#[derive(Debug, Default, PartialEq, Eq)]
struct Plan {
    /// Sorted, without overlaps.
    extents: Vec<Extent>,
    /// What is put into place after the extents are mapped.
    patches: Vec<Piece>,
}

/// RAM in `regions` (the guest address and the length in bytes of each) with the contents that `pieces` say,
/// which must cover the regions exactly, sorted, each inside one of them. No page counts as changed.
///
/// The files are not needed any more afterwards, but nobody may ever write or shorten them: much of memory is
/// read from them only when it is touched.
pub fn restore(regions: &[(GuestAddress, u64)], pieces: &[Piece], files: &[&File]) -> Result<GuestMemory, Error> {
    check_lengths(pieces, files)?;
    let by_region = split(regions, pieces)?;
    let mut plans: Vec<Plan> = Vec::new();
    let mut long = LONG;
    loop {
        plans.clear();
        plans.extend(by_region.iter().map(|pieces| plan(pieces, long)));
        if plans.iter().map(|plan| plan.extents.len()).sum::<usize>() <= MAX_EXTENTS {
            break;
        }
        long *= 2;
    }
    let build = |(&(start, size), plan)| {
        let ram = Ram::reserve(start, size).map_err(|source| Error::Map { size, source })?;
        fill(&ram, plan, files)?;
        Ok(ram.restored(!plan.extents.is_empty()))
    };
    let regions = regions.iter().zip(&plans).map(build).collect::<Result<Vec<_>, Error>>()?;
    Ok(GuestMemory::from_regions(regions)?)
}

/// Every piece of a file must be in it: a mapping that goes on behind a file's end kills who touches it.
fn check_lengths(pieces: &[Piece], files: &[&File]) -> Result<(), Error> {
    let mut needed = vec![0; files.len()];
    for piece in pieces {
        let Source::File { file, offset } = piece.source else { continue };
        let end = offset.checked_add(piece.length).filter(|_| offset.is_multiple_of(PAGE));
        let (Some(end), Some(needed)) = (end, needed.get_mut(file)) else {
            return Err(Error::Pieces(format!("what is at {:#x} is in no file, or not at a page", piece.address)));
        };
        *needed = end.max(*needed);
    }
    for (file, (needed, handle)) in needed.into_iter().zip(files).enumerate() {
        let length = handle.metadata().map_err(|source| Error::File { file, source })?.len();
        if length < needed {
            return Err(Error::TooShort { file, length, needed });
        }
    }
    Ok(())
}

/// The pieces of each region, which must fill it.
fn split<'a>(regions: &[(GuestAddress, u64)], pieces: &'a [Piece]) -> Result<Vec<&'a [Piece]>, Error> {
    let mut rest = pieces;
    let mut by_region = Vec::new();
    for &(start, size) in regions {
        let refuse = |at: u64| Error::Pieces(format!("the pieces around {at:#x} do not fill RAM page by page"));
        let end = start.0.checked_add(size).ok_or_else(|| refuse(start.0))?;
        let (mut at, mut count) = (start.0, 0);
        while at < end {
            let piece = rest.get(count).filter(|piece| piece.address == at).ok_or_else(|| refuse(at))?;
            let pages = piece.length > 0 && piece.length.is_multiple_of(PAGE) && at.is_multiple_of(PAGE);
            at = at.checked_add(piece.length).filter(|next| pages && *next <= end).ok_or_else(|| refuse(at))?;
            count += 1;
        }
        let (own, others) = rest.split_at(count);
        by_region.push(own);
        rest = others;
    }
    match rest.first() {
        None => Ok(by_region),
        Some(piece) => Err(Error::Pieces(format!("what is at {:#x} is in no region", piece.address))),
    }
}

/// Decides what of a region is mapped: what has at least `long` bytes.
fn plan(pieces: &[Piece], long: u64) -> Plan {
    let mut plan = Plan::default();
    let mut rest = pieces;
    while let Some((first, others)) = rest.split_first() {
        let Source::File { file, offset } = first.source else {
            // Between extents, memory is zero as it is.
            rest = others;
            continue;
        };
        let (count, length) = reach(rest, file, offset);
        if length < long {
            plan.patches.push(*first);
            rest = others;
            continue;
        }
        let (covered, others) = rest.split_at(count);
        let extent = Extent { address: first.address, length, file, offset };
        plan.patches.extend(covered.iter().filter(|piece| piece.source != extent.source_at(piece.address)));
        plan.extents.push(extent);
        rest = others;
    }
    plan
}

/// How far an extent can go that begins with the first of the pieces: how many pieces, and how many bytes. It
/// goes on over interruptions, as long as they are short and its own file continues after them.
fn reach(pieces: &[Piece], file: usize, offset: u64) -> (usize, u64) {
    let Some(first) = pieces.first() else { return (0, 0) };
    let extent = Extent { address: first.address, length: first.length, file, offset };
    let (mut count, mut end) = (1, first.end());
    for (n, piece) in pieces.iter().enumerate().skip(1) {
        if piece.source == extent.source_at(piece.address) {
            (count, end) = (n + 1, piece.end());
        } else if piece.end() - end > BRIDGE {
            break;
        }
    }
    (count, end - first.address)
}

/// Maps the extents, then puts the patches into place.
fn fill(ram: &Ram, plan: &Plan, files: &[&File]) -> Result<(), Error> {
    // In `split`, everything was found to lie in the region, whose length is that of a mapping.
    let at = |address: u64| (address - ram.start_addr().0) as usize;
    let mapping = ram.mapping();
    for extent in &plan.extents {
        mapping
            .map_file(at(extent.address), extent.length as usize, files[extent.file], extent.offset)
            .map_err(|source| Error::File { file: extent.file, source })?;
    }
    // A page that is read into untouched memory should not take a huge one: that would be cleared first.
    let free = free(&plan.extents, ram);
    free.iter().for_each(|&(start, length)| mapping.avoid_huge_pages_in(start, length));
    // By file and place, so that pages that are scattered in memory and neighbours in the file are read at once.
    let mut reads = Vec::new();
    for patch in &plan.patches {
        match patch.source {
            // SAFETY: the range is in the mapping, which nobody else has yet.
            Source::Zeros => unsafe {
                mapping.as_ptr().add(at(patch.address)).write_bytes(0, patch.length as usize);
            },
            Source::File { file, offset } => reads.push((file, offset, at(patch.address), patch.length)),
        }
    }
    reads.sort_unstable();
    for batch in reads.chunk_by(|one, next| one.0 == next.0 && one.1 + one.3 == next.1) {
        read(mapping, batch, files)?;
    }
    free.iter().for_each(|&(start, length)| mapping.prefer_huge_pages_in(start, length));
    Ok(())
}

/// What is between extents and has room for huge pages: offsets in the mapping and lengths.
fn free(extents: &[Extent], ram: &Ram) -> Vec<(usize, usize)> {
    let mut free = Vec::new();
    let mut from = 0;
    let ends = extents.iter().map(|extent| ((extent.address - ram.start_addr().0) as usize, extent.length as usize));
    for (at, length) in ends.chain([(ram.mapping().size(), 0)]) {
        if at - from >= HUGE_PAGE {
            free.push((from, at - from));
        }
        from = at + length;
    }
    free
}

/// Reads what is one range in a file into the places where it belongs. Of each: the file, the offset in it, the
/// offset in the mapping, the length.
fn read(mapping: &Mapping, batch: &[(usize, u64, usize, u64)], files: &[&File]) -> Result<(), Error> {
    let Some(&(file, mut offset, ..)) = batch.first() else { return Ok(()) };
    let buffer = |&(_, _, at, length): &(usize, u64, usize, u64)| {
        // SAFETY: the ranges are in the mapping, which nobody else has yet, and do not overlap each other.
        IoSliceMut::new(unsafe { std::slice::from_raw_parts_mut(mapping.as_ptr().add(at), length as usize) })
    };
    let mut buffers: Vec<IoSliceMut<'_>> = batch.iter().map(buffer).collect();
    let mut rest = &mut buffers[..];
    while !rest.is_empty() {
        let count = rest.len().min(MAX_BUFFERS) as libc::c_int;
        // SAFETY: an `IoSliceMut` has the layout of an iovec, and all of them are writable memory.
        let read = unsafe { libc::preadv(files[file].as_raw_fd(), rest.as_ptr().cast(), count, offset as libc::off_t) };
        let source = match usize::try_from(read) {
            Ok(0) => io::ErrorKind::UnexpectedEof.into(),
            Ok(read) => {
                IoSliceMut::advance_slices(&mut rest, read);
                offset += read as u64;
                continue;
            }
            Err(_) => io::Error::last_os_error(),
        };
        if source.kind() != io::ErrorKind::Interrupted {
            return Err(Error::File { file, source });
        }
    }
    Ok(())
}

impl Piece {
    fn end(&self) -> u64 {
        self.address + self.length
    }
}

impl Extent {
    /// What a piece at `address` would have as its source if it belonged to this extent.
    fn source_at(&self, address: u64) -> Source {
        Source::File { file: self.file, offset: self.offset.saturating_add(address - self.address) }
    }
}

#[cfg(test)]
mod tests;
