//! Processes that we start, and those that PID 1 inherits.
//!
//! PID 1 must reap every orphan, and yet leave the processes that we started to those who wait for them. So
//! our own are listed; the reaper peeks before it reaps, and stops at one of ours until its owner has taken
//! it and rung again.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::{self, SigSet, SigmaskHow, Signal};
use nix::unistd::getpid;

static OURS: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());
static CLOSED: AtomicBool = AtomicBool::new(false);

/// A process that we started, the leader of a session and a process group of its own. Dropping it kills the
/// whole group, unless it was waited for.
#[derive(Debug)]
pub struct Process {
    child: Child,
    handle: OwnedFd,
    waited: bool,
}

impl Process {
    /// Starts `command` with no signal blocked. With `terminal` its standard input becomes the session's
    /// controlling terminal.
    pub fn start(command: &mut Command, terminal: bool) -> io::Result<Process> {
        let prepare = move || {
            signal::sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
            nix::unistd::setsid()?;
            // SAFETY: an ioctl on a number that needs no memory of ours.
            if terminal && unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) } != 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        };
        // Held until the process is listed, so that the reaper cannot take it before.
        let mut ours = OURS.lock().unwrap_or_else(PoisonError::into_inner);
        if CLOSED.load(Ordering::Relaxed) {
            return Err(io::Error::other("the machine is going down"));
        }
        // SAFETY: the closure runs in the forked child and makes only system calls: no allocation, no locks.
        let mut child = unsafe { command.pre_exec(prepare) }.spawn()?;
        match handle_of(child.id() as i32) {
            Ok(handle) => {
                ours.insert(child.id() as i32);
                Ok(Process { child, handle, waited: false })
            }
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    /// The process' standard streams, each to be taken once.
    pub fn streams(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Waits until the process has ended, and returns its code as a shell would: 128 + n for signal n.
    pub fn wait(&mut self) -> io::Result<u8> {
        let status = self.child.wait();
        self.waited = true;
        self.unlist();
        let status = status?;
        Ok(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)) as u8)
    }

    /// Sends a signal to the process' whole group; numbers that are no signal are ignored.
    pub fn signal(&self, number: u8) {
        if (1..=64).contains(&number) && !self.waited {
            // SAFETY: kill touches no memory. The process has not been waited for, so its number is still its own.
            unsafe { libc::kill(-(self.child.id() as i32), number.into()) };
        }
    }

    fn unlist(&self) {
        OURS.lock().unwrap_or_else(PoisonError::into_inner).remove(&(self.child.id() as i32));
        if getpid().as_raw() == 1 {
            // The reaper may have stopped at this one.
            let _ = signal::kill(getpid(), Signal::SIGCHLD);
        }
    }
}

/// Readable when the process has ended.
impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.handle.as_fd()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.waited {
            self.signal(libc::SIGKILL as u8);
            let _ = self.wait();
        }
    }
}

/// Starts no more processes, for good. One that is being started is waited for.
pub fn close() {
    let _ours = OURS.lock().unwrap_or_else(PoisonError::into_inner);
    CLOSED.store(true, Ordering::Relaxed);
}

fn handle_of(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: the call touches no memory of ours; the result is checked before it is used as a descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor (close-on-exec by itself) and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Reaps the orphans that have ended. For PID 1, on every SIGCHLD.
pub fn reap_orphans() {
    let ours = OURS.lock().unwrap_or_else(PoisonError::into_inner);
    while let Some(pid) = peek().filter(|pid| !ours.contains(pid)) {
        let _ = reap(pid);
    }
}

/// Reaps everything, ours too, and says whether no child is left. For the shutdown.
pub fn reap_all() -> bool {
    loop {
        match reap(-1) {
            Ok(0) => return false,
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return true,
        }
    }
}

// nix has both calls, but fails on a child that a real-time signal killed.

/// The next child that has ended and waits to be reaped.
fn peek() -> Option<i32> {
    // SAFETY: all zeroes is a valid siginfo_t.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes one siginfo_t through the pointer, which is ours and of that type.
    let done = unsafe { libc::waitid(libc::P_ALL, 0, &mut info, libc::WEXITED | libc::WNOHANG | libc::WNOWAIT) };
    // SAFETY: for waitid the field is always set; it is 0 when no child has ended.
    let pid = unsafe { info.si_pid() };
    (done == 0 && pid != 0).then_some(pid)
}

fn reap(pid: i32) -> nix::Result<i32> {
    // SAFETY: a null status pointer is allowed.
    Errno::result(unsafe { libc::waitpid(pid, std::ptr::null_mut(), libc::WNOHANG) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_those_of_a_shell() {
        let run = |script: &str| Process::start(Command::new("/bin/sh").args(["-c", script]), false).unwrap().wait();
        assert_eq!(run("exit 7").unwrap(), 7);
        assert_eq!(run("kill -9 $$").unwrap(), 137);
    }

    #[test]
    fn a_dropped_process_takes_its_group_along() {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "sleep 1000 & echo $!; wait"]).stdout(std::process::Stdio::piped());
        let mut process = Process::start(&mut command, false).unwrap();
        let mut line = String::new();
        let stdout = process.streams().stdout.take().unwrap();
        io::BufRead::read_line(&mut io::BufReader::new(stdout), &mut line).unwrap();
        drop(process);
        let gone = || {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", line.trim())).unwrap_or_default();
            stat.is_empty() || stat.contains(") Z ")
        };
        let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while !gone() {
            assert!(std::time::Instant::now() < end, "the group's member still runs");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}
