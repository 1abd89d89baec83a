//! Disks in the host's memory: what they survive, and what they never do. Each row of docs/transient.md is here, but
//! for the host's own restart, which scripts/lib/host-restart-test does.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::colleague::Colleague;
use common::naps::{Swept, wake};
use common::registry::Repository;
use common::{Machine, PATIENCE, catnap, home, in_background, inside, machine, namespace, within};
use serde_json::Value;

const MIB: u64 = 1 << 20;

/// What the monitor says of the disk that is mounted on a folder.
fn drive(machine: &Machine, at: &str) -> Option<Value> {
    let drives = machine.everything()["monitor"]["ephemeral"].clone();
    drives.as_array()?.iter().find(|drive| drive["at"] == at).cloned()
}

/// Its file on this host.
fn file(machine: &Machine, at: &str) -> PathBuf {
    drive(machine, at).expect("a disk")["file"].as_str().expect("a path").into()
}

/// The memory that it takes.
fn taken(path: &Path) -> u64 {
    fs::metadata(path).expect("a medium").blocks() * 512
}

fn notes(machine: &Machine) -> String {
    machine.sh("cat /mnt/notes.txt 2>/dev/null || echo none")
}

#[test]
fn a_transient_disk_lives_as_long_as_its_machine_and_host() {
    let _swept = Swept;
    let anna = machine("anna").publish(80).with(["--ephemeral", "64M:/mnt"]).boot();
    each!(anna;
        it_is_blank_and_in_memory, the_page_shows_the_notes, it_survives_a_pause, it_survives_a_reboot_of_the_guest,
        it_survives_a_live_snapshot, space_comes_back, what_is_provably_the_same_is_kept,
        what_was_written_to_since_is_lost, it_is_lost_on_stop, a_killed_monitor_leaves_nothing_for_the_next);
    let folder = file(&anna, "/mnt").parent().expect("a folder").to_owned();
    anna.kill_monitor();
    assert!(folder.join("bay0.disk").exists());
    catnap(&["rm", "anna"]).succeeds();
    assert!(!folder.exists(), "rm sweeps");
}

fn it_is_blank_and_in_memory(anna: &Machine) {
    assert_eq!(anna.sh("ls -A /mnt | grep -v lost+found || true"), "");
    assert!(anna.sh("mount").lines().any(|line| line.starts_with("/dev/vdb on /mnt type ext4")));
    let told = drive(anna, "/mnt").expect("a disk");
    assert_eq!((&told["state"], &told["size"]), (&"mounted".into(), &(64 * MIB).into()));
    let file = file(anna, "/mnt");
    assert!(taken(&file) < 4 * MIB, "{} bytes", taken(&file));
    assert_eq!(anna.view()["ephemeral"][0]["at"], "/mnt");
    assert!(catnap(&["ps"]).text().contains("64M:/mnt"));
    assert!(anna.get("/").text().contains("The disk is here, and blank"));
}

fn the_page_shows_the_notes(anna: &Machine) {
    anna.sh("echo 'buy <fish>' >/mnt/notes.txt; sync");
    let page = anna.get("/").text().to_owned();
    assert!(page.contains("buy &lt;fish&gt;") && page.contains("transient storage"), "{page}");
}

fn it_survives_a_pause(anna: &Machine) {
    anna.catnap("pause").succeeds();
    catnap(&["disk", "attach", "anna", "--ephemeral", "1M:/a"]).refuses(4, &["paused"]);
    anna.catnap("resume").succeeds();
    assert_eq!(notes(anna), "buy <fish>");
}

fn it_survives_a_reboot_of_the_guest(anna: &Machine) {
    let before = anna.boot_id();
    catnap(&["exec", "anna", "--", "reboot"]);
    anna.boots_anew(&before);
    assert_eq!(notes(anna), "buy <fish>");
    assert_eq!(drive(anna, "/mnt").expect("a disk")["state"], "mounted");
}

