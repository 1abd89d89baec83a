//! Many connections at once.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use super::super::packet::{Header, op, shutdown};
use super::super::testing::{Guest, Peer};
use super::{assert_is_reset, listen, tcp_pair};

#[test]
fn two_thousand_connections_over_tcp_at_once_each_get_their_own_answer() {
    const COUNT: usize = 2000;
    crate::sys::limits::raise_open_files().unwrap();
    let mut guest = Guest::new();
    let handle = guest.device.handle();
    let mut clients: Vec<TcpStream> = Vec::new();
    let mut peers: HashMap<(u32, u32), (Peer, Vec<u8>)> = HashMap::new();
    for index in 0..COUNT {
        let (mut ours, theirs) = tcp_pair();
        handle.connect(1024, format!("{index:08}").into_bytes(), theirs.into());
        ours.write_all(b" please\n").unwrap();
        clients.push(ours);
    }
    let mut answered = 0;
    while answered < COUNT {
        let (header, payload) = guest.packet();
        let key = (header.dst_port, header.src_port);
        if header.op == op::REQUEST {
            let peer = guest.answer(&header, 65536);
            peers.insert(key, (peer, Vec::new()));
            continue;
        }
        assert_eq!(header.op, op::RW);
        let (peer, asked) = peers.get_mut(&key).unwrap();
        asked.extend(payload);
        if asked.ends_with(b"\n") {
            let answer = [b"here you are, ", &asked[..]].concat();
            peer.write(&mut guest, &answer);
            peer.send(&mut guest, op::SHUTDOWN, shutdown::BOTH, &[]);
            answered += 1;
        }
    }
    for (index, client) in clients.iter_mut().enumerate() {
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, format!("here you are, {index:08} please\n"));
    }
    for _ in 0..COUNT {
        guest.expect(op::RST);
    }
}

#[test]
fn beyond_the_bound_both_sides_are_refused_until_others_end() {
    crate::sys::limits::raise_open_files().unwrap();
    let mut guest = Guest::new();
    let streams = listen(&guest.device.handle(), 9);
    let request = |from: u32| Peer { guest: from, host: 9, buf_alloc: 65536, ..Peer::default() };
    let mut answers: Vec<Header> = Vec::new();
    for from in 0..4097 {
        request(from).send(&mut guest, op::REQUEST, 0, &[]);
        guest.collect();
        answers.extend(guest.inbox.drain(..).map(|(header, _)| header));
    }
    assert!(answers[..4096].iter().all(|header| header.op == op::RESPONSE));
    assert_eq!(answers[4096].op, op::RST);
    let (ours, theirs) = tcp_pair();
    guest.device.handle().connect(7, vec![], theirs.into());
    guest.turn(Duration::from_millis(100));
    assert_is_reset(ours);

    drop(streams.recv().unwrap());
    assert_eq!(guest.expect(op::SHUTDOWN).0.flags, shutdown::BOTH);
    request(0).send(&mut guest, op::RST, 0, &[]);
    guest.connect(4097, 9, 65536);
}
