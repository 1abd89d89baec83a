//! Freezing: what is on the disks is made complete, and stays so until the thaw.
//!
//! ```text
//!            freeze                      thaw, or the watchdog
//! Thawed ──────────────> Frozen(until) ────────────────────────> Thawed
//!    ^                      │
//!    └── any step failed ───┘
//! ```
//!
//! The guest book is held first (its own hook, so to say), then come the hooks of the folder, then the
//! filesystems. A thaw goes the other way. Whatever was begun is undone, also when the host is gone.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;

use super::hooks::{self, QUIESCE_TIME};
use super::mounts::writable_disks;
use crate::site::book::GuestBook;

/// The longest freeze that may be asked for, in seconds; the protocol says so.
const LONGEST: u32 = 60;

// include/uapi/linux/fs.h: _IOWR('X', 119, int) and _IOWR('X', 120, int).
const FIFREEZE: libc::Ioctl = 0xc004_5877;
const FITHAW: libc::Ioctl = 0xc004_5878;

struct Frozen {
    filesystems: Vec<(PathBuf, File)>,
    until: Instant,
}

/// Freezes and thaws. Clones are the same freezer.
#[derive(Clone)]
pub(super) struct Freezer(Arc<Inner>);

struct Inner {
    book: Arc<GuestBook>,
    hooks: PathBuf,
    /// Held for the whole of a freeze and of a thaw.
    state: Mutex<Option<Frozen>>,
    thawed: Condvar,
    /// The same as the state, for those who must not wait for it.
    frozen: AtomicBool,
}

impl Freezer {
    pub(super) fn new(book: Arc<GuestBook>, hooks: PathBuf) -> Freezer {
        let (state, thawed) = (Mutex::new(None), Condvar::new());
        Freezer(Arc::new(Inner { book, hooks, state, thawed, frozen: AtomicBool::new(false) }))
    }

    pub(super) fn frozen(&self) -> bool {
        self.0.frozen.load(Ordering::Relaxed)
    }

    /// Freezes for at most `seconds`, counted from now.
    pub(super) fn freeze(&self, seconds: u32) -> Result<(), String> {
        if !(1..=LONGEST).contains(&seconds) {
            return Err(format!("a freeze takes 1 to {LONGEST} seconds"));
        }
        let until = Instant::now() + Duration::from_secs(seconds.into());
        let mut state = self.lock();
        if state.is_some() {
            return Err("it is frozen already".into());
        }
        let mut frozen = Frozen { filesystems: Vec::new(), until };
        let done = self.descend(&mut frozen).and_then(|()| self.watch());
        if let Err(why) = done {
            // Why it failed is worth more than what may fail in undoing it.
            let _ = self.ascend(frozen);
            return Err(why);
        }
        *state = Some(frozen);
        self.0.frozen.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Ends a freeze; does nothing when there is none.
    pub(super) fn thaw(&self) -> Result<(), String> {
        let mut state = self.lock();
        self.thaw_locked(&mut state)
    }

    fn thaw_locked(&self, state: &mut Option<Frozen>) -> Result<(), String> {
        let Some(frozen) = state.take() else { return Ok(()) };
        let result = self.ascend(frozen);
        self.0.frozen.store(false, Ordering::Relaxed);
        self.0.thawed.notify_all();
        result
    }

    fn descend(&self, frozen: &mut Frozen) -> Result<(), String> {
        self.0.book.hold().map_err(|error| format!("guest book: {error}"))?;
        hooks::run(&self.0.hooks, "freeze", QUIESCE_TIME)?;
        for mount in writable_disks() {
            let failed = |error: &dyn std::fmt::Display| format!("{}: {error}", mount.at.display());
            let root = File::open(&mount.at).map_err(|error| failed(&error))?;
            // The freeze syncs too, but then with every writer already waiting for it.
            nix::unistd::syncfs(&root).map_err(|error| failed(&error))?;
            match call(&root, FIFREEZE) {
                Ok(()) => frozen.filesystems.push((mount.at.clone(), root)),
                // A filesystem that cannot be frozen is at least synced.
                Err(Errno::EOPNOTSUPP) => {}
                Err(error) => return Err(failed(&error)),
            }
        }
        Ok(())
    }

    /// Undoes all of it, whatever fails; the first failure is returned.
    fn ascend(&self, frozen: Frozen) -> Result<(), String> {
        let mut result = Ok(());
        for (path, root) in frozen.filesystems.iter().rev() {
            // EINVAL: somebody else has thawed it.
            if let Err(error) = call(root, FITHAW)
                && error != Errno::EINVAL
            {
                result = result.and(Err(format!("{}: {error}", path.display())));
            }
        }
        result = result.and(hooks::run(&self.0.hooks, "thaw", QUIESCE_TIME));
        self.0.book.release();
        result
    }

    /// Starts the watchdog, which sees to the thaw when nobody else does. The lock is held, so it looks at the
    /// state after the freeze is complete.
    fn watch(&self) -> Result<(), String> {
        let freezer = self.clone();
        let watchdog = move || {
            let mut state = freezer.lock();
            while let Some(left) = state.as_ref().map(|frozen| frozen.until.saturating_duration_since(Instant::now())) {
                if left.is_zero() {
                    let _ = freezer.thaw_locked(&mut state);
                } else {
                    state = freezer.0.thawed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        };
        let thread = std::thread::Builder::new().name("thaw".into()).stack_size(128 << 10);
        thread.spawn(watchdog).map(drop).map_err(|error| format!("no watchdog, no freeze: {error}"))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Frozen>> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn call(root: &File, number: libc::Ioctl) -> Result<(), Errno> {
    // SAFETY: both ioctls ignore their argument; no memory of ours is touched.
    Errno::result(unsafe { libc::ioctl(root.as_raw_fd(), number, 0) }).map(drop)
}
