//! `catnap resize`: another size for a machine, while it runs.

use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use super::home::House;
use super::sizes::{self, Wanted};
use super::{Outcome, checks, ui};
use crate::control::protocol::{Resize, Resized, Status};
use crate::control::{Client, Code, Failure};
use crate::machine::{self, Shape};
use crate::spec::{Name, Size};
use crate::store::Machine;

/// How often the size that is reached is shown.
const GLANCE: Duration = Duration::from_millis(200);

/// Give a machine more or fewer vCPUs and memory
#[derive(clap::Args)]
#[command(after_help = "\
A running machine is resized while it runs: the guest is asked to take or to give back vCPUs and memory, and this
command returns when the guest itself shows the new size. What it cannot give back it keeps; then the size that was
reached is said, and the exit code is 4. A stopped machine has the new size from its next boot on.

A running machine can have what its envelope holds (`run --max-cpus --max-memory`), and no less memory than it booted
with. For more or less than that it must boot again.

Examples:
  catnap resize anna --cpus 4 --memory 1G
  catnap resize anna --flavor cat
  catnap resize anna --cpus 1 --json")]
pub struct Args {
    #[command(flatten)]
    wanted: Wanted,
    /// Print what came of it as JSON
    #[arg(long)]
    json: bool,
    /// The machine
    #[arg(value_name = "MACHINE")]
    name: Name,
}

/// Runs the verb.
pub fn run(args: Args) -> Outcome {
    if !args.wanted.is_some() {
        return Err(Failure::new(Code::Usage, "no size is given").hint("--cpus N, --memory SIZE or --flavor NAME"));
    }
    let house = House::open()?;
    let machine = house.machine(&args.name)?;
    if !machine.is_running()? {
        return at_rest(&machine, &args);
    }
    let client = house.client(&args.name)?;
    let now = client.status()?;
    let wanted = Resize { cpus: args.wanted.cpus(), memory: args.wanted.memory().map(Size::bytes) };
    if let Some(size) = now.size {
        sizes::warn_of_many(wanted.cpus.filter(|cpus| *cpus > size.cpus).unwrap_or(0));
        if let Some(memory) = wanted.memory.filter(|memory| *memory > size.memory) {
            checks::memory(Size(memory - size.memory))?;
        }
    }
    let resized = watch(&client, &args.name, wanted)?;
    match args.json {
        true => ui::json(&resized)?,
        false if resized.is_complete() => ui::data(format!("{} has {}\n", args.name, resized.reached))?,
        false => {}
    }
    match resized.is_complete() {
        true => Ok(ExitCode::SUCCESS),
        false => Err(sizes::fell_short(&args.name, &resized)),
    }
}

/// Resizes, and shows how far it is where someone watches.
fn watch(client: &Client, name: &Name, wanted: Resize) -> Result<Resized, Failure> {
    let progress = ui::Progress::begin(format!("Resizing {name}"));
    thread::scope(|scope| {
        let resize = scope.spawn(|| client.resize(wanted));
        while !resize.is_finished() {
            thread::sleep(if progress.is_seen() { GLANCE } else { GLANCE / 20 });
            if progress.is_seen()
                && let Ok(Status { size: Some(size), .. }) = client.status()
            {
                progress.say(format!("Resizing {name}: {size}"));
            }
        }
        let resized = resize.join().map_err(|_| Failure::new(Code::Failed, "the request broke off"))?;
        Ok(resized?)
    })
}

/// A machine that does not run gets its size at its next boot.
fn at_rest(machine: &Machine, args: &Args) -> Outcome {
    let _held = machine.lock()?;
    let spec = &machine.spec;
    let before = machine::Size { cpus: spec.cpus, memory: spec.memory.bytes() };
    let wanted = machine::Size {
        cpus: args.wanted.cpus().unwrap_or(spec.cpus),
        memory: args.wanted.memory().map_or(before.memory, Size::bytes),
    };
    // It boots anew, so there is no boot memory that it could not go below.
    let shape = Shape { boot_memory: before.memory.min(wanted.memory), ..Shape::of(spec) };
    if wanted.cpus > shape.max_cpus || wanted.memory > shape.max_memory {
        let failure = Failure::new(Code::Refused, machine::Error::Envelope { wanted, shape }.to_string());
        let name = &args.name;
        let size = format!("--cpus {} --memory {}", wanted.cpus, Size(wanted.memory));
        return Err(failure.hint(format!(
            "catnap snapshot create {name}@small && catnap restore {name}@small --name {name}-big --cold {size}"
        )));
    }
    let changed = crate::spec::MachineSpec { cpus: wanted.cpus, memory: Size(wanted.memory), ..spec.clone() };
    changed.check().map_err(|error| Failure::new(Code::Usage, error.to_string()).hint("catnap resize --help"))?;
    machine.set_size(wanted.cpus, wanted.memory)?;
    match args.json {
        true => {
            ui::json(&Resized { before, wanted, reached: wanted, guest: None, unconfirmed: false, duration_ms: 0 })?
        }
        false => ui::data(format!("{} will boot with {wanted}\n", args.name))?,
    }
    Ok(ExitCode::SUCCESS)
}
