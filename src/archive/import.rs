//! Taking a snapshot out of an archive that may come from a stranger.
//!
//! The manifest comes first and is checked as a whole: from then on every further byte is either exactly what must
//! come next, or the archive is refused. Files are made under names that cannot lead anywhere, in a staging folder
//! that goes away unless all of it was right; nothing is read further than the manifest says, and that must find
//! room first.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::frames::FrameReader;
use super::{BLOCK, Error, Progress, Trust, Watch, head, padding, signed, threads};
use crate::snapshot::memory::{INDEX, Index, longest_full};
use crate::snapshot::{self, Digest, Kind, MANIFEST, MAX_MANIFEST, MAX_STATE, MachineState, Manifest, PublicKey, Role};
use crate::store::{self, Reserved, Snapshot, Store};
use crate::sys::files::{At, read_bounded};
use crate::sys::process;

/// The largest pieces whose digests a manifest may list, in bytes: each is held in memory once.
const MAX_CHUNK: u64 = 64 << 20;

/// What the snapshot will be called.
#[derive(Clone, Copy, Debug)]
pub enum Naming<'a> {
    /// This, which must be free.
    As(&'a str),
    /// What it was called, which must be free.
    Own,
    /// What it was called, or something like that when this is taken.
    OwnOrFree,
}

/// A snapshot that arrived.
#[derive(Debug)]
pub struct Arrived {
    /// The snapshot.
    pub snapshot: Snapshot,
    /// What it is called here.
    pub name: String,
    /// Whether it was here already, so that nothing but its manifest was read.
    pub known: bool,
    /// Who has signed it.
    pub signed: Option<PublicKey>,
}

/// Reads an archive, and lets the snapshot in it appear when all of it was right.
pub fn import(
    store: &Store,
    input: impl Read + Send + 'static,
    naming: Naming<'_>,
    trust: Trust<'_>,
    watch: Watch<'_>,
) -> Result<Arrived, Error> {
    let (signature, input) = signed::take(input)?;
    let mut from = FrameReader::new(input, threads()).map_err(Error::Read)?;
    watch(Progress { what: MANIFEST, done: 0, total: None });
    let (manifest, bytes) = read_manifest(&mut from)?;
    let total = check_whole(&manifest)?;
    let digest = Digest::of(&bytes);
    let signed = signed::judge(&digest, signature.as_ref(), trust)?;
    let (name, _reserved) = choose_name(store, &manifest, &digest, naming)?;
    if let Ok(snapshot) = store.resolve(&digest.to_string())
        && store.verify_quickly(&snapshot).is_ok()
    {
        store.set_name(&name, &digest)?;
        return Ok(Arrived { snapshot, name, known: true, signed });
    }
    store.check_room(total)?;
    let staging = store.stage()?;
    let mut done = 0;
    for file in &manifest.files {
        let mut tell = |bytes| {
            done += bytes;
            watch(Progress { what: &file.name, done, total: Some(total) });
        };
        read_file(&mut from, file, &manifest, staging.dir(), &mut tell)?;
    }
    read_end(&mut from)?;
    let staged = Snapshot { digest, dir: staging.dir().into(), manifest };
    check_staged(store, &staged)?;
    watch(Progress { what: "syncing", done, total: Some(total) });
    let snapshot = store.publish_received(staging, &bytes, &name)?;
    Ok(Arrived { snapshot, name, known: false, signed })
}

/// The manifest with its bytes, from the first entry.
fn read_manifest(from: &mut FrameReader) -> Result<(Manifest, Vec<u8>), Error> {
    let found = block(from)?;
    let header = tar::Header::from_byte_slice(&found);
    let name = header.path_bytes();
    if *name != *MANIFEST.as_bytes() {
        let name = String::from_utf8_lossy(&name).escape_debug().to_string();
        return Err(Error::refused(format!("it begins with `{name}` in place of {MANIFEST}")));
    }
    let size = header.entry_size().ok().filter(|size| *size <= MAX_MANIFEST);
    let size = size.ok_or_else(|| Error::refused(format!("{MANIFEST} has more than {MAX_MANIFEST} bytes")))?;
    let mut bytes = Vec::new();
    from.take(size).read_to_end(&mut bytes).map_err(Error::reading)?;
    if (bytes.len() as u64) < size {
        return Err(Error::refused("it is cut off"));
    }
    let manifest = Manifest::parse(&bytes, Path::new(MANIFEST))?;
    if found != *head(MANIFEST, size, &manifest)?.as_bytes() {
        return Err(Error::refused(difference(&found, MANIFEST, size)));
    }
    read_padding(from, size)?;
    Ok((manifest, bytes))
}

