//! What a guest has flushed is there, whatever becomes of its monitor.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, sleep};
use std::time::Duration;

use common::monitor::{monitor_of, signal};
use common::{Machine, catnap, disk, http, in_background, inside, machine, machine_folder};

#[test]
fn what_was_flushed_survives_kill_9() {
    match inside::here().as_deref() {
        Some("write") => return write_ledger(),
        Some(safe) => return check_ledger(safe.parse().expect("a number")),
        None => {}
    }
    let base = disk::digest(&disk::base());
    let anna = machine("anna").publish(80).boot();
    // scripts/soak asks for many more rounds.
    let rounds = std::env::var("CATNAP_TEST_ROUNDS").map_or(3, |rounds| rounds.parse().expect("a number of rounds"));
    let mut dice = Dice(std::process::id().into());
    let mut promised = Promised::default();
    for round in 0..rounds {
        println!("  round {round} of {rounds}");
        match round % 3 {
            0 | 1 => kill_while_it_writes(&anna, &mut promised, &mut dice),
            _ => kill_while_it_comes_or_goes(&anna, &mut dice),
        }
        assert_eq!(anna.view()["detail"], "its monitor was killed");
        anna.disk_is_sound_after(round + 1);
        anna.start();
        promises_are_kept(&anna, &promised);
    }
    anna.stop();
    anna.disk_is_sound_after(rounds);
    anna.filesystem_is_clean();
    assert_eq!(disk::digest(&disk::base()), base, "the base was written to");
}

/// What a guest has told the outside that it is safe.
#[derive(Default)]
struct Promised {
    /// The last number in the ledger.
    ledger: u64,
    /// Visitors who were thanked for their entry in the guest book.
    visitors: u64,
}

fn kill_while_it_writes(anna: &Machine, promised: &mut Promised, dice: &mut Dice) {
    let mut writer = anna.other_half_begins("what_was_flushed_survives_kill_9", "write", "safe");
    let (visitors, dead) = (AtomicU64::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !dead.load(Ordering::SeqCst)
                && http::thanks(anna.port(80), "/api/guestbook", r#"{"name":"Ben","message":"purr"}"#)
            {
                visitors.fetch_add(1, Ordering::SeqCst);
            }
        });
        sleep(Duration::from_millis(1000 + dice.below(3000)));
        anna.kill_monitor();
        dead.store(true, Ordering::SeqCst);
    });
    assert_eq!(anna.state(), "died");
    assert!(machine_folder("anna").join("../../../run/anna/control.sock").exists(), "a dead monitor leaves its socket");
    let numbers = writer.lines.by_ref().filter_map(|line| line.strip_prefix("safe ")?.parse().ok());
    promised.ledger = numbers.max().unwrap_or(promised.ledger);
    promised.visitors += visitors.into_inner();
    println!("    safe: number {} in the ledger, {} entries of the guest book", promised.ledger, promised.visitors);
}

/// At any moment of a boot or of a shutdown.
fn kill_while_it_comes_or_goes(anna: &Machine, dice: &mut Dice) {
    let (verb, moment) = if dice.below(2) == 0 { ("start", dice.below(8000)) } else { ("stop", dice.below(400)) };
    if verb == "start" {
        anna.stop();
    }
    println!("    killed {moment} ms into {verb}");
    let mut busy = in_background(&[verb, &anna.name]);
    sleep(Duration::from_millis(moment));
    if let Some(pid) = monitor_of(&anna.name) {
        signal(pid, libc::SIGKILL);
    }
    drop(busy.wait());
    // It had not come yet, or had gone, or its process had just begun or was at its end, and had nothing of the
    // machine: then a running one will do.
    if anna.state() != "died" {
        drop(anna.catnap("start"));
        anna.kill_monitor();
    }
}

fn promises_are_kept(anna: &Machine, promised: &Promised) {
    anna.other_half("what_was_flushed_survives_kill_9", &promised.ledger.to_string());
    let entries = anna.status_of("guestbook_entries");
    assert!(entries >= promised.visitors, "{entries} of {} entries are there", promised.visitors);
    let said = anna.sh("dmesg | grep -i ext4");
    assert!(!said.contains("error") && !said.contains("warning"), "{said}");
}

// The ledger: the slots of a file are written over again and again, each with its number in every word. A
// number is safe when its slot was flushed; what was written since may be there or not, but never in part
// or in another slot's place: a slot is larger than a sector, so the guest's filesystem journals nothing of
// it, and a torn one shows.

const LEDGER: &str = "/root/ledger";
const SLOTS: u64 = 512;
/// Numbers between two flushes.
const BATCH: u64 = 8;
const WORDS: usize = 512;
const SLOT: u64 = WORDS as u64 * 8;

/// In the guest: goes on from where the ledger ends.
fn write_ledger() {
    let ledger = File::options().create(true).truncate(false).read(true).write(true).open(LEDGER).expect("the ledger");
    let mut number = (0..SLOTS).filter_map(|slot| read_slot(&ledger, slot)?.first().copied()).max().unwrap_or(0);
    loop {
        for _ in 0..BATCH {
            number += 1;
            ledger.write_all_at(&number.to_le_bytes().repeat(WORDS), number % SLOTS * SLOT).expect("a slot");
        }
        ledger.sync_data().expect("a flush");
        // Space that comes and goes.
        let scrap = format!("/root/scrap-{}", number % 5);
        fs::write(&scrap, vec![7; 50_000]).and_then(|()| fs::remove_file(&scrap)).expect("a file");
        println!("safe {number}");
    }
}

/// In the guest: everything up to `safe` is there.
fn check_ledger(safe: u64) {
    let ledger = File::open(LEDGER).expect("the ledger");
    for number in safe.saturating_sub(SLOTS - 1).max(1)..=safe {
        let slot = read_slot(&ledger, number % SLOTS).expect("a slot");
        let newest = slot.iter().max().expect("words");
        // Written over since, in whole or, as nobody has flushed that, in part.
        let allowed = |word: &u64| *word >= number && word % SLOTS == number % SLOTS;
        assert!(slot.iter().all(allowed), "number {number} of {safe} is lost: its slot holds {newest}");
    }
}

fn read_slot(ledger: &File, slot: u64) -> Option<Vec<u64>> {
    let mut bytes = vec![0; SLOT as usize];
    ledger.read_exact_at(&mut bytes, slot * SLOT).ok()?;
    Some(bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes"))).collect())
}

/// Numbers that differ from run to run (xorshift, Marsaglia 2003).
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        for shift in [13i32, -7, 17] {
            self.0 ^= if shift > 0 { self.0 << shift } else { self.0 >> -shift };
        }
        self.0 % end
    }
}

#[test]
fn a_disk_has_one_machine_at_a_time() {
    let anna = machine("anna").boot();
    anna.sh("dd if=/dev/urandom of=/root/big bs=1M count=64 conv=fsync");
    let digest = anna.sh("sha256sum /root/big");
    // Ben's disk is Anna's, by another name.
    let ben = machine("ben").boot();
    ben.stop();
    let theirs = ben.disk();
    fs::remove_file(&theirs).and_then(|()| fs::hard_link(anna.disk(), &theirs)).expect("a link");
    ben.catnap("start").refuses(4, &["root.qcow2", "in use"]);
    assert_eq!(ben.state(), "stopped");
    assert_eq!(anna.sh("sha256sum /root/big"), digest);
    anna.stop();
    ben.start();
    assert_eq!(ben.sh("sha256sum /root/big"), digest);
    catnap(&["start", "anna"]).refuses(4, &["root.qcow2", "in use"]);
    ben.stop();
    anna.disk_is_sound();
}
