//! Processes: which boot of the host this is, a process that outlives its parent, and signals.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::num::NonZero;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

/// The longest readiness report, in bytes.
const MAX_REPORT: u64 = 64 * 1024;

/// Where [`boot_id`] is read (random(4)).
pub const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The kernel's random id of this boot of the host; another one after a restart.
pub fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string(BOOT_ID)?.trim().to_owned())
}

/// How many CPUs this process can keep busy; 1 when nobody tells. It is asked once: the kernel lets nobody read the file in
/// which that is, `/proc/self/cgroup`, for the milliseconds that it takes to make a VM of KVM.
pub fn cpus() -> usize {
    static CPUS: OnceLock<usize> = OnceLock::new();
    *CPUS.get_or_init(|| thread::available_parallelism().map_or(1, NonZero::get))
}

/// The host's monotonic clock in microseconds: the same for all processes of one boot.
pub fn monotonic_us() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a live timespec; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    time.tv_sec as u64 * 1_000_000 + time.tv_nsec as u64 / 1000
}

/// When this process began, by the same clock: when this was first asked, by the first words of `main`.
pub fn begun_us() -> u64 {
    static BEGUN: OnceLock<u64> = OnceLock::new();
    *BEGUN.get_or_init(monotonic_us)
}

/// A process that was started by [`spawn_detached`] and has not reported yet.
pub struct Detached {
    child: Child,
}

/// Starts `program`, which is to [`detach`] itself, so that neither this terminal's signals nor its end reach it. That is
/// not done for it between fork and exec: so this process's memory need not be copied for the fork.
/// Its standard input is a pipe by which it may be told to go on ([`Detached::go_on`], [`wait_for_word`]), its standard
/// error is this process's until it has a log ([`log_to`]), and its standard output is the readiness pipe: the process
/// writes its report there and then calls [`end_report`].
pub fn spawn_detached(program: &Path, args: &[&str]) -> io::Result<Detached> {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped());
    // What is relative to this folder would mean another one there.
    if let Some(home) = std::env::var_os("CATNAP_HOME").filter(|home| !home.is_empty()) {
        command.env("CATNAP_HOME", std::path::absolute(home)?);
    }
    Ok(Detached { child: command.spawn()? })
}

/// Called in the detached process, first of all: leaves the session and the folder of whoever started it. One that leads a
/// group of processes, since a shell started it, stays in its session.
pub fn detach() -> io::Result<()> {
    // SAFETY: it touches no memory. The kernel refuses it to leaders of a group, and for no other reason (setsid(2)).
    unsafe { libc::setsid() };
    std::env::set_current_dir("/")
}

impl Detached {
    /// The process's id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it has said that it is [`busy`], or has died, which its report tells.
    pub fn wait_until_busy(&mut self) {
        if let Some(pipe) = &mut self.child.stdout {
            let _ = pipe.read(&mut [0]);
        }
    }

    /// Lets it go on that waits for this. One that has died meanwhile says so by its report.
    pub fn go_on(&mut self) {
        if let Some(mut pipe) = self.child.stdin.take() {
            let _ = pipe.write_all(b"\n");
        }
    }

    /// Waits for the report: whatever the process wrote before it ended its report, or died.
    pub fn report(&mut self) -> io::Result<Vec<u8>> {
        let mut report = Vec::new();
        if let Some(pipe) = self.child.stdout.take() {
            pipe.take(MAX_REPORT).read_to_end(&mut report)?;
        }
        Ok(report)
    }

    /// Ends the process by force and waits for it.
    pub fn kill(&mut self) -> io::Result<()> {
        self.child.kill()?;
        self.child.wait().map(drop)
    }
}

/// Called in the detached process: says that it is well under way, by a blank in front of its report.
pub fn busy() {
    let mut out = io::stdout().lock();
    // Whoever is not there to hear it is missed soon enough.
    let _ = out.write_all(b"\n").and_then(|()| out.flush());
}

/// Called in the detached process: waits until it may go on. `false` when nobody is there any more who could say so.
pub fn wait_for_word() -> bool {
    matches!(io::stdin().lock().read(&mut [0]), Ok(1..))
}

