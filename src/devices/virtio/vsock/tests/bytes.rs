//! Bytes that flow, within their credit.

use std::io::{Read, Write};
use std::thread;
use std::time::{Duration, Instant};

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::super::VsockState;
use super::super::packet::{Header, op};
use super::super::testing::{Guest, Peer, RX, RX_BUFFER, SIZE, rx_address};
use super::{listen, pattern, read_exact, tcp_pair};

#[test]
fn the_guest_gets_the_preamble_and_then_what_the_stream_gets() {
    let mut guest = Guest::new();
    let (mut ours, theirs) = tcp_pair();
    ours.write_all(b"GET /").unwrap();
    guest.device.handle().connect(1024, b"hello\n".to_vec(), theirs.into());
    let mut peer = guest.accept(65536);
    assert_eq!(peer.guest, 1024);
    assert_eq!(peer.read(&mut guest, 11), b"hello\nGET /");
    peer.write(&mut guest, b"kittens");
    assert_eq!(read_exact(&mut ours, 7), b"kittens");
    peer.close(&mut guest);
    assert_eq!(ours.read(&mut [0; 1]).unwrap(), 0);
    assert!(guest.interrupts > 0);
}

#[test]
fn the_guest_connects_to_ports_that_the_host_listens_on_and_to_no_others() {
    let mut guest = Guest::new();
    let streams = listen(&guest.device.handle(), 1024);
    let mut peer = guest.connect(5000, 1024, 65536);
    peer.write(&mut guest, b"ready");
    let mut stream = streams.recv().unwrap();
    assert_eq!(read_exact(&mut stream, 5), b"ready");
    stream.write_all(b"good").unwrap();
    assert_eq!(peer.read(&mut guest, 4), b"good");

    let mut refused = Peer { guest: 5001, host: 1025, ..Peer::default() };
    refused.send(&mut guest, op::REQUEST, 0, &[]);
    let (header, _) = guest.expect(op::RST);
    assert!(refused.is_meant(&header));
    assert!(streams.try_recv().is_err());
}

#[test]
fn far_more_than_the_credit_goes_both_ways_at_once_and_unharmed() {
    echo(Guest::new());
}

#[test]
fn a_driver_that_rings_only_where_it_is_asked_to_is_asked_where_it_must_be() {
    echo(Guest::with_event_idx(VsockState::default()));
}

fn echo(mut guest: Guest) {
    const TOTAL: usize = 6 << 20;
    let stream = guest.device.handle().open(7).unwrap();
    let mut peer = guest.accept(20_000);
    let (mut reader, mut writer) = (stream.try_clone().unwrap(), stream);
    let writing = thread::spawn(move || writer.write_all(&pattern(TOTAL)).unwrap());
    let reading = thread::spawn(move || read_exact(&mut reader, TOTAL));

    // An echo that holds at most what it has credit for.
    let (mut held, mut echoed) = (Vec::new(), 0);
    let mut last = Instant::now();
    while echoed < TOTAL {
        assert!(last.elapsed() < Duration::from_secs(20), "it hangs after {echoed} bytes");
        if let Some((header, payload)) = guest.packet_within(Duration::from_millis(1)) {
            peer.hear(&header);
            match header.op {
                op::RW => held.extend(payload),
                op::CREDIT_UPDATE | op::CREDIT_REQUEST => {}
                _ => panic!("{header:?}"),
            }
            assert!(held.len() <= 20_000, "beyond the guest's credit");
        }
        let count = held.len().min(peer.credit());
        if count > 0 {
            let bytes: Vec<u8> = held.drain(..count).collect();
            peer.taken = peer.taken.wrapping_add(count as u32);
            peer.write(&mut guest, &bytes);
            echoed += count;
            last = Instant::now();
        }
    }
    // The device has all of it, and the reader perhaps not yet.
    while !reading.is_finished() {
        assert!(last.elapsed() < Duration::from_secs(20), "the last bytes do not come out");
        guest.turn(Duration::from_millis(1));
    }
    writing.join().unwrap();
    assert!(reading.join().unwrap() == pattern(TOTAL));
}

