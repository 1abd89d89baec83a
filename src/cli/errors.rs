//! What went wrong in the rooms below, with the next step to try.

use std::collections::BTreeSet;

use crate::control::{Code, Failure};
use crate::store::Dependent;
use crate::{archive, disk, image, oci, snapshot, store};

impl From<store::Error> for Failure {
    fn from(error: store::Error) -> Failure {
        let text = error.to_string();
        let is = |code| Failure::new(code, text.clone());
        match error {
            store::Error::NoMachine(_) => is(Code::NotFound).hint("catnap ps"),
            store::Error::NoSnapshot(_) => {
                is(Code::NotFound).hint("catnap snapshot ls --all; kitten is made on first use")
            }
            store::Error::Reference(_) | store::Error::Ambiguous(_) => is(Code::Usage).hint("catnap snapshot ls --all"),
            store::Error::Gone(_) => is(Code::Refused).hint("catnap snapshot ls --all"),
            store::Error::NoKey(_) => is(Code::NotFound).hint("catnap key ls"),
            store::Error::KeyTaken(name) => is(Code::Refused).hint(format!("another name, or catnap key rm {name}")),
            store::Error::NotOwnKey(_) => is(Code::Refused).hint("catnap key new NAME"),
            store::Error::Needed { above, .. } => is(Code::Refused).hint(remove_first(&above)),
            store::Error::MachineTaken(name) => {
                is(Code::Refused).hint(format!("another name, or catnap start {name}, or catnap rm {name}"))
            }
            store::Error::Arriving(_) => is(Code::Refused).hint("again, when the other one has ended"),
            store::Error::SnapshotTaken(_) => is(Code::Refused).hint("another tag, or catnap snapshot rm"),
            store::Error::Running(name) => is(Code::Refused).hint(format!("catnap stop {name}")),
            store::Error::DiskTooSmall { .. } => is(Code::Usage).hint("a larger --disk-size"),
            store::Error::Manifest(snapshot::Error::Later { .. }) => is(Code::Refused).hint("a later catnap"),
            store::Error::Damaged { .. } | store::Error::Manifest(_) => is(Code::Verify)
                .hint("catnap snapshot verify, which finds all that is damaged; catnap image build makes kitten anew"),
            store::Error::BadMachine { .. } => is(Code::Verify).hint("catnap rm, which removes what is left of it"),
            store::Error::NoRoom { .. } => is(Code::Failed).hint("catnap snapshot prune, which makes room"),
            store::Error::Disk(error) => error.into(),
            store::Error::File(_) => is(Code::Failed),
        }
    }
}

/// The commands that remove all that depends on a snapshot.
fn remove_first(above: &[Dependent]) -> String {
    let names = |wanted: fn(&&Dependent) -> bool| {
        // A machine can need several of those that are in question.
        let names: BTreeSet<_> = above.iter().filter(wanted).map(Dependent::name).collect();
        names.into_iter().collect::<Vec<_>>().join(" ")
    };
    let machines = names(|by| matches!(by, Dependent::Machine { .. }));
    let snapshots = names(|by| matches!(by, Dependent::Snapshot { .. }));
    let or_merge = if machines.is_empty() { ", or catnap snapshot rm --merge" } else { "" };
    let commands = [("catnap rm", machines), ("catnap snapshot rm", snapshots)];
    let commands =
        commands.iter().filter(|(_, names)| !names.is_empty()).map(|(verb, names)| format!("{verb} {names}"));
    commands.collect::<Vec<_>>().join(" and ") + " first" + or_merge
}

impl From<image::Error> for Failure {
    fn from(error: image::Error) -> Failure {
        let failure = Failure::new(Code::Failed, format!("the image {} cannot be made: {error}", image::NAME));
        match error {
            image::Error::Missing { .. } => Failure { code: Code::Host, ..failure }.hint("catnap doctor --fix"),
            image::Error::Store(error) => error.into(),
            _ => failure.hint("catnap doctor"),
        }
    }
}

impl From<archive::Error> for Failure {
    fn from(error: archive::Error) -> Failure {
        let is = |code| Failure::new(code, error.to_string());
        match error {
            archive::Error::Refused(_) => {
                is(Code::Verify).hint("have it sent again; catnap snapshot export makes such files")
            }
            archive::Error::Signature(_) => is(Code::Verify).hint("have it sent again, by whoever signed it"),
            archive::Error::Unknown(Some(key)) => {
                is(Code::Refused).hint(format!("catnap key trust NAME {key}, once you know whose it is"))
            }
            archive::Error::Unknown(None) => {
                is(Code::Refused).hint("--sign with snapshot export or push, or leave --require-signature away")
            }
            archive::Error::BadName(_) => is(Code::Verify).hint("catnap snapshot import --name NAME@TAG"),
            archive::Error::Taken(_) => is(Code::Refused).hint("catnap snapshot import --name NAME@TAG"),
            archive::Error::Store(error) => error.into(),
            archive::Error::Read(_) | archive::Error::Write(_) | archive::Error::File(_) => {
                is(Code::Failed).hint("catnap doctor, which looks at the room that is left")
            }
            archive::Error::Registry(error) => error.into(),
            archive::Error::Unfit { .. } => is(Code::Verify)
                .hint("have it pushed again, which sends what is missing there; what is damaged there its keeper must remove first"),
            archive::Error::Large { .. } => is(Code::Refused).hint("--disk-only, or catnap snapshot export"),
            archive::Error::Interrupted => is(Code::Failed),
        }
    }
}

impl From<oci::Error> for Failure {
    fn from(error: oci::Error) -> Failure {
        let is = |code| Failure::new(code, error.to_string());
        match error {
            oci::Error::Reference { .. } => {
                is(Code::Usage).hint("REGISTRY/REPOSITORY:TAG, as in localhost:5000/cats/anna:monday")
            }
            oci::Error::Plain(_) => is(Code::Refused).hint("--plain-http, if everybody in between may see it"),
            oci::Error::Configuration { .. } | oci::Error::Helper { .. } => {
                is(Code::Failed).hint("docker login, which writes it anew")
            }
            oci::Error::NoRoots => is(Code::Host).hint("install ca-certificates, or set SSL_CERT_FILE"),
            oci::Error::Answer { status: 400..=499, .. } => {
                is(Code::Failed).hint("whether that is a registry, and the repository one of it")
            }
            oci::Error::Unreachable { .. } | oci::Error::Answer { .. } => {
                is(Code::Failed).hint("the same again: what has arrived is not done twice")
            }
            oci::Error::Denied { .. } => is(Code::Refused).hint("docker login, and whether you may"),
            oci::Error::NotFound(_) => {
                is(Code::NotFound).hint("another tag or repository; catnap snapshot push puts one there")
            }
            oci::Error::Strange { .. } => {
                is(Code::Verify).hint("catnap snapshot export hands it on without a registry")
            }
            oci::Error::Damaged { .. } => {
                is(Code::Verify).hint("the same again, when whoever runs the registry has removed that blob from it")
            }
            oci::Error::Interrupted => is(Code::Failed),
        }
    }
}

impl From<disk::Error> for Failure {
    fn from(error: disk::Error) -> Failure {
        Failure::new(Code::Failed, error.to_string())
    }
}
