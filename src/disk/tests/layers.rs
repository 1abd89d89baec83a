//! A machine's own layers: which they are, and one made of many.

use std::fs;
use std::os::unix::fs::symlink;
use std::process::Command;

use vm_memory::{Bytes, GuestAddress};

use super::model::{self, SIZE};
use super::swap::Running;
use super::{base, qemu_img};
use crate::disk::{
    Access, Error, Format, MAX_LAYERS, Reach, create_overlay, depth, flatten, open, own_layers, prepare, tidy,
};

#[test]
fn only_plain_names_that_fall_are_layers() {
    let dir = tempfile::tempdir().unwrap();
    let (_, _) = base(dir.path());
    let at = |name: &str| dir.path().join(name);
    let make = |name: &str, backing: &str, format| {
        let _ = fs::remove_file(at(name));
        create_overlay(&at(name), backing, format, SIZE).unwrap();
    };
    // Spelt in another way, it is no layer but a base, and what that may be is for others to say.
    for name in [
        "base.qcow2",
        "root-0.qcow2",
        "root-07.qcow2",
        "root-+7.qcow2",
        "root-7.qcow2 ",
        "./root-7.qcow2",
        "../x/root-7.qcow2",
        "root-99999999999.qcow2",
        "boot-7.qcow2",
        "root-7/../../secret",
        "root.qcow2",
        "/etc/passwd",
    ] {
        make("root.qcow2", name, Format::Qcow2);
        let own = own_layers(&at("root.qcow2")).unwrap();
        assert_eq!((own.layers.len(), own.base), (0, Some((name.into(), Format::Qcow2))));
    }
    make("root-3.qcow2", "base.qcow2", Format::Qcow2);
    make("root-7.qcow2", "root-3.qcow2", Format::Qcow2);
    make("root.qcow2", "root-7.qcow2", Format::Qcow2);
    assert_eq!(own_layers(&at("root.qcow2")).unwrap().layers, [at("root-3.qcow2"), at("root-7.qcow2")]);

    let refused = || {
        let why = own_layers(&at("root.qcow2")).unwrap_err().to_string();
        // Nothing is removed on the word of a chain that cannot be followed.
        assert!(tidy(&at("root.qcow2")).is_err() && at("root-7.qcow2").symlink_metadata().is_ok());
        why
    };
    for higher in ["root-7.qcow2", "root-8.qcow2"] {
        make("root-3.qcow2", higher, Format::Qcow2);
        assert!(refused().contains("not an earlier layer"));
    }
    make("root.qcow2", "root-7.qcow2", Format::Raw);
    assert!(refused().contains("not an earlier layer"));
    make("root.qcow2", "root-7.qcow2", Format::Qcow2);
    fs::rename(at("root-7.qcow2"), at("elsewhere")).unwrap();
    symlink("elsewhere", at("root-7.qcow2")).unwrap();
    assert!(refused().contains("not a plain file"));
    fs::remove_file(at("root-7.qcow2")).unwrap();
    assert!(Command::new("mkfifo").arg(at("root-7.qcow2")).status().unwrap().success());
    assert!(refused().contains("not a plain file"));
    assert!(own_layers(&at("base.raw")).is_err());
    assert!(own_layers(&at("root-5.qcow2")).is_err());
}

#[test]
fn a_chain_that_is_too_long_is_flattened_while_the_disk_is_in_use() {
    let dir = tempfile::tempdir().unwrap();
    let mut running = Running::start(dir.path());
    assert!(flatten(&running.top, &running.root, Reach::Own).unwrap().is_none());
    let layers = MAX_LAYERS - 2;
    for _ in 0..layers {
        running.work(4);
        running.snapshot();
    }
    running.work(10);
    assert!(matches!(prepare(&running.top, &running.root), Err(Error::TooManyLayers(_))));
    assert_eq!(running.names().len(), layers + 1);

    let mut flattened = flatten(&running.top, &running.root, Reach::Own).unwrap().unwrap();
    running.work(10);
    let layer = flattened.layer().to_path_buf();
    assert!(layer.ends_with(format!("root-{}.qcow2", layers + 1)));
    // Before and after the adoption, a kill leaves a disk that opens and shows the same.
    running.disk.flush().unwrap();
    let before = dir.path().join("before");
    assert!(Command::new("cp").arg("-a").args([dir.path().join("anna"), before.clone()]).status().unwrap().success());
    running.disk.adopt(&mut flattened).unwrap();
    running.compare();
    running.work(10);
    running.compare();
    assert_eq!(own_layers(&running.top).unwrap().layers, [layer.as_path()]);
    flattened.remove_old().unwrap();
    assert_eq!(running.names().len(), 2);
    let (sound, said) = qemu_img(&["check", "-q"], &layer);
    assert!(sound, "{said}");

    running.snapshot();
    running.work(10);
    assert_eq!(own_layers(&running.top).unwrap().layers.len(), 2);
    assert_eq!(own_layers(&running.top).unwrap().base, Some(("../base.qcow2".into(), Format::Qcow2)));
    running.end();
    let top = before.join("root.qcow2");
    assert_eq!(tidy(&top).unwrap(), 1, "the flattened layer, which no header names");
    open(&top, Format::Qcow2, Access::ReadWrite, dir.path()).unwrap();
}

