//! What snapshots of each kind hold of what was acknowledged: SQLite, in the middle of its work.

mod common;

use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::thread::{self, sleep};
use std::time::Duration;

use common::monitor::signal;
use common::naps::{Swept, wake};
use common::ran::Ran;
use common::{Machine, PATIENCE, http, in_background, machine, within};
use serde_json::{Value, json};

const MODES: [&str; 3] = ["live", "crash", "quiesced"];

#[test]
fn acknowledged_rows_are_kept() {
    let _swept = Swept;
    let anna = machine("anna").cpus(2).publish(80).boot();
    for mode in MODES {
        let promised = snapshot_under_inserts(&anna, mode);
        let (bella, told) = wake(&format!("anna@{mode}"), "bella", &[]);
        assert_eq!((told["kind"].as_str(), &told["resumed"]), (Some(mode), &(mode == "live").into()));
        let found = findings(&bella);
        println!("  {mode}: {promised} rows were acknowledged before it, and it has {found}");
        assert_eq!((found["integrity"].as_str(), &found["entries"]), (Some("ok"), &found["last"]));
        assert!(number(&found["last"]) >= promised, "{promised} were acknowledged: {found}");
        assert_eq!(number(&write(&bella, "after the wake", None)["id"]), number(&found["last"]) + 1);
        assert_eq!(bella.status()["nonce"] == anna.status()["nonce"], mode == "live");
    }
    let found = findings(&anna);
    assert_eq!((found["integrity"].as_str(), &found["entries"]), (Some("ok"), &found["last"]));
}

