use std::sync::mpsc::{Receiver, channel};

use super::*;
use crate::devices::testing::Counter;

struct Bench {
    cpus: Cpus,
    ejected: Receiver<u32>,
    line: Arc<Counter>,
    changes: Arc<Changes>,
}

fn bench(state: CpusState, count: u32) -> Result<Bench, Error> {
    let (line, changes, (send, ejected)) = (Arc::new(Counter::default()), Arc::new(Changes::default()), channel());
    let events = Events::new(0, line.clone()).unwrap();
    let cpus = Cpus::new(state, count, events, changes.clone(), Box::new(move |cpu| send.send(cpu).unwrap()))?;
    Ok(Bench { cpus, ejected, line, changes })
}

impl Bench {
    fn byte(&mut self, offset: u64) -> u8 {
        let mut data = [0xaa];
        self.cpus.read(offset, &mut data);
        data[0]
    }

    fn status(&mut self, cpu: u8) -> u8 {
        self.cpus.write(SELECTED, &[cpu]);
        self.byte(STATUS)
    }

    fn set_status(&mut self, cpu: u8, value: u8) {
        self.cpus.write(SELECTED, &[cpu]);
        self.cpus.write(STATUS, &[value]);
    }

    /// `_OST` of a vCPU.
    fn outcome(&mut self, cpu: u8, event: u32, outcome: u32) {
        self.cpus.write(SELECTED, &[cpu]);
        self.cpus.write(EVENT, &event.to_le_bytes());
        self.cpus.write(OUTCOME, &outcome.to_le_bytes());
    }

    /// What the method CSCN does; returns which notifications it sends.
    fn scan(&mut self) -> Vec<(u8, u8)> {
        let mut sent = Vec::new();
        while let cpu @ 0..64 = self.byte(NEXT) {
            let status = self.status(cpu);
            for (bit, what) in [(STATUS_OFFERED, 1), (STATUS_ASKED_BACK, 3)] {
                if status & bit != 0 {
                    self.cpus.write(STATUS, &[bit]);
                    sent.push((cpu, what));
                }
            }
        }
        sent
    }
}

#[test]
fn vcpus_come_and_go_as_the_host_wishes_and_the_guest_agrees() {
    let mut bench = bench(CpusState::booted(2), 4).unwrap();
    assert_eq!([0, 1, 2, 3].map(|cpu| bench.status(cpu)), [1, 1, 0, 0]);
    assert_eq!((bench.byte(NEXT), bench.scan()), (NEXT_NONE, vec![]));

    bench.cpus.insert(3).unwrap();
    bench.cpus.insert(2).unwrap();
    bench.cpus.remove(1).unwrap();
    assert_eq!(bench.line.count(), 3);
    assert_eq!((bench.cpus.present(), bench.cpus.pending()), (0b1111, 0b1110));
    assert_eq!([1, 2, 3].map(|cpu| bench.status(cpu)), [5, 3, 3]);
    let seen = bench.changes.count();
    assert_eq!(bench.scan(), [(1, 3), (2, 1), (3, 1)]);
    assert_eq!((bench.cpus.pending(), bench.byte(NEXT)), (0, NEXT_NONE));
    assert_eq!(bench.changes.count(), seen + 3);

    bench.set_status(1, STATUS_EJECT);
    assert_eq!((bench.cpus.present(), bench.changes.count()), (0b1101, seen + 4));
    assert_eq!(bench.ejected.try_iter().collect::<Vec<_>>(), [1]);
    // What is gone can come again.
    bench.cpus.insert(1).unwrap();
    assert_eq!(bench.scan(), [(1, 1)]);
}

#[test]
fn what_the_guest_never_saw_is_taken_back_at_once() {
    let mut bench = bench(CpusState::booted(1), 2).unwrap();
    bench.cpus.insert(1).unwrap();
    bench.cpus.remove(1).unwrap();
    assert_eq!((bench.cpus.present(), bench.cpus.pending(), bench.scan()), (1, 0, vec![]));
    assert_eq!(bench.ejected.try_iter().collect::<Vec<_>>(), [1]);

    bench.cpus.insert(1).unwrap();
    assert_eq!(bench.scan(), [(1, 1)]);
    bench.cpus.remove(1).unwrap();
    bench.cpus.keep(1).unwrap();
    assert_eq!((bench.cpus.present(), bench.scan()), (0b11, vec![]));
}

