//! The terminal: raw mode that is given back however the program ends, and its size.

use std::io;
use std::mem::zeroed;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// Standard input, the terminal that is typed on.
const TERMINAL: libc::c_int = libc::STDIN_FILENO;

/// How the terminal was before, for the signal handler and the panic hook; written once, then only read.
static BEFORE: OnceLock<libc::termios> = OnceLock::new();
/// Whether the terminal is raw at this moment.
static RAW: AtomicBool = AtomicBool::new(false);

/// The signals that end a program from outside and must not leave a raw terminal behind.
const DEADLY: [libc::c_int; 4] = [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM];

/// Standard input in raw mode: every key goes to the program, none is echoed. Dropping it gives the terminal
/// back as it was; so do a panic (also where panics abort) and the signals that end a program.
#[must_use = "the terminal is raw only while this lives"]
pub struct RawMode(());

impl RawMode {
    /// Makes the terminal on standard input raw.
    pub fn enter() -> io::Result<RawMode> {
        // SAFETY: `termios` is plain integers, for which all zeros are valid.
        let mut now: libc::termios = unsafe { zeroed() };
        // SAFETY: the kernel fills `now`, which is of the type that tcgetattr takes.
        check(unsafe { libc::tcgetattr(TERMINAL, &mut now) })?;
        if BEFORE.set(now).is_ok() {
            let hook = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                restore();
                hook(panic);
            }));
            for signal in DEADLY {
                // SAFETY: `on_signal` does only what signal-safety(7) allows: atomics, tcsetattr, signal, raise.
                unsafe { libc::signal(signal, on_signal as *const () as libc::sighandler_t) };
            }
        }
        // SAFETY: `now` is a valid termios.
        unsafe { libc::cfmakeraw(&mut now) };
        RAW.store(true, Ordering::SeqCst);
        // SAFETY: as for tcgetattr; the kernel only reads.
        check(unsafe { libc::tcsetattr(TERMINAL, libc::TCSADRAIN, &now) })?;
        Ok(RawMode(()))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    if let (true, Some(before)) = (RAW.swap(false, Ordering::SeqCst), BEFORE.get()) {
        // SAFETY: `before` came from tcgetattr and never changes. A failure means that the terminal is gone.
        unsafe { libc::tcsetattr(TERMINAL, libc::TCSANOW, before) };
    }
}

extern "C" fn on_signal(signal: libc::c_int) {
    restore();
    // SAFETY: both may be called from a signal handler. The signal is raised again with its default action, so
    // that the parent sees the truth about how this process ended.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
}

/// Forgets what was typed on standard input and is not read yet. What is no terminal keeps it.
pub fn forget_typed() {
    // SAFETY: tcflush has no conditions; where there is no terminal it fails, and nothing is lost.
    unsafe { libc::tcflush(TERMINAL, libc::TCIFLUSH) };
}

/// The terminal's rows and columns; `None` when standard output is not a terminal.
pub fn size() -> Option<(u16, u16)> {
    // SAFETY: `winsize` is plain integers, for which all zeros are valid.
    let mut size: libc::winsize = unsafe { zeroed() };
    // SAFETY: TIOCGWINSZ fills a `winsize` (ioctl_tty(2)).
    let result = unsafe { libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, &mut size) };
    (result == 0 && size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
    use std::process::{Command, Stdio};

    use super::*;

    /// A new pseudo-terminal: the master's side and the program's side.
    fn terminal() -> (OwnedFd, OwnedFd) {
        let (mut ours, mut theirs) = (0, 0);
        // SAFETY: openpty writes two descriptors; the other arguments may be null (openpty(3)).
        let result = unsafe {
            libc::openpty(&mut ours, &mut theirs, std::ptr::null_mut(), std::ptr::null_mut(), std::ptr::null_mut())
        };
        assert_eq!(result, 0);
        // SAFETY: both descriptors are fresh and owned by nobody else.
        unsafe { (OwnedFd::from_raw_fd(ours), OwnedFd::from_raw_fd(theirs)) }
    }

    fn is_raw(terminal: &OwnedFd) -> bool {
        // SAFETY: as in `RawMode::enter`.
        let mut now: libc::termios = unsafe { zeroed() };
        // SAFETY: the descriptor is open because `terminal` is borrowed.
        assert_eq!(unsafe { libc::tcgetattr(terminal.as_raw_fd(), &mut now) }, 0);
        now.c_lflag & libc::ICANON == 0
    }

    /// The body of the child that the test below starts from this very test binary.
    #[test]
    fn child_on_a_terminal() {
        let Ok(end) = std::env::var("CATNAP_TEST_TTY") else { return };
        let raw = RawMode::enter().unwrap();
        println!("raw");
        let mut key = String::new();
        let _ = io::stdin().read_line(&mut key);
        match end.as_str() {
            "drop" => drop(raw),
            "panic" => panic!("on purpose"),
            // SAFETY: raise has no conditions.
            _ => assert_ne!(unsafe { libc::raise(libc::SIGTERM) }, 0, "the signal must have ended this process"),
        }
    }

    /// What is typed before anybody waits for it.
    const EARLY: &[u8] = b"too early\n";

    /// The body of the child that the test below starts.
    #[test]
    fn child_that_forgets() {
        if std::env::var_os("CATNAP_TEST_FORGETS").is_none() {
            return;
        }
        println!("early");
        let mut typed = 0;
        while typed < EARLY.len() as libc::c_int {
            // SAFETY: FIONREAD fills an integer (ioctl_tty(2)).
            assert_eq!(unsafe { libc::ioctl(TERMINAL, libc::FIONREAD, &mut typed) }, 0);
            std::thread::yield_now();
        }
        forget_typed();
        println!("late");
        let mut word = String::new();
        let _ = io::stdin().read_line(&mut word);
        println!("read {}", word.trim());
    }

    #[test]
    fn what_was_typed_too_early_is_forgotten() {
        use std::io::{BufRead, Write};
        let (ours, theirs) = terminal();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["sys::tty::tests::child_that_forgets", "--exact", "--nocapture"])
            .env("CATNAP_TEST_FORGETS", "1")
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut output = io::BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        let mut keyboard = File::from(ours);
        let mut said = |word: &str| output.by_ref().find(|line| line.contains(word)).unwrap();
        said("early");
        keyboard.write_all(EARLY).unwrap();
        said("late");
        keyboard.write_all(b"in time\n").unwrap();
        assert!(said("read ").ends_with("read in time"));
        child.wait().unwrap();
    }

    #[test]
    fn the_terminal_is_given_back_after_drop_panic_and_signal() {
        use std::io::{BufRead, Write};
        for end in ["drop", "panic", "signal"] {
            let (ours, theirs) = terminal();
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["sys::tty::tests::child_on_a_terminal", "--exact", "--nocapture"])
                .env("CATNAP_TEST_TTY", end)
                .stdin(Stdio::from(theirs.try_clone().unwrap()))
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            let output = io::BufReader::new(child.stdout.take().unwrap());
            assert!(output.lines().map_while(Result::ok).any(|line| line.ends_with("raw")), "{end}");
            assert!(is_raw(&theirs), "{end}");
            File::from(ours.try_clone().unwrap()).write_all(b"\n").unwrap();
            child.wait().unwrap();
            assert!(!is_raw(&theirs), "{end}");
        }
    }
}