fn it_survives_a_live_snapshot(anna: &Machine) {
    anna.snapshot("one", &[]);
    assert_eq!(notes(anna), "buy <fish>");
    let manifest = catnap(&["snapshot", "inspect", "anna@one"]).succeeds().text();
    assert!(manifest.contains("\"bay0\""), "{manifest}");
}

fn space_comes_back(anna: &Machine) {
    let file = file(anna, "/mnt");
    anna.sh("dd if=/dev/urandom of=/mnt/big bs=1M count=20 2>/dev/null; sync");
    assert!(taken(&file) > 20 * MIB);
    anna.sh("rm /mnt/big; sync");
    within(PATIENCE, "the space is given back", || taken(&file) < 4 * MIB);
}

/// What a wake says of a disk that is not what it was.
const LOST: &str = "the ephemeral disk on /mnt of anna: what was on it is lost: it is blank";

/// Wakes a snapshot of anna in her place; what is said of it.
fn replace(tag: &str) -> String {
    catnap(&["restore", &format!("anna@{tag}"), "--replace", "--no-safety"]).succeeds().err
}

fn what_is_provably_the_same_is_kept(anna: &Machine) {
    anna.sh("echo kept >/mnt/notes.txt");
    anna.snapshot("kept", &[]);
    for _ in 0..2 {
        assert!(!replace("kept").contains("lost"));
        assert_eq!(drive(anna, "/mnt").expect("a disk")["state"], "mounted");
        assert_eq!(notes(anna), "kept");
        assert!(anna.get("/").text().contains("<pre>kept</pre>"));
    }
    assert!(!anna.sh("dmesg").contains("I/O error"));
}

fn what_was_written_to_since_is_lost(anna: &Machine) {
    anna.sh("echo later >/mnt/notes.txt; sync");
    assert!(replace("kept").contains(LOST));
    the_notes_are_lost(anna);
}

/// After a wake without the medium: a blank disk is there, and the page tells.
fn the_notes_are_lost(machine: &Machine) {
    assert_eq!(drive(machine, "/mnt").expect("a disk")["state"], "mounted");
    assert_eq!(notes(machine), "none");
    let page = machine.get("/").text().to_owned();
    assert!(page.contains("Anna’s notes are lost"), "{page}");
    machine.sh("echo new >/mnt/notes.txt; sync; echo 3 >/proc/sys/vm/drop_caches");
    assert_eq!(notes(machine), "new");
    assert!(machine.get("/").text().contains("<pre>new</pre>"));
}

fn it_is_lost_on_stop(anna: &Machine) {
    let file = file(anna, "/mnt");
    anna.stop();
    assert!(!file.exists(), "wiped when given up");
    anna.start();
    assert_eq!(notes(anna), "none");
    assert!(anna.get("/").text().contains("The disk is here, and blank"), "nothing is said to be lost after a boot");
}

fn a_killed_monitor_leaves_nothing_for_the_next(anna: &Machine) {
    anna.sh("echo before the kill >/mnt/notes.txt; sync");
    let file = file(anna, "/mnt");
    anna.kill_monitor();
    assert!(file.exists());
    anna.start();
    assert_eq!(notes(anna), "none");
}

