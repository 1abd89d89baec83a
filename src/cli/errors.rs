//! What went wrong in the rooms below, with the next step to try.

use crate::control::{Code, Failure};
use crate::{disk, image, store};

impl From<store::Error> for Failure {
    fn from(error: store::Error) -> Failure {
        let text = error.to_string();
        let is = |code| Failure::new(code, text.clone());
        match error {
            store::Error::NoMachine(_) => is(Code::NotFound).hint("catnap ps"),
            store::Error::NoSnapshot(_) => is(Code::NotFound).hint("catnap image ls; kitten is made on first use"),
            store::Error::Reference(_) | store::Error::Ambiguous(_) => is(Code::Usage).hint("catnap image ls"),
            store::Error::MachineTaken(name) => {
                is(Code::Refused).hint(format!("another --name, or catnap start {name}, or catnap rm {name}"))
            }
            store::Error::Running(name) => is(Code::Refused).hint(format!("catnap stop {name}")),
            store::Error::DiskTooSmall { .. } => is(Code::Usage).hint("a larger --disk-size"),
            store::Error::Damaged { .. } | store::Error::Manifest(_) => {
                is(Code::Verify).hint("catnap image build, which makes the image anew")
            }
            store::Error::BadMachine { .. } => is(Code::Verify).hint("catnap rm, which removes what is left of it"),
            store::Error::Disk(error) => error.into(),
            store::Error::File(_) => is(Code::Failed),
        }
    }
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

impl From<disk::Error> for Failure {
    fn from(error: disk::Error) -> Failure {
        Failure::new(Code::Failed, error.to_string())
    }
}
