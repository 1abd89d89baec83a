//! One vCPU.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, Xsave, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};
use zerocopy::IntoBytes;

use super::hex::{Bytes, Plain};
use crate::kvm::{Error, Shown, ioctl};

/// The most MSRs that are taken: more than any kernel lists.
const MOST_MSRS: usize = 1024;

/// IA32_TIME_STAMP_COUNTER and IA32_TSC_DEADLINE (Intel SDM volume 4, table 2-2).
const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// MSRs that a guest can have set and that KVM_GET_MSR_INDEX_LIST does not name on every kernel: memory type
/// ranges (SDM volume 3, section 12.11.2), and the paravirtual ones (Documentation/virt/kvm/x86/msr.rst): a lost
/// asynchronous-page-fault MSR leaves tasks of the guest asleep for ever.
const MORE_MSRS: [std::ops::Range<u32>; 7] = [
    0x200..0x210, // variable ranges
    0x250..0x251,
    0x258..0x25a,
    0x268..0x270,
    0x2ff..0x300, // default type
    0x11..0x13,   // KVM's old clock MSRs
    0x4b56_4d00..0x4b56_4d09,
];

/// All that KVM knows of one vCPU.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuState {
    /// Its number.
    id: u32,
    /// What CPUID tells.
    cpuid: Vec<Plain<kvm_cpuid_entry2>>,
    /// Running, halted, or waiting for INIT or SIPI.
    mp_state: Plain<kvm_mp_state>,
    regs: Plain<kvm_regs>,
    sregs: Plain<kvm_sregs>,
    /// The XSAVE area, in its standard form.
    xsave: Bytes,
    xcrs: Plain<kvm_xcrs>,
    debug_regs: Plain<kvm_debugregs>,
    lapic: Plain<kvm_lapic_state>,
    /// Index and value.
    msrs: Vec<(u32, u64)>,
    events: Plain<kvm_vcpu_events>,
    /// The rate of its time stamp counter.
    tsc_khz: u32,
}

/// What saving and restoring a vCPU needs to know of its VM.
#[derive(Clone, Debug)]
pub struct Host {
    /// The size of the XSAVE area (KVM_CAP_XSAVE2), or of the old structure.
    pub xsave_size: usize,
    /// The MSRs to save.
    pub msrs: Vec<u32>,
}

impl Host {
    /// Adds to KVM's list of MSRs those that it may lack.
    pub fn new(listed: &[u32], xsave_size: usize) -> Host {
        let mut msrs: Vec<u32> = listed.iter().copied().chain(MORE_MSRS.into_iter().flatten()).collect();
        msrs.sort_unstable();
        msrs.dedup();
        Host { xsave_size: xsave_size.max(size_of::<kvm_xsave>()), msrs }
    }
}

impl VcpuState {
    /// Reads the state of a vCPU that stands still and has no access to finish.
    pub fn save(id: u32, fd: &VcpuFd, host: &Host) -> Result<VcpuState, Error> {
        // First: reading it makes KVM take pending INIT and SIPI events in, which changes other registers.
        let mp_state = fd.get_mp_state().map_err(ioctl("KVM_GET_MP_STATE"))?;
        let regs = fd.get_regs().map_err(ioctl("KVM_GET_REGS"))?;
        let sregs = fd.get_sregs().map_err(ioctl("KVM_GET_SREGS"))?;
        let xsave = get_xsave(fd, host.xsave_size)?;
        let xcrs = fd.get_xcrs().map_err(ioctl("KVM_GET_XCRS"))?;
        let debug_regs = fd.get_debug_regs().map_err(ioctl("KVM_GET_DEBUGREGS"))?;
        let lapic = fd.get_lapic().map_err(ioctl("KVM_GET_LAPIC"))?;
        let tsc_khz = fd.get_tsc_khz().unwrap_or(0);
        let cpuid = fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(ioctl("KVM_GET_CPUID2"))?;
        let msrs = get_msrs(fd, &host.msrs)?;
        // Last: the calls above may raise or take events.
        let events = fd.get_vcpu_events().map_err(ioctl("KVM_GET_VCPU_EVENTS"))?;
        Ok(VcpuState {
            id,
            cpuid: cpuid.as_slice().iter().copied().map(Plain).collect(),
            mp_state: Plain(mp_state),
            regs: Plain(regs),
            sregs: Plain(sregs),
            xsave: Bytes(xsave),
            xcrs: Plain(xcrs),
            debug_regs: Plain(debug_regs),
            lapic: Plain(lapic),
            msrs,
            events: Plain(events),
            tsc_khz,
        })
    }

