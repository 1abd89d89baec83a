//! Makes one memory of several: a difference, and what it is a difference to; or all of it, of a whole chain.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::snapshot::Role;
use crate::snapshot::memory::{self, Index, Region, Run, Source};
use crate::store::{Error, Snapshot, Store};
use crate::sys::files::At;

/// How much is copied at once, in bytes.
const CHUNK: u64 = 1 << 20;

/// Writes a memory and its index into the folder `into`: what any of the uppermost `count` memories of `snapshot`
/// holds, with the newest on top. It is full when the lowest of them is, and a difference to the same parent
/// otherwise. Gives the bytes of data in it.
pub(super) fn merge(store: &Store, snapshot: &Snapshot, count: usize, into: &Path) -> Result<u64, Error> {
    let chain = chain(store, snapshot)?;
    let indexes: Vec<_> = chain.iter().map(|layer| &layer.index).collect();
    let mut known: Vec<_> = chain.iter().rev().take(count).flat_map(|layer| layer.index.runs()).collect();
    known.sort_by_key(|run| run.address);

    let path = into.join(memory::DATA);
    let mut out =
        Out { file: BufWriter::new(File::create(&path).at("make", &path)?), path, runs: Vec::new(), length: 0 };
    let regions = indexes.first().map(|index| index.regions().to_vec()).unwrap_or_default();
    let mut known = ranges(&known).into_iter().peekable();
    for piece in memory::resolve(&indexes)? {
        // Of the piece, the parts that one of the two knows: those are its, or zeros.
        while let Some(&(start, end)) = known.peek() {
            let part = (start.max(piece.address), end.min(piece.address + piece.length));
            if part.0 < part.1 {
                let source = match piece.source {
                    Source::Zeros => None,
                    Source::Layer { layer, offset } => {
                        chain.get(layer).map(|layer| (layer, offset + (part.0 - piece.address)))
                    }
                };
                out.add(part, source, &regions)?;
            }
            if end > piece.address + piece.length {
                break;
            }
            known.next();
        }
    }
    out.finish(regions, &into.join(memory::INDEX))
}

