//! What KVM holds of a machine, saved and put back: the state of each vCPU, of the interrupt controllers, the
//! timer and the clock.
//!
//! Everything here is done while no vCPU runs. The orders of the calls matter, and each says why.

mod hex;
pub(super) mod vcpu;
mod vm;

pub use vcpu::VcpuState;
pub use vm::VmState;
