//! How connections end: in halves, in good order, and by force.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::thread;
use std::time::{Duration, Instant};

use super::super::connection::CONNECT_TIME;
use super::super::packet::{op, shutdown};
use super::super::testing::Guest;
use super::{assert_is_reset, listen, pattern, read_exact, tcp_pair};
use crate::devices::virtio::VirtioDevice;

#[test]
fn each_side_can_end_its_half_and_go_on_listening() {
    let mut guest = Guest::new();
    let (mut ours, theirs) = tcp_pair();
    guest.device.handle().connect(7, vec![], theirs.into());
    let mut peer = guest.accept(65536);
    ours.write_all(b"request").unwrap();
    ours.shutdown(Shutdown::Write).unwrap();
    assert_eq!(peer.read(&mut guest, 7), b"request");
    assert_eq!(guest.expect(op::SHUTDOWN).0.flags, shutdown::SEND);
    peer.write(&mut guest, b"answer");
    peer.send(&mut guest, op::SHUTDOWN, shutdown::SEND, &[]);
    let mut answer = Vec::new();
    ours.read_to_end(&mut answer).unwrap();
    assert_eq!(answer, b"answer");
    // Both halves are over: the host closes, and the guest agrees.
    assert_eq!(guest.expect(op::SHUTDOWN).0.flags, shutdown::BOTH);
    peer.send(&mut guest, op::RST, 0, &[]);
    guest.expect_silence();
}

#[test]
fn the_guest_can_end_its_half_first() {
    let mut guest = Guest::new();
    let streams = listen(&guest.device.handle(), 9);
    let mut peer = guest.connect(5000, 9, 65536);
    peer.write(&mut guest, b"all");
    peer.send(&mut guest, op::SHUTDOWN, shutdown::SEND, &[]);
    let mut stream = streams.recv().unwrap();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, b"all");
    stream.write_all(b"still here").unwrap();
    assert_eq!(peer.read(&mut guest, 10), b"still here");
    peer.close(&mut guest);
    assert_eq!(stream.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
}

#[test]
fn a_stream_that_reads_no_more_tells_the_guest_and_frees_its_credit() {
    let mut guest = Guest::new();
    let stream = guest.device.handle().open(7).unwrap();
    let mut peer = guest.accept(65536);
    stream.shutdown(Shutdown::Read).unwrap();
    peer.write(&mut guest, b"for nobody");
    assert_eq!(guest.expect(op::SHUTDOWN).0.flags, shutdown::RCV);
    peer.send(&mut guest, op::CREDIT_REQUEST, 0, &[]);
    assert_eq!(guest.expect(op::CREDIT_UPDATE).0.fwd_cnt, 10);
}

#[test]
fn what_was_written_before_a_close_reaches_the_guest() {
    let mut guest = Guest::new();
    let mut stream = guest.device.handle().open(7).unwrap();
    stream.write_all(&pattern(30_000)).unwrap();
    drop(stream);
    let mut peer = guest.accept(65536);
    assert_eq!(peer.read(&mut guest, 30_000), pattern(30_000));
    assert_eq!(guest.expect(op::SHUTDOWN).0.flags & shutdown::SEND, shutdown::SEND);
}

#[test]
fn when_both_sides_close_at_once_neither_waits() {
    let mut guest = Guest::new();
    let stream = guest.device.handle().open(7).unwrap();
    let mut peer = guest.accept(65536);
    drop(stream);
    assert_eq!(guest.expect(op::SHUTDOWN).0.flags, shutdown::BOTH);
    let began = Instant::now();
    peer.write(&mut guest, b"under way");
    peer.close(&mut guest);
    assert!(began.elapsed() < Duration::from_secs(2));
    guest.expect_silence();
}

#[test]
fn a_slow_reader_gets_everything_from_a_guest_that_did_not_wait() {
    let mut guest = Guest::new();
    let (mut ours, theirs) = tcp_pair();
    guest.device.handle().connect(7, vec![], theirs.into());
    let mut peer = guest.accept(65536);
    let mut sent = 0;
    let bytes = pattern(32 << 20);
    loop {
        while let Some((header, _)) = guest.packet_within(Duration::from_millis(20)) {
            peer.hear(&header);
        }
        let count = peer.credit().min(60_000);
        if count == 0 {
            break; // The socket's buffers are full, and ours is too.
        }
        peer.write(&mut guest, &bytes[sent..sent + count]);
        sent += count;
    }
    peer.send(&mut guest, op::SHUTDOWN, shutdown::BOTH, &[]);
    guest.expect_silence();
    peer.send(&mut guest, op::RST, 0, &[]);
    let reading = thread::spawn(move || {
        let mut all = Vec::new();
        ours.read_to_end(&mut all).map(|_| all)
    });
    while !reading.is_finished() {
        guest.turn(Duration::from_millis(10));
    }
    assert!(reading.join().unwrap().unwrap() == bytes[..sent]);
}

