//! Disks against a model, against `qemu-img`, against `kill -9` and against power cuts.
//!
//! The model knows for every sector which contents are right: one after a write; the old one or zeros after
//! a discard; and after a crash, that of the last flush or of anything done since.

mod crash;
mod hostile;
mod layers;
pub(super) mod model;
mod power;
mod record;
mod swap;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use model::{Model, Random};
use vm_memory::{Bytes, GuestAddress};

pub(super) use record::{Event, Recorder, Tape};
pub(super) use swap::photograph;

use super::*;

/// A folder with `base.qcow2`, made from a raw file of known content, and the model of what is in it.
fn base(dir: &Path) -> (PathBuf, Model) {
    let raw = dir.join("base.raw");
    let file = fs::File::create(&raw).unwrap();
    file.set_len(model::SIZE).unwrap();
    drop(file);
    let mut model = Model::new();
    let mut disk = open(&raw, Format::Raw, Access::ReadWrite, dir).unwrap();
    let mut random = Random(7);
    for stamp in 1..40 {
        model.step(&mut *disk, &mut random, stamp).unwrap();
    }
    disk.flush().unwrap();
    drop(disk);
    let path = dir.join("base.qcow2");
    create_from_raw(&raw, &path).unwrap();
    (path, model)
}

fn qemu_img(arguments: &[&str], path: &Path) -> (bool, String) {
    let (code, said) = run_qemu_img(arguments, path);
    (code == Some(0), said)
}

/// Its exit code, and all that it said.
fn run_qemu_img(arguments: &[&str], path: &Path) -> (Option<i32>, String) {
    let begun = Instant::now();
    loop {
        let output = Command::new("qemu-img").args(arguments).arg(path).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        // A test beside this one that starts a program just now has inherited our lock, until that program runs.
        if !said.contains("Failed to lock") || begun.elapsed() > Duration::from_secs(10) {
            return (output.status.code(), said);
        }
    }
}

#[test]
fn a_raw_file_and_the_qcow2_made_from_it_hold_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let (path, model) = base(dir.path());
    let mut disk = open(&path, Format::Qcow2, Access::ReadOnly, dir.path()).unwrap();
    model.compare(&mut *disk);
    let (same, said) = qemu_img(&["compare", dir.path().join("base.raw").to_str().unwrap()], &path);
    assert!(same, "{said}");
    // The same content makes the same file, and holes cost nothing.
    let again = dir.path().join("again.qcow2");
    create_from_raw(&dir.path().join("base.raw"), &again).unwrap();
    assert!(fs::read(&path).unwrap() == fs::read(&again).unwrap());
    assert!(fs::metadata(&path).unwrap().len() < 16 << 20);
}

#[test]
fn a_chain_of_overlays_agrees_with_the_model_and_with_qemu() {
    let dir = tempfile::tempdir().unwrap();
    let (base, mut model) = base(dir.path());
    let before = fs::read(&base).unwrap();
    let mut below = "base.qcow2".to_string();
    let mut random = Random(1);
    let mut stamp = 1000;
    for layer in 0..3 {
        let name = format!("layer{layer}.qcow2");
        let path = dir.path().join(&name);
        create_overlay(&path, &below, Format::Qcow2, model::SIZE).unwrap();
        for _ in 0..3 {
            let mut disk = open(&path, Format::Qcow2, Access::ReadWrite, dir.path()).unwrap();
            for _ in 0..60 {
                stamp += 1;
                model.step(&mut *disk, &mut random, stamp).unwrap();
            }
            model.compare(&mut *disk);
            disk.flush().unwrap();
        }
        let (sound, said) = qemu_img(&["check", "-q"], &path);
        assert!(sound, "{said}");
        below = name;
    }
    assert!(fs::read(&base).unwrap() == before, "the base was written to");
    let (_, said) = qemu_img(&["info", "--backing-chain"], &dir.path().join(&below));
    for name in ["layer2.qcow2", "layer1.qcow2", "layer0.qcow2", "base.qcow2"] {
        assert!(said.contains(&format!("image: {}", dir.path().join(name).display())), "{said}");
    }
    assert_eq!(said.matches("virtual size: 2 GiB").count(), 4, "{said}");
    // What QEMU reads through the whole chain is what we read.
    let flat = dir.path().join("flat.raw");
    let (done, said) = qemu_img(&["convert", "-O", "raw", dir.path().join(&below).to_str().unwrap()], &flat);
    assert!(done, "{said}");
    model.compare(&mut *open(&flat, Format::Raw, Access::ReadOnly, dir.path()).unwrap());
}

