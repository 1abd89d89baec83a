//! The machines of this user as the verbs see them: what is stored of each, and whether its monitor lives.

use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use catnap_guest::escape::escape;
use serde::Serialize;

use super::record::Record;
use crate::control::protocol::{self, Ended, Status};
use crate::control::{Client, Code, Failure};
use crate::disk::Mark;
use crate::image;
use crate::machine::{self, Drive, Files, Layer, Saved, Shape, Standing};
use crate::snapshot::memory::MAX_LENGTH;
use crate::snapshot::{Kind, MAX_STATE, Role};
use crate::spec::{Ephemeral, Forward, MachineSpec, Name, Size};
use crate::store::{Condition, Machine, Snapshot, Store};
use crate::sys::files;
use crate::sys::home::Home;

/// How long a monitor may take to say what it does before it counts as stuck.
const PATIENCE: Duration = Duration::from_secs(3);

/// What every guest's kernel is told: to show itself on the serial console, but only what matters, for every
/// byte costs an exit; to reboot at once when it panics, by way of the keyboard controller; not to test its own
/// ciphers, which is more than half of what a distribution's kernel does in a boot (`scripts/bench`); to use memory
/// that is plugged in at once, for what can be moved, so that it can be given back; and not to fill what it takes from
/// itself with zeros, for then all memory that is given back is written to right before, a fault for each page.
pub const COMMAND_LINE: &str =
    "console=ttyS0 quiet reboot=k panic=-1 cryptomgr.notests memhp_default_state=online_movable init_on_alloc=0";

/// A machine by name, or why its files cannot be read.
pub type Listed = (Name, Result<Machine, Failure>);

/// All machines.
pub struct House {
    store: Store,
}

/// What a machine does, in one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Its monitor lives and does not answer yet, or not any more.
    Busy,
    /// The vCPUs run.
    Running,
    /// The vCPUs stand still.
    Paused,
    /// Not running; it ended in good order or was never started.
    Stopped,
    /// Not running; its guest could not go on.
    Crashed,
    /// Not running; its monitor was killed.
    Died,
    /// Not running; its host was restarted under it.
    Lost,
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            State::Busy => "busy",
            State::Running => "running",
            State::Paused => "paused",
            State::Stopped => "stopped",
            State::Crashed => "crashed",
            State::Died => "died",
            State::Lost => "lost",
        })
    }
}

/// A machine as it is listed.
#[derive(Clone, Debug, Serialize)]
pub struct View {
    /// Its name.
    pub name: Name,
    /// What it does.
    pub state: State,
    /// Why, where there is more to say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// The name of its image, or the digest when it has none any more.
    pub image: String,
    /// vCPUs.
    pub cpus: u32,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// Ports of the host that lead into it.
    pub forwards: Vec<Forward>,
    /// Its disks in the host's memory.
    pub ephemeral: Vec<Ephemeral>,
    /// For how long it has run, in seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uptime_seconds: Option<u64>,
    /// Its monitor's process id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// Whether the guest's agent has said that it is ready.
    pub agent: bool,
}

impl House {
    /// The machines of whom this process works for.
    pub fn open() -> Result<House, Failure> {
        let home = Home::from_env().map_err(|error| Failure::new(Code::Failed, error.to_string()))?;
        Ok(House { store: Store::open(&home)? })
    }

    /// Where everything is kept.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// All machines, sorted by name.
    pub fn machines(&self) -> Result<Vec<Listed>, Failure> {
        let machines = self.store.machines()?.into_iter();
        Ok(machines.map(|(name, machine)| (name, machine.map_err(Failure::from))).collect())
    }

    /// A machine.
    pub fn machine(&self, name: &Name) -> Result<Machine, Failure> {
        Ok(self.store.machine(name)?)
    }

    /// A way to speak to a running machine.
    pub fn client(&self, name: &Name) -> Result<Client, Failure> {
        let machine = self.machine(name)?;
        if !machine.is_running()? {
            let failure = Failure::new(Code::Refused, format!("{name} does not run"));
            return Err(failure.hint(format!("catnap start {name}")));
        }
        Ok(Client::new(machine.control_socket()?))
    }

