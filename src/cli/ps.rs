//! `catnap ps`: the list of machines.

use std::process::ExitCode;
use std::time::Duration;

use super::home::{House, State, View};
use super::{Outcome, ui};
use crate::control::Code;
use crate::spec::Size;

/// List machines
#[derive(clap::Args)]
#[command(after_help = "\
All machines are listed, whatever they do:
  running  its vCPUs run             stopped  it was shut down, or never started
  paused   its vCPUs stand still     crashed  its guest could not go on
  busy     its monitor is starting,  died     its monitor was killed
           or does not answer        lost     its host was restarted under it

Examples:
  catnap ps
  catnap ps --json
  catnap stop $(catnap ps -q --running)")]
pub struct Args {
    /// Print names only
    #[arg(short, long, conflicts_with = "json")]
    quiet: bool,
    /// Only machines that run or are paused
    #[arg(short, long)]
    running: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs the verb.
pub fn run(args: Args) -> Outcome {
    let house = House::open()?;
    let mut views = Vec::new();
    for (_, machine) in house.machines()? {
        match machine.and_then(|machine| house.view(&machine)) {
            Ok(view) => views.push(view),
            // Removed by someone else while we looked.
            Err(failure) if failure.code == Code::NotFound => {}
            Err(failure) => ui::failure(&failure),
        }
    }
    if args.running {
        views.retain(|view| matches!(view.state, State::Running | State::Paused | State::Busy));
    }
    if args.json {
        ui::json(&views)?;
    } else if args.quiet {
        ui::data(views.iter().map(|view| format!("{}\n", view.name)).collect::<String>())?;
    } else {
        let rows: Vec<_> = views.iter().map(row).collect();
        ui::table(&["NAME", "STATE", "IMAGE", "CPUS", "MEMORY", "PORTS", "EPHEMERAL", "UPTIME"], &rows)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn row(view: &View) -> Vec<String> {
    let state = match &view.detail {
        Some(detail) => format!("{} ({detail})", view.state),
        None => view.state.to_string(),
    };
    let ports: Vec<_> = view.forwards.iter().map(|forward| forward.to_string()).collect();
    let ephemeral: Vec<_> = view.ephemeral.iter().map(|disk| disk.to_string()).collect();
    let uptime = view.uptime_seconds.map(|seconds| ui::span(Duration::from_secs(seconds)));
    vec![
        view.name.to_string(),
        state,
        view.image.clone(),
        view.cpus.to_string(),
        Size(view.memory_bytes).to_string(),
        if ports.is_empty() { "-".into() } else { ports.join(",") },
        if ephemeral.is_empty() { "-".into() } else { ephemeral.join(",") },
        uptime.unwrap_or_else(|| "-".into()),
    ]
}
