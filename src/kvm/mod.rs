//! KVM: the VM, its vCPUs and their threads, and what they start from.
//!
//! This room knows nothing of devices. A vCPU's exit reaches them through [`Io`], which `machine` implements
//! over its bus.

pub mod cpuid;
mod entry;
mod features;
pub mod probe;
mod state;
mod team;
mod vcpu;
mod vm;

pub use entry::Entry;
pub use features::Cpu;
pub use state::{VcpuState, VmState};
pub use team::{End, Switch, Team};
pub use vcpu::Vcpu;
pub use vm::{Bare, Shown, Vm};

use vm::open;

/// Where a vCPU's port and memory-mapped accesses go.
///
/// Implementations are called from every vCPU's thread at once, and block only as long as a device works.
pub trait Io: Send + Sync {
    /// The guest reads `data.len()` (1, 2, 4 or 8) bytes.
    fn read(&self, at: Address, data: &mut [u8]);
    /// The guest writes `data`.
    fn write(&self, at: Address, data: &[u8]);
}

/// The two address spaces that a vCPU's accesses leave through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Address {
    /// An I/O port (`in`, `out`).
    Port(u16),
    /// A physical address that is not RAM.
    Memory(u64),
}

/// What KVM refused, or the host lacks.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no KVM.
    #[error("/dev/kvm does not exist: this host has no KVM, or its module is not loaded")]
    Missing,
    /// There is, for others.
    #[error("/dev/kvm may not be opened by this user (is it in the group `kvm`?)")]
    Denied,
    /// The device is there and does not open.
    #[error("/dev/kvm cannot be opened: {0}")]
    Open(#[source] std::io::Error),
    /// What is called `/dev/kvm` is something else.
    #[error("/dev/kvm is there, but it is not KVM")]
    NotKvm,
    /// The kernel speaks another dialect of the KVM API.
    #[error("this kernel's KVM API is version {0}; Catnap needs 12")]
    ApiVersion(i32),
    /// The counter has another rate here, and the host cannot scale it.
    #[error("the guest's time stamp counter ran at {saved} kHz, this host's runs at {here} kHz and cannot be scaled")]
    TscRate {
        /// The guest's, in kHz.
        saved: u32,
        /// This host's, in kHz.
        here: u32,
    },
    /// The host's CPU is less than the baseline.
    #[error("this host's CPU is less than {baseline}: it lacks {missing}")]
    Baseline {
        /// What was wanted.
        baseline: crate::spec::Baseline,
        /// The features that are missing.
        missing: String,
    },
    /// A capability that Catnap cannot do without.
    #[error("this kernel's KVM lacks {0}")]
    Lacks(&'static str),
    /// An ioctl failed.
    #[error("{call} failed: {source}")]
    Ioctl {
        /// The ioctl, with what it was about.
        call: &'static str,
        /// KVM's answer.
        source: kvm_ioctls::Error,
    },
    /// A saved state that this KVM cannot take.
    #[error("the saved state has {0}")]
    Saved(&'static str),
    /// KVM did not take one of the MSRs.
    #[error("KVM refused MSR {0:#x}")]
    Msr(u32),
    /// More vCPUs than this host's KVM can have.
    #[error("this host's KVM can have {max} vCPUs, not {asked}")]
    TooManyCpus {
        /// How many were wanted.
        asked: u32,
        /// KVM_CAP_MAX_VCPUS.
        max: u32,
    },
    /// The probe guest could not be run.
    #[error("KVM refuses {call}: {cause}")]
    Probe {
        /// What was asked.
        call: &'static str,
        /// What it answered.
        cause: std::io::Error,
    },
    /// A thread for a vCPU could not be started.
    #[error("no thread for a vCPU: {0}")]
    Thread(#[source] std::io::Error),
}

/// Names the ioctl in its error.
fn ioctl(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |source| Error::Ioctl { call, source }
}
