//! The MMIO transport, version 2 (virtio 1.2 section 4.2).
//!
//! The status register moves like this; whatever a driver does beside it is ignored:
//!
//! ```text
//!          set_status         set_status          agree              activate
//!   0 ───────────> ACKNOWLEDGE ────────> DRIVER ────────> FEATURES_OK ────────> DRIVER_OK
//!   ^                                                     queues are set up     queues work
//!   └──── reset: from anywhere ──── NEEDS_RESET <──── broken: a queue that makes no sense
//! ```
//!
//! - Features change only before `FEATURES_OK`; queues only between it and `DRIVER_OK`, and only while they
//!   are not ready. A ready queue lies in guest memory as a whole.
//! - The device is called about queues only while it is [active](Mmio::is_active), with the lock held, and
//!   nothing is on its way when the call returns: a locked device is one at rest.
//! - A queue's positions live in the working [`Queue`]; [`Mmio::state`] puts them into the registers.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use libc::EFD_NONBLOCK;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::state::{DRIVER_OK, FAILED, FEATURES_OK, MmioState, NEEDS_RESET, QueueState, STEPS};
use super::{Error, VirtioDevice};
use crate::devices::{BusDevice, Interrupt, Throttle};
use crate::mem::GuestMemory;

/// The length of a device's registers and configuration space, in bytes.
pub const LENGTH: u64 = 0x200;
/// Where the driver rings: `QueueNotify`, for ioeventfd.
pub const QUEUE_NOTIFY: u64 = VIRTIO_MMIO_QUEUE_NOTIFY as u64;

const CONFIG: u64 = VIRTIO_MMIO_CONFIG as u64;
const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"CTNP");
/// What the transport and its queues can do, whatever the device behind them.
const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// The registers and queues of one device, and the device behind them.
pub struct Mmio<D> {
    registers: MmioState,
    queues: Vec<Queue>,
    /// Apart from the registers, so that a [`Slot`](super::slot::Slot) can answer while the device works.
    interrupt_status: Arc<AtomicU32>,
    doorbells: Vec<EventFd>,
    device: D,
    mem: GuestMemory,
    irq: Arc<dyn Interrupt>,
    complaints: Throttle,
}

impl<D: VirtioDevice> Mmio<D> {
    /// A device with the given registers; `MmioState::default()` for one that was never touched.
    pub fn new(state: MmioState, device: D, mem: GuestMemory, irq: Arc<dyn Interrupt>) -> Result<Mmio<D>, Error> {
        let sizes = device.queue_sizes();
        let mut registers = state;
        if registers == MmioState::default() {
            registers.reset(sizes);
        }
        registers.check(device.features() | TRANSPORT_FEATURES, sizes)?;
        let queues = sizes.iter().enumerate().map(|(index, &max)| registers.build(index, max, &mem));
        let queues = queues.collect::<Result<_, _>>()?;
        let doorbells = sizes.iter().map(|_| EventFd::new(EFD_NONBLOCK).map_err(Error::Doorbell));
        let doorbells = doorbells.collect::<Result<_, _>>()?;
        let interrupt_status = Arc::new(AtomicU32::new(registers.interrupt_status));
        let complaints = Throttle::default();
        let mut mmio = Mmio { registers, queues, interrupt_status, doorbells, device, mem, irq, complaints };
        if mmio.registers.status & DRIVER_OK != 0 {
            mmio.device.activate(mmio.registers.driver_features);
        }
        Ok(mmio)
    }

    /// The registers, for a snapshot.
    pub fn state(&self) -> MmioState {
        let mut state = self.registers.clone();
        state.interrupt_status = self.interrupt_status.load(Ordering::Acquire);
        for (saved, queue) in state.queues.iter_mut().zip(&self.queues).filter(|(saved, _)| saved.ready) {
            saved.next_avail = queue.next_avail();
            saved.next_used = queue.next_used();
        }
        state
    }

    /// One descriptor per queue; readable when the driver rang for that queue.
    pub fn doorbells(&self) -> &[EventFd] {
        &self.doorbells
    }

    /// Rings for every queue and raises an interrupt that was pending. After a restore nobody knows what
    /// rang before it, as that was the state of event descriptors; to ring once too often does no harm.
    pub fn kick_all(&mut self) {
        self.ring_doorbells();
        if self.interrupt_status.load(Ordering::Acquire) != 0 {
            self.raise();
        }
    }

