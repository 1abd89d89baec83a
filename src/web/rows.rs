//! Which rows of the guest book were acknowledged, found and torn: what the lesson measured and wrote down.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::sys::files;

/// The longest such file, in bytes, and the most lines that are taken from it.
const LIMIT: u64 = 64 << 10;
const MOST: usize = 32;
/// The longest name of a kind, in bytes.
const LONGEST: usize = 32;

/// What one restored snapshot had of the guest book.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rows {
    /// The snapshot's kind, or whatever else it was.
    pub kind: String,
    /// Rows whose writers had been told that they are kept.
    pub acknowledged: u64,
    /// Rows that were there.
    pub found: u64,
    /// Rows that were there and not whole.
    pub torn: u64,
}

/// What the lesson wrote; nothing when there is no such file, or one that makes no sense.
pub fn read(path: &Path) -> Vec<Rows> {
    let read = files::read_bounded(path, LIMIT).ok().and_then(|bytes| serde_json::from_slice::<Vec<Rows>>(&bytes).ok());
    let mut rows = read.unwrap_or_default();
    rows.retain(|row| row.kind.len() <= LONGEST);
    rows.truncate(MOST);
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_lesson_wrote_is_read_and_rubbish_is_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.json");
        assert_eq!(read(&path), []);
        std::fs::write(&path, r#"[{"kind": "crash", "acknowledged": 3, "found": 2, "torn": 0, "more": 1}]"#).unwrap();
        assert_eq!(read(&path), [Rows { kind: "crash".into(), acknowledged: 3, found: 2, torn: 0 }]);
        let long = format!(r#"[{{"kind": "{}", "acknowledged": 3, "found": 2, "torn": 0}}]"#, "x".repeat(LONGEST + 1));
        let huge = " ".repeat(LIMIT as usize) + "[]";
        for rubbish in ["", "{", "[1]", r#"[{"kind": "a", "acknowledged": -1, "found": 0, "torn": 0}]"#, &long, &huge] {
            std::fs::write(&path, rubbish).unwrap();
            assert_eq!(read(&path), []);
        }
    }
}
