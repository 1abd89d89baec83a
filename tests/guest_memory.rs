//! A snapshot's memory is the guest's, byte for byte, however many differences it is made of.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use catnap::control::Client;
use catnap::control::protocol::MAX_CELLS;
use catnap::snapshot::memory::{Index, PAGE, Piece, Region, Source, resolve};
use catnap::store::Store;
use catnap::sys::home::Home;
use common::naps::{Swept, wake};
use common::{Machine, http, machine, with_input};

/// How many pages are compared at once.
const STEP: u64 = 256 * PAGE;

#[test]
fn base_and_differences_are_the_memory_of_that_instant() {
    let _swept = Swept;
    let anna = machine("anna").cpus(2).with(["--max-memory", "512M"]).publish(80).boot();
    anna.snapshot("base", &[]);
    work(&anna);
    anna.snapshot("first", &[]);
    looked_at(&anna, || {
        work(&anna);
        anna.snapshot("second", &[]);
        work(&anna);
        anna.catnap("pause").succeeds();
        anna.snapshot("third", &[]);
    });
    is_the_memory_of(&anna, "anna@third");
    // Once more, with nothing in between but what the last one itself did.
    anna.snapshot("fourth", &[]);
    is_the_memory_of(&anna, "anna@fourth");
    drop(anna);
    // A machine that woke has its memory from files, and its first snapshot is a difference to them.
    let (bella, _) = wake("anna@first", "bella", &[]);
    work(&bella);
    bella.catnap("pause").succeeds();
    bella.snapshot("fifth", &[]);
    is_the_memory_of(&bella, "bella@fifth");
}

/// Looks at the memory map again and again while something is done. It reads KVM's log, which empties it.
fn looked_at(machine: &Machine, act: impl FnOnce()) {
    let client = Client::new(machine.file("socket"));
    // Goes when this does, also in a panic.
    let enough = Arc::new(());
    let until = Arc::downgrade(&enough);
    let looking = thread::spawn(move || {
        let mut looks = 0;
        while until.strong_count() > 0 {
            let map = client.memory_map(MAX_CELLS).expect("a map");
            let pages: u32 = map.cells.iter().flat_map(|cell| <[u32; 5]>::from(*cell)).sum();
            assert_eq!((u64::from(pages), map.since_snapshot), ((256 << 20) / PAGE, true));
            looks += 1;
            thread::sleep(Duration::from_millis(50));
        }
        looks
    });
    act();
    drop(enough);
    let looks = looking.join().expect("maps");
    println!("  looked at the memory map {looks} times meanwhile");
    assert!(looks > 5, "only {looks} looks");
}

/// Has memory written: by the CPU, by the disk (into the page cache), by the socket device, and given back.
fn work(machine: &Machine) {
    machine.sh(
        "head -c 6000000 /dev/urandom >/root/noise; sync; echo 3 >/proc/sys/vm/drop_caches; md5sum /root/noise >/tmp/sum; \
         head -c 3000000 /dev/urandom >/tmp/noise; dd if=/dev/vda of=/dev/null bs=64k count=100 2>/dev/null",
    );
    let through_the_socket = vec![0x5a; 2 << 20];
    with_input(&["exec", &machine.name, "--", "sh", "-c", "cat >/tmp/sent"], &through_the_socket).succeeds();
    for _ in 0..5 {
        http::get(machine.port(80), "/").text();
    }
}

/// The memory of a snapshot of a machine that has stood still since then is what is in its monitor.
fn is_the_memory_of(machine: &Machine, snapshot: &str) {
    let store = Store::open(&Home::from_env().expect("a home")).expect("a store");
    let saved = Saved::new(&store, snapshot);
    let monitor = Monitor::of(machine.pid());
    for region in saved.regions.clone() {
        let places = monitor.places(region.length);
        // Neighbours in memory look like one place, and RAM is at one end of it.
        let differ = places.iter().map(|place| saved.differing(region, &monitor, *place)).min();
        let (pages, layers) = (region.length / PAGE, saved.data.len());
        println!("  {snapshot}: {layers} layers, {differ:?} of {pages} pages from {:#x} differ", region.start);
        assert_eq!(differ, Some(0), "pages of {snapshot} are not what the guest had");
    }
}

