//! `catnap snapshot scrub`: a new snapshot without keys, logs and the like, to be handed on.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use catnap_guest::protocol::{Scrubbed, pattern};
use serde::Serialize;

use super::{scrubber, secrets};
use crate::archive::secrets::Report;
use crate::cli::home::House;
use crate::cli::{Outcome, checks, restore, ui};
use crate::control::{Code, Failure};
use crate::disk::{Format, chain_files, fold};
use crate::snapshot::{Digest, Disk, Kind, Manifest, Role, describe};
use crate::store::{self, Snapshot, Store};
use crate::sys::files::{At, read_bounded};
use crate::sys::process;

/// What is removed when nobody says more.
const LIST: &str = include_str!("../../../images/scrub.list");
/// The longest list, in bytes: the agent takes 64 KiB in one request.
const MAX_LIST: usize = 32 << 10;
/// The most secrets that are shown.
const SHOWN: usize = 10;
/// The root disk's file.
const ROOT: &str = "root.qcow2";

/// Make a copy of a snapshot without keys, histories and logs
#[derive(clap::Args)]
#[command(after_help = "\
The copy has disks alone, and boots; the original stays as it is. Keys, machine id, shell histories, logs and whatever
else is in the list (--show-list) is removed by a small machine that boots for it, and wiped: neither free blocks, nor
the filesystem's journal, nor a layer below the disk has any of it. What then still looks like a secret is told.

A pattern is PATH (goes, with all that is in it), PATH/ (files below it go) or 'empty PATH' (stays, without what is in
it); * stands for any part of a name, ** for any folders.

Examples:
  catnap snapshot scrub anna@monday
  catnap snapshot scrub anna@monday anna@public --also /root/notes.txt --also '/srv/**/*.pem'
  catnap snapshot scrub anna@monday --also-from my.list
  catnap snapshot scrub --show-list
  catnap snapshot export anna@monday anna.catnap --scrub")]
pub struct Args {
    #[command(flatten)]
    also: Also,
    /// A string to search for in what is left, beside the usual secrets; can be given several times
    #[arg(long, value_name = "STRING", value_parser = secrets::wanted)]
    find: Vec<String>,
    /// Print the list of what is removed, and do nothing
    #[arg(long, exclusive = true)]
    show_list: bool,
    /// Print what came of it as JSON
    #[arg(long)]
    json: bool,
    /// The snapshot
    #[arg(value_name = "SNAPSHOT", required_unless_present = "show_list")]
    reference: Option<String>,
    /// The name of the copy [default: that of the snapshot with -scrubbed]
    #[arg(value_name = "NEW")]
    new: Option<String>,
}

/// What is to be removed beside the list.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Also {
    /// Remove this too; can be given several times
    #[arg(long, value_name = "PATTERN")]
    pub also: Vec<String>,
    /// Remove what the patterns in this file match, one a line
    #[arg(long, value_name = "FILE")]
    pub also_from: Option<PathBuf>,
}

/// What came of a scrub.
#[derive(Serialize)]
struct Told {
    name: String,
    digest: Digest,
    kind: Kind,
    /// What was removed, and how much was wiped.
    #[serde(flatten)]
    scrubbed: Scrubbed,
    /// How many different secrets are still found in it.
    secrets: usize,
    seconds: f64,
}

/// Runs the verb.
pub fn run(args: Args) -> Outcome {
    let Some(reference) = args.reference.filter(|_| !args.show_list) else {
        return ui::data(LIST).map(|()| ExitCode::SUCCESS);
    };
    process::catch_interrupts();
    let (house, begun) = (House::open()?, Instant::now());
    let (snapshot, scrubbed) = make(&house, &reference, args.new.as_deref(), &args.also)?;
    let name = &snapshot.manifest.name;
    let report = secrets::scan(&house, name, &snapshot, &args.find)?;
    match args.json {
        true => ui::json(&Told {
            name: name.clone(),
            digest: snapshot.digest,
            kind: snapshot.manifest.kind,
            secrets: report.findings.len(),
            seconds: begun.elapsed().as_secs_f64(),
            scrubbed,
        })?,
        false => {
            ui::data(format!("{name}\n"))?;
            show(name, &scrubbed);
        }
    }
    tell_what_is_left(name, &report);
    Ok(ExitCode::SUCCESS)
}

