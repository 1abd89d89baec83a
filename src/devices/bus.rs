use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use super::BusDevice;

/// An address space (ports, or memory where there is no RAM) and the devices in it.
///
/// Where there is no device, reads give all ones and writes go nowhere, as on a PC. The same holds for an
/// access that reaches beyond a device's end, and for a device whose lock a panic has poisoned.
#[derive(Default)]
pub struct Bus {
    devices: BTreeMap<u64, (u64, Arc<Mutex<dyn BusDevice>>)>,
}

/// Two devices want the same addresses, or one wants none or more than there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no device can be put at {base:#x} with a length of {length:#x}: the addresses are taken or make no sense")]
pub struct Overlap {
    /// The first address that was asked for.
    pub base: u64,
    /// How many.
    pub length: u64,
}

impl Bus {
    /// Puts a device at `base`.
    pub fn insert(&mut self, base: u64, length: u64, device: Arc<Mutex<dyn BusDevice>>) -> Result<(), Overlap> {
        let refused = Overlap { base, length };
        let end = base.checked_add(length).filter(|&end| end > base).ok_or(refused)?;
        // Devices do not overlap each other, so the last one that begins before `end` reaches furthest.
        if self.devices.range(..end).next_back().is_some_and(|(&other, (length, _))| other + length > base) {
            return Err(refused);
        }
        self.devices.insert(base, (length, device));
        Ok(())
    }

    /// The guest reads `data.len()` bytes at `address`.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()).map(|(offset, device)| (offset, device.lock())) {
            Some((offset, Ok(mut device))) => device.read(offset, data),
            _ => data.fill(0xff),
        }
    }

    /// The guest writes `data` at `address`.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address, data.len())
            && let Ok(mut device) = device.lock()
        {
            device.write(offset, data);
        }
    }

    fn find(&self, address: u64, length: usize) -> Option<(u64, &Mutex<dyn BusDevice>)> {
        let (base, (space, device)) = self.devices.range(..=address).next_back()?;
        let offset = address - base;
        let end = offset.checked_add(length as u64)?;
        (end <= *space).then_some((offset, &**device))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Eight bytes of storage.
    struct Bytes([u8; 8]);

    impl BusDevice for Bytes {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.copy_from_slice(&self.0[offset as usize..][..data.len()]);
        }

        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0[offset as usize..][..data.len()].copy_from_slice(data);
        }
    }

    fn bytes() -> Arc<Mutex<dyn BusDevice>> {
        Arc::new(Mutex::new(Bytes(*b"01234567")))
    }

    #[test]
    fn devices_cannot_overlap() {
        let mut bus = Bus::default();
        bus.insert(0x100, 8, bytes()).unwrap();
        for (base, length) in [(0x100, 8), (0xff, 2), (0x107, 1), (0x0, 0x1000), (0x200, 0), (u64::MAX, 2)] {
            assert_eq!(bus.insert(base, length, bytes()), Err(Overlap { base, length }));
        }
        bus.insert(0x108, 8, bytes()).unwrap();
        bus.insert(0xf8, 8, bytes()).unwrap();
    }

    #[test]
    fn an_access_reaches_one_device_or_none() {
        let mut bus = Bus::default();
        bus.insert(0x100, 8, bytes()).unwrap();
        bus.insert(0x108, 8, bytes()).unwrap();
        bus.write(0x104, b"ab");
        bus.write(0x10f, b"xy");
        let read = |address| {
            let mut data = [0; 2];
            bus.read(address, &mut data);
            data
        };
        assert_eq!((read(0x104), read(0x106), read(0x10e)), (*b"ab", *b"67", *b"67"));
        for unknown in [0, 0xff, 0x107, 0x10f, 0x110, u64::MAX] {
            assert_eq!(read(unknown), [0xff; 2], "{unknown:#x}");
        }
    }
}
