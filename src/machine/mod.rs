//! A machine: the only room that knows both `kvm` and `devices`. It builds one, runs it, pauses it, and takes
//! snapshots of it.
//!
//! | file | holds |
//! |---|---|
//! | `mod.rs` | the machine: what it is made of, how it runs and pauses |
//! | `board.rs`, `devices.rs` | which device sits where; how they are made |
//! | `states.rs` | the devices' states, saved and put back |
//! | `capture.rs`, `memory_file.rs` | taking a snapshot; writing memory from a forked child |
//! | `resize.rs` | giving and taking vCPUs and RAM |
//! | `wake.rs` | what a snapshot's files must be for a machine to wake from them |
//! | `waker.rs`, `greeting.rs` | telling the guest's agent that it woke; hearing from it that it is up |
//! | `console.rs`, `forward.rs` | the serial console; TCP ports |

mod board;
mod capture;
mod console;
mod devices;
mod forward;
mod greeting;
pub mod memory_file;
mod resize;
mod states;
mod wake;
mod waker;

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use catnap_guest::protocol::{AGENT_PORT, HOST_PORT, Hello};
use vm_memory::GuestAddress;

use crate::devices::cpus::CpuError;
use crate::devices::virtio::gate::Gate;
use crate::devices::virtio::memory::RequestError;
use crate::devices::virtio::vsock;
use crate::devices::virtio::worker::Worker;
use crate::devices::{self as device_room, generation, virtio};
use crate::disk;
use crate::kvm::{self, Switch, Team, Vm};
use crate::mem::{self, GuestMemory, layout};
use crate::spec::MachineSpec;
use crate::{boot, snapshot};

pub use crate::kvm::{Bare, End};
pub use capture::{Captured, CapturedMemory, Phase, Progress};
pub use console::Console;
pub use resize::Size;
pub use states::{DeviceStates, Virtio};
pub use wake::{Layer, Saved};
pub use waker::Wakeup;

use board::Board;
use capture::Tracking;
use devices::{Devices, Wires};
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

/// What of a machine's size was settled at its boot, and stays until the next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// vCPUs at the boot.
    pub cpus: u32,
    /// The most vCPUs.
    pub max_cpus: u32,
    /// RAM at the boot, in bytes. What is more than that was plugged in.
    pub boot_memory: u64,
    /// The most RAM, in bytes.
    pub max_memory: u64,
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [boot, max] = [self.boot_memory, self.max_memory].map(crate::spec::Size);
        write!(f, "1 to {} vCPUs and {boot} to {max} of memory", self.max_cpus)
    }
}

impl Shape {
    /// The shape of a machine that boots.
    pub fn of(spec: &MachineSpec) -> Shape {
        Shape {
            cpus: spec.cpus,
            max_cpus: spec.max_cpus,
            boot_memory: spec.memory.bytes(),
            max_memory: spec.max_memory.bytes(),
        }
    }

    /// Where its RAM lies, plugged in or not: addresses and lengths in bytes.
    pub fn regions(&self) -> Vec<(GuestAddress, u64)> {
        layout::all(self.boot_memory, self.max_memory)
    }

