//! What became of the monitor of each machine.
//!
//! A monitor holds the lock of its machine for as long as it lives; `run.json` says what it would say of
//! itself if it could no longer:
//!
//! ```text
//!            RunLock::started          RunLock::ended
//!  stopped ─────────────────► running ───────────────► stopped
//!                                │ killed                the lock is free, and run.json says that it ran:
//!                                ├─────────────────────► died   (this boot of the host)
//!                                └─────────────────────► lost   (an earlier boot: the host restarted)
//! ```
//!
//! A machine is made to run. So it has a `run.json` from its beginning, without a monitor: its first run need not wait
//! until the disk has another.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Error;
use crate::sys::files::{At, read_bounded, write_atomically, write_soon};
use crate::sys::lock::FileLock;
use crate::sys::process;

/// The file's name in the machine's folder, and the most bytes that it has.
pub const RUN: &str = "run.json";
const MAX_FILE: u64 = 4096;

/// What a machine is doing, as far as its files tell. Whether a running one is paused, its monitor knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// Its monitor lives.
    Running,
    /// It was shut down, or never started.
    Stopped,
    /// Its monitor went without a word.
    Died,
    /// It ran when the host went down.
    Lost,
}

/// The last run of a machine.
#[derive(Debug, Serialize, Deserialize)]
pub struct Run {
    /// The host's boot.
    pub boot_id: String,
    /// The monitor's process, for people; 0 before the first.
    pub pid: u32,
    /// Whether it ended as it should.
    pub ended: bool,
}

/// The right to run a machine, to change its folder or to remove it. Ends with the process at the latest.
#[derive(Debug)]
pub struct RunLock {
    run: PathBuf,
    _held: FileLock,
}

impl RunLock {
    /// For the machine in that folder.
    pub(super) fn new(held: FileLock, dir: &Path) -> RunLock {
        RunLock { run: dir.join(RUN), _held: held }
    }

    /// Records that the machine runs now. Whoever looks sees it. At its first run, it is on the disk only after
    /// [`super::Machine::settle_run`]: what is there until then says nothing else after a power cut.
    pub fn started(&self) -> Result<(), Error> {
        let is_first = matches!(Run::read(&self.run), Ok(Some(Run { pid: 0, .. })));
        let bytes = Run { pid: std::process::id(), ..Run::begins()? }.bytes(&self.run)?;
        match is_first {
            true => write_soon(&self.run, &bytes)?,
            false => write_atomically(&self.run, &bytes)?,
        }
        Ok(())
    }

    /// Records that the machine stopped in an orderly way.
    pub fn ended(&self) -> Result<(), Error> {
        let run = Run { pid: std::process::id(), ended: true, ..Run::begins()? };
        Ok(write_atomically(&self.run, &run.bytes(&self.run)?)?)
    }
}

impl Run {
    /// That of a machine that nobody has run yet.
    pub fn begins() -> Result<Run, Error> {
        let boot_id = process::boot_id().at("read", Path::new(process::BOOT_ID))?;
        Ok(Run { boot_id, pid: 0, ended: false })
    }

    /// What is recorded at `path`; none when nothing is.
    pub fn read(path: &Path) -> Result<Option<Run>, Error> {
        let bytes = match read_bounded(path, MAX_FILE) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        // The host went down before what was recorded at the first start was on the disk.
        if bytes.is_empty() {
            return Ok(Some(Run { boot_id: String::new(), pid: 0, ended: false }));
        }
        let run = serde_json::from_slice(&bytes);
        run.map(Some).map_err(|error| Error::BadMachine { path: path.into(), why: error.to_string() })
    }

    /// The file's content; `path` is for messages.
    pub fn bytes(&self, path: &Path) -> Result<Vec<u8>, Error> {
        Ok(serde_json::to_vec(self).map_err(io::Error::from).at("write", path)?)
    }

    /// What the machine is doing when it is not running.
    pub fn condition(&self) -> Result<Condition, Error> {
        let this_boot = Run::begins()?.boot_id;
        Ok(match self {
            Run { ended: true, .. } => Condition::Stopped,
            Run { boot_id, .. } if *boot_id != this_boot => Condition::Lost,
            Run { pid: 0, .. } => Condition::Stopped,
            Run { .. } => Condition::Died,
        })
    }
}