    /// The files that a machine is built from.
    pub fn files(&self, machine: &Machine) -> Result<Files, Failure> {
        let image = self.store.resolve(&machine.spec.image)?;
        let missing = |what| Failure::new(Code::Verify, format!("the image {} has no {what}", machine.spec.image));
        let (kernel, initrd) = match &machine.spec.kernel {
            Some(kernel) => (kernel.clone(), Some(own_initrd(machine)?)),
            None => (image.file(Role::Kernel).ok_or_else(|| missing("kernel"))?, image.file(Role::Initrd)),
        };
        Ok(Files {
            kernel,
            initrd,
            disk: machine.disk(),
            disk_root: self.store.root().into(),
            cmdline: command_line(&machine.spec),
            console_log: machine.console_log()?,
            wipe: false,
        })
    }

    /// What a machine wakes from: the state and memory of a snapshot, checked.
    pub fn saved(&self, snapshot: &str) -> Result<Saved, Failure> {
        let snapshot = self.store.resolve(snapshot)?;
        let layer = |of: &Snapshot| {
            let path = |role| of.file(role).ok_or_else(|| no_memory(of));
            Ok(Layer {
                index_path: path(Role::MemoryIndex)?,
                index: self.store.read_checked(of, Role::MemoryIndex, MAX_LENGTH)?,
                memory: path(Role::Memory)?,
            })
        };
        let layers = self.store.memory_chain(&snapshot)?.iter().map(layer).collect::<Result<Vec<_>, Failure>>()?;
        let path = snapshot.file(Role::State).ok_or_else(|| no_memory(&snapshot))?;
        let state = self.store.read_checked(&snapshot, Role::State, MAX_STATE)?;
        let shape = snapshot.manifest.machine.as_ref().ok_or_else(|| no_memory(&snapshot))?;
        let shape = Shape {
            cpus: shape.cpus,
            max_cpus: shape.max_cpus,
            boot_memory: shape.boot_memory,
            max_memory: shape.max_memory,
        };
        Ok(Saved::new(snapshot.digest, &path, &state, &layers, shape)?)
    }

    /// What the ephemeral disks held when a snapshot with memory was taken.
    pub fn marks(&self, snapshot: &Snapshot) -> Result<Vec<Mark>, Failure> {
        if snapshot.manifest.ephemeral.is_empty() || snapshot.manifest.kind != Kind::Live {
            return Ok(Vec::new());
        }
        let path = snapshot.file(Role::State).ok_or_else(|| no_memory(snapshot))?;
        Ok(machine::marks(&path, &self.store.read_checked(snapshot, Role::State, MAX_STATE)?)?)
    }

    /// What a snapshot of the disk of a machine is that does not run.
    pub fn kind_at_rest(&self, machine: &Machine) -> Result<Kind, Failure> {
        let ended = Record::read(&machine.dir).and_then(|record| record.ended);
        Ok(match (machine.condition()?, ended) {
            // Only a machine that never ran has no record of how that ended.
            (Condition::Stopped, None | Some(Ended::PowerOff)) => Kind::Clean,
            _ => Kind::Crash,
        })
    }

    /// A machine as it is listed.
    pub fn view(&self, machine: &Machine) -> Result<View, Failure> {
        Ok(self.look_at(machine)?.0)
    }

