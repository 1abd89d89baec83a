//! How far the lesson is, and what was measured on the way; kept, so that it goes on where it was left.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Error, Figures};
use crate::sys::files::{At, read_bounded, write_atomically};

const FILE: &str = "progress.json";
/// The longest file, in bytes. Figures hold what commands printed.
const MAX_FILE: u64 = 64 << 20;

/// How far the lesson is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// The step that comes next, as `chapter/step`; none at the very beginning.
    pub next: Option<String>,
    /// Whether the stage is as that step needs it.
    pub staged: bool,
    /// Whether all steps have been played, and there is no next one.
    pub over: bool,
    /// What was measured in each step that was played.
    pub figures: BTreeMap<String, Figures>,
    /// Ports of this host for the machines' pages.
    pub ports: Vec<u16>,
    /// The host's boot in which it is to die.
    pub dies_in: Option<String>,
}

impl Progress {
    /// What was kept; the beginning when nothing was.
    pub fn read(folder: &Path) -> Result<Progress, Error> {
        let path = folder.join(FILE);
        match read_bounded(&path, MAX_FILE) {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).map_err(io::Error::from).at("read", &path)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Progress::default()),
            Err(error) => Err(error.into()),
        }
    }

    /// Keeps it.
    pub fn write(&self, folder: &Path) -> Result<(), Error> {
        let path = folder.join(FILE);
        let bytes = serde_json::to_vec_pretty(self).map_err(io::Error::from).at("write", &path)?;
        Ok(write_atomically(&path, &bytes)?)
    }
}
