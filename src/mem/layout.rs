//! The guest's physical address space.
//!
//! ```text
//!            0  real-mode area, boot structures, RAM
//!    0x9_fc00  where a BIOS keeps its data: not RAM
//!    0xe_0000  ACPI tables (reserved; Linux also searches here for the RSDP)
//!   0x10_0000  kernel, initramfs, RAM
//! 0xc000_0000  the hole: virtio-mmio slots, I/O APIC, local APIC
//!  0x1_0000_0000  RAM above 4 GiB, and behind it the region for RAM that is plugged in later
//! ```

use vm_memory::GuestAddress;

use crate::spec::MEMORY_BLOCK;

/// Where RAM below 4 GiB ends and the hole begins: 3 GiB.
pub const HOLE_START: u64 = 0xc000_0000;
/// Where the hole ends and RAM goes on: 4 GiB.
pub const HOLE_END: u64 = 1 << 32;

/// Conventional memory ends here: the last KiB below 640 KiB is where a BIOS would keep its data area.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// ACPI tables, in the area that ACPI 6.5 section 5.2.5.1 has systems search for the RSDP.
pub const ACPI_START: u64 = 0xe_0000;
/// One byte past the area for ACPI tables.
pub const ACPI_END: u64 = 0x10_0000;
/// The last page of that area holds the generation ID. The whole area is reserved in the guest's memory map,
/// so the guest does not use the page as RAM, and it is real RAM, so a wake can write it.
pub const GENERATION: u64 = ACPI_END - 0x1000;
/// How many bytes the tables themselves may take.
pub const ACPI_TABLES_LIMIT: u64 = GENERATION - ACPI_START;
/// RAM for the kernel begins at 1 MiB.
pub const HIGH_RAM_START: u64 = 0x10_0000;

/// Virtio-mmio slot `n` has its registers at `VIRTIO_START + n * VIRTIO_SLOT`.
pub const VIRTIO_START: u64 = 0xd000_0000;
/// Each slot is a page, so that a page can be mapped or trapped on its own.
pub const VIRTIO_SLOT: u64 = 0x1000;
/// The I/O APIC's registers, where the PC has always had them.
pub const IOAPIC: u64 = 0xfec0_0000;
/// The local APIC's registers (Intel SDM volume 3, section 11.4.1).
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// A page for the identity map and, behind it, three pages for the TSS that KVM needs on Intel hosts
/// (KVM API, KVM_SET_IDENTITY_MAP_ADDR and KVM_SET_TSS_ADDR): in the hole, below the BIOS's area.
pub const KVM_PAGES: u64 = 0xfffb_c000;

/// Where `size` bytes of RAM lie: below the hole, and what does not fit there from 4 GiB on.
pub fn ram(size: u64) -> Vec<(GuestAddress, u64)> {
    let low = size.min(HOLE_START);
    let mut ranges = vec![(GuestAddress(0), low)];
    if size > low {
        ranges.push((GuestAddress(HOLE_END), size - low));
    }
    ranges
}

/// Where RAM lies that is plugged in later, for a machine that boots with `boot` bytes and can have `max`:
/// the start and the length of the region. `None` when it cannot grow.
///
/// The region lies above 4 GiB and above all boot RAM, and consists of whole [`MEMORY_BLOCK`]s, because Linux
/// uses no block of which a part lies outside. It so may be longer than `max - boot`, which takes address
/// space and nothing else. (With 64 GiB and more of boot RAM, Linux chooses larger blocks: the largest up to
/// 2 GiB that divide the end of boot RAM. The region begins there, so its start still fits; of its end, less
/// than a block may stay unused.)
pub fn pluggable(boot: u64, max: u64) -> Option<(GuestAddress, u64)> {
    let length = max.checked_sub(boot).filter(|more| *more > 0)?.checked_next_multiple_of(MEMORY_BLOCK.bytes())?;
    let (GuestAddress(start), size) = ram(boot).pop()?;
    let start = start.checked_add(size)?.max(HOLE_END).checked_next_multiple_of(MEMORY_BLOCK.bytes())?;
    start.checked_add(length)?;
    Some((GuestAddress(start), length))
}

/// All of a machine's RAM: what it boots with, and what can be plugged in.
pub fn all(boot: u64, max: u64) -> Vec<(GuestAddress, u64)> {
    let mut ranges = ram(boot);
    ranges.extend(pluggable(boot, max));
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_flows_around_the_hole() {
        assert_eq!(ram(256 << 20), [(GuestAddress(0), 256 << 20)]);
        assert_eq!(ram(3 << 30), [(GuestAddress(0), 3 << 30)]);
        assert_eq!(ram(5 << 30), [(GuestAddress(0), 3 << 30), (GuestAddress(4 << 30), 2 << 30)]);
    }

    #[test]
    fn ram_that_comes_later_lies_above_all_other() {
        const MIB: u64 = 1 << 20;
        let region = |boot, max| pluggable(boot * MIB, max * MIB).map(|(start, length)| (start.0 / MIB, length / MIB));
        assert_eq!(region(256, 4096), Some((4096, 3840)));
        assert_eq!(region(3072, 4096), Some((4096, 1024)));
        assert_eq!(region(5120, 6144), Some((6144, 1024)));
        // What is not whole blocks of Linux is rounded up on both sides.
        assert_eq!(region(257, 259), Some((4096, 128)));
        assert_eq!(region(3073, 3201), Some((4224, 128)));
        assert_eq!(region(256, 256), None);
        assert_eq!(region(256, 128), None);
        for (boot, max) in [(0, u64::MAX), (u64::MAX - 1, u64::MAX), (u64::MAX / 2, u64::MAX)] {
            assert_eq!(pluggable(boot, max), None);
        }
        for boot in (64..9000).step_by(61) {
            let (start, length) = pluggable(boot * MIB, (boot + 1000) * MIB).unwrap();
            assert!(ram(boot * MIB).iter().all(|(at, size)| at.0 + size <= start.0));
            assert!(start.0 >= HOLE_END && start.0.is_multiple_of(128 * MIB) && length == 1024 * MIB);
        }
    }
}
