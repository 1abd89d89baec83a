//! A host whose disk is full: the snapshot says so, and nothing else is harmed.

mod common;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;

use common::naps::{Swept, wake};
use common::{Machine, catnap, home, machine, namespace, within};

/// Room for the image, a machine, and one snapshot with memory, in MiB.
const ROOM: u32 = 320;
/// What is left when it counts as full, in bytes: less than any snapshot with memory takes.
const LEFT: u64 = 6 << 20;

#[test]
fn a_full_disk_stops_the_snapshot_and_not_the_guest() {
    if let Some(image) = std::env::var_os("CATNAP_TEST_IMAGE") {
        return on_the_small_disk(Path::new(&image));
    }
    let folder = tempfile::tempdir_in(home()).expect("a folder");
    let mut again = Command::new("/proc/self/exe");
    again.args(["--exact", "a_full_disk_stops_the_snapshot_and_not_the_guest", "--nocapture"]);
    again.env("CATNAP_TEST_IMAGE", home().join("data")).env("CATNAP_HOME", folder.path());
    match namespace::on_a_small_disk(folder.path(), ROOM, &mut again) {
        None => println!("not run: this host has no namespaces for its users"),
        Some(ran) => println!("{}", ran.succeeds().text()),
    }
}

fn on_the_small_disk(image: &Path) {
    let data = home().join("data");
    fs::create_dir(&data).expect("a folder");
    for part in ["snapshots", "names", "verified"] {
        assert!(Command::new("cp").arg("-R").arg(image.join(part)).arg(&data).status().expect("cp").success());
    }
    let _swept = Swept;
    let anna = machine("anna").boot();
    anna.sh("head -c 20000000 /dev/urandom >/tmp/noise; md5sum </tmp/noise >/tmp/sum");
    let boot = anna.boot_id();
    fill(&home().join("filler"));
    let refused = anna.try_to_snapshot("full", &[]).refuses(1, &["No space left", "memory"]);
    println!("  {}", refused.err.trim());
    is_as_before(&anna, &boot);
    fs::remove_file(home().join("filler")).expect("the filler");
    anna.snapshot("one", &[]);
    catnap(&["snapshot", "verify", "anna@one"]).succeeds();
    // Now a difference is in the way of one that is not to be had.
    anna.sh("head -c 20000000 /dev/urandom >/tmp/noise; md5sum </tmp/noise >/tmp/sum");
    fill(&home().join("filler"));
    anna.try_to_snapshot("full", &[]).refuses(1, &["No space left"]);
    is_as_before(&anna, &boot);
    catnap(&["snapshot", "verify", "anna@one"]).succeeds();
    fs::remove_file(home().join("filler")).expect("the filler");
    anna.snapshot("two", &[]);
    drop(anna);
    let (bella, _) = wake("anna@two", "bella", &[]);
    bella.sh("md5sum </tmp/noise | cmp - /tmp/sum");
}

fn is_as_before(anna: &Machine, boot: &str) {
    assert_eq!(anna.boot_id(), boot, "the guest runs on");
    assert!(Swept::listed().iter().all(|name| name != "anna@full"));
    let half_made = || {
        fs::read_dir(home().join("data/staging"))
            .expect("a folder")
            .filter(|it| it.as_ref().is_ok_and(|it| it.path().is_dir()))
            .count()
    };
    within(common::PATIENCE, "nothing half made is left", || half_made() == 0);
}

/// Fills the disk but for a little.
fn fill(path: &Path) {
    let mut file = fs::File::create(path).expect("a file");
    while free(path) > LEFT {
        let size = (free(path) - LEFT).min(1 << 20);
        file.write_all(&vec![1; size as usize]).expect("room");
    }
}

/// Bytes that are free in a file's filesystem.
fn free(path: &Path) -> u64 {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(path.as_os_str().as_bytes()).expect("a path");
    // SAFETY: statvfs is plain data, which the call fills or fails.
    let mut found: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are valid for the call.
    assert_eq!(unsafe { libc::statvfs(path.as_ptr(), &mut found) }, 0);
    found.f_bavail * found.f_bsize
}
