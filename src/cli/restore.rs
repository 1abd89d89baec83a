//! `catnap restore`: wakes a machine from a snapshot, or boots one from its disks. `clone` does it many times.

use std::process::ExitCode;
use std::time::Duration;

use serde::Serialize;

use super::home::House;
use super::snapshot::{create, import};
use super::{Outcome, checks, console, launch, start, stop, ui};
use crate::control::protocol::{Mode, SnapshotRequest, Status};
use crate::control::{Code, Failure, Keeper};
use crate::snapshot::Kind;
use crate::spec::{Forward, MachineSpec, Name, Size};
use crate::store::{self, Machine, Snapshot};
use crate::sys::process;

/// Wake a machine from a snapshot
#[derive(clap::Args)]
#[command(after_help = "\
A `live` snapshot resumes: processes go on where they were. Others have no memory, and boot from their disks,
as `--cold` has it done with a live one too. Memory is read as it is touched, so the size does not matter.

The machine gets the name of the one that was snapshotted, if that is free. With --replace it takes the place of
a machine of its name, which is snapshotted first (NAME@before-…). A machine whose original still runs, or may run
elsewhere because the snapshot was imported, gets an identity of its own: machine id, host name, entropy.

Examples:
  catnap restore anna@monday
  catnap restore anna@monday --replace
  catnap restore anna@monday --name anna-again -p 8081:80
  catnap restore anna@monday --name anna-cold --cold
  catnap restore anna.catnap")]
pub struct Args {
    /// The machine's name [default: that of the machine that was snapshotted]
    #[arg(short, long, conflicts_with = "replace")]
    name: Option<Name>,
    /// Take the place of the machine of that name, also when it runs
    #[arg(long)]
    replace: bool,
    /// With --replace: do not take a snapshot of the machine that goes
    #[arg(long, requires = "replace")]
    no_safety: bool,
    /// Boot from the disks alone, also when there is memory
    #[arg(long)]
    cold: bool,
    /// Bring a TCP port of the guest to a port of this host's loopback; can be given several times
    #[arg(short = 'p', long = "publish", value_name = "HOST:GUEST")]
    forwards: Vec<Forward>,
    /// Join the console once it is awake
    #[arg(short, long)]
    attach: bool,
    /// Print what came of it as JSON
    #[arg(long, conflicts_with = "attach")]
    json: bool,
    /// How many seconds the guest has until its agent answers
    #[arg(long, value_name = "SECONDS", default_value_t = start::TIMEOUT, value_parser = clap::value_parser!(u32).range(1..=3600))]
    timeout: u32,
    /// The snapshot: a name, sha256: and some digits (`catnap snapshot ls`), or a FILE.catnap, which is imported
    #[arg(value_name = "SNAPSHOT")]
    snapshot: String,
}

/// What came of a restore.
#[derive(Debug, Serialize)]
pub struct Restored {
    /// The machine.
    pub name: Name,
    /// The snapshot's digest.
    pub snapshot: String,
    /// The snapshot's kind.
    pub kind: Kind,
    /// Whether the guest went on; otherwise it booted.
    pub resumed: bool,
    /// Microseconds from the start of this command until the vCPUs ran.
    pub resume_us: u64,
    /// Microseconds until the guest's agent answered.
    pub ready_us: u64,
    /// Ports of the host that lead into the guest.
    pub forwards: Vec<Forward>,
}

/// How a snapshot becomes a machine.
pub struct Plan<'a> {
    /// What it wakes from.
    pub snapshot: &'a Snapshot,
    /// Its name.
    pub name: Name,
    /// Its ports.
    pub forwards: Vec<Forward>,
    /// Whether it boots in any case.
    pub cold: bool,
    /// Whether it is somebody else from now on.
    pub new_identity: bool,
    /// How long the agent may take.
    pub timeout: Duration,
}

