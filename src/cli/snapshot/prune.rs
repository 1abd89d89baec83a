//! `catnap snapshot prune`: removes snapshots that nothing needs, by age and number.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::process::ExitCode;
use std::time::Duration;

use serde::Serialize;

use super::view::{self, View};
use crate::cli::home::House;
use crate::cli::{Outcome, ui};
use crate::control::{Code, Failure};
use crate::snapshot::Digest;
use crate::spec::Name;
use crate::store::Family;

/// Remove snapshots that nothing needs, and what killed programs left
#[derive(clap::Args)]
#[command(after_help = "\
Without --keep or --older-than, every snapshot goes that no machine and no snapshot which stays needs. Base images \
stay unless --images is given, and so does what cannot be read: `catnap snapshot rm` removes that.

Examples:
  catnap snapshot prune --dry-run
  catnap snapshot prune --older-than 7d --keep 3
  catnap snapshot prune --machine anna --yes --json")]
pub struct Args {
    /// Keep the newest N snapshots of each machine
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    keep: usize,
    /// Only those that were taken so long ago, such as 90s, 12h, 7d or 4w
    #[arg(long, value_name = "TIME", value_parser = time)]
    older_than: Option<Duration>,
    /// Only those of this machine
    #[arg(long, value_name = "MACHINE")]
    machine: Option<Name>,
    /// Base images too
    #[arg(long, conflicts_with = "machine")]
    images: bool,
    /// Only say what would be removed
    #[arg(long)]
    dry_run: bool,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
    /// Print what came of it as JSON
    #[arg(long)]
    json: bool,
}

/// What was removed, or would be.
#[derive(Debug, Default, Serialize)]
struct Pruned {
    /// The snapshots, by name or digest.
    snapshots: Vec<String>,
    /// Things that killed programs had left.
    half_made: usize,
    /// What is free by that, in bytes.
    bytes: u64,
    /// Whether it was only looked at.
    dry_run: bool,
}

impl Pruned {
    /// Tells of it: in JSON, or by a sentence that begins with this.
    fn tell(&self, json: bool, begin: &str) -> Result<(), Failure> {
        match json {
            true => ui::json(self),
            false => {
                ui::note(format!("{begin} {self}"));
                Ok(())
            }
        }
    }
}

impl fmt::Display for Pruned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (snapshots, bytes) = (self.snapshots.len(), ui::amount(self.bytes));
        write!(f, "{snapshots} snapshots and {} half-made things, {bytes} in all", self.half_made)
    }
}

/// Runs the verb.
pub fn run(args: Args) -> Outcome {
    let house = House::open()?;
    let store = house.store();
    let (family, usage) = (store.family()?, store.usage()?);
    let views = view::views(&family, &usage);
    if let Some(machine) = &args.machine {
        view::check_machine(machine, &family, &views)?;
    }
    let going = choose(&args, &views, &family);
    let digests: BTreeSet<_> = going.iter().map(|view| view.digest).collect();
    let (half_made, left_bytes) = store.leftovers()?;
    let bytes = |of: &BTreeSet<Digest>| usage.freed_by(of).saturating_add(left_bytes);
    let snapshots = going.iter().map(|view| view.reference()).collect();
    let planned = Pruned { snapshots, half_made, bytes: bytes(&digests), dry_run: args.dry_run };
    let nothing = going.is_empty() && half_made == 0;
    if nothing && !args.json {
        ui::note("There is nothing to remove");
        return Ok(ExitCode::SUCCESS);
    }
    if args.dry_run {
        if !args.json {
            ui::data(planned.snapshots.iter().map(|name| name.to_owned() + "\n").collect::<String>())?;
        }
        planned.tell(args.json, "It would remove")?;
        return Ok(ExitCode::SUCCESS);
    }
    if !args.yes && !nothing {
        going.iter().for_each(|view| ui::note(format!("  {}", view.name())));
        if !ui::confirm(&format!("Remove {planned}?"))? {
            return Err(Failure::new(Code::Refused, "nothing was removed").hint("--yes"));
        }
    }
    let mut done = Pruned { half_made: store.sweep()?, ..Pruned::default() };
    let mut removed = BTreeSet::new();
    let outcome = crate::cli::each(&going, |view| {
        // It looks again: something may have come to need it since.
        store.remove_snapshot(&view.digest)?;
        removed.insert(view.digest);
        done.snapshots.push(view.reference());
        if args.json { Ok(()) } else { ui::data(view.reference() + "\n") }
    })?;
    done.bytes = bytes(&removed);
    done.tell(args.json, "Removed")?;
    Ok(outcome)
}

/// What goes, each before what it needs.
fn choose<'a>(args: &Args, views: &'a [View], family: &Family) -> Vec<&'a View> {
    let mut kept: BTreeMap<&str, usize> = BTreeMap::new();
    // The newest first: they come to be kept, and they need the older ones.
    let candidates = views.iter().rev().filter(|view| view.damaged.is_none()).filter(|view| {
        let kept = kept.entry(view.machine().filter(|_| !view.image).unwrap_or_default()).or_default();
        *kept += usize::from(!view.image);
        let counts = if view.image { args.images } else { *kept > args.keep };
        let mine = args.machine.as_ref().is_none_or(|machine| view.is_of(machine));
        counts && mine && args.older_than.is_none_or(|age| view::since(view.created) >= age)
    });
    let mut candidates: Vec<_> = candidates.collect();
    let (mut going, mut gone) = (Vec::new(), BTreeSet::<Digest>::new());
    loop {
        let before = going.len();
        candidates.retain(|view| {
            let free = family.dependents_without(&view.digest, &gone).is_empty();
            if free {
                gone.insert(view.digest);
                going.push(*view);
            }
            !free
        });
        if going.len() == before {
            return going;
        }
    }
}

/// Reads a time such as `7d`.
fn time(text: &str) -> Result<Duration, String> {
    const UNITS: [(char, u64); 5] = [('s', 1), ('m', 60), ('h', 3600), ('d', 86400), ('w', 7 * 86400)];
    let refuse = || "write a whole number with s, m, h, d or w, such as 7d".to_owned();
    let (unit, seconds) = UNITS.into_iter().find(|(unit, _)| text.ends_with(*unit)).ok_or_else(refuse)?;
    let digits = text.strip_suffix(unit).filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()));
    let count: u64 = digits.and_then(|digits| digits.parse().ok()).ok_or_else(refuse)?;
    count.checked_mul(seconds).map(Duration::from_secs).ok_or_else(refuse)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_a_unit() {
        for (text, seconds) in [("0s", 0), ("90s", 90), ("12h", 43200), ("7d", 604_800), ("4w", 2_419_200)] {
            assert_eq!(time(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for bad in ["", "7", "d", "-1d", "1.5h", "7y", "+1d", "99999999999999999999d", "9999999999999999999w", "é"] {
            assert!(time(bad).is_err(), "{bad}");
        }
    }
}
