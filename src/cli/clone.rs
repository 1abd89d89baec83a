//! `catnap clone`: new machines from one snapshot, each its own.

use std::process::ExitCode;

use super::home::House;
use super::restore::{self, Plan, Restored};
use super::sizes::Wanted;
use super::{Outcome, checks, cpu, launch, start, ui};
use crate::control::{Code, Failure};
use crate::snapshot::Kind;
use crate::spec::{Forward, Name, Setting, Size};
use crate::sys::process;

/// Make new machines from one snapshot
#[derive(clap::Args)]
#[command(after_help = "\
Each clone wakes where the snapshot was taken, and is somebody else from then on: machine id, host name, entropy
and generation. All of them share the snapshot's memory until they write to it.

With --count, the clones are called NAME-1, NAME-2 … and a port that is published counts up from clone to clone.

Examples:
  catnap clone anna@monday bella
  catnap clone anna@monday bella --count 3 -p 8081:80
  catnap clone anna@monday bella --flavor tiger --set colour=grey")]
pub struct Args {
    /// How many
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1000))]
    count: Option<u16>,
    /// Let the clones keep machine id, host name and host keys; their entropy is renewed all the same
    #[arg(long)]
    keep_identity: bool,
    /// Set something of their sites: colour or title; can be given several times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<Setting>,
    #[command(flatten)]
    size: Wanted,
    /// A larger root disk for each; its filesystem grows to fill it
    #[arg(long, value_name = "SIZE")]
    disk_size: Option<Size>,
    /// Bring a TCP port of the guest to a port of this host's loopback; can be given several times
    #[arg(short = 'p', long = "publish", value_name = "HOST:GUEST")]
    forwards: Vec<Forward>,
    /// Print what came of it as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    patience: launch::Patience,
    /// Speak to a registry elsewhere without encryption
    #[arg(long)]
    plain_http: bool,
    /// The snapshot: a name, sha256: and some digits (`catnap snapshot ls`), or a FILE.catnap or REGISTRY/REPO:TAG, which
    /// is brought here
    #[arg(value_name = "SNAPSHOT")]
    snapshot: String,
    /// The new machine's name
    #[arg(value_name = "NAME")]
    name: Name,
}

/// Runs the verb.
pub fn run(args: Args) -> Outcome {
    process::catch_interrupts();
    let house = House::open()?;
    let snapshot = restore::locate(&house, &args.snapshot, args.plain_http)?;
    let clones = plan(&args)?;
    // All names first: half of a class is worth less than a clear no.
    if let Some((name, _)) = clones.iter().find(|(name, _)| house.store().machine(name).is_ok()) {
        return Err(crate::store::Error::MachineTaken(name.clone()).into());
    }
    let mut early = clones.first().map(|(name, _)| restore::begin(&snapshot, name, false)).transpose()?;
    restore::check_files(&house, &snapshot)?;
    if snapshot.manifest.kind == Kind::Live {
        cpu::wakes_here(&snapshot)?;
    }
    checks::kvm_quickly()?;
    let mut restored = Vec::with_capacity(clones.len());
    for (name, forwards) in clones {
        let begun = process::monotonic_us();
        let monitor = early.take().map_or_else(|| restore::begin(&snapshot, &name, false), Ok)?;
        let plan = Plan {
            snapshot: &snapshot,
            name,
            forwards,
            size: args.size.clone(),
            disk_size: args.disk_size,
            ephemeral: Vec::new(),
            cold: false,
            new_identity: !args.keep_identity,
            settings: Setting::gather(&args.settings),
            timeout: args.patience.time(),
        };
        let clone = restore::carry_out(&house, plan, monitor, begun)?;
        if !args.json {
            ui::data(start::announcement(&house.machine(&clone.name)?.spec))?;
        }
        restored.push(clone);
    }
    if args.json {
        ui::json(&restored)?;
    }
    restored.iter().try_for_each(Restored::check_size)?;
    Ok(ExitCode::SUCCESS)
}

/// Names and ports of the clones.
fn plan(args: &Args) -> Result<Vec<(Name, Vec<Forward>)>, Failure> {
    let usage = |why: String| Failure::new(Code::Usage, why).hint("catnap clone --help");
    let Some(count) = args.count else {
        return Ok(vec![(args.name.clone(), args.forwards.clone())]);
    };
    let clone = |index: u16| {
        let name = format!("{}-{}", args.name, index + 1).parse().map_err(|error| usage(format!("{error}")))?;
        let shift = |forward: &Forward| {
            let host = forward.host.checked_add(index).ok_or_else(|| usage("there are no ports above 65535".into()))?;
            Ok(Forward { host, guest: forward.guest })
        };
        Ok((name, args.forwards.iter().map(shift).collect::<Result<_, Failure>>()?))
    };
    (0..count).map(clone).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clones_are_numbered_and_their_ports_count_up() {
        let args = |count, name: &str, port: u16| Args {
            count,
            keep_identity: false,
            settings: Vec::new(),
            size: Wanted::default(),
            disk_size: None,
            forwards: vec![Forward { host: port, guest: 80 }],
            json: false,
            patience: launch::Patience::of(1),
            plain_http: false,
            snapshot: "anna@monday".into(),
            name: name.parse().unwrap(),
        };
        let planned = plan(&args(Some(2), "bella", 8081)).unwrap();
        let shown: Vec<_> = planned.iter().map(|(name, ports)| format!("{name} {}", ports[0])).collect();
        assert_eq!(shown, ["bella-1 8081:80", "bella-2 8082:80"]);
        assert_eq!(plan(&args(None, "bella", 8081)).unwrap()[0].0.to_string(), "bella");
        assert_eq!(plan(&args(Some(2), "bella", 65535)).unwrap_err().code, Code::Usage);
        assert_eq!(plan(&args(Some(9), &"x".repeat(63), 80)).unwrap_err().code, Code::Usage);
    }
}
