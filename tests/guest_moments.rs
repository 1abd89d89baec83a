//! Snapshots at any moment, also at bad ones: during a boot, while all vCPUs compute, while disks are written, with
//! connections open.

mod common;

use std::io::{Read, Write};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use common::naps::{Dice, Swept, rounds, wake};
use common::net::{connect, free_port};
use common::{Machine, PATIENCE, catnap, http, machine, within};

/// Snapshots that are taken of one boot.
const OF_A_BOOT: u64 = 3;

#[test]
fn a_boot_goes_on_from_wherever_it_was() {
    let mut dice = Dice::new();
    for round in 0..rounds(4) {
        let _swept = Swept;
        drop(catnap(&["rm --force", "anna"]));
        let port = format!("{}:80", free_port());
        let booting = thread::spawn(move || {
            let ran = catnap(&["run", "kitten", "--name", "anna", "--cpus", "2", "-p", &port]);
            // Said at once: a machine that did not come up is gone, and all that is asked of it next fails.
            if ran.code != 0 {
                println!("  {ran}");
            }
            ran
        });
        let anna = Machine::booting("anna");
        let begun = Instant::now();
        within(PATIENCE, "there is a monitor", || catnap(&["pause", "anna"]).code == 0);
        catnap(&["resume", "anna"]).succeeds();
        let mut taken = Vec::new();
        for number in 0..OF_A_BOOT {
            sleep(Duration::from_millis(dice.below(1200)));
            let tag = format!("at-{number}");
            let moment = begun.elapsed().as_millis();
            anna.snapshot(&tag, &[]);
            taken.push((format!("anna@{tag}"), moment));
        }
        // The boot that is looked at comes to its end.
        booting.join().expect("it is run").succeeds();
        drop(anna);
        for (name, moment) in taken {
            let (bella, _) = wake(&name, "bella", &[]);
            assert_eq!(bella.status()["cpus"], 2, "{name}");
            bella.sh("echo works >/root/note; sync");
            println!("  round {round}: {name}, taken after {moment} ms, came up");
        }
    }
}

#[test]
fn four_busy_cpus_and_a_busy_disk_go_on() {
    let _swept = Swept;
    let anna = machine("anna").cpus(4).publish(80).boot();
    anna.sh(
        "for cpu in 1 2 3 4; do (n=0; while :; do n=$((n + 1)); echo $n >/tmp/cpu-$cpu; done) </dev/null >/dev/null 2>&1 & done; \
         (n=0; while :; do n=$((n + 1)); dd if=/dev/urandom of=/root/busy-$((n % 4)) bs=16k count=20 conv=fsync; echo $n >/root/rounds; done) \
         </dev/null >/dev/null 2>&1 &",
    );
    sleep(Duration::from_millis(1500));
    for tag in ["one", "two", "three"] {
        anna.snapshot(tag, &[]);
    }
    for tag in ["one", "three"] {
        let (bella, _) = wake(&format!("anna@{tag}"), "bella", &[]);
        goes_on(&bella);
        let said = bella.sh("dmesg");
        for bad in ["I/O error", "EXT4-fs error", "soft lockup", "rcu: INFO", "BUG:"] {
            assert!(!said.contains(bad), "{said}");
        }
        bella.stop();
        bella.disk_is_sound();
        bella.filesystem_is_clean();
    }
    goes_on(&anna);
}

/// All four counters and the disk's one go on.
fn goes_on(machine: &Machine) {
    let counts = || -> Vec<u64> {
        let said = machine
            .sh("for cpu in 1 2 3 4; do until n=$(cat /tmp/cpu-$cpu) && [ -n \"$n\" ]; do :; done; echo $n; done");
        said.lines().map(|line| line.parse().expect("a number")).collect()
    };
    let before = counts();
    within(PATIENCE, "all vCPUs go on", || counts().iter().zip(&before).all(|(now, before)| now > before));
    let written = machine.sh("cat /root/rounds");
    within(PATIENCE, "the disk is written to", || machine.sh("cat /root/rounds") != written);
}

#[test]
fn connections_end_cleanly_and_new_ones_work() {
    let _swept = Swept;
    let anna = machine("anna").publish(80).boot();
    let mut open = connect(anna.port(80));
    write!(open, "GET /healthz HTTP/1.1\r\nHost: kitten\r\n\r\n").expect("a request");
    let mut answer = [0; 16];
    open.read_exact(&mut answer).expect("an answer");
    let mut idle = connect(anna.port(80));
    anna.snapshot("one", &[]);
    // The original's go on as if nothing had been.
    write!(idle, "GET /healthz HTTP/1.1\r\nHost: kitten\r\nConnection: close\r\n\r\n").expect("a request");
    let mut all = String::new();
    idle.read_to_string(&mut all).expect("an answer");
    assert!(all.contains("200"), "{all}");
    drop(open);
    let (bella, _) = wake("anna@one", "bella", &[]);
    for _ in 0..10 {
        assert_eq!(http::get(bella.port(80), "/healthz").status, 200);
    }
    // What the sleeping connections held is given back: the agent relays new ones only.
    within(PATIENCE, "the old connections are gone", || {
        bella.sh("netstat -tn 2>/dev/null | grep -c ':80 .*ESTABLISHED' || true") == "0"
    });
    assert_eq!(bella.sh("echo exec works"), "exec works");
}

#[test]
fn a_guest_of_5_gib_wakes_too() {
    let available = std::fs::read_to_string("/proc/meminfo").expect("a host");
    let available = available.lines().find_map(|line| line.strip_prefix("MemAvailable:")).expect("a line");
    let available: u64 = available.trim().trim_end_matches(" kB").parse().expect("a number");
    if available < 2 << 20 {
        return println!("not run: the host has {} MiB, and 2 GiB are wanted", available >> 10);
    }
    let _swept = Swept;
    // Most of it is never touched, and so takes nothing of the host.
    let anna = machine("anna").memory("5G").publish(80).boot();
    anna.sh("head -c 30000000 /dev/urandom >/tmp/noise; md5sum </tmp/noise >/tmp/sum");
    let nonce = anna.status()["nonce"].clone();
    anna.snapshot("one", &[]);
    drop(anna);
    let (bella, _) = wake("anna@one", "bella", &[]);
    assert_eq!(bella.status()["nonce"], nonce);
    assert!(bella.status_of("memory_bytes") > 4_500 << 20);
    bella.sh("md5sum </tmp/noise | cmp - /tmp/sum");
    // Above 4 GiB there is memory as well, and it can be used.
    bella.sh("head -c 100000000 /dev/zero | tr '\\0' x >/tmp/more; test $(wc -c </tmp/more) = 100000000");
}
