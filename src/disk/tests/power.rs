//! A power cut around a swap.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::base;
use super::crash::{BATCH, after, check};
use super::model::{Random, SIZE};
use super::record::{Event, Recorder, flushed, lay_out};
use crate::disk::{Access, Format, create_overlay, open, prepare};

/// What the test does beside writing, and in which step of which batch.
enum Act {
    Prepare,
    Swap,
    Seal,
}

#[test]
fn a_power_cut_around_a_swap_loses_nothing_that_was_flushed() {
    use Act::{Prepare, Seal, Swap};
    let cases: [&[(usize, usize, Act)]; 3] = [
        // With flushes in each of the states,
        &[(2, 3, Prepare), (4, 2, Swap), (6, 4, Seal)],
        // with none in any,
        &[(3, 1, Prepare), (3, 2, Swap), (3, 5, Seal)],
        // and with a second new top before the first layer was sealed.
        &[(2, 1, Prepare), (2, 4, Swap), (4, 1, Prepare), (4, 4, Swap), (6, 2, Seal)],
    ];
    for (seed, acts) in (50..).zip(cases) {
        power_cuts(seed, acts);
    }
}

fn power_cuts(seed: u64, acts: &[(usize, usize, Act)]) {
    let dir = tempfile::tempdir().unwrap();
    let (base, start) = base(dir.path());
    let top = dir.path().join("root.qcow2");
    create_overlay(&top, "base.qcow2", Format::Qcow2, SIZE).unwrap();
    let file = |path: &Path| (fs::metadata(path).unwrap().ino(), fs::read(path).unwrap());
    let mut files = vec![file(&top)];
    let recorder = Recorder::install();
    let mut disk = open(&top, Format::Qcow2, Access::ReadWrite, dir.path()).unwrap();
    let (mut model, mut random, mut prepared) = (start.clone(), Random(seed), None);
    for number in 0..10 {
        for step in 0..BATCH {
            for (.., act) in acts.iter().filter(|(at, within, _)| (*at, *within) == (number, step)) {
                match act {
                    Act::Prepare => {
                        prepared = Some(prepare(&top, dir.path()).unwrap());
                        files.push(file(&top));
                        recorder.record(Event::Prepared(files.len() - 1));
                    }
                    Act::Swap => disk.swap(prepared.as_mut().unwrap()).unwrap(),
                    Act::Seal => disk.seal().unwrap(),
                }
            }
            model.step(&mut *disk, &mut random, (10_000 + number * BATCH + step) as u32).unwrap();
        }
        disk.flush().unwrap();
        recorder.record(Event::Flushed(number + 1));
    }
    model.compare(&mut *disk);
    drop(disk);
    let entries = recorder.finish();

    let folder = dir.path().join("cut");
    fs::create_dir(&folder).unwrap();
    fs::hard_link(base, folder.join("base.qcow2")).unwrap();
    let mut chance = Random(seed);
    for _ in 0..60 {
        let cut = chance.below(entries.len() as u64 + 1) as usize;
        let entries = &entries[..cut];
        let tops = entries.iter().rev().find_map(|(_, event)| match event {
            Event::Prepared(number) => Some(*number),
            _ => None,
        });
        let tops = tops.unwrap_or(0);
        for (i, (inode, empty)) in files.iter().enumerate().take(tops + 1) {
            let name = if i == tops { "root.qcow2".into() } else { format!("root-{}.qcow2", i + 1) };
            lay_out(&folder.join(&name), (*inode, empty), entries, &mut chance);
            check(&folder.join(&name));
        }
        let mut disk = open(&folder.join("root.qcow2"), Format::Qcow2, Access::ReadWrite, dir.path()).unwrap();
        after(&start, seed, flushed(entries)).compare(&mut *disk);
    }
}
