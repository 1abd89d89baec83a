//! What a snapshot is without any other: all of its disks and memory, whatever chains they come from.

use std::fs;
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use super::memory;
use crate::disk::{Format, Reader, chain_files, fold, read_data};
use crate::snapshot::memory::DATA;
use crate::snapshot::{Disk, Kind, MANIFEST, Manifest, MemoryInfo, Role, describe};
use crate::store::{Error, Seen, Snapshot, Staging, Store};
use crate::sys::files::At;
use crate::sys::space;

/// What is given of a disk or a memory: an address in it, and what is there.
pub type Each<'a> = &'a mut dyn FnMut(u64, &[u8]) -> ControlFlow<()>;

/// The files of a disk's chain, the top one first.
type Chain = Vec<(PathBuf, Format)>;

impl Store {
    /// What is left of a snapshot without its memory: of a live one, what a power cut would have.
    pub fn without_memory(snapshot: &Snapshot) -> Snapshot {
        let mut manifest = snapshot.manifest.clone();
        if manifest.kind == Kind::Live {
            manifest.kind = Kind::Crash;
        }
        (manifest.memory, manifest.cpu) = (None, None);
        manifest.files.retain(|file| !matches!(file.role, Role::Memory | Role::MemoryIndex | Role::State));
        Snapshot { manifest, ..snapshot.clone() }
    }

    /// Puts the files of a snapshot that needs no other into an empty folder: each disk as one file without a
    /// backing file, and all of the memory. Files that are like that already are linked; when all are, the manifest
    /// is the snapshot's own. Everything is verified before, for what is made anew gets digests of its own. `step` is
    /// told what is being done.
    pub fn make_whole(
        &self,
        snapshot: &Snapshot,
        into: &Staging,
        mut step: impl FnMut(&str),
    ) -> Result<Manifest, Error> {
        self.check_room(self.made_anew(snapshot)?)?;
        let mut seen = Seen::default();
        for needed in self.needed_by(snapshot)? {
            step(&format!("verifying {}", needed.manifest.name));
            // Of the snapshot itself, also what is left out here is in its manifest on the disk.
            let stored = self.load(&needed.digest)?;
            self.verify_unseen(&stored, &mut seen, |_, _| {})?;
            self.verify_links(&stored)?;
        }
        let mut manifest = Manifest { files: Vec::new(), ..snapshot.manifest.clone() };
        for disk in &mut manifest.disks {
            let chain = self.chain_of(snapshot, disk)?;
            if chain.len() > 1 {
                step(&format!("folding the disk {}", disk.device));
                fold(&chain, &into.dir().join(&disk.file), None, self.root())?;
                (disk.backing, disk.format) = (None, Format::Qcow2.name().into());
            }
        }
        if manifest.memory.as_ref().is_some_and(|memory| memory.parent.is_some()) {
            step("laying memories over each other");
            let count = self.memory_chain(snapshot)?.len();
            manifest.memory =
                Some(MemoryInfo { parent: None, bytes: memory::merge(self, snapshot, count, into.dir())? });
        }
        step("digesting");
        for old in &snapshot.manifest.files {
            let path = into.dir().join(&old.name);
            let below = old.role == Role::Disk && manifest.disks.iter().all(|disk| disk.file != old.name);
            match path.exists() {
                _ if below => {}
                true => manifest.files.push(describe(into.dir(), &old.name, old.role)?),
                false => {
                    let from = snapshot.dir.join(&old.name);
                    fs::hard_link(&from, &path).at("link", &from)?;
                    manifest.files.push(old.clone());
                }
            }
        }
        Ok(manifest)
    }

    /// Reads all of a disk of a snapshot, clusters of zeros left out.
    pub fn read_disk(&self, snapshot: &Snapshot, disk: &Disk, each: Each<'_>) -> Result<(), Error> {
        Ok(read_data(&snapshot.dir.join(&disk.file), format(snapshot, disk)?, self.root(), each)?)
    }

    /// Opens a disk of a snapshot, to read anywhere in it.
    pub fn open_disk(&self, snapshot: &Snapshot, disk: &Disk) -> Result<Reader, Error> {
        Ok(Reader::open(&snapshot.dir.join(&disk.file), format(snapshot, disk)?, self.root())?)
    }

    /// Reads all of a snapshot's memory, zeros left out.
    pub fn read_memory(&self, snapshot: &Snapshot, each: Each<'_>) -> Result<(), Error> {
        memory::read(self, snapshot, each)
    }

    /// How many bytes a disk or the memory of a snapshot has to be read for: those in the files of its chain.
    pub fn bytes_in(&self, snapshot: &Snapshot, disk: Option<&Disk>) -> Result<u64, Error> {
        let paths: Vec<PathBuf> = match disk {
            Some(disk) => self.chain_of(snapshot, disk)?.into_iter().map(|(path, _)| path).collect(),
            None => self.memory_chain(snapshot)?.iter().map(|layer| layer.dir.join(DATA)).collect(),
        };
        paths.iter().try_fold(0u64, |sum, path| Ok(sum.saturating_add(taken(path)?)))
    }

