//! What must hold before a machine is booted: refused here it costs nothing, and the reason is plain.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::time::Duration;

use super::home::House;
use super::ui;
use crate::control::{Code, Failure};
use crate::kvm;
use crate::kvm::probe::{self, Verdict};
use crate::spec::{MachineSpec, Name, Size};

/// Long enough for a verdict on a busy host, short enough not to be felt.
const BUDGET: Duration = Duration::from_millis(200);
/// The module of a KVM that cannot run an ordinary Linux guest.
const PVM: &str = "/sys/module/kvm_pvm";
/// What always helps where KVM does not.
const LAB: &str = "scripts/lab up, an emulated host with real KVM inside";

/// Whether KVM is there for this user and runs guests for real: lets a probe guest show it.
pub fn kvm() -> Result<Verdict, Failure> {
    match probe::probe(BUDGET) {
        Ok(verdict) if verdict.usable => Ok(verdict),
        Ok(verdict) => Err(unusable(format!("this host cannot run machines: {}", verdict.reason), LAB)),
        Err(kvm::Error::Missing) => Err(kvm_missing()),
        Err(kvm::Error::Denied) => Err(kvm_denied()),
        Err(error) => Err(unusable(error.to_string(), LAB)),
    }
}

/// The part of it that costs nothing, for the way to a boot.
pub fn kvm_quickly() -> Result<(), Failure> {
    match fs::File::options().read(true).write(true).open("/dev/kvm") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(kvm_missing()),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Err(kvm_denied()),
        Err(error) => return Err(unusable(format!("/dev/kvm cannot be opened: {error}"), LAB)),
        Ok(_) if Path::new(PVM).exists() => {}
        Ok(_) => return Ok(()),
    }
    let why = "this host cannot run machines: its KVM is kvm_pvm, which only emulates ordinary Linux guests";
    Err(unusable(why.into(), LAB))
}

fn kvm_missing() -> Failure {
    let why = "there is no /dev/kvm: this host has no KVM, or its module is not loaded";
    let load = "sudo modprobe -a kvm_intel kvm_amd; in a virtual machine, turn on nested virtualisation";
    unusable(why.into(), &format!("{load}; or {LAB}"))
}

fn kvm_denied() -> Failure {
    let why = "/dev/kvm may not be opened by this user, who is not in the group `kvm`";
    unusable(why.into(), "sudo usermod -aG kvm $USER, then log out and in again")
}

fn unusable(why: String, hint: &str) -> Failure {
    Failure::new(Code::Host, why).hint(hint)
}

/// The host's memory: all of it, and what could be had now.
pub fn host_memory() -> io::Result<(Size, Size)> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    };
    match (field("MemTotal"), field("MemAvailable")) {
        (Some(total), Some(available)) => Ok((Size(total), Size(available))),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "/proc/meminfo lacks MemTotal or MemAvailable")),
    }
}

/// Whether the host has the memory that a machine wants; warns when that will be tight.
pub fn memory(wanted: Size) -> Result<(), Failure> {
    let (total, available) = host_memory().map_err(|error| Failure::while_doing("/proc/meminfo", error))?;
    if wanted > total {
        let why = format!("{wanted} of memory cannot be had: this host has {}M", total.bytes() >> 20);
        return Err(Failure::new(Code::Refused, why)
            .hint(format!("--memory {}", Size((available.bytes() / 2).next_multiple_of(64 << 20)))));
    }
    if wanted > available {
        ui::warn(format!("{wanted} of memory is wanted and {}M is free: the host may swap", available.bytes() >> 20));
    }
    Ok(())
}

/// Whether the ports of the host that a machine wants are free.
pub fn ports(house: &House, spec: &MachineSpec) -> Result<(), Failure> {
    spec.forwards.iter().try_for_each(|forward| {
        let port = forward.host;
        let Err(error) = TcpListener::bind((Ipv4Addr::LOCALHOST, port)) else { return Ok(()) };
        Err(match error.kind() {
            io::ErrorKind::AddrInUse => port_taken(port, holder(house, port).as_ref(), forward.guest),
            io::ErrorKind::PermissionDenied => Failure::new(
                Code::Refused,
                format!("port {port} of this host is for root only"),
            )
            .hint(format!("-p {}:{}", u32::from(port) + 8000, forward.guest)),
            _ => Failure::new(Code::Failed, format!("port {port} of this host cannot be used: {error}")),
        })
    })
}

fn port_taken(port: u16, holder: Option<&Name>, guest: u16) -> Failure {
    let (who, stop) = match holder {
        Some(name) => (format!("the machine {name}"), format!("catnap stop {name}, or ")),
        None => ("another program".into(), String::new()),
    };
    let other = if port == u16::MAX { port - 1 } else { port + 1 };
    Failure::new(Code::Refused, format!("port {port} of this host is in use by {who}"))
        .hint(format!("{stop}another port, such as -p {other}:{guest}"))
}

/// The machine of ours that has this port of the host, if one has.
fn holder(house: &House, port: u16) -> Option<Name> {
    let machines = house.machines().ok()?.into_iter().filter_map(|(_, machine)| machine.ok());
    let mut holders = machines.filter(|machine| {
        machine.spec.forwards.iter().any(|forward| forward.host == port) && machine.is_running().unwrap_or(false)
    });
    holders.next().map(|machine| machine.spec.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_memory_than_the_host_has_is_refused() {
        let (total, available) = host_memory().unwrap();
        assert!(available <= total && total > Size::mib(64));
        let refused = memory(Size(total.bytes() * 2)).unwrap_err();
        assert_eq!(refused.code, Code::Refused);
        assert!(memory(Size::mib(1)).is_ok());
    }

    #[test]
    fn the_holder_of_a_port_is_named() {
        let anna: Name = "anna".parse().unwrap();
        let taken = port_taken(8080, Some(&anna), 80);
        assert!(taken.error.contains("8080") && taken.error.contains("anna"), "{taken}");
        assert!(taken.hint.unwrap().contains("-p 8081:80"));
        assert!(port_taken(65535, None, 80).hint.unwrap().contains("65534:80"));
    }
}
