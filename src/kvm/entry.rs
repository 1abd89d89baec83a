//! The state in which the first vCPU enters a kernel.

use kvm_bindings::{Msrs, kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

use super::{Error, ioctl};

/// Where and how a kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// The 64-bit Linux boot protocol (Documentation/arch/x86/boot.rst): long mode with memory mapped one
    /// to one, RSI pointing to the zero page.
    Linux64 {
        /// The first instruction.
        ip: u64,
        /// The zero page (`boot_params`).
        zero_page: u64,
        /// A page table (PML4) that maps the first 4 GiB one to one.
        page_table: u64,
    },
    /// The PVH boot protocol (Xen, docs/misc/pvh.pandoc): 32-bit protected mode without paging, EBX
    /// pointing to `hvm_start_info`.
    Pvh {
        /// The first instruction.
        ip: u64,
        /// The start info.
        start_info: u64,
    },
}

// Bits of control registers and EFER, Intel SDM volume 3, sections 2.5 and 2.2.1.
const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Bit 1 of RFLAGS is always set (SDM volume 1, section 3.4.3).
const RFLAGS_FIXED: u64 = 1 << 1;

/// IA32_MISC_ENABLE with fast string operations on, as firmware leaves it (SDM volume 4).
const MSR_MISC_ENABLE: (u32, u64) = (0x1a0, 1);
/// IA32_MTRR_DEF_TYPE: MTRRs on, everything write-back.
const MSR_MTRR_DEF_TYPE: (u32, u64) = (0x2ff, 1 << 11 | 6);

impl Entry {
    /// Puts a fresh vCPU before the kernel's first instruction.
    pub(super) fn apply(&self, vcpu: &VcpuFd) -> Result<(), Error> {
        let mut sregs = vcpu.get_sregs().map_err(ioctl("KVM_GET_SREGS"))?;
        vcpu.set_regs(&self.regs()).map_err(ioctl("KVM_SET_REGS"))?;
        self.fill(&mut sregs);
        vcpu.set_sregs(&sregs).map_err(ioctl("KVM_SET_SREGS"))?;
        // The FPU as FINIT and a cleared MXCSR leave it (SDM volume 1, sections 8.1.5 and 10.2.3).
        let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
        vcpu.set_fpu(&fpu).map_err(ioctl("KVM_SET_FPU"))
    }

    fn regs(&self) -> kvm_regs {
        let regs = kvm_regs { rflags: RFLAGS_FIXED, ..Default::default() };
        match *self {
            Entry::Linux64 { ip, zero_page, .. } => kvm_regs { rip: ip, rsi: zero_page, ..regs },
            Entry::Pvh { ip, start_info } => kvm_regs { rip: ip, rbx: start_info, ..regs },
        }
    }

    /// Segments are flat. Only the hidden parts matter: no kernel uses our descriptor table before it has
    /// loaded its own, so there is none in memory.
    fn fill(&self, sregs: &mut kvm_sregs) {
        let long = matches!(self, Entry::Linux64 { .. });
        // Selectors as the Linux boot protocol wants them: __BOOT_CS, __BOOT_DS, and a TSS behind.
        let flat = kvm_segment { base: 0, limit: 0xffff_ffff, present: 1, s: 1, g: 1, ..Default::default() };
        sregs.cs = kvm_segment { selector: 0x10, type_: 0xb, l: u8::from(long), db: u8::from(!long), ..flat };
        let data = kvm_segment { selector: 0x18, type_: 0x3, db: 1, ..flat };
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = kvm_segment { selector: 0x20, type_: 0xb, limit: 0x67, present: 1, ..Default::default() };
        sregs.cr0 = CR0_PE | CR0_ET;
        if let Entry::Linux64 { page_table, .. } = *self {
            sregs.cr0 |= CR0_PG;
            sregs.cr3 = page_table;
            sregs.cr4 |= CR4_PAE;
            sregs.efer |= EFER_LME | EFER_LMA;
        }
    }
}

/// What firmware sets on every processor, before any kernel: MSRs, and how the local APIC takes the
/// interrupt lines of the old days.
pub(super) fn as_firmware_leaves_it(vcpu: &VcpuFd) -> Result<(), Error> {
    let entries =
        [MSR_MISC_ENABLE, MSR_MTRR_DEF_TYPE].map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
    let msrs = Msrs::from_entries(&entries).expect("two MSRs are fewer than the most that fit");
    let taken = vcpu.set_msrs(&msrs).map_err(ioctl("KVM_SET_MSRS"))?;
    if let Some(refused) = entries.get(taken) {
        return Err(Error::Msr(refused.index));
    }
    let mut lapic = vcpu.get_lapic().map_err(ioctl("KVM_GET_LAPIC"))?;
    // LINT0 takes the 8259's interrupts, LINT1 is NMI (SDM volume 3, section 11.5.1: delivery mode is
    // bits 8 to 10 of the local vector table's entries at 0x350 and 0x360).
    set_delivery_mode(&mut lapic, 0x350, 0b111);
    set_delivery_mode(&mut lapic, 0x360, 0b100);
    vcpu.set_lapic(&lapic).map_err(ioctl("KVM_SET_LAPIC"))
}

fn set_delivery_mode(lapic: &mut kvm_lapic_state, register: usize, mode: u32) {
    let mut bytes = [0; 4];
    for (byte, from) in bytes.iter_mut().zip(&lapic.regs[register..]) {
        *byte = *from as u8;
    }
    let value = u32::from_le_bytes(bytes) & !0x700 | mode << 8;
    for (to, byte) in lapic.regs[register..].iter_mut().zip(value.to_le_bytes()) {
        *to = byte as _;
    }
}
