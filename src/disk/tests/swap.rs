//! A new top for a disk that is in use.

use std::cell::RefCell;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::crash::check;
use super::model::{Model, Random, SIZE};
use super::record::{Event, Recorder};
use super::{base, qemu_img};
use crate::disk::{Access, Disk, Error, Format, create_overlay, open, own_layers, prepare, tidy};
use crate::sys::files::names_in;

/// A disk over a base, in a folder of its own, with the model of what is in it.
pub struct Running {
    pub top: PathBuf,
    pub root: PathBuf,
    pub disk: Box<dyn Disk>,
    pub model: Model,
    random: Random,
    stamp: u32,
}

impl Running {
    pub fn start(root: &Path) -> Running {
        let (_, model) = base(root);
        let top = root.join("anna/root.qcow2");
        fs::create_dir(root.join("anna")).unwrap();
        create_overlay(&top, "../base.qcow2", Format::Qcow2, SIZE).unwrap();
        let disk = open(&top, Format::Qcow2, Access::ReadWrite, root).unwrap();
        Running { top, root: root.into(), disk, model, random: Random(5), stamp: 100 }
    }

    pub fn work(&mut self, steps: usize) {
        for _ in 0..steps {
            self.stamp += 1;
            self.model.step(&mut *self.disk, &mut self.random, self.stamp).unwrap();
        }
    }

    pub fn compare(&mut self) {
        self.model.compare(&mut *self.disk);
    }

    /// The layer that the snapshot gets.
    pub fn snapshot(&mut self) -> PathBuf {
        let mut prepared = prepare(&self.top, &self.root).unwrap();
        self.disk.swap(&mut prepared).unwrap();
        self.disk.seal().unwrap();
        prepared.layer().into()
    }

    /// Another machine that wakes over all that this one has written.
    pub fn reborn(self, generation: u32) -> Running {
        let Running { top, root, disk, model, random, stamp } = self;
        drop(disk);
        let folder = top.parent().unwrap();
        fs::rename(folder, root.join(format!("kept-{generation}"))).unwrap();
        fs::create_dir(folder).unwrap();
        create_overlay(&top, &format!("../kept-{generation}/root.qcow2"), Format::Qcow2, SIZE).unwrap();
        let disk = open(&top, Format::Qcow2, Access::ReadWrite, &root).unwrap();
        Running { top, root, disk, model, random, stamp }
    }

    /// Ends, and checks what QEMU and a next start see.
    pub fn end(self) {
        let Running { top, root, disk, model, .. } = self;
        drop(disk);
        check(&top);
        by_qemu(&top, &root, &model);
        model.compare(&mut *open(&top, Format::Qcow2, Access::ReadWrite, &root).unwrap());
    }

    pub fn names(&self) -> Vec<String> {
        names_in(self.top.parent().unwrap()).unwrap()
    }
}

/// QEMU reads through the whole chain what the model says.
fn by_qemu(top: &Path, root: &Path, model: &Model) {
    let flat = root.join("flat.raw");
    let (done, said) = qemu_img(&["convert", "-O", "raw", top.to_str().unwrap()], &flat);
    assert!(done, "{said}");
    model.compare(&mut *open(&flat, Format::Raw, Access::ReadOnly, root).unwrap());
}

