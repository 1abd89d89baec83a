//! What the agent may do to the whole machine: freeze and thaw it, mount and unmount disks that come and go, and tell
//! it that it was woken.

mod bays;
mod freeze;
mod hooks;
mod mounts;
mod scrub;
mod wake;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::protocol::{Scrubbed, Wake};
use crate::site::book::GuestBook;

pub use bays::LOST;
pub use mounts::{Mount, mounts};
pub(crate) use wake::settle;

/// The machine that PID 1 looks after.
pub struct Machine {
    generation: Arc<AtomicU64>,
    book: Arc<GuestBook>,
    freezer: freeze::Freezer,
    hooks: PathBuf,
}

impl Machine {
    /// The machine, with the hooks in `hooks` (`/etc/catnap`).
    pub fn new(book: Arc<GuestBook>, generation: Arc<AtomicU64>, hooks: PathBuf) -> Arc<Machine> {
        let freezer = freeze::Freezer::new(book.clone(), hooks.join("quiesce.d"));
        Arc::new(Machine { generation, book, freezer, hooks })
    }

    /// How often the machine was woken.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Relaxed)
    }

    /// Whether filesystems are frozen now.
    pub fn frozen(&self) -> bool {
        self.freezer.frozen()
    }

    /// Makes everything on the disks complete and keeps it still, for `seconds` at most.
    pub fn freeze(&self, seconds: u32) -> Result<(), String> {
        self.freezer.freeze(seconds)
    }

    /// Ends a freeze.
    pub fn thaw(&self) -> Result<(), String> {
        self.freezer.thaw()
    }

    /// Mounts the disk in a bay, after making a filesystem on it if it is blank.
    pub fn mount(&self, bay: &str, at: &str, size: u64) -> Result<(), String> {
        bays::mount(bay, at, size)
    }

    /// Unmounts the disk in a bay; says whether nobody holds it any more.
    pub fn unmount(&self, bay: &str, force: bool) -> Result<bool, String> {
        bays::unmount(bay, force)
    }

    /// Writes to the disks in all bays what is still held back.
    pub fn sync_bays(&self) -> Result<(), String> {
        bays::sync()
    }

    /// Removes files from the disk for good. Only a machine that does not run on it may.
    pub fn scrub(&self, patterns: &[String]) -> Result<Scrubbed, String> {
        scrub::scrub(patterns)
    }

    /// The machine was restored. All steps are tried; what failed is said.
    pub fn wake(&self, wake: &Wake) -> Result<(), String> {
        wake::check(wake)?;
        let mut failed = Vec::new();
        let mut note = |what: &str, result: Result<(), String>| {
            if let Err(why) = result {
                failed.push(format!("{what}: {why}"));
            }
        };
        note("entropy", wake::add_entropy(&wake.entropy));
        note("clock", wake::set_clock(wake.realtime_ns));
        // Raised before the disk is written to, so that even a failing disk does not hide it.
        let generation = match wake.generation {
            0 => self.generation().saturating_add(1),
            wanted => wanted,
        };
        self.generation.fetch_max(generation, Ordering::Relaxed);
        // A snapshot that was taken in a freeze would stay frozen until the watchdog comes.
        note("thaw", self.thaw());
        note("transient disks", bays::let_go(&wake.ephemeral));
        if let Some(identity) = &wake.identity {
            note("identity", wake::set_identity(identity));
        }
        note("settings", wake::set(&wake.settings));
        let hooks = self.hooks.join("wake.d");
        match hooks::are_in(&hooks) {
            // The disk takes its time, and nobody needs to wait for it.
            false => self.raise_beside(generation),
            // Hooks are told the number that is in the book.
            true => {
                note("guest book", raise(&self.book, &self.generation, generation));
                note("hooks", hooks::run(&hooks, &self.generation().to_string(), hooks::WAKE_TIME));
            }
        }
        if failed.is_empty() { Ok(()) } else { Err(failed.join("; ")) }
    }

    /// Notes the generation in the guest book, from a thread of its own where there can be one.
    fn raise_beside(&self, generation: u64) {
        let (book, known) = (self.book.clone(), self.generation.clone());
        let raise = move || {
            if let Err(why) = raise(&book, &known, generation) {
                eprintln!("catnap: guest book: {why}");
            }
        };
        if std::thread::Builder::new().name("generation".into()).spawn(raise.clone()).is_err() {
            raise();
        }
    }
}

/// Notes the generation in the guest book. One that was not open yet may know of more wakes.
fn raise(book: &GuestBook, known: &AtomicU64, generation: u64) -> Result<(), String> {
    let raised = book.raise_generation(generation).map_err(|error| error.to_string())?;
    known.fetch_max(raised, Ordering::Relaxed);
    Ok(())
}
