//! Starts the program of an exec request, with pipes or with a terminal.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;
use nix::pty::{grantpt, posix_openpt, unlockpt};

use crate::children::Process;
use crate::protocol::Exec;

/// Where programs are looked for when nobody says otherwise.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A running program and our ends of its streams, none of which blocks. With a terminal, all of them are it.
pub(super) struct Program {
    pub process: Process,
    pub stdin: Option<File>,
    pub stdout: Option<File>,
    pub stderr: Option<File>,
    /// The terminal once more, for its size.
    terminal: Option<OwnedFd>,
}

/// Starts the program; on failure the code to exit with (as docker does) and why.
pub(super) fn start(exec: &Exec) -> Result<Program, (u8, String)> {
    let Some(name) = exec.argv.first().filter(|name| !name.is_empty()) else {
        return Err((126, "no program was named".into()));
    };
    let folder = exec.cwd.as_deref().unwrap_or(if Path::new("/root").is_dir() { "/root" } else { "/" });
    if !Path::new(folder).is_dir() {
        return Err((126, format!("{folder}: no such folder to work in")));
    }
    let mut command = Command::new(name);
    command.args(&exec.argv[1..]).current_dir(folder).env("HOME", "/root");
    if std::env::var_os("PATH").is_none() {
        command.env("PATH", PATH);
    }
    if exec.tty.is_some() {
        command.env("TERM", "xterm");
    }
    // A name that is empty or has a `=` would be refused by the kernel's convention, not by the kernel.
    let sound = |name: &str| !name.is_empty() && !name.contains(['=', '\0']);
    command.envs(exec.env.iter().filter(|(name, _)| sound(name)).map(|(name, value)| (name, value)));
    let started = match exec.tty {
        Some(size) => with_terminal(&mut command, size),
        None => with_pipes(&mut command),
    };
    started.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => (127, format!("{name}: not found")),
        _ => (126, format!("{name}: {error}")),
    })
}

fn with_pipes(command: &mut Command) -> io::Result<Program> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = Process::start(command, false)?;
    let child = process.streams();
    let stdin = child.stdin.take().map(|pipe| nonblocking(pipe.into())).transpose()?;
    let stdout = child.stdout.take().map(|pipe| nonblocking(pipe.into())).transpose()?;
    let stderr = child.stderr.take().map(|pipe| nonblocking(pipe.into())).transpose()?;
    Ok(Program { process, stdin, stdout, stderr, terminal: None })
}

fn with_terminal(command: &mut Command, size: (u16, u16)) -> io::Result<Program> {
    let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    // The terminal's other end by number, not by name, so that it need not be visible under /dev/pts.
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: the ioctl takes a number and returns a new descriptor or an error; no memory of ours is touched.
    let fd = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor and nobody else knows of it.
    let slave = unsafe { OwnedFd::from_raw_fd(fd) };
    set_size(&slave, size)?;
    command.stdin(slave.try_clone()?).stdout(slave.try_clone()?).stderr(slave);
    let process = Process::start(command, true)?;
    let master = File::from(OwnedFd::from(master));
    let (stdin, stdout) = (Some(master.try_clone()?), Some(master.try_clone()?));
    Ok(Program { process, stdin, stdout, stderr: None, terminal: Some(master.into()) })
}

impl Program {
    /// Gives the terminal, if there is one, another size.
    pub(super) fn resize(&self, size: (u16, u16)) {
        if let Some(terminal) = &self.terminal {
            let _ = set_size(terminal, size);
        }
    }

    /// Whether the program talks to a terminal.
    pub(super) fn has_terminal(&self) -> bool {
        self.terminal.is_some()
    }
}

fn set_size(terminal: &OwnedFd, (rows, cols): (u16, u16)) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the ioctl reads one winsize through the pointer, which is valid for that.
    match unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &size) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn nonblocking(fd: OwnedFd) -> io::Result<File> {
    fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok(fd.into())
}