/// Refuses what an archive of ours cannot be, going by the manifest alone. Gives the bytes of all files.
pub(super) fn check_whole(manifest: &Manifest) -> Result<u64, Error> {
    if let Some((needed, _)) = manifest.needs().next() {
        return Err(Error::refused(format!("it needs another snapshot, {}", needed.short())));
    }
    let count = |role| manifest.files.iter().filter(|file| file.role == role).count();
    let memory = usize::from(manifest.kind == Kind::Live);
    if [Role::State, Role::Memory, Role::MemoryIndex].map(count) != [memory; 3]
        || manifest.memory.is_some() != (memory == 1)
    {
        return Err(Error::refused(format!(
            "its memory and state are not those of a {} snapshot",
            manifest.kind.name()
        )));
    }
    if count(Role::Kernel) != 1 || count(Role::Initrd) > 1 {
        return Err(Error::refused("it has not one kernel, or more than one initrd"));
    }
    let mut disks: Vec<_> = manifest.disks.iter().map(|disk| disk.file.as_str()).collect();
    disks.sort_unstable();
    disks.dedup();
    if disks.len() != manifest.disks.len() || disks.len() != count(Role::Disk) {
        return Err(Error::refused("its disks are not of one file each"));
    }
    let total = manifest.files.iter().try_fold(0u64, |sum, file| sum.checked_add(file.size));
    let total = total.ok_or_else(|| Error::refused("its files would be larger than anything"))?;
    let size = |role| manifest.file(role).map_or(0, |file| file.size);
    let (index, longest) = (size(Role::MemoryIndex), longest_full(size(Role::Memory)));
    if index > longest {
        return Err(Error::refused(format!(
            "its {INDEX} has {index} bytes, and such a memory needs {longest} at most"
        )));
    }
    let large = |file: &&snapshot::File| file.chunks.as_ref().is_some_and(|chunks| chunks.size > MAX_CHUNK);
    match manifest.files.iter().find(large) {
        Some(file) => Err(Error::refused(format!("the pieces of {} are larger than {MAX_CHUNK} bytes", file.name))),
        None => Ok(total),
    }
}

/// What the snapshot will be called: none of another snapshot's names, and nobody else's until this one is there.
pub(super) fn choose_name(
    store: &Store,
    manifest: &Manifest,
    digest: &Digest,
    naming: Naming<'_>,
) -> Result<(String, Reserved), Error> {
    let wanted = if let Naming::As(name) = naming { name } else { &manifest.name };
    let bad = |name: String| match naming {
        Naming::As(_) => store::Error::Reference(name).into(),
        _ => Error::BadName(name),
    };
    let free = |name: &str| {
        let reserved = match store.reserve(name) {
            Err(store::Error::SnapshotTaken(_)) => return Ok(None),
            Err(store::Error::Reference(name)) => return Err(bad(name)),
            other => other?,
        };
        match store.lookup(name) {
            Ok(there) => Ok((there == *digest).then_some(reserved)),
            Err(store::Error::NoSnapshot(_)) => Ok(Some(reserved)),
            Err(error) => Err(error.into()),
        }
    };
    if wanted.starts_with(Digest::PREFIX) {
        return Err(Error::BadName(wanted.into()));
    }
    if let Some(reserved) = free(wanted)? {
        return Ok((wanted.into(), reserved));
    }
    if !matches!(naming, Naming::OwnOrFree) {
        return Err(Error::Taken(wanted.into()));
    }
    let mut other = (2..1000).map(|number| format!("{wanted}-{number}"));
    let found = other.find_map(|name| match free(&name) {
        Ok(None) => None,
        Ok(Some(reserved)) => Some(Ok((name, reserved))),
        Err(error) => Some(Err(error)),
    });
    found.unwrap_or_else(|| Err(Error::Taken(wanted.into())))
}

/// Takes one file into the folder, checking its digests as it comes.
fn read_file(
    from: &mut FrameReader,
    file: &snapshot::File,
    manifest: &Manifest,
    dir: &Path,
    tell: &mut dyn FnMut(u64),
) -> Result<(), Error> {
    let found = block(from)?;
    if found != *head(&file.name, file.size, manifest)?.as_bytes() {
        return Err(Error::refused(difference(&found, &file.name, file.size)));
    }
    let path = dir.join(&file.name);
    let to = OpenOptions::new().write(true).create_new(true).open(&path).at("make", &path)?;
    let mut through = Through { from: from.take(file.size), to: &to, at: 0, failed: None, tell };
    let digests = digests_of(file, &mut through);
    let (length, failed) = (through.at, through.failed.take());
    failed.map_or(Ok(()), Err).at("write", &path)?;
    let digests = digests.map_err(Error::reading)?;
    if length < file.size {
        return Err(Error::refused(format!("it is cut off in {}", file.name)));
    }
    digests.compare(file)?;
    to.set_len(file.size).at("write", &path)?;
    read_padding(from, file.size)
}

/// The digests of a file, as far as its manifest lists them.
pub(super) struct Digests {
    whole: Digest,
    pieces: Option<Vec<Digest>>,
}

