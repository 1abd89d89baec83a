//! A repository in a registry of containers. The registry runs where the tests are started, and may be another host to
//! us; here it has a port of the loopback, as registries elsewhere are spoken to over TLS only.

use std::io;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::UNIX_EPOCH;

/// A repository that nobody has used.
pub struct Repository {
    port: u16,
    name: String,
}

impl Repository {
    pub fn new() -> Repository {
        let there = std::env::var("CATNAP_TEST_REGISTRY").expect("CATNAP_TEST_REGISTRY; scripts/test guest sets it");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        thread::spawn(move || {
            for near in listener.incoming().flatten() {
                let Ok(far) = TcpStream::connect(&there) else { continue };
                let both = |stream: &TcpStream| stream.try_clone().expect("a descriptor");
                for (from, to) in [(both(&near), both(&far)), (far, near)] {
                    thread::spawn(move || carry(from, to));
                }
            }
        });
        let now = UNIX_EPOCH.elapsed().expect("a time after 1970").as_millis();
        Repository { port, name: format!("cats/anna-{now}") }
    }

    /// Where something with this tag is, or will be.
    pub fn at(&self, tag: &str) -> String {
        format!("localhost:{}/{}:{tag}", self.port, self.name)
    }
}

/// Carries bytes from one connection to the other until its end.
fn carry(mut from: TcpStream, mut to: TcpStream) {
    // Whoever still wants something from a broken connection finds out.
    let _ = io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Write);
}
