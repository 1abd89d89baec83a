//! One connection: a vsock stream of the guest joined to a stream socket of the host.
//!
//! ```text
//!   requested() ──► Requested ──RESPONSE──► Open ──settle(): host's end is over──► Closing ─┐
//!                      │         accepted() ──┘ │ │                                         │ RST
//!         RST, too late│                        │ └──RST, bytes left for the host──► Draining│
//!                      ▼                        ▼                                     │     │
//!                    (reset(): tells the guest) Resetting ──RST went out──► Over ◄────┴─────┘
//! ```
//!
//! - `Requested`: the guest was asked, or is about to be, and has not answered.
//! - `Open`: bytes flow, each way until that way is ended.
//! - `Closing`: the host's stream is closed, the guest was told `SHUTDOWN` both ways and owes a `RST`.
//! - `Draining`: the guest is done with the connection (so its ports are unknown to it); what it sent before
//!   is still on its way to a slow reader.
//! - `Resetting`: the stream is gone and a `RST` for the guest waits for room.
//! - `Over`: to be forgotten.
//!
//! Invariants: bytes wait in `backlog` only, never more than the `buf_alloc` that the guest was told. What
//! we have to say to the guest is a set of flags in `pending`, never a queue. `readable` and `writable` are
//! true until the socket said otherwise, because epoll reports edges only.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::EventSet;

use super::credit::Credit;
use super::packet::{Header, op, shutdown};
use super::stream::{self, Stream};
use crate::devices::virtio::ring::Slices;

/// How long the guest may take to answer a request. One whose kernel gives memory back, on an emulated host, was seen
/// to be silent for seconds; whoever has less patience hangs up.
pub(super) const CONNECT_TIME: Duration = Duration::from_secs(15);
/// How long the guest may take to answer a `SHUTDOWN` of both ways; as long as Linux waits.
const CLOSE_TIME: Duration = Duration::from_secs(8);
/// The longest payload of one packet to the guest, which is also Linux's own limit.
const MAX_PAYLOAD: usize = 64 * 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Requested,
    Open,
    Closing,
    Draining,
    Resetting,
    Over,
}

/// The control packets that wait to be sent: one bit for each kind, at the place of its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pending(u16);

impl Pending {
    fn only(op: u16) -> Pending {
        Pending(1 << op)
    }

    fn add(&mut self, op: u16) {
        self.0 |= 1 << op;
    }

    fn has(self, op: u16) -> bool {
        self.0 & (1 << op) != 0
    }

    /// Takes the one with the lowest number, which is the order in which they make sense.
    fn take(&mut self) -> Option<u16> {
        let op = self.0.trailing_zeros();
        self.0 &= self.0.wrapping_sub(1);
        (op < u16::BITS).then_some(op as u16)
    }
}

/// One connection, see the head of this file.
pub struct Connection {
    phase: Phase,
    /// Whether it waits for its turn to send (kept by the switchboard).
    pub queued: bool,
    stream: Option<Stream>,
    /// Goes to the guest before the stream's own bytes.
    preamble: Vec<u8>,
    /// From the guest, not yet taken by the stream.
    backlog: VecDeque<u8>,
    credit: Credit,
    pending: Pending,
    /// Which ways are ended, as the flags of a `SHUTDOWN` that the guest sent, and that we send.
    guest_ended: u32,
    host_ended: u32,
    readable: bool,
    writable: bool,
    /// The stream's peer is gone: what it sent can still be read, nothing can be written.
    hung_up: bool,
    /// The stream was told that the guest sends no more.
    told_end: bool,
    deadline: Option<Instant>,
}

impl Connection {
    /// The host asks the guest.
    pub fn requested(stream: Stream, preamble: Vec<u8>, buf_alloc: u32) -> Connection {
        let deadline = Some(Instant::now() + CONNECT_TIME);
        let pending = Pending::only(op::REQUEST);
        Connection { phase: Phase::Requested, preamble, pending, deadline, ..Connection::open(stream, buf_alloc) }
    }

    /// The guest asked with `request`, and the host accepts.
    pub fn accepted(stream: Stream, buf_alloc: u32, request: &Header) -> Connection {
        let mut connection = Connection::open(stream, buf_alloc);
        connection.credit.hear(request.buf_alloc, request.fwd_cnt);
        connection
    }

    fn open(stream: Stream, buf_alloc: u32) -> Connection {
        Connection {
            phase: Phase::Open,
            queued: false,
            stream: Some(stream),
            preamble: Vec::new(),
            backlog: VecDeque::new(),
            credit: Credit::new(buf_alloc),
            pending: Pending::only(op::RESPONSE),
            guest_ended: 0,
            host_ended: 0,
            readable: true,
            writable: true,
            hung_up: false,
            told_end: false,
            deadline: None,
        }
    }

