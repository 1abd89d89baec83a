//! `catnap image`: what machines are made from.

use std::process::ExitCode;

use serde::Serialize;

use super::home::House;
use super::{Outcome, snapshot, ui};
use crate::control::Failure;
use crate::image;
use crate::store::{Listed, Snapshot};

/// Make, list and remove base images
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  catnap image build             make kitten now, in place of at its first use
  catnap image ls
  catnap image rm kitten")]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(clap::Subcommand)]
enum Verb {
    /// Make the kitten image anew
    #[command(after_help = "Examples:\n  catnap image build")]
    Build,
    /// List images
    Ls(Ls),
    /// Remove images that no machine uses
    Rm(Rm),
}

#[derive(clap::Args)]
#[command(after_help = "Examples:\n  catnap image ls\n  catnap image ls --json")]
struct Ls {
    /// Print names only
    #[arg(short, long, conflicts_with = "json")]
    quiet: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
#[command(after_help = "Examples:\n  catnap image rm kitten\n  catnap image rm --dry-run kitten")]
struct Rm {
    /// Only say what would be removed
    #[arg(long)]
    dry_run: bool,
    /// The images
    #[arg(value_name = "IMAGE", required = true)]
    names: Vec<String>,
}

/// Runs the verb.
pub fn run(args: Args) -> Outcome {
    let house = House::open()?;
    match args.verb {
        Verb::Build => {
            let image = image::build(house.store(), &mut Watched::begin())?;
            ui::data(format!("{}\n", image.digest))?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Ls(args) => list(&house, &args),
        Verb::Rm(args) => snapshot::rm::remove(&house, &args.names, false, args.dry_run),
    }
}

/// The image that `reference` means, checked; `kitten` is made when it is not there, or of another Catnap.
/// One in a file or a registry is brought here; from a registry elsewhere only by `plain_http` without encryption.
pub fn find_or_make(house: &House, reference: &str, plain_http: bool) -> Result<Snapshot, Failure> {
    match reference {
        image::NAME => Ok(image::ensure(house.store(), &mut Watched::begin())?),
        _ => match snapshot::import::bring(house, reference, plain_http)? {
            Some(brought) => Ok(brought),
            None => house.image(reference),
        },
    }
}

/// Shows how the making of an image goes on.
struct Watched(ui::Progress);

impl Watched {
    fn begin() -> Watched {
        Watched(ui::Progress::begin("Looking for the image kitten"))
    }
}

impl image::Progress for Watched {
    fn step(&mut self, what: &str, done: u64, total: u64) {
        let part = done.saturating_mul(100).checked_div(total).map_or(String::new(), |part| format!(" {part}%"));
        self.0.say(format!("Making the image kitten: {what}{part}"));
    }

    fn warn(&mut self, what: &str) {
        self.0.aside(|| ui::warn(what));
    }
}

/// An image as it is listed.
#[derive(Serialize)]
struct View {
    names: Vec<String>,
    digest: String,
    size_bytes: u64,
    created: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    damaged: Option<String>,
}

impl View {
    fn of(listed: Listed) -> View {
        let (size_bytes, created, damaged) = match &listed.snapshot {
            Ok(image) => (image.manifest.files.iter().map(|file| file.size).sum(), image.manifest.created, None),
            Err(error) => (0, 0, Some(error.to_string())),
        };
        View { names: listed.names, digest: listed.digest.to_string(), size_bytes, created, damaged }
    }
}

fn list(house: &House, args: &Ls) -> Outcome {
    let images = house.store().list()?.into_iter().filter(Listed::is_image);
    let views: Vec<_> = images.map(View::of).collect();
    if args.json {
        ui::json(&views)?;
    } else if args.quiet {
        let name = |view: &View| view.names.first().unwrap_or(&view.digest).clone() + "\n";
        ui::data(views.iter().map(name).collect::<String>())?;
    } else {
        ui::table(&["NAME", "DIGEST", "SIZE", "AGE"], &views.iter().map(row).collect::<Vec<_>>())?;
    }
    Ok(ExitCode::SUCCESS)
}

fn row(view: &View) -> Vec<String> {
    let age = snapshot::view::since(view.created);
    vec![
        if view.names.is_empty() { "-".into() } else { view.names.join(",") },
        view.digest.chars().take("sha256:".len() + 12).collect(),
        if view.damaged.is_some() { "damaged".into() } else { format!("{}M", view.size_bytes.div_ceil(1 << 20)) },
        if view.damaged.is_some() { "-".into() } else { ui::span(age) },
    ]
}