#[test]
fn a_guest_that_wakes_without_its_disk_gets_a_blank_one_and_no_garbage() {
    let _swept = Swept;
    let anna = machine("anna").publish(80).with(["--ephemeral", "32M"]).boot();
    anna.sh("echo old >/mnt/notes.txt; echo held >/mnt/held; sync");
    anna.snapshot("free", &[]);
    // One who has a file open, and reads it when it is told to.
    anna.sh("(exec 3</mnt/held; while [ ! -e /tmp/go ]; do sleep 0.1; done; cat <&3 >/tmp/read 2>&1; \
             echo $? >/tmp/code; sleep 1000) </dev/null >/dev/null 2>&1 &");
    anna.sh("sleep 0.5; echo 3 >/proc/sys/vm/drop_caches");
    anna.snapshot("held", &[]);
    let generation = anna.status_of("generation");
    drop(anna);

    let (bella, _) = wake("anna@free", "bella", &[]);
    the_notes_are_lost(&bella);
    assert!(bella.status_of("generation") > generation);
    assert!(bella.sh("mount").contains("/dev/vdb on /mnt"), "the same bay");
    assert_eq!(drive(&bella, "/mnt").expect("a disk")["size"], 32 * MIB);
    drop(bella);

    let (bella, _) = wake("anna@held", "bella", &[]);
    the_notes_are_lost(&bella);
    assert!(bella.sh("mount").contains("/dev/vdc on /mnt"), "the other bay, for the old one is held");
    bella.sh("touch /tmp/go");
    within(PATIENCE, "the old file is an error, and no hang", || bella.sh("cat /tmp/code 2>/dev/null || true") == "1");
    assert!(!bella.sh("cat /tmp/read").contains("held"));
    assert_eq!(notes(&bella), "new", "the old disk's end does the new one no harm");
    drop(bella);

    // Another size, another place, and a boot from the disks alone.
    let (bella, _) = wake("anna@free", "bella", &["--ephemeral", "16M:/data"]);
    assert_eq!(bella.sh("mount | grep -c '/dev/vd[bc]'; ls /data"), "1\nlost+found");
    drop(bella);
    let (bella, told) = wake("anna@free", "bella", &["--cold"]);
    assert_eq!((&told["resumed"], notes(&bella)), (&false.into(), "none".into()));
}

#[test]
fn a_guest_without_an_agent_gets_an_error_and_then_a_blank_disk() {
    let _swept = Swept;
    // With cgroups, by one of which init is frozen.
    let anna = machine("anna").with(["--ephemeral", "8M"]).stock_kernel().boot();
    anna.sh("umount /mnt; yes old | dd of=/dev/vdb bs=4096 count=1 seek=1000 oflag=direct iflag=fullblock 2>/dev/null");
    // It says on its console what it reads: nobody in there can be asked once the agent, which is init, stands still.
    let read = "dd if=/dev/vdb bs=4096 count=1 skip=1000 iflag=direct 2>/dev/null >/tmp/block";
    let tell = "if ! $read; then echo bay: error; elif grep -q old /tmp/block; then echo bay: old; \
                elif [ $(tr -d '\\0' </tmp/block | wc -c) = 0 ]; then echo bay: blank; else echo bay: garbage; fi";
    let watch = format!("while :; do {}; sleep 0.3; done", tell.replace("$read", read));
    anna.sh(&format!("({watch}) </dev/null >/dev/console 2>&1 &"));
    let says = |machine: &Machine, what: &str| machine.console_log().contains(what);
    within(PATIENCE, "the guest reads what it wrote", || says(&anna, "bay: old"));
    anna.sh("mkdir /tmp/groups; mount -t cgroup2 none /tmp/groups; mkdir /tmp/groups/still; \
             (sleep 0.5; echo 1 >/tmp/groups/still/cgroup.procs; echo 1 >/tmp/groups/still/cgroup.freeze) \
             </dev/null >/dev/null 2>&1 &");
    within(PATIENCE, "the agent is silent", || is_silent(&anna));
    anna.snapshot("silent", &[]);
    drop(anna);

    let bella = Machine::named("bella");
    let told = catnap(&["restore", "anna@silent", "--name", "bella", "--timeout", "0", "--json"]).succeeds().json();
    assert!(told["resumed"] == true && told.get("ready_us").is_none(), "{told}");
    within(PATIENCE, "the lost disk is an I/O error", || says(&bella, "bay: error"));
    within(2 * PATIENCE, "a blank disk takes its place", || says(&bella, "bay: blank"));
    let log = bella.console_log();
    // What the guest had read before it slept it may say once more; after the error nothing old is ever read.
    let (before, after) = log.split_once("bay: error").expect("it was said");
    assert!(before.matches("bay: old").count() <= 1 && !after.contains("bay: old"), "{log}");
    assert!(!log.contains("bay: garbage"), "{log}");
    let log = catnap(&["logs", "--monitor", "bella"]).text();
    assert!(log.contains("the ephemeral disk on /mnt is lost: a blank one took its place"), "{log}");
    assert_eq!(drive(&bella, "/mnt").expect("a disk")["state"], "attached");
}

