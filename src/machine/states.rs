//! The states of all devices, as they are saved and put back.

use serde::{Deserialize, Serialize};

use super::media::BAYS;
use super::{Devices, Shape, lock};
use crate::devices::cpus::CpusState;
use crate::devices::power::PowerState;
use crate::devices::rtc::RtcState;
use crate::devices::serial::SerialState;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::bay::BayState;
use crate::devices::virtio::block::BlockState;
use crate::devices::virtio::memory::MemoryState;
use crate::devices::virtio::mmio::Mmio;
use crate::devices::virtio::rng::RngState;
use crate::devices::virtio::state::MmioState;
use crate::devices::virtio::vsock::VsockState;
use crate::snapshot::{MachineState, StateError};

/// What is saved of the devices.
///
/// [`DeviceStates::put`], [`DeviceStates::take`] and [`Devices::states`] name every field, so a device that is
/// added here and forgotten there does not compile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceStates {
    /// The serial port.
    pub serial: SerialState,
    /// Sleep, reset and the power button.
    pub power: PowerState,
    /// The real-time clock.
    pub rtc: RtcState,
    /// Which vCPUs are there.
    pub cpus: CpusState,
    /// The root disk's slot and chip.
    pub root: Virtio<BlockState>,
    /// The entropy source's slot and chip.
    pub rng: Virtio<RngState>,
    /// The socket device's slot and chip.
    pub vsock: Virtio<VsockState>,
    /// Slot and chip of the RAM that can be plugged in, when the machine can grow.
    pub memory: Option<Virtio<MemoryState>>,
    /// The bays' slots and chips. None when the machine was made before there were bays.
    pub bays: Vec<Virtio<BayState>>,
}

/// A virtio device: the registers and queues of its slot, and its chip.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Virtio<S> {
    /// Registers and queues.
    pub mmio: MmioState,
    /// What is behind them.
    pub chip: S,
}

impl<S> Virtio<S> {
    fn of<D: VirtioDevice<State = S>>(slot: &Mmio<D>) -> Virtio<S> {
        Virtio { mmio: slot.state(), chip: slot.device().state() }
    }
}

impl DeviceStates {
    /// The states in a machine of this shape that was never on.
    pub fn booted(shape: &Shape) -> DeviceStates {
        let memory = shape
            .pluggable()
            .map(|(start, length)| Virtio { mmio: MmioState::default(), chip: MemoryState::booted(start, length) });
        DeviceStates {
            serial: SerialState::default(),
            power: PowerState::default(),
            rtc: RtcState::default(),
            cpus: CpusState::booted(shape.cpus),
            root: Virtio::default(),
            rng: Virtio::default(),
            vsock: Virtio::default(),
            memory,
            bays: vec![Virtio::default(); BAYS],
        }
    }

    /// Adds a part for each device; the numbers are the versions of what each saves.
    pub fn put(&self, to: &mut MachineState) -> Result<(), StateError> {
        let DeviceStates { serial, power, rtc, cpus, root, rng, vsock, memory, bays } = self;
        to.put("serial", 1, serial)?;
        to.put("power", 1, power)?;
        to.put("rtc", 1, rtc)?;
        to.put("cpus", 1, cpus)?;
        to.put("root-disk", 1, root)?;
        to.put("rng", 1, rng)?;
        to.put("vsock", 1, vsock)?;
        memory.iter().try_for_each(|memory| to.put("memory", 1, memory))?;
        bays.iter().try_for_each(|bay| to.put("bay", 1, bay))
    }

    /// Takes every device's part out.
    pub fn take(from: &mut MachineState) -> Result<DeviceStates, StateError> {
        Ok(DeviceStates {
            serial: from.take("serial", 1)?,
            power: from.take("power", 1)?,
            rtc: from.take("rtc", 1)?,
            cpus: from.take("cpus", 1)?,
            root: from.take("root-disk", 1)?,
            rng: from.take("rng", 1)?,
            vsock: from.take("vsock", 1)?,
            memory: from.take_optional("memory", 1)?,
            bays: match from.take_all("bay", 1)? {
                bays if bays.len() == BAYS || bays.is_empty() => bays,
                bays => return Err(StateError::Count { kind: "bay", found: bays.len(), wanted: "2, or none at all" }),
            },
        })
    }
}

impl Devices {
    /// The states of devices that stand still.
    pub(super) fn states(&self) -> DeviceStates {
        let Devices { serial, power, rtc, cpus, root, rng, vsock, memory, bays, changes: _ } = self;
        DeviceStates {
            serial: lock(serial).state(),
            power: lock(power).state(),
            rtc: lock(rtc).state(),
            cpus: lock(cpus).state(),
            root: Virtio::of(&lock(root)),
            rng: Virtio::of(&lock(rng)),
            vsock: Virtio::of(&lock(vsock)),
            memory: memory.as_ref().map(|memory| Virtio::of(&lock(memory))),
            bays: bays.iter().map(|bay| Virtio::of(&lock(bay))).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_found_again_and_none_may_be_missing() {
        let shape = Shape { cpus: 2, max_cpus: 4, boot_memory: 256 << 20, max_memory: 1 << 30 };
        let mut states = DeviceStates::booted(&shape);
        states.serial.scratch = 7;
        states.root.chip.sectors = Some(2048);
        let mut saved = MachineState::default();
        states.put(&mut saved).unwrap();
        let bytes = saved.to_bytes().unwrap();
        let mut read = MachineState::parse(&bytes).unwrap();
        assert_eq!(DeviceStates::take(&mut read).unwrap(), states);
        read.finish().unwrap();
        let mut without = MachineState::parse(&bytes).unwrap();
        without.take::<serde_json::Value>("rng", 1).unwrap();
        assert!(matches!(DeviceStates::take(&mut without), Err(StateError::Count { kind: "rng", found: 0, .. })));
    }
}
