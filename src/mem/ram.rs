use std::io;
use std::sync::Arc;

use vm_memory::bitmap::{AtomicBitmap, BS, Bitmap, NewBitmap};
use vm_memory::guest_memory::Error;
use vm_memory::{
    GuestAddress, GuestMemoryRegion, GuestMemoryRegionBytes, GuestUsize, MemoryRegionAddress, VolatileSlice,
};

use crate::sys::mmap::Mapping;

/// One contiguous range of guest RAM and the host memory behind it.
#[derive(Debug)]
pub struct Ram {
    start: GuestAddress,
    mapping: Arc<Mapping>,
    dirty: AtomicBitmap,
    anonymous: bool,
}

impl Ram {
    /// Fresh zeroed RAM of `size` bytes at `start`, on huge pages where the host has them.
    pub fn anonymous(start: GuestAddress, size: u64) -> io::Result<Ram> {
        let ram = Ram::reserve(start, size)?;
        ram.mapping.prefer_huge_pages();
        Ok(ram)
    }

    /// The same, but nothing is said about huge pages yet.
    pub(super) fn reserve(start: GuestAddress, size: u64) -> io::Result<Ram> {
        let size = usize::try_from(size).map_err(|_| io::ErrorKind::InvalidInput)?;
        start.0.checked_add(size as u64).ok_or(io::ErrorKind::InvalidInput)?;
        let mapping = Arc::new(Mapping::anonymous(size)?);
        Ok(Ram { start, mapping, dirty: AtomicBitmap::with_len(size), anonymous: true })
    }

    /// The same with saved memory in it, some of which may be `mapped` from files.
    pub(super) fn restored(self, mapped: bool) -> Ram {
        Ram { anonymous: !mapped, ..self }
    }

    /// Whether no file is mapped anywhere in it, so that a page that the host never gave is a page of zeros.
    pub fn is_anonymous(&self) -> bool {
        self.anonymous
    }

    /// The bits that are set by writing through this type.
    pub(super) fn dirty(&self) -> &AtomicBitmap {
        &self.dirty
    }

    /// Gives `length` bytes from `offset` on back to the host, both multiples of the page size. They read as
    /// zeros from then on, which counts as a change.
    pub fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        let too_large = |_| io::ErrorKind::InvalidInput;
        let (at, length) = (usize::try_from(offset).map_err(too_large)?, usize::try_from(length).map_err(too_large)?);
        if self.anonymous {
            self.mapping.forget(at, length)?;
        } else {
            // Where a file is mapped, what is forgotten would be read from it again.
            self.mapping.map_zeros(at, length)?;
            self.mapping.prefer_huge_pages_in(at, length);
        }
        self.dirty.set_addr_range(at, length);
        Ok(())
    }

    /// The host memory behind this range.
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }
}

impl GuestMemoryRegion for Ram {
    type B = AtomicBitmap;

    fn len(&self) -> GuestUsize {
        self.mapping.size() as GuestUsize
    }

    fn start_addr(&self) -> GuestAddress {
        self.start
    }

    fn bitmap(&self) -> BS<'_, AtomicBitmap> {
        self.dirty.slice_at(0)
    }

    fn get_host_address(&self, addr: MemoryRegionAddress) -> Result<*mut u8, Error> {
        let addr = self.check_address(addr).ok_or(Error::InvalidBackendAddress)?;
        Ok(self.mapping.as_ptr().wrapping_add(addr.0 as usize))
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, BS<'_, AtomicBitmap>>, Error> {
        let offset = offset.0 as usize;
        if offset.checked_add(count).is_none_or(|end| end > self.mapping.size()) {
            return Err(Error::InvalidBackendAddress);
        }
        // SAFETY: offset + count lies within the mapping, which lives as long as `self` and so as the
        // slice. The guest changes it at any time, which is why it is only reached volatilely.
        Ok(unsafe {
            VolatileSlice::with_bitmap(self.mapping.as_ptr().add(offset), count, self.dirty.slice_at(offset), None)
        })
    }
}

impl GuestMemoryRegionBytes for Ram {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mem::from_ranges;
    use vm_memory::{Bytes, GuestMemoryBackend};

    #[test]
    fn what_is_written_through_guest_memory_is_dirty_and_nothing_else() {
        let mem = from_ranges(&[(GuestAddress(0), 0x10000), (GuestAddress(0x100000), 0x10000)]).unwrap();
        mem.write_slice(&[7; 2], GuestAddress(0x102fff)).unwrap();
        let dirty: Vec<bool> = (0..16).map(|page| mem.iter().nth(1).unwrap().bitmap().dirty_at(page << 12)).collect();
        assert_eq!(dirty.iter().enumerate().filter(|(_, d)| **d).map(|(i, _)| i).collect::<Vec<_>>(), [2, 3]);
        assert_eq!(mem.read_obj::<u16>(GuestAddress(0x102fff)).unwrap(), 0x0707);
        assert!(mem.write_slice(&[1], GuestAddress(0x10000)).is_err());
        assert!(mem.find_region(GuestAddress(0)).unwrap().get_slice(MemoryRegionAddress(0xffff), 2).is_err());
        assert!(mem.find_region(GuestAddress(0)).unwrap().get_slice(MemoryRegionAddress(u64::MAX), 2).is_err());
    }
    #[test]
    fn what_is_discarded_reads_as_zeros_and_is_dirty() {
        let mem = from_ranges(&[(GuestAddress(0x10000), 0x10000)]).unwrap();
        mem.write_slice(&[7; 0x10000], GuestAddress(0x10000)).unwrap();
        let ram = mem.iter().next().unwrap();
        ram.dirty().reset();
        ram.discard(0x2000, 0x3000).unwrap();
        let (mut before, mut bytes) = ([0; 1], [1; 0x3000]);
        mem.read_slice(&mut bytes, GuestAddress(0x12000)).unwrap();
        mem.read_slice(&mut before, GuestAddress(0x11fff)).unwrap();
        assert_eq!((before, bytes), ([7], [0; 0x3000]));
        let dirty: Vec<usize> = (0..16).filter(|page| ram.bitmap().dirty_at(page << 12)).collect();
        assert_eq!(dirty, [2, 3, 4]);
        for (offset, length) in [(1, 0x1000), (0, 1), (0xf000, 0x2000), (u64::MAX, 0x1000), (0, u64::MAX)] {
            assert!(ram.discard(offset, length).is_err());
        }
    }
}
