//! The guest book: SQLite on the root disk, and the generation beside it.
//!
//! ```text
//!            open              hold               release
//! Opening ─────────> Open ────────────> Held ─────────────> Open
//!                      └──────── close ──┴──> Closed
//! ```
//!
//! While it is held (for a quiesced snapshot) nothing touches the files: the filesystem below is frozen, and
//! even a reader of a WAL database writes. The latest entries are therefore kept in memory as well.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rusqlite::Connection;
use serde::{Deserialize, Serialize};

/// Entries that are shown.
pub const SHOWN: usize = 50;
/// The longest name and message, in characters.
pub const MAX_NAME: usize = 40;
/// See [`MAX_NAME`].
pub const MAX_MESSAGE: usize = 400;
/// The book is full: a class of students will not get there, a loop will.
pub const MAX_ENTRIES: u64 = 100_000;

/// What can go wrong with the book.
#[derive(Debug)]
pub enum Error {
    /// The name or the message is empty or too long.
    Refused(&'static str),
    /// It has [`MAX_ENTRIES`].
    Full,
    /// It is held still for a snapshot, or was closed, or has not come up in time.
    Unavailable,
    /// SQLite says no.
    Database(String),
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Error::Refused(why) => f.write_str(why),
            Error::Full => f.write_str("the guest book is full"),
            Error::Unavailable => f.write_str("the guest book is held still for a moment; try again"),
            Error::Database(why) => write!(f, "the guest book cannot be used: {why}"),
        }
    }
}

impl From<rusqlite::Error> for Error {
    fn from(error: rusqlite::Error) -> Error {
        Error::Database(error.to_string())
    }
}

/// One entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// Counts up.
    pub id: i64,
    /// Seconds since 1970.
    pub written: i64,
    /// Who wrote it.
    pub name: String,
    /// What they wrote.
    pub message: String,
}

/// Where in the writing of an entry one can stop to ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// The row is inserted, and its transaction still open.
    BeforeCommit,
    /// It is on the disk.
    AfterCommit,
    /// It is committed, but SQLite was told not to wait for the disk (`PRAGMA synchronous=NORMAL`).
    Unsynced,
}

/// What to do at a place.
pub type Stop<'a> = (Place, &'a dyn Fn());

/// What became of the book, as far as SQLite can tell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Findings {
    /// What `PRAGMA integrity_check` says: `ok`, or what is wrong.
    pub integrity: String,
    /// How many entries there are.
    pub entries: i64,
    /// The number of the last one, 0 when there is none. Numbers have no gaps as long as no entry was lost.
    pub last: i64,
}

enum State {
    Opening,
    Open(Connection),
    Held(Connection),
    Closed(String),
}

struct Inner {
    state: State,
    /// The newest first.
    latest: Vec<Entry>,
    /// SQLite's own count of changes made by others, to see when `latest` is old.
    data_version: i64,
}

/// The guest book.
pub struct GuestBook {
    inner: Mutex<Inner>,
    changed: Condvar,
    /// Beside the lock, for those who must not wait for a disk.
    entries: AtomicU64,
}

impl Default for GuestBook {
    fn default() -> GuestBook {
        let inner = Inner { state: State::Opening, latest: Vec::new(), data_version: 0 };
        GuestBook { inner: Mutex::new(inner), changed: Condvar::new(), entries: AtomicU64::new(0) }
    }
}

impl GuestBook {
    /// The longest that a visitor waits for a book that is held or not open yet.
    const PATIENCE: Duration = Duration::from_secs(2);

    /// Opens the book in `folder`, and raises `generation` to the one that is written in it, before anybody can read. To
    /// be called once.
    pub fn open(&self, folder: &Path, generation: &AtomicU64) -> Result<(), Error> {
        let opened = prepare(folder);
        let mut inner = self.lock();
        if !matches!(inner.state, State::Opening) {
            // The machine went down meanwhile; dropping the connection closes it.
            return Err(Error::Unavailable);
        }
        let result = match opened {
            Ok((connection, written)) => {
                generation.fetch_max(written, Ordering::Relaxed);
                inner.state = State::Open(connection);
                self.reload(&mut inner)
            }
            Err(error) => {
                inner.state = State::Closed(error.to_string());
                Err(error)
            }
        };
        self.changed.notify_all();
        result
    }

