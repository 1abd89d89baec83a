//! Stores and snapshots for tests.

use std::fs;
use std::path::Path;

use super::{Error, Snapshot, Store};
use crate::disk::{Format, create_from_raw, create_overlay};
use crate::snapshot::{Backing, Disk, Kind, MANIFEST, Machine, Manifest, MemoryInfo, Role, describe};
use crate::spec::{MachineSpec, Size};
use crate::sys::home::Home;

/// The size of every disk here, in bytes.
pub const DISK_SIZE: u64 = 4 << 20;

/// An empty store in a folder of its own.
pub fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&Home::at(dir.path()).unwrap()).unwrap();
    (dir, store)
}

/// A small machine.
pub fn spec(name: &str) -> MachineSpec {
    MachineSpec::new(name.parse().unwrap(), "", 1, Size::mib(128))
}

/// What a file of a snapshot is made of.
enum Content {
    Bytes(Vec<u8>),
    Link(std::path::PathBuf),
    Layer(Option<(String, Format)>),
    /// A disk that is full of one byte.
    Filled(u8),
}

/// What is done to a disk, by its folder and the name of its top layer, before it is sealed.
type Touch = Box<dyn FnOnce(&Store, &Path, &str)>;

/// A snapshot that is being put together.
pub struct Made {
    manifest: Manifest,
    files: Vec<(String, Role, Content)>,
    touch: Option<Touch>,
}

impl Made {
    /// One with nothing in it. One that is not an image (by its name) has a machine.
    pub fn new(kind: Kind, name: &str) -> Made {
        let mut manifest = Manifest::new(kind, name, 1_700_000_000);
        let (cmdline, append) = (String::new(), String::new());
        let machine = Machine {
            cpus: 1,
            memory: 1 << 28,
            max_cpus: 1,
            max_memory: 1 << 28,
            boot_memory: 1 << 28,
            cmdline,
            append,
            cpu_baseline: Default::default(),
        };
        manifest.machine = name.contains('@').then_some(machine);
        Made { manifest, files: Vec::new(), touch: None }
    }

    /// Changes the manifest.
    pub fn with(mut self, change: impl FnOnce(&mut Manifest)) -> Made {
        change(&mut self.manifest);
        self
    }

    pub fn parent(self, parent: &Snapshot) -> Made {
        self.with(|manifest| manifest.parent = Some(parent.digest))
    }

    /// A plain file.
    pub fn file(self, name: &str, bytes: &[u8]) -> Made {
        self.with_file(name, Role::State, Content::Bytes(bytes.into()))
    }

    /// Something to boot with.
    pub fn kernel(self) -> Made {
        self.with_file("kernel", Role::Kernel, Content::Bytes(b"a kernel".into()))
    }

    /// A file that another snapshot has too.
    pub fn link(self, of: &Snapshot, name: &str) -> Made {
        let role = of.manifest.files.iter().find(|file| file.name == name).unwrap().role;
        self.with_file(name, role, Content::Link(of.dir.join(name)))
    }

    /// A root disk of one layer: over that of another snapshot, or a base.
    pub fn disk(self, over: Option<&Snapshot>) -> Made {
        let backing = over.map(|base| (base, base.manifest.disks[0].file.clone()));
        let header = backing.as_ref().map(|(base, file)| (super::snapshots::backing_path(base, file), Format::Qcow2));
        let content = if header.is_some() { Content::Layer(header) } else { Content::Filled(0) };
        let backing = backing.map(|(base, file)| Backing { snapshot: base.digest, file });
        self.with_file("root-1.qcow2", Role::Disk, content).with_disk("root-1.qcow2", backing)
    }

    /// A root disk without a base that is full of one byte.
    pub fn filled(self, byte: u8) -> Made {
        self.with_file("root-1.qcow2", Role::Disk, Content::Filled(byte)).with_disk("root-1.qcow2", None)
    }

    /// A further layer over all layers of another snapshot of the same machine, which are linked.
    pub fn successor(mut self, of: &Snapshot) -> Made {
        let layers: Vec<_> = of.manifest.files.iter().filter(|file| file.role == Role::Disk).cloned().collect();
        for file in &layers {
            self = self.link(of, &file.name);
        }
        let (name, old) = (format!("root-{}.qcow2", layers.len() + 1), &of.manifest.disks[0]);
        let content = Content::Layer(Some((old.file.clone(), Format::Qcow2)));
        self.with_file(&name, Role::Disk, content).with_disk(&name, old.backing.clone())
    }

    /// Memory that nobody reads: all of it, or the difference to that of another snapshot.
    pub fn memory(self, parent: Option<&Snapshot>) -> Made {
        self.memory_of(parent, &[1; 8192], &[2; 64])
    }

    /// The same with memory of this content.
    pub fn memory_of(self, parent: Option<&Snapshot>, data: &[u8], index: &[u8]) -> Made {
        let memory = MemoryInfo { parent: parent.map(|parent| parent.digest), bytes: data.len() as u64 };
        self.with(|manifest| manifest.memory = Some(memory))
            .with_file("memory", Role::Memory, Content::Bytes(data.into()))
            .with_file("memory.index", Role::MemoryIndex, Content::Bytes(index.into()))
    }

    /// Does something to the disk before it is sealed.
    pub fn touch(mut self, touch: impl FnOnce(&Store, &Path, &str) + 'static) -> Made {
        self.touch = Some(Box::new(touch));
        self
    }

    fn with_file(mut self, name: &str, role: Role, content: Content) -> Made {
        self.files.push((name.into(), role, content));
        self
    }

    fn with_disk(self, file: &str, backing: Option<Backing>) -> Made {
        let disk =
            Disk { device: "root".into(), file: file.into(), format: "qcow2".into(), virtual_size: DISK_SIZE, backing };
        self.with(|manifest| manifest.disks.push(disk))
    }

    /// Makes the files and puts it into the store.
    pub fn try_publish(mut self, store: &Store) -> Result<Snapshot, Error> {
        let staging = store.stage().unwrap();
        for (name, role, content) in self.files {
            let path = staging.dir().join(&name);
            match content {
                Content::Bytes(bytes) => fs::write(&path, bytes).unwrap(),
                Content::Link(of) => fs::hard_link(of, &path).unwrap(),
                Content::Layer(backing) => {
                    let (backing, format) = backing.unwrap();
                    create_overlay(&path, &backing, format, DISK_SIZE).unwrap();
                }
                Content::Filled(byte) => {
                    let raw = store.root().join(".raw");
                    fs::write(&raw, vec![byte; DISK_SIZE as usize]).unwrap();
                    create_from_raw(&raw, &path).unwrap();
                    fs::remove_file(&raw).unwrap();
                }
            }
            if let Some(touch) = self.touch.take_if(|_| self.manifest.disks.first().is_some_and(|d| d.file == name)) {
                touch(store, staging.dir(), &name);
            }
            self.manifest.files.push(describe(staging.dir(), &name, role).unwrap());
        }
        assert!(!staging.dir().join(MANIFEST).exists());
        let name = self.manifest.name.clone();
        store.publish(staging, &self.manifest, &name)
    }

    pub fn publish(self, store: &Store) -> Snapshot {
        self.try_publish(store).unwrap()
    }
}
