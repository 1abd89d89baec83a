//! Asking the guest's agent something.

use std::io;
use std::time::Duration;

use catnap_guest::protocol::{AGENT_PORT, Reply, Request, Status, read_line, write_line};

use crate::devices::virtio::vsock::Handle;

/// Sends a request, and waits up to `patience` for each piece of its reply.
pub(super) fn ask(vsock: &Handle, request: &Request, patience: Duration) -> io::Result<Reply> {
    let mut stream = vsock.open(AGENT_PORT)?;
    stream.set_read_timeout(Some(patience))?;
    write_line(&mut stream, request)?;
    read_line(&mut stream)
}

/// What the guest says of itself.
pub(super) fn status(vsock: &Handle, patience: Duration) -> io::Result<Status> {
    match ask(vsock, &Request::Status, patience)? {
        Reply::Status(status) => Ok(status),
        other => Err(io::Error::other(format!("{other:?} in place of a status"))),
    }
}
