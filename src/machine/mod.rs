//! A machine: the only room that knows both `kvm` and `devices`. It builds one, runs it, pauses it, and takes
//! snapshots of it.
//!
//! | file | holds |
//! |---|---|
//! | `mod.rs` | the machine: what it is made of, how it runs and pauses |
//! | `board.rs`, `devices.rs` | which device sits where; how they are made |
//! | `states.rs` | the devices' states, saved and put back |
//! | `capture.rs`, `memory_file.rs` | taking a snapshot; writing memory from a forked child |
//! | `map.rs` | a picture of memory, for people |
//! | `bays.rs`, `media.rs` | disks in the host's memory: put in, taken out, and what becomes of them |
//! | `shape.rs`, `resize.rs` | what was settled at the boot; giving and taking vCPUs and RAM |
//! | `wake.rs` | what a snapshot's files must be for a machine to wake from them |
//! | `waker.rs`, `greeting.rs`, `agent.rs` | telling the guest's agent that it woke; hearing from it; asking it |
//! | `doorbell.rs` | hearing that a program in the guest has come to a certain place |
//! | `console.rs`, `forward.rs` | the serial console; TCP ports |

mod agent;
mod bays;
mod board;
mod capture;
mod console;
mod devices;
mod doorbell;
mod error;
mod forward;
#[cfg(test)]
mod fuzz;
mod greeting;
mod map;
mod media;
pub mod memory_file;
mod resize;
mod shape;
mod states;
mod wake;
mod waker;

use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use catnap_guest::protocol::{AGENT_PORT, DOORBELL_PORT, HOST_PORT, Hello};

use crate::boot;
use crate::devices::generation;
use crate::devices::virtio::gate::Gate;
use crate::devices::virtio::vsock;
use crate::devices::virtio::worker::Worker;
use crate::disk::Mark;
use crate::kvm::{self, Switch, Team, Vm};
use crate::mem::{self, GuestMemory};
use crate::spec::{Ephemeral, MachineSpec};
use crate::sys::random;

pub use crate::kvm::{Bare, End};
pub use bays::BayError;
pub use capture::{Captured, CapturedMemory, Phase, Progress};
pub use console::Console;
pub use doorbell::{Armed, Doorbell, Visitor};
pub use error::Error;
pub use map::{Cell, MemoryMap};
pub use media::{Drive, Folders, Media, Standing};
pub use resize::{Asked, Resized, Seen, Size};
pub use shape::Shape;
pub use states::{DeviceStates, Virtio};
pub use wake::{Layer, Saved, marks};
pub use waker::{SETTLING, Wakeup};

use bays::Bays;
use board::Board;
use capture::{Log, Tracking};
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
    /// Whether nothing may be left of what the guest discards.
    pub wipe: bool,
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

/// A virtual machine with its devices.
///
/// Fields are dropped in this order, and the order matters: first nobody new comes in, then the vCPUs stop,
/// then the workers, and then the devices, with the disk flushed.
pub struct Machine {
    forwarder: Forwarder,
    team: Team,
    switch: Switch,
    _workers: Vec<Worker>,
    gate: Arc<Gate>,
    devices: Devices,
    bays: Arc<Bays>,
    vsock: vsock::Handle,
    greeting: Arc<Greeting>,
    doorbell: Arc<Doorbell>,
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
    /// Held while KVM's log of pages is read.
    log: Mutex<Log>,
    /// Held while the size changes.
    resizing: Mutex<()>,
    /// What came of the size that it was to wake in.
    resized: Mutex<Option<Resized>>,
    /// Whether it was woken, so that it has an agent even if that has not spoken yet.
    woke: bool,
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
    /// vCPUs do not run yet. What is in `media` is in its bays.
    pub fn new(
        spec: &MachineSpec,
        files: &Files,
        media: &Arc<Media>,
        origin: Origin,
        bare: Bare,
    ) -> Result<Arc<Machine>, Error> {
        let log = &files.console_log;
        let console = Console::new(log).map_err(|source| Error::Console { path: log.clone(), source })?;
        let (mem, saved) = match origin {
            Origin::Boot => (mem::from_ranges(&Shape::of(spec).regions())?, None),
            Origin::Wake(saved) => (saved.memory.clone(), Some(saved)),
        };
        let shape = saved.as_ref().map_or_else(|| Shape::of(spec), |saved| saved.shape);
        let mut vm = Vm::new(bare, mem.clone(), shape.max_cpus)?;
        if saved.is_none() {
            // One that wakes has what it was shown before.
            vm.limit_cpu(spec.cpu_baseline)?;
        }
        let switch = Switch::new();

        let mut board = Board::new(&vm, shape.max_cpus);
        let states = saved.as_ref().map_or_else(|| DeviceStates::booted(&shape), |saved| saved.devices.clone());
        let wires = Wires { mem: &mem, files, console: &console, switch: &switch, shape: &shape, media };
        let devices = Devices::new(states, &mut board, &wires)?;
        // Before the vCPUs get their state back: some of it KVM copies into guest memory right then (the wall
        // clock of MSR_KVM_WALL_CLOCK_NEW), and what it does not note is missing from the next snapshot.
        let (tracking, log) = match &saved {
            Some(saved) => Tracking::since(saved.base, &vm)?,
            None => Default::default(),
        };
        let vcpus = match &saved {
            Some(saved) => vm.restore(&saved.vm, &saved.vcpus)?,
            None => boot_vcpus(&shape, files, &vm, &mem, &board)?,
        };

        let woke = saved.is_some();
        let vsock = lock(&devices.vsock).device().handle();
        let greeting = Greeting::expect(&vsock, HOST_PORT);
        let doorbell = Doorbell::listen(&vsock, DOORBELL_PORT);
        let bays = Bays::new(devices.bays.clone(), media.clone(), vsock.clone());
        let forwarder = Forwarder::listen(&spec.forwards, vsock.clone())?;
        let gate = Arc::new(Gate::default());
        let workers = devices.workers(&gate).map_err(Error::Host)?;
        let team = Team::new(vcpus, board.finish(), switch.clone())?;
        if saved.is_some() {
            devices.kick_all();
            generation::change(&mem, &new_generation()?, &lock(&devices.power).events()).map_err(Error::Host)?;
        } else {
            generation::write(&mem, &new_generation()?).map_err(Error::Host)?;
            bays.mount_at_hello(&greeting).map_err(Error::Host)?;
            // One that wakes lets nobody in before it has the size that it is to have.
            forwarder.open().map_err(Error::Host)?;
        }
        Ok(Arc::new(Machine {
            forwarder,
            team,
            switch,
            _workers: workers,
            gate,
            devices,
            bays,
            vsock,
            greeting,
            doorbell,
            console,
            vm,
            mem,
            shape,
            files: files.clone(),
            pausing: Mutex::default(),
            tracking: Mutex::new(tracking),
            log: Mutex::new(log),
            resizing: Mutex::default(),
            resized: Mutex::default(),
            woke,
        }))
    }