    /// The stream's descriptor, for epoll.
    pub fn fd(&self) -> Option<RawFd> {
        self.stream.as_ref().map(Stream::as_raw_fd)
    }

    /// Whether it can be forgotten.
    pub fn is_over(&self) -> bool {
        self.phase == Phase::Over
    }

    /// Whether the guest has this connection, as far as we know.
    pub fn is_known_to_guest(&self) -> bool {
        !matches!(self.phase, Phase::Over | Phase::Draining)
    }

    /// When [`Connection::expire`] must be called, if ever.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Whether there may be something to send to the guest.
    pub fn wants_to_send(&self) -> bool {
        self.pending.0 != 0
            || (self.phase == Phase::Open
                && !self.reading_is_over()
                && (self.readable || !self.preamble.is_empty())
                && self.credit.available() > 0)
    }

    /// A packet of the guest for this connection. `payload` is as long as the header says.
    pub fn receive(&mut self, header: &Header, payload: &Slices) {
        self.credit.hear(header.buf_alloc, header.fwd_cnt);
        match (self.phase, header.op) {
            (_, op::RST) => self.guest_reset(),
            (Phase::Requested, op::RESPONSE) => {
                self.phase = Phase::Open;
                self.deadline = None;
            }
            (Phase::Open, op::RW) => self.take(payload),
            (Phase::Open, op::SHUTDOWN) => self.guest_shutdown(header.flags),
            (Phase::Open, op::CREDIT_UPDATE) => {}
            (Phase::Open | Phase::Closing, op::CREDIT_REQUEST) => self.pending.add(op::CREDIT_UPDATE),
            // Both ends closed at the same time, and the guest waits for an answer just like we do.
            (Phase::Closing, op::SHUTDOWN) if header.flags & shutdown::BOTH == shutdown::BOTH => self.reset(),
            // It was under way when we closed.
            (Phase::Closing, op::RW | op::SHUTDOWN | op::CREDIT_UPDATE) => {}
            (Phase::Draining | Phase::Resetting | Phase::Over, _) => {}
            _ => self.reset(),
        }
        self.settle();
    }

    /// What epoll saw of the stream.
    pub fn stream_ready(&mut self, events: EventSet) {
        if events.contains(EventSet::ERROR) {
            return self.reset();
        }
        self.hung_up |= events.contains(EventSet::HANG_UP);
        self.readable |= events.intersects(EventSet::IN | EventSet::READ_HANG_UP | EventSet::HANG_UP);
        if events.contains(EventSet::OUT) {
            self.writable = true;
            self.flush();
        }
        self.settle();
    }

    /// Gives up when the guest's time is over.
    pub fn expire(&mut self, now: Instant) {
        if self.deadline.is_some_and(|deadline| deadline <= now) {
            self.reset();
        }
    }

    /// The next packet to the guest, if there is one, with its payload written to `room`. Of the header, the
    /// addresses are left to the caller.
    pub fn transmit(&mut self, room: &Slices) -> Option<Header> {
        let mut len = 0;
        if self.pending.0 == 0 && self.wants_to_send() {
            len = self.fill(room);
            self.settle();
        }
        let op = if len > 0 { op::RW } else { self.pending.take()? };
        if op == op::RST {
            self.phase = Phase::Over;
        }
        let flags = if op == op::SHUTDOWN { self.host_ended } else { 0 };
        let (buf_alloc, fwd_cnt) = self.credit.announce();
        Some(Header { len: len as u32, op, flags, buf_alloc, fwd_cnt, ..Header::default() })
    }

    /// Puts bytes for the guest into `room`.
    fn fill(&mut self, room: &Slices) -> usize {
        let limit = self.credit.available().min(room.len()).min(MAX_PAYLOAD);
        let count = if self.preamble.is_empty() {
            self.read(room, limit)
        } else {
            let first = self.preamble.len().min(limit);
            room.write(&self.preamble[..first]);
            self.preamble.drain(..first);
            first
        };
        self.credit.spend(count);
        if count > 0 && self.credit.available() == 0 {
            self.pending.add(op::CREDIT_REQUEST);
        }
        count
    }

