//! Anna's kitten site: a page to look at, a guest book to write in, and figures to read.
//!
//! ```text
//! server ─ the event loop and its workers ─┬─ http   bytes to requests, responses to bytes
//!                                          └─ routes ─┬─ page, settings, notes   what is shown
//!                                                     ├─ book, form, doorbell    what is written
//!                                                     └─ work                    what is burnt
//! ```

pub mod book;
mod date;
mod doorbell;
mod form;
mod http;
mod notes;
mod page;
mod pool;
mod routes;
mod server;
pub(crate) mod settings;
mod work;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use crate::facts;
use crate::socket::{Address, Listener};
use book::GuestBook;

/// The counter on the page counts this often, so that a pause can be seen.
const TICK: Duration = Duration::from_millis(500);

/// What all requests share. Everything but the guest book lives in memory alone.
pub struct Site {
    book: Arc<GuestBook>,
    generation: Arc<AtomicU64>,
    visits: AtomicU64,
    /// Answers that took work: the page, the guest book, `/work`.
    answered: AtomicU64,
    ticks: AtomicU64,
    nonce: OnceLock<String>,
    settings: PathBuf,
    notes: PathBuf,
}

impl Site {
    /// A site that begins to tick at once.
    pub fn new(book: Arc<GuestBook>, generation: Arc<AtomicU64>) -> Arc<Site> {
        Site::with_files(book, generation, "/etc/kitten.conf".into(), "/mnt/notes.txt".into())
    }

    /// The same with the settings and Anna's notes elsewhere.
    pub fn with_files(
        book: Arc<GuestBook>,
        generation: Arc<AtomicU64>,
        settings: PathBuf,
        notes: PathBuf,
    ) -> Arc<Site> {
        let (visits, answered, ticks) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
        let nonce = OnceLock::new();
        let site = Arc::new(Site { book, generation, visits, answered, ticks, nonce, settings, notes });
        let ticking = Arc::downgrade(&site);
        spawn("ticks", move || {
            while let Some(site) = ticking.upgrade() {
                site.ticks.fetch_add(1, Ordering::Relaxed);
                drop(site);
                thread::sleep(TICK);
            }
        });
        site
    }

    /// Opens the guest book in a thread of its own: a boot does not wait for it, only its readers do.
    pub fn open_book(self: &Arc<Site>, folder: PathBuf) {
        let site = self.clone();
        spawn("guest book", move || {
            site.nonce();
            if let Err(error) = site.book.open(&folder, &site.generation) {
                eprintln!("catnap: {error}");
            }
        });
    }

    /// Begins to serve in threads of its own; returns the TCP port.
    pub fn serve(self: &Arc<Site>, at: Address) -> io::Result<u16> {
        let listener = Listener::bind(at)?;
        let port = listener.port()?;
        let server = server::Server::new(self.clone(), listener)?;
        spawn("site", move || {
            if let Err(error) = server.run() {
                eprintln!("catnap: the site stopped: {error}");
            }
        });
        Ok(port)
    }

    /// Sixteen random bytes that nobody writes down: the same nonce means the same memory. Not drawn before the
    /// machine is up, as the kernel may have to wait for entropy.
    fn nonce(&self) -> &str {
        self.nonce.get_or_init(facts::random_hex)
    }
}

/// Serves the site without a machine around it, for ever.
pub fn serve_alone(at: Address, folder: &Path) -> io::Result<()> {
    let site = Site::with_files(
        Arc::new(GuestBook::default()),
        Arc::new(AtomicU64::new(0)),
        folder.join("kitten.conf"),
        folder.join("notes.txt"),
    );
    site.open_book(folder.into());
    server::Server::new(site, Listener::bind(at)?)?.run()
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) {
    let thread = thread::Builder::new().name(name.into()).stack_size(256 << 10);
    if let Err(error) = thread.spawn(work) {
        eprintln!("catnap: {name}: {error}");
    }
}
