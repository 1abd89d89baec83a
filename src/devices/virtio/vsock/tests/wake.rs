//! Snapshots: what is saved, and what a woken guest is told.

use std::io::Write;
use std::time::{Duration, Instant};

use super::super::packet::op;
use super::super::testing::{EVENT, Guest, RX, TX};
use super::super::{Error, GUEST_CID, Vsock, VsockState};
use super::{listen, pattern, read_exact};
use crate::devices::virtio::VirtioDevice;

#[test]
fn only_the_addresses_of_guests_are_accepted() {
    for cid in [0, 1, 2, u64::from(u32::MAX), 1 << 32, u64::MAX] {
        let state = VsockState { cid, ..VsockState::default() };
        assert!(matches!(Vsock::new(state), Err(Error::Cid(refused)) if refused == cid));
    }
    let device = Vsock::new(VsockState { cid: 0x1234_5678, reset_pending: false }).unwrap();
    let mut config = [0xEE; 10];
    device.read_config(0, &mut config);
    assert_eq!(config, [0x78, 0x56, 0x34, 0x12, 0, 0, 0, 0, 0, 0]);
    device.read_config(u64::MAX, &mut config);
    assert_eq!(config, [0; 10]);
}

#[test]
fn a_pause_and_a_snapshot_change_nothing_for_the_machine_that_goes_on() {
    let mut guest = Guest::new();
    let streams = listen(&guest.device.handle(), 9);
    let mut peer = guest.connect(5000, 9, 65536);
    let mut stream = streams.recv().unwrap();
    stream.write_all(b"before").unwrap();
    assert_eq!(guest.device.state(), VsockState { cid: GUEST_CID, reset_pending: true });
    stream.write_all(b" and after").unwrap();
    assert_eq!(peer.read(&mut guest, 16), b"before and after");
    assert!(guest.events.is_empty());
}

#[test]
fn a_woken_guest_hears_of_the_reset_before_anything_else() {
    let state = Guest::new().device.state();
    wake(Guest::with(state.clone()));
    wake(Guest::with_event_idx(state));
}

fn wake(mut guest: Guest) {
    let mut stream = guest.device.handle().open(7).unwrap();
    stream.write_all(b"hello").unwrap();
    // The event lies there, and the guest has not looked at it yet.
    guest.interrupts = 0;
    assert_eq!(guest.returned(EVENT), 1);
    while guest.is_woken(Duration::from_millis(20)) {
        guest.device.host_ready(&mut guest.queues, &guest.mem).unwrap();
    }
    assert_eq!(guest.returned(RX), 0);
    // Returning the event's buffer is enough: what waited comes at once.
    guest.collect();
    assert_eq!(guest.events, [0]);
    assert_eq!(guest.returned(RX), 1);
    let mut peer = guest.accept(65536);
    assert_eq!(peer.read(&mut guest, 5), b"hello");
    assert!(guest.device.state().reset_pending);
}

#[test]
fn a_guest_that_never_returns_the_event_is_spoken_to_all_the_same() {
    let mut guest = Guest::with(VsockState { reset_pending: true, ..VsockState::default() });
    let _stream = guest.device.handle().open(7).unwrap();
    let end = Instant::now() + Duration::from_secs(5);
    while guest.returned(RX) == 0 && Instant::now() < end {
        if guest.is_woken(Duration::from_millis(100)) {
            guest.device.host_ready(&mut guest.queues, &guest.mem).unwrap();
        }
    }
    assert_eq!(guest.returned(EVENT), 1);
    assert_eq!(guest.returned(RX), 1);
}

#[test]
fn packets_of_connections_from_before_are_refused() {
    let mut old = Guest::new();
    let streams = listen(&old.device.handle(), 9);
    let peer = old.connect(5000, 9, 65536);
    drop(streams);
    let mut guest = Guest::with(old.device.state());
    guest.collect();
    guest.send(&peer.header(op::RW, 0, 100), &pattern(100));
    let (header, _) = guest.expect(op::RST);
    assert!(peer.is_meant(&header));
    guest.ring(TX);
    let streams = listen(&guest.device.handle(), 9);
    guest.connect(5000, 9, 65536).write(&mut guest, b"again");
    assert_eq!(read_exact(&mut streams.recv().unwrap(), 5), b"again");
}
