//! What a machine is, in words that are stored, sent and typed: plain data with the checks that need
//! nothing but the data itself.

mod baseline;
mod envelope;
mod ephemeral;
mod machine;
mod name;
mod settings;
mod size;

pub use baseline::Baseline;
pub use envelope::{Flavor, MEMORY_BLOCK, MEMORY_STEP, default_max_cpus, default_max_memory};
pub use ephemeral::Ephemeral;
pub use machine::{Forward, MachineSpec};
pub use name::Name;
pub use settings::Setting;
pub use size::Size;

/// A value that a person or a file gave and that cannot be meant.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not a baseline.
    #[error("`{0}` is not a CPU baseline: choose host, x86-64-v2 or x86-64-v3")]
    Baseline(String),
    /// Not a setting.
    #[error("{0}")]
    Setting(String),
    /// Not a machine id.
    #[error("a machine id has 32 hexadecimal digits")]
    MachineId,
    /// Not a size.
    #[error("`{0}` is not a size: write a whole number with K, M, G or T (binary), such as 512M")]
    Size(String),
    /// Not a name.
    #[error("`{0}` is not a name: use 1 to 63 letters, digits, `-`, `_` or `.`, beginning with a letter or digit")]
    Name(String),
    /// Not a port forward.
    #[error("`{0}` is not a port forward: write HOST:GUEST with ports from 1 to 65535, such as 8080:80")]
    Forward(String),
    /// The number of vCPUs is out of range.
    #[error("{0} vCPUs cannot be had: choose 1 to {max}", max = MachineSpec::MAX_CPUS)]
    Cpus(u32),
    /// The size of RAM is out of range.
    #[error("{0} of memory cannot be had: choose a multiple of 1M, from {min} up", min = MachineSpec::MIN_MEMORY)]
    Memory(Size),
    /// The envelope's vCPUs are fewer than the machine starts with, or too many.
    #[error("{max} vCPUs at most cannot be had with {cpus} at start: choose --max-cpus from {cpus} to {limit}", limit = MachineSpec::MAX_CPUS)]
    MaxCpus {
        /// vCPUs at start.
        cpus: u32,
        /// vCPUs at most.
        max: u32,
    },
    /// The envelope's RAM is less than the machine starts with, too much, or not more by whole steps.
    #[error("{max} of memory at most cannot be had with {memory} at start: choose a --max-memory that is larger by a multiple of {step}, up to {limit}", step = MEMORY_STEP, limit = MachineSpec::MAX_MEMORY)]
    MaxMemory {
        /// RAM at start.
        memory: Size,
        /// RAM at most.
        max: Size,
    },
    /// Not a flavor.
    #[error("`{0}` is not a flavor: choose kitten, cat or tiger")]
    Flavor(String),
    /// The size of an ephemeral disk is out of range.
    #[error("an ephemeral disk cannot have {0}: choose a multiple of {step}, from {step} up", step = Ephemeral::STEP)]
    Ephemeral(Size),
    /// Not a place where a disk can be mounted.
    #[error("`{0}` is no place for an ephemeral disk: choose a folder such as /mnt, none that the guest lives on")]
    MountPoint(String),
    /// Two ephemeral disks want one place.
    #[error("two ephemeral disks cannot both be mounted on {0}")]
    MountedTwice(String),
    /// More ephemeral disks than there are bays.
    #[error("{0} ephemeral disks are too many: a machine has {most} bays for them", most = Ephemeral::MOST)]
    TooManyEphemeral(usize),
    /// Two forwards use one port of the host.
    #[error("port {0} of the host is forwarded twice")]
    ForwardTwice(u16),
}
