use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_bindings::virtio_mmio::*;

use super::*;
use crate::devices::BusDevice;
use crate::devices::virtio::slot::Slot;
use crate::devices::virtio::state::{DRIVER_OK, MmioState, NEEDS_RESET};
use crate::devices::virtio::testing::{DESC, Driver, WRITE};

/// A region of 70 blocks at 4 GiB: more than one word of bits.
const START: u64 = 1 << 32;
const COUNT: u64 = 70;
const REGION: (GuestAddress, u64) = (GuestAddress(START), COUNT * BLOCK);

/// A host that notes what it gets back, or cannot take it.
#[derive(Clone, Default)]
struct Host {
    discarded: Arc<Mutex<Vec<(u64, u64)>>>,
    stubborn: Arc<AtomicBool>,
}

impl Backing for Host {
    fn discard(&self, start: GuestAddress, length: u64) -> io::Result<()> {
        if self.stubborn.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        self.discarded.lock().unwrap().push(((start.0 - START) / BLOCK, length / BLOCK));
        Ok(())
    }
}

fn device(state: MemoryState, host: &Host) -> Result<Memory, Error> {
    Memory::new(state, REGION, Box::new(host.clone()), Arc::default())
}

fn booted() -> MemoryState {
    MemoryState::booted(REGION.0, REGION.1)
}

/// A device in use whose guest should have `blocks` blocks.
fn drive(blocks: u64) -> (Driver<Memory>, Host) {
    let host = Host::default();
    let mut driver = Driver::started(device(booted(), &host).unwrap(), 0);
    driver.mmio.request_size(blocks * BLOCK).unwrap();
    (driver, host)
}

/// Sends a request about `count` blocks at an address, and gives the response and the state.
fn send_at(driver: &mut Driver<Memory>, kind: u16, address: u64, count: u16) -> (u16, u16) {
    let mut request = [0xee; REQUEST_LENGTH]; // what is padding must not matter
    request[..2].copy_from_slice(&kind.to_le_bytes());
    request[8..16].copy_from_slice(&address.to_le_bytes());
    request[16..18].copy_from_slice(&count.to_le_bytes());
    let (answer, written) = driver.exchange(&request, &[5, 19], &[3, 7]);
    assert_eq!((written, &answer[2..8]), (10, &[0; 6][..]));
    (u16::from_le_bytes([answer[0], answer[1]]), u16::from_le_bytes([answer[8], answer[9]]))
}

/// The same of blocks by their number.
fn send(driver: &mut Driver<Memory>, kind: u16, first: u64, count: u16) -> (u16, u16) {
    send_at(driver, kind, START + first * BLOCK, count)
}

fn config(driver: &mut Driver<Memory>) -> [u64; 7] {
    [0, 8, 16, 24, 32, 40, 48].map(|offset| {
        let half = |driver: &mut Driver<Memory>, at| u64::from(driver.get(VIRTIO_MMIO_CONFIG + at));
        half(driver, offset) | half(driver, offset + 4) << 32
    })
}

#[test]
fn a_guest_plugs_what_it_should_have_and_gives_it_back() {
    let (mut driver, host) = drive(68);
    let region = COUNT * BLOCK;
    assert_eq!(driver.get(VIRTIO_MMIO_DEVICE_ID), 24);
    assert_eq!(config(&mut driver), [2 << 20, 0, START, region, region, 0, 68 * BLOCK]);
    assert_eq!(driver.get(VIRTIO_MMIO_CONFIG + 56), 0);

    let seen = driver.mmio.device().changes.count();
    assert_eq!(send(&mut driver, PLUG, 0, 66), (ACK, 0));
    assert_eq!(send(&mut driver, PLUG, 68, 2), (ACK, 0));
    assert_eq!(config(&mut driver)[5..], [68 * BLOCK, 68 * BLOCK]);
    let states = [(0, 66), (68, 2), (66, 2), (65, 2), (0, 70)].map(|(first, n)| send(&mut driver, STATE, first, n));
    let (plugged, unplugged, mixed) = ((ACK, STATE_PLUGGED), (ACK, STATE_UNPLUGGED), (ACK, STATE_MIXED));
    assert_eq!(states, [plugged, plugged, unplugged, mixed, mixed]);

    driver.mmio.request_size(BLOCK).unwrap();
    assert_eq!(send(&mut driver, UNPLUG, 1, 65), (ACK, 0));
    assert_eq!(send(&mut driver, UNPLUG, 69, 1), (ACK, 0));
    assert_eq!((driver.mmio.device().plugged(), driver.mmio.device().requested()), (2 * BLOCK, BLOCK));
    assert_eq!(*host.discarded.lock().unwrap(), [(1, 65), (69, 1)]);
    assert_eq!(driver.mmio.device().changes.count(), seen + 4);

    assert_eq!(send_at(&mut driver, UNPLUG_ALL, u64::MAX, u16::MAX), (ACK, 0));
    assert_eq!(send_at(&mut driver, UNPLUG_ALL, 0, 0), (ACK, 0));
    assert_eq!((driver.mmio.device().plugged(), driver.mmio.device().requested()), (0, BLOCK));
    assert_eq!(host.discarded.lock().unwrap()[2..], [(0, 70)]);
}

