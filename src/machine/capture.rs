//! Taking a snapshot of a machine that runs: the part that needs the machine.
//!
//! ```text
//!  prepare            stand_still     take_moment                  resume    finish
//!  new overlay,  ──▶  vCPUs,     ──▶  devices, vCPUs, VM;  ──▶        ──▶ the old overlay is sealed,
//!  empty files        devices         disk swapped; fork                  the child writes memory
//! ```
//!
//! The guest stands still only from `pause` to `resume`, for work that depends neither on the disk's speed nor
//! (but for the page tables that `fork` copies) on the size of its memory.
//!
//! Which pages changed is known from KVM's dirty log and from the bits that devices set. [`Tracking`] keeps this
//! invariant: *memory equals that of `base`, but for the pages that are dirty in KVM's log or in the bits.* A
//! snapshot that comes to nothing puts what it took out back into the bits.

use std::fs::{File, OpenOptions};
use std::ops::ControlFlow;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::MutexGuard;
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vm_memory::GuestMemoryBackend;

use super::memory_file::{Plan, Writing};
use super::wake::{VCPU_VERSION, VM_VERSION};
use super::{Drive, Error, Machine, Shape, Size, State, lock};
use crate::disk::{self, Prepared, Reach};
use crate::kvm::{Shown, Vm};
use crate::mem::{Dirty, GuestMemory};
use crate::snapshot::{Digest, MachineState, STATE, memory};
use crate::sys::files::{self, At};
use crate::sys::process;

/// How often progress is told while memory is written.
const TICK: Duration = Duration::from_millis(20);

/// What is known of the pages that changed since the last snapshot.
#[derive(Default)]
pub struct Tracking {
    /// The snapshot whose memory is the one to compare with.
    pub(super) base: Option<Digest>,
}

/// KVM's log of pages. Reading it empties it, so whoever does holds this until what was read is where the next
/// snapshot finds it.
#[derive(Default)]
pub struct Log {
    /// Whether KVM logs. Not from the start: it costs the guest a fault per page, and most machines are never
    /// snapshotted.
    pub(super) on: bool,
}

impl Tracking {
    /// For a machine that wakes from `base`.
    pub fn since(base: Digest, vm: &Vm) -> Result<(Tracking, Log), Error> {
        vm.log_dirty_pages()?;
        Ok((Tracking { base: Some(base) }, Log { on: true }))
    }
}

/// What a snapshot is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Another snapshot of the machine is under way.
    Turn,
    /// The guest has not rung yet.
    Doorbell,
    /// Memory is being written.
    Memory,
    /// Everything is there and is being digested.
    Digests,
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// What it is at.
    pub phase: Phase,
    /// Bytes done, of how many.
    pub done: u64,
    /// See `done`.
    pub total: u64,
}

/// Hears of progress, and says whether to go on.
pub type Watch<'a> = &'a dyn Fn(Progress) -> ControlFlow<()>;

/// A snapshot's files, taken and not yet published. Dropped without [`Captured::commit`], it counts as failed,
/// and no changed page is forgotten.
pub struct Captured<'m> {
    /// When it was to stand still, in microseconds of the host's CLOCK_MONOTONIC.
    pub paused_at_us: u64,
    /// How long the guest stood still, in microseconds; 0 when it was paused anyway.
    pub pause_us: u64,
    /// The machine's size at that instant.
    pub size: Size,
    /// What it can be without another boot.
    pub shape: Shape,
    /// The disks that live in the host's memory: that they are there.
    pub drives: Vec<Drive>,
    /// The CPU that it was shown, when memory was wanted.
    pub cpu: Option<Shown>,
    /// Memory, when it was wanted.
    pub memory: Option<CapturedMemory>,
    tracking: MutexGuard<'m, Tracking>,
    mem: &'m GuestMemory,
    taken: Option<Dirty>,
}

/// What was written of a machine's memory.
#[derive(Clone, Copy, Debug)]
pub struct CapturedMemory {
    /// The snapshot that it is a difference to.
    pub parent: Option<Digest>,
    /// Bytes of data that were written.
    pub bytes: u64,
}

impl Captured<'_> {
    /// The snapshot is in the store as `digest`: what changes from now on changes since then.
    pub fn commit(mut self, digest: Digest) {
        if self.memory.is_some() {
            self.taken = None;
            self.tracking.base = Some(digest);
        }
    }
}

