//! The list of chunks: which make up which file.

use serde::{Deserialize, Serialize};

use super::MAX_CHUNK;
use crate::snapshot::{Digest, Manifest};

/// The most chunks: so many layers go into a manifest that a registry takes.
pub(super) const MAX_CHUNKS: usize = 20_000;
/// The most pieces of a file.
const MAX_PIECES: usize = 1 << 20;
/// The smallest part of an address space that is looked at as one.
const MIN_SPAN: u64 = 4096;

#[derive(Serialize, Deserialize)]
pub(super) struct List {
    format: u32,
    /// Each with the layer of its number, one more.
    pub(super) chunks: Vec<Chunk>,
    /// One for each of the snapshot's files, in their order.
    pub(super) files: Vec<Cut>,
}

/// What is in a chunk before it is compressed.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub(super) struct Chunk {
    pub(super) size: u64,
    pub(super) digest: Digest,
}

/// A file, cut in pieces.
#[derive(Serialize, Deserialize)]
pub(super) struct Cut {
    pub(super) name: String,
    /// What part of the guest's addresses, at most, lies in a piece of a disk or a memory; other files are just cut.
    pub(super) span: u64,
    /// The number of a chunk; or, less than zero, how many zeros there are.
    pub(super) pieces: Vec<i64>,
}

/// A piece of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// Where it lies in the file.
    pub(super) at: u64,
    /// The number of the chunk that it is.
    pub(super) chunk: usize,
}

impl List {
    const FORMAT: u32 = 1;

    pub(super) fn new(chunks: Vec<Chunk>, files: Vec<Cut>) -> List {
        List { format: List::FORMAT, chunks, files }
    }

    /// Reads and checks the list of a snapshot with this manifest, in an artifact with so many chunks.
    pub(super) fn parse(bytes: &[u8], manifest: &Manifest, chunks: usize) -> Result<List, String> {
        let list: List =
            serde_json::from_slice(bytes).map_err(|error| format!("its list of chunks is none: {error}"))?;
        if list.format != List::FORMAT {
            return Err(format!(
                "its list of chunks is of format {}, and this catnap reads {}",
                list.format,
                List::FORMAT
            ));
        }
        if list.chunks.len() != chunks || chunks > MAX_CHUNKS {
            return Err(format!("it has {chunks} chunks, and lists {}", list.chunks.len()));
        }
        if let Some(chunk) = list.chunks.iter().find(|chunk| !(1..=MAX_CHUNK).contains(&chunk.size)) {
            return Err(format!("a chunk has {} bytes, and can have {MAX_CHUNK}", chunk.size));
        }
        let mut used = vec![false; chunks];
        if !list.files.iter().map(|cut| &cut.name).eq(manifest.files.iter().map(|file| &file.name)) {
            return Err("its list of chunks is of other files".into());
        }
        for (cut, file) in list.files.iter().zip(&manifest.files) {
            if !(MIN_SPAN..=MAX_CHUNK).contains(&cut.span) {
                return Err(format!("a piece of {} would cover {} bytes", cut.name, cut.span));
            }
            match list.length(cut, &mut used) {
                Some(length) if length == file.size => {}
                _ => return Err(format!("the chunks of {} do not make up its size", cut.name)),
            }
        }
        match used.iter().all(|used| *used) {
            true => Ok(list),
            false => Err("it has chunks that belong nowhere".into()),
        }
    }

    /// The length of a file by its pieces; none when that makes no sense.
    fn length(&self, cut: &Cut, used: &mut [bool]) -> Option<u64> {
        if cut.pieces.len() > MAX_PIECES {
            return None;
        }
        let mut length = 0u64;
        for piece in &cut.pieces {
            let part = match usize::try_from(*piece) {
                Ok(number) => {
                    *used.get_mut(number)? = true;
                    self.chunks.get(number)?.size
                }
                Err(_) => piece.unsigned_abs(),
            };
            length = length.checked_add(part)?;
        }
        Some(length)
    }

