//! What a hostile guest can do to a device: rings that make no sense, registers written in any order, and
//! saved state that was tampered with. Every test runs the real transport and a real device.

use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::VRING_DESC_F_INDIRECT;
use vm_memory::{Bytes, GuestAddress};

use super::VirtioDevice;
use super::block::{Block, BlockState};
use super::mmio::{LENGTH, Mmio};
use super::rng::{Rng, RngState};
use super::state::*;
use super::testing::*;
use crate::devices::BusDevice;
use crate::devices::testing::Counter;

const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;
/// An indirect table, and a place for data.
const TABLE: u64 = 0x8000;
const DATA: u64 = 0x1_0000;

fn drive() -> Driver<Block> {
    let disk = RawDisk::sparse(1 << 30);
    let driver = Driver::started(Block::new(BlockState::default(), Box::new(disk), "root", false).unwrap(), 0);
    // A request to read sector 0 lies ready as data.
    driver.mem.write_obj([VIRTIO_BLK_T_IN, 0, 0, 0], GuestAddress(DATA)).unwrap();
    driver
}

/// Submits the chain at descriptor 0, which must break the ring: nothing is answered, and the driver is told.
fn breaks(mut driver: Driver<Block>, what: &str) {
    driver.submit(0);
    driver.notify();
    assert_ne!(driver.get(VIRTIO_MMIO_STATUS) & NEEDS_RESET, 0, "{what}");
    assert_ne!(driver.get(VIRTIO_MMIO_INTERRUPT_STATUS) & VIRTIO_MMIO_INT_CONFIG, 0, "{what}");
    assert_eq!(driver.used(), None, "{what}");
    assert_eq!(driver.line.count(), 1, "{what}");
    driver.notify();
    assert_eq!(driver.used(), None, "{what}");
    works_after_reset(driver, what);
}

fn works_after_reset<D: VirtioDevice>(mut driver: Driver<D>, what: &str) {
    driver.set(VIRTIO_MMIO_STATUS, 0);
    assert_eq!((driver.get(VIRTIO_MMIO_STATUS), driver.get(VIRTIO_MMIO_INTERRUPT_STATUS)), (0, 0), "{what}");
    driver.negotiate(0);
    driver.set_up_queue(DESC, AVAIL, USED);
    driver.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    assert!(driver.mmio.is_active(), "{what}");
}

#[test]
fn chains_that_make_no_sense_stop_the_device_until_it_is_reset() {
    type Descriptor = (u64, u32, u16, u16);
    let header: Descriptor = (DATA, 16, NEXT, 1);
    let chains: [(&str, &[Descriptor]); 14] = [
        ("a loop of one", &[(DATA, 16, NEXT, 0)]),
        ("a loop of two", &[header, (DATA, 512, WRITE | NEXT, 1)]),
        ("a link out of the table", &[header, (DATA, 512, WRITE | NEXT, 16)]),
        ("a link far out of the table", &[header, (DATA, 512, WRITE | NEXT, u16::MAX)]),
        ("no status", &[(DATA, 16, 0, 0)]),
        ("no header", &[(DATA, 513, WRITE, 0)]),
        ("a short header", &[(DATA, 15, NEXT, 1), (DATA, 513, WRITE, 0)]),
        ("a status without length", &[header, (DATA, 0, WRITE, 0)]),
        ("a read-only status", &[header, (DATA, 512, WRITE | NEXT, 2), (DATA, 1, 0, 0)]),
        ("data beyond memory", &[header, (END - 8, 513, WRITE, 0)]),
        ("data in no memory", &[header, (0xd000_0000, 513, WRITE, 0)]),
        ("data that wraps", &[header, (u64::MAX - 8, 513, WRITE, 0)]),
        ("4 GiB of data", &[header, (DATA, u32::MAX, WRITE | NEXT, 2), (DATA, 1, WRITE, 0)]),
        ("more than 4 GiB", &[header, (0, END as u32, WRITE | NEXT, 2), (0, u32::MAX, WRITE, 0)]),
    ];
    for (what, chain) in chains {
        let driver = drive();
        for (index, &(address, length, flags, next)) in chain.iter().enumerate() {
            driver.descriptor(DESC, index as u16, address, length, flags, next);
        }
        breaks(driver, what);
    }
}