impl Drop for Captured<'_> {
    fn drop(&mut self) {
        if let Some(taken) = self.taken.take() {
            taken.put_back(self.mem);
        }
    }
}

/// What was had while the guest stood still.
struct Moment {
    size: Size,
    state: Option<MachineState>,
    parent: Option<Digest>,
    writing: Option<Writing>,
    taken: Option<Dirty>,
}

/// A machine that stands still. Dropped, it goes on if it ran before.
struct Still<'m> {
    machine: &'m Machine,
    since: Instant,
    ran: bool,
    _alone: MutexGuard<'m, ()>,
}

impl Machine {
    /// Takes the disk, and with `with_memory` the machine's state and memory, into the folder `dir`: the state
    /// as `machine.state`, memory as `memory` and `memory.index`, the sealed layers of the disk under their
    /// names. When it fails, the machine runs on as if nothing had been, but for one more layer under its disk.
    ///
    /// Memory is a difference to that of the last snapshot if `may_lie_over` says so of it.
    pub fn capture(
        &self,
        dir: &Path,
        with_memory: bool,
        may_lie_over: &dyn Fn(&Digest) -> bool,
        watch: Watch<'_>,
    ) -> Result<Captured<'_>, Error> {
        // A guest that stands still writes nothing.
        if with_memory && self.state() == State::Running {
            self.bays.sync();
        }
        let mut tracking = lock(&self.tracking);
        tracking.base = tracking.base.filter(may_lie_over);
        let mut prepared = disk::prepare(&self.files.disk, &self.files.disk_root)?;
        let files = match with_memory {
            true => Some((create(dir, memory::DATA)?, create(dir, memory::INDEX)?)),
            false => None,
        };
        // Before the pause, so that nobody who looks at the log makes it longer.
        let mut log = lock(&self.log);
        let still = self.stand_still()?;
        let paused_at_us = process::monotonic_us().saturating_sub(still.since.elapsed().as_micros() as u64);
        let moment = self.take_moment(&tracking, &mut log, &mut prepared, files);
        let pause = still.go_on();
        drop(log);
        let mut moment = moment?;
        // From here on, whatever fails, the pages that were taken are put back.
        let mut captured = Captured {
            paused_at_us,
            pause_us: pause?.as_micros() as u64,
            size: moment.size,
            shape: self.shape,
            drives: self.drives(),
            cpu: self.vm.shown().filter(|_| with_memory).cloned(),
            memory: None,
            taken: moment.taken.take(),
            mem: &self.mem,
            tracking,
        };
        lock(&self.devices.root).device_mut().seal_disk()?;
        for layer in disk::own_layers(&self.files.disk)?.layers {
            let to = dir.join(layer.file_name().unwrap_or_default());
            std::fs::hard_link(&layer, &to).at("link", &to)?;
        }
        if let Some(state) = moment.state {
            let path = dir.join(STATE);
            std::fs::write(&path, state.to_bytes()?).at("write", &path)?;
        }
        if let Some(writing) = moment.writing {
            let bytes = wait(writing, watch, &dir.join(memory::DATA))?;
            captured.memory = Some(CapturedMemory { parent: moment.parent, bytes });
        }
        Ok(captured)
    }

    /// Everything that must be of one instant. The order: devices before vCPUs and the VM, because completing
    /// their work raises interrupts; the log right before the fork, so that it tells of all that the child sees.
    fn take_moment(
        &self,
        tracking: &Tracking,
        log: &mut Log,
        prepared: &mut Prepared,
        files: Option<(File, File)>,
    ) -> Result<Moment, Error> {
        let state = match files {
            Some(_) => Some(self.save()?),
            None => None,
        };
        lock(&self.devices.root).device_mut().swap_disk(prepared)?;
        let mut moment = Moment { size: self.size(), state, parent: None, writing: None, taken: None };
        let Some((data, index)) = files else { return Ok(moment) };
        let plan = match tracking.base.filter(|_| log.on) {
            Some(base) => {
                let taken = Dirty::take(&self.mem, &self.take_logs()?)?;
                let plan = Plan::changed(&self.mem, &taken);
                (moment.parent, moment.taken) = (Some(base), Some(taken));
                plan
            }
            // All of it is written, so whatever was noted before is of no use.
            None => {
                if log.on {
                    self.take_logs()?;
                }
                Dirty::forget(&self.mem);
                Plan::full(&self.mem)
            }
        };
        let writing = plan.and_then(|plan| plan.spawn(data, index));
        match writing {
            Ok(writing) => moment.writing = Some(writing),
            Err(error) => {
                if let Some(taken) = moment.taken {
                    taken.put_back(&self.mem);
                }
                return Err(error.into());
            }
        }
        // After the fork, which has made KVM let go of all its pages: so there are none to protect one by one.
        if !log.on {
            self.vm.log_dirty_pages()?;
            log.on = true;
        }
        Ok(moment)
    }

    /// KVM's log of each region, which begins anew. When one cannot be had, those before it are kept for the next time.
    fn take_logs(&self) -> Result<Vec<Vec<u64>>, Error> {
        let mut logs = Vec::new();
        for (slot, region) in self.mem.iter().enumerate() {
            match self.vm.take_dirty_log(slot, region) {
                Ok(log) => logs.push(log),
                Err(error) => {
                    self.mem.iter().zip(logs).for_each(|(region, log)| Dirty::absorb(region, log));
                    return Err(error.into());
                }
            }
        }
        Ok(logs)
    }

    /// Makes one layer of those under the disk, while the guest runs. Layers that snapshots hold stay theirs.
    pub fn flatten_disk(&self, reach: Reach) -> Result<(), Error> {
        // No snapshot meanwhile: it would add a layer to those that are being read.
        let _tracking = lock(&self.tracking);
        if let Some(mut flattened) = disk::flatten(&self.files.disk, &self.files.disk_root, reach)? {
            lock(&self.devices.root).device_mut().adopt_flattened(&mut flattened)?;
            flattened.remove_old()?;
        }
        Ok(())
    }

    pub(super) fn save(&self) -> Result<MachineState, Error> {
        let mut state = MachineState::default();
        self.devices.states().put(&mut state)?;
        let (vm, vcpus) = self.vm.save(&self.team.vcpus())?;
        state.put("vm", VM_VERSION, &vm)?;
        vcpus.iter().try_for_each(|vcpu| state.put("vcpu", VCPU_VERSION, vcpu))?;
        Ok(state)
    }

    fn stand_still(&self) -> Result<Still<'_>, Error> {
        let alone = lock(&self.pausing);
        let ran = self.team.running();
        if ran {
            // What a device is at may take as long as a disk takes; the guest runs on meanwhile.
            self.gate.close();
        }
        let since = Instant::now();
        if ran && !self.team.pause() {
            self.gate.open();
        }
        match self.state() {
            State::Ended(_) => Err(Error::Ended),
            _ => Ok(Still { machine: self, since, ran, _alone: alone }),
        }
    }
}

