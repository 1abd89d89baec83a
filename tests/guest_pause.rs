//! Paused machines stand still, and go on as if nothing had been.

mod common;

use std::io::Read;
use std::thread::sleep;
use std::time::Duration;

use common::net::connect;
use common::{Machine, catnap, http, machine};

const NAP: Duration = Duration::from_secs(3);

#[test]
fn a_paused_machine_stands_still_and_goes_on() {
    let anna = machine("anna").cpus(2).publish(80).boot();
    each!(anna;
        nothing_moves_while_it_is_paused, those_who_wait_are_answered_afterwards, pausing_twice_is_pausing_once,
        a_hundred_short_naps_do_no_harm, a_paused_machine_can_be_stopped);
}

fn nothing_moves_while_it_is_paused(anna: &Machine) {
    let before = anna.status();
    anna.catnap("pause").succeeds();
    assert_eq!(anna.state(), "paused");
    catnap(&["exec", "anna", "--", "true"]).refuses(125, &["paused"]);
    sleep(NAP);
    anna.catnap("resume").succeeds();
    let after = anna.status();
    assert_eq!(anna.state(), "running");
    for same in ["nonce", "boot_id", "generation"] {
        assert_eq!(before[same], after[same]);
    }
    let ticks = |status: &serde_json::Value| status["ticks"].as_u64().expect("a number");
    // Two ticks are a second; commands take some time too.
    let moved = ticks(&after) - ticks(&before);
    assert!(moved < 2 * NAP.as_secs(), "{moved} ticks in a nap of {NAP:?}");
    let seen = anna.status_of("ticks");
    sleep(Duration::from_secs(1));
    assert!(anna.status_of("ticks") > seen);
    let now = || std::time::UNIX_EPOCH.elapsed().expect("a clock").as_secs();
    let asked = now();
    let guest: u64 = anna.sh("date +%s").parse().expect("seconds");
    let answered = now();
    assert!((asked - 2..=answered + 2).contains(&guest), "{guest} is not between {asked} and {answered}");
}

fn those_who_wait_are_answered_afterwards(anna: &Machine) {
    anna.catnap("pause").succeeds();
    let mut stream = connect(anna.port(80));
    http::ask(&mut stream, "/healthz");
    stream.set_read_timeout(Some(Duration::from_secs(1))).expect("a timeout");
    assert!(stream.read(&mut [0; 1]).is_err(), "a machine that stands still answered");
    anna.catnap("resume").succeeds();
    stream.set_read_timeout(Some(common::PATIENCE)).expect("a timeout");
    assert_eq!(http::answer(stream).text(), "ok\n");
}

fn pausing_twice_is_pausing_once(anna: &Machine) {
    anna.catnap("pause").succeeds();
    anna.catnap("pause").succeeds();
    anna.catnap("resume").succeeds();
    anna.catnap("resume").succeeds();
    assert_eq!(anna.sh("echo awake"), "awake");
}

/// While the guest is busy with its disk, its console and its ports.
fn a_hundred_short_naps_do_no_harm(anna: &Machine) {
    anna.sh("(while :; do date >/dev/ttyS0; dd if=/dev/zero of=/root/big bs=64k count=64 conv=fsync; done) >/dev/null 2>&1 &");
    for _ in 0..100 {
        anna.catnap("pause").succeeds();
        anna.catnap("resume").succeeds();
    }
    assert!(anna.get("/").text().contains("kitten"));
    let said = anna.sh("dmesg");
    assert!(!said.contains("blocked for more than") && !said.contains("I/O error"), "{said}");
}

fn a_paused_machine_can_be_stopped(anna: &Machine) {
    anna.catnap("pause").succeeds();
    anna.stop();
    assert!(anna.console_log().contains("reboot: Power down"));
    anna.disk_is_sound();
    anna.catnap("pause").refuses(4, &["anna does not run"]);
}
