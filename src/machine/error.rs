use std::io;
use std::path::PathBuf;

use super::{BayError, Shape, Size, forward, memory_file};
use crate::devices::cpus::CpuError;
use crate::devices::virtio::memory::RequestError;
use crate::devices::virtio::{self, vsock};
use crate::{boot, devices, disk, kvm, mem, snapshot, spec};

/// Why a machine cannot be built, or cannot do what is asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// RAM.
    #[error(transparent)]
    Memory(#[from] mem::Error),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// Kernel and initramfs.
    #[error(transparent)]
    Boot(#[from] boot::Error),
    /// The root disk.
    #[error(transparent)]
    Disk(#[from] disk::Error),
    /// A device.
    #[error(transparent)]
    Device(#[from] devices::Error),
    /// A virtio device.
    #[error(transparent)]
    Virtio(#[from] virtio::Error),
    /// The vsock device.
    #[error(transparent)]
    Vsock(#[from] vsock::Error),
    /// A port of the host that leads into the guest.
    #[error(transparent)]
    Forward(#[from] forward::Error),
    /// The console's log.
    #[error("the console cannot be logged to {path}: {source}")]
    Console {
        /// The log.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A thread or a descriptor.
    #[error("the host has no more threads or descriptors: {0}")]
    Host(#[source] io::Error),
    /// A snapshot's file cannot be used to wake from.
    #[error("{path} cannot be woken from: {why}")]
    Unsound {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A saved state of a machine that can grow, for one that cannot, or the other way round.
    #[error("the saved state is that of a machine of another shape")]
    Shape,
    /// The state of the machine cannot be written down.
    #[error("the machine's state cannot be saved: {0}")]
    State(#[from] snapshot::StateError),
    /// The files of a snapshot.
    #[error(transparent)]
    Snapshot(#[from] snapshot::Error),
    /// Writing or loading guest memory.
    #[error(transparent)]
    MemoryFile(#[from] memory_file::Error),
    /// Writing guest memory.
    #[error("{path}: {source}")]
    Write {
        /// Where to.
        path: PathBuf,
        /// Why it failed.
        source: memory_file::Error,
    },
    /// A file of a snapshot under way.
    #[error(transparent)]
    File(#[from] crate::sys::files::Error),
    /// A vCPU that cannot be given or taken.
    #[error(transparent)]
    Cpu(#[from] CpuError),
    /// RAM that cannot be plugged in.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// More or less than the machine can have.
    #[error("the machine can have {shape}, so it cannot have {wanted}")]
    Envelope {
        /// What was wanted.
        wanted: Size,
        /// What it can have.
        shape: Shape,
    },
    /// Memory comes and goes in steps.
    #[error("{} of memory cannot be had: it grows from {} in steps of {}", spec::Size(*wanted), spec::Size(*boot), spec::MEMORY_STEP)]
    Step {
        /// What was wanted, in bytes.
        wanted: u64,
        /// What it booted with, in bytes.
        boot: u64,
    },
    /// A guest that stands still cannot follow.
    #[error("the machine is paused, so its guest cannot follow")]
    Paused,
    /// Whoever wanted the snapshot does not want it any more.
    #[error("the snapshot was cancelled")]
    Cancelled,
    /// A bay.
    #[error(transparent)]
    Bay(#[from] BayError),
    /// Too many devices.
    #[error("a machine has room for {0} virtio devices")]
    NoSlot(u32),
    /// The machine has ended.
    #[error("the machine has ended")]
    Ended,
}