    /// The pieces of a file that are not zeros. Of a list that was checked.
    pub(super) fn pieces<'a>(&'a self, cut: &'a Cut) -> impl Iterator<Item = Piece> + 'a {
        let mut at = 0;
        cut.pieces.iter().filter_map(move |piece| {
            let begin = at;
            match usize::try_from(*piece) {
                Ok(chunk) => {
                    at += self.chunks[chunk].size;
                    Some(Piece { at: begin, chunk })
                }
                Err(_) => {
                    at += piece.unsigned_abs();
                    None
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::{File, Kind, Role};
    use crate::sys::mutate::{Mutator, rounds};

    fn manifest() -> Manifest {
        let file = |name: &str, size| File {
            name: name.into(),
            role: Role::Kernel,
            size,
            digest: Digest::of(b""),
            chunks: None,
        };
        Manifest { files: vec![file("a", 30), file("b", 10)], ..Manifest::new(Kind::Clean, "x", 0) }
    }

    fn list() -> List {
        let chunk = |size| Chunk { size, digest: Digest::of(&[size as u8]) };
        let cut = |name: &str, pieces: &[i64]| Cut { name: name.into(), span: 4096, pieces: pieces.into() };
        List::new(vec![chunk(10), chunk(5)], vec![cut("a", &[0, -5, 1, 0]), cut("b", &[-10])])
    }

    fn parse(change: impl FnOnce(&mut List)) -> Result<List, String> {
        let mut list = list();
        change(&mut list);
        List::parse(&serde_json::to_vec(&list).unwrap(), &manifest(), 2)
    }

    #[test]
    fn a_list_tells_where_each_chunk_goes() {
        let list = parse(|_| {}).unwrap();
        let place = |piece: Piece| (piece.at, piece.chunk);
        let places: Vec<Vec<_>> = list.files.iter().map(|cut| list.pieces(cut).map(place).collect()).collect();
        assert_eq!(places, [vec![(0, 0), (15, 1), (20, 0)], vec![]]);
    }

    #[test]
    fn lists_that_make_no_sense_are_refused() {
        type Change = fn(&mut List);
        let cases: &[(&str, Change)] = &[
            ("format 2", |l| l.format = 2),
            ("it has 2 chunks, and lists 1", |l| l.chunks.truncate(1)),
            ("it has 2 chunks, and lists 3", |l| l.chunks.push(l.chunks[0])),
            ("a chunk has 0 bytes", |l| l.chunks[0].size = 0),
            ("a chunk has", |l| l.chunks[0].size = u64::MAX),
            ("of other files", |l| l.files.swap(0, 1)),
            ("of other files", |l| drop(l.files.pop())),
            ("of other files", |l| l.files[0].name = "../a".into()),
            ("would cover 0", |l| l.files[0].span = 0),
            ("would cover", |l| l.files[0].span = u64::MAX),
            ("chunks of a do not", |l| l.files[0].pieces[0] = 1),
            ("chunks of a do not", |l| l.files[0].pieces[0] = 2),
            ("chunks of a do not", |l| l.files[0].pieces[1] = i64::MIN),
            ("chunks of a do not", |l| l.files[0].pieces = vec![i64::MIN; 4]),
            ("chunks of a do not", |l| l.files[0].pieces.clear()),
            ("chunks of b do not", |l| l.files[1].pieces = vec![-1; MAX_PIECES + 1]),
            ("belong nowhere", |l| l.files[0].pieces = vec![0, 0, 0]),
        ];
        for (why, change) in cases {
            let said = parse(*change).err().unwrap_or_default();
            assert!(said.contains(why), "{said} ({why})");
        }
        for text in
            ["", "[]", "{\"format\": 1}", "{\"format\":1,\"chunks\":[{\"size\":-1,\"digest\":\"x\"}],\"files\":[]}"]
        {
            assert!(List::parse(text.as_bytes(), &manifest(), 0).is_err());
        }
    }

    #[test]
    fn no_list_is_too_strange() {
        let good = serde_json::to_vec(&list()).unwrap();
        let document = serde_json::from_slice(&good).unwrap();
        let (mut mutator, mut taken) = (Mutator::from_env(), 0);
        for round in 0..rounds(5000) {
            let strange = match round % 2 {
                0 => mutator.bytes(&good),
                _ => serde_json::to_vec(&mutator.json(&document)).unwrap(),
            };
            let Ok(list) = List::parse(&strange, &manifest(), 2) else { continue };
            taken += 1;
            for (cut, file) in list.files.iter().zip(&manifest().files) {
                let within = |piece: Piece| piece.at + list.chunks[piece.chunk].size <= file.size;
                assert!(list.pieces(cut).all(within));
            }
        }
        assert!(taken > 0);
    }
}
