//! The doorbell: the host may be waiting to take a snapshot at exactly this place.

use std::io;
use std::time::Duration;

use crate::protocol::{DOORBELL_PORT, Ring, Rung, read_line, write_line};
use crate::socket::{Address, Socket};

/// The host's address (vsock(7), VMADDR_CID_HOST).
const HOST: u32 = 2;
/// The longest that the host may keep us waiting: a live snapshot writes memory meanwhile.
const PATIENCE: Duration = Duration::from_secs(120);

/// Rings and waits for the answer. Whether the host had waited for it; `false` also where there is no host, and in
/// a machine that woke from the snapshot which was taken meanwhile.
pub(super) fn ring(at: &str) -> bool {
    let answer = || -> io::Result<Rung> {
        let socket = Socket::connect(Address::Vsock(HOST, DOORBELL_PORT))?;
        socket.set_timeout(PATIENCE)?;
        write_line(&mut &socket, &Ring { at: at.into() })?;
        read_line(&mut &socket)
    };
    answer().is_ok_and(|rung| rung.awaited)
}