#[test]
fn requests_that_make_no_sense_are_errors_and_change_nothing() {
    let (mut driver, host) = drive(COUNT);
    assert_eq!(send(&mut driver, PLUG, 10, 10), (ACK, 0));
    let before = driver.mmio.device().state();
    for kind in [PLUG, UNPLUG, STATE] {
        for (address, count) in [
            (START + 10 * BLOCK, 0),
            (START + 10 * BLOCK + 4096, 1),
            (START + 10 * BLOCK + 1, 1),
            (START - BLOCK, 1),
            (START - BLOCK, 2),
            (START + COUNT * BLOCK, 1),
            (START + (COUNT - 1) * BLOCK, 2),
            (START, u16::MAX),
            (0, 1),
            (0, u16::MAX),
            (u64::MAX - BLOCK + 1, 1),
            (u64::MAX - BLOCK + 1, u16::MAX),
            (u64::MAX, 1),
        ] {
            assert_eq!(send_at(&mut driver, kind, address, count), (ERROR, 0), "{kind} {address:#x} {count}");
        }
    }
    // Blocks that are, or are not, in the state that they shall be brought into.
    for (kind, first, count) in [(PLUG, 10, 1), (PLUG, 9, 2), (PLUG, 19, 2), (PLUG, 0, 70)] {
        assert_eq!(send(&mut driver, kind, first, count), (ERROR, 0));
    }
    for (kind, first, count) in [(UNPLUG, 9, 1), (UNPLUG, 9, 2), (UNPLUG, 19, 2), (UNPLUG, 0, 70)] {
        assert_eq!(send(&mut driver, kind, first, count), (ERROR, 0));
    }
    for kind in [4, 5, 0x100, u16::MAX] {
        assert_eq!(send(&mut driver, kind, 30, 1), (ERROR, 0));
    }
    assert_eq!((driver.mmio.device().state(), host.discarded.lock().unwrap().len()), (before, 0));
    assert!(driver.mmio.is_active());
}

#[test]
fn nobody_gets_more_than_was_requested() {
    let (mut driver, _) = drive(3);
    assert_eq!(send(&mut driver, PLUG, 0, 4), (NACK, 0));
    assert_eq!(send(&mut driver, PLUG, 0, 2), (ACK, 0));
    assert_eq!(send(&mut driver, PLUG, 2, 2), (NACK, 0));
    assert_eq!(send(&mut driver, PLUG, 2, 1), (ACK, 0));
    assert_eq!(send(&mut driver, PLUG, 3, 1), (NACK, 0));
    // A host that changes its mind takes nothing away by itself.
    driver.mmio.request_size(0).unwrap();
    assert_eq!((driver.mmio.device().plugged(), send(&mut driver, PLUG, 3, 1)), (3 * BLOCK, (NACK, 0)));
}

