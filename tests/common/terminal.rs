//! A terminal with a person before it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::Child;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use super::ran::command;

/// A pseudo terminal of 30 rows and 100 columns with `catnap` on it.
pub struct Terminal {
    keyboard: File,
    screen: Receiver<Vec<u8>>,
    seen: String,
    line: OwnedFd,
    program: Child,
}

impl Terminal {
    /// Starts `catnap` on a new terminal.
    pub fn running(arguments: &[&str]) -> Terminal {
        let (mut ours, mut theirs) = (-1, -1);
        let size = libc::winsize { ws_row: 30, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: the three pointers are valid for the call; openpty takes null for what is not wanted.
        let done = unsafe { libc::openpty(&mut ours, &mut theirs, std::ptr::null_mut(), std::ptr::null(), &size) };
        assert_eq!(done, 0, "no terminal can be had");
        // SAFETY: openpty has just made both descriptors, and nobody else has them.
        let (keyboard, line) = unsafe { (File::from_raw_fd(ours), OwnedFd::from_raw_fd(theirs)) };
        let other = || line.try_clone().expect("a descriptor");
        let program = command().args(arguments).stdin(other()).stdout(other()).stderr(other()).spawn();
        let (send, screen) = channel();
        let mut shown = keyboard.try_clone().expect("a descriptor");
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = shown.read(&mut bytes) {
                if send.send(bytes[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        Terminal { keyboard, screen, seen: String::new(), line, program: program.expect("catnap starts") }
    }

    pub fn types(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).expect("a terminal");
    }

    /// Waits until the screen shows something that it has not shown before.
    pub fn shows(&mut self, text: &str) {
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            if let Some(at) = self.seen.find(text) {
                self.seen.drain(..at + text.len());
                return;
            }
            match self.screen.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(bytes) => self.seen += &String::from_utf8_lossy(&bytes),
                Err(_) => panic!("the terminal does not show {text:?} but {:?}", self.seen),
            }
        }
    }

    /// Waits for the program's end, and gives its exit code.
    pub fn ends(&mut self) -> i32 {
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            if let Some(status) = self.program.try_wait().expect("a child") {
                return status.code().expect("an exit code");
            }
            assert!(Instant::now() < end, "the program on the terminal does not end; it shows {:?}", self.seen);
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Whether it echoes and waits for whole lines, as a shell leaves it.
    pub fn is_tidy(&self) -> bool {
        // SAFETY: termios is plain data, and tcgetattr fills it or fails.
        let mut state: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: the descriptor is open and the pointer valid.
        assert_eq!(unsafe { libc::tcgetattr(self.line.as_raw_fd(), &mut state) }, 0);
        let cooked = libc::ICANON | libc::ECHO | libc::ISIG;
        state.c_lflag & cooked == cooked
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}
