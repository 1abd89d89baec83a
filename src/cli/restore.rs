//! `catnap restore`: wakes a machine from a snapshot, or boots one from its disks. `clone` does it many times.

use std::ops::ControlFlow;
use std::process::ExitCode;
use std::time::Duration;

use catnap_guest::protocol::Settings;
use serde::Serialize;

use super::fit::{fit, ratchet};
use super::home::House;
use super::launch::Begun;
use super::sizes::{self, Wanted};
use super::snapshot::{create, import};
use super::{Outcome, checks, console, cpu, disk, launch, start, stop, ui};
use crate::control::protocol::{self, Give, Mode, Resized, SnapshotRequest, Status};
use crate::control::{Client, Code, Failure};
use crate::disk::Mark;
use crate::machine::SETTLING;
use crate::snapshot::Kind;
use crate::spec::{Ephemeral, Forward, MachineSpec, Name, Setting, Size};
use crate::store::{self, Aside, Machine, Snapshot};
use crate::sys::process;

/// Wake a machine from a snapshot
#[derive(clap::Args)]
#[command(after_help = "\
A `live` snapshot resumes: processes go on where they were. Others have no memory, and boot from their disks,
as `--cold` has it done with a live one too. Memory is read as it is touched, so the size does not matter.

The machine gets the name of the one that was snapshotted, if that is free. With --replace it takes the place of
a machine of its name, which is snapshotted first (NAME@before-…). One that gets another name, or whose original may
run elsewhere because the snapshot was imported, gets an identity of its own: machine id, host name, host keys, entropy.
--set colour=grey (ginger, grey, black, cream, brown, blue) and --set title='Ben’s kitten' tell its page from others.

It can wake in another size: before anybody reaches its ports, the guest has the new vCPUs and memory. What it cannot
give back it keeps; then the size that was reached is said, the exit code is 4, and the machine runs. Sizes outside of
its envelope, and less memory than it booted with, take another boot (--cold). A disk only grows.

A guest that goes on needs what it was shown of its CPU. When this host's lacks something of that, it is refused and
said; --cold boots it.

Ephemeral disks are in no snapshot: they come back blank, and the guest is told. Only --replace keeps one, when
the machine still runs on this host and has written nothing to it since the snapshot.

Examples:
  catnap restore anna@monday
  catnap restore anna@monday --cpus 4 --memory 1G
  catnap restore anna@monday --name anna-roomy --disk-size 4G
  catnap restore anna@monday --replace
  catnap restore anna@monday --name anna-again -p 8081:80 --set colour=grey
  catnap restore anna@monday --name anna-cold --cold
  catnap restore anna.catnap
  catnap restore localhost:5000/cats/anna:monday")]
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
    #[command(flatten)]
    size: Wanted,
    /// A larger root disk; its filesystem grows to fill it
    #[arg(long, value_name = "SIZE")]
    disk_size: Option<Size>,
    /// Bring a TCP port of the guest to a port of this host's loopback; can be given several times
    #[arg(short = 'p', long = "publish", value_name = "HOST:GUEST")]
    forwards: Vec<Forward>,
    /// A blank disk in this host's memory, in place of those that the snapshot's machine had; can be given twice
    #[arg(long, value_name = "SIZE[:PATH]")]
    ephemeral: Vec<Ephemeral>,
    /// Set something of its site: colour or title; can be given several times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<Setting>,
    /// Let it keep machine id, host name and host keys, whatever it is called; its entropy is renewed all the same
    #[arg(long)]
    keep_identity: bool,
    /// Join the console once it is awake
    #[arg(short, long)]
    attach: bool,
    /// Print what came of it as JSON
    #[arg(long, conflicts_with = "attach")]
    json: bool,
    #[command(flatten)]
    patience: launch::Patience,
    /// Speak to a registry elsewhere without encryption
    #[arg(long)]
    plain_http: bool,
    /// The snapshot: a name, sha256: and some digits (`catnap snapshot ls`), or a FILE.catnap or REGISTRY/REPO:TAG, which
    /// is brought here
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
    /// Microseconds until the guest's agent answered, if that was waited for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready_us: Option<u64>,
    /// Ports of the host that lead into the guest.
    pub forwards: Vec<Forward>,
    /// What came of another size than the snapshot's, for a guest that went on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resized: Option<Resized>,
}