/// Computes the digests of what is to be `file`.
pub(super) fn digests_of(file: &snapshot::File, from: &mut impl Read) -> io::Result<Digests> {
    match &file.chunks {
        None => Digest::of_all(from).map(|whole| Digests { whole, pieces: None }),
        Some(chunks) => {
            Digest::of_pieces(from, chunks.size).map(|(whole, pieces)| Digests { whole, pieces: Some(pieces) })
        }
    }
}

impl Digests {
    /// Refuses a file that has others.
    pub(super) fn compare(&self, file: &snapshot::File) -> Result<(), Error> {
        let pieces = file.chunks.as_ref().map(|chunks| &chunks.digests);
        match self.whole == file.digest && self.pieces.as_ref() == pieces {
            true => Ok(()),
            false => Err(Error::refused(format!(
                "{} is damaged: its digest is {} in place of {}",
                file.name, self.whole, file.digest
            ))),
        }
    }
}

/// Gives what it reads, and writes it to a file, with holes for zeros.
struct Through<'a, R> {
    from: R,
    to: &'a File,
    at: u64,
    /// Why it could not be written.
    failed: Option<io::Error>,
    tell: &'a mut dyn FnMut(u64),
}

impl<R: Read> Read for Through<'_, R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if process::interrupted() {
            return Err(io::Error::other(super::frames::Stopped));
        }
        let count = self.from.read(into)?;
        let there = &into[..count];
        if there.iter().any(|byte| *byte != 0)
            && let Err(error) = self.to.write_all_at(there, self.at)
        {
            let kind = error.kind();
            self.failed = Some(error);
            return Err(kind.into());
        }
        self.at += count as u64;
        (self.tell)(count as u64);
        Ok(count)
    }
}

/// What follows the last file: two blocks of zeros, and nothing behind them.
fn read_end(from: &mut FrameReader) -> Result<(), Error> {
    for _ in 0..2 {
        let found = block(from)?;
        if found != [0; BLOCK] {
            return Err(Error::refused(format!("`{}` follows behind its last file", shown(&found))));
        }
    }
    match from.read(&mut [0]).map_err(Error::reading)? {
        0 => Ok(()),
        _ => Err(Error::refused("something follows behind its end")),
    }
}

/// What only the files themselves can tell: whether the disks lie over nothing, and the memory is all there.
pub(super) fn check_staged(store: &Store, staged: &Snapshot) -> Result<(), Error> {
    let refuse = |error: &dyn std::error::Error| {
        // The folder's name means nothing to anybody.
        Error::refused(error.to_string().replace(&format!("{}/", staged.dir.display()), ""))
    };
    store.verify_links(staged).map_err(|error| refuse(&error))?;
    if let Some(state) = staged.file(Role::State) {
        let bytes = read_bounded(&state, MAX_STATE).map_err(|error| refuse(&error))?;
        MachineState::parse(&bytes).map_err(|error| Error::refused(format!("its state is not sound: {error}")))?;
    }
    let (Some(memory), Some(path)) = (staged.manifest.file(Role::Memory), staged.file(Role::MemoryIndex)) else {
        return Ok(());
    };
    let bytes = read_bounded(&path, snapshot::memory::MAX_LENGTH).map_err(|error| refuse(&error))?;
    let index = Index::parse(&bytes, &path).map_err(|error| refuse(&error))?;
    match index.is_full() && index.data_length() == memory.size {
        true => Ok(()),
        false => Err(Error::refused("its memory is not all of it, or of another length than its index says")),
    }
}

fn block(from: &mut FrameReader) -> Result<[u8; BLOCK], Error> {
    let mut block = [0; BLOCK];
    from.read_exact(&mut block).map_err(Error::reading)?;
    Ok(block)
}

fn read_padding(from: &mut FrameReader, size: u64) -> Result<(), Error> {
    let mut zeros = [0; BLOCK];
    let zeros = &mut zeros[..padding(size)];
    from.read_exact(zeros).map_err(Error::reading)?;
    match zeros.iter().all(|byte| *byte == 0) {
        true => Ok(()),
        false => Err(Error::refused("something hides between its files")),
    }
}

/// In which way an entry's head is not the one of the file that must come here.
fn difference(found: &[u8; BLOCK], name: &str, size: u64) -> String {
    if *found == [0; BLOCK] {
        return format!("{name} is missing");
    }
    let header = tar::Header::from_byte_slice(found);
    if *header.path_bytes() != *name.as_bytes() {
        return format!("`{}` stands where {name} must be", shown(found));
    }
    if header.entry_type() != tar::EntryType::Regular {
        return format!("{name} is not a plain file");
    }
    match header.entry_size() {
        Ok(found) if found == size => format!("the head of {name} is not as it must be"),
        Ok(found) => format!("{name} has {found} bytes in place of {size}"),
        Err(_) => format!("{name} has no length"),
    }
}

/// The name in an entry's head, harmless.
fn shown(found: &[u8; BLOCK]) -> String {
    String::from_utf8_lossy(&tar::Header::from_byte_slice(found).path_bytes()).escape_debug().to_string()
}
