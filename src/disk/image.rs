//! A chain of files, opened by imago, as a [`Disk`].
//!
//! Invariants: the top is nobody else's, and is the only file that is written to by the guest. Layers that were
//! the top before, and whose tables are partly in memory still, are `unsealed`; a flush takes them first, for what
//! the guest wrote before a swap has to be as durable as what it wrote after.
//!
//! ```text
//!               swap                          seal
//! top: A  ────────────►  top: B, unsealed: A  ────►  top: B, and A never changes again
//! ```

use std::any::Any;
use std::io;
use std::mem;
use std::sync::Arc;

use imago::io_buffers::{IoVector, IoVectorMut};
use imago::{FormatAccess, ShallowMapping};

use super::chain::{Layer, Overlay};
use super::fenced::Fenced;
use super::flatten::Flattened;
use super::layout::CLUSTER;
use super::swap::Prepared;
use super::{Buffer, Disk, Error};
use crate::sys::files::At;

/// The most pieces that preadv(2) and pwritev(2) take at once (`IOV_MAX`).
const MAX_PIECES: usize = 1024;

/// The most pieces of a discarded range whose space is given back; the rest is only used again.
const MAX_RANGES: usize = 4096;

/// An opened chain.
pub(super) struct Image {
    top: Layer,
    len: u64,
    /// Lowest first. More than one when a layer could not be sealed.
    unsealed: Vec<Layer>,
}

/// Where a piece of the disk lies in the top file.
struct Piece {
    guest: u64,
    host: u64,
    length: u64,
}

impl Image {
    /// A raw file's last sector, if it is not whole, is out of the guest's reach.
    pub(super) fn new(top: Layer) -> Image {
        Image { len: top.access.size() / 512 * 512, top, unsealed: Vec::new() }
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
        discard(alone(&mut self.top.access)?)?;
        for piece in before {
            // Only what reads as zeros now, all of it, is really gone from the table.
            let (now, length) = self.top.access.get_shallow_mapping(piece.guest, piece.length)?;
            if matches!(now, ShallowMapping::Zero { .. }) && length == piece.length {
                self.top.fence.freed().add(piece.host..piece.host + piece.length);
            }
        }
        Ok(())
    }

    /// Where the whole clusters of this range lie that are in the top file.
    fn pieces(&self, offset: u64, length: u64) -> io::Result<Vec<Piece>> {
        let mut pieces = Vec::new();
        let (mut at, end) = whole_clusters(offset, length);
        while at < end && pieces.len() < MAX_RANGES {
            let (mapping, length) = self.top.access.get_shallow_mapping(at, end - at)?;
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
            self.top.access.readv(vector, offset)?;
        }
        Ok(())
    }

    fn write(&mut self, from: &[Buffer<'_>], offset: u64) -> io::Result<()> {
        for (portion, offset) in self.portions(from, offset)? {
            let (vector, _guard) = IoVector::from_volatile_slice(portion);
            self.top.access.writev(vector, offset)?;
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.unsealed.iter().chain([&self.top]).try_for_each(flush)
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
            return self.top.access.write_zeroes(offset, length);
        }
        self.discarding(start, end - start, |top| top.discard_to_zero(start, end - start))?;
        self.top.access.write_zeroes(offset, start - offset)?;
        self.top.access.write_zeroes(end, offset + length - end)
    }

    fn swap(&mut self, prepared: &mut Prepared) -> Result<(), Error> {
        let refuse = |why: &str| Err(Error::refused(&self.top.path, why));
        let driver = self.top.access.inner();
        if !driver.writable() || !(driver as &dyn Any).is::<Overlay>() {
            return refuse("only a qcow2 disk that is written to can get a new top");
        }
        if !prepared.fits(&self.top, self.len) {
            return refuse("the new top was prepared for another disk");
        }
        let Some((mut overlay, fence)) = prepared.take() else { return refuse("the new top is in use already") };
        overlay.set_backing(Some(Arc::clone(&self.top.access)));
        let path = mem::replace(&mut self.top.path, prepared.layer().into());
        let top = Layer { path, access: Arc::new(FormatAccess::new(overlay)), fence };
        self.unsealed.push(mem::replace(&mut self.top, top));
        Ok(())
    }

    fn seal(&mut self) -> Result<(), Error> {
        while let Some(layer) = self.unsealed.first() {
            flush(layer).and_then(|()| layer.fence.seal()).at("seal", &layer.path)?;
            self.unsealed.remove(0);
        }
        Ok(())
    }

    fn adopt(&mut self, flattened: &mut Flattened) -> Result<(), Error> {
        let path = self.top.path.clone();
        if !self.unsealed.is_empty() || !flattened.fits(&self.top) {
            return Err(Error::refused(&path, "the layers were flattened for another disk"));
        }
        let driver = alone(&mut self.top.access).at("change", &path)?.inner_mut() as &mut dyn Any;
        let Some(overlay) = driver.downcast_mut::<Overlay>() else {
            return Err(Error::refused(&path, "it is not a qcow2 disk"));
        };
        let Some(below) = flattened.take() else { return Err(Error::refused(&path, "the layers are used already")) };
        // Whichever name the header has when the writing of it fails, it leads to the same content.
        self.top.fence.change_header(|sector| flattened.rename(sector)).at("change", &path)?;
        overlay.set_backing(Some(below));
        flattened.adopted();
        Ok(())
    }
}

/// Tables that are only in memory go to the kernel, then everything goes to the disk.
fn flush(layer: &Layer) -> io::Result<()> {
    layer.access.flush()?;
    layer.access.sync()
}

/// The image of a layer that nothing else reads through.
fn alone(access: &mut Arc<FormatAccess<Fenced>>) -> io::Result<&mut FormatAccess<Fenced>> {
    Arc::get_mut(access).ok_or_else(|| io::Error::other("the disk's top is shared"))
}

/// The whole clusters of a range, as start and end; the start is not below the end when there are none.
fn whole_clusters(offset: u64, length: u64) -> (u64, u64) {
    (offset.next_multiple_of(CLUSTER), (offset + length) / CLUSTER * CLUSTER)
}
