//! Snapshots in the store.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{Error, Staging, Store};
use crate::disk::{Format, create_overlay};
use crate::snapshot::{Backing, Digest, MANIFEST, Manifest, Role};
use crate::sys::files::{At, make_read_only, names_in, write_atomically};

/// A snapshot that is in the store.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Its identity.
    pub digest: Digest,
    /// Its folder.
    pub dir: PathBuf,
    /// What it is made of.
    pub manifest: Manifest,
}

impl Snapshot {
    /// The path of the one file that has this role.
    pub fn file(&self, role: Role) -> Option<PathBuf> {
        self.manifest.file(role).map(|file| self.dir.join(&file.name))
    }

    /// Makes a disk over the snapshot's root disk, in a machine's or a staging folder; of `size` bytes, when it is to
    /// be larger. What lies beyond the snapshot's reads as zeros.
    pub fn lay_over(&self, disk: &Path, size: Option<u64>) -> Result<(), Error> {
        let path = self.dir.join(MANIFEST);
        let below = self.manifest.disks.iter().find(|disk| disk.device == "root");
        let below = below.ok_or_else(|| Error::Damaged { path: path.clone(), why: "it has no root disk".into() })?;
        let format = Format::from_name(&below.format)
            .ok_or_else(|| Error::Damaged { path, why: format!("a disk's format is {:?}", below.format) })?;
        let (size, least) = (size.unwrap_or(below.virtual_size), below.virtual_size);
        if size < least {
            return Err(Error::DiskTooSmall { wanted: size, least });
        }
        Ok(create_overlay(disk, &backing_path(self, &below.file), format, size)?)
    }
}

/// A snapshot as listed: one that cannot be read is listed too.
#[derive(Debug)]
pub struct Listed {
    /// Its identity, by the name of its folder.
    pub digest: Digest,
    /// The names that stand for it.
    pub names: Vec<String>,
    /// The snapshot, or why it cannot be used.
    pub snapshot: Result<Snapshot, Error>,
}

impl Listed {
    /// What a person calls it: its first name, or the beginning of its digest when it has none.
    pub fn name(&self) -> String {
        self.names.first().cloned().unwrap_or_else(|| self.digest.short())
    }

    /// Whether it is a base image: it was made of no machine, and has no name of the kind `machine@tag`. What
    /// cannot be read is told by its names alone.
    pub fn is_image(&self) -> bool {
        let of_none = self.snapshot.as_ref().map_or(!self.names.is_empty(), |s| s.manifest.machine.is_none());
        of_none && !self.names.iter().any(|name| name.contains('@'))
    }
}

impl Store {
    /// Puts a snapshot into the store whose files lie in `staging`, just as `manifest` lists them, and gives
    /// it a name. It appears whole or not at all. One that is there already is taken as it is.
    ///
    /// Refused when a snapshot that it needs is not there any more.
    ///
    /// The manifest's digests are believed: whoever made the files has just computed them, and whoever got
    /// them from elsewhere has checked them.
    pub fn publish(&self, staging: Staging, manifest: &Manifest, name: &str) -> Result<Snapshot, Error> {
        let published = self.publish_bytes(staging, manifest, &manifest.to_bytes()?)?;
        self.name_or_withdraw(published, name)
    }

    /// The same with a manifest that came from elsewhere: its very bytes are kept, for its digest is of those, and
    /// they may hold what only a later version knows. That it came from elsewhere is noted.
    pub fn publish_received(&self, staging: Staging, bytes: &[u8], name: &str) -> Result<Snapshot, Error> {
        let manifest = Manifest::parse(bytes, Path::new(MANIFEST))?;
        let digest = Digest::of(bytes);
        let (note, there) = (self.arrived_path(&digest), self.snapshot_dir(&digest).is_dir());
        if !there {
            write_atomically(&note, b"")?;
        }
        let published = self.publish_bytes(staging, &manifest, bytes).inspect_err(|_| {
            // Without its snapshot it means nothing, and does no harm.
            let _ = if there { Ok(()) } else { fs::remove_file(&note) };
        });
        self.name_or_withdraw(published?, name)
    }

    /// Gives a snapshot its name. One that is new does not stay without, since its maker hears of a failure.
    fn name_or_withdraw(&self, (snapshot, is_new): (Snapshot, bool), name: &str) -> Result<Snapshot, Error> {
        let named = self.set_name(name, &snapshot.digest);
        if named.is_err() && is_new {
            // When somebody needs it by now, it does stay, and is listed.
            let _ = self.remove_snapshot(&snapshot.digest);
        }
        named.map(|()| snapshot)
    }

    /// Whether the snapshot came from elsewhere, so that its machine may still run there.
    pub fn has_arrived(&self, digest: &Digest) -> bool {
        self.arrived_path(digest).exists()
    }