    /// The newest entries, newest first; or why there are none to be had.
    pub fn latest(&self) -> Result<Vec<Entry>, Error> {
        let (mut inner, _) = self
            .changed
            .wait_timeout_while(self.lock(), Self::PATIENCE, |inner| matches!(inner.state, State::Opening))
            .unwrap_or_else(PoisonError::into_inner);
        match inner.connection() {
            Ok(connection) => {
                let version = connection.query_row("PRAGMA data_version", [], |row| row.get(0))?;
                if inner.data_version != version {
                    inner.data_version = version;
                    self.reload(&mut inner)?;
                }
            }
            // What is in memory is all there is, as nobody can write now.
            Err(_) if matches!(inner.state, State::Held(_)) => {}
            Err(error) => return Err(error),
        }
        Ok(inner.latest.clone())
    }

    /// How many entries there are, without waiting for anything.
    pub fn entries(&self) -> u64 {
        self.entries.load(Ordering::Relaxed)
    }

    /// Writes an entry; it is on the disk when this returns.
    pub fn write(&self, name: &str, message: &str) -> Result<i64, Error> {
        self.write_with_stop(name, message, None)
    }

    /// The same with a stop on the way, for those who want to see what a snapshot holds that is taken just there.
    pub fn write_with_stop(&self, name: &str, message: &str, stop: Option<Stop<'_>>) -> Result<i64, Error> {
        let (name, message) = (tidy(name), tidy(message));
        if name.is_empty() || message.is_empty() {
            return Err(Error::Refused("a name and a message are needed"));
        }
        if name.chars().count() > MAX_NAME || message.chars().count() > MAX_MESSAGE {
            return Err(Error::Refused("that is too long"));
        }
        let mut inner = self.wait_until_open();
        let connection = inner.connection()?;
        if self.entries() >= MAX_ENTRIES {
            return Err(Error::Full);
        }
        let id = insert(connection, &name, &message, stop)?;
        self.reload(&mut inner)?;
        Ok(id)
    }

    /// Has SQLite look at the whole file.
    pub fn check(&self) -> Result<Findings, Error> {
        let inner = self.wait_until_open();
        let connection = inner.connection()?;
        let integrity = connection.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))?;
        let count = "SELECT count(*), ifnull(max(id), 0) FROM guestbook";
        let (entries, last) = connection.query_row(count, [], |row| Ok((row.get(0)?, row.get(1)?)))?;
        Ok(Findings { integrity, entries, last })
    }

    /// Raises the generation where it can be seen in SQLite: by one, and to `least` at least. Returns what it is then.
    pub fn raise_generation(&self, least: u64) -> Result<u64, Error> {
        let inner = self.wait_until_open();
        let sql = "UPDATE machine SET generation = max(generation + 1, ?1), woken = unixepoch() RETURNING generation";
        let raised: i64 = inner.connection()?.query_row(sql, [least as i64], |row| row.get(0))?;
        Ok(raised.max(0) as u64)
    }

    /// Puts everything into the main file and keeps it still until [`GuestBook::release`].
    pub fn hold(&self) -> Result<(), Error> {
        let mut inner = self.wait_until_open();
        let connection = inner.connection()?;
        let checkpointed = connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get::<_, i64>(0))?;
        if checkpointed != 0 {
            return Err(Error::Database("another process is using the guest book".into()));
        }
        inner.state = match std::mem::replace(&mut inner.state, State::Opening) {
            State::Open(connection) => State::Held(connection),
            other => other,
        };
        Ok(())
    }

    /// Ends [`GuestBook::hold`]. Does nothing when it is not held.
    pub fn release(&self) {
        let mut inner = self.lock();
        inner.state = match std::mem::replace(&mut inner.state, State::Opening) {
            State::Held(connection) => State::Open(connection),
            other => other,
        };
        self.changed.notify_all();
    }

    /// Checkpoints and closes the files, for good.
    pub fn close(&self) {
        let mut inner = self.lock();
        let state = std::mem::replace(&mut inner.state, State::Closed("the machine is going down".into()));
        if let State::Open(connection) | State::Held(connection) = state {
            let _ = connection.close();
        }
        self.changed.notify_all();
    }

    fn reload(&self, inner: &mut Inner) -> Result<(), Error> {
        let connection = inner.connection()?;
        let sql = "SELECT id, written, name, message FROM guestbook ORDER BY id DESC LIMIT ?1";
        let latest = connection
            .prepare(sql)?
            .query_map([SHOWN as i64], |row| {
                Ok(Entry { id: row.get(0)?, written: row.get(1)?, name: row.get(2)?, message: row.get(3)? })
            })?
            .collect::<Result<_, _>>()?;
        let entries: i64 = connection.query_row("SELECT count(*) FROM guestbook", [], |row| row.get(0))?;
        inner.latest = latest;
        self.entries.store(entries.max(0) as u64, Ordering::Relaxed);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The book once it is open; or as it is, when that takes too long.
    fn wait_until_open(&self) -> MutexGuard<'_, Inner> {
        let waiting = |inner: &mut Inner| matches!(inner.state, State::Opening | State::Held(_));
        self.changed.wait_timeout_while(self.lock(), Self::PATIENCE, waiting).unwrap_or_else(PoisonError::into_inner).0
    }
}

