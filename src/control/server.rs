//! Takes connections on the control socket: only its owner's, only so many at once, a thread for each.

use std::fs;
use std::io;
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use super::failure::{Code, Failure};
use super::http::{self, Request};
use crate::sys::{local, peer};

/// What a server allows.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at once; one more is told so and closed.
    pub connections: usize,
    /// The time for a whole request to arrive, and for a response to be taken.
    pub time: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { connections: 64, time: Duration::from_secs(10) }
    }
}

/// Answers requests; on the connection's own thread.
pub trait Handler: Send + Sync + 'static {
    /// Answers `request` on `stream`, whatever time it takes. An error means that the peer is gone.
    fn handle(&self, request: Request, stream: UnixStream) -> io::Result<()>;
}

/// The stack of a connection's thread: room for the buffers of two copies, and for serde.
const STACK: usize = 256 * 1024;

/// A control socket with a thread that takes its connections.
pub struct Server {
    path: PathBuf,
    live: Arc<AtomicUsize>,
}

impl Server {
    /// Listens at `path`, replacing a socket that a killed monitor left there.
    pub fn bind(path: &Path) -> io::Result<(Server, UnixListener)> {
        let listener = local::bind(path)?;
        // Whoever connects before this line is met by `peer_uid`, which is asked for every connection.
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        Ok((Server { path: path.into(), live: Arc::default() }, listener))
    }

    /// Begins to answer.
    pub fn serve(&self, listener: UnixListener, limits: Limits, handler: Arc<dyn Handler>) -> io::Result<()> {
        let live = Arc::clone(&self.live);
        thread::Builder::new()
            .name("control".into())
            .stack_size(STACK)
            .spawn(move || {
                loop {
                    match listener.accept() {
                        Ok((stream, _)) => take(stream, limits, &live, &handler),
                        // Out of descriptors or memory: give others time to let some go.
                        Err(_) => thread::sleep(Duration::from_millis(50)),
                    }
                }
            })
            .map(drop)
    }

    /// Removes the socket and gives the answers that are under way `grace` to get out.
    pub fn close(self, grace: Duration) {
        // Someone may have removed the runtime folder already; then there is nothing to do.
        let _ = fs::remove_file(&self.path);
        let deadline = Instant::now() + grace;
        while self.live.load(Ordering::SeqCst) > 0 && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// One of the connections that a server allows; gives its place back when dropped.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Starts a thread for the connection, or turns it away.
fn take(mut stream: UnixStream, limits: Limits, live: &Arc<AtomicUsize>, handler: &Arc<dyn Handler>) {
    live.fetch_add(1, Ordering::SeqCst);
    let place = Place(Arc::clone(live));
    // A fresh socket's buffer holds these short answers, so that no peer can hold up the taking thread.
    let turn_away = |stream: &mut UnixStream, code, why: &str| {
        let _ = stream.set_write_timeout(Some(Duration::from_millis(100)));
        let _ = http::fail(stream, &Failure::new(code, why));
        let _ = stream.shutdown(Shutdown::Both);
    };
    if !peer::peer_uid(&stream).is_ok_and(|uid| uid == own_uid()) {
        return turn_away(&mut stream, Code::Refused, "only the owner of this machine may speak to it");
    }
    if live.load(Ordering::SeqCst) > limits.connections {
        return turn_away(&mut stream, Code::Refused, "too many connections to this machine's monitor at once");
    }
    let handler = Arc::clone(handler);
    // When no thread can be had, the closure and with it the connection are dropped: the peer sees the end.
    let _ = thread::Builder::new().name("connection".into()).stack_size(STACK).spawn(move || {
        let _place = place;
        let _ = answer(stream, limits, &*handler);
    });
}

fn answer(mut stream: UnixStream, limits: Limits, handler: &dyn Handler) -> io::Result<()> {
    stream.set_write_timeout(Some(limits.time))?;
    match http::read_request(&mut stream, limits.time) {
        Ok(request) => {
            stream.set_read_timeout(None)?;
            handler.handle(request, stream)
        }
        Err(http::Error::Refused(status, why)) => {
            http::respond(&mut stream, status, &serde_json::to_vec(&Failure::new(Code::Usage, why))?)?;
            stream.shutdown(Shutdown::Write)
        }
        Err(http::Error::Io(error)) => Err(error),
    }
}

fn own_uid() -> u32 {
    static UID: OnceLock<u32> = OnceLock::new();
    *UID.get_or_init(peer::own_uid)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    /// Answers with the path that was asked for.
    struct Echo;

    impl Handler for Echo {
        fn handle(&self, request: Request, mut stream: UnixStream) -> io::Result<()> {
            http::respond(&mut stream, 200, request.path.as_bytes())
        }
    }

    fn serve(path: &Path, limits: Limits) -> Server {
        let (server, listener) = Server::bind(path).unwrap();
        server.serve(listener, limits, Arc::new(Echo)).unwrap();
        server
    }

    fn ask(path: &Path, wire: &[u8]) -> String {
        let mut stream = local::connect(path).unwrap();
        // A server that turns us away may close before it has read everything.
        let _ = stream.write_all(wire);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    #[test]
    fn hostile_peers_do_not_keep_others_from_being_answered() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.sock");
        let limits = Limits { connections: 4, time: Duration::from_millis(300) };
        let server = serve(&path, limits);

        // Three that say nothing or only half of something leave one place.
        let mut idle: Vec<_> = (0..3).map(|_| local::connect(&path).unwrap()).collect();
        idle[1].write_all(b"GET /v1/mach").unwrap();
        idle[2].write_all(b"POST / HTTP/1.1\r\nContent-Length: 100\r\n\r\n{").unwrap();
        assert!(ask(&path, b"GET /hello HTTP/1.1\r\n\r\n").ends_with("/hello\n"));
        assert!(ask(&path, &[b'x'; 3 * 8192]).starts_with("HTTP/1.1 4"));

        // Ten more fill the house; who comes then is told so at once.
        idle.extend((0..10).map(|_| local::connect(&path).unwrap()));
        assert!(ask(&path, b"GET / HTTP/1.1\r\n\r\n").contains("too many connections"));

        // All of them run out of time, and the house is empty again.
        thread::sleep(limits.time * 2);
        assert!(ask(&path, b"GET /again HTTP/1.1\r\n\r\n").ends_with("/again\n"));
        server.close(Duration::from_secs(1));
        assert!(!path.exists());
    }

    #[test]
    fn a_socket_left_by_a_killed_monitor_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.sock");
        drop(local::bind(&path).unwrap());
        let server = serve(&path, Limits::default());
        assert!(ask(&path, b"GET /here HTTP/1.1\r\n\r\n").ends_with("/here\n"));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        server.close(Duration::from_secs(1));
    }
}