/// Makes the copy. Without a name it gets the snapshot's with `-scrubbed`, and a number if that is taken.
pub fn make(house: &House, reference: &str, new: Option<&str>, also: &Also) -> Result<(Snapshot, Scrubbed), Failure> {
    let patterns = also.patterns()?;
    let snapshot = restore::find(house, reference, false)?;
    let name = free_name(house.store(), &snapshot.manifest.name, new)?;
    if snapshot.manifest.disks.len() != 1 {
        return Err(Failure::new(Code::Refused, format!("{reference} has not one disk, and only one can be scrubbed")));
    }
    checks::kvm_quickly()?;
    let progress = ui::Progress::begin(format!("Scrubbing {reference}"));
    // For the machine; what is published has a folder of its own.
    let staging = house.store().stage()?;
    let (disk, scrubbed) = scrubber::scrub(house, &snapshot, &staging, patterns)?;
    if snapshot.manifest.memory.is_some() {
        let unwritten = format!("what the guest of {reference} had not written to its disk yet is not in {name}");
        progress.aside(|| ui::note(unwritten));
    }
    Ok((publish(house.store(), &snapshot, &disk, &name)?, scrubbed))
}

/// Folds the disk into one that lies over nothing, and lets the copy appear.
fn publish(store: &Store, snapshot: &Snapshot, disk: &Path, name: &str) -> Result<Snapshot, Failure> {
    let failed = |error: crate::sys::files::Error| Failure::new(Code::Failed, error.to_string());
    let mut bytes = 0;
    for disk in &snapshot.manifest.disks {
        bytes = store.bytes_in(snapshot, Some(disk))?;
    }
    store.check_room(bytes)?;
    let staging = store.stage()?;
    fold(&chain_files(disk, Format::Qcow2, store.root())?, &staging.dir().join(ROOT), None, store.root())?;
    let mut manifest = Manifest {
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()),
        name: name.into(),
        note: "scrubbed".into(),
        parent: Some(snapshot.digest),
        files: Vec::new(),
        ..Store::without_memory(snapshot).manifest
    };
    for file in &snapshot.manifest.files {
        if matches!(file.role, Role::Kernel | Role::Initrd) {
            let from = snapshot.dir.join(&file.name);
            std::fs::hard_link(&from, staging.dir().join(&file.name)).at("link", &from).map_err(failed)?;
            manifest.files.push(file.clone());
        }
    }
    manifest.files.push(describe(staging.dir(), ROOT, Role::Disk).map_err(failed)?);
    for disk in &mut manifest.disks {
        let format = Format::Qcow2.name().into();
        *disk = Disk { file: ROOT.into(), format, backing: None, ..disk.clone() };
    }
    Ok(store.publish(staging, &manifest, name)?)
}

/// Makes the copy that is to travel in the place of a snapshot, and shows what was removed; its name.
pub fn first(house: &House, reference: &str, also: &Also) -> Result<String, Failure> {
    let (scrubbed, done) = make(house, reference, None, also)?;
    show(&scrubbed.manifest.name, &done);
    Ok(scrubbed.manifest.name)
}

/// The copy's name.
fn free_name(store: &Store, original: &str, new: Option<&str>) -> Result<String, Failure> {
    if let Some(name) = new {
        store.check_free(name)?;
        return Ok(name.into());
    }
    let names = (1..1000).map(|number| match number {
        1 => format!("{original}-scrubbed"),
        _ => format!("{original}-scrubbed-{number}"),
    });
    for name in names {
        match store.check_free(&name) {
            Err(store::Error::SnapshotTaken(_)) => {}
            other => return Ok(other.map(|()| name)?),
        }
    }
    Err(Failure::new(Code::Refused, "all names are taken").hint("give the copy a name"))
}

