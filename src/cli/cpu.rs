//! Whether this host's CPU will do. It is asked itself, and not KVM.

use super::ui;
use crate::control::{Code, Failure};
use crate::kvm::Cpu;
use crate::snapshot;
use crate::spec::Baseline;
use crate::store::Snapshot;

/// Whether a guest can go on here that was shown another CPU. What KVM refuses beyond that, such as another rate of the
/// time stamp counter where that cannot be scaled, shows when it wakes.
pub fn wakes_here(snapshot: &Snapshot) -> Result<(), Failure> {
    let manifest = &snapshot.manifest;
    match manifest.cpu.as_ref().and_then(|cpu| misfit(cpu, &Cpu::of_host())) {
        None => Ok(()),
        Some(why) => {
            let name = &manifest.name;
            let hint = format!(
                "catnap restore {name} --cold, which boots it from its disks; `catnap run --cpu-baseline x86-64-v2` \
                 makes machines that wake on other hosts"
            );
            Err(Failure::new(Code::Refused, format!("{name} cannot wake on this host: {why}")).hint(hint))
        }
    }
}

/// Why a guest cannot go on on a CPU.
fn misfit(cpu: &snapshot::Cpu, host: &Cpu) -> Option<String> {
    if cpu.vendor != host.vendor {
        return Some(format!("its guest was shown a CPU of {}, and this one is of {}", cpu.vendor, host.vendor));
    }
    let missing = host.lacks(cpu.features.iter().map(String::as_str));
    (!missing.is_empty()).then(|| format!("its CPU lacks {}, which the guest was shown", missing.join(", ")))
}

/// Whether this host has all of a baseline.
pub fn reaches(baseline: Baseline) -> Result<(), Failure> {
    let missing = Cpu::of_host().lacks_for(baseline);
    if missing.is_empty() {
        return Ok(());
    }
    let why = format!("this host's CPU is less than {baseline}: it lacks {}", missing.join(", "));
    Err(Failure::new(Code::Refused, why).hint("a lower --cpu-baseline, or none"))
}

/// The baseline of a machine that boots here again. Better more than it asked for than no boot.
pub fn for_boot(baseline: Baseline) -> Baseline {
    match reaches(baseline) {
        Ok(()) => baseline,
        Err(failure) => {
            ui::warn(format!("{}; the guest is shown all that there is", failure.error));
            Baseline::Host
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        let host = Cpu { vendor: "AuthenticAMD".into(), features: vec!["sse2", "avx"] };
        let cpu = |vendor: &str, features: &[&str]| snapshot::Cpu {
            vendor: vendor.into(),
            features: features.iter().map(|name| name.to_string()).collect(),
            tsc_khz: 1,
        };
        assert_eq!(misfit(&cpu("AuthenticAMD", &["avx"]), &host), None);
        let why = misfit(&cpu("AuthenticAMD", &["avx", "avx2", "from_the_future"]), &host).unwrap();
        assert!(why.contains("lacks avx2, from_the_future,"), "{why}");
        let why = misfit(&cpu("GenuineIntel", &[]), &host).unwrap();
        assert!(why.contains("GenuineIntel") && why.contains("AuthenticAMD"), "{why}");
    }
}
