//! The life of PID 1 between boot and shutdown: one sleep, and what may end it.

use std::path::PathBuf;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::Ending;
use super::button::Buttons;
use super::console::{Console, say};
use crate::children::reap_orphans;
use crate::poll::{Poll, READ};

/// The signals that mean something to PID 1. Those that end the machine are what busybox' halt (SIGUSR1),
/// poweroff (SIGUSR2) and reboot (SIGTERM) send, and Ctrl-Alt-Del (SIGINT).
pub(super) const SIGNALS: [Signal; 6] =
    [Signal::SIGCHLD, Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP];

/// The signals as a descriptor that never blocks.
pub(super) fn signal_descriptor() -> nix::Result<SignalFd> {
    let signals: SigSet = SIGNALS.into_iter().collect();
    SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
}

/// Sleeps until somebody ends the machine.
pub(super) fn until_the_end() -> Ending {
    let signals = match signal_descriptor() {
        Ok(signals) => signals,
        Err(error) => {
            say(&format!("no signals: {error}"));
            return Ending::Off;
        }
    };
    let mut buttons = Buttons::find().map_err(|error| say(&format!("no power button: {error}"))).ok();
    let mut console = Console::open();
    loop {
        match wait(&signals, buttons.as_ref(), console.as_ref()) {
            Some(Event::Signal) => {
                while let Ok(Some(info)) = signals.read_signal() {
                    match Signal::try_from(info.ssi_signo as i32) {
                        Ok(Signal::SIGCHLD) => reap_orphans(),
                        // A machine that stands still for ever is of no use in a monitor, so halt is off.
                        Ok(Signal::SIGUSR1 | Signal::SIGUSR2) => return Ending::Off,
                        Ok(Signal::SIGTERM | Signal::SIGINT) => return Ending::Reboot,
                        _ => {}
                    }
                }
            }
            Some(Event::NewDevice) => buttons.iter_mut().for_each(Buttons::look),
            Some(Event::Device(path)) if buttons.as_mut().is_some_and(|buttons| buttons.pressed(&path)) => {
                return Ending::Off;
            }
            Some(Event::Device(_)) => {}
            Some(Event::Key) => console = console.and_then(|mut console| console.key().then_some(console)),
            Some(Event::ShellEnded) => console = console.and_then(Console::ended),
            None => {}
        }
    }
}

enum Event {
    Signal,
    NewDevice,
    Device(PathBuf),
    Key,
    ShellEnded,
}

/// The next event; the first of several, as the others stay.
fn wait(signals: &SignalFd, buttons: Option<&Buttons>, console: Option<&Console>) -> Option<Event> {
    let (mut poll, mut events) = (Poll::default(), Vec::new());
    events.push((poll.add(signals, READ), Event::Signal));
    if let Some(buttons) = buttons {
        events.push((poll.add(&buttons.watch, READ), Event::NewDevice));
        for (path, device) in &buttons.devices {
            events.push((poll.add(device, READ), Event::Device(path.clone())));
        }
    }
    match console {
        Some(Console { shell: Some(shell), .. }) => events.push((poll.add(shell, READ), Event::ShellEnded)),
        Some(Console { terminal, .. }) => events.push((poll.add(terminal, READ), Event::Key)),
        None => {}
    }
    poll.wait(None).ok()?;
    events.into_iter().find(|(at, _)| poll.found(*at) != 0).map(|(_, event)| event)
}
