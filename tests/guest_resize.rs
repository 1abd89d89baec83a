//! Vertical scaling: the same machine with more vCPUs and memory, and with less again, live and from snapshots.

mod common;

use std::hint::black_box;
use std::process::exit;
use std::thread;
use std::time::Duration;

use common::monitor::own_memory;
use common::naps::{Swept, wake, wake_with};
use common::ran::catnap_with;
use common::{Machine, PATIENCE, Ran, catnap, inside, machine, within};
use serde_json::Value;

const MIB: u64 = 1 << 20;

/// A machine of 1 vCPU and 256 MiB that can have 4 and 1 GiB.
fn growing(name: &str) -> common::Builder {
    machine(name).publish(80).with(["--max-cpus", "4", "--max-memory", "1G"])
}

fn resize(machine: &Machine, options: &[&str]) -> Ran {
    catnap_with(["resize", "--json", &machine.name].iter().chain(options))
}

/// MemTotal in the guest, in bytes.
fn total(machine: &Machine) -> u64 {
    let line = machine.sh("grep MemTotal /proc/meminfo");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).expect("a number") * 1024
}

/// The guest, its page, and `ps` agree on its size. The kernel keeps some of the memory that it booted with.
fn has(machine: &Machine, cpus: u64, memory_mib: u64) {
    // First the page, for it is what visitors see first.
    let status = machine.status();
    assert_eq!(status["cpus"].as_u64(), Some(cpus), "{status}");
    assert_eq!(machine.sh("nproc"), cpus.to_string());
    let memory = memory_mib * MIB;
    for seen in [status["memory_bytes"].as_u64().expect("a number"), total(machine)] {
        assert!(seen <= memory && seen >= memory - 64 * MIB, "{} MiB of {memory_mib}", seen / MIB);
    }
    let view = machine.view();
    assert_eq!((view["cpus"].as_u64(), view["memory_bytes"].as_u64()), (Some(cpus), Some(memory)), "{view}");
}

/// What must be the same before and after, for the guest to have gone on.
fn same(machine: &Machine) -> [Value; 2] {
    let status = machine.status();
    ["nonce", "boot_id"].map(|field| status[field].clone())
}

fn reached(told: &Value) -> (u64, u64) {
    let reached = &told["reached"];
    (reached["cpus"].as_u64().expect("vCPUs"), reached["memory"].as_u64().expect("memory") / MIB)
}

#[test]
fn a_running_machine_grows_and_shrinks() {
    let anna = growing("anna").boot();
    each!(anna;
        it_grows_and_shrinks_in_both, one_can_stay_as_it_is, what_cannot_be_is_refused_with_what_can,
        a_paused_machine_is_not_resized, the_monitor_does_not_grow, the_size_is_kept_for_the_next_boot);
}

fn it_grows_and_shrinks_in_both(anna: &Machine) {
    has(anna, 1, 256);
    let (before, small) = (same(anna), total(anna));
    let told = resize(anna, &["--cpus", "4", "--memory", "1G"]).succeeds().json();
    assert_eq!(reached(&told), (4, 1024));
    has(anna, 4, 1024);
    // All that was plugged in can be used.
    assert!(total(anna) - small >= 760 * MIB, "{small} {}", total(anna));
    let movable = anna.sh("cat /sys/devices/system/memory/memory*/valid_zones | grep -c Movable");
    assert!(movable.parse::<u32>().expect("a number") >= 6, "{movable}");
    let told = resize(anna, &["--flavor", "cat"]).succeeds().json();
    assert_eq!(reached(&told), (2, 512));
    has(anna, 2, 512);
    assert_eq!(same(anna), before);
}

fn one_can_stay_as_it_is(anna: &Machine) {
    resize(anna, &["--cpus", "3"]).succeeds();
    has(anna, 3, 512);
    resize(anna, &["--memory", "640M"]).succeeds();
    has(anna, 3, 640);
    resize(anna, &["--memory", "640M"]).succeeds();
    has(anna, 3, 640);
}

