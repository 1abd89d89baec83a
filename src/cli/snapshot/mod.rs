//! `catnap snapshot …`: snapshots of machines.

pub mod create;

use super::Outcome;

/// Take, list, compare and remove snapshots
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  catnap snapshot create anna@monday")]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(clap::Subcommand)]
enum Verb {
    Create(create::Args),
}

/// Runs the verb.
pub fn run(args: Args) -> Outcome {
    match args.verb {
        Verb::Create(args) => create::run(args),
    }
}
