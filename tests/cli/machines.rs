//! Machines that are not running, in every state that they can be in.

use std::fs;

use super::house::{House, soon};

#[test]
fn a_machine_that_was_never_started_is_shown_and_removed() {
    let house = House::new();
    let machine = house.machine("anna", b"");
    let port = machine.spec.forwards[0].host;
    let view = house.only_view();
    assert_eq!((&view["name"], &view["state"], &view["cpus"]), (&"anna".into(), &"stopped".into(), &1.into()));
    assert_eq!((&view["image"], &view["memory_bytes"]), (&"empty".into(), &(64 << 20).into()));
    assert_eq!(view["forwards"], serde_json::json!([{"host": port, "guest": 80}]));
    assert!(house.catnap("ps").out.contains(&format!("anna  stopped  empty  1     64M     {port}:80  -          -\n")));
    house.catnap("ps -q").gives("anna\n");
    house.catnap("ps -q --running").gives("");
    let all: serde_json::Value = serde_json::from_str(&house.catnap("inspect anna").out).unwrap();
    assert_eq!(all[0]["files"]["disk"], machine.disk().to_str().unwrap());

    house.catnap("logs anna").gives("");
    house.catnap("stop anna").refuses(4, "anna does not run");
    house.catnap("pause anna").refuses(4, "anna does not run");
    house.catnap("exec anna ls").refuses(125, "anna does not run");
    house.catnap("run empty --name anna").refuses(4, "a machine anna is there already");
    house.catnap("image rm empty").refuses(4, "the machine anna is made from empty");

    house.catnap("rm --dry-run anna").gives("anna\n");
    assert!(machine.dir.exists());
    // One that is missing does not keep the others from it, and is told of by the code.
    let said = house.catnap("rm nobody anna");
    assert_eq!((said.code, said.out.as_str()), (Some(3), "anna\n"));
    assert!(!machine.dir.exists());
    house.catnap("image rm empty").gives("empty\n");
}

#[test]
fn ps_tells_what_became_of_a_monitor() {
    let house = House::new();
    let machine = house.machine("anna", b"");
    let held = machine.lock().unwrap();
    held.started().unwrap();
    assert_eq!(house.only_view()["state"], "busy", "it lives and does not answer");
    house.catnap("start anna").refuses(4, "anna runs already");
    house.catnap("rm anna").refuses(4, "anna runs");
    house.catnap("ps -q --running").gives("anna\n");

    drop(held);
    // Another test's program, between its fork and its exec, holds the lock for a moment longer.
    soon(|| house.only_view()["state"] == "died");
    assert!(house.catnap("ps").out.contains("died (its monitor was killed)"));

    // The same after the host was restarted: the record names another boot.
    let record = machine.dir.join("run.json");
    let boot_id = catnap::sys::process::boot_id().unwrap();
    let text = fs::read_to_string(&record).unwrap();
    assert!(text.contains(&boot_id));
    fs::write(&record, text.replace(&boot_id, "00000000-0000-0000-0000-000000000000")).unwrap();
    assert_eq!(house.only_view()["state"], "lost");
    assert!(house.catnap("ps").out.contains("lost (host restarted)"));
}

#[test]
fn a_machine_whose_files_are_damaged_is_told_of_and_can_be_removed() {
    let house = House::new();
    let machine = house.machine("anna", b"");
    fs::write(machine.dir.join("machine.json"), "{").unwrap();
    let said = house.catnap("ps");
    assert_eq!(said.code, Some(0));
    assert!(said.err.contains("machine.json") && said.err.contains("try: "), "{said:?}");
    house.catnap("start anna").refuses(6, "machine.json");
    let doctor = house.catnap("doctor");
    assert!(doctor.out.contains("poor  store: not readable: anna"), "{doctor:?}");
    house.catnap("rm anna").gives("anna\n");
    assert!(!machine.dir.exists());
}

#[test]
fn what_killed_processes_left_is_removed_by_the_doctor() {
    let house = House::new();
    let machine = house.machine("anna", b"");
    let socket = machine.control_socket().unwrap();
    drop(catnap::sys::local::bind(&socket).unwrap());
    let staging = house.store().root().join("staging/1-2-3");
    fs::create_dir_all(&staging).unwrap();
    assert!(house.catnap("doctor").out.contains("1 sockets of killed monitors"));
    assert!(socket.exists() && staging.exists(), "it only looks");
    let fixed = house.catnap("doctor --fix").out;
    assert!(fixed.contains("removed 1 half-made things and 1 stale sockets"), "{fixed}");
    assert!(!socket.exists() && !staging.exists() && machine.dir.exists());
}

#[test]
fn only_a_machine_that_was_shut_down_has_a_clean_snapshot() {
    let house = House::new();
    let anna = house.machine("anna", b"#!/bin/sh\n");
    let said = house.catnap("snapshot create anna@rested --json");
    assert!(said.out.contains("\"kind\": \"clean\""), "{said:?}");
    fs::write(anna.dir.join("history.json"), r#"{"started": 1, "stopped": 2, "ended": "forced"}"#).unwrap();
    let said = house.catnap("snapshot create anna@forced --json");
    assert!(said.out.contains("\"kind\": \"crash\""), "{said:?}");
}
