//! Anna's page, and the ports that lead to it.

mod common;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use common::monitor::own_memory;
use common::net::{connect, many_descriptors};
use common::{Machine, http, inside, machine, within};

#[test]
fn the_kitten_page_comes_through_a_forwarded_port() {
    let anna = machine("anna").publish(80).boot();
    each!(anna;
        the_kitten_is_on_the_page, the_status_is_true, ticks_and_visits_count, the_guest_book_takes_text_only,
        work_is_done);
}

fn the_kitten_is_on_the_page(anna: &Machine) {
    let page = anna.get("/");
    assert!(page.text().contains("<svg") && page.text().contains("kitten"), "{page:?}");
    assert!(page.head.contains("text/html"), "{page:?}");
    assert_eq!(anna.get("/no/such/page").status, 404);
}

fn the_status_is_true(anna: &Machine) {
    let status = anna.status();
    assert_eq!(status["cpus"], 1);
    assert_eq!(status["hostname"], "anna");
    assert_eq!(status["boot_id"], anna.boot_id());
    assert_eq!(status["generation"], 0);
    assert_eq!(status["nonce"].as_str().map(str::len), Some(32));
    assert!((200 << 20..256 << 20).contains(&status["memory_bytes"].as_u64().expect("a number")), "{status}");
    assert!((1..600).contains(&status["uptime_seconds"].as_u64().expect("a number")), "{status}");
}

fn ticks_and_visits_count(anna: &Machine) {
    let (ticks, visits, begin) = (anna.status_of("ticks"), anna.status_of("visits"), Instant::now());
    anna.get("/");
    anna.get("/");
    assert_eq!(anna.status_of("visits"), visits + 2);
    within(Duration::from_secs(5), "two ticks", || anna.status_of("ticks") >= ticks + 2);
    assert!(begin.elapsed() >= Duration::from_millis(500), "a tick is half a second");
}

fn the_guest_book_takes_text_only(anna: &Machine) {
    let evil = "name=%3Cb%3EBen&message=%3Cscript%3Ealert(1)%3C/script%3E+%26";
    assert_eq!(http::post(anna.port(80), "/api/guestbook", evil).status, 303);
    let page = anna.get("/");
    assert!(page.text().contains("&lt;script&gt;alert(1)&lt;/script&gt; &amp;"), "{page:?}");
    assert!(!page.text().contains("<script>alert"), "{page:?}");
    assert_eq!(http::post(anna.port(80), "/api/guestbook", "name=&message=").status, 400);
    assert_eq!(http::post(anna.port(80), "/api/guestbook", &"x".repeat(1 << 20)).status, 413);
    // It is in the database on the root disk, and stays there.
    anna.stop();
    anna.start();
    assert_eq!(anna.get("/api/guestbook").json()[0]["name"], "<b>Ben");
}

fn work_is_done(anna: &Machine) {
    assert_eq!(anna.get("/work?n=1000").json()["primes"], 168);
}

const ECHO: u16 = 7000;
const FOUNTAIN: u16 = 7001;
const NOBODY: u16 = 7002;
/// More than all buffers on the way hold together.
const MUCH: usize = 32 << 20;

#[test]
fn forwarded_ports_carry_tcp_as_it_is() {
    if inside::here().is_some() {
        return serve();
    }
    let anna = machine("anna").cpus(2).publish(80).publish(ECHO).publish(FOUNTAIN).publish(NOBODY).boot();
    let serving = anna.other_half_begins("forwarded_ports_carry_tcp_as_it_is", "serve", "serving");
    each!(anna;
        each_direction_ends_by_itself, a_port_without_a_listener_ends_the_connection, a_slow_reader_holds_up_nobody,
        a_thousand_connections_are_open_at_once);
    drop(serving);
}

/// In the guest: a server that answers after the last byte, and one that only ever sends.
fn serve() {
    let [echo, fountain] = [ECHO, FOUNTAIN].map(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).expect("a port"));
    println!("serving");
    thread::spawn(move || {
        let much = Arc::new(pattern(MUCH));
        for stream in fountain.incoming() {
            let (mut stream, much) = (stream.expect("a connection"), much.clone());
            // Most readers go away before the end.
            thread::spawn(move || stream.write_all(&much));
        }
    });
    for stream in echo.incoming() {
        let (mut stream, mut bytes) = (stream.expect("a connection"), Vec::new());
        stream.read_to_end(&mut bytes).expect("bytes");
        let _ = stream.write_all(&bytes);
    }
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at.wrapping_mul(31) >> 7) as u8).collect()
}

fn each_direction_ends_by_itself(anna: &Machine) {
    let (mut stream, bytes, mut back) = (connect(anna.port(ECHO)), pattern(3 << 20), Vec::new());
    stream.write_all(&bytes).expect("bytes sent");
    stream.shutdown(Shutdown::Write).expect("an open connection");
    stream.read_to_end(&mut back).expect("bytes back");
    assert!(back == bytes, "{} bytes came back", back.len());
}

fn a_port_without_a_listener_ends_the_connection(anna: &Machine) {
    let begin = Instant::now();
    let mut stream = connect(anna.port(NOBODY));
    assert!(matches!(stream.read(&mut [0; 10]), Ok(0) | Err(_)));
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
}

fn a_slow_reader_holds_up_nobody(anna: &Machine) {
    let page = || {
        let begin = Instant::now();
        anna.get("/").text();
        begin.elapsed()
    };
    let (before, alone) = (own_memory(anna.pid(), 256), page());
    let slow: Vec<TcpStream> = (0..10).map(|_| connect(anna.port(FOUNTAIN))).collect();
    thread::sleep(Duration::from_secs(2));
    let grown = own_memory(anna.pid(), 256).saturating_sub(before);
    assert!(grown < 8 << 10, "ten slow readers cost the monitor {grown} KiB");
    // As long again as it takes on a host that is slow by itself.
    let (beside, most) = (page(), Duration::from_secs(3) + 4 * alone);
    assert!(beside < most, "the page took {beside:?}, and {alone:?} without them");
    // A slow one that reads on loses nothing; the others go away.
    let mut bytes = Vec::new();
    (&slow[0]).read_to_end(&mut bytes).expect("bytes");
    assert!(bytes == pattern(MUCH), "{} bytes came", bytes.len());
}

fn a_thousand_connections_are_open_at_once(anna: &Machine) {
    many_descriptors();
    let mut streams: Vec<TcpStream> = (0..1000).map(|_| connect(anna.port(80))).collect();
    streams.iter_mut().for_each(|stream| http::ask(stream, "/healthz"));
    for stream in streams {
        assert_eq!(http::answer(stream).text(), "ok\n");
    }
}
