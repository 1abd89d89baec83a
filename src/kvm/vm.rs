use std::sync::OnceLock;
use std::thread;

use kvm_bindings::{
    KVM_API_VERSION, KVM_MEM_LOG_DIRTY_PAGES, KVM_PIT_SPEAKER_DUMMY, kvm_cpuid_entry2, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::state::vcpu::Host;
use super::{Cpu, Error, Vcpu, VcpuState, VmState, ioctl};
use crate::mem::{GuestMemory, Ram, layout};
use crate::spec::Baseline;
use crate::sys::thread::small;

/// A virtual machine of KVM: memory slots, interrupt controllers, clock; and the maker of vCPUs.
pub struct Vm {
    kvm: Kvm,
    fd: VmFd,
    /// Keeps the memory that the slots point to mapped for as long as the VM can touch it.
    mem: GuestMemory,
    /// What saving and restoring vCPUs needs to know.
    host: Host,
    /// How much of the host's CPU the guest may see.
    baseline: Baseline,
    /// What its first vCPU was shown, so that those that come later are like it.
    shown: OnceLock<Shown>,
}

/// A CPU as a guest was shown it.
#[derive(Clone, Debug)]
pub struct Shown {
    pub(super) entries: Vec<kvm_cpuid_entry2>,
    /// The rate of its time stamp counter; 0 when unknown.
    pub tsc_khz: u32,
}

impl Shown {
    /// What it can do.
    pub fn cpu(&self) -> Cpu {
        Cpu::of_guest(&self.entries)
    }
}

/// A VM with interrupt controllers and timer, and without memory and vCPUs.
///
/// Making one takes the kernel some milliseconds, most of which it waits: it starts a thread for the VM and moves
/// it into the caller's cgroups, which waits for a grace period of RCU.
pub struct Bare {
    kvm: Kvm,
    fd: VmFd,
}

/// What the monitor relies on, with names for people.
const NEEDED: [(Cap, &str); 11] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
];

/// Opens `/dev/kvm` and makes sure that it can do what machines need.
pub fn open() -> Result<Kvm, Error> {
    let kvm = Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => Error::Missing,
        libc::EACCES | libc::EPERM => Error::Denied,
        _ => Error::Open(error.into()),
    })?;
    match kvm.get_api_version() {
        // What does not know the ioctl is some other device or file.
        ..0 => return Err(Error::NotKvm),
        version if version != KVM_API_VERSION as i32 => return Err(Error::ApiVersion(version)),
        _ => {}
    }
    match NEEDED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        Some((_, name)) => Err(Error::Lacks(name)),
        None => Ok(kvm),
    }
}

