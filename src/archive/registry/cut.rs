//! Where a file is cut into pieces.
//!
//! The file of a memory holds the pages that are not zeros, one behind the other; a disk's has its tables and then
//! the clusters that are not zeros, in the order of the guest's addresses. One more of them moves all that follow. So
//! the cuts go by the guest's addresses: what lies in one span of these is one piece, however many bytes that are.

use std::ops::ControlFlow;

use crate::archive::Error;
use crate::disk::CLUSTER;
use crate::snapshot::memory::{INDEX, Index};
use crate::snapshot::{Disk, Manifest, Role};
use crate::store::{Snapshot, Store};

/// The smallest span, in bytes: a page or two that change carry this much with them. Half of it would save a tenth of
/// what an idle guest's second snapshot sends, for twice as many requests.
const SPAN: u64 = 128 << 10;
/// The most spans of one disk or memory: with the largest, larger pieces are better than so many.
const MAX_SPANS: u64 = 8192;
/// The length of the pieces of other files.
const PLAIN: u64 = super::MAX_CHUNK;

/// How a file is cut.
pub(super) struct Lengths {
    pub(super) span: u64,
    pub(super) lengths: Vec<u64>,
}

/// The pieces of all files of a snapshot that needs no other.
pub(super) fn cut(store: &Store, snapshot: &Snapshot) -> Result<Vec<Lengths>, Error> {
    let manifest = &snapshot.manifest;
    let one = |file: &crate::snapshot::File| {
        let disk = manifest.disks.iter().find(|disk| disk.file == file.name);
        match (file.role, disk) {
            (Role::Memory, _) => of_memory(snapshot, file.size),
            (Role::Disk, Some(disk)) => of_disk(store, snapshot, disk, file.size),
            _ => Ok(Lengths { span: PLAIN, lengths: even(file.size, PLAIN) }),
        }
    };
    manifest.files.iter().map(one).collect()
}

fn of_memory(snapshot: &Snapshot, size: u64) -> Result<Lengths, Error> {
    let span = memory_span(&snapshot.manifest);
    let mut spans = Spans::new(span);
    if snapshot.manifest.file(Role::MemoryIndex).is_some_and(|index| index.name == INDEX) {
        for run in Index::read(&snapshot.dir)?.runs().iter().filter(|run| run.offset.is_some()) {
            spans.add(run.address, run.length);
        }
    }
    Ok(Lengths { span, lengths: spans.behind(size, span) })
}

fn of_disk(store: &Store, snapshot: &Snapshot, disk: &Disk, size: u64) -> Result<Lengths, Error> {
    let span = disk_span(disk);
    let mut spans = Spans::new(span);
    store.read_disk(snapshot, disk, &mut |at, bytes| {
        spans.add(at, (bytes.len() as u64).next_multiple_of(CLUSTER));
        ControlFlow::Continue(())
    })?;
    Ok(Lengths { span, lengths: spans.behind(size, CLUSTER) })
}

fn memory_span(manifest: &Manifest) -> u64 {
    span(manifest.machine.as_ref().map_or(0, |machine| machine.memory))
}

fn disk_span(disk: &Disk) -> u64 {
    span(disk.virtual_size)
}

/// It goes by what does not change from one snapshot to the next.
fn span(size: u64) -> u64 {
    (size / MAX_SPANS).checked_next_power_of_two().unwrap_or(u64::MAX).clamp(SPAN, super::MAX_CHUNK)
}

/// Lengths that make up `size`: all of one length, but for the last.
fn even(size: u64, length: u64) -> Vec<u64> {
    (0..size).step_by(length as usize).map(|at| length.min(size - at)).collect()
}

/// How many bytes of a file lie in each span.
struct Spans {
    span: u64,
    current: Option<u64>,
    lengths: Vec<u64>,
}

impl Spans {
    fn new(span: u64) -> Spans {
        Spans { span, current: None, lengths: Vec::new() }
    }

    fn add(&mut self, address: u64, length: u64) {
        for (number, part) in parts(self.span, address, length) {
            match self.lengths.last_mut() {
                Some(last) if self.current == Some(number) => *last += part,
                _ => self.lengths.push(part),
            }
            self.current = Some(number);
        }
    }

    /// The lengths, behind what else is at the beginning of a file of this size, in pieces of `front`. A file that is
    /// not as we make them has other bytes there; whatever comes of it, the lengths make up its size.
    fn behind(self, size: u64, front: u64) -> Vec<u64> {
        match size.checked_sub(self.lengths.iter().sum()) {
            Some(before) => even(before, front).into_iter().chain(self.lengths).collect(),
            None => even(size, self.span),
        }
    }
}