#[test]
fn a_guest_that_cannot_says_so_until_it_is_asked_again() {
    let mut bench = bench(CpusState::booted(2), 4).unwrap();
    bench.cpus.remove(1).unwrap();
    bench.scan();
    // Success, what goes on, other events, and vCPUs that are not there are no refusals.
    let seen = bench.changes.count();
    for (cpu, event, outcome) in
        [(1, 3, 0), (1, 3, 0x84), (1, 0x103, 0x84), (1, 1, 0x80), (1, 0, 1), (1, u32::MAX, 1), (4, 3, 1), (255, 3, 1)]
    {
        bench.outcome(cpu, event, outcome);
    }
    bench.outcome(3, 3, 1);
    assert_eq!(bench.cpus.refused(), 0);
    assert_eq!(bench.changes.count(), seen + 1);
    bench.outcome(1, 3, 0x82);
    assert_eq!((bench.cpus.refused(), bench.cpus.present()), (0b10, 0b11));
    bench.cpus.remove(1).unwrap();
    assert_eq!(bench.cpus.refused(), 0);
    bench.outcome(1, 0x103, 1);
    bench.set_status(1, STATUS_EJECT);
    assert_eq!(bench.cpus.refused(), 0);
}

#[test]
fn the_host_cannot_ask_for_what_makes_no_sense() {
    let mut bench = bench(CpusState::booted(2), 4).unwrap();
    assert!(matches!(bench.cpus.insert(1), Err(CpuError::There(1))));
    assert!(matches!(bench.cpus.remove(2), Err(CpuError::Away(2))));
    assert!(matches!(bench.cpus.remove(0), Err(CpuError::First)));
    for cpu in [4, 64, u32::MAX] {
        assert!(matches!(bench.cpus.insert(cpu), Err(CpuError::Beyond { last: 3, .. })));
        assert!(matches!(bench.cpus.remove(cpu), Err(CpuError::Beyond { last: 3, .. })));
        assert!(matches!(bench.cpus.keep(cpu), Err(CpuError::Beyond { last: 3, .. })));
    }
    assert_eq!((bench.cpus.state(), bench.line.count()), (CpusState::booted(2), 0));
}

#[test]
fn saved_states_that_cannot_have_been_are_refused() {
    let good = CpusState { present: 0b111, offered: 0b10, asked_back: 0b100, refused: 0b1000, selected: 255, event: 9 };
    let restored = bench(good.clone(), 4).unwrap();
    assert_eq!(restored.cpus.state(), good);
    let bad = [
        CpusState { present: 0b110, ..good.clone() },
        CpusState { present: 0b1_0111, ..good.clone() },
        CpusState { offered: 0b1000, ..good.clone() },
        CpusState { asked_back: 0b1000, ..good.clone() },
        CpusState { asked_back: 0b110, ..good.clone() },
        CpusState { asked_back: 0b101, ..good.clone() },
        CpusState { refused: 1 << 4, ..good.clone() },
    ];
    for state in bad {
        assert!(bench(state.clone(), 4).is_err(), "{state:?}");
    }
    for count in [0, 2, 65, u32::MAX] {
        assert!(bench(good.clone(), count).is_err(), "{count}");
    }
    assert_eq!(bench(CpusState::booted(64), 64).unwrap().cpus.present(), u64::MAX);
}

#[test]
fn a_riot_at_the_ports_leaves_a_state_that_can_be_restored() {
    let mut bench = bench(CpusState::booted(1), 64).unwrap();
    let mut dice = 0x5eed_u64;
    let mut roll = |below: u64| {
        dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (dice >> 33) % below
    };
    for _ in 0..100_000 {
        let (offset, length, cpu) = (roll(14), [1, 1, 1, 2, 4, 8][roll(6) as usize], roll(66) as u32);
        let mut data: Vec<u8> = (0..length).map(|_| roll(256) as u8).collect();
        match roll(9) {
            0 => bench.cpus.read(offset, &mut data),
            1 => _ = bench.cpus.insert(cpu),
            2 => _ = bench.cpus.remove(cpu),
            3 => _ = bench.cpus.keep(cpu),
            4 => _ = bench.scan(),
            5 => bench.outcome(cpu as u8, [1, 3, 0x103, 0x200][roll(4) as usize], roll(0x90) as u32),
            6 => bench.set_status(cpu as u8, data[0]),
            _ => bench.cpus.write(offset, &data),
        }
        bench.cpus.state().check(u64::MAX).unwrap();
    }
    assert!(bench.ejected.try_iter().count() > 1000, "this tests nothing");
}
