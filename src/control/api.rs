//! What each request does, and the streams that a connection can become.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::ops::ControlFlow;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::thread;
use std::time::Duration;

use catnap_guest::protocol as agent;
use serde::de::DeserializeOwned;

use super::failure::{Code, Failure};
use super::host::{Guest, Host};
use super::http::{self, Request};
use super::protocol::{
    Detach, Give, MAX_CELLS, MAX_WAIT, MemoryMap, Resized, STREAM, SnapshotEvent, SnapshotRequest, Wait,
};
use super::server::Handler;
use crate::machine::State;
use crate::spec::Ephemeral;

/// Answers the control protocol for a host's guest.
pub struct Api(pub Arc<Host>);

/// What a request comes to.
enum Answer {
    /// The machine's status.
    Status,
    /// What came of a resize.
    Resized(Box<Resized>),
    /// A picture of the guest's memory.
    Memory(MemoryMap),
    /// The connection becomes the guest's console.
    Console,
    /// The connection tells how a snapshot comes about.
    Snapshot(SnapshotRequest),
    /// The connection is joined to a fresh one to the guest's agent, which has been told what is wanted.
    Agent(UnixStream),
}

impl Handler for Api {
    fn handle(&self, request: Request, mut stream: UnixStream) -> io::Result<()> {
        match self.route(&request) {
            Err(failure) => http::fail(&mut stream, &failure),
            Ok(Answer::Status) => http::respond(&mut stream, 200, &serde_json::to_vec(&self.0.status())?),
            Ok(Answer::Resized(resized)) => http::respond(&mut stream, 200, &serde_json::to_vec(&resized)?),
            Ok(Answer::Memory(map)) => http::respond(&mut stream, 200, &serde_json::to_vec(&map)?),
            Ok(Answer::Console) => console(&self.0, stream, &request.early),
            Ok(Answer::Snapshot(wanted)) => snapshot(&self.0, stream, wanted),
            Ok(Answer::Agent(agent)) => join(stream, agent, &request.early),
        }
    }
}

impl Api {
    fn route(&self, request: &Request) -> Result<Answer, Failure> {
        let host = &self.0;
        match (request.method.as_str(), request.path.as_str()) {
            ("GET", "/v1/machine") => {
                if let Some((what, time)) = wanted_wait(request)? {
                    host.wait(what, time);
                }
            }
            ("POST", "/v1/pause") => host.guest()?.pause()?,
            ("POST", "/v1/resume") => host.guest()?.resume()?,
            ("POST", "/v1/power-button") => host.guest()?.power_button()?,
            ("POST", "/v1/stop") => host.stop(body(request)?)?,
            ("POST", "/v1/resize") => return Ok(Answer::Resized(Box::new(host.resize(body(request)?)?))),
            ("POST", "/v1/disk/attach") => {
                let wanted: Ephemeral = body(request)?;
                wanted.check().map_err(|error| Failure::new(Code::Usage, error.to_string()))?;
                self.awake()?.attach(&wanted)?;
            }
            ("POST", "/v1/disk/detach") => {
                let Detach { disk, force } = body(request)?;
                self.awake()?.detach(&disk, force)?;
            }
            ("POST", "/v1/disk/give") => host.guest()?.give(&body::<Give>(request)?.marks)?,
            ("GET", "/v1/memory-map") => return Ok(Answer::Memory(host.guest()?.memory_map(wanted_cells(request)?)?)),
            ("GET", "/v1/console") => {
                must_upgrade(request)?;
                host.guest()?;
                return Ok(Answer::Console);
            }
            ("POST", "/v1/snapshot") => {
                must_upgrade(request)?;
                host.guest()?;
                return Ok(Answer::Snapshot(body(request)?));
            }
            ("POST", "/v1/exec") => return self.agent(request, agent::Request::Exec(body(request)?)),
            ("POST", "/v1/agent") => return self.agent(request, body(request)?),
            (method, path) => {
                return Err(Failure::new(Code::NotFound, format!("there is no {method} {path}"))
                    .hint("docs/control.md lists what there is"));
            }
        }
        Ok(Answer::Status)
    }

