//! Whatever is killed in the middle of a snapshot: those before are whole, nothing half is seen, nothing leaks.

mod common;

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::thread::sleep;
use std::time::{Duration, Instant};

use common::monitor::{is_gone, signal};
use common::naps::{Dice, Swept, rounds, wake};
use common::ran::{Ran, run};
use common::{Machine, PATIENCE, catnap, home, in_background, machine, machine_folder, within};

#[test]
fn the_monitor_may_be_killed_at_any_moment_of_a_snapshot() {
    let _swept = Swept;
    let mut dice = Dice::new();
    let anna = machine("anna").cpus(2).boot();
    let mut good = take_whole(&anna, "good");
    let usual = good.1;
    for round in 0..rounds(2) {
        let name = format!("anna@round-{round}");
        if dice.below(2) == 0 {
            // So that the one that is killed is a difference.
            good = take_whole(&anna, &format!("before-{round}"));
        }
        let monitor = anna.pid();
        let taking = begin(&name);
        let moment = dice.below(usual + usual / 4);
        sleep(Duration::from_millis(moment));
        signal(monitor, libc::SIGKILL);
        let ran = end(taking);
        println!("  round {round}: killed after {moment} of {usual} ms: {}", ran.code);
        assert!(ran.code != 0 || Swept::listed().contains(&name), "it was told to be there: {ran}");
        catnap(&["snapshot", "verify"]).succeeds();
        wakes_with(&good.0, &good.2);
        within(PATIENCE, "its child is gone too", || children_of(monitor).iter().all(|child| is_gone(*child)));
        anna.start();
        nothing_is_left_over(&anna);
    }
    anna.stop();
    anna.disk_is_sound_after(rounds(2));
}

#[test]
fn the_writing_child_may_be_killed_and_the_guest_runs_on() {
    let _swept = Swept;
    let mut dice = Dice::new();
    let anna = machine("anna").cpus(2).boot();
    take_whole(&anna, "base");
    let boot = anna.boot_id();
    let mut killed = 0;
    for round in 0..rounds(2) {
        let (lost, next) = (format!("anna@lost-{round}"), format!("next-{round}"));
        // What changed before the snapshot that comes to nothing must be in the next one.
        anna.sh(&format!(
            "echo {next} >/tmp/note; head -c 40000000 /dev/urandom >/tmp/noise; md5sum </tmp/noise >/tmp/sum"
        ));
        let monitor = anna.pid();
        let mut taking = begin(&lost);
        let child = loop {
            let found = writer_of(monitor);
            if found.is_some() || taking.try_wait().expect("a child").is_some() {
                break found;
            }
        };
        sleep(Duration::from_millis(dice.below(80)));
        if let Some(child) = child {
            // SAFETY: kill touches no memory. The child may have ended by itself.
            unsafe { libc::kill(child, libc::SIGKILL) };
        }
        let ran = end(taking);
        if ran.code != 0 {
            killed += 1;
            assert!(ran.err.contains("ended early"), "{ran}");
            assert!(!Swept::listed().contains(&lost));
        }
        assert_eq!(anna.boot_id(), boot, "the guest runs on");
        let (name, _, nonce) = take_whole(&anna, &next);
        catnap(&["snapshot", "verify", &name]).succeeds();
        let (bella, _) = wake(&name, "bella", &[]);
        assert_eq!(bella.sh("cat /tmp/note; md5sum </tmp/noise | cmp - /tmp/sum"), next);
        assert_eq!(bella.boot_id(), nonce);
        drop(bella);
        nothing_is_left_over(&anna);
    }
    println!("  {killed} of {} children were killed before they were done", rounds(2));
    assert!(killed > 0, "no child was met at work");
}

#[test]
fn ctrl_c_leaves_nothing() {
    let _swept = Swept;
    let mut dice = Dice::new();
    let anna = machine("anna").boot();
    let (_, usual, _) = take_whole(&anna, "base");
    for round in 0..rounds(2) {
        let next = format!("next-{round}");
        anna.sh(&format!("echo {next} >/tmp/note; head -c 4000000 /dev/urandom >/tmp/noise"));
        let taking = begin("anna@never");
        sleep(Duration::from_millis(dice.below(usual)));
        // SAFETY: kill touches no memory. The program may have ended by itself, and waits for us.
        unsafe { libc::kill(taking.id() as i32, libc::SIGINT) };
        let ran = end(taking);
        if ran.code == 0 {
            catnap(&["snapshot", "rm", "anna@never"]).succeeds();
        }
        within(PATIENCE, "nothing is left", || half_made().is_empty());
        assert!(!Swept::listed().contains(&"anna@never".to_owned()), "{ran}");
        take_whole(&anna, &next);
        let (bella, _) = wake(&format!("anna@{next}"), "bella", &[]);
        assert_eq!(bella.sh("cat /tmp/note"), next);
    }
    nothing_is_left_over(&anna);
}

