//! A child that is a frozen copy of this process, for one task, and does not outlive it.
//!
//! All threads but the forking one are missing in the child, and the locks that they held stay locked for
//! ever. So the task may only do what signal-safety(7) allows: no allocation, no lock, no panic.

use std::io;
use std::os::fd::RawFd;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::ptr;
use std::sync::atomic::{AtomicI32, Ordering};

/// What the child's exit code is when its parent is gone.
const ORPHANED: libc::c_int = 100;
/// What the child's exit code is when its task panicked.
const PANICKED: libc::c_int = 101;
/// How much nicer the child is to the machine that runs on beside it.
const NICER: libc::c_int = 5;
/// What the kernel sends to the child when the thread that forked it ends.
const PARENT_ENDED: libc::c_int = libc::SIGHUP;

/// A child. It is killed when this is dropped.
#[derive(Debug)]
pub struct Child {
    pid: libc::pid_t,
    status: Option<ExitStatus>,
}

/// Forks a child that does `task`, whose result is its exit code. It keeps the descriptors in `keep` and closes
/// all others, so that no lock, socket or virtual machine lives on in it. No signal but SIGKILL reaches it.
///
/// # Safety
/// `task` must only do what signal-safety(7) allows in the child of a process with several threads.
pub unsafe fn fork<const N: usize>(keep: [RawFd; N], task: impl FnOnce() -> u8) -> io::Result<Child> {
    // SAFETY: getpid always succeeds, and sigfillset fills the set, which is plain memory.
    let (parent, all) = unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        (libc::getpid(), all)
    };
    let mut before = all;
    // SAFETY: both sets are valid. With all signals held back, none of the parent's handlers runs in the child.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before) };
    // SAFETY: the child calls only what signal-safety(7) allows: `settle` is written so, the caller promises it
    // of `task`, and `_exit` ends the child before anything of the parent's is dropped.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let _never_back = NeverBack;
        settle(parent, keep, all);
        let code = task();
        // SAFETY: `_exit` may be called at any time.
        unsafe { libc::_exit(code.into()) };
    }
    let failure = io::Error::last_os_error();
    // SAFETY: `before` was filled by the call above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &before, ptr::null_mut()) };
    if pid < 0 { Err(failure) } else { Ok(Child { pid, status: None }) }
}

/// A panic that unwound past the task would run a second copy of whatever called `fork`.
struct NeverBack;

impl Drop for NeverBack {
    fn drop(&mut self) {
        // SAFETY: `_exit` may be called at any time.
        unsafe { libc::_exit(PANICKED) };
    }
}

static PARENT: AtomicI32 = AtomicI32::new(0);

/// The signal of the parent's death comes as soon as the *thread* that forked ends (prctl(2),
/// PR_SET_PDEATHSIG). As long as the process lives on, the child does too.
extern "C" fn on_parent_ended(_: libc::c_int) {
    // SAFETY: both calls may be made at any time, also in a signal handler.
    unsafe {
        if libc::getppid() != PARENT.load(Ordering::SeqCst) {
            libc::_exit(ORPHANED);
        }
    }
}

/// In the child: ties it to its parent and lets go of everything that it does not need.
fn settle<const N: usize>(parent: libc::pid_t, keep: [RawFd; N], all: libc::sigset_t) {
    PARENT.store(parent, Ordering::SeqCst);
    // SAFETY: all of these are system calls or allowed by signal-safety(7), with pointers to live values. The
    // handler only makes calls that are allowed in one. That the child is nicer is a wish: failing is no harm.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_parent_ended as *const () as libc::sighandler_t;
        action.sa_flags = libc::SA_RESTART;
        libc::sigaction(PARENT_ENDED, &action, ptr::null_mut());
        let mut held_back = all;
        libc::sigdelset(&mut held_back, PARENT_ENDED);
        libc::pthread_sigmask(libc::SIG_SETMASK, &held_back, ptr::null_mut());
        libc::prctl(libc::PR_SET_PDEATHSIG, PARENT_ENDED);
        // It may have died before the line above.
        on_parent_ended(PARENT_ENDED);
        libc::nice(NICER);
    }
    close_others(keep);
}

/// Closes all descriptors but those.
fn close_others<const N: usize>(mut keep: [RawFd; N]) {
    keep.sort_unstable();
    let mut first: libc::c_uint = 0;
    for fd in keep {
        let Ok(fd) = libc::c_uint::try_from(fd) else { continue };
        if fd > first {
            close_range(first, fd - 1);
        }
        first = fd.saturating_add(1);
    }
    close_range(first, libc::c_uint::MAX);
}

/// Closes the descriptors from `first` to `last`.
fn close_range(first: libc::c_uint, last: libc::c_uint) {
    // SAFETY: nothing in this process uses the descriptors any more: it does one task, with those it keeps.
    if unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } == 0 {
        return;
    }
    // Kernels before 5.9 do not have the call.
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to a live `rlimit`, which the call fills.
    unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) };
    for fd in u64::from(first)..limit.rlim_cur.min(u64::from(last).saturating_add(1)) {
        // SAFETY: as above; closing what is not open fails without harm.
        unsafe { libc::close(fd as libc::c_int) };
    }
}