impl Still<'_> {
    /// Lets the machine go on if it ran before; says for how long it stood still.
    fn go_on(mut self) -> Result<Duration, Error> {
        let (ran, resumed) = (self.ran, self.resume());
        let paused = self.since.elapsed();
        if !resumed {
            return Err(Error::Ended);
        }
        Ok(if ran { paused } else { Duration::ZERO })
    }

    fn resume(&mut self) -> bool {
        if !std::mem::take(&mut self.ran) {
            return true;
        }
        self.machine.gate.open();
        self.machine.team.resume()
    }
}

impl Drop for Still<'_> {
    fn drop(&mut self) {
        self.resume();
    }
}

/// Waits for the child, telling how far it is; gives the number of bytes that it wrote.
fn wait(mut writing: Writing, watch: Watch<'_>, path: &Path) -> Result<u64, Error> {
    loop {
        let now = writing.progress();
        if watch(Progress { phase: Phase::Memory, done: now.scanned, total: now.total }).is_break() {
            return Err(Error::Cancelled);
        }
        let written = writing.try_wait().map_err(|source| Error::Write { path: path.into(), source })?;
        if let Some(written) = written {
            return Ok(written.written);
        }
        thread::sleep(TICK);
    }
}

fn create(dir: &Path, name: &str) -> Result<File, files::Error> {
    let path = dir.join(name);
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path).at("make", &path)
}
