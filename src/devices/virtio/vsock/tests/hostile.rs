//! Guests that break the rules.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};

use super::super::packet::{Header, STREAM, op};
use super::super::testing::{Guest, MEMORY, Peer, RX, SIZE, TX};
use super::listen;
use crate::devices::virtio::VirtioDevice;

#[test]
fn a_guest_that_sends_beyond_its_credit_is_reset() {
    let mut guest = Guest::new();
    let mut stream = guest.device.handle().open(7).unwrap();
    let mut peer = guest.accept(65536);
    let mut sent = 0;
    // The host reads nothing: what the socket holds and the buffer that was promised is all there is.
    let last = loop {
        peer.write(&mut guest, &[7; 60_000]);
        sent += 60_000;
        match guest.packet_within(Duration::from_millis(1)) {
            Some((header, _)) if header.op == op::RST => break header,
            _ => assert!(sent < 4 << 20, "the device takes everything"),
        }
    };
    assert!(peer.is_meant(&last));
    while stream.read(&mut [0; 65536]).is_ok_and(|count| count > 0) {}
    peer.write(&mut guest, b"more");
    guest.expect(op::RST);
}

#[test]
fn packets_that_break_the_rules_are_refused_or_dropped_and_others_go_on() {
    let mut guest = Guest::new();
    let streams = listen(&guest.device.handle(), 9);
    let mut good = guest.connect(5000, 9, 65536);
    let nobody = Peer { guest: 6000, host: 9, ..Peer::default() };

    for op in [0, op::RESPONSE, op::RW, op::SHUTDOWN, op::CREDIT_UPDATE, op::CREDIT_REQUEST, 8, u16::MAX] {
        guest.send(&nobody.header(op, u32::MAX, 0), &[]);
        assert_eq!(guest.expect(op::RST).0.kind, STREAM);
    }
    // A kind of socket that is not had: refused in its own kind, even on a port that listens.
    for kind in [0, 2, u16::MAX] {
        guest.send(&Header { kind, ..nobody.header(op::REQUEST, 0, 0) }, &[]);
        assert_eq!(guest.expect(op::RST).0.kind, kind);
    }
    // No answer to: resets, wrong addresses, and packets shorter than they claim or than a header.
    guest.send(&nobody.header(op::RST, 0, 0), &[]);
    guest.send(&Header { src_cid: 4, ..nobody.header(op::REQUEST, 0, 0) }, &[]);
    guest.send(&Header { dst_cid: 0, ..nobody.header(op::REQUEST, 0, 0) }, &[]);
    guest.send(&good.header(op::RW, 0, u32::MAX as usize), b"short");
    guest.send_cut(&good.header(op::RW, 0, 0).to_bytes()[..43], 7);
    guest.expect_silence();

    good.write(&mut guest, b"fine");
    assert_eq!(super::read_exact(&mut streams.recv().unwrap(), 4), b"fine");
}

#[test]
fn breaches_of_a_connection_reset_it() {
    let breaches = [(op::REQUEST, 0), (op::RESPONSE, 0), (0, 0), (99, 0), (op::RW, 300_000)];
    for (index, (op, len)) in (0u32..).zip(breaches) {
        let mut guest = Guest::new();
        let streams = listen(&guest.device.handle(), 9);
        let peer = guest.connect(5000 + index, 9, 65536);
        if len == 0 {
            guest.send(&peer.header(op, 0, 0), &[]);
        } else {
            guest.send_cut(&[&peer.header(op, 0, len).to_bytes()[..], &vec![0; len]].concat(), 50_000);
        }
        guest.expect(op::RST);
        assert_eq!(streams.recv().unwrap().read(&mut [0; 1]).unwrap_or(0), 0);
    }
}