impl Restored {
    /// A failure when the machine runs in another size than was wanted.
    pub fn check_size(&self) -> Result<(), Failure> {
        match &self.resized {
            Some(resized) if !resized.is_complete() => Err(sizes::fell_short(&self.name, resized)),
            _ => Ok(()),
        }
    }
}

/// How a snapshot becomes a machine.
pub struct Plan<'a> {
    /// What it wakes from.
    pub snapshot: &'a Snapshot,
    /// Its name.
    pub name: Name,
    /// Its ports.
    pub forwards: Vec<Forward>,
    /// Another size than the snapshot's.
    pub size: Wanted,
    /// Another size of its disk.
    pub disk_size: Option<Size>,
    /// Its disks in the host's memory; none stands for those of the machine that was snapshotted.
    pub ephemeral: Vec<Ephemeral>,
    /// Whether it boots in any case.
    pub cold: bool,
    /// Whether it is somebody else from now on.
    pub new_identity: bool,
    /// Settings of its site that change.
    pub settings: Settings,
    /// How long the agent may take.
    pub timeout: Duration,
}

impl Plan<'_> {
    fn resumes(&self) -> bool {
        resumes(self.snapshot, self.cold)
    }

    /// The machine that the snapshot becomes, or why it cannot.
    pub fn check(&self) -> Result<MachineSpec, Failure> {
        let manifest = &self.snapshot.manifest;
        let saved = manifest.machine.as_ref().ok_or_else(|| {
            Failure::new(Code::Refused, format!("{} is an image, and no machine's snapshot", manifest.name))
                .hint(format!("catnap run {}", manifest.name))
        })?;
        if self.resumes() {
            cpu::wakes_here(self.snapshot)?;
        }
        let least = manifest.disks.iter().map(|disk| disk.virtual_size).max().unwrap_or(0);
        match self.disk_size.map(Size::bytes).filter(|wanted| *wanted < least) {
            Some(wanted) => Err(ratchet(store::Error::DiskTooSmall { wanted, least })),
            None => fit(self, saved, self.resumes()),
        }
    }
}

/// Runs the verb.
pub fn run(args: Args) -> Outcome {
    process::catch_interrupts();
    let house = House::open()?;
    let snapshot = locate(&house, &args.snapshot, args.plain_http)?;
    let original = original(&snapshot);
    let nameless = || Failure::new(Code::Usage, "the snapshot tells no machine's name").hint("--name NAME");
    let name = args.name.clone().or_else(|| original.clone()).ok_or_else(nameless)?;
    let there = match house.store().machine(&name) {
        Err(store::Error::NoMachine(_)) => None,
        Ok(_) | Err(store::Error::BadMachine { .. }) if !args.replace => {
            return Err(Failure::from(store::Error::MachineTaken(name.clone()))
                .hint(format!("--replace, which snapshots {name} first, or --name NAME")));
        }
        Err(error @ store::Error::BadMachine { .. }) => Some(Err(error)),
        machine => Some(Ok(machine?)),
    };
    // With another one in its place there is more to do first than to wait for KVM.
    let early = there.is_none().then(|| begin(&snapshot, &name, args.cold)).transpose()?;
    check_files(&house, &snapshot)?;
    let mut plan = Plan {
        snapshot: &snapshot,
        name: name.clone(),
        forwards: args.forwards,
        size: args.size,
        disk_size: args.disk_size,
        ephemeral: args.ephemeral,
        cold: args.cold,
        new_identity: false,
        settings: Setting::gather(&args.settings),
        timeout: args.patience.time(),
    };
    // Before a machine makes way for one that cannot be.
    plan.check()?;
    checks::kvm_quickly()?;
    let gone = match there {
        None => None,
        Some(Ok(machine)) => {
            if plan.forwards.is_empty() {
                plan.forwards = machine.spec.forwards.clone();
            }
            let wanted = if args.cold { Vec::new() } else { house.marks(&snapshot)? };
            check_in_its_place(&house, &plan, &machine)?;
            Some(make_way(&house, &machine, !args.no_safety, wanted)?)
        }
        Some(Err(_)) => {
            house.store().remove_machine(&name)?;
            None
        }
    };
    // Of a snapshot that came from elsewhere, nobody here knows whether the original still runs.
    let elsewhere = house.store().has_arrived(&snapshot.digest);
    plan.new_identity = !args.keep_identity && (elsewhere || original.is_none_or(|original| original != name));
    let monitor = early.map_or_else(|| begin(&snapshot, &name, args.cold), Ok);
    let restored = match monitor.and_then(|monitor| carry_out(&house, plan, monitor, process::begun_us())) {
        Ok(restored) => restored,
        Err(failure) => {
            gone.map_or(Ok(()), Gone::put_back)?;
            return Err(failure);
        }
    };
    drop(gone);
    match (args.json, args.attach) {
        (true, _) => ui::json(&restored)?,
        (_, true) if restored.check_size().is_err() => {}
        (_, attach) => {
            ui::data(start::announcement(&house.machine(&name)?.spec))?;
            ui::note(tell(&restored));
            if attach {
                return console::attach(&house, &name);
            }
        }
    }
    restored.check_size()?;
    Ok(ExitCode::SUCCESS)
}

