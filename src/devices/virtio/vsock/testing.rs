//! A guest's driver, built by hand: rings in guest memory, and the device behind them served as the worker
//! would do it, in the test's own thread.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use virtio_queue::{Error, Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

pub use super::packet::op;
use super::packet::{HOST_CID, Header, STREAM, shutdown};
use super::{GUEST_CID, Vsock, VsockState};
use crate::devices::virtio::VirtioDevice;
use crate::mem::GuestMemory;

pub const RX: usize = 0;
pub const TX: usize = 1;
pub const EVENT: usize = 2;

pub const MEMORY: usize = 64 << 20;
/// Each queue has a megabyte for its rings, and each of its descriptors 64 KiB and a header for its buffer.
const RINGS: u64 = 1 << 20;
const BUFFERS: [u64; 3] = [8 << 20, 32 << 20, 4 << 20];
const BUFFER: u64 = 65536 + Header::SIZE as u64;
/// What one of Linux's receive buffers holds.
pub const RX_BUFFER: u32 = 4096;
pub const SIZE: u16 = 256;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// The guest's side of one queue.
#[derive(Default)]
pub struct Ring {
    offered: u16,
    /// `offered` when the doorbell was last thought of.
    rung: u16,
    seen: u16,
}

pub struct Guest {
    pub mem: GuestMemory,
    pub device: Vsock,
    pub queues: Vec<Queue>,
    pub rings: [Ring; 3],
    pub inbox: VecDeque<(Header, Vec<u8>)>,
    pub events: Vec<u32>,
    pub interrupts: usize,
    /// VIRTIO_F_EVENT_IDX: the doorbell is rung only where the device asked for it.
    event_idx: bool,
}

impl Guest {
    pub fn new() -> Guest {
        Guest::with(VsockState::default())
    }

    pub fn with(state: VsockState) -> Guest {
        let mem = crate::mem::from_ranges(&[(GuestAddress(0), MEMORY as u64)]).unwrap();
        let mut guest = Guest {
            mem,
            device: Vsock::new(state).unwrap(),
            queues: Vec::new(),
            rings: Default::default(),
            inbox: VecDeque::new(),
            events: Vec::new(),
            interrupts: 0,
            event_idx: false,
        };
        guest.start();
        guest
    }

    /// The same with VIRTIO_F_EVENT_IDX negotiated.
    pub fn with_event_idx(state: VsockState) -> Guest {
        let mut guest = Guest::with(VsockState::default());
        guest.device = Vsock::new(state).unwrap();
        guest.event_idx = true;
        guest.start();
        guest
    }

    /// What a driver does at first, also after it reset the device.
    pub fn start(&mut self) {
        self.rings = Default::default();
        self.queues = (0..3u64).map(|index| queue_at(&self.mem, RINGS * (index + 1))).collect();
        self.queues.iter_mut().for_each(|queue| queue.set_event_idx(self.event_idx));
        self.inbox.clear();
        self.device.activate(0);
        for slot in 0..SIZE {
            self.offer(RX, slot, &[(rx_address(slot), RX_BUFFER, true)]);
        }
        for slot in 0..8 {
            self.offer(EVENT, slot, &[(BUFFERS[EVENT] + u64::from(slot) * 16, 4, true)]);
        }
        for queue in [EVENT, RX, TX] {
            self.ring(queue);
        }
    }

    /// Makes a chain available that uses the descriptors from `first` on: address, length, and whether the
    /// device may write.
    pub fn offer(&mut self, queue: usize, first: u16, pieces: &[(u64, u32, bool)]) {
        let last = first + pieces.len() as u16 - 1;
        for (at, &(address, length, writable)) in (first..).zip(pieces) {
            let flags = if at < last { NEXT } else { 0 } | if writable { WRITE } else { 0 };
            self.write_descriptor(queue, at, address, length, flags, at + 1);
        }
        self.make_available(queue, first);
    }

