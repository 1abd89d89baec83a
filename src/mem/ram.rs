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
}

impl Ram {
    /// Fresh zeroed RAM of `size` bytes at `start`, on huge pages where the host has them.
    pub fn anonymous(start: GuestAddress, size: u64) -> io::Result<Ram> {
        let size = usize::try_from(size).map_err(|_| io::ErrorKind::InvalidInput)?;
        start.0.checked_add(size as u64).ok_or(io::ErrorKind::InvalidInput)?;
        let mapping = Mapping::anonymous(size)?;
        mapping.prefer_huge_pages();
        Ok(Ram { start, mapping: Arc::new(mapping), dirty: AtomicBitmap::with_len(size) })
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
}
