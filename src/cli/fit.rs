//! The size in which a snapshot becomes a machine, and what cannot be had.

use super::cpu;
use super::restore::Plan;
use crate::control::{Code, Failure};
use crate::machine::{self, Shape};
use crate::snapshot;
use crate::spec::{Ephemeral, MEMORY_STEP, MachineSpec, Size};
use crate::store;
use crate::sys::{hex, random};

/// The machine that a snapshot becomes, in the size that is wanted.
pub fn fit(plan: &Plan<'_>, saved: &snapshot::Machine, resumed: bool) -> Result<MachineSpec, Failure> {
    let cpus = plan.size.cpus().unwrap_or(saved.cpus);
    let memory = plan.size.memory().unwrap_or(Size(saved.memory));
    let mut spec = MachineSpec {
        max_cpus: saved.max_cpus,
        max_memory: Size(saved.max_memory),
        append: saved.append.clone(),
        forwards: plan.forwards.clone(),
        // Those of the machine that was snapshotted, unless others are wanted.
        ephemeral: match plan.ephemeral.is_empty() {
            true => plan.snapshot.manifest.ephemeral.iter().map(same).collect(),
            false => plan.ephemeral.clone(),
        },
        settings: plan.settings.clone(),
        machine_id: plan.new_identity.then(new_machine_id).transpose()?,
        cpu_baseline: if resumed { saved.cpu_baseline } else { cpu::for_boot(saved.cpu_baseline) },
        ..MachineSpec::new(plan.name.clone(), &plan.snapshot.digest.to_string(), cpus, memory)
    };
    if resumed {
        let shape = Shape {
            cpus: saved.cpus,
            max_cpus: saved.max_cpus,
            boot_memory: saved.boot_memory,
            max_memory: saved.max_memory,
        };
        shape.check(machine::Size { cpus, memory: memory.bytes() }).map_err(|error| match error {
            machine::Error::Envelope { .. } => Failure::from(error).hint(format!(
                "catnap restore {} --name {} --cold --cpus {cpus} --memory {memory}",
                plan.snapshot.manifest.name, spec.name
            )),
            other => other.into(),
        })?;
    } else {
        // Another boot is the beginning of another envelope, which holds the old one where it can.
        spec.max_cpus = spec.max_cpus.max(cpus);
        let more = spec.max_memory.bytes().saturating_sub(memory.bytes());
        spec.max_memory = Size(memory.bytes() + (more - more % MEMORY_STEP.bytes()));
    }
    spec.check().map_err(|error| Failure::new(Code::Usage, error.to_string()).hint("catnap restore --help"))?;
    Ok(spec)
}

/// A machine id that nobody has had.
pub fn new_machine_id() -> Result<String, Failure> {
    let bytes = random::bytes::<16>().map_err(|error| Failure::while_doing(random::SOURCE, error))?;
    Ok(hex::encode(&bytes))
}

/// Why a disk cannot be smaller.
pub fn ratchet(error: store::Error) -> Failure {
    match error {
        store::Error::DiskTooSmall { wanted, least } => {
            let size = |bytes| Size(bytes).to_string();
            let why = format!(
                "the disk cannot have {}: the snapshot's has {}, and a disk only grows. Its filesystem reaches to its \
                 end, and so does what a guest in memory believes of it",
                size(wanted),
                size(least)
            );
            Failure::new(Code::Refused, why).hint(format!("--disk-size {} or more", size(least)))
        }
        other => other.into(),
    }
}

/// A disk in the host's memory as one of the machine that was snapshotted.
fn same(of: &snapshot::Ephemeral) -> Ephemeral {
    Ephemeral { size: Size(of.size), at: of.at.clone() }
}