    /// The guest, if it does not stand still.
    fn awake(&self) -> Result<Arc<dyn Guest>, Failure> {
        let guest = self.0.guest()?;
        match guest.state() {
            State::Paused => {
                Err(Failure::new(Code::Refused, "the machine is paused, so its agent cannot answer")
                    .hint("catnap resume"))
            }
            _ => Ok(guest),
        }
    }

    /// A connection to the agent with the request's line sent.
    fn agent(&self, request: &Request, line: agent::Request) -> Result<Answer, Failure> {
        must_upgrade(request)?;
        let guest = self.awake()?;
        let refuse = |why: &str| Failure::new(Code::Refused, why);
        if guest.hello(Duration::ZERO).is_none() {
            return Err(refuse("the guest's agent has not said that it is ready").hint("catnap logs shows the boot"));
        }
        let failed = |error: io::Error| Failure::while_doing("the guest's agent cannot be reached", error);
        let mut agent = guest.agent().map_err(failed)?;
        agent::write_line(&mut agent, &line).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidInput => Failure::new(Code::Usage, "the request to the guest's agent is too long"),
            _ => failed(error),
        })?;
        Ok(Answer::Agent(agent))
    }
}

fn body<T: DeserializeOwned>(request: &Request) -> Result<T, Failure> {
    let bytes = if request.body.is_empty() { b"{}" } else { request.body.as_slice() };
    serde_json::from_slice(bytes)
        .map_err(|error| Failure::new(Code::Usage, format!("the body of {} makes no sense: {error}", request.path)))
}

fn must_upgrade(request: &Request) -> Result<(), Failure> {
    if request.upgrade {
        return Ok(());
    }
    Err(Failure::new(Code::Usage, format!("{} is a stream", request.path)).hint(format!("send `Upgrade: {STREAM}`")))
}

fn wanted_wait(request: &Request) -> Result<Option<(Wait, Duration)>, Failure> {
    let Some(word) = request.field("wait") else { return Ok(None) };
    let what = Wait::from_word(word)
        .ok_or_else(|| Failure::new(Code::Usage, format!("`{word}` cannot be waited for: agent and end can")))?;
    let seconds = request.field("seconds").unwrap_or("30");
    match seconds.parse::<u32>() {
        Ok(seconds) if seconds <= MAX_WAIT => Ok(Some((what, Duration::from_secs(seconds.into())))),
        _ => Err(Failure::new(Code::Usage, format!("`{seconds}` seconds cannot be waited: 0 to {MAX_WAIT} can"))),
    }
}

fn wanted_cells(request: &Request) -> Result<u32, Failure> {
    let cells = request.field("cells").unwrap_or("512");
    let refuse = || Failure::new(Code::Usage, format!("`{cells}` cells cannot be had: 1 to {MAX_CELLS} can"));
    cells.parse().ok().filter(|cells| (1..=MAX_CELLS).contains(cells)).ok_or_else(refuse)
}

/// Takes a snapshot and tells the client how far it is. A client that goes away does not want it any more.
fn snapshot(host: &Host, mut stream: UnixStream, wanted: SnapshotRequest) -> io::Result<()> {
    http::upgrade(&mut stream)?;
    let _work = host.begin_work();
    let taking = host.begin_taking(&wanted.name);
    // To see whether the client is still there, without waiting for it to say anything.
    stream.set_nonblocking(true)?;
    let tell = |event: &SnapshotEvent| -> io::Result<()> {
        let mut line = serde_json::to_vec(event)?;
        line.push(b'\n');
        // Some hundred bytes fit into the socket unless the client has long stopped reading.
        (&stream).write_all(&line)
    };
    let watch = |progress| match (&stream).read(&mut [0]) {
        Ok(0) => ControlFlow::Break(()),
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => ControlFlow::Break(()),
        _ => {
            taking.say(progress);
            match tell(&SnapshotEvent::Progress(progress)) {
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            }
        }
    };
    let guest = host.guest();
    let both = host.keeper().and_then(|keeper| Ok((keeper, guest?)));
    let taken = both.as_ref().map_err(Clone::clone).and_then(|(keeper, guest)| keeper.take(&**guest, &wanted, &watch));
    taking.end(taken.as_ref().ok());
    stream.set_nonblocking(false)?;
    tell(&match taken {
        Ok(taken) => SnapshotEvent::Done(taken),
        Err(failure) => SnapshotEvent::Failed(failure),
    })?;
    drop(stream);
    // Nobody waits for this.
    if let Ok((keeper, guest)) = both {
        keeper.flatten_if_long(&*guest);
    }
    Ok(())
}

