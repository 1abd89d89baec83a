//! The words of the control protocol, version 1. Everything is JSON; unknown fields are ignored by readers,
//! so that a newer monitor can say more.

use catnap_guest::protocol::Hello;
use serde::{Deserialize, Serialize};

use crate::disk::Mark;
use crate::machine::{Drive, Progress, Shape, Size};
use crate::snapshot::Kind;
use crate::spec::MachineSpec;

use super::failure::Failure;
pub use crate::machine::{MemoryMap, Resized, Seen};

/// The protocol that a connection is upgraded to for a stream of bytes.
pub const STREAM: &str = "catnap-stream";
/// The longest head of a request or response, in bytes.
pub const MAX_HEAD: usize = 8 * 1024;
/// The longest body, in bytes: enough for the longest line that the guest's agent takes, and some more.
pub const MAX_BODY: usize = 128 * 1024;
/// The longest time that one request may wait for something to happen, in seconds.
pub const MAX_WAIT: u32 = 600;

/// The most cells of a memory map: what is told of them fits into a body.
pub const MAX_CELLS: u32 = 2048;

/// The longest time that a resize takes, in seconds, and then some for a guest that answers late.
pub const MAX_RESIZE: u32 = 120;

/// What a machine is and does: the answer to `GET /v1/machine` and to everything that changes its state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// What it does now.
    pub state: State,
    /// What the guest's agent said when it was ready, when it was since the last boot.
    pub agent: Option<Hello>,
    /// How the guest ended, once it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<Ended>,
    /// How often the guest was booted in this process: 1, and one more for each reboot.
    pub boots: u32,
    /// Milliseconds since this process was ready.
    pub uptime_ms: u64,
    /// The monitor's process id.
    pub pid: u32,
    /// The monitor's version.
    pub version: String,
    /// What the machine was started with.
    pub machine: MachineSpec,
    /// When the vCPUs first ran, in microseconds of the host's CLOCK_MONOTONIC.
    #[serde(default)]
    pub running_since_us: u64,
    /// The size that the machine has now.
    #[serde(default)]
    pub size: Option<Size>,
    /// What it can be resized to without another boot.
    #[serde(default)]
    pub shape: Option<Shape>,
    /// What came of the size that it was to wake in, when that was another than the snapshot's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resized: Option<Resized>,
    /// Disks that live in this host's memory.
    #[serde(default)]
    pub ephemeral: Vec<Drive>,
    /// The snapshot that is being taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub taking: Option<Taking>,
    /// The last snapshot that this process took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub taken: Option<Taken>,
}

/// What a machine with a monitor does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It is being built and has not run yet.
    Starting,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs stand still.
    Paused,
    /// The guest is being booted anew.
    Rebooting,
    /// The guest has ended and the monitor is about to go.
    Ended,
}

/// How a guest ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ended {
    /// It turned itself off, asked or unasked.
    PowerOff,
    /// It was stopped by force, as by pulling the plug.
    Forced,
    /// It could not go on.
    Crash {
        /// Why.
        why: String,
    },
}

/// The body of `POST /v1/stop`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stop {
    /// How long the guest has to shut down after its power button was pressed; 0 does not press it.
    #[serde(default = "Stop::seconds")]
    pub seconds: u32,
    /// Whether a guest that still runs then is ended by force. If not, that is a failure with code 4.
    #[serde(default)]
    pub force: bool,
}

impl Stop {
    fn seconds() -> u32 {
        30
    }
}

/// The body of `POST /v1/resize`, which is answered with a [`Resized`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resize {
    /// vCPUs; as many as now when not given.
    #[serde(default)]
    pub cpus: Option<u32>,
    /// RAM in bytes; as much as now when not given.
    #[serde(default)]
    pub memory: Option<u64>,
}

/// The body of `POST /v1/disk/detach`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Detach {
    /// The bay, or where the disk is mounted.
    pub disk: String,
    /// Whether it is taken out also when the guest does not let go of it.
    #[serde(default)]
    pub force: bool,
}

/// The body of `POST /v1/disk/give`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Give {
    /// What the media that are wanted hold.
    pub marks: Vec<Mark>,
}

/// The body of `POST /v1/snapshot`. The answer is a stream of [`SnapshotEvent`]s, each a line of JSON. A client
/// that closes its side of the connection (or all of it) before the end cancels the snapshot, unless it is there already:
/// the last event tells.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRequest {
    /// The name that the snapshot gets, such as `anna@monday`.
    pub name: String,
    /// What it captures.
    #[serde(default)]
    pub mode: Mode,
    /// A note for people.
    #[serde(default)]
    pub note: String,
    /// Whether to wait until a program in the guest rings the doorbell, and to take it just there, before the
    /// guest is answered.
    #[serde(default)]
    pub at_doorbell: bool,
}

/// What a snapshot of a running machine captures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Disks, memory and machine state.
    #[default]
    Live,
    /// Disks, as a power cut would leave them.
    Crash,
    /// Disks, after the agent froze the filesystems.
    Quiesced,
}

/// A line of a snapshot's stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotEvent {
    /// How far it is.
    Progress(Progress),
    /// It is in the store. The last line.
    Done(Taken),
    /// It came to nothing. The last line.
    Failed(Failure),
}

/// A snapshot that was taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Taken {
    /// Its name.
    pub name: String,
    /// The digest of its manifest.
    pub digest: String,
    /// What it captures.
    pub kind: Kind,
    /// How long the guest stood still, in microseconds.
    pub pause_us: u64,
    /// Bytes of guest memory that were written.
    pub bytes_written: u64,
    /// Milliseconds from the request to the snapshot in the store.
    pub duration_ms: u64,
    /// When it came about.
    #[serde(default)]
    pub moments: Moments,
}

/// When a snapshot came about, in microseconds of the host's CLOCK_MONOTONIC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moments {
    /// The guest was to stand still. For as long as it did, see `pause_us`.
    pub paused_us: u64,
    /// Disks and memory were written.
    pub written_us: u64,
    /// The snapshot was in the store.
    pub published_us: u64,
}

/// A snapshot that is being taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Taking {
    /// Its name.
    pub name: String,
    /// When it was asked for, in microseconds of the host's CLOCK_MONOTONIC.
    pub begun_us: u64,
    /// How far it is, once there is something to tell.
    pub progress: Option<Progress>,
}

/// What `GET /v1/machine` can wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// The guest's agent has said hello (or the guest has ended).
    Agent,
    /// The guest has ended.
    End,
}

impl Wait {
    /// The word in the query.
    pub fn word(self) -> &'static str {
        match self {
            Wait::Agent => "agent",
            Wait::End => "end",
        }
    }

    /// What the word in a query means.
    pub fn from_word(word: &str) -> Option<Wait> {
        [Wait::Agent, Wait::End].into_iter().find(|wait| wait.word() == word)
    }
}
