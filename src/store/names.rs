//! Names of snapshots: `kitten`, `anna@monday`, or the beginning of a digest.

use std::fs;
use std::io;
use std::path::PathBuf;

use super::{Error, Store};
use crate::snapshot::Digest;
use crate::spec::Name;
use crate::sys::files::{At, names_in, read_bounded, sync_dir, write_atomically};

/// Fewer digits than this are too easily hit by accident.
const MIN_DIGITS: usize = 4;
/// `sha256:`, 64 digits, a newline, and room for a hand-edited file.
const MAX_FILE: u64 = 128;

/// Whether `text` may name a snapshot: a name, or two with an `@` between them.
fn is_name(text: &str) -> bool {
    let (name, tag) = text.split_once('@').map_or((text, None), |(name, tag)| (name, Some(tag)));
    name.parse::<Name>().is_ok() && tag.is_none_or(|tag| tag.parse::<Name>().is_ok())
}

impl Store {
    /// Lets `name` stand for the snapshot, whatever it stood for before.
    pub fn set_name(&self, name: &str, digest: &Digest) -> Result<(), Error> {
        Ok(write_atomically(&self.name_path(name)?, format!("{digest}\n").as_bytes())?)
    }

    /// Forgets a name. The snapshot stays.
    pub fn remove_name(&self, name: &str) -> Result<(), Error> {
        let path = self.name_path(name)?;
        match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Error::NoSnapshot(name.into())),
            other => other.at("remove", &path).map_err(Error::from),
        }?;
        Ok(sync_dir(&self.folder("names"))?)
    }

    /// All names with the digests that they stand for, by name.
    pub fn names(&self) -> Result<Vec<(String, Digest)>, Error> {
        let mut names = Vec::new();
        for name in names_in(&self.folder("names"))?.into_iter().filter(|name| is_name(name)) {
            let digest = self.named(&name)?;
            names.push((name, digest));
        }
        Ok(names)
    }

    /// The digest that a reference of any kind means.
    pub fn lookup(&self, reference: &str) -> Result<Digest, Error> {
        let Some(digits) = reference.strip_prefix(Digest::PREFIX) else {
            return self.named(reference);
        };
        if let Ok(digest) = reference.parse() {
            return match self.snapshot_dir(&digest).exists() {
                true => Ok(digest),
                false => Err(Error::NoSnapshot(reference.into())),
            };
        }
        let hexadecimal = digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if !hexadecimal || !(MIN_DIGITS..=64).contains(&digits.len()) {
            return Err(Error::Reference(reference.into()));
        }
        let mut found = self.digests()?.into_iter().filter(|digest| digest.hex().starts_with(digits));
        match (found.next(), found.next()) {
            (None, _) => Err(Error::NoSnapshot(reference.into())),
            (Some(digest), None) => Ok(digest),
            (Some(_), Some(_)) => Err(Error::Ambiguous(reference.into())),
        }
    }

    fn named(&self, name: &str) -> Result<Digest, Error> {
        let path = self.name_path(name)?;
        let bytes = match read_bounded(&path, MAX_FILE) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(Error::NoSnapshot(name.into())),
            other => other?,
        };
        let text = String::from_utf8_lossy(&bytes);
        text.trim().parse().map_err(|why| Error::Damaged { path, why: format!("{why}") })
    }

    pub(super) fn name_path(&self, name: &str) -> Result<PathBuf, Error> {
        if is_name(name) { Ok(self.folder("names").join(name)) } else { Err(Error::Reference(name.into())) }
    }
}