/// Takes a snapshot while four visitors write; the number of the last row that was acknowledged before.
fn snapshot_under_inserts(anna: &Machine, mode: &str) -> i64 {
    let (last, enough) = (AtomicI64::new(0), AtomicBool::new(false));
    let visitor = || {
        while !enough.load(Ordering::SeqCst) {
            let said = http::post(anna.port(80), "/api/guestbook", r#"{"name":"Ben","message":"purr"}"#);
            // It may be held still for the snapshot.
            if said.status == 201 {
                let id = serde_json::from_str::<Value>(&said.body).expect("JSON")["id"].clone();
                last.fetch_max(number(&id), Ordering::SeqCst);
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(visitor);
        }
        let begun = last.load(Ordering::SeqCst);
        within(PATIENCE, "rows are acknowledged", || last.load(Ordering::SeqCst) >= begun + 20);
        let before = last.load(Ordering::SeqCst);
        anna.snapshot(mode, &["--mode", mode]);
        let after = last.load(Ordering::SeqCst);
        within(PATIENCE, "the guest book goes on", || last.load(Ordering::SeqCst) > after);
        enough.store(true, Ordering::SeqCst);
        before
    })
}

#[test]
fn at_the_doorbell_it_is_known_what_each_kind_holds() {
    let _swept = Swept;
    let anna = machine("anna").publish(80).boot();
    assert_eq!(write(&anna, "nobody waits", Some("after-commit"))["awaited"], false);
    // Whether the row of a writer who rings there is in the snapshot that is taken there.
    let cases = [
        ("live", "before-commit", true),
        ("live", "unsynced", true),
        ("crash", "before-commit", false),
        ("crash", "unsynced", false),
        ("crash", "after-commit", true),
        ("quiesced", "before-commit", true),
        ("quiesced", "unsynced", true),
    ];
    let rows = cases.map(|(mode, place, _)| ring_for_a_snapshot(&anna, mode, place));
    for ((mode, place, is_there), row) in cases.into_iter().zip(rows) {
        let (bella, _) = wake(&format!("anna@{mode}-{place}"), "bella", &[]);
        // A woken writer goes on as soon as it notices that its doorbell is gone.
        within(PATIENCE, &format!("{row} is there: {is_there}"), || has(&bella, &row) == is_there);
        assert!(has(&bella, &format!("before {row}")), "what was acknowledged before {row}");
        assert_eq!(findings(&bella)["integrity"], "ok");
        println!("  {mode}, {place}: the row is {}", if is_there { "there" } else { "not there" });
    }
}

/// Has a row written which rings at `place`, and a snapshot taken there; the row.
fn ring_for_a_snapshot(anna: &Machine, mode: &str, place: &str) -> String {
    let name = format!("anna@{mode}-{place}");
    let mut taking = in_background(&["snapshot", "create", &name, "--mode", mode, "--at-doorbell"]);
    // Until the snapshot waits, rings are answered at once, and there is one row more.
    let row = (0..100).find_map(|attempt| {
        sleep(Duration::from_millis(200));
        let row = format!("{mode}, {place}, {attempt}");
        write(anna, &format!("before {row}"), None);
        (write(anna, &row, Some(place))["awaited"] == true).then_some(row)
    });
    assert!(taking.wait().expect("an end").success(), "{name}");
    let row = row.expect("a ring that was awaited");
    assert!(has(anna, &row), "the writer goes on");
    row
}

#[test]
fn a_snapshot_that_cannot_be_had_is_refused_and_nothing_stays_frozen() {
    let _swept = Swept;
    let anna = machine("anna").publish(80).boot();
    let quiesced = ["--mode", "quiesced"];
    anna.catnap("pause").succeeds();
    anna.try_to_snapshot("one", &quiesced).refuses(4, &["paused", "agent"]);
    anna.catnap("resume").succeeds();
    // A hook that fails, and one that takes its time.
    let hook = |text: &str| {
        let line = format!("mkdir -p /etc/catnap/quiesce.d && cd /etc/catnap/quiesce.d && printf '%s' '{text}' >one");
        anna.sh(&format!("{line} && chmod 755 one"));
    };
    hook("#!/bin/sh\nexit 3\n");
    anna.try_to_snapshot("one", &quiesced).refuses(1, &["cannot be quiesced", "one"]);
    can_write(&anna);
    // Nobody rings, and whoever waits may give up.
    let cancelled = interrupted(&anna, &["--mode", "crash", "--at-doorbell"]);
    assert!(cancelled.code != 0 && cancelled.err.contains("cancelled"), "{cancelled}");
    assert_eq!(write(&anna, "nobody waits any more", Some("before-commit"))["awaited"], false);
    // The monitor is killed in the freeze, and with it the guest; the next boot is not frozen.
    hook("#!/bin/sh\nsleep 3\n");
    let mut taking = in_background(&["snapshot", "create", "anna@one", "--mode", "quiesced"]);
    sleep(Duration::from_millis(1500));
    anna.kill_monitor();
    assert!(!taking.wait().expect("an end").success());
    assert!(Swept::listed().iter().all(|name| name != "anna@one"));
    anna.start();
    can_write(&anna);
    assert_eq!(findings(&anna)["integrity"], "ok");
    anna.snapshot("one", &quiesced);
    can_write(&anna);
}

/// Begins a snapshot and presses Ctrl-C.
fn interrupted(anna: &Machine, options: &[&str]) -> Ran {
    let name = format!("{}@interrupted", anna.name);
    let words: Vec<&str> = ["snapshot", "create", &name].iter().chain(options).copied().collect();
    let taking = in_background(&words);
    sleep(Duration::from_millis(1000));
    signal(taking.id() as i32, libc::SIGINT);
    let output = taking.wait_with_output().expect("an end");
    Ran::new(&std::process::Command::new("catnap snapshot create"), output)
}

fn can_write(machine: &Machine) {
    machine.sh("echo thawed >/root/thawed && sync");
}

fn write(machine: &Machine, message: &str, ring: Option<&str>) -> Value {
    let entry = json!({"name": "Ben", "message": message, "ring": ring}).to_string();
    let answer = http::post(machine.port(80), "/api/guestbook", &entry);
    assert_eq!(answer.status, 201, "{answer:?}");
    serde_json::from_str(&answer.body).expect("JSON")
}

fn has(machine: &Machine, message: &str) -> bool {
    let all = machine.get("/api/guestbook").json();
    all.as_array().expect("a list").iter().any(|entry| entry["message"] == message)
}

/// What SQLite says of the guest book.
fn findings(machine: &Machine) -> Value {
    machine.get("/api/guestbook/check").json()
}

fn number(value: &Value) -> i64 {
    value.as_i64().expect("a number")
}
