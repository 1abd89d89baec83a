//! `catnap rm`: removes machines.

use super::home::House;
use super::{Outcome, stop, ui};
use crate::control::{Code, Failure};
use crate::spec::Name;

/// Remove machines with their disks
#[derive(clap::Args)]
#[command(after_help = "\
What a machine wrote to its disk is gone with it, and so are its logs. Images stay.

Examples:
  catnap rm anna
  catnap rm --dry-run anna ben
  catnap rm --force anna          also when it runs: its plug is pulled")]
pub struct Args {
    /// Stop machines that run, at once
    #[arg(short, long)]
    force: bool,
    /// Only say what would be removed
    #[arg(long)]
    dry_run: bool,
    /// The machines
    #[arg(value_name = "MACHINE", required = true)]
    names: Vec<Name>,
}

/// Runs the verb.
pub fn run(args: Args) -> Outcome {
    let house = House::open()?;
    super::each(&args.names, |name| {
        // One whose files cannot be read cannot run either, and is removed like any other.
        let machine = match house.store().machine(name) {
            Err(crate::store::Error::BadMachine { .. }) => None,
            other => Some(other?),
        };
        if let Some(machine) = machine.filter(|machine| machine.is_running().unwrap_or(true)) {
            if !args.force {
                return Err(Failure::new(Code::Refused, format!("{name} runs"))
                    .hint(format!("catnap stop {name}, or catnap rm --force {name}")));
            }
            if !args.dry_run {
                stop::stop(&machine, 0)?;
            }
        }
        if !args.dry_run {
            house.store().remove_machine(name)?;
        }
        ui::data(format!("{name}\n"))
    })
}
