//! `catnap stop`: the power button, and the plug when that does not help.

use std::thread;
use std::time::{Duration, Instant};

use super::home::{self, House};
use super::{Outcome, ui};
use crate::control::client::{Client, Error};
use crate::control::protocol::{Ended, Stop, Wait};
use crate::control::{Code, Failure};
use crate::spec::Name;
use crate::store::Machine;

/// How long a monitor may take to go once its guest has ended.
const LEAVING: Duration = Duration::from_secs(10);
/// How often it is seen whether a snapshot has been written.
const GLANCE: Duration = Duration::from_millis(50);

/// Shut machines down
#[derive(clap::Args)]
#[command(after_help = "\
Presses the power button and waits for the guest to shut down. A guest that still runs after --time seconds
is stopped by force, as if its plug were pulled; --force does so at once. The disk stays; `catnap start`
boots the machine again. A snapshot that is being written is written to its end.

Examples:
  catnap stop anna
  catnap stop --time 5 anna ben
  catnap stop --force anna")]
pub struct Args {
    /// Pull the plug at once
    #[arg(short, long)]
    force: bool,
    /// How many seconds the guest has to shut down
    #[arg(short, long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(..=600))]
    time: u32,
    /// Print what the machines are then as JSON
    #[arg(long)]
    json: bool,
    /// The machines
    #[arg(value_name = "MACHINE", required = true)]
    names: Vec<Name>,
}

/// Runs the verb.
pub fn run(args: Args) -> Outcome {
    let house = House::open()?;
    let time = if args.force { 0 } else { args.time };
    super::each_machine(&house, &args.names, args.json, |name| {
        let machine = house.machine(name)?;
        if !machine.is_running()? {
            return Err(Failure::new(Code::Refused, format!("{name} does not run"))
                .hint(format!("catnap start {name}, or catnap rm {name}")));
        }
        if stop(&machine, time)? == Ended::Forced && !args.force {
            ui::warn(format!("{name} did not shut down within {time} seconds and was stopped by force"));
        }
        Ok(format!("{name}\n"))
    })
}

/// Stops a running machine and returns when its monitor has gone. 0 seconds: by force.
pub fn stop(machine: &Machine, seconds: u32) -> Result<Ended, Failure> {
    let client = Client::new(machine.control_socket()?);
    let mut ended = None;
    if seconds > 0 {
        let progress = ui::Progress::begin(format!("Shutting {} down", machine.spec.name));
        ended = shut_down(&client, Duration::from_secs(seconds.into()))?;
        drop(progress);
    }
    let ended = match ended {
        Some(ended) => ended,
        None => match client.stop(Stop { seconds: 0, force: true }) {
            Ok(status) => status.ended.unwrap_or(Ended::Forced),
            Err(Error::Gone { .. }) => Ended::PowerOff,
            Err(error) => return Err(error.into()),
        },
    };
    await_snapshot(&client);
    home::wait_until_free(machine, LEAVING)?;
    Ok(ended)
}

/// A snapshot that was taken while the machine ran is written to its end, however long that takes.
fn await_snapshot(client: &Client) {
    let mut progress = None;
    while let Some(taking) = client.status().ok().and_then(|status| status.taking) {
        progress.get_or_insert_with(|| ui::Progress::begin(format!("Waiting for the snapshot {}", taking.name)));
        thread::sleep(GLANCE);
    }
}

/// Presses the power button and waits; `None` when the guest still runs then.
fn shut_down(client: &Client, time: Duration) -> Result<Option<Ended>, Failure> {
    let deadline = Instant::now() + time;
    // A guest that stands still cannot hear its power button. One that is still booting cannot either, so it is
    // pressed again and again.
    let mut pressed = client.resume();
    loop {
        pressed = pressed.and_then(|_| client.power_button());
        match (client.wait(Wait::End, Duration::from_secs(1)), pressed) {
            (Ok(status), _) if status.ended.is_some() => return Ok(status.ended),
            // It ended between two questions.
            (Err(Error::Gone { .. } | Error::Io { .. }), _) => return Ok(Some(Ended::PowerOff)),
            (Err(error), _) | (_, Err(error)) => return Err(error.into()),
            (Ok(_), _) if Instant::now() >= deadline => return Ok(None),
            (going_on, _) => pressed = going_on,
        }
    }
}
