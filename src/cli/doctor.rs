//! `catnap doctor`: whether this host can run machines, and what to do about what it lacks.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use serde::Serialize;

use super::home::House;
use super::{Outcome, checks, ui};
use crate::control::{Code, Failure};
use crate::spec::Size;
use crate::sys::{files, peer, space};

/// What a kitten with its image needs on the disk, and in memory.
const ROOM: Size = Size::mib(1024);
const MEMORY: Size = Size::mib(256);

/// Programs that Catnap runs, with the Debian package that has them, and whether something fails without.
const PROGRAMS: [(&str, &str, bool, &str); 4] = [
    ("mke2fs", "e2fsprogs", true, "makes the root disk of images"),
    ("dpkg", "dpkg", false, "unpacks the distribution's kernel; without it, the host's own kernel is taken"),
    ("apt-get", "apt", false, "fetches the distribution's kernel; without it, the host's own kernel is taken"),
    ("qemu-img", "qemu-utils", false, "looks into disks from outside; nothing of Catnap's needs it"),
];

/// Find out whether this host can run machines, and what to do if not
#[derive(clap::Args)]
#[command(after_help = "\
Exit code 5: machines cannot be run on this host as it is.

Examples:
  catnap doctor
  catnap doctor --fix            install what is missing, remove what killed monitors left behind
  catnap doctor --kvm && echo ready   for scripts: KVM alone, quickly")]
pub struct Args {
    /// Do what can be done about it
    #[arg(long)]
    fix: bool,
    /// Look at KVM alone
    #[arg(long, conflicts_with = "fix")]
    kvm: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// How something fares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Health {
    Good,
    /// Machines run, but not everything will be well.
    Poor,
    /// Machines cannot be run.
    Bad,
}

/// One finding.
#[derive(Debug, Serialize)]
struct Finding {
    what: &'static str,
    health: Health,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
}

impl Finding {
    fn good(what: &'static str, found: impl Into<String>) -> Finding {
        Finding { what, health: Health::Good, found: found.into(), hint: None }
    }

    fn not_good(what: &'static str, health: Health, found: impl Into<String>, hint: impl Into<String>) -> Finding {
        Finding { what, health, found: found.into(), hint: Some(hint.into()) }
    }

    fn of(what: &'static str, health: Health, failure: Failure) -> Finding {
        Finding { what, health, found: failure.error, hint: failure.hint }
    }
}

/// Runs the verb.
pub fn run(args: Args) -> Outcome {
    let findings = if args.kvm { vec![kvm()] } else { everything(args.fix)? };
    if args.json {
        ui::json(&findings)?;
    } else {
        ui::data(findings.iter().map(line).collect::<String>())?;
    }
    let bad = findings.iter().any(|finding| finding.health == Health::Bad);
    Ok(if bad { ExitCode::from(Code::Host as u8) } else { ExitCode::SUCCESS })
}

fn everything(fix: bool) -> Result<Vec<Finding>, Failure> {
    if fix {
        install_missing();
    }
    let mut findings = vec![kvm(), memory()];
    match House::open() {
        Err(failure) => findings.push(Finding::of("store", Health::Bad, failure)),
        Ok(house) => {
            findings.push(disk(&house.store().home().data));
            findings.push(store(&house, fix)?);
        }
    }
    findings.extend(PROGRAMS.iter().map(program));
    Ok(findings)
}

fn line(finding: &Finding) -> String {
    let mark = match finding.health {
        Health::Good => "ok  ",
        Health::Poor => "poor",
        Health::Bad => "BAD ",
    };
    let hint = finding.hint.as_ref().map_or(String::new(), |hint| format!("      try: {hint}\n"));
    format!("{mark}  {}: {}\n{hint}", finding.what, finding.found)
}

fn kvm() -> Finding {
    match checks::kvm() {
        Ok(verdict) => Finding::good("kvm", verdict.reason),
        Err(failure) => Finding::of("kvm", Health::Bad, failure),
    }
}

fn memory() -> Finding {
    let what = "memory";
    match checks::host_memory() {
        Err(error) => Finding::not_good(what, Health::Poor, error.to_string(), "mount -t proc proc /proc"),
        Ok((total, available)) => {
            let found = format!("{}M of {}M are free", available.bytes() >> 20, total.bytes() >> 20);
            if available >= MEMORY {
                return Finding::good(what, found);
            }
            Finding::not_good(what, Health::Poor, found, "stop what needs memory; a kitten wants 256M")
        }
    }
}