    /// The most that has to be written for a snapshot that needs no other.
    fn made_anew(&self, snapshot: &Snapshot) -> Result<u64, Error> {
        let mut bytes = 0u64;
        for disk in &snapshot.manifest.disks {
            if self.chain_of(snapshot, disk)?.len() > 1 {
                bytes = bytes.saturating_add(self.bytes_in(snapshot, Some(disk))?);
            }
        }
        match &snapshot.manifest.memory {
            Some(memory) if memory.parent.is_some() => Ok(bytes.saturating_add(self.bytes_in(snapshot, None)?)),
            _ => Ok(bytes),
        }
    }

    fn chain_of(&self, snapshot: &Snapshot, disk: &Disk) -> Result<Chain, Error> {
        Ok(chain_files(&snapshot.dir.join(&disk.file), format(snapshot, disk)?, self.root())?)
    }
}

fn format(snapshot: &Snapshot, disk: &Disk) -> Result<Format, Error> {
    Format::from_name(&disk.format)
        .ok_or_else(|| Error::Damaged { path: snapshot.dir.join(MANIFEST), why: "a disk's format is not known".into() })
}

fn taken(path: &Path) -> Result<u64, Error> {
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(Error::Damaged { path: path.into(), why: "it is missing".into() })
        }
        other => Ok(space::taken(&other.at("find", path)?)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::memory::{Index, PAGE, Region, Run};
    use crate::store::testing::{Made, store};

    fn index(pages: &[(u64, Option<u64>)], of: u64) -> Vec<u8> {
        let run = |(page, offset): &(u64, Option<u64>)| Run {
            address: page * PAGE,
            length: PAGE,
            offset: offset.map(|at| at * PAGE),
        };
        let region = Region { start: 0, length: of * PAGE };
        Index::new(vec![region], pages.iter().map(run).collect()).unwrap().to_bytes()
    }

    #[test]
    fn what_is_whole_stays_itself_and_chains_become_one() {
        let (_dir, store) = store();
        let kitten = Made::new(Kind::Clean, "kitten").filled(7).publish(&store);
        let staging = store.stage().unwrap();
        assert_eq!(store.make_whole(&kitten, &staging, |_| {}).unwrap(), kitten.manifest);

        let page = |byte| vec![byte; PAGE as usize];
        let one = Made::new(Kind::Live, "anna@one").disk(Some(&kitten));
        let one = one.memory_of(None, &page(1), &index(&[(0, Some(0)), (1, None)], 2)).publish(&store);
        let two = Made::new(Kind::Live, "anna@two").successor(&one);
        let two = two.memory_of(Some(&one), &page(2), &index(&[(1, Some(0))], 2)).publish(&store);
        let staging = store.stage().unwrap();
        let manifest = store.make_whole(&two, &staging, |_| {}).unwrap();
        assert_eq!(manifest.needs().count(), 0);
        assert_eq!(fs::read(staging.dir().join("memory")).unwrap(), [page(1), page(2)].concat());
        let mut names: Vec<_> = manifest.files.iter().map(|file| file.name.as_str()).collect();
        names.sort();
        assert_eq!(names, ["memory", "memory.index", "root-2.qcow2"]);
        let whole = store.publish(staging, &manifest, "anna@whole").unwrap();
        store.verify(&whole, |_, _| {}).unwrap();
        store.verify_links(&whole).unwrap();
        let bytes = |snapshot: &Snapshot| {
            let mut found = Vec::new();
            let mut each = |at, bytes: &[u8]| {
                found.push((at, bytes.to_vec()));
                ControlFlow::Continue(())
            };
            store.read_disk(snapshot, &snapshot.manifest.disks[0], &mut each).unwrap();
            store.read_memory(snapshot, &mut each).unwrap();
            found.iter().flat_map(|(at, bytes)| (0..bytes.len()).map(move |n| (at + n as u64, bytes[n]))).collect()
        };
        let (before, after): (Vec<_>, Vec<_>) = (bytes(&two), bytes(&whole));
        assert!(before == after && before.len() == (4 << 20) + 2 * PAGE as usize);

        let alone = Store::without_memory(&two);
        let staging = store.stage().unwrap();
        let manifest = store.make_whole(&alone, &staging, |_| {}).unwrap();
        assert_eq!((manifest.kind, manifest.files.len(), &manifest.memory), (Kind::Crash, 1, &None));
        std::fs::remove_file(one.dir.join("memory")).unwrap();
        let staging = store.stage().unwrap();
        store.make_whole(&alone, &staging, |_| {}).unwrap();
        assert!(matches!(store.make_whole(&two, &store.stage().unwrap(), |_| {}), Err(Error::Damaged { .. })));
    }
}
