//! New qcow2 files, with all of their tables in front.
//!
//! ```text
//! header | refcount table | refcount blocks | L1 table | L2 tables | data clusters …
//! ```
//!
//! A qcow2 file that grows its tables as it goes is only whole when the table's own refcount reaches the
//! disk before the pointer to it does. Here nothing ever has to grow: every table that the disk can need is
//! there from the start, as a hole in the file that costs no space. What is left to be written while a
//! machine runs are entries in tables that exist, and [`super::fence`] can tell them from data by where
//! they lie.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use super::header::{self, BACKING_FORMAT, Header, MAGIC, MAX_BACKING_NAME, MAX_SIZE};
use super::{Error, Format};
use crate::sys::files::At;

/// The unit of allocation: QEMU's default, a good compromise between copying and the size of tables.
pub const CLUSTER: u64 = 64 << 10;
const CLUSTER_BITS: u32 = CLUSTER.trailing_zeros();
/// Bytes that one L2 table maps: a cluster of entries of 8 bytes.
const PER_L2: u64 = CLUSTER / 8 * CLUSTER;
/// Clusters that one refcount block counts: a cluster of entries of 2 bytes.
const PER_BLOCK: u64 = CLUSTER / 2;
/// Refcounts have 2^4 bits.
pub(super) const REFCOUNT_ORDER: u32 = 4;
/// Of an L1 or L2 entry: the cluster is used once, so it may be written in place.
const COPIED: u64 = 1 << 63;
/// Of an L2 entry: the cluster reads as zeros.
pub(super) const ZEROS: u64 = 1;

/// Makes a disk of `size` bytes that reads as the file `backing`, a path relative to the new file, until it
/// is written to. Fails when `path` exists. Nothing is synced.
pub fn create_overlay(path: &Path, backing: &str, format: Format, size: u64) -> Result<(), Error> {
    Writer::create(path, size, Some((backing, format)))?.finish(path)
}

/// Copies what is not zero of the raw file at `raw` into a new qcow2 file at `path`. The same content gives
/// the same file, byte by byte. Nothing is synced.
pub fn create_from_raw(raw: &Path, path: &Path) -> Result<(), Error> {
    let source = File::open(raw).at("open", raw)?;
    let size = source.metadata().at("open", raw)?.len();
    let mut writer = Writer::create(path, size, None)?;
    let mut cluster = vec![0; CLUSTER as usize];
    let mut at = 0;
    while let Some(data) = next_data(&source, at, size).at("read", raw)? {
        at = data / CLUSTER * CLUSTER;
        let length = CLUSTER.min(size - at) as usize;
        source.read_exact_at(&mut cluster[..length], at).at("read", raw)?;
        cluster[length..].fill(0);
        if cluster.iter().any(|byte| *byte != 0) {
            writer.append(at, &cluster).at("write", path)?;
        }
        at += CLUSTER;
    }
    writer.finish(path)
}

/// Where the next bytes that are no hole begin, at `from` or later.
fn next_data(file: &File, from: u64, size: u64) -> io::Result<Option<u64>> {
    if from >= size {
        return Ok(None);
    }
    // SAFETY: lseek takes plain numbers; the descriptor is open while `file` is borrowed. `from` is below the
    // file's size, so it fits an off_t.
    match unsafe { libc::lseek(file.as_raw_fd(), from as libc::off_t, libc::SEEK_DATA) } {
        -1 => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            error => Err(error),
        },
        data => Ok(Some(data as u64).filter(|data| *data < size)),
    }
}

/// Where the L2 tables of an open file lie, if all of its tables lie as this module puts them. A file whose
/// refcount or L1 table says anything else is not written to, whether another program made it or it is damaged.
pub(super) fn l2_tables(file: &File, header: &Header) -> io::Result<Option<std::ops::Range<u64>>> {
    let layout = Layout::for_size(header.size);
    let expected = (CLUSTER, layout.l1_parts(), layout.refcount_parts());
    if (header.cluster_size, header.l1, header.refcounts) != expected {
        return Ok(None);
    }
    let mut there = vec![0; (layout.refcount_table * CLUSTER) as usize];
    file.read_exact_at(&mut there, layout.refcount_table_at())?;
    let mut refcount_table = layout.refcount_table();
    refcount_table.resize(there.len(), 0);
    let mut l1 = vec![0; layout.l2 as usize * 8];
    file.read_exact_at(&mut l1, layout.l1_at())?;
    let ours = there == refcount_table && l1 == layout.l1_table();
    Ok(ours.then(|| layout.l2_at()..layout.data_at()))
}

/// How many clusters each part of a file takes.
struct Layout {
    refcount_table: u64,
    refcount_blocks: u64,
    l1: u64,
    l2: u64,
}

impl Layout {
    fn for_size(size: u64) -> Layout {
        let l2 = size.div_ceil(PER_L2);
        let l1 = (l2 * 8).div_ceil(CLUSTER);
        // Blocks must count themselves. One more than are needed for that leaves room for the clusters that
        // a killed machine had taken and not yet used.
        let others = 1 + l1 + l2 + size.div_ceil(CLUSTER);
        let refcount_blocks = others.div_ceil(PER_BLOCK - 1) + 1;
        let refcount_table = (refcount_blocks * 8).div_ceil(CLUSTER);
        Layout { refcount_table, refcount_blocks, l1, l2 }
    }

    // Offsets, in the order in which the parts lie.
    fn refcount_table_at(&self) -> u64 {
        CLUSTER
    }
    fn refcount_blocks_at(&self) -> u64 {
        self.refcount_table_at() + self.refcount_table * CLUSTER
    }
    fn l1_at(&self) -> u64 {
        self.refcount_blocks_at() + self.refcount_blocks * CLUSTER
    }
    fn l2_at(&self) -> u64 {
        self.l1_at() + self.l1 * CLUSTER
    }
    fn data_at(&self) -> u64 {
        self.l2_at() + self.l2 * CLUSTER
    }

