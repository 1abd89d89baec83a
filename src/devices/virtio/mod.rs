//! Virtio devices (OASIS virtio 1.2) and the MMIO transport that carries them.
//!
//! [`mmio::Mmio`] holds the registers and the queues of one device and is generic over the chip behind
//! them, a [`VirtioDevice`]. A worker thread (one per device) sleeps on the queues' doorbells and on the
//! device's own file descriptor.

pub mod bay;
pub mod block;
pub mod gate;
pub mod memory;
pub mod mmio;
pub mod ring;
pub mod rng;
pub mod slot;
pub mod state;
pub mod vsock;
pub mod worker;

#[cfg(test)]
mod hostile;
#[cfg(test)]
mod testing;

use std::io;
use std::os::fd::RawFd;

use acpi_tables::aml;
use virtio_queue::Queue;

use crate::acpi;
use crate::mem::GuestMemory;

/// Saved state that no device can have been in, or wiring that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Status bits out of order.
    #[error("device status {0:#x} is not one that a driver can reach")]
    Status(u32),
    /// Features that this device does not have.
    #[error("the driver uses features {driver:#x}, the device offers {device:#x}")]
    Features {
        /// What the driver accepted.
        driver: u64,
        /// What can be offered.
        device: u64,
    },
    /// Unknown interrupt causes.
    #[error("interrupt status {0:#x} has unknown bits")]
    InterruptStatus(u32),
    /// Another device's registers.
    #[error("{found} queues were saved of a device that has {wanted}")]
    QueueCount {
        /// Queues in the saved state.
        found: usize,
        /// Queues of the device.
        wanted: usize,
    },
    /// A queue that cannot be worked with.
    #[error("queue {queue} is not usable: {cause}")]
    Queue {
        /// Its number.
        queue: usize,
        /// What is wrong with it.
        cause: virtio_queue::Error,
    },
    /// The disk under a block device is shorter than what the driver was told.
    #[error("disk `{id}` has {found} sectors, the guest was told {wanted}")]
    DiskTooShort {
        /// The disk's name.
        id: String,
        /// Sectors that there are.
        found: u64,
        /// Sectors that there must be.
        wanted: u64,
    },
    /// What a bay is said to have held.
    #[error("the saved state of `{0}` names a medium that cannot have been")]
    Medium(String),
    /// The memory device's registers.
    #[error("the saved state of the memory device is not a possible one: {0}")]
    Memory(&'static str),
    /// No doorbell could be made.
    #[error("no event descriptor for a queue's doorbell: {0}")]
    Doorbell(io::Error),
}

/// A virtio chip without its slot: it knows nothing of addresses, ports or KVM.
pub trait VirtioDevice: Send {
    /// What is saved of the chip itself; the transport saves registers and queues.
    type State;

    /// The device ID of virtio 1.2 section 5.
    const KIND: u32;

    /// The largest size of each queue, which also says how many there are.
    fn queue_sizes(&self) -> &'static [u16];

    /// The device-specific feature bits that are offered. `VIRTIO_F_VERSION_1` is added by the transport.
    fn features(&self) -> u64;

    /// The driver reads its configuration space. Beyond the end, zeros.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// The driver set `DRIVER_OK` (or a restore found it set). `features` is what was negotiated.
    fn activate(&mut self, features: u64);

    /// The driver reset the device: forget everything that `activate` and the queues brought about.
    fn reset(&mut self);

    /// The doorbell of queue number `queue` rang (or a restore rings it to be safe). Returns whether the
    /// driver must be interrupted. An `Err` is a broken ring: the transport sets `DEVICE_NEEDS_RESET`.
    fn queue_ready(
        &mut self,
        queue: usize,
        queues: &mut [Queue],
        mem: &GuestMemory,
    ) -> Result<bool, virtio_queue::Error>;

    /// A descriptor that becomes readable when the device has something to do by itself, if it has one
    /// (an epoll descriptor may gather several). The worker calls `host_ready` then.
    fn host_fd(&self) -> Option<RawFd> {
        None
    }

    /// `host_fd` is readable. Same result as `queue_ready`.
    fn host_ready(&mut self, _queues: &mut [Queue], _mem: &GuestMemory) -> Result<bool, virtio_queue::Error> {
        Ok(false)
    }

    /// Whether the last `queue_ready` or `host_ready` stopped early, so as not to keep the device's lock for
    /// long, and would go on if called again. The transport then rings every doorbell itself.
    fn unfinished(&self) -> bool {
        false
    }

    /// The chip's state, for a snapshot. No default: forgetting it must not compile.
    fn state(&self) -> Self::State;
}

/// Reads `data.len()` bytes at `offset` of a configuration space; zeros beyond its end.
pub fn read_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let rest = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)).unwrap_or_default();
    data.iter_mut().zip(rest).for_each(|(to, byte)| *to = *byte);
}

/// Describes the slot number `slot` to ACPI: Linux finds virtio over MMIO by the ID LNRO0005.
pub fn aml(slot: u32, base: u64, gsi: u32) -> Vec<u8> {
    let hid = aml::Name::new("_HID".into(), &"LNRO0005");
    let uid = aml::Name::new("_UID".into(), &slot);
    // The device's view of memory is coherent with the CPU's (ACPI 6.5, 6.2.17).
    let coherent = aml::Name::new("_CCA".into(), &aml::ONE);
    let registers = aml::Memory32Fixed::new(true, base as u32, mmio::LENGTH as u32);
    let line = aml::Interrupt::new(true, true, false, false, gsi);
    let resources = aml::Name::new("_CRS".into(), &aml::ResourceTemplate::new(vec![&registers, &line]));
    let name = format!("VR{slot:02X}");
    acpi::bytes(&aml::Device::new(name.as_str().into(), vec![&hid, &uid, &coherent, &resources]))
}
