//! The board: which device sits at which address and on which interrupt, and the bus between vCPUs and devices.
//!
//! | device | where | interrupt |
//! |---|---|---|
//! | keyboard controller (reset only) | ports 0x60–0x64 | – |
//! | RTC | ports 0x70–0x71 | – |
//! | serial | ports 0x3f8–0x3ff | 4 |
//! | power and events | ports 0x600–0x607 | 9 |
//! | vCPUs | ports 0x608–0x613 | by an event |
//! | virtio slot *n* | [`layout::VIRTIO_START`] + *n* pages | 10 + *n* |

use std::io;
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::EventFd;

use super::Error;
use crate::acpi;
use crate::devices::virtio::mmio::{LENGTH, Mmio, QUEUE_NOTIFY};
use crate::devices::virtio::slot::Slot;
use crate::devices::virtio::{self, VirtioDevice};
use crate::devices::{Bus, BusDevice, Interrupt, cpus, generation, i8042, power, rtc, serial};
use crate::kvm::{Address, Io, Vm};
use crate::mem::layout;

/// The first port and the length of a device's registers.
pub struct Ports(u16, u16);

pub const I8042: Ports = Ports(0x60, i8042::PORTS);
pub const RTC: Ports = Ports(0x70, rtc::PORTS);
pub const SERIAL: Ports = Ports(0x3f8, serial::PORTS);
pub const POWER: Ports = Ports(0x600, power::PORTS);
pub const CPUS: Ports = Ports(0x608, cpus::PORTS);

pub const SERIAL_GSI: u32 = 4;
pub const POWER_GSI: u32 = 9;
const VIRTIO_GSI: u32 = 10;
/// The I/O APIC has 24 inputs.
const VIRTIO_SLOTS: u32 = 24 - VIRTIO_GSI;

/// A board while devices are put onto it.
pub struct Board<'a> {
    vm: &'a Vm,
    max_cpus: u32,
    ports: Bus,
    memory: Bus,
    slots: u32,
    aml: Vec<u8>,
}

/// What the vCPUs see of the finished board.
pub struct Wiring {
    ports: Bus,
    memory: Bus,
}

/// An interrupt line that ends in KVM's interrupt controllers.
struct Line(EventFd);

impl Interrupt for Line {
    fn raise(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

impl<'a> Board<'a> {
    /// An empty board for up to `max_cpus` vCPUs.
    pub fn new(vm: &'a Vm, max_cpus: u32) -> Board<'a> {
        let aml = [
            serial::aml(SERIAL.0, SERIAL_GSI),
            rtc::aml(RTC.0),
            power::aml(POWER.0, POWER_GSI),
            cpus::aml(CPUS.0, max_cpus),
            generation::aml(),
        ];
        Board { vm, max_cpus, ports: Bus::default(), memory: Bus::default(), slots: 0, aml: aml.concat() }
    }

    /// A line to the interrupt `gsi`.
    pub fn line(&self, gsi: u32) -> Result<Arc<dyn Interrupt>, Error> {
        let event = EventFd::new(libc::EFD_NONBLOCK).map_err(Error::Host)?;
        self.vm.route_interrupt(&event, gsi)?;
        Ok(Arc::new(Line(event)))
    }

    /// Puts a device at its ports.
    pub fn at_ports(&mut self, ports: Ports, device: Arc<Mutex<dyn BusDevice>>) {
        self.ports.insert(ports.0.into(), ports.1.into(), device).expect("the table above has no overlaps");
    }

    /// Puts a virtio device into the next slot: `make` gets the slot's interrupt line.
    pub fn in_slot<D: VirtioDevice + 'static>(
        &mut self,
        make: impl FnOnce(Arc<dyn Interrupt>) -> Result<Mmio<D>, virtio::Error>,
    ) -> Result<Arc<Mutex<Mmio<D>>>, Error> {
        let (slot, gsi) = (self.slots, VIRTIO_GSI + self.slots);
        if slot == VIRTIO_SLOTS {
            return Err(Error::NoSlot(VIRTIO_SLOTS));
        }
        let base = layout::VIRTIO_START + u64::from(slot) * layout::VIRTIO_SLOT;
        let device = make(self.line(gsi)?)?;
        for (queue, doorbell) in device.doorbells().iter().enumerate() {
            self.vm.route_doorbell(doorbell, base + QUEUE_NOTIFY, queue as u32)?;
        }
        let device = Arc::new(Mutex::new(device));
        let on_bus = Slot::new(device.clone()).expect("nobody else has had the lock yet");
        self.memory.insert(base, LENGTH, Arc::new(Mutex::new(on_bus))).expect("slots do not overlap");
        self.aml.extend(virtio::aml(slot, base, gsi));
        self.slots += 1;
        Ok(device)
    }

    /// What the ACPI tables say of this board.
    pub fn describe(&self, cpus: u32) -> acpi::Description {
        acpi::Description {
            cpus,
            max_cpus: self.max_cpus,
            local_apic: layout::LOCAL_APIC as u32,
            io_apic: layout::IOAPIC as u32,
            sleep_control: POWER.0 + power::SLEEP_CONTROL,
            sleep_status: POWER.0 + power::SLEEP_STATUS,
            reset: POWER.0 + power::RESET,
            devices: self.aml.clone(),
        }
    }

    /// Ends the wiring.
    pub fn finish(self) -> Arc<Wiring> {
        Arc::new(Wiring { ports: self.ports, memory: self.memory })
    }
}

impl Io for Wiring {
    fn read(&self, at: Address, data: &mut [u8]) {
        match at {
            Address::Port(port) => self.ports.read(port.into(), data),
            Address::Memory(address) => self.memory.read(address, data),
        }
    }

    fn write(&self, at: Address, data: &[u8]) {
        match at {
            Address::Port(port) => self.ports.write(port.into(), data),
            Address::Memory(address) => self.memory.write(address, data),
        }
    }
}
