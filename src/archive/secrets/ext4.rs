//! As much of ext4 as it takes to tell which file lies where on a disk (Documentation/filesystems/ext4 of Linux).
//!
//! The filesystem may be anybody's, and damaged: every number is held against what was read, and only so many blocks are
//! read. Checksums are not looked at, for a mistake costs no more than a name. A guest that runs, or was cut off, has the
//! latest state of many blocks only in the journal, so that is read first.

use std::collections::HashMap;

use super::journal;
use crate::disk::Reader;
use crate::sys::process;

/// The most blocks that are read, in all. A system of many packages has some tens of thousands for inodes and folders.
const MAX_BLOCKS: u64 = 1 << 20;
/// The most extents of a folder or the journal.
const MAX_EXTENTS: usize = 4096;
/// Where the superblock is, and its magic number.
const SUPERBLOCK: u64 = 1024;
const MAGIC: u16 = 0xef53;
/// `s_feature_incompat`: descriptors have 64 bytes or more.
const WIDE: u32 = 0x80;
/// The incompatible features that change nothing for us, or are known here: file types in folders, a journal to be
/// replayed, extents, 64 bits, multiple mount protection, flexible groups, large attributes, the checksum's seed,
/// large folders, content in inodes, folders without case.
const KNOWN: u32 = 0x2 | 0x4 | 0x40 | WIDE | 0x100 | 0x200 | 0x400 | 0x2000 | 0x4000 | 0x8000 | 0x2_0000;
/// The length of a descriptor without `WIDE`, and the least with it.
const DESCRIPTOR: u64 = 32;
const WIDE_DESCRIPTOR: u64 = 64;
/// What is read of an inode; the rest has times and attributes.
const INODE: usize = 128;
/// `i_mode`: what it is.
const KIND: u16 = 0xf000;
const FOLDER: u16 = 0x4000;
const PLAIN_FILE: u16 = 0x8000;
/// `file_type` of a folder's entry for a folder.
const FOLDER_ENTRY: u8 = 2;
/// `i_flags`: its blocks are told by extents.
const EXTENTS: u32 = 0x8_0000;
/// The head of a node of extents, its magic number, and how deep a tree of them can be.
const HEAD: usize = 12;
const NODE_MAGIC: u16 = 0xf30a;
const MAX_DEPTH: u16 = 5;
/// A longer extent has room that was set aside and never written: so much less than this.
const WRITTEN: u64 = 32768;

/// A filesystem.
pub struct Filesystem {
    disk: Reader,
    block_size: u64,
    first_data_block: u64,
    inodes: u32,
    inodes_per_group: u32,
    inode_size: u64,
    descriptor_size: u64,
    /// The blocks that are newer in the journal, and where they lie there.
    newer: HashMap<u64, journal::Newer>,
    /// How many blocks may still be read.
    left: u64,
}

/// A part of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where it begins in the file, in blocks.
    pub logical: u64,
    /// Where it begins on the disk, in blocks.
    pub physical: u64,
    /// How many blocks it has.
    pub length: u64,
    /// Whether what is there is the file's, and not whatever was there before.
    pub written: bool,
}

/// A plain file or a folder with extents.
pub struct Inode {
    /// Whether it is a folder.
    pub is_folder: bool,
    /// In bytes.
    pub size: u64,
    /// The root of its tree of extents.
    root: [u8; 60],
}

/// An entry of a folder.
pub struct Entry<'a> {
    /// Its inode's number.
    pub inode: u32,
    /// Whether it says that this is a folder's.
    pub is_folder: bool,
    /// Its name.
    pub name: &'a [u8],
}

