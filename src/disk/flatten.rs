//! One layer in place of many, while the machine runs.
//!
//! ```text
//! root ──► root-3 ──► root-2 ──► root-1 ──► base        before
//! root ──► root-4 ──► base                              after, and both show the guest the same
//! ```
//!
//! What lies below a machine's own layers are those of the snapshot that it woke from, and of those before that one. A
//! machine that is woken from a snapshot of a machine that was woken, and so on, gets a chain that is made of these; so
//! they can be copied along ([`Reach::All`]), down to the last file of all, the image's.
//!
//! Sealed layers never change, so what they show together is copied at leisure. Then [`super::Disk::adopt`] gives
//! the running top the new layer to read through, in memory, and writes the new name into the top's header. That
//! name lies in the first sector, which a disk writes as a whole or not at all; and whichever of the two names a
//! power cut leaves, there is a file of that name with the same content, because the new file and its name were
//! on the disk before, and the old ones are removed only when the header is. What a kill in between leaves over,
//! [`super::tidy`] removes. Snapshots have links of their own to the old layers.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use imago::FormatAccess;

use super::chain::{Layer, chain_files, locked, open_layer};
use super::fence::{Identity, Sector};
use super::fenced::Fenced;
use super::fold::fold;
use super::header::rename_backing;
use super::layers::{Names, own_header, own_layers};
use super::{Error, Format};
use crate::sys::files::{At, sync_dir, sync_file};

/// Layers that were flattened into one, which no disk reads through yet. Dropped before that, it goes away.
pub struct Flattened {
    path: PathBuf,
    /// Which file the top is.
    top: Identity,
    /// The name in the top's header, and the one that is to be there.
    names: (String, String),
    /// The layers that are no longer needed then.
    old: Vec<PathBuf>,
    /// The new one with all below it. Taken by the adoption.
    below: Option<Arc<FormatAccess<Fenced>>>,
    used: Used,
}

/// What became of a flattened layer.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Used {
    /// Nothing names it.
    No,
    /// A header may name it: it was being written.
    Perhaps,
    /// The top's header on the disk names it.
    Yes,
}

/// Which layers become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// The machine's own.
    Own,
    /// Everything between the top and the last file.
    All,
}

/// Makes one layer of those below the disk at `top`, whose chain stays inside the folder `root`. `None` when there are
/// fewer than two. `InUse` when one of the machine's own is not sealed. The machine may go on, but must not get a new
/// top until the result was adopted or dropped.
pub fn flatten(top: &Path, root: &Path, reach: Reach) -> Result<Option<Flattened>, Error> {
    let names = Names::of(top)?;
    let own = own_layers(top)?;
    let (sources, base) = match reach {
        Reach::Own => (own.layers.iter().rev().map(|path| (path.clone(), Format::Qcow2)).collect(), own.base),
        Reach::All => {
            let files = chain_files(top, Format::Qcow2, root)?;
            let [_, between @ .., (last, format)] = files.as_slice() else { return Ok(None) };
            (between.to_vec(), Some((name_from(names.dir(), last, root)?, *format)))
        }
    };
    if sources.len() < 2 {
        return Ok(None);
    }
    let Some((below, _)) = own_header(top)?.backing else { return Ok(None) };
    // Beside others who read: a layer that is not sealed has a lock by which this is refused.
    let _held = own.layers.iter().map(|path| locked(path, false)).collect::<Result<Vec<_>, _>>()?;

    let number = names.next()?;
    let (path, temporary) = (names.layer(number), names.temporary());
    let base = base.as_ref().map(|(name, format)| (name.as_str(), *format));
    let written = fold(&sources, &temporary, base, root)
        .and_then(|()| Ok(sync_file(&temporary)?))
        .and_then(|()| Ok(fs::rename(&temporary, &path).at("make", &path)?));
    written.inspect_err(|_: &Error| {
        // What went wrong is the error to report; what cannot be removed now, `tidy` removes.
        let _ = fs::remove_file(&temporary);
    })?;
    let mut flattened = Flattened {
        top: Identity::of(&fs::symlink_metadata(top).at("find", top)?),
        names: (below, names.layer_name(number)),
        old: own.layers,
        path,
        below: None,
        used: Used::No,
    };
    sync_dir(names.dir())?;
    flattened.below = Some(open_layer(&flattened.path, root)?.access);
    Ok(Some(flattened))
}

/// How a file of the store is called from a folder of the store.
fn name_from(folder: &Path, file: &Path, root: &Path) -> Result<String, Error> {
    let root = fs::canonicalize(root).at("find", root)?;
    let folder = fs::canonicalize(folder).at("find", folder)?;
    match (folder.strip_prefix(&root), file.strip_prefix(&root)) {
        (Ok(folder), Ok(file)) => Ok(format!("{}{}", "../".repeat(folder.components().count()), file.display())),
        _ => Err(Error::refused(file, "it is not in the store")),
    }
}

impl Flattened {
    /// The path of the one layer.
    pub fn layer(&self) -> &Path {
        &self.path
    }

    /// After the adoption: removes the layers that are no longer needed from the machine's folder.
    pub fn remove_old(self) -> Result<(), Error> {
        if self.used != Used::Yes {
            return Err(Error::refused(&self.path, "the layers below are still in use"));
        }
        self.old.iter().try_for_each(|path| fs::remove_file(path).at("remove", path))?;
        Ok(sync_dir(self.path.parent().unwrap_or(Path::new(".")))?)
    }

    /// Whether it was made for the disk with this top.
    pub(super) fn fits(&self, top: &Layer) -> bool {
        self.top == top.fence.identity()
    }

    /// The new layer, once.
    pub(super) fn take(&mut self) -> Option<Arc<FormatAccess<Fenced>>> {
        self.below.take().inspect(|_| self.used = Used::Perhaps)
    }

    /// Writes the new name into a header.
    pub(super) fn rename(&self, sector: &mut Sector) -> io::Result<()> {
        rename_backing(sector, &self.names.0, &self.names.1)
    }

    pub(super) fn adopted(&mut self) {
        self.used = Used::Yes;
    }
}

impl Drop for Flattened {
    fn drop(&mut self) {
        if self.used == Used::No {
            // What cannot be removed now, `tidy` removes.
            let _ = fs::remove_file(&self.path);
        }
    }
}
