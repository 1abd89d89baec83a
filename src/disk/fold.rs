//! Makes one layer out of several, so that what lay between two disks can go.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use super::chain::{chain_files, open_sealed};
use super::clusters::{Clusters, read_cluster};
use super::layout::{CLUSTER, Writer};
use super::{Error, Format};
use crate::sys::files::At;

/// Makes a new file at `into` that holds all that `layers` hold: the top of a chain and any number of files
/// below it, in their order. Over `backing`, which must read as what lies below the last of them does, it reads
/// as the chain did. A single layer gets a new backing file in this way. The same content gives the same file. Nothing is
/// synced.
pub fn fold(
    layers: &[(PathBuf, Format)],
    into: &Path,
    backing: Option<(&str, Format)>,
    root: &Path,
) -> Result<(), Error> {
    let Some(((top, format), below)) = layers.split_first() else {
        return Err(Error::refused(into, "it would be made of no layers"));
    };
    let chain = open_sealed(top, *format, root)?;
    let size = chain.size();
    let held = held((top, *format), below, size)?;
    let mut writer = Writer::create(into, size, backing)?;
    let mut cluster = vec![0; CLUSTER as usize];
    for offset in held.offsets().take_while(|offset| *offset < size) {
        read_cluster(&chain, offset, &mut cluster, top)?;
        let zeros = cluster.iter().all(|byte| *byte == 0);
        match (zeros, backing) {
            (false, _) => writer.append(offset, &cluster),
            (true, Some(_)) => writer.append_zeros(offset),
            (true, None) => Ok(()),
        }
        .at("write", into)?;
    }
    writer.finish(into)
}

/// Reads what the disk at `top` holds with everything below it, zeros of whole clusters left out: `each` gets an
/// offset and a cluster, in ascending order, and ends the reading when it breaks.
pub fn read_data(
    top: &Path,
    format: Format,
    root: &Path,
    each: &mut dyn FnMut(u64, &[u8]) -> ControlFlow<()>,
) -> Result<(), Error> {
    let layers = chain_files(top, format, root)?;
    let disk = open_sealed(top, format, root)?;
    let size = disk.size();
    let mut cluster = vec![0; CLUSTER as usize];
    for offset in held((top, format), &layers[1..], size)?.offsets().take_while(|offset| *offset < size) {
        read_cluster(&disk, offset, &mut cluster, top)?;
        let there = &cluster[..(size - offset).min(CLUSTER) as usize];
        if there.iter().any(|byte| *byte != 0) && each(offset, there).is_break() {
            break;
        }
    }
    Ok(())
}

/// The clusters of a disk of `size` bytes for which any of its layers has something.
fn held((top, format): (&Path, Format), below: &[(PathBuf, Format)], size: u64) -> Result<Clusters, Error> {
    let mut held = Clusters::of(size);
    held.add_layer(top, format)?;
    for (path, format) in below {
        let end = held.add_layer(path, *format)?;
        // Behind the end of a shorter layer there are zeros, whatever lies below it.
        held.add(end, size);
    }
    Ok(held)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::disk::tests::model::{Model, Random, SIZE};
    use crate::disk::{Access, chain_files, create_from_raw, create_overlay, open};

    /// A chain of a base and three layers with a model of what is in it; the paths, the top one first.
    fn chain(dir: &Path) -> (Vec<(PathBuf, Format)>, Model) {
        let raw = dir.join("raw");
        fs::File::create(&raw).unwrap().set_len(SIZE).unwrap();
        create_from_raw(&raw, &dir.join("l0")).unwrap();
        let (mut model, mut random) = (Model::new(), Random(3));
        for layer in 1..4 {
            let path = dir.join(format!("l{layer}"));
            create_overlay(&path, &format!("l{}", layer - 1), Format::Qcow2, SIZE).unwrap();
            let mut disk = open(&path, Format::Qcow2, Access::ReadWrite, dir).unwrap();
            for stamp in 1..60 {
                model.step(&mut *disk, &mut random, layer * 1000 + stamp).unwrap();
            }
            disk.flush().unwrap();
        }
        (chain_files(&dir.join("l3"), Format::Qcow2, dir).unwrap(), model)
    }

    /// All that a disk holds.
    fn data(path: &Path, root: &Path) -> Vec<(u64, Vec<u8>)> {
        let mut found = Vec::new();
        let mut each = |at, bytes: &[u8]| {
            found.push((at, bytes.to_vec()));
            ControlFlow::Continue(())
        };
        read_data(path, Format::Qcow2, root, &mut each).unwrap();
        found
    }

    #[test]
    fn a_fold_reads_as_the_chain_did_and_as_nothing_but_itself() {
        let dir = tempfile::tempdir().unwrap();
        let (chain, model) = chain(dir.path());
        assert_eq!(chain.len(), 4);
        for count in 1..=4 {
            let below = (count < 4).then(|| format!("l{}", 3 - count));
            let into = dir.path().join(format!("fold{count}"));
            let backing = below.as_deref().map(|name| (name, Format::Qcow2));
            fold(&chain[..count], &into, backing, dir.path()).unwrap();
            let found = chain_files(&into, Format::Qcow2, dir.path()).unwrap();
            assert_eq!(found[1..], chain[count..]);
            assert!(data(&into, dir.path()) == data(&chain[0].0, dir.path()));
            // It is a file of ours: it can be written to.
            model.compare(&mut *open(&into, Format::Qcow2, Access::ReadWrite, dir.path()).unwrap());
        }
        let again = dir.path().join("again");
        fold(&chain[..2], &again, Some(("l1", Format::Qcow2)), dir.path()).unwrap();
        assert!(fs::read(&again).unwrap() == fs::read(dir.path().join("fold2")).unwrap());
        let check = std::process::Command::new("qemu-img").args(["check", "-q"]).arg(&again).output().unwrap();
        assert!(check.status.success(), "{check:?}");
        assert!(fold(&chain[..2], &again, None, dir.path()).is_err(), "nothing is replaced");
        assert!(fold(&[], &dir.path().join("none"), None, dir.path()).is_err());
    }

    #[test]
    fn behind_the_end_of_a_shorter_layer_there_are_zeros() {
        let dir = tempfile::tempdir().unwrap();
        let raw = dir.path().join("raw");
        fs::write(&raw, [7; 4 * CLUSTER as usize]).unwrap();
        create_from_raw(&raw, &dir.path().join("l0")).unwrap();
        for (name, below, clusters) in [("l1", "l0", 2), ("l2", "l1", 4)] {
            create_overlay(&dir.path().join(name), below, Format::Qcow2, clusters * CLUSTER).unwrap();
        }
        let chain = chain_files(&dir.path().join("l2"), Format::Qcow2, dir.path()).unwrap();
        let into = dir.path().join("fold");
        fold(&chain[..2], &into, Some(("l0", Format::Qcow2)), dir.path()).unwrap();
        let all = |path: &Path| {
            let disk = open_sealed(path, Format::Qcow2, dir.path()).unwrap();
            let mut bytes = vec![1; 4 * CLUSTER as usize];
            disk.read(&mut bytes[..], 0).unwrap();
            bytes
        };
        assert!(all(&into) == all(&chain[0].0));
        assert_eq!(all(&into)[2 * CLUSTER as usize - 1..][..2], [7, 0]);
    }
}
