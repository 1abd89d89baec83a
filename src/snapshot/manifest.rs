//! `snapshot.json`: what a snapshot is and what it is made of.
//!
//! The rule that keeps it readable for ever: within one [`Manifest::FORMAT`], fields are only ever added, and
//! none that an older reader must understand to be right. Unknown fields are ignored; a higher format is
//! refused by name. It comes from strangers too, so everything in it is bounded and checked.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::format::{self, Read};
use super::{Cpu, Digest, Machine};
use crate::sys::files::{self, At};

/// The manifest's own file name.
pub const MANIFEST: &str = "snapshot.json";
/// The longest manifest, in bytes. With chunks of 4 MiB that lists about a terabyte.
pub const MAX_MANIFEST: u64 = 16 << 20;
const MAX_FILES: usize = 256;
const MAX_DISKS: usize = 32;
const MAX_NOTE: usize = 4096;
/// Files of this size and more have the digests of their chunks listed, so that a copy of what changed can
/// do with little.
const CHUNKED_FROM: u64 = 64 << 20;
const CHUNK: u64 = 4 << 20;

/// Why a manifest, or the index of a memory, is not taken.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read.
    #[error(transparent)]
    File(#[from] files::Error),
    /// Not JSON, or not of the right shape.
    #[error("{path} is not a snapshot's manifest: {source}")]
    Json {
        /// The manifest.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// Made by a later version.
    #[error("{path} is of format {format}, and this catnap reads format {}: use a later catnap", Manifest::FORMAT)]
    Later {
        /// The manifest.
        path: PathBuf,
        /// Its format.
        format: u32,
    },
    /// A field cannot be meant.
    #[error("{path} is not sound: {why}")]
    Unsound {
        /// The manifest.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A base and its differences are not of one machine, or some are missing.
    #[error("the memory of these snapshots does not fit together: {0}")]
    Chain(String),
}

/// What a snapshot captures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Memory, machine state and disks of one instant.
    Live,
    /// Disks alone, as a power cut would leave them.
    Crash,
    /// Disks alone, of a guest whose filesystems were frozen.
    Quiesced,
    /// Disks alone, of a machine that was shut down. Base images too.
    Clean,
}

/// A snapshot's manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`Manifest::FORMAT`] when it was written.
    pub format: u32,
    /// What it captures.
    pub kind: Kind,
    /// When it was taken, in seconds since 1970 (UTC).
    pub created: u64,
    /// The name it was given at first; names are kept elsewhere and can change.
    pub name: String,
    /// A note by who took it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub note: String,
    /// The snapshot that its machine was started or restored from, or whose successor it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<Digest>,
    /// The files beside the manifest, all of them.
    pub files: Vec<File>,
    /// The disks, and how they are made up of files.
    pub disks: Vec<Disk>,
    /// Disks that lived in memory: that they were there, and nothing of what was on them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ephemeral: Vec<Ephemeral>,
    /// What the memory file holds, when there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryInfo>,
    /// The machine's shape; a base image has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<Machine>,
    /// The CPU that its guest goes on with, when it has memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<Cpu>,
    /// The host on which it was taken: facts for people and for the check whether it can wake elsewhere.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    pub host: serde_json::Map<String, serde_json::Value>,
}

/// What a file is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The kernel.
    Kernel,
    /// The initramfs.
    Initrd,
    /// A disk, or a layer of one.
    Disk,
    /// vCPUs and devices.
    State,
    /// Guest memory.
    Memory,
    /// Where in guest memory the pieces of the memory file belong.
    #[serde(rename = "memory-index")]
    MemoryIndex,
}

/// A file of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    /// Its name in the snapshot's folder.
    pub name: String,
    /// What it is for.
    pub role: Role,
    /// Its length in bytes.
    pub size: u64,
    /// The digest of all of it.
    pub digest: Digest,
    /// The digests of its pieces, when it is large.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chunks: Option<Chunks>,
}

/// A large file in pieces of one size; the last may be shorter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chunks {
    /// Bytes per piece.
    pub size: u64,
    /// The pieces' digests, in order.
    pub digests: Vec<Digest>,
}

