//! `catnap snapshot inspect`: all that is known of snapshots, as JSON.

use std::path::PathBuf;

use serde::Serialize;

use super::secrets;
use crate::archive::secrets::Report;
use crate::cli::home::House;
use crate::cli::{Outcome, ui};
use crate::control::Failure;
use crate::snapshot::{Digest, Manifest};
use crate::store::{Dependent, Family, Sizes, Usage};
use crate::sys::process;

/// Show all that is known of snapshots
#[derive(clap::Args)]
#[command(after_help = "\
Prints a JSON list with an object for each snapshot: its manifest, its names, the space that it takes, and what \
depends on it.

With --secrets, its disks and its memory are searched for private keys, authorised keys, tokens, passwords in the \
usual forms, and the strings of --find. Prints a table of what was found and where, masked; with --json, a list in \
each object. What is compressed, encrypted or in pieces is not found.

Examples:
  catnap snapshot inspect anna@monday
  catnap snapshot inspect anna@monday | jq '.[0].dependents'
  catnap snapshot inspect kitten | jq -r '.[0].manifest.files[].digest'
  catnap snapshot inspect anna@monday --secrets --find anna@example.org")]
pub struct Args {
    /// Search for secrets
    #[arg(long)]
    secrets: bool,
    /// A string to search for, as well; can be given several times
    #[arg(long, value_name = "STRING", requires = "secrets", value_parser = secrets::wanted)]
    find: Vec<String>,
    /// Print JSON, as is done anyway when no secrets are searched for
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
    #[serde(skip_serializing_if = "Option::is_none")]
    secrets: Option<Report>,
}

/// Runs the verb.
pub fn run(args: Args) -> Outcome {
    process::catch_interrupts();
    let house = House::open()?;
    let (family, usage) = (house.store().family()?, house.store().usage()?);
    let mut all = Vec::new();
    let outcome = crate::cli::each(&args.references, |reference| {
        let mut everything = everything(&house, &family, &usage, reference)?;
        if args.secrets {
            let snapshot = house.store().resolve(reference)?;
            everything.secrets = Some(secrets::scan(&house, reference, &snapshot, &args.find)?);
        }
        all.push(everything);
        Ok(())
    })?;
    match args.secrets && !args.json {
        true => ui::table(&secrets::HEADING, &all.iter().flat_map(rows).collect::<Vec<_>>())?,
        false => ui::json(&all)?,
    }
    Ok(outcome)
}

/// What is printed of one, as JSON.
pub fn json(house: &House, reference: &str) -> Result<serde_json::Value, Failure> {
    let everything = everything(house, &house.store().family()?, &house.store().usage()?, reference)?;
    serde_json::to_value(everything).map_err(|error| Failure::while_doing("JSON", error))
}

fn rows(of: &Everything) -> Vec<Vec<String>> {
    let name = of.names.first().cloned().unwrap_or_else(|| of.digest.short());
    of.secrets.as_ref().map(|report| secrets::rows(&name, report)).unwrap_or_default()
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
        secrets: None,
    })
}