/// Joins a connection to the guest's console, over reboots, until either ends.
fn console(host: &Host, mut stream: UnixStream, early: &[u8]) -> io::Result<()> {
    http::upgrade(&mut stream)?;
    // Someone who holds the terminal's output back (Ctrl-S) is not gone.
    stream.set_write_timeout(None)?;
    let typed = stream.try_clone()?;
    let gone = AtomicBool::new(false);
    thread::scope(|scope| {
        thread::Builder::new().name("console keys".into()).stack_size(64 * 1024).spawn_scoped(scope, || {
            keys(host, typed, early);
            gone.store(true, Ordering::SeqCst);
        })?;
        let result = screen(host, &mut stream, &gone);
        // Ends the other thread's read.
        let _ = stream.shutdown(Shutdown::Both);
        result
    })
}

/// Carries what the client types to the guest.
fn keys(host: &Host, mut typed: UnixStream, early: &[u8]) {
    let mut bytes = [0; 1024];
    let mut ready = early;
    loop {
        press(host, ready);
        match typed.read(&mut bytes) {
            Ok(0) | Err(_) => return,
            Ok(count) => ready = &bytes[..count],
        }
    }
}

/// Types `bytes` as fast as the guest's serial port takes them. A guest that takes none for a while loses the
/// rest, as with a real port.
fn press(host: &Host, mut bytes: &[u8]) {
    let mut patience = 200;
    while let (false, 1.., Ok(guest)) = (bytes.is_empty(), patience, host.guest()) {
        let taken = guest.console_input(bytes).min(bytes.len());
        bytes = &bytes[taken..];
        if taken == 0 {
            patience -= 1;
            drop(guest);
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Carries what the guest shows to the client, until there is no guest or no client.
fn screen(host: &Host, stream: &mut UnixStream, gone: &AtomicBool) -> io::Result<()> {
    let mut seen = 0;
    while let Some((boot, guest)) = host.guest_after(seen) {
        seen = boot;
        let (history, live) = guest.attach_console();
        drop(guest);
        stream.write_all(&history)?;
        loop {
            match live.recv_timeout(Duration::from_millis(500)) {
                Ok(bytes) => stream.write_all(&bytes)?,
                Err(RecvTimeoutError::Timeout) if gone.load(Ordering::SeqCst) => return Ok(()),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
    }
    Ok(())
}

/// Copies both ways between a client and the guest's agent until both have ended.
fn join(mut client: UnixStream, agent: UnixStream, early: &[u8]) -> io::Result<()> {
    http::upgrade(&mut client)?;
    client.set_write_timeout(None)?;
    let (from_client, to_agent) = (client.try_clone()?, agent.try_clone()?);
    thread::scope(|scope| {
        thread::Builder::new().name("agent input".into()).stack_size(64 * 1024).spawn_scoped(scope, move || {
            let (mut from, mut to) = (from_client, to_agent);
            let _ = to.write_all(early).and_then(|()| io::copy(&mut from, &mut to));
            let _ = to.shutdown(Shutdown::Write);
        })?;
        let (mut from, mut to) = (&agent, &client);
        let result = io::copy(&mut from, &mut to);
        // Whether the guest has said all or the client is gone: there is nothing more to carry.
        let _ = client.shutdown(Shutdown::Both);
        let _ = agent.shutdown(Shutdown::Both);
        result.map(drop)
    })
}
