//! A disk of which nothing is left that its user discards.

use std::io;

use super::{Buffer, Disk, Error, Flattened, Prepared};

/// Puts zeros in the place of all that is discarded. Other disks keep what is left of a cluster.
pub struct Wiping(pub Box<dyn Disk>);

impl Disk for Wiping {
    fn len(&self) -> u64 {
        self.0.len()
    }
    fn read(&mut self, into: &[Buffer<'_>], offset: u64) -> io::Result<()> {
        self.0.read(into, offset)
    }
    fn write(&mut self, from: &[Buffer<'_>], offset: u64) -> io::Result<()> {
        self.0.write(from, offset)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
    fn discard(&mut self, offset: u64, length: u64) -> io::Result<()> {
        self.0.write_zeroes(offset, length, true)
    }
    fn write_zeroes(&mut self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        self.0.write_zeroes(offset, length, unmap)
    }
    fn swap(&mut self, prepared: &mut Prepared) -> Result<(), Error> {
        self.0.swap(prepared)
    }
    fn seal(&mut self) -> Result<(), Error> {
        self.0.seal()
    }
    fn adopt(&mut self, flattened: &mut Flattened) -> Result<(), Error> {
        self.0.adopt(flattened)
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::bitmap::AtomicBitmap;
    use vm_memory::{Bytes, MmapRegion, VolatileMemory};

    use super::*;
    use crate::disk::{Access, Format, create_from_raw, create_overlay, open};

    #[test]
    fn what_is_discarded_is_zeros_in_every_byte_also_of_what_lies_below() {
        const SIZE: usize = 256 << 10;
        let dir = tempfile::tempdir().unwrap();
        let [raw, below, top] = ["raw", "below", "top"].map(|name| dir.path().join(name));
        std::fs::write(&raw, [7; SIZE]).unwrap();
        create_from_raw(&raw, &below).unwrap();
        create_overlay(&top, "below", Format::Qcow2, SIZE as u64).unwrap();
        let mut disk = Wiping(open(&top, Format::Qcow2, Access::ReadWrite, dir.path()).unwrap());
        // The end of one cluster, a whole one, and the beginning of a third.
        let (start, end) = ((64 << 10) - 4096, (128 << 10) + 4096);
        disk.discard(start as u64, (end - start) as u64).unwrap();
        let memory = MmapRegion::<AtomicBitmap>::new(SIZE).unwrap();
        let all = memory.get_slice(0, SIZE).unwrap();
        disk.read(&[all], 0).unwrap();
        let mut bytes = vec![1; SIZE];
        all.read_slice(&mut bytes, 0).unwrap();
        let wiped = |at: &usize| (start..end).contains(at);
        assert!(bytes.iter().enumerate().all(|(at, byte)| *byte == if wiped(&at) { 0 } else { 7 }));
    }
}