fn what_cannot_be_is_refused_with_what_can(anna: &Machine) {
    resize(anna, &["--cpus", "5"]).refuses(4, &["1 to 4 vCPUs", "256M to 1G", "--cold --cpus 5"]);
    resize(anna, &["--memory", "2G"]).refuses(4, &["256M to 1G", "--cold"]);
    resize(anna, &["--memory", "128M"]).refuses(4, &["256M", "catnap start anna"]);
    resize(anna, &["--memory", "257M"]).refuses(2, &["steps of 2M", "--memory 258M"]);
    resize(anna, &[]).refuses(2, &["no size"]);
    catnap(&["resize", "nobody", "--cpus", "2"]).refuses(3, &["nobody"]);
    has(anna, 3, 640);
}

fn a_paused_machine_is_not_resized(anna: &Machine) {
    anna.catnap("pause").succeeds();
    resize(anna, &["--cpus", "4"]).refuses(4, &["paused"]);
    anna.catnap("resume").succeeds();
    has(anna, 3, 640);
}

fn the_monitor_does_not_grow(anna: &Machine) {
    let cycle = || {
        resize(anna, &["--cpus", "4", "--memory", "768M"]).succeeds();
        resize(anna, &["--cpus", "1", "--memory", "256M"]).succeeds();
    };
    cycle();
    let before = own_memory(anna.pid(), 256);
    for _ in 0..rounds() / 2 {
        cycle();
    }
    let after = own_memory(anna.pid(), 256);
    println!("    {before} KiB, {after} KiB after {} rounds", rounds() / 2);
    assert!(after <= before + 512, "{before} KiB, then {after} KiB");
    has(anna, 1, 256);
}

fn the_size_is_kept_for_the_next_boot(anna: &Machine) {
    resize(anna, &["--cpus", "2", "--memory", "320M"]).succeeds();
    anna.sh("reboot -f >/dev/null 2>&1 &");
    within(PATIENCE, "it has rebooted", || anna.everything()["monitor"]["boots"] == 2);
    within(PATIENCE, "its agent answers", || !anna.boot_id().is_empty());
    has(anna, 2, 320);
    anna.stop();
    // A machine that does not run can be resized too, and smaller than it was.
    resize(anna, &["--cpus", "1", "--memory", "192M"]).succeeds();
    anna.start();
    has(anna, 1, 192);
}

