//! The socket device (virtio 1.2 section 5.10): connections between host and guest without a network.
//!
//! The device lives in the monitor: each connection is joined to a stream socket of this process, and bytes
//! go between that socket and guest memory without a copy in between (except what a slow reader leaves).
//!
//! | file | holds |
//! |---|---|
//! | `mod.rs` | the chip: its state, its three queues |
//! | `switchboard.rs` | all connections: who gets which packet, whose turn it is |
//! | `connection.rs` | one connection, from its request to its end |
//! | `credit.rs` | how much may be sent |
//! | `stream.rs` | the host's socket |
//! | `packet.rs` | the header of a packet |
//! | `handle.rs` | what other threads ask of the device |
//!
//! Connections are not saved. A guest that wakes from a snapshot is told with a transport reset (section
//! 5.10.6.7) that all of them are gone.

mod connection;
mod credit;
mod handle;
mod packet;
mod stream;
mod switchboard;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use virtio_queue::{Error as QueueError, Queue, QueueOwnedT, QueueT};

use crate::mem::GuestMemory;

pub use self::handle::{Handle, Listener};
use self::packet::Header;
use self::switchboard::Switchboard;
use super::ring::{Slices, needs_interrupt, next_chain};
use super::{VirtioDevice, read_bytes};

/// The guest's address unless another is wanted: the first that is free for guests.
pub const GUEST_CID: u64 = 3;

