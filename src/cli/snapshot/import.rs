//! `catnap snapshot import`: takes a snapshot out of a file.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use serde::Serialize;

use super::age::{self, Age};
use super::pull;
use crate::archive::{self, Arrived, Naming, Trust};
use crate::cli::home::House;
use crate::cli::{Outcome, key, ui};
use crate::control::{Code, Failure};
use crate::oci::Reference;
use crate::snapshot::{Digest, Kind, PublicKey};
use crate::store::Snapshot;
use crate::sys::patient::Patient;
use crate::sys::process;

/// Take a snapshot out of a file
#[derive(clap::Args)]
#[command(after_help = "\
The file may come from anybody: it is checked as it is read, every byte against the digests in it, and nothing
appears before all of it was right. Of a snapshot that is here already, only the head is read. Who has signed it is
said; a wrong signature is refused. `run`, `restore` and `clone` take such a file as well.

Examples:
  catnap snapshot import anna.catnap
  catnap snapshot import anna.catnap --name guest@monday
  catnap snapshot import anna.catnap --require-signature --identity key.txt
  ssh ben catnap snapshot export ben@today - --yes | catnap snapshot import -")]
pub struct Args {
    /// What it is to be called [default: what it was called]
    #[arg(short, long, value_name = "NAME@TAG")]
    name: Option<String>,
    /// Decrypt it with the key in this file, which age-keygen made
    #[arg(long, value_name = "FILE")]
    identity: Option<PathBuf>,
    /// Take it only when somebody has signed it whose key is known here (`catnap key ls`)
    #[arg(long)]
    require_signature: bool,
    /// Print what came of it as JSON
    #[arg(long)]
    json: bool,
    /// The file, or - for standard input
    #[arg(value_name = "FILE")]
    file: String,
}

/// What came of an import.
#[derive(Serialize)]
struct Imported {
    name: String,
    digest: Digest,
    kind: Kind,
    /// Bytes of the archive that were read.
    bytes: u64,
    /// Whether it was here already, so that its files were not read.
    known: bool,
    /// The key that stands for it, known here or not.
    #[serde(skip_serializing_if = "Option::is_none")]
    signed: Option<PublicKey>,
    seconds: f64,
}

/// Runs the verb.
pub fn run(args: Args) -> Outcome {
    process::catch_interrupts();
    let house = House::open()?;
    let begun = Instant::now();
    let naming = naming(args.name.as_deref())?;
    let (arrived, bytes) = import(&house, &args.file, naming, args.require_signature, args.identity.as_deref())?;
    let Arrived { snapshot, name, known, signed } = arrived;
    let imported = Imported {
        name,
        digest: snapshot.digest,
        kind: snapshot.manifest.kind,
        bytes,
        known,
        signed,
        seconds: begun.elapsed().as_secs_f64(),
    };
    match args.json {
        true => ui::json(&imported)?,
        false => {
            ui::data(format!("{}\n", imported.name))?;
            ui::note(tell(&imported));
        }
    }
    key::tell(&house, signed)?;
    Ok(ExitCode::SUCCESS)
}

/// What a snapshot that comes is to be called, when the user says so.
pub fn naming(name: Option<&str>) -> Result<Naming<'_>, Failure> {
    match name {
        Some(name) if name.starts_with(Digest::PREFIX) => Err(crate::store::Error::Reference(name.into()).into()),
        Some(name) => Ok(Naming::As(name)),
        None => Ok(Naming::Own),
    }
}

/// The snapshot that a reference means which leads out of this store, to a file or a registry. It is here now, under
/// the name in it or a free one. If `plain_http`, a registry elsewhere is spoken to without encryption.
pub fn bring(house: &House, reference: &str, plain_http: bool) -> Result<Option<Snapshot>, Failure> {
    let (arrived, how) = if reference.ends_with(archive::SUFFIX) {
        (import(house, reference, Naming::OwnOrFree, false, None)?.0, "imported")
    } else if Reference::is_meant(reference) {
        (pull::pull(house, &reference.parse()?, Naming::OwnOrFree, false, plain_http)?.arrived, "pulled")
    } else {
        return Ok(None);
    };
    if !arrived.known {
        ui::note(format!("{reference} was {how} as {}", arrived.name));
    }
    key::tell(house, arrived.signed)?;
    Ok(Some(arrived.snapshot))
}

/// Tells of which file it is said that it is refused.
fn blame(file: &str, error: archive::Error) -> Failure {
    use archive::Error::{Read, Refused, Signature, Unknown};
    let its = file != "-" && matches!(error, Refused(_) | Read(_) | Signature(_) | Unknown(_));
    let failure = Failure::from(error);
    if its { Failure { error: format!("{file}: {}", failure.error), ..failure } } else { failure }
}

/// Imports a file; also gives how many bytes of it were read. If `known`, only one that a known key has signed.
fn import(
    house: &House,
    file: &str,
    naming: Naming<'_>,
    known: bool,
    identity: Option<&Path>,
) -> Result<(Arrived, u64), Failure> {
    let keys = key::known(house)?;
    let trust = if known { Trust::Only(&keys) } else { Trust::Anybody };
    let progress = ui::Progress::begin(format!("Importing {file}"));
    let read = Arc::new(AtomicU64::new(0));
    let (age, input): (_, Box<dyn Read + Send>) = match (file, identity) {
        ("-", None) => {
            let stdin = Patient::new(&io::stdin()).map_err(|error| Failure::while_doing("standard input", error))?;
            (None, Box::new(age::refuse_encrypted(stdin)?))
        }
        (_, None) => (None, Box::new(age::refuse_encrypted(open(Path::new(file))?)?)),
        (_, Some(identity)) => {
            let from = if file == "-" { Stdio::inherit() } else { open(Path::new(file))?.into() };
            let (age, input) = Age::decrypt(identity, from)?;
            (Some(age), Box::new(input))
        }
    };
    let input = Counted { from: input, read: read.clone() };
    let arrived = archive::import(house.store(), input, naming, trust, &mut |now| {
        progress.count(format!("Importing {file}: {}", now.what), now.done, now.total);
    });
    let arrived = arrived.map_err(|error| blame(file, error))?;
    // Of one that is here already, not all was read.
    age.filter(|_| !arrived.known).map_or(Ok(()), Age::finish)?;
    Ok((arrived, read.load(Ordering::Relaxed)))
}

fn open(path: &Path) -> Result<File, Failure> {
    File::open(path).map_err(|error| {
        let code = if error.kind() == io::ErrorKind::NotFound { Code::NotFound } else { Code::Failed };
        Failure::new(code, format!("{} cannot be read: {error}", path.display()))
            .hint("catnap snapshot export makes such files")
    })
}

/// Counts what is read.
struct Counted<R> {
    from: R,
    read: Arc<AtomicU64>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = self.from.read(into)?;
        self.read.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

fn tell(imported: &Imported) -> String {
    let kind = imported.kind.name();
    match imported.known {
        true => format!("{kind}, {}: it was here already", imported.digest.short()),
        false => {
            let (bytes, seconds) = (ui::amount(imported.bytes), imported.seconds);
            format!("{kind}, {}: {bytes} read and checked in {seconds:.1} s", imported.digest.short())
        }
    }
}
