//! The visitors of the guest book, and what snapshots of each kind hold of what they wrote.
//!
//! One of them waits for the disk, one is content with less, and one is in the middle of writing while a snapshot is
//! taken, which the doorbell makes certain. What they were told is kept in `visits.json`; what is found in machines that
//! were made from those snapshots goes to `rows.json`, for people and for the dashboard.

use std::collections::BTreeMap;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Desk, Error, page};
use crate::snapshot::Kind;
use crate::sys::files::{At, read_bounded, write_atomically};

const VISITS: &str = "visits.json";
const ROWS: &str = "rows.json";
const MAX_FILE: u64 = 1 << 20;
/// The longest that a visitor waits: a live snapshot writes memory while the ring is not answered.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long somebody rings until a snapshot waits for it, and a woken writer has to go on.
const RINGS: Duration = Duration::from_secs(30);
/// The pause between two rings.
const BREATH: Duration = Duration::from_millis(250);

/// A row of the guest book.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Row {
    id: i64,
    message: String,
}

/// What visitors were told.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Visits {
    /// Rows for which they were thanked.
    acknowledged: Vec<Row>,
    /// By the name of a snapshot: how many rows were acknowledged when it was taken, and what was being written.
    moments: BTreeMap<String, Moment>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Moment {
    acknowledged: usize,
    open: String,
}

/// What came of a visit.
#[derive(Debug, Serialize)]
pub struct Visit {
    /// Rows that were acknowledged so far.
    pub acknowledged: usize,
    /// What was being written when the snapshot was taken.
    pub open: Option<String>,
}

/// What a snapshot holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Rows {
    /// What the snapshot captured.
    pub kind: String,
    /// Rows for which a visitor had been thanked before it.
    pub acknowledged: usize,
    /// How many of those are in a machine that was made from it.
    pub found: usize,
    /// Rows that were being written at that moment, and are not there: the work was torn in two.
    pub torn: usize,
    /// What SQLite says of the whole book.
    pub integrity: String,
}

/// Has visitors write into the guest book of `machine`. Without a `ring` there are two: Ben waits for the disk, Cleo is
/// thanked as soon as the guest's memory has her row. With one, Dora writes, and rings in the middle of it, until a
/// snapshot that waits for a ring is taken there.
pub fn visit(desk: &Desk, machine: &str, ring: Option<&str>) -> Result<Visit, Error> {
    let port = desk.port(machine).ok_or_else(|| failed(machine, "no port of this host leads to it"))?;
    let mut visits = match ring {
        None => Visits::default(),
        Some(_) => read(&desk.state.join(VISITS))?,
    };
    let open = match ring {
        None => {
            for (name, place) in [("Ben", None), ("Cleo", Some("unsynced"))] {
                visits.acknowledged.push(write(machine, port, name, &format!("{name} was here"), place)?.0);
            }
            None
        }
        Some(moment) => Some(ring_until_awaited(&mut visits, machine, port, moment)?),
    };
    let path = desk.state.join(VISITS);
    write_atomically(&path, &serde_json::to_vec_pretty(&visits).map_err(std::io::Error::from).at("write", &path)?)?;
    Ok(Visit { acknowledged: visits.acknowledged.len(), open })
}

/// Until the snapshot waits, rings are answered at once, and what was written is a row like others.
fn ring_until_awaited(visits: &mut Visits, machine: &str, port: u16, moment: &str) -> Result<String, Error> {
    let deadline = Instant::now() + RINGS;
    for attempt in 1.. {
        let message = format!("Dora, in the middle of it ({moment}, {attempt})");
        let acknowledged = visits.acknowledged.len();
        let (row, awaited) = write(machine, port, "Dora", &message, Some("unsynced"))?;
        visits.acknowledged.push(row);
        if awaited {
            visits.moments.insert(moment.into(), Moment { acknowledged, open: message.clone() });
            return Ok(message);
        }
        if Instant::now() >= deadline {
            break;
        }
        thread::sleep(BREATH);
    }
    Err(failed(machine, "nobody waits for the ring; take a snapshot with --at-doorbell at the same time"))
}

/// Writes a row; also whether somebody waited for its ring.
fn write(machine: &str, port: u16, name: &str, message: &str, ring: Option<&str>) -> Result<(Row, bool), Error> {
    let entry = json!({"name": name, "message": message, "ring": ring});
    let answer = page::post(port, "/api/guestbook", &entry, PATIENCE).and_then(|answer| answer.json());
    let answer = answer.map_err(|error| failed(machine, error))?;
    let id = answer["id"].as_i64().ok_or_else(|| failed(machine, "it gives the row no number"))?;
    Ok((Row { id, message: message.into() }, answer["awaited"] == true))
}

