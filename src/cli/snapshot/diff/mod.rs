//! `catnap snapshot diff`: what changed between two snapshots.

mod memory;

use std::path::PathBuf;
use std::process::ExitCode;

use serde::Serialize;

use super::view::View;
use crate::cli::home::House;
use crate::cli::{Outcome, ui};
use crate::control::{Code, Failure};
use crate::disk::{self, Changes, Format};
use crate::snapshot::{Digest, Disk};
use crate::spec::Size;
use crate::store::{Snapshot, Store};

/// Show what changed between two snapshots
#[derive(clap::Args)]
#[command(after_help = "\
Disks are compared in clusters of 64K, as their guests see them. Layers that both snapshots have are not read, so it \
takes no longer than what was written since they parted.

Examples:
  catnap snapshot diff anna@monday anna@tuesday
  catnap snapshot diff kitten anna@monday
  catnap snapshot diff anna@monday ben@friday --json | jq '.disks[].changed_bytes'")]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// The snapshot before
    #[arg(value_name = "SNAPSHOT")]
    reference_a: String,
    /// The snapshot after
    #[arg(value_name = "SNAPSHOT")]
    reference_b: String,
}

/// All that differs.
#[derive(Serialize)]
struct Difference {
    before: View,
    after: View,
    /// Seconds from the one to the other; negative when the second is the older one.
    seconds: i128,
    memory: memory::Change,
    disks: Vec<DiskChange>,
}

/// What changed on a disk.
#[derive(Serialize)]
struct DiskChange {
    device: String,
    /// Its size before, in bytes; none when it was not there.
    size_before: Option<u64>,
    /// Its size after, in bytes; none when it is not there.
    size_after: Option<u64>,
    /// What differs, when it is on both sides.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    changes: Option<Numbers>,
}

/// The figures of [`Changes`].
#[derive(Serialize)]
struct Numbers {
    changed_clusters: u64,
    changed_bytes: u64,
    written_clusters: u64,
}

/// Runs the verb.
pub fn run(args: Args) -> Outcome {
    let house = House::open()?;
    let store = house.store();
    let [before, after] = [&args.reference_a, &args.reference_b].map(|reference| store.resolve(reference));
    let (before, after) = (before?, after?);
    let usage = store.usage()?;
    let family = store.family()?;
    let view = |digest: &Digest| {
        let gone =
            || Failure::new(Code::NotFound, format!("{digest} was removed meanwhile")).hint("catnap snapshot ls");
        family.get(digest).map(|listed| View::of(listed, &usage)).ok_or_else(gone)
    };
    let difference = Difference {
        before: view(&before.digest)?,
        after: view(&after.digest)?,
        seconds: i128::from(after.manifest.created) - i128::from(before.manifest.created),
        memory: memory::compare(store, &before, &after)?,
        disks: disks(store, &before, &after)?,
    };
    if args.json {
        ui::json(&difference)?;
    } else {
        ui::data(difference.to_text())?;
    }
    Ok(ExitCode::SUCCESS)
}

fn disks(store: &Store, before: &Snapshot, after: &Snapshot) -> Result<Vec<DiskChange>, Failure> {
    let find = |of: &Snapshot, device: &str| of.manifest.disks.iter().find(|disk| disk.device == device).cloned();
    let all = before.manifest.disks.iter().chain(&after.manifest.disks).map(|disk| disk.device.clone());
    let mut devices: Vec<_> = all.collect();
    devices.sort();
    devices.dedup();
    let change = |device: String| {
        let (old, new) = (find(before, &device), find(after, &device));
        let changes = match (&old, &new) {
            (Some(old), Some(new)) => Some(compare(store, (before, old), (after, new))?),
            _ => None,
        };
        let changes = changes.map(|changes| Numbers {
            changed_clusters: changes.clusters,
            changed_bytes: changes.bytes,
            written_clusters: changes.written,
        });
        let size = |disk: Option<Disk>| disk.map(|disk| disk.virtual_size);
        Ok(DiskChange { device, size_before: size(old), size_after: size(new), changes })
    };
    devices.into_iter().map(change).collect()
}

fn compare(store: &Store, old: (&Snapshot, &Disk), new: (&Snapshot, &Disk)) -> Result<Changes, Failure> {
    let file = |(snapshot, disk): (&Snapshot, &Disk)| -> Result<(PathBuf, Format), Failure> {
        let unknown = || Failure::new(Code::Verify, format!("the disk {} is of an unknown format", disk.device));
        Ok((snapshot.dir.join(&disk.file), Format::from_name(&disk.format).ok_or_else(unknown)?))
    };
    let (old, new) = (file(old)?, file(new)?);
    let progress = ui::Progress::begin("Comparing disks");
    let mut shown = 0;
    let watch = |done: u64, total: u64| {
        let part = done.saturating_mul(100).checked_div(total).unwrap_or(100);
        if part != shown {
            shown = part;
            progress.say(format!("Comparing disks: {part}%"));
        }
        true
    };
    Ok(disk::compare((&old.0, old.1), (&new.0, new.1), store.root(), watch)?)
}

impl Difference {
    fn to_text(&self) -> String {
        let (a, b) = (&self.before, &self.after);
        let mut rows = vec![
            ("kind", change(Some(a.kind()), Some(b.kind()))),
            ("taken", when(self.seconds)),
            ("cpus", change(a.cpus, b.cpus)),
            ("memory", change(a.memory_bytes.map(Size), b.memory_bytes.map(Size))),
            ("own size", change(Some(ui::amount(a.sizes.own)), Some(ui::amount(b.sizes.own)))),
            ("shared", change(Some(ui::amount(a.sizes.shared)), Some(ui::amount(b.sizes.shared)))),
            ("contents", self.memory.to_text()),
        ];
        rows.extend(self.disks.iter().map(|disk| (disk.device.as_str(), disk.to_text())));
        let width = rows.iter().map(|(what, _)| what.len()).max().unwrap_or(0);
        let rows = rows.iter().map(|(what, text)| format!("  {what:width$}  {text}\n"));
        format!("{} → {}\n{}", a.name(), b.name(), rows.collect::<String>())
    }
}

impl DiskChange {
    fn to_text(&self) -> String {
        let sizes = change(self.size_before.map(Size), self.size_after.map(Size));
        match &self.changes {
            None => format!("a disk of {sizes}"),
            Some(Numbers { written_clusters: 0, .. }) => format!("a disk of {sizes}: the same"),
            Some(changes) => format!(
                "a disk of {sizes}: {} clusters differ, {}, of {} that were written",
                changes.changed_clusters,
                ui::amount(changes.changed_bytes),
                changes.written_clusters
            ),
        }
    }
}

/// `old → new`, or one of them when they are the same.
fn change<T: std::fmt::Display + PartialEq>(old: Option<T>, new: Option<T>) -> String {
    let show = |side: &Option<T>| side.as_ref().map_or("-".to_owned(), T::to_string);
    if old == new { show(&old) } else { format!("{} → {}", show(&old), show(&new)) }
}

fn when(seconds: i128) -> String {
    let span = ui::span(std::time::Duration::from_secs(u64::try_from(seconds.unsigned_abs()).unwrap_or(u64::MAX)));
    match seconds {
        0 => "in the same second".into(),
        1.. => format!("{span} later"),
        _ => format!("{span} earlier"),
    }
}