#[test]
fn what_is_flattened_is_sealed_and_goes_to_the_disk_that_it_came_from() {
    let dir = tempfile::tempdir().unwrap();
    let mut running = Running::start(dir.path());
    running.work(20);
    running.snapshot();
    running.work(20);
    let mut prepared = prepare(&running.top, &running.root).unwrap();
    let in_use = |running: &Running| matches!(flatten(&running.top, &running.root, Reach::Own), Err(Error::InUse(_)));
    assert!(in_use(&running));
    running.disk.swap(&mut prepared).unwrap();
    assert!(in_use(&running));
    running.disk.seal().unwrap();

    // A new top came in between: it is refused, and the file goes.
    let mut flattened = flatten(&running.top, &running.root, Reach::Own).unwrap().unwrap();
    running.work(20);
    let four = running.snapshot();
    assert!(four.ends_with("root-4.qcow2"));
    assert!(running.disk.adopt(&mut flattened).is_err());
    assert!(flattened.remove_old().is_err());
    assert_eq!(running.names(), ["root-1.qcow2", "root-2.qcow2", "root-4.qcow2", "root.qcow2"]);
    running.compare();

    // It can be used once.
    let mut flattened = flatten(&running.top, &running.root, Reach::Own).unwrap().unwrap();
    running.disk.adopt(&mut flattened).unwrap();
    assert!(running.disk.adopt(&mut flattened).is_err());
    flattened.remove_old().unwrap();
    running.compare();
    running.end();
}

#[test]
fn damaged_tables_are_not_flattened() {
    use std::os::unix::fs::FileExt;
    let dir = tempfile::tempdir().unwrap();
    let mut running = Running::start(dir.path());
    let layer = running.snapshot();
    running.snapshot();
    let file = fs::File::options().read(true).write(true).open(&layer).unwrap();
    let header = crate::disk::Header::read(&layer).unwrap();
    let tables = crate::disk::layout::l2_tables(&file, &header).unwrap().unwrap();
    for entry in [1 << 62, 0x200, tables.start & !0xffff, 1 << 50, u64::MAX] {
        file.write_all_at(&entry.to_be_bytes(), tables.start + 800).unwrap();
        assert!(matches!(flatten(&running.top, &running.root, Reach::Own), Err(Error::Refused { .. })), "{entry:x}");
        assert_eq!(running.names().len(), 3);
        assert_eq!(tidy(&running.top).unwrap(), 0);
    }
}

#[test]
fn a_disk_may_be_larger_than_what_it_is_made_over() {
    let dir = tempfile::tempdir().unwrap();
    // Ends within a cluster.
    let small = 4096;
    fs::write(dir.path().join("raw"), vec![7; small]).unwrap();
    crate::disk::create_from_raw(&dir.path().join("raw"), &dir.path().join("base.qcow2")).unwrap();
    let path = dir.path().join("root.qcow2");
    let size = 1 << 20;
    create_overlay(&path, "base.qcow2", Format::Qcow2, size as u64).unwrap();
    let mut disk = open(&path, Format::Qcow2, Access::ReadWrite, dir.path()).unwrap();
    let memory = model::memory(size as u64);
    let mut expected = vec![0; size];
    expected[..small].fill(7);
    for at in [0, 8192, 65536, size - 512] {
        let mut bytes = vec![1; size];
        memory.write_slice(&bytes, GuestAddress(0)).unwrap();
        disk.read(&[model::slice(&memory, size)], 0).unwrap();
        memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        assert!(bytes == expected, "{at}");
        memory.write_slice(&[5; 512], GuestAddress(0)).unwrap();
        disk.write(&[model::slice(&memory, 512)], at as u64).unwrap();
        expected[at..at + 512].fill(5);
    }
    drop(disk);
    let flat = dir.path().join("flat");
    assert!(qemu_img(&["convert", "-O", "raw", path.to_str().unwrap()], &flat).0);
    assert!(fs::read(flat).unwrap() == expected);
}

#[test]
fn a_chain_over_many_snapshots_is_flattened_down_to_the_image() {
    let dir = tempfile::tempdir().unwrap();
    let mut running = Running::start(dir.path());
    // Each generation wakes over the files of the one before.
    for generation in 1..40 {
        running.work(3);
        running = running.reborn(generation);
    }
    running.work(10);
    assert_eq!(depth(&running.top, &running.root).unwrap(), 41);
    assert!(flatten(&running.top, &running.root, Reach::Own).unwrap().is_none(), "it has none of its own");
    let mut flattened = flatten(&running.top, &running.root, Reach::All).unwrap().unwrap();
    running.work(10);
    running.disk.adopt(&mut flattened).unwrap();
    flattened.remove_old().unwrap();
    running.work(10);
    running.compare();
    assert_eq!(depth(&running.top, &running.root).unwrap(), 3);
    assert_eq!(own_layers(&running.top).unwrap().base, Some(("../base.qcow2".into(), Format::Qcow2)));
    // What it was flattened out of is nobody's any more.
    (1..40).for_each(|generation| fs::remove_dir_all(dir.path().join(format!("kept-{generation}"))).unwrap());
    running.snapshot();
    running.work(3);
    running.end();
}
