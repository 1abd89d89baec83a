//! `catnap man`: manual pages, made of the same words as `--help`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::CommandFactory;
use clap_mangen::Man;

use super::{Cli, Outcome, ui};
use crate::control::{Code, Failure};

/// Print the manual page, or write one for each verb
#[derive(clap::Args)]
#[command(after_help = "\
Without a folder, the page of catnap itself is printed. With one, it gets catnap.1, catnap-run.1 and so on, in place of
those that are there.

Examples:
  catnap man | man -l -
  catnap man ~/.local/share/man/man1 && man catnap-restore")]
pub struct Args {
    /// The folder for the pages
    #[arg(value_name = "DIR")]
    folder: Option<PathBuf>,
}

/// Runs the verb.
pub fn run(args: Args) -> Outcome {
    let command = Cli::command().disable_help_subcommand(true);
    let Some(folder) = args.folder else {
        let mut page = Vec::new();
        Man::new(command).render(&mut page).map_err(|error| Failure::while_doing("the manual page", error))?;
        ui::data(page)?;
        return Ok(ExitCode::SUCCESS);
    };
    if !folder.is_dir() {
        let why = format!("there is no folder {}", folder.display());
        return Err(Failure::new(Code::NotFound, why).hint(format!("mkdir -p {}", folder.display())));
    }
    clap_mangen::generate_to(command, &folder).map_err(|error| Failure::while_doing(folder.display(), error))?;
    ui::data(format!("{}\n", folder.display()))?;
    Ok(ExitCode::SUCCESS)
}
