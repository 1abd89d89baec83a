//! Opening a file and everything below it.
//!
//! A qcow2 file names the file that it is backed by, and a file from a stranger may name anything. So names
//! must be relative paths that end, with all links followed, at a plain file inside the store; below the top
//! everything is opened read-only; and the chain is neither a loop nor longer than [`MAX_LAYERS`].

use std::fs::{self, File, OpenOptions};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use imago::FormatAccess;
use imago::qcow2::Qcow2;
use imago::raw::Raw;

use super::fence::{Fence, Identity};
use super::fenced::Fenced;
use super::header::Header;
use super::image::Image;
use super::{Disk, Error, Format, layout};
use crate::sys::files::At;
use crate::sys::lock;

/// The longest chain, in files. Every layer costs two descriptors and some memory for tables.
pub const MAX_LAYERS: usize = 64;

/// An opened qcow2 file. What it is backed by is shared: a layer that a machine wrote to until just now has to be
/// flushed once more while the new top reads through it already.
pub(super) type Overlay = Qcow2<Fenced, Arc<FormatAccess<Fenced>>>;

/// An opened file with all below it.
pub(super) struct Layer {
    /// Where it was found.
    pub path: PathBuf,
    /// What is read and written.
    pub access: Arc<FormatAccess<Fenced>>,
    /// The fences of this one file.
    pub fence: Arc<Fence>,
}

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
    let path = fs::canonicalize(path).at("find", path)?;
    let writable = access == Access::ReadWrite;
    let file = locked(&path, writable)?;
    Ok(Box::new(Image::new(Layers::below(root)?.open(&path, file, format, writable)?)))
}

/// Opens the qcow2 file at `path` read-only, as a layer for others to be backed by, with the chain below it.
pub(super) fn open_layer(path: &Path, root: &Path) -> Result<Layer, Error> {
    let path = fs::canonicalize(path).at("find", path)?;
    Layers::below(root)?.open(&path, plain_file(&path, false)?, Format::Qcow2, false)
}

/// Opens and locks the qcow2 file at `path`, to write to it, and nothing of what it is backed by.
pub(super) fn open_alone(path: &Path) -> Result<(Overlay, Arc<Fence>), Error> {
    let file = locked(path, true)?;
    let header = Header::of(&file, path)?;
    overlay(path, file, &header, true)
}

/// The files of the chain that begins at `path`, the top one first, as their headers name them. The same rules
/// hold as for [`open`], which reads them.
pub fn chain_files(path: &Path, format: Format, root: &Path) -> Result<Vec<(PathBuf, Format)>, Error> {
    let layers = Layers::below(root)?;
    let mut found: Vec<(PathBuf, Format)> = Vec::new();
    let mut next = Some((fs::canonicalize(path).at("find", path)?, format));
    while let Some((path, format)) = next {
        if found.iter().any(|(seen, _)| *seen == path) {
            return Err(Error::refused(&path, "it is backed by itself"));
        }
        if found.len() == MAX_LAYERS {
            return Err(Error::TooManyLayers(path));
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

/// Opens a file of the store to read it, with all below it. Without a lock: nobody writes to what is in a snapshot.
pub(super) fn open_sealed(path: &Path, format: Format, root: &Path) -> Result<Arc<FormatAccess<Fenced>>, Error> {
    let path = fs::canonicalize(path).at("find", path)?;
    Ok(Layers::below(root)?.open(&path, plain_file(&path, false)?, format, false)?.access)
}

/// The same without what is below, which reads as zeros.
pub(super) fn open_sealed_alone(path: &Path, format: Format) -> Result<FormatAccess<Fenced>, Error> {
    let file = plain_file(path, false)?;
    match format {
        Format::Raw => {
            let storage = Fenced::new(file, 0..0).at("open", path)?;
            Ok(FormatAccess::new(Raw::open_image(storage, false).at("open", path)?))
        }
        Format::Qcow2 => {
            let header = Header::of(&file, path)?;
            Ok(FormatAccess::new(overlay(path, file, &header, false)?.0))
        }
    }
}

/// How many files the chain of the qcow2 file at `path` has; `TooManyLayers` when they are too many.
pub fn depth(path: &Path, root: &Path) -> Result<usize, Error> {
    let layers = Layers::below(root)?;
    let mut at = fs::canonicalize(path).at("find", path)?;
    for depth in 1..=MAX_LAYERS {
        at = match Header::of(&plain_file(&at, false)?, &at)?.backing {
            None => return Ok(depth),
            Some((_, Format::Raw)) if depth < MAX_LAYERS => return Ok(depth + 1),
            Some((name, _)) => layers.resolve(&at, &name)?,
        };
    }
    Err(Error::TooManyLayers(path.into()))
}

/// Opens a plain file and locks it until it is closed.
pub(super) fn locked(path: &Path, writable: bool) -> Result<File, Error> {
    let file = plain_file(path, writable)?;
    if !lock::try_lock_open(&file, writable).at("lock", path)? {
        return Err(Error::InUse(path.into()));
    }
    Ok(file)
}

/// Hands an open file to imago, which is to open nothing of its own accord.
fn overlay(path: &Path, file: File, header: &Header, writable: bool) -> Result<(Overlay, Arc<Fence>), Error> {
    let tables = match writable {
        false => 0..0,
        true => layout::l2_tables(&file, header)
            .at("read", path)?
            .ok_or_else(|| Error::refused(path, "it was not made by Catnap; put an overlay over it to write"))?,
    };
    let storage = Fenced::new(file, tables).at("open", path)?;
    let fence = storage.fence();
    let mut qcow2 = Overlay::open_image(storage, writable).map_err(|error| Error::refused(path, error.to_string()))?;
    // Nothing is opened because a file says so: what it may name is checked, and opened here.
    qcow2.set_data_file(None);
    qcow2.set_backing(None);
    Ok((qcow2, fence))
}

/// A chain while it is being opened.
struct Layers {
    root: PathBuf,
    /// The files that it has so far.
    seen: Vec<Identity>,
}

impl Layers {
    fn below(root: &Path) -> Result<Layers, Error> {
        Ok(Layers { root: fs::canonicalize(root).at("find", root)?, seen: Vec::new() })
    }

    fn open(&mut self, path: &Path, file: File, format: Format, writable: bool) -> Result<Layer, Error> {
        let identity = Identity::of(&file.metadata().at("open", path)?);
        if self.seen.contains(&identity) {
            return Err(Error::refused(path, "it is backed by itself"));
        }
        if self.seen.len() == MAX_LAYERS {
            return Err(Error::TooManyLayers(path.into()));
        }
        self.seen.push(identity);
        let (access, fence) = match format {
            Format::Raw => {
                let storage = Fenced::new(file, 0..0).at("open", path)?;
                let fence = storage.fence();
                (FormatAccess::new(Raw::open_image(storage, writable).at("open", path)?), fence)
            }
            Format::Qcow2 => self.open_qcow2(path, file, writable)?,
        };
        Ok(Layer { path: path.into(), access: Arc::new(access), fence })
    }

    fn open_qcow2(
        &mut self,
        path: &Path,
        file: File,
        writable: bool,
    ) -> Result<(FormatAccess<Fenced>, Arc<Fence>), Error> {
        let header = Header::of(&file, path)?;
        let (mut qcow2, fence) = overlay(path, file, &header, writable)?;
        if let Some((name, format)) = header.backing {
            let below = self.resolve(path, &name)?;
            let file = plain_file(&below, false)?;
            qcow2.set_backing(Some(self.open(&below, file, format, false)?.access));
        }
        Ok((FormatAccess::new(qcow2), fence))
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
