//! `catnap snapshot verify`: whether every byte of snapshots is what it was.

use std::collections::BTreeSet;
use std::process::ExitCode;

use serde::Serialize;

use crate::cli::home::House;
use crate::cli::{Outcome, ui};
use crate::control::{Code, Failure};
use crate::snapshot::Digest;
use crate::store::{Family, Listed, Seen, Snapshot, Store};

/// Check every byte of snapshots against their digests
#[derive(clap::Args)]
#[command(after_help = "\
Reads every file of the snapshots and of those that they need, and checks what their disks and memories build on. \
Prints the names of those that are whole; damage is told of with the file's name, and the exit code is 6. Without \
names, all snapshots are checked, base images too.

Examples:
  catnap snapshot verify
  catnap snapshot verify anna@monday
  catnap snapshot verify --json | jq -r '.[] | select(.damage) | .damage'")]
pub struct Args {
    /// All snapshots, as when none is named
    #[arg(long, conflicts_with = "references")]
    all: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// The snapshots
    #[arg(value_name = "SNAPSHOT")]
    references: Vec<String>,
}

/// What came of a check.
#[derive(Serialize)]
struct Verdict {
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    digest: Option<Digest>,
    /// Files that are as they were.
    files: usize,
    /// Bytes in them.
    bytes: u64,
    /// What is wrong, with the file's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    damage: Option<String>,
}

/// Runs the verb.
pub fn run(args: Args) -> Outcome {
    let house = House::open()?;
    let store = house.store();
    let family = store.family()?;
    let mut first: Option<Code> = None;
    let mut verdicts = Vec::new();
    let mut note = |failure: &Failure| {
        ui::failure(failure);
        first.get_or_insert(failure.code);
    };
    let mut digests = Vec::new();
    if args.references.is_empty() {
        digests.extend(family.snapshots.iter().map(|listed| listed.digest));
        for lost in lost_names(store, &family)? {
            note(&lost.1);
            verdicts.push(Verdict { name: lost.0, digest: None, files: 0, bytes: 0, damage: Some(lost.1.error) });
        }
    }
    for reference in &args.references {
        match store.lookup(reference) {
            Ok(digest) => digests.push(digest),
            Err(error) => note(&error.into()),
        }
    }
    let mut check = Check { store, seen: Seen::default(), progress: ui::Progress::begin("Verifying") };
    for listed in with_needed(&digests, &family) {
        let mut verdict =
            Verdict { name: listed.name(), digest: Some(listed.digest), files: 0, bytes: 0, damage: None };
        match check.snapshot(listed) {
            Ok(snapshot) => {
                let files = &snapshot.manifest.files;
                verdict.files = files.len();
                verdict.bytes = files.iter().fold(0, |sum, file| file.size.saturating_add(sum));
                if !args.json {
                    let mut said = Ok(());
                    check.progress.aside(|| said = ui::data(format!("{}\n", verdict.name)));
                    said?;
                }
            }
            Err(failure) => {
                check.progress.aside(|| note(&failure));
                verdict.damage = Some(failure.error);
            }
        }
        verdicts.push(verdict);
    }
    drop(check);
    if args.json {
        ui::json(&verdicts)?;
    }
    Ok(first.map_or(ExitCode::SUCCESS, |code| ExitCode::from(code as u8)))
}

/// A check of several snapshots, which reads files that they share once.
struct Check<'a> {
    store: &'a Store,
    seen: Seen,
    progress: ui::Progress,
}

impl Check<'_> {
    fn snapshot<'l>(&mut self, listed: &'l Listed) -> Result<&'l Snapshot, Failure> {
        let name = listed.name();
        let snapshot = match &listed.snapshot {
            Ok(snapshot) => snapshot,
            // Read again for an error of our own.
            Err(_) => return Err(self.unreadable(listed, &name)),
        };
        let total = snapshot.manifest.files.iter().fold(0u64, |sum, file| file.size.saturating_add(sum));
        let (progress, mut read, mut shown) = (&self.progress, 0u64, u64::MAX);
        let watch = |file: &str, bytes: u64| {
            read = read.saturating_add(bytes);
            let part = read.saturating_mul(100).checked_div(total).unwrap_or(100);
            if part != shown {
                shown = part;
                progress.say(format!("Verifying {name}: {file} {part}%"));
            }
        };
        let checked = self.store.verify_unseen(snapshot, &mut self.seen, watch);
        checked.and_then(|()| self.store.verify_links(snapshot)).map_err(|error| remedy(error.into(), &name))?;
        Ok(snapshot)
    }

    fn unreadable(&self, listed: &Listed, name: &str) -> Failure {
        match self.store.resolve(&listed.digest.to_string()) {
            Err(error) => remedy(error.into(), name),
            Ok(_) => Failure::new(Code::Failed, format!("{name} changed while it was looked at")).hint("try again"),
        }
    }
}

/// Damage to a snapshot that can be made again is no reason to give up; that of another is final.
fn remedy(failure: Failure, name: &str) -> Failure {
    match failure.code {
        Code::Verify if name == crate::image::NAME => failure.hint("catnap image build, which makes it anew"),
        Code::Verify => failure.hint(format!("catnap snapshot inspect {name}; catnap snapshot rm {name} gives it up")),
        _ => failure,
    }
}

/// The snapshots of these digests and all that they need, each once.
fn with_needed<'a>(digests: &[Digest], family: &'a Family) -> Vec<&'a Listed> {
    let (mut seen, mut found) = (BTreeSet::new(), Vec::new());
    let mut next: Vec<_> = digests.iter().rev().copied().collect();
    while let Some(digest) = next.pop() {
        // What is missing is told of by whoever needs it.
        let Some(listed) = family.get(&digest).filter(|_| seen.insert(digest)) else { continue };
        found.push(listed);
        if let Ok(snapshot) = &listed.snapshot {
            next.extend(snapshot.manifest.needs().map(|(needed, _)| needed));
        }
    }
    found
}

/// Names that stand for snapshots which are not there.
fn lost_names(store: &Store, family: &Family) -> Result<Vec<(String, Failure)>, Failure> {
    let lost = store.names()?.into_iter().filter(|(_, digest)| family.get(digest).is_none());
    let failure = |(name, digest): (String, Digest)| {
        let failure = Failure::new(Code::Verify, format!("{name} stands for {digest}, which is missing"));
        let failure = failure.hint(format!("catnap snapshot rm {name}"));
        (name, failure)
    };
    Ok(lost.map(failure).collect())
}
