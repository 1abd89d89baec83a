//! Machines of every size boot, and are what was asked for.

mod common;

use common::{Machine, inside, machine, minimal_kernel};

#[test]
fn a_small_machine_boots_and_is_healthy() {
    let anna = machine("anna").memory("128M").with(["--append", "purr=1"]).boot();
    each!(anna; it_has_what_was_asked_for, its_kernel_has_no_complaints, its_clock_is_right, it_has_entropy);
}

fn it_has_what_was_asked_for(anna: &Machine) {
    assert_eq!(anna.sh("nproc"), "1");
    assert_eq!(anna.sh("hostname"), "anna");
    assert_eq!(anna.sh("grep -o purr=1 /proc/cmdline"), "purr=1");
    assert!((90..128).contains(&mebibytes(anna)), "{} MiB", mebibytes(anna));
    assert_eq!(anna.sh("touch /root/it && echo written"), "written");
}

fn its_kernel_has_no_complaints(anna: &Machine) {
    let said = without_the_labs_quirk(&anna.sh("dmesg"));
    for bad in ["BUG", "WARNING", "Call Trace", "ACPI Error", "ACPI BIOS", "I/O error", "soft lockup", "rcu: INFO"] {
        assert!(!said.contains(bad), "{bad}: {said}");
    }
}

/// The lab's QEMU keeps a guest's XSETBV from KVM, which then cannot keep its CPUID true; no monitor can help it.
fn without_the_labs_quirk(said: &str) -> String {
    let parts = said.split("[ cut here ]").map(|part| match part.split_once("[ end trace") {
        Some((quirk, after)) if quirk.contains("XSAVE consistency problem") => after,
        _ => part,
    });
    parts.collect()
}

fn its_clock_is_right(anna: &Machine) {
    let now = || std::time::UNIX_EPOCH.elapsed().expect("a clock").as_secs();
    let (before, guest, after) = (now(), anna.sh("date +%s").parse::<u64>().expect("seconds"), now());
    assert!((before - 1..=after + 1).contains(&guest), "{before} {guest} {after}");
}

fn it_has_entropy(anna: &Machine) {
    assert_eq!(anna.sh("cat /sys/class/misc/hw_random/rng_current"), "virtio_rng.0");
    let drawn = || anna.sh("head -c 16 /dev/hwrng | md5sum");
    assert_ne!(drawn(), drawn());
}

#[test]
fn four_vcpus_and_4_gib_are_really_there() {
    if inside::here().is_some() {
        return fill_memory();
    }
    // Where its memory is, pagemap tells.
    let (tiger, ran) = machine("tiger").cpus(4).memory("4G").publish(80).stock_kernel().try_to_boot();
    let host = std::thread::available_parallelism().map_or(1, usize::from);
    let warning = format!("4 vCPUs are wanted and this host has {host}: they take turns");
    assert_eq!(ran.succeeds().err.contains(&warning), host < 4);
    assert_eq!(tiger.sh("nproc"), "4");
    assert_eq!(tiger.status_of("cpus"), 4);
    assert!((3800..4096).contains(&mebibytes(&tiger)), "{} MiB", mebibytes(&tiger));
    assert!(tiger.sh("cat /proc/iomem").contains("100000000-13fffffff : System RAM"));
    // Each vCPU gets interrupts of its own and does work.
    tiger.sh("for cpu in 0 1 2 3; do taskset -c $cpu sh -c 'test $(cut -d\" \" -f39 /proc/self/stat) = '$cpu || exit 1; done");
    // Whole 2 MiB at a time, for the sake of speed.
    tiger.sh("echo always >/sys/kernel/mm/transparent_hugepage/enabled");
    tiger.other_half("four_vcpus_and_4_gib_are_really_there", "fill");
}

/// In the guest: fills memory from both sides of the hole below 4 GiB with numbers, and finds all of them again.
fn fill_memory() {
    const WORDS_PER_PAGE: usize = 512;
    let mut memory = vec![0u64; (1100 << 20) / 8];
    memory.iter_mut().enumerate().step_by(64).for_each(|(at, word)| *word = at as u64 ^ 0x00ca_7ca7);
    let frames = inside::frames(&memory);
    assert!(memory.iter().enumerate().step_by(64).all(|(at, word)| *word == at as u64 ^ 0x00ca_7ca7));
    let (high, low): (Vec<u64>, Vec<u64>) = frames.iter().partition(|frame| **frame >= 1 << 20);
    println!("{} MiB above 4 GiB, {} MiB below", high.len() >> 8, low.len() >> 8);
    assert!(frames.len() >= memory.len() / WORDS_PER_PAGE - 1, "{} pages", frames.len());
    assert!(high.len() >> 8 > 700 && low.len() >> 8 > 20);
}

/// MemTotal: what the kernel has left for programs.
fn mebibytes(machine: &Machine) -> u64 {
    machine.sh("awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo").parse().expect("a number")
}

#[test]
fn the_minimal_kernel_boots_from_both_of_its_files() {
    let Some(folder) = minimal_kernel() else {
        return println!("skipped: CATNAP_TEST_MINIMAL_KERNEL names no folder with bzImage and vmlinux");
    };
    for file in ["bzImage", "vmlinux"] {
        let anna = machine("anna").cpus(2).kernel(&folder.join(file)).publish(80).boot();
        assert_eq!(anna.sh("nproc"), "2");
        assert!(anna.get("/").text().contains("kitten"));
        anna.stop();
        assert_eq!(anna.state(), "stopped");
    }
}
