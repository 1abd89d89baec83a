//! Files of snapshots as somebody hostile would write them: refused or read, but never a panic, and never much
//! memory.

use std::path::Path;

use serde_json::Value;

use super::memory::{Index, PAGE, Region, Run, resolve};
use super::{Digest, Disk, File, Kind, Machine, Manifest, MemoryInfo, Role};
use super::{MachineState, StateError};
use crate::sys::mutate::{Mutator, most_memory, rounds};

/// What reading hostile files may add to this process's memory, in KiB.
const MUCH: u64 = 256 << 10;

/// Half of the changes are made in the document, so that it can still be parsed, and half in its bytes.
fn changed(mutator: &mut Mutator, good: &[u8], document: &Value) -> Vec<u8> {
    match mutator.below(2) {
        0 => mutator.bytes(good),
        _ => mutator.json(document).to_string().into_bytes(),
    }
}

#[test]
fn no_manifest_is_too_strange() {
    let mut manifest = Manifest::new(Kind::Live, "anna@monday", 1_700_000_000);
    let file = |name: &str, role| File { name: name.into(), role, size: 4096, digest: Digest::of(b"x"), chunks: None };
    manifest.files.extend([
        file("kernel", Role::Kernel),
        file("machine.state", Role::State),
        file("memory", Role::Memory),
        file("memory.index", Role::MemoryIndex),
        file("root.qcow2", Role::Disk),
    ]);
    manifest.memory = Some(MemoryInfo { parent: Some(Digest::of(b"parent")), bytes: 4096 });
    manifest.machine = serde_json::from_str::<Machine>(
        r#"{"cpus": 2, "memory": 268435456, "max_cpus": 4, "max_memory": 1073741824, "boot_memory": 268435456}"#,
    )
    .ok();
    manifest.disks.push(Disk {
        device: "root".into(),
        file: "root.qcow2".into(),
        format: "qcow2".into(),
        virtual_size: 4096,
        backing: None,
    });
    let good = manifest.to_bytes().unwrap();
    let document = serde_json::from_slice(&good).unwrap();
    let (mut mutator, before, mut taken) = (Mutator::from_env(), most_memory(), 0);
    for _ in 0..rounds(3000) {
        let bytes = changed(&mut mutator, &good, &document);
        if let Ok(read) = Manifest::parse(&bytes, Path::new("snapshot.json")) {
            taken += 1;
            // What is taken keeps the rules: nothing of it leads out of its folder.
            assert!(read.files.iter().all(|file| !file.name.contains('/') && !file.name.starts_with('.')));
            let again = Manifest::parse(&read.to_bytes().unwrap(), Path::new("again")).unwrap();
            assert_eq!(again.files, read.files);
        }
    }
    assert!(taken > 0 && most_memory() - before < MUCH, "{taken} taken, {} KiB", most_memory() - before);
}

#[test]
fn no_state_is_too_strange() {
    let mut state = MachineState::default();
    state.put("serial", 1, &serde_json::json!({"scratch": 7, "fifo": [1, 2, 3]})).unwrap();
    state.put("vcpu", 1, &serde_json::json!({"id": 0, "msrs": [[1, 2], [3, 4]]})).unwrap();
    let good = state.to_bytes().unwrap();
    let document = serde_json::from_slice(&good).unwrap();
    let (mut mutator, before) = (Mutator::from_env(), most_memory());
    for _ in 0..rounds(3000) {
        let read = || -> Result<(), StateError> {
            let mut state = MachineState::parse(&changed(&mut mutator, &good, &document))?;
            state.take::<Value>("serial", 1)?;
            state.take_all::<Value>("vcpu", 1)?;
            state.finish()
        };
        let _ = { read }();
    }
    assert!(most_memory() - before < MUCH);
}

#[test]
fn no_index_is_too_strange() {
    let regions = vec![Region { start: 0, length: 64 * PAGE }, Region { start: 1 << 32, length: 32 * PAGE }];
    let run = |page, pages, offset: Option<u64>| Run { address: page * PAGE, length: pages * PAGE, offset };
    let high = (1 << 32) / PAGE;
    let full = vec![run(0, 10, Some(0)), run(10, 54, None), run(high, 32, Some(10 * PAGE))];
    let base = Index::new(regions.clone(), full).unwrap();
    let some = vec![run(3, 2, Some(0)), run(20, 1, None), run(high + 7, 5, Some(2 * PAGE))];
    let difference = Index::new(regions, some).unwrap();
    let (mut mutator, before, mut taken) = (Mutator::from_env(), most_memory(), 0);
    for _ in 0..rounds(5000) {
        let strange = |mutator: &mut Mutator, index: &Index| {
            Index::parse(&mutator.bytes(&index.to_bytes()), Path::new("memory.index"))
        };
        let (lower, upper) = (strange(&mut mutator, &base), strange(&mut mutator, &difference));
        let chains = [vec![lower.as_ref().ok(), Some(&difference)], vec![Some(&base), upper.as_ref().ok()]];
        for chain in chains.into_iter().filter_map(|chain| chain.into_iter().collect::<Option<Vec<_>>>()) {
            let Ok(pieces) = resolve(&chain) else { continue };
            taken += 1;
            // They cover all of RAM, each byte once.
            let covered: u64 = pieces.iter().map(|piece| piece.length).sum();
            let whole: u64 = chain[0].regions().iter().map(|region| region.length).sum();
            assert_eq!(covered, whole);
        }
    }
    assert!(taken > 0 && most_memory() - before < MUCH);
}
