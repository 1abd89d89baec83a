//! A machine: the only room that knows both `kvm` and `devices`. It builds one, runs it, and pauses it.

mod board;
mod console;
mod forward;
mod greeting;
mod states;

use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use catnap_guest::protocol::{AGENT_PORT, HOST_PORT, Hello};

use crate::devices::i8042::I8042;
use crate::devices::power::{Power, PowerRequest, PowerState};
use crate::devices::rtc::{Rtc, RtcState};
use crate::devices::serial::{Serial, SerialState};
use crate::devices::virtio::block::{Block, BlockState};
use crate::devices::virtio::gate::Gate;
use crate::devices::virtio::mmio::Mmio;
use crate::devices::virtio::rng::{Rng, RngState};
use crate::devices::virtio::state::MmioState;
use crate::devices::virtio::vsock::{self, Vsock, VsockState};
use crate::devices::virtio::worker::Worker;
use crate::devices::{self, virtio};
use crate::disk::{self, Access, Format};
use crate::kvm::{self, Switch, Team, Vm};
use crate::spec::MachineSpec;
use crate::{boot, mem};

pub use crate::kvm::End;
pub use console::Console;
pub use states::{DeviceState, Virtio};

use board::Board;
use forward::Forwarder;
use greeting::Greeting;

/// The files that a machine is built from.
#[derive(Clone, Debug)]
pub struct Files {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: Option<PathBuf>,
    /// The root disk, a qcow2 overlay that only this machine writes.
    pub disk: PathBuf,
    /// The folder that the disk's backing files must not leave.
    pub disk_root: PathBuf,
    /// The kernel's command line.
    pub cmdline: String,
    /// Where the console is logged.
    pub console_log: PathBuf,
}

/// What a machine is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Its vCPUs run.
    Running,
    /// Its vCPUs stand still, and so do its devices.
    Paused,
    /// It has ended.
    Ended(End),
}

