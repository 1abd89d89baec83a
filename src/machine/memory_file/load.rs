//! Guest memory, out of the files of a snapshot and those before it.

use std::fs::File;

use vm_memory::GuestAddress;

use super::Error;
use crate::machine;
use crate::mem::{self, GuestMemory};
use crate::snapshot::memory::{Index, Source, resolve};

/// Memory as it was at the last snapshot of a chain, whose first is a full one. Each has its index and its file
/// `memory`, opened to be read; the files may be closed afterwards, and must never change. Most of it is read
/// when the guest touches it.
pub fn load(chain: &[(&Index, File)]) -> Result<GuestMemory, machine::Error> {
    let (indexes, files) = chain.iter().map(|(index, file)| (*index, file)).unzip::<_, _, Vec<_>, Vec<_>>();
    for (layer, (index, file)) in chain.iter().enumerate() {
        let length = file.metadata().map_err(|source| mem::Error::File { file: layer, source })?.len();
        if length != index.data_length() {
            return Err(Error::Length { layer, length, expected: index.data_length() }.into());
        }
    }
    let pieces = resolve(&indexes)?.into_iter().map(|piece| mem::Piece {
        address: piece.address,
        length: piece.length,
        source: match piece.source {
            Source::Zeros => mem::Source::Zeros,
            Source::Layer { layer, offset } => mem::Source::File { file: layer, offset },
        },
    });
    let regions = indexes.first().map_or(&[][..], |base| base.regions());
    let regions: Vec<_> = regions.iter().map(|region| (GuestAddress(region.start), region.length)).collect();
    Ok(mem::restore(&regions, &pieces.collect::<Vec<_>>(), &files)?)
}
