//! Fetching a snapshot from a registry that may be anybody's.
//!
//! The manifests come first and are checked as a whole; they bound everything else. Chunks go straight to their places
//! in the files of a folder that belongs to the snapshot's digest. When this ends early the folder stays, and whoever
//! comes next reads what is in it: a chunk is there when its digest says so, and otherwise it is fetched. The snapshot
//! appears when every file has its digest and an archive's checks have passed.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use zstd::bulk::Decompressor;
use zstd::zstd_safe::compress_bound;

use super::list::{Chunk, Cut, List};
use super::work::Work;
use super::{ARTIFACT_TYPE, Artifact, CHUNK_TYPE, CONFIG_TYPE, Descriptor, LIST_TYPE, MANIFEST_TYPE};
use super::{MAX_CHUNK, SIGNATURE, cut};
use crate::archive::frames::decompress;
use crate::archive::import::{Naming, check_staged, check_whole, choose_name, digests_of};
use crate::archive::{Arrived, Error, Progress, Trust, Watch, signed};
use crate::oci::{self, Client};
use crate::snapshot::{self, Digest, Disk, MANIFEST, MAX_MANIFEST, Manifest, Role};
use crate::store::{Listed, Snapshot, Staging, Store};
use crate::sys::files::{self, At};
use crate::sys::{process, space};

/// The most snapshots of this host that are searched for chunks.
const MAX_RELATIVES: usize = 6;
/// How many bytes may be read here to save fetching one.
const WORTH: u64 = 16;

/// What came of a pull.
#[derive(Debug)]
pub struct Pulled {
    /// The snapshot.
    pub arrived: Arrived,
    /// The digest of the manifest in the registry.
    pub artifact: Digest,
    /// Chunks, each counted once.
    pub chunks: usize,
    /// How many of them were fetched; the others were here.
    pub fetched_chunks: usize,
    /// All bytes that were fetched.
    pub fetched_bytes: u64,
    /// Bytes of the snapshot's files.
    pub content_bytes: u64,
}

/// Fetches what `client` leads to, if it is one of those that are taken, and lets the snapshot appear when all of it
/// was right.
pub fn pull(
    store: &Store,
    client: &Arc<Client>,
    naming: Naming<'_>,
    trust: Trust<'_>,
    watch: Watch<'_>,
) -> Result<Pulled, Error> {
    fetch(store, client, naming, trust, watch).map_err(|error| match error {
        Error::Refused(why) => Error::Unfit { what: client.reference().to_string(), why },
        other => other,
    })
}

fn fetch(
    store: &Store,
    client: &Arc<Client>,
    naming: Naming<'_>,
    trust: Trust<'_>,
    watch: Watch<'_>,
) -> Result<Pulled, Error> {
    watch(Progress { what: "the manifest", done: 0, total: None });
    let bytes = client.manifest(MANIFEST_TYPE)?;
    let artifact = parse(&bytes)?;
    let config = blob(client, &artifact.config)?;
    let manifest = Manifest::parse(&config, Path::new(MANIFEST))?;
    let content_bytes = check_whole(&manifest)?;
    let digest = artifact.config.digest;
    let signature = artifact.annotations.get(SIGNATURE).map(|text| signed::from_annotation(text)).transpose()?;
    let signed = signed::judge(&digest, signature.as_ref(), trust)?;
    let (name, _reserved) = choose_name(store, &manifest, &digest, naming)?;
    let mut fetched_bytes = bytes.len() as u64 + artifact.config.size;
    let pulled = |snapshot, known, fetched_chunks, fetched_bytes| Pulled {
        arrived: Arrived { snapshot, name: name.clone(), known, signed },
        artifact: Digest::of(&bytes),
        chunks: artifact.layers.len() - 1,
        fetched_chunks,
        fetched_bytes,
        content_bytes,
    };
    if let Ok(snapshot) = store.resolve(&digest.to_string())
        && store.verify_quickly(&snapshot).is_ok()
    {
        store.set_name(&name, &digest)?;
        return Ok(pulled(snapshot, true, 0, fetched_bytes));
    }
    let list = unpack(&blob(client, &artifact.layers[0])?)?;
    fetched_bytes += artifact.layers[0].size;
    let list = List::parse(&list, &manifest, artifact.layers.len() - 1).map_err(Error::Refused)?;

    let mut staging = store.stage_arriving(&digest)?;
    staging.keep(true);
    store.check_room(content_bytes.saturating_sub(space::taken_by(staging.dir())))?;
    let mut arriving = Arriving::begin(store, &staging, &manifest, &list, watch)?;
    arriving.search(store, &manifest, watch)?;
    let missing = arriving.missing();
    let fetched_chunks = missing.len();
    fetched_bytes += arriving.fetch(client, &artifact.layers[1..], missing, watch)?;
    // From here on it is right as a whole, or it never will be; only who has had enough may come again.
    let staged = Snapshot { digest, dir: staging.dir().into(), manifest };
    arriving.check(&staged.manifest, watch).and_then(|()| check_staged(store, &staged)).inspect_err(|error| {
        staging.keep(matches!(error, Error::Interrupted));
    })?;
    watch(Progress { what: "syncing", done: content_bytes, total: Some(content_bytes) });
    staging.keep(false);
    let snapshot = store.publish_received(staging, &config, &name)?;
    Ok(pulled(snapshot, false, fetched_chunks, fetched_bytes))
}

