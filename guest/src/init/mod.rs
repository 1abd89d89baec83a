//! PID 1: from the kernel's last step to a machine that serves, and down again.
//!
//! It is started from the initramfs as `/init` and goes on in the same process when the root disk is there:
//! its text stays in the initramfs, so that the root disk may even be unmounted below it. What it does before
//! `catnap: ready` is what every boot waits for, so there is nothing slow in it.

mod button;
mod console;
mod follow;
mod grow;
mod modules;
mod root;
mod settle;
mod shutdown;
mod supervise;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{self, SigSet, Signal};
use nix::unistd::getpid;

use crate::agent::Agent;
use crate::facts;
use crate::machine::Machine;
use crate::protocol::{AGENT_PORT, HOST_PORT, Hello, VERSION, write_line};
use crate::site::Site;
use crate::site::book::GuestBook;
use crate::socket::{Address, Listener, Socket};
use console::say;
pub(crate) use root::wait_for;

/// The contexts of vsock: any of our own, and the host.
const ANY: u32 = nix::libc::VMADDR_CID_ANY;
const HOST: u32 = nix::libc::VMADDR_CID_HOST;
/// How long a vsock that is not there yet is waited for.
const PATIENCE: Duration = Duration::from_secs(30);
/// Where the guest book lies.
const BOOK: &str = "/var/lib/kitten";

/// How a machine ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    Off,
    Reboot,
}

/// What PID 1 does. It must never return: the kernel would panic.
pub fn run() -> ! {
    say("init");
    // Every thread inherits the mask, so that these signals wait for `supervise` to read them.
    let signals: SigSet = supervise::SIGNALS.into_iter().collect();
    if let Err(error) = signals.thread_block() {
        say(&format!("signals: {error}"));
    }
    let options = root::Options::read();
    let later = root::find(&options).unwrap_or_else(|why| {
        say(&why);
        shutdown::stop(Ending::Off)
    });
    settle::down(&options);

    let (book, generation) = (Arc::new(GuestBook::default()), Arc::new(AtomicU64::new(0)));
    let machine = Machine::new(book.clone(), generation.clone(), "/etc/catnap".into());
    let site = Site::new(book.clone(), generation.clone());
    if let Err(error) = site.serve(Address::Tcp(([0, 0, 0, 0], 80).into())) {
        say(&format!("the site: {error}"));
    }
    answer(Agent::new(Some(machine.clone())));
    say("ready");
    site.open_book(BOOK.into());
    start("later", || {
        modules::load_each(later);
        settle::later();
        follow::follow();
    });

    let ending = supervise::until_the_end();
    shutdown::go(ending, &machine, &book)
}

/// Asks PID 1 for the end, from any thread: by the same signals that poweroff and reboot send.
pub fn ask_for_shutdown(reboot: bool) {
    if getpid().as_raw() == 1 {
        let _ = signal::kill(getpid(), if reboot { Signal::SIGTERM } else { Signal::SIGUSR2 });
    }
}

/// Listens, at once when vsock is there, and tells the host so.
fn answer(agent: Arc<Agent>) {
    let at = Address::Vsock(ANY, AGENT_PORT);
    let first = Listener::bind(at);
    start("agent", move || {
        let listener = match first.or_else(|_| retry(|| Listener::bind(at))) {
            Ok(listener) => listener,
            Err(error) => return say(&format!("no agent: {error}")),
        };
        start("hello", || {
            let hello = Hello { version: VERSION, boot_id: facts::boot_id() };
            // A host that does not listen is none of ours: nothing depends on the hello in here.
            let _ = retry(|| write_line(&mut &Socket::connect(Address::Vsock(HOST, HOST_PORT))?, &hello));
        });
        if let Err(error) = agent.serve(&listener) {
            say(&format!("the agent stopped: {error}"));
        }
    });
}

/// Tries again, more and more slowly, until it works or [`PATIENCE`] is over. Nothing tells of a vsock that
/// appears, so it is asked for.
fn retry<T>(mut attempt: impl FnMut() -> std::io::Result<T>) -> std::io::Result<T> {
    let (end, mut pause) = (Instant::now() + PATIENCE, Duration::from_millis(5));
    loop {
        match attempt() {
            Err(_) if Instant::now() < end => thread::sleep(pause),
            result => return result,
        }
        pause = (pause * 2).min(Duration::from_secs(1));
    }
}

fn start(name: &str, work: impl FnOnce() + Send + 'static) {
    let thread = thread::Builder::new().name(name.into()).stack_size(256 << 10);
    if let Err(error) = thread.spawn(work) {
        say(&format!("{name}: {error}"));
    }
}
