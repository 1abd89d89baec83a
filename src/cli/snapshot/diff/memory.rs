//! What changed in memory, page by page.
//!
//! Each memory is a full one with the differences laid over it. Where both have the same piece of the same file,
//! nothing is read: so two snapshots of one machine are compared at the cost of what changed between them.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use serde::Serialize;

use crate::cli::ui;
use crate::control::Failure;
use crate::snapshot::memory::{Index, PAGE, Piece, Source, resolve};
use crate::snapshot::{Digest, Role};
use crate::store::{Error, Snapshot, Store};

/// How much of each memory is read at once: many pages, in bytes.
const CHUNK: usize = 1 << 20;

/// What is known of the change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "in")]
pub enum Change {
    /// Neither snapshot has memory.
    Neither,
    /// Only the first has.
    FirstOnly,
    /// Only the second has.
    SecondOnly,
    /// The machines have RAM at different addresses, which cannot be compared.
    OtherRam,
    /// Both have.
    Both {
        /// Pages of 4096 bytes that are not the same.
        changed_pages: u64,
        /// The bytes in them.
        changed_bytes: u64,
    },
}

/// Compares the memory of two snapshots.
pub fn compare(store: &Store, before: &Snapshot, after: &Snapshot) -> Result<Change, Failure> {
    match (&before.manifest.memory, &after.manifest.memory) {
        (None, None) => Ok(Change::Neither),
        (Some(_), None) => Ok(Change::FirstOnly),
        (None, Some(_)) => Ok(Change::SecondOnly),
        (Some(_), Some(_)) => {
            let (a, b) = (Memory::of(store, before)?, Memory::of(store, after)?);
            if a.length != b.length || a.pieces.first().map(|p| p.address) != b.pieces.first().map(|p| p.address) {
                return Ok(Change::OtherRam);
            }
            Ok(changes(&a, &b)?)
        }
    }
}

/// A whole memory, wherever its pieces lie.
struct Memory {
    /// Covers all of RAM, sorted.
    pieces: Vec<Piece>,
    /// Bytes of RAM.
    length: u64,
    layers: Vec<Layer>,
}

/// The memory file of a snapshot.
struct Layer {
    digest: Digest,
    path: PathBuf,
    file: File,
}

impl Memory {
    fn of(store: &Store, snapshot: &Snapshot) -> Result<Memory, Error> {
        let (mut layers, mut indexes) = (Vec::new(), Vec::new());
        for snapshot in store.memory_chain(snapshot)? {
            let damaged = |path: PathBuf, why: String| Error::Damaged { path, why };
            let path = snapshot.file(Role::Memory);
            let path = path.ok_or_else(|| damaged(snapshot.dir.clone(), "it has no memory".into()))?;
            let file = File::open(&path).map_err(|error| damaged(path.clone(), error.to_string()))?;
            indexes.push(Index::read(&snapshot.dir)?);
            layers.push(Layer { digest: snapshot.digest, path, file });
        }
        let pieces = resolve(&indexes.iter().collect::<Vec<_>>())?;
        Ok(Memory { length: pieces.iter().map(|piece| piece.length).sum(), pieces, layers })
    }

    /// Which bytes these are: those of the same file at the same place are the same.
    fn identity(&self, source: Source) -> Option<(Digest, u64)> {
        match source {
            Source::Zeros => None,
            Source::Layer { layer, offset } => self.layers.get(layer).map(|layer| (layer.digest, offset)),
        }
    }

    fn read(&self, source: Source, into: &mut [u8]) -> Result<(), Error> {
        match source {
            Source::Zeros => into.fill(0),
            Source::Layer { layer, offset } => {
                let Some(layer) = self.layers.get(layer) else { return Ok(()) };
                let read = layer.file.read_exact_at(into, offset);
                read.map_err(|error| Error::Damaged { path: layer.path.clone(), why: error.to_string() })?;
            }
        }
        Ok(())
    }
}

/// Goes through both memories at once.
fn changes(a: &Memory, b: &Memory) -> Result<Change, Error> {
    let progress = ui::Progress::begin("Comparing memory");
    let (mut changed_pages, mut done, mut shown) = (0, 0u64, 0);
    let (mut in_a, mut in_b) = (a.pieces.iter().copied(), b.pieces.iter().copied());
    let (mut next_a, mut next_b) = (in_a.next(), in_b.next());
    while let (Some(one), Some(two)) = (next_a, next_b) {
        if one.address != two.address {
            return Ok(Change::OtherRam);
        }
        let length = one.length.min(two.length);
        if a.identity(one.source) != b.identity(two.source) {
            changed_pages += differing(a, one.source, b, two.source, length)?;
        }
        done += length;
        let part = done.saturating_mul(100).checked_div(a.length).unwrap_or(100);
        if part != shown {
            shown = part;
            progress.say(format!("Comparing memory: {part}%"));
        }
        next_a = behind(one, length).or_else(|| in_a.next());
        next_b = behind(two, length).or_else(|| in_b.next());
    }
    Ok(Change::Both { changed_pages, changed_bytes: changed_pages * PAGE })
}

/// How many of the pages differ that two sources have from their beginnings on.
fn differing(a: &Memory, from_a: Source, b: &Memory, from_b: Source, length: u64) -> Result<u64, Error> {
    let mut buffers = [vec![0; CHUNK], vec![0; CHUNK]];
    let [one, two] = &mut buffers;
    let (mut at, mut changed) = (0, 0);
    while at < length {
        let size = (length - at).min(CHUNK as u64) as usize;
        a.read(forward(from_a, at), &mut one[..size])?;
        b.read(forward(from_b, at), &mut two[..size])?;
        let pages = one[..size].chunks(PAGE as usize).zip(two[..size].chunks(PAGE as usize));
        changed += pages.filter(|(one, two)| one != two).count() as u64;
        at += size as u64;
    }
    Ok(changed)
}

fn forward(source: Source, by: u64) -> Source {
    match source {
        Source::Zeros => Source::Zeros,
        Source::Layer { layer, offset } => Source::Layer { layer, offset: offset + by },
    }
}

/// What is left of a piece behind its first bytes.
fn behind(piece: Piece, length: u64) -> Option<Piece> {
    let left = piece.length - length;
    let source = forward(piece.source, length);
    (left > 0).then_some(Piece { address: piece.address + length, length: left, source })
}

impl Change {
    /// For people.
    pub fn to_text(&self) -> String {
        match self {
            Change::Neither => "no memory in either".into(),
            Change::FirstOnly => "memory in the first alone".into(),
            Change::SecondOnly => "memory in the second alone".into(),
            Change::OtherRam => "not compared: their machines have different RAM".into(),
            Change::Both { changed_pages: 0, .. } => "the same".into(),
            Change::Both { changed_pages, changed_bytes } => {
                format!("{changed_pages} pages differ, {}", ui::amount(*changed_bytes))
            }
        }
    }
}