impl Bare {
    /// Creates a VM of KVM, which belongs to this process.
    pub fn new() -> Result<Bare, Error> {
        let kvm = open()?;
        let fd = kvm.create_vm().map_err(ioctl("KVM_CREATE_VM"))?;
        // Both only matter on Intel hosts without unrestricted guest mode, must name pages outside of
        // RAM, and must come before the first vCPU (KVM API 4.35 and 4.42).
        fd.set_identity_map_address(layout::KVM_PAGES).map_err(ioctl("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.set_tss_address(layout::KVM_PAGES as usize + 0x1000).map_err(ioctl("KVM_SET_TSS_ADDR"))?;
        // The interrupt chips come before the vCPUs, whose local APICs they create.
        fd.create_irq_chip().map_err(ioctl("KVM_CREATE_IRQCHIP"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        fd.create_pit2(pit).map_err(ioctl("KVM_CREATE_PIT2"))?;
        Ok(Bare { kvm, fd })
    }

    /// The same, and does something on the side meanwhile. It is this thread that waits for the kernel: so the
    /// other one has a CPU at once, also where there is only one.
    pub fn new_while<T: Send>(meanwhile: impl FnOnce() -> T + Send) -> Result<(Result<Bare, Error>, T), Error> {
        thread::scope(|scope| {
            let aside = small("prepare").spawn_scoped(scope, meanwhile).map_err(Error::Thread)?;
            let bare = Bare::new();
            // A panic ends the process before it gets here, or goes on in this thread.
            Ok((bare, aside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))))
        })
    }
}

impl Vm {
    /// Gives a VM its memory, for up to `cpus` vCPUs.
    pub fn new(Bare { kvm, fd }: Bare, mem: GuestMemory, cpus: u32) -> Result<Vm, Error> {
        let max = kvm.get_max_vcpus() as u32;
        if cpus > max {
            return Err(Error::TooManyCpus { asked: cpus, max });
        }
        let listed = kvm.get_msr_index_list().map_err(ioctl("KVM_GET_MSR_INDEX_LIST"))?;
        let host = Host::new(listed.as_slice(), fd.check_extension_int(Cap::Xsave2).try_into().unwrap_or(0));
        let vm = Vm { kvm, fd, mem, host, baseline: Baseline::Host, shown: OnceLock::new() };
        vm.set_slots(0)?;
        Ok(vm)
    }

    /// Shows the vCPUs that are made from now on no more than a baseline has.
    pub fn limit_cpu(&mut self, baseline: Baseline) -> Result<(), Error> {
        let missing = Cpu::of_host().lacks_for(baseline);
        if !missing.is_empty() {
            return Err(Error::Baseline { baseline, missing: missing.join(", ") });
        }
        self.baseline = baseline;
        Ok(())
    }

    /// What its vCPUs were shown of a CPU; `None` before there is one.
    pub fn shown(&self) -> Option<&Shown> {
        self.shown.get()
    }

    /// Gives every region of guest memory its slot, or changes the slots' flags.
    fn set_slots(&self, flags: u32) -> Result<(), Error> {
        for (slot, region) in self.mem.iter().enumerate() {
            let slot = kvm_userspace_memory_region {
                slot: slot as u32,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.mapping().as_ptr() as u64,
                flags,
            };
            // SAFETY: the slot is one mapping of exactly this length, and the VM holds a reference to it.
            unsafe { self.fd.set_user_memory_region(slot) }.map_err(ioctl("KVM_SET_USER_MEMORY_REGION"))?;
        }
        Ok(())
    }

    /// From now on KVM notes which pages vCPUs write to.
    pub fn log_dirty_pages(&self) -> Result<(), Error> {
        self.set_slots(KVM_MEM_LOG_DIRTY_PAGES)
    }

    /// Takes what KVM has noted since the last call of the region with this number: a bit per page of 4 KiB, the lowest
    /// first.
    pub fn take_dirty_log(&self, slot: usize, region: &Ram) -> Result<Vec<u64>, Error> {
        self.fd.get_dirty_log(slot as u32, region.len() as usize).map_err(ioctl("KVM_GET_DIRTY_LOG"))
    }

    /// What KVM holds of the machine as a whole and of each vCPU. No vCPU may run.
    pub fn save(&self, vcpus: &[std::sync::Arc<Vcpu>]) -> Result<(VmState, Vec<VcpuState>), Error> {
        let mut saved = vcpus.iter().map(|vcpu| vcpu.save(&self.host)).collect::<Result<Vec<_>, _>>()?;
        // Their counters are one counter to the guest, and were read one after the other.
        if let Some(tsc) = saved.first().and_then(VcpuState::tsc) {
            saved.iter_mut().for_each(|vcpu| vcpu.set_tsc(tsc));
        }
        Ok((VmState::save(&self.fd)?, saved))
    }

    /// Makes the vCPUs of a saved machine. Its interrupt controllers are put back first, for the vCPUs' own to
    /// find them.
    pub fn restore(&self, vm: &VmState, vcpus: &[VcpuState]) -> Result<Vec<Vcpu>, Error> {
        vm.restore_chips(&self.fd)?;
        let restore = |state: &VcpuState| {
            let fd = self.fd.create_vcpu(u64::from(state.id())).map_err(ioctl("KVM_CREATE_VCPU"))?;
            state.restore(&fd, &self.host)?;
            self.shown.get_or_init(|| state.shown());
            Ok(Vcpu::new(state.id(), fd))
        };
        let restored = vcpus.iter().map(restore).collect::<Result<_, Error>>()?;
        vm.restore_clock(&self.fd)?;
        Ok(restored)
    }

    /// Makes vCPU `id` of at most `count`, with its CPUID set and its registers as after a reset.
    pub fn vcpu(&self, id: u32, count: u32) -> Result<Vcpu, Error> {
        let fd = self.fd.create_vcpu(u64::from(id)).map_err(ioctl("KVM_CREATE_VCPU"))?;
        let like = self.shown.get().map(|shown| &shown.entries[..]);
        let cpuid = super::cpuid::for_vcpu(&self.kvm, id, count, self.baseline, like)?;
        fd.set_cpuid2(&cpuid).map_err(ioctl("KVM_SET_CPUID2"))?;
        self.shown.get_or_init(|| Shown { entries: cpuid.as_slice().to_vec(), tsc_khz: fd.get_tsc_khz().unwrap_or(0) });
        Ok(Vcpu::new(id, fd))
    }

    /// Has a signalled `event` raise the interrupt line `gsi`, without waking the monitor.
    pub fn route_interrupt(&self, event: &EventFd, gsi: u32) -> Result<(), Error> {
        self.fd.register_irqfd(event, gsi).map_err(ioctl("KVM_IRQFD"))
    }

    /// Has a 32-bit write of `value` to the guest address `at` signal `event`, without waking the monitor.
    pub fn route_doorbell(&self, event: &EventFd, at: u64, value: u32) -> Result<(), Error> {
        self.fd.register_ioevent(event, &IoEventAddress::Mmio(at), value).map_err(ioctl("KVM_IOEVENTFD"))
    }
}
