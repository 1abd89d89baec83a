//! Sizes as they are asked for on the command line, and what is said of those that were not reached.

use clap::builder::{PossibleValuesParser, TypedValueParser};

use super::ui;
use crate::control::protocol::Resized;
use crate::control::{Code, Failure};
use crate::spec::{Flavor, MachineSpec, Name, Size};
use crate::sys::process;

/// Another size for a machine.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Wanted {
    /// How many vCPUs it is to have
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(MachineSpec::MAX_CPUS)))]
    cpus: Option<u32>,
    /// How much memory it is to have
    #[arg(short, long, value_name = "SIZE")]
    memory: Option<Size>,
    /// A size by name: kitten (1 vCPU, 256M), cat (2, 512M) or tiger (4, 1G)
    #[arg(long, value_name = "NAME", value_parser = flavors(), hide_possible_values = true, conflicts_with_all = ["cpus", "memory"])]
    flavor: Option<Flavor>,
}

impl Wanted {
    /// vCPUs, when they were asked for.
    pub fn cpus(&self) -> Option<u32> {
        self.cpus.or(self.flavor.map(Flavor::cpus))
    }

    /// Memory, when it was asked for.
    pub fn memory(&self) -> Option<Size> {
        self.memory.or(self.flavor.map(Flavor::memory))
    }

    /// Whether any size was asked for.
    pub fn is_some(&self) -> bool {
        self.cpus().is_some() || self.memory().is_some()
    }
}

/// Reads the name of a flavor, so that shells can complete it.
pub fn flavors() -> impl TypedValueParser<Value = Flavor> {
    PossibleValuesParser::new(Flavor::ALL.map(Flavor::name)).try_map(|name| name.parse::<Flavor>())
}

/// How many processors this host has.
pub fn host_cpus() -> u32 {
    process::cpus() as u32
}

/// Warns of more vCPUs than the host has processors: allowed, for they only take turns.
pub fn warn_of_many(cpus: u32) {
    let host = host_cpus();
    if cpus > host {
        ui::warn(format!("{cpus} vCPUs are wanted and this host has {host}: they take turns"));
    }
}

/// What is said of a size that was not reached; the machine runs on with what it has.
pub fn fell_short(name: &Name, resized: &Resized) -> Failure {
    if resized.unconfirmed && resized.reached == resized.wanted {
        let why = format!("{name} was given {}, and its agent does not say whether it can use that", resized.reached);
        return Failure::new(Code::Refused, why).hint(format!("catnap logs {name}; catnap resize tries again"));
    }
    let why = format!(
        "{name} has {} and not {}: the guest did not follow any further, and runs on",
        resized.reached, resized.wanted
    );
    let less = resized.reached.memory > resized.wanted.memory || resized.reached.cpus > resized.wanted.cpus;
    Failure::new(Code::Refused, why).hint(match less {
        true => format!("catnap exec {name} -- free shows what its programs use; catnap resize tries again"),
        false => format!("catnap logs {name} shows what its kernel says; catnap resize tries again"),
    })
}
