//! The host's end of a connection: a stream socket, TCP or Unix.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use vm_memory::bitmap::Bitmap;

use crate::devices::virtio::ring::Slices;

/// Nothing here waits, and a peer that is gone is an error and not a signal.
const FLAGS: libc::c_int = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;

/// A stream socket that is reset when it is dropped, unless it came to its end in good order: whatever goes
/// wrong between the two sides, the peer never takes it for the end of the data.
pub struct Stream {
    fd: OwnedFd,
    finished: bool,
}

impl Stream {
    pub fn new(fd: OwnedFd) -> Stream {
        Stream { fd, finished: false }
    }

    /// Reads at most `limit` bytes straight into guest memory. Zero is the end of the stream.
    pub fn recv(&self, into: &Slices, limit: usize) -> io::Result<usize> {
        let mut vectors = iovecs(into, limit);
        let mut message = message(&mut vectors);
        // SAFETY: the message names vectors that live until the end of this function; each lies in guest
        // memory, which `into` borrows and in which no Rust reference points.
        let count = retry(|| unsafe { libc::recvmsg(self.fd.as_raw_fd(), &mut message, FLAGS) })?;
        mark_dirty(into, count);
        Ok(count)
    }

    /// Writes as much as fits of the guest's bytes.
    pub fn send_from(&self, from: &Slices) -> io::Result<usize> {
        let mut vectors = iovecs(from, from.len());
        let message = message(&mut vectors);
        // SAFETY: as in `recv`; the kernel only reads.
        retry(|| unsafe { libc::sendmsg(self.fd.as_raw_fd(), &message, FLAGS) })
    }

    /// Writes as much as fits of `from`.
    pub fn send(&self, from: &[u8]) -> io::Result<usize> {
        // SAFETY: `from` is a live slice of that length.
        retry(|| unsafe { libc::send(self.fd.as_raw_fd(), from.as_ptr().cast(), from.len(), FLAGS) })
    }

    /// Ends one direction. A socket whose peer is already gone refuses; then there is nothing to end.
    pub fn shutdown(&self, how: Shutdown) {
        let how = match how {
            Shutdown::Read => libc::SHUT_RD,
            Shutdown::Write => libc::SHUT_WR,
            Shutdown::Both => libc::SHUT_RDWR,
        };
        // SAFETY: no memory is involved, and the descriptor is ours.
        unsafe { libc::shutdown(self.fd.as_raw_fd(), how) };
    }

    /// Closes in good order: the peer reads all that was written, and then the end.
    pub fn finish(mut self) {
        self.finished = true;
    }
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        // With no time to linger, closing a TCP socket sends a reset; a Unix socket does not mind.
        let linger = libc::linger { l_onoff: 1, l_linger: 0 };
        // SAFETY: the pointer and the length are those of `linger`, which lives across the call.
        unsafe {
            libc::setsockopt(
                self.fd.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_LINGER,
                (&raw const linger).cast(),
                size_of::<libc::linger>() as libc::socklen_t,
            )
        };
    }
}

/// Appends all but the first `skip` bytes of `from` to `to`.
pub fn append(from: &Slices, mut skip: usize, to: &mut VecDeque<u8>) {
    let mut bounce = [0; 4096];
    for slice in from.as_buffers() {
        let mut at = skip.min(slice.len());
        skip -= at;
        while let Ok(rest) = slice.offset(at)
            && !rest.is_empty()
        {
            let count = rest.copy_to(&mut bounce);
            to.extend(&bounce[..count]);
            at += count;
        }
    }
}

/// The first `limit` bytes as the kernel wants them. They are valid for as long as guest memory is borrowed.
fn iovecs(slices: &Slices, limit: usize) -> Vec<libc::iovec> {
    let mut left = limit;
    let mut vectors = Vec::with_capacity(slices.as_buffers().len());
    for slice in slices.as_buffers() {
        let count = slice.len().min(left);
        if count > 0 {
            left -= count;
            vectors.push(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: count });
        }
    }
    vectors
}

/// Notes that the kernel wrote the first `count` bytes.
fn mark_dirty(slices: &Slices, count: usize) {
    let mut left = count;
    for slice in slices.as_buffers() {
        let here = slice.len().min(left);
        slice.bitmap().mark_dirty(0, here);
        left -= here;
    }
}

fn message(vectors: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: `msghdr` is plain data for which all zeros mean no name, no vectors and no control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.as_mut_ptr();
    message.msg_iovlen = vectors.len();
    message
}

fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(count) => return Ok(count),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}