/// Runs the verb.
pub fn run(args: Args) -> Outcome {
    let begun = process::monotonic_us();
    process::catch_interrupts();
    let house = House::open()?;
    let snapshot = find(&house, &args.snapshot)?;
    let original = original(&snapshot);
    let nameless = || Failure::new(Code::Usage, "the snapshot tells no machine's name").hint("--name NAME");
    let name = args.name.clone().or_else(|| original.clone()).ok_or_else(nameless)?;
    checks::kvm_quickly()?;
    let mut forwards = args.forwards;
    match house.store().machine(&name) {
        Err(store::Error::NoMachine(_)) => {}
        Ok(machine) if args.replace => {
            if forwards.is_empty() {
                forwards = machine.spec.forwards.clone();
            }
            make_way(&house, &machine, !args.no_safety)?;
        }
        Err(store::Error::BadMachine { .. }) if args.replace => house.store().remove_machine(&name)?,
        Ok(_) | Err(store::Error::BadMachine { .. }) => {
            return Err(Failure::from(store::Error::MachineTaken(name.clone()))
                .hint(format!("--replace, which snapshots {name} first, or --name NAME")));
        }
        Err(error) => return Err(error.into()),
    }
    let runs = |name: &Name| house.machine(name).is_ok_and(|machine| machine.is_running().unwrap_or(false));
    // Of a snapshot that came from elsewhere, nobody here knows whether the original still runs.
    let elsewhere = house.store().has_arrived(&snapshot.digest);
    let new_identity = elsewhere || original.is_some_and(|original| original != name && runs(&original));
    let timeout = Duration::from_secs(args.timeout.into());
    let plan = Plan { snapshot: &snapshot, name: name.clone(), forwards, cold: args.cold, new_identity, timeout };
    let restored = carry_out(&house, plan, begun)?;
    match (args.json, args.attach) {
        (true, _) => ui::json(&restored)?,
        (_, attach) => {
            start::announce(&house.machine(&name)?.spec)?;
            ui::note(tell(&restored));
            if attach {
                return console::attach(&house, &name);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The snapshot that is meant, with no file changed of it or of what it lies over. One in a file is imported first.
pub fn find(house: &House, reference: &str) -> Result<Snapshot, Failure> {
    let store = house.store();
    if import::is_archive(reference) {
        return import::bring(house, reference);
    }
    let snapshot = store.resolve(reference).map_err(|error| match error {
        store::Error::NoSnapshot(_) => Failure::from(error).hint("catnap snapshot ls"),
        other => other.into(),
    })?;
    for needed in store.needed_by(&snapshot)? {
        store.verify_quickly(&needed)?;
    }
    Ok(snapshot)
}

/// The machine that was snapshotted.
pub fn original(snapshot: &Snapshot) -> Option<Name> {
    snapshot.manifest.name.split('@').next()?.parse().ok()
}

/// Makes the machine and starts it. When that fails, nothing of it stays behind.
pub fn carry_out(house: &House, plan: Plan<'_>, begun: u64) -> Result<Restored, Failure> {
    let manifest = &plan.snapshot.manifest;
    let shape = manifest.machine.as_ref().ok_or_else(|| {
        Failure::new(Code::Refused, format!("{} is an image, and no machine's snapshot", manifest.name))
            .hint(format!("catnap run {}", manifest.name))
    })?;
    let spec = MachineSpec {
        name: plan.name,
        image: plan.snapshot.digest.to_string(),
        cpus: shape.cpus,
        memory: Size(shape.memory),
        max_cpus: shape.max_cpus,
        max_memory: Size(shape.max_memory),
        append: shape.append.clone(),
        kernel: None,
        forwards: plan.forwards,
    };
    spec.check().map_err(|error| Failure::new(Code::Usage, error.to_string()).hint("catnap restore --help"))?;
    let resumed = manifest.kind == Kind::Live && !plan.cold;
    let machine = house.store().create_machine(&spec, plan.snapshot)?;
    let from = match resumed {
        true => launch::From::Nap { new_identity: plan.new_identity },
        false => launch::From::Disk,
    };
    let status = launch::launch(house, &machine, from, plan.timeout).inspect_err(|_| {
        if let Err(error) = house.store().remove_machine(&spec.name) {
            ui::warn(format!("{} could not be removed: {error}", spec.name));
        }
    })?;
    let Status { running_since_us, .. } = status;
    Ok(Restored {
        name: spec.name,
        snapshot: spec.image,
        kind: manifest.kind,
        resumed,
        resume_us: running_since_us.saturating_sub(begun),
        ready_us: process::monotonic_us().saturating_sub(begun),
        forwards: spec.forwards,
    })
}

/// Removes a machine that another takes the place of, after a snapshot of it.
fn make_way(house: &House, machine: &Machine, safety: bool) -> Result<(), Failure> {
    let name = &machine.spec.name;
    let running = machine.is_running()?;
    if safety {
        let request = SnapshotRequest {
            name: format!("{name}@before-{}", create::now()),
            mode: Mode::Live,
            note: "taken before a restore took its place".into(),
        };
        let taken = match running {
            true => create::take_running(machine, &request)?,
            false => {
                let _held = machine.lock()?;
                let files = house.files(machine)?;
                let keeper = Keeper { store: house.store().clone(), machine: machine.clone(), files };
                keeper.take_clean(&request, &|_| std::ops::ControlFlow::Continue(()))?
            }
        };
        ui::note(format!("{name} as it was is kept as {}", taken.name));
    }
    if running {
        stop::stop(machine, 0)?;
    }
    Ok(house.store().remove_machine(name)?)
}

fn tell(restored: &Restored) -> String {
    let milliseconds = |us: u64| us as f64 / 1000.0;
    match restored.resumed {
        true => format!(
            "awake: it ran after {:.0} ms and answered after {:.0} ms",
            milliseconds(restored.resume_us),
            milliseconds(restored.ready_us)
        ),
        false => format!("booted from its disks: it answered after {:.0} ms", milliseconds(restored.ready_us)),
    }
}
