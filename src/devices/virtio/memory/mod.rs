//! The memory device, virtio-mem (virtio 1.2 section 5.15): RAM that a running guest gets and gives back.
//!
//! The device has a region of guest memory, cut into blocks. The host says how much of it the guest should
//! have plugged; which blocks, and when, the guest chooses:
//!
//! ```text
//! host                        device                             guest's driver
//! request_size(bytes) ──────> requested_size, interrupt ───────> looks
//!                             blocks, plugged_size <──────────── PLUG or UNPLUG some blocks, again and again
//! requested, plugged  <────── Changes
//! ```
//!
//! - All of the region is guest memory from the start, mapped without being reserved: to plug is to allow. A
//!   guest that uses blocks which it has not plugged can have the envelope's memory and no more; it takes it
//!   from itself, for what is not plugged may be discarded at any time.
//! - An unplugged block reads as zeros and takes no memory of the host, once its owner unplugged it. So
//!   `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE` is not needed, and Linux may read it when it dumps memory.
//! - The whole region is usable. It is made of blocks that Linux wants whole
//!   ([`layout::pluggable`](crate::mem::layout::pluggable)), and which it uses first is its own affair.
//! - A reset of the device leaves the blocks as they are (section 5.15.5): a driver that comes afterwards
//!   begins with UNPLUG ALL.

mod blocks;
#[cfg(test)]
mod tests;

use std::io;
use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_queue::{Error as RingError, Queue};
use vm_memory::GuestAddress;

use super::mmio::Mmio;
use super::ring::{Chain, work_off};
use super::{Error, VirtioDevice, read_bytes};
use crate::devices::{Changes, Throttle};
use crate::mem::GuestMemory;
use crate::spec::MEMORY_STEP;

pub use blocks::Blocks;

/// The size of a block, in bytes: what one huge page holds, so that a block that is given back leaves no
/// huge page torn.
pub const BLOCK: u64 = MEMORY_STEP.bytes();
/// The largest region, in bytes: what a [`MachineSpec`](crate::spec::MachineSpec) can ask for. It bounds the
/// saved state at 1 MiB.
const LARGEST_REGION: u64 = 1 << 44;

const REQUEST_LENGTH: usize = 24;
const RESPONSE_LENGTH: usize = 10;
// Section 5.15.6: requests, responses, and states.
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;
const ACK: u16 = 0;
const NACK: u16 = 1;
const BUSY: u16 = 2;
const ERROR: u16 = 3;
const STATE_PLUGGED: u16 = 0;
const STATE_UNPLUGGED: u16 = 1;
const STATE_MIXED: u16 = 2;

/// What the guest's memory can do for this device.
pub trait Backing: Send {
    /// Gives the host's memory behind a range of guest addresses back. Afterwards the range reads as zeros,
    /// *whatever it is mapped from*, and counts as changed since the last snapshot. It must lie within the
    /// region, and be aligned to [`BLOCK`] on both sides: it always does.
    fn discard(&self, start: GuestAddress, length: u64) -> io::Result<()>;
}

/// The configuration that can change, and the blocks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryState {
    /// Where the region begins, in the guest's physical memory.
    pub start: u64,
    /// How long it is, in bytes.
    pub region_size: u64,
    /// How much of it the guest should have plugged, in bytes.
    pub requested_size: u64,
    /// What it has plugged.
    pub blocks: Blocks,
}

impl MemoryState {
    /// A region at a cold boot: nothing is plugged, and nothing requested.
    pub fn booted(start: GuestAddress, length: u64) -> MemoryState {
        let blocks = Blocks::unplugged((length.min(LARGEST_REGION) / BLOCK) as usize);
        MemoryState { start: start.0, region_size: length, requested_size: 0, blocks }
    }

    fn check(&self, region: (GuestAddress, u64)) -> Result<(), &'static str> {
        let (start, length) = (self.start, self.region_size);
        let whole = |number: u64| number.is_multiple_of(BLOCK);
        let rules = [
            ((GuestAddress(start), length) == region, "the region is not where this machine has it"),
            (whole(start) && whole(length), "the region does not consist of whole blocks"),
            (length <= LARGEST_REGION && start.checked_add(length).is_some(), "the region is too large"),
            (whole(self.requested_size) && self.requested_size <= length, "the requested size cannot be had"),
        ];
        match rules.iter().find(|(kept, _)| !kept) {
            Some((_, what)) => Err(what),
            None if !self.blocks.fits(self.count()) => Err("the bitmap is not that of the region"),
            None => Ok(()),
        }
    }

    fn count(&self) -> usize {
        (self.region_size / BLOCK) as usize
    }
}

/// A size that the guest cannot be asked to reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{asked} bytes cannot be plugged: choose a multiple of {BLOCK}, up to {most}")]
pub struct RequestError {
    /// What was asked for.
    pub asked: u64,
    /// The most that there can be.
    pub most: u64,
}

/// The device.
pub struct Memory {
    state: MemoryState,
    backing: Box<dyn Backing>,
    changes: Arc<Changes>,
    unfinished: bool,
    complaints: Throttle,
}

/// A request, decoded.
#[derive(Clone, Copy, Debug)]
struct Request {
    kind: u16,
    start: u64,
    blocks: u16,
}

impl Memory {
    /// The device of the region at `region` (its address and length, as the machine's memory is laid out).
    /// `changes` is told whenever the guest plugged or unplugged.
    pub fn new(
        state: MemoryState,
        region: (GuestAddress, u64),
        backing: Box<dyn Backing>,
        changes: Arc<Changes>,
    ) -> Result<Memory, Error> {
        state.check(region).map_err(Error::Memory)?;
        Ok(Memory { state, backing, changes, unfinished: false, complaints: Throttle::default() })
    }

