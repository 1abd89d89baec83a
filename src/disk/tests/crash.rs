//! What is left after `kill -9`, and after a power cut.

use std::fs;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::model::{Model, Random, SIZE};
use super::record::{Event, Recorder, flushed, lay_out};
use super::{base, qemu_img, run_qemu_img};
use crate::disk::{Access, Format, create_overlay, open};

pub const BATCH: usize = 7;

/// Does one batch of work.
fn batch(disk: &mut dyn crate::disk::Disk, model: &mut Model, random: &mut Random, number: usize) {
    for step in 0..BATCH {
        model.step(disk, random, (10_000 + number * BATCH + step) as u32).unwrap();
    }
}

/// A disk that takes the steps and does nothing, so that a model can be brought forward alone.
struct Nowhere;

impl crate::disk::Disk for Nowhere {
    fn len(&self) -> u64 {
        SIZE
    }
    fn read(&mut self, _: &[crate::disk::Buffer<'_>], _: u64) -> std::io::Result<()> {
        Ok(())
    }
    fn write(&mut self, _: &[crate::disk::Buffer<'_>], _: u64) -> std::io::Result<()> {
        Ok(())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
    fn discard(&mut self, _: u64, _: u64) -> std::io::Result<()> {
        Ok(())
    }
    fn write_zeroes(&mut self, _: u64, _: u64, _: bool) -> std::io::Result<()> {
        Ok(())
    }
}

/// What may be on the disk when `flushed` batches were flushed and one more may have been under way.
pub fn after(start: &Model, seed: u64, flushed: usize) -> Model {
    let (mut model, mut random) = (start.clone(), Random(seed));
    (0..flushed).for_each(|number| batch(&mut Nowhere, &mut model, &mut random, number));
    let mut allowed = model.clone();
    for step in 0..BATCH {
        model.step(&mut Nowhere, &mut random, (10_000 + flushed * BATCH + step) as u32).unwrap();
        allowed.allow(&model);
    }
    allowed
}

pub fn check(path: &Path) {
    // Exit code 0: all is well; 3: clusters are leaked, which costs space and nothing else.
    let (code, said) = run_qemu_img(&["check", "-f", "qcow2"], path);
    assert!(matches!(code, Some(0 | 3)), "{said}");
}

#[test]
fn a_power_cut_at_any_moment_loses_nothing_that_was_flushed() {
    let dir = tempfile::tempdir().unwrap();
    let (_, start) = base(dir.path());
    let path = dir.path().join("d.qcow2");
    create_overlay(&path, "base.qcow2", Format::Qcow2, SIZE).unwrap();
    let empty = fs::read(&path).unwrap();
    let inode = fs::metadata(&path).unwrap().ino();

    let recorder = Recorder::install();
    let mut disk = open(&path, Format::Qcow2, Access::ReadWrite, dir.path()).unwrap();
    let (mut model, mut random) = (start.clone(), Random(42));
    for number in 0..25 {
        batch(&mut *disk, &mut model, &mut random, number);
        disk.flush().unwrap();
        recorder.record(Event::Flushed(number + 1));
    }
    drop(disk);
    let events = recorder.finish();
    assert!(matches!(events[events.len() - 2].1, Event::Fence), "a flush ends with a fence");

    let mut chance = Random(1);
    for _ in 0..150 {
        let cut = chance.below(events.len() as u64) as usize;
        lay_out(&path, (inode, &empty), &events[..cut], &mut chance);
        check(&path);
        let mut disk = open(&path, Format::Qcow2, Access::ReadWrite, dir.path()).unwrap();
        after(&start, 42, flushed(&events[..cut])).compare(&mut *disk);
    }
}

#[test]
fn a_killed_process_loses_nothing_that_was_flushed() {
    const SEED: &str = "CATNAP_TEST_WRITER_SEED";
    const FOLDER: &str = "CATNAP_TEST_WRITER_FOLDER";
    if let (Some(seed), Some(folder)) = (std::env::var_os(SEED), std::env::var_os(FOLDER)) {
        return write_until_killed(seed.to_str().unwrap().parse().unwrap(), Path::new(&folder));
    }
    let dir = tempfile::tempdir().unwrap();
    let (_, start) = base(dir.path());
    let path = dir.path().join("d.qcow2");
    let mut chance = Random(3);
    let mut most = 0;
    for seed in 0..40 {
        let _ = fs::remove_file(&path);
        create_overlay(&path, "base.qcow2", Format::Qcow2, SIZE).unwrap();
        let mut writer = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture", "disk::tests::crash::a_killed_process_loses_nothing_that_was_flushed"])
            .env(SEED, seed.to_string())
            .env(FOLDER, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(20 + chance.below(300)));
        writer.kill().unwrap();
        writer.wait().unwrap();
        let mut said = String::new();
        writer.stdout.take().unwrap().read_to_string(&mut said).unwrap();
        let flushed = said.matches("flushed\n").count();
        most = most.max(flushed);
        check(&path);
        let mut disk = open(&path, Format::Qcow2, Access::ReadWrite, dir.path()).unwrap();
        after(&start, seed, flushed).compare(&mut *disk);
        let (read, said) = qemu_img(&["info", "--backing-chain", "-U"], &path);
        assert!(read, "{said}");
    }
    assert!(most > 2, "no writer got anywhere before it was killed");
}

fn write_until_killed(seed: u64, folder: &Path) {
    let mut disk = open(&folder.join("d.qcow2"), Format::Qcow2, Access::ReadWrite, folder).unwrap();
    let (mut model, mut random) = (Model::new(), Random(seed));
    for number in 0.. {
        batch(&mut *disk, &mut model, &mut random, number);
        disk.flush().unwrap();
        println!("flushed");
    }
}
