//! What belongs to the VM as a whole.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use super::hex::Plain;
use crate::kvm::{Error, ioctl};

/// The interrupt controllers that are not a vCPU's own.
const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// Interrupt controllers, timer and clock.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmState {
    /// The two 8259s and the I/O APIC, in this order.
    chips: Vec<Plain<kvm_irqchip>>,
    pit: Plain<kvm_pit_state2>,
    /// What the guest's kvm-clock shows, in nanoseconds since its boot.
    clock_ns: u64,
}

impl VmState {
    /// Reads the state while no vCPU runs.
    pub fn save(fd: &VmFd) -> Result<VmState, Error> {
        let chips = CHIPS.map(|chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            fd.get_irqchip(&mut chip).map_err(ioctl("KVM_GET_IRQCHIP"))?;
            Ok(Plain(chip))
        });
        Ok(VmState {
            chips: chips.into_iter().collect::<Result<_, Error>>()?,
            pit: Plain(fd.get_pit2().map_err(ioctl("KVM_GET_PIT2"))?),
            clock_ns: fd.get_clock().map_err(ioctl("KVM_GET_CLOCK"))?.clock,
        })
    }

    /// Puts the controllers and the timer back, before the vCPUs.
    pub fn restore_chips(&self, fd: &VmFd) -> Result<(), Error> {
        let ids: Vec<_> = self.chips.iter().map(|chip| chip.0.chip_id).collect();
        if ids != CHIPS {
            return Err(Error::Saved("other interrupt controllers than there are"));
        }
        for chip in &self.chips {
            fd.set_irqchip(&chip.0).map_err(ioctl("KVM_SET_IRQCHIP"))?;
        }
        fd.set_pit2(&self.pit.0).map_err(ioctl("KVM_SET_PIT2"))
    }

    /// Lets the guest's clock go on from where it stood; call it last, right before the vCPUs run. The time
    /// of the nap does not pass for the guest's monotonic clock, so that no timer fires late and no counter
    /// jumps; its wall clock is set by the agent.
    pub fn restore_clock(&self, fd: &VmFd) -> Result<(), Error> {
        // Flags of zero: no correction by real time (KVM API, KVM_SET_CLOCK).
        let clock = kvm_clock_data { clock: self.clock_ns, ..Default::default() };
        fd.set_clock(&clock).map_err(ioctl("KVM_SET_CLOCK"))
    }
}