    fn read(&mut self, room: &Slices, limit: usize) -> usize {
        let Some(stream) = &self.stream else { return 0 };
        match stream.recv(room, limit) {
            Ok(0) => {
                self.host_ended |= shutdown::SEND;
                self.pending.add(op::SHUTDOWN);
                0
            }
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                0
            }
            Err(_) => {
                self.reset();
                0
            }
        }
    }

    /// Bytes from the guest: straight to the stream if they fit, and the rest into the backlog.
    fn take(&mut self, payload: &Slices) {
        let in_breach = self.guest_ended & shutdown::SEND != 0;
        if in_breach || !self.credit.allows(self.backlog.len(), payload.len()) {
            return self.reset();
        }
        let mut sent = 0;
        if self.backlog.is_empty() && self.writable {
            sent = self.write(|stream, _| stream.send_from(payload));
        }
        if self.phase != Phase::Open || self.host_ended & shutdown::RCV != 0 {
            // Nobody reads any more: the guest was told or will be, and gets its credit back.
            return self.credit.forward(payload.len() - sent);
        }
        if sent < payload.len() {
            stream::append(payload, sent, &mut self.backlog);
            // Until the socket is asked once more and refuses, it reports no edge when it has room.
            self.flush();
        }
    }

    /// Writes the backlog to the stream, as far as it goes.
    fn flush(&mut self) {
        while self.writable && !self.backlog.is_empty() {
            let count = self.write(|stream, backlog| stream.send(backlog.as_slices().0));
            self.backlog.drain(..count.min(self.backlog.len()));
        }
        if self.backlog.is_empty() {
            self.backlog = VecDeque::new();
        }
    }

    fn write(&mut self, send: impl FnOnce(&Stream, &VecDeque<u8>) -> io::Result<usize>) -> usize {
        let Some(stream) = &self.stream else {
            self.writable = false;
            return 0;
        };
        match send(stream, &self.backlog) {
            Ok(count) => {
                self.credit.forward(count);
                return count;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable = false,
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                self.writable = false;
                self.credit.forward(self.backlog.len());
                self.backlog.clear();
                self.host_ended |= shutdown::RCV;
                self.pending.add(op::SHUTDOWN);
            }
            Err(_) => self.reset(),
        }
        0
    }

    fn guest_shutdown(&mut self, flags: u32) {
        self.guest_ended |= flags & shutdown::BOTH;
        if self.guest_ended & shutdown::RCV != 0 {
            self.preamble = Vec::new();
            if let Some(stream) = &self.stream {
                stream.shutdown(Shutdown::Read);
            }
        }
    }

    /// The guest dropped the connection. After a `SHUTDOWN` of both ways that only means that it got tired
    /// of waiting for a slow reader, who shall have everything all the same.
    fn guest_reset(&mut self) {
        self.pending = Pending(0);
        self.deadline = None;
        if self.phase == Phase::Open && self.guest_ended == shutdown::BOTH && !self.backlog.is_empty() {
            self.phase = Phase::Draining;
        } else {
            self.phase = Phase::Over;
            self.stream = None;
        }
    }

    /// Breaks the connection off; both sides see a reset.
    fn reset(&mut self) {
        // A guest that was never asked must not hear of it.
        let unheard = self.phase == Phase::Requested && self.pending.has(op::REQUEST);
        let silent = unheard || !self.is_known_to_guest();
        self.end(if silent { Phase::Over } else { Phase::Resetting });
    }

    /// Leaves the stream, in whatever way it is, and says the last word to the guest.
    fn end(&mut self, phase: Phase) {
        self.phase = phase;
        self.pending = match phase {
            Phase::Resetting => Pending::only(op::RST),
            Phase::Closing => Pending::only(op::SHUTDOWN),
            _ => Pending(0),
        };
        self.deadline = (phase == Phase::Closing).then(|| Instant::now() + CLOSE_TIME);
        self.stream = None;
        self.preamble = Vec::new();
        self.backlog = VecDeque::new();
    }

    fn reading_is_over(&self) -> bool {
        self.host_ended & shutdown::SEND != 0 || self.guest_ended & shutdown::RCV != 0
    }

    /// Draws the conclusions from what has changed; calling it twice is like calling it once.
    fn settle(&mut self) {
        let flushed = self.guest_ended & shutdown::SEND != 0 && self.backlog.is_empty();
        match self.phase {
            Phase::Open => {
                if flushed && !self.told_end {
                    self.told_end = true;
                    if let Some(stream) = &self.stream {
                        stream.shutdown(Shutdown::Write);
                    }
                }
                let writing_is_over = flushed || self.hung_up || self.host_ended & shutdown::RCV != 0;
                if self.reading_is_over() && writing_is_over {
                    self.finish();
                } else if self.credit.is_stale() {
                    self.pending.add(op::CREDIT_UPDATE);
                }
            }
            Phase::Draining if flushed => self.finish(),
            _ => {}
        }
    }

    /// Both ways came to their end: closes the stream in good order, and tells the guest if it must be told.
    fn finish(&mut self) {
        if let Some(stream) = self.stream.take() {
            stream.finish();
        }
        if self.phase == Phase::Draining {
            return self.end(Phase::Over);
        }
        if self.guest_ended == shutdown::BOTH {
            // The guest closed; a `RST` is how it learns that all has arrived.
            return self.end(Phase::Resetting);
        }
        self.host_ended = shutdown::BOTH;
        self.end(Phase::Closing);
    }
}
