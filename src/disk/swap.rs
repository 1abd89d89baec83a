//! A new top for a running machine, so that what it wrote so far can become part of a snapshot.
//!
//! `A` is the file that the machine writes to, `B` the new and empty one; `N` is the next free number.
//!
//! ```text
//!             root.qcow2   root-N.qcow2   the machine writes to
//!
//! at rest     A            –              A
//!    │ prepare: link
//! linked      A            A              A                        ┐
//!    │ prepare: make B, lock it, rename it                         │ killed here, it comes back
//! prepared    B over N     A              A  ── abandon ──► at rest ├ with the same content
//!    │ Disk::swap                                                  │
//! swapped     B over N     A              B, and A has tables that are only in memory
//!    │ Disk::seal                                                  ┘
//! sealed      B over N     A              B; A is on the disk and never changes again
//! ```
//!
//! Why a kill or a power cut is harmless in every line: `root.qcow2` is A, or it is B, which is empty and reads
//! through to A. B is on the disk before it gets the name, and so is the name `root-N.qcow2` that it is backed by.
//! The swap itself changes nothing on the disk. From then on a flush makes A durable before B, so what was flushed
//! is there, and what was not may be lost, as with any disk. `linked` leaves a second name for A, and every line
//! up to the rename may leave a hidden file: [`super::tidy`] removes both.
//!
//! Abandoning is one rename, of A over B. It is what dropping a [`Prepared`] does that was not swapped. Should even
//! that fail, the folder stays as `prepared`, with which the machine can be started again like any other.
//! After the swap there is no way back and none is needed: the machine has one more layer, and that is all.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::chain::{Layer, Overlay, depth, open_alone};
use super::fence::{Fence, Identity};
use super::layers::{Names, own_header};
use super::{Error, Format, MAX_LAYERS, create_overlay};
use crate::sys::files::{At, sync_dir, sync_file};

/// A new top that is ready to be put over a disk with [`super::Disk::swap`]. Dropped before that, the folder is
/// put back as it was.
pub struct Prepared {
    /// The name of the top.
    top: PathBuf,
    /// The name that the old top has got.
    layer: PathBuf,
    /// Which file the old top is, and its size as the guest sees it.
    old: (Identity, u64),
    /// The new top without what it is backed by. Taken by the swap.
    new: Option<(Overlay, Arc<Fence>)>,
}

/// Makes a new top for the disk at `top`, whose chain stays inside the folder `root`, while the machine goes on
/// writing to the old one. Only one at a time, and only for the holder of the machine's lock.
pub fn prepare(top: &Path, root: &Path) -> Result<Prepared, Error> {
    let names = Names::of(top)?;
    let size = own_header(top)?.size;
    let old = Identity::of(&fs::symlink_metadata(top).at("find", top)?);
    if depth(top, root)? >= MAX_LAYERS {
        return Err(Error::TooManyLayers(top.into()));
    }
    let number = names.next()?;
    let (layer, temporary) = (names.layer(number), names.temporary());
    fs::hard_link(top, &layer).at("link", &layer)?;
    step(names);
    let made = (|| {
        create_overlay(&temporary, &names.layer_name(number), Format::Qcow2, size)?;
        step(names);
        // Locked before it gets the name, so that nobody comes in between.
        let new = open_alone(&temporary)?;
        // What it is backed by is there for good before it is.
        sync_file(&temporary)?;
        sync_dir(names.dir())?;
        fs::rename(&temporary, top).at("replace", top)?;
        Ok(new)
    })();
    step(names);
    let new = made.inspect_err(|_: &Error| {
        // What went wrong is the error to report; what cannot be removed now, `tidy` removes.
        let _ = fs::remove_file(&temporary);
        let _ = fs::remove_file(&layer);
    })?;
    let prepared = Prepared { top: top.into(), layer, old: (old, size), new: Some(new) };
    sync_dir(names.dir())?;
    step(names);
    Ok(prepared)
}

impl Prepared {
    /// The path of the layer that the swap leaves behind and that is sealed afterwards.
    pub fn layer(&self) -> &Path {
        &self.layer
    }

    /// Puts the folder back as it was: the machine keeps the top that it writes to. Does nothing after a swap.
    pub fn abandon(mut self) -> Result<(), Error> {
        self.put_back()
    }

    /// Leaves the folder as it is now, for a machine that does not run: what it wrote is sealed by that.
    pub fn keep(mut self) {
        self.new = None;
    }

    /// Whether it was made for the disk with this top and this length.
    pub(super) fn fits(&self, top: &Layer, len: u64) -> bool {
        self.old == (top.fence.identity(), len)
    }

    /// The new top, once.
    pub(super) fn take(&mut self) -> Option<(Overlay, Arc<Fence>)> {
        self.new.take()
    }

    fn put_back(&mut self) -> Result<(), Error> {
        if self.new.take().is_none() {
            return Ok(());
        }
        // The other file goes with its only name: nothing was ever written to it.
        fs::rename(&self.layer, &self.top).at("replace", &self.top)?;
        Ok(sync_dir(self.top.parent().unwrap_or(Path::new(".")))?)
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        if let Err(error) = self.put_back() {
            tracing::warn!("a new top that was not used stays: {error}");
        }
    }
}

/// Where a kill would leave the folder as it is now; tests look at it there.
fn step(_names: Names<'_>) {
    #[cfg(test)]
    super::tests::photograph(_names.dir());
}
