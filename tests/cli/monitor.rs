//! The monitor process with a real machine, whose guest is ten instructions long: it says a word on the serial
//! console and sleeps for ever. So it runs on any KVM that takes a guest at all, and needs no image.

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Stdio};

use super::house::{House, said, soon};

/// 64-bit code: `mov dx, 0x3f8`, and for each letter `mov al, c; out dx, al`; then `hlt` for ever.
pub fn code(word: &[u8]) -> Vec<u8> {
    let letters = word.iter().flat_map(|c| [0xb0, *c, 0xee]);
    [0x66, 0xba, 0xf8, 0x03].into_iter().chain(letters).chain([0xf4, 0xeb, 0xfd]).collect()
}

/// An ELF file with one segment, loaded and entered at 1 MiB (elf(5)).
pub fn elf(code: &[u8]) -> Vec<u8> {
    const START: u64 = 1 << 20;
    const HEADERS: u64 = 64 + 56;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend([2u16, 62].map(u16::to_le_bytes).concat()); // an executable for x86-64
    file.extend(1u32.to_le_bytes());
    file.extend([START, 64, 0].map(u64::to_le_bytes).concat()); // entry, program headers, no sections
    file.extend(0u32.to_le_bytes());
    file.extend([64u16, 56, 1, 64, 0, 0].map(u16::to_le_bytes).concat());
    file.extend([1u32, 7].map(u32::to_le_bytes).concat()); // to be loaded, all rights
    let length = code.len() as u64;
    file.extend([HEADERS, START, START, length, length, 4096].map(u64::to_le_bytes).concat());
    file.extend(code);
    file
}

/// Whether a VM can be made here at all.
pub fn kvm_is_there() -> bool {
    let there = File::options().read(true).write(true).open("/dev/kvm").is_ok();
    if !there {
        println!("not run: /dev/kvm cannot be opened");
    }
    there
}

/// Starts a monitor as `catnap start` does, without the wait for an agent; gives its report too.
pub fn monitor(house: &House) -> (Child, String) {
    let mut child = house.program();
    child.args(["monitor", "anna"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = child.spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"\n").unwrap();
    let mut report = String::new();
    child.stdout.take().unwrap().read_to_string(&mut report).unwrap();
    (child, report.trim().to_owned())
}

#[test]
fn a_machine_is_steered_from_outside_until_its_plug_is_pulled() {
    if !kvm_is_there() {
        return;
    }
    let house = House::new();
    let port = house.machine("anna", &elf(&code(b"miau\n"))).spec.forwards[0].host;
    let (mut child, report) = monitor(&house);
    assert!(report.starts_with("{\"pid\":"), "{report}");
    let view = house.only_view();
    assert_eq!((&view["state"], &view["pid"], &view["agent"]), (&"running".into(), &child.id().into(), &false.into()));
    soon(|| house.catnap("logs anna").out == "miau\n");

    house.catnap("pause anna").gives("anna\n");
    let told: serde_json::Value = serde_json::from_str(&house.catnap("pause anna --json").out).unwrap();
    assert_eq!((&told[0]["name"], &told[0]["state"], &told[1]), (&"anna".into(), &"paused".into(), &().into()));
    assert_eq!(house.only_view()["state"], "paused");
    house.catnap("exec anna ls").refuses(125, "the machine is paused");
    house.catnap("resume anna").gives("anna\n");
    house.catnap("exec anna ls").refuses(125, "has not said that it is ready");
    house.catnap("rm anna").refuses(4, "anna runs");
    house.catnap("start anna").refuses(4, "anna runs already");
    let said = said(house.program().args(["run", "empty", "-p", &format!("{port}:80")]).output().unwrap());
    said.refuses(4, &format!("port {port} of this host is in use by the machine anna"));

    // A second monitor is refused and does the first no harm.
    let (mut second, report) = monitor(&house);
    assert!(report.contains("the machine anna is running") && report.contains("\"code\":4"), "{report}");
    assert_eq!(second.wait().unwrap().code(), Some(4));

    let mut console = house
        .program()
        .args(["console", "anna"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut shown = [0; 5];
    console.stdout.as_mut().unwrap().read_exact(&mut shown).unwrap();
    assert_eq!(&shown, b"miau\n");
    console.stdin.as_mut().unwrap().write_all(b"nobody reads this").unwrap();

    // It knows no power button.
    let stopped = house.catnap("stop --time 1 anna");
    assert_eq!((stopped.code, stopped.out.as_str()), (Some(0), "anna\n"));
    assert!(stopped.err.contains("stopped by force"), "{stopped:?}");
    assert_eq!(console.wait().unwrap().code(), Some(0), "the console ends with the machine");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!((&house.only_view()["state"], &house.only_view()["detail"]), (&"stopped".into(), &"by force".into()));
    house.catnap("rm anna").gives("anna\n");
}

#[test]
fn a_killed_monitor_leaves_a_socket_that_is_no_obstacle() {
    if !kvm_is_there() {
        return;
    }
    let house = House::new();
    let machine = house.machine("anna", &elf(&code(b"one\n")));
    let (mut child, _) = monitor(&house);
    soon(|| house.catnap("logs anna").out == "one\n");
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(machine.control_socket().unwrap().exists());
    assert_eq!(house.only_view()["state"], "died");

    let (mut child, report) = monitor(&house);
    assert!(report.starts_with("{\"pid\":"), "{report}");
    assert_eq!(house.only_view()["state"], "running");
    soon(|| house.catnap("logs anna").out == "one\none\n");
    house.catnap("rm --force anna").gives("anna\n");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(!machine.dir.exists());
}

#[test]
fn a_monitor_that_cannot_begin_says_why_and_leaves_nothing() {
    let house = House::new();
    let machine = house.machine("anna", b"#!/bin/sh\n");
    if kvm_is_there() {
        let (mut child, report) = monitor(&house);
        assert!(report.contains("not a kernel that can be booted"), "{report}");
        assert_eq!(child.wait().unwrap().code(), Some(1));
        assert!(!machine.control_socket().unwrap().exists());
    }
    assert_eq!(house.only_view()["state"], "stopped");
    std::fs::remove_dir_all(&machine.dir).unwrap();
    let (mut child, report) = monitor(&house);
    assert!(report.contains("there is no machine anna") && report.contains("\"code\":3"), "{report}");
    assert_eq!(child.wait().unwrap().code(), Some(3));
}