#[test]
fn indirect_tables_that_make_no_sense_stop_the_device() {
    for (what, address, length) in [
        ("an odd length", TABLE, 40),
        ("no length", TABLE, 0),
        ("too long", TABLE, 16 * 65536),
        ("longer than any queue", TABLE, 16 * 300),
        ("beyond memory", END - 16, 32),
        ("in no memory", 0xd000_0000, 32),
        ("wrapping", u64::MAX - 15, 32),
        ("huge", 0, 0xffff_fff0),
    ] {
        let driver = drive();
        driver.descriptor(DESC, 0, address, length, INDIRECT, 0);
        driver.mem.write_slice(&[0; 64], GuestAddress(END - 64)).unwrap();
        // A whole request, but for its length.
        for index in 0..299 {
            driver.descriptor(TABLE, index, DATA, 16, NEXT, index + 1);
        }
        driver.descriptor(TABLE, 299, DATA, 1, WRITE, 0);
        if what == "beyond memory" {
            driver.descriptor(END - 16, 0, DATA, 16, NEXT, 1);
        }
        breaks(driver, what);
    }
    let driver = drive();
    driver.descriptor(DESC, 0, TABLE, 32, INDIRECT, 0);
    driver.descriptor(TABLE, 0, DATA, 16, NEXT, 1);
    driver.descriptor(TABLE, 1, TABLE, 32, INDIRECT, 0);
    breaks(driver, "a table in a table");
}

#[test]
fn an_indirect_table_that_makes_sense_is_served() {
    let mut driver = drive();
    driver.descriptor(DESC, 3, TABLE, 48, INDIRECT, 0);
    driver.descriptor(TABLE, 0, DATA, 16, NEXT, 2);
    driver.descriptor(TABLE, 2, DATA + 0x1000, 512, WRITE | NEXT, 1);
    driver.descriptor(TABLE, 1, DATA + 0x2000, 1, WRITE, 0);
    driver.submit(3);
    driver.notify();
    assert_eq!(driver.used(), Some((3, 513)));
}

#[test]
fn aliased_buffers_cannot_make_one_request_last_for_ever() {
    let mut driver = drive();
    // 250 times the same mebibyte: all of it in memory, far more than the limits of the configuration space.
    driver.descriptor(DESC, 0, TABLE, 16 * 252, INDIRECT, 0);
    driver.descriptor(TABLE, 0, DATA, 16, NEXT, 1);
    for index in 1..251 {
        driver.descriptor(TABLE, index, SEAM, 1 << 20, WRITE | NEXT, index + 1);
    }
    driver.descriptor(TABLE, 251, DATA + 0x1000, 1, WRITE, 0);
    driver.submit(0);
    driver.notify();
    assert_eq!(driver.used(), Some((0, 0)));
    assert_eq!(driver.mem.read_obj::<u8>(GuestAddress(DATA + 0x1000)).unwrap(), 1, "VIRTIO_BLK_S_IOERR");
}

#[test]
fn rings_that_make_no_sense_stop_the_device() {
    for jump in [17, 1000, u16::MAX] {
        let mut driver = drive();
        driver.submitted = jump - 1;
        breaks_at(&mut driver, 0, "an index that jumps");
    }
    for head in [16, u16::MAX] {
        breaks_at(&mut drive(), head, "a head out of the table");
    }
}

fn breaks_at(driver: &mut Driver<Block>, head: u16, what: &str) {
    driver.submit(head);
    driver.notify();
    assert_ne!(driver.get(VIRTIO_MMIO_STATUS) & NEEDS_RESET, 0, "{what} {head}");
    assert_eq!(driver.used(), None);
}

