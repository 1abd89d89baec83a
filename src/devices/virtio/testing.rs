//! A small driver for tests: it does what a guest's driver does, and whatever else it is told to.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress, ReadVolatile, WriteVolatile};

use super::VirtioDevice;
use super::mmio::Mmio;
use super::state::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, MmioState};
use crate::devices::BusDevice;
use crate::devices::testing::Counter;
use crate::disk::{Buffer, Disk};
use crate::mem::GuestMemory;

pub const NEXT: u16 = VRING_DESC_F_NEXT as u16;
pub const WRITE: u16 = VRING_DESC_F_WRITE as u16;

pub const DESC: u64 = 0x1000;
pub const AVAIL: u64 = 0x3000;
pub const USED: u64 = 0x4000;
/// Where one region of memory ends and the next begins.
pub const SEAM: u64 = 0x10_0000;
/// The end of all memory.
pub const END: u64 = 0x20_0000;

/// Two regions, side by side, with a seam between.
pub fn memory() -> GuestMemory {
    crate::mem::from_ranges(&[(GuestAddress(0), SEAM), (GuestAddress(SEAM), END - SEAM)]).unwrap()
}

pub struct Driver<D> {
    pub mmio: Mmio<D>,
    pub mem: GuestMemory,
    pub line: Arc<Counter>,
    pub submitted: u16,
    seen: u16,
}

impl<D: VirtioDevice> Driver<D> {
    /// A device that nobody touched yet.
    pub fn cold(device: D) -> Driver<D> {
        let (mem, line) = (memory(), Arc::new(Counter::default()));
        let mmio = Mmio::new(MmioState::default(), device, mem.clone(), line.clone()).unwrap();
        Driver { mmio, mem, line, submitted: 0, seen: 0 }
    }

    /// A device that is in use with all that it offers beside `without` (feature bits).
    pub fn started(device: D, without: u64) -> Driver<D> {
        let mut driver = Driver::cold(device);
        driver.negotiate(without);
        driver.set_up_queue(DESC, AVAIL, USED);
        driver.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        assert!(driver.mmio.is_active());
        driver
    }