    /// Whether the driver uses the device.
    pub fn is_active(&self) -> bool {
        self.registers.status & (DRIVER_OK | NEEDS_RESET | FAILED) == DRIVER_OK
    }

    /// Works off queue number `queue`, whose doorbell rang.
    pub fn queue_ready(&mut self, queue: usize) {
        if self.is_active() && self.queues.get(queue).is_some_and(Queue::ready) {
            let outcome = self.device.queue_ready(queue, &mut self.queues, &self.mem);
            self.settle(outcome);
        }
    }

    /// Lets the device do what its own descriptor announced.
    pub fn host_ready(&mut self) {
        if self.is_active() {
            let outcome = self.device.host_ready(&mut self.queues, &self.mem);
            self.settle(outcome);
        }
    }

    /// The device's configuration space reads differently from now on: tells the driver, if there is one
    /// (section 2.3), and gives the configuration another generation (section 4.2.2.1), by which a driver
    /// sees that it read half of the old and half of the new.
    pub fn config_changed(&mut self) {
        self.registers.config_generation = self.registers.config_generation.wrapping_add(1);
        if self.registers.status & DRIVER_OK != 0 {
            self.interrupt(VIRTIO_MMIO_INT_CONFIG);
        }
    }

    /// The device behind the registers.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// The device behind the registers, to change what the guest does not see of it.
    pub fn device_mut(&mut self) -> &mut D {
        &mut self.device
    }

    pub(super) fn interrupt_status(&self) -> &Arc<AtomicU32> {
        &self.interrupt_status
    }

    fn settle(&mut self, outcome: Result<bool, virtio_queue::Error>) {
        match outcome {
            Ok(interrupt) => {
                if interrupt {
                    self.interrupt(VIRTIO_MMIO_INT_VRING);
                }
                if self.device.unfinished() {
                    self.ring_doorbells();
                }
            }
            Err(error) => self.broken(&error),
        }
    }

    fn ring_doorbells(&self) {
        for doorbell in &self.doorbells {
            ring(doorbell);
        }
    }

    fn interrupt(&mut self, cause: u32) {
        self.interrupt_status.fetch_or(cause, Ordering::AcqRel);
        self.raise();
    }

    fn raise(&mut self) {
        if let Err(error) = self.irq.raise()
            && let Some(withheld) = self.complaints.pass()
        {
            tracing::warn!(device = D::KIND, withheld, "cannot raise a virtio interrupt: {error}");
        }
    }

    /// Stops the device until the driver resets it (section 2.1.2).
    fn broken(&mut self, error: &dyn std::error::Error) {
        if let Some(withheld) = self.complaints.pass() {
            tracing::warn!(device = D::KIND, withheld, "virtio device needs a reset: {error}");
        }
        self.registers.status |= NEEDS_RESET;
        if self.registers.status & DRIVER_OK != 0 {
            self.interrupt(VIRTIO_MMIO_INT_CONFIG);
        }
    }

    fn offered(&self) -> u64 {
        self.device.features() | TRANSPORT_FEATURES
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        self.registers.status |= value & FAILED;
        for step in STEPS.into_iter().filter(|step| value & step != 0) {
            // Each step rests on all those before it, and none is taken twice.
            let before = STEPS.iter().take_while(|&&earlier| earlier != step).fold(0, |all, bit| all | bit);
            let taken = self.registers.status;
            if taken & step != 0 {
                continue;
            }
            if taken & before != before || taken & NEEDS_RESET != 0 || (step == FEATURES_OK && !self.agree()) {
                tracing::debug!(device = D::KIND, "status {value:#x} refused at {taken:#x}");
                return;
            }
            self.registers.status |= step;
            if step == DRIVER_OK {
                self.activate();
            }
        }
    }

    /// Whether the driver's choice of features is one that the device can work with.
    fn agree(&self) -> bool {
        self.registers.driver_features & !self.offered() == 0 && self.registers.has(VIRTIO_F_VERSION_1)
    }

    fn activate(&mut self) {
        self.device.activate(self.registers.driver_features);
        // The driver may have filled its queues already, and the worker must look at `host_fd` again.
        self.ring_doorbells();
    }

    fn reset(&mut self) {
        self.registers.reset(self.device.queue_sizes());
        self.queues.iter_mut().for_each(Queue::reset);
        self.interrupt_status.store(0, Ordering::Release);
        self.device.reset();
    }

