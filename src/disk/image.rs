//! A chain of files, opened by imago, as a [`Disk`].

use std::io;
use std::sync::Arc;

use imago::io_buffers::{IoVector, IoVectorMut};
use imago::{FormatAccess, ShallowMapping};

use super::fenced::Fenced;
use super::freed::Freed;
use super::layout::CLUSTER;
use super::{Buffer, Disk};

/// The most pieces that preadv(2) and pwritev(2) take at once (`IOV_MAX`).
const MAX_PIECES: usize = 1024;

/// The most pieces of a discarded range whose space is given back; the rest is only used again.
const MAX_RANGES: usize = 4096;

/// An opened chain.
pub(super) struct Image {
    top: FormatAccess<Fenced>,
    len: u64,
    /// Clusters of the top file that wait to be given back.
    freed: Arc<Freed>,
}

/// Where a piece of the disk lies in the top file.
struct Piece {
    guest: u64,
    host: u64,
    length: u64,
}

impl Image {
    /// A raw file's last sector, if it is not whole, is out of the guest's reach.
    pub(super) fn new(top: FormatAccess<Fenced>, freed: Arc<Freed>) -> Image {
        Image { len: top.size() / 512 * 512, top, freed }
    }

    /// Lets imago discard something, and finds out which clusters became free by it. `discard` must not write
    /// data: imago could put it into a cluster that it has just freed, and we would take that for free still.
    fn discarding(
        &mut self,
        offset: u64,
        length: u64,
        discard: impl FnOnce(&mut FormatAccess<Fenced>) -> io::Result<()>,
    ) -> io::Result<()> {
        let before = self.pieces(offset, length)?;
        discard(&mut self.top)?;
        for piece in before {
            // Only what reads as zeros now, all of it, is really gone from the table.
            let (now, length) = self.top.get_shallow_mapping(piece.guest, piece.length)?;
            if matches!(now, ShallowMapping::Zero { .. }) && length == piece.length {
                self.freed.add(piece.host..piece.host + piece.length);
            }
        }
        Ok(())
    }

    /// Where the whole clusters of this range lie that are in the top file.
    fn pieces(&self, offset: u64, length: u64) -> io::Result<Vec<Piece>> {
        let mut pieces = Vec::new();
        let (mut at, end) = whole_clusters(offset, length);
        while at < end && pieces.len() < MAX_RANGES {
            let (mapping, length) = self.top.get_shallow_mapping(at, end - at)?;
            if let ShallowMapping::Raw { offset: host, writable: true, .. } = mapping {
                pieces.push(Piece { guest: at, host, length });
            }
            if length == 0 {
                break;
            }
            at += length;
        }
        Ok(pieces)
    }

    fn check(&self, offset: u64, length: u64) -> io::Result<()> {
        match offset.checked_add(length) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "beyond the end of the disk")),
        }
    }

    /// Checks a transfer, and splits it into portions with their offsets.
    fn portions<'a, 'b>(
        &self,
        buffers: &'a [Buffer<'b>],
        mut offset: u64,
    ) -> io::Result<impl Iterator<Item = (&'a [Buffer<'b>], u64)> + use<'a, 'b>> {
        self.check(offset, length(buffers))?;
        Ok(buffers.chunks(MAX_PIECES).map(move |portion| {
            let at = offset;
            offset += length(portion);
            (portion, at)
        }))
    }
}

fn length(buffers: &[Buffer<'_>]) -> u64 {
    buffers.iter().map(|buffer| buffer.len() as u64).sum()
}

impl Disk for Image {
    fn len(&self) -> u64 {
        self.len
    }

    fn read(&mut self, into: &[Buffer<'_>], offset: u64) -> io::Result<()> {
        for (portion, offset) in self.portions(into, offset)? {
            // The guard keeps the memory mapped, and marks it dirty when it goes.
            let (vector, _guard) = IoVectorMut::from_volatile_slice(portion);
            self.top.readv(vector, offset)?;
        }
        Ok(())
    }

    fn write(&mut self, from: &[Buffer<'_>], offset: u64) -> io::Result<()> {
        for (portion, offset) in self.portions(from, offset)? {
            let (vector, _guard) = IoVector::from_volatile_slice(portion);
            self.top.writev(vector, offset)?;
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        // Tables that are only in memory go to the kernel, then everything goes to the disk.
        self.top.flush()?;
        self.top.sync()
    }

    fn discard(&mut self, offset: u64, length: u64) -> io::Result<()> {
        self.check(offset, length)?;
        // Whole clusters only; what is left at the ends reads as before.
        self.discarding(offset, length, |top| top.discard_to_any(offset, length))
    }

    fn write_zeroes(&mut self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        self.check(offset, length)?;
        let (start, end) = whole_clusters(offset, length);
        if !unmap || start >= end {
            return self.top.write_zeroes(offset, length);
        }
        self.discarding(start, end - start, |top| top.discard_to_zero(start, end - start))?;
        self.top.write_zeroes(offset, start - offset)?;
        self.top.write_zeroes(end, offset + length - end)
    }
}

/// The whole clusters of a range, as start and end; the start is not below the end when there are none.
fn whole_clusters(offset: u64, length: u64) -> (u64, u64) {
    (offset.next_multiple_of(CLUSTER), (offset + length) / CLUSTER * CLUSTER)
}
