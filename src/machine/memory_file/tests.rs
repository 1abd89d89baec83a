use std::os::fd::FromRawFd;
use std::sync::RwLock;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use std::{fs, thread};

use vm_memory::Bytes;

use super::*;
use crate::mem::from_ranges;
use crate::snapshot::memory::{DATA, INDEX, Index};

const HIGH: u64 = 1 << 32;
const LOW_PAGES: u64 = 2000;
const HIGH_PAGES: u64 = 700;

fn memory() -> GuestMemory {
    from_ranges(&[(GuestAddress(0), LOW_PAGES * PAGE), (GuestAddress(HIGH), HIGH_PAGES * PAGE)]).unwrap()
}

fn contents(mem: &GuestMemory) -> Vec<Vec<u8>> {
    let of_region = |region: &crate::mem::Ram| {
        let mut bytes = vec![0; region.len() as usize];
        mem.read_slice(&mut bytes, region.start_addr()).unwrap();
        bytes
    };
    mem.iter().map(of_region).collect()
}

/// A snapshot's two files, in a folder of their own.
struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Files {
        Files(tempfile::tempdir().unwrap())
    }

    fn create(&self, name: &str) -> File {
        File::create_new(self.0.path().join(name)).unwrap()
    }

    fn spawn(&self, plan: Plan) -> Writing {
        plan.spawn(self.create(DATA), self.create(INDEX)).unwrap()
    }

    fn index(&self) -> Index {
        Index::read(self.0.path()).unwrap()
    }

    fn data(&self) -> File {
        File::open(self.0.path().join(DATA)).unwrap()
    }

    fn written(plan: Plan) -> (Files, Written) {
        let files = Files::new();
        let written = files.spawn(plan).wait().unwrap();
        (files, written)
    }
}

fn loaded(chain: &[Files]) -> GuestMemory {
    let indexes: Vec<Index> = chain.iter().map(Files::index).collect();
    let layers: Vec<(&Index, File)> = indexes.iter().zip(chain).map(|(index, files)| (index, files.data())).collect();
    load(&layers).unwrap()
}

/// SplitMix64: small, and the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        ((z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb) >> 20) % limit
    }
}

/// Changes memory the way that devices and vCPUs do; gives the log that KVM would have of it.
fn change(mem: &GuestMemory, random: &mut Random, times: u64) -> Vec<Vec<u64>> {
    let mut logs: Vec<Vec<u64>> = mem.iter().map(|region| vec![0; (region.len() / PAGE / 64 + 1) as usize]).collect();
    for _ in 0..times {
        let n = random.below(2) as usize;
        let region = mem.iter().nth(n).unwrap();
        let longest = [PAGE, 40 * PAGE][random.below(2) as usize];
        let at = random.below(region.len());
        let length = (1 + random.below(longest)).min(region.len() - at);
        let bytes = vec![random.below(4) as u8; length as usize];
        match random.below(4) {
            0 => {
                let (first, pages) = (at / PAGE, length.div_ceil(PAGE).min((region.len() - at) / PAGE));
                let _ = region.discard(first * PAGE, pages * PAGE);
            }
            1 | 2 => mem.write_slice(&bytes, GuestAddress(region.start_addr().0 + at)).unwrap(),
            _ => {
                // SAFETY: within the region; nobody else touches this memory.
                unsafe {
                    let to = region.mapping().as_ptr().add(at as usize);
                    to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
                }
                (at / PAGE..=(at + length - 1) / PAGE).for_each(|page| logs[n][page as usize / 64] |= 1 << (page % 64));
            }
        }
    }
    logs
}

#[test]
fn a_base_and_its_differences_are_the_memory_of_every_instant() {
    let mut random = Random(1);
    let mut mem = memory();
    change(&mem, &mut random, 60);
    Dirty::take(&mem, &[vec![0; 32], vec![0; 11]]).unwrap();
    let mut chain = vec![Files::written(Plan::full(&mem).unwrap()).0];
    assert!(chain[0].index().is_full());
    let mut before = Vec::new();
    for generation in 1..12 {
        let logs = change(&mem, &mut random, 25);
        let dirty = Dirty::take(&mem, &logs).unwrap();
        let expected = contents(&mem);
        let plan = Plan::changed(&mem, &dirty).unwrap();
        assert_eq!(plan.total(), dirty.count() * PAGE);
        let (files, written) = Files::written(plan);
        let index = files.index();
        assert_eq!(written.pages, dirty.count());
        assert_eq!((written.length, written.runs), (index.data_length(), index.runs().len() as u64));
        assert!(written.written <= written.length && written.written + written.zeros == dirty.count() * PAGE);
        assert!(!index.is_full());
        chain.push(files);

        let restored = loaded(&chain);
        assert!(contents(&restored) == expected, "generation {generation}");
        assert_eq!(Dirty::take(&restored, &[vec![0; 32], vec![0; 11]]).unwrap().count(), 0);
        let full = Files::written(Plan::full(&mem).unwrap()).0;
        assert!(contents(&loaded(&[full])) == expected);
        // From here on the machine is a restored one, whose memory is in part that of the files.
        if generation % 3 == 0 {
            mem = restored;
        }
        before.push(expected);
    }
    // All of the changes above went to memory that was mapped from these files, and none of them into a file.
    for (generation, expected) in before.iter().enumerate() {
        assert!(contents(&loaded(&chain[..generation + 2])) == *expected);
    }
}