#[test]
fn queues_outside_memory_never_become_ready() {
    let places = [
        (DESC + 8, AVAIL, USED),
        (DESC, AVAIL + 1, USED),
        (DESC, AVAIL, USED + 2),
        (END - 16 * 15, AVAIL, USED),
        (DESC, END - 36, USED),
        (DESC, AVAIL, END - 132),
        (0xd000_0000, AVAIL, USED),
        (DESC, 0xd000_0000, USED),
        (DESC, AVAIL, 0xd000_0000),
        (!15, AVAIL, USED),
        (DESC, !1, USED),
        (DESC, AVAIL, !3),
    ];
    for (desc, avail, used) in places {
        let mut driver = Driver::cold(Rng::new(RngState::default()));
        driver.negotiate(0);
        driver.set_up_queue(desc, avail, used);
        assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_READY), 0, "{desc:#x} {avail:#x} {used:#x}");
        assert_ne!(driver.get(VIRTIO_MMIO_STATUS) & NEEDS_RESET, 0);
        works_after_reset(driver, "a queue outside memory");
    }
}

#[test]
fn queues_are_set_up_between_features_and_use_or_not_at_all() {
    let mut driver = Driver::cold(Rng::new(RngState::default()));
    driver.set_up_queue(DESC, AVAIL, USED);
    assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_READY), 0, "before the features");
    driver.negotiate(0);
    driver.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    driver.set_up_queue(DESC, AVAIL, USED);
    assert_eq!(driver.get(VIRTIO_MMIO_QUEUE_READY), 0, "while the device is in use");

    // A queue from before a reset is gone.
    let mut driver = Driver::started(Rng::new(RngState::default()), 0);
    driver.set(VIRTIO_MMIO_STATUS, 0);
    driver.negotiate(0);
    driver.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    assert!(driver.mmio.is_active());
    driver.descriptor(DESC, 0, DATA, 64, WRITE, 0);
    driver.submit(0);
    driver.notify();
    assert_eq!(driver.used(), None);
}

#[test]
fn the_status_goes_only_along_its_path() {
    let rng = || Driver::cold(Rng::new(RngState::default()));
    // Steps that are left out.
    for status in [DRIVER, DRIVER_OK, FEATURES_OK, ACKNOWLEDGE | DRIVER_OK, NEEDS_RESET, 0xffff_ff00 & !FAILED] {
        let mut driver = rng();
        driver.set(VIRTIO_MMIO_STATUS, status);
        assert_eq!(driver.get(VIRTIO_MMIO_STATUS), status & ACKNOWLEDGE, "{status:#x}");
    }
    // Features that were not offered, and no agreement on version 1.
    for (half, features) in [(0, 1), (1, 0), (1, u32::MAX)] {
        let mut driver = rng();
        driver.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE);
        driver.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER);
        driver.set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        driver.set(VIRTIO_MMIO_DRIVER_FEATURES, 1);
        driver.set(VIRTIO_MMIO_DRIVER_FEATURES_SEL, half);
        driver.set(VIRTIO_MMIO_DRIVER_FEATURES, features);
        driver.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert_eq!(driver.get(VIRTIO_MMIO_STATUS), ACKNOWLEDGE | DRIVER, "{half} {features:#x}");
    }
    // A device in use keeps its features and queues.
    let mut driver = Driver::started(Rng::new(RngState::default()), 0);
    let before = driver.mmio.state();
    driver.set(VIRTIO_MMIO_DRIVER_FEATURES, 0);
    driver.set(VIRTIO_MMIO_QUEUE_NUM, 2);
    driver.set(VIRTIO_MMIO_QUEUE_DESC_LOW, 0);
    driver.set(VIRTIO_MMIO_QUEUE_USED_HIGH, 7);
    driver.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE);
    assert_eq!(driver.mmio.state(), before);
    // A driver that gave up is not served.
    driver.set(VIRTIO_MMIO_STATUS, FAILED);
    assert!(!driver.mmio.is_active());
}