/// Looks into the guest books of machines, each named as the moment that it was made from, and keeps what is found.
pub fn rows(desk: &Desk, machines: &[String]) -> Result<Vec<Rows>, Error> {
    let visits = read(&desk.state.join(VISITS))?;
    let rows = machines.iter().map(|machine| look_into(desk, &visits, machine)).collect::<Result<Vec<_>, _>>()?;
    let path = desk.state.join(ROWS);
    write_atomically(&path, &serde_json::to_vec_pretty(&rows).map_err(std::io::Error::from).at("write", &path)?)?;
    Ok(rows)
}

fn look_into(desk: &Desk, visits: &Visits, machine: &str) -> Result<Rows, Error> {
    let port = desk.port(machine).ok_or_else(|| failed(machine, "no port of this host leads to it"))?;
    let moment =
        visits.moments.get(machine).ok_or_else(|| failed(machine, "nobody rang for a snapshot of this name"))?;
    let name = machine.parse().map_err(|error: crate::spec::Error| failed(machine, error))?;
    let kind = desk.store().resolve(&desk.store().machine(&name)?.spec.image)?.manifest.kind;
    // A writer that woke in the middle of its work goes on when it notices that nobody waits any more.
    let deadline = Instant::now() + if kind == Kind::Live { RINGS } else { Duration::ZERO };
    let get = |path| {
        let answer = page::get(port, path, PATIENCE).and_then(|answer| answer.json());
        answer.map_err(|error| failed(machine, error))
    };
    let mut there = get("/api/guestbook")?;
    while !has(&there, None, &moment.open) && Instant::now() < deadline {
        thread::sleep(BREATH);
        there = get("/api/guestbook")?;
    }
    let acknowledged = &visits.acknowledged[..moment.acknowledged.min(visits.acknowledged.len())];
    Ok(Rows {
        kind: kind.name().into(),
        acknowledged: acknowledged.len(),
        found: acknowledged.iter().filter(|row| has(&there, Some(row.id), &row.message)).count(),
        torn: usize::from(!has(&there, None, &moment.open)),
        integrity: get("/api/guestbook/check")?["integrity"].as_str().unwrap_or("nothing").into(),
    })
}

fn has(book: &Value, id: Option<i64>, message: &str) -> bool {
    let same = |entry: &Value| entry["message"] == message && id.is_none_or(|id| entry["id"] == id);
    book.as_array().is_some_and(|entries| entries.iter().any(same))
}

/// What `rows` has kept, by kind, as figures.
pub fn look_for(desk: &Desk) -> Value {
    let read = read_bounded(&desk.state.join(ROWS), MAX_FILE).ok();
    let list: Option<Vec<Value>> = read.and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let by_kind = |row: Value| Some((row["kind"].as_str()?.to_owned(), row));
    list.into_iter().flatten().filter_map(by_kind).collect::<serde_json::Map<_, _>>().into()
}

fn read(path: &Path) -> Result<Visits, Error> {
    let bytes = read_bounded(path, MAX_FILE)?;
    Ok(serde_json::from_slice(&bytes).map_err(std::io::Error::from).at("read", path)?)
}

fn failed(machine: &str, why: impl ToString) -> Error {
    Error::Page { machine: machine.into(), why: why.to_string() }
}

#[cfg(test)]
mod tests {
    use super::super::page::tests::serve;
    use super::*;

    fn answers(bodies: &[&str]) -> Vec<String> {
        bodies.iter().map(|body| format!("HTTP/1.1 201 Made\r\nContent-Length: {}\r\n\r\n{body}", body.len())).collect()
    }

    #[test]
    fn a_ring_that_nobody_awaits_leaves_a_row_that_was_acknowledged() {
        let (port, served) = serve(answers(&[r#"{"id":3,"awaited":false}"#, r#"{"id":4,"awaited":true}"#]));
        let mut visits = Visits::default();
        let open = ring_until_awaited(&mut visits, "anna", port, "crash").unwrap();
        let moment = &visits.moments["crash"];
        assert_eq!((moment.acknowledged, &moment.open), (1, &open));
        assert_eq!(visits.acknowledged.iter().map(|row| row.id).collect::<Vec<_>>(), [3, 4]);
        assert!(served.join().unwrap().iter().all(|request| request.contains(r#""ring":"unsynced""#)));
    }

    #[test]
    fn a_row_counts_as_found_by_its_number_and_its_text() {
        let book = json!([{"id": 1, "message": "Ben was here"}, {"id": 2, "message": "somebody else"}]);
        assert!(has(&book, Some(1), "Ben was here") && has(&book, None, "somebody else"));
        assert!(!has(&book, Some(2), "Cleo was here") && !has(&book, Some(2), "Ben was here"));
        assert!(!has(&json!({"error": "held"}), None, "Ben was here"));
    }
}