/// The manifest in the registry, if it is one of ours, with lengths that can be.
fn parse(bytes: &[u8]) -> Result<Artifact, Error> {
    let artifact: Artifact = serde_json::from_slice(bytes)
        .map_err(|error| Error::refused(format!("it is no OCI manifest with an image or an artifact: {error}")))?;
    if artifact.schema_version != 2 || artifact.media_type != MANIFEST_TYPE {
        return Err(Error::refused("it is another kind of manifest"));
    }
    if artifact.artifact_type != ARTIFACT_TYPE || artifact.config.media_type != CONFIG_TYPE {
        let other =
            if artifact.artifact_type.is_empty() { &artifact.config.media_type } else { &artifact.artifact_type };
        let other: String = other.escape_debug().take(100).collect();
        return Err(Error::refused(format!("it is no snapshot, or one of a later catnap: its type is {other}")));
    }
    let largest = compress_bound(MAX_CHUNK as usize) as u64;
    let fits = |layer: &Descriptor, media_type| layer.media_type == media_type && (1..=largest).contains(&layer.size);
    let Some((list, chunks)) = artifact.layers.split_first() else {
        return Err(Error::refused("it has no list of chunks"));
    };
    if !fits(list, LIST_TYPE) || !chunks.iter().all(|chunk| fits(chunk, CHUNK_TYPE)) {
        return Err(Error::refused("its layers are not a list of chunks and chunks, or larger than those can be"));
    }
    match artifact.config.size {
        0..=MAX_MANIFEST => Ok(artifact),
        size => Err(Error::refused(format!("its {MANIFEST} has {size} bytes"))),
    }
}

/// A blob that must be there when the manifest is.
fn blob(client: &Client, blob: &Descriptor) -> Result<Vec<u8>, Error> {
    client.blob(&blob.digest, blob.size).map_err(|error| match error {
        oci::Error::NotFound(_) => Error::refused(format!("its blob {} is missing there", blob.digest)),
        other => other.into(),
    })
}

fn unpack(frame: &[u8]) -> Result<Vec<u8>, Error> {
    Decompressor::new().and_then(|mut decompressor| decompress(&mut decompressor, frame)).map_err(Error::reading)
}

/// A snapshot's files, some of whose chunks are in their places.
struct Arriving<'a> {
    list: &'a List,
    files: Arc<Vec<Target>>,
    /// For each chunk, where it goes: the number of a file, and an offset in it.
    places: Arc<Vec<Vec<(usize, u64)>>>,
    there: Vec<bool>,
    done: u64,
    total: u64,
}

struct Target {
    path: PathBuf,
    /// None for one that is a snapshot's of this host, which nobody may write to.
    file: Option<File>,
}