/// Whether a program that ends at once in the guest has not ended after two seconds.
fn is_silent(machine: &Machine) -> bool {
    let mut asking = in_background(&["exec", &machine.name, "--", "true"]);
    std::thread::sleep(Duration::from_secs(2));
    let silent = asking.try_wait().expect("a child").is_none();
    let _ = asking.kill();
    let _ = asking.wait();
    silent
}

#[test]
fn nothing_of_it_is_in_any_snapshot() {
    const TEST: &str = "nothing_of_it_is_in_any_snapshot";
    if inside::here().is_some() {
        return write_secret();
    }
    let _swept = Swept;
    let begun = std::time::SystemTime::now();
    let anna = machine("anna").with(["--ephemeral", "32M"]).boot();
    catnap(&["disk", "attach", "anna", "--ephemeral", "8M:/raw"]).succeeds();
    // On the filesystem, as people do it, and past the guest's memory.
    anna.sh("head -c 3000 /dev/urandom | md5sum | head -c 32 >/mnt/word; cat /mnt/word /mnt/word >/mnt/twice; sync");
    let word = anna.sh("cat /mnt/word");
    anna.other_half(TEST, "write");
    let medium = fs::read(file(&anna, "/raw")).expect("a medium");
    let at = find(&medium, SECRET).expect("the secret, on the medium");
    let secret = medium[at + SECRET.len()..][..64].to_vec();
    assert!(find(&fs::read(file(&anna, "/mnt")).expect("a medium"), word.as_bytes()).is_some());

    for mode in ["crash", "quiesced", "live"] {
        anna.snapshot(mode, &["--mode", mode]);
    }
    anna.stop();
    anna.snapshot("clean", &[]);
    let since = |path: &PathBuf| fs::metadata(path).is_ok_and(|it| it.modified().is_ok_and(|at| at >= begun));
    let ours = files(&home().join("data")).into_iter().filter(since);
    // What travels is packed on its way, so it is looked at where it arrives.
    let (emil, registry) = (Colleague::new(), Repository::new());
    let archive = emil.0.join("anna.catnap").display().to_string();
    catnap(&["snapshot", "export", "anna@live", &archive, "--yes"]).succeeds();
    emil.catnap(&format!("snapshot import {archive}")).succeeds();
    catnap(&["snapshot", "push", "anna@quiesced", &registry.at("quiesced"), "--yes"]).succeeds();
    emil.catnap(&format!("snapshot pull {}", registry.at("quiesced"))).succeeds();
    let theirs = files(&emil.0.join("data"));
    assert_eq!(theirs.iter().filter(|path| path.ends_with("snapshot.json")).count(), 2);
    for path in ours.chain(theirs) {
        let bytes = fs::read(&path).expect("a file of the store");
        assert!(find(&bytes, &secret).is_none(), "the secret is in {}", path.display());
        // What the guest's own memory remembers of its files is memory, and a live snapshot has that.
        let is_memory = path.ends_with("memory");
        assert!(is_memory || find(&bytes, word.as_bytes()).is_none(), "the word is in {}", path.display());
    }
}

/// Stands before the secret on the medium; alone it is in this program too, and tells nothing.
const SECRET: &[u8] = b"here begins what nobody may keep";

