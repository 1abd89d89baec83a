//! The dashboard's server: who is let in, what is told, and what it costs. No browser is needed here, and no guest
//! but one of ten instructions.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Child, Stdio};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use super::house::{House, soon};
use super::monitor::{code, elf, kvm_is_there, monitor};

/// A dashboard at work, ended at the end.
struct Dashboard {
    child: Child,
    port: u16,
    token: String,
}

/// An answer.
#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Dashboard {
    fn of(house: &House) -> Dashboard {
        let mut child = house.program().args(["dashboard", "--json"]).stdout(Stdio::piped()).spawn().unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut text = String::new();
        while !text.ends_with("}\n") {
            assert!(out.read_line(&mut text).unwrap() > 0, "{text}");
        }
        let said: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(said["pid"], child.id());
        let (address, port) = (said["address"].as_str().unwrap(), said["port"].as_u64().unwrap());
        let token = address.strip_prefix(&format!("http://127.0.0.1:{port}/")).unwrap().trim_end_matches('/');
        assert_eq!(token.len(), 32);
        Dashboard { port: port as u16, token: token.to_owned(), child }
    }

    /// Sends a request with these lines in its head.
    fn send(&self, method: &str, path: &str, lines: &[&str], body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let lines: String = lines.iter().map(|line| format!("{line}\r\n")).collect();
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\n{lines}Connection: close\r\nContent-Length: {length}\r\n\r\n{body}"
        )
        .unwrap();
        stream
    }

    fn ask(&self, method: &str, path: &str, lines: &[&str], body: &str) -> Answer {
        let mut text = Vec::new();
        self.send(method, path, lines, body).read_to_end(&mut text).unwrap();
        let text = String::from_utf8_lossy(&text).into_owned();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{text}"));
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Answer { status, head: head.to_ascii_lowercase(), body: body.into() }
    }

    /// Asks as the page itself would.
    fn get(&self, path: &str) -> Answer {
        self.ask("GET", &format!("/{}/{path}", self.token), &[&self.host()], "")
    }

    fn post(&self, path: &str, body: &Value) -> Answer {
        let lines = [&self.host()[..], "Content-Type: application/json"];
        self.ask("POST", &format!("/{}/{path}", self.token), &lines, &body.to_string())
    }

    fn host(&self) -> String {
        format!("Host: 127.0.0.1:{}", self.port)
    }

    /// The stream of events, behind its head.
    fn events(&self) -> BufReader<TcpStream> {
        let mut events = BufReader::new(self.send("GET", &format!("/{}/api/events", self.token), &[&self.host()], ""));
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert!(events.read_line(&mut head).unwrap() > 0, "{head}");
        }
        assert!(head.starts_with("HTTP/1.1 200") && head.contains("text/event-stream"), "{head}");
        events
    }

    fn run(&self, line: &str) -> Answer {
        self.post("api/run", &json!({ "words": line.split(' ').collect::<Vec<_>>() }))
    }
}

impl Drop for Dashboard {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the next event holds.
fn next(events: &mut impl BufRead) -> Value {
    loop {
        let mut line = String::new();
        assert!(events.read_line(&mut line).unwrap() > 0, "the stream ended");
        if let Some(text) = line.strip_prefix("data: ") {
            return serde_json::from_str(text).unwrap();
        }
    }
}

/// The first event of which something is true.
#[track_caller]
fn until(events: &mut impl BufRead, what: impl Fn(&Value) -> bool) -> Value {
    let mut seen = Value::Null;
    for _ in 0..60 {
        seen = next(events);
        if what(&seen) {
            return seen;
        }
    }
    panic!("{seen:#}");
}

fn machine<'a>(shown: &'a Value, name: &str) -> &'a Value {
    shown["machines"].as_array().unwrap().iter().find(|machine| machine["name"] == name).unwrap_or(&Value::Null)
}