    pub(super) fn arrived_path(&self, digest: &Digest) -> PathBuf {
        self.folder("arrived").join(digest.hex())
    }

    /// The same without the name.
    pub(super) fn publish_nameless(&self, staging: Staging, manifest: &Manifest) -> Result<Snapshot, Error> {
        self.publish_bytes(staging, manifest, &manifest.to_bytes()?).map(|(snapshot, _)| snapshot)
    }

    /// Also says whether it is new, or was there already.
    fn publish_bytes(&self, staging: Staging, manifest: &Manifest, bytes: &[u8]) -> Result<(Snapshot, bool), Error> {
        let digest = Digest::of(bytes);
        let dir = self.snapshot_dir(&digest);
        let path = staging.dir().join(MANIFEST);
        fs::write(&path, bytes).at("write", &path)?;
        for file in names_in(staging.dir())? {
            if file != MANIFEST && !manifest.files.iter().any(|listed| listed.name == file) {
                return Err(Error::Damaged { path: staging.dir().join(file), why: "it is not in the manifest".into() });
            }
            make_read_only(&staging.dir().join(file))?;
        }
        let snapshot = Snapshot { digest, dir, manifest: manifest.clone() };
        let _beside = self.beside_others()?;
        self.check_needs(manifest)?;
        let is_new = match staging.publish(&snapshot.dir) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
            published => published.map(|()| true)?,
        };
        match is_new {
            true => self.check_lengths(&snapshot)?,
            false => self.replace_damaged(&snapshot, &staging)?,
        }
        Ok((snapshot, is_new))
    }

    /// Keeps the snapshot that is there already when it is whole, and puts the new copy in its place when not.
    fn replace_damaged(&self, snapshot: &Snapshot, copy: &Staging) -> Result<(), Error> {
        if self.verify(snapshot, |_, _| {}).is_ok() {
            return Ok(());
        }
        let away = self.stage()?;
        fs::rename(&snapshot.dir, away.dir().join("damaged")).at("remove", &snapshot.dir)?;
        copy.publish(&snapshot.dir)?;
        self.check_lengths(snapshot)
    }

    /// The snapshot that `reference` means, its manifest checked against its digest. Its files are not
    /// looked at: see [`Store::verify_quickly`].
    pub fn resolve(&self, reference: &str) -> Result<Snapshot, Error> {
        let digest = self.lookup(reference)?;
        self.load(&digest).map_err(|error| match error {
            Error::NoSnapshot(_) => Error::NoSnapshot(reference.into()),
            other => other,
        })
    }

    /// All snapshots, in the order of their digests.
    pub fn list(&self) -> Result<Vec<Listed>, Error> {
        let names = self.names()?;
        let listed = |digest| {
            let mine = names.iter().filter(|(_, named)| *named == digest).map(|(name, _)| name.clone());
            Listed { digest, names: mine.collect(), snapshot: self.load(&digest) }
        };
        Ok(self.digests()?.into_iter().map(listed).collect())
    }

    pub(super) fn digests(&self) -> Result<Vec<Digest>, Error> {
        let names = names_in(&self.folder("snapshots"))?;
        Ok(names.iter().filter_map(|name| format!("{}{name}", Digest::PREFIX).parse().ok()).collect())
    }

    pub(super) fn load(&self, digest: &Digest) -> Result<Snapshot, Error> {
        let dir = self.snapshot_dir(digest);
        let (manifest, found) = Manifest::read(&dir).map_err(|error| match error {
            crate::snapshot::Error::File(error) if error.kind() == io::ErrorKind::NotFound => match dir.is_dir() {
                true => Error::Damaged { path: dir.join(MANIFEST), why: "it is missing".into() },
                false => Error::NoSnapshot(digest.to_string()),
            },
            other => other.into(),
        })?;
        if found != *digest {
            return Err(Error::Damaged { path: dir.join(MANIFEST), why: format!("its digest is {found}") });
        }
        Ok(Snapshot { digest: *digest, dir, manifest })
    }

    pub(super) fn snapshot_dir(&self, digest: &Digest) -> PathBuf {
        self.folder("snapshots").join(digest.hex())
    }
}

/// The path by which a disk in a machine's or a staging folder names a file of a snapshot.
pub(super) fn backing_path(snapshot: &Snapshot, file: &str) -> String {
    Path::new("../../snapshots").join(snapshot.digest.hex()).join(file).display().to_string()
}

/// What a path that [`backing_path`] made stands for; `None` for any other.
pub(super) fn backing_of_path(path: &str) -> Option<Backing> {
    let (hex, file) = path.strip_prefix("../../snapshots/")?.split_once('/')?;
    let snapshot = format!("{}{hex}", Digest::PREFIX).parse().ok()?;
    let plain = !file.is_empty() && !file.starts_with('.') && !file.contains('/');
    plain.then(|| Backing { snapshot, file: file.into() })
}