#[test]
fn a_snapshot_holds_what_was_written_before_and_the_disk_all_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut running = Running::start(dir.path());
    let mut snapshots = Vec::new();
    for round in 1..4 {
        running.work(40);
        let mut prepared = prepare(&running.top, &running.root).unwrap();
        // The machine goes on writing to what is called differently by now.
        running.work(20);
        let before = running.model.clone();
        running.disk.swap(&mut prepared).unwrap();
        running.compare();
        running.work(20);
        running.compare();
        running.disk.seal().unwrap();
        running.compare();
        let layer = prepared.layer();
        assert!(layer.ends_with(format!("root-{round}.qcow2")));
        let (sound, said) = qemu_img(&["check", "-q"], layer);
        assert!(sound, "{said}");
        // As a snapshot does: links to all layers, under the same names.
        let folder = dir.path().join(format!("snapshot{round}"));
        fs::create_dir(&folder).unwrap();
        let own = own_layers(&running.top).unwrap();
        assert_eq!(own.base, Some(("../base.qcow2".into(), Format::Qcow2)));
        assert_eq!(own.layers.len(), round);
        for path in &own.layers {
            fs::hard_link(path, folder.join(path.file_name().unwrap())).unwrap();
        }
        let top = folder.join(layer.file_name().unwrap());
        snapshots.push((top.clone(), before, fs::read(top).unwrap()));
    }
    running.work(60);
    running.disk.flush().unwrap();
    running.compare();
    for (top, model, bytes) in &snapshots {
        assert!(fs::read(top).unwrap() == *bytes, "a sealed layer was written to");
        by_qemu(top, dir.path(), model);
        model.compare(&mut *open(top, Format::Qcow2, Access::ReadOnly, dir.path()).unwrap());
    }
    running.end();
}

#[test]
fn a_swap_touches_no_file_and_a_flush_takes_the_lower_layer_first() {
    let dir = tempfile::tempdir().unwrap();
    let recorder = Recorder::install();
    let mut running = Running::start(dir.path());
    running.work(20);
    running.disk.flush().unwrap();
    running.work(20);
    let old = fs::metadata(&running.top).unwrap().ino();
    let mut prepared = prepare(&running.top, &running.root).unwrap();
    let new = fs::metadata(&running.top).unwrap().ino();
    let swap = recorder.len();
    running.disk.swap(&mut prepared).unwrap();
    assert_eq!(recorder.len(), swap);
    running.work(20);
    let flush = recorder.len();
    running.disk.flush().unwrap();
    let flushed = recorder.len();
    running.disk.seal().unwrap();
    let sealed = recorder.len();
    running.work(20);
    running.disk.flush().unwrap();
    drop(running);

    let entries = recorder.finish();
    let fences = |range: std::ops::Range<usize>| {
        entries[range].iter().filter(|(_, event)| matches!(event, Event::Fence)).map(|(of, _)| *of).collect::<Vec<_>>()
    };
    let order = fences(flush..flushed);
    assert!(order.starts_with(&[old]) && order.ends_with(&[new]) && order.is_sorted_by_key(|of| *of == new));
    assert_eq!(sealed, flushed, "after a flush, there is nothing left to seal");
    assert!(entries[sealed..].iter().all(|(of, _)| *of == new));
}

#[test]
fn what_was_prepared_for_nothing_leaves_no_trace() {
    let dir = tempfile::tempdir().unwrap();
    let mut running = Running::start(dir.path());
    let inode = fs::metadata(&running.top).unwrap().ino();
    for dropped in [false, true] {
        running.work(20);
        let prepared = prepare(&running.top, &running.root).unwrap();
        assert_eq!(running.names(), ["root-1.qcow2", "root.qcow2"]);
        running.work(20);
        if dropped {
            drop(prepared)
        } else {
            prepared.abandon().unwrap()
        }
        assert_eq!(running.names(), ["root.qcow2"]);
        assert_eq!(fs::metadata(&running.top).unwrap().ino(), inode);
    }
    running.work(20);
    running.disk.flush().unwrap();
    running.compare();
    // And what was used is not put back.
    let mut prepared = prepare(&running.top, &running.root).unwrap();
    running.disk.swap(&mut prepared).unwrap();
    prepared.abandon().unwrap();
    assert_eq!(running.names(), ["root-1.qcow2", "root.qcow2"]);
    running.work(20);
    running.end();
}

