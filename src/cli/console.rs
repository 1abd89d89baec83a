//! `catnap console`: the guest's serial console on this terminal.

use std::io::{self, IsTerminal, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::home::House;
use super::{Outcome, ui};
use crate::control::Failure;
use crate::spec::Name;
use crate::sys::tty::RawMode;

/// Ctrl-], as in telnet and virsh: no shell and no editor wants it.
const DETACH: u8 = 0x1d;

/// Join the guest's serial console
#[derive(clap::Args)]
#[command(after_help = "\
Shows what the console showed lately, then all that comes, and types what you type. Ctrl-] leaves; the
machine runs on. Without a terminal, standard input is typed as it comes.

Examples:
  catnap console anna")]
pub struct Args {
    /// The machine
    #[arg(value_name = "MACHINE")]
    name: Name,
}

/// Runs the verb.
pub fn run(args: Args) -> Outcome {
    attach(&House::open()?, &args.name)
}

/// Joins the console of a machine until the user leaves or the guest ends.
pub fn attach(house: &House, name: &Name) -> Outcome {
    let stream = house.client(name)?.console()?;
    let failed = |error: io::Error| Failure::while_doing("the console", error);
    let raw = if io::stdin().is_terminal() {
        ui::note(format!("The console of {name}. Ctrl-] leaves it."));
        Some(RawMode::enter().map_err(failed)?)
    } else {
        None
    };
    let left = Arc::new(AtomicBool::new(false));
    let (typed, typing, is_raw) = (stream.try_clone().map_err(failed)?, Arc::clone(&left), raw.is_some());
    thread::spawn(move || type_on(typed, is_raw, &typing));
    let shown = show(stream);
    drop(raw);
    if left.load(Ordering::SeqCst) {
        ui::note(format!("\nLeft the console. {name} runs on."));
    } else {
        shown.map_err(failed)?;
        ui::note(format!("\nThe console of {name} has ended."));
    }
    Ok(ExitCode::SUCCESS)
}

/// Types standard input on the console. The end of input that is not a terminal leaves the console shown.
fn type_on(mut console: UnixStream, raw: bool, left: &AtomicBool) {
    let mut keys = [0; 1024];
    let mut stdin = io::stdin().lock();
    while let Ok(count @ 1..) = stdin.read(&mut keys) {
        let keys = &keys[..count];
        let leaves = keys.iter().position(|key| raw && *key == DETACH);
        let typed = console.write_all(&keys[..leaves.unwrap_or(count)]);
        if leaves.is_some() {
            left.store(true, Ordering::SeqCst);
            let _ = console.shutdown(Shutdown::Both);
        }
        if leaves.is_some() || typed.is_err() {
            return;
        }
    }
}

fn show(mut console: UnixStream) -> io::Result<()> {
    let mut bytes = [0; 16 * 1024];
    let mut out = io::stdout().lock();
    loop {
        match console.read(&mut bytes)? {
            0 => return Ok(()),
            count => out.write_all(&bytes[..count]).and_then(|()| out.flush())?,
        }
    }
}