impl Child {
    /// The child's process id.
    pub fn id(&self) -> u32 {
        self.pid.unsigned_abs()
    }

    /// How the child ended, if it has.
    pub fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        self.wait_for_it(libc::WNOHANG)
    }

    /// Waits until the child has ended.
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        loop {
            if let Some(status) = self.wait_for_it(0)? {
                return Ok(status);
            }
        }
    }

    /// Ends the child by force. Does nothing when it has ended.
    pub fn kill(&mut self) -> io::Result<()> {
        if self.status.is_none() {
            // SAFETY: the child was not waited for, so that the number is still its own.
            unsafe { libc::kill(self.pid, libc::SIGKILL) };
        }
        self.wait().map(drop)
    }

    fn wait_for_it(&mut self, options: libc::c_int) -> io::Result<Option<ExitStatus>> {
        if self.status.is_some() {
            return Ok(self.status);
        }
        let mut status = 0;
        // SAFETY: the pointer is to a live number, and the child was not waited for yet.
        match unsafe { libc::waitpid(self.pid, &mut status, options) } {
            0 => Ok(None),
            pid if pid == self.pid => {
                self.status = Some(ExitStatus::from_raw(status));
                Ok(self.status)
            }
            _ => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => Ok(None),
                error => Err(error),
            },
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // It fails only when somebody else waited for the child, and then there is none.
        let _ = self.kill();
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::fd::AsRawFd;
    use std::time::{Duration, Instant};

    use super::*;

    fn sleep_for_ever() -> u8 {
        loop {
            // SAFETY: pause only waits.
            unsafe { libc::pause() };
        }
    }

    fn gone(pid: u32) -> bool {
        // SAFETY: signal 0 only asks whether the process is there; a zombie is.
        unsafe { libc::kill(pid.cast_signed(), 0) < 0 }
    }

    #[test]
    fn the_exit_code_is_the_tasks_and_a_panic_does_not_come_back() {
        // SAFETY: it does nothing.
        let mut child = unsafe { fork([], || 42) }.unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(42));
        assert_eq!(child.try_wait().unwrap().unwrap().code(), Some(42));
        // SAFETY: it panics, which allocates; no other thread of this test holds the allocator's lock.
        let mut child = unsafe { fork([], || panic!("in the child")) }.unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(PANICKED));
    }

    #[test]
    fn a_dropped_child_is_gone_and_leaves_no_zombie() {
        // SAFETY: it only waits.
        let mut child = unsafe { fork([], sleep_for_ever) }.unwrap();
        assert!(child.try_wait().unwrap().is_none());
        let pid = child.id();
        drop(child);
        assert!(gone(pid));
    }

    #[test]
    fn only_what_is_kept_stays_open() {
        let files: Vec<File> = (0..5).map(|_| tempfile::tempfile().unwrap()).collect();
        let keep = [files[3].as_raw_fd(), files[1].as_raw_fd()];
        let task = move || {
            // SAFETY: fcntl with F_GETFD only asks.
            let open = |fd: &libc::c_int| unsafe { libc::fcntl(*fd, libc::F_GETFD) } >= 0;
            let kept = keep.iter().filter(|fd| open(fd)).count();
            (kept * 100 + (0..1024).filter(open).count()) as u8
        };
        // SAFETY: it makes system calls and counts.
        assert_eq!(unsafe { fork(keep, task) }.unwrap().wait().unwrap().code(), Some(202));
        assert!(files[0].metadata().is_ok(), "the parent's are its own");
    }

    #[test]
    fn the_child_outlives_the_thread_that_forked_it() {
        // SAFETY: it only waits.
        let mut child = std::thread::spawn(|| unsafe { fork([], sleep_for_ever) }.unwrap()).join().unwrap();
        std::thread::sleep(Duration::from_millis(50));
        assert!(child.try_wait().unwrap().is_none());
    }

    #[test]
    fn the_child_does_not_outlive_the_process() {
        // SAFETY: from now on orphaned grandchildren come to this process, which can then wait for them.
        unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) };
        let (mut told, mut tells) = io::pipe().unwrap();
        // SAFETY: it forks once more, writes to a pipe and waits.
        let mut middle = unsafe {
            fork([tells.as_raw_fd()], || {
                let Ok(child) = fork([], sleep_for_ever) else { return 1 };
                let _ = tells.write_all(&child.id().to_ne_bytes());
                sleep_for_ever()
            })
        }
        .unwrap();
        let mut pid = [0; 4];
        told.read_exact(&mut pid).unwrap();
        let mut grandchild = Child { pid: i32::from_ne_bytes(pid), status: None };
        assert!(!gone(grandchild.id()));
        middle.kill().unwrap();
        let started = Instant::now();
        let status = loop {
            match grandchild.try_wait() {
                Ok(Some(status)) => break status,
                // Until the kernel has handed it over, it is nobody's child here.
                _ => assert!(started.elapsed() < Duration::from_secs(10), "the grandchild lives on"),
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        assert_eq!(status.code(), Some(ORPHANED));
    }
}
