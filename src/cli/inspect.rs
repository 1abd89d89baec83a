//! `catnap inspect`: all that is known of machines, as JSON.

use std::path::PathBuf;

use serde::Serialize;

use super::home::{self, House, View};
use super::record::Record;
use super::{Outcome, ui};
use crate::control::Failure;
use crate::control::protocol::Status;
use crate::spec::{MachineSpec, Name};

/// Show all that is known of machines
#[derive(clap::Args)]
#[command(after_help = "\
Prints a JSON list with an object for each machine.

Examples:
  catnap inspect anna
  catnap inspect anna | jq -r '.[0].files.console_log'")]
pub struct Args {
    /// Accepted for the sake of habit: the output is JSON anyway
    #[arg(long)]
    json: bool,
    /// The machines
    #[arg(value_name = "MACHINE", required = true)]
    names: Vec<Name>,
}

/// Everything about one machine.
#[derive(Serialize)]
struct Everything {
    #[serde(flatten)]
    view: View,
    /// How it was made.
    machine: MachineSpec,
    /// Its last run, or the one under way.
    #[serde(skip_serializing_if = "Option::is_none")]
    run: Option<Record>,
    /// What its monitor says.
    #[serde(skip_serializing_if = "Option::is_none")]
    monitor: Option<Status>,
    files: Files,
}

#[derive(Serialize)]
struct Files {
    folder: PathBuf,
    disk: PathBuf,
    console_log: PathBuf,
    monitor_log: PathBuf,
    socket: PathBuf,
}

/// Runs the verb.
pub fn run(args: Args) -> Outcome {
    let house = House::open()?;
    let mut all = Vec::new();
    let outcome = super::each(&args.names, |name| {
        all.push(everything(&house, name)?);
        Ok(())
    })?;
    ui::json(&all)?;
    Ok(outcome)
}

fn everything(house: &House, name: &Name) -> Result<Everything, Failure> {
    let machine = house.machine(name)?;
    Ok(Everything {
        view: house.view(&machine)?,
        run: Record::read(&machine.dir),
        monitor: if machine.is_running()? { home::status(&machine)? } else { None },
        files: Files {
            folder: machine.dir.clone(),
            disk: machine.disk(),
            console_log: machine.console_log()?,
            monitor_log: machine.monitor_log()?,
            socket: machine.control_socket()?,
        },
        machine: machine.spec,
    })
}
