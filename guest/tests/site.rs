//! The kitten site as browsers, and worse, meet it.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use catnap_guest::site::Site;
use catnap_guest::site::book::{GuestBook, Place};
use catnap_guest::socket::Address;
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(60);

/// A site in a folder of its own.
struct Fixture {
    at: SocketAddr,
    folder: PathBuf,
    book: Arc<GuestBook>,
}

impl Fixture {
    fn new() -> Fixture {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("catnap-site-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        Fixture::over(folder)
    }

    fn over(folder: PathBuf) -> Fixture {
        let (book, generation) = (Arc::new(GuestBook::default()), Arc::new(AtomicU64::new(0)));
        let site = Site::with_files(book.clone(), generation, folder.join("kitten.conf"), "/proc/notes.txt".into());
        site.open_book(folder.clone());
        let port = site.serve(Address::Tcp(([127, 0, 0, 1], 0).into())).unwrap();
        Fixture { at: ([127, 0, 0, 1], port).into(), folder, book }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.at).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Sends bytes as they are, and returns everything until the server closes.
    fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        let _ = stream.write_all(bytes);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    fn get(&self, path: &str) -> String {
        self.raw(format!("GET {path} HTTP/1.1\r\nConnection: close\r\n\r\n").as_bytes())
    }

    fn post(&self, kind: &str, body: &str) -> String {
        let length = body.len();
        self.raw(
            format!(
                "POST /api/guestbook HTTP/1.1\r\nConnection: close\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n{body}"
            )
            .as_bytes(),
        )
    }

    fn status(&self) -> Value {
        serde_json::from_str(body(&self.get("/api/status"))).unwrap()
    }

    fn entries(&self) -> Vec<Value> {
        serde_json::from_str(body(&self.get("/api/guestbook"))).unwrap()
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.book.close();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

const FORM: &str = "application/x-www-form-urlencoded";
const JSON: &str = "application/json";

fn body(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").expect("an answer has a head").1
}

#[test]
fn the_page_counts_visits_and_carries_its_headers() {
    let site = Fixture::new();
    let first = site.get("/");
    assert!(first.starts_with("HTTP/1.1 200 OK\r\n"));
    for needed in
        ["Content-Security-Policy: default-src 'none'", "X-Content-Type-Options: nosniff", "text/html; charset=utf-8"]
    {
        assert!(first.contains(needed), "{needed}");
    }
    site.get("/");
    let head = site.raw(b"HEAD / HTTP/1.1\r\nConnection: close\r\n\r\n");
    assert!(head.starts_with("HTTP/1.1 200") && body(&head).is_empty());
    assert_eq!(site.status()["visits"], 2, "a HEAD is no visit");
}

#[test]
fn the_status_ticks_twice_a_second_and_keeps_its_nonce() {
    let site = Fixture::new();
    let (first, start) = (site.status(), Instant::now());
    for key in
        ["cpus", "memory_bytes", "uptime_seconds", "boot_id", "nonce", "ticks", "generation", "visits", "hostname"]
    {
        assert!(!first[key].is_null(), "{key}");
    }
    assert_eq!(first["nonce"].as_str().unwrap().len(), 32);
    let ticks = |status: &Value| status["ticks"].as_u64().unwrap();
    while ticks(&site.status()) < ticks(&first) + 3 {
        assert!(start.elapsed() < PATIENCE);
        thread::sleep(Duration::from_millis(10));
    }
    assert!(start.elapsed() >= Duration::from_millis(1000), "three ticks are at least two whole pauses apart");
    let last = site.status();
    assert_eq!(first["nonce"], last["nonce"]);
    assert_ne!(first["nonce"], Fixture::new().status()["nonce"]);
}

#[test]
fn the_guest_book_takes_forms_and_json_and_shows_them_as_text() {
    let site = Fixture::new();
    let answer = site.post(FORM, "name=Anna&message=%3Cscript%3Ealert(1)%3C%2Fscript%3E+%26+purr");
    assert!(answer.starts_with("HTTP/1.1 303") && answer.contains("Location: /#guestbook"));
    let json = json!({ "name": "Ben \"<b>\"", "message": "second" }).to_string();
    assert!(site.post(JSON, &json).starts_with("HTTP/1.1 201"));
    let page = site.get("/");
    assert!(page.contains("&lt;script&gt;alert(1)&lt;/script&gt; &amp; purr") && !page.contains("<script>alert"));
    let entries = site.entries();
    assert_eq!(
        (&entries[0]["name"], &entries[1]["message"]),
        (&json!("Ben \"<b>\""), &json!("<script>alert(1)</script> & purr"))
    );
    assert_eq!(site.status()["guestbook_entries"], 2);
}

#[test]
fn entries_out_of_bounds_are_refused_and_the_last_fifty_are_shown() {
    let site = Fixture::new();
    for (kind, body, status) in [
        (FORM, "name=Anna&message=+".to_string(), 400),
        (FORM, "message=hello".to_string(), 400),
        (FORM, format!("name={}&message=x", "x".repeat(41)), 400),
        (FORM, format!("name=x&message={}", "x".repeat(401)), 400),
        (JSON, "{\"name\":7}".to_string(), 400),
        ("text/plain", "name=x&message=x".to_string(), 415),
    ] {
        assert!(site.post(kind, &body).starts_with(&format!("HTTP/1.1 {status}")), "{body}");
    }
    let foreign =
        "POST /api/guestbook HTTP/1.1\r\nSec-Fetch-Site: cross-site\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
    assert!(site.raw(foreign.as_bytes()).starts_with("HTTP/1.1 403"));
    for number in 0..55 {
        site.book.write("Anna", &format!("number {number}")).unwrap();
    }
    let entries = site.entries();
    assert_eq!((entries.len(), &entries[0]["message"]), (50, &json!("number 54")));
    assert_eq!(site.status()["guestbook_entries"], 55);
}

#[test]
fn a_writer_may_ring_on_the_way_and_goes_on_where_nobody_answers() {
    let site = Fixture::new();
    for (number, place) in ["before-commit", "after-commit", "unsynced"].into_iter().enumerate() {
        let entry = json!({"name": "Anna", "message": place, "ring": place}).to_string();
        let answer = site.post(JSON, &entry);
        assert!(answer.starts_with("HTTP/1.1 201") && answer.contains(r#""awaited":false"#), "{answer}");
        let found = site.book.check().unwrap();
        assert_eq!((found.integrity.as_str(), found.entries, found.last), ("ok", number as i64 + 1, number as i64 + 1));
    }
    // At the stop before the commit, another reader does not see the row yet; at the others it does.
    for (place, seen) in [(Place::BeforeCommit, 3), (Place::AfterCommit, 5), (Place::Unsynced, 6)] {
        let file = site.folder.join("guestbook.sqlite");
        let count = move || {
            let reader = rusqlite::Connection::open(&file).unwrap();
            let rows: i64 = reader.query_row("SELECT count(*) FROM guestbook", [], |row| row.get(0)).unwrap();
            assert_eq!(rows, seen, "{place:?}");
        };
        site.book.write_with_stop("Anna", "stop", Some((place, &count))).unwrap();
    }
}

#[test]
fn the_guest_book_outlives_its_site_and_can_be_held_still() {
    let site = Fixture::new();
    site.post(FORM, "name=Anna&message=kept");
    site.book.hold().unwrap();
    let wal = std::fs::metadata(site.folder.join("guestbook.sqlite-wal")).unwrap();
    assert_eq!(wal.len(), 0, "everything is in the main file");
    let held = site.post(FORM, "name=Anna&message=not+now");
    assert!(held.starts_with("HTTP/1.1 503") && held.contains("Retry-After"));
    assert!(site.get("/").contains("kept"), "the page is shown all the same");
    // The main file alone is the whole book.
    let copy = site.folder.join("copy.sqlite");
    std::fs::copy(site.folder.join("guestbook.sqlite"), &copy).unwrap();
    let copy = rusqlite::Connection::open(copy).unwrap();
    let (count, check): (i64, String) = copy
        .query_row("SELECT count(*), (SELECT * FROM pragma_integrity_check) FROM guestbook", [], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })
        .unwrap();
    assert_eq!((count, check.as_str()), (1, "ok"));
    site.book.release();
    assert!(site.post(FORM, "name=Anna&message=now").starts_with("HTTP/1.1 303"));

    assert_eq!((site.book.raise_generation(5).unwrap(), site.book.raise_generation(0).unwrap()), (5, 6));
    site.book.close();
    assert!(site.post(FORM, "name=Anna&message=late").starts_with("HTTP/1.1 503"));
    let again = Fixture::over(site.folder.clone());
    assert_eq!(again.entries().len(), 2);
    assert_eq!(again.status()["generation"], 6);
}

#[test]
fn what_another_program_writes_into_the_book_is_shown() {
    let site = Fixture::new();
    site.post(FORM, "name=Anna&message=one");
    let other = rusqlite::Connection::open(site.folder.join("guestbook.sqlite")).unwrap();
    other.execute("INSERT INTO guestbook (written, name, message) VALUES (0, 'shell', 'two')", []).unwrap();
    assert_eq!(site.entries()[0]["message"], "two");
}

#[test]
fn settings_change_the_coat_at_once() {
    let site = Fixture::new();
    assert!(site.get("/").contains("class=\"ginger\""));
    std::fs::write(site.folder.join("kitten.conf"), "colour=grey\ntitle=Ben's <kitten>\n").unwrap();
    let page = site.get("/");
    assert!(page.contains("class=\"grey\"") && page.contains("Ben&#39;s &lt;kitten&gt;"));
}

#[test]
fn one_connection_serves_many_requests_also_in_one_packet() {
    let site = Fixture::new();
    let mut stream = site.connect();
    let one = "GET /healthz HTTP/1.1\r\n\r\n".repeat(100) + "GET /work?n=10 HTTP/1.1\r\nConnection: close\r\n\r\n";
    stream.write_all(one.as_bytes()).unwrap();
    let mut answers = String::new();
    stream.read_to_string(&mut answers).unwrap();
    assert_eq!(answers.matches("HTTP/1.1 200 OK").count(), 101);
    assert!(answers.ends_with("{\"n\":10,\"primes\":4}"));
}

#[test]
fn a_client_that_ends_its_side_early_still_gets_its_answer() {
    let site = Fixture::new();
    let mut stream = site.connect();
    stream.write_all(b"GET /work HTTP/1.1\r\n\r\n").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.ends_with("\"primes\":9592}"));
}

#[test]
fn what_is_no_proper_request_is_answered_and_closed() {
    let site = Fixture::new();
    let long = format!("GET / HTTP/1.1\r\nA: {}\r\n\r\n", "x".repeat(20 << 10));
    for (bytes, status) in [
        (&b"nonsense\r\n\r\n"[..], 400),
        (b"\x16\x03\x01\x02\x00\x01", 400),
        (long.as_bytes(), 431),
        (b"POST /api/guestbook HTTP/1.1\r\nContent-Length: 65537\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 501),
        (b"GET /no/such/page HTTP/1.0\r\n\r\n", 404),
        (b"DELETE / HTTP/1.0\r\n\r\n", 405),
        (b"PUT /api/status HTTP/1.0\r\n\r\n", 405),
        (b"GET /work?n=99999999 HTTP/1.0\r\n\r\n", 400),
        (b"GET /work?n=-1 HTTP/1.0\r\n\r\n", 400),
    ] {
        let answer = site.raw(bytes);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{status}: {answer}");
    }
}

#[test]
fn a_body_comes_after_the_invitation() {
    let site = Fixture::new();
    let mut stream = site.connect();
    let body = "name=Anna&message=polite";
    let head = format!(
        "POST /api/guestbook HTTP/1.1\r\nExpect: 100-continue\r\nConnection: close\r\nContent-Type: {FORM}\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    let mut invitation = [0; 25];
    stream.read_exact(&mut invitation).unwrap();
    assert_eq!(&invitation, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(body.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 303"));
}

#[test]
fn hundreds_of_slow_and_idle_visitors_do_not_disturb_the_others() {
    let site = Fixture::new();
    let idle: Vec<TcpStream> = (0..300).map(|_| site.connect()).collect();
    let slow: Vec<TcpStream> = (0..300)
        .map(|_| {
            let mut stream = site.connect();
            stream.write_all(b"GET / HTTP/1.1\r\nX: ").unwrap();
            stream
        })
        .collect();
    // These ask for pages and do not read them.
    let deaf: Vec<TcpStream> = (0..50)
        .map(|_| {
            let mut stream = site.connect();
            stream.write_all(&b"GET / HTTP/1.1\r\n\r\n".repeat(200)).unwrap();
            stream
        })
        .collect();
    let start = Instant::now();
    for _ in 0..20 {
        assert!(site.get("/healthz").ends_with("ok\n"));
    }
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    drop((idle, slow, deaf));
    assert!(site.get("/").starts_with("HTTP/1.1 200"));
}

#[test]
fn a_request_that_never_ends_is_closed_on() {
    let site = Fixture::new();
    let mut stream = site.connect();
    stream.write_all(b"GET / HTTP/1.1\r\n").unwrap();
    let start = Instant::now();
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    assert!((8..40).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
}

#[test]
fn a_book_that_cannot_be_opened_is_said_to_be_so() {
    let site = Fixture::new();
    assert!(site.entries().is_empty());
    site.book.close();
    std::fs::write(site.folder.join("guestbook.sqlite"), "this is no database, and long enough to be looked at")
        .unwrap();
    let broken = Fixture::over(site.folder.clone());
    assert!(broken.get("/").contains("the guest book cannot be used"));
    assert!(broken.get("/api/guestbook").starts_with("HTTP/1.1 503"));
    assert!(broken.post(FORM, "name=Anna&message=hello").starts_with("HTTP/1.1 503"));
}
