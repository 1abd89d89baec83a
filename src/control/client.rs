//! Speaks to a machine's monitor. Used by the command line, and by whatever else steers machines.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::ops::ControlFlow;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use catnap_guest::protocol as agent;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::failure::{Code, Failure};
use super::protocol::{
    Detach, Give, MAX_BODY, MAX_HEAD, MAX_RESIZE, MemoryMap, Resize, Resized, STREAM, SnapshotEvent, SnapshotRequest,
    Status, Stop, Taken, Wait,
};
use crate::machine::Progress;
use crate::spec::Ephemeral;
use crate::sys::local;

/// How long a monitor may take beyond the time that a request asks it to wait.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long the guest may take to make a filesystem and mount it.
const DISK: Duration = Duration::from_secs(120);

/// How often someone who waits for a snapshot is asked whether to go on.
const GLANCE: Duration = Duration::from_millis(100);

/// Why a request was not fulfilled.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody listens on the socket.
    #[error("no monitor listens on {}", path.display())]
    Gone {
        /// The socket.
        path: PathBuf,
    },
    /// The connection failed on the way.
    #[error("the connection to the monitor on {} failed: {source}", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// What answered is no monitor.
    #[error("what answers on {} is no monitor: {why}", path.display())]
    Nonsense {
        /// The socket.
        path: PathBuf,
        /// What is wrong with the answer.
        why: String,
    },
    /// The monitor says no.
    #[error(transparent)]
    Failure(Failure),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        match error {
            Error::Failure(failure) => failure,
            Error::Gone { .. } => Failure::new(Code::Refused, error.to_string()).hint("catnap ps"),
            _ => Failure::new(Code::Failed, error.to_string()),
        }
    }
}

/// A machine's control socket. Each call is a connection of its own.
#[derive(Clone, Debug)]
pub struct Client {
    path: PathBuf,
    patience: Duration,
}

impl Client {
    /// Speaks to the monitor that listens on `path`.
    pub fn new(path: impl Into<PathBuf>) -> Client {
        Client { path: path.into(), patience: PATIENCE }
    }

    /// The same, waiting no longer than `patience` for what should be answered at once.
    pub fn with_patience(self, patience: Duration) -> Client {
        Client { patience, ..self }
    }

    /// The socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the machine is and does.
    pub fn status(&self) -> Result<Status, Error> {
        self.ask("GET", "/v1/machine", &(), Duration::ZERO)
    }

    /// The same, once what is waited for has come or `time` (whole seconds) has passed.
    pub fn wait(&self, what: Wait, time: Duration) -> Result<Status, Error> {
        let path = format!("/v1/machine?wait={}&seconds={}", what.word(), time.as_secs());
        self.ask("GET", &path, &(), time)
    }

    /// Stops the vCPUs.
    pub fn pause(&self) -> Result<Status, Error> {
        self.ask("POST", "/v1/pause", &(), Duration::ZERO)
    }

    /// Lets the vCPUs run on.
    pub fn resume(&self) -> Result<Status, Error> {
        self.ask("POST", "/v1/resume", &(), Duration::ZERO)
    }

    /// Presses the power button and does not wait.
    pub fn power_button(&self) -> Result<Status, Error> {
        self.ask("POST", "/v1/power-button", &(), Duration::ZERO)
    }

    /// Shuts the guest down and returns when it has ended.
    pub fn stop(&self, stop: Stop) -> Result<Status, Error> {
        self.ask("POST", "/v1/stop", &stop, Duration::from_secs(stop.seconds.into()))
    }

    /// Gives the guest another size, and returns when it has that or will not.
    pub fn resize(&self, resize: Resize) -> Result<Resized, Error> {
        self.ask("POST", "/v1/resize", &resize, Duration::from_secs(MAX_RESIZE.into()))
    }

    /// A picture of the guest's memory in so many cells.
    pub fn memory_map(&self, cells: u32) -> Result<MemoryMap, Error> {
        self.ask("GET", &format!("/v1/memory-map?cells={cells}"), &(), Duration::ZERO)
    }

    /// Puts a blank disk into a bay; returns when the agent has mounted it.
    pub fn attach(&self, wanted: &Ephemeral) -> Result<Status, Error> {
        self.ask("POST", "/v1/disk/attach", wanted, DISK)
    }