#[test]
fn a_reset_on_one_side_is_a_reset_on_the_other() {
    let mut guest = Guest::new();
    let handle = guest.device.handle();
    let (ours, theirs) = tcp_pair();
    handle.connect(7, vec![], theirs.into());
    guest.accept(65536).send(&mut guest, op::RST, 0, &[]);
    assert_is_reset(ours);

    // A TCP socket that is closed with bytes unread is reset.
    let (ours, theirs) = tcp_pair();
    handle.connect(7, vec![], theirs.into());
    let mut peer = guest.accept(65536);
    peer.write(&mut guest, b"unread");
    while ours.peek(&mut [0; 6]).unwrap() < 6 {}
    drop(ours);
    let (header, _) = guest.expect(op::RST);
    assert!(peer.is_meant(&header));
}

#[test]
fn a_refusal_resets_the_stream_and_so_does_a_guest_without_a_driver() {
    let mut guest = Guest::new();
    let handle = guest.device.handle();
    let (ours, theirs) = tcp_pair();
    handle.connect(7, b"never read".to_vec(), theirs.into());
    let (request, _) = guest.expect(op::REQUEST);
    guest.send(&request.refusal(), &[]);
    assert_is_reset(ours);

    // It goes away before it was asked, and then it is not there.
    let (ours, theirs) = tcp_pair();
    handle.connect(7, vec![], theirs.into());
    guest.device.reset();
    assert_is_reset(ours);
    let (ours, theirs) = tcp_pair();
    handle.connect(7, vec![], theirs.into());
    assert_is_reset(ours);
}

#[test]
fn a_guest_that_has_ended_ends_all_streams() {
    let mut guest = Guest::new();
    let handle = guest.device.handle();
    let (mut ours, theirs) = tcp_pair();
    handle.connect(7, vec![], theirs.into());
    guest.expect(op::REQUEST);
    handle.hang_up();
    let (asked_later, theirs) = tcp_pair();
    handle.connect(7, vec![], theirs.into());
    guest.serve_host(Duration::from_secs(1));
    assert_eq!(ours.read(&mut [0; 1]).unwrap_or(0), 0);
    assert_is_reset(asked_later);
}

#[test]
fn a_guest_that_does_not_answer_is_given_up() {
    let mut guest = Guest::new();
    let (ours, theirs) = tcp_pair();
    guest.device.handle().connect(7, vec![], theirs.into());
    let (request, _) = guest.expect(op::REQUEST);
    let began = Instant::now();
    let (header, _) = guest.packet_within(CONNECT_TIME + Duration::from_secs(10)).expect("an end");
    assert_eq!(header.op, op::RST);
    let after = began.elapsed().saturating_sub(CONNECT_TIME - Duration::from_secs(1));
    assert!((Duration::from_millis(1)..Duration::from_secs(3)).contains(&after), "{after:?}");
    assert_eq!(header.dst_port, request.dst_port);
    assert_is_reset(ours);
    assert!(!guest.is_woken(Duration::from_millis(600)), "the timer runs for nothing");
}

#[test]
fn a_new_driver_finds_no_old_connections() {
    let mut guest = Guest::new();
    let streams = listen(&guest.device.handle(), 9);
    let mut peer = guest.connect(5000, 9, 65536);
    guest.device.reset();
    let mut stream = streams.recv().unwrap();
    assert_eq!(stream.read(&mut [0; 1]).unwrap_or(0), 0);
    guest.start();
    peer.write(&mut guest, b"lost");
    guest.expect(op::RST);
    guest.connect(5000, 9, 65536).write(&mut guest, b"found");
    assert_eq!(read_exact(&mut streams.recv().unwrap(), 5), b"found");
    assert!(guest.events.is_empty());
}
