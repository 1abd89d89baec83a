//! Snapshots that are handed on as files, between two folders that know nothing of each other.

use std::fs;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use catnap::snapshot::Kind;
use catnap::store::{Snapshot, Store};
use serde_json::Value;

use super::house::{House, Said, said};
use super::shots::Shot;

/// How long what ends at once may take on a busy host.
const PATIENCE: Duration = Duration::from_secs(20);

const KEY: &str = "-----BEGIN OPENSSH PRIVATE KEY-----\n\
                   b3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQAAAAAAAAABAAAAMwAAAAtzc2gtZW\n";

/// kitten, with a key on its disk ◄ anna@monday (live) ◄ anna@tuesday (a difference)
fn family(store: &Store) -> [Snapshot; 3] {
    let kitten = Shot::new(store, Kind::Clean, "kitten", 0).bootable().with_text(KEY).take();
    let monday = Shot::new(store, Kind::Live, "anna@monday", 60).bootable().over(&kitten);
    let monday = monday.memory(&[(0, 1), (1, 1)], None).take();
    let tuesday = Shot::new(store, Kind::Live, "anna@tuesday", 120).bootable().same_disk(&monday);
    let tuesday = tuesday.memory(&[(1, 2), (5, 3)], Some(&monday)).take();
    [kitten, monday, tuesday]
}

fn json(said: &Said) -> Value {
    serde_json::from_str(&said.out).unwrap_or_else(|error| panic!("{error}: {said:?}"))
}

/// Where the archive is to be.
fn file(house: &House, name: &str) -> PathBuf {
    house.store().root().parent().unwrap().join(name)
}

/// Runs the program with something on its standard input.
fn with_input(house: &House, line: &str, input: &[u8]) -> Said {
    let mut child = house
        .program()
        .args(line.split_whitespace())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A program that has seen enough reads no further.
    let _ = child.stdin.take().unwrap().write_all(input);
    said(child.wait_with_output().unwrap())
}

#[track_caller]
fn nothing_is_left(store: &Store) {
    for folder in ["snapshots", "names", "staging"] {
        let left = fs::read_dir(store.root().join(folder)).unwrap().map(|entry| entry.unwrap().file_name());
        let left: Vec<_> = left.filter(|name| name != ".lock" && name != ".guard").collect();
        assert!(left.is_empty(), "{folder}: {left:?}");
    }
}

#[test]
fn a_snapshot_goes_to_another_folder_and_is_whole_there() {
    let (here, there) = (House::new(), House::new());
    let [kitten, ..] = family(&here.store());
    let path = file(&here, "anna.catnap");
    let shown = path.to_str().unwrap();
    let told = here.catnap(&format!("snapshot export anna@tuesday {shown} --yes --json"));
    let exported = json(&told);
    assert_eq!((&exported["kind"], &exported["name"]), (&"live".into(), &"anna@tuesday".into()));
    assert_eq!(exported["bytes"], path.metadata().unwrap().len());
    assert_eq!(exported["secrets"], 1);
    // What goes is shown, and what is secret is not.
    for word in ["anna@tuesday: live, taken ", "memory ", "secrets in it", "PRIVATE KEY", "disk root at 0x0"] {
        assert!(told.err.contains(word), "{word}: {told:?}");
    }
    assert!(!told.err.contains("b3Blb"), "{told:?}");

    let imported = json(&there.catnap(&format!("snapshot import {shown} --json")));
    for same in ["digest", "kind", "name", "bytes"] {
        assert_eq!(imported[same], exported[same], "{same}");
    }
    assert_eq!(imported["known"], false);
    there.catnap("snapshot verify").gives("anna@tuesday\n");
    let snapshot = there.store().resolve("anna@tuesday").unwrap();
    assert_eq!(fs::read(snapshot.dir.join("memory")).unwrap(), [vec![1; 4096], vec![2; 4096], vec![3; 4096]].concat());
    let again = there.catnap(&format!("snapshot import {shown}"));
    assert_eq!((again.code, again.out.as_str()), (Some(0), "anna@tuesday\n"), "{again:?}");
    assert!(again.err.contains("it was here already"), "{again:?}");
    there.catnap(&format!("snapshot import {shown} --name sha256:0123")).refuses(2, "names no snapshot");

    // A base image is the same snapshot there.
    let path = file(&here, "kitten.catnap");
    assert_eq!(here.catnap(&format!("snapshot export kitten {} -y", path.display())).code, Some(0));
    let said = there.catnap(&format!("snapshot import {}", path.display()));
    assert_eq!((said.code, said.out.as_str()), (Some(0), "kitten\n"), "{said:?}");
    assert_eq!(there.store().resolve("kitten").unwrap().digest, kitten.digest);
    assert_eq!(there.catnap("image ls -q").out, "kitten\n");
}

