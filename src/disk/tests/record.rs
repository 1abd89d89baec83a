//! What was written to files, in order, so that a power cut can be put anywhere in between.

use std::cell::RefCell;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::{Arc, Mutex};

use imago::io_buffers::IoVector;

use super::model::Random;

/// One thing that happened to a file.
pub enum Event {
    Write(u64, Vec<u8>),
    Zeroes(u64, u64),
    /// Everything before is on the disk.
    Fence,
    /// The test was told that its n-th batch is safe.
    Flushed(usize),
    /// The n-th new top was prepared.
    Prepared(usize),
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

/// An event, and the inode of its file; zero when it is none of a file's.
pub type Entry = (u64, Event);

/// Collects what happens to the files that this thread opens while one is installed.
#[derive(Clone)]
pub struct Recorder(Arc<Mutex<Vec<Entry>>>);

thread_local!(static CURRENT: RefCell<Option<Recorder>> = const { RefCell::new(None) });

impl Recorder {
    pub fn install() -> Recorder {
        let recorder = Recorder(Arc::default());
        CURRENT.set(Some(recorder.clone()));
        recorder
    }

    /// Where what happens to this file is written down, if anybody wants to know.
    pub fn tape(file: &File) -> Option<Tape> {
        let inode = file.metadata().unwrap().ino();
        CURRENT.with(|current| current.borrow().clone()).map(|recorder| Tape { recorder, inode })
    }

    pub fn record(&self, event: Event) {
        self.0.lock().unwrap().push((0, event));
    }

    /// How much has happened.
    pub fn len(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    /// What has happened, and an end to it.
    pub fn finish(self) -> Vec<Entry> {
        CURRENT.set(None);
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

/// What happens to one file.
pub struct Tape {
    recorder: Recorder,
    inode: u64,
}

impl std::fmt::Debug for Tape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("tape")
    }
}

impl Tape {
    pub fn record(&self, event: Event) {
        self.recorder.0.lock().unwrap().push((self.inode, event));
    }
}

/// Writes a file as a power cut leaves it: all up to its last fence, and any of what came later. At first it
/// held `empty`.
pub fn lay_out(path: &Path, (inode, empty): (u64, &[u8]), entries: &[Entry], chance: &mut Random) {
    let events: Vec<_> = entries.iter().filter(|(of, _)| *of == inode).map(|(_, event)| event).collect();
    let fence = events.iter().rposition(|event| matches!(event, Event::Fence)).unwrap_or(0);
    fs::write(path, empty).unwrap();
    let file = File::options().write(true).open(path).unwrap();
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

/// The batches that were said to be safe by then.
pub fn flushed(entries: &[Entry]) -> usize {
    let last = entries.iter().rev().find_map(|(_, event)| match event {
        Event::Flushed(number) => Some(*number),
        _ => None,
    });
    last.unwrap_or(0)
}