/// A snapshot's memory.
struct Saved {
    regions: Vec<Region>,
    pieces: Vec<Piece>,
    data: Vec<File>,
}

impl Saved {
    fn new(store: &Store, snapshot: &str) -> Saved {
        let chain = store.memory_chain(&store.resolve(snapshot).expect("a snapshot")).expect("its memory");
        let indices: Vec<Index> = chain.iter().map(|one| Index::read(&one.dir).expect("an index")).collect();
        let data = chain.iter().map(|one| File::open(one.dir.join("memory")).expect("a memory")).collect();
        let pieces = resolve(&indices.iter().collect::<Vec<_>>()).expect("a memory");
        Saved { regions: indices[0].regions().to_vec(), pieces, data }
    }

    /// How many pages of a region are not what a monitor has, if the region is at `place` in it.
    fn differing(&self, region: Region, monitor: &Monitor, place: u64) -> usize {
        let (mut ours, mut theirs, mut differ) = (vec![0; STEP as usize], vec![0; STEP as usize], 0);
        let inside = region.start..region.start + region.length;
        for piece in self.pieces.iter().filter(|piece| inside.contains(&piece.address)) {
            for at in (0..piece.length).step_by(STEP as usize) {
                let (address, length) = (piece.address + at, STEP.min(piece.length - at) as usize);
                let (ours, theirs) = (&mut ours[..length], &mut theirs[..length]);
                if monitor.is_untouched(place + address - region.start, length as u64) {
                    theirs.fill(0);
                } else {
                    monitor.memory.read_exact_at(theirs, place + address - region.start).expect("RAM");
                }
                match piece.source {
                    Source::Zeros => ours.fill(0),
                    Source::Layer { layer, offset } => {
                        self.data[layer].read_exact_at(ours, offset + at).expect("bytes");
                    }
                }
                let pages = ours.chunks(PAGE as usize).zip(theirs.chunks(PAGE as usize));
                for (page, _) in pages.enumerate().filter(|(_, (ours, theirs))| ours != theirs) {
                    differ += 1;
                    if differ <= 5 {
                        println!("    {:#x} differs: {:?}", address + page as u64 * PAGE, piece.source);
                    }
                }
            }
        }
        differ
    }
}

/// A monitor's memory, with the guest's RAM in it.
struct Monitor {
    memory: File,
    pagemap: File,
    /// Private memory that can be written, neighbours joined: where it begins and ends.
    runs: Vec<(u64, u64)>,
    /// Whether RAM was loaded from a snapshot's files, which may have more than was looked at so far.
    in_a_file: bool,
}

impl Monitor {
    fn of(pid: i32) -> Monitor {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("a process of ours");
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for line in maps.lines().filter(|line| line.split(' ').nth(1) == Some("rw-p")) {
            let (start, end) = line.split(' ').next().and_then(|range| range.split_once('-')).expect("a range");
            let [start, end] = [start, end].map(|text| u64::from_str_radix(text, 16).expect("an address"));
            match runs.last_mut() {
                Some(run) if run.1 == start => run.1 = end,
                _ => runs.push((start, end)),
            }
        }
        let open = |what| File::open(format!("/proc/{pid}/{what}")).expect("a process of ours");
        let in_a_file = maps.lines().any(|line| line.ends_with("/memory"));
        Monitor { memory: open("mem"), pagemap: open("pagemap"), runs, in_a_file }
    }

    /// Where so many bytes of RAM may begin.
    fn places(&self, length: u64) -> Vec<u64> {
        let fitting = self.runs.iter().filter(|(start, end)| end - start >= length);
        let mut places: Vec<u64> = fitting.flat_map(|(start, end)| [*start, end - length]).collect();
        places.dedup();
        places
    }

    /// Whether none of these pages was ever there, so that reading them, which takes long, gives zeros.
    /// See Documentation/admin-guide/mm/pagemap.rst.
    fn is_untouched(&self, address: u64, length: u64) -> bool {
        let mut entries = vec![0; (length / PAGE * 8) as usize];
        let known = self.pagemap.read_exact_at(&mut entries, address / PAGE * 8).is_ok();
        known && !self.in_a_file && entries.iter().all(|byte| *byte == 0)
    }
}