#[test]
fn a_new_top_goes_over_the_disk_that_it_was_made_for_and_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let mut running = Running::start(dir.path());
    let refused = |disk: &mut dyn Disk, prepared: &mut _| matches!(disk.swap(prepared), Err(Error::Refused { .. }));

    let other = dir.path().join("root.qcow2");
    create_overlay(&other, "base.qcow2", Format::Qcow2, SIZE).unwrap();
    let mut others = prepare(&other, dir.path()).unwrap();
    assert!(refused(&mut *running.disk, &mut others));
    let mut raw = open(&dir.path().join("base.raw"), Format::Raw, Access::ReadWrite, dir.path()).unwrap();
    assert!(refused(&mut *raw, &mut others));
    let old = open(others.layer(), Format::Qcow2, Access::ReadOnly, dir.path());
    assert!(refused(&mut *old.unwrap(), &mut others));
    // Nobody else comes in between.
    assert!(matches!(open(&other, Format::Qcow2, Access::ReadWrite, dir.path()), Err(Error::InUse(_))));
    drop(others);

    let mut prepared = prepare(&running.top, &running.root).unwrap();
    running.disk.swap(&mut prepared).unwrap();
    assert!(refused(&mut *running.disk, &mut prepared));
    // Not sealed yet, so QEMU keeps away from it.
    assert!(!qemu_img(&["info"], prepared.layer()).0);
    running.disk.seal().unwrap();
    running.disk.seal().unwrap();
    assert!(qemu_img(&["info"], prepared.layer()).0);
    running.work(20);
    running.end();
    assert!(prepare(&dir.path().join("base.raw"), dir.path()).is_err());
}

thread_local!(static ALBUM: RefCell<Option<PathBuf>> = const { RefCell::new(None) });

/// Copies the folder, with which names are links to one file, as a kill at this moment would leave it.
pub fn photograph(dir: &Path) {
    ALBUM.with_borrow(|album| {
        let Some(album) = album else { return };
        let number = fs::read_dir(album).unwrap().count();
        let copy = album.join(number.to_string());
        assert!(Command::new("cp").arg("-a").arg(dir).arg(copy).status().unwrap().success());
    });
}

#[test]
fn a_kill_at_any_step_of_preparing_leaves_a_disk_that_opens() {
    let dir = tempfile::tempdir().unwrap();
    let mut running = Running::start(dir.path());
    running.work(60);
    running.snapshot();
    running.work(60);
    running.disk.flush().unwrap();
    // The photographs lie as deep as the original, so that the base is found from there.
    let album = dir.path().join("album");
    fs::create_dir(&album).unwrap();
    fs::hard_link(dir.path().join("base.qcow2"), dir.path().join("album/base.qcow2")).unwrap();
    ALBUM.set(Some(album.clone()));
    let prepared = prepare(&running.top, &running.root).unwrap();
    ALBUM.set(None);
    drop(prepared);

    let mut seen = Vec::new();
    for number in 1.. {
        let folder = album.join(number.to_string());
        if !folder.exists() {
            break;
        }
        let top = folder.join("root.qcow2");
        seen.push(names_in(&folder).unwrap().len());
        // As it is; then tidied up, also with a file that was cut off in the making; then as the next start has it.
        running.model.compare(&mut *open(&top, Format::Qcow2, Access::ReadWrite, dir.path()).unwrap());
        fs::write(folder.join(".root-1-2-3"), "cut off").unwrap();
        fs::write(folder.join("root-9x.qcow2"), "not ours").unwrap();
        assert!(tidy(&top).unwrap() >= 1);
        assert_eq!(tidy(&top).unwrap(), 0);
        let own = own_layers(&top).unwrap();
        assert_eq!(fs::read_dir(&folder).unwrap().count(), own.layers.len() + 2);
        let mut disk = open(&top, Format::Qcow2, Access::ReadWrite, dir.path()).unwrap();
        running.model.compare(&mut *disk);
        disk.swap(&mut prepare(&top, dir.path()).unwrap()).unwrap();
        disk.seal().unwrap();
        running.model.compare(&mut *disk);
    }
    assert_eq!(seen, [3, 3, 3, 3], "linked, made, renamed, synced");
    running.end();
}