#[test]
fn only_who_has_the_whole_address_comes_in_and_from_nowhere_else() {
    let house = House::new();
    let dashboard = Dashboard::of(&house);
    let (host, own) = (dashboard.host(), format!("Origin: http://127.0.0.1:{}", dashboard.port));
    let refused = |path: &str, lines: &[&str]| {
        for method in ["GET", "POST"] {
            let lines: Vec<&str> = lines.iter().copied().chain(["Content-Type: application/json"]).collect();
            let answer = dashboard.ask(method, path, &lines, r#"{"words": ["rm", "anna"]}"#);
            assert_eq!(answer.status, 403, "{method} {path} {lines:?}: {answer:?}");
            assert!(!answer.body.contains(&dashboard.token), "{answer:?}");
        }
    };
    let paths = ["", "app.js", "api/events", "api/run", "api/tree", "api/page/anna", "api/memory/anna", "nothing"];
    let wrong = "0".repeat(32);
    for path in paths {
        let there = format!("/{}/{path}", dashboard.token);
        for token in ["", &wrong, &dashboard.token[1..], &dashboard.token.to_uppercase()] {
            refused(&format!("/{token}/{path}"), &[&host]);
        }
        refused(&there, &["Host: evil.example"]);
        refused(&there, &[&format!("Host: evil.example:{}", dashboard.port)]);
        refused(&there, &[&host, "Origin: http://evil.example"]);
        refused(&there, &[&host, "Origin: null"]);
        refused(&there, &[&host, "Origin: http://127.0.0.1:1"]);
        refused(&there, &[&host, "Sec-Fetch-Site: cross-site"]);
        refused(&there, &[&host, "Sec-Fetch-Site: same-site", &own]);
    }
    for path in ["/", "/favicon.ico", "/page/", "/page/x/anna/", &format!("/page/{}/anna/", dashboard.token)] {
        refused(path, &[&host]);
    }
    // The page itself, a person who types the address, and a browser behind a forwarded port.
    let page = format!("/{}/", dashboard.token);
    for lines in [
        &[&host[..], "Sec-Fetch-Site: none"][..],
        &[&host, &own, "Sec-Fetch-Site: same-origin"],
        &["Host: localhost:22930", "Origin: http://localhost:22930"],
    ] {
        let answer = dashboard.ask("GET", &page, lines, "");
        assert_eq!(answer.status, 200, "{answer:?}");
        assert!(answer.body.contains("<title>Catnap</title>"), "{answer:?}");
    }
}

#[test]
fn the_page_needs_nothing_from_elsewhere_and_says_so_to_the_browser() {
    let house = House::new();
    let dashboard = Dashboard::of(&house);
    for path in ["", "style.css", "app.js", "charts.js", "icon.svg"] {
        let answer = dashboard.get(path);
        assert_eq!(answer.status, 200, "{path}");
        let text = answer.body.replace("http://www.w3.org/2000/svg", "");
        assert!(!text.contains("http://") && !text.contains("https://") && !text.contains("//cdn"), "{path}");
        for line in [
            "content-security-policy: default-src 'none'; script-src 'self'",
            "frame-ancestors 'none'",
            "x-frame-options: deny",
            "x-content-type-options: nosniff",
            "referrer-policy: no-referrer",
            "cache-control: no-store",
        ] {
            assert!(answer.head.contains(line), "{path}: {line}: {}", answer.head);
        }
    }
    assert_eq!(dashboard.get("api/nothing").status, 404);
    assert_eq!(dashboard.get("api/memory/../x").status, 404);
    assert_eq!(dashboard.get("api/memory/nobody").status, 404);
    assert_eq!(dashboard.get("api/snapshot/nobody").status, 404);
}

#[test]
fn each_event_holds_everything_and_a_slow_reader_holds_up_nobody() {
    let house = House::new();
    let dashboard = Dashboard::of(&house);
    let mut events = dashboard.events();
    let shown = next(&mut events);
    assert_eq!((&shown["machines"], &shown["jobs"], &shown["rows"]), (&json!([]), &json!([]), &json!([])));

    // A machine that is made meanwhile, and rows that the lesson writes.
    house.machine("anna", b"#!/bin/sh\n");
    let rows = json!([{ "kind": "crash", "acknowledged": 12, "found": 11, "torn": 0 }]);
    let lesson = house.path().join("state/lesson");
    fs::create_dir_all(&lesson).unwrap();
    fs::write(lesson.join("rows.json"), rows.to_string()).unwrap();
    let shown = until(&mut events, |shown| machine(shown, "anna")["state"] == "stopped" && shown["rows"] == rows);
    assert!(machine(&shown, "anna")["monitor"].is_null());
    let tree: Value = serde_json::from_str(&dashboard.get("api/tree").body).unwrap();
    assert_eq!(tree, serde_json::from_str::<Value>(&house.catnap("snapshot tree --json").out).unwrap());
    assert_eq!(tree[1]["machine"]["name"], "anna");
    let inspected: Value = serde_json::from_str(&dashboard.get("api/snapshot/empty").body).unwrap();
    assert_eq!(inspected["manifest"]["kind"], "clean");

    // As many as are let in, of whom all but one never read.
    let slow: Vec<_> = (0..31).map(|_| dashboard.events()).collect();
    let late = dashboard.get("api/events");
    assert_eq!(late.status, 409, "{late:?}");
    let (before, begun) = (next(&mut events), std::time::Instant::now());
    for _ in 0..6 {
        next(&mut events);
    }
    let after = next(&mut events);
    let passed = (after["now_us"].as_u64().unwrap() - before["now_us"].as_u64().unwrap()) as f64 / 1e6;
    assert!(passed < begun.elapsed().as_secs_f64() + 1.0, "events that are old: {passed} s");
    drop(slow);
    soon(|| dashboard.get_status("api/events") == 200);
    // When nobody looks any more, and somebody does again.
    drop(events);
    thread::sleep(Duration::from_millis(1200));
    assert_eq!(machine(&next(&mut dashboard.events()), "anna")["state"], "stopped");
}

impl Dashboard {
    /// The status alone, for what has no end.
    fn get_status(&self, path: &str) -> u16 {
        let mut stream = self.send("GET", &format!("/{}/{path}", self.token), &[&self.host()], "");
        let mut status = [0; 12];
        stream.read_exact(&mut status).unwrap();
        std::str::from_utf8(&status[9..]).unwrap().parse().unwrap()
    }
}

#[test]
fn a_button_runs_the_program_with_the_words_that_it_shows_and_tells_what_came_of_it() {
    let house = House::new();
    house.machine("anna", b"#!/bin/sh\n");
    let dashboard = Dashboard::of(&house);
    let mut events = dashboard.events();
    for line in ["monitor anna", "exec anna -- sh", "run kitten --kernel /etc/passwd", "snapshot export anna@a /tmp/x"]
    {
        let answer = dashboard.run(line);
        assert_eq!(answer.status, 400, "{line}: {answer:?}");
    }
    assert_eq!(dashboard.post("api/run", &json!({ "words": [] })).status, 400);
    assert_eq!(dashboard.post("api/run", &json!({ "words": ["start", "anna"], "more": 1 })).status, 400);
    let form = ["Content-Type: application/x-www-form-urlencoded"];
    let lines = [&dashboard.host()[..], form[0]];
    let path = format!("/{}/api/run", dashboard.token);
    assert_eq!(dashboard.ask("POST", &path, &lines, r#"{"words": ["rm", "anna"]}"#).status, 400);
    let long = format!(r#"{{"words": ["{}"]}}"#, "x".repeat(70 << 10));
    let lines = [&dashboard.host()[..], "Content-Type: application/json"];
    assert_eq!(dashboard.ask("POST", &path, &lines, &long).status, 400);

    let answer = dashboard.run("snapshot verify nobody@monday");
    assert_eq!((answer.status, answer.body.as_str()), (202, r#"{"id":1}"#));
    let shown = until(&mut events, |shown| shown["jobs"][0]["code"].is_i64());
    let job = &shown["jobs"][0];
    assert_eq!((&job["code"], &job["words"]), (&json!(3), &json!(["snapshot", "verify", "nobody@monday"])));
    assert!(job["output"].as_str().unwrap().starts_with("error: "), "{job}");
    assert!(job["ended_us"].as_u64() >= job["begun_us"].as_u64());
    assert_eq!(dashboard.run("rm anna").status, 202);
    until(&mut events, |shown| shown["machines"] == json!([]) && shown["jobs"][0]["code"] == 0);
}

#[test]
fn a_monitor_that_dies_is_shown_dead_and_its_memory_is_shown_before() {
    if !kvm_is_there() {
        return;
    }
    let house = House::new();
    house.machine("anna", &elf(&code(b"miau\n")));
    let dashboard = Dashboard::of(&house);
    let mut events = dashboard.events();
    let (mut child, _) = monitor(&house);
    let shown = until(&mut events, |shown| machine(shown, "anna")["state"] == "running");
    assert_eq!(machine(&shown, "anna")["kitten"], Value::Null, "nobody answers behind its port");
    until(&mut events, |shown| machine(shown, "anna")["share"]["resident"].as_u64().is_some_and(|bytes| bytes > 0));
    let map: Value = serde_json::from_str(&dashboard.get("api/memory/anna").body).unwrap();
    let pages: u64 = map["cells"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|cell| cell.as_array().unwrap())
        .map(|n| n.as_u64().unwrap())
        .sum();
    assert_eq!((pages, &map["page"], &map["since_snapshot"]), (64 << 20 >> 12, &json!(4096), &json!(false)));
    assert_eq!(dashboard.run("pause anna").status, 202);
    until(&mut events, |shown| machine(shown, "anna")["state"] == "paused");
    // Stopped, it does not answer; killed, it is dead.
    let pid = child.id() as i32;
    // SAFETY: signals to our own child, which has not been waited for.
    unsafe { libc::kill(pid, libc::SIGSTOP) };
    until(&mut events, |shown| machine(shown, "anna")["state"] == "busy");
    child.kill().unwrap();
    child.wait().unwrap();
    let shown = until(&mut events, |shown| machine(shown, "anna")["state"] == "died");
    assert_eq!(machine(&shown, "anna")["share"], Value::Null);
    assert_eq!(dashboard.get("api/memory/anna").status, 409);
}

#[test]
fn a_machines_page_is_shown_without_its_own_headers_and_without_an_origin() {
    let house = House::new();
    let port = house.machine("anna", b"#!/bin/sh\n").spec.forwards[0].host;
    let served = TcpListener::bind(("127.0.0.1", port)).unwrap();
    let dashboard = Dashboard::of(&house);
    let page: Value = serde_json::from_str(&dashboard.get("api/page/anna").body).unwrap();
    let root = page["root"].as_str().unwrap().to_owned();
    assert!(!root.contains(&dashboard.token));
    thread::spawn(move || {
        for stream in served.incoming() {
            let (mut stream, mut bytes) = (stream.unwrap(), [0; 4096]);
            let count = stream.read(&mut bytes).unwrap();
            let asked = String::from_utf8_lossy(&bytes[..count]).into_owned();
            let answer = match asked.split(' ').nth(1).unwrap() {
                "/" => "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nSet-Cookie: a=b\r\nContent-Security-Policy: x\r\n\r\n<svg>".into(),
                "/big" => format!("HTTP/1.1 200 OK\r\n\r\n{}", "x".repeat(2 << 20)),
                "/odd" => "meow".into(),
                "/away" => "HTTP/1.1 303 See\r\nLocation: http://evil.example/\r\n\r\n".into(),
                "/api/guestbook" => "HTTP/1.1 303 See\r\nLocation: /#guestbook\r\n\r\n".into(),
                _ => format!("HTTP/1.1 200 OK\r\n\r\n{asked}"),
            };
            let _ = stream.write_all(answer.as_bytes());
            // What is not read when a connection closes resets it, and may take the answer along.
            let _ = stream.shutdown(Shutdown::Write);
            let _ = stream.read_to_end(&mut Vec::new());
        }
    });
    // A frame without an origin looks like a stranger to the browser: the key tells who may ask.
    let stranger = [&dashboard.host()[..], "Origin: null", "Sec-Fetch-Site: cross-site"];
    let ask = |method: &str, path: &str| dashboard.ask(method, &format!("{root}{path}"), &stranger, "name=Ben");
    let page = ask("GET", "");
    assert_eq!((page.status, page.body.as_str()), (200, "<svg>"));
    assert!(
        page.head.contains("content-security-policy: sandbox allow-scripts allow-forms; default-src 'self'"),
        "{page:?}"
    );
    assert!(!page.head.contains("set-cookie") && page.head.contains("access-control-allow-origin: *"), "{page:?}");
    let echo = ask("GET", "echo?n=7");
    assert!(echo.body.starts_with("GET /echo?n=7 HTTP/1.0\r\n"), "{echo:?}");
    assert!(!echo.body.contains(&dashboard.token) && !echo.body.contains("null"), "{echo:?}");
    let written = ask("POST", "api/guestbook");
    assert_eq!(written.status, 303);
    assert!(written.head.contains(&format!("location: {root}#guestbook")), "{written:?}");
    assert!(!ask("GET", "away").head.contains("location"));
    assert_eq!((ask("GET", "big").status, ask("GET", "odd").status), (502, 502));
    assert_eq!((ask("POST", "").status, ask("DELETE", "").status), (405, 405));
    assert_eq!(ask("GET", &"x".repeat(2000)).status, 400);
    // The key opens pages and nothing else, and only under a loopback name.
    let key = root.split('/').nth(2).unwrap();
    assert_eq!(dashboard.ask("GET", &format!("/{key}/api/tree"), &[&dashboard.host()], "").status, 403);
    assert_eq!(dashboard.ask("GET", &root, &["Host: evil.example"], "").status, 403);
    // Nor does it open another machine's: what a guest serves may look at its own address.
    assert_eq!(dashboard.ask("GET", &root.replace("anna", "bella"), &stranger, "").status, 403);
    let nobody: Value = serde_json::from_str(&dashboard.get("api/page/nobody").body).unwrap();
    assert_eq!(dashboard.ask("GET", nobody["root"].as_str().unwrap(), &stranger, "").status, 404);
}

#[test]
fn it_ends_in_good_order_when_it_is_asked_to() {
    let house = House::new();
    for signal in [libc::SIGINT, libc::SIGTERM] {
        let mut dashboard = Dashboard::of(&house);
        let mut events = dashboard.events();
        next(&mut events);
        // SAFETY: a signal to our own child, which has not been waited for.
        unsafe { libc::kill(dashboard.child.id() as i32, signal) };
        assert_eq!(dashboard.child.wait().unwrap().code(), Some(0));
    }
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    house.catnap(&format!("dashboard --port {port}")).refuses(1, &format!("port {port} of this host"));
}