#[test]
fn a_disk_has_one_writer() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d.qcow2");
    let (base, _) = base(dir.path());
    create_overlay(&path, "base.qcow2", Format::Qcow2, model::SIZE).unwrap();
    let disk = open(&path, Format::Qcow2, Access::ReadWrite, dir.path()).unwrap();
    for access in [Access::ReadWrite, Access::ReadOnly] {
        assert!(matches!(open(&path, Format::Qcow2, access, dir.path()), Err(Error::InUse(_))));
    }
    let (taken, said) = qemu_img(&["resize", "-f", "qcow2", path.to_str().unwrap()], Path::new("4G"));
    assert!(!taken && said.contains("lock"), "{said}");
    // The base has as many readers as there are.
    let _other = open(&base, Format::Qcow2, Access::ReadOnly, dir.path()).unwrap();
    drop(disk);
    open(&path, Format::Qcow2, Access::ReadWrite, dir.path()).unwrap();
}

#[test]
fn discarded_space_goes_back_to_the_host_and_is_used_again() {
    const MIB: u64 = 1 << 20;
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("d.raw");
    fs::File::create(&raw).unwrap().set_len(model::SIZE).unwrap();
    let qcow2 = dir.path().join("d.qcow2");
    create_overlay(&qcow2, "d.raw", Format::Raw, model::SIZE).unwrap();
    for (path, format) in [(qcow2, Format::Qcow2), (raw, Format::Raw)] {
        let used = || fs::metadata(&path).unwrap().blocks() * 512;
        let mut disk = open(&path, format, Access::ReadWrite, dir.path()).unwrap();
        let memory = model::memory(8 * MIB);
        memory.write_slice(&[7; 8 << 20], GuestAddress(0)).unwrap();
        for unmap in [None, Some(true)] {
            disk.write(&[model::slice(&memory, 8 << 20)], MIB).unwrap();
            disk.flush().unwrap();
            assert!(used() >= 8 * MIB, "{}", used());
            let (offset, length) = (MIB + 512, 8 * MIB - 512);
            match unmap {
                None => disk.discard(offset, length).unwrap(),
                Some(unmap) => disk.write_zeroes(offset, length, unmap).unwrap(),
            }
            disk.flush().unwrap();
            assert!(used() < MIB, "{}", used());
        }
        // The file did not grow for the second time.
        assert!(format == Format::Raw || fs::metadata(&path).unwrap().len() < 10 * MIB);
    }
}

#[test]
fn requests_beyond_the_end_touch_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (base, model) = base(dir.path());
    let path = dir.path().join("d.qcow2");
    create_overlay(&path, "base.qcow2", Format::Qcow2, model::SIZE).unwrap();
    for (path, format) in [(path, Format::Qcow2), (dir.path().join("base.raw"), Format::Raw)] {
        let mut disk = open(&path, format, Access::ReadWrite, dir.path()).unwrap();
        let memory = model::memory(1024);
        let buffer = [model::slice(&memory, 1024)];
        for offset in [model::SIZE - 512, model::SIZE, u64::MAX - 511, u64::MAX] {
            let refused = [
                disk.read(&buffer, offset),
                disk.write(&buffer, offset),
                disk.discard(offset, 1024),
                disk.write_zeroes(offset, 1024, true),
                disk.write_zeroes(offset, u64::MAX, false),
            ];
            for result in refused {
                assert_eq!(result.unwrap_err().kind(), io::ErrorKind::InvalidInput);
            }
        }
        model.compare(&mut *disk);
    }
    assert!(base.exists());
}