#[test]
fn the_file_is_memory_at_the_fork_whatever_other_threads_do() {
    let mem = memory();
    let (stop, still) = (AtomicBool::new(false), RwLock::new(()));
    thread::scope(|scope| {
        for seed in 0..4 {
            let (mem, stop, still) = (&mem, &stop, &still);
            scope.spawn(move || {
                let mut random = Random(seed);
                while !stop.load(Ordering::Relaxed) {
                    // Allocating all the time, in and out of the lock, has the allocator's locks taken at the fork.
                    let page = vec![random.below(3) as u8; (random.below(9) * PAGE) as usize];
                    let at = random.below((HIGH_PAGES - 9) * PAGE) + random.below(2) * HIGH;
                    {
                        let _moving = still.read().unwrap();
                        mem.write_slice(&page, GuestAddress(at)).unwrap();
                    }
                    drop((0..20).map(|n| vec![n; n * 100]).collect::<Vec<_>>());
                }
            });
        }
        for _ in 0..15 {
            thread::sleep(Duration::from_millis(2));
            let files = Files::new();
            let alone = still.write().unwrap();
            let expected = contents(&mem);
            let mut writing = files.spawn(Plan::full(&mem).unwrap());
            drop(alone);
            writing.wait().unwrap();
            assert!(contents(&loaded(&[files])) == expected);
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn zeros_become_holes_in_runs_and_runs_of_their_own() {
    let mem = memory();
    let one = |page: u64| mem.write_slice(&[1], GuestAddress(page * PAGE + 4095)).unwrap();
    // 15 pages of zeros stay in the run of data, 16 do not.
    [100, 116, 133].into_iter().for_each(one);
    one((HIGH / PAGE) + HIGH_PAGES - 1);
    let (files, written) = Files::written(Plan::full(&mem).unwrap());
    let run = |page: u64, pages: u64, offset: Option<u64>| crate::snapshot::memory::Run {
        address: page * PAGE,
        length: pages * PAGE,
        offset: offset.map(|page| page * PAGE),
    };
    let high = HIGH / PAGE;
    let expected = [
        run(0, 100, None),
        run(100, 17, Some(0)),
        run(117, 16, None),
        run(133, 1, Some(17)),
        run(134, LOW_PAGES - 134, None),
        run(high, HIGH_PAGES - 1, None),
        run(high + HIGH_PAGES - 1, 1, Some(18)),
    ];
    assert_eq!(files.index().runs(), expected);
    let pages = LOW_PAGES + HIGH_PAGES;
    let expected = Written { pages, length: 19 * PAGE, written: 4 * PAGE, zeros: (pages - 4) * PAGE, runs: 7 };
    assert_eq!(written, expected);
    assert_eq!(files.data().metadata().unwrap().len(), 19 * PAGE);

    // Looking at every page, as for memory that came from files, finds the same.
    let mut plan = Plan::full(&mem).unwrap();
    plan.spans.iter_mut().for_each(|span| span.anonymous = false);
    let (looked, written) = Files::written(plan);
    assert_eq!((looked.index(), written), (files.index(), expected));
}

#[test]
fn memory_that_was_never_touched_costs_no_reading() {
    let size = 256 << 30;
    let mem = from_ranges(&[(GuestAddress(0), size)]).unwrap();
    mem.write_slice(&[1; 10], GuestAddress(size / 2)).unwrap();
    let (files, written) = Files::written(Plan::full(&mem).unwrap());
    assert_eq!((written.written, written.zeros, written.runs), (PAGE, size - PAGE, 3));
    assert!(files.index().is_full());
}

#[test]
fn progress_reaches_the_end_and_nothing_is_a_difference_too() {
    let mem = memory();
    mem.write_slice(&vec![1; 3 << 20], GuestAddress(0)).unwrap();
    let files = Files::new();
    let plan = Plan::full(&mem).unwrap();
    let total = plan.total();
    let mut writing = files.spawn(plan);
    let meter = writing.meter();
    let written = loop {
        let progress = writing.progress();
        assert!(progress.scanned <= total && progress.written <= 3 << 20);
        if let Some(written) = writing.try_wait().unwrap() {
            break written;
        }
        thread::sleep(Duration::from_millis(1));
    };
    assert_eq!(written.written, 3 << 20);
    drop(writing);
    assert_eq!(meter.read(), Progress { total, scanned: total, written: 3 << 20 });

    Dirty::take(&mem, &[vec![0; 32], vec![0; 11]]).unwrap();
    let none = Dirty::take(&mem, &[vec![0; 32], vec![0; 11]]).unwrap();
    let (nothing, written) = Files::written(Plan::changed(&mem, &none).unwrap());
    assert_eq!(written, Written { pages: 0, length: 0, written: 0, zeros: 0, runs: 0 });
    assert!(contents(&loaded(&[files, nothing])) == contents(&mem));
}

#[test]
fn a_cancelled_or_killed_child_leaves_no_zombie() {
    let mem = memory();
    mem.write_slice(&vec![1; (LOW_PAGES * PAGE) as usize], GuestAddress(0)).unwrap();
    let signal = |pid: u32, signal| {
        // SAFETY: the process is a child that was not waited for, or gone.
        unsafe { libc::kill(pid.cast_signed(), signal) }
    };
    for way in 0..3 {
        let files = Files::new();
        let mut writing = files.spawn(Plan::full(&mem).unwrap());
        let pid = writing.child.id();
        match way {
            0 => writing.cancel().unwrap(),
            1 => drop(writing),
            _ => {
                signal(pid, libc::SIGSTOP);
                signal(pid, libc::SIGKILL);
                // It may have been done before the signal came.
                assert!(matches!(writing.wait(), Err(Error::Died(_)) | Ok(_)));
            }
        }
        assert!(signal(pid, 0) < 0, "way {way} leaves a zombie");
    }
}

#[test]
fn a_full_disk_is_reported_and_what_changed_can_be_put_back() {
    let mem = memory();
    mem.write_slice(&vec![1; 3 << 20], GuestAddress(0)).unwrap();
    let full = || File::options().write(true).open("/dev/full").unwrap();
    let logs = [vec![0; 32], vec![0; 11]];
    let dirty = Dirty::take(&mem, &logs).unwrap();
    let plan = || Plan::changed(&mem, &dirty).unwrap();

    let error = plan().spawn(full(), Files::new().create(INDEX)).unwrap().wait().unwrap_err();
    assert_eq!(error.to_string(), "cannot write guest memory: No space left on device (os error 28)");
    let files = Files::new();
    let error = plan().spawn(files.create(DATA), full()).unwrap().wait().unwrap_err();
    assert!(
        matches!(&error, Error::Write { doing: "write the index of guest memory", source }
        if source.raw_os_error() == Some(libc::ENOSPC)),
        "{error}"
    );

    // A file that cannot grow beyond 1.5 MiB, so that the first MiB is written, and half of the second.
    let name = c"memory";
    // SAFETY: the name is a C string; the new descriptor is nobody else's.
    let bounded = unsafe { File::from_raw_fd(libc::memfd_create(name.as_ptr(), libc::MFD_ALLOW_SEALING)) };
    bounded.set_len(3 << 19).unwrap();
    // SAFETY: it changes only what the file allows.
    assert_eq!(unsafe { libc::fcntl(bounded.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_GROW) }, 0);
    let files = Files::new();
    let mut writing = plan().spawn(bounded, files.create(INDEX)).unwrap();
    let error = writing.wait().unwrap_err();
    assert!(matches!(&error, Error::Write { source, .. } if source.raw_os_error() == Some(libc::EPERM)), "{error}");
    assert!(writing.progress().written >= 1 << 20);
    let index = fs::read(files.0.path().join(INDEX)).unwrap();
    assert!(Index::parse(&index, files.0.path()).is_err(), "half a snapshot has no index");

    dirty.put_back(&mem);
    assert_eq!(Dirty::take(&mem, &logs).unwrap(), dirty);
}

#[test]
fn files_that_are_not_of_their_index_are_refused() {
    let mem = memory();
    mem.write_slice(&[1; 9000], GuestAddress(0)).unwrap();
    let (files, written) = Files::written(Plan::full(&mem).unwrap());
    let index = files.index();
    for length in [0, written.length - 1, written.length + 1] {
        File::options().write(true).open(files.0.path().join(DATA)).unwrap().set_len(length).unwrap();
        let error = load(&[(&index, files.data())]).unwrap_err();
        assert!(matches!(error, crate::machine::Error::MemoryFile(Error::Length { layer: 0, .. })), "{error}");
    }
    assert!(matches!(load(&[]), Err(crate::machine::Error::Snapshot(_))));
}

#[test]
fn changes_of_another_guest_are_refused() {
    let large = from_ranges(&[(GuestAddress(0), 2 * LOW_PAGES * PAGE)]).unwrap();
    large.write_slice(&[1], GuestAddress((2 * LOW_PAGES - 1) * PAGE)).unwrap();
    let dirty = Dirty::take(&large, &[vec![0; 63]]).unwrap();
    assert!(matches!(Plan::changed(&memory(), &dirty), Err(Error::Pages { .. })));
    let odd = from_ranges(&[(GuestAddress(0), PAGE + 1)]).unwrap();
    assert!(matches!(Plan::full(&odd), Err(Error::Pages { .. })));
}