#[test]
fn nobody_is_asked_in_vain_and_nothing_is_overwritten() {
    let house = House::new();
    family(&house.store());
    let path = file(&house, "anna.catnap");
    let export = |words: &str| house.catnap(&format!("snapshot export {words}"));
    let said = export(&format!("anna@monday {}", path.display()));
    assert_eq!((said.code, said.out.as_str()), (Some(4), ""), "{said:?}");
    assert!(said.err.contains("Nobody is there to be asked") && said.err.contains("\ntry: --yes"), "{said:?}");
    assert!(!path.exists());
    export(&format!("anna@never {}", path.display())).refuses(3, "there is no snapshot anna@never");
    export("anna@monday /no/such/folder/x --yes").refuses(3, "/no/such/folder");
    export("anna@monday - --yes --json").refuses(2, "standard output");
    export(&format!("kitten --with-memory {}", path.display())).refuses(4, "which has no memory");
    fs::write(&path, "mine").unwrap();
    export(&format!("anna@monday {} --yes", path.display())).refuses(4, "is there already");
    assert_eq!(fs::read(&path).unwrap(), b"mine");
    // Where no secrets are and no memory goes, there is nothing to ask.
    let store = house.store();
    Shot::new(&store, Kind::Crash, "ben@x", 0).bootable().filled(1, 7).take();
    let path = file(&house, "ben.catnap");
    let said = export(&format!("ben@x {}", path.display()));
    assert_eq!((said.code, said.out), (Some(0), format!("{}\n", path.display())));
    let said = export(&format!("ben@x {} --find {}", file(&house, "x").display(), "\u{7}\u{7}\u{7}\u{7}\u{7}"));
    assert_eq!(said.code, Some(4), "{said:?}");
    let hidden = fs::read_dir(path.parent().unwrap()).unwrap();
    let mut hidden = hidden.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert!(hidden.all(|name| !name.starts_with('.')), "no half-written file is left");
}

#[test]
fn streams_work_and_memory_can_stay_behind() {
    let (here, there) = (House::new(), House::new());
    family(&here.store());
    let words = ["snapshot", "export", "anna@tuesday", "-", "--yes", "--disk-only"];
    let output = here.program().args(words).output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && told.contains("left out  memory and machine state"), "{told}");
    let said = with_input(&there, "snapshot import - --name guest@monday", &output.stdout);
    assert_eq!((said.code, said.out.as_str()), (Some(0), "guest@monday\n"), "{said:?}");
    let snapshot = there.store().resolve("guest@monday").unwrap();
    assert_eq!((snapshot.manifest.kind, &snapshot.manifest.memory), (Kind::Crash, &None));
    assert_eq!(there.catnap("snapshot verify").code, Some(0));
    // Without an end there is nothing.
    let empty = House::new();
    with_input(&empty, "snapshot import -", &output.stdout[..output.stdout.len() - 1]).refuses(6, "it is cut off");
    with_input(&empty, "snapshot import -", b"").refuses(6, "it is cut off");
    nothing_is_left(&empty.store());
}

#[test]
fn ctrl_c_ends_the_wait_for_a_pipe_at_which_nobody_is() {
    let house = House::new();
    family(&house.store());
    let (empty, _silent) = io::pipe().unwrap();
    ends_on_ctrl_c(house.program().args(["snapshot", "import", "-"]).stdin(empty));
    let (_unread, mut full) = io::pipe().unwrap();
    // SAFETY: fcntl changes a flag of a descriptor that is open.
    assert_eq!(unsafe { libc::fcntl(full.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) }, 0);
    while full.write(&[0; 4096]).is_ok() {}
    // SAFETY: as above.
    assert_eq!(unsafe { libc::fcntl(full.as_raw_fd(), libc::F_SETFL, 0) }, 0);
    ends_on_ctrl_c(house.program().args(["snapshot", "export", "anna@tuesday", "-", "--yes"]).stdout(full));
    let left = fs::read_dir(house.store().root().join("staging")).unwrap().map(|entry| entry.unwrap().path());
    assert_eq!(left.filter(|path| path.is_dir()).collect::<Vec<_>>(), Vec::<PathBuf>::new());
}