/// Called in the detached process: from now on what it says on standard error is appended to this file.
pub fn log_to(path: &Path) -> io::Result<()> {
    let log = File::options().append(true).create(true).open(path)?;
    // SAFETY: the file is open, and standard error belongs to this process for as long as it lives.
    let result = unsafe { libc::dup2(log.as_raw_fd(), libc::STDERR_FILENO) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Called in the detached process: writes the report and lets go of the pipe; from now on standard output
/// goes where standard error goes, to the log.
pub fn end_report(report: &[u8]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(report)?;
    out.flush()?;
    // SAFETY: both descriptors belong to this process's standard streams, which live as long as it does; the
    // lock on standard output keeps other threads from writing in between.
    let result = unsafe { libc::dup2(io::stderr().as_fd().as_raw_fd(), libc::STDOUT_FILENO) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Signals that are taken by a thread in place of interrupting one.
pub struct Signals(libc::sigset_t);

impl Signals {
    /// Holds these signals back from this thread and all that it starts. Call it before starting threads.
    pub fn block(signals: &[libc::c_int]) -> io::Result<Signals> {
        // SAFETY: `sigset_t` is plain memory; sigemptyset makes it a valid set before anything reads it.
        let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: `set` outlives the calls and sigaddset refuses numbers that are not signals.
        let result = unsafe {
            libc::sigemptyset(&mut set);
            signals.iter().for_each(|signal| {
                libc::sigaddset(&mut set, *signal);
            });
            libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut())
        };
        if result == 0 { Ok(Signals(set)) } else { Err(io::Error::from_raw_os_error(result)) }
    }

    /// Waits for the next of them.
    pub fn wait(&self) -> libc::c_int {
        let mut signal = 0;
        // SAFETY: both pointers are valid for the call. sigwait fails only for an invalid set, which `block`
        // rules out.
        while unsafe { libc::sigwait(&self.0, &mut signal) } != 0 {}
        signal
    }
}

/// When the first interrupt was caught, in microseconds of CLOCK_MONOTONIC; 0 for never.
static INTERRUPTED: AtomicU64 = AtomicU64::new(0);
/// How long what was begun may take to come to its end before another interrupt ends everything at once, in microseconds.
const PATIENCE: u64 = 1_000_000;

extern "C" fn on_interrupt(signal: libc::c_int) {
    let now = monotonic_us().max(1);
    match INTERRUPTED.compare_exchange(0, now, Ordering::SeqCst, Ordering::SeqCst) {
        Err(first) if now.saturating_sub(first) > PATIENCE => {
            // SAFETY: both may be called in a signal handler (signal-safety(7)) and touch no memory.
            unsafe {
                libc::signal(signal, libc::SIG_DFL);
                libc::raise(signal);
            }
        }
        _ => {}
    }
}

/// From now on Ctrl-C and SIGTERM only set a flag, so that what was begun can be taken back in good order. Whoever
/// presses it again a second later wants no order: that ends this process, and what it leaves is swept like any other's.
pub fn catch_interrupts() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: the handler touches an atomic and calls what a handler may call (signal-safety(7)). Programs that are started later do not inherit it.
        unsafe { libc::signal(signal, on_interrupt as *const () as libc::sighandler_t) };
    }
}

/// Whether a caught interrupt came.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst) != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Detached {
        spawn_detached(Path::new("/bin/sh"), &["-c", script]).unwrap()
    }

    #[test]
    fn a_detached_process_is_busy_for_a_while_and_reports() {
        let mut child = shell("echo; read -r word; echo \"$$\"");
        child.wait_until_busy();
        child.go_on();
        assert_eq!(String::from_utf8(child.report().unwrap()).unwrap(), format!("{}\n", child.id()));
        // One that dies before that keeps nobody waiting.
        let mut child = shell("exit 1");
        child.wait_until_busy();
        assert_eq!(child.report().unwrap(), b"");
    }

    #[test]
    fn whoever_detaches_has_a_session_and_a_folder_of_its_own() {
        let task = || {
            let mut folder = [0_u8; 8];
            let detached = detach().is_ok();
            // SAFETY: both only ask the kernel, and the folder's name has room.
            let own = unsafe {
                libc::getcwd(folder.as_mut_ptr().cast(), folder.len());
                libc::getsid(0) == libc::getpid()
            };
            u8::from(!(detached && own && folder.starts_with(b"/\0")))
        };
        // SAFETY: the task makes system calls, and a path of one character needs no allocation.
        let mut child = unsafe { crate::sys::fork::fork([], task) }.unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(0));
    }

    #[test]
    fn a_detached_process_goes_on_when_it_is_told_and_ends_when_nobody_is_left_to_tell_it() {
        let mut child = shell("read -r word && echo going on");
        child.go_on();
        assert_eq!(child.report().unwrap(), b"going on\n");
        let mut child = shell("read -r word && echo going on");
        drop(child.child.stdin.take());
        assert_eq!(child.report().unwrap(), b"");
        assert_eq!(boot_id().unwrap().len(), 36);
    }

    #[test]
    fn what_is_said_goes_to_the_log_behind_what_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        fs::write(&log, "before\n").unwrap();
        let path = log.clone();
        let task = move || {
            let logs = log_to(&path).is_ok();
            // SAFETY: standard error is open, and these are as many bytes.
            let said = unsafe { libc::write(libc::STDERR_FILENO, b"after\n".as_ptr().cast(), 6) };
            u8::from(!(logs && said == 6))
        };
        // SAFETY: the path is short, so that opening it makes system calls and no more.
        let mut child = unsafe { crate::sys::fork::fork([libc::STDERR_FILENO], task) }.unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(0));
        assert_eq!(fs::read_to_string(log).unwrap(), "before\nafter\n");
    }

    #[test]
    fn a_blocked_signal_waits_to_be_taken() {
        let signals = Signals::block(&[libc::SIGUSR2]).unwrap();
        // SAFETY: the signal is blocked in this very thread and stays pending for it.
        unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGUSR2) };
        assert_eq!(signals.wait(), libc::SIGUSR2);
    }
}
