//! What a machine is, in words that are stored, sent and typed: plain data with the checks that need
//! nothing but the data itself.

mod machine;
mod name;
mod size;

pub use machine::{Forward, MachineSpec};
pub use name::Name;
pub use size::Size;

/// A value that a person or a file gave and that cannot be meant.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
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
    /// Two forwards use one port of the host.
    #[error("port {0} of the host is forwarded twice")]
    ForwardTwice(u16),
}