#[test]
fn tampered_state_is_refused_one_field_at_a_time() {
    let mut driver = Driver::started(Rng::new(RngState::default()), 0);
    driver.descriptor(DESC, 0, DATA, 64, WRITE, 0);
    driver.submit(0);
    driver.notify();
    let good = driver.mmio.state();
    assert_eq!((good.queues[0].next_avail, good.queues[0].next_used), (1, 1));
    let json = serde_json::to_string(&good).unwrap();
    assert_eq!(serde_json::from_str::<MmioState>(&json).unwrap(), good);

    let restore = |state| {
        let (mem, line) = (driver.mem.clone(), Arc::new(Counter::default()));
        Mmio::new(state, Rng::new(RngState::default()), mem, line)
    };
    assert_eq!(restore(good.clone()).unwrap().state(), good);
    type Tamper = fn(&mut MmioState);
    let tampers: [(&str, Tamper); 17] = [
        ("a step missing", |s| s.status = DRIVER_OK),
        ("unknown status", |s| s.status |= 0x100),
        ("an unknown feature", |s| s.driver_features |= 1),
        ("no version 1", |s| s.driver_features &= !(1 << 32)),
        ("an unknown interrupt", |s| s.interrupt_status = 4),
        ("a queue more", |s| s.queues.push(QueueState::default())),
        ("a queue less", |s| s.queues.clear()),
        ("a ready queue before its time", |s| s.status = ACKNOWLEDGE | DRIVER),
        ("no size", |s| s.queues[0].size = 0),
        ("an odd size", |s| s.queues[0].size = 15),
        ("too large a size", |s| s.queues[0].size = 128),
        ("descriptors outside memory", |s| s.queues[0].desc = END),
        ("descriptors askew", |s| s.queues[0].desc += 8),
        ("an available ring outside memory", |s| s.queues[0].avail = u64::MAX - 1),
        ("a used ring outside memory", |s| s.queues[0].used = END - 4),
        ("more used than available", |s| s.queues[0].next_used = 2),
        ("more on its way than fits", |s| s.queues[0].next_avail = 18),
    ];
    for (what, tamper) in tampers {
        let mut state = good.clone();
        tamper(&mut state);
        assert!(restore(state).is_err(), "{what}");
    }
}

/// Numbers that look random and are the same in every run (xorshift64*, Vigna 2016).
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.roll() % limit
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

/// Addresses and lengths at the edges of what makes sense.
const NUMBERS: [u64; 12] = [0, 1, 2, 15, 16, 512, DESC, DATA, END - 8, 0xd000_0000, u32::MAX as u64, u64::MAX - 15];

/// One thing that a guest without manners might do.
fn mischief<D: VirtioDevice>(driver: &mut Driver<D>, dice: &mut Dice) {
    if !driver.mmio.is_active() && dice.below(2) == 0 {
        return start_over(driver, dice);
    }
    let any_register = dice.below(LENGTH / 4) as u32 * 4;
    match dice.below(32) {
        0 => driver.set(any_register, dice.roll() as u32),
        1 => driver.set(any_register, dice.pick(&NUMBERS) as u32),
        2 => {
            let length = dice.pick(&[0, 1, 2, 3, 4, 8]);
            driver.mmio.write(dice.below(LENGTH), &dice.roll().to_le_bytes()[..length]);
            driver.mmio.read(dice.below(LENGTH), &mut [0; 8][..length]);
        }
        3 => driver.set(VIRTIO_MMIO_STATUS, dice.pick(&[0, 1, 3, 11, 15, 64, 128, 255])),
        // Noise in the rings and in an indirect table.
        4 => noise(driver, dice, &[DESC, AVAIL, USED]),
        5 => noise(driver, dice, &[TABLE]),
        6..=9 => odd_descriptor(driver, dice),
        _ => {
            request(driver, dice);
            if dice.below(2) == 0 {
                odd_descriptor(driver, dice);
            }
            let odd = dice.below(20) as u16;
            driver.submit(dice.pick(&[0, 0, 0, 0, 0, 0, 3, odd]));
            driver.notify();
        }
    }
}

