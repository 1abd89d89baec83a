//! `catnap snapshot`: taking snapshots, looking after those that are there, and handing them on.

mod age;
pub mod create;
mod diff;
mod export;
pub mod import;
mod inspect;
mod ls;
mod prune;
mod pull;
mod push;
pub mod rm;
mod scrub;
mod scrubber;
mod secrets;
mod tree;
mod verify;
pub(super) mod view;

use serde_json::Value;

use super::Outcome;
use super::home::House;
use crate::control::Failure;

/// Take, list, compare, check, share and remove snapshots
#[derive(clap::Args)]
#[command(after_help = "\
A snapshot is named MACHINE@TAG, or by its digest: `sha256:` and as many digits as tell it from others. A base \
image, such as kitten, is a snapshot too. What a snapshot needs is never removed before it: its base's disks, and \
the memory that its own is a difference to.

Examples:
  catnap snapshot create anna@monday
  catnap snapshot ls
  catnap snapshot tree anna
  catnap snapshot diff anna@monday anna@tuesday
  catnap snapshot verify
  catnap snapshot rm anna@monday
  catnap snapshot prune --older-than 7d --keep 3 --dry-run
  catnap snapshot scrub anna@monday
  catnap snapshot export anna@monday anna.catnap
  catnap snapshot import anna.catnap
  catnap snapshot push anna@monday localhost:5000/cats/anna:monday
  catnap snapshot pull localhost:5000/cats/anna:monday

`catnap snapshot VERB --help` explains each.")]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(clap::Subcommand)]
enum Verb {
    Create(create::Args),
    Ls(ls::Args),
    Tree(tree::Args),
    Inspect(inspect::Args),
    Diff(diff::Args),
    Verify(verify::Args),
    Rm(rm::Args),
    Prune(prune::Args),
    Scrub(scrub::Args),
    Export(export::Args),
    Import(import::Args),
    Push(push::Args),
    Pull(pull::Args),
}

/// What `tree --json` prints.
pub fn tree_json(house: &House) -> Result<Value, Failure> {
    tree::json(house)
}

/// What `inspect` prints of one snapshot.
pub fn inspect_json(house: &House, reference: &str) -> Result<Value, Failure> {
    inspect::json(house, reference)
}

/// Runs the verb.
pub fn run(args: Args) -> Outcome {
    match args.verb {
        Verb::Create(args) => create::run(args),
        Verb::Ls(args) => ls::run(args),
        Verb::Tree(args) => tree::run(args),
        Verb::Inspect(args) => inspect::run(args),
        Verb::Diff(args) => diff::run(args),
        Verb::Verify(args) => verify::run(args),
        Verb::Rm(args) => rm::run(args),
        Verb::Prune(args) => prune::run(args),
        Verb::Scrub(args) => scrub::run(args),
        Verb::Export(args) => export::run(args),
        Verb::Import(args) => import::run(args),
        Verb::Push(args) => push::run(args),
        Verb::Pull(args) => pull::run(args),
    }
}