/// A disk of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// What it is to the machine, such as `root`.
    pub device: String,
    /// The file that is its top layer.
    pub file: String,
    /// How the file is to be read: `qcow2` or `raw`.
    pub format: String,
    /// The disk's size as the guest sees it, in bytes.
    pub virtual_size: u64,
    /// What the file lies over, in another snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing: Option<Backing>,
}

/// A file of another snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backing {
    /// The other snapshot.
    pub snapshot: Digest,
    /// The file's name in it.
    pub file: String,
}

/// What a snapshot's memory file holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryInfo {
    /// The snapshot to whose memory this is a difference; none when it is all of the memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<Digest>,
    /// Bytes of memory that the file holds itself: neither zeros nor the parent's.
    pub bytes: u64,
}

/// An ephemeral disk that the machine had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ephemeral {
    /// What it is to the machine: its bay.
    pub device: String,
    /// Its size in bytes.
    pub size: u64,
    /// Where the guest had it mounted.
    #[serde(default)]
    pub at: String,
}

/// What a snapshot needs another one for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Need {
    /// A disk of it lies over one of the other's.
    Disk,
    /// Its memory is a difference to the other's.
    Memory,
}

impl Kind {
    /// The kind in one word.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Live => "live",
            Kind::Crash => "crash",
            Kind::Quiesced => "quiesced",
            Kind::Clean => "clean",
        }
    }
}

impl Manifest {
    /// The format that this version writes, and the highest that it reads.
    pub const FORMAT: u32 = 1;

    /// A manifest with the fields that every snapshot has, and nothing in it yet.
    pub fn new(kind: Kind, name: &str, created: u64) -> Manifest {
        Manifest {
            format: Manifest::FORMAT,
            kind,
            created,
            name: name.into(),
            note: String::new(),
            parent: None,
            files: Vec::new(),
            disks: Vec::new(),
            ephemeral: Vec::new(),
            memory: None,
            machine: None,
            cpu: None,
            host: serde_json::Map::new(),
        }
    }

    /// Reads and checks the manifest in a snapshot's folder; also gives the digest of its bytes.
    pub fn read(dir: &Path) -> Result<(Manifest, Digest), Error> {
        let path = dir.join(MANIFEST);
        let bytes = files::read_bounded(&path, MAX_MANIFEST)?;
        Ok((Manifest::parse(&bytes, &path)?, Digest::of(&bytes)))
    }

    /// Reads and checks a manifest; `path` is for messages.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Manifest, Error> {
        let json = |source| Error::Json { path: path.into(), source };
        let manifest = match format::read(bytes, Manifest::FORMAT, |it: &Manifest| it.format).map_err(json)? {
            Read::Known(manifest) => manifest,
            Read::Later(format) => return Err(Error::Later { path: path.into(), format }),
        };
        manifest.check().map_err(|why| Error::Unsound { path: path.into(), why })?;
        Ok(manifest)
    }

    /// The bytes of `snapshot.json`.
    pub fn to_bytes(&self) -> Result<Vec<u8>, Error> {
        let json = |source| Error::Json { path: MANIFEST.into(), source };
        let mut bytes = serde_json::to_vec_pretty(self).map_err(json)?;
        bytes.push(b'\n');
        self.check().map_err(|why| Error::Unsound { path: MANIFEST.into(), why })?;
        Ok(bytes)
    }

    /// The file of this role, when there is exactly one.
    pub fn file(&self, role: Role) -> Option<&File> {
        let mut of_role = self.files.iter().filter(|file| file.role == role);
        of_role.next().filter(|_| of_role.next().is_none())
    }

    fn check(&self) -> Result<(), String> {
        if self.files.len() > MAX_FILES || self.disks.len() > MAX_DISKS || self.ephemeral.len() > MAX_DISKS {
            return Err(format!("more than {MAX_FILES} files or {MAX_DISKS} disks"));
        }
        if self.note.len() > MAX_NOTE || self.name.len() > MAX_NOTE {
            return Err(format!("a name or note of more than {MAX_NOTE} bytes"));
        }
        let mut names = HashSet::new();
        for file in &self.files {
            check_name(&file.name)?;
            if file.name == MANIFEST || !names.insert(file.name.as_str()) {
                return Err(format!("two files with the name {}", file.name));
            }
            if let Some(chunks) = &file.chunks {
                let count = file.size.checked_div(chunks.size).map(|_| file.size.div_ceil(chunks.size));
                if count != Some(chunks.digests.len() as u64) {
                    return Err(format!("the chunks of {} do not make up its size", file.name));
                }
            }
        }
        for disk in &self.disks {
            check_name(&disk.device)?;
            disk.backing.as_ref().map_or(Ok(()), |backing| check_name(&backing.file))?;
            if !self.files.iter().any(|file| file.name == disk.file && file.role == Role::Disk) {
                return Err(format!("the disk {} has no file {}", disk.device, disk.file.escape_default()));
            }
        }
        self.ephemeral.iter().try_for_each(|disk| check_name(&disk.device))?;
        self.cpu.as_ref().map_or(Ok(()), Cpu::check)?;
        self.memory.as_ref().map_or(Ok(()), |memory| self.check_memory(memory))
    }

    fn check_memory(&self, memory: &MemoryInfo) -> Result<(), String> {
        let Some(file) = self.file(Role::Memory).filter(|_| self.kind == Kind::Live) else {
            return Err("memory without a memory file, or in a snapshot that is not live".into());
        };
        if memory.parent.is_some() && self.file(Role::MemoryIndex).is_none() {
            return Err("a difference of memory without an index".into());
        }
        if memory.bytes > file.size {
            return Err(format!("{} bytes of memory in a file of {}", memory.bytes, file.size));
        }
        Ok(())
    }

    /// The snapshots without which this one cannot be used, and for what. The parent, which is only its origin,
    /// is none of them for that reason alone.
    pub fn needs(&self) -> impl Iterator<Item = (Digest, Need)> + '_ {
        let disks = self.disks.iter().filter_map(|disk| disk.backing.as_ref());
        let memory = self.memory.as_ref().and_then(|memory| memory.parent);
        disks.map(|backing| (backing.snapshot, Need::Disk)).chain(memory.map(|parent| (parent, Need::Memory)))
    }
}

