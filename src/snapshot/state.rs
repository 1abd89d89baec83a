//! `machine.state`: what the parts of a machine were at the instant of a snapshot.
//!
//! A JSON document with a list of parts, each with its kind, the version of its payload, and the payload. Who
//! reads it takes out the parts that it knows; an unknown version and a part that nobody took are errors, for a
//! machine that wakes without a part of its state is not the machine that fell asleep.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};

use super::format::{self, Read};

/// The file's name.
pub const STATE: &str = "machine.state";
/// The longest file, in bytes: 64 vCPUs take about 1 MiB.
pub const MAX_STATE: u64 = 16 << 20;
const FORMAT: u32 = 1;
const MAX_PARTS: usize = 1024;

/// Why a machine's state is not taken.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Not JSON, or not of the right shape.
    #[error("it cannot be read: {0}")]
    Json(#[from] serde_json::Error),
    /// The document or a part was written by a later version.
    #[error("its {kind} is of version {found}, and this catnap reads version {known}")]
    Version {
        /// What is too new.
        kind: String,
        /// Its version.
        found: u32,
        /// The version that is read here.
        known: u32,
    },
    /// A part is missing, or there twice.
    #[error("it has {found} parts of the kind {kind}, not {wanted}")]
    Count {
        /// The kind.
        kind: &'static str,
        /// How many there are.
        found: usize,
        /// How many there must be.
        wanted: &'static str,
    },
    /// A part that nobody knows.
    #[error("it has a part of the unknown kind `{0}`")]
    Unknown(String),
    /// A part's payload makes no sense.
    #[error("its {kind} makes no sense: {source}")]
    Part {
        /// The part.
        kind: &'static str,
        /// Where and why.
        source: serde_json::Error,
    },
}

/// The parts of a machine's state.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineState {
    format: u32,
    parts: Vec<Part>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Part {
    kind: String,
    version: u32,
    /// As it is written: it is read once, by who takes the part.
    state: Box<RawValue>,
}

impl Default for MachineState {
    fn default() -> MachineState {
        MachineState { format: FORMAT, parts: Vec::new() }
    }
}

impl MachineState {
    /// Reads a document. The parts are looked at when they are taken.
    pub fn parse(bytes: &[u8]) -> Result<MachineState, StateError> {
        let state = match format::read(bytes, FORMAT, |it: &MachineState| it.format)? {
            Read::Known(state) => state,
            Read::Later(found) => return Err(StateError::Version { kind: "format".into(), found, known: FORMAT }),
        };
        match state.parts.len() {
            0..=MAX_PARTS => Ok(state),
            found => Err(StateError::Count { kind: "any", found, wanted: "at most 1024" }),
        }
    }

    /// The document, a part to a line.
    pub fn to_bytes(&self) -> Result<Vec<u8>, StateError> {
        let mut bytes = format!("{{\"format\": {}, \"parts\": [\n", self.format).into_bytes();
        for (index, part) in self.parts.iter().enumerate() {
            bytes.extend(if index == 0 { &b""[..] } else { b",\n" });
            serde_json::to_writer(&mut bytes, part)?;
        }
        bytes.extend(b"\n]}\n");
        Ok(bytes)
    }

    /// Adds a part.
    pub fn put(&mut self, kind: &'static str, version: u32, state: &impl Serialize) -> Result<(), StateError> {
        let state = to_raw_value(state).map_err(|source| StateError::Part { kind, source })?;
        self.parts.push(Part { kind: kind.into(), version, state });
        Ok(())
    }

    /// Takes all parts of a kind out, in their order.
    pub fn take_all<T: DeserializeOwned>(&mut self, kind: &'static str, version: u32) -> Result<Vec<T>, StateError> {
        let (taken, left): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.parts).into_iter().partition(|part| part.kind == kind);
        self.parts = left;
        let read = |part: Part| match part.version == version {
            true => serde_json::from_str(part.state.get()).map_err(|source| StateError::Part { kind, source }),
            false => Err(StateError::Version { kind: kind.into(), found: part.version, known: version }),
        };
        taken.into_iter().map(read).collect()
    }

    /// Takes the one part of a kind out.
    pub fn take<T: DeserializeOwned>(&mut self, kind: &'static str, version: u32) -> Result<T, StateError> {
        let mut all = self.take_all(kind, version)?;
        match (all.len(), all.pop()) {
            (1, Some(one)) => Ok(one),
            (found, _) => Err(StateError::Count { kind, found, wanted: "1" }),
        }
    }

    /// Takes the part of a kind out that may not be there.
    pub fn take_optional<T: DeserializeOwned>(
        &mut self,
        kind: &'static str,
        version: u32,
    ) -> Result<Option<T>, StateError> {
        let mut all = self.take_all(kind, version)?;
        match all.len() {
            0 | 1 => Ok(all.pop()),
            found => Err(StateError::Count { kind, found, wanted: "at most 1" }),
        }
    }

    /// Whether everything was taken.
    pub fn finish(self) -> Result<(), StateError> {
        match self.parts.into_iter().next() {
            None => Ok(()),
            Some(part) => Err(StateError::Unknown(part.kind.chars().take(40).collect())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> MachineState {
        let mut state = MachineState::default();
        state.put("vcpu", 1, &7u32).unwrap();
        state.put("serial", 2, &"x").unwrap();
        state.put("vcpu", 1, &8u32).unwrap();
        MachineState::parse(&state.to_bytes().unwrap()).unwrap()
    }

    #[test]
    fn every_part_is_taken_once_and_nothing_is_left() {
        let mut state = state();
        assert_eq!(state.take_all::<u32>("vcpu", 1).unwrap(), [7, 8]);
        assert_eq!(state.take::<String>("serial", 2).unwrap(), "x");
        state.finish().unwrap();
    }

    #[test]
    fn what_is_unknown_missing_or_left_over_is_refused() {
        assert!(matches!(state().take::<String>("serial", 1), Err(StateError::Version { found: 2, known: 1, .. })));
        assert!(matches!(state().take::<u32>("serial", 2), Err(StateError::Part { kind: "serial", .. })));
        assert!(matches!(state().take::<u32>("vcpu", 1), Err(StateError::Count { found: 2, .. })));
        assert!(matches!(state().take::<u32>("rtc", 1), Err(StateError::Count { found: 0, .. })));
        let mut rest = state();
        rest.take_all::<u32>("vcpu", 1).unwrap();
        assert!(matches!(rest.finish(), Err(StateError::Unknown(kind)) if kind == "serial"));
        for bad in [&b""[..], b"{}", b"[]", b"{\"format\":1}", b"{\"format\":1,\"parts\":[],\"more\":0}"] {
            assert!(matches!(MachineState::parse(bad), Err(StateError::Json(_))), "{bad:?}");
        }
        let later = MachineState::parse(b"{\"format\":2,\"anything\":0}");
        assert!(matches!(later, Err(StateError::Version { found: 2, .. })));
        let many =
            format!("{{\"format\":1,\"parts\":[{}]}}", vec![r#"{"kind":"x","version":1,"state":0}"#; 1025].join(","));
        assert!(matches!(MachineState::parse(many.as_bytes()), Err(StateError::Count { found: 1025, .. })));
    }
}