    /// Puts the state into a fresh vCPU. KVM validates what it is given; what it refuses is an error.
    pub fn restore(&self, fd: &VcpuFd, host: &Host) -> Result<(), Error> {
        // CPUID comes before everything whose validity depends on it. MP_STATE comes before the registers,
        // because setting it may reset them; the local APIC before the deadline, which arms its timer; the
        // events last, because the other calls may raise or drop some.
        let entries: Vec<_> = self.cpuid.iter().map(|entry| entry.0).collect();
        let cpuid = CpuId::from_entries(&entries).map_err(|_| Error::Saved("more CPUID entries than fit"))?;
        fd.set_cpuid2(&cpuid).map_err(ioctl("KVM_SET_CPUID2"))?;
        self.restore_tsc_rate(fd)?;
        fd.set_mp_state(self.mp_state.0).map_err(ioctl("KVM_SET_MP_STATE"))?;
        fd.set_regs(&self.regs.0).map_err(ioctl("KVM_SET_REGS"))?;
        fd.set_sregs(&self.sregs.0).map_err(ioctl("KVM_SET_SREGS"))?;
        set_xsave(fd, &self.xsave.0, host.xsave_size)?;
        // A guest that was shown no XSAVE has never set any, and a host may have none either.
        if self.has_xsave() {
            fd.set_xcrs(&self.xcrs.0).map_err(ioctl("KVM_SET_XCRS"))?;
        }
        fd.set_debug_regs(&self.debug_regs.0).map_err(ioctl("KVM_SET_DEBUGREGS"))?;
        fd.set_lapic(&self.lapic.0).map_err(ioctl("KVM_SET_LAPIC"))?;
        set_msrs(fd, &self.msrs)?;
        fd.set_vcpu_events(&self.events.0).map_err(ioctl("KVM_SET_VCPU_EVENTS"))
    }

    /// A guest whose counter ran at another rate gets it scaled, where this host can.
    fn restore_tsc_rate(&self, fd: &VcpuFd) -> Result<(), Error> {
        let (saved, here) = (self.tsc_khz, fd.get_tsc_khz().unwrap_or(0));
        // Within 250 ppm KVM takes two rates for the same (its tsc_tolerance_ppm).
        if saved == 0 || differ_by(saved, here) * 4000 <= u64::from(here) || fd.set_tsc_khz(saved).is_ok() {
            return Ok(());
        }
        // A host measures the rate at each of its boots, some of them badly. So near, it is no other counter: the
        // guest's clock is KVM's, which knows the rate of here, and its timers err by no more than that.
        if differ_by(saved, here) * 100 <= u64::from(here) {
            tracing::warn!("the time stamp counter ran at {saved} kHz, and runs at {here} kHz now");
            return Ok(());
        }
        Err(Error::TscRate { saved, here })
    }

    /// Whether the guest was shown XSAVE (CPUID leaf 1, ECX bit 26).
    fn has_xsave(&self) -> bool {
        self.cpuid.iter().any(|entry| entry.0.function == 1 && entry.0.ecx >> 26 & 1 == 1)
    }

    /// What it was shown of a CPU.
    pub(in crate::kvm) fn shown(&self) -> Shown {
        Shown { entries: self.cpuid.iter().map(|entry| entry.0).collect(), tsc_khz: self.tsc_khz }
    }

    /// The vCPU's number.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The value of the time stamp counter.
    pub fn tsc(&self) -> Option<u64> {
        self.msrs.iter().find(|(index, _)| *index == MSR_TSC).map(|(_, value)| *value)
    }

    /// Sets the value of the time stamp counter that will be restored.
    pub fn set_tsc(&mut self, value: u64) {
        self.msrs.iter_mut().filter(|(index, _)| *index == MSR_TSC).for_each(|msr| msr.1 = value);
    }
}

