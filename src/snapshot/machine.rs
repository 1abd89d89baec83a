//! What a machine is like that was snapshotted: its shape, and the CPU that its guest goes on with.

use serde::{Deserialize, Serialize};

use crate::spec::Baseline;

/// CPU features, and how long the name of one may be.
const MAX_FEATURES: usize = 512;
const MAX_FEATURE: usize = 32;

/// The shape of the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// vCPUs when it was taken.
    pub cpus: u32,
    /// RAM when it was taken, in bytes.
    pub memory: u64,
    /// The most vCPUs that it can wake with.
    pub max_cpus: u32,
    /// The most RAM that it can wake with, in bytes.
    pub max_memory: u64,
    /// RAM at its boot, in bytes: what is more was plugged in.
    pub boot_memory: u64,
    /// The kernel's command line.
    #[serde(default)]
    pub cmdline: String,
    /// The words in it that the user added.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub append: String,
    /// How much of the host's CPU its guest was shown.
    #[serde(default, skip_serializing_if = "Baseline::is_host")]
    pub cpu_baseline: Baseline,
}

/// The CPU that the guest was shown, and that another host must have to wake it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpu {
    /// Its maker, such as `GenuineIntel`.
    pub vendor: String,
    /// What the guest may use, by the names of Linux.
    pub features: Vec<String>,
    /// The rate of its time stamp counter; 0 when unknown.
    #[serde(default)]
    pub tsc_khz: u32,
}

impl Cpu {
    /// Its names are shown to people, and may come from anybody.
    pub(super) fn check(&self) -> Result<(), String> {
        let plain = |name: &str| name.len() <= MAX_FEATURE && name.bytes().all(|byte| byte.is_ascii_graphic());
        match self.features.len() <= MAX_FEATURES && plain(&self.vendor) && self.features.iter().all(|name| plain(name))
        {
            true => Ok(()),
            false => Err("its CPU has strange names or too many of them".into()),
        }
    }
}