impl Inner {
    fn connection(&self) -> Result<&Connection, Error> {
        match &self.state {
            State::Open(connection) => Ok(connection),
            State::Closed(why) => Err(Error::Database(why.clone())),
            State::Opening | State::Held(_) => Err(Error::Unavailable),
        }
    }
}

fn insert(connection: &Connection, name: &str, message: &str, stop: Option<Stop<'_>>) -> rusqlite::Result<i64> {
    let synchronous = |how: &str| connection.pragma_update(None, "synchronous", how);
    let at = |place| {
        if let Some((wanted, stop)) = stop
            && wanted == place
        {
            stop();
        }
    };
    let unsynced = matches!(stop, Some((Place::Unsynced, _)));
    if unsynced {
        synchronous("NORMAL")?;
    }
    let write = || {
        // Dropped without a commit, it is rolled back.
        let transaction = connection.unchecked_transaction()?;
        let sql = "INSERT INTO guestbook (written, name, message) VALUES (unixepoch(), ?1, ?2)";
        transaction.execute(sql, (name, message))?;
        let id = transaction.last_insert_rowid();
        at(Place::BeforeCommit);
        transaction.commit()?;
        at(Place::AfterCommit);
        at(Place::Unsynced);
        Ok(id)
    };
    let written = write();
    if unsynced {
        synchronous("FULL")?;
    }
    written
}

fn prepare(folder: &Path) -> Result<(Connection, u64), Error> {
    std::fs::create_dir_all(folder).map_err(|error| Error::Database(format!("{}: {error}", folder.display())))?;
    let connection = Connection::open(folder.join("guestbook.sqlite"))?;
    connection.busy_timeout(Duration::from_secs(2))?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    let ready: bool = connection.query_row(
        "SELECT count(*) = 2 FROM sqlite_schema WHERE name IN ('guestbook', 'machine')",
        [],
        |row| row.get(0),
    )?;
    if !ready {
        connection.execute_batch(
            "BEGIN;
             CREATE TABLE IF NOT EXISTS guestbook (
                 id INTEGER PRIMARY KEY AUTOINCREMENT,
                 written INTEGER NOT NULL,
                 name TEXT NOT NULL,
                 message TEXT NOT NULL
             );
             CREATE TABLE IF NOT EXISTS machine (generation INTEGER NOT NULL, woken INTEGER);
             INSERT INTO machine SELECT 0, NULL WHERE NOT EXISTS (SELECT 1 FROM machine);
             COMMIT;",
        )?;
    }
    let generation: i64 = connection.query_row("SELECT max(generation) FROM machine", [], |row| row.get(0))?;
    Ok((connection, generation.max(0) as u64))
}

/// Without control characters (but for line ends) and without blanks around.
fn tidy(text: &str) -> String {
    let text: String = text.replace("\r\n", "\n").chars().filter(|c| *c == '\n' || !c.is_control()).collect();
    text.trim().into()
}