#[test]
fn what_the_host_cannot_take_back_stays_plugged() {
    let (mut driver, host) = drive(COUNT);
    assert_eq!(send(&mut driver, PLUG, 0, 8), (ACK, 0));
    host.stubborn.store(true, Ordering::SeqCst);
    assert_eq!(send(&mut driver, UNPLUG, 0, 2), (BUSY, 0));
    assert_eq!(send(&mut driver, UNPLUG_ALL, 0, 0), (BUSY, 0));
    assert_eq!(driver.mmio.device().plugged(), 8 * BLOCK);
    host.stubborn.store(false, Ordering::SeqCst);
    assert_eq!(send(&mut driver, UNPLUG, 0, 8), (ACK, 0));
}

#[test]
fn a_driver_is_told_of_another_size_and_sees_that_the_configuration_is_another() {
    let mut driver = Driver::cold(device(booted(), &Host::default()).unwrap());
    driver.mmio.request_size(BLOCK).unwrap();
    assert_eq!((driver.line.count(), driver.get(VIRTIO_MMIO_CONFIG_GENERATION)), (0, 1), "nobody is there to be told");

    let (driver, _) = drive(2);
    assert_eq!(driver.line.count(), 1);
    let line = driver.line.clone();
    let device = Arc::new(Mutex::new(driver.mmio));
    let mut slot = Slot::new(device.clone()).unwrap();
    let mut word = |offset: u32| {
        let mut data = [0; 4];
        slot.read(offset.into(), &mut data);
        u32::from_le_bytes(data)
    };
    assert_eq!((word(VIRTIO_MMIO_INTERRUPT_STATUS), word(VIRTIO_MMIO_CONFIG_GENERATION)), (VIRTIO_MMIO_INT_CONFIG, 1));
    device.lock().unwrap().request_size(4 * BLOCK).unwrap();
    assert_eq!((word(VIRTIO_MMIO_CONFIG_GENERATION), word(VIRTIO_MMIO_CONFIG + 48)), (2, 4 * BLOCK as u32));
    slot.write(VIRTIO_MMIO_INTERRUPT_ACK.into(), &VIRTIO_MMIO_INT_CONFIG.to_le_bytes());
    assert_eq!((device.lock().unwrap().state().interrupt_status, line.count()), (0, 2));

    let most = COUNT * BLOCK;
    for asked in [1, BLOCK - 1, BLOCK + 4096, most + BLOCK, u64::MAX - BLOCK + 1, u64::MAX] {
        assert_eq!(device.lock().unwrap().request_size(asked), Err(RequestError { asked, most }));
    }
    assert_eq!((device.lock().unwrap().device().requested(), line.count()), (4 * BLOCK, 2));
}

#[test]
fn a_restored_device_knows_its_blocks_and_so_does_one_that_was_reset() {
    let (mut driver, host) = drive(9);
    assert_eq!(send(&mut driver, PLUG, 60, 9), (ACK, 0));
    let (registers, state) = (driver.mmio.state(), driver.mmio.device().state());
    let state: MemoryState = serde_json::from_str(&serde_json::to_string(&state).unwrap()).unwrap();
    let chip = device(state.clone(), &host).unwrap();
    driver.mmio = Mmio::new(registers, chip, driver.mem.clone(), driver.line.clone()).unwrap();
    assert_eq!(send(&mut driver, STATE, 60, 9), (ACK, STATE_PLUGGED));

    driver.set(VIRTIO_MMIO_STATUS, 0);
    assert_eq!(driver.mmio.device().state(), state);
    assert!(host.discarded.lock().unwrap().is_empty());
}

#[test]
fn saved_states_that_cannot_have_been_are_refused() {
    let host = Host::default();
    let good = MemoryState { requested_size: 3 * BLOCK, ..booted() };
    assert!(device(good.clone(), &host).is_ok());
    let (large, odd) = ((1 << 44) + BLOCK, BLOCK + 1);
    let bad = [
        MemoryState { start: START + BLOCK, ..good.clone() },
        MemoryState { region_size: COUNT * BLOCK - BLOCK, ..good.clone() },
        MemoryState { requested_size: odd, ..good.clone() },
        MemoryState { requested_size: (COUNT + 1) * BLOCK, ..good.clone() },
        MemoryState { requested_size: u64::MAX, ..good.clone() },
        MemoryState { blocks: Blocks::default(), ..good.clone() },
        MemoryState { blocks: Blocks::unplugged(200), ..good.clone() },
    ];
    for state in bad {
        assert!(matches!(device(state.clone(), &host), Err(Error::Memory(_))), "{state:?}");
    }
    let mut beyond = good.clone();
    beyond.blocks.set(COUNT as usize..COUNT as usize + 1, true);
    assert!(matches!(device(beyond, &host), Err(Error::Memory(_))));
    // A machine laid out so that no device can be made of it.
    for (start, length) in [(START, large), (START, odd), (START + 1, BLOCK), (u64::MAX - BLOCK + 1, 2 * BLOCK)] {
        let region = (GuestAddress(start), length);
        let made = Memory::new(MemoryState::booted(region.0, length), region, Box::new(host.clone()), Arc::default());
        assert!(matches!(made, Err(Error::Memory(_))), "{start:#x} {length:#x}");
    }
}