    fn selected(&self) -> Option<&QueueState> {
        self.registers.queues.get(self.registers.queue_sel as usize)
    }

    /// The selected queue, if it may be set up now.
    fn unready(&mut self) -> Option<&mut QueueState> {
        let open = self.registers.status & (FEATURES_OK | DRIVER_OK | NEEDS_RESET) == FEATURES_OK;
        self.registers.queues.get_mut(self.registers.queue_sel as usize).filter(|queue| open && !queue.ready)
    }

    fn set_queue_size(&mut self, value: u32) {
        if let (Some(queue), Ok(size)) = (self.unready(), u16::try_from(value)) {
            queue.size = size;
        }
    }

    fn set_queue_ready(&mut self, on: bool) {
        let index = self.registers.queue_sel as usize;
        if !on {
            if let (Some(registers), Some(queue)) = (self.registers.queues.get_mut(index), self.queues.get_mut(index)) {
                registers.ready = false;
                queue.reset();
            }
        } else if let Some(queue) = self.unready() {
            queue.ready = true;
            match self.registers.build(index, self.queues[index].max_size(), &self.mem) {
                Ok(queue) => self.queues[index] = queue,
                Err(error) => {
                    self.registers.queues[index].ready = false;
                    self.broken(&error);
                }
            }
        }
    }

    fn read_register(&self, offset: u32) -> u32 {
        let half = |bits: u64, select: u32| if select < 2 { (bits >> (32 * select)) as u32 } else { 0 };
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => D::KIND,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => half(self.offered(), self.registers.device_features_sel),
            VIRTIO_MMIO_QUEUE_NUM_MAX => {
                self.queues.get(self.registers.queue_sel as usize).map_or(0, |queue| queue.max_size().into())
            }
            VIRTIO_MMIO_QUEUE_READY => self.selected().is_some_and(|queue| queue.ready).into(),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt_status.load(Ordering::Acquire),
            VIRTIO_MMIO_STATUS => self.registers.status,
            // There is no shared memory, which is said with a length of all ones (section 4.2.2).
            VIRTIO_MMIO_SHM_LEN_LOW | VIRTIO_MMIO_SHM_LEN_HIGH => u32::MAX,
            VIRTIO_MMIO_SHM_BASE_LOW | VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            VIRTIO_MMIO_CONFIG_GENERATION => self.registers.config_generation,
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.registers.device_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.registers.driver_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES => {
                let select = self.registers.driver_features_sel;
                if self.registers.status & FEATURES_OK == 0 && select < 2 {
                    set_half(&mut self.registers.driver_features, select == 1, value);
                }
            }
            VIRTIO_MMIO_QUEUE_SEL => self.registers.queue_sel = value,
            VIRTIO_MMIO_QUEUE_NUM => self.set_queue_size(value),
            VIRTIO_MMIO_QUEUE_READY => self.set_queue_ready(value == 1),
            // Usually KVM writes to the doorbell itself and this register is never reached.
            VIRTIO_MMIO_QUEUE_NOTIFY => self.doorbells.get(value as usize).into_iter().for_each(ring),
            VIRTIO_MMIO_INTERRUPT_ACK => _ = self.interrupt_status.fetch_and(!value, Ordering::AcqRel),
            VIRTIO_MMIO_STATUS => self.set_status(value),
            VIRTIO_MMIO_QUEUE_DESC_LOW..=VIRTIO_MMIO_QUEUE_USED_HIGH => {
                if let Some(queue) = self.unready() {
                    set_address(queue, offset, value);
                }
            }
            _ => {}
        }
    }
}

fn set_address(queue: &mut QueueState, offset: u32, value: u32) {
    let (address, high) = match offset {
        VIRTIO_MMIO_QUEUE_DESC_LOW => (&mut queue.desc, false),
        VIRTIO_MMIO_QUEUE_DESC_HIGH => (&mut queue.desc, true),
        VIRTIO_MMIO_QUEUE_AVAIL_LOW => (&mut queue.avail, false),
        VIRTIO_MMIO_QUEUE_AVAIL_HIGH => (&mut queue.avail, true),
        VIRTIO_MMIO_QUEUE_USED_LOW => (&mut queue.used, false),
        VIRTIO_MMIO_QUEUE_USED_HIGH => (&mut queue.used, true),
        _ => return,
    };
    set_half(address, high, value);
}