/// The parts of a range of addresses that lie in one span each, with the spans' numbers.
fn parts(span: u64, mut address: u64, mut length: u64) -> impl Iterator<Item = (u64, u64)> {
    std::iter::from_fn(move || {
        let number = address / span;
        let part = length.min(span - address % span);
        (address, length) = (address.wrapping_add(part), length - part);
        (part > 0).then_some((number, part))
    })
}

/// Cuts what is read of a disk or a memory, as the file would be cut that holds it.
struct Cutter<'a> {
    span: u64,
    current: Option<u64>,
    piece: Vec<u8>,
    each: &'a mut dyn FnMut(&[u8]) -> ControlFlow<()>,
}

impl Cutter<'_> {
    fn feed(&mut self, address: u64, bytes: &[u8]) -> ControlFlow<()> {
        let mut from = 0;
        for (number, part) in parts(self.span, address, bytes.len() as u64) {
            if self.current != Some(number) {
                self.flush()?;
                self.current = Some(number);
            }
            let to = from + part as usize;
            self.piece.extend_from_slice(&bytes[from..to]);
            from = to;
        }
        ControlFlow::Continue(())
    }

    fn flush(&mut self) -> ControlFlow<()> {
        let flow = if self.piece.is_empty() { ControlFlow::Continue(()) } else { (self.each)(&self.piece) };
        self.piece.clear();
        flow
    }
}

/// Gives the pieces of a disk of any snapshot, chains and all, as they would be in a file of its own.
pub(super) fn pieces_of_disk(
    store: &Store,
    snapshot: &Snapshot,
    disk: &Disk,
    span: u64,
    each: &mut dyn FnMut(&[u8]) -> ControlFlow<()>,
) -> Result<(), Error> {
    let mut cutter = Cutter { span, current: None, piece: Vec::new(), each };
    let mut last = Vec::new();
    store.read_disk(snapshot, disk, &mut |at, bytes| {
        if (bytes.len() as u64).is_multiple_of(CLUSTER) {
            return cutter.feed(at, bytes);
        }
        last = bytes.to_vec();
        last.resize(bytes.len().next_multiple_of(CLUSTER as usize), 0);
        cutter.feed(at, &last)
    })?;
    // Whoever breaks has all that is wanted.
    let _ = cutter.flush();
    Ok(())
}

/// The same of a memory.
pub(super) fn pieces_of_memory(
    store: &Store,
    snapshot: &Snapshot,
    span: u64,
    each: &mut dyn FnMut(&[u8]) -> ControlFlow<()>,
) -> Result<(), Error> {
    let mut cutter = Cutter { span, current: None, piece: Vec::new(), each };
    store.read_memory(snapshot, &mut |at, bytes| cutter.feed(at, bytes))?;
    let _ = cutter.flush();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts_go_by_addresses_and_lengths_make_up_the_file() {
        let mut spans = Spans::new(100);
        spans.add(0, 10);
        spans.add(90, 20);
        spans.add(150, 10);
        spans.add(350, 300);
        assert_eq!(spans.lengths, [20, 20, 50, 100, 100, 50]);
        assert_eq!(spans.behind(350, 4), [4, 4, 2, 20, 20, 50, 100, 100, 50]);
        let mut odd = Spans::new(100);
        odd.add(0, 500);
        assert_eq!(odd.behind(250, 4), [100, 100, 50]);
        assert_eq!(even(0, 4), [0; 0]);
        let mut most = Spans::new(4096);
        most.add(u64::MAX - 4095, 4095);
        assert_eq!(most.lengths, [4095]);
    }

    #[test]
    fn what_is_read_is_cut_as_the_file_is() {
        let mut found = Vec::new();
        let mut each = |piece: &[u8]| {
            found.push(piece.to_vec());
            ControlFlow::Continue(())
        };
        let mut cutter = Cutter { span: 100, current: None, piece: Vec::new(), each: &mut each };
        for (at, length, byte) in [(0, 10, 1u8), (90, 20, 2), (150, 10, 3), (350, 60, 4)] {
            assert!(cutter.feed(at, &vec![byte; length]).is_continue());
        }
        assert!(cutter.flush().is_continue());
        let lengths: Vec<_> = found.iter().map(Vec::len).collect();
        assert_eq!(lengths, [20, 20, 50, 10]);
        assert_eq!(found[1], [[2; 10], [3; 10]].concat());
    }

    #[test]
    fn spans_grow_with_what_they_cover_and_with_nothing_else() {
        let sizes = [0, 256 << 20, 1 << 30, (1 << 30) + 1, 4 << 30, 16 << 30, 64 << 30, u64::MAX];
        let spans = sizes.map(|size: u64| span(size) >> 10);
        assert_eq!(spans, [128, 128, 128, 128, 512, 2048, 4096, 4096]);
    }
}
