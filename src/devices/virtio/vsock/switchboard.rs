//! All connections of one device: who gets which packet, and whose turn it is to send.
//!
//! Invariants: memory is bounded whatever the guest does. There are at most [`MAX_CONNECTIONS`], each with
//! one place in `ready` (an ended one stays in the table until its place comes up), and at most
//! [`MAX_REFUSALS`] packets for connections that do not exist; when those are many, the guest is not heard
//! ([`Switchboard::can_receive`]) until it has taken some.
//!
//! Sockets are watched for edges, once and for all. A connection whose stream has bytes waits in `ready`
//! until the guest gives buffers; nothing polls meanwhile.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::timerfd::TimerFd;

use super::connection::Connection;
use super::handle::{Command, Handle, Inbox, Listener};
use super::packet::{HOST_CID, Header, STREAM, op};
use super::stream::Stream;
use crate::devices::virtio::ring::Slices;

/// Connections at the same time, of both directions.
const MAX_CONNECTIONS: usize = 4096;
/// Refusals that wait for room in the guest's rx queue; as many as that queue has.
const MAX_REFUSALS: usize = 256;
/// The receive buffer of a connection while there are few, as large as Linux's own, …
const LARGE_BUFFER: u32 = 256 * 1024;
/// … and when there are many, so that all buffers together stay below 304 MiB.
const SMALL_BUFFER: u32 = 64 * 1024;
/// How many are few.
const FEW_CONNECTIONS: usize = 256;
/// How often deadlines are looked at, while there are any.
const TICK: Duration = Duration::from_millis(250);

/// Epoll's tokens for what is not a connection. No connection has this port of the host, `VMADDR_PORT_ANY`.
const NO_PORT: u32 = u32::MAX;
const DOORBELL: u64 = Ports { host: NO_PORT, guest: 0 }.token();
const TIMER: u64 = Ports { host: NO_PORT, guest: 1 }.token();
/// The host's own ports for connections to the guest begin here, as TCP's do.
const FIRST_PORT: u32 = 49152;

/// What names a connection, as the CIDs are always the same two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Ports {
    host: u32,
    guest: u32,
}

impl Ports {
    const fn token(self) -> u64 {
        (self.host as u64) << 32 | self.guest as u64
    }

    fn from_token(token: u64) -> Ports {
        Ports { host: (token >> 32) as u32, guest: token as u32 }
    }
}

/// See the head of this file.
pub struct Switchboard {
    guest_cid: u64,
    epoll: Epoll,
    timer: TimerFd,
    ticking: bool,
    handle: Handle,
    inbox: Inbox,
    /// Nothing is sent before this moment.
    quiet_until: Option<Instant>,
    connections: HashMap<Ports, Connection>,
    ready: VecDeque<Ports>,
    refusals: VecDeque<Header>,
    listeners: HashMap<u32, Listener>,
    next_port: u32,
}

