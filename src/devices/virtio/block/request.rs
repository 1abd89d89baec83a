//! Requests as they come from the driver (virtio 1.2 section 5.2.6), taken apart and checked.

use std::io;

use virtio_queue::Error as RingError;

use crate::devices::virtio::ring::{Chain, Slices};

/// The unit of the protocol, whatever the disk's own blocks are.
pub const SECTOR: u64 = 512;

/// Why a request is not carried out.
pub enum Refusal {
    /// The device does not do such things.
    Unsupported,
    /// It is wrong, or the disk failed.
    Failed(io::Error),
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Refusal {
        Refusal::Failed(error)
    }
}

/// A request, taken apart.
pub struct Request<'m> {
    /// Which of `VIRTIO_BLK_T_…`.
    pub kind: u32,
    /// Where on the disk.
    pub sector: u64,
    /// Data from the driver.
    pub from: Slices<'m>,
    /// Room for data to the driver.
    pub into: Slices<'m>,
    /// Room for the status byte.
    pub status: Slices<'m>,
}

/// A part of the disk, in bytes, that a discard or write-zeroes request names.
pub struct Piece {
    /// Its beginning.
    pub offset: u64,
    /// Its length.
    pub length: u64,
    /// `VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP` was given.
    pub unmap: bool,
}

/// What a discard or write-zeroes request may be.
pub struct Limits {
    /// The most pieces in one request.
    pub pieces: usize,
    /// The most sectors in one piece.
    pub sectors: u32,
    /// The flags that are known.
    pub flags: u32,
}

impl<'m> Request<'m> {
    /// Takes a chain apart: 16 bytes of header at the beginning of what is readable, one of status at the end
    /// of what is writable, data between. Without room for those, there is no way to answer: an error.
    pub fn parse(chain: Chain<'m>) -> Result<Request<'m>, RingError> {
        let (header, from) = chain.readable.split_at(16).ok_or(RingError::InvalidChain)?;
        let room = chain.writable.len().checked_sub(1).ok_or(RingError::InvalidChain)?;
        let (into, status) = chain.writable.split_at(room).ok_or(RingError::InvalidChain)?;
        // Read once: the guest may change its memory at any time.
        let mut bytes = [0; 16];
        header.read(&mut bytes);
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = bytes;
        let (kind, sector) = (u32::from_le_bytes([k0, k1, k2, k3]), u64::from_le_bytes(sector));
        Ok(Request { kind, sector, from, into, status })
    }

    /// Where on a disk of `capacity` sectors a transfer of `length` bytes, at most `most`, begins.
    pub fn offset(&self, length: usize, most: usize, capacity: u64) -> Result<u64, Refusal> {
        if length > most || !(length as u64).is_multiple_of(SECTOR) {
            return Err(invalid("the length of the data is out of bounds"));
        }
        offset(self.sector, length as u64 / SECTOR, capacity)
    }

    /// The pieces (`struct virtio_blk_discard_write_zeroes`) of the request. If one is wrong, all are.
    pub fn pieces(&self, limits: &Limits, capacity: u64) -> Result<Vec<Piece>, Refusal> {
        const LENGTH: usize = 16;
        let length = self.from.len();
        if length == 0 || length > limits.pieces * LENGTH || !length.is_multiple_of(LENGTH) {
            return Err(invalid("the number of pieces is out of bounds"));
        }
        let mut bytes = vec![0; length];
        self.from.read(&mut bytes);
        bytes.as_chunks::<LENGTH>().0.iter().map(|bytes| Piece::parse(*bytes, limits, capacity)).collect()
    }
}

impl Piece {
    fn parse(bytes: [u8; 16], limits: &Limits, capacity: u64) -> Result<Piece, Refusal> {
        // Sector (64 bits), number of sectors (32), flags (32), all little-endian.
        let number = u128::from_le_bytes(bytes);
        let (sector, count, flags) = (number as u64, (number >> 64) as u32, (number >> 96) as u32);
        if flags & !limits.flags != 0 {
            return Err(Refusal::Unsupported);
        }
        if count > limits.sectors {
            return Err(invalid("a piece is too long"));
        }
        let offset = offset(sector, count.into(), capacity)?;
        Ok(Piece { offset, length: u64::from(count) * SECTOR, unmap: flags != 0 })
    }
}

fn offset(sector: u64, count: u64, capacity: u64) -> Result<u64, Refusal> {
    match sector.checked_add(count) {
        // No overflow: the capacity comes from a length in bytes that is a u64.
        Some(end) if end <= capacity => Ok(sector * SECTOR),
        _ => Err(invalid("the sectors lie beyond the disk's end")),
    }
}

fn invalid(what: &'static str) -> Refusal {
    Refusal::Failed(io::Error::new(io::ErrorKind::InvalidInput, what))
}