impl Filesystem {
    /// The filesystem that the whole disk is, if it is one that is known here.
    pub fn open(disk: Reader) -> Option<Filesystem> {
        let mut superblock = [0; 1024];
        disk.read(SUPERBLOCK, &mut superblock).ok()?;
        let features = u32_at(&superblock, 0x60);
        let block_size = 1024u64 << u32_at(&superblock, 0x18).min(6);
        let wide = u64::from(u16_at(&superblock, 0xfe));
        let filesystem = Filesystem {
            disk,
            block_size,
            first_data_block: u32_at(&superblock, 0x14).into(),
            inodes: u32_at(&superblock, 0),
            inodes_per_group: u32_at(&superblock, 0x28),
            inode_size: u16_at(&superblock, 0x58).into(),
            descriptor_size: if features & WIDE == 0 { DESCRIPTOR } else { wide },
            newer: HashMap::new(),
            left: MAX_BLOCKS,
        };
        let Filesystem { inodes_per_group, inode_size, descriptor_size, .. } = filesystem;
        let fits = |size: u64, least: u64| size >= least && size <= block_size && size.is_power_of_two();
        let sound = u16_at(&superblock, 0x38) == MAGIC
            && features & !KNOWN == 0
            && u32_at(&superblock, 0x18) <= 6
            && inodes_per_group > 0
            && fits(inode_size, INODE as u64)
            && fits(descriptor_size, if features & WIDE == 0 { DESCRIPTOR } else { WIDE_DESCRIPTOR });
        let journal = u32_at(&superblock, 0xe0);
        sound.then(|| filesystem.with_journal(journal))
    }

    fn with_journal(mut self, inode: u32) -> Filesystem {
        let extents = self.inode(inode).map(|inode| self.first_extents(&inode)).unwrap_or_default();
        self.newer = journal::read(&mut self, &extents).unwrap_or_default();
        self
    }

    /// In bytes.
    pub fn block_size(&self) -> u64 {
        self.block_size
    }

    /// A block as it would be after the journal was replayed. None beyond the disk, or when it is enough.
    pub fn block(&mut self, number: u64) -> Option<Vec<u8>> {
        let newer = self.newer.get(&number).copied();
        let place = newer.map_or(number, |newer| newer.place);
        let at = place.checked_mul(self.block_size)?;
        self.left = self.left.checked_sub(1)?;
        let inside = at.checked_add(self.block_size).is_some_and(|end| end <= self.disk.size());
        if !inside || process::interrupted() {
            return None;
        }
        let mut block = vec![0; self.block_size as usize];
        self.disk.read(at, &mut block).ok()?;
        if newer.is_some_and(|newer| newer.escaped) {
            block[..4].copy_from_slice(&journal::MAGIC.to_be_bytes());
        }
        Some(block)
    }

    /// Gives every plain file with extents that has a name somewhere, with its number.
    pub fn each_file(&mut self, each: &mut dyn FnMut(&mut Filesystem, u32, &Inode)) {
        for group in 0..self.inodes.div_ceil(self.inodes_per_group) {
            let Some((table, used)) = self.group(group) else { return };
            let per_block = self.block_size / self.inode_size;
            for number in 0..u64::from(used).div_ceil(per_block) {
                let Some(block) = table.checked_add(number).and_then(|block| self.block(block)) else { return };
                for (index, bytes) in block.chunks_exact(self.inode_size as usize).enumerate() {
                    let within = number * per_block + index as u64;
                    let inode = Inode::parse(bytes).filter(|inode| !inode.is_folder && within < used.into());
                    let number = u64::from(group) * u64::from(self.inodes_per_group) + within + 1;
                    if let (Some(inode), Ok(number)) = (inode, u32::try_from(number)) {
                        each(self, number, &inode);
                    }
                }
            }
        }
    }

    /// The inode of that number, if it is a plain file's or a folder's.
    pub fn inode(&mut self, number: u32) -> Option<Inode> {
        let index = number.checked_sub(1).filter(|index| *index < self.inodes)?;
        let (table, _) = self.group(index / self.inodes_per_group)?;
        let at = u64::from(index % self.inodes_per_group) * self.inode_size;
        let block = self.block(table.checked_add(at / self.block_size)?)?;
        Inode::parse(&block[(at % self.block_size) as usize..])
    }