    pub fn write_descriptor(&self, queue: usize, at: u16, address: u64, length: u32, flags: u16, next: u16) {
        let place = GuestAddress(self.queues[queue].desc_table() + u64::from(at) * 16);
        let bytes =
            [&address.to_le_bytes()[..], &length.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat();
        self.mem.write_slice(&bytes, place).unwrap();
    }

    pub fn make_available(&mut self, queue: usize, head: u16) {
        let avail = self.queues[queue].avail_ring();
        let ring = &mut self.rings[queue];
        let place = avail + 4 + u64::from(ring.offered % SIZE) * 2;
        self.mem.write_obj(head, GuestAddress(place)).unwrap();
        ring.offered = ring.offered.wrapping_add(1);
        self.mem.write_obj(ring.offered, GuestAddress(avail + 2)).unwrap();
    }

    /// How many chains the device has given back and not yet looked at.
    pub fn returned(&self, queue: usize) -> u16 {
        let index: u16 = self.mem.read_obj(GuestAddress(self.queues[queue].used_ring() + 2)).unwrap();
        index.wrapping_sub(self.rings[queue].seen)
    }

    fn take_used(&mut self, queue: usize) -> Option<(u16, u32)> {
        if self.returned(queue) == 0 {
            return None;
        }
        let ring = &mut self.rings[queue];
        let place = self.queues[queue].used_ring() + 4 + u64::from(ring.seen % SIZE) * 8;
        ring.seen = ring.seen.wrapping_add(1);
        let [head, length]: [u32; 2] = self.mem.read_obj(GuestAddress(place)).unwrap();
        Some((head as u16, length))
    }

    /// Rings a doorbell, unless the device does not want it.
    pub fn ring(&mut self, queue: usize) {
        let new = self.rings[queue].offered;
        let old = std::mem::replace(&mut self.rings[queue].rung, new);
        let place = self.queues[queue].used_ring() + 4 + u64::from(SIZE) * 8;
        let event: u16 = self.mem.read_obj(GuestAddress(place)).unwrap();
        let wanted = new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old);
        if wanted || !self.event_idx {
            self.try_ring(queue).unwrap();
        }
    }

    /// Rings a doorbell, and the transport's others for as long as the device asks for it.
    pub fn try_ring(&mut self, queue: usize) -> Result<(), Error> {
        self.interrupts += usize::from(self.device.queue_ready(queue, &mut self.queues, &self.mem)?);
        while self.device.unfinished() {
            self.interrupts += usize::from(self.device.queue_ready(queue, &mut self.queues, &self.mem)?);
        }
        Ok(())
    }

    /// Whether the worker would wake within `time`.
    pub fn is_woken(&self, time: Duration) -> bool {
        let mut poll = libc::pollfd { fd: self.device.host_fd().unwrap(), events: libc::POLLIN, revents: 0 };
        // SAFETY: the pointer is to one live `pollfd`.
        unsafe { libc::poll(&mut poll, 1, time.as_millis() as i32) > 0 }
    }

    /// Serves the host's side once, if there is anything within `time`.
    pub fn serve_host(&mut self, time: Duration) {
        if self.is_woken(time) {
            self.interrupts += usize::from(self.device.host_ready(&mut self.queues, &self.mem).unwrap());
            if self.device.unfinished() {
                self.try_ring(RX).unwrap();
            }
        }
    }

    /// The same, and then takes what came.
    pub fn turn(&mut self, time: Duration) {
        self.serve_host(time);
        self.collect();
    }