fn start_over<D: VirtioDevice>(driver: &mut Driver<D>, dice: &mut Dice) {
    driver.set(VIRTIO_MMIO_STATUS, 0);
    driver.mem.write_obj(0u32, GuestAddress(AVAIL)).unwrap();
    driver.submitted = 0;
    driver.negotiate(dice.pick(&[0, 1 << 29, 1 << 28, u64::MAX >> 32]));
    driver.set_up_queue(DESC, AVAIL, USED);
    driver.set(VIRTIO_MMIO_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
}

fn noise<D: VirtioDevice>(driver: &mut Driver<D>, dice: &mut Dice, places: &[u64]) {
    let at = dice.pick(places) + dice.below(300);
    driver.mem.write_obj(dice.roll(), GuestAddress(at)).unwrap();
}

fn odd_descriptor<D: VirtioDevice>(driver: &mut Driver<D>, dice: &mut Dice) {
    let table = dice.pick(&[DESC, DESC, TABLE]);
    let flags = dice.pick(&[0, NEXT, WRITE, WRITE | NEXT, INDIRECT, INDIRECT | NEXT, u16::MAX]);
    let (odd, length) = (dice.pick(&NUMBERS), dice.pick(&NUMBERS));
    let address = dice.pick(&[DATA, DATA, TABLE, SEAM - 5, odd]);
    driver.descriptor(table, dice.below(4) as u16, address, length as u32, flags, dice.below(18) as u16);
}

/// A block request of some kind that is well formed, as chain 0.
fn request<D: VirtioDevice>(driver: &mut Driver<D>, dice: &mut Dice) {
    let odd = dice.roll() as u32;
    let kind = dice.pick(&[VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, 4, 8, 11, 13, odd]);
    let length = dice.pick(&[0, 16, 512, 1024]);
    let direction = if matches!(kind, VIRTIO_BLK_T_IN | 8) { WRITE } else { 0 };
    driver.mem.write_obj([kind, 0, dice.below(70) as u32, 0], GuestAddress(DATA)).unwrap();
    driver.mem.write_obj([dice.below(70) as u32, 0, dice.below(9) as u32, 0], GuestAddress(DATA + 16)).unwrap();
    driver.descriptor(DESC, 0, DATA, 16, NEXT, 1);
    driver.descriptor(DESC, 1, DATA + 16, length, direction | NEXT, 2);
    driver.descriptor(DESC, 2, DATA + 0x2000, 1, WRITE, 0);
    driver.descriptor(DESC, 3, TABLE, 48, INDIRECT, 0);
}

fn run_riot<D: VirtioDevice>(make: impl Fn() -> D, seed: u64) {
    let (mut driver, mut dice) = (Driver::started(make(), 0), Dice(seed));
    let (began, mut served) = (Instant::now(), 0);
    for _ in 0..100_000 {
        let before = driver.mmio.state().queues[0].next_used;
        mischief(&mut driver, &mut dice);
        served += u32::from(driver.mmio.state().queues[0].next_used != before);
        if dice.below(1000) == 0 {
            // Whatever state a guest brings about, it can be saved and restored.
            let state = driver.mmio.state();
            let (mem, line) = (driver.mem.clone(), driver.line.clone());
            driver.mmio =
                Mmio::new(state.clone(), make(), mem, line).unwrap_or_else(|error| panic!("{error}: {state:?}"));
            assert_eq!(driver.mmio.state(), state);
        }
    }
    eprintln!("{served} requests served in {:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());
    assert!(served > 10_000, "only {served} requests got through: this tests nothing");
}

#[test]
fn a_riot_of_registers_and_rings_harms_no_block_device() {
    run_riot(|| Block::new(BlockState::default(), Box::new(RawDisk::new(64).0), "root", false).unwrap(), 0x00c0_ffee);
}

#[test]
fn a_riot_of_registers_and_rings_harms_no_rng() {
    run_riot(|| Rng::new(RngState::default()), 0xcafe_f00d);
}