/// The snapshot that is meant, with no file changed of it or of what it lies over. One in a file or a registry is
/// brought here first; from a registry elsewhere only by `plain_http` without encryption.
pub fn find(house: &House, reference: &str, plain_http: bool) -> Result<Snapshot, Failure> {
    let snapshot = locate(house, reference, plain_http)?;
    check_files(house, &snapshot)?;
    Ok(snapshot)
}

/// The same, before its files are looked at.
pub fn locate(house: &House, reference: &str, plain_http: bool) -> Result<Snapshot, Failure> {
    if let Some(snapshot) = import::bring(house, reference, plain_http)? {
        return Ok(snapshot);
    }
    house.store().resolve(reference).map_err(|error| match error {
        store::Error::NoSnapshot(_) => Failure::from(error).hint("catnap snapshot ls"),
        other => other.into(),
    })
}

/// Checks that no file has changed of a snapshot or of what it lies over.
pub fn check_files(house: &House, snapshot: &Snapshot) -> Result<(), Failure> {
    let store = house.store();
    store.needed_by(snapshot)?.iter().try_for_each(|needed| Ok(store.verify_quickly(needed)?))
}

/// Begins the monitor of the machine that the snapshot becomes. Before all that must hold is looked at: what a monitor waits
/// for longest is a VM of KVM, in which there is nothing yet of the snapshot.
pub fn begin(snapshot: &Snapshot, name: &Name, cold: bool) -> Result<Begun, Failure> {
    let digest = snapshot.digest.to_string();
    Begun::new(name, resumes(snapshot, cold).then_some(digest.as_str()))
}

/// Whether the guest goes on; otherwise it boots.
fn resumes(snapshot: &Snapshot, cold: bool) -> bool {
    snapshot.manifest.kind == Kind::Live && !cold
}

/// The machine that was snapshotted.
pub fn original(snapshot: &Snapshot) -> Option<Name> {
    snapshot.manifest.name.split('@').next()?.parse().ok()
}

/// Makes the machine and starts it with the monitor that was begun for it. When that fails, nothing of it stays behind.
pub fn carry_out(house: &House, plan: Plan<'_>, monitor: Begun, begun: u64) -> Result<Restored, Failure> {
    let (manifest, resumed) = (&plan.snapshot.manifest, plan.resumes());
    let spec = plan.check()?;
    sizes::warn_of_many(spec.cpus);
    launch::check(house, &spec)?;
    let disk_size = plan.disk_size.map(Size::bytes);
    let machine = house.store().create_machine_sized(&spec, plan.snapshot, disk_size).map_err(ratchet)?;
    // A guest that changes its size answers when it has done so.
    let waits = !plan.timeout.is_zero();
    let patience = if resumed && waits { plan.timeout + SETTLING } else { plan.timeout };
    let status = launch::go_on(house, &machine, monitor, patience).inspect_err(|_| {
        if let Err(error) = house.store().remove_machine(&spec.name) {
            ui::warn(format!("{} could not be removed: {error}", spec.name));
        }
    })?;
    disk::tell(&spec.name, &status);
    let Status { running_since_us, resized, .. } = status;
    Ok(Restored {
        name: spec.name,
        snapshot: spec.image,
        kind: manifest.kind,
        resumed,
        resume_us: running_since_us.saturating_sub(begun),
        ready_us: waits.then(|| process::monotonic_us().saturating_sub(begun)),
        forwards: spec.forwards,
        resized,
    })
}

