//! `catnap snapshot pull`: a snapshot from a registry.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;

use super::import;
use crate::archive::{self, Naming, Trust, registry};
use crate::cli::home::House;
use crate::cli::{Outcome, key, ui};
use crate::control::Failure;
use crate::oci::{Access, Client, Reference};
use crate::snapshot::{Digest, Kind, PublicKey};
use crate::sys::process;

/// Pull a snapshot from a registry
#[derive(clap::Args)]
#[command(after_help = "\
What is there may be anybody's: every chunk and every file is checked against the digests, and nothing appears before \
all of it was right. Chunks that a snapshot of the same machine here has, or an image, are not fetched. When a pull is \
interrupted, the next one goes on. `run`, `restore` and `clone` take REGISTRY/REPO:TAG as well.

Who you are is what docker knows: `docker login`, ~/.docker/config.json (or $DOCKER_CONFIG), credential helpers. \
Registries are spoken to over TLS, but for those on this machine.

Examples:
  catnap snapshot pull localhost:5000/cats/anna:monday
  catnap snapshot pull registry.example/anna:monday --name guest@monday
  catnap restore registry.example/anna:monday")]
pub struct Args {
    /// What it is to be called [default: what it was called]
    #[arg(short, long, value_name = "NAME@TAG")]
    name: Option<String>,
    /// Take it only when a key that is known here has signed it (`catnap key ls`)
    #[arg(long)]
    require_signature: bool,
    /// Speak to a registry elsewhere without encryption
    #[arg(long)]
    plain_http: bool,
    /// Print what came of it as JSON
    #[arg(long)]
    json: bool,
    /// Where from: HOST[:PORT]/REPOSITORY:TAG, or @sha256:… in place of the tag
    #[arg(value_name = "REGISTRY/REPO:TAG")]
    source: String,
}

/// What came of a pull.
#[derive(Serialize)]
struct Pulled {
    reference: String,
    /// Of the manifest in the registry.
    artifact: Digest,
    name: String,
    digest: Digest,
    kind: Kind,
    chunks: usize,
    /// How many of them were fetched, and not here already.
    fetched_chunks: usize,
    /// Bytes that were fetched.
    fetched_bytes: u64,
    /// Bytes of the snapshot's files.
    content_bytes: u64,
    /// Whether all of it was here already.
    known: bool,
    /// Who has signed it.
    #[serde(skip_serializing_if = "Option::is_none")]
    signed: Option<PublicKey>,
    seconds: f64,
}

/// Runs the verb.
pub fn run(args: Args) -> Outcome {
    process::catch_interrupts();
    let house = House::open()?;
    let begun = Instant::now();
    let naming = import::naming(args.name.as_deref())?;
    let source: Reference = args.source.parse()?;
    let done = pull(&house, &source, naming, args.require_signature, args.plain_http)?;
    let pulled = Pulled {
        reference: source.to_string(),
        artifact: done.artifact,
        name: done.arrived.name,
        digest: done.arrived.snapshot.digest,
        kind: done.arrived.snapshot.manifest.kind,
        chunks: done.chunks,
        fetched_chunks: done.fetched_chunks,
        fetched_bytes: done.fetched_bytes,
        content_bytes: done.content_bytes,
        known: done.arrived.known,
        signed: done.arrived.signed,
        seconds: begun.elapsed().as_secs_f64(),
    };
    match args.json {
        true => ui::json(&pulled)?,
        false => {
            ui::data(format!("{}\n", pulled.name))?;
            ui::note(tell(&pulled));
            key::tell(&house, pulled.signed)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Pulls, and shows how far that is. If `known`, only what a known key has signed.
pub fn pull(
    house: &House,
    source: &Reference,
    naming: Naming<'_>,
    known: bool,
    plain_http: bool,
) -> Result<registry::Pulled, Failure> {
    let keys = key::known(house)?;
    let trust = if known { Trust::Only(&keys) } else { Trust::Anybody };
    let client = Arc::new(Client::new(source, Access::Pull, plain_http)?);
    let progress = ui::Progress::begin(format!("Pulling {source}"));
    let pulled = registry::pull(house.store(), &client, naming, trust, &mut |now| {
        progress.count(format!("Pulling {source}: {}", now.what), now.done, now.total);
    });
    pulled.map_err(|error| match error {
        archive::Error::Taken(_) | archive::Error::BadName(_) => {
            Failure::from(error).hint("catnap snapshot pull --name NAME@TAG")
        }
        error => error.into(),
    })
}

fn tell(pulled: &Pulled) -> String {
    let (kind, digest) = (pulled.kind.name(), pulled.digest.short());
    if pulled.known {
        return format!("{kind}, {digest}: it was here already");
    }
    let (bytes, content) = (ui::amount(pulled.fetched_bytes), ui::amount(pulled.content_bytes));
    let Pulled { chunks, fetched_chunks, seconds, .. } = pulled;
    format!("{kind}, {digest}: {bytes} fetched for {content} in {seconds:.1} s, {fetched_chunks} of {chunks} chunks")
}