    /// Where a group's table of inodes begins, in blocks, and how many of these are used.
    fn group(&mut self, group: u32) -> Option<(u64, u32)> {
        let at = u64::from(group) * self.descriptor_size;
        let block = self.block(self.first_data_block + 1 + at / self.block_size)?;
        let descriptor = &block[(at % self.block_size) as usize..][..self.descriptor_size as usize];
        // The upper halves are only there in wide ones.
        let table = u64::from(u32_at(descriptor, 0x28)) << 32 | u64::from(u32_at(descriptor, 0x8));
        let unused = u32::from(u16_at(descriptor, 0x32)) << 16 | u32::from(u16_at(descriptor, 0x1c));
        Some((table, self.inodes_per_group.saturating_sub(unused)))
    }

    /// Gives all extents of a file, as far as they can be read.
    pub fn extents(&mut self, inode: &Inode, each: &mut dyn FnMut(Extent)) {
        let depth = u16_at(&inode.root, 6).min(MAX_DEPTH);
        self.node(&inode.root, depth, each);
    }

    /// The first of them, as many as a folder or a journal can be believed to have.
    fn first_extents(&mut self, inode: &Inode) -> Vec<Extent> {
        let mut extents = Vec::new();
        self.extents(inode, &mut |extent| {
            if extents.len() < MAX_EXTENTS {
                extents.push(extent);
            }
        });
        extents
    }

    /// A node that lies so high over the leaves.
    fn node(&mut self, node: &[u8], depth: u16, each: &mut dyn FnMut(Extent)) {
        if u16_at(node, 0) != NODE_MAGIC || u16_at(node, 6) != depth {
            return;
        }
        for entry in node[HEAD..].chunks_exact(12).take(u16_at(node, 2).into()) {
            if depth == 0 {
                let length = u64::from(u16_at(entry, 4));
                let physical = u64::from(u16_at(entry, 6)) << 32 | u64::from(u32_at(entry, 8));
                let written = length <= WRITTEN;
                let length = if written { length } else { length - WRITTEN };
                each(Extent { logical: u32_at(entry, 0).into(), physical, length, written });
            } else {
                let below = u64::from(u16_at(entry, 8)) << 32 | u64::from(u32_at(entry, 4));
                match self.block(below) {
                    Some(below) => self.node(&below, depth - 1, each),
                    None => return,
                }
            }
        }
    }

    /// Gives the entries of a folder, as far as they can be read. (An index of it looks like a block without entries.)
    pub fn entries(&mut self, folder: &Inode, each: &mut dyn FnMut(Entry<'_>)) {
        for extent in self.first_extents(folder) {
            for number in 0..extent.length {
                let Some(block) = self.block(extent.physical + number) else { return };
                let mut rest = &block[..];
                while rest.len() >= 8 {
                    let (length, name) = (usize::from(u16_at(rest, 4)), usize::from(rest[6]));
                    let Some((entry, behind)) = rest.split_at_checked(length.max(8)) else { break };
                    if let (inode @ 1.., Some(name)) = (u32_at(entry, 0), entry.get(8..8 + name)) {
                        each(Entry { inode, is_folder: entry[7] == FOLDER_ENTRY, name });
                    }
                    rest = behind;
                }
            }
        }
    }
}

impl Inode {
    fn parse(bytes: &[u8]) -> Option<Inode> {
        let (kind, links) = (u16_at(bytes, 0) & KIND, u16_at(bytes, 0x1a));
        let known = [FOLDER, PLAIN_FILE].contains(&kind) && links > 0 && u32_at(bytes, 0x20) & EXTENTS != 0;
        let size = u64::from(u32_at(bytes, 0x6c)) << 32 | u64::from(u32_at(bytes, 4));
        let root = *bytes.get(0x28..)?.first_chunk()?;
        known.then_some(Inode { is_folder: kind == FOLDER, size, root })
    }
}

/// Fields are little endian; what lies beyond the end is zero.
fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |field| u16::from_le_bytes(*field))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |field| u32::from_le_bytes(*field))
}
