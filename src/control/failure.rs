//! What went wrong, in the words that a person needs.

use serde::{Deserialize, Serialize};

use crate::machine::BayError;
use crate::{boot, disk, kvm, machine};

/// A failure as it travels over the control socket and as the command line shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{error}")]
pub struct Failure {
    /// What failed.
    pub error: String,
    /// The next step to try.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// What kind of failure it is: the exit code of the command that met it.
    pub code: Code,
}

/// The exit codes of `catnap`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "u8", from = "u8")]
pub enum Code {
    /// It was tried and failed.
    Failed = 1,
    /// The command or request makes no sense.
    Usage = 2,
    /// There is no such thing.
    NotFound = 3,
    /// Not now, or not in this state.
    Refused = 4,
    /// This host cannot do it.
    Host = 5,
    /// Something is not what its digest says.
    Verify = 6,
}

impl From<Code> for u8 {
    fn from(code: Code) -> u8 {
        code as u8
    }
}

impl From<u8> for Code {
    fn from(code: u8) -> Code {
        match code {
            2 => Code::Usage,
            3 => Code::NotFound,
            4 => Code::Refused,
            5 => Code::Host,
            6 => Code::Verify,
            _ => Code::Failed,
        }
    }
}

impl Failure {
    /// A failure of this kind.
    pub fn new(code: Code, error: impl Into<String>) -> Failure {
        Failure { error: error.into(), hint: None, code }
    }

    /// The same with a next step.
    pub fn hint(mut self, hint: impl Into<String>) -> Failure {
        self.hint = Some(hint.into());
        self
    }

    /// Something failed while `doing`.
    pub fn while_doing(doing: impl std::fmt::Display, why: impl std::fmt::Display) -> Failure {
        Failure::new(Code::Failed, format!("{doing}: {why}"))
    }
}

impl From<machine::Error> for Failure {
    fn from(error: machine::Error) -> Failure {
        let text = whole(&error);
        let is = |code| Failure::new(code, text.clone());
        match &error {
            machine::Error::Kvm(kvm::Error::TscRate { .. } | kvm::Error::Msr(_) | kvm::Error::Saved(_)) => {
                is(Code::Refused).hint("catnap restore --cold, which boots from the disks alone")
            }
            machine::Error::Kvm(_) => is(Code::Host).hint("catnap doctor"),
            machine::Error::Memory(_) | machine::Error::Boot(boot::Error::TooLittleMemory { .. }) => {
                is(Code::Failed).hint("another --memory")
            }
            machine::Error::Boot(boot::Error::CommandLine { .. }) => is(Code::Usage).hint("fewer words in --append"),
            machine::Error::Boot(_) => is(Code::Failed).hint("--kernel takes a bzImage or an ELF vmlinux for x86-64"),
            machine::Error::Disk(disk::Error::InUse(_)) => {
                is(Code::Refused).hint("stop what uses it; catnap ps lists machines")
            }
            machine::Error::Disk(_) => is(Code::Failed).hint("qemu-img check tells more about the disk"),
            machine::Error::Forward(_) => is(Code::Refused).hint("another port of the host with -p"),
            // The next step depends on the machine, so whoever knows that gives it.
            machine::Error::Envelope { .. } => is(Code::Refused),
            machine::Error::Step { wanted, boot } => {
                // What a machine can have at most is a step as well, so there is one above what was wanted.
                let more = wanted.saturating_sub(*boot).next_multiple_of(crate::spec::MEMORY_STEP.bytes());
                is(Code::Usage).hint(format!("--memory {}", crate::spec::Size(boot + more)))
            }
            machine::Error::Paused => is(Code::Refused).hint("catnap resume"),
            machine::Error::Bay(error) => bay(error, text),
            machine::Error::Ended => is(Code::Refused).hint("catnap start boots it again"),
            machine::Error::Unsound { .. } | machine::Error::MemoryFile(machine::memory_file::Error::Length { .. }) => {
                is(Code::Verify).hint("catnap snapshot verify; --cold boots from the disks alone")
            }
            machine::Error::Write { source: machine::memory_file::Error::Write { source, .. }, .. }
                if source.kind() == std::io::ErrorKind::StorageFull =>
            {
                is(Code::Failed).hint("catnap snapshot prune makes room")
            }
            _ => is(Code::Failed),
        }
    }
}

/// What becomes of a disk in the host's memory.
fn bay(error: &BayError, text: String) -> Failure {
    let is = |code| Failure::new(code, text.clone());
    match error {
        BayError::NoTmpfs | BayError::Disk(disk::Error::Refused { .. }) => is(Code::Host)
            .hint("mount -t tmpfs -o mode=1777 tmpfs /dev/shm, or set XDG_RUNTIME_DIR to a folder on a tmpfs"),
        BayError::Disk(disk::Error::NoRoom { room, .. }) => {
            is(Code::Refused).hint(format!("{}M at most, or more room: df -h /dev/shm", room >> 20))
        }
        BayError::Disk(_) => is(Code::Failed),
        BayError::Taken(at) => is(Code::Refused).hint(format!("another place, such as --ephemeral 64M:{at}2")),
        BayError::Full => is(Code::Refused).hint("catnap disk detach frees one"),
        BayError::NoBays => is(Code::Refused).hint("catnap stop, then catnap start: a machine that boots has bays"),
        BayError::NotThere(_) => is(Code::NotFound).hint("catnap inspect shows what there is"),
        BayError::Busy(_) => is(Code::Refused).hint("end what uses it, or --force, and its users see I/O errors"),
        BayError::Agent { doing: "unmount it", .. } => is(Code::Refused).hint("--force takes it out all the same"),
        BayError::Agent { .. } => is(Code::Failed).hint("catnap logs shows what the guest says"),
    }
}

/// An error with all that it says about its causes, `what: why: why`.
pub fn whole(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        // Many errors already repeat their cause.
        if !text.contains(&inner.to_string()) {
            text = format!("{text}: {inner}");
        }
        cause = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_travels_with_its_code_as_a_number() {
        let failure = Failure::new(Code::Refused, "anna is paused").hint("catnap resume anna");
        let text = serde_json::to_string(&failure).unwrap();
        assert_eq!(text, r#"{"error":"anna is paused","hint":"catnap resume anna","code":4}"#);
        assert_eq!(serde_json::from_str::<Failure>(&text).unwrap(), failure);
        let strange: Failure = serde_json::from_str(r#"{"error":"x","code":99}"#).unwrap();
        assert_eq!(strange, Failure::new(Code::Failed, "x"));
    }
}
