//! `catnap pause` and `catnap resume`: the vCPUs stand still, and run on.

use super::Outcome;
use super::home::House;
use crate::spec::Name;

/// Hold machines' vCPUs still
#[derive(clap::Args)]
#[command(after_help = "\
A paused guest does nothing and notices nothing; its memory stays where it is.

Examples:
  catnap pause anna
  catnap resume anna")]
pub struct Pause {
    /// Print what the machines are then as JSON
    #[arg(long)]
    json: bool,
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
    /// Print what the machines are then as JSON
    #[arg(long)]
    json: bool,
    /// The machines
    #[arg(value_name = "MACHINE", required = true)]
    names: Vec<Name>,
}

/// Runs `pause`.
pub fn pause(args: Pause) -> Outcome {
    let house = House::open()?;
    super::each_machine(&house, &args.names, args.json, |name| {
        house.client(name)?.pause()?;
        Ok(format!("{name}\n"))
    })
}

/// Runs `resume`.
pub fn resume(args: Resume) -> Outcome {
    let house = House::open()?;
    super::each_machine(&house, &args.names, args.json, |name| {
        house.client(name)?.resume()?;
        Ok(format!("{name}\n"))
    })
}
