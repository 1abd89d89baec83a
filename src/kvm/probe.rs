//! Finds out whether this host's KVM runs guests for real.
//!
//! Some hosts have a `/dev/kvm` that answers every call and yet emulates the guest one instruction at a time
//! (kvm_pvm does so with all code that is not written for it, at some 2 million instructions a second). A
//! Linux guest would seem to hang on them. What gives them away on any host is speed, so the probe lets a
//! tiny guest count in a loop and looks how far it comes in a given time.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use std::{io, thread};

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::Error;
use crate::sys::kick;

/// The slowest KVM that we call real, in guest instructions a second. Emulators of single instructions reach
/// about 2 million. Real KVM runs thousands of millions, and still more than 100 million when the whole host
/// is itself emulated by QEMU's TCG; this lies between, with room on both sides.
pub const SLOWEST: u64 = 20_000_000;

/// Where the kernel shows that KVM is the paravirtual one.
const PVM: &str = "/sys/module/kvm_pvm";

/// How KVM fared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Whether a Linux guest can be run.
    pub usable: bool,
    /// What the probe guest reached.
    pub instructions_per_second: u64,
    /// Why, in words for a person.
    pub reason: String,
}

/// Opens `/dev/kvm` and lets a tiny guest run for at most `budget` (200 ms are enough).
pub fn probe(budget: Duration) -> Result<Verdict, Error> {
    let kvm = super::open()?;
    let run = measure(&kvm, budget)?;
    Ok(judge(run, Path::new(PVM).exists()))
}

/// How far the probe guest came.
#[derive(Clone, Copy, Debug)]
struct Run {
    instructions: u64,
    /// Processor time of the thread that ran it: on a busy host less than what the clock on the wall shows.
    took: Duration,
}

fn judge(run: Run, pvm: bool) -> Verdict {
    // Less than a millisecond says nothing; to divide by it would say too much.
    let nanos = run.took.max(Duration::from_millis(1)).as_nanos();
    let speed = (u128::from(run.instructions) * 1_000_000_000 / nanos) as u64;
    let usable = speed >= SLOWEST;
    let millions = speed as f64 / 1e6;
    let mut reason = match usable {
        true => format!("KVM runs guests at {millions:.0} million instructions a second"),
        false => format!(
            "KVM runs guests at {millions:.1} million instructions a second: it emulates them, and Linux would \
             take hours to boot"
        ),
    };
    if pvm {
        reason.push_str(" (it is the paravirtual kvm_pvm)");
    }
    Verdict { usable, instructions_per_second: speed, reason }
}

/// The guest: 64-bit code, because old processors emulate real mode even on real KVM.
///
/// ```text
/// again: add rax, rcx
///        xor rdx, rax
///        dec rcx
///        jnz again
///        hlt
/// ```
const CODE: [u8; 12] = [0x48, 0x01, 0xc8, 0x48, 0x31, 0xc2, 0x48, 0xff, 0xc9, 0x75, 0xf5, 0xf4];
/// Instructions in the loop.
const LOOP: u64 = 4;
/// Times around it: a real processor is done in about 20 ms.
const ROUNDS: u64 = 20_000_000;

/// Where things lie in the guest's memory: three levels of page tables, each a page, and the code.
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const START: u64 = 0x4000;
const MEMORY: usize = 0x10000;

fn measure(kvm: &Kvm, budget: Duration) -> Result<Run, Error> {
    kick::install().map_err(|cause| Error::Probe { call: "a signal handler", cause })?;
    let memory = memory().map_err(|cause| Error::Probe { call: "memory for the probe guest", cause })?;
    let vm = kvm.create_vm().map_err(call("KVM_CREATE_VM"))?;
    give_memory(&vm, &memory)?;
    if kvm.check_extension(Cap::SetTssAddr) {
        // Intel's processors want three pages below 4 GiB for themselves, with some modes of the guest.
        vm.set_tss_address(0xfffb_d000).map_err(call("KVM_SET_TSS_ADDR"))?;
    }
    let mut vcpu = vm.create_vcpu(0).map_err(call("KVM_CREATE_VCPU"))?;
    set_registers(&vcpu)?;

    let done = AtomicBool::new(false);
    let runner = kick::current();
    let took = thread::scope(|scope| {
        let timer = scope.spawn(|| {
            thread::park_timeout(budget);
            // A signal that comes between two calls is lost, so one is not enough.
            while !done.load(Ordering::Acquire) {
                let _ = kick::kick(runner);
                thread::park_timeout(Duration::from_millis(1));
            }
        });
        let took = run(&mut vcpu, budget);
        done.store(true, Ordering::Release);
        timer.thread().unpark();
        took
    })?;
    let left = vcpu.get_regs().map_err(call("KVM_GET_REGS"))?.rcx;
    // A KVM that returns nonsense has done no work.
    let rounds = ROUNDS.saturating_sub(left);
    Ok(Run { instructions: rounds * LOOP, took })
}