/// Whether a machine can be what `plan` says once another one is gone; all that can be known before.
fn check_in_its_place(house: &House, plan: &Plan<'_>, other: &Machine) -> Result<(), Failure> {
    let mut spec = plan.check()?;
    if other.is_running()? {
        spec.forwards.retain(|forward| other.spec.forwards.iter().all(|held| held.host != forward.host));
    }
    launch::check(house, &spec)?;
    if plan.resumes() {
        house.saved(&plan.snapshot.digest.to_string())?;
    }
    Ok(())
}

/// A machine that another takes the place of.
struct Gone<'a> {
    aside: Aside<'a>,
    name: Name,
    /// The snapshot that keeps it as it was.
    kept: Option<String>,
}

impl Gone<'_> {
    /// The other one failed.
    fn put_back(self) -> Result<(), Failure> {
        self.aside.put_back()?;
        let kept = self.kept.map_or(String::new(), |kept| format!("; as it ran it is kept as {kept}"));
        ui::note(format!("{} is there again, stopped{kept}", self.name));
        Ok(())
    }
}

/// Takes away a machine that another takes the place of, after a snapshot of it. Disks in the host's memory that still
/// hold what `marks` say are kept for the other.
fn make_way<'a>(house: &'a House, machine: &Machine, safety: bool, marks: Vec<Mark>) -> Result<Gone<'a>, Failure> {
    let name = &machine.spec.name;
    let kept = match machine.is_running()? {
        false => safety
            .then(|| create::take_resting(house, machine, &before(name), &|_| ControlFlow::Continue(())))
            .transpose()?
            .map(|taken| taken.name),
        true => {
            let client = Client::new(machine.control_socket()?);
            let ran = client.status()?.state == protocol::State::Running;
            // It stands still from the snapshot to its end: what it did in between would be nowhere.
            client.pause()?;
            let kept = (|| {
                let kept = safety.then(|| create::take_running(machine, &before(name))).transpose()?;
                if !marks.is_empty() {
                    client.give(&Give { marks })?;
                }
                Ok::<_, Failure>(kept.map(|taken| taken.name))
            })();
            if kept.is_err() && ran {
                client.resume()?;
            }
            let kept = kept?;
            stop::stop(machine, 0)?;
            kept
        }
    };
    if let Some(kept) = &kept {
        ui::note(format!("{name} as it was is kept as {kept}"));
    }
    Ok(Gone { aside: house.store().set_aside(name)?, name: name.clone(), kept })
}

fn before(name: &Name) -> SnapshotRequest {
    SnapshotRequest {
        name: format!("{name}@before-{}", create::now()),
        mode: Mode::Live,
        note: "taken before a restore took its place".into(),
        at_doorbell: false,
    }
}

fn tell(restored: &Restored) -> String {
    let milliseconds = |us: u64| format!("{:.0} ms", us as f64 / 1000.0);
    let ran = milliseconds(restored.resume_us);
    // Only a snapshot with memory has more than its disks.
    let unwritten = match restored.kind {
        Kind::Live => ", without what it had only in memory",
        _ => "",
    };
    let reached = restored.resized.as_ref().filter(|resized| resized.is_complete()).map(|resized| resized.reached);
    match (restored.resumed, restored.ready_us.map(milliseconds), reached) {
        (true, Some(ready), Some(size)) => {
            format!("awake with {size}: it ran after {ran} and had its size after {ready}")
        }
        (true, Some(ready), None) => format!("awake: it ran after {ran} and answered after {ready}"),
        (false, Some(ready), _) => format!("booted from its disks{unwritten}: it answered after {ready}"),
        (true, None, _) => format!("awake: it ran after {ran}; whether it has an agent was not waited for"),
        (false, None, _) => {
            format!("boots from its disks{unwritten}: it ran after {ran}; its agent was not waited for")
        }
    }
}
