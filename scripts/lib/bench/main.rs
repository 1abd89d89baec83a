//! Measures Catnap and other monitors side by side; `scripts/bench` builds it, finds a place where guests can
//! run, and starts it there.
//!
//! All monitors get the same kernel, initramfs, command line, memory and disk content, and are looked at in
//! the same way. They take turns, so that whatever else the host does meets all of them alike. Rates of an
//! emulated host mean nothing by themselves; ratios of one run do.

mod boot;
mod monitor;
mod process;
mod report;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use catnap::spec::Size;
use clap::Parser;

use monitor::{Catnap, Monitor, Peer};

/// This program is for developers, and says what went wrong in words; nobody takes its errors apart.
type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Measures monitors side by side
#[derive(Parser)]
struct Args {
    /// The catnap to measure
    #[arg(long, value_name = "FILE")]
    catnap: PathBuf,
    /// Another monitor to measure beside it; can be given several times
    #[arg(long = "peer", value_name = "KIND=FILE")]
    peers: Vec<Peer>,
    /// A kernel in place of the image's
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// The guest's memory
    #[arg(long, value_name = "SIZE", default_value = "128M")]
    memory: Size,
    /// How often everything is measured
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// Words to add to the kernel's command line
    #[arg(long, value_name = "WORDS", default_value = "", hide_default_value = true, allow_hyphen_values = true)]
    append: String,
    /// Print JSON, with every single figure
    #[arg(long)]
    json: bool,
    /// What `cargo bench` says to everything that it runs
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let work = tempfile::tempdir()?;
    let catnap = Catnap::new(&args.catnap, args.kernel.as_deref(), args.memory, &args.append)?;
    eprintln!("bench: warming up");
    let guest = catnap.warm_up(work.path())?;
    let mut monitors: Vec<Box<dyn Monitor>> = vec![Box::new(catnap)];
    for peer in &args.peers {
        monitors.push(peer.monitor(guest.clone()));
    }
    let mut columns: Vec<_> = monitors.iter().map(|monitor| report::Column::new(monitor.name())).collect();
    for run in 1..=args.runs {
        for (monitor, column) in monitors.iter().zip(&mut columns) {
            eprintln!("bench: run {run} of {}: {}", args.runs, monitor.name());
            let folder = tempfile::tempdir_in(work.path())?;
            let sample = boot::measure(monitor.as_ref(), folder.path());
            column.samples.push(sample.map_err(|error| format!("{}: {error}", monitor.name()))?);
        }
    }
    match args.json {
        true => report::json(&guest, &columns),
        false => report::table(&guest, &columns),
    }
}
