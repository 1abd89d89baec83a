//! The devices of a machine, made from their states and put onto its board.

use std::io;
use std::sync::{Arc, Mutex};

use super::board::{self, Board};
use super::console::Console;
use super::states::DeviceStates;
use super::{Error, Files, lock};
use crate::devices::i8042::I8042;
use crate::devices::power::{Power, PowerRequest};
use crate::devices::rtc::Rtc;
use crate::devices::serial::Serial;
use crate::devices::virtio::block::Block;
use crate::devices::virtio::gate::Gate;
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
    pub root: Arc<Mutex<Mmio<Block>>>,
    pub rng: Arc<Mutex<Mmio<Rng>>>,
    pub vsock: Arc<Mutex<Mmio<Vsock>>>,
}

impl Devices {
    /// Puts all devices onto `board`, as `states` has them.
    pub fn new(
        states: DeviceStates,
        board: &mut Board<'_>,
        mem: &GuestMemory,
        files: &Files,
        console: &Console,
        switch: &Switch,
    ) -> Result<Devices, Error> {
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
        let power = Arc::new(Mutex::new(Power::new(states.power, line, on_request)));
        board.at_ports(board::POWER, power.clone());

        let rtc = Arc::new(Mutex::new(Rtc::new(states.rtc)));
        board.at_ports(board::RTC, rtc.clone());
        let ender = switch.clone();
        let i8042 = I8042::new(Box::new(move || ender.end(End::Reboot)));
        board.at_ports(board::I8042, Arc::new(Mutex::new(i8042)));

        let disk = disk::open(&files.disk, Format::Qcow2, Access::ReadWrite, &files.disk_root)?;
        let root = states.root;
        let block = Block::new(root.chip, disk, "root", false)?;
        let root = board.in_slot(|line| Mmio::new(root.mmio, block, mem.clone(), line))?;
        let rng = states.rng;
        let rng = board.in_slot(|line| Mmio::new(rng.mmio, Rng::new(rng.chip), mem.clone(), line))?;
        let chip = Vsock::new(states.vsock.chip)?;
        let vsock = board.in_slot(|line| Mmio::new(states.vsock.mmio, chip, mem.clone(), line))?;
        Ok(Devices { serial, power, rtc, root, rng, vsock })
    }

    /// Starts the thread of each device that has one.
    pub fn workers(&self, gate: &Arc<Gate>) -> io::Result<Vec<Worker>> {
        Ok(vec![
            Worker::spawn("root disk", self.root.clone(), gate.clone())?,
            Worker::spawn("rng", self.rng.clone(), gate.clone())?,
            Worker::spawn("vsock", self.vsock.clone(), gate.clone())?,
        ])
    }

    /// What rang before a nap was the state of event descriptors, which nobody saved: rings everywhere, and
    /// raises the interrupts that were pending.
    pub fn kick_all(&self) {
        lock(&self.root).kick_all();
        lock(&self.rng).kick_all();
        lock(&self.vsock).kick_all();
    }
}