fn differ_by(one: u32, other: u32) -> u64 {
    one.abs_diff(other).into()
}

fn get_xsave(fd: &VcpuFd, size: usize) -> Result<Vec<u8>, Error> {
    let mut xsave = xsave_area(size)?;
    // SAFETY: the area has room for as much as this VM's KVM_CAP_XSAVE2 says, and no feature is switched on
    // later (nothing here calls arch_prctl).
    unsafe { fd.get_xsave2(&mut xsave) }.map_err(ioctl("KVM_GET_XSAVE2"))?;
    let area = xsave.as_fam_struct_ref();
    let mut bytes = area.xsave.region.as_bytes().to_vec();
    bytes.extend(xsave.as_slice().as_bytes());
    Ok(bytes)
}

fn set_xsave(fd: &VcpuFd, bytes: &[u8], size: usize) -> Result<(), Error> {
    if bytes.len() > size {
        return Err(Error::Saved("a larger XSAVE area than this host's: its CPU lacks features of the other"));
    }
    let mut words: Vec<u32> =
        bytes.chunks(4).map(|chunk| chunk.iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte))).collect();
    words.resize(size.div_ceil(4), 0);
    let mut xsave = xsave_area(size)?;
    let mut region = [0; size_of::<kvm_xsave>() / 4];
    let (front, rest) = words.split_at(region.len());
    region.copy_from_slice(front);
    xsave.as_mut_slice().copy_from_slice(rest);
    // SAFETY: the number of entries, which is all that must stay as it is, is not touched.
    unsafe { xsave.as_mut_fam_struct() }.xsave.region = region;
    // SAFETY: as in `get_xsave`.
    unsafe { fd.set_xsave2(&xsave) }.map_err(ioctl("KVM_SET_XSAVE"))
}

fn xsave_area(size: usize) -> Result<Xsave, Error> {
    let more = size.saturating_sub(size_of::<kvm_xsave>()).div_ceil(size_of::<u32>());
    Xsave::new(more).map_err(|_| Error::Saved("no room for an XSAVE area"))
}

/// Reads all of these MSRs that there are: KVM stops at the first that it does not know.
fn get_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, Error> {
    let mut found = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let wanted = &rest[..rest.len().min(MOST_MSRS)];
        let mut msrs = list(wanted.iter().map(|index| (*index, 0)))?;
        let count = fd.get_msrs(&mut msrs).map_err(ioctl("KVM_GET_MSRS"))?;
        found.extend(msrs.as_slice()[..count].iter().map(|msr| (msr.index, msr.data)));
        // The one at `count` is unknown here, and nothing of it can be saved.
        rest = &rest[if count < wanted.len() { count + 1 } else { count }..];
    }
    Ok(found)
}

/// Writes all of these MSRs. One that KVM refuses is an error, unless it has that value already: some are
/// read-only.
fn set_msrs(fd: &VcpuFd, saved: &[(u32, u64)]) -> Result<(), Error> {
    if saved.len() > MOST_MSRS {
        return Err(Error::Saved("more MSRs than there can be"));
    }
    // Setting the counter moves a deadline that was set before, so the deadline comes last.
    let (deadlines, mut ordered): (Vec<_>, Vec<_>) = saved.iter().partition(|(index, _)| *index == MSR_TSC_DEADLINE);
    ordered.extend(deadlines);
    let mut rest: &[(u32, u64)] = &ordered;
    while !rest.is_empty() {
        let count = fd.set_msrs(&list(rest.iter().copied())?).map_err(ioctl("KVM_SET_MSRS"))?;
        rest = &rest[count..];
        if let Some((&(index, value), others)) = rest.split_first() {
            let mut now = list([(index, 0)])?;
            let known = fd.get_msrs(&mut now).map_err(ioctl("KVM_GET_MSRS"))? == 1;
            if !known || now.as_slice()[0].data != value {
                return Err(Error::Msr(index));
            }
            rest = others;
        }
    }
    Ok(())
}

fn list(msrs: impl IntoIterator<Item = (u32, u64)>) -> Result<Msrs, Error> {
    let entries: Vec<_> =
        msrs.into_iter().map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
    Msrs::from_entries(&entries).map_err(|_| Error::Saved("more MSRs than fit"))
}