/// Why a machine cannot be built, or cannot do what is asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// RAM.
    #[error(transparent)]
    Memory(#[from] mem::Error),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// Kernel and initramfs.
    #[error(transparent)]
    Boot(#[from] boot::Error),
    /// The root disk.
    #[error(transparent)]
    Disk(#[from] disk::Error),
    /// A device.
    #[error(transparent)]
    Device(#[from] devices::Error),
    /// A virtio device.
    #[error(transparent)]
    Virtio(#[from] virtio::Error),
    /// The vsock device.
    #[error(transparent)]
    Vsock(#[from] vsock::Error),
    /// A port of the host that leads into the guest.
    #[error(transparent)]
    Forward(#[from] forward::Error),
    /// The console's log.
    #[error("the console cannot be logged to {path}: {source}")]
    Console {
        /// The log.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A thread or a descriptor.
    #[error("the host has no more threads or descriptors: {0}")]
    Host(#[source] io::Error),
    /// Too many devices.
    #[error("a machine has room for {0} virtio devices")]
    NoSlot(u32),
    /// The machine has ended.
    #[error("the machine has ended")]
    Ended,
}

/// A virtual machine with its devices.
///
/// Fields are dropped in this order, and the order matters: first nobody new comes in, then the vCPUs stop,
/// then the workers, and then the devices, with the disk flushed.
pub struct Machine {
    _forwarder: Forwarder,
    team: Team,
    switch: Switch,
    _workers: Vec<Worker>,
    gate: Arc<Gate>,
    devices: Devices,
    vsock: vsock::Handle,
    greeting: Arc<Greeting>,
    console: Console,
    /// Owns the interrupt lines' and doorbells' way through KVM, which closes with it, and the slots' memory.
    _vm: Vm,
    /// Held while the machine is paused or resumed, so that two requests do not cross.
    pausing: Mutex<()>,
}

/// Every device that has a state.
struct Devices {
    serial: Arc<Mutex<Serial>>,
    power: Arc<Mutex<Power>>,
    rtc: Arc<Mutex<Rtc>>,
    root: Arc<Mutex<Mmio<Block>>>,
    rng: Arc<Mutex<Mmio<Rng>>>,
    vsock: Arc<Mutex<Mmio<Vsock>>>,
}

impl Machine {
    /// Builds everything and puts the kernel into memory. The vCPUs do not run yet.
    pub fn new(spec: &MachineSpec, files: &Files) -> Result<Arc<Machine>, Error> {
        let log = &files.console_log;
        let console = Console::new(log).map_err(|source| Error::Console { path: log.clone(), source })?;
        let mem = mem::allocate(spec.memory.bytes())?;
        let vm = Vm::new(mem.clone(), spec.cpus)?;
        let switch = Switch::new();

        let mut board = Board::new(&vm);
        let devices = Devices::new(&mut board, &mem, files, &console, &switch)?;
        let entry = boot::load(
            &mem,
            &boot::Sources {
                kernel: &files.kernel,
                initrd: files.initrd.as_deref(),
                command_line: &files.cmdline,
                acpi: board.describe(spec.cpus),
            },
        )?;
        let vcpus = (0..spec.cpus).map(|id| vm.vcpu(id, spec.cpus)).collect::<Result<Vec<_>, _>>()?;
        vcpus.iter().try_for_each(|vcpu| vcpu.reset(entry))?;

        let vsock = lock(&devices.vsock).device().handle();
        let greeting = Greeting::expect(&vsock, HOST_PORT);
        let forwarder = Forwarder::start(&spec.forwards, vsock.clone())?;
        let gate = Arc::new(Gate::default());
        let workers = devices.workers(&gate).map_err(Error::Host)?;
        let team = Team::new(vcpus, board.finish(), switch.clone())?;
        Ok(Arc::new(Machine {
            _forwarder: forwarder,
            team,
            switch,
            _workers: workers,
            gate,
            devices,
            vsock,
            greeting,
            console,
            _vm: vm,
            pausing: Mutex::default(),
        }))
    }

    /// Lets the vCPUs run.
    pub fn start(&self) -> Result<(), Error> {
        if self.team.resume() { Ok(()) } else { Err(Error::Ended) }
    }

    /// Stops the vCPUs, then the devices; returns when all of them stand still. Does nothing twice.
    pub fn pause(&self) -> Result<(), Error> {
        let _alone = lock(&self.pausing);
        if !self.team.running() {
            return if self.team.ended().is_some() { Err(Error::Ended) } else { Ok(()) };
        }
        if !self.team.pause() {
            return Err(Error::Ended);
        }
        self.gate.close();
        Ok(())
    }

    /// Lets devices and vCPUs go on. Does nothing when they do already.
    pub fn resume(&self) -> Result<(), Error> {
        let _alone = lock(&self.pausing);
        if self.team.running() {
            return Ok(());
        }
        if self.team.ended().is_some() {
            return Err(Error::Ended);
        }
        self.gate.open();
        if self.team.resume() { Ok(()) } else { Err(Error::Ended) }
    }

    /// The states of all devices. They mean something only while the machine is paused, so they are `None`
    /// when it is not.
    pub fn device_states(&self) -> Option<Vec<DeviceState>> {
        let _alone = lock(&self.pausing);
        (self.state() == State::Paused).then(|| self.devices.states())
    }

    /// What the machine is doing.
    pub fn state(&self) -> State {
        match self.team.ended() {
            Some(end) => State::Ended(end),
            None if self.team.running() => State::Running,
            None => State::Paused,
        }
    }

    /// Blocks until the machine has ended and no vCPU runs any more.
    pub fn wait(&self) -> End {
        self.team.wait()
    }

    /// Presses the power button.
    pub fn power_button(&self) -> Result<(), Error> {
        lock(&self.devices.power).press_button().map_err(Error::Host)
    }

    /// Ends the machine at once.
    pub fn stop(&self) {
        self.switch.end(End::Stopped);
    }

    /// The serial console.
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// Opens a connection to the guest's agent. Whether anybody answers shows when it is used.
    pub fn agent(&self) -> io::Result<UnixStream> {
        self.vsock.open(AGENT_PORT)
    }

    /// What the agent said when it was ready; waits for that up to `timeout`.
    pub fn hello(&self, timeout: Duration) -> Option<Hello> {
        self.greeting.wait(timeout)
    }
}

impl Devices {
    fn new(
        board: &mut Board<'_>,
        mem: &mem::GuestMemory,
        files: &Files,
        console: &Console,
        switch: &Switch,
    ) -> Result<Devices, Error> {
        let line = board.line(board::SERIAL_GSI)?;
        let serial = Arc::new(Mutex::new(Serial::new(SerialState::default(), line, console.output())?));
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
        let power = Arc::new(Mutex::new(Power::new(PowerState::default(), line, on_request)?));
        board.at_ports(board::POWER, power.clone());

        let rtc = Arc::new(Mutex::new(Rtc::new(RtcState::default())));
        board.at_ports(board::RTC, rtc.clone());
        let ender = switch.clone();
        let i8042 = I8042::new(Box::new(move || ender.end(End::Reboot)));
        board.at_ports(board::I8042, Arc::new(Mutex::new(i8042)));

        let disk = disk::open(&files.disk, Format::Qcow2, Access::ReadWrite, &files.disk_root)?;
        let block = Block::new(BlockState::default(), disk, "root", false)?;
        let root = board.in_slot(|line| Mmio::new(MmioState::default(), block, mem.clone(), line))?;
        let rng = Rng::new(RngState::default());
        let rng = board.in_slot(|line| Mmio::new(MmioState::default(), rng, mem.clone(), line))?;
        let vsock = Vsock::new(VsockState::default())?;
        let vsock = board.in_slot(|line| Mmio::new(MmioState::default(), vsock, mem.clone(), line))?;
        Ok(Devices { serial, power, rtc, root, rng, vsock })
    }

    fn workers(&self, gate: &Arc<Gate>) -> io::Result<Vec<Worker>> {
        Ok(vec![
            Worker::spawn("root disk", self.root.clone(), gate.clone())?,
            Worker::spawn("rng", self.rng.clone(), gate.clone())?,
            Worker::spawn("vsock", self.vsock.clone(), gate.clone())?,
        ])
    }
}

/// A device or a flag whose holder panicked is still a device: what it did is in the log.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
