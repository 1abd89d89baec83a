//! The guest-visible registers of the MMIO transport, which are also what a snapshot keeps of it.

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};

use super::Error;
use crate::mem::GuestMemory;

/// The driver noticed the device.
pub const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
/// The driver knows how to drive it.
pub const DRIVER: u32 = VIRTIO_CONFIG_S_DRIVER;
/// Both sides agree on features.
pub const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
/// The driver is set up: the device works.
pub const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
/// The device stopped for good, until a reset.
pub const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;
/// The driver gave up on the device.
pub const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;

/// The steps of initialisation in the order that virtio 1.2 section 3.1.1 demands.
pub const STEPS: [u32; 4] = [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK];

/// The registers of one device. `Default` is a device that was never touched.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MmioState {
    /// `Status`.
    pub status: u32,
    /// `DeviceFeaturesSel`.
    pub device_features_sel: u32,
    /// `DriverFeaturesSel`.
    pub driver_features_sel: u32,
    /// What the driver wrote to `DriverFeatures`, both halves.
    pub driver_features: u64,
    /// `QueueSel`.
    pub queue_sel: u32,
    /// `InterruptStatus`.
    pub interrupt_status: u32,
    /// `ConfigGeneration`.
    pub config_generation: u32,
    /// One for each queue of the device.
    pub queues: Vec<QueueState>,
}

/// The registers of one queue.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueState {
    /// `QueueNum`: the size that the driver chose.
    pub size: u16,
    /// `QueueReady`.
    pub ready: bool,
    /// `QueueDesc`: the address of the descriptor table.
    pub desc: u64,
    /// `QueueDriver`: the address of the available ring.
    pub avail: u64,
    /// `QueueDevice`: the address of the used ring.
    pub used: u64,
    /// How far the device has read the available ring. Up to date in what [`Mmio::state`] returns.
    ///
    /// [`Mmio::state`]: super::mmio::Mmio::state
    pub next_avail: u16,
    /// How far the device has written the used ring. Likewise.
    pub next_used: u16,
}

impl MmioState {
    /// What a reset leaves: everything forgotten but the generation, which the driver may still compare.
    pub fn reset(&mut self, sizes: &[u16]) {
        let queues = sizes.iter().map(|&size| QueueState { size, ..QueueState::default() }).collect();
        *self = MmioState { config_generation: self.config_generation, queues, ..MmioState::default() };
    }

    /// Whether the driver and the device agreed on `feature` (a bit number).
    pub fn has(&self, feature: u32) -> bool {
        self.driver_features & 1 << feature != 0
    }

    /// Checks registers from a file against a device of `sizes` queues that offers `offered`.
    pub fn check(&self, offered: u64, sizes: &[u16]) -> Result<(), Error> {
        let steps = STEPS.iter().take_while(|&&step| self.status & step != 0).fold(0, |all, step| all | step);
        if self.status & !(NEEDS_RESET | FAILED) != steps {
            return Err(Error::Status(self.status));
        }
        let agreed = self.status & FEATURES_OK != 0;
        if agreed && (self.driver_features & !offered != 0 || !self.has(VIRTIO_F_VERSION_1)) {
            return Err(Error::Features { driver: self.driver_features, device: offered });
        }
        if self.interrupt_status & !(VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG) != 0 {
            return Err(Error::InterruptStatus(self.interrupt_status));
        }
        if self.queues.len() != sizes.len() {
            return Err(Error::QueueCount { found: self.queues.len(), wanted: sizes.len() });
        }
        match self.queues.iter().position(|queue| queue.ready && !agreed) {
            Some(queue) => Err(Error::Queue { queue, cause: virtio_queue::Error::QueueNotReady }),
            None => Ok(()),
        }
    }

    /// The working queue number `index`, of at most `max_size` elements, that the registers describe.
    ///
    /// # Panics
    /// When there is no queue `index`.
    pub fn build(&self, index: usize, max_size: u16, mem: &GuestMemory) -> Result<Queue, Error> {
        self.queues[index]
            .build(max_size, self.has(VIRTIO_RING_F_EVENT_IDX), mem)
            .map_err(|cause| Error::Queue { queue: index, cause })
    }
}

impl QueueState {
    fn build(&self, max_size: u16, event_idx: bool, mem: &GuestMemory) -> Result<Queue, virtio_queue::Error> {
        if !self.ready {
            // Nothing of it is used before the driver says that it is ready, so nothing need make sense.
            return Queue::new(max_size);
        }
        let queue = Queue::try_from(virtio_queue::QueueState {
            max_size,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: event_idx,
            size: self.size,
            ready: true,
            desc_table: self.desc,
            avail_ring: self.avail,
            used_ring: self.used,
        })?;
        // No more chains can be on their way through the device than the queue has elements.
        if self.next_avail.wrapping_sub(self.next_used) > self.size {
            return Err(virtio_queue::Error::InvalidAvailRingIndex);
        }
        if queue.is_valid(mem) { Ok(queue) } else { Err(virtio_queue::Error::FindMemoryRegion) }
    }
}