impl Also {
    /// Refuses what only means something when it is scrubbed.
    pub fn check(&self, scrub: bool) -> Result<(), Failure> {
        match scrub || self.also.is_empty() && self.also_from.is_none() {
            true => Ok(()),
            false => Err(Failure::new(Code::Usage, "--also and --also-from say what --scrub removes").hint("--scrub")),
        }
    }

    /// All that is to be removed.
    fn patterns(&self) -> Result<Vec<String>, Failure> {
        let read = |path: &PathBuf| {
            let bytes = read_bounded(path, MAX_LIST as u64).map_err(|error| {
                let missing = error.kind() == std::io::ErrorKind::NotFound;
                Failure::new(if missing { Code::NotFound } else { Code::Failed }, error.to_string())
                    .hint("a file with a pattern on each line; --show-list shows what one looks like")
            })?;
            String::from_utf8(bytes).map_err(|_| usage(format!("{} is not UTF-8", path.display())))
        };
        let file = self.also_from.as_ref().map(read).transpose()?.unwrap_or_default();
        let lines = LIST.lines().chain(file.lines()).map(str::trim).chain(self.also.iter().map(String::as_str));
        let patterns: Vec<String> =
            lines.filter(|line| !line.is_empty() && !line.starts_with('#')).map(str::to_owned).collect();
        if let Some(line) = patterns.iter().find(|line| pattern(line).is_none()) {
            return Err(usage(format!("`{}` is no pattern: it is no path below /", line.escape_debug())));
        }
        match patterns.iter().map(|line| line.len() + 8).sum::<usize>() <= MAX_LIST {
            true => Ok(patterns),
            false => Err(usage(format!("the patterns have more than {MAX_LIST} bytes"))),
        }
    }
}

fn usage(why: String) -> Failure {
    Failure::new(Code::Usage, why).hint("catnap snapshot scrub --help")
}

/// Shows what was done.
pub fn show(name: &str, scrubbed: &Scrubbed) {
    let Scrubbed { files, bytes, wiped, notes, .. } = scrubbed;
    let (bytes, wiped) = (ui::amount(*bytes), ui::amount(*wiped));
    ui::note(format!("{name}: {files} files with {bytes} removed, {wiped} of free space wiped"));
    notes.iter().for_each(|note| ui::warn(ui::harmless(note.as_bytes())));
}

/// Shows what still looks like a secret.
fn tell_what_is_left(name: &str, report: &Report) {
    if report.findings.is_empty() {
        return ui::note("no secrets are found in it any more, which proves nothing");
    }
    ui::warn(format!("{name} still has what looks like secrets in it; --also PATTERN removes more:"));
    secrets::rows(name, report).iter().take(SHOWN).for_each(|row| ui::note(format!("  {}", row[1..].join("  "))));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_sound_and_can_be_added_to() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("list");
        std::fs::write(&path, "# mine\n\n  /srv/**/*.pem\n").unwrap();
        let also = Also { also: vec!["empty /etc/motd".into()], also_from: Some(path.clone()) };
        let patterns = also.patterns().unwrap();
        for line in ["/root/.ssh", "empty /etc/machine-id", "/var/log/", "/srv/**/*.pem", "empty /etc/motd"] {
            assert!(patterns.iter().any(|pattern| pattern == line), "{line}");
        }
        let code = |also: &Also| also.patterns().unwrap_err().code;
        assert_eq!(code(&Also { also: vec!["etc".into()], also_from: None }), Code::Usage);
        assert_eq!(code(&Also { also: vec!["/x".repeat(MAX_LIST)], also_from: None }), Code::Usage);
        assert_eq!(code(&Also { also: vec![], also_from: Some(dir.path().join("none")) }), Code::NotFound);
        std::fs::write(&path, [0xff]).unwrap();
        assert_eq!(code(&also), Code::Usage);
    }
}