#[track_caller]
fn ends_on_ctrl_c(program: &mut Command) {
    let mut child = program.stderr(Stdio::piped()).spawn().unwrap();
    let pid = child.id();
    until("it catches Ctrl-C", || {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap();
        u64::from_str_radix(caught.trim(), 16).unwrap() & 1 << (libc::SIGINT - 1) != 0
    });
    until("it waits", || waits(pid));
    // SAFETY: kill touches no memory.
    assert_eq!(unsafe { libc::kill(pid as i32, libc::SIGINT) }, 0);
    until("it ends", || child.try_wait().unwrap().is_some());
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

/// Whether a thread of a process waits in poll(2).
fn waits(pid: u32) -> bool {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    // The system call's number comes first (proc(5)); a thread that has just ended has none.
    let call = |task: fs::DirEntry| fs::read_to_string(task.path().join("syscall")).unwrap_or_default();
    tasks.flatten().any(|task| call(task).split(' ').next() == Some(&libc::SYS_poll.to_string()))
}

#[track_caller]
fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < PATIENCE, "not in time: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn what_is_damaged_or_taken_is_refused_by_name() {
    let (here, there) = (House::new(), House::new());
    let [.., tuesday] = family(&here.store());
    let path = file(&here, "anna.catnap");
    assert_eq!(here.catnap(&format!("snapshot export anna@tuesday {} -y", path.display())).code, Some(0));
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    let broken = file(&there, "broken.catnap");
    fs::write(&broken, &bytes).unwrap();
    for verb in ["snapshot import", "run"] {
        let said = there.catnap(&format!("{verb} {}", broken.display()));
        if verb == "run" && said.code == Some(5) {
            continue; // No KVM here: it does not come to that.
        }
        said.refuses(6, "broken.catnap: the archive is refused");
    }
    there.catnap("snapshot import /no/such.catnap").refuses(3, "/no/such.catnap");
    nothing_is_left(&there.store());
    // Where it comes from, the name stands for what has a chain below it.
    here.catnap(&format!("snapshot import {}", path.display())).refuses(4, "another snapshot anna@tuesday");
    let said = here.catnap(&format!("snapshot import {} --name anna@copy", path.display()));
    assert_eq!((said.code, said.out.as_str()), (Some(0), "anna@copy\n"), "{said:?}");
    assert_eq!(here.store().resolve("anna@tuesday").unwrap().digest, tuesday.digest);
    // Damage at the origin gets no new digest.
    let layer = tuesday.dir.join("memory");
    let mut bytes = fs::read(&layer).unwrap();
    bytes[0] ^= 1;
    fs::remove_file(&layer).unwrap();
    fs::write(&layer, bytes).unwrap();
    here.catnap(&format!("snapshot export anna@tuesday {} -y", file(&here, "x").display())).fails(6, "memory");
    assert!(!file(&here, "x").exists());
}

#[test]
fn secrets_are_told_with_their_places_and_masked() {
    let house = House::new();
    family(&house.store());
    let table = house.catnap("snapshot inspect --secrets anna@monday kitten");
    assert_eq!((table.code, table.out.lines().count()), (Some(0), 3), "{table:?}");
    let line = table.out.lines().nth(1).unwrap();
    assert!(line.starts_with("anna@monday  private key  -----BEGIN OPENSSH PRIVATE KEY----- …  1"), "{line}");
    assert!(line.ends_with("disk root at 0x0"), "{line}");
    let page = "\u{2}".repeat(200);
    let words = ["snapshot", "inspect", "--json", "--secrets", "--find", &page, "anna@tuesday"];
    let found = json(&said(house.program().args(words).output().unwrap()));
    let findings = found[0]["secrets"]["findings"].as_array().unwrap();
    assert_eq!((findings.len(), &findings[1]["kind"]), (2, &"wanted".into()), "{findings:?}");
    assert_eq!(findings[1]["places"][0], serde_json::json!({"in": "guest memory", "offset": 4096}));
    assert!(!found.to_string().contains("b3Blb"));
    // Only what was asked for.
    assert!(json(&house.catnap("snapshot inspect anna@monday"))[0].get("secrets").is_none());
}

impl Said {
    /// Checks that it failed like this; what travels may have been shown before.
    #[track_caller]
    fn fails(&self, code: i32, words: &str) {
        assert_eq!((self.code, self.out.as_str()), (Some(code), ""), "{self:?}");
        assert!(self.err.contains(words) && self.err.contains("\ntry: "), "{self:?}");
    }
}

#[test]
fn only_archives_are_taken_for_files() {
    let house = House::new();
    let said = house.catnap("snapshot inspect /etc/passwd");
    assert!(said.code == Some(2) && said.err.contains("names no snapshot"), "{said:?}");
    house.catnap("snapshot import /etc/passwd").refuses(6, "not an archive of Catnap's");
    house.catnap("snapshot import /etc").refuses(1, "");
}