#[test]
fn a_flood_that_asks_for_answers_and_takes_none_is_not_heard_any_more() {
    let mut guest = Guest::new();
    let nobody = Peer { guest: 6000, host: 9, ..Peer::default() };
    let mut posted = 0;
    while guest.in_flight(TX) < SIZE {
        guest.post(&nobody.header(op::REQUEST, 0, 0), &[]);
        guest.ring(TX);
        posted += 1;
        assert!(posted < 10_000, "the device hears everything");
    }
    // 256 answers lie in the guest's buffers, 256 are kept, and then it is the guest's turn.
    assert_eq!(posted, 3 * SIZE);
    assert!(!guest.is_woken(Duration::from_millis(20)));
    for _ in 0..posted {
        guest.expect(op::RST);
    }
    guest.expect_silence();
}

#[test]
fn a_flood_of_connections_that_end_before_they_are_answered_leaves_nothing_behind() {
    let mut guest = Guest::new();
    let streams = listen(&guest.device.handle(), 9);
    let nobody = Peer { guest: 6000, host: 10, ..Peer::default() };
    while guest.in_flight(RX) > 0 {
        guest.post(&nobody.header(op::REQUEST, 0, 0), &[]);
        guest.ring(TX);
    }
    let peer = Peer { guest: 5000, host: 9, ..Peer::default() };
    let mut posted = 0;
    while guest.in_flight(TX) < SIZE - 1 {
        for op in [op::REQUEST, op::RST] {
            guest.post(&peer.header(op, 0, 0), &[]);
        }
        guest.ring(TX);
        posted += 1;
        assert!(posted < 10_000, "the device hears everything");
    }
    while guest.packet_within(Duration::from_millis(100)).is_some() {}
    assert_eq!(streams.try_iter().count(), 1, "its ports are in use until its place in the queue comes up");
    guest.connect(5000, 9, 65536).write(&mut guest, b"alive");
    assert_eq!(super::read_exact(&mut streams.recv().unwrap(), 5), b"alive");
}

#[test]
fn broken_rings_are_errors_and_a_reset_heals() {
    for break_it in [
        |guest: &mut Guest| guest.offer(TX, 0, &[(u64::MAX - 10, 44, false)]),
        |guest: &mut Guest| guest.offer(TX, 0, &[(MEMORY as u64 - 10, 44, false)]),
        |guest: &mut Guest| guest.make_available(TX, SIZE),
        |guest: &mut Guest| {
            let place = guest.queues[TX].avail_ring() + 2;
            guest.mem.write_obj(1000u16, GuestAddress(place)).unwrap();
        },
        |guest: &mut Guest| {
            guest.write_descriptor(TX, 0, 0x1000, 44, 1, 0);
            guest.make_available(TX, 0);
        },
    ] {
        let mut guest = Guest::new();
        let streams = listen(&guest.device.handle(), 9);
        guest.connect(5000, 9, 65536);
        break_it(&mut guest);
        assert!(guest.try_ring(TX).is_err());
        assert_eq!(streams.recv().unwrap().read(&mut [0; 1]).unwrap_or(0), 0);
        guest.device.reset();
        guest.start();
        guest.connect(5000, 9, 65536);
    }
}

/// A small generator, so that a failure can be repeated (xorshift64*).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % sides
    }

    fn one_of<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.roll(of.len() as u64) as usize]
    }
}

