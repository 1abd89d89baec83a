//! Live snapshots: the guest goes on, and wakes from them exactly as it was.

mod common;

use std::thread::sleep;
use std::time::{Duration, Instant};

use common::naps::{Swept, wake};
use common::{Machine, catnap, http, machine};

#[test]
fn a_machine_wakes_as_it_fell_asleep() {
    let _swept = Swept;
    let anna = machine("anna").cpus(2).publish(80).boot();
    each!(anna;
        the_guest_goes_on_while_it_is_taken, a_woken_guest_goes_on_where_it_was, its_clocks_are_right,
        an_idle_guest_writes_little, differences_of_differences_wake_too, the_original_is_not_disturbed, cold_is_another_boot,
        a_copy_of_a_machine_that_runs_is_somebody_else, hooks_are_run, names_are_not_taken_twice);
    anna.stop();
    anna.disk_is_sound();
}

fn the_guest_goes_on_while_it_is_taken(anna: &Machine) {
    for _ in 0..3 {
        anna.get("/").text();
    }
    anna.sh("echo kept in memory >/tmp/note; sleep 1000 </dev/null >/dev/null 2>&1 & echo $! >/tmp/sleeper");
    anna.sh("dd if=/dev/zero of=/root/big bs=64k count=200 2>/dev/null; echo on the disk >/root/note; sync");
    let before = anna.status();
    let taken = anna.snapshot("one", &["-m", "the first"]);
    let after = anna.status();
    assert_eq!((&taken["name"], &taken["kind"]), (&"anna@one".into(), &"live".into()));
    assert!(taken["pause_us"].as_u64().expect("a pause") > 0);
    assert!(taken["bytes_written"].as_u64().expect("bytes") > 10 << 20);
    assert!(taken["digest"].as_str().expect("a digest").starts_with("sha256:"));
    for same in ["nonce", "boot_id", "generation"] {
        assert_eq!(before[same], after[same]);
    }
    catnap(&["snapshot", "verify", "anna@one"]).succeeds();
}