/// Reads the memory of a snapshot as it was, zeros left out, in the order of its addresses: `each` gets an address
/// and what is there, at most [`CHUNK`] bytes at once, and ends the reading when it breaks.
pub(super) fn read(
    store: &Store,
    snapshot: &Snapshot,
    each: &mut dyn FnMut(u64, &[u8]) -> ControlFlow<()>,
) -> Result<(), Error> {
    let chain = chain(store, snapshot)?;
    let indexes: Vec<_> = chain.iter().map(|layer| &layer.index).collect();
    let mut buffer = vec![0; CHUNK as usize];
    for piece in memory::resolve(&indexes)? {
        let Source::Layer { layer, offset } = piece.source else { continue };
        let Some(layer) = chain.get(layer) else { continue };
        for at in (0..piece.length).step_by(CHUNK as usize) {
            let part = &mut buffer[..(piece.length - at).min(CHUNK) as usize];
            layer.file.read_exact_at(part, offset + at).at("read", &layer.path)?;
            if each(piece.address + at, part).is_break() {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// The memory of one snapshot.
struct Layer {
    index: Index,
    path: PathBuf,
    file: File,
}

/// The memories that make up that of a snapshot, the full one first.
fn chain(store: &Store, snapshot: &Snapshot) -> Result<Vec<Layer>, Error> {
    let layer = |snapshot: &Snapshot| {
        let missing = || Error::Damaged { path: snapshot.dir.clone(), why: "it has no memory".into() };
        let path = snapshot.file(Role::Memory).ok_or_else(missing)?;
        let file = File::open(&path).at("open", &path)?;
        Ok(Layer { index: Index::read(&snapshot.dir)?, path, file })
    };
    store.memory_chain(snapshot)?.iter().map(layer).collect()
}

/// Sorted runs as ranges of addresses, with those that touch or overlap made one.
fn ranges(runs: &[&Run]) -> Vec<(u64, u64)> {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for run in runs {
        let end = run.address + run.length;
        match ranges.last_mut() {
            Some(last) if run.address <= last.1 => last.1 = last.1.max(end),
            _ => ranges.push((run.address, end)),
        }
    }
    ranges
}

/// What is being written.
struct Out {
    file: BufWriter<File>,
    path: PathBuf,
    runs: Vec<Run>,
    /// Bytes of data so far.
    length: u64,
}

impl Out {
    /// Adds a range of addresses with what is there; zeros when there is no source.
    fn add(
        &mut self,
        (start, end): (u64, u64),
        source: Option<(&Layer, u64)>,
        regions: &[Region],
    ) -> Result<(), Error> {
        let offset = source.map(|_| self.length);
        if let Some((layer, from)) = source {
            let mut buffer = vec![0; (end - start).min(CHUNK) as usize];
            let mut at = 0;
            while at < end - start {
                let size = (end - start - at).min(CHUNK) as usize;
                layer.file.read_exact_at(&mut buffer[..size], from + at).at("read", &layer.path)?;
                self.file.write_all(&buffer[..size]).at("write", &self.path)?;
                at += size as u64;
            }
            self.length += end - start;
        }
        // A run ends where its region does, and two that follow each other are one.
        let begins_region = regions.iter().any(|region| region.start == start);
        match self.runs.last_mut() {
            Some(last)
                if !begins_region
                    && last.address + last.length == start
                    && last.offset.is_some() == offset.is_some() =>
            {
                last.length += end - start;
            }
            _ => self.runs.push(Run { address: start, length: end - start, offset }),
        }
        Ok(())
    }

    fn finish(mut self, regions: Vec<Region>, index_path: &Path) -> Result<u64, Error> {
        self.file.flush().at("write", &self.path)?;
        let index = Index::new(regions, self.runs)?;
        std::fs::write(index_path, index.to_bytes()).at("write", index_path)?;
        Ok(index.data_length())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::snapshot::Kind;
    use crate::snapshot::memory::{PAGE, resolve};
    use crate::store::testing::{Made, store};

    const REGIONS: [Region; 2] = [Region { start: 0, length: 6 * PAGE }, Region { start: 6 * PAGE, length: 4 * PAGE }];

    /// A memory of single pages: for each page, its byte, or zero for zeros.
    fn pages(known: &[(u64, u8)]) -> (Vec<u8>, Vec<u8>) {
        let (mut runs, mut data) = (Vec::new(), Vec::new());
        for (page, byte) in known {
            let offset = (*byte != 0).then_some(data.len() as u64);
            if *byte != 0 {
                data.extend(vec![*byte; PAGE as usize]);
            }
            runs.push(Run { address: page * PAGE, length: PAGE, offset });
        }
        (data, Index::new(REGIONS.to_vec(), runs).unwrap().to_bytes())
    }

    fn live(store: &Store, name: &str, parent: Option<&Snapshot>, known: &[(u64, u8)]) -> Snapshot {
        let (data, index) = pages(known);
        Made::new(Kind::Live, name).memory_of(parent, &data, &index).publish(store)
    }

    /// The first byte of each page of a whole memory.
    fn whole(store: &Store, snapshot: &Snapshot) -> Vec<u8> {
        let chain = chain(store, snapshot).unwrap();
        let indexes: Vec<_> = chain.iter().map(|layer| &layer.index).collect();
        let mut bytes = Vec::new();
        for piece in resolve(&indexes).unwrap() {
            for page in 0..piece.length / PAGE {
                let mut byte = [0];
                if let Source::Layer { layer, offset } = piece.source {
                    chain[layer].file.read_exact_at(&mut byte, offset + page * PAGE).unwrap();
                }
                bytes.push(byte[0]);
            }
        }
        bytes
    }

    #[test]
    fn a_chain_of_memories_reads_the_same_whichever_goes() {
        let full: Vec<_> = (0..10).map(|page| (page, if page % 3 == 0 { 0 } else { 1 })).collect();
        let names = ["a@0", "a@1", "a@2", "a@3"];
        for goes in 0..3 {
            let (_dir, store) = store();
            let zero = live(&store, names[0], None, &full);
            let one = live(&store, names[1], Some(&zero), &[(0, 2), (1, 0), (5, 2), (6, 2), (9, 2)]);
            let two = live(&store, names[2], Some(&one), &[(1, 3), (2, 3), (5, 0), (7, 3)]);
            let three = live(&store, names[3], Some(&two), &[(2, 0), (3, 4), (9, 4)]);
            let before = [&zero, &one, &two, &three].map(|snapshot| whole(&store, snapshot));
            assert_eq!(before[3], [2, 3, 0, 4, 1, 0, 2, 3, 1, 4]);
            let digest = [&zero, &one, &two][goes].digest;
            store.merge_snapshot(&digest, |_| {}).unwrap();
            for left in (0..4).filter(|left| *left != goes) {
                let snapshot = store.resolve(names[left]).unwrap();
                assert_eq!(whole(&store, &snapshot), before[left], "{goes} goes, {left} is left");
                store.verify(&snapshot, |_, _| {}).unwrap();
                store.verify_links(&snapshot).unwrap();
                let memory = snapshot.manifest.memory.clone().unwrap();
                assert_eq!(memory.bytes, fs::metadata(snapshot.dir.join("memory")).unwrap().len());
                assert_eq!(memory.parent.is_none(), left == 0 || goes == 0 && left == 1);
            }
        }
    }
}