    /// How much the guest should have plugged, in bytes.
    pub fn requested(&self) -> u64 {
        self.state.requested_size
    }

    /// How much it has plugged, in bytes.
    pub fn plugged(&self) -> u64 {
        self.state.blocks.plugged() as u64 * BLOCK
    }

    /// How much of the region lies before the end of the last block that is plugged, in bytes.
    pub fn reach(&self) -> u64 {
        self.state.blocks.reach() as u64 * BLOCK
    }

    fn answer(&mut self, chain: &Chain<'_>) -> Result<u32, RingError> {
        let mut request = [0; REQUEST_LENGTH];
        if chain.readable.read(&mut request) < REQUEST_LENGTH || chain.writable.len() < RESPONSE_LENGTH {
            return Err(RingError::InvalidChain);
        }
        let (response, state) = self.serve(Request::decode(&request));
        let mut answer = [0; RESPONSE_LENGTH];
        answer[..2].copy_from_slice(&response.to_le_bytes());
        answer[8..].copy_from_slice(&state.to_le_bytes());
        Ok(chain.writable.write(&answer) as u32)
    }

    /// The response, and for STATE requests the state.
    fn serve(&mut self, request: Request) -> (u16, u16) {
        if request.kind == UNPLUG_ALL {
            return (self.unplug_all(), 0);
        }
        let Some(range) = self.range(request) else { return (ERROR, 0) };
        let plugged = self.state.blocks.plugged_in(range.clone());
        match request.kind {
            PLUG if plugged > 0 => (ERROR, 0),
            PLUG if self.plugged() + range.len() as u64 * BLOCK > self.state.requested_size => (NACK, 0),
            PLUG => {
                self.state.blocks.set(range, true);
                self.changes.note();
                (ACK, 0)
            }
            UNPLUG if plugged < range.len() => (ERROR, 0),
            UNPLUG => (self.unplug(range), 0),
            STATE if plugged == 0 => (ACK, STATE_UNPLUGGED),
            STATE if plugged == range.len() => (ACK, STATE_PLUGGED),
            STATE => (ACK, STATE_MIXED),
            _ => (ERROR, 0),
        }
    }

    /// The blocks that a request names, if all of them lie in the region.
    fn range(&self, request: Request) -> Option<Range<usize>> {
        let offset = request.start.checked_sub(self.state.start)?;
        let first = usize::try_from(offset / BLOCK).ok()?;
        let end = first.checked_add(request.blocks.into())?;
        let sound = offset.is_multiple_of(BLOCK) && request.blocks > 0 && end <= self.state.count();
        sound.then_some(first..end)
    }

    fn unplug_all(&mut self) -> u16 {
        // In one piece, as what lies between plugged blocks may be discarded just as well: so a guest cannot
        // make this a million small pieces.
        if self.plugged() == 0 { ACK } else { self.unplug(0..self.state.count()) }
    }

    /// Unplugs a range. If the host cannot take it back it stays plugged, and the driver tries again later.
    fn unplug(&mut self, range: Range<usize>) -> u16 {
        let start = GuestAddress(self.state.start + range.start as u64 * BLOCK);
        if let Err(error) = self.backing.discard(start, range.len() as u64 * BLOCK) {
            if let Some(withheld) = self.complaints.pass() {
                tracing::warn!(withheld, "the guest's memory at {:#x} cannot be given back: {error}", start.0);
            }
            return BUSY;
        }
        self.state.blocks.set(range, false);
        self.changes.note();
        ACK
    }

    /// `struct virtio_mem_config` (section 5.15.4).
    fn config(&self) -> [u8; 56] {
        let state = &self.state;
        let usable = state.region_size;
        let node = 0; // means nothing without VIRTIO_MEM_F_ACPI_PXM
        let fields = [BLOCK, node, state.start, state.region_size, usable, self.plugged(), state.requested_size]
            .map(u64::to_le_bytes);
        let mut config = [0; 56];
        config.as_chunks_mut().0.copy_from_slice(&fields);
        config
    }
}

impl Request {
    fn decode(bytes: &[u8; REQUEST_LENGTH]) -> Request {
        let [k0, k1, _, _, _, _, _, _, start @ .., n0, n1, _, _, _, _, _, _] = *bytes;
        Request {
            kind: u16::from_le_bytes([k0, k1]),
            start: u64::from_le_bytes(start),
            blocks: u16::from_le_bytes([n0, n1]),
        }
    }
}

impl Mmio<Memory> {
    /// Asks the guest to have `bytes` plugged, no more and no less, and interrupts it. It answers in its own
    /// time, or never: see [`Memory::plugged`].
    pub fn request_size(&mut self, bytes: u64) -> Result<(), RequestError> {
        let state = &mut self.device_mut().state;
        if !bytes.is_multiple_of(BLOCK) || bytes > state.region_size {
            return Err(RequestError { asked: bytes, most: state.region_size });
        }
        state.requested_size = bytes;
        self.config_changed();
        Ok(())
    }
}

impl VirtioDevice for Memory {
    type State = MemoryState;

    const KIND: u32 = 24;

    fn queue_sizes(&self) -> &'static [u16] {
        &[64]
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.config(), offset, data);
    }

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self) {
        self.unfinished = false;
    }

    fn queue_ready(&mut self, queue: usize, queues: &mut [Queue], mem: &GuestMemory) -> Result<bool, RingError> {
        self.unfinished = false;
        let Some(queue) = queues.get_mut(queue) else { return Ok(false) };
        let turn = work_off(queue, mem, |chain| self.answer(&chain))?;
        self.unfinished = turn.unfinished;
        Ok(turn.interrupt)
    }

    fn unfinished(&self) -> bool {
        self.unfinished
    }

    fn state(&self) -> MemoryState {
        self.state.clone()
    }
}