    /// Takes the packets and events that the device gave, and returns the buffers.
    pub fn collect(&mut self) {
        loop {
            let mut progress = false;
            while let Some((head, length)) = self.take_used(RX) {
                let bytes = self.peek(rx_address(head), length as usize);
                let header = Header::from_bytes(bytes[..Header::SIZE].try_into().unwrap());
                assert_eq!(header.len as usize, bytes.len() - Header::SIZE);
                assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, GUEST_CID));
                self.inbox.push_back((header, bytes[Header::SIZE..].to_vec()));
                self.make_available(RX, head);
                progress = true;
            }
            while let Some((head, length)) = self.take_used(EVENT) {
                assert_eq!(length, 4);
                let address = BUFFERS[EVENT] + u64::from(head) * 16;
                self.events.push(self.mem.read_obj(GuestAddress(address)).unwrap());
                self.make_available(EVENT, head);
                self.ring(EVENT);
            }
            while self.take_used(TX).is_some() {}
            if !progress {
                return;
            }
            self.ring(RX);
        }
    }

    fn peek(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.mem.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// Puts a packet into the tx ring without ringing, header and payload in two buffers as old Linux does.
    pub fn post(&mut self, header: &Header, payload: &[u8]) {
        let slot = self.rings[TX].offered % (SIZE / 2);
        let address = BUFFERS[TX] + u64::from(slot) * BUFFER;
        self.mem.write_slice(&header.to_bytes(), GuestAddress(address)).unwrap();
        self.mem.write_slice(payload, GuestAddress(address + Header::SIZE as u64)).unwrap();
        let front = (address, Header::SIZE as u32, false);
        let back = (address + Header::SIZE as u64, payload.len() as u32, false);
        let pieces = [front, back];
        self.offer(TX, slot * 2, &pieces[..if payload.is_empty() { 1 } else { 2 }]);
    }

    /// How many chains the device has not given back.
    pub fn in_flight(&self, queue: usize) -> u16 {
        self.rings[queue].offered.wrapping_sub(self.rings[queue].seen).wrapping_sub(self.returned(queue))
    }

    /// Sends a packet that lies in memory in pieces of `cut` bytes, the last one shorter.
    pub fn send_cut(&mut self, packet: &[u8], cut: usize) {
        self.mem.write_slice(packet, GuestAddress(BUFFERS[TX])).unwrap();
        let piece = |at: usize| (BUFFERS[TX] + at as u64, cut.min(packet.len() - at) as u32, false);
        let pieces: Vec<_> = (0..packet.len()).step_by(cut).map(piece).collect();
        self.offer(TX, 0, &pieces);
        self.ring(TX);
        while self.take_used(TX).is_some() {}
    }

    pub fn send(&mut self, header: &Header, payload: &[u8]) {
        self.post(header, payload);
        self.ring(TX);
        while self.take_used(TX).is_some() {}
    }

    /// The next packet, or nothing when none comes within `time`.
    pub fn packet_within(&mut self, time: Duration) -> Option<(Header, Vec<u8>)> {
        let end = Instant::now() + time;
        self.collect();
        while self.inbox.is_empty() && Instant::now() < end {
            self.turn(end.saturating_duration_since(Instant::now()).min(Duration::from_millis(50)));
        }
        self.inbox.pop_front()
    }

    pub fn packet(&mut self) -> (Header, Vec<u8>) {
        self.packet_within(Duration::from_secs(10)).expect("a packet should have come")
    }

    /// Asserts that the next packet is of this kind.
    pub fn expect(&mut self, op: u16) -> (Header, Vec<u8>) {
        let (header, payload) = self.packet();
        assert_eq!(header.op, op, "{header:?}");
        (header, payload)
    }

    /// Asserts that no packet comes.
    pub fn expect_silence(&mut self) {
        let packet = self.packet_within(Duration::from_millis(100));
        assert!(packet.is_none(), "{packet:?}");
    }

    /// Answers the host's request, which must be the next packet.
    pub fn accept(&mut self, buf_alloc: u32) -> Peer {
        let (request, _) = self.expect(op::REQUEST);
        self.answer(&request, buf_alloc)
    }

    /// Answers a request of the host.
    pub fn answer(&mut self, request: &Header, buf_alloc: u32) -> Peer {
        let mut peer = Peer { guest: request.dst_port, host: request.src_port, buf_alloc, ..Peer::default() };
        peer.hear(request);
        peer.send(self, op::RESPONSE, 0, &[]);
        peer
    }

    /// Connects to the host, and expects to be accepted.
    pub fn connect(&mut self, from: u32, to: u32, buf_alloc: u32) -> Peer {
        let mut peer = Peer { guest: from, host: to, buf_alloc, ..Peer::default() };
        peer.send(self, op::REQUEST, 0, &[]);
        let (response, _) = self.expect(op::RESPONSE);
        peer.hear(&response);
        peer
    }
}

