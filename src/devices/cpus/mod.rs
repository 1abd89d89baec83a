//! vCPUs that come and go: a register block of our own, and the ACPI methods that are its only driver.
//!
//! ```text
//! port  +0  selected    the vCPU that `status` and `outcome` are about
//!       +1  status      read: bit 0 it is there, bit 1 it shall be used, bit 2 it shall be given back
//!                       write: bit 1 or 2 acknowledges that, bit 3 gives the vCPU back ("ejects" it)
//!       +2  next        read: the lowest vCPU with bit 1 or 2 set, 255 when there is none
//!       +4  event       write, 4 bytes: what `outcome` is the outcome of (first argument of _OST)
//!       +8  outcome     write, 4 bytes: how it went (second argument of _OST, ACPI 6.5 section 6.3.5)
//! ```
//!
//! What becomes of a vCPU; what the host does is in capitals:
//!
//! ```text
//!            INSERT             acknowledge
//!    away ───────────> offered ─────────────> there <───────────────┐
//!    ^  ^                 │                    │                    │ KEEP, or the guest
//!    │  └──── REMOVE ─────┘                    │ REMOVE             │ refuses (_OST)
//!    │                                         v                    │
//!    └──────────────── eject ──────────── asked back ───────────────┘
//! ```
//!
//! A guest may also eject a vCPU unasked, as it may on a real machine, and may use one that it has not
//! acknowledged. vCPU 0 is always there.

mod aml;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::events::{Event, Events};
use super::{BusDevice, Changes, Error};

pub use aml::aml;

/// How many ports the registers take.
pub const PORTS: u16 = 12;
/// How many vCPUs the registers can speak of: one bit each.
pub const MOST: u32 = u64::BITS;

const SELECTED: u64 = 0;
const STATUS: u64 = 1;
const NEXT: u64 = 2;
const EVENT: u64 = 4;
const OUTCOME: u64 = 8;

const STATUS_THERE: u8 = 1 << 0;
const STATUS_OFFERED: u8 = 1 << 1;
const STATUS_ASKED_BACK: u8 = 1 << 2;
const STATUS_EJECT: u8 = 1 << 3;
const NEXT_NONE: u8 = u8::MAX;

/// The guest-visible registers. A vCPU is a bit: number 0 is bit 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpusState {
    /// Those that are there.
    pub present: u64,
    /// Those of them that the guest shall use and has not acknowledged.
    pub offered: u64,
    /// Those of them that the guest shall give back and has not acknowledged.
    pub asked_back: u64,
    /// Those about which the guest said that it cannot do what it was last asked.
    pub refused: u64,
    /// `selected`.
    pub selected: u8,
    /// `event`.
    pub event: u32,
}

impl CpusState {
    /// The state at a cold boot with `cpus` vCPUs (at most [`MOST`]), which the MADT lists as enabled.
    pub fn booted(cpus: u32) -> CpusState {
        CpusState { present: first(cpus), offered: 0, asked_back: 0, refused: 0, selected: 0, event: 0 }
    }

    fn check(&self, all: u64) -> Result<(), Error> {
        let rules = [
            (self.present & 1 != 0, "vCPU 0 is away"),
            (self.present & !all == 0, "a vCPU is there that is not in the envelope"),
            (self.refused & !all == 0, "a vCPU was refused that is not in the envelope"),
            (self.offered & !self.present == 0, "a vCPU is offered that is away"),
            (self.asked_back & !self.present == 0, "a vCPU is asked back that is away"),
            (self.asked_back & (self.offered | 1) == 0, "a vCPU is asked back that the guest cannot give back"),
        ];
        match rules.iter().find(|(kept, _)| !kept) {
            Some((_, what)) => Err(Error::State { device: "cpus", what }),
            None => Ok(()),
        }
    }
}

/// Why a vCPU cannot be inserted or removed.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    /// Beyond the envelope.
    #[error("the machine has no vCPU {cpu}, only 0 to {last}")]
    Beyond {
        /// The vCPU.
        cpu: u32,
        /// The last one that there can be.
        last: u32,
    },
    /// To be inserted, but there.
    #[error("vCPU {0} is there already")]
    There(u32),
    /// To be removed, but not there.
    #[error("vCPU {0} is not there")]
    Away(u32),
    /// To be removed, but needed.
    #[error("vCPU 0 cannot be removed: the machine began with it")]
    First,
    /// The guest could not be told.
    #[error("the guest cannot be told of vCPU {cpu}: {source}")]
    Interrupt {
        /// The vCPU.
        cpu: u32,
        /// Why.
        source: io::Error,
    },
}

/// What a vCPU does is for others to say: this is who is there.
pub struct Cpus {
    state: CpusState,
    count: u32,
    events: Events,
    changes: Arc<Changes>,
    on_eject: Box<dyn Fn(u32) + Send>,
}

impl Cpus {
    /// The registers of a machine that can have up to `count` vCPUs, which must be 1 to [`MOST`].
    ///
    /// `changes` is told when the guest moved. `on_eject` is told which vCPU the guest does not use any more;
    /// it is called on a vCPU's thread with this device locked, so it must not block.
    pub fn new(
        state: CpusState,
        count: u32,
        events: Events,
        changes: Arc<Changes>,
        on_eject: Box<dyn Fn(u32) + Send>,
    ) -> Result<Cpus, Error> {
        if !(1..=MOST).contains(&count) {
            return Err(Error::State { device: "cpus", what: "so many vCPUs cannot be" });
        }
        state.check(first(count))?;
        Ok(Cpus { state, count, events, changes, on_eject })
    }

