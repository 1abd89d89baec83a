//! What differs between two disks that have layers in common.
//!
//! Layers that both chains end in cannot make a difference. Of the others, only the clusters that one of them
//! holds are read, through both chains: so the answer is exact, and costs no more than what was written.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::chain::{chain_files, open_sealed};
use super::clusters::{Clusters, read_cluster};
use super::layout::CLUSTER;
use super::{Error, Format};
use crate::sys::files::At;

/// What differs between two disks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Clusters of 64 KiB that do not read the same.
    pub clusters: u64,
    /// The bytes in them.
    pub bytes: u64,
    /// Clusters that were looked at: those that were written to since the two disks parted.
    pub written: u64,
}

/// Compares the disks whose top layers are the files `one` and `other`. The end of the shorter one counts as
/// zeros. `watch` is told how many clusters of how many were looked at; when it says `false`, the rest is left.
pub fn compare(
    one: (&Path, Format),
    other: (&Path, Format),
    root: &Path,
    mut watch: impl FnMut(u64, u64) -> bool,
) -> Result<Changes, Error> {
    let (ours, theirs) = (identified(one, root)?, identified(other, root)?);
    let common = ours.iter().rev().zip(theirs.iter().rev()).take_while(|(a, b)| a.identity == b.identity).count();
    let alone = [&ours[..ours.len() - common], &theirs[..theirs.len() - common]].concat();
    let [a, b] = [one, other].map(|(path, format)| open_sealed(path, format, root));
    let (a, b) = (a?, b?);

    let mut candidates = Clusters::of(a.size().max(b.size()));
    candidates.add(a.size().min(b.size()), a.size().max(b.size()));
    for layer in alone {
        candidates.add_layer(&layer.path, layer.format)?;
    }
    let mut changes = Changes { written: candidates.count(), ..Changes::default() };
    let mut clusters = [vec![0; CLUSTER as usize], vec![0; CLUSTER as usize]];
    for (done, offset) in candidates.offsets().enumerate() {
        if !watch(done as u64, changes.written) {
            break;
        }
        read_cluster(&a, offset, &mut clusters[0], one.0)?;
        read_cluster(&b, offset, &mut clusters[1], other.0)?;
        if clusters[0] != clusters[1] {
            changes.clusters += 1;
            changes.bytes += CLUSTER;
        }
    }
    Ok(changes)
}

/// A layer, known again under whatever name: snapshots share layers by hard links.
#[derive(Clone)]
struct Layer {
    path: PathBuf,
    format: Format,
    identity: (u64, u64),
}

fn identified((path, format): (&Path, Format), root: &Path) -> Result<Vec<Layer>, Error> {
    let identify = |(path, format): (PathBuf, Format)| {
        let metadata = fs::metadata(&path).at("find", &path)?;
        Ok(Layer { identity: (metadata.dev(), metadata.ino()), path, format })
    };
    chain_files(path, format, root)?.into_iter().map(identify).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{Access, create_from_raw, create_overlay, open};

    const SIZE: u64 = 64 << 20;

    /// Two overlays over one base; gives their paths.
    fn twins(dir: &Path) -> [PathBuf; 2] {
        let raw = dir.join("raw");
        fs::File::create(&raw).unwrap().set_len(SIZE).unwrap();
        create_from_raw(&raw, &dir.join("base")).unwrap();
        ["one", "two"].map(|name| {
            create_overlay(&dir.join(name), "base", Format::Qcow2, SIZE).unwrap();
            dir.join(name)
        })
    }

    fn zero(path: &Path, root: &Path, offset: u64, length: u64) {
        let mut disk = open(path, Format::Qcow2, Access::ReadWrite, root).unwrap();
        disk.write_zeroes(offset, length, false).unwrap();
        disk.flush().unwrap();
    }

    fn changes(one: &Path, two: &Path, root: &Path) -> Changes {
        compare((one, Format::Qcow2), (two, Format::Qcow2), root, |_, _| true).unwrap()
    }

    #[test]
    fn what_was_written_alike_is_no_difference() {
        let dir = tempfile::tempdir().unwrap();
        let [one, two] = twins(dir.path());
        assert_eq!(changes(&one, &two, dir.path()), Changes::default());
        assert_eq!(changes(&one, &one, dir.path()), Changes::default());
        // Zeros over zeros: written, and no change.
        zero(&two, dir.path(), CLUSTER, 3 * CLUSTER);
        assert_eq!(changes(&one, &two, dir.path()), Changes { clusters: 0, bytes: 0, written: 3 });
        let longer = dir.path().join("longer");
        create_overlay(&longer, "two", Format::Qcow2, SIZE + CLUSTER).unwrap();
        assert_eq!(changes(&one, &longer, dir.path()).written, 4, "the end counts");
    }

    #[test]
    fn what_differs_is_counted_and_a_link_to_a_layer_is_that_layer() {
        let dir = tempfile::tempdir().unwrap();
        let [one, two] = twins(dir.path());
        let raw = dir.path().join("raw2");
        fs::write(&raw, [7; 2 * CLUSTER as usize]).unwrap();
        fs::File::options().write(true).open(&raw).unwrap().set_len(SIZE).unwrap();
        let other = dir.path().join("other");
        create_from_raw(&raw, &other).unwrap();
        assert_eq!(changes(&one, &other, dir.path()), Changes { clusters: 2, bytes: 2 * CLUSTER, written: 2 });
        fs::hard_link(&other, dir.path().join("same")).unwrap();
        assert_eq!(changes(&other, &dir.path().join("same"), dir.path()), Changes::default());
        let mut left = 0;
        let stop = |done, _| {
            left = done;
            done == 0
        };
        compare((&two, Format::Qcow2), (&other, Format::Qcow2), dir.path(), stop).unwrap();
        assert_eq!(left, 1, "it stops when it is told to");
    }
}
