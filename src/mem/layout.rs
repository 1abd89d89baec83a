//! The guest's physical address space.
//!
//! ```text
//!            0  real-mode area, boot structures, RAM
//!    0x9_fc00  where a BIOS keeps its data: not RAM
//!    0xe_0000  ACPI tables (reserved; Linux also searches here for the RSDP)
//!   0x10_0000  kernel, initramfs, RAM
//! 0xc000_0000  the hole: virtio-mmio slots, I/O APIC, local APIC
//!  0x1_0000_0000  RAM above 4 GiB
//! ```

use vm_memory::GuestAddress;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_flows_around_the_hole() {
        assert_eq!(ram(256 << 20), [(GuestAddress(0), 256 << 20)]);
        assert_eq!(ram(3 << 30), [(GuestAddress(0), 3 << 30)]);
        assert_eq!(ram(5 << 30), [(GuestAddress(0), 3 << 30), (GuestAddress(4 << 30), 2 << 30)]);
    }
}
