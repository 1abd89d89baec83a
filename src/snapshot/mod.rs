//! The on-disk format of snapshots.
//!
//! A snapshot is a folder with a [`Manifest`] (`snapshot.json`) and the files that it lists. Its identity is
//! the digest of the manifest's exact bytes, and the manifest holds the digests of the files.

mod digest;
mod format;
#[cfg(test)]
mod fuzz;
mod machine;
mod manifest;
pub mod memory;
mod signature;
mod state;

pub use digest::Digest;
pub use machine::{Cpu, Machine};
pub use manifest::{
    Backing, Chunks, Disk, Ephemeral, Error, File, Kind, MANIFEST, MAX_MANIFEST, Manifest, MemoryInfo, Need, Role,
    describe, describe_watched,
};
pub use signature::{KeyError, PublicKey, SecretKey, Signature};
pub use state::{MAX_STATE, MachineState, STATE, StateError};
