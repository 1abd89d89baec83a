//! CPUID as each vCPU sees it: what the host and KVM support, with the machine's own topology.
//!
//! One package of single-threaded cores, numbered like their local APICs. Leaf numbers and fields are
//! those of the Intel SDM volume 2A (CPUID) and the AMD APM volume 3 (appendix E).

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use super::{Error, features, ioctl};
use crate::spec::Baseline;

/// The CPUID of vCPU `id` in a machine of `count`: like the one `shown` to another vCPU, or what there is, within the
/// baseline.
pub fn for_vcpu(
    kvm: &Kvm,
    id: u32,
    count: u32,
    baseline: Baseline,
    shown: Option<&[kvm_cpuid_entry2]>,
) -> Result<CpuId, Error> {
    let mut cpuid = match shown {
        Some(entries) => CpuId::from_entries(entries).map_err(|_| Error::Saved("more CPUID entries than fit"))?,
        None => kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(ioctl("KVM_GET_SUPPORTED_CPUID"))?,
    };
    for entry in cpuid.as_mut_slice() {
        features::limit(entry, baseline);
    }
    let deadline_timer = kvm.check_extension(Cap::TscDeadlineTimer);
    for entry in cpuid.as_mut_slice() {
        adapt(entry, id, count, deadline_timer);
    }
    Ok(cpuid)
}

/// The width of the APIC ID's part that numbers cores: enough bits for `count` of them.
fn core_bits(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

fn adapt(entry: &mut kvm_cpuid_entry2, id: u32, count: u32, deadline_timer: bool) {
    match (entry.function, entry.index) {
        (0x1, _) => {
            // EBX: initial APIC ID, and the number of logical processors (when EDX.HTT says it counts).
            entry.ebx = entry.ebx & 0x0000_ffff | count << 16 | id << 24;
            // ECX: a hypervisor is present; x2APIC; the APIC timer can count to a TSC deadline, which
            // KVM does not list as "supported" but does itself.
            entry.ecx |= 1 << 31 | 1 << 21;
            set_bit(&mut entry.ecx, 24, deadline_timer);
            set_bit(&mut entry.edx, 28, count > 1);
        }
        // Caches (Intel): each core has its own up to level 2, level 3 is shared by the package.
        (0x4, _) if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 0x7;
            let sharing = if level < 3 { 0 } else { count - 1 };
            entry.eax = entry.eax & 0x0000_3fff | sharing << 14 | (count - 1).min(0x3f) << 26;
        }
        // Performance counters are the host's business: no snapshot could carry them elsewhere.
        (0xa, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        // Topology: level 0 is threads (one, no bits), level 1 is cores.
        (0xb | 0x1f, level) => {
            (entry.eax, entry.ebx, entry.ecx) = match level {
                0 => (0, 1, 1 << 8),
                1 => (core_bits(count), count, 2 << 8 | 1),
                _ => (0, 0, level),
            };
            entry.edx = id;
        }
        // AMD: HTT with CmpLegacy means cores, not threads; no extended topology leaf to contradict it.
        (0x8000_0001, _) if entry.ecx & 1 << 22 != 0 || entry.ecx & 1 << 1 != 0 => {
            set_bit(&mut entry.ecx, 1, count > 1);
            set_bit(&mut entry.ecx, 22, false);
        }
        (0x8000_0008, _) if entry.ecx != 0 => {
            entry.ecx = entry.ecx & !0xf0ff | core_bits(count) << 12 | (count - 1);
        }
        (0x8000_001e, _) => (entry.eax, entry.ebx, entry.ecx) = (id, id & 0xff, 0),
        _ => {}
    }
}

fn set_bit(register: &mut u32, bit: u32, on: bool) {
    *register = *register & !(1 << bit) | u32::from(on) << bit;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapted(function: u32, index: u32, id: u32, count: u32) -> kvm_cpuid_entry2 {
        let mut entry = kvm_cpuid_entry2 { function, index, eax: 0x0000_0163, ..Default::default() };
        adapt(&mut entry, id, count, true);
        entry
    }

    #[test]
    fn every_vcpu_knows_its_own_number_and_the_count() {
        let one = adapted(1, 0, 5, 64);
        assert_eq!((one.ebx >> 24, one.ebx >> 16 & 0xff), (5, 64));
        assert_eq!(one.ecx & 1 << 24, 1 << 24, "TSC deadline");
        let cores = adapted(0xb, 1, 5, 6);
        assert_eq!((cores.eax, cores.ebx, cores.ecx, cores.edx), (3, 6, 0x201, 5));
        assert_eq!(adapted(0x4, 3, 0, 64).eax >> 26, 63);
        assert_eq!(adapted(0x4, 3, 0, 1).eax, 0x163);
    }

    #[test]
    fn a_single_vcpu_has_no_siblings() {
        assert_eq!(adapted(1, 0, 0, 1).edx & 1 << 28, 0);
        assert_eq!(adapted(0xb, 1, 0, 1).eax, 0);
        assert_eq!(adapted(0xa, 0, 0, 1).eax, 0);
    }
}
