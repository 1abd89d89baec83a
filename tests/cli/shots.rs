//! Snapshots as a machine's would be, without a machine: a disk in layers, and memory of a few pages.

use std::fs;

use catnap::disk::{Format, create_from_raw, create_overlay};
use catnap::snapshot::memory::{Index, PAGE, Region, Run};
use catnap::snapshot::{Backing, Disk, Kind, Machine, MachineState, Manifest, MemoryInfo, Role, STATE, describe};
use catnap::store::{Snapshot, Store};

/// Clusters of 64 KiB in every disk.
pub const CLUSTERS: u64 = 16;
const CLUSTER: u64 = 64 << 10;
/// Pages in every memory.
const PAGES: u64 = 8;

/// A snapshot that is being put together.
pub struct Shot<'a> {
    store: &'a Store,
    manifest: Manifest,
    layers: Vec<(String, Layer<'a>)>,
    linked: Option<&'a Snapshot>,
    memory: Vec<(u64, u8)>,
    state: bool,
    plain: Vec<(&'static str, Role, Vec<u8>)>,
    text: String,
    noise: Vec<u8>,
}

enum Layer<'a> {
    /// A disk of its own: so many clusters of this byte.
    Filled(u64, u8),
    Over(&'a Snapshot),
    Link(&'a Snapshot),
}

impl<'a> Shot<'a> {
    /// One with nothing in it, taken so many seconds after a certain moment.
    pub fn new(store: &'a Store, kind: Kind, name: &str, after: u64) -> Shot<'a> {
        let mut manifest = Manifest::new(kind, name, 1_700_000_000 + after);
        manifest.machine = name.contains('@').then(|| {
            serde_json::from_str::<Machine>(
                r#"{"cpus": 2, "memory": 268435456, "max_cpus": 4, "max_memory": 1073741824, "boot_memory": 268435456}"#,
            )
            .unwrap()
        });
        Shot {
            store,
            manifest,
            layers: Vec::new(),
            linked: None,
            memory: Vec::new(),
            plain: Vec::new(),
            text: String::new(),
            noise: Vec::new(),
            state: false,
        }
    }

    pub fn with(mut self, change: impl FnOnce(&mut Manifest)) -> Shot<'a> {
        change(&mut self.manifest);
        self
    }

    pub fn note(self, note: &str) -> Shot<'a> {
        self.with(|manifest| manifest.note = note.into())
    }

    pub fn parent(self, parent: &Snapshot) -> Shot<'a> {
        self.with(|manifest| manifest.parent = Some(parent.digest))
    }

    /// Something to boot with, and for a live one a state, of which nothing can wake.
    pub fn bootable(mut self) -> Shot<'a> {
        self.plain.push(("kernel", Role::Kernel, b"a kernel".into()));
        if self.manifest.kind == Kind::Live {
            self.plain.push(("machine.state", Role::State, br#"{"format": 1, "parts": []}"#.into()));
        }
        self
    }

    /// The same, with a kernel of this many bytes that cannot be compressed.
    pub fn with_kernel(mut self, length: usize) -> Shot<'a> {
        self = self.bootable();
        self.plain[0].2 = noise(length);
        self
    }

    /// A disk without a base that cannot be compressed.
    pub fn noisy(mut self, clusters: u64) -> Shot<'a> {
        self.noise = noise((clusters * CLUSTER) as usize);
        self.filled(clusters, 0)
    }

    /// With one of the clusters zeros.
    pub fn but(mut self, cluster: u64) -> Shot<'a> {
        let at = (cluster * CLUSTER) as usize;
        self.noise[at..at + CLUSTER as usize].fill(0);
        self
    }

    /// A disk without a base.
    pub fn filled(mut self, clusters: u64, byte: u8) -> Shot<'a> {
        self.layers.push(("root-1.qcow2".into(), Layer::Filled(clusters, byte)));
        self
    }

    /// A disk without a base that begins with a text.
    pub fn with_text(mut self, text: &str) -> Shot<'a> {
        self.text = text.into();
        self.filled(1, 0)
    }

    /// A layer over the disk of a snapshot that another machine's is.
    pub fn over(mut self, base: &'a Snapshot) -> Shot<'a> {
        self.layers.push(("root-1.qcow2".into(), Layer::Over(base)));
        self.parent(base)
    }

    /// The same layers as another snapshot has.
    pub fn same_disk(mut self, of: &'a Snapshot) -> Shot<'a> {
        self.linked = Some(of);
        let layers = of.manifest.files.iter().filter(|file| file.role == Role::Disk);
        self.layers.extend(layers.map(|file| (file.name.clone(), Layer::Link(of))));
        self.parent(of)
    }

    /// Memory: all of it, with these pages full of a byte and the others zeros; or what differs from `parent`.
    pub fn memory(mut self, pages: &[(u64, u8)], parent: Option<&Snapshot>) -> Shot<'a> {
        self.memory = pages.into();
        let info = MemoryInfo { parent: parent.map(|parent| parent.digest), bytes: pages.len() as u64 * PAGE };
        self.with(|manifest| manifest.memory = Some(info))
    }

    /// The state of a machine without parts.
    pub fn state(mut self) -> Shot<'a> {
        self.state = true;
        self
    }

    /// Puts it into the store.
    pub fn take(mut self) -> Snapshot {
        let staging = self.store.stage().unwrap();
        for (name, role, bytes) in &self.plain {
            fs::write(staging.dir().join(name), bytes).unwrap();
            self.manifest.files.push(describe(staging.dir(), name, *role).unwrap());
        }
        let mut backing = self.linked.and_then(|of| of.manifest.disks[0].backing.clone());
        for (name, layer) in &self.layers {
            let path = staging.dir().join(name);
            match layer {
                Layer::Link(of) => fs::hard_link(of.dir.join(name), &path).unwrap(),
                Layer::Over(base) => {
                    let file = base.manifest.disks[0].file.clone();
                    let below = format!("../../snapshots/{}/{file}", base.digest.hex());
                    create_overlay(&path, &below, Format::Qcow2, CLUSTERS * CLUSTER).unwrap();
                    backing = Some(Backing { snapshot: base.digest, file });
                }
                Layer::Filled(clusters, byte) => {
                    let raw = self.store.root().join(".raw");
                    let mut bytes = vec![*byte; (clusters * CLUSTER) as usize];
                    bytes.splice(..self.text.len(), self.text.bytes());
                    bytes.splice(..self.noise.len(), self.noise.iter().copied());
                    bytes.resize((CLUSTERS * CLUSTER) as usize, 0);
                    fs::write(&raw, bytes).unwrap();
                    create_from_raw(&raw, &path).unwrap();
                    fs::remove_file(&raw).unwrap();
                }
            }
            self.manifest.files.push(describe(staging.dir(), name, Role::Disk).unwrap());
        }
        if let Some((top, _)) = self.layers.last() {
            self.manifest.disks.push(Disk {
                device: "root".into(),
                file: top.clone(),
                format: "qcow2".into(),
                virtual_size: CLUSTERS * CLUSTER,
                backing,
            });
        }
        if let Some(info) = &self.manifest.memory {
            let (index, data) = memory(&self.memory, info.parent.is_none());
            fs::write(staging.dir().join("memory"), data).unwrap();
            fs::write(staging.dir().join("memory.index"), index.to_bytes()).unwrap();
            for (name, role) in [("memory", Role::Memory), ("memory.index", Role::MemoryIndex)] {
                self.manifest.files.push(describe(staging.dir(), name, role).unwrap());
            }
        }
        if self.state {
            fs::write(staging.dir().join(STATE), MachineState::default().to_bytes().unwrap()).unwrap();
            self.manifest.files.push(describe(staging.dir(), STATE, Role::State).unwrap());
        }
        let name = self.manifest.name.clone();
        self.store.publish(staging, &self.manifest, &name).unwrap()
    }
}

/// Bytes that look like chance (xorshift64*), and are the same in every run.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let word = |_| {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes()
    };
    let mut bytes: Vec<u8> = (0..length.div_ceil(8)).flat_map(word).collect();
    bytes.truncate(length);
    bytes
}

fn memory(pages: &[(u64, u8)], full: bool) -> (Index, Vec<u8>) {
    let (mut runs, mut data) = (Vec::new(), Vec::new());
    for page in 0..PAGES {
        let filled = pages.iter().find(|(at, _)| *at == page);
        if filled.is_none() && !full {
            continue;
        }
        let offset = filled.map(|_| data.len() as u64);
        data.extend(filled.into_iter().flat_map(|(_, byte)| vec![*byte; PAGE as usize]));
        runs.push(Run { address: page * PAGE, length: PAGE, offset });
    }
    (Index::new(vec![Region { start: 0, length: PAGES * PAGE }], runs).unwrap(), data)
}