/// Runs the guest until it halts or the budget is used up.
fn run(vcpu: &mut VcpuFd, budget: Duration) -> Result<Duration, Error> {
    let (began, used_before) = (Instant::now(), processor_time()?);
    loop {
        match vcpu.run() {
            Ok(VcpuExit::Hlt) => break,
            Ok(VcpuExit::Intr) => {}
            Ok(exit) => {
                let cause = io::Error::other(format!("it left with {exit:?}"));
                return Err(Error::Probe { call: "to run the probe guest", cause });
            }
            Err(errno) if matches!(errno.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(errno) => return Err(call("KVM_RUN")(errno)),
        }
        if began.elapsed() >= budget {
            break;
        }
    }
    Ok(processor_time()?.saturating_sub(used_before))
}

/// What the calling thread has used of a processor so far, guest code included.
fn processor_time() -> Result<Duration, Error> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid timespec that the call fills in.
    match unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) } {
        0 => Ok(Duration::new(time.tv_sec as u64, time.tv_nsec as u32)),
        _ => Err(Error::Probe { call: "the time", cause: io::Error::last_os_error() }),
    }
}

/// Page tables that map the first 2 MiB onto themselves (AMD64 manual, volume 2, section 5.3), and the code.
fn memory() -> io::Result<GuestMemoryMmap<()>> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).map_err(io::Error::other)?;
    for (table, entry) in
        [(PML4, PDPT | PRESENT_WRITABLE), (PDPT, PD | PRESENT_WRITABLE), (PD, PRESENT_WRITABLE | LARGE)]
    {
        memory.write_obj(entry, GuestAddress(table)).map_err(io::Error::other)?;
    }
    memory.write_slice(&CODE, GuestAddress(START)).map_err(io::Error::other)?;
    Ok(memory)
}

fn give_memory(vm: &VmFd, memory: &GuestMemoryMmap<()>) -> Result<(), Error> {
    let address = memory
        .get_host_address(GuestAddress(0))
        .map_err(|error| Error::Probe { call: "memory for the probe guest", cause: io::Error::other(error) })?;
    let region = kvm_userspace_memory_region {
        memory_size: MEMORY as u64,
        userspace_addr: address as u64,
        ..Default::default()
    };
    // SAFETY: `memory` is one mapping of MEMORY bytes that outlives the VM's only vCPU: both belong to
    // `measure`, which declares the memory first. Nothing in this process keeps references into it.
    unsafe { vm.set_user_memory_region(region) }.map_err(call("KVM_SET_USER_MEMORY_REGION"))
}

/// Straight into 64-bit mode: paging on, flat segments, no tables of descriptors, as no segment is loaded.
fn set_registers(vcpu: &VcpuFd) -> Result<(), Error> {
    let sregs = vcpu.get_sregs().map_err(call("KVM_GET_SREGS"))?;
    let code =
        kvm_segment { limit: 0xffff_ffff, selector: 8, type_: 11, present: 1, l: 1, s: 1, g: 1, ..Default::default() };
    let data = kvm_segment { selector: 16, type_: 3, l: 0, db: 1, ..code };
    let sregs = kvm_sregs {
        cs: code,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        idt: kvm_dtable::default(),
        cr0: 0x8000_0031, // PG, NE, ET, PE
        cr3: PML4,
        cr4: 0x20,   // PAE
        efer: 0x500, // LMA, LME
        ..sregs
    };
    vcpu.set_sregs(&sregs).map_err(call("KVM_SET_SREGS"))?;
    let regs = kvm_regs { rip: START, rcx: ROUNDS, rflags: 2, ..Default::default() };
    vcpu.set_regs(&regs).map_err(call("KVM_SET_REGS"))
}

fn call(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> Error {
    move |errno| Error::Probe { call, cause: errno.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn emulators_are_told_from_real_kvm_by_their_speed() {
        let run = |instructions, millis| Run { instructions, took: Duration::from_millis(millis) };
        // As measured: kvm_pvm; KVM inside QEMU's TCG; a processor of today.
        for (run, usable) in [(run(400_000, 200), false), (run(20_000_000, 200), true), (run(80_000_000, 20), true)] {
            assert_eq!(judge(run, false).usable, usable, "{run:?}");
        }
        let nothing = judge(run(0, 0), true);
        assert!(!nothing.usable && nothing.reason.contains("kvm_pvm"));
    }

    #[test]
    fn the_host_is_judged_in_time_and_kvm_pvm_is_found_out() {
        let began = Instant::now();
        match probe(Duration::from_millis(200)) {
            Ok(verdict) => {
                eprintln!("{verdict:?} in {:?}", began.elapsed());
                assert_eq!(verdict.usable, verdict.instructions_per_second >= SLOWEST);
                if Path::new(PVM).exists() {
                    assert!(!verdict.usable, "{verdict:?}");
                }
            }
            Err(error) => assert!(matches!(error, Error::Missing | Error::Denied), "{error}"),
        }
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    }
}