pub fn rx_address(slot: u16) -> u64 {
    BUFFERS[RX] + u64::from(slot) * BUFFER
}

fn queue_at(mem: &GuestMemory, base: u64) -> Queue {
    mem.write_slice(&[0; 0x4000], GuestAddress(base)).unwrap();
    let mut queue = Queue::new(SIZE).unwrap();
    queue.set_desc_table_address(Some(base as u32), Some(0));
    queue.set_avail_ring_address(Some(base as u32 + 0x2000), Some(0));
    queue.set_used_ring_address(Some(base as u32 + 0x3000), Some(0));
    queue.set_ready(true);
    queue
}

/// The guest's end of one connection, with its accounts.
#[derive(Clone, Debug, Default)]
pub struct Peer {
    pub guest: u32,
    pub host: u32,
    pub buf_alloc: u32,
    /// Bytes sent, and bytes taken.
    pub sent: u32,
    pub taken: u32,
    pub host_buf_alloc: u32,
    pub host_fwd_cnt: u32,
}

impl Peer {
    pub fn hear(&mut self, header: &Header) {
        self.host_buf_alloc = header.buf_alloc;
        self.host_fwd_cnt = header.fwd_cnt;
    }

    pub fn credit(&self) -> usize {
        self.host_buf_alloc.checked_sub(self.sent.wrapping_sub(self.host_fwd_cnt)).unwrap() as usize
    }

    pub fn is_meant(&self, header: &Header) -> bool {
        (header.src_port, header.dst_port) == (self.host, self.guest)
    }

    pub fn header(&self, op: u16, flags: u32, len: usize) -> Header {
        Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: self.guest,
            dst_port: self.host,
            len: len as u32,
            kind: STREAM,
            op,
            flags,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.taken,
        }
    }

    pub fn send(&mut self, guest: &mut Guest, op: u16, flags: u32, payload: &[u8]) {
        self.sent = self.sent.wrapping_add(payload.len() as u32);
        guest.send(&self.header(op, flags, payload.len()), payload);
    }

    pub fn write(&mut self, guest: &mut Guest, payload: &[u8]) {
        self.send(guest, op::RW, 0, payload);
    }

    /// Receives exactly `count` bytes and returns the credit for them.
    pub fn read(&mut self, guest: &mut Guest, count: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() < count {
            let (header, payload) = guest.packet();
            assert!(self.is_meant(&header), "{header:?}");
            self.hear(&header);
            match header.op {
                op::RW => bytes.extend(payload),
                op::CREDIT_REQUEST => {
                    self.send(guest, op::CREDIT_UPDATE, 0, &[]);
                    continue;
                }
                op::CREDIT_UPDATE => continue,
                _ => panic!("{header:?}"),
            }
            self.taken = self.taken.wrapping_add(header.len);
            assert!(header.len <= self.buf_alloc, "beyond the guest's credit");
        }
        assert_eq!(bytes.len(), count);
        bytes
    }

    /// Closes as Linux does, and expects the host's answer.
    pub fn close(&mut self, guest: &mut Guest) {
        self.send(guest, op::SHUTDOWN, shutdown::BOTH, &[]);
        loop {
            let (header, _) = guest.packet();
            if header.op == op::RST {
                return assert!(self.is_meant(&header));
            }
        }
    }
}