#[test]
fn a_hundred_thousand_random_steps_do_no_harm() {
    let mut dice = Dice(0x9E37_79B9_7F4A_7C15);
    let mut guest = Guest::new();
    let streams = listen(&guest.device.handle(), 9);
    let mut open: Vec<UnixStream> = Vec::new();
    // Ports that the device has lately used, so that some of the nonsense hits.
    let mut ports = VecDeque::from([(9, 0)]);
    let (mut broken, mut answers) = (0, [0u32; 8]);
    for _ in 0..100_000 {
        let result = match dice.roll(1000) {
            0..750 => {
                let header = random_header(&mut dice, &ports);
                guest.post(&header, &vec![3; header.len as usize % 6000]);
                guest.try_ring(TX)
            }
            750..800 => guest.device.handle().open(dice.roll(3) as u32).map(|stream| open.push(stream)).or(Ok(())),
            800..900 => {
                act_as_host(&mut dice, &mut open);
                Ok(())
            }
            900..995 => {
                guest.collect();
                Ok(())
            }
            _ => {
                guest.post(&random_header(&mut dice, &ports), &[3; 100]);
                (0..8).for_each(|_| scribble(&mut dice, &guest));
                let result = guest.try_ring(dice.roll(3) as usize);
                guest.device.reset();
                guest.start();
                result
            }
        };
        broken += u32::from(result.is_err());
        guest.serve_host(Duration::ZERO);
        if guest.in_flight(TX) > SIZE - 2 {
            guest.collect();
        }
        for (header, _) in guest.inbox.drain(..) {
            answers[usize::from(header.op)] += 1;
            ports.push_front((header.src_port, header.dst_port));
            ports.truncate(16);
        }
        open.extend(streams.try_iter());
        open.truncate(64);
    }
    assert!(broken > 100, "only {broken} broken rings were seen");
    assert!(answers[1..].iter().all(|count| *count > 0), "{answers:?} {broken}");

    // And after all this it works as on the first day.
    guest.device.reset();
    guest.start();
    guest.connect(5000, 9, 65536).write(&mut guest, b"alive");
    let mut last = streams.iter().next().unwrap();
    assert_eq!(super::read_exact(&mut last, 5), b"alive");
}

fn random_header(dice: &mut Dice, ports: &VecDeque<(u32, u32)>) -> Header {
    let (host, guest) = match dice.roll(4) {
        0 => (dice.one_of(&[9, 9, 10, 49152, u32::MAX]), dice.roll(100) as u32),
        _ => ports[dice.roll(ports.len() as u64) as usize],
    };
    let peer = Peer {
        guest,
        host,
        buf_alloc: dice.one_of(&[0, 1, 1000, 65536, 65536, u32::MAX]),
        taken: dice.one_of(&[0, 0, 0, 1, 500, u32::MAX]),
        ..Peer::default()
    };
    let op = dice.one_of(&[1, 1, 1, 2, 2, 2, 2, 3, 4, 5, 5, 5, 5, 5, 5, 6, 6, 7, 8, 77]);
    let mut header = peer.header(op, dice.roll(5) as u32, dice.one_of(&[0, 0, 1, 100, 5000, 70_000]));
    if dice.roll(20) == 0 {
        header.kind = dice.roll(4) as u16;
        header.src_cid = dice.roll(5);
    }
    header
}

fn act_as_host(dice: &mut Dice, open: &mut Vec<UnixStream>) {
    if open.is_empty() {
        return;
    }
    let index = dice.roll(open.len() as u64) as usize;
    let stream = &mut open[index];
    stream.set_nonblocking(true).unwrap();
    match dice.roll(5) {
        0 => drop(stream.write(&[5; 3000])),
        1 => drop(stream.read(&mut [0; 3000])),
        2 => drop(stream.shutdown(std::net::Shutdown::Write)),
        3 => drop(stream.shutdown(std::net::Shutdown::Read)),
        _ => drop(open.swap_remove(index)),
    }
}

/// Writes nonsense somewhere into the rings.
fn scribble(dice: &mut Dice, guest: &Guest) {
    let queue = &guest.queues[dice.roll(3) as usize];
    let anywhere = dice.roll(600);
    let place = match dice.roll(3) {
        0 => queue.desc_table() + dice.roll(4096),
        1 => queue.avail_ring() + dice.one_of(&[0, 2, anywhere]),
        _ => queue.used_ring() + dice.roll(2000),
    };
    let word = dice.one_of(&[0, 1, 0xFFFF, 0xFFFF_FFFF_FFFF_FFFF, 0x0003_0001_0000_0010, 0x1234_5678_9ABC_DEF0]);
    guest.mem.write_obj::<u64>(word, GuestAddress(place)).unwrap();
}