    /// The state to save.
    pub fn state(&self) -> CpusState {
        self.state.clone()
    }

    /// Those that are there, a bit each.
    pub fn present(&self) -> u64 {
        self.state.present
    }

    /// Those that the guest did not acknowledge yet: offered or asked back, a bit each.
    pub fn pending(&self) -> u64 {
        self.state.offered | self.state.asked_back
    }

    /// Those that were offered and that the guest did not acknowledge yet, a bit each.
    pub fn offered(&self) -> u64 {
        self.state.offered
    }

    /// Those about which the guest said that it could not do what it was last asked, a bit each.
    pub fn refused(&self) -> u64 {
        self.state.refused
    }

    /// Offers a vCPU to the guest. It must be ready to be started, as the guest may do so at once.
    pub fn insert(&mut self, cpu: u32) -> Result<(), CpuError> {
        let bit = self.bit(cpu)?;
        if self.state.present & bit != 0 {
            return Err(CpuError::There(cpu));
        }
        self.state.present |= bit;
        self.state.offered |= bit;
        self.state.refused &= !bit;
        self.tell(cpu)
    }

    /// Asks the guest to give a vCPU back. One that the guest has not even acknowledged is taken away at once,
    /// and told to `on_eject`.
    pub fn remove(&mut self, cpu: u32) -> Result<(), CpuError> {
        let bit = self.bit(cpu)?;
        if cpu == 0 {
            return Err(CpuError::First);
        }
        if self.state.present & bit == 0 {
            return Err(CpuError::Away(cpu));
        }
        self.state.refused &= !bit;
        if self.state.offered & bit != 0 {
            self.eject(cpu);
            return Ok(());
        }
        self.state.asked_back |= bit;
        self.tell(cpu)
    }

    /// Asks no longer for the vCPU, if the guest has not acknowledged that it was asked. If it has, it may
    /// still eject the vCPU, however late.
    pub fn keep(&mut self, cpu: u32) -> Result<(), CpuError> {
        self.state.asked_back &= !self.bit(cpu)?;
        Ok(())
    }

    fn bit(&self, cpu: u32) -> Result<u64, CpuError> {
        if cpu < self.count { Ok(1 << cpu) } else { Err(CpuError::Beyond { cpu, last: self.count - 1 }) }
    }

    fn tell(&self, cpu: u32) -> Result<(), CpuError> {
        self.events.raise(Event::Cpus).map_err(|source| CpuError::Interrupt { cpu, source })
    }

    fn eject(&mut self, cpu: u32) {
        let gone = !(1 << cpu);
        self.state.present &= gone;
        self.state.offered &= gone;
        self.state.asked_back &= gone;
        self.state.refused &= gone;
        (self.on_eject)(cpu);
        self.changes.note();
    }

    /// The selected vCPU, if the machine can have it.
    fn selected(&self) -> Option<u32> {
        Some(u32::from(self.state.selected)).filter(|cpu| *cpu < self.count)
    }

    fn status(&self) -> u8 {
        let Some(cpu) = self.selected() else { return 0 };
        let state = &self.state;
        let bits =
            [(state.present, STATUS_THERE), (state.offered, STATUS_OFFERED), (state.asked_back, STATUS_ASKED_BACK)];
        bits.iter().filter(|(set, _)| set & 1 << cpu != 0).fold(0, |status, (_, bit)| status | bit)
    }

    fn set_status(&mut self, value: u8) {
        let Some(cpu) = self.selected() else { return };
        let bit = 1u64 << cpu;
        if value & STATUS_OFFERED & self.status() != 0 {
            self.state.offered &= !bit;
            self.changes.note();
        }
        if value & STATUS_ASKED_BACK & self.status() != 0 {
            self.state.asked_back &= !bit;
            self.changes.note();
        }
        if value & STATUS_EJECT != 0 && self.state.present & bit != 0 && cpu != 0 {
            self.eject(cpu);
        }
    }

    fn next(&self) -> u8 {
        match self.pending() {
            0 => NEXT_NONE,
            pending => pending.trailing_zeros() as u8,
        }
    }

    /// The guest says how it went. Only what cannot be done any more is kept: success shows in `present`.
    fn set_outcome(&mut self, outcome: u32) {
        // Events and status codes of ACPI 6.5 section 6.3.5: device check and insertion; ejection, asked for by
        // us or begun by the guest. A process that goes on is no refusal.
        let goes_on = match self.state.event {
            0x1 | 0x200 => 0x80,
            0x3 | 0x103 => 0x84,
            _ => return,
        };
        if let Some(cpu) = self.selected()
            && outcome != 0
            && outcome != goes_on
        {
            self.state.refused |= 1 << cpu & self.state.present;
            self.changes.note();
        }
    }
}

impl BusDevice for Cpus {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let [byte] = data {
            *byte = match offset {
                SELECTED => self.state.selected,
                STATUS => self.status(),
                NEXT => self.next(),
                _ => 0,
            };
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (SELECTED, &[cpu]) => self.state.selected = cpu,
            (STATUS, &[value]) => self.set_status(value),
            (EVENT, &[a, b, c, d]) => self.state.event = u32::from_le_bytes([a, b, c, d]),
            (OUTCOME, &[a, b, c, d]) => self.set_outcome(u32::from_le_bytes([a, b, c, d])),
            _ => {}
        }
    }
}

/// The first `count` vCPUs, at most all 64.
fn first(count: u32) -> u64 {
    if count >= MOST { u64::MAX } else { (1 << count) - 1 }
}
