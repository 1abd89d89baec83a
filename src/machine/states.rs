//! The states of all devices, for a snapshot.

use serde::{Deserialize, Serialize};

use super::{Devices, lock};
use crate::devices::power::PowerState;
use crate::devices::rtc::RtcState;
use crate::devices::serial::SerialState;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::block::BlockState;
use crate::devices::virtio::mmio::Mmio;
use crate::devices::virtio::rng::RngState;
use crate::devices::virtio::state::MmioState;
use crate::devices::virtio::vsock::VsockState;

/// What is saved of one device. The list is closed: a device that is added without a place here cannot be
/// part of a machine's states, and the compiler says so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "device", rename_all = "snake_case", deny_unknown_fields)]
pub enum DeviceState {
    /// The serial port.
    Serial(SerialState),
    /// Sleep, reset and the power button.
    Power(PowerState),
    /// The real-time clock.
    Rtc(RtcState),
    /// The root disk's slot and chip.
    RootDisk(Virtio<BlockState>),
    /// The entropy source's slot and chip.
    Rng(Virtio<RngState>),
    /// The socket device's slot and chip.
    Vsock(Virtio<VsockState>),
}

/// A virtio device: the registers and queues of its slot, and its chip.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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

impl Devices {
    /// The states of devices that stand still.
    pub(super) fn states(&self) -> Vec<DeviceState> {
        // Taken apart, so that a new device cannot be forgotten.
        let Devices { serial, power, rtc, root, rng, vsock } = self;
        vec![
            DeviceState::Serial(lock(serial).state()),
            DeviceState::Power(lock(power).state()),
            DeviceState::Rtc(lock(rtc).state()),
            DeviceState::RootDisk(Virtio::of(&lock(root))),
            DeviceState::Rng(Virtio::of(&lock(rng))),
            DeviceState::Vsock(Virtio::of(&lock(vsock))),
        ]
    }
}
