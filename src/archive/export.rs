//! Writing a snapshot as one file.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;

use super::frames::FrameWriter;
use super::{BLOCK, Error, Progress, Watch, head, padding, signed, threads};
use crate::snapshot::{self, Digest, MANIFEST, Manifest, Role, SecretKey, Signature};
use crate::store::{Snapshot, Staging, Store};
use crate::sys::files::At;
use crate::sys::process;

/// How much is read at once, in bytes.
const PIECE: usize = 1 << 20;

/// A snapshot that needs no other, ready to be written.
pub struct Outgoing {
    staging: Staging,
    manifest: Manifest,
    /// The manifest's bytes.
    bytes: Vec<u8>,
    /// Of its owner's, when it is signed.
    signature: Option<Signature>,
}

impl Outgoing {
    /// Gathers all that belongs to a snapshot, whatever chains it comes from. Without `memory`, only its disks and
    /// what they boot with.
    pub fn prepare(store: &Store, snapshot: &Snapshot, memory: bool, watch: Watch<'_>) -> Result<Outgoing, Error> {
        let snapshot = if memory { snapshot.clone() } else { Store::without_memory(snapshot) };
        if snapshot.manifest.file(Role::Kernel).is_none() {
            return Err(Error::refused("it would have no kernel to boot with"));
        }
        let staging = store.stage()?;
        let manifest = store.make_whole(&snapshot, &staging, |what| watch(Progress { what, done: 0, total: None }))?;
        let stored = snapshot.dir.join(MANIFEST);
        // Of one that is sent as it is, the very bytes, so that it is the same snapshot there.
        let bytes = match Manifest::read(&snapshot.dir) {
            Ok((same, _)) if same == manifest => fs::read(&stored).at("read", &stored)?,
            _ => manifest.to_bytes()?,
        };
        Ok(Outgoing { staging, manifest, bytes, signature: None })
    }

    /// Has the key's owner stand for it.
    pub fn sign(&mut self, key: &SecretKey) {
        self.signature = Some(key.sign(&self.digest()));
    }

    /// Who stands for it, and how.
    pub(super) fn signature(&self) -> Option<&Signature> {
        self.signature.as_ref()
    }

    /// What is in it.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The manifest's bytes.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The folder with its files.
    pub(super) fn dir(&self) -> &Path {
        self.staging.dir()
    }

    /// The snapshot as it will arrive, where it is now.
    pub(super) fn snapshot(&self) -> Snapshot {
        Snapshot { digest: self.digest(), dir: self.dir().into(), manifest: self.manifest.clone() }
    }

    /// The digest of the snapshot that arrives.
    pub fn digest(&self) -> Digest {
        Digest::of(&self.bytes)
    }

    /// Bytes of content, before they are compressed.
    pub fn size(&self) -> u64 {
        self.manifest.files.iter().fold(0, |sum, file| file.size.saturating_add(sum))
    }

    /// Writes the archive. Gives what was written to, and how many bytes that were.
    pub fn write<W: Write + Send + 'static>(&self, mut out: W, watch: Watch<'_>) -> Result<(W, u64), Error> {
        let preface = self.signature.as_ref().map_or(Ok(Vec::new()), signed::preface)?;
        out.write_all(&preface).map_err(Error::Write)?;
        let mut out = FrameWriter::new(out, threads()).map_err(Error::Write)?;
        let size = self.bytes.len() as u64;
        out.write_all(head(MANIFEST, size, &self.manifest)?.as_bytes()).map_err(Error::Write)?;
        out.write_all(&self.bytes).map_err(Error::Write)?;
        out.write_all(&[0; BLOCK][..padding(size)]).map_err(Error::Write)?;
        let mut done = 0;
        for file in &self.manifest.files {
            self.write_file(&mut out, file, &mut done, watch)?;
        }
        out.write_all(&[0; 2 * BLOCK]).map_err(Error::Write)?;
        let (out, bytes) = out.finish().map_err(Error::Write)?;
        Ok((out, bytes + preface.len() as u64))
    }

    fn write_file(
        &self,
        out: &mut impl Write,
        file: &snapshot::File,
        done: &mut u64,
        watch: Watch<'_>,
    ) -> Result<(), Error> {
        out.write_all(head(&file.name, file.size, &self.manifest)?.as_bytes()).map_err(Error::Write)?;
        let path = self.staging.dir().join(&file.name);
        let mut from = File::open(&path).at("open", &path)?;
        let mut piece = vec![0; PIECE.min(file.size as usize)];
        let mut left = file.size;
        while left > 0 {
            if process::interrupted() {
                return Err(Error::Interrupted);
            }
            let part = &mut piece[..left.min(PIECE as u64) as usize];
            from.read_exact(part).at("read", &path)?;
            out.write_all(part).map_err(Error::Write)?;
            left -= part.len() as u64;
            *done += part.len() as u64;
            watch(Progress { what: &file.name, done: *done, total: Some(self.size()) });
        }
        out.write_all(&[0; BLOCK][..padding(file.size)]).map_err(Error::Write)
    }
}
