//! `catnap pause` and `catnap resume`: the vCPUs stand still, and run on.

use super::home::House;
use super::{Outcome, ui};
use crate::spec::Name;

/// Hold machines' vCPUs still
#[derive(clap::Args)]
#[command(after_help = "\
A paused guest does nothing and notices nothing; its memory stays where it is.

Examples:
  catnap pause anna
  catnap resume anna")]
pub struct Pause {
    /// The machines
    #[arg(value_name = "MACHINE", required = true)]
    names: Vec<Name>,
}

/// Let paused machines run on
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  catnap resume anna")]
pub struct Resume {
    /// The machines
    #[arg(value_name = "MACHINE", required = true)]
    names: Vec<Name>,
}

/// Runs `pause`.
pub fn pause(args: Pause) -> Outcome {
    let house = House::open()?;
    super::each(&args.names, |name| {
        house.client(name)?.pause()?;
        ui::data(format!("{name}\n"))
    })
}

/// Runs `resume`.
pub fn resume(args: Resume) -> Outcome {
    let house = House::open()?;
    super::each(&args.names, |name| {
        house.client(name)?.resume()?;
        ui::data(format!("{name}\n"))
    })
}
