//! TCP on this host's loopback.

use std::net::{Ipv4Addr, TcpListener, TcpStream};

use super::PATIENCE;

/// A port that nobody has just now.
pub fn free_port() -> u16 {
    listen().local_addr().expect("an address").port()
}

/// A listener at a free port.
pub fn listen() -> TcpListener {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port")
}

/// A connection to a port, on which nothing blocks for ever.
pub fn connect(port: u16) -> TcpStream {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).expect("a listener");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    stream.set_write_timeout(Some(PATIENCE)).expect("a timeout");
    stream
}

/// Lets this process have as many descriptors as it may.
pub fn many_descriptors() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls get a pointer to one rlimit that outlives them.
    let done = unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) == 0 && {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit) == 0
        }
    };
    assert!(done, "the limit of descriptors cannot be raised");
}
