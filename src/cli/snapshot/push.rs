//! `catnap snapshot push`: a snapshot to a registry.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;

use super::export::Going;
use super::{scrub, secrets};
use crate::archive::{self, Outgoing, registry};
use crate::cli::home::House;
use crate::cli::{Outcome, ui};
use crate::control::{Code, Failure};
use crate::oci::{Access, Client, Reference, Version};
use crate::snapshot::{Digest, Kind, PublicKey, SecretKey};
use crate::spec::Name;
use crate::sys::process;

/// Push a snapshot to a registry
#[derive(clap::Args)]
#[command(after_help = "\
Any registry for containers will do: what arrives there is an OCI artifact (docs/snapshot-format.md), and needs nothing \
else. It travels in chunks, and those that the repository has already are not sent: of the second snapshot of a \
machine, only what changed. When a push is interrupted, the next one goes on.

What travels is shown before it goes. Whoever gets it gets all that is on the disks and in the memory, also what was \
removed and not overwritten; so when secrets are found, or memory goes, you are asked. --scrub has keys, machine id, \
shell histories, logs and the like removed before (`catnap snapshot scrub --help`).

Who you are is what docker knows: `docker login`, ~/.docker/config.json (or $DOCKER_CONFIG), credential helpers. \
Registries are spoken to over TLS, but for those on this machine.

Examples:
  catnap snapshot push anna@monday localhost:5000/cats/anna:monday
  catnap snapshot push anna@monday registry.example/anna:monday --disk-only
  catnap snapshot push anna@tuesday registry.example/anna:tuesday --dry-run")]
pub struct Args {
    /// Leave memory and machine state out
    #[arg(long)]
    disk_only: bool,
    /// Push a copy from which keys, machine id, histories, logs and the like are removed; it stays as NAME-scrubbed
    #[arg(long, conflicts_with_all = ["disk_only", "dry_run"])]
    scrub: bool,
    #[command(flatten)]
    also: scrub::Also,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
    /// Only say what would be sent
    #[arg(long)]
    dry_run: bool,
    /// Stand for it with this key of yours (`catnap key new`)
    #[arg(long, value_name = "KEY")]
    sign: Option<Name>,
    /// A string to search for, beside the usual secrets; can be given several times
    #[arg(long, value_name = "STRING", value_parser = secrets::wanted)]
    find: Vec<String>,
    /// Speak to a registry elsewhere without encryption
    #[arg(long)]
    plain_http: bool,
    /// Print what came of it as JSON
    #[arg(long)]
    json: bool,
    /// The snapshot
    #[arg(value_name = "SNAPSHOT")]
    reference: String,
    /// Where to: HOST[:PORT]/REPOSITORY:TAG
    #[arg(value_name = "REGISTRY/REPO:TAG")]
    target: String,
}

/// What came of a push.
#[derive(Serialize)]
struct Pushed {
    reference: String,
    /// Of the manifest in the registry.
    artifact: Digest,
    name: String,
    /// Of the snapshot that arrives.
    digest: Digest,
    kind: Kind,
    chunks: usize,
    /// How many of them the registry did not have.
    sent_chunks: usize,
    /// Bytes that were sent.
    sent_bytes: u64,
    /// Bytes of all that is there now.
    stored_bytes: u64,
    /// Bytes before they were compressed.
    content_bytes: u64,
    /// How many different secrets were found in it.
    secrets: usize,
    /// The key that stands for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    signed: Option<PublicKey>,
    /// Whether nothing was sent, and this is only what would be.
    dry_run: bool,
    seconds: f64,
}

/// Runs the verb.
pub fn run(mut args: Args) -> Outcome {
    process::catch_interrupts();
    let house = House::open()?;
    args.also.check(args.scrub)?;
    let target: Reference = args.target.parse()?;
    if matches!(target.version, Version::Digest(_)) {
        return Err(Failure::new(Code::Usage, format!("{target} is a digest, and what is pushed gets a tag"))
            .hint("REGISTRY/REPOSITORY:TAG"));
    }
    let key = args.sign.as_ref().map(|name| house.store().secret_key(name)).transpose()?;
    let client = Arc::new(Client::new(&target, Access::Push, args.plain_http)?);
    if args.scrub {
        args.reference = scrub::first(&house, &args.reference, &args.also)?;
    }
    let going = Going::find(&house, &args.reference, false, args.disk_only, &args.find)?;
    going.ask(args.yes || args.dry_run, &format!("Push all of this to {target}?"), "nothing was pushed")?;
    let begun = Instant::now();
    let progress = ui::Progress::begin(format!("Pushing {}", args.reference));
    let mut watch = |now: archive::Progress<'_>| {
        progress.count(format!("Pushing {}: {}", args.reference, now.what), now.done, now.total);
    };
    let mut outgoing = Outgoing::prepare(house.store(), &going.snapshot, going.memory, &mut watch)?;
    if let Some(key) = &key {
        outgoing.sign(key);
    }
    let done = registry::push(house.store(), &outgoing, &client, args.dry_run, &mut watch)?;
    drop(progress);
    let pushed = Pushed {
        reference: target.to_string(),
        artifact: done.artifact,
        name: outgoing.manifest().name.clone(),
        digest: outgoing.digest(),
        kind: outgoing.manifest().kind,
        chunks: done.chunks,
        sent_chunks: done.sent_chunks,
        sent_bytes: done.sent_bytes,
        stored_bytes: done.stored_bytes,
        content_bytes: outgoing.size(),
        secrets: going.report.findings.len(),
        signed: key.as_ref().map(SecretKey::public),
        dry_run: args.dry_run,
        seconds: begun.elapsed().as_secs_f64(),
    };
    if args.json {
        return ui::json(&pushed).map(|()| ExitCode::SUCCESS);
    }
    ui::data(format!("{}\n", pushed.reference))?;
    ui::note(tell(&pushed));
    Ok(ExitCode::SUCCESS)
}

fn tell(pushed: &Pushed) -> String {
    let Pushed { chunks, sent_chunks, seconds, .. } = pushed;
    let (sent, all) = (ui::amount(pushed.sent_bytes), ui::amount(pushed.stored_bytes));
    let how = if pushed.dry_run {
        format!("{sent} of {all} would be sent")
    } else {
        format!("{sent} of {all} sent in {seconds:.1} s")
    };
    let (kind, digest) = (pushed.kind.name(), pushed.digest.short());
    format!("{kind}, {digest}: {how}, {sent_chunks} of {chunks} chunks")
}
