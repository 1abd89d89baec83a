//! `catnap disk`: disks in the host's memory, put into machines that run and taken out again.

use std::process::ExitCode;

use super::home::House;
use super::{Outcome, ui};
use crate::control::protocol::{Detach, Status};
use crate::control::{Code, Failure};
use crate::machine::Standing;
use crate::spec::{Ephemeral, Name};

/// Put disks into running machines and take them out
#[derive(clap::Args)]
#[command(after_help = "\
Such a disk lives in this host's memory, on a tmpfs. It is blank at first, in no snapshot, and wiped when it is
given up: when it is detached, when the machine stops, and when the host restarts. docs/transient.md tells what
it survives.

Examples:
  catnap disk attach anna --ephemeral 64M
  catnap disk attach anna --ephemeral 1G:/scratch
  catnap disk detach anna
  catnap disk detach anna /scratch --force")]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(clap::Subcommand)]
enum Verb {
    Attach(Attach),
    Detach(DetachArgs),
}

/// Put a blank disk into a running machine, and mount it there
#[derive(clap::Args)]
#[command(after_help = "\
It is there until it is detached or the machine stops; `catnap run --ephemeral` gives a machine one at every start.

Examples:
  catnap disk attach anna --ephemeral 64M")]
struct Attach {
    /// The machine
    #[arg(value_name = "MACHINE")]
    name: Name,
    /// Its size, and where the guest mounts it [default: /mnt]
    #[arg(long, value_name = "SIZE[:PATH]")]
    ephemeral: Ephemeral,
}

/// Take a disk out of a running machine, which wipes it
#[derive(clap::Args)]
#[command(after_help = "\
The guest unmounts it first, and refuses to while programs have files of it open. With --force it is taken out in
any case, and those programs see I/O errors.

Examples:
  catnap disk detach anna
  catnap disk detach anna /scratch
  catnap disk detach anna bay0 --force")]
struct DetachArgs {
    /// Take it out whatever the guest says
    #[arg(short, long)]
    force: bool,
    /// The machine
    #[arg(value_name = "MACHINE")]
    name: Name,
    /// The disk: where it is mounted, or its bay [default: the only one]
    #[arg(value_name = "DISK")]
    disk: Option<String>,
}

/// Runs the verb.
pub fn run(args: Args) -> Outcome {
    let house = House::open()?;
    match args.verb {
        Verb::Attach(Attach { name, ephemeral }) => {
            let status = house.client(&name)?.attach(&ephemeral)?;
            ui::data(format!("{}\n", ephemeral.at))?;
            tell(&name, &status);
        }
        Verb::Detach(DetachArgs { force, name, disk }) => {
            let client = house.client(&name)?;
            let disk = match disk {
                Some(disk) => disk,
                None => only(&name, &client.status()?)?,
            };
            client.detach(&Detach { disk: disk.clone(), force })?;
            ui::data(format!("{disk}\n"))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn only(name: &Name, status: &Status) -> Result<String, Failure> {
    match status.ephemeral.as_slice() {
        [one] => Ok(one.at.clone()),
        [] => Err(Failure::new(Code::NotFound, format!("{name} has no ephemeral disk"))
            .hint(format!("catnap disk attach {name} --ephemeral 64M"))),
        many => {
            let places: Vec<_> = many.iter().map(|drive| drive.at.as_str()).collect();
            Err(Failure::new(Code::Usage, format!("{name} has several: {}", places.join(", ")))
                .hint(format!("catnap disk detach {name} {}", places[0])))
        }
    }
}

/// Warns of disks that are not as they should be.
pub fn tell(name: &Name, status: &Status) {
    for drive in &status.ephemeral {
        let disk = format!("the ephemeral disk on {} of {name}", drive.at);
        match (drive.state, drive.note.as_deref()) {
            (Standing::Mounted, None) => {}
            (Standing::Mounted, Some(note)) => ui::warn(format!("{disk}: {note}")),
            (_, note) => ui::warn(format!("{disk} is not mounted: {}", note.unwrap_or("its agent was not asked"))),
        }
    }
}