impl Switchboard {
    pub fn new(guest_cid: u64) -> io::Result<Switchboard> {
        let (handle, inbox) = Handle::new()?;
        let (epoll, timer) = (Epoll::new()?, TimerFd::new().map_err(io::Error::from)?);
        let watch = |fd, token| epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token));
        watch(inbox.doorbell_fd(), DOORBELL)?;
        watch(timer.as_raw_fd(), TIMER)?;
        Ok(Switchboard {
            guest_cid,
            epoll,
            timer,
            ticking: false,
            handle,
            inbox,
            quiet_until: None,
            connections: HashMap::new(),
            ready: VecDeque::new(),
            refusals: VecDeque::new(),
            listeners: HashMap::new(),
            next_port: FIRST_PORT,
        })
    }

    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Readable when [`Switchboard::poll`] has something to do.
    pub fn fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// The guest's driver is there.
    pub fn go_online(&mut self) {
        self.inbox.set_online(true);
    }

    /// The guest's driver is gone, and with it all that it knew.
    pub fn go_offline(&mut self) {
        self.inbox.set_online(false);
        self.obey();
        self.quiet_until = None;
        self.connections.clear();
        self.ready.clear();
        self.refusals.clear();
    }

    /// Sends nothing until [`Switchboard::speak`] is called, or `time` has passed.
    pub fn keep_quiet(&mut self, time: Duration) {
        self.quiet_until = Some(Instant::now() + time);
        self.tick();
    }

    /// Ends [`Switchboard::keep_quiet`].
    pub fn speak(&mut self) {
        self.quiet_until = None;
    }

    /// Looks at what happened on the host's side. More events than fit are seen by the next call.
    pub fn poll(&mut self) {
        let mut events = [EpollEvent::default(); 128];
        // Interrupted by a signal is the same as nothing: the descriptor stays readable.
        let count = self.epoll.wait(0, &mut events).unwrap_or(0);
        for event in &events[..count] {
            match event.data() {
                DOORBELL => self.inbox.silence(),
                TIMER => self.check_deadlines(),
                token => {
                    let ports = Ports::from_token(token);
                    self.with(ports, |connection| connection.stream_ready(event.event_set()));
                }
            }
        }
    }

    /// Does what the handles asked for.
    pub fn obey(&mut self) {
        while let Some(command) = self.inbox.next() {
            match command {
                Command::HangUp => self.go_offline(),
                Command::Listen { port, listener } => drop(self.listeners.insert(port, listener)),
                Command::Connect { port, preamble, stream } => {
                    if self.inbox.is_online() && self.connections.len() < MAX_CONNECTIONS {
                        let ports = Ports { host: self.free_port(port), guest: port };
                        let buffer = self.buffer();
                        self.add(ports, Connection::requested(stream, preamble, buffer));
                    }
                }
            }
        }
    }

    /// Whether [`Switchboard::receive`] may be called.
    pub fn can_receive(&self) -> bool {
        self.refusals.len() < MAX_REFUSALS
    }

    /// A packet from the guest. `payload` is as long as the header says.
    pub fn receive(&mut self, header: &Header, payload: &Slices) {
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            return; // Nobody here is meant, and nobody can be told.
        }
        let ports = Ports { host: header.dst_port, guest: header.src_port };
        let known = self.connections.get(&ports).is_some_and(Connection::is_known_to_guest);
        if header.kind == STREAM && known {
            self.with(ports, |connection| connection.receive(header, payload));
        } else if header.kind != STREAM || header.op != op::REQUEST || !self.accept(ports, header) {
            self.refuse(header);
        }
    }

    /// Whether [`Switchboard::transmit`] may have something to send.
    pub fn wants_to_send(&self) -> bool {
        self.quiet_until.is_none() && !(self.refusals.is_empty() && self.ready.is_empty())
    }

    /// Writes the next packet for the guest to `room` and returns its length; `None` when there is none.
    /// `room` must be longer than a header.
    pub fn transmit(&mut self, room: Slices) -> Option<u32> {
        let (front, room) = room.split_at(Header::SIZE)?;
        let header = self.next_packet(&room)?;
        front.write(&header.to_bytes());
        Some(Header::SIZE as u32 + header.len)
    }

    fn next_packet(&mut self, room: &Slices) -> Option<Header> {
        if let Some(refusal) = self.refusals.pop_front() {
            return Some(refusal);
        }
        while let Some(ports) = self.ready.pop_front() {
            let packet = self.with(ports, |connection| {
                connection.queued = false;
                connection.transmit(room)
            });
            if let Some(packet) = packet.flatten() {
                return Some(Header {
                    src_cid: HOST_CID,
                    dst_cid: self.guest_cid,
                    src_port: ports.host,
                    dst_port: ports.guest,
                    kind: STREAM,
                    ..packet
                });
            }
        }
        None
    }

    /// Answers a packet that belongs to no connection; a `RST` is never answered.
    fn refuse(&mut self, header: &Header) {
        if header.op != op::RST && self.can_receive() {
            self.refusals.push_back(header.refusal());
        }
    }

    /// Accepts a connection that the guest asks for. Returns whether that was possible.
    fn accept(&mut self, ports: Ports, request: &Header) -> bool {
        let buffer = self.buffer();
        let free =
            self.connections.len() < MAX_CONNECTIONS && ports.host != NO_PORT && !self.connections.contains_key(&ports);
        let (true, Some(listener)) = (free, self.listeners.get(&ports.host)) else { return false };
        let Ok((ours, theirs)) = UnixStream::pair() else { return false };
        listener(theirs);
        self.add(ports, Connection::accepted(Stream::new(ours.into()), buffer, request));
        true
    }

    fn add(&mut self, ports: Ports, connection: Connection) {
        let interest = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        let watched = connection
            .fd()
            .map(|fd| self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(interest, ports.token())));
        self.connections.insert(ports, connection);
        // Without epoll's eyes (the host has no memory for them) it must end; that is like an error.
        let events = if matches!(watched, Some(Ok(()))) { EventSet::empty() } else { EventSet::ERROR };
        self.with(ports, |connection| connection.stream_ready(events));
    }

    /// Does something to a connection, if it is there, and sees to what follows from it.
    fn with<T>(&mut self, ports: Ports, change: impl FnOnce(&mut Connection) -> T) -> Option<T> {
        let connection = self.connections.get_mut(&ports)?;
        let result = change(connection);
        if !connection.queued {
            if connection.is_over() {
                self.connections.remove(&ports);
                return Some(result);
            }
            if connection.wants_to_send() {
                connection.queued = true;
                self.ready.push_back(ports);
            }
        }
        if connection.deadline().is_some() {
            self.tick();
        }
        Some(result)
    }

    /// Lets the timer run.
    fn tick(&mut self) {
        if !self.ticking {
            self.ticking = self.timer.reset(TICK, Some(TICK)).is_ok();
        }
    }

    fn check_deadlines(&mut self) {
        let _ = self.timer.wait();
        let now = Instant::now();
        self.quiet_until = self.quiet_until.filter(|until| *until > now);
        let due = |connection: &Connection| connection.deadline().is_some_and(|deadline| deadline <= now);
        let expired: Vec<Ports> =
            self.connections.iter().filter(|(_, connection)| due(connection)).map(|(ports, _)| *ports).collect();
        for ports in expired {
            self.with(ports, |connection| connection.expire(now));
        }
        let needed = self.quiet_until.is_some() || self.connections.values().any(|c| c.deadline().is_some());
        if !needed {
            self.ticking = self.timer.clear().is_err();
        }
    }

    /// The receive buffer of the next connection.
    fn buffer(&self) -> u32 {
        if self.connections.len() < FEW_CONNECTIONS { LARGE_BUFFER } else { SMALL_BUFFER }
    }

    /// A port of the host that is not used with `guest`. There is one, as there are few connections.
    fn free_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_port;
            self.next_port = if host + 1 == NO_PORT { FIRST_PORT } else { host + 1 };
            if !self.connections.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
    }
}