    /// Lets the vCPUs run.
    pub fn start(&self) -> Result<(), Error> {
        if self.team.resume() { Ok(()) } else { Err(Error::Ended) }
    }

    /// Stops the devices, then the vCPUs; returns when all of them stand still. Does nothing twice.
    pub fn pause(&self) -> Result<(), Error> {
        let _alone = lock(&self.pausing);
        if !self.team.running() {
            return if self.team.ended().is_some() { Err(Error::Ended) } else { Ok(()) };
        }
        self.gate.close();
        if !self.team.pause() {
            self.gate.open();
            return Err(Error::Ended);
        }
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
        let end = self.team.wait();
        // Whoever still writes a snapshot holds on to the machine; those who speak with the guest need not wait for that.
        self.vsock.hang_up();
        end
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

    /// Where programs in the guest ring.
    pub fn doorbell(&self) -> &Arc<Doorbell> {
        &self.doorbell
    }

    /// Before a woken machine runs: asks its guest to have the size `wanted`, and to use all of a disk that is
    /// larger than it knew.
    pub fn ask_at_wake(&self, wanted: Size) -> Result<Asked, Error> {
        let mut asked = self.ask_for(wanted)?;
        asked.disk = lock(&self.devices.root).grow();
        Ok(asked)
    }

    /// Tells the agent, from a thread of its own, that the machine woke. Opens the forwarded ports when it has the
    /// size that was asked for.
    pub fn tell_agent(self: &Arc<Machine>, wakeup: Wakeup) -> io::Result<()> {
        waker::start(self, wakeup)
    }

    /// What can be had of it without another boot.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// What came of the size that it was to wake in, once that is known.
    pub fn resized(&self) -> Option<Resized> {
        lock(&self.resized).clone()
    }

    /// What the agent said when it was ready; waits for that up to `timeout`.
    pub fn hello(&self, timeout: Duration) -> Option<Hello> {
        let begun = Instant::now();
        let hello = self.greeting.wait(timeout)?;
        self.bays.settled(timeout.saturating_sub(begun.elapsed())).then_some(hello)
    }

    /// The disks that live in this host's memory.
    pub fn drives(&self) -> Vec<Drive> {
        self.bays.drives()
    }

    /// Puts a blank disk that lives in this host's memory into a bay, and has the agent mount it if it is there.
    pub fn attach(&self, wanted: &Ephemeral) -> Result<(), Error> {
        Ok(self.bays.attach(wanted, self.hello(Duration::ZERO).is_some())?)
    }

    /// Takes such a disk out, which wipes it: the one in the bay of that name, or mounted there. The agent unmounts
    /// it first; with `force`, it is taken out whatever the agent says.
    pub fn detach(&self, what: &str, force: bool) -> Result<(), Error> {
        Ok(self.bays.detach(what, self.hello(Duration::ZERO).is_some(), force)?)
    }

    /// Pauses the machine for ever and gives those of its media away that hold what the marks say; how many.
    pub fn give(&self, marks: &[Mark]) -> Result<usize, Error> {
        self.pause()?;
        Ok(self.bays.give(marks)?)
    }
}

/// A generation ID that nobody has had.
fn new_generation() -> Result<generation::Id, Error> {
    random::bytes().map_err(Error::Host)
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
