//! The way down: nothing that was acknowledged is lost, and nothing can hold it up for long.

use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::{self, Signal};
use nix::sys::signalfd::SignalFd;
use nix::unistd::{Pid, sync};

use super::Ending;
use super::console::say;
use super::supervise::signal_descriptor;
use crate::children::{self, reap_all};
use crate::machine::{Machine, mounts};
use crate::poll::{Poll, READ};
use crate::site::book::GuestBook;

/// The time that processes have to end by themselves, and the time that the kernel has to kill them.
const ASKED: Duration = Duration::from_secs(5);
const KILLED: Duration = Duration::from_secs(2);
/// The time that the kernel has to let go of the files of the dead.
const LET_GO: Duration = Duration::from_secs(2);

/// Ends everything in order, and then the machine.
pub(super) fn go(ending: Ending, machine: &Machine, book: &GuestBook) -> ! {
    // A frozen filesystem would hold up every process that writes, and us.
    let _ = machine.thaw();
    children::close();
    if let Ok(signals) = signal_descriptor() {
        // A shell ignores SIGTERM and ends on SIGHUP; a stopped process hears neither until it goes on.
        for polite in [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGCONT] {
            let _ = signal::kill(Pid::from_raw(-1), polite);
        }
        if !all_ended(&signals, ASKED) {
            let _ = signal::kill(Pid::from_raw(-1), Signal::SIGKILL);
            all_ended(&signals, KILLED);
        }
    }
    book.close();
    sync();
    for mount in mounts().iter().rev().filter(|mount| mount.on_disk()) {
        unmount(&mount.at);
    }
    stop(ending)
}

/// Whether the last process but us has ended in time.
fn all_ended(signals: &SignalFd, time: Duration) -> bool {
    let end = Instant::now() + time;
    loop {
        // Orphans become our children, so when there is no child there is nobody.
        if reap_all() {
            return true;
        }
        let left = end.saturating_duration_since(Instant::now());
        let mut poll = Poll::default();
        poll.add(signals, READ);
        if left.is_zero() || poll.wait(Some(left)).is_err() {
            return false;
        }
        while let Ok(Some(_)) = signals.read_signal() {}
    }
}

/// The root cannot be unmounted while we stand on it; read-only is as good. The kernel lets go of the files of those who
/// have ended a little later than it says that they have.
fn unmount(at: &Path) {
    let end = Instant::now() + LET_GO;
    while let Err(error) = let_go(at) {
        if error != Errno::EBUSY || Instant::now() >= end {
            return say(&format!("{}: {error}", at.display()));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn let_go(at: &Path) -> nix::Result<()> {
    if at != Path::new("/") && umount2(at, MntFlags::empty()).is_ok() {
        return Ok(());
    }
    mount(None::<&str>, at, None::<&str>, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, None::<&str>)
}

/// Turns the machine off, or reboots it, here and now.
pub(super) fn stop(ending: Ending) -> ! {
    sync();
    let mode = match ending {
        Ending::Off => RebootMode::RB_POWER_OFF,
        Ending::Reboot => RebootMode::RB_AUTOBOOT,
    };
    let Err(error) = reboot(mode);
    say(&format!("{mode:?}: {error}"));
    // A machine that cannot be turned off sleeps.
    loop {
        std::thread::park();
    }
}