/// A file's name must stay in the folder and be plain to read.
fn check_name(name: &str) -> Result<(), String> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    let good = (1..=100).contains(&name.len()) && name.bytes().all(allowed) && !name.starts_with('.');
    if good { Ok(()) } else { Err(format!("`{}` is not a file's name", name.escape_default())) }
}

/// Describes the file `name` in `dir`: reads all of it for its digest.
pub fn describe(dir: &Path, name: &str, role: Role) -> Result<File, files::Error> {
    describe_watched(dir, name, role, &mut |_| Ok(()))
}

/// The same, and `watch` hears of every so many bytes that were read; its error ends the reading.
pub fn describe_watched(
    dir: &Path,
    name: &str,
    role: Role,
    watch: &mut dyn FnMut(u64) -> io::Result<()>,
) -> Result<File, files::Error> {
    let path = dir.join(name);
    let file = fs::File::open(&path).at("open", &path)?;
    let size = file.metadata().at("open", &path)?.len();
    let mut file = Watched { from: file, watch };
    let (digest, chunks) = if size < CHUNKED_FROM {
        (Digest::of_all(&mut file).at("read", &path)?, None)
    } else {
        let (digest, digests) = Digest::of_pieces(&mut file, CHUNK).at("read", &path)?;
        (digest, Some(Chunks { size: CHUNK, digests }))
    };
    Ok(File { name: name.into(), role, size, digest, chunks })
}

/// A file, and who hears of what is read.
struct Watched<'a> {
    from: fs::File,
    watch: &'a mut dyn FnMut(u64) -> io::Result<()>,
}

