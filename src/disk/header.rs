//! The header of a qcow2 file, and which qcow2 files we take at all.
//!
//! Numbers of this module are those of QEMU's `docs/interop/qcow2.txt`. All fields are big endian.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::layout::REFCOUNT_ORDER;
use super::{Error, Format};
use crate::sys::files::At;

pub(super) const MAGIC: u32 = u32::from_be_bytes(*b"QFI\xfb");
/// The length of a version 3 header without optional fields.
pub(super) const LENGTH: usize = 104;
/// The header extension that names the backing file's format.
pub(super) const BACKING_FORMAT: u32 = 0xe279_2aca;
/// The longest name of a backing file.
pub(super) const MAX_BACKING_NAME: u32 = 1023;
/// The largest disk. Its tables still fit comfortably, and no arithmetic on offsets comes near its limits.
pub(super) const MAX_SIZE: u64 = 1 << 44;
/// The largest L1 table, in bytes; that of a disk of [`MAX_SIZE`] with clusters of 64 KiB is a quarter of it.
const MAX_L1: u64 = 1 << 20;
/// Bits of an incompatible feature that we do not take, by what they mean.
const INCOMPATIBLE: [(u64, &str); 5] = [
    (1 << 0, "it was not closed properly and its refcounts are stale (`qemu-img check -r all` repairs it)"),
    (1 << 1, "it is marked corrupt"),
    (1 << 2, "its data is in an external file"),
    (1 << 3, "it is compressed with another method than deflate"),
    (1 << 4, "it has extended L2 entries"),
];

/// How much of the first cluster is read at first, in bytes.
const FRONT: u64 = 512;

/// What a qcow2 file says of itself, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The disk's size as the guest sees it, in bytes.
    pub size: u64,
    /// The unit of allocation, in bytes.
    pub cluster_size: u64,
    /// The file that is read where this one has nothing: its path as written, and its format.
    pub backing: Option<(String, Format)>,
    /// Where the L1 table lies, and its number of entries.
    pub(super) l1: (u64, u64),
    /// Where the refcount table lies, and its number of clusters.
    pub(super) refcounts: (u64, u64),
}

impl Header {
    /// Reads and checks the header of the file at `path`.
    pub fn read(path: &Path) -> Result<Header, Error> {
        Header::of(&File::open(path).at("open", path)?, path)
    }

    /// Reads and checks the header of an open file; `path` is for messages.
    pub(super) fn of(file: &File, path: &Path) -> Result<Header, Error> {
        let mut bytes = vec![0; LENGTH];
        file.read_exact_at(&mut bytes, 0).map_err(|_| Error::refused(path, "it is too short for a qcow2 file"))?;
        let cluster_size = check_fields(&bytes).map_err(|why| Error::refused(path, why))?;

        // The header, its extensions and the backing file's name lie in the first cluster, and mostly right at its
        // beginning.
        let backing = match backing(&first(file, FRONT, path)?) {
            Err(_) if cluster_size > FRONT => backing(&first(file, cluster_size, path)?),
            other => other,
        };
        let backing = backing.map_err(|why| Error::refused(path, why))?;
        Ok(Header {
            size: u64_at(&bytes, 24),
            cluster_size,
            backing,
            l1: (u64_at(&bytes, 40), u64::from(u32_at(&bytes, 36))),
            refcounts: (u64_at(&bytes, 48), u64::from(u32_at(&bytes, 56))),
        })
    }
}

