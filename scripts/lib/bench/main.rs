//! Measures Catnap and other monitors side by side; `scripts/bench` builds it, finds a place where guests can
//! run, and starts it there.
//!
//! All monitors get the same kernel, initramfs, command line, memory and disk content, and are looked at in
//! the same way. They take turns, so that whatever else the host does meets all of them alike. Rates of an
//! emulated host mean nothing by themselves; ratios of one run do.

mod boot;
mod clones;
mod export;
mod look;
mod monitor;
mod parts;
mod process;
mod push;
mod report;
mod resize;
mod restore;
mod snapshot;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use catnap::spec::Size;
use clap::{Parser, ValueEnum};

use monitor::Peer;

/// This program is for developers, and says what went wrong in words; nobody takes its errors apart.
type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// From process start to the first page of the guest's site
    Boot,
    /// How long a snapshot makes a guest stand still
    Snapshot,
    /// How long a guest takes to wake
    Restore,
    /// What memory clones of one snapshot cost
    Clones,
    /// A snapshot as one file, beside tar and zstd
    Export,
    /// What a registry is sent of successive snapshots
    Push,
    /// What another size brings, and how soon
    Resize,
    /// All of these but `resize`, which wants a host of two CPUs
    All,
}

/// Measures monitors side by side
#[derive(Parser)]
struct Args {
    /// What to measure
    #[arg(value_enum, default_value = "boot")]
    part: Part,
    /// The catnap to measure
    #[arg(long, value_name = "FILE")]
    catnap: PathBuf,
    /// Another monitor to measure beside it; can be given several times
    #[arg(long = "peer", value_name = "KIND=FILE")]
    peers: Vec<Peer>,
    /// A kernel in place of the image's
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// The guest's memory; several, with commas [default: boot 128M, clones, export, push and resize 256M, others 256M,1G,4G]
    #[arg(long, value_name = "SIZE", value_delimiter = ',')]
    memory: Vec<Size>,
    /// How often everything is measured
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// How many clones; several, with commas
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [1, 10], value_parser = clap::value_parser!(u32).range(1..=200))]
    clones: Vec<u32>,
    /// What runs Debian's docker-registry
    #[arg(long, value_name = "FILE", default_value = "docker-registry")]
    registry: PathBuf,
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
    let bench = parts::Bench::begin(args)?;
    let parts: &[Part] = match &args.part {
        Part::All => &[Part::Boot, Part::Snapshot, Part::Restore, Part::Clones, Part::Export, Part::Push],
        part => &[*part],
    };
    let mut sections = Vec::new();
    let measured = parts.iter().try_for_each(|part| bench.measure(*part, &mut sections));
    // What was measured before something failed took long.
    if measured.is_ok() || !sections.is_empty() {
        match args.json {
            true => report::json(bench.command_line(), &sections)?,
            false => report::tables(bench.command_line(), &sections)?,
        }
    }
    measured
}
