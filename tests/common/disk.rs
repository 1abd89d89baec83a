//! Disks, as qemu-img and e2fsck see them. Only machines that do not run may be looked at.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use sha2::{Digest, Sha256};

use super::ran::{Ran, run};
use super::{Machine, home};

/// The image's root disk: the base under every machine.
pub fn base() -> PathBuf {
    let digest = fs::read_to_string(home().join("data/names/kitten")).expect("the image");
    home().join("data/snapshots").join(digest.trim().trim_start_matches("sha256:")).join("root.qcow2")
}

/// What tells two files apart.
pub fn digest(path: &Path) -> String {
    let mut hash = Sha256::new();
    std::io::copy(&mut File::open(path).expect("a file"), &mut hash).expect("its bytes");
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The most clusters that one kill may leak: those of one request of the guest, which may span a few.
const LEAKS: u64 = 8;

impl Machine {
    pub fn disk(&self) -> PathBuf {
        super::machine_folder(&self.name).join("root.qcow2")
    }

    /// qemu-img finds no fault with the machine's disk: its own layers, perhaps some of snapshots, and the base.
    pub fn disk_is_sound(&self) {
        self.disk_is_sound_after(0);
    }

    /// The same for a disk whose monitor was killed so many times. A cluster is counted as used before
    /// anything points to it, so each kill may leak what was being allocated: space is lost, and nothing else.
    pub fn disk_is_sound_after(&self, kills: u64) {
        let disk = self.disk();
        let ran = qemu_img(&["check", "--output=json"], &disk);
        let check = ran.json();
        let count = |fault: &str| check.get(fault).and_then(Value::as_u64).unwrap_or(0);
        assert_eq!((count("corruptions"), count("check-errors")), (0, 0), "{check}");
        assert!(count("leaks") <= kills * LEAKS, "{check}");
        // 3 stands for leaks and nothing worse.
        ran.exits(if count("leaks") > 0 { 3 } else { 0 });
        let chain = qemu_img(&["info", "--output=json", "--backing-chain"], &disk).succeeds().json();
        let files: Vec<&str> =
            chain.as_array().expect("a list").iter().filter_map(|it| it["filename"].as_str()).collect();
        let files: Vec<PathBuf> = files.into_iter().map(|file| fs::canonicalize(file).expect("a file")).collect();
        let [disk, base] = [disk, base()].map(|file| fs::canonicalize(file).expect("a file"));
        assert_eq!((files.first(), files.last()), (Some(&disk), Some(&base)));
        let own = disk.parent().expect("a folder");
        let kept = fs::canonicalize(home().join("data/snapshots")).expect("a folder");
        assert!(files.iter().all(|file| file.starts_with(own) || file.starts_with(&kept)), "{files:?}");
    }

    /// The filesystem on the machine's disk needs no repair, not even its journal played back.
    pub fn filesystem_is_clean(&self) {
        let folder = tempfile::tempdir_in(home()).expect("a folder");
        let raw = folder.path().join("raw");
        let mut convert = Command::new("qemu-img");
        run(convert.args(["convert", "-O", "raw"]).args([&self.disk(), &raw])).succeeds();
        let ran = run(Command::new("e2fsck").env("PATH", "/bin:/sbin:/usr/bin:/usr/sbin").args(["-f", "-n"]).arg(&raw));
        let ran = ran.succeeds();
        assert!(
            !ran.text().contains("recovery") && !ran.err.contains("recovery"),
            "the journal was left behind: {ran}"
        );
    }
}

fn qemu_img(words: &[&str], disk: &Path) -> Ran {
    run(Command::new("qemu-img").args(words).arg(disk))
}
