//! The event loop: one thread for all connections, however many and however slow.
//!
//! ```text
//!            a whole request          answered               all sent
//! Reading ───────────────────> Working ───────> Writing ──┬────────────> Reading (keep-alive)
//!    │ refused                                     ^      └────────────> Draining, then closed
//!    └─────────────────────────────────────────────┘
//! ```
//!
//! A connection costs a descriptor and its buffers, and what all buffers hold together is bounded. Whoever
//! makes no progress is closed.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::http::{self, Parsed, Response};
use super::pool::Pool;
use super::{Site, routes};
use crate::socket::{Listener, Socket};

/// Connections at one time. When there are so many, idle ones make room for new ones.
const MAX_CONNECTIONS: usize = 4096;
/// What all connections' buffers may hold together, in bytes.
const MAX_HELD: usize = 24 << 20;
/// The longest that a connection may be idle between requests, ...
const IDLE: Duration = Duration::from_secs(60);
/// ... that a request may take to arrive from its first byte on, ...
const ARRIVAL: Duration = Duration::from_secs(10);
/// ... that an answer may make no progress, ...
const STALL: Duration = Duration::from_secs(30);
/// ... and that a client may take to close after the last answer.
const LEAVE: Duration = Duration::from_secs(2);

/// Steps that a connection may take before the others have their turn.
const TURN: usize = 64;

const LISTENER: u64 = 0;
const POOL: u64 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Reading,
    Working,
    Writing,
    Draining,
}

struct Connection {
    socket: Socket,
    stage: Stage,
    /// When the stage began or, in `Writing`, made progress.
    since: Instant,
    input: Vec<u8>,
    output: Vec<u8>,
    sent: usize,
    /// What is to be done after the answer.
    keep_alive: bool,
    head_only: bool,
    /// The client was told to send the body.
    encouraged: bool,
}

/// What a step says of its connection.
#[derive(PartialEq, Eq)]
enum Next {
    /// Nothing can be done before the next event.
    Wait,
    /// The stage has changed; go on.
    Again,
    Close,
}

/// The site's server.
pub(super) struct Server {
    site: Arc<Site>,
    listener: Listener,
    epoll: Epoll,
    pool: Arc<Pool>,
    connections: HashMap<u64, Connection>,
    next_id: u64,
    held: usize,
}

