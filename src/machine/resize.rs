//! Giving a running machine vCPUs and RAM, and taking them back.
//!
//! All of it is asking: the monitor offers or asks back, the guest's kernel takes or gives in its own time, and
//! some of it perhaps never. So a resize waits for as long as something moves, and then says how far it came. What
//! the guest did not do by then is not asked for any more.

use std::fmt;
use std::time::{Duration, Instant};

use super::{Error, Machine, lock};
use crate::spec;

/// How long the guest may do nothing before it counts as unable or unwilling.
const STANDSTILL: Duration = Duration::from_secs(5);

/// The size of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// vCPUs.
    pub cpus: u32,
    /// RAM, in bytes.
    pub memory: u64,
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} vCPUs and {} of memory", self.cpus, spec::Size(self.memory))
    }
}

impl Machine {
    /// The size that the machine has: the vCPUs that the guest was given, and the RAM that it has plugged in.
    pub fn size(&self) -> Size {
        Size { cpus: lock(&self.devices.cpus).present().count_ones(), memory: self.shape.boot_memory + self.plugged() }
    }

    /// Asks the guest to have the size `wanted` and waits until it has it, or nothing moves any more, or `time` is
    /// over. Gives the size that was reached.
    pub fn resize(&self, wanted: Size, time: Duration) -> Result<Size, Error> {
        self.ask_for(wanted)?;
        self.await_size(wanted, time);
        self.stop_asking(wanted)?;
        Ok(self.size())
    }

    /// The first half of a resize: asks, and does not wait.
    pub fn ask_for(&self, wanted: Size) -> Result<(), Error> {
        let shape = self.shape;
        let memory = shape.boot_memory..=shape.max_memory;
        if !(1..=shape.max_cpus).contains(&wanted.cpus) || !memory.contains(&wanted.memory) {
            return Err(Error::Envelope { wanted, shape });
        }
        if let Some(device) = &self.devices.memory {
            lock(device).request_size(wanted.memory - shape.boot_memory)?;
        }
        for cpu in 0..shape.max_cpus {
            let there = lock(&self.devices.cpus).present() & 1 << cpu != 0;
            if cpu < wanted.cpus && !there {
                self.provide(cpu)?;
                lock(&self.devices.cpus).insert(cpu)?;
            } else if cpu >= wanted.cpus && there {
                lock(&self.devices.cpus).remove(cpu)?;
            }
        }
        Ok(())
    }

    /// Waits until the guest has the size `wanted`, or nothing moves any more, or `time` is over.
    fn await_size(&self, wanted: Size, time: Duration) {
        let deadline = Instant::now() + time;
        let changes = &self.devices.changes;
        loop {
            let seen = changes.count();
            let refused = lock(&self.devices.cpus).refused() != 0;
            let patience = STANDSTILL.min(deadline.saturating_duration_since(Instant::now()));
            if self.size() == wanted || refused || self.team.ended().is_some() || patience.is_zero() {
                return;
            }
            if changes.wait_beyond(seen, patience).is_none() {
                return;
            }
        }
    }

    /// Takes back what was asked and not done.
    fn stop_asking(&self, wanted: Size) -> Result<(), Error> {
        if let Some(device) = &self.devices.memory {
            let plugged = self.plugged();
            lock(device).request_size(plugged)?;
        }
        let mut cpus = lock(&self.devices.cpus);
        for cpu in 1..self.shape.max_cpus {
            let bit = 1 << cpu;
            if cpu >= wanted.cpus {
                cpus.keep(cpu)?;
            } else if cpus.pending() & bit != 0 && cpus.present() & bit != 0 {
                cpus.remove(cpu)?;
            }
        }
        Ok(())
    }

    /// A vCPU that the guest can start.
    fn provide(&self, cpu: u32) -> Result<(), Error> {
        // Nobody pauses while a thread is added.
        let _alone = lock(&self.pausing);
        if self.team.bring_back(cpu) {
            return Ok(());
        }
        let vcpu = self.vm.vcpu(cpu, self.shape.max_cpus)?;
        vcpu.power_on()?;
        Ok(self.team.add(vcpu)?)
    }

    fn plugged(&self) -> u64 {
        self.devices.memory.as_ref().map_or(0, |device| lock(device).device().plugged())
    }
}
