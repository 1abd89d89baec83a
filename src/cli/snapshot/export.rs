//! `catnap snapshot export`: a snapshot as one file, to hand on.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IsTerminal};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::Instant;

use serde::Serialize;

use super::{age, scrub, secrets, view};
use crate::archive::Outgoing;
use crate::archive::secrets::Report;
use crate::cli::home::House;
use crate::cli::{Outcome, ui};
use crate::control::{Code, Failure};
use crate::snapshot::{Digest, Kind, PublicKey, Role, SecretKey};
use crate::spec::Name;
use crate::store::{Snapshot, Store};
use crate::sys::files::{sync_dir, unique_name};
use crate::sys::patient::Patient;
use crate::sys::process;

/// The most secrets that are shown before it is asked; `inspect --secrets` shows all.
const SHOWN: usize = 10;

/// Write a snapshot to one file, to hand it on
#[derive(clap::Args)]
#[command(after_help = "\
The file needs nothing else: kernel and initrd are in it, each disk is one layer, memory is whole. It is a tar \
archive in zstd frames (docs/snapshot-format.md).

What travels is shown before it goes. Whoever gets the file gets all that is on the disks and in the memory, also \
what was removed and not overwritten; so when secrets are found, or memory goes, you are asked. --disk-only leaves \
memory and machine state out: what arrives is a `crash` snapshot, and boots. --scrub has keys, machine id, shell
histories, logs and the like removed before, in a new snapshot (`catnap snapshot scrub --help`). --encrypt-to has the
program `age` encrypt it; age-keygen makes keys.

Examples:
  catnap snapshot export anna@monday anna.catnap
  catnap snapshot export anna@monday anna.catnap --disk-only
  catnap snapshot export anna@monday anna.catnap --scrub --also /root/notes.txt
  catnap snapshot export anna@monday anna.catnap --sign anna --encrypt-to age1…
  catnap snapshot export anna@monday - --yes | ssh ben catnap snapshot import -")]