#[test]
fn requests_cut_short_stop_the_device() {
    for (request, room) in [(23, 10), (24, 9), (0, 10), (24, 0)] {
        let (mut driver, _) = drive(COUNT);
        let next = crate::devices::virtio::testing::NEXT;
        driver.descriptor(DESC, 0, 0x8000, request, if room > 0 { next } else { 0 }, 1);
        driver.descriptor(DESC, 1, 0x9000, room, WRITE, 0);
        driver.submit(0);
        driver.notify();
        assert_eq!((driver.used(), driver.mmio.state().status & NEEDS_RESET), (None, NEEDS_RESET), "{request} {room}");
        assert_ne!(driver.mmio.state().status & DRIVER_OK, 0);
    }
}

#[test]
fn the_device_agrees_with_a_simple_one_about_a_riot_of_requests() {
    let (mut driver, host) = drive(0);
    let mut model = [false; COUNT as usize];
    let mut dice = 0x0dd5_u64;
    let mut roll = |below: u64| {
        dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (dice >> 33) % below
    };
    let (mut requested, mut answers) = (0, [0; 4]);
    for _ in 0..20_000 {
        if roll(20) == 0 {
            requested = roll(COUNT + 1);
            driver.mmio.request_size(requested * BLOCK).unwrap();
        }
        let stubborn = roll(6) == 0;
        host.stubborn.store(stubborn, Ordering::SeqCst);
        let (kind, first, count) = ([0, 1, 1, 3, 0, 1, 3, 2][roll(8) as usize], roll(COUNT + 2), roll(8) as u16);
        let inside = count > 0 && first + u64::from(count) <= COUNT;
        let slots = match kind {
            UNPLUG_ALL => &mut model[..],
            _ if inside => &mut model[first as usize..][..usize::from(count)],
            _ => &mut [],
        };
        let (on, of) = (slots.iter().filter(|slot| **slot).count(), slots.len());
        let want = match kind {
            UNPLUG_ALL if on > 0 && stubborn => (BUSY, 0),
            UNPLUG_ALL => (ACK, 0),
            _ if !inside => (ERROR, 0),
            STATE if on == 0 => (ACK, STATE_UNPLUGGED),
            STATE => (ACK, if on == of { STATE_PLUGGED } else { STATE_MIXED }),
            PLUG if on > 0 => (ERROR, 0),
            UNPLUG if on < of => (ERROR, 0),
            UNPLUG if stubborn => (BUSY, 0),
            PLUG if driver.mmio.device().plugged() / BLOCK + u64::from(count) > requested => (NACK, 0),
            _ => (ACK, 0),
        };
        if want.0 == ACK && kind != STATE {
            slots.fill(kind == PLUG);
        }
        assert_eq!(send(&mut driver, kind, first, count), want, "{kind} {first} {count} of {requested}");
        answers[usize::from(want.0)] += 1;
        let plugged = model.iter().filter(|slot| **slot).count() as u64;
        assert_eq!(driver.mmio.device().plugged(), plugged * BLOCK);
    }
    assert!(answers.iter().all(|&times| times > 100), "{answers:?}: this tests too little");
    let state = driver.mmio.device().state();
    assert_eq!(device(state.clone(), &host).unwrap().state(), state);
    assert!(Mmio::new(MmioState::default(), device(state, &host).unwrap(), driver.mem, driver.line).is_ok());
}
