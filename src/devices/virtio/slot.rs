//! What the bus sees of a virtio device.
//!
//! The guest's interrupt handler reads and acknowledges the interrupt status. It must not wait for that
//! until a worker is done with, say, a flush to the disk: so these two registers are reached without the
//! device's lock, and everything else with it.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS};

use super::VirtioDevice;
use super::mmio::Mmio;
use crate::devices::BusDevice;

const STATUS: u64 = VIRTIO_MMIO_INTERRUPT_STATUS as u64;
const ACK: u64 = VIRTIO_MMIO_INTERRUPT_ACK as u64;

/// A device on the bus.
pub struct Slot<D> {
    device: Arc<Mutex<Mmio<D>>>,
    interrupt_status: Arc<AtomicU32>,
}

impl<D: VirtioDevice> Slot<D> {
    /// Puts a device into a slot. `None` when a panic left its lock poisoned.
    pub fn new(device: Arc<Mutex<Mmio<D>>>) -> Option<Slot<D>> {
        let interrupt_status = device.lock().ok()?.interrupt_status().clone();
        Some(Slot { device, interrupt_status })
    }
}

impl<D: VirtioDevice> BusDevice for Slot<D> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if (offset, data.len()) == (STATUS, 4) {
            data.copy_from_slice(&self.interrupt_status.load(Ordering::Acquire).to_le_bytes());
        } else if let Ok(mut device) = self.device.lock() {
            device.read(offset, data);
        } else {
            // As where there is no device: a panic has taken it away.
            data.fill(0xff);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (true, Ok(value)) = (offset == ACK, <[u8; 4]>::try_from(data)) {
            self.interrupt_status.fetch_and(!u32::from_le_bytes(value), Ordering::AcqRel);
        } else if let Ok(mut device) = self.device.lock() {
            device.write(offset, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::rng::{Rng, RngState};
    use crate::devices::virtio::testing::{DESC, Driver, WRITE};

    #[test]
    fn an_interrupt_is_acknowledged_while_the_device_is_at_work() {
        let mut driver = Driver::started(Rng::new(RngState::default()), 0);
        driver.descriptor(DESC, 0, 0x8000, 8, WRITE, 0);
        driver.submit(0);
        driver.notify();
        let device = Arc::new(Mutex::new(driver.mmio));
        let mut slot = Slot::new(device.clone()).unwrap();
        let mut word = |offset| {
            let mut data = [0; 4];
            slot.read(offset, &mut data);
            u32::from_le_bytes(data)
        };
        assert_eq!(word(0x0), u32::from_le_bytes(*b"virt"));
        let at_work = device.lock().unwrap();
        assert_eq!(word(STATUS), 1);
        slot.write(ACK, &1u32.to_le_bytes());
        assert_eq!(at_work.state().interrupt_status, 0);
    }
}
