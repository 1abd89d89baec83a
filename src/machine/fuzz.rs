//! A machine's state as somebody hostile would write it, all the way into devices and KVM. The vCPUs do not run:
//! what a guest can do from any state, it could do from any other. The devices' threads do.

use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::*;
use crate::disk::create_from_raw;
use crate::snapshot::Digest;
use crate::snapshot::memory::{Index, Region, Run};
use crate::spec::Size as Bytes;
use crate::sys::mutate::{Mutator, most_memory, rounds};

/// What all the machines may add to this process's memory, in KiB.
const MUCH: u64 = 512 << 10;
const RAM: u64 = 32 << 20;

/// An ELF file (elf(5)) whose code is `hlt` at 1 MiB.
fn kernel() -> Vec<u8> {
    const START: u64 = 1 << 20;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend([2u16, 62].map(u16::to_le_bytes).concat()); // an executable for x86-64
    file.extend(1u32.to_le_bytes());
    file.extend([START, 64, 0].map(u64::to_le_bytes).concat()); // entry, program headers, no sections
    file.extend(0u32.to_le_bytes());
    file.extend([64u16, 56, 1, 64, 0, 0].map(u16::to_le_bytes).concat());
    file.extend([1u32, 7].map(u32::to_le_bytes).concat()); // to be loaded, all rights
    file.extend([120, START, START, 1, 1, 4096u64].map(u64::to_le_bytes).concat());
    file.push(0xf4);
    file
}

/// A machine that can grow, so that it has every device there is.
fn spec() -> MachineSpec {
    let small = MachineSpec::new("anna".parse().unwrap(), "", 2, Bytes(RAM));
    MachineSpec { max_cpus: 4, max_memory: Bytes(1 << 30), ..small }
}

fn files(dir: &Path) -> Files {
    let [kernel_file, raw, disk] = ["kernel", "raw", "root.qcow2"].map(|name| dir.join(name));
    fs::write(&kernel_file, kernel()).unwrap();
    fs::write(&raw, [0; 65536]).unwrap();
    create_from_raw(&raw, &disk).unwrap();
    Files {
        kernel: kernel_file,
        initrd: None,
        disk,
        disk_root: dir.into(),
        cmdline: String::new(),
        console_log: dir.join("console.log"),
        wipe: false,
    }
}

/// A layer of nothing but zeros.
fn layer(dir: &Path, shape: &Shape) -> Layer {
    let regions: Vec<_> =
        shape.regions().iter().map(|(start, length)| Region { start: start.0, length: *length }).collect();
    let zeros = regions.iter().map(|region| Run { address: region.start, length: region.length, offset: None });
    let index = Index::new(regions.clone(), zeros.collect()).unwrap();
    let memory = dir.join("memory");
    File::create(&memory).unwrap();
    Layer { index_path: dir.join("memory.index"), index: index.to_bytes(), memory }
}

#[test]
fn no_state_of_a_machine_is_too_strange() {
    let dir = tempfile::tempdir().unwrap();
    let (spec, files) = (spec(), files(dir.path()));
    let media = Media::blank(Box::new(Vec::new), &[]).unwrap();
    let machine =
        match Bare::new().map_err(Error::from).and_then(|bare| Machine::new(&spec, &files, &media, Origin::Boot, bare))
        {
            Ok(machine) => machine,
            Err(Error::Kvm(error)) => return println!("not run: {error}"),
            Err(error) => panic!("{error}"),
        };
    let good = machine.save().unwrap().to_bytes().unwrap();
    drop(Arc::into_inner(machine).expect("nobody else has it"));
    let document: Value = serde_json::from_slice(&good).unwrap();
    let shape = Shape::of(&spec);
    let layers = [layer(dir.path(), &shape)];
    let saved = |state: &[u8]| Saved::new(Digest::of(b"base"), Path::new("machine.state"), state, &layers, shape);
    let wake = |state: &[u8]| -> Result<Arc<Machine>, Error> {
        let saved = saved(state)?;
        let media = Media::woken(Box::new(Vec::new), &saved.media(), &[])?;
        Machine::new(&spec, &files, &media, Origin::Wake(Box::new(saved)), Bare::new()?)
    };
    wake(&good).map(drop).expect("what was saved can be woken");
    let sleeper = saved(&good).unwrap();
    sleeper.check_files().unwrap();
    fs::copy(&layers[0].memory, dir.path().join("other")).unwrap();
    fs::rename(dir.path().join("other"), &layers[0].memory).unwrap();
    assert!(
        matches!(sleeper.check_files(), Err(Error::Unsound { .. })),
        "it wakes from a file that nobody sees any more"
    );
    let (mut mutator, before, mut taken) = (Mutator::from_env(), most_memory(), 0);
    for round in 0..rounds(100) {
        let begun = Instant::now();
        if let Ok(machine) = wake(mutator.json(&document).to_string().as_bytes()) {
            taken += 1;
            machine.pause().unwrap();
            let again = machine.save().and_then(|state| Ok(state.to_bytes()?));
            again.expect("what was taken can be saved");
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "round {round} hangs");
    }
    println!("{taken} were taken, {} KiB more", most_memory() - before);
    assert!(most_memory() - before < MUCH);
}
