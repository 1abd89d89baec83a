//! The dashboard: a page on loopback that shows machines and snapshots as they are, and has the command line do what
//! its buttons say.
//!
//! ```text
//! House (the verbs' own eyes) ──▶ watch ── one JSON text twice a second ──▶ server ── events ──▶ page/
//! kitten: each machine's page ──▶   │                                         │
//! rows, share: files, /proc   ──▶   ┘          page/ ── a command line ──▶ commands ──▶ this very program
//! ```
//!
//! Each text is all there is to show, so whoever misses some has missed nothing: a slow reader gets the latest and
//! holds nobody up. Nothing is looked at while nobody looks.
//!
//! Who may come in is in [`gate`]. A machine's own page is shown in a frame without an origin, through [`proxy`] and
//! under a key of its own, so that what a guest serves never learns the dashboard's token.

mod commands;
mod gate;
mod jobs;
mod kitten;
mod proxy;
mod rows;
mod server;
mod share;
mod watch;

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use serde_json::Value;
use tokio::net::TcpListener;

use crate::control::protocol::Status;
use crate::control::{Client, Failure};
use crate::spec::Name;

/// The most machines that are followed.
const MAX_MACHINES: usize = 64;

/// What the dashboard knows, told by the very code that the verbs have.
pub trait House: Send + Sync + 'static {
    /// The names of all machines.
    fn names(&self) -> Result<Vec<Name>, Failure>;
    /// A machine.
    fn look(&self, name: &Name) -> Result<Seen, Failure>;
    /// A way to its monitor.
    fn client(&self, name: &Name) -> Result<Client, Failure>;
    /// What `catnap snapshot tree --json` prints.
    fn tree(&self) -> Result<Value, Failure>;
    /// What `catnap snapshot inspect` prints of one.
    fn snapshot(&self, reference: &str) -> Result<Value, Failure>;
}

/// A machine as it is now.
pub struct Seen {
    /// What `catnap ps --json` prints of it.
    pub view: Value,
    /// What its monitor says, if there is one that answers.
    pub status: Option<Status>,
    /// The port of this host that leads to its page.
    pub port: Option<u16>,
}

/// Where and of what the dashboard is.
pub struct Settings {
    /// The port on loopback; 0 finds a free one.
    pub port: u16,
    /// Where the lesson writes which rows it found.
    pub rows: PathBuf,
}

/// The dashboard, which listens already and does not answer yet.
pub struct Dashboard {
    listener: std::net::TcpListener,
    token: String,
    port: u16,
    settings: Settings,
}

impl Dashboard {
    /// Takes the port and draws a token.
    pub fn listen(settings: Settings) -> io::Result<Dashboard> {
        let listener = std::net::TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, settings.port)))?;
        listener.set_nonblocking(true)?;
        let port = listener.local_addr()?.port();
        Ok(Dashboard { listener, token: gate::secret()?, port, settings })
    }

    /// Where it is found. Whoever knows this address can use it.
    pub fn address(&self) -> String {
        format!("http://127.0.0.1:{}/{}/", self.port, self.token)
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Answers until the process is asked to end (SIGINT, SIGTERM or SIGHUP).
    pub fn serve(self, house: Arc<dyn House>) -> io::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            // Most of them wait: for monitors, and for folders to be read.
            .max_blocking_threads(MAX_MACHINES)
            .thread_stack_size(512 << 10)
            .build()?;
        let result = runtime.block_on(async {
            let listener = TcpListener::from_std(self.listener)?;
            server::run(listener, self.token, &self.settings, house).await
        });
        // Nobody waits for a monitor that does not answer.
        runtime.shutdown_background();
        result
    }
}
