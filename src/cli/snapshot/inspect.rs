//! `catnap snapshot inspect`: all that is known of snapshots, as JSON.

use std::path::PathBuf;

use serde::Serialize;

use crate::cli::home::House;
use crate::cli::{Outcome, ui};
use crate::control::Failure;
use crate::snapshot::{Digest, Manifest};
use crate::store::{Dependent, Family, Sizes, Usage};

/// Show all that is known of snapshots
#[derive(clap::Args)]
#[command(after_help = "\
Prints a JSON list with an object for each snapshot: its manifest, its names, the space that it takes, and what \
depends on it.

Examples:
  catnap snapshot inspect anna@monday
  catnap snapshot inspect anna@monday | jq '.[0].dependents'
  catnap snapshot inspect kitten | jq -r '.[0].manifest.files[].digest'")]
pub struct Args {
    /// Accepted for the sake of habit: the output is JSON anyway
    #[arg(long)]
    json: bool,
    /// The snapshots
    #[arg(value_name = "SNAPSHOT", required = true)]
    references: Vec<String>,
}

/// Everything about one snapshot.
#[derive(Serialize)]
struct Everything {
    digest: Digest,
    names: Vec<String>,
    folder: PathBuf,
    #[serde(flatten)]
    sizes: Sizes,
    dependents: Vec<Dependent>,
    manifest: Manifest,
}

/// Runs the verb.
pub fn run(args: Args) -> Outcome {
    let house = House::open()?;
    let (family, usage) = (house.store().family()?, house.store().usage()?);
    let mut all = Vec::new();
    let outcome = crate::cli::each(&args.references, |reference| {
        all.push(everything(&house, &family, &usage, reference)?);
        Ok(())
    })?;
    ui::json(&all)?;
    Ok(outcome)
}

fn everything(house: &House, family: &Family, usage: &Usage, reference: &str) -> Result<Everything, Failure> {
    let snapshot = house.store().resolve(reference)?;
    Ok(Everything {
        digest: snapshot.digest,
        names: family.get(&snapshot.digest).map(|listed| listed.names.clone()).unwrap_or_default(),
        folder: snapshot.dir,
        sizes: usage.of(&snapshot.digest),
        dependents: family.dependents(&snapshot.digest),
        manifest: snapshot.manifest,
    })
}
