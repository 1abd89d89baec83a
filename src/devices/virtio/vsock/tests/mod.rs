//! The device against a guest's driver built by hand.

mod bytes;
mod ends;
mod hostile;
mod many;
mod wake;

use std::io::{ErrorKind, Read};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use super::Handle;

/// Both ends of a TCP connection over loopback.
fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (theirs, _) = listener.accept().unwrap();
    for stream in [&ours, &theirs] {
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    }
    (ours, theirs)
}

/// Listens on a port of the host and gives what comes to the test.
fn listen(handle: &Handle, port: u32) -> Receiver<UnixStream> {
    let (sender, receiver) = channel();
    handle.listen(port, Box::new(move |stream| drop(sender.send(stream))));
    receiver
}

fn read_exact(stream: &mut impl Read, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

fn assert_is_reset(mut stream: impl Read) {
    let error = stream.read(&mut [0; 16]).expect_err("the stream should have been reset");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

/// Bytes in which a lost, doubled or swapped piece shows.
fn pattern(count: usize) -> Vec<u8> {
    (0..count as u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 16) as u8).collect()
}