/// The queues' order and sizes.
const QUEUE_SIZES: [u16; 3] = [256, 256, 256];
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`, as it lies in an event buffer.
const TRANSPORT_RESET: [u8; 4] = 0u32.to_le_bytes();
/// How long a woken guest may take to handle the transport reset before it is spoken to all the same.
const RESET_TIME: Duration = Duration::from_secs(1);
/// How long one turn at a queue may last, as the worker holds the device's lock meanwhile.
const TURN: Duration = Duration::from_millis(1);

/// The device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address is not one that a guest can have (virtio 1.2 section 5.10.4).
    #[error("the vsock address {0} cannot be a guest's: 3 to 4294967294 can")]
    Cid(u64),
    /// The host has no descriptors left.
    #[error("vsock: the host's operating system refuses")]
    Host(#[from] io::Error),
}

/// What is saved of the device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockState {
    /// The guest's address.
    pub cid: u64,
    /// The guest must be told that its connections are gone.
    pub reset_pending: bool,
}

impl Default for VsockState {
    fn default() -> VsockState {
        VsockState { cid: GUEST_CID, reset_pending: false }
    }
}

/// The chip.
pub struct Vsock {
    state: VsockState,
    /// Whether the driver is there.
    active: bool,
    /// After a transport reset was sent: how many event buffers the driver had offered then. As soon as
    /// there are more, it has handled the reset.
    reset_sent_at: Option<u16>,
    /// The last turn was over before the work was.
    unfinished: bool,
    board: Switchboard,
}

impl Vsock {
    /// A device with this state and no connections.
    pub fn new(state: VsockState) -> Result<Vsock, Error> {
        if !(GUEST_CID..u64::from(u32::MAX)).contains(&state.cid) {
            return Err(Error::Cid(state.cid));
        }
        Ok(Vsock { board: Switchboard::new(state.cid)?, state, active: false, reset_sent_at: None, unfinished: false })
    }

    /// How other threads reach the guest through this device.
    pub fn handle(&self) -> Handle {
        self.board.handle()
    }

    /// Works off what is there, for one turn. Returns whether the guest must be interrupted.
    fn serve(&mut self, queues: &mut [Queue], mem: &GuestMemory) -> Result<bool, QueueError> {
        self.unfinished = false;
        self.board.obey();
        let [rx, tx, event] = queues else { return Ok(false) };
        if !self.active {
            return Ok(false);
        }
        let result = self.serve_queues(rx, tx, event, mem);
        if result.is_err() {
            // The driver cannot go on before it has reset the device, so nobody may wait for it.
            self.leave();
        }
        result
    }

    fn serve_queues(
        &mut self,
        rx: &mut Queue,
        tx: &mut Queue,
        event: &mut Queue,
        mem: &GuestMemory,
    ) -> Result<bool, QueueError> {
        let mut interrupt = false;
        if event.ready() {
            interrupt |= self.announce_reset(event, mem)?;
        }
        if tx.ready() {
            interrupt |= self.hear(tx, mem)?;
        }
        let was_deaf = !self.board.can_receive();
        if rx.ready() {
            interrupt |= self.speak(rx, mem)?;
        }
        // What it did not want to hear for too many refusals it can hear now, in another turn.
        self.unfinished |= was_deaf && self.board.can_receive();
        Ok(interrupt)
    }

    /// Tells a woken guest that its connections are gone, and keeps quiet until it has heard it: Linux
    /// handles events and packets in no certain order, and on this event resets whatever is connected.
    fn announce_reset(&mut self, event: &mut Queue, mem: &GuestMemory) -> Result<bool, QueueError> {
        if let Some(offered) = self.reset_sent_at
            && event.avail_idx(mem, Ordering::Acquire)?.0 != offered
        {
            self.reset_sent_at = None;
            self.board.speak();
        }
        if !self.state.reset_pending {
            return Ok(false);
        }
        let Some(chain) = next_chain(event, mem)? else {
            // If one came just now, its doorbell was not asked for.
            self.unfinished |= event.enable_notification(mem)?;
            return Ok(false);
        };
        let written = chain.writable.write(&TRANSPORT_RESET);
        event.add_used(mem, chain.head, written as u32)?;
        if written == TRANSPORT_RESET.len() {
            self.state.reset_pending = false;
            self.board.keep_quiet(RESET_TIME);
            self.reset_sent_at = Some(watch_next_offer(event, mem)?);
        }
        needs_interrupt(event, mem)
    }

    /// Takes packets from the guest.
    fn hear(&mut self, tx: &mut Queue, mem: &GuestMemory) -> Result<bool, QueueError> {
        let began = Instant::now();
        let mut used = false;
        // Section 5.10.6.1 foresees that the guest is not heard before it has taken something itself.
        while self.board.can_receive() {
            if began.elapsed() >= TURN {
                self.unfinished = true;
                break;
            }
            let Some(chain) = next_chain(tx, mem)? else {
                if tx.enable_notification(mem)? {
                    continue;
                }
                break;
            };
            if let Some((header, payload)) = parse(chain.readable) {
                self.board.receive(&header, &payload);
            }
            tx.add_used(mem, chain.head, 0)?;
            used = true;
        }
        Ok(used && needs_interrupt(tx, mem)?)
    }

    /// Gives packets to the guest.
    fn speak(&mut self, rx: &mut Queue, mem: &GuestMemory) -> Result<bool, QueueError> {
        let began = Instant::now();
        let mut used = false;
        while self.board.wants_to_send() {
            if began.elapsed() >= TURN {
                self.unfinished = true;
                break;
            }
            let Some(chain) = next_chain(rx, mem)? else {
                if rx.enable_notification(mem)? {
                    continue;
                }
                break;
            };
            // A buffer that cannot hold a header and a byte goes back empty.
            let length = if chain.writable.len() <= Header::SIZE {
                0
            } else if let Some(length) = self.board.transmit(chain.writable) {
                length
            } else {
                rx.go_to_previous_position();
                break;
            };
            rx.add_used(mem, chain.head, length)?;
            used = true;
        }
        Ok(used && needs_interrupt(rx, mem)?)
    }

    /// The driver went away.
    fn leave(&mut self) {
        self.active = false;
        self.unfinished = false;
        self.reset_sent_at = None;
        self.board.go_offline();
    }
}

/// Asks for the doorbell when the driver offers one buffer more than now, and returns the count of now. The
/// usual call asks for the first buffer that was not taken, which has long been offered.
fn watch_next_offer(queue: &mut Queue, mem: &GuestMemory) -> Result<u16, QueueError> {
    let offered = queue.avail_idx(mem, Ordering::Acquire)?.0;
    let taken = queue.next_avail();
    queue.set_next_avail(offered);
    let asked = queue.enable_notification(mem);
    queue.set_next_avail(taken);
    asked.map(|_| offered)
}

/// Reads a packet's header, once, and cuts the payload to the length that it tells. A packet that is shorter
/// than that is none.
fn parse(packet: Slices<'_>) -> Option<(Header, Slices<'_>)> {
    let (front, rest) = packet.split_at(Header::SIZE)?;
    let mut bytes = [0; Header::SIZE];
    front.read(&mut bytes);
    let header = Header::from_bytes(&bytes);
    let (payload, _) = rest.split_at(header.len as usize)?;
    Some((header, payload))
}

impl VirtioDevice for Vsock {
    type State = VsockState;

    const KIND: u32 = 19;

    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0 // Stream sockets need none.
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.state.cid.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, _features: u64) {
        self.active = true;
        self.board.go_online();
    }

    fn reset(&mut self) {
        // A new driver knows of no connections, so there is nothing to tell it.
        self.state.reset_pending = false;
        self.leave();
    }

    fn queue_ready(&mut self, _queue: usize, queues: &mut [Queue], mem: &GuestMemory) -> Result<bool, QueueError> {
        self.serve(queues, mem)
    }

    fn host_fd(&self) -> Option<RawFd> {
        Some(self.board.fd())
    }

    fn host_ready(&mut self, queues: &mut [Queue], mem: &GuestMemory) -> Result<bool, QueueError> {
        self.board.poll();
        self.serve(queues, mem)
    }

    fn unfinished(&self) -> bool {
        self.unfinished
    }

    /// The device that wakes from this state has no connections, so a guest whose driver is there must be
    /// told; this device goes on as it is.
    fn state(&self) -> VsockState {
        VsockState { reset_pending: self.active || self.state.reset_pending, ..self.state }
    }
}
