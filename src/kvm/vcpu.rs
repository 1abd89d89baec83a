use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use kvm_ioctls::{VcpuExit, VcpuFd};

use super::state::vcpu::Host;
use super::{Address, End, Entry, Error, Io, VcpuState, entry};
use crate::sys::kick;

/// One vCPU.
///
/// Its thread holds the lock while it runs guest code; a paused machine is one whose vCPU locks can be had.
pub struct Vcpu {
    id: u32,
    fd: Mutex<VcpuFd>,
    /// `kvm_run.immediate_exit` of `fd`: when it is not zero, KVM_RUN returns at once.
    immediate_exit: *const AtomicU8,
    /// Whom to signal when it must leave guest mode.
    thread: OnceLock<kick::Thread>,
}

// SAFETY: the pointer leads into the kvm_run mapping that `fd` owns, which lives exactly as long as this
// value and does not move; the kernel reads the byte at any time, and all our accesses are atomic.
unsafe impl Send for Vcpu {}
// SAFETY: as above; everything else is behind the mutex.
unsafe impl Sync for Vcpu {}

/// Why a vCPU came back from guest mode for good.
pub(super) enum Left {
    /// It was kicked.
    Kicked,
    /// The guest, or KVM, ended the machine.
    Ended(End),
}

impl Vcpu {
    pub(super) fn new(id: u32, mut fd: VcpuFd) -> Vcpu {
        let immediate_exit = (&raw const fd.get_kvm_run().immediate_exit).cast();
        Vcpu { id, fd: Mutex::new(fd), immediate_exit, thread: OnceLock::new() }
    }

    /// The vCPU's number, which is its local APIC's ID too.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Sets what firmware leaves on every processor and, on the first, the kernel's entry. The others wait
    /// for INIT and SIPI, which is how KVM makes them.
    pub fn reset(&self, entry: Entry) -> Result<(), Error> {
        let fd = self.lock();
        entry::as_firmware_leaves_it(&fd)?;
        if self.id == 0 { entry.apply(&fd) } else { Ok(()) }
    }

    /// The state of a vCPU that stands still.
    pub(super) fn save(&self, host: &Host) -> Result<VcpuState, Error> {
        VcpuState::save(&self.lock(), host)
    }

    /// Tells the guest that it was stopped on purpose, so that its watchdogs do not take the pause for a hang.
    /// A vCPU whose kvm-clock is off has nobody to tell (KVM API, KVM_KVMCLOCK_CTRL: EINVAL).
    pub(super) fn excuse_pause(&self) {
        let _ = self.lock().kvmclock_ctrl();
    }

    /// Waits for the vCPU to stand still and keeps it there for as long as the guard lives.
    pub(super) fn lock(&self) -> MutexGuard<'_, VcpuFd> {
        self.fd.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on the calling thread runs this vCPU.
    pub(super) fn belongs_to_this_thread(&self) {
        self.thread.get_or_init(kick::current);
    }

    /// Brings the vCPU out of guest mode, or keeps it from entering, so that its thread looks at its orders.
    pub(super) fn kick(&self) {
        self.ask_to_leave();
        if let Some(thread) = self.thread.get() {
            // A thread that has gone (ESRCH) runs nothing.
            let _ = kick::kick(*thread);
        }
    }

    /// Makes the next KVM_RUN return at once.
    fn ask_to_leave(&self) {
        // SAFETY: see `Send`: the byte lives as long as `self`.
        unsafe { &*self.immediate_exit }.store(1, Ordering::SeqCst);
    }

    fn may_enter(&self) {
        // SAFETY: see `Send`: the byte lives as long as `self`.
        unsafe { &*self.immediate_exit }.store(0, Ordering::SeqCst);
    }

    /// Runs guest code until `stop` says so after a kick, or the guest ends. On the way out, an access that
    /// KVM has handed us and not yet finished is finished, so that registers can be read (KVM API 5,
    /// `kvm_run`: "userspace must re-enter the guest with KVM_RUN to complete the operation").
    pub(super) fn run(&self, io: &dyn Io, stop: impl Fn() -> bool) -> Left {
        let mut fd = self.lock();
        loop {
            // Cleared before `stop` is asked: a kick that comes in between is seen by one or the other.
            self.may_enter();
            if stop() {
                // An access that KVM handed over counts as done only at the next KVM_RUN.
                self.ask_to_leave();
                loop {
                    match enter(&mut fd, io) {
                        Step::Done => {} // one part of an access that KVM hands over in several
                        Step::Interrupted => return Left::Kicked,
                        Step::Ended(end) => return Left::Ended(end),
                    }
                }
            }
            loop {
                match enter(&mut fd, io) {
                    Step::Done => {}
                    Step::Interrupted => break,
                    Step::Ended(end) => return Left::Ended(end),
                }
            }
        }
    }
}

/// What one KVM_RUN came to.
enum Step {
    /// An exit was worked off.
    Done,
    /// A signal or `immediate_exit` brought the vCPU back, with nothing left to finish.
    Interrupted,
    /// The machine cannot go on.
    Ended(End),
}

/// One KVM_RUN, and the work that its exit brings.
fn enter(fd: &mut VcpuFd, io: &dyn Io) -> Step {
    let crash = |why: String| Step::Ended(End::Crash(why));
    match fd.run() {
        Ok(VcpuExit::MmioRead(address, data)) => io.read(Address::Memory(address), data),
        Ok(VcpuExit::MmioWrite(address, data)) => io.write(Address::Memory(address), data),
        Ok(VcpuExit::IoIn(port, data)) => {
            let data = std::ptr::from_mut(data);
            let size = port_size(fd);
            // SAFETY: `data` points into the kvm_run mapping of `fd`, which is borrowed and not re-entered
            // here; looking at another field of kvm_run meanwhile does not invalidate it.
            unsafe { &mut *data }.chunks_exact_mut(size).for_each(|data| io.read(Address::Port(port), data));
        }
        Ok(VcpuExit::IoOut(port, data)) => {
            let data = std::ptr::from_ref(data);
            let size = port_size(fd);
            // SAFETY: as for IoIn.
            unsafe { &*data }.chunks_exact(size).for_each(|data| io.write(Address::Port(port), data));
        }
        // A triple fault: the guest's own way to say that it is past help.
        Ok(VcpuExit::Shutdown) => return crash("the guest's CPU shut down (triple fault)".into()),
        Ok(VcpuExit::FailEntry(reason, cpu)) => {
            return crash(format!("vCPU {cpu} could not enter the guest (hardware reason {reason:#x})"));
        }
        Ok(VcpuExit::InternalError) => return crash("KVM could not emulate an instruction".into()),
        Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt) => {}
        Ok(other) => return crash(format!("KVM left the guest for a reason unknown to us: {other:?}")),
        Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => return Step::Interrupted,
        Err(e) => return crash(format!("KVM_RUN failed: {e}")),
    }
    Step::Done
}

/// The width in bytes of each access of the port exit that was just taken: string instructions bring many.
fn port_size(fd: &mut VcpuFd) -> usize {
    // SAFETY: KVM_RUN has just returned with KVM_EXIT_IO, for which `io` is the valid member of the union.
    let size = unsafe { fd.get_kvm_run().__bindgen_anon_1.io.size };
    usize::from(size).max(1)
}
