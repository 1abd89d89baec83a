//! A snapshot's memory is the guest's, byte for byte, however many differences it is made of.

mod common;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;

use catnap::snapshot::memory::{Index, PAGE, Source, resolve};
use catnap::store::Store;
use catnap::sys::home::Home;
use common::naps::{Swept, wake};
use common::{Machine, http, machine, with_input};

/// How many pages are compared at once.
const STEP: u64 = 256 * PAGE;

#[test]
fn base_and_differences_are_the_memory_of_that_instant() {
    let _swept = Swept;
    let anna = machine("anna").cpus(2).publish(80).boot();
    anna.snapshot("base", &[]);
    for tag in ["first", "second"] {
        work(&anna);
        anna.snapshot(tag, &[]);
    }
    work(&anna);
    anna.catnap("pause").succeeds();
    anna.snapshot("third", &[]);
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
    let chain = store.memory_chain(&store.resolve(snapshot).expect("a snapshot")).expect("its memory");
    let indices: Vec<Index> = chain.iter().map(|one| Index::read(&one.dir).expect("an index")).collect();
    let data: Vec<File> = chain.iter().map(|one| File::open(one.dir.join("memory")).expect("a memory")).collect();
    let pieces = resolve(&indices.iter().collect::<Vec<_>>()).expect("a memory");
    assert_eq!(pieces.first().expect("a piece").address, 0, "RAM begins at 0");
    let ram = pieces.last().map_or(0, |piece| piece.address + piece.length);
    let monitor = Monitor::of(machine.pid(), ram);
    let (mut ours, mut theirs, mut differ) = (vec![0; STEP as usize], vec![0; STEP as usize], 0);
    for piece in &pieces {
        for at in (0..piece.length).step_by(STEP as usize) {
            let length = STEP.min(piece.length - at) as usize;
            match piece.source {
                Source::Zeros => ours[..length].fill(0),
                Source::Layer { layer, offset } => {
                    data[layer].read_exact_at(&mut ours[..length], offset + at).expect("bytes");
                }
            }
            monitor.read(piece.address + at, &mut theirs[..length]);
            let pages = ours[..length].chunks(PAGE as usize).zip(theirs[..length].chunks(PAGE as usize));
            for (page, (ours, theirs)) in pages.enumerate() {
                if ours != theirs {
                    differ += 1;
                    if differ <= 20 {
                        let address = piece.address + at + page as u64 * PAGE;
                        println!("    {address:#x} differs, which is from {:?}", piece.source);
                    }
                }
            }
        }
    }
    println!("  {snapshot}: {} layers, {} pieces, {differ} of {} pages differ", chain.len(), pieces.len(), ram / PAGE);
    std::io::stdout().flush().expect("a screen");
    assert_eq!(differ, 0, "pages of {snapshot} are not what the guest had");
}

/// A monitor's memory, with the guest's RAM in it.
struct Monitor {
    memory: File,
    ram: u64,
}

impl Monitor {
    /// Finds RAM: so many bytes of private memory that can be written, in one mapping or in neighbours.
    fn of(pid: i32, ram: u64) -> Monitor {
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
        let fitting: Vec<_> = runs.into_iter().filter(|(start, end)| end - start >= ram).collect();
        println!("  RAM of {} MiB may be at {fitting:x?}", ram >> 20);
        assert_eq!(fitting.len(), 1, "one place for {ram} bytes of RAM");
        let (start, end) = fitting[0];
        assert_eq!(end - start, ram, "RAM has joined a neighbour");
        Monitor { memory: File::open(format!("/proc/{pid}/mem")).expect("memory of a process of ours"), ram: start }
    }

    fn read(&self, address: u64, to: &mut [u8]) {
        self.memory.read_exact_at(to, self.ram + address).expect("RAM");
    }
}
