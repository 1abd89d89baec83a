//! `catnap snapshot tree`: where snapshots and machines come from.

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;

use serde::Serialize;

use super::view::{self, View};
use crate::cli::home::{House, State};
use crate::cli::{Outcome, ui};
use crate::control::Failure;
use crate::snapshot::{Digest, Kind};
use crate::spec::Name;
use crate::store::{Family, Machine};

/// The longest note that is shown beside a snapshot.
const NOTE: usize = 40;

/// Show where snapshots and machines come from
#[derive(clap::Args)]
#[command(after_help = "\
Below each snapshot stand those that were taken of a machine which had been started from it, or taken after it of the \
same machine. Machines are the leaves. What is not in brackets is what a snapshot needs for itself; shared is what it \
has in common with others. JSON is a flat list in the order of the tree, each line with its depth.

Examples:
  catnap snapshot tree
  catnap snapshot tree anna              the lineage of a machine
  catnap snapshot tree anna@monday       where a snapshot comes from, and what comes from it
  catnap snapshot tree --json | jq -r '.[] | select(.depth == 0) | .snapshot.digest'")]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Only this machine's or snapshot's lineage
    #[arg(value_name = "MACHINE|SNAPSHOT")]
    reference: Option<String>,
}

/// A line of the tree.
#[derive(Serialize)]
struct Line<'a> {
    /// How many lines stand above it in its lineage.
    depth: usize,
    #[serde(flatten)]
    node: Node<'a>,
    /// Whether a later line has the same parent, for it and for each line above it in its lineage.
    #[serde(skip)]
    followed: Vec<bool>,
}

