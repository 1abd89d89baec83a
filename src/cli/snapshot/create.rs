//! `catnap snapshot create`: takes a snapshot of a machine.

use std::ops::ControlFlow;
use std::process::ExitCode;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::ValueEnum;

use crate::cli::home::House;
use crate::cli::{Outcome, ui};
use crate::control::protocol::{self, SnapshotRequest, Taken};
use crate::control::{Client, Code, Failure, Keeper, Watch};
use crate::machine::{Phase, Progress};
use crate::spec::{Error, Name};
use crate::store::Machine;
use crate::sys::{process, time};

/// The longest note, in bytes; the manifest's own limit.
const MAX_NOTE: usize = 4096;

/// Take a snapshot of a machine
#[derive(clap::Args)]
#[command(after_help = "\
A machine that runs goes on running: it stands still for milliseconds only, whatever its size.

  live      disks, memory and machine state: restoring it resumes the machine exactly
  crash     disks alone, as a power cut at this instant would leave them
  quiesced  disks alone, after the guest's agent ran its hooks and froze the filesystems

A machine that was shut down gets a `clean` snapshot of its disks; one that does not run for another reason, because it
was stopped by force or its host restarted, a `crash` snapshot. Ctrl-C cancels, and leaves nothing.

Examples:
  catnap snapshot create anna
  catnap snapshot create anna@monday -m 'before the upgrade'
  catnap snapshot create anna@safe --mode quiesced --json
  catnap snapshot create anna@torn --mode crash --at-doorbell")]
pub struct Args {
    /// What is captured of a machine that runs [default: live]
    #[arg(long, value_enum)]
    mode: Option<Mode>,
    /// Wait until a program in the guest rings (the guest book can), and take it before that goes on
    #[arg(long)]
    at_doorbell: bool,
    /// A note for whoever reads the list later
    #[arg(short = 'm', long = "message", value_name = "NOTE", default_value = "", hide_default_value = true)]
    note: String,
    /// Print what was taken as JSON
    #[arg(long)]
    json: bool,
    /// The machine, and a tag for the snapshot [default tag: date and time]
    #[arg(value_name = "MACHINE[@TAG]")]
    target: Target,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// Disks, memory and machine state
    Live,
    /// Disks, as a power cut would leave them
    Crash,
    /// Disks, after the guest froze its filesystems
    Quiesced,
}

impl From<Mode> for protocol::Mode {
    fn from(mode: Mode) -> protocol::Mode {
        match mode {
            Mode::Live => protocol::Mode::Live,
            Mode::Crash => protocol::Mode::Crash,
            Mode::Quiesced => protocol::Mode::Quiesced,
        }
    }
}

/// A machine, and perhaps a tag.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Target {
    machine: Name,
    tag: Option<Name>,
}

impl FromStr for Target {
    type Err = Error;

    fn from_str(text: &str) -> Result<Target, Error> {
        match text.split_once('@') {
            Some((machine, tag)) => Ok(Target { machine: machine.parse()?, tag: Some(tag.parse()?) }),
            None => Ok(Target { machine: text.parse()?, tag: None }),
        }
    }
}