pub struct Args {
    /// Take memory along, and refuse when there is none [default: take it when it is there]
    #[arg(long, conflicts_with = "disk_only")]
    with_memory: bool,
    /// Leave memory and machine state out
    #[arg(long)]
    disk_only: bool,
    /// Make a new snapshot without memory, keys, histories and logs, and write that
    #[arg(long, conflicts_with = "with_memory")]
    scrub: bool,
    #[command(flatten)]
    also: scrub::Also,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
    /// Stand for it with this key of yours (`catnap key new`)
    #[arg(long, value_name = "KEY")]
    sign: Option<Name>,
    /// Encrypt the file, so that only whose key this is can read it; can be given several times
    #[arg(long, value_name = "RECIPIENT", value_parser = age::recipient)]
    encrypt_to: Vec<String>,
    /// A string to search for, beside the usual secrets; can be given several times
    #[arg(long, value_name = "STRING", value_parser = secrets::wanted)]
    find: Vec<String>,
    /// Print what came of it as JSON
    #[arg(long)]
    json: bool,
    /// The snapshot
    #[arg(value_name = "SNAPSHOT")]
    reference: String,
    /// The file, which must not be there yet, or - for standard output
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

/// What came of an export.
#[derive(Serialize)]
struct Exported {
    file: PathBuf,
    name: String,
    /// Of the snapshot that arrives.
    digest: Digest,
    kind: Kind,
    /// Length of the file.
    bytes: u64,
    /// Bytes in it before they were compressed.
    content_bytes: u64,
    /// How many different secrets were found in it.
    secrets: usize,
    /// The key that stands for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    signed: Option<PublicKey>,
    seconds: f64,
}

/// Runs the verb.
pub fn run(mut args: Args) -> Outcome {
    process::catch_interrupts();
    let house = House::open()?;
    let to_stdout = args.file.as_os_str() == "-";
    check_target(&args.file, to_stdout, args.json)?;
    args.also.check(args.scrub)?;
    let key = args.sign.as_ref().map(|name| house.store().secret_key(name)).transpose()?;
    if args.scrub {
        args.reference = scrub::first(&house, &args.reference, &args.also)?;
    }
    let going = Going::find(&house, &args.reference, args.with_memory, args.disk_only, &args.find)?;
    going.ask(args.yes, &format!("Write all of this to {}?", args.file.display()), "nothing was written")?;
    let (begun, signed) = (Instant::now(), key.as_ref().map(SecretKey::public));
    let progress = ui::Progress::begin(format!("Exporting {}", args.reference));
    let mut watch = |now: crate::archive::Progress<'_>| {
        progress.count(format!("Exporting {}: {}", args.reference, now.what), now.done, now.total);
    };
    let mut outgoing = Outgoing::prepare(house.store(), &going.snapshot, going.memory, &mut watch)?;
    if let Some(key) = &key {
        outgoing.sign(key);
    }
    let bytes = match to_stdout {
        true if args.encrypt_to.is_empty() => {
            let stdout = Patient::new(&io::stdout()).map_err(|error| Failure::while_doing("standard output", error))?;
            outgoing.write(stdout, &mut watch)?.1
        }
        true => age::through(&args.encrypt_to, Stdio::inherit(), |age| Ok(outgoing.write(age, &mut watch)?))?,
        false if args.encrypt_to.is_empty() => write_file(&args.file, |file| Ok(outgoing.write(file, &mut watch)?))?,
        false => write_file(&args.file, |file| {
            let failed = |error| Failure::while_doing(args.file.display(), error);
            let to = file.try_clone().map_err(failed)?;
            age::through(&args.encrypt_to, to.into(), |age| Ok(outgoing.write(age, &mut watch)?))?;
            let bytes = file.metadata().map_err(failed)?.len();
            Ok((file, bytes))
        })?,
    };
    drop(progress);
    let exported = Exported {
        file: args.file,
        name: outgoing.manifest().name.clone(),
        digest: outgoing.digest(),
        kind: outgoing.manifest().kind,
        bytes,
        content_bytes: outgoing.size(),
        secrets: going.report.findings.len(),
        signed,
        seconds: begun.elapsed().as_secs_f64(),
    };
    match (to_stdout, args.json) {
        (true, _) => {}
        (_, true) => return ui::json(&exported).map(|()| ExitCode::SUCCESS),
        _ => ui::data(format!("{}\n", exported.file.display()))?,
    }
    ui::note(tell(&exported));
    Ok(ExitCode::SUCCESS)
}

/// Refuses what cannot be written before anything is read.
fn check_target(file: &Path, to_stdout: bool, json: bool) -> Result<(), Failure> {
    let usage = |why: &str| Err(Failure::new(Code::Usage, why).hint("catnap snapshot export --help"));
    match to_stdout {
        true if json => usage("the archive and --json cannot both go to standard output"),
        true if io::stdout().is_terminal() => usage("an archive is nothing for a terminal: lead it elsewhere"),
        true => Ok(()),
        false if fs::symlink_metadata(file).is_ok() => {
            Err(Failure::new(Code::Refused, format!("{} is there already", file.display()))
                .hint("another name, or remove it first"))
        }
        false if !folder(file).is_dir() => {
            Err(Failure::new(Code::NotFound, format!("there is no folder {}", folder(file).display()))
                .hint("mkdir, or another name"))
        }
        false => Ok(()),
    }
}