/// In the guest: writes random bytes to the second disk without leaving them in memory.
fn write_secret() {
    let umount = common::ran::run(std::process::Command::new("umount").arg("/raw"));
    assert_eq!(umount.code, 0, "{umount}");
    #[repr(align(4096))]
    struct Page([u8; 4096]);
    let mut page = Box::new(Page([0; 4096]));
    page.0[..SECRET.len()].copy_from_slice(SECRET);
    let random = File::open("/dev/urandom").expect("random bytes");
    std::io::Read::read_exact(&mut &random, &mut page.0[SECRET.len()..]).expect("random bytes");
    let disk = File::options().write(true).custom_flags(libc::O_DIRECT).open("/dev/vdc").expect("the bay");
    disk.write_all_at(&page.0, 4 << 20).expect("a write past the page cache");
    page.0.fill(0);
    std::hint::black_box(&page);
}

/// Where `what` is in `bytes`, by Horspool's algorithm: the files are long, and the host is slow.
fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    let last = what.len().checked_sub(1)?;
    let mut shift = [what.len(); 256];
    for (at, byte) in what[..last].iter().enumerate() {
        shift[usize::from(*byte)] = last - at;
    }
    let mut at = 0;
    while let Some(here) = bytes.get(at..at + what.len()) {
        if here == what {
            return Some(at);
        }
        at += shift[usize::from(here[last])];
    }
    None
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("a folder").flatten() {
        match entry.path() {
            path if path.is_dir() => found.extend(files(&path)),
            path => found.push(path),
        }
    }
    found
}

#[test]
fn disks_come_and_go_while_the_guest_runs() {
    let anna = machine("anna").boot();
    each!(anna;
        attached_and_detached, what_makes_no_sense_is_refused, a_disk_in_use_is_let_go_only_by_force,
        a_file_that_is_removed_or_cut_is_an_io_error);
    anna.stop();
}

fn attached_and_detached(anna: &Machine) {
    for round in 0..3 {
        let said = catnap(&["disk", "attach", "anna", "--ephemeral", &format!("{}M", 8 + round)]).succeeds();
        assert_eq!((said.text().as_str(), said.err.as_str()), ("/mnt", ""));
        assert_eq!(notes(anna), "none", "round {round}");
        anna.sh("echo mine >/mnt/notes.txt");
        let file = file(anna, "/mnt");
        catnap(&["disk", "detach", "anna"]).succeeds();
        assert!(!file.exists() && drive(anna, "/mnt").is_none());
        assert!(!anna.sh("mount").contains("/mnt"));
    }
    // What an empty bay is asked for fails at once.
    anna.sh(
        "! dd if=/dev/vdb of=/dev/null bs=4096 count=1 iflag=direct 2>/dev/null || [ $(cat /sys/block/vdb/size) = 0 ]",
    );
}

fn what_makes_no_sense_is_refused(_: &Machine) {
    let attach = |what: &str| catnap(&["disk", "attach", "anna", "--ephemeral", what]);
    for (what, why) in
        [("0", "multiple"), ("100K", "multiple"), ("1M:etc", "place"), ("1M:/etc", "place"), ("x", "size")]
    {
        attach(what).exits(2).says(&[why]);
        catnap(&["run", "kitten", "--name", "ben", "--ephemeral", what]).exits(2);
    }
    attach("8T").refuses(4, &["tmpfs", "left"]);
    catnap(&["run", "kitten", "--name", "ben", "--ephemeral", "8T"]).refuses(4, &["tmpfs", "left"]);
    catnap(&["inspect", "ben"]).exits(3);
    catnap(&["disk", "detach", "anna"]).refuses(3, &["no ephemeral disk"]);
    attach("8M").succeeds();
    attach("8M").refuses(4, &["/mnt already"]);
    attach("8M:/b").succeeds();
    attach("8M:/c").refuses(4, &["bays"]);
    catnap(&["disk", "detach", "anna"]).refuses(2, &["/mnt", "/b"]);
    catnap(&["disk", "detach", "anna", "/c"]).refuses(3, &["/c"]);
    for one in ["/mnt", "bay1"] {
        catnap(&["disk", "detach", "anna", one]).succeeds();
    }
}