impl<'a> Arriving<'a> {
    /// Makes the files, and looks at what is there already.
    fn begin(
        store: &Store,
        staging: &Staging,
        manifest: &Manifest,
        list: &'a List,
        watch: Watch<'_>,
    ) -> Result<Arriving<'a>, Error> {
        let total = manifest.files.iter().map(|file| file.size).sum();
        let (mut files, mut left) = (Vec::new(), Vec::new());
        let listed = store.list()?;
        for file in &manifest.files {
            watch(Progress { what: &file.name, done: 0, total: Some(total) });
            let path = staging.dir().join(&file.name);
            let (file, was_there) = match link(&listed, file, &path)? {
                true => (None, true),
                false => open(&path, file.size).map(|(open, was_there)| (Some(open), was_there)).at("make", &path)?,
            };
            files.push(Target { path, file });
            left.push(was_there);
        }
        let mut places = vec![Vec::new(); list.chunks.len()];
        for (number, cut) in list.files.iter().enumerate() {
            list.pieces(cut).for_each(|piece| places[piece.chunk].push((number, piece.at)));
        }
        let there = vec![false; list.chunks.len()];
        let mut arriving = Arriving { list, files: Arc::new(files), places: Arc::new(places), there, done: 0, total };
        arriving.look(&left, watch)?;
        Ok(arriving)
    }

    /// Finds the chunks that are in all of their places, going by what is there.
    fn look(&mut self, left: &[bool], watch: Watch<'_>) -> Result<(), Error> {
        let mut content = Vec::new();
        for (number, chunk) in self.list.chunks.iter().enumerate() {
            let mut good = true;
            for &(file, at) in &self.places[number] {
                check_interrupt()?;
                // What is linked has been read.
                if !good || self.files[file].file.is_none() {
                    continue;
                }
                good = left[file] && {
                    content.resize(chunk.size as usize, 0);
                    self.files[file].file.as_ref().is_some_and(|file| file.read_exact_at(&mut content, at).is_ok())
                        && Digest::of(&content) == chunk.digest
                };
            }
            if good {
                self.arrived(number, "what is here", watch);
            }
        }
        Ok(())
    }

    fn arrived(&mut self, number: usize, what: &str, watch: Watch<'_>) {
        self.there[number] = true;
        self.done += self.list.chunks[number].size * self.places[number].len() as u64;
        watch(Progress { what, done: self.done.min(self.total), total: Some(self.total) });
    }

    fn missing(&self) -> Vec<usize> {
        (0..self.there.len()).filter(|number| !self.there[*number]).collect()
    }

    /// Searches what this host has of the same machine, and its images, for the chunks that are missing.
    fn search(&mut self, store: &Store, manifest: &Manifest, watch: Watch<'_>) -> Result<(), Error> {
        let list = self.list;
        for relative in relatives(store, manifest)? {
            for (cut, file) in list.files.iter().zip(&manifest.files) {
                match file.role {
                    Role::Memory if relative.manifest.memory.is_some() => {
                        self.search_in(store, &relative, None, cut, watch)?;
                    }
                    Role::Disk => {
                        let disks = relative.manifest.disks.iter();
                        disks
                            .into_iter()
                            .try_for_each(|disk| self.search_in(store, &relative, Some(disk), cut, watch))?;
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// Searches one disk, or the memory, if what is missing is worth it.
    fn search_in(
        &mut self,
        store: &Store,
        relative: &Snapshot,
        disk: Option<&Disk>,
        cut: &Cut,
        watch: Watch<'_>,
    ) -> Result<(), Error> {
        let mut wanted = self.wanted(cut);
        let bytes = wanted.values().map(|number| self.list.chunks[*number].size).fold(0, u64::saturating_add);
        // One that is damaged has nothing to give, and is not what was asked for.
        let Ok(to_read) = store.bytes_in(relative, disk) else { return Ok(()) };
        if bytes == 0 || bytes.saturating_mul(WORTH) < to_read {
            return Ok(());
        }
        let mut failed = None;
        let mut each = |piece: &[u8]| {
            let found = wanted.remove(&Digest::of(piece));
            let found = found.filter(|number| self.list.chunks[*number].size == piece.len() as u64);
            let put = found.map_or(Ok(()), |number| {
                put(&self.files, &self.places[number], piece)?;
                self.arrived(number, "what is here", watch);
                Ok(())
            });
            failed = put.and_then(|()| check_interrupt()).err();
            match failed.is_some() || wanted.is_empty() {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        };
        let _ = match disk {
            Some(disk) => cut::pieces_of_disk(store, relative, disk, cut.span, &mut each),
            None => cut::pieces_of_memory(store, relative, cut.span, &mut each),
        };
        failed.map_or(Ok(()), Err)
    }

    /// The missing chunks of a file, by what is in them.
    fn wanted(&self, cut: &Cut) -> HashMap<Digest, usize> {
        let missing = self.list.pieces(cut).filter(|piece| !self.there[piece.chunk]);
        missing.map(|piece| (self.list.chunks[piece.chunk].digest, piece.chunk)).collect()
    }

    /// Fetches these chunks. Gives how many bytes that were.
    fn fetch(
        &mut self,
        client: &Arc<Client>,
        blobs: &[Descriptor],
        missing: Vec<usize>,
        watch: Watch<'_>,
    ) -> Result<u64, Error> {
        let wanted: Vec<_> =
            missing.iter().map(|number| (*number, blobs[*number].clone(), self.list.chunks[*number])).collect();
        let (client, files, places) = (client.clone(), self.files.clone(), self.places.clone());
        let work = Work::begin(wanted.len(), move |job| {
            let (number, descriptor, chunk) = &wanted[job];
            let content = chunk_of(&client, descriptor, chunk)?;
            put(&files, &places[*number], &content)?;
            Ok((*number, descriptor.size))
        })?;
        let mut bytes = 0;
        for fetched in work {
            let (number, size) = fetched?;
            bytes += size;
            self.arrived(number, "from the registry", watch);
        }
        Ok(bytes)
    }

    /// Compares all files with their digests.
    fn check(&self, manifest: &Manifest, watch: Watch<'_>) -> Result<(), Error> {
        for (file, target) in manifest.files.iter().zip(self.files.iter()) {
            watch(Progress { what: &format!("checking {}", file.name), done: self.total, total: Some(self.total) });
            if target.file.is_some() {
                let open = File::open(&target.path).at("open", &target.path)?;
                let found = digests_of(file, &mut Interruptible(open)).map_err(Error::reading)?;
                found.compare(file)?;
            }
        }
        Ok(())
    }
}

/// What is in a chunk, fetched and checked.
fn chunk_of(client: &Client, descriptor: &Descriptor, chunk: &Chunk) -> Result<Vec<u8>, Error> {
    let content = unpack(&blob(client, descriptor)?)?;
    match content.len() as u64 == chunk.size && Digest::of(&content) == chunk.digest {
        true => Ok(content),
        false => Err(Error::refused(format!("in the blob {} is another chunk than its list says", descriptor.digest))),
    }
}

/// Puts a chunk into all of its places.
fn put(files: &[Target], places: &[(usize, u64)], content: &[u8]) -> Result<(), Error> {
    for (number, at) in places {
        let target = &files[*number];
        if let Some(file) = &target.file {
            file.write_all_at(content, *at).at("write", &target.path)?;
        }
    }
    Ok(())
}

/// Links a file of a snapshot of this host that has the same digest, and is as it says. Whether there is one.
fn link(listed: &[Listed], file: &snapshot::File, path: &Path) -> Result<bool, files::Error> {
    for snapshot in listed.iter().filter_map(|listed| listed.snapshot.as_ref().ok()) {
        let same = |other: &&snapshot::File| {
            (other.digest, other.size, &other.chunks) == (file.digest, file.size, &file.chunks)
        };
        let Some(same) = snapshot.manifest.files.iter().find(same) else { continue };
        let from = snapshot.dir.join(&same.name);
        let sound =
            File::open(&from).and_then(|mut file| Digest::of_all(&mut file)).is_ok_and(|found| found == file.digest);
        if !sound {
            continue;
        }
        match fs::remove_file(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => other.at("remove", path)?,
        }
        // Another filesystem, or too many links: then it is fetched.
        if fs::hard_link(&from, path).is_ok() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Opens a file of this size, to go on with what is in it, or makes it. Whether it was there. One that has another
/// name too may be a snapshot's, and is left alone.
fn open(path: &Path, size: u64) -> io::Result<(File, bool)> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    match fs::symlink_metadata(path) {
        Ok(there) if there.is_file() && there.nlink() == 1 && there.len() == size => {
            return Ok((options.open(path)?, true));
        }
        Ok(_) => fs::remove_file(path)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let file = options.create_new(true).open(path)?;
    file.set_len(size)?;
    Ok((file, false))
}

/// The snapshots here that may share chunks with one of this manifest, the nearest first: its parent, those of the same
/// machine by their age, and base images.
fn relatives(store: &Store, manifest: &Manifest) -> Result<Vec<Snapshot>, Error> {
    let machine = |name: &str| name.split('@').next().unwrap_or_default().to_owned();
    let ours = machine(&manifest.name);
    let distance = |listed: &Listed| {
        let snapshot = listed.snapshot.as_ref().ok()?;
        let is_parent = manifest.parent == Some(snapshot.digest);
        let same = machine(&snapshot.manifest.name) == ours || listed.names.iter().any(|name| machine(name) == ours);
        let kin = [is_parent, same, listed.is_image()].iter().position(|is| *is)?;
        Some((kin, snapshot.manifest.created.abs_diff(manifest.created)))
    };
    let listed = store.list()?;
    let mut near: Vec<_> =
        listed.iter().filter_map(|listed| Some((distance(listed)?, listed.snapshot.as_ref().ok()?))).collect();
    near.sort_by_key(|(distance, _)| *distance);
    Ok(near.into_iter().take(MAX_RELATIVES).map(|(_, snapshot)| snapshot.clone()).collect())
}

fn check_interrupt() -> Result<(), Error> {
    if process::interrupted() { Err(Error::Interrupted) } else { Ok(()) }
}

/// Reads until the user has had enough.
struct Interruptible(File);

impl io::Read for Interruptible {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match check_interrupt() {
            Ok(()) => self.0.read(into),
            Err(_) => Err(io::Error::other(super::super::frames::Stopped)),
        }
    }
}