    /// Takes a disk out of its bay.
    pub fn detach(&self, detach: &Detach) -> Result<Status, Error> {
        self.ask("POST", "/v1/disk/detach", detach, DISK)
    }

    /// Pauses the machine for ever, and has the media given away that hold what is wanted.
    pub fn give(&self, give: &Give) -> Result<Status, Error> {
        self.ask("POST", "/v1/disk/give", give, Duration::ZERO)
    }

    /// Takes a snapshot; `watch` is asked a few times a second whether to go on, also when there is nothing new. When
    /// it says no, the monitor is asked to cancel, and what it says then counts: the snapshot may be there already.
    pub fn snapshot(
        &self,
        request: &SnapshotRequest,
        mut watch: impl FnMut(Option<Progress>) -> ControlFlow<()>,
    ) -> Result<Taken, Error> {
        let stream = self.stream("POST", "/v1/snapshot", request)?;
        stream.set_read_timeout(Some(GLANCE)).map_err(|error| self.io(error))?;
        let (mut line, mut unwanted) = (Vec::new(), false);
        let mut watch = |progress| {
            if !unwanted && watch(progress).is_break() {
                unwanted = true;
                return stream.shutdown(Shutdown::Write).map_err(|error| self.io(error));
            }
            Ok(())
        };
        loop {
            let mut byte = [0];
            match (&stream).read(&mut byte) {
                Ok(0) => return Err(self.nonsense("it ended without a word of the snapshot")),
                Ok(_) if byte[0] != b'\n' && line.len() < MAX_BODY => line.push(byte[0]),
                Ok(_) => {
                    match serde_json::from_slice(&line).map_err(|error| self.nonsense(error))? {
                        SnapshotEvent::Done(taken) => return Ok(taken),
                        SnapshotEvent::Failed(failure) => return Err(Error::Failure(failure)),
                        SnapshotEvent::Progress(progress) => watch(Some(progress))?,
                    }
                    line.clear();
                }
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
                    ) =>
                {
                    watch(None)?;
                }
                Err(error) => return Err(self.io(error)),
            }
        }
    }

    /// The guest's console, as a stream: first what it has shown so far.
    pub fn console(&self) -> Result<UnixStream, Error> {
        self.stream("GET", "/v1/console", &())
    }

    /// Runs a program in the guest; the stream carries [`agent::Frame`]s.
    pub fn exec(&self, exec: &agent::Exec) -> Result<UnixStream, Error> {
        self.stream("POST", "/v1/exec", exec)
    }

    /// A connection to the guest's agent that has read `request`.
    pub fn agent(&self, request: &agent::Request) -> Result<UnixStream, Error> {
        self.stream("POST", "/v1/agent", request)
    }

    /// One request with an answer in JSON that takes the monitor up to `time`.
    fn ask<T: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        body: &impl Serialize,
        time: Duration,
    ) -> Result<T, Error> {
        let mut stream = self.send(method, path, body, "", time)?;
        let (status, length) = self.head(&mut stream)?;
        let body = self.body(stream, length)?;
        if status != 200 {
            return Err(self.failure(&body));
        }
        serde_json::from_slice(&body).map_err(|error| self.nonsense(error))
    }

    /// One request that turns the connection into a stream.
    fn stream(&self, method: &str, path: &str, body: &impl Serialize) -> Result<UnixStream, Error> {
        let upgrade = format!("Connection: Upgrade\r\nUpgrade: {STREAM}\r\n");
        let mut stream = self.send(method, path, body, &upgrade, Duration::ZERO)?;
        let (status, length) = self.head(&mut stream)?;
        if status != 101 {
            return Err(self.failure(&self.body(stream, length)?));
        }
        stream.set_read_timeout(None).and_then(|()| stream.set_write_timeout(None)).map_err(|e| self.io(e))?;
        Ok(stream)
    }

    fn send(
        &self,
        method: &str,
        path: &str,
        body: &impl Serialize,
        more: &str,
        time: Duration,
    ) -> Result<UnixStream, Error> {
        let mut stream = local::connect(&self.path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Error::Gone { path: self.path.clone() },
            _ => self.io(error),
        })?;
        let body = match method {
            "POST" => serde_json::to_vec(body).map_err(|error| self.nonsense(error))?,
            _ => Vec::new(),
        };
        // `()` stands for no body; in JSON it would be `null`.
        let body = if body == b"null" { Vec::new() } else { body };
        let head = format!("{method} {path} HTTP/1.1\r\nHost: catnap\r\n{more}Content-Length: {}\r\n\r\n", body.len());
        stream
            .set_read_timeout(Some(time + self.patience))
            .and_then(|()| stream.set_write_timeout(Some(self.patience)))
            .and_then(|()| stream.write_all(&[head.as_bytes(), &body].concat()))
            .map_err(|error| self.io(error))?;
        Ok(stream)
    }

    /// The status of a response and the length of its body. Reads byte by byte, so that nothing of a stream
    /// that follows is taken; a head of ours is some hundred bytes long.
    fn head(&self, stream: &mut UnixStream) -> Result<(u16, usize), Error> {
        let mut bytes = Vec::with_capacity(256);
        while !bytes.ends_with(b"\r\n\r\n") {
            if bytes.len() >= MAX_HEAD {
                return Err(self.nonsense("its answer has no end"));
            }
            let mut byte = [0];
            stream.read_exact(&mut byte).map_err(|error| self.io(error))?;
            bytes.push(byte[0]);
        }
        let mut headers = [httparse::EMPTY_HEADER; 16];
        let mut head = httparse::Response::new(&mut headers);
        head.parse(&bytes).map_err(|error| self.nonsense(error))?;
        let length = head.headers.iter().find(|header| header.name.eq_ignore_ascii_case("content-length"));
        let length = match length.map(|header| std::str::from_utf8(header.value).ok().and_then(|v| v.parse().ok())) {
            None => 0,
            Some(Some(length)) if length <= MAX_BODY => length,
            Some(_) => return Err(self.nonsense("its answer is too long")),
        };
        Ok((head.code.unwrap_or(0), length))
    }

    fn body(&self, mut stream: UnixStream, length: usize) -> Result<Vec<u8>, Error> {
        let mut body = vec![0; length];
        stream.read_exact(&mut body).map_err(|error| self.io(error))?;
        Ok(body)
    }

    fn failure(&self, body: &[u8]) -> Error {
        serde_json::from_slice(body).map_or_else(|error| self.nonsense(error), Error::Failure)
    }

    fn io(&self, source: io::Error) -> Error {
        Error::Io { path: self.path.clone(), source }
    }

    fn nonsense(&self, why: impl ToString) -> Error {
        Error::Nonsense { path: self.path.clone(), why: why.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;
    use crate::snapshot::Kind;

    /// What a client hears that gives up, from a monitor that answers with `last` when it hears of that.
    fn given_up(last: Option<SnapshotEvent>) -> Result<Taken, Error> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let monitor = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let (mut asked, mut bytes) = (Vec::new(), [0; 1024]);
            while !asked.ends_with(b"}") {
                let count = stream.read(&mut bytes).unwrap();
                asked.extend_from_slice(&bytes[..count]);
            }
            stream.write_all(b"HTTP/1.1 101 Switching Protocols\r\n\r\n").unwrap();
            assert_eq!(stream.read(&mut bytes).unwrap(), 0, "it closes its side");
            if let Some(last) = last {
                stream.write_all(&[serde_json::to_vec(&last).unwrap(), b"\n".to_vec()].concat()).unwrap();
            }
        });
        let request = SnapshotRequest {
            name: "anna@monday".into(),
            mode: Default::default(),
            note: String::new(),
            at_doorbell: false,
        };
        let heard = Client::new(path).snapshot(&request, |_| ControlFlow::Break(()));
        monitor.join().unwrap();
        heard
    }

    #[test]
    fn a_snapshot_that_was_there_before_it_was_cancelled_is_no_cancelled_one() {
        let taken = Taken {
            name: "anna@monday".into(),
            digest: String::new(),
            kind: Kind::Live,
            pause_us: 1,
            bytes_written: 2,
            duration_ms: 3,
            moments: Default::default(),
        };
        assert_eq!(given_up(Some(SnapshotEvent::Done(taken.clone()))).unwrap(), taken);
        let cancelled = Failure::new(Code::Failed, "the snapshot was cancelled");
        match given_up(Some(SnapshotEvent::Failed(cancelled.clone()))) {
            Err(Error::Failure(failure)) => assert_eq!(failure, cancelled),
            other => panic!("{other:?}"),
        }
        assert!(given_up(None).is_err());
    }
}
