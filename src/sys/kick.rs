//! Waking a thread out of a system call (above all `KVM_RUN`) with a signal that does nothing else.
//!
//! A signal that arrives just before the system call begins is lost, so whoever kicks either sets
//! `immediate_exit` first, or kicks again until the thread has answered.

use std::io;

use libc::c_int;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

/// A thread of this process, as the kernel numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thread(libc::pid_t);

/// The calling thread.
pub fn current() -> Thread {
    // SAFETY: gettid takes no arguments and cannot fail.
    Thread(unsafe { libc::gettid() })
}

/// Installs the handler, for the whole process. To do so again changes nothing.
pub fn install() -> io::Result<()> {
    // Without SA_RESTART: the interrupted call must return EINTR, which is the point of it.
    register_signal_handler(signal(), ignore).map_err(io::Error::from)
}

/// Interrupts `thread`, if it does not block the signal. A thread that has ended gives an error (`ESRCH`) and no harm: unlike a `pthread_t`,
/// a number that is out of date is no undefined behaviour.
pub fn kick(thread: Thread) -> io::Result<()> {
    // SAFETY: tgkill takes plain numbers. It reaches only threads of this process, whose handler for the
    // signal does nothing.
    match unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread.0, signal()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The first real-time signal that the C library leaves to programs is 34; one further, out of the way of
/// debuggers' habits.
fn signal() -> c_int {
    SIGRTMIN() + 1
}

extern "C" fn ignore(_signal: c_int, _info: *mut libc::siginfo_t, _context: *mut libc::c_void) {}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn a_kick_interrupts_a_system_call() {
        install().unwrap();
        let (send, receive) = mpsc::channel();
        let sleeper = std::thread::spawn(move || {
            send.send(current()).unwrap();
            // SAFETY: no descriptors are passed; the call only sleeps.
            unsafe { libc::poll(std::ptr::null_mut(), 0, 60_000) };
            io::Error::last_os_error().raw_os_error()
        });
        let thread = receive.recv().unwrap();
        while !sleeper.is_finished() {
            let _ = kick(thread);
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(sleeper.join().unwrap(), Some(libc::EINTR));
        // The kernel lets go of a thread a little after it was joined.
        while kick(thread).is_ok() {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(kick(thread).unwrap_err().raw_os_error(), Some(libc::ESRCH));
    }
}
