//! What is left after `kill -9`, and after a power cut.

use std::cell::RefCell;
use std::fs::{self, OpenOptions};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use imago::io_buffers::IoVector;

use super::model::{Model, Random, SIZE};
use super::{base, qemu_img};
use crate::disk::{Access, Format, create_overlay, open};

/// One thing that happened to a file.
pub enum Event {
    Write(u64, Vec<u8>),
    Zeroes(u64, u64),
    /// Everything before is on the disk.
    Fence,
    /// The test was told that its n-th batch is safe.
    Flushed(usize),
}

impl Event {
    pub fn write(vector: &IoVector<'_>, offset: u64) -> Event {
        let mut bytes = vec![0; vector.len() as usize];
        vector.copy_into_slice(&mut bytes);
        Event::Write(offset, bytes)
    }

    pub fn zeroes(offset: u64, length: u64) -> Event {
        Event::Zeroes(offset, length)
    }
}

/// Collects what happens to the files that this thread opens while one is installed.
#[derive(Clone, Debug)]
pub struct Recorder(Arc<Mutex<Vec<Event>>>);

impl std::fmt::Debug for Event {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("event")
    }
}

thread_local!(static CURRENT: RefCell<Option<Recorder>> = const { RefCell::new(None) });

impl Recorder {
    pub fn current() -> Option<Recorder> {
        CURRENT.with(|current| current.borrow().clone())
    }

    pub fn record(&self, event: Event) {
        self.0.lock().unwrap().push(event);
    }

    fn install() -> Recorder {
        let recorder = Recorder(Arc::default());
        CURRENT.set(Some(recorder.clone()));
        recorder
    }
}

const BATCH: usize = 7;

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
fn after(start: &Model, seed: u64, flushed: usize) -> Model {
    let (mut model, mut random) = (start.clone(), Random(seed));
    (0..flushed).for_each(|number| batch(&mut Nowhere, &mut model, &mut random, number));
    let mut allowed = model.clone();
    for step in 0..BATCH {
        model.step(&mut Nowhere, &mut random, (10_000 + flushed * BATCH + step) as u32).unwrap();
        allowed.allow(&model);
    }
    allowed
}

fn check(path: &Path) {
    // Exit code 0: all is well; 3: clusters are leaked, which costs space and nothing else.
    let output = Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(path).output().unwrap();
    assert!(matches!(output.status.code(), Some(0 | 3)), "{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
fn a_power_cut_at_any_moment_loses_nothing_that_was_flushed() {
    let dir = tempfile::tempdir().unwrap();
    let (_, start) = base(dir.path());
    let path = dir.path().join("d.qcow2");
    create_overlay(&path, "base.qcow2", Format::Qcow2, SIZE).unwrap();
    let empty = fs::read(&path).unwrap();

    let recorder = Recorder::install();
    let mut disk = open(&path, Format::Qcow2, Access::ReadWrite, dir.path()).unwrap();
    let (mut model, mut random) = (start.clone(), Random(42));
    for number in 0..25 {
        batch(&mut *disk, &mut model, &mut random, number);
        disk.flush().unwrap();
        recorder.record(Event::Flushed(number + 1));
    }
    drop(disk);
    CURRENT.set(None);
    let events = std::mem::take(&mut *recorder.0.lock().unwrap());
    assert!(matches!(events[events.len() - 2], Event::Fence), "a flush ends with a fence");

    let mut chance = Random(1);
    for _ in 0..150 {
        let cut = chance.below(events.len() as u64) as usize;
        let flushed = events[..cut].iter().rev().find_map(|event| match event {
            Event::Flushed(number) => Some(*number),
            _ => None,
        });
        lay_out(&path, &empty, &events[..cut], &mut chance);
        check(&path);
        let mut disk = open(&path, Format::Qcow2, Access::ReadWrite, dir.path()).unwrap();
        after(&start, 42, flushed.unwrap_or(0)).compare(&mut *disk);
    }
}

/// Writes the file as a power cut leaves it: all up to the last fence, and any of what came later.
fn lay_out(path: &Path, empty: &[u8], events: &[Event], chance: &mut Random) {
    let fence = events.iter().rposition(|event| matches!(event, Event::Fence)).unwrap_or(0);
    fs::write(path, empty).unwrap();
    let file = OpenOptions::new().write(true).open(path).unwrap();
    for (i, event) in events.iter().enumerate() {
        let survives = |chance: &mut Random| i < fence || chance.below(2) == 0;
        match event {
            Event::Write(offset, bytes) => {
                // Sectors are whole; everything larger can be torn.
                for (n, sector) in bytes.chunks(512).enumerate() {
                    if survives(chance) {
                        file.write_all_at(sector, offset + n as u64 * 512).unwrap();
                    }
                }
            }
            Event::Zeroes(offset, length) if survives(chance) => {
                file.write_all_at(&vec![0; *length as usize], *offset).unwrap();
            }
            _ => {}
        }
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