#[test]
fn a_guest_without_credit_gets_one_request_for_it_and_nothing_else() {
    let mut guest = Guest::new();
    let mut stream = guest.device.handle().open(7).unwrap();
    stream.write_all(&pattern(3000)).unwrap();
    let mut peer = guest.accept(1000);
    assert_eq!(guest.expect(op::RW).1, pattern(3000)[..1000]);
    guest.expect(op::CREDIT_REQUEST);
    guest.expect_silence();
    peer.taken = 1000;
    peer.buf_alloc = 5000;
    peer.send(&mut guest, op::CREDIT_UPDATE, 0, &[]);
    assert_eq!(guest.expect(op::RW).1, pattern(3000)[1000..]);
    peer.send(&mut guest, op::CREDIT_REQUEST, 0, &[]);
    guest.expect(op::CREDIT_UPDATE);
}

#[test]
fn without_receive_buffers_the_worker_sleeps_and_nothing_is_lost() {
    run_out_of_buffers(Guest::new());
    run_out_of_buffers(Guest::with_event_idx(VsockState::default()));
}

fn run_out_of_buffers(mut guest: Guest) {
    let mut stream = guest.device.handle().open(7).unwrap();
    let mut peer = guest.accept(8 << 20);
    let total = SIZE as usize * RX_BUFFER as usize + 50_000;
    let bytes = pattern(total);
    stream.set_nonblocking(true).unwrap();
    let mut written = 0;
    for _ in 0..2000 {
        written += stream.write(&bytes[written..]).unwrap_or(0);
        guest.serve_host(Duration::ZERO);
    }
    assert_eq!(guest.in_flight(RX), 0);
    assert!(!guest.is_woken(Duration::from_millis(50)), "the worker would spin");
    guest.collect();
    let got: usize = guest.inbox.iter().map(|(_, payload)| payload.len()).sum();
    assert_eq!(got, written, "the doorbell was not asked for");
    stream.set_nonblocking(false).unwrap();
    let rest = bytes[written..].to_vec();
    let writing = thread::spawn(move || stream.write_all(&rest).map(|()| stream).unwrap());
    assert!(peer.read(&mut guest, total) == bytes);
    writing.join().unwrap();
}

#[test]
fn packets_are_understood_however_the_driver_cuts_them() {
    let mut guest = Guest::new();
    let streams = listen(&guest.device.handle(), 9);
    let peer = guest.connect(5000, 9, 65536);
    let packet = [&peer.header(op::RW, 0, 100).to_bytes()[..], &pattern(100)].concat();
    for cut in [1, 3, 43, 44, 45, 144] {
        guest.send_cut(&packet, cut);
    }
    let mut stream = streams.recv().unwrap();
    for _ in 0..6 {
        assert_eq!(read_exact(&mut stream, 100), pattern(100));
    }
}

#[test]
fn one_busy_connection_does_not_starve_another() {
    let mut guest = Guest::new();
    let mut busy = guest.device.handle().open(7).unwrap();
    guest.accept(64 << 20);
    let mut calm = guest.device.handle().open(8).unwrap();
    let peer = guest.accept(65536);
    let writing = thread::spawn(move || {
        let bytes = pattern(8 << 20);
        let _ = busy.write_all(&bytes);
    });
    while guest.in_flight(RX) > 0 {
        guest.serve_host(Duration::from_millis(10));
    }
    calm.write_all(b"me too").unwrap();
    guest.serve_host(Duration::from_millis(10));
    let mut others = 0;
    loop {
        let (header, payload) = guest.packet();
        if peer.is_meant(&header) {
            assert_eq!(payload, b"me too");
            break;
        }
        others += 1;
    }
    assert!(others <= SIZE as usize + 1, "{others} packets came first");
    drop(guest);
    writing.join().unwrap();
}

#[test]
fn every_page_that_bytes_were_written_to_is_known_as_changed() {
    let mut guest = Guest::new();
    let mut stream = guest.device.handle().open(7).unwrap();
    guest.accept(65536);
    // The request took the first buffer; this takes the second, and reaches into its last page.
    let last = rx_address(1) as usize + RX_BUFFER as usize - 1;
    let is_dirty = |guest: &Guest, at: usize| guest.mem.iter().next().unwrap().bitmap().dirty_at(at);
    assert!(!is_dirty(&guest, last));
    stream.write_all(&pattern(RX_BUFFER as usize - Header::SIZE)).unwrap();
    guest.expect(op::RW);
    assert!(is_dirty(&guest, last) && !is_dirty(&guest, rx_address(2) as usize + 4096));
}
