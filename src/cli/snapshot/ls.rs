//! `catnap snapshot ls`: the list of snapshots.

use std::process::ExitCode;

use super::view::{self, View};
use crate::cli::home::House;
use crate::cli::{Outcome, ui};
use crate::spec::{Name, Size};

/// The longest note that is shown in a table.
const NOTE: usize = 40;

/// List snapshots
#[derive(clap::Args)]
#[command(after_help = "\
The kinds:
  live      memory and disks: its machine goes on where it was
  crash     disks alone, as a power cut would have left them
  quiesced  disks alone, of a guest whose filesystems were frozen
  clean     disks alone, of a machine that was shut down
SIZE is what the snapshot alone takes; SHARED is in files that other snapshots have too.

Examples:
  catnap snapshot ls
  catnap snapshot ls anna --json
  catnap snapshot ls --all        with base images
  catnap snapshot verify $(catnap snapshot ls -q anna)")]
pub struct Args {
    /// Base images too
    #[arg(short, long)]
    all: bool,
    /// Print names only
    #[arg(short, long, conflicts_with = "json")]
    quiet: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Only those of this machine
    #[arg(value_name = "MACHINE")]
    machine: Option<Name>,
}

/// Runs the verb.
pub fn run(args: Args) -> Outcome {
    let house = House::open()?;
    let family = house.store().family()?;
    let mut views = view::views(&family, &house.store().usage()?);
    if let Some(machine) = &args.machine {
        view::check_machine(machine, &family, &views)?;
        views.retain(|view| view.is_of(machine));
    }
    views.retain(|view| args.all || !view.image);
    if args.json {
        ui::json(&views)?;
    } else if args.quiet {
        ui::data(views.iter().map(|view| view.reference() + "\n").collect::<String>())?;
    } else {
        let rows: Vec<_> = views.iter().map(row).collect();
        ui::table(&["NAME", "KIND", "AGE", "SIZE", "SHARED", "CPUS", "MEMORY", "NOTE"], &rows)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn row(view: &View) -> Vec<String> {
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
    vec![
        view.name(),
        view.kind().into(),
        view.age(),
        ui::amount(view.sizes.own),
        ui::amount(view.sizes.shared),
        or_dash(view.cpus.map(|cpus| cpus.to_string())),
        or_dash(view.memory_bytes.map(|bytes| Size(bytes).to_string())),
        view.note(NOTE),
    ]
}
