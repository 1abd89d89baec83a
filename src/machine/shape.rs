use std::fmt;

use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;

use crate::mem::layout;
use crate::spec::{self, MachineSpec};

/// What of a machine's size was settled at its boot, and stays until the next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// vCPUs at the boot.
    pub cpus: u32,
    /// The most vCPUs.
    pub max_cpus: u32,
    /// RAM at the boot, in bytes. What is more than that was plugged in.
    pub boot_memory: u64,
    /// The most RAM, in bytes.
    pub max_memory: u64,
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [boot, max] = [self.boot_memory, self.max_memory].map(spec::Size);
        write!(f, "1 to {} vCPUs and {boot} to {max} of memory", self.max_cpus)
    }
}

impl Shape {
    /// The shape of a machine that boots.
    pub fn of(spec: &MachineSpec) -> Shape {
        Shape {
            cpus: spec.cpus,
            max_cpus: spec.max_cpus,
            boot_memory: spec.memory.bytes(),
            max_memory: spec.max_memory.bytes(),
        }
    }

    /// Where its RAM lies, plugged in or not: addresses and lengths in bytes.
    pub fn regions(&self) -> Vec<(GuestAddress, u64)> {
        layout::all(self.boot_memory, self.max_memory)
    }

    /// Where the part lies that can be plugged in, if there is one.
    pub fn pluggable(&self) -> Option<(GuestAddress, u64)> {
        layout::pluggable(self.boot_memory, self.max_memory)
    }
}
