//! Opening a file and everything below it.
//!
//! A qcow2 file names the file that it is backed by, and a file from a stranger may name anything. So names
//! must be relative paths that end, with all links followed, at a plain file inside the store; below the top
//! everything is opened read-only; and the chain is neither a loop nor longer than [`MAX_LAYERS`].

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use imago::FormatAccess;
use imago::qcow2::Qcow2;
use imago::raw::Raw;

use super::fenced::Fenced;
use super::freed::Freed;
use super::header::Header;
use super::image::Image;
use super::{Disk, Error, Format, layout};
use crate::sys::files::At;
use crate::sys::lock;

/// The longest chain. Every layer costs a descriptor and some memory for tables.
const MAX_LAYERS: usize = 64;
const TOO_MANY: &str = "more than 64 files back each other";

/// What a disk is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// To read it, beside others who do.
    ReadOnly,
    /// To read and write it, alone. A qcow2 file must be one that Catnap made.
    ReadWrite,
}

/// Opens the disk at `path` and the chain below it, which must stay inside the folder `root`. The top file is
/// locked until the disk is dropped.
pub fn open(path: &Path, format: Format, access: Access, root: &Path) -> Result<Box<dyn Disk>, Error> {
    let root = fs::canonicalize(root).at("find", root)?;
    let path = fs::canonicalize(path).at("find", path)?;
    let writable = access == Access::ReadWrite;
    let file = plain_file(&path, writable)?;
    if !lock::try_lock_open(&file, writable).at("lock", &path)? {
        return Err(Error::InUse(path));
    }
    let mut layers = Layers { root, seen: Vec::new(), depth: Depth::All };
    let (top, freed) = layers.open(&path, file, format, writable)?;
    Ok(Box::new(Image::new(top, freed)))
}

/// The files of the chain that begins at `path`, the top one first, as their headers name them. The same rules
/// hold as for [`open`], which reads them.
pub fn layers(path: &Path, format: Format, root: &Path) -> Result<Vec<(PathBuf, Format)>, Error> {
    let layers = Layers { root: fs::canonicalize(root).at("find", root)?, seen: Vec::new(), depth: Depth::All };
    let mut found: Vec<(PathBuf, Format)> = Vec::new();
    let mut next = Some((fs::canonicalize(path).at("find", path)?, format));
    while let Some((path, format)) = next {
        if found.iter().any(|(seen, _)| *seen == path) {
            return Err(Error::refused(&path, "it is backed by itself"));
        }
        if found.len() == MAX_LAYERS {
            return Err(Error::refused(&path, TOO_MANY));
        }
        let backing = match format {
            Format::Raw => None,
            Format::Qcow2 => Header::of(&plain_file(&path, false)?, &path)?.backing,
        };
        let below = backing.map(|(name, format)| Ok::<_, Error>((layers.resolve(&path, &name)?, format)));
        found.push((path, format));
        next = below.transpose()?;
    }
    Ok(found)
}

/// Opens a file of the store to read it, without a lock: nobody writes to what is in a snapshot, and whoever
/// wrote to it before it was sealed may still hold it.
pub(super) fn open_sealed(
    path: &Path,
    format: Format,
    depth: Depth,
    root: &Path,
) -> Result<FormatAccess<Fenced>, Error> {
    let root = fs::canonicalize(root).at("find", root)?;
    let mut layers = Layers { root, seen: Vec::new(), depth };
    Ok(layers.open(path, plain_file(path, false)?, format, false)?.0)
}

/// How much of a chain is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Depth {
    /// All of it.
    All,
    /// The top file alone: what lies below reads as zeros.
    Top,
}

/// An opened layer with everything below it, and the clusters of its file that wait to be given back.
type Layer = (FormatAccess<Fenced>, Arc<Freed>);

/// A chain while it is being opened.
struct Layers {
    root: PathBuf,
    /// The files that it has so far, as device and inode.
    seen: Vec<(u64, u64)>,
    depth: Depth,
}

impl Layers {
    fn open(&mut self, path: &Path, file: File, format: Format, writable: bool) -> Result<Layer, Error> {
        let metadata = file.metadata().at("open", path)?;
        let identity = (metadata.dev(), metadata.ino());
        if self.seen.contains(&identity) {
            return Err(Error::refused(path, "it is backed by itself"));
        }
        if self.seen.len() == MAX_LAYERS {
            return Err(Error::refused(path, TOO_MANY));
        }
        self.seen.push(identity);
        match format {
            Format::Raw => {
                let storage = Fenced::new(file, 0..0).at("open", path)?;
                let freed = storage.freed();
                Ok((FormatAccess::new(Raw::open_image(storage, writable).at("open", path)?), freed))
            }
            Format::Qcow2 => self.open_qcow2(path, file, writable),
        }
    }

    fn open_qcow2(&mut self, path: &Path, file: File, writable: bool) -> Result<Layer, Error> {
        let header = Header::of(&file, path)?;
        let tables = match writable {
            false => 0..0,
            true => layout::l2_tables(&file, &header)
                .at("read", path)?
                .ok_or_else(|| Error::refused(path, "it was not made by Catnap; put an overlay over it to write"))?,
        };
        let storage = Fenced::new(file, tables).at("open", path)?;
        let freed = storage.freed();
        let mut qcow2 =
            Qcow2::<Fenced>::open_image(storage, writable).map_err(|error| Error::refused(path, error.to_string()))?;
        // Nothing is opened because a file says so: what it may name was checked, and is opened here.
        qcow2.set_data_file(None);
        let backing = match header.backing.filter(|_| self.depth == Depth::All) {
            None => None,
            Some((name, format)) => {
                let below = self.resolve(path, &name)?;
                let file = plain_file(&below, false)?;
                Some(self.open(&below, file, format, false)?.0)
            }
        };
        qcow2.set_backing(backing);
        Ok((FormatAccess::new(qcow2), freed))
    }

    /// Where the backing file `name` of the file at `path` is, if it may be used.
    fn resolve(&self, path: &Path, name: &str) -> Result<PathBuf, Error> {
        let refuse = |why: &str| Error::refused(path, format!("its backing file `{}` {why}", name.escape_default()));
        // QEMU takes a colon before the first slash for a protocol (`nbd:…`, `json:…`).
        if name.split('/').next().is_some_and(|first| first.contains(':')) {
            return Err(refuse("is not a file"));
        }
        if Path::new(name).components().any(|part| matches!(part, Component::RootDir)) {
            return Err(refuse("is an absolute path"));
        }
        let below = path.parent().unwrap_or(Path::new("/")).join(name);
        let below = fs::canonicalize(&below).map_err(|error| refuse(&format!("cannot be found: {error}")))?;
        if below.starts_with(&self.root) { Ok(below) } else { Err(refuse("lies outside of the store")) }
    }
}

/// Opens a plain file: nothing that could block or has no size, such as a pipe or a terminal.
fn plain_file(path: &Path, writable: bool) -> Result<File, Error> {
    if !fs::metadata(path).at("find", path)?.is_file() {
        return Err(Error::refused(path, "it is not a plain file"));
    }
    Ok(OpenOptions::new().read(true).write(writable).open(path).at("open", path)?)
}
