//! `catnap dashboard`: a page that shows machines and snapshots, live.

use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;

use serde_json::{Value, json};

use super::home::House;
use super::snapshot;
use super::{Outcome, ui};
use crate::control::{Client, Code, Failure};
use crate::spec::Name;
use crate::sys::home::Home;
use crate::web::{self, Dashboard, Seen, Settings};

/// The port of a guest where its page is.
const PAGE: u16 = 80;

/// Show machines and snapshots on a page, live
#[derive(clap::Args)]
#[command(after_help = "\
Prints the address of a page on this host's loopback, and serves it until Ctrl-C. The address has a secret in it: whoever \
knows it can use the page, and nobody else. Nothing is fetched from elsewhere.

The page shows what machines do, their kitten pages, the tree of snapshots and what is in each, the counter across a \
snapshot, requests per second across a resize, memory page by page, and what clones share. Its buttons run this very \
program, with the command line that they show. What it shows is in one home; the lesson has one of its own.

Examples:
  catnap dashboard
  CATNAP_HOME=~/.local/share/catnap-lesson catnap dashboard
  catnap dashboard --open
  catnap dashboard --port 7000
  catnap dashboard --json | jq -r .address")]
pub struct Args {
    /// The port on loopback [default: one that is free]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    port: u16,
    /// Open the page in a browser. Other users of this host can then see the address in the list of processes
    #[arg(long)]
    open: bool,
    /// Print the address as JSON
    #[arg(long)]
    json: bool,
}

/// Runs the verb.
pub fn run(args: Args) -> Outcome {
    let house = House::open()?;
    let home = Home::from_env().map_err(|error| Failure::new(Code::Failed, error.to_string()))?;
    let rows = home.state.join("lesson").join("rows.json");
    let dashboard = Dashboard::listen(Settings { port: args.port, rows }).map_err(|error| {
        Failure::while_doing(format!("port {} of this host", args.port), error).hint("catnap dashboard, without --port")
    })?;
    let address = dashboard.address();
    match args.json {
        true => ui::json(&json!({ "address": address, "port": dashboard.port(), "pid": std::process::id() }))?,
        false => {
            ui::data(format!("{address}\n"))?;
            ui::note("Serving this page until Ctrl-C. Keep the address to yourself: whoever has it can use it.");
        }
    }
    if args.open {
        open(&address);
    }
    let served = dashboard.serve(Arc::new(house));
    served.map_err(|error| Failure::while_doing("the dashboard", error))?;
    Ok(ExitCode::SUCCESS)
}

/// Has the desktop show an address. It is no failure where there is no desktop.
fn open(address: &str) {
    let quiet = || Stdio::null();
    let opened = Command::new("xdg-open").arg(address).stdin(quiet()).stdout(quiet()).stderr(quiet()).spawn();
    if let Err(error) = opened {
        ui::warn(format!("no browser can be opened from here (xdg-open: {error}): open the address by hand"));
    }
}

impl web::House for House {
    fn names(&self) -> Result<Vec<Name>, Failure> {
        Ok(self.machines()?.into_iter().map(|(name, _)| name).collect())
    }

    fn look(&self, name: &Name) -> Result<Seen, Failure> {
        let machine = self.machine(name)?;
        let (view, status) = self.look_at(&machine)?;
        let port = view.forwards.iter().find(|forward| forward.guest == PAGE).map(|forward| forward.host);
        Ok(Seen { view: as_json(&view)?, status, port })
    }

    fn client(&self, name: &Name) -> Result<Client, Failure> {
        House::client(self, name)
    }

    fn tree(&self) -> Result<Value, Failure> {
        snapshot::tree_json(self)
    }

    fn snapshot(&self, reference: &str) -> Result<Value, Failure> {
        snapshot::inspect_json(self, reference)
    }
}

fn as_json(value: &impl serde::Serialize) -> Result<Value, Failure> {
    serde_json::to_value(value).map_err(|error| Failure::while_doing("JSON", error))
}