    pub fn negotiate(&mut self, without: u64) {
        self.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE);
        self.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER);
        for half in 0..2 {
            self.set(VIRTIO_MMIO_DEVICE_FEATURES_SEL, half);
            let offered = self.get(VIRTIO_MMIO_DEVICE_FEATURES);
            self.set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
            self.set(VIRTIO_MMIO_DRIVER_FEATURES, offered & !(without >> (32 * half)) as u32);
        }
        self.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    }

    pub fn set_up_queue(&mut self, desc: u64, avail: u64, used: u64) {
        self.set(VIRTIO_MMIO_QUEUE_SEL, 0);
        self.set(VIRTIO_MMIO_QUEUE_NUM, 16);
        for (register, address) in [
            (VIRTIO_MMIO_QUEUE_DESC_LOW, desc),
            (VIRTIO_MMIO_QUEUE_AVAIL_LOW, avail),
            (VIRTIO_MMIO_QUEUE_USED_LOW, used),
        ] {
            self.set(register, address as u32);
            self.set(register + 4, (address >> 32) as u32);
        }
        self.set(VIRTIO_MMIO_QUEUE_READY, 1);
    }

    pub fn get(&mut self, register: u32) -> u32 {
        let mut data = [0; 4];
        self.mmio.read(register.into(), &mut data);
        u32::from_le_bytes(data)
    }

    pub fn set(&mut self, register: u32, value: u32) {
        self.mmio.write(register.into(), &value.to_le_bytes());
    }

    /// Writes descriptor `index` of the table at `table`.
    pub fn descriptor(&self, table: u64, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let at = table + 16 * u64::from(index);
        self.mem.write_obj(address, GuestAddress(at)).unwrap();
        self.mem.write_obj(length, GuestAddress(at + 8)).unwrap();
        self.mem.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.mem.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Makes the chain at `head` available.
    pub fn submit(&mut self, head: u16) {
        self.mem.write_obj(head, GuestAddress(AVAIL + 4 + 2 * u64::from(self.submitted % 16))).unwrap();
        self.submitted = self.submitted.wrapping_add(1);
        self.mem.write_obj(self.submitted, GuestAddress(AVAIL + 2)).unwrap();
    }

    /// Rings, and does the worker's part until no doorbell rings any more.
    pub fn notify(&mut self) {
        self.set(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
        self.serve();
    }

    pub fn serve(&mut self) {
        while self.mmio.doorbells()[0].read().is_ok() {
            self.mmio.queue_ready(0);
        }
    }

    /// The next chain that the device gave back: its head, and how many bytes it wrote.
    pub fn used(&mut self) -> Option<(u32, u32)> {
        let index: u16 = self.mem.read_obj(GuestAddress(USED + 2)).unwrap();
        if index == self.seen {
            return None;
        }
        let at = USED + 4 + 8 * u64::from(self.seen % 16);
        self.seen = self.seen.wrapping_add(1);
        Some((self.mem.read_obj(GuestAddress(at)).unwrap(), self.mem.read_obj(GuestAddress(at + 4)).unwrap()))
    }

    /// Sends `out`, cut into pieces of the given lengths, and room for an answer, cut likewise. Returns the
    /// answer and how much of it was written. The data lies astride the seam between the regions.
    pub fn exchange(&mut self, out: &[u8], cuts: &[usize], room: &[usize]) -> (Vec<u8>, u32) {
        let start = SEAM - 10;
        self.mem.write_slice(out, GuestAddress(start)).unwrap();
        let answer = start + out.len() as u64;
        let total: usize = room.iter().sum();
        self.mem.write_slice(&vec![0xaa; total], GuestAddress(answer)).unwrap();
        let pieces = cuts.iter().map(|&length| (length, 0)).chain(room.iter().map(|&length| (length, WRITE)));
        let count = cuts.len() + room.len();
        let mut address = start;
        for (index, (length, flags)) in pieces.enumerate() {
            let next = if index + 1 < count { NEXT } else { 0 };
            self.descriptor(DESC, index as u16, address, length as u32, flags | next, index as u16 + 1);
            address += length as u64;
        }
        assert_eq!(address, answer + total as u64, "the cuts do not add up");
        self.submit(0);
        self.notify();
        let (head, written) = self.used().expect("an answer");
        assert_eq!(head, 0);
        let mut data = vec![0; total];
        self.mem.read_slice(&mut data, GuestAddress(answer)).unwrap();
        (data, written)
    }
}

/// A file in memory where there is such a place, for tests that flush ten thousand times.
fn blank() -> File {
    tempfile::tempfile_in("/dev/shm").or_else(|_| tempfile::tempfile()).unwrap()
}

/// A raw disk image.
pub struct RawDisk {
    file: File,
    length: u64,
    pub flushes: Arc<AtomicU32>,
}

impl RawDisk {
    /// A disk of so many sectors, each filled with its number (its lowest byte).
    pub fn new(sectors: u64) -> (RawDisk, File) {
        let file = blank();
        for sector in 0..sectors {
            file.write_all_at(&[sector as u8; 512], sector * 512).unwrap();
        }
        let disk = RawDisk { file: file.try_clone().unwrap(), length: sectors * 512, flushes: Arc::default() };
        (disk, file)
    }

    /// A large disk of zeros that takes no space.
    pub fn sparse(length: u64) -> RawDisk {
        let file = blank();
        file.set_len(length).unwrap();
        RawDisk { file, length, flushes: Arc::default() }
    }

    fn check(&self, offset: u64, length: u64) -> io::Result<()> {
        let end = offset.checked_add(length).filter(|&end| end <= self.length);
        end.map(|_| ()).ok_or(io::ErrorKind::InvalidInput.into())
    }
}

impl Disk for RawDisk {
    fn len(&self) -> u64 {
        self.length
    }

    fn read(&mut self, into: &[Buffer<'_>], offset: u64) -> io::Result<()> {
        self.check(offset, into.iter().map(|slice| slice.len() as u64).sum())?;
        io::Seek::seek(&mut self.file, io::SeekFrom::Start(offset))?;
        into.iter().try_for_each(|slice| self.file.read_exact_volatile(&mut slice.clone())).map_err(io::Error::other)
    }

    fn write(&mut self, from: &[Buffer<'_>], offset: u64) -> io::Result<()> {
        self.check(offset, from.iter().map(|slice| slice.len() as u64).sum())?;
        io::Seek::seek(&mut self.file, io::SeekFrom::Start(offset))?;
        from.iter().try_for_each(|slice| self.file.write_all_volatile(slice)).map_err(io::Error::other)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.flushes.fetch_add(1, Ordering::Relaxed);
        self.file.sync_data()
    }

    fn discard(&mut self, offset: u64, length: u64) -> io::Result<()> {
        self.write_zeroes(offset, length, true)
    }

    fn write_zeroes(&mut self, offset: u64, length: u64, _unmap: bool) -> io::Result<()> {
        self.check(offset, length)?;
        self.file.write_all_at(&vec![0; length as usize], offset)
    }
}
