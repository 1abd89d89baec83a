//! The journal of an ext4 filesystem (Documentation/filesystems/ext4/journal.rst of Linux): which blocks have a newer
//! state in it. It is not replayed; whoever reads a block asks here where to read it.
//!
//! ```text
//! superblock … │ descriptor  block block …  [revocations]  commit │ descriptor  block …  commit │ older rubbish
//!              ▲ s_start                    a transaction                                       ▲ another sequence
//! ```

use std::collections::HashMap;

use super::ext4::{Extent, Filesystem};

/// What every block of the journal's own begins with.
pub const MAGIC: u32 = 0xc03b_3998;
/// The kinds of such blocks.
const DESCRIPTOR: u32 = 1;
const COMMIT: u32 = 2;
const SUPERBLOCKS: std::ops::RangeInclusive<u32> = 3..=4;
const REVOCATIONS: u32 = 5;
/// `s_feature_incompat`: block numbers of 64 bits, and checksums of two kinds.
const WIDE: u32 = 0x2;
const CHECKSUMS_2: u32 = 0x8;
const CHECKSUMS_3: u32 = 0x10;
/// Flags of a block in a descriptor: its first four bytes were the magic number; no UUID follows; it is the last.
const ESCAPED: u32 = 1;
const SAME_UUID: u32 = 2;
const LAST: u32 = 8;
/// The most blocks of a journal that are believed: mke2fs makes it of 262144 at most.
const MAX_BLOCKS: u32 = 1 << 20;

/// Where a block lies in the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Newer {
    /// A block of the disk.
    pub place: u64,
    /// Whether it began with the magic number, which was taken out.
    pub escaped: bool,
}

/// Goes through the journal with these extents. None when it is none.
pub fn read(filesystem: &mut Filesystem, extents: &[Extent]) -> Option<HashMap<u64, Newer>> {
    let place = |at: u32| {
        let at = u64::from(at);
        let extent = extents.iter().find(|extent| (extent.logical..extent.logical + extent.length).contains(&at))?;
        extent.physical.checked_add(at - extent.logical)
    };
    let superblock = filesystem.block(place(0)?)?;
    let (features, end, first) = (u32_at(&superblock, 0x28), u32_at(&superblock, 0x10), u32_at(&superblock, 0x14));
    let (mut sequence, start) = (u32_at(&superblock, 0x18), u32_at(&superblock, 0x1c));
    if u32_at(&superblock, 0) != MAGIC || !SUPERBLOCKS.contains(&u32_at(&superblock, 4)) || end > MAX_BLOCKS {
        return None;
    }
    let (mut newer, mut begun, mut revoked) = (HashMap::new(), Vec::new(), Vec::new());
    // Where nothing is to be replayed it begins nowhere.
    let mut log = (start != 0).then(|| ring(first, start, end)).into_iter().flatten();
    while let Some(at) = log.next() {
        let Some(block) = place(at).and_then(|place| filesystem.block(place)) else { break };
        if u32_at(&block, 0) != MAGIC || u32_at(&block, 8) != sequence {
            break;
        }
        match u32_at(&block, 4) {
            DESCRIPTOR => {
                for (number, flags) in tags(&block, features) {
                    let Some(place) = log.next().and_then(place) else { break };
                    begun.push((number, Newer { place, escaped: flags & ESCAPED != 0 }));
                }
            }
            REVOCATIONS if revoked.len() < MAX_BLOCKS as usize => revoked.extend(revocations(&block, features)),
            COMMIT => {
                // What was journaled before and is something else now; not what came after that.
                for number in revoked.drain(..) {
                    newer.remove(&number);
                }
                newer.extend(begun.drain(..));
                sequence = sequence.wrapping_add(1);
            }
            _ => break,
        }
    }
    Some(newer)
}

/// Once around: from `start` to the end, and from `first` on up to `start`.
fn ring(first: u32, start: u32, end: u32) -> impl Iterator<Item = u32> {
    (start..end).chain(first..start.min(end))
}

/// The blocks that a descriptor tells of: their numbers and flags.
fn tags(block: &[u8], features: u32) -> Vec<(u64, u32)> {
    let third = features & CHECKSUMS_3 != 0;
    let length = match (third, features & CHECKSUMS_2 != 0, features & WIDE != 0) {
        (true, ..) => 16,
        (_, second, wide) => 8 + usize::from(second) * 2 + usize::from(wide) * 4,
    };
    let (mut tags, mut rest) = (Vec::new(), block.get(12..).unwrap_or_default());
    while let Some((tag, behind)) = rest.split_at_checked(length) {
        let flags = if third { u32_at(tag, 4) } else { u32_at(tag, 4) & 0xffff };
        let high = if features & WIDE != 0 { u64::from(u32_at(tag, 8)) << 32 } else { 0 };
        tags.push((high | u64::from(u32_at(tag, 0)), flags));
        rest = behind.get(if flags & SAME_UUID == 0 { 16 } else { 0 }..).unwrap_or_default();
        if flags & LAST != 0 {
            break;
        }
    }
    tags
}

/// The numbers of the blocks that are revoked.
fn revocations(block: &[u8], features: u32) -> Vec<u64> {
    let used = block.get(16..u32_at(block, 12) as usize).unwrap_or_default();
    match features & WIDE != 0 {
        true => used.chunks_exact(8).map(|it| u64::from(u32_at(it, 0)) << 32 | u64::from(u32_at(it, 4))).collect(),
        false => used.chunks_exact(4).map(|it| u32_at(it, 0).into()).collect(),
    }
}

/// Fields are big endian; what lies beyond the end is zero.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |field| u32::from_be_bytes(*field))
}