fn folder(file: &Path) -> &Path {
    file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Writes a file that appears when it is whole and synced. Gives its length.
fn write_file(path: &Path, write: impl FnOnce(File) -> Result<(File, u64), Failure>) -> Result<u64, Failure> {
    let temporary = folder(path).join(format!(".{}", unique_name()));
    let failed = |error: io::Error| {
        Failure::while_doing(path.display(), error).hint("another place, with room for it, where you may write")
    };
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary).map_err(failed)?;
    let written = write(file).and_then(|(file, bytes)| {
        // A link, and not a new name: that would take the place of what has appeared there meanwhile.
        file.sync_all().and_then(|()| fs::hard_link(&temporary, path)).map_err(failed)?;
        let _ = fs::remove_file(&temporary);
        sync_dir(folder(path)).map_err(|error| failed(error.source))?;
        Ok(bytes)
    });
    if written.is_err() {
        // What went wrong is the error to report; what is left is hidden.
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// A snapshot that is about to travel, which the user has been shown.
pub struct Going {
    /// The snapshot.
    pub snapshot: Snapshot,
    /// Whether its memory goes.
    pub memory: bool,
    /// The secrets in what goes.
    pub report: Report,
}

impl Going {
    /// Finds a snapshot, searches what of it is to travel for secrets, and shows all of that.
    pub fn find(
        house: &House,
        reference: &str,
        with_memory: bool,
        disk_only: bool,
        wanted: &[String],
    ) -> Result<Going, Failure> {
        let snapshot = house.store().resolve(reference)?;
        let has_memory = snapshot.manifest.memory.is_some();
        if with_memory && !has_memory {
            let why = format!("{reference} is a {} snapshot, which has no memory", snapshot.manifest.kind.name());
            return Err(Failure::new(Code::Refused, why).hint("leave --with-memory away"));
        }
        let memory = has_memory && !disk_only;
        let going = if memory { snapshot.clone() } else { Store::without_memory(&snapshot) };
        let report = secrets::scan(house, reference, &going, wanted)?;
        show(reference, &snapshot, &going, &report);
        Ok(Going { snapshot, memory, report })
    }

    /// Asks, when there is something to ask for: memory, or secrets.
    pub fn ask(&self, yes: bool, question: &str, nothing: &str) -> Result<(), Failure> {
        if yes || !self.memory && self.report.findings.is_empty() || ui::confirm(question)? {
            return Ok(());
        }
        Err(Failure::new(Code::Refused, nothing).hint("--disk-only leaves the memory out"))
    }
}

/// Shows what is about to travel.
fn show(name: &str, snapshot: &Snapshot, going: &Snapshot, report: &Report) {
    let manifest = &going.manifest;
    let note = |what: &str, text: String| ui::note(format!("  {what:9} {text}"));
    ui::note(format!("{name}: {}, taken {} ago", manifest.kind.name(), ui::span(view::since(manifest.created))));
    for disk in &manifest.disks {
        note("disk", format!("{} of {}", disk.device, ui::amount(disk.virtual_size)));
    }
    let size = |role| manifest.file(role).map_or(0, |file| file.size);
    note("boots", format!("kernel and initrd, {}", ui::amount(size(Role::Kernel).saturating_add(size(Role::Initrd)))));
    match (&manifest.memory, &manifest.machine) {
        (Some(_), Some(machine)) => note("memory", format!("all that is in use of {}", ui::amount(machine.memory))),
        _ if snapshot.manifest.memory.is_some() => {
            note(
                "left out",
                "memory and machine state, and with them what the guest had not written to its disk yet".into(),
            );
        }
        _ => {}
    }
    if !manifest.ephemeral.is_empty() {
        let disks: Vec<_> = manifest.ephemeral.iter().map(|disk| disk.device.as_str()).collect();
        note("left out", format!("what was on the ephemeral disks {}", disks.join(", ")));
    }
    if report.findings.is_empty() {
        note("secrets", "none were found, which proves nothing".into());
        return;
    }
    ui::warn(format!("{name} has secrets in it, which travel along:"));
    for row in secrets::rows(name, report).iter().take(SHOWN) {
        ui::note(format!("  {}", row[1..].join("  ")));
    }
    if report.findings.len() > SHOWN {
        ui::note(format!("  … and {} more: catnap snapshot inspect --secrets {name}", report.findings.len() - SHOWN));
    }
}

fn tell(exported: &Exported) -> String {
    let rate = exported.content_bytes as f64 / exported.seconds.max(0.001);
    format!(
        "{}, {}: {} in {:.1} s, {}/s before compression",
        exported.kind.name(),
        exported.digest.short(),
        ui::amount(exported.bytes),
        exported.seconds,
        ui::amount(rate as u64)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_appears_at_the_place_meanwhile_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("anna.catnap");
        let write = |file: File| Ok((file, 3));
        assert_eq!(write_file(&path, write).unwrap(), 3);
        assert!(write_file(&path, write).unwrap_err().to_string().contains("exists"));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing stays behind");
    }
}