    // What the header says of them: where they lie, and their number of entries or clusters.
    fn l1_parts(&self) -> (u64, u64) {
        (self.l1_at(), self.l2)
    }
    fn refcount_parts(&self) -> (u64, u64) {
        (self.refcount_table_at(), self.refcount_table)
    }

    // What is in them, from the start to the end.
    fn refcount_table(&self) -> Vec<u8> {
        entries((0..self.refcount_blocks).map(|i| self.refcount_blocks_at() + i * CLUSTER))
    }
    fn l1_table(&self) -> Vec<u8> {
        entries((0..self.l2).map(|i| COPIED | (self.l2_at() + i * CLUSTER)))
    }
}

/// Fills a new file from front to back.
pub(super) struct Writer {
    file: File,
    layout: Layout,
    /// Where the next data cluster goes.
    end: u64,
}

impl Writer {
    pub(super) fn create(path: &Path, size: u64, backing: Option<(&str, Format)>) -> Result<Writer, Error> {
        if size == 0 || size > MAX_SIZE || !size.is_multiple_of(512) {
            return Err(Error::refused(path, format!("a size of {size} is not a multiple of 512 up to {MAX_SIZE}")));
        }
        if backing.is_some_and(|(name, _)| !(1..=MAX_BACKING_NAME as usize).contains(&name.len())) {
            return Err(Error::refused(path, "its backing file's name is empty or too long"));
        }
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
        let file = file.at("make", path)?;
        let layout = Layout::for_size(size);
        let end = layout.data_at();
        let writer = Writer { file, layout, end };
        writer.write_front(size, backing).at("write", path)?;
        Ok(writer)
    }

    fn write_front(&self, size: u64, backing: Option<(&str, Format)>) -> io::Result<()> {
        self.file.set_len(self.end)?;
        self.file.write_all_at(&self.header(size, backing), 0)?;
        self.file.write_all_at(&self.layout.refcount_table(), self.layout.refcount_table_at())?;
        self.file.write_all_at(&self.layout.l1_table(), self.layout.l1_at())
    }

    fn header(&self, size: u64, backing: Option<(&str, Format)>) -> Vec<u8> {
        let mut extensions = Vec::new();
        if let Some((_, format)) = backing {
            let name = format.name().as_bytes();
            extensions.extend(BACKING_FORMAT.to_be_bytes());
            extensions.extend((name.len() as u32).to_be_bytes());
            extensions.extend(name);
            extensions.resize(extensions.len().next_multiple_of(8), 0);
        }
        extensions.extend([0; 8]);
        let name = backing.map_or("", |(name, _)| name);
        let name_at = if name.is_empty() { 0 } else { header::LENGTH + extensions.len() };

        let mut bytes = Vec::with_capacity(CLUSTER as usize);
        let u32 = |bytes: &mut Vec<u8>, field: u32| bytes.extend(field.to_be_bytes());
        let u64 = |bytes: &mut Vec<u8>, field: u64| bytes.extend(field.to_be_bytes());
        u32(&mut bytes, MAGIC);
        u32(&mut bytes, 3); // version
        u64(&mut bytes, name_at as u64);
        u32(&mut bytes, name.len() as u32);
        u32(&mut bytes, CLUSTER_BITS);
        u64(&mut bytes, size);
        u32(&mut bytes, 0); // not encrypted
        u32(&mut bytes, self.layout.l2 as u32); // entries of the L1 table
        u64(&mut bytes, self.layout.l1_at());
        u64(&mut bytes, self.layout.refcount_table_at());
        u32(&mut bytes, self.layout.refcount_table as u32);
        u32(&mut bytes, 0); // no snapshots inside
        u64(&mut bytes, 0);
        u64(&mut bytes, 0); // features: incompatible,
        u64(&mut bytes, 0); // compatible,
        u64(&mut bytes, 0); // autoclear
        u32(&mut bytes, REFCOUNT_ORDER);
        u32(&mut bytes, header::LENGTH as u32);
        bytes.extend(extensions);
        bytes.extend(name.as_bytes());
        bytes
    }

    /// Adds the cluster of data that the guest sees at `guest_offset`.
    pub(super) fn append(&mut self, guest_offset: u64, cluster: &[u8]) -> io::Result<()> {
        self.file.write_all_at(cluster, self.end)?;
        self.enter(guest_offset, COPIED | self.end)?;
        self.end += CLUSTER;
        Ok(())
    }

    /// Lets the cluster at `guest_offset` read as zeros, whatever the backing file has there.
    pub(super) fn append_zeros(&mut self, guest_offset: u64) -> io::Result<()> {
        self.enter(guest_offset, ZEROS)
    }

    fn enter(&self, guest_offset: u64, entry: u64) -> io::Result<()> {
        // The L2 tables lie one after the other, so together they are one long array.
        self.file.write_all_at(&entry.to_be_bytes(), self.layout.l2_at() + guest_offset / CLUSTER * 8)
    }

    /// Counts the clusters. Whoever lets the file appear syncs it.
    pub(super) fn finish(self, path: &Path) -> Result<(), Error> {
        // The refcount blocks, too, are one long array, and every cluster up to the end is used once.
        let counts = [0, 1].repeat((self.end / CLUSTER) as usize);
        Ok(self.file.write_all_at(&counts, self.layout.refcount_blocks_at()).at("write", path)?)
    }
}

fn entries(values: impl Iterator<Item = u64>) -> Vec<u8> {
    values.flat_map(u64::to_be_bytes).collect()
}