impl io::Read for Watched<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = self.from.read(into)?;
        (self.watch)(count as u64)?;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        let digest = Digest::of(b"x");
        let file = |name: &str, role| File { name: name.into(), role, size: 1, digest, chunks: None };
        Manifest {
            files: vec![file("kernel", Role::Kernel), file("root.qcow2", Role::Disk)],
            disks: vec![Disk {
                device: "root".into(),
                file: "root.qcow2".into(),
                format: "qcow2".into(),
                virtual_size: 1 << 31,
                backing: None,
            }],
            ..Manifest::new(Kind::Clean, "kitten", 1_700_000_000)
        }
    }

    fn parse(text: &str) -> Result<Manifest, Error> {
        Manifest::parse(text.as_bytes(), Path::new(MANIFEST))
    }

    #[test]
    fn a_manifest_survives_and_what_a_later_version_adds_is_ignored() {
        let text = String::from_utf8(manifest().to_bytes().unwrap()).unwrap();
        assert_eq!(parse(&text).unwrap(), manifest());
        let later = text.replacen('{', "{\"colour\": {\"deep\": [1, 2]},", 1);
        assert_eq!(parse(&later).unwrap(), manifest());
        let error = parse("{\"format\": 2, \"all\": \"different\"}").unwrap_err();
        assert!(matches!(error, Error::Later { format: 2, .. }), "{error}");
        assert_eq!(manifest().file(Role::Kernel).unwrap().name, "kernel");
        assert_eq!(manifest().file(Role::Memory), None);
    }

    #[test]
    fn hostile_manifests_are_refused() {
        for name in ["", ".", "..", "../kernel", "/etc/passwd", "a/b", "a\\b", ".hidden", "a\0", "ü", "snapshot.json"]
        {
            let mut bad = manifest();
            bad.files[0].name = name.into();
            assert!(bad.to_bytes().is_err(), "{name:?}");
        }
        let bad: [fn(&mut Manifest); 8] = [
            |m| m.files[1].name = "kernel".into(),
            |m| m.disks[0].file = "kernel".into(),
            |m| m.disks[0].device = "../x".into(),
            |m| m.disks[0].backing = Some(Backing { snapshot: Digest::of(b""), file: "../../x".into() }),
            |m| m.files[0].chunks = Some(Chunks { size: 0, digests: vec![] }),
            |m| m.files[0].chunks = Some(Chunks { size: 1, digests: vec![] }),
            |m| m.note = "x".repeat(MAX_NOTE + 1),
            |m| m.files = vec![m.files[0].clone(); MAX_FILES + 1],
        ];
        for change in bad {
            let mut changed = manifest();
            change(&mut changed);
            let text = serde_json::to_string(&changed).unwrap();
            assert!(matches!(parse(&text), Err(Error::Unsound { .. })), "{changed:?}");
        }
        let live = || {
            let mut live = manifest();
            let file = |name: &str, role| File { name: name.into(), role, ..live.files[0].clone() };
            let files = [file("memory", Role::Memory), file("memory.index", Role::MemoryIndex)];
            live.files.extend(files);
            live.memory = Some(MemoryInfo { parent: Some(Digest::of(b"")), bytes: 1 });
            Manifest { kind: Kind::Live, ..live }
        };
        let text = String::from_utf8(live().to_bytes().unwrap()).unwrap();
        assert!(text.contains("\"memory-index\""), "{text}");
        assert_eq!(parse(&text).unwrap().needs().collect::<Vec<_>>(), [(Digest::of(b""), Need::Memory)]);
        let bad: [fn(&mut Manifest); 5] = [
            |m| m.kind = Kind::Crash,
            |m| m.memory.as_mut().unwrap().bytes = 2,
            |m| m.files[2].role = Role::State,
            |m| m.files[3].role = Role::State,
            |m| m.files[3].role = Role::Memory,
        ];
        for change in bad {
            let mut changed = live();
            change(&mut changed);
            assert!(changed.to_bytes().is_err(), "{changed:?}");
        }
        for text in ["", "{}", "[]", "{\"format\": 1}", "{\"format\": -1}", &"[".repeat(100_000)] {
            assert!(matches!(parse(text), Err(Error::Json { .. })));
        }
    }

    #[test]
    fn large_files_list_their_chunks() {
        let dir = tempfile::tempdir().unwrap();
        let large = fs::File::create(dir.path().join("large")).unwrap();
        large.set_len(CHUNKED_FROM + 1).unwrap();
        let mut heard = 0;
        let mut count = |bytes| {
            heard += bytes;
            Ok(())
        };
        let described = describe_watched(dir.path(), "large", Role::Memory, &mut count).unwrap();
        assert_eq!(heard, described.size);
        let mut enough = |_| Err(io::ErrorKind::Other.into());
        assert!(describe_watched(dir.path(), "large", Role::Memory, &mut enough).is_err());
        let chunks = described.chunks.unwrap();
        assert_eq!((described.size, chunks.digests.len()), (CHUNKED_FROM + 1, 17));
        assert_eq!(chunks.digests[0], Digest::of(&vec![0; CHUNK as usize]));
        assert_eq!(chunks.digests[16], Digest::of(&[0]));
    }
}