    /// The same, and what its monitor says if it has one that answers.
    pub fn look_at(&self, machine: &Machine) -> Result<(View, Option<Status>), Failure> {
        let condition = machine.condition()?;
        let record = Record::read(&machine.dir);
        let status = if condition == Condition::Running { status(machine)? } else { None };
        let (state, detail) = match (condition, &status) {
            (Condition::Running, status) => (while_running(status.as_ref()), None),
            (Condition::Stopped, _) => at_rest(record.as_ref()),
            (Condition::Died, _) => (State::Died, Some("its monitor was killed".into())),
            (Condition::Lost, _) => (State::Lost, Some("host restarted".into())),
        };
        let spec = machine.spec.clone();
        let size = status.as_ref().and_then(|status| status.size);
        let view = View {
            name: spec.name,
            state,
            detail,
            image: self.image_name(&spec.image),
            cpus: size.map_or(spec.cpus, |size| size.cpus),
            memory_bytes: size.map_or(spec.memory.bytes(), |size| size.memory),
            forwards: spec.forwards,
            ephemeral: match &status {
                Some(status) => {
                    status.ephemeral.iter().filter(|drive| drive.state != Standing::Lost).map(seen).collect()
                }
                None => spec.ephemeral,
            },
            uptime_seconds: record.filter(|_| status.is_some()).map(|record| record.age()),
            pid: status.as_ref().map(|status| status.pid),
            agent: status.as_ref().is_some_and(|status| status.agent.is_some()),
        };
        Ok((view, status))
    }

    /// The name that stands for a digest, or the digest's beginning when it has none any more.
    fn image_name(&self, digest: &str) -> String {
        let names = self.store.names().unwrap_or_default();
        let named = names.into_iter().find(|(_, named)| named.to_string() == digest);
        named.map_or_else(|| digest.chars().take("sha256:".len() + 12).collect(), |(name, _)| name)
    }

    /// The image that `reference` means, with no file of it changed since it was made.
    pub fn image(&self, reference: &str) -> Result<Snapshot, Failure> {
        let image = self.store.resolve(reference)?;
        self.store.verify_quickly(&image)?;
        Ok(image)
    }
}

fn no_memory(snapshot: &Snapshot) -> Failure {
    Failure::new(Code::Refused, format!("the snapshot {} has no memory to wake", snapshot.manifest.name))
        .hint("--cold boots it from its disk")
}

/// The kernel's command line of a machine.
fn command_line(spec: &MachineSpec) -> String {
    let mut words = format!("{COMMAND_LINE} catnap.hostname={}", spec.name);
    let own = spec.machine_id.iter().map(|id| format!(" catnap.machine_id={id}"));
    let set = spec.settings.iter().map(|(key, value)| format!(" catnap.set.{key}={}", escape(value)));
    words.extend(own.chain(set));
    format!("{words} {}", spec.append).trim_end().into()
}

/// The initramfs for a kernel of the user's own: the image's modules would not fit it, so it has none.
fn own_initrd(machine: &Machine) -> Result<PathBuf, Failure> {
    let path = machine.dir.join("initrd");
    if !path.exists() {
        files::write_atomically(&path, &image::without_modules())
            .map_err(|error| Failure::new(Code::Failed, error.to_string()))?;
    }
    Ok(path)
}

/// What a running machine's monitor says; `None` when it does not answer in time.
pub fn status(machine: &Machine) -> Result<Option<Status>, Failure> {
    Ok(Client::new(machine.control_socket()?).with_patience(PATIENCE).status().ok())
}

/// Waits until no monitor holds the machine.
pub fn wait_until_free(machine: &Machine, time: Duration) -> Result<(), Failure> {
    let deadline = Instant::now() + time;
    while machine.is_running()? {
        if Instant::now() >= deadline {
            let name = &machine.spec.name;
            return Err(Failure::new(Code::Failed, format!("the monitor of {name} does not go"))
                .hint(format!("catnap logs --monitor {name}")));
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn seen(drive: &Drive) -> Ephemeral {
    Ephemeral { size: Size(drive.size), at: drive.at.clone() }
}

fn while_running(status: Option<&Status>) -> State {
    match status.map(|status| status.state) {
        Some(protocol::State::Running) => State::Running,
        Some(protocol::State::Paused) => State::Paused,
        Some(protocol::State::Starting | protocol::State::Rebooting | protocol::State::Ended) | None => State::Busy,
    }
}

fn at_rest(record: Option<&Record>) -> (State, Option<String>) {
    match record.and_then(|record| record.ended.as_ref()) {
        None | Some(Ended::PowerOff) => (State::Stopped, None),
        Some(Ended::Forced) => (State::Stopped, Some("by force".into())),
        Some(Ended::Crash { why }) => (State::Crashed, Some(why.clone())),
    }
}