fn a_disk_in_use_is_let_go_only_by_force(anna: &Machine) {
    catnap(&["disk", "attach", "anna", "--ephemeral", "8M"]).succeeds();
    anna.sh("(cd /mnt; while true; do echo x >>/mnt/log; sync; sleep 0.1; done) </dev/null >/dev/null 2>&1 & echo $! >/tmp/writer");
    catnap(&["disk", "detach", "anna"]).refuses(4, &["in use"]);
    assert_eq!(anna.sh("ls /mnt/log"), "/mnt/log");
    catnap(&["disk", "detach", "anna", "--force"]).succeeds();
    assert!(drive(anna, "/mnt").is_none());
    // Another takes its place although the first is still held open.
    catnap(&["disk", "attach", "anna", "--ephemeral", "8M"]).succeeds();
    assert_eq!(notes(anna), "none");
    anna.sh("kill -9 $(cat /tmp/writer)");
    catnap(&["disk", "detach", "anna"]).succeeds();
}

fn a_file_that_is_removed_or_cut_is_an_io_error(anna: &Machine) {
    let other = machine("ben").with(["--ephemeral", "8M"]).boot();
    type Break = fn(&Path);
    let remove: Break = |path| fs::remove_file(path).expect("a file");
    let cut: Break = |path| File::options().write(true).open(path).expect("a file").set_len(0).expect("a cut");
    for harm in [remove, cut] {
        catnap(&["disk", "attach", "anna", "--ephemeral", "8M"]).succeeds();
        anna.sh("echo mine >/mnt/notes.txt; sync");
        harm(&file(anna, "/mnt"));
        let failed = "dd if=/dev/zero of=/mnt/more bs=64k count=16 conv=fsync 2>&1 || true";
        assert!(anna.sh(failed).contains("error"), "{}", anna.sh(failed));
        assert_eq!(drive(anna, "/mnt").expect("a disk")["state"], "lost");
        assert_eq!(anna.state(), "running");
        catnap(&["disk", "detach", "anna", "--force"]).succeeds();
    }
    other.sh("echo unharmed >/mnt/notes.txt; sync; cat /mnt/notes.txt");
}

#[test]
fn a_full_tmpfs_is_an_io_error_to_the_guest_and_to_nobody_else() {
    let anna = machine("anna").boot();
    let small = |options: &[&str]| namespace::catnap_with_small_shm(24, options);
    let words = ["run", "kitten", "--name", "ben", "--ephemeral", "20M"];
    let ben = Machine::named("ben");
    let Some(ran) = small(&words) else { return println!("this host lets nobody have namespaces") };
    ran.succeeds();
    // A second disk may be promised what the first has not used yet. Not both can have it.
    let second = small(&["disk", "attach", "ben", "--ephemeral", "20M:/b"]).expect("a namespace");
    second.succeeds();
    let fill = |at: &str| {
        ben.sh(&format!("dd if=/dev/urandom of={at}/big bs=1M count=18 conv=fsync 2>&1 && echo fits || echo failed"))
    };
    let said = [fill("/mnt"), fill("/b")];
    assert!(said[0].ends_with("fits") && said[1].ends_with("failed"), "{said:?}");
    assert_eq!(ben.state(), "running");
    ben.sh("echo alive >/root/note; sync");
    ben.sh("rm /mnt/big; sync");
    within(Duration::from_secs(60), "there is room again", || {
        ben.sh("dd if=/dev/zero of=/mnt/again bs=1M count=4 conv=fsync 2>/dev/null && echo ok || true") == "ok"
    });
    assert_eq!(anna.sh("echo unharmed"), "unharmed");
}
