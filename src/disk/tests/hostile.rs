//! Files that a stranger made.

use std::fs;
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;

use super::model::SIZE;
use super::{base, qemu_img};
use crate::disk::{Access, Format, create_overlay, open};

fn refusal(path: &Path, access: Access, root: &Path) -> String {
    match open(path, Format::Qcow2, access, root) {
        Ok(_) => panic!("{} was opened", path.display()),
        Err(error) => error.to_string(),
    }
}

#[test]
fn backing_files_stay_inside_the_store() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("store");
    fs::create_dir(&root).unwrap();
    base(dir.path());
    fs::rename(dir.path().join("base.qcow2"), dir.path().join("secret")).unwrap();
    symlink("../secret", root.join("link")).unwrap();
    let secret = dir.path().join("secret");
    for (name, why) in [
        ("../secret", "outside of the store"),
        ("link", "outside of the store"),
        (secret.to_str().unwrap(), "absolute path"),
        ("nbd://localhost/x", "not a file"),
        ("json:{\"driver\":\"file\"}", "not a file"),
        ("file:base", "not a file"),
        ("missing", "cannot be found"),
        (".", "not a plain file"),
    ] {
        let path = root.join("d.qcow2");
        let _ = fs::remove_file(&path);
        create_overlay(&path, name, Format::Qcow2, SIZE).unwrap();
        let said = refusal(&path, Access::ReadWrite, &root);
        assert!(said.contains(why), "{name}: {said}");
    }
}

#[test]
fn loops_and_endless_chains_end() {
    let dir = tempfile::tempdir().unwrap();
    for (name, backing) in [("a", "b"), ("b", "a")] {
        create_overlay(&dir.path().join(name), backing, Format::Qcow2, SIZE).unwrap();
    }
    assert!(refusal(&dir.path().join("a"), Access::ReadWrite, dir.path()).contains("backed by itself"));
    for i in 0..70 {
        create_overlay(&dir.path().join(format!("l{i}")), &format!("l{}", i + 1), Format::Qcow2, SIZE).unwrap();
    }
    assert!(refusal(&dir.path().join("l0"), Access::ReadWrite, dir.path()).contains("more than 64 files"));
}

#[test]
fn what_we_do_not_take_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (base, _) = base(dir.path());
    let good = fs::read(&base).unwrap();
    let changed = dir.path().join("changed.qcow2");
    for (at, bytes, why) in [
        (0, &b"QFI?"[..], "not a qcow2 file"),
        (4, &[0, 0, 0, 2], "version 2"),
        (20, &[0, 0, 0, 40], "2^40"),
        (24, &[0xff; 8], "its size"),
        (24, &[0, 0, 0, 0, 0, 0, 0, 1], "its size"),
        (32, &[0, 0, 0, 2], "encrypted"),
        (36, &[0xff; 4], "L1 table"),
        (36, &[0; 4], "L1 table"),
        (60, &[0, 0, 0, 1], "snapshots inside"),
        (79, &[1], "refcounts are stale"),
        (79, &[4], "external file"),
        (72, &[0x80], "unknown features"),
        (96, &[0, 0, 0, 9], "2^9 bits"),
        (100, &[0xff; 4], "no end"),
        (100, &[0; 4], "length of 0"),
        (104, &[1, 1, 1, 1, 0xff, 0xff, 0xff, 0xff], "longer than the header"),
        (40, &[0, 0, 0, 0, 0, 0, 0, 3], "Unaligned"),
    ] {
        fs::write(&changed, &good).unwrap();
        fs::OpenOptions::new().write(true).open(&changed).unwrap().write_all_at(bytes, at).unwrap();
        let said = refusal(&changed, Access::ReadOnly, dir.path());
        assert!(said.contains(why) && said.contains("changed.qcow2"), "{at}: {said}");
    }
    for length in [0, 3, 103, 104, 111] {
        fs::write(&changed, &good[..length]).unwrap();
        refusal(&changed, Access::ReadOnly, dir.path());
    }
}

#[test]
fn a_file_that_qemu_made_is_read_and_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let (base, model) = base(dir.path());
    let theirs = dir.path().join("theirs.qcow2");
    for options in [&["-c"][..], &[], &["-o", "cluster_size=512"], &["-o", "cluster_size=2M"]] {
        let base = base.to_str().unwrap();
        let (done, said) = qemu_img(&[&["convert", "-O", "qcow2"], options, &[base]].concat(), &theirs);
        assert!(done, "{said}");
        model.compare(&mut *open(&theirs, Format::Qcow2, Access::ReadOnly, dir.path()).unwrap());
        let said = refusal(&theirs, Access::ReadWrite, dir.path());
        assert!(said.contains("not made by Catnap"), "{said}");
    }
    let (done, _) = qemu_img(&["create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2"], &theirs);
    assert!(done);
    model.compare(&mut *open(&theirs, Format::Qcow2, Access::ReadOnly, dir.path()).unwrap());
}

#[test]
fn random_damage_is_an_error_or_other_data_and_never_a_crash() {
    let dir = tempfile::tempdir().unwrap();
    let (base, _) = base(dir.path());
    let good = fs::read(&base).unwrap();
    let changed = dir.path().join("changed.qcow2");
    let mut random = super::Random(9);
    let (mut opened, mut refused) = (0, 0);
    // The tables are the first 1 MiB or so; everything after them is data, and any data is fine.
    for _ in 0..200 {
        let mut bytes = good[..(1 << 20).min(good.len())].to_vec();
        for _ in 0..1 + random.below(4) {
            let at = match random.below(3) {
                0 => random.below(256),
                _ => random.below(bytes.len() as u64),
            };
            bytes[at as usize] ^= 1 << random.below(8);
        }
        fs::write(&changed, &bytes).unwrap();
        match open(&changed, Format::Qcow2, Access::ReadWrite, dir.path()) {
            Err(_) => refused += 1,
            Ok(mut disk) => {
                opened += 1;
                let memory = super::model::memory(1 << 17);
                let buffer = [super::model::slice(&memory, 1 << 17)];
                for offset in (0..SIZE).step_by(100 << 20) {
                    // Errors are fine here, and so is any data.
                    let _ = disk.read(&buffer, offset);
                    let _ = disk.write(&buffer, offset);
                    let _ = disk.discard(offset, 1 << 17);
                }
                let _ = disk.flush();
            }
        }
    }
    assert!(opened > 0 && refused > 0, "{opened} opened, {refused} refused");
}