/// Checks every field of the fixed part that we rely on, and gives the cluster size.
fn check_fields(bytes: &[u8]) -> Result<u64, String> {
    if u32_at(bytes, 0) != MAGIC {
        return Err("it is not a qcow2 file".into());
    }
    if u32_at(bytes, 4) != 3 {
        return Err(format!("it is of qcow2 version {}, and only version 3 is taken", u32_at(bytes, 4)));
    }
    let cluster_bits = u32_at(bytes, 20);
    if !(9..=21).contains(&cluster_bits) {
        return Err(format!("its clusters have 2^{cluster_bits} bytes, out of the range 2^9 to 2^21"));
    }
    if u32_at(bytes, 32) != 0 {
        return Err("it is encrypted".into());
    }
    let incompatible = u64_at(bytes, 72);
    if let Some((_, what)) = INCOMPATIBLE.iter().find(|(bit, _)| incompatible & bit != 0) {
        return Err((*what).into());
    }
    if incompatible != 0 {
        return Err(format!("it uses unknown features ({incompatible:#x})"));
    }
    if u32_at(bytes, 96) != REFCOUNT_ORDER {
        return Err(format!("its refcounts have 2^{} bits, and only 16 bits are taken", u32_at(bytes, 96)));
    }
    let size = u64_at(bytes, 24);
    if size > MAX_SIZE || !size.is_multiple_of(512) {
        return Err(format!("its size is {size}, not a multiple of 512 up to {MAX_SIZE}"));
    }
    // One L2 table fills a cluster and holds 8 bytes for each cluster that it maps.
    let needed = size.div_ceil(1 << (2 * cluster_bits - 3));
    let l1_size = u64::from(u32_at(bytes, 36));
    if l1_size < needed || l1_size * 8 > MAX_L1 {
        return Err(format!("its L1 table has {l1_size} entries, and its size needs {needed}"));
    }
    if u32_at(bytes, 60) != 0 {
        return Err("it holds snapshots inside".into());
    }
    Ok(1 << cluster_bits)
}

/// The backing file's name and format, out of the first cluster.
fn backing(cluster: &[u8]) -> Result<Option<(String, Format)>, String> {
    let (offset, length) = (u64_at(cluster, 8), u32_at(cluster, 16));
    let mut format = None;
    let mut at = u32_at(cluster, 100) as usize;
    if at < LENGTH {
        return Err(format!("its header has a length of {at}, less than {LENGTH}"));
    }
    // Extensions: a type, a length, and data padded to 8 bytes, until a type of zero.
    loop {
        let Some(head) = cluster.get(at..).and_then(|rest| rest.get(..8)) else {
            return Err("its header extensions have no end".into());
        };
        let (kind, size) = (u32_at(head, 0), u32_at(head, 4) as usize);
        if kind == 0 {
            break;
        }
        let data = cluster.get(at + 8..).and_then(|rest| rest.get(..size));
        let data = data.ok_or("a header extension is longer than the header")?;
        if kind == BACKING_FORMAT {
            let name = String::from_utf8_lossy(data);
            format = Some(Format::from_name(&name).ok_or(format!("its backing file's format is `{name}`"))?);
        }
        at += 8 + size.next_multiple_of(8);
    }
    if offset == 0 {
        return Ok(None);
    }
    let name = usize::try_from(offset).ok().and_then(|offset| cluster.get(offset..)?.get(..length as usize));
    let name = name.filter(|_| (1..=MAX_BACKING_NAME).contains(&length)).ok_or("its backing file's name is cut off")?;
    let name = String::from_utf8(name.into()).map_err(|_| "its backing file's name is not UTF-8")?;
    Ok(Some((name, format.ok_or("it does not say its backing file's format")?)))
}

/// Puts another backing file's name, of the same format, into the first bytes of a file that Catnap made. The name
/// is the last that a header of ours has.
pub(super) fn rename_backing(header: &mut [u8], old: &str, new: &str) -> io::Result<()> {
    let start = u64_at(header, 8) as usize;
    let same = header.get(start..).and_then(|rest| rest.strip_prefix(old.as_bytes()));
    if u32_at(header, 16) as usize != old.len() || !same.is_some_and(|rest| rest.iter().all(|byte| *byte == 0)) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("its backing file is not {old}")));
    }
    header[start..].fill(0);
    let place = header.get_mut(start..start + new.len()).ok_or(io::ErrorKind::InvalidInput)?;
    place.copy_from_slice(new.as_bytes());
    header[16..20].copy_from_slice(&(new.len() as u32).to_be_bytes());
    Ok(())
}

/// The first bytes of a file: so many, if it has them.
fn first(file: &File, length: u64, path: &Path) -> Result<Vec<u8>, Error> {
    let (mut bytes, mut there) = (vec![0; length as usize], 0);
    while there < bytes.len() {
        match file.read_at(&mut bytes[there..], there as u64).at("read", path)? {
            0 => break,
            n => there += n,
        }
    }
    bytes.truncate(there);
    Ok(bytes)
}

// Both are only used at places within the `LENGTH` bytes that were read, or on slices of known length.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|field| field.try_into().ok()).map_or(0, u32::from_be_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) << 32 | u64::from(u32_at(bytes, at + 4))
}
