//! Snapshots that are not alone: of several machines at once, of one machine by several people, and a great many of one.

mod common;

use common::naps::{Swept, wake};
use common::{catnap, in_background, machine};

const MARK: &str = "cat /root/mark /dev/shm/mark 2>/dev/null || true";

#[test]
fn several_at_once_are_each_whole() {
    let _swept = Swept;
    let anna = machine("anna").boot();
    anna.snapshot("base", &[]);
    let machines = [anna, wake("anna@base", "bella", &[]).0, wake("anna@base", "carla", &[]).0];
    for machine in &machines {
        machine.sh(&format!("echo {} | tee /root/mark >/dev/shm/mark; sync", machine.name));
    }
    // One of them for each kind: those take turns, and each follows the one before.
    let asked = [("anna", "live"), ("bella", "live"), ("anna", "quiesced"), ("anna", "crash"), ("carla", "live")];
    let taking = asked.map(|(name, mode)| {
        let tag = format!("{name}@{mode}");
        in_background(&["snapshot", "create", &tag, "--mode", mode])
    });
    for (mut taking, asked) in taking.into_iter().zip(asked) {
        assert!(taking.wait().expect("an end").success(), "{asked:?}");
    }
    catnap(&["snapshot", "verify"]).succeeds();
    // Nobody has the same parent as another, so they are in a line.
    let mut line = vec!["anna@base".to_owned()];
    while let Some(next) = child_of(line.last().expect("one"), "anna@") {
        line.push(next);
    }
    println!("  {}", line.join(", "));
    assert_eq!(line.len(), 4);
    drop(machines);
    for (name, mode) in asked {
        let (dora, _) = wake(&format!("{name}@{mode}"), "dora", &[]);
        let memory = if mode == "live" { format!("\n{name}") } else { String::new() };
        assert_eq!(dora.sh(MARK), format!("{name}{memory}"));
    }
}

/// The one snapshot that follows another and whose name begins so.
fn child_of(parent: &str, prefix: &str) -> Option<String> {
    let inspect = |name: &str| catnap(&["snapshot", "inspect", "--json", name]).succeeds().json()[0].clone();
    let digest = inspect(parent)["digest"].clone();
    assert!(digest.is_string(), "{parent} has no digest");
    let follows = |name: &String| name.starts_with(prefix) && inspect(name)["manifest"]["parent"] == digest;
    let mut children = Swept::listed().into_iter().filter(follows);
    let child = children.next();
    assert_eq!(children.next(), None, "more than one follows {parent}");
    child
}

/// More than lie over each other in memory (16), and more than the disk's layers before they are made one.
const MANY: u32 = 18;

#[test]
fn a_great_many_in_a_row_each_wake_as_they_were() {
    let _swept = Swept;
    let anna = machine("anna").boot();
    for number in 0..MANY {
        anna.sh(&format!("echo {number} | tee /root/mark >/dev/shm/mark; sync"));
        anna.snapshot(&number.to_string(), &[]);
    }
    catnap(&["snapshot", "verify"]).succeeds();
    let boot = anna.boot_id();
    // The end of the longest chain, and what lies beyond it.
    for number in [15, MANY - 1] {
        let (bella, _) = wake(&format!("anna@{number}"), "bella", &[]);
        assert_eq!((bella.sh(MARK), bella.boot_id()), (format!("{number}\n{number}"), boot.clone()));
        bella.stop();
        bella.disk_is_sound();
    }
    anna.stop();
    anna.disk_is_sound();
}