    /// Where the part lies that can be plugged in, if there is one.
    pub fn pluggable(&self) -> Option<(GuestAddress, u64)> {
        layout::pluggable(self.boot_memory, self.max_memory)
    }
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
    Device(#[from] device_room::Error),
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
    /// A snapshot's file cannot be used to wake from.
    #[error("{path} cannot be woken from: {why}")]
    Unsound {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A saved state of a machine that can grow, for one that cannot, or the other way round.
    #[error("the saved state is that of a machine of another shape")]
    Shape,
    /// The state of the machine cannot be written down.
    #[error("the machine's state cannot be saved: {0}")]
    State(#[from] snapshot::StateError),
    /// The files of a snapshot.
    #[error(transparent)]
    Snapshot(#[from] snapshot::Error),
    /// Writing or loading guest memory.
    #[error(transparent)]
    MemoryFile(#[from] memory_file::Error),
    /// A file of a snapshot under way.
    #[error(transparent)]
    File(#[from] crate::sys::files::Error),
    /// A vCPU that cannot be given or taken.
    #[error(transparent)]
    Cpu(#[from] CpuError),
    /// RAM that cannot be plugged in.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// More or less than the machine can have.
    #[error("the machine can have {shape}, so it cannot have {wanted}")]
    Envelope {
        /// What was wanted.
        wanted: Size,
        /// What it can have.
        shape: Shape,
    },
    /// Whoever wanted the snapshot does not want it any more.
    #[error("the snapshot was cancelled")]
    Cancelled,
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
    vm: Vm,
    mem: GuestMemory,
    shape: Shape,
    files: Files,
    /// Held while the machine is paused or resumed, so that two requests do not cross.
    pausing: Mutex<()>,
    /// Held while a snapshot is taken: there is one at a time.
    tracking: Mutex<Tracking>,
}

/// What a machine starts from.
pub enum Origin {
    /// Its kernel.
    Boot,
    /// A snapshot with memory.
    Wake(Box<Saved>),
}

impl Machine {
    /// Builds everything around the VM `bare`, and puts the kernel into memory or the saved state where it belongs. The
    /// vCPUs do not run yet.
    pub fn new(spec: &MachineSpec, files: &Files, origin: Origin, bare: Bare) -> Result<Arc<Machine>, Error> {
        let log = &files.console_log;
        let console = Console::new(log).map_err(|source| Error::Console { path: log.clone(), source })?;
        let (mem, saved) = match origin {
            Origin::Boot => (mem::from_ranges(&Shape::of(spec).regions())?, None),
            Origin::Wake(saved) => (saved.memory.clone(), Some(saved)),
        };
        let shape = saved.as_ref().map_or_else(|| Shape::of(spec), |saved| saved.shape);
        let vm = Vm::new(bare, mem.clone(), shape.max_cpus)?;
        let switch = Switch::new();

        let mut board = Board::new(&vm, shape.max_cpus);
        let states = saved.as_ref().map_or_else(|| DeviceStates::booted(&shape), |saved| saved.devices.clone());
        let wires = Wires { mem: &mem, files, console: &console, switch: &switch, shape: &shape };
        let devices = Devices::new(states, &mut board, &wires)?;
        let vcpus = match &saved {
            Some(saved) => vm.restore(&saved.vm, &saved.vcpus)?,
            None => boot_vcpus(&shape, files, &vm, &mem, &board)?,
        };

        let vsock = lock(&devices.vsock).device().handle();
        let greeting = Greeting::expect(&vsock, HOST_PORT);
        let forwarder = Forwarder::start(&spec.forwards, vsock.clone())?;
        let gate = Arc::new(Gate::default());
        let workers = devices.workers(&gate).map_err(Error::Host)?;
        let team = Team::new(vcpus, board.finish(), switch.clone())?;
        let tracking = match saved {
            None => {
                generation::write(&mem, &random()?).map_err(Error::Host)?;
                Tracking::default()
            }
            Some(saved) => {
                devices.kick_all();
                generation::change(&mem, &random()?, &lock(&devices.power).events()).map_err(Error::Host)?;
                Tracking::since(saved.base, &vm)?
            }
        };
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
            vm,
            mem,
            shape,
            files: files.clone(),
            pausing: Mutex::default(),
            tracking: Mutex::new(tracking),
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

    /// Tells the agent, from a thread of its own, that the machine woke.
    pub fn tell_agent(self: &Arc<Machine>, wakeup: Wakeup) -> io::Result<()> {
        waker::start(self, wakeup)
    }

    /// What the agent said when it was ready; waits for that up to `timeout`.
    pub fn hello(&self, timeout: Duration) -> Option<Hello> {
        self.greeting.wait(timeout)
    }
}

/// A generation ID that nobody has had.
fn random() -> Result<generation::Id, Error> {
    let mut id = generation::Id::default();
    File::open("/dev/urandom").and_then(|mut random| random.read_exact(&mut id)).map_err(Error::Host)?;
    Ok(id)
}

/// Puts the kernel into memory and makes vCPUs that begin with it.
fn boot_vcpus(
    shape: &Shape,
    files: &Files,
    vm: &Vm,
    mem: &GuestMemory,
    board: &Board<'_>,
) -> Result<Vec<kvm::Vcpu>, Error> {
    let sources = boot::Sources {
        kernel: &files.kernel,
        initrd: files.initrd.as_deref(),
        command_line: &files.cmdline,
        memory: shape.boot_memory,
        acpi: board.describe(shape.cpus),
    };
    let entry = boot::load(mem, &sources)?;
    let vcpus = (0..shape.cpus).map(|id| vm.vcpu(id, shape.max_cpus)).collect::<Result<Vec<_>, _>>()?;
    vcpus.iter().try_for_each(|vcpu| vcpu.reset(entry))?;
    Ok(vcpus)
}

/// A device or a flag whose holder panicked is still a device: what it did is in the log.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
