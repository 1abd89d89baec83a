//! What changed in memory.
//!
//! So far this knows what manifests say: a difference holds every page that changed, so what lies between two
//! snapshots of which one is a difference to the other is at most what the differences on the way hold. With
//! the memory's index at hand, [`between`] is the place to be exact.

use serde::Serialize;

use crate::cli::ui;
use crate::control::Failure;
use crate::store::{Snapshot, Store};

/// The most differences that are followed from one snapshot to another.
const LONGEST: usize = 4096;

/// What is known of the change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase", tag = "known")]
pub enum Change {
    /// Neither snapshot has memory.
    None,
    /// Only the first has.
    Before,
    /// Only the second has.
    After,
    /// It is the very same.
    Same,
    /// No more than so many bytes differ.
    AtMost {
        /// The bytes.
        changed_bytes: u64,
    },
    /// Both have memory, and neither is a difference to the other.
    Apart,
}

/// Compares the memory of two snapshots.
pub fn compare(store: &Store, before: &Snapshot, after: &Snapshot) -> Result<Change, Failure> {
    match (&before.manifest.memory, &after.manifest.memory) {
        (None, None) => Ok(Change::None),
        (Some(_), None) => Ok(Change::Before),
        (None, Some(_)) => Ok(Change::After),
        (Some(_), Some(_)) if before.digest == after.digest => Ok(Change::Same),
        (Some(_), Some(_)) => between(store, before, after),
    }
}

/// The seam for an exact answer, by both indexes.
fn between(store: &Store, before: &Snapshot, after: &Snapshot) -> Result<Change, Failure> {
    let changed = match at_most(store, before, after)? {
        None => at_most(store, after, before)?,
        found => found,
    };
    Ok(changed.map_or(Change::Apart, |changed_bytes| Change::AtMost { changed_bytes }))
}

/// What the differences from `new` down to `old` hold together; none when they do not lead there.
fn at_most(store: &Store, old: &Snapshot, new: &Snapshot) -> Result<Option<u64>, Failure> {
    let (mut at, mut bytes) = (new.clone(), 0u64);
    for _ in 0..LONGEST {
        let Some(memory) = &at.manifest.memory else { return Ok(None) };
        bytes = bytes.saturating_add(memory.bytes);
        match memory.parent {
            None => return Ok(None),
            Some(parent) if parent == old.digest => return Ok(Some(bytes)),
            Some(parent) => at = store.resolve(&parent.to_string())?,
        }
    }
    Ok(None)
}

impl Change {
    /// For people.
    pub fn to_text(&self) -> String {
        match self {
            Change::None => "no memory in either".into(),
            Change::Before => "memory in the first alone".into(),
            Change::After => "memory in the second alone".into(),
            Change::Same => "the same".into(),
            Change::AtMost { changed_bytes } => format!("{} differ at most", ui::amount(*changed_bytes)),
            Change::Apart => "not compared: neither memory is a difference to the other".into(),
        }
    }
}
