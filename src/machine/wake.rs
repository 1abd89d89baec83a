//! What a machine wakes from: its state and its memory, read from a snapshot and from those that it is a
//! difference to, all of it checked before KVM is asked for anything.

use std::fs::File;
use std::path::{Path, PathBuf};

use vm_memory::GuestAddress;

use super::states::DeviceStates;
use super::{Error, memory_file};
use crate::kvm::{VcpuState, VmState};
use crate::mem::GuestMemory;
use crate::snapshot::memory::Index;
use crate::snapshot::{Digest, MachineState};
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
}

impl Saved {
    /// Reads the state (the bytes of the file `path`) and maps the memory of the snapshot `base`, whose `layers`
    /// begin with a full one, for a machine with RAM in `regions` (address and length in bytes).
    pub fn new(
        base: Digest,
        path: &Path,
        state: &[u8],
        layers: &[Layer],
        regions: &[(GuestAddress, u64)],
    ) -> Result<Saved, Error> {
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
        if vcpus.is_empty() {
            return Err(unsound("it has no vCPUs".into()));
        }
        Ok(Saved { vm, vcpus, devices, memory: map(layers, regions)?, base })
    }

    /// How many vCPUs it has.
    pub fn cpus(&self) -> u32 {
        self.vcpus.len() as u32
    }
}

/// The versions of the states of the VM and of a vCPU.
pub(super) const VM_VERSION: u32 = 1;
pub(super) const VCPU_VERSION: u32 = 1;

/// Maps what the layers come to when they are laid over each other, for a machine with RAM in `regions`.
fn map(layers: &[Layer], regions: &[(GuestAddress, u64)]) -> Result<GuestMemory, Error> {
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
    memory_file::load(&chain)
}
