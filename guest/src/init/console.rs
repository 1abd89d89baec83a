//! The console: our few lines, and a shell for whoever presses Enter.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;

use nix::libc;

use crate::children::Process;

/// Says one line on the console. PID 1 has nobody else to tell, so failures are not looked at.
pub(super) fn say(what: &str) {
    let _ = io::stdout().write_all(format!("catnap: {what}\n").as_bytes());
    let _ = io::stdout().flush();
}

/// The terminal behind the console, and the shell on it.
pub(super) struct Console {
    pub terminal: File,
    pub shell: Option<Process>,
}

impl Console {
    /// The console's terminal; `None` when there is none.
    pub(super) fn open() -> Option<Console> {
        // /dev/console itself cannot be a controlling terminal. The last one named here is where it leads.
        let active = fs::read_to_string("/sys/class/tty/console/active").ok()?;
        let path = format!("/dev/{}", active.split_whitespace().last()?);
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        let terminal = File::options().read(true).write(true).custom_flags(flags).open(path).ok()?;
        Some(Console { terminal, shell: None })
    }

    /// Takes what was typed while no shell was there, and starts one. False when the terminal is gone.
    pub(super) fn key(&mut self) -> bool {
        let mut typed = [0; 256];
        match self.terminal.read(&mut typed) {
            Ok(0) => return false,
            Ok(_) => self.shell = self.start().ok(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return false,
        }
        true
    }

    /// Takes leave of a shell that has ended. Its end has hung up the terminal, which is opened anew.
    pub(super) fn ended(mut self) -> Option<Console> {
        if let Some(mut shell) = self.shell.take() {
            let _ = shell.wait();
        }
        Console::open()
    }

    fn start(&self) -> io::Result<Process> {
        // Opened anew, because whether reads block belongs to the open file, not to the descriptor.
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&self.terminal));
        let terminal = File::options().read(true).write(true).custom_flags(libc::O_NOCTTY).open(path)?;
        let home = if fs::exists("/root").unwrap_or(false) { "/root" } else { "/" };
        let mut command = Command::new("/bin/sh");
        command.arg("-l").current_dir(home).env("HOME", home).env("TERM", "xterm");
        command.stdin(terminal.try_clone()?).stdout(terminal.try_clone()?).stderr(terminal);
        Process::start(&mut command, true)
    }
}