/// How much the disk with the store has left.
fn disk(folder: &Path) -> Finding {
    let what = "disk";
    match space::free(folder).map(Size) {
        Err(error) => Finding::not_good(what, Health::Poor, format!("{}: {error}", folder.display()), "df -h"),
        Ok(free) => {
            let found = format!("{}M are free in {}", free.bytes() >> 20, folder.display());
            if free >= ROOM {
                return Finding::good(what, found);
            }
            Finding::not_good(what, Health::Poor, found, "make room, or set CATNAP_HOME to a folder on another disk")
        }
    }
}

/// Whether the store can be read, and what killed processes have left in it.
fn store(house: &House, fix: bool) -> Result<Finding, Failure> {
    let what = "store";
    let store = house.store();
    let machines = house.machines()?;
    let snapshots = store.list()?;
    let unreadable = machines.iter().filter(|(_, machine)| machine.is_err()).map(|(name, _)| name.to_string());
    let unreadable: Vec<_> = unreadable
        .chain(snapshots.iter().filter(|listed| listed.snapshot.is_err()).map(|listed| listed.name()))
        .collect();
    if !unreadable.is_empty() {
        let found = format!("not readable: {}", unreadable.join(", "));
        return Ok(Finding::not_good(what, Health::Poor, found, "catnap rm or catnap snapshot rm removes them"));
    }
    let counted = |count, one, many| format!("{count} {}", if count == 1 { one } else { many });
    let mut found = counted(machines.len(), "machine", "machines");
    found += &format!(", {}", counted(snapshots.len(), "image or snapshot", "images and snapshots"));
    let stale: Vec<_> = stale_runtime_folders(house)?;
    if fix {
        let swept = store.sweep()?;
        for folder in &stale {
            fs::remove_dir_all(folder).map_err(|error| Failure::while_doing(folder.display(), error))?;
        }
        found += &format!("; removed {swept} half-made things and {} stale sockets", stale.len());
    } else if !stale.is_empty() {
        found += &format!(", {} sockets of killed monitors", stale.len());
        return Ok(Finding::not_good(what, Health::Good, found, "catnap doctor --fix, or start those machines again"));
    }
    Ok(Finding::good(what, found))
}

/// Folders for sockets whose machines do not run.
fn stale_runtime_folders(house: &House) -> Result<Vec<PathBuf>, Failure> {
    let runtime = &house.store().home().runtime;
    let names = files::names_in(runtime).map_err(|error| Failure::new(Code::Failed, error.to_string()))?;
    let runs = |name: &str| {
        let machine = name.parse().ok().and_then(|name| house.machine(&name).ok());
        machine.is_some_and(|machine| machine.is_running().unwrap_or(true))
    };
    let stale = names.into_iter().filter(|name| runtime.join(name).join("control.sock").exists() && !runs(name));
    Ok(stale.map(|name| runtime.join(name)).collect())
}

fn program((name, package, needed, purpose): &(&'static str, &str, bool, &str)) -> Finding {
    match find(name) {
        Some(path) => Finding::good(name, path.display().to_string()),
        None => {
            let health = if *needed { Health::Bad } else { Health::Good };
            let found = format!("not installed ({purpose})");
            Finding::not_good(name, health, found, format!("sudo apt-get install {package}, or catnap doctor --fix"))
        }
    }
}

/// Where a program is; beside PATH also in the folders for administrators, which users often lack in theirs.
fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let admin = ["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(admin).map(|folder| folder.join(program)).find(|path| path.is_file())
}

/// Installs the packages of missing programs, where this user may.
fn install_missing() {
    let missing: Vec<_> = PROGRAMS.iter().filter(|(name, ..)| find(name).is_none()).map(|(_, p, ..)| *p).collect();
    if missing.is_empty() {
        return;
    }
    if find("apt-get").is_none() {
        return ui::warn(format!("there is no apt-get to install {} with", missing.join(" ")));
    }
    let mut command = if peer::own_uid() == 0 {
        Command::new("apt-get")
    } else {
        // -n: a script must not hang at a question for a password.
        let mut sudo = Command::new("sudo");
        sudo.args(["-n", "apt-get"]);
        sudo
    };
    ui::note(format!("Installing {}", missing.join(" ")));
    command.args(["install", "-y", "--no-install-recommends"]).args(&missing).stdin(Stdio::null());
    // Its words are no data of ours.
    command.stdout(Stdio::null());
    match command.status() {
        Ok(status) if status.success() => {}
        Ok(status) => ui::warn(format!("apt-get install {} failed: {status}", missing.join(" "))),
        Err(error) => ui::warn(format!("apt-get install {} cannot be run: {error}", missing.join(" "))),
    }
}