/// Runs the verb.
pub fn run(args: Args) -> Outcome {
    if args.note.len() > MAX_NOTE {
        return Err(Failure::new(Code::Usage, format!("a note has at most {MAX_NOTE} bytes")));
    }
    process::catch_interrupts();
    let house = House::open()?;
    let machine = house.machine(&args.target.machine)?;
    let tag = args.target.tag.map_or_else(now, |tag| tag.to_string());
    let name = format!("{}@{tag}", args.target.machine);
    let request = SnapshotRequest {
        name,
        mode: args.mode.unwrap_or(Mode::Live).into(),
        note: args.note,
        at_doorbell: args.at_doorbell,
    };
    let taken = take(&house, &machine, &request, args.mode)?;
    match args.json {
        true => ui::json(&taken)?,
        false => {
            ui::data(format!("{}\n", taken.name))?;
            ui::note(tell(&taken));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Takes a snapshot of a machine, whatever it does now.
fn take(house: &House, machine: &Machine, request: &SnapshotRequest, mode: Option<Mode>) -> Result<Taken, Failure> {
    let name = request.name.as_str();
    // Before the machine is troubled.
    house.store().check_free(name)?;
    if machine.is_running()? {
        return take_running(machine, request);
    }
    if let Some(mode) = mode {
        let word = mode.to_possible_value().map_or(String::new(), |value| value.get_name().to_owned());
        return Err(Failure::new(
            Code::Refused,
            format!("{} does not run, so a {word} snapshot of it cannot be had", machine.spec.name),
        )
        .hint("leave --mode away for one of its disks"));
    }
    if request.at_doorbell {
        return Err(Failure::new(Code::Refused, format!("{} does not run, so nobody in it rings", machine.spec.name))
            .hint(format!("catnap start {}", machine.spec.name)));
    }
    let progress = ui::Progress::begin(format!("Taking {name}"));
    take_resting(house, machine, request, &|now| {
        progress.say(describe(name, &now));
        if process::interrupted() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })
}

/// Takes a snapshot of the disk of a machine that does not run.
pub fn take_resting(
    house: &House,
    machine: &Machine,
    request: &SnapshotRequest,
    watch: Watch<'_>,
) -> Result<Taken, Failure> {
    // Before it is locked, which is how a machine that runs is told.
    let kind = house.kind_at_rest(machine)?;
    let _held = machine.lock()?;
    let keeper = Keeper { store: house.store().clone(), machine: machine.clone(), files: house.files(machine)? };
    keeper.take_resting(kind, request, watch)
}

/// Has the machine's monitor take a snapshot.
pub fn take_running(machine: &Machine, request: &SnapshotRequest) -> Result<Taken, Failure> {
    let client = Client::new(machine.control_socket()?);
    let progress = ui::Progress::begin(format!("Taking {}", request.name));
    let taken = client.snapshot(request, |now| {
        if let Some(now) = now {
            progress.say(describe(&request.name, &now));
        }
        if process::interrupted() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    Ok(taken?)
}

fn describe(name: &str, progress: &Progress) -> String {
    let what = match progress.phase {
        Phase::Doorbell => return format!("Taking {name} as soon as the guest rings"),
        Phase::Turn => return format!("Taking {name} when another snapshot of it is there"),
        Phase::Memory => "writing memory",
        Phase::Digests => "digesting",
    };
    let percent = (progress.done * 100).checked_div(progress.total).unwrap_or(100);
    format!("Taking {name}: {what}, {percent}% of {} MiB", progress.total >> 20)
}

fn tell(taken: &Taken) -> String {
    let kind = serde_json::to_value(taken.kind).ok().and_then(|kind| kind.as_str().map(str::to_owned));
    let pause = match taken.pause_us {
        0 => String::new(),
        us => format!(", the guest stood still for {:.1} ms", us as f64 / 1000.0),
    };
    format!("{}{pause}, done after {:.2} s", kind.unwrap_or_default(), taken.duration_ms as f64 / 1000.0)
}

/// The tag of this moment: date and time in UTC, such as `2026-11-24-205730`.
pub fn now() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    time::tag(since.as_secs()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_machines_with_or_without_a_tag() {
        let target =
            |text: &str| text.parse::<Target>().ok().map(|t| (t.machine.to_string(), t.tag.map(|t| t.to_string())));
        assert_eq!(target("anna"), Some(("anna".into(), None)));
        assert_eq!(target("anna@monday"), Some(("anna".into(), Some("monday".into()))));
        for bad in ["", "@monday", "anna@", "anna@a@b", "../anna@x"] {
            assert_eq!(target(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_tag_for_now_can_be_a_tag() {
        assert!(now().parse::<Name>().is_ok());
    }
}
