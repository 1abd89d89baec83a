//! The agent's one event loop: takes connections, reads first lines, carries forwards.
//!
//! ```text
//!           accept            greet: a whole line           joined
//! listener ───────> Greeting ───────────────────> Relay ───────────> Relay, until both ends are done
//!                      │ another request             │ refused
//!                      └───────> a session thread    └───────> reset
//! ```
//!
//! Descriptors are registered once, edge-triggered; what they are ready for is remembered until the kernel
//! says otherwise. A busy connection is served in turns, so that it cannot hold up the others.

use std::collections::{HashMap, VecDeque};
use std::io::{self, Read};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::Agent;
use super::relay::{Budget, Relay, Turn};
use crate::protocol::{MAX_LINE, Request};
use crate::socket::{Listener, Socket};

/// Forwards at one time; more are reset. Two descriptors each; init raises the limit of those.
const MAX_RELAYS: usize = 8192;
/// Connections whose first line is not complete, at most [`MAX_LINE`] bytes each.
const MAX_GREETINGS: usize = 128;
/// The longest that a first line takes.
const GREETING_TIME: Duration = Duration::from_secs(10);
/// The listener's token; connection `id` has the tokens `2 * id` (the monitor's side) and `2 * id + 1`.
const LISTENER: u64 = 0;

/// A connection whose first line is still coming.
struct Greeting {
    socket: Socket,
    line: Vec<u8>,
    since: Instant,
}

struct Loop<'a> {
    agent: &'a Arc<Agent>,
    epoll: Epoll,
    listener: &'a Listener,
    listening: bool,
    next_id: u64,
    greetings: HashMap<u64, Greeting>,
    relays: HashMap<u64, Relay>,
    /// Relays whose turn ended before their work did.
    unfinished: VecDeque<u64>,
    budget: Budget,
}

pub(super) fn run(agent: &Arc<Agent>, listener: &Listener) -> io::Result<()> {
    let mut state = Loop {
        agent,
        epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
        listener,
        listening: false,
        next_id: 1,
        greetings: HashMap::new(),
        relays: HashMap::new(),
        unfinished: VecDeque::new(),
        budget: Budget::default(),
    };
    let mut events = [EpollEvent::empty(); 256];
    loop {
        state.listen_if_there_is_room()?;
        let ready = match state.epoll.wait(&mut events, state.patience()) {
            Ok(ready) => ready,
            Err(Errno::EINTR) => 0,
            Err(error) => return Err(error.into()),
        };
        for event in &events[..ready] {
            state.dispatch(event.data(), event.events());
        }
        // Only those that were unfinished before this round, so that new events are seen in between.
        for _ in 0..state.unfinished.len() {
            if let Some(id) = state.unfinished.pop_front() {
                state.carry(id);
            }
        }
        state.drop_the_slow();
    }
}

impl Loop<'_> {
    fn listen_if_there_is_room(&mut self) -> io::Result<()> {
        let room = self.greetings.len() < MAX_GREETINGS;
        if room && !self.listening {
            self.epoll.add(self.listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
        } else if !room && self.listening {
            self.epoll.delete(self.listener)?;
        }
        self.listening = room;
        Ok(())
    }

    /// How long epoll may sleep: not at all with work left, a second while first lines are coming.
    fn patience(&self) -> EpollTimeout {
        if !self.unfinished.is_empty() {
            EpollTimeout::ZERO
        } else if !self.greetings.is_empty() {
            EpollTimeout::from(1000u16)
        } else {
            EpollTimeout::NONE
        }
    }

    fn dispatch(&mut self, token: u64, flags: EpollFlags) {
        if token == LISTENER {
            return self.accept();
        }
        let id = token / 2;
        if let Some(relay) = self.relays.get_mut(&id) {
            relay.notice(token % 2 == 1, flags);
            if !relay.queued {
                self.carry(id);
            }
        } else {
            self.greet(id);
        }
    }

    fn accept(&mut self) {
        match self.listener.accept() {
            Ok(Some(socket)) => {
                socket.set_nodelay();
                let id = self.next_id;
                self.next_id += 1;
                if self.watch(&socket, 2 * id).is_ok() {
                    self.greetings.insert(id, Greeting { socket, line: Vec::new(), since: Instant::now() });
                }
            }
            Ok(None) => {}
            // Out of descriptors or memory: the connection stays in the kernel's queue and is tried again.
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }

    fn watch(&self, socket: &Socket, token: u64) -> io::Result<()> {
        let all = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
        Ok(self.epoll.add(socket, EpollEvent::new(all, token))?)
    }

    /// Reads on at a first line, and acts on it when it is whole. A line that is too long or makes no sense
    /// ends the connection.
    fn greet(&mut self, id: u64) {
        let Some(greeting) = self.greetings.get_mut(&id) else { return };
        let mut chunk = [0; 4096];
        let end = loop {
            match (&greeting.socket).read(&mut chunk) {
                Ok(0) => break None,
                Ok(n) => {
                    let seen = greeting.line.len();
                    greeting.line.extend_from_slice(&chunk[..n]);
                    if let Some(at) = greeting.line[seen..].iter().position(|byte| *byte == b'\n') {
                        break Some(seen + at);
                    }
                    if greeting.line.len() >= MAX_LINE {
                        break None;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break None,
            }
        };
        let Some(greeting) = self.greetings.remove(&id) else { return };
        let Some(end) = end else { return };
        if let Ok(request) = serde_json::from_slice(&greeting.line[..end]) {
            self.act(id, greeting.socket, request, greeting.line[end + 1..].to_vec());
        }
    }

    fn act(&mut self, id: u64, socket: Socket, request: Request, rest: Vec<u8>) {
        let Request::Forward { port } = request else {
            if self.epoll.delete(&socket).is_ok() {
                self.agent.begin_session(socket, request, rest);
            }
            return;
        };
        if self.relays.len() >= MAX_RELAYS {
            return socket.reset();
        }
        let inner = Socket::begin_connect(SocketAddrV4::new(Ipv4Addr::LOCALHOST, port))
            .and_then(|inner| self.watch(&inner, 2 * id + 1).map(|()| inner));
        match inner {
            Ok(inner) => {
                self.relays.insert(id, Relay::new(socket, inner, rest, &mut self.budget));
            }
            Err(_) => socket.reset(),
        }
    }

    fn carry(&mut self, id: u64) {
        let Some(relay) = self.relays.get_mut(&id) else { return };
        let turn = relay.turn(&mut self.budget);
        relay.queued = turn == Turn::Unfinished;
        match turn {
            Turn::Waiting => {}
            Turn::Unfinished => self.unfinished.push_back(id),
            Turn::Done | Turn::Broken => {
                if let Some(relay) = self.relays.remove(&id) {
                    relay.close(turn == Turn::Broken, &mut self.budget);
                }
            }
        }
    }

    fn drop_the_slow(&mut self) {
        if !self.greetings.is_empty() {
            self.greetings.retain(|_, greeting| greeting.since.elapsed() < GREETING_TIME);
        }
    }
}