fn set_half(whole: &mut u64, high: bool, value: u32) {
    *whole = match high {
        true => *whole & u64::from(u32::MAX) | u64::from(value) << 32,
        false => *whole & !u64::from(u32::MAX) | u64::from(value),
    };
}

fn ring(doorbell: &EventFd) {
    // Fails only when it rang 2^64 - 1 times unheard, and then it is as readable as can be.
    let _ = doorbell.write(1);
}

impl<D: VirtioDevice> BusDevice for Mmio<D> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= CONFIG {
            self.device.read_config(offset - CONFIG, data);
        } else if let (4, 0) = (data.len(), offset % 4) {
            // Section 4.2.2.2: registers are read and written as aligned words, or not at all.
            data.copy_from_slice(&self.read_register(offset as u32).to_le_bytes());
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        // No device of ours has configuration that can be written.
        if let (true, 0, Ok(value)) = (offset < CONFIG, offset % 4, <[u8; 4]>::try_from(data)) {
            self.write_register(offset as u32, u32::from_le_bytes(value));
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::devices::testing::Counter;
    use crate::devices::virtio::rng::{Rng, RngState};
    use crate::devices::virtio::testing::{AVAIL, DESC, Driver, WRITE};

    fn rng() -> Rng {
        Rng::new(RngState::default())
    }

    #[test]
    fn a_driver_finds_the_device_and_its_queues() {
        let mut driver = Driver::cold(rng());
        assert_eq!([0, 4, 8, 12].map(|offset| driver.get(offset)), [0x7472_6976, 2, 4, u32::from_le_bytes(*b"CTNP")]);
        assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_NUM_MAX), 64);
        driver.set(VIRTIO_MMIO_QUEUE_SEL, 1);
        assert_eq!((driver.get(VIRTIO_MMIO_QUEUE_NUM_MAX), driver.get(VIRTIO_MMIO_QUEUE_READY)), (0, 0));
        assert_eq!((driver.get(VIRTIO_MMIO_SHM_LEN_LOW), driver.get(VIRTIO_MMIO_SHM_LEN_HIGH)), (u32::MAX, u32::MAX));
        // Only whole, aligned words are registers.
        let mut byte = [0xff];
        driver.mmio.read(0, &mut byte);
        assert_eq!(byte, [0]);
        driver.mmio.write(VIRTIO_MMIO_STATUS.into(), &[1]);
        assert_eq!(driver.get(VIRTIO_MMIO_STATUS), 0);
    }

    #[test]
    fn a_ring_of_the_register_reaches_the_doorbell_of_its_queue_alone() {
        let mut driver = Driver::started(rng(), 0);
        driver.serve();
        for nobody in [1, 64, u32::MAX] {
            driver.set(VIRTIO_MMIO_QUEUE_NOTIFY, nobody);
        }
        assert!(driver.mmio.doorbells()[0].read().is_err());
        driver.set(VIRTIO_MMIO_QUEUE_NOTIFY, 0);
        assert_eq!(driver.mmio.doorbells()[0].read().unwrap(), 1);
    }

    #[test]
    fn a_restored_device_goes_on_where_the_saved_one_stood() {
        let mut driver = Driver::started(rng(), 0);
        driver.descriptor(DESC, 0, 0x8000, 8, WRITE, 0);
        driver.submit(0);
        driver.notify();
        assert_eq!(driver.used(), Some((0, 8)));
        // One more request was made, and an interrupt is pending, when the snapshot is taken.
        driver.submit(0);
        let state = driver.mmio.state();
        assert_eq!((state.interrupt_status, state.queues[0].next_avail), (VIRTIO_MMIO_INT_VRING, 1));
        driver.line = Arc::new(Counter::default());
        driver.mmio = Mmio::new(state, rng(), driver.mem.clone(), driver.line.clone()).unwrap();
        driver.mmio.kick_all();
        assert_eq!(driver.line.count(), 1);
        driver.serve();
        assert_eq!(driver.used(), Some((0, 8)));
        assert_eq!(driver.used(), None);
    }

    #[test]
    fn a_queue_that_is_taken_back_is_left_alone() {
        let mut driver = Driver::started(rng(), 0);
        driver.set(VIRTIO_MMIO_QUEUE_READY, 0);
        assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_READY), 0);
        driver.mem.write_obj(u64::MAX, GuestAddress(AVAIL)).unwrap();
        driver.notify();
        assert_eq!(driver.used(), None);
        assert!(driver.mmio.is_active(), "it is the driver's right to do so");
    }
}
