//! What is noted of a machine's run beside what the store notes: since when it runs, and how it ended.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::control::protocol::Ended;
use crate::sys::files;

/// The file's name in the machine's folder.
const FILE: &str = "history.json";
/// Longer than any such file, in bytes.
const LIMIT: u64 = 64 * 1024;

/// The last run of a machine, or the one under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// When the monitor was ready, in seconds since 1970.
    pub started: u64,
    /// When the guest ended, in seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped: Option<u64>,
    /// How it ended. Missing when it still runs, or when its monitor could not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<Ended>,
}

impl Record {
    /// The record of a run that begins now.
    pub fn begin() -> Record {
        Record { started: now(), stopped: None, ended: None }
    }

    /// Notes how the run ended.
    pub fn end(self, ended: Ended) -> Record {
        Record { stopped: Some(now()), ended: Some(ended), ..self }
    }

    /// Seconds since the beginning.
    pub fn age(&self) -> u64 {
        now().saturating_sub(self.started)
    }

    /// Writes the record into a machine's folder.
    pub fn write(&self, folder: &Path) -> Result<(), files::Error> {
        files::write_atomically(&folder.join(FILE), &self.text())
    }

    /// The same, to be on the disk after [`Record::settle`].
    pub fn write_soon(&self, folder: &Path) -> Result<(), files::Error> {
        files::write_soon(&folder.join(FILE), &self.text())
    }

    /// Has the record in a machine's folder on the disk.
    pub fn settle(folder: &Path) -> Result<(), files::Error> {
        files::settle(&folder.join(FILE))
    }

    /// Plain fields of our own: this cannot fail, and an empty record reads as none.
    fn text(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(self).unwrap_or_default()
    }

    /// The record in a machine's folder; `None` when it has none, or one that cannot be read.
    pub fn read(folder: &Path) -> Option<Record> {
        serde_json::from_slice(&files::read_bounded(&folder.join(FILE), LIMIT).ok()?).ok()
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_as_it_was_written_and_rubbish_is_no_record() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Record::read(folder.path()), None);
        let ended = Record::begin().end(Ended::Crash { why: "triple fault".into() });
        assert!(ended.stopped.is_some_and(|stopped| stopped >= ended.started) && ended.age() < 60);
        ended.write(folder.path()).unwrap();
        assert_eq!(Record::read(folder.path()), Some(ended));
        std::fs::write(folder.path().join(FILE), "{").unwrap();
        assert_eq!(Record::read(folder.path()), None);
    }
}
