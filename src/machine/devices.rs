//! The devices of a machine, made from their states and put onto its board.

use std::io;
use std::sync::{Arc, Mutex};

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::board::{self, Board};
use super::console::Console;
use super::media::{self, Media};
use super::states::DeviceStates;
use super::{Error, Files, Shape, lock};
use crate::devices::Changes;
use crate::devices::cpus::Cpus;
use crate::devices::i8042::I8042;
use crate::devices::power::{Power, PowerRequest};
use crate::devices::rtc::Rtc;
use crate::devices::serial::Serial;
use crate::devices::virtio::bay::Bay;
use crate::devices::virtio::block::Block;
use crate::devices::virtio::gate::Gate;
use crate::devices::virtio::memory::{Backing, Memory};
use crate::devices::virtio::mmio::Mmio;
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::vsock::Vsock;
use crate::devices::virtio::worker::Worker;
use crate::disk::{self, Access, Format};
use crate::kvm::{End, Switch};
use crate::mem::GuestMemory;

/// Every device that has a state.
pub(super) struct Devices {
    pub serial: Arc<Mutex<Serial>>,
    pub power: Arc<Mutex<Power>>,
    pub rtc: Arc<Mutex<Rtc>>,
    pub cpus: Arc<Mutex<Cpus>>,
    pub root: Arc<Mutex<Mmio<Block>>>,
    pub rng: Arc<Mutex<Mmio<Rng>>>,
    pub vsock: Arc<Mutex<Mmio<Vsock>>>,
    /// RAM that can be plugged in, when the machine can grow.
    pub memory: Option<Arc<Mutex<Mmio<Memory>>>>,
    /// Drives whose media come and go.
    pub bays: Vec<Arc<Mutex<Mmio<Bay>>>>,
    /// Told when the guest takes or gives back vCPUs or RAM.
    pub changes: Arc<Changes>,
}

/// What the devices are wired to.
pub(super) struct Wires<'a> {
    pub mem: &'a GuestMemory,
    pub files: &'a Files,
    pub console: &'a Console,
    pub switch: &'a Switch,
    pub shape: &'a Shape,
    pub media: &'a Media,
}

impl Devices {
    /// Puts all devices onto `board`, as `states` has them.
    pub fn new(states: DeviceStates, board: &mut Board<'_>, wires: &Wires<'_>) -> Result<Devices, Error> {
        let Wires { mem, files, console, switch, shape, media } = *wires;
        let line = board.line(board::SERIAL_GSI)?;
        let serial = Arc::new(Mutex::new(Serial::new(states.serial, line, console.output())?));
        console.connect(&serial);
        board.at_ports(board::SERIAL, serial.clone());

        let ender = switch.clone();
        let on_request = Box::new(move |request| {
            ender.end(match request {
                PowerRequest::Off => End::PowerOff,
                PowerRequest::Reset => End::Reboot,
            });
        });
        let line = board.line(board::POWER_GSI)?;
        let power = Arc::new(Mutex::new(Power::new(states.power, line, on_request)?));
        board.at_ports(board::POWER, power.clone());

        let rtc = Arc::new(Mutex::new(Rtc::new(states.rtc)));
        board.at_ports(board::RTC, rtc.clone());
        let changes = Arc::new(Changes::default());
        let (parker, events) = (switch.clone(), lock(&power).events());
        let on_eject = Box::new(move |cpu| parker.set_aside(cpu));
        let cpus = Cpus::new(states.cpus, shape.max_cpus, events, changes.clone(), on_eject)?;
        let cpus = Arc::new(Mutex::new(cpus));
        board.at_ports(board::CPUS, cpus.clone());

        let ender = switch.clone();
        let i8042 = I8042::new(Box::new(move || ender.end(End::Reboot)));
        board.at_ports(board::I8042, Arc::new(Mutex::new(i8042)));

        let mut disk = disk::open(&files.disk, Format::Qcow2, Access::ReadWrite, &files.disk_root)?;
        if files.wipe {
            disk = Box::new(disk::Wiping(disk));
        }
        let root = states.root;
        let block = Block::new(root.chip, disk, "root", false)?;
        let root = board.in_slot(|line| Mmio::new(root.mmio, block, mem.clone(), line))?;
        let rng = states.rng;
        let rng = board.in_slot(|line| Mmio::new(rng.mmio, Rng::new(rng.chip), mem.clone(), line))?;
        let chip = Vsock::new(states.vsock.chip)?;
        let vsock = board.in_slot(|line| Mmio::new(states.vsock.mmio, chip, mem.clone(), line))?;
        let memory = match (states.memory, shape.pluggable()) {
            (Some(memory), Some(region)) => {
                let chip = Memory::new(memory.chip, region, Box::new(Pages(mem.clone())), changes.clone())?;
                Some(board.in_slot(|line| Mmio::new(memory.mmio, chip, mem.clone(), line))?)
            }
            (None, None) => None,
            _ => return Err(Error::Shape),
        };
        // Last, so that the root disk is the first that the guest finds, and so that machines without them are like
        // others in all else.
        let mut bays = Vec::new();
        for (number, bay) in states.bays.into_iter().enumerate() {
            let chip = Bay::new(bay.chip, media.for_bay(number), &media::name(number))?;
            bays.push(board.in_slot(|line| Mmio::new(bay.mmio, chip, mem.clone(), line))?);
        }
        Ok(Devices { serial, power, rtc, cpus, root, rng, vsock, memory, bays, changes })
    }

    /// Starts the thread of each device that has one.
    pub fn workers(&self, gate: &Arc<Gate>) -> io::Result<Vec<Worker>> {
        let mut workers = vec![
            Worker::spawn("root disk", self.root.clone(), gate.clone())?,
            Worker::spawn("rng", self.rng.clone(), gate.clone())?,
            Worker::spawn("vsock", self.vsock.clone(), gate.clone())?,
        ];
        if let Some(memory) = &self.memory {
            workers.push(Worker::spawn("memory", memory.clone(), gate.clone())?);
        }
        if !self.bays.is_empty() {
            workers.push(Worker::spawn_for_all("bays", &self.bays, gate.clone())?);
        }
        Ok(workers)
    }

    /// What rang before a nap was the state of event descriptors, which nobody saved: rings everywhere, and
    /// raises the interrupts that were pending.
    pub fn kick_all(&self) {
        lock(&self.root).kick_all();
        lock(&self.rng).kick_all();
        lock(&self.vsock).kick_all();
        if let Some(memory) = &self.memory {
            lock(memory).kick_all();
        }
        self.bays.iter().for_each(|bay| lock(bay).kick_all());
        if let Err(error) = lock(&self.power).events().remind() {
            tracing::warn!("the guest is not reminded of its events: {error}");
        }
    }
}

/// The guest's memory, as the memory device uses it.
struct Pages(GuestMemory);

impl Backing for Pages {
    fn discard(&self, start: GuestAddress, length: u64) -> io::Result<()> {
        let region = self.0.find_region(start).ok_or(io::ErrorKind::InvalidInput)?;
        region.discard(start.0 - region.start_addr().0, length)
    }
}
