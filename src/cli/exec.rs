//! `catnap exec`: runs a program in the guest, with its streams, its signals and its exit code.

use std::io::{self, IsTerminal, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, TryLockError};
use std::thread;
use std::time::Duration;

use catnap_guest::protocol::{Exec, Frame};

use super::home::House;
use super::{Outcome, ui};
use crate::control::{Code, Failure};
use crate::spec::Name;
use crate::sys::process::Signals;
use crate::sys::tty::{self, RawMode};

/// The exit code for a program that Catnap itself could not get to, as docker has it.
const UNREACHED: u8 = 125;
/// The exit code of a program whose output nobody reads any more (128 + SIGPIPE).
const UNHEARD: u8 = 141;
/// The exit code of a program that was interrupted (128 + SIGINT).
const INTERRUPTED: i32 = 130;

/// Run a program in the guest
#[derive(clap::Args)]
#[command(after_help = "\
The exit code is the program's own. 125: the guest could not be reached, 126: the program cannot be run,
127: there is no such program.

Examples:
  catnap exec anna -- uname -a
  catnap exec anna -- sh                          a shell, with a terminal of its own
  echo hello | catnap exec anna -- tee /root/note  what is piped in reaches the program
  catnap exec -e LANG=C -w /tmp anna -- ls -l")]
pub struct Args {
    /// Pass standard input on (as is done anyway when it is not a terminal)
    #[arg(short, long)]
    interactive: bool,
    /// Give the program a terminal (as is done anyway when standard input and output are one)
    #[arg(short, long)]
    tty: bool,
    /// Give the program no terminal
    #[arg(short = 'T', long, conflicts_with = "tty")]
    no_tty: bool,
    /// Set a variable for the program
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = variable)]
    env: Vec<(String, String)>,
    /// Start in this folder
    #[arg(short, long, value_name = "FOLDER")]
    workdir: Option<String>,
    /// The machine
    #[arg(value_name = "MACHINE")]
    name: Name,
    /// The program and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

fn variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.into(), value.into())),
        _ => Err("write NAME=VALUE".into()),
    }
}

/// Runs the verb.
pub fn run(args: Args) -> Outcome {
    match attend(args) {
        Ok(code) => Ok(ExitCode::from(code)),
        Err(failure) => {
            ui::failure(&failure);
            Ok(ExitCode::from(UNREACHED))
        }
    }
}

fn attend(args: Args) -> Result<u8, Failure> {
    let typed = io::stdin().is_terminal();
    let terminal = (args.tty || typed && io::stdout().is_terminal()) && !args.no_tty;
    if terminal && !typed {
        return Err(Failure::new(Code::Usage, "standard input is not a terminal").hint("leave out --tty"));
    }
    let house = House::open()?;
    let exec = Exec {
        argv: args.command,
        env: with_term(args.env, terminal),
        cwd: args.workdir,
        tty: terminal.then(|| tty::size().unwrap_or((24, 80))),
    };
    // Before any thread starts, so that all of them hold these signals back for the one that waits for them.
    let wanted: &[i32] = if terminal { &[libc::SIGWINCH] } else { &[libc::SIGINT, libc::SIGTERM, libc::SIGHUP] };
    let failed = |error| Failure::while_doing("exec", error);
    let stream = house.client(&args.name)?.exec(&exec)?;
    let signals = Signals::block(wanted).map_err(failed)?;
    let to_guest = Arc::new(Mutex::new(stream.try_clone().map_err(failed)?));
    let raw = if terminal { Some(RawMode::enter().map_err(failed)?) } else { None };

    let sender = Arc::clone(&to_guest);
    thread::spawn(move || pass_signals(&signals, &sender));
    let pass_input = terminal || args.interactive || !typed;
    thread::spawn(move || send_input(pass_input, &to_guest));
    let ended = show_output(stream);
    drop(raw);
    match ended? {
        Frame::Exit(code) => Ok(code),
        Frame::Failed(code, why) => {
            ui::failure(&Failure::new(Code::Failed, ui::harmless(why.as_bytes())));
            Ok(code)
        }
        _ => Err(Failure::new(Code::Failed, "the guest's agent broke the protocol")),
    }
}

/// A program on our terminal must know what kind of terminal that is.
fn with_term(mut env: Vec<(String, String)>, terminal: bool) -> Vec<(String, String)> {
    if let (true, Ok(kind)) = (terminal && env.iter().all(|(name, _)| name != "TERM"), std::env::var("TERM")) {
        env.push(("TERM".into(), kind));
    }
    env
}

/// Carries standard input to the guest until its end, which an empty frame tells.
fn send_input(pass: bool, to_guest: &Mutex<UnixStream>) {
    let mut bytes = [0; 16 * 1024];
    let mut stdin = io::stdin().lock();
    loop {
        let count = match pass.then(|| stdin.read(&mut bytes)) {
            Some(Err(error)) if error.kind() == io::ErrorKind::Interrupted => continue,
            Some(Ok(count)) => count,
            Some(Err(_)) | None => 0,
        };
        let Ok(mut stream) = to_guest.lock() else { return };
        if Frame::Stdin(bytes[..count].to_vec()).write(&mut *stream).is_err() || count == 0 {
            return;
        }
    }
}

/// Carries signals and the terminal's size to the guest.
fn pass_signals(signals: &Signals, to_guest: &Mutex<UnixStream>) {
    loop {
        let frame = match (signals.wait(), tty::size()) {
            (libc::SIGWINCH, Some((rows, cols))) => Frame::Resize(rows, cols),
            (libc::SIGWINCH, None) => continue,
            (signal, _) => Frame::Signal(signal as u8),
        };
        let sent = patiently(to_guest).is_some_and(|mut stream| frame.write(&mut *stream).is_ok());
        if let (false, Frame::Signal(_)) = (sent, &frame) {
            // Our input is stuck in front of a guest that does not take it: whoever interrupts means us.
            std::process::exit(INTERRUPTED);
        }
    }
}

/// The lock, unless its holder keeps it for longer than a second.
fn patiently(to_guest: &Mutex<UnixStream>) -> Option<std::sync::MutexGuard<'_, UnixStream>> {
    for _ in 0..100 {
        match to_guest.try_lock() {
            Ok(guard) => return Some(guard),
            Err(TryLockError::Poisoned(_)) => return None,
            Err(TryLockError::WouldBlock) => thread::sleep(Duration::from_millis(10)),
        }
    }
    None
}

/// Shows what the program says until its last frame, which is given back.
fn show_output(stream: UnixStream) -> Result<Frame, Failure> {
    let lost = |why: String| Failure::new(Code::Failed, format!("the connection to the guest was lost: {why}"));
    let mut from_guest = io::BufReader::new(stream);
    loop {
        let frame = Frame::read(&mut from_guest).map_err(|error| lost(error.to_string()))?;
        let shown = match frame {
            Some(Frame::Stdout(bytes)) => show(&mut io::stdout(), &bytes),
            Some(Frame::Stderr(bytes)) => show(&mut io::stderr(), &bytes),
            Some(last) => return Ok(last),
            None => return Err(lost("it ended before the program did".into())),
        };
        match shown {
            // A reader that has seen enough (`| head`): leaving ends the program in the guest.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(Frame::Exit(UNHEARD)),
            shown => shown.map_err(|error| Failure::while_doing("the output cannot be written", error))?,
        }
    }
}

fn show(to: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes).and_then(|()| to.flush())
}