#[test]
fn the_guest_may_end_while_its_snapshot_is_written() {
    let _swept = Swept;
    let anna = machine("anna").boot();
    let (boot, monitor) = (anna.boot_id(), anna.pid());
    let (taking, child) = begin_and_hold(&anna, "anna@before-reboot");
    catnap(&["exec", "anna", "--", "sh", "-c", "echo b >/proc/sysrq-trigger"]);
    // For longer than anything else may hold up a reboot.
    sleep(Duration::from_secs(11));
    signal(child, libc::SIGCONT);
    end(taking).succeeds();
    anna.boots_anew(&boot);
    assert_eq!(anna.pid(), monitor);
    wakes_with("anna@before-reboot", &boot);

    let boot = anna.boot_id();
    let (taking, child) = begin_and_hold(&anna, "anna@before-end");
    let stopping = in_background(&["stop", "--force", "anna"]);
    // For longer than the last answers of a monitor may take.
    sleep(Duration::from_secs(4));
    assert!(!is_gone(monitor), "it does not wait");
    signal(child, libc::SIGCONT);
    end(taking).succeeds();
    end(stopping).succeeds();
    assert_eq!(anna.state(), "stopped");
    wakes_with("anna@before-end", &boot);
    anna.start();
    nothing_is_left_over(&anna);
}

/// Begins a snapshot whose writing child stands still until it gets SIGCONT.
fn begin_and_hold(anna: &Machine, name: &str) -> (Child, i32) {
    let (monitor, taking) = (anna.pid(), begin(name));
    let mut child = None;
    within(PATIENCE, "a child writes", || {
        child = writer_of(monitor);
        child.is_some()
    });
    let child = child.expect("a child");
    signal(child, libc::SIGSTOP);
    (taking, child)
}

/// Takes a snapshot; its name, how many milliseconds that took, and the guest's boot id.
fn take_whole(anna: &Machine, tag: &str) -> (String, u64, String) {
    let begun = Instant::now();
    anna.snapshot(tag, &[]);
    let time = begun.elapsed().as_millis() as u64;
    (format!("anna@{tag}"), time.max(1), anna.boot_id())
}

fn begin(name: &str) -> Child {
    in_background(&["snapshot", "create", name])
}

fn end(taking: Child) -> Ran {
    let output = taking.wait_with_output().expect("an end");
    Ran::new(&Command::new("catnap snapshot create"), output)
}

fn wakes_with(snapshot: &str, boot_id: &str) {
    let (bella, told) = wake(snapshot, "bella", &[]);
    assert_eq!(told["resumed"], true);
    assert_eq!(bella.boot_id(), boot_id);
}

/// The child of a monitor that writes a snapshot, as long as it lives.
fn writer_of(monitor: i32) -> Option<i32> {
    children_of(monitor).into_iter().find(|child| !is_gone(*child))
}

/// The processes that this one has started, also those that have ended and were not asked for their exit code.
fn children_of(pid: i32) -> Vec<i32> {
    let parent = |stat: &str| stat.rsplit(") ").next()?.split(' ').nth(1)?.parse::<i32>().ok();
    let processes = fs::read_dir("/proc").expect("processes");
    let numbers = processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    let is_child = |child: &i32| {
        let stat = fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
        parent(&stat) == Some(pid)
    };
    numbers.filter(is_child).collect()
}

/// Folders in which something is being made.
fn half_made() -> Vec<PathBuf> {
    let staging = fs::read_dir(home().join("data/staging")).expect("a folder");
    staging.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| path.is_dir()).collect()
}

/// Neither in the store nor beside the machine's disk, nor among its monitor's children.
fn nothing_is_left_over(anna: &Machine) {
    // A new monitor sweeps beside its work.
    within(PATIENCE, "nothing half made is left", || half_made().is_empty());
    assert_eq!(children_of(anna.pid()), [0; 0], "a child that nobody has waited for");
    let info = run(Command::new("qemu-img").args(["info", "-U", "--output=json", "--backing-chain"]).arg(anna.disk()));
    let chain = info.succeeds().json();
    let used: Vec<PathBuf> = chain
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|layer| fs::canonicalize(layer["filename"].as_str()?).ok())
        .collect();
    for entry in fs::read_dir(machine_folder(&anna.name)).expect("a folder") {
        let path = fs::canonicalize(entry.expect("an entry").path()).expect("a path");
        let is_disk = path.extension().is_some_and(|extension| extension == "qcow2");
        assert!(!is_disk || used.contains(&path), "{} belongs to nothing", path.display());
    }
}