impl Server {
    pub(super) fn new(site: Arc<Site>, listener: Listener) -> io::Result<Server> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let pool = Pool::new(site.clone())?;
        epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
        epoll.add(&pool.rung, EpollEvent::new(EpollFlags::EPOLLIN, POOL))?;
        Ok(Server { site, listener, epoll, pool, connections: HashMap::new(), next_id: 2, held: 0 })
    }

    /// Serves for ever, or until epoll fails.
    pub(super) fn run(mut self) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); 256];
        let mut swept = Instant::now();
        loop {
            // An idle site with no visitors sleeps soundly.
            let patience = if self.connections.is_empty() { EpollTimeout::NONE } else { EpollTimeout::from(1000u16) };
            let ready = match self.epoll.wait(&mut events, patience) {
                Ok(ready) => ready,
                Err(Errno::EINTR) => 0,
                Err(error) => return Err(error.into()),
            };
            for event in &events[..ready] {
                match event.data() {
                    LISTENER => self.accept(),
                    POOL => self.deliver(),
                    id => self.advance(id),
                }
            }
            if swept.elapsed() >= Duration::from_secs(1) {
                self.close_the_slow();
                swept = Instant::now();
            }
        }
    }

    fn accept(&mut self) {
        // Bounded, so that a flood of new connections does not starve the old ones.
        for _ in 0..64 {
            match self.listener.accept() {
                Ok(Some(socket)) => self.welcome(socket),
                Ok(None) => return,
                // Out of descriptors: without a pause this would spin, as the connection stays in the queue.
                Err(_) => return std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    fn welcome(&mut self, socket: Socket) {
        if self.connections.len() >= MAX_CONNECTIONS && !self.close_longest_idle() {
            return;
        }
        socket.set_nodelay();
        let id = self.next_id;
        self.next_id += 1;
        if self.epoll.add(&socket, interest(id)).is_ok() {
            self.connections.insert(id, Connection::new(socket));
        }
    }

    /// Makes room; false when everybody is busy.
    fn close_longest_idle(&mut self) -> bool {
        let idle = self.connections.iter().filter(|(_, connection)| connection.is_idle());
        let Some(id) = idle.min_by_key(|(_, connection)| connection.since).map(|(id, _)| *id) else { return false };
        self.close(id);
        true
    }

    /// Hands the workers' answers to their connections, those of them that are still there.
    fn deliver(&mut self) {
        for (id, response) in self.pool.fetch() {
            if let Some(connection) = self.connections.get_mut(&id) {
                connection.reply(&response);
                self.advance(id);
            }
        }
    }

    /// Does for a connection all that can be done now.
    fn advance(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let before = connection.held();
        let mut next = Next::Again;
        for _ in 0..TURN {
            next = match connection.stage {
                Stage::Reading => connection.read(id, &self.site, &self.pool, MAX_HELD.saturating_sub(self.held)),
                Stage::Working => Next::Wait,
                Stage::Writing => connection.write(),
                Stage::Draining => connection.drain(),
            };
            if next != Next::Again {
                break;
            }
        }
        if next == Next::Again && self.epoll.modify(&connection.socket, &mut interest(id)).is_err() {
            next = Next::Close;
        }
        self.held = self.held - before.min(self.held) + connection.held();
        if next == Next::Close || self.held > MAX_HELD {
            self.close(id);
        }
    }

    fn close(&mut self, id: u64) {
        if let Some(connection) = self.connections.remove(&id) {
            self.held -= connection.held().min(self.held);
        }
    }

    fn close_the_slow(&mut self) {
        let late = |connection: &Connection| connection.since.elapsed() > connection.patience();
        let late: Vec<u64> = self.connections.iter().filter(|(_, c)| late(c)).map(|(id, _)| *id).collect();
        late.into_iter().for_each(|id| self.close(id));
    }
}

/// Edge-triggered. Setting it again reports anew what is still to be done.
fn interest(id: u64) -> EpollEvent {
    let all = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
    EpollEvent::new(all, id)
}

impl Connection {
    fn new(socket: Socket) -> Connection {
        Connection {
            socket,
            stage: Stage::Reading,
            since: Instant::now(),
            input: Vec::new(),
            output: Vec::new(),
            sent: 0,
            keep_alive: false,
            head_only: false,
            encouraged: false,
        }
    }

    fn is_idle(&self) -> bool {
        self.stage == Stage::Draining || self.stage == Stage::Reading && self.input.is_empty()
    }

    fn held(&self) -> usize {
        self.input.capacity() + self.output.capacity()
    }

    fn patience(&self) -> Duration {
        match self.stage {
            Stage::Reading if self.input.is_empty() => IDLE,
            Stage::Reading => ARRIVAL,
            // The work itself is bounded.
            Stage::Working => Duration::MAX,
            Stage::Writing => STALL,
            Stage::Draining => LEAVE,
        }
    }

    fn enter(&mut self, stage: Stage) {
        self.stage = stage;
        self.since = Instant::now();
    }

    /// Acts on the request that the input begins with, or reads more of it.
    fn read(&mut self, id: u64, site: &Arc<Site>, pool: &Arc<Pool>, room: usize) -> Next {
        match http::parse(&self.input) {
            Parsed::Whole(request, length) => {
                self.input.drain(..length);
                self.input.shrink_to_fit();
                (self.keep_alive, self.head_only) = (request.keep_alive, request.method == "HEAD");
                self.encouraged = false;
                match routes::answer_at_once(site, &request) {
                    Some(response) => self.reply(&response),
                    None => {
                        self.enter(Stage::Working);
                        pool.submit(id, *request);
                    }
                }
                return Next::Again;
            }
            Parsed::Refused(status) => return self.refuse(status),
            Parsed::Partial { expecting: true } if !self.encouraged => {
                self.encouraged = true;
                // 25 bytes fit into an empty send buffer; should they not, the client goes on after a while.
                let _ = (&self.socket).write(b"HTTP/1.1 100 Continue\r\n\r\n");
            }
            Parsed::Partial { .. } => {}
        }
        let mut chunk = [0; 16 << 10];
        match (&self.socket).read(&mut chunk) {
            Ok(0) => Next::Close,
            Ok(n) if n > room => self.refuse(503),
            Ok(n) => {
                if self.input.is_empty() {
                    self.since = Instant::now();
                }
                self.input.extend_from_slice(&chunk[..n]);
                Next::Again
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Next::Wait,
            Err(_) => Next::Close,
        }
    }

    /// Answers what is no proper request; nobody knows where the next one begins.
    fn refuse(&mut self, status: u16) -> Next {
        (self.keep_alive, self.head_only, self.input) = (false, false, Vec::new());
        self.reply(&Response::text(status, "This cannot be answered."));
        Next::Again
    }

    fn reply(&mut self, response: &Response) {
        self.output = response.bytes(self.keep_alive, self.head_only);
        self.sent = 0;
        self.enter(Stage::Writing);
    }

    fn write(&mut self) -> Next {
        while self.sent < self.output.len() {
            match (&self.socket).write(&self.output[self.sent..]) {
                Ok(n) => {
                    self.sent += n;
                    self.since = Instant::now();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Next::Wait,
                Err(_) => return Next::Close,
            }
        }
        self.output = Vec::new();
        if self.keep_alive {
            self.enter(Stage::Reading);
            return Next::Again;
        }
        // Closing with bytes unread would reset the connection, and the client might lose the answer.
        if self.socket.shutdown_write().is_err() {
            return Next::Close;
        }
        self.input = Vec::new();
        self.enter(Stage::Draining);
        Next::Again
    }

    fn drain(&mut self) -> Next {
        let mut chunk = [0; 16 << 10];
        // Bounded: whoever sends for ever is closed on.
        for _ in 0..16 {
            match (&self.socket).read(&mut chunk) {
                Ok(n) if n > 0 => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Next::Wait,
                _ => return Next::Close,
            }
        }
        Next::Close
    }
}
