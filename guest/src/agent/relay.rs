//! Two joined connections, the monitor's and one to a port of this guest, and the bytes between them.
//!
//! Each direction is its own stream with its own end, so half-closed connections work. Bytes that the reader
//! does not take are kept aside and nothing more is read for it until they are gone. What all relays keep
//! aside together is bounded by [`Budget`].

use std::io::{self, Read, Write};

use nix::sys::epoll::EpollFlags;

use crate::socket::Socket;

/// The bytes that all relays together hold for slow readers.
#[derive(Default)]
pub(super) struct Budget {
    held: usize,
}

impl Budget {
    /// What may be held before reads become small.
    const TOTAL: usize = 8 << 20;

    /// How much may be read at once. The share shrinks with what is left; at its smallest, thousands of
    /// directions that all hold one read stay below another [`Budget::TOTAL`].
    fn share(&self) -> usize {
        (Self::TOTAL.saturating_sub(self.held) / 16).clamp(512, 64 << 10)
    }
}

/// What a relay wants after its turn.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// To be called when a socket changes.
    Waiting,
    /// Another turn: there is work left.
    Unfinished,
    /// To be closed: both directions have ended.
    Done,
    /// To be reset: a side failed.
    Broken,
}

/// One of the two sockets and what epoll has last said of it.
struct Side {
    socket: Socket,
    readable: bool,
    writable: bool,
    failed: bool,
}

impl Side {
    fn new(socket: Socket) -> Side {
        Side { socket, readable: false, writable: false, failed: false }
    }
}

/// What one direction has read and not yet written.
#[derive(Default)]
struct Stream {
    held: Vec<u8>,
    written: usize,
    /// The reader has seen the end.
    ended: bool,
    /// The end has been passed on.
    closed: bool,
}

/// A pair of joined connections.
pub(super) struct Relay {
    outer: Side,
    inner: Side,
    inward: Stream,
    outward: Stream,
    connected: bool,
    /// It is in the queue of those that want another turn.
    pub(super) queued: bool,
}

impl Relay {
    /// Bytes that one direction moves in one turn.
    const TURN: usize = 256 << 10;

    /// Joins `outer` to `inner`, which is still connecting; `rest` came from outside already.
    pub(super) fn new(outer: Socket, inner: Socket, rest: Vec<u8>, budget: &mut Budget) -> Relay {
        budget.held += rest.len();
        let inward = Stream { held: rest, ..Stream::default() };
        // The outer socket was read until it had no more, or its rest would be longer: ask again to be sure.
        let outer = Side { readable: true, writable: true, ..Side::new(outer) };
        Relay { outer, inner: Side::new(inner), inward, outward: Stream::default(), connected: false, queued: false }
    }

    /// Remembers what epoll said of one side.
    pub(super) fn notice(&mut self, inner: bool, flags: EpollFlags) {
        let side = if inner { &mut self.inner } else { &mut self.outer };
        let broken = EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP;
        side.failed |= flags.contains(EpollFlags::EPOLLERR);
        side.readable |= flags.intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | broken);
        side.writable |= flags.intersects(EpollFlags::EPOLLOUT | broken);
    }

    /// Moves bytes in both directions, as far as the sockets allow and for a bounded time.
    pub(super) fn turn(&mut self, budget: &mut Budget) -> Turn {
        if self.outer.failed || self.inner.failed {
            return Turn::Broken;
        }
        if !self.connected {
            if !self.inner.writable {
                return Turn::Waiting;
            }
            if self.inner.socket.error().is_err() {
                return Turn::Broken;
            }
            self.inner.socket.set_nodelay();
            self.connected = true;
        }
        let inward = self.inward.carry(&mut self.outer, &mut self.inner, budget);
        let outward = self.outward.carry(&mut self.inner, &mut self.outer, budget);
        match (inward, outward) {
            (Err(_), _) | (_, Err(_)) => Turn::Broken,
            _ if self.inward.closed && self.outward.closed => Turn::Done,
            (Ok(false), Ok(false)) => Turn::Waiting,
            _ => Turn::Unfinished,
        }
    }

    /// Closes both sockets, with a reset when the relay broke, and gives back what it held.
    pub(super) fn close(self, broken: bool, budget: &mut Budget) {
        budget.held -= self.inward.held.len() + self.outward.held.len();
        if broken {
            self.outer.socket.reset();
            self.inner.socket.reset();
        }
    }
}

impl Stream {
    /// Moves bytes; true when the turn ended before the work did.
    fn carry(&mut self, from: &mut Side, to: &mut Side, budget: &mut Budget) -> io::Result<bool> {
        let mut moved = 0;
        while moved < Relay::TURN {
            if !self.held.is_empty() {
                if !to.writable {
                    return Ok(false);
                }
                match ready((&to.socket).write(&self.held[self.written..]), &mut to.writable)? {
                    Some(n) => self.wrote(n, budget),
                    None => return Ok(false),
                }
            } else if self.ended {
                if !self.closed {
                    to.socket.shutdown_write()?;
                    self.closed = true;
                }
                return Ok(false);
            } else if from.readable {
                moved += self.pass(from, to, budget)?;
            } else {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn wrote(&mut self, n: usize, budget: &mut Budget) {
        self.written += n;
        if self.written == self.held.len() {
            budget.held -= self.held.len();
            // An idle relay holds no memory.
            *self = Stream { ended: self.ended, closed: self.closed, ..Stream::default() };
        }
    }

    /// Reads once and writes it on; what is not taken is held. Most bytes never touch the heap.
    fn pass(&mut self, from: &mut Side, to: &mut Side, budget: &mut Budget) -> io::Result<usize> {
        let mut chunk = [0; 64 << 10];
        let Some(n) = ready((&from.socket).read(&mut chunk[..budget.share()]), &mut from.readable)? else {
            return Ok(0);
        };
        if n == 0 {
            self.ended = true;
            return Ok(0);
        }
        let taken = match to.writable {
            true => ready((&to.socket).write(&chunk[..n]), &mut to.writable)?.unwrap_or(0),
            false => 0,
        };
        if taken < n {
            self.held = chunk[taken..n].to_vec();
            budget.held += self.held.len();
        }
        Ok(n)
    }
}

/// Turns "would block" into `None`, and remembers it. (A call that never waits is never interrupted.)
fn ready(result: io::Result<usize>, flag: &mut bool) -> io::Result<Option<usize>> {
    match result {
        Ok(n) => Ok(Some(n)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            *flag = false;
            Ok(None)
        }
        Err(error) => Err(error),
    }
}