/// What stands on a line.
#[derive(Clone, Serialize)]
#[serde(rename_all = "lowercase")]
enum Node<'a> {
    Snapshot(&'a View),
    /// A parent that is not there any more.
    Missing(Digest),
    Machine(&'a Leaf),
}

/// A machine and the snapshot that it grew from.
#[derive(Serialize)]
struct Leaf {
    name: Name,
    state: State,
    #[serde(skip)]
    on: Digest,
}

/// Runs the verb.
pub fn run(args: Args) -> Outcome {
    let house = House::open()?;
    let family = house.store().family()?;
    let views = view::views(&family, &house.store().usage()?);
    let lineage = Lineage::of(&views);
    let mut leaves = leaves(&house, &family, &lineage);
    let kept = match &args.reference {
        None => None,
        Some(reference) => Some(lineage.around(&house, reference, &family, &mut leaves)?),
    };
    let lines = lineage.lines(&leaves, kept.as_ref());
    if args.json {
        ui::json(&lines)?;
    } else {
        ui::data(lines.iter().map(Line::draw).collect::<String>())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The whole tree as JSON.
pub fn json(house: &House) -> Result<serde_json::Value, Failure> {
    let family = house.store().family()?;
    let views = view::views(&family, &house.store().usage()?);
    let lineage = Lineage::of(&views);
    let leaves = leaves(house, &family, &lineage);
    serde_json::to_value(lineage.lines(&leaves, None)).map_err(|error| Failure::while_doing("JSON", error))
}

/// The snapshots by their parents.
struct Lineage<'a> {
    views: BTreeMap<Digest, &'a View>,
    /// The children of each parent, the oldest first.
    children: BTreeMap<Digest, Vec<&'a View>>,
    /// Those without a parent, and in place of each missing parent its digest.
    roots: Vec<Digest>,
}

impl<'a> Lineage<'a> {
    fn of(views: &'a [View]) -> Lineage<'a> {
        let by_digest: BTreeMap<_, _> = views.iter().map(|view| (view.digest, view)).collect();
        let (mut children, mut roots) = (BTreeMap::<_, Vec<_>>::new(), Vec::new());
        for view in views {
            match view.parent {
                None => roots.push(view.digest),
                Some(parent) => {
                    if !by_digest.contains_key(&parent) && !children.contains_key(&parent) {
                        roots.push(parent);
                    }
                    children.entry(parent).or_default().push(view);
                }
            }
        }
        Lineage { views: by_digest, children, roots }
    }

    /// A snapshot and where it comes from. It ends: no manifest can hold a digest that depends on its own.
    fn above(&self, digest: Digest) -> impl Iterator<Item = Digest> + '_ {
        std::iter::successors(Some(digest), |digest| self.views.get(digest)?.parent)
    }

    /// A snapshot and all that comes from it.
    fn below(&self, digest: Digest) -> Vec<Digest> {
        let mut found = vec![digest];
        let mut at = 0;
        while let Some(digest) = found.get(at) {
            found.extend(self.children.get(digest).into_iter().flatten().map(|view| view.digest));
            at += 1;
        }
        found
    }

    /// The snapshots that belong to the lineage of a snapshot or a machine. Other machines are left out.
    fn around(
        &self,
        house: &House,
        reference: &str,
        family: &Family,
        leaves: &mut Vec<Leaf>,
    ) -> Result<BTreeSet<Digest>, Failure> {
        let name = reference.parse::<Name>();
        match (house.store().lookup(reference), name) {
            (Ok(digest), _) => {
                let below = self.below(digest);
                leaves.retain(|leaf| below.contains(&leaf.on));
                Ok(self.above(digest).chain(below).collect())
            }
            (Err(_), Ok(machine)) => {
                view::check_machine(&machine, family, &self.views.values().copied().cloned().collect::<Vec<_>>())?;
                leaves.retain(|leaf| leaf.name == machine);
                let mine = self.views.values().filter(|view| view.is_of(&machine)).map(|view| view.digest);
                Ok(mine.chain(leaves.iter().map(|leaf| leaf.on)).flat_map(|digest| self.above(digest)).collect())
            }
            (Err(error), Err(_)) => Err(error.into()),
        }
    }

    /// The tree, line by line. Not by recursion: a lineage may be long.
    fn lines<'l>(&self, leaves: &'l [Leaf], kept: Option<&BTreeSet<Digest>>) -> Vec<Line<'l>>
    where
        'a: 'l,
    {
        let is_kept = |digest: &Digest| kept.is_none_or(|kept| kept.contains(digest));
        let stranded =
            leaves.iter().filter(|leaf| !self.views.contains_key(&leaf.on) && !self.roots.contains(&leaf.on));
        let stranded: BTreeSet<_> = stranded.map(|leaf| leaf.on).collect();
        let node = |digest: &Digest| self.views.get(digest).map_or(Node::Missing(*digest), |view| Node::Snapshot(view));
        let mut lines = Vec::new();
        let roots = self.roots.iter().chain(&stranded).filter(|digest| is_kept(digest));
        let mut next: Vec<(Node<'l>, Vec<bool>)> = roots.map(|digest| (node(digest), Vec::new())).collect();
        next.reverse();
        while let Some((node, followed)) = next.pop() {
            let digest = match &node {
                Node::Snapshot(view) => Some(view.digest),
                Node::Missing(digest) => Some(*digest),
                Node::Machine(_) => None,
            };
            let snapshots = digest.and_then(|digest| self.children.get(&digest)).into_iter().flatten();
            let snapshots = snapshots.filter(|view| is_kept(&view.digest)).map(|view| Node::Snapshot(view));
            let machines = leaves.iter().filter(|leaf| Some(leaf.on) == digest).map(Node::Machine);
            let children: Vec<_> = snapshots.chain(machines).collect();
            for (left, child) in children.into_iter().rev().enumerate() {
                next.push((child, followed.iter().copied().chain([left > 0]).collect()));
            }
            lines.push(Line { depth: followed.len(), node, followed });
        }
        lines
    }
}

/// The machines, each on the snapshot that it grew from last.
fn leaves(house: &House, family: &Family, lineage: &Lineage<'_>) -> Vec<Leaf> {
    let mut leaves = Vec::new();
    for (name, machine) in &family.machines {
        // One whose files cannot be read is told of by `ps`.
        let Ok(machine) = machine else { continue };
        let (Some(on), Ok(view)) = (grew_from(machine, lineage), house.view(machine)) else { continue };
        leaves.push(Leaf { name: name.clone(), state: view.state, on });
    }
    leaves
}

/// The last snapshot that was taken of the machine, if any is there, or else the one that it was made from.
fn grew_from(machine: &Machine, lineage: &Lineage<'_>) -> Option<Digest> {
    let last = machine.last_snapshot().ok().and_then(|last| last.parse().ok());
    let last = last.filter(|last| lineage.views.contains_key(last));
    last.or_else(|| machine.spec.image.parse().ok())
}

impl Line<'_> {
    fn draw(&self) -> String {
        let mut line = String::new();
        if let Some((last, before)) = self.followed.split_last() {
            before.iter().for_each(|followed| line += if *followed { "│   " } else { "    " });
            line += if *last { "├── " } else { "└── " };
        }
        line + &self.node.draw() + "\n"
    }
}

impl Node<'_> {
    fn draw(&self) -> String {
        match self {
            Node::Missing(digest) => format!("{} (not here)", digest.short()),
            Node::Machine(leaf) => {
                let colour = if matches!(leaf.state, State::Running | State::Paused) { "32;1" } else { "2" };
                ui::paint_data(colour, &format!("{} ({})", leaf.name, leaf.state))
            }
            Node::Snapshot(view) => {
                let kind = ui::paint_data(colour(view.kind), view.kind());
                let mut text = format!("{}  {kind}  {}", view.name(), ui::amount(view.sizes.own));
                if view.sizes.shared > 0 {
                    text += &format!(" (shared {})", ui::amount(view.sizes.shared));
                }
                match view.note(NOTE) {
                    note if note.is_empty() => text,
                    note => format!("{text}  {note}"),
                }
            }
        }
    }
}

/// Warm for what lives, cold for what is at rest, a warning for what a power cut leaves.
fn colour(kind: Option<Kind>) -> &'static str {
    match kind {
        Some(Kind::Live) => "32",
        Some(Kind::Crash) => "33",
        Some(Kind::Quiesced) => "36",
        Some(Kind::Clean) => "34",
        None => "31;1",
    }
}
