//! What `snapshot.json` and the machine state have in common: a number, `format`, of which all later versions keep the name.

use serde::Deserialize;
use serde::de::DeserializeOwned;

/// A document, or the format of one that a later Catnap has written.
pub enum Read<T> {
    /// It can be read.
    Known(T),
    /// It may have any shape but for this.
    Later(u32),
}

/// Reads a document of this format or an older one. One that can be read is gone through once.
pub fn read<T: DeserializeOwned>(
    bytes: &[u8],
    newest: u32,
    format: impl Fn(&T) -> u32,
) -> Result<Read<T>, serde_json::Error> {
    #[derive(Deserialize)]
    struct Only {
        format: u32,
    }
    match serde_json::from_slice::<T>(bytes) {
        Ok(document) if format(&document) <= newest => Ok(Read::Known(document)),
        other => match serde_json::from_slice(bytes)? {
            Only { format } if format > newest => Ok(Read::Later(format)),
            _ => other.map(Read::Known),
        },
    }
}