fn a_woken_guest_goes_on_where_it_was(anna: &Machine) {
    let before = anna.status();
    let (bella, told) = wake("anna@one", "bella", &[]);
    assert_eq!((&told["resumed"], &told["kind"]), (&true.into(), &"live".into()));
    assert!(told["resume_us"].as_u64() < told["ready_us"].as_u64());
    let status = bella.status();
    for same in ["nonce", "boot_id", "cpus", "memory_bytes"] {
        assert_eq!(status[same], before[same], "{same}");
    }
    assert!(status["visits"].as_u64().expect("visits") >= 3);
    assert!(status["generation"].as_u64() > before["generation"].as_u64());
    // Processes, open files, memory and disk are there.
    assert_eq!(bella.sh("kill -0 $(cat /tmp/sleeper) && cat /tmp/note /root/note"), "kept in memory\non the disk");
    let seen = bella.status_of("ticks");
    sleep(Duration::from_millis(1100));
    assert!(bella.status_of("ticks") > seen);
    // It can be worked with: disk, guest book, and a clean end.
    http::post(bella.port(80), "/api/guestbook", r#"{"name":"Ben","message":"purr"}"#);
    bella.sh("dd if=/dev/urandom of=/root/more bs=64k count=50 conv=fsync 2>/dev/null");
    let said = bella.sh("dmesg");
    assert!(!said.contains("I/O error") && !said.contains("EXT4-fs error"), "{said}");
    let woken = bella.status_of("generation");
    bella.stop();
    bella.disk_is_sound();
    bella.start();
    assert_eq!(bella.sh("cat /root/note"), "on the disk");
    assert!(bella.status_of("generation") >= woken, "the guest book does not know its generation");
}

/// The time of day goes on with the world's, and the monotonic clock with the guest's own life.
fn its_clocks_are_right(anna: &Machine) {
    let uptime = |machine: &Machine| machine.sh("cut -d' ' -f1 /proc/uptime").parse::<f64>().expect("seconds");
    let (begun, before) = (Instant::now(), uptime(anna));
    anna.snapshot("clock", &[]);
    let asleep = Duration::from_secs(2);
    sleep(asleep);
    let (bella, _) = wake("anna@clock", "bella", &[]);
    let now = || std::time::UNIX_EPOCH.elapsed().expect("a clock").as_secs_f64();
    let asked = now();
    let said = bella.sh("adjtimex | sed -n 's/.*tv_u\\?sec: *//p'");
    let (answered, said) = (now(), said.lines().filter_map(|line| line.parse::<f64>().ok()).collect::<Vec<_>>());
    let guest = said[0] + said[1] / 1e6;
    println!("    its clock is between {:.3} and {:.3} s late", asked - guest, answered - guest);
    assert!((asked - 0.5..=answered + 0.5).contains(&guest), "{guest} is not between {asked} and {answered}");
    let lived = uptime(&bella) - before;
    let most = (begun.elapsed() - asleep).as_secs_f64();
    println!("    it has lived {lived:.2} s of {most:.2}");
    assert!((0.0..=most + 0.02).contains(&lived));
}

fn an_idle_guest_writes_little(anna: &Machine) {
    let ram = anna.view()["memory_bytes"].as_u64().expect("a size");
    let taken = anna.snapshot("two", &[]);
    let written = taken["bytes_written"].as_u64().expect("bytes");
    println!("    {} KiB of {} MiB changed", written >> 10, ram >> 20);
    assert!(written < ram / 10, "{written} of {ram}");
}

fn differences_of_differences_wake_too(anna: &Machine) {
    anna.sh("echo changed >/tmp/note");
    anna.snapshot("three", &[]);
    let nonce = anna.status()["nonce"].clone();
    let (bella, _) = wake("anna@three", "bella", &[]);
    assert_eq!(bella.sh("cat /tmp/note"), "changed");
    assert_eq!(bella.status()["nonce"], nonce);
    // The first snapshot of a machine that woke is a difference too.
    bella.sh("echo by bella >/tmp/note");
    let taken = bella.snapshot("four", &[]);
    let ram = bella.view()["memory_bytes"].as_u64().expect("a size");
    assert!(taken["bytes_written"].as_u64().expect("bytes") < ram / 4, "{taken}");
    drop(bella);
    let (carla, _) = wake("bella@four", "carla", &[]);
    assert_eq!(carla.sh("cat /tmp/note /root/note"), "by bella\non the disk");
}

fn the_original_is_not_disturbed(anna: &Machine) {
    assert_eq!(anna.sh("cat /tmp/note"), "changed");
    assert!(anna.sh("ls /root").lines().all(|name| name != "more"));
}

fn cold_is_another_boot(anna: &Machine) {
    let (bella, told) = wake("anna@one", "bella", &["--cold"]);
    assert_eq!(told["resumed"], false);
    assert_ne!(bella.boot_id(), anna.boot_id());
    assert_eq!(bella.sh("cat /root/note; ls /tmp/note 2>/dev/null || true"), "on the disk");
}

fn a_copy_of_a_machine_that_runs_is_somebody_else(anna: &Machine) {
    let identity = "cat /etc/machine-id /proc/sys/kernel/hostname";
    let (bella, _) = wake("anna@one", "bella", &[]);
    let both = [anna.sh(identity), bella.sh(identity)];
    assert_ne!(both[0].lines().next(), both[1].lines().next(), "the machine id");
    assert_eq!(both[1].lines().nth(1), Some("bella"));
}

fn hooks_are_run(anna: &Machine) {
    let hook = |folder: &str, does: &str| {
        let path = format!("/etc/catnap/{folder}/note");
        anna.sh(&format!("mkdir -p /etc/catnap/{folder}; printf '#!/bin/sh\n{does}\n' >{path}; chmod +x {path}"));
    };
    hook("quiesce.d", "echo $1 >>/root/quiesced");
    hook("wake.d", "echo $1 >/root/woken");
    anna.snapshot("hooked", &["--mode", "quiesced"]);
    assert_eq!(anna.sh("cat /root/quiesced"), "freeze\nthaw");
    anna.snapshot("woken", &[]);
    let (bella, _) = wake("anna@woken", "bella", &[]);
    assert_eq!(bella.sh("cat /root/woken"), bella.status_of("generation").to_string());
    drop(bella);
    let (bella, _) = wake("anna@hooked", "bella", &[]);
    assert_eq!(bella.sh("cat /root/quiesced"), "freeze", "what the hook wrote is in the snapshot");
    drop(bella);
    // One that fails is told of: there is no snapshot, and nothing stays frozen.
    hook("quiesce.d", "exit 3");
    anna.try_to_snapshot("never", &["--mode", "quiesced"]).refuses(1, &["quiesce.d/note"]);
    anna.sh("rm -r /etc/catnap/quiesce.d /etc/catnap/wake.d; touch /root/thawed");
}

fn names_are_not_taken_twice(anna: &Machine) {
    anna.try_to_snapshot("one", &[]).refuses(4, &["anna@one"]);
    catnap(&["restore", "anna@one"]).refuses(4, &["anna", "already"]);
    catnap(&["restore", "anna@never"]).refuses(3, &["anna@never"]);
    catnap(&["restore", "kitten", "--name", "bella"]).refuses(4, &["kitten"]);
    anna.snapshot("crashed", &["--mode", "crash"]);
    let (bella, told) = wake("anna@crashed", "bella", &[]);
    assert_eq!((&told["resumed"], &told["kind"]), (&false.into(), &"crash".into()));
    assert_eq!(bella.sh("cat /root/note"), "on the disk");
}

#[test]
fn eight_clones_are_eight_machines() {
    let _swept = Swept;
    let anna = machine("anna").boot();
    anna.snapshot("one", &[]);
    drop(anna);
    let clones = Clones(8);
    let told = catnap(&["clone", "--json", "anna@one", "kit", "--count", "8"]).succeeds().json();
    assert_eq!(told.as_array().map(Vec::len), Some(8));
    let mut drawn: Vec<[String; 3]> = Vec::new();
    for number in 1..=clones.0 {
        let name = format!("kit-{number}");
        let ask = "head -c 16 /dev/urandom | od -An -tx1; cat /proc/sys/kernel/random/uuid /etc/machine-id; hostname";
        let said = catnap(&["exec", &name, "--", "sh", "-c", ask]).succeeds().text();
        let lines: Vec<String> = said.lines().map(str::to_owned).collect();
        assert_eq!(lines[3], name);
        drawn.push([lines[0].clone(), lines[1].clone(), lines[2].clone()]);
    }
    for (at, one) in drawn.iter().enumerate() {
        assert!(drawn[..at].iter().all(|other| one.iter().zip(other).all(|(a, b)| a != b)), "{drawn:?}");
    }
}

/// Machines `kit-1` … that are removed at the end.
struct Clones(u32);

impl Drop for Clones {
    fn drop(&mut self) {
        for number in 1..=self.0 {
            drop(catnap(&["rm --force", &format!("kit-{number}")]));
        }
    }
}
