//! poll(2), with `POLLRDHUP`: the one way to see the end of a connection that one does not want to read yet.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;

/// There is something to read, or the end.
pub const READ: i16 = libc::POLLIN;
/// Something can be written.
pub const WRITE: i16 = libc::POLLOUT;
/// The peer will send no more.
pub const PEER_ENDED: i16 = libc::POLLRDHUP;
/// Reported whether asked for or not: no use waiting any longer.
pub const GONE: i16 = libc::POLLHUP | libc::POLLERR | libc::POLLNVAL;

/// Descriptors to wait for.
#[derive(Default)]
pub struct Poll<'a> {
    fds: Vec<libc::pollfd>,
    borrowed: PhantomData<BorrowedFd<'a>>,
}

impl<'a> Poll<'a> {
    /// Adds a descriptor, and returns its place.
    pub fn add(&mut self, fd: &'a impl AsFd, events: i16) -> usize {
        self.fds.push(libc::pollfd { fd: fd.as_fd().as_raw_fd(), events, revents: 0 });
        self.fds.len() - 1
    }

    /// Waits for the first event, or until `patience` (`None`: for ever) is over.
    pub fn wait(&mut self, patience: Option<Duration>) -> io::Result<()> {
        // Rounded up, so that a caller with half a millisecond left does not spin.
        let time = patience.map_or(-1, |time| i32::try_from(time.as_micros().div_ceil(1000)).unwrap_or(i32::MAX));
        // SAFETY: the pointer and the count are those of the vector.
        match Errno::result(unsafe { libc::poll(self.fds.as_mut_ptr(), self.fds.len() as libc::nfds_t, time) }) {
            Ok(_) => Ok(()),
            Err(Errno::EINTR) => {
                self.fds.iter_mut().for_each(|fd| fd.revents = 0);
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// What was found at a place.
    pub fn found(&self, at: usize) -> i16 {
        self.fds.get(at).map_or(0, |fd| fd.revents)
    }
}
