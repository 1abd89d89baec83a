//! `catnap key`: keys with which snapshots are signed, and those of others that are known here.

use std::process::ExitCode;

use serde::Serialize;

use super::home::House;
use super::{Outcome, ui};
use crate::control::{Code, Failure};
use crate::snapshot::PublicKey;
use crate::spec::Name;
use crate::store::Key;

/// Make the keys that snapshots are signed with, and know those of others
#[derive(clap::Args)]
#[command(after_help = "\
A signature says that somebody stands for a snapshot: it is made with a secret key that never leaves this host, and
checked with the public one, which may be told to everybody. What a key is called here is up to you.

Examples:
  catnap key new anna
  catnap snapshot export anna@monday anna.catnap --sign anna
  catnap key trust ben ed25519:…
  catnap snapshot import ben.catnap --require-signature
  catnap key ls

`catnap key VERB --help` explains each.")]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(clap::Subcommand)]
enum Verb {
    /// Make a key of your own
    #[command(after_help = "\
Prints the public key, to be told to whoever gets your snapshots. The secret one is a file that only you can read;
whoever else has it can sign in your place.

Examples:
  catnap key new anna")]
    New {
        /// What it is to be called
        #[arg(value_name = "NAME")]
        name: Name,
    },
    /// Know the signatures of somebody
    #[command(after_help = "\
Have the public key told to you in a way in which nobody can put another in its place.

Examples:
  catnap key trust ben ed25519:6f3c…")]
    Trust {
        /// What it is to be called here
        #[arg(value_name = "NAME")]
        name: Name,
        /// The public key, as `catnap key new` or `catnap key ls` shows it
        #[arg(value_name = "KEY")]
        key: PublicKey,
    },
    /// List all keys
    #[command(after_help = "\
Examples:
  catnap key ls
  catnap key ls --json | jq -r '.[] | select(.own).key'")]
    Ls {
        /// Print them as JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove a key
    #[command(after_help = "\
An own key is gone for good: nobody can sign with it any more. Signatures that were made with it stay right.

Examples:
  catnap key rm ben")]
    Rm {
        /// Do not ask
        #[arg(short, long)]
        yes: bool,
        /// The key
        #[arg(value_name = "NAME")]
        name: Name,
    },
}

/// A key as it is listed.
#[derive(Serialize)]
struct Listed {
    name: Name,
    key: PublicKey,
    own: bool,
}

/// Runs the verb.
pub fn run(args: Args) -> Outcome {
    let house = House::open()?;
    let store = house.store();
    match args.verb {
        Verb::New { name } => {
            ui::data(format!("{}\n", store.make_key(&name)?.key))?;
            ui::note("that is the public key; catnap snapshot export --sign uses the secret one");
        }
        Verb::Trust { name, key } => {
            if let Some(there) = store.keys()?.into_iter().find(|there| there.key == key) {
                return Err(Failure::new(Code::Refused, format!("this key is known as {}", there.name))
                    .hint(format!("catnap key rm {}", there.name)));
            }
            store.trust_key(&name, key)?;
            ui::note(format!("signatures by this key are those of {name} from now on"));
        }
        Verb::Ls { json } => list(store.keys()?, json)?,
        Verb::Rm { yes, name } => {
            let own = store.key(&name)?.own;
            if own && !yes && !ui::confirm(&format!("Remove the key {name}, so that nobody can sign with it?"))? {
                return Err(Failure::new(Code::Refused, "nothing was removed").hint("--yes"));
            }
            store.remove_key(&name)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn list(keys: Vec<Key>, json: bool) -> Result<(), Failure> {
    if json {
        let listed = |Key { name, key, own }| Listed { name, key, own };
        return ui::json(&keys.into_iter().map(listed).collect::<Vec<_>>());
    }
    let whose = |own: bool| if own { "yours" } else { "known" };
    let rows: Vec<_> =
        keys.iter().map(|key| vec![key.name.to_string(), whose(key.own).into(), key.key.to_string()]).collect();
    ui::table(&["NAME", "WHOSE", "KEY"], &rows)
}

/// The keys that are known here.
pub fn known(house: &House) -> Result<Vec<PublicKey>, Failure> {
    Ok(house.store().keys()?.into_iter().map(|key| key.key).collect())
}

/// Tells who has signed what has arrived.
pub fn tell(house: &House, signed: Option<PublicKey>) -> Result<(), Failure> {
    let Some(key) = signed else {
        ui::note("it is not signed: nobody stands for it");
        return Ok(());
    };
    match house.store().keys()?.into_iter().find(|known| known.key == key) {
        Some(known) if known.own => ui::note(format!("signed with your own key {}", known.name)),
        Some(known) => ui::note(format!("signed by {}", known.name)),
        None => ui::warn(format!(
            "it is signed by a key that is not known here, so by whoever that is: {key}\n\
             try: catnap key trust NAME {key}, once you know whose it is"
        )),
    }
    Ok(())
}
