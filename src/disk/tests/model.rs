//! A disk as an array of sectors, each with the contents that would be right.

use std::io;

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::disk::{Buffer, Disk};

const SECTOR: u64 = 512;
/// Large enough for four L2 tables.
pub const SIZE: u64 = 2 << 30;
/// The work happens in four areas of this size, three of them across a border between two L2 tables.
const AREA: u64 = 2 << 20;
const AREAS: u64 = 4;

fn area_start(area: u64) -> u64 {
    if area == 0 { 0 } else { area * (512 << 20) - AREA / 2 }
}

/// A small generator of numbers (SplitMix64), the same in every run.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// For every sector of the areas, the stamps that it may hold; zero is a sector of zeros.
#[derive(Clone)]
pub struct Model {
    sectors: Vec<Vec<u32>>,
}

impl Model {
    pub fn new() -> Model {
        Model { sectors: vec![vec![0]; (AREAS * AREA / SECTOR) as usize] }
    }

    /// Does one random thing to the disk and to the model. What is written bears `stamp`.
    pub fn step(&mut self, disk: &mut dyn Disk, random: &mut Random, stamp: u32) -> io::Result<()> {
        let (area, kind) = (random.below(AREAS), random.below(10));
        let longest = if kind == 0 { AREA / SECTOR } else { 300 };
        let first = random.below(AREA / SECTOR);
        let count = 1 + random.below(longest.min(AREA / SECTOR - first));
        let (offset, length) = (area_start(area) + first * SECTOR, count * SECTOR);
        let sectors = &mut self.sectors[(area * AREA / SECTOR + first) as usize..][..count as usize];
        match kind {
            0 | 1 => {
                sectors.iter_mut().filter(|sector| !sector.contains(&0)).for_each(|sector| sector.push(0));
                disk.discard(offset, length)
            }
            2 | 3 => {
                sectors.fill(vec![0]);
                disk.write_zeroes(offset, length, kind == 2)
            }
            _ => {
                sectors.fill(vec![stamp]);
                let memory = memory(length);
                memory.write_slice(&stamp.to_le_bytes().repeat(length as usize / 4), GuestAddress(0)).unwrap();
                disk.write(&pieces(&memory, length, random), offset)
            }
        }
    }

    /// After a crash, a sector may also hold what `later` steps did to it.
    pub fn allow(&mut self, later: &Model) {
        for (mine, theirs) in self.sectors.iter_mut().zip(&later.sectors) {
            theirs.iter().for_each(|stamp| {
                if !mine.contains(stamp) {
                    mine.push(*stamp);
                }
            });
        }
    }

    /// Checks that every sector of the disk holds something that is right.
    pub fn compare(&self, disk: &mut dyn Disk) {
        assert_eq!(disk.len(), SIZE);
        for area in 0..AREAS {
            let memory = memory(AREA);
            disk.read(&pieces(&memory, AREA, &mut Random(area)), area_start(area)).unwrap();
            let mut bytes = vec![0; AREA as usize];
            memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
            for (i, sector) in bytes.chunks_exact(SECTOR as usize).enumerate() {
                let stamp: [u8; 4] = sector[..4].try_into().unwrap();
                assert!(sector.chunks_exact(4).all(|word| word == stamp), "a torn sector");
                let right = &self.sectors[area as usize * (AREA / SECTOR) as usize + i];
                let stamp = u32::from_le_bytes(stamp);
                assert!(right.contains(&stamp), "area {area}, sector {i}: {stamp} and not one of {right:?}");
            }
        }
    }
}

/// Guest memory of `length` bytes.
pub fn memory(length: u64) -> GuestMemoryMmap<AtomicBitmap> {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), length as usize)]).unwrap()
}

pub fn slice(memory: &GuestMemoryMmap<AtomicBitmap>, length: usize) -> Buffer<'_> {
    memory.get_slice(GuestAddress(0), length).unwrap()
}

/// The memory in pieces of random length, as a guest's descriptors may give it.
fn pieces<'a>(memory: &'a GuestMemoryMmap<AtomicBitmap>, length: u64, random: &mut Random) -> Vec<Buffer<'a>> {
    let (mut pieces, mut at) = (Vec::new(), 0);
    while at < length {
        let piece = (SECTOR * (1 + random.below(16))).min(length - at);
        pieces.push(memory.get_slice(GuestAddress(at), piece as usize).unwrap());
        at += piece;
    }
    pieces
}
