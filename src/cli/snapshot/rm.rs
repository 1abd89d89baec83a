//! `catnap snapshot rm`: removes snapshots that nothing needs.

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;

use crate::cli::home::House;
use crate::cli::{Outcome, ui};
use crate::control::{Code, Failure};
use crate::snapshot::Digest;
use crate::store::{Error, Family, Store};

/// Remove snapshots
#[derive(clap::Args)]
#[command(after_help = "\
A snapshot that another snapshot or a machine needs is kept, and what needs it is named. Where several names stand \
for one snapshot, it stays until the last of them is removed.

Examples:
  catnap snapshot rm anna@monday
  catnap snapshot rm --dry-run anna@monday anna@tuesday
  catnap snapshot rm $(catnap snapshot ls -q anna)     in whatever order they need each other
  catnap snapshot rm --merge anna@monday               what needs it takes over what it needs of it")]
pub struct Args {
    /// Let what needs a snapshot take over what it needs of it, so that it can go
    #[arg(long)]
    merge: bool,
    /// Only say what would be removed
    #[arg(long)]
    dry_run: bool,
    /// The snapshots
    #[arg(value_name = "SNAPSHOT", required = true)]
    references: Vec<String>,
}

/// Runs the verb.
pub fn run(args: Args) -> Outcome {
    remove(&House::open()?, &args.references, args.merge, args.dry_run)
}

/// Removes what the references mean, dependents before what they depend on. What cannot be removed does not keep
/// the others from it; the exit code is that of the first failure.
pub fn remove(house: &House, references: &[String], merge: bool, dry_run: bool) -> Outcome {
    let store = house.store();
    let mut first: Option<Code> = None;
    let mut fail = |failure: Failure| {
        ui::failure(&failure);
        first.get_or_insert(failure.code);
    };
    let mut wanted = Wanted::default();
    for reference in references {
        match store.lookup(reference) {
            Ok(digest) => wanted.add(reference, digest),
            Err(error) => fail(error.into()),
        }
    }
    for (name, others) in wanted.take_names_of_others(store)? {
        ui::note(format!("{name} is one name of several: the snapshot stays as {}", others.join(", ")));
        let removed = if dry_run { Ok(()) } else { store.remove_name(&name) };
        removed.map_err(Failure::from).and_then(|()| ui::data(format!("{name}\n"))).unwrap_or_else(&mut fail);
    }
    let (order, stuck) = wanted.order(&store.family()?);
    for (digest, references) in &order {
        let removed = if dry_run { exists(store, digest) } else { store.remove_snapshot(digest) };
        let said = references.iter().map(|reference| format!("{reference}\n")).collect::<String>();
        removed.map_err(Failure::from).and_then(|()| ui::data(said)).unwrap_or_else(&mut fail);
    }
    for ((digest, references), refusal) in stuck {
        let done = if merge { merge_away(store, &digest, &references, dry_run) } else { Err(refusal.into()) };
        done.unwrap_or_else(&mut fail);
    }
    Ok(first.map_or(ExitCode::SUCCESS, |code| ExitCode::from(code as u8)))
}

/// A name can be there, and its snapshot not.
fn exists(store: &Store, digest: &Digest) -> Result<(), Error> {
    store.lookup(&digest.to_string()).map(|_| ())
}

/// Removes a snapshot that others need, and tells which were made anew for that.
fn merge_away(store: &Store, digest: &Digest, references: &[String], dry_run: bool) -> Result<(), Failure> {
    if dry_run {
        store.check_merge(digest)?;
    } else {
        // It may have been made anew itself, in place of one that went before it.
        let named = references.iter().find_map(|reference| store.lookup(reference).ok());
        let digest = named.unwrap_or(*digest);
        let progress = ui::Progress::begin("Merging");
        let anew = store.merge_snapshot(&digest, |step| progress.say(format!("Merging: {step}")))?;
        drop(progress);
        if !anew.is_empty() {
            ui::note(format!("Made anew, with the same content: {}", anew.join(", ")));
        }
    }
    ui::data(references.iter().map(|reference| format!("{reference}\n")).collect::<String>())
}

/// A snapshot, and the references that mean it.
type Means = (Digest, Vec<String>);

/// What is to be removed: for each snapshot, the references that mean it.
#[derive(Default)]
struct Wanted(BTreeMap<Digest, Vec<String>>);

impl Wanted {
    fn add(&mut self, reference: &str, digest: Digest) {
        let references = self.0.entry(digest).or_default();
        if !references.iter().any(|known| known == reference) {
            references.push(reference.into());
        }
    }

    /// Takes out the names whose snapshots stay, because they have others; gives each with those.
    fn take_names_of_others(&mut self, store: &Store) -> Result<Vec<(String, Vec<String>)>, Failure> {
        let names = store.names()?;
        let mut taken = Vec::new();
        self.0.retain(|digest, references| {
            let left = names.iter().filter(|(name, named)| named == digest && !references.contains(name));
            let left: Vec<_> = left.map(|(name, _)| name.clone()).collect();
            let by_digest = references.iter().any(|reference| reference.starts_with(Digest::PREFIX));
            let stays = !by_digest && !left.is_empty();
            if stays {
                taken.extend(references.drain(..).map(|name| (name, left.clone())));
            }
            !stays
        });
        Ok(taken)
    }

    /// The snapshots in an order in which each is needed by none that comes later, and those that something else
    /// needs, each with a refusal.
    fn order(mut self, family: &Family) -> (Vec<Means>, Vec<(Means, Error)>) {
        let (mut order, mut gone) = (Vec::new(), BTreeSet::new());
        while let Some(digest) = self.0.keys().find(|on| family.dependents_without(on, &gone).is_empty()).copied() {
            gone.insert(digest);
            order.extend(self.0.remove_entry(&digest));
        }
        let refusal = |means: Means| {
            let of = means.1.first().cloned().unwrap_or_else(|| means.0.short());
            let by = family.dependents_without(&means.0, &gone);
            let above = family.above(&means.0, &gone);
            (means, Error::Needed { of, by, above })
        };
        (order, self.0.into_iter().map(refusal).collect())
    }
}
