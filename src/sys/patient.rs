//! Streams on which nobody waits for ever: a caught Ctrl-C ends a read from a silent pipe and a write to a full one.
//!
//! [`process::catch_interrupts`] makes Ctrl-C a flag, and the kernel takes up again what it interrupts. So whoever
//! may wait for somebody else waits in `poll`, which ends, and looks at the flag.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use super::process;

/// What a pipe that `poll` calls ready takes at once, in bytes (POSIX, PIPE_BUF; pipe(7)).
const PIPE_BUF: usize = libc::PIPE_BUF;
/// How often the flag is looked at when the signal went to another thread.
const GLANCE: Duration = Duration::from_millis(100);

/// A stream of this process that Ctrl-C ends.
#[derive(Debug)]
pub struct Patient {
    file: File,
    /// A file is always ready, and takes what it is given.
    is_plain: bool,
}

impl Patient {
    /// This process's standard input or output, or any other descriptor, with a descriptor of its own and no buffer.
    pub fn new(of: &impl AsFd) -> io::Result<Patient> {
        let file = File::from(of.as_fd().try_clone_to_owned()?);
        let is_plain = file.metadata()?.is_file();
        Ok(Patient { file, is_plain })
    }

    /// Waits until it is ready. Not with the kind `Interrupted`, upon which everybody tries again.
    fn ready(&self, events: libc::c_short) -> io::Result<()> {
        loop {
            if process::interrupted() {
                return Err(io::Error::other("interrupted"));
            }
            let mut poll = libc::pollfd { fd: self.file.as_raw_fd(), events, revents: 0 };
            // SAFETY: `poll` is one entry, and its descriptor is open because `self` is borrowed.
            match unsafe { libc::poll(&mut poll, 1, GLANCE.as_millis() as libc::c_int) } {
                0 => {}
                1.. => return Ok(()),
                _ => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
    }
}

impl Read for Patient {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.ready(libc::POLLIN)?;
        self.file.read(into)
    }
}

impl Write for Patient {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.ready(libc::POLLOUT)?;
        let most = if self.is_plain { bytes.len() } else { bytes.len().min(PIPE_BUF) };
        self.file.write(&bytes[..most])
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_through_a_pipe_comes_out_of_it() {
        let (from, to) = io::pipe().unwrap();
        let (mut from, mut to) = (Patient::new(&from).unwrap(), Patient::new(&to).unwrap());
        let bytes: Vec<u8> = (0..1_000_000).map(|number: u32| (number % 251) as u8).collect();
        let sent = bytes.clone();
        let writer = std::thread::spawn(move || to.write_all(&sent));
        let mut read = vec![0; bytes.len()];
        from.read_exact(&mut read).unwrap();
        assert!(read == bytes);
        writer.join().unwrap().unwrap();
        assert_eq!(Patient::new(&File::open("/dev/null").unwrap()).unwrap().read(&mut [0]).unwrap(), 0);
    }
}
