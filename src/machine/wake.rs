//! What a machine wakes from: its state and its memory, read from a snapshot and from those that it is a
//! difference to, all of it checked before anything of it reaches KVM.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use vm_memory::GuestAddress;

use super::states::{DeviceStates, Virtio};
use super::{Error, Shape, memory_file};
use crate::devices::virtio::bay::{BayState, MediumState};
use crate::disk::Mark;
use crate::kvm::{VcpuState, VmState};
use crate::mem::GuestMemory;
use crate::snapshot::memory::Index;
use crate::snapshot::{Digest, MachineState, StateError};
use crate::sys::files::At;

/// One snapshot's part of a memory: its index, whose digest was checked, and its data.
pub struct Layer {
    /// Where the index is, for messages.
    pub index_path: PathBuf,
    /// What is in it.
    pub index: Vec<u8>,
    /// The data.
    pub memory: PathBuf,
}

/// A machine that sleeps.
pub struct Saved {
    pub(super) vm: VmState,
    pub(super) vcpus: Vec<VcpuState>,
    pub(super) devices: DeviceStates,
    pub(super) memory: GuestMemory,
    pub(super) base: Digest,
    pub(super) shape: Shape,
    /// The files that its memory is in.
    files: Vec<Opened>,
}

/// A file, as it was opened.
struct Opened {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Saved {
    /// Checks that its memory is in the files that have these names now. Whoever checked the files by their names has then
    /// checked these.
    pub fn check_files(&self) -> Result<(), Error> {
        let is_it = |file: &&Opened| {
            fs::metadata(&file.path).is_ok_and(|now| (now.dev(), now.ino()) == (file.device, file.inode))
        };
        match self.files.iter().find(|file| !is_it(file)) {
            None => Ok(()),
            Some(Opened { path, .. }) => {
                Err(Error::Unsound { path: path.clone(), why: "another came in its place meanwhile".into() })
            }
        }
    }

    /// What was in its bays.
    pub fn media(&self) -> Vec<Option<MediumState>> {
        self.devices.bays.iter().map(|bay| bay.chip.medium.clone()).collect()
    }

    /// Reads the state (the bytes of the file `path`) and maps the memory of the snapshot `base`, whose `layers`
    /// begin with a full one, of a machine of this shape.
    pub fn new(base: Digest, path: &Path, state: &[u8], layers: &[Layer], shape: Shape) -> Result<Saved, Error> {
        let unsound = |why: String| Error::Unsound { path: path.into(), why };
        let mut state = MachineState::parse(state).map_err(|error| unsound(error.to_string()))?;
        let mut read = || {
            let devices = DeviceStates::take(&mut state)?;
            let vm = state.take("vm", VM_VERSION)?;
            let vcpus = state.take_all("vcpu", VCPU_VERSION)?;
            Ok((devices, vm, vcpus))
        };
        let (devices, vm, vcpus) = read().map_err(|error: crate::snapshot::StateError| unsound(error.to_string()))?;
        state.finish().map_err(|error| unsound(error.to_string()))?;
        let ids: Vec<_> = vcpus.iter().map(VcpuState::id).collect();
        let sorted = ids.windows(2).all(|pair| pair[0] < pair[1]);
        if ids.first() != Some(&0) || !sorted || ids.last().is_some_and(|last| *last >= shape.max_cpus) {
            return Err(unsound(format!("it has the vCPUs {ids:?}, of {} at most", shape.max_cpus)));
        }
        let (memory, files) = map(layers, &shape.regions())?;
        Ok(Saved { vm, vcpus, devices, memory, base, shape, files })
    }
}

/// What the media in a machine's bays held, by its saved state (the bytes of the file `path`).
pub fn marks(path: &Path, state: &[u8]) -> Result<Vec<Mark>, Error> {
    let unsound = |error: StateError| Error::Unsound { path: path.into(), why: error.to_string() };
    let bays = MachineState::parse(state).and_then(|mut state| state.take_all::<Virtio<BayState>>("bay", 1));
    Ok(bays.map_err(unsound)?.into_iter().filter_map(|bay| Some(bay.chip.medium?.mark)).collect())
}

/// The versions of the states of the VM and of a vCPU.
pub(super) const VM_VERSION: u32 = 1;
pub(super) const VCPU_VERSION: u32 = 1;

/// Maps what the layers come to when they are laid over each other, for a machine with RAM in `regions`; and tells the
/// files.
fn map(layers: &[Layer], regions: &[(GuestAddress, u64)]) -> Result<(GuestMemory, Vec<Opened>), Error> {
    let indices = layers.iter().map(|layer| {
        let index = Index::parse(&layer.index, &layer.index_path)?;
        // Checked before anything is allocated by their size.
        match index
            .regions()
            .iter()
            .map(|region| (GuestAddress(region.start), region.length))
            .eq(regions.iter().copied())
        {
            true => Ok(index),
            false => {
                Err(Error::Unsound { path: layer.index_path.clone(), why: "it is of a machine with other RAM".into() })
            }
        }
    });
    let indices = indices.collect::<Result<Vec<_>, Error>>()?;
    let open = |(layer, index): (&Layer, _)| Ok((index, File::open(&layer.memory).at("open", &layer.memory)?));
    let chain = layers.iter().zip(&indices).map(open).collect::<Result<Vec<_>, Error>>()?;
    let opened = |(layer, (_, file)): (&Layer, &(_, File))| {
        let found = file.metadata().at("look at", &layer.memory)?;
        Ok(Opened { path: layer.memory.clone(), device: found.dev(), inode: found.ino() })
    };
    let files = layers.iter().zip(&chain).map(opened).collect::<Result<_, Error>>()?;
    Ok((memory_file::load(&chain)?, files))
}
