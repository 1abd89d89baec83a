//! The agent: answers the monitor, as [`crate::protocol`] says.
//!
//! [`Agent::serve`] is one thread asleep in epoll. It takes connections, reads their first line, and keeps
//! those that forward ([`relay`]): thousands of them cost no thread. Each of the others gets a thread, and
//! the number of these is bounded.

mod exec;
mod program;
mod relay;
mod serve;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::facts;
use crate::machine::Machine;
use crate::protocol::{Frame, Reply, Request, Status, Woken, write_line};
use crate::socket::{Listener, Socket};

/// Answers requests, on behalf of a whole machine or (in the lab) of nothing but its programs.
pub struct Agent {
    machine: Option<Arc<Machine>>,
    sessions: AtomicUsize,
    /// MemTotal at the start, in bytes.
    boot_memory: u64,
    /// The memory that the kernel had then, in bytes.
    boot_present: u64,
}

impl Agent {
    /// Programs and requests that are served at one time.
    const MAX_SESSIONS: usize = 64;
    /// The longest that a reply waits for its reader.
    const REPLY_TIME: Duration = Duration::from_secs(10);

    /// An agent that may freeze, wake and shut down `machine`; without one it refuses to.
    pub fn new(machine: Option<Arc<Machine>>) -> Arc<Agent> {
        let (boot_memory, boot_present) = (facts::memory_bytes(), facts::present_bytes());
        Arc::new(Agent { machine, sessions: AtomicUsize::new(0), boot_memory, boot_present })
    }

    /// Serves for ever, or until the listener fails.
    pub fn serve(self: Arc<Agent>, listener: &Listener) -> io::Result<()> {
        serve::run(&self, listener)
    }

    /// Serves one request (never `forward`) in a thread of its own. `rest` is what came after its line.
    fn begin_session(self: &Arc<Agent>, socket: Socket, request: Request, rest: Vec<u8>) {
        if self.sessions.fetch_add(1, Ordering::Relaxed) >= Self::MAX_SESSIONS {
            self.sessions.fetch_sub(1, Ordering::Relaxed);
            return turn_away(&socket, &request);
        }
        let agent = self.clone();
        let session = move || {
            agent.session(socket, request, rest);
            agent.sessions.fetch_sub(1, Ordering::Relaxed);
        };
        if std::thread::Builder::new().name("session".into()).stack_size(256 << 10).spawn(session).is_err() {
            // The connection went with the closure; the monitor sees it end without an answer.
            self.sessions.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Whatever fails here fails because the peer is gone, so there is nobody to tell.
    fn session(&self, socket: Socket, request: Request, rest: Vec<u8>) {
        if let Request::Exec(exec) = request {
            return exec::run(socket, rest, &exec);
        }
        let _ = socket.set_nonblocking(false).and_then(|()| socket.set_timeout(Self::REPLY_TIME));
        let reply = self.answer(&request);
        let written = write_line(&mut &socket, &reply);
        if let (Request::Shutdown { reboot }, Ok(()), Reply::Ok) = (request, written, reply) {
            crate::init::ask_for_shutdown(reboot);
        }
    }

    fn answer(&self, request: &Request) -> Reply {
        let Some(machine) = &self.machine else {
            return match request {
                Request::Status => Reply::Status(self.status(0, false)),
                _ => Reply::Error("this agent is not the machine's init".into()),
            };
        };
        let done = match request {
            Request::Status => return Reply::Status(self.status(machine.generation(), machine.frozen())),
            Request::Freeze { seconds } => machine.freeze(*seconds),
            Request::Thaw => machine.thaw(),
            Request::Wake(wake) => {
                let failed = machine.wake(wake).err();
                return Reply::Woken(Woken { boot_id: facts::boot_id(), failed });
            }
            Request::Mount { bay, at, size } => machine.mount(bay, at, *size),
            Request::Unmount { bay, force } => match machine.unmount(bay, *force) {
                Ok(false) => return Reply::Held,
                done => done.map(drop),
            },
            Request::SyncBays => machine.sync_bays(),
            Request::Scrub { patterns } => match machine.scrub(patterns) {
                Ok(scrubbed) => return Reply::Scrubbed(scrubbed),
                Err(why) => Err(why),
            },
            Request::Shutdown { .. } => Ok(()),
            Request::Exec(_) | Request::Forward { .. } => Err("not a request with a reply".into()),
        };
        done.map_or_else(Reply::Error, |()| Reply::Ok)
    }

    fn status(&self, generation: u64, frozen: bool) -> Status {
        Status {
            cpus: facts::cpus(),
            memory_bytes: facts::memory_bytes(),
            boot_memory_bytes: self.boot_memory,
            present_bytes: facts::present_bytes(),
            boot_present_bytes: self.boot_present,
            available_bytes: facts::available_bytes(),
            disk_bytes: facts::root_disk_bytes().unwrap_or(0),
            root_bytes: facts::root_bytes(),
            uptime_seconds: facts::uptime_seconds(),
            boot_id: facts::boot_id(),
            generation,
            realtime_ns: facts::realtime_ns(),
            frozen,
        }
    }
}

/// A full house. This is the accepting thread, which must not wait: what the kernel does not take is lost.
fn turn_away(socket: &Socket, request: &Request) {
    const BUSY: &str = "too many requests at one time";
    let _ = match request {
        Request::Exec(_) => Frame::Failed(126, BUSY.into()).write(&mut &*socket),
        _ => write_line(&mut &*socket, &Reply::Error(BUSY.into())),
    };
}