/// So many cycles: more when a person wants to wait for them.
fn rounds() -> u32 {
    std::env::var("CATNAP_TEST_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(6)
}

#[test]
fn a_snapshot_wakes_bigger_and_smaller() {
    let _swept = Swept;
    let anna = growing("anna").boot();
    anna.sh("echo kept >/tmp/note; sleep 1000 </dev/null >/dev/null 2>&1 & echo $! >/tmp/sleeper");
    anna.snapshot("small", &[]);
    each!(anna;
        it_wakes_in_another_size, a_resized_machine_is_snapshotted_and_wakes, a_disk_grows_and_never_shrinks,
        sizes_outside_the_envelope_take_another_boot, clones_have_a_size_too);
}

fn lives_on(woken: &Machine, before: &[Value; 2]) {
    assert_eq!(same(woken), *before);
    assert_eq!(woken.sh("kill -0 $(cat /tmp/sleeper) && cat /tmp/note"), "kept");
}

fn it_wakes_in_another_size(anna: &Machine) {
    let before = same(anna);
    let (bella, told) = wake("anna@small", "bella", &["--cpus", "4", "--memory", "1G"]);
    // The first thing that anybody asks of it.
    has(&bella, 4, 1024);
    assert_eq!(reached(&told["resized"]), (4, 1024));
    lives_on(&bella, &before);
    bella.snapshot("big", &[]);
    drop(bella);
    let (carla, _) = wake("bella@big", "carla", &["--cpus", "2", "--memory", "512M"]);
    has(&carla, 2, 512);
    lives_on(&carla, &before);
    let (bella, told) = wake("bella@big", "bella", &[]);
    assert_eq!(told["resized"], Value::Null);
    has(&bella, 4, 1024);
    lives_on(&bella, &before);
}

fn a_resized_machine_is_snapshotted_and_wakes(anna: &Machine) {
    let before = same(anna);
    resize(anna, &["--cpus", "3", "--memory", "768M"]).succeeds();
    anna.sh("mount -t tmpfs none /mnt; head -c 40000000 /dev/urandom >/mnt/random; sha256sum /mnt/random >/mnt/sum");
    anna.snapshot("filled", &[]);
    anna.sh("rm /mnt/random");
    resize(anna, &["--cpus", "1", "--memory", "256M"]).succeeds();
    let taken = anna.snapshot("emptied", &[]);
    // Nothing is written of memory that was given back.
    assert!(taken["bytes_written"].as_u64().expect("bytes") < 64 * MIB, "{taken}");
    let (bella, _) = wake("anna@filled", "bella", &[]);
    has(&bella, 3, 768);
    bella.sh("sha256sum -c /mnt/sum");
    drop(bella);
    let (bella, _) = wake("anna@emptied", "bella", &["--memory", "512M"]);
    has(&bella, 1, 512);
    lives_on(&bella, &before);
    catnap(&["snapshot", "diff", "anna@filled", "anna@emptied"]).succeeds();
    catnap(&["snapshot", "verify", "anna@emptied"]).succeeds();
}

fn a_disk_grows_and_never_shrinks(_: &Machine) {
    let size = |machine: &Machine| -> u64 {
        let said = machine.sh("df -k / | tail -n 1");
        said.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number")
    };
    let (bella, _) = wake("anna@small", "bella", &[]);
    let small = size(&bella);
    drop(bella);
    for cold in [&["--disk-size", "3G"][..], &["--disk-size", "3G", "--cold"]] {
        let (bella, _) = wake("anna@small", "bella", cold);
        within(PATIENCE, "the filesystem has grown", || size(&bella) > 2_500_000);
        assert!(size(&bella) > small, "{small} KiB");
        bella.sh("dd if=/dev/zero of=/root/big bs=1M count=16 conv=fsync 2>/dev/null");
        let said = bella.sh("dmesg");
        assert!(!said.contains("EXT4-fs error"), "{said}");
        bella.stop();
        bella.filesystem_is_clean();
    }
    let (_bella, ran) = wake_with("anna@small", "bella", &["--disk-size", "64M"]);
    ran.refuses(4, &["only grows", "--disk-size"]);
}

fn sizes_outside_the_envelope_take_another_boot(_: &Machine) {
    let wide = ["--cpus", "5", "--memory", "512M"];
    let (_none, ran) = wake_with("anna@small", "bella", &wide);
    ran.refuses(4, &["1 to 4 vCPUs", "catnap restore anna@small --name bella --cold --cpus 5 --memory 512M"]);
    let (bella, told) = wake("anna@small", "bella", &[&wide[..], &["--cold"]].concat());
    assert_eq!(told["resumed"], false);
    has(&bella, 5, 512);
    drop(bella);
    let (_none, ran) = wake_with("anna@small", "bella", &["--memory", "128M"]);
    ran.refuses(4, &["256M to 1G", "--cold"]);
}

fn clones_have_a_size_too(_: &Machine) {
    let bella = Machine::named("bella");
    catnap(&["clone", "anna@small", "bella", "--cpus", "2", "--memory", "384M"]).succeeds();
    assert_eq!(bella.sh("nproc"), "2");
    assert!((320..=384).contains(&(total(&bella) / MIB)));
}

#[test]
fn a_guest_that_does_not_follow_keeps_what_it_has() {
    let _swept = Swept;
    let anna = growing("anna").with(["--append", "nr_cpus=1"]).boot();
    each!(anna; vcpus_that_it_refuses_are_taken_back, memory_in_use_is_not_taken, a_restore_says_so_too);
}

fn vcpus_that_it_refuses_are_taken_back(anna: &Machine) {
    let ran = resize(anna, &["--cpus", "3"]).refuses(4, &["1 vCPU ", "not 3"]);
    assert_eq!(reached(&ran.json()), (1, 256));
    has(anna, 1, 256);
    let ran = resize(anna, &["--cpus", "2", "--memory", "768M"]).exits(4);
    assert_eq!(reached(&ran.json()), (1, 768));
    has(anna, 1, 768);
}

fn memory_in_use_is_not_taken(anna: &Machine) {
    anna.sh("mount -t tmpfs -o size=900m none /mnt; head -c 400m /dev/zero >/mnt/zeros");
    let ran = resize(anna, &["--memory", "256M"]).refuses(4, &["free"]);
    let (_, left) = reached(&ran.json());
    println!("    {left} MiB are left");
    assert!((400..768).contains(&left), "{left}");
    has(anna, 1, left);
    anna.sh("rm /mnt/zeros");
    resize(anna, &["--memory", "256M"]).succeeds();
    has(anna, 1, 256);
}

fn a_restore_says_so_too(anna: &Machine) {
    anna.snapshot("one", &[]);
    let (bella, ran) = wake_with("anna@one", "bella", &["--cpus", "2", "--memory", "512M"]);
    let ran = ran.refuses(4, &["bella has 1 vCPU and 512M"]);
    assert_eq!(reached(&ran.json()["resized"]), (1, 512));
    has(&bella, 1, 512);
}

const CHURN: &str = "soak_cycles_lose_no_page_while_all_vcpus_are_busy";

/// Up, snapshot, wake smaller, snapshot, wake bigger …: each machine goes on where the last one was, with four
/// threads that write and check memory all the time.
#[test]
fn soak_cycles_lose_no_page_while_all_vcpus_are_busy() {
    if inside::here().is_some() {
        churn();
    }
    let _swept = Swept;
    let anna = growing("anna").boot();
    anna.send_program();
    anna.sh(&format!(
        "CATNAP_INSIDE=churn setsid {} --exact {CHURN} --nocapture </dev/null >/tmp/churn 2>&1 & echo $! >/tmp/pid",
        inside::PROGRAM
    ));
    let mut awake = anna;
    let before = same(&awake);
    for round in 0..rounds() {
        let (cpus, memory) = if round % 2 == 0 { ("4", "768M") } else { ("2", "384M") };
        let name = if round % 2 == 0 { "bella" } else { "anna" };
        let tag = format!("round-{round}");
        awake.snapshot(&tag, &[]);
        let snapshot = format!("{}@{tag}", awake.name);
        drop(awake);
        awake = wake(&snapshot, name, &["--cpus", cpus, "--memory", memory]).0;
        has(&awake, cpus.parse().expect("a number"), memory.trim_end_matches('M').parse().expect("a number"));
        goes_on(&awake);
    }
    assert_eq!(same(&awake), before);
    let said = awake.sh("dmesg");
    assert!(!said.contains("BUG") && !said.contains("Call Trace"), "{said}");
}

/// The guest's half finds its memory as it left it, and gets on.
fn goes_on(machine: &Machine) {
    let rounds =
        || -> usize { machine.sh("kill -0 $(cat /tmp/pid) && grep -c round /tmp/churn || true").parse().unwrap_or(0) };
    let before = rounds();
    within(PATIENCE, "memory is checked again", || rounds() >= before + 5);
    assert_eq!(machine.sh("grep -c LOST /tmp/churn || true"), "0");
}

/// In the guest: four threads, each with memory of its own that it fills, checks and fills with something else.
fn churn() -> ! {
    const WORDS: usize = (20 * MIB / 8) as usize;
    let mix = |word: usize, seed: u64| (word as u64 ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let threads: Vec<_> = (0..4u64)
        .map(|thread| {
            thread::spawn(move || {
                let mut memory = vec![0; WORDS];
                for seed in (thread << 32).. {
                    memory.iter_mut().enumerate().for_each(|(at, word)| *word = mix(at, seed));
                    black_box(&mut memory);
                    if let Some(at) = memory.iter().enumerate().position(|(at, word)| *word != mix(at, seed)) {
                        println!("LOST word {at} of thread {thread}");
                        exit(1);
                    }
                    println!("round of thread {thread}");
                    thread::sleep(Duration::from_millis(1));
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| drop(thread.join()));
    exit(1)
}
