//! Taking a snapshot, all of it: the guest's part is the machine's ([`Machine::capture`]); around it come the
//! freeze of a quiesced one, digests, the manifest, and the way into the store.
//!
//! Nothing is seen of a snapshot before the one rename that publishes it. Whatever fails before that, the folder
//! in which it was made goes away, and the guest runs on.
//!
//! [`Machine::capture`]: crate::machine::Machine::capture

use std::fs;
use std::io;
use std::ops::ControlFlow;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, TryLockError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use catnap_guest::protocol as agent;

use super::failure::{Code, Failure};
use super::host::Guest;
use super::protocol::{Mode, Moments, SnapshotRequest, Taken};
use crate::disk::{self, Access, Format, Reach};
use crate::kvm::Shown;
use crate::machine::{self, CapturedMemory, Drive, Files, Phase, Progress, Shape, Size, State, Visitor};
use crate::snapshot::memory::{DATA, INDEX};
use crate::snapshot::{self, Digest, Disk, Kind, Manifest, MemoryInfo, Role, STATE};
use crate::spec::Ephemeral;
use crate::store::{self, Reserved, Snapshot, Staging, Store};
use crate::sys::files::At;
use crate::sys::process;

/// The longest time that filesystems stay frozen, in seconds. The capture takes milliseconds; the rest is for
/// a host that is busy.
const FREEZE: u32 = 20;
/// How long the agent may take to freeze: its hooks have ten seconds.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long it may take to thaw; what is under way then is done all the same.
const THAW_PATIENCE: Duration = Duration::from_secs(5);

/// How long a guest that is to ring may take.
const DOORBELL: Duration = Duration::from_secs(300);
/// How often it is seen meanwhile whether anybody still wants the snapshot.
const GLANCE: Duration = Duration::from_millis(50);

/// After so many differences of memory comes a full one again, so that no wake has to look through more.
const LONGEST_CHAIN: usize = 16;
/// So many layers of a machine's own are made one. A chain may have 64 files (`disk::MAX_LAYERS`), and each costs
/// a descriptor and some memory.
const MANY_LAYERS: usize = 16;
/// From so many files on, what a machine's disk lies over becomes one layer of its own, in the next snapshot too: those
/// are the layers of snapshots that were woken and snapshotted again and again. At [`disk::MAX_LAYERS`] it would be over.
const MANY_FILES: usize = 40;

/// What must be known of a machine to keep snapshots of it.
pub struct Keeper {
    /// Where they go.
    pub store: Store,
    /// Whose they are.
    pub machine: store::Machine,
    /// What the machine was built from.
    pub files: Files,
}

/// Hears of progress and says whether to go on.
pub type Watch<'a> = &'a dyn Fn(Progress) -> ControlFlow<()>;

/// There is one at a time, from its freeze until it is there.
static TURN: Mutex<()> = Mutex::new(());

/// Waits for the turn; ends early when nobody wants it any more, or the guest has ended.
fn my_turn(guest: &dyn Guest, watch: Watch<'_>) -> Result<MutexGuard<'static, ()>, Failure> {
    loop {
        if let State::Ended(_) = guest.state() {
            return Err(machine::Error::Ended.into());
        }
        match TURN.try_lock() {
            Ok(turn) => return Ok(turn),
            Err(TryLockError::Poisoned(turn)) => return Ok(turn.into_inner()),
            Err(TryLockError::WouldBlock) => {}
        }
        if watch(Progress { phase: Phase::Turn, done: 0, total: 0 }).is_break() {
            return Err(machine::Error::Cancelled.into());
        }
        thread::sleep(GLANCE);
    }
}

/// A snapshot that is being put together.
struct Draft<'a> {
    keeper: &'a Keeper,
    staging: Staging,
    /// Its name, which nobody else gets meanwhile.
    _name: Reserved,
    /// The snapshot that this one follows.
    previous: Snapshot,
    manifest: Manifest,
    begun: Instant,
}

impl Keeper {
    /// Takes a snapshot of a machine that runs or is paused.
    pub fn take(&self, guest: &dyn Guest, request: &SnapshotRequest, watch: Watch<'_>) -> Result<Taken, Failure> {
        let kind = match request.mode {
            Mode::Live => Kind::Live,
            Mode::Crash => Kind::Crash,
            Mode::Quiesced => Kind::Quiesced,
        };
        if self.is_deep()
            && let Ok(_turn) = my_turn(guest, watch)
            && let Err(failure) = guest.flatten_disk(Reach::All)
        {
            tracing::warn!("the disk lies over many snapshots still: {failure}");
        }
        let mut draft = self.draft(kind, request)?;
        let mut visitor = if request.at_doorbell { Some(await_ring(guest, watch)?) } else { None };
        if request.mode == Mode::Quiesced {
            // What is in the middle of something must come to its end before it can hold still.
            visitor = None;
        }
        // Before the freeze: who waits for another's snapshot frozen, waits longer than a freeze lasts.
        let _turn = my_turn(guest, watch)?;
        draft.follow_the_last()?;
        let frozen = match request.mode {
            Mode::Quiesced => Some(Frozen::freeze(guest)?),
            Mode::Live | Mode::Crash => None,
        };
        let may_lie_over = |base: &Digest| self.chain_length(base).is_some_and(|length| length < LONGEST_CHAIN);
        let captured = guest.capture(draft.staging.dir(), request.mode == Mode::Live, &may_lie_over, watch);
        drop(visitor);
        let still_frozen = frozen.map(Frozen::thaw);
        let captured = captured?;
        still_frozen.transpose()?;
        if let Some(memory) = &captured.memory {
            draft.add_memory(memory)?;
        }
        draft.shape(captured.size, &captured.shape);
        draft.manifest.cpu = captured.cpu.as_ref().map(of_cpu);
        draft.manifest.ephemeral = captured.drives.iter().map(of_drive).collect();
        let moments =
            Moments { paused_us: captured.paused_at_us, written_us: process::monotonic_us(), published_us: 0 };
        let (pause_us, bytes) = (captured.pause_us, captured.memory.map_or(0, |memory| memory.bytes));
        let (mut taken, digest) = draft.publish(&request.name, pause_us, bytes, watch)?;
        captured.commit(digest);
        taken.moments = Moments { published_us: process::monotonic_us(), ..moments };
        Ok(taken)
    }

    /// Makes one layer of many under the disk of a running machine, when it has too many of its own.
    pub fn flatten_if_long(&self, guest: &dyn Guest) {
        let Ok(_turn) = my_turn(guest, &|_| ControlFlow::Continue(())) else { return };
        let long = self.machine.disk_layers().is_ok_and(|(layers, _)| layers.len() >= MANY_LAYERS);
        if let Err(failure) = if long { guest.flatten_disk(Reach::Own) } else { Ok(()) } {
            tracing::warn!("the disk keeps its many layers: {failure}");
        }
    }

    /// Whether the disk lies over so many files that before long no further one can come.
    fn is_deep(&self) -> bool {
        disk::depth(&self.files.disk, &self.files.disk_root).is_ok_and(|files| files >= MANY_FILES)
    }

    /// How many memories lie over each other in this one; `None` when one of them is gone.
    fn chain_length(&self, base: &Digest) -> Option<usize> {
        let base = self.store.resolve(&base.to_string()).ok()?;
        Some(self.store.memory_chain(&base).ok()?.len())
    }

    /// Takes a snapshot of the disk of a machine that does not run, whose lock the caller holds: `clean` when it was shut
    /// down in good order, and otherwise `crash`.
    pub fn take_resting(&self, kind: Kind, request: &SnapshotRequest, watch: Watch<'_>) -> Result<Taken, Failure> {
        if self.is_deep() {
            self.flatten_at_rest()?;
        }
        let mut draft = self.draft(kind, request)?;
        disk::prepare(&self.files.disk, &self.files.disk_root)?.keep();
        for layer in disk::own_layers(&self.files.disk)?.layers {
            share(&layer, &draft.staging.dir().join(layer.file_name().unwrap_or_default()))?;
        }
        let spec = &self.machine.spec;
        draft.shape(Size { cpus: spec.cpus, memory: spec.memory.bytes() }, &Shape::of(spec));
        draft.manifest.ephemeral = spec.ephemeral.iter().enumerate().map(of_spec).collect();
        draft.publish(&request.name, 0, 0, watch).map(|(taken, _)| taken)
    }

    /// Makes one layer of all those that the disk of a machine that is shut down lies over.
    fn flatten_at_rest(&self) -> Result<(), Failure> {
        let (top, root) = (&self.files.disk, &self.files.disk_root);
        let mut disk = disk::open(top, Format::Qcow2, Access::ReadWrite, root)?;
        if let Some(mut flattened) = disk::flatten(top, root, Reach::All)? {
            disk.adopt(&mut flattened)?;
            flattened.remove_old()?;
        }
        Ok(())
    }

    fn draft(&self, kind: Kind, request: &SnapshotRequest) -> Result<Draft<'_>, Failure> {
        let begun = Instant::now();
        let name = self.store.reserve(&request.name)?;
        self.store.check_free(&request.name)?;
        let staging = self.store.stage()?;
        let previous = self.previous()?;
        let mut manifest = Manifest::new(kind, &request.name, now());
        manifest.note = request.note.clone();
        manifest.parent = Some(previous.digest);
        manifest.host = host_facts();
        let boot = [(Some(&self.files.kernel), "kernel"), (self.files.initrd.as_ref(), "initrd")];
        for (path, name) in boot.into_iter().filter_map(|(path, name)| path.map(|path| (path, name))) {
            share(path, &staging.dir().join(name))?;
        }
        Ok(Draft { keeper: self, staging, _name: name, previous, manifest, begun })
    }

    /// What a snapshot that is taken now follows. Lineage is a tale, not a need: the last snapshot may have been removed
    /// since.
    fn previous(&self) -> Result<Snapshot, Failure> {
        let last = self.machine.last_snapshot()?;
        Ok(self.store.resolve(&last).or_else(|_| self.store.resolve(&self.machine.spec.image))?)
    }
}

impl Draft<'_> {
    /// Follows the one that came before its turn, if one did.
    fn follow_the_last(&mut self) -> Result<(), Failure> {
        if self.keeper.machine.last_snapshot()? != self.previous.digest.to_string() {
            self.previous = self.keeper.previous()?;
            self.manifest.parent = Some(self.previous.digest);
        }
        Ok(())
    }

    fn add_memory(&mut self, memory: &CapturedMemory) -> Result<(), Failure> {
        self.manifest.memory = Some(MemoryInfo { parent: memory.parent, bytes: memory.bytes });
        Ok(())
    }

    /// What the machine is like.
    fn shape(&mut self, size: Size, shape: &Shape) {
        self.manifest.machine = Some(snapshot::Machine {
            cpus: size.cpus,
            memory: size.memory,
            max_cpus: shape.max_cpus,
            max_memory: shape.max_memory,
            boot_memory: shape.boot_memory,
            cmdline: self.keeper.files.cmdline.split(' ').filter(tells_nobody).collect::<Vec<_>>().join(" "),
            append: self.keeper.machine.spec.append.clone(),
            cpu_baseline: self.keeper.machine.spec.cpu_baseline,
        });
    }

    /// Digests all files, writes the manifest, and lets the snapshot appear.
    fn publish(mut self, name: &str, pause_us: u64, bytes: u64, watch: Watch<'_>) -> Result<(Taken, Digest), Failure> {
        let dir = self.staging.dir().to_owned();
        let names = crate::sys::files::names_in(&dir).map_err(failed)?;
        let size = |name: &String| fs::metadata(dir.join(name)).map_or(0, |file| file.len());
        let (mut done, total) = (0, names.iter().map(size).sum());
        for name in &names {
            let (mut now, mut cancelled) = (done, false);
            let mut tell = |bytes| {
                now += bytes;
                cancelled = watch(Progress { phase: Phase::Digests, done: now, total }).is_break();
                if cancelled { Err(io::Error::other("cancelled")) } else { Ok(()) }
            };
            let described =
                tell(0).at("digest", &dir).map_err(failed).and_then(|()| self.describe(&dir, name, &mut tell));
            if cancelled {
                return Err(machine::Error::Cancelled.into());
            }
            self.manifest.files.push(described?);
            done += size(name);
        }
        self.manifest.disks.push(self.disk(&dir)?);
        let (store, kind) = (&self.keeper.store, self.manifest.kind);
        let snapshot = store.publish(self.staging, &self.manifest, name)?;
        // It is there, whatever becomes of the tale.
        if let Err(error) = self.keeper.machine.set_last_snapshot(&snapshot.digest) {
            tracing::warn!("the next snapshot will not be known as a child of {name}: {error}");
        }
        let taken = Taken {
            name: name.into(),
            digest: snapshot.digest.to_string(),
            kind,
            pause_us,
            bytes_written: bytes,
            duration_ms: self.begun.elapsed().as_millis() as u64,
            moments: Moments::default(),
        };
        Ok((taken, snapshot.digest))
    }

    /// A file's entry in the manifest. A file that is the previous snapshot's too was digested then.
    fn describe(
        &self,
        dir: &Path,
        name: &str,
        watch: &mut dyn FnMut(u64) -> io::Result<()>,
    ) -> Result<snapshot::File, Failure> {
        let role = match name {
            "kernel" => Role::Kernel,
            "initrd" => Role::Initrd,
            STATE => Role::State,
            DATA => Role::Memory,
            INDEX => Role::MemoryIndex,
            _ => Role::Disk,
        };
        let mine = fs::metadata(dir.join(name)).at("look at", &dir.join(name)).map_err(failed)?;
        let same = |file: &&snapshot::File| {
            let there = fs::metadata(self.previous.dir.join(&file.name));
            file.role == role && there.is_ok_and(|there| (there.dev(), there.ino()) == (mine.dev(), mine.ino()))
        };
        match self.previous.manifest.files.iter().find(same) {
            Some(known) if known.size == mine.len() => Ok(snapshot::File { name: name.into(), ..known.clone() }),
            _ => snapshot::describe_watched(dir, name, role, watch).map_err(failed),
        }
    }

    /// The root disk: its top layer, and what the lowest lies over.
    fn disk(&self, dir: &Path) -> Result<Disk, Failure> {
        let (layers, backing) = self.keeper.machine.disk_layers()?;
        let top = layers.last().and_then(|top| top.file_name()?.to_str());
        let top = top.ok_or_else(|| Failure::new(Code::Failed, "the disk has no layer to keep"))?;
        Ok(Disk {
            device: "root".into(),
            file: top.into(),
            format: "qcow2".into(),
            virtual_size: disk::Header::read(&dir.join(top))?.size,
            backing: Some(backing),
        })
    }
}

/// Waits until the guest stands at the door.
fn await_ring(guest: &dyn Guest, watch: Watch<'_>) -> Result<Visitor, Failure> {
    let armed = guest.arm_doorbell().ok_or_else(|| {
        Failure::new(Code::Refused, "another snapshot waits for the guest to ring already").hint("wait for that one")
    })?;
    let (begun, waiting) = (Instant::now(), Progress { phase: Phase::Doorbell, done: 0, total: 0 });
    while begun.elapsed() < DOORBELL {
        if let Some(visitor) = armed.visitor(GLANCE) {
            tracing::info!("the guest rang: {:.200}", visitor.at.escape_debug().to_string());
            return Ok(visitor);
        }
        if watch(waiting).is_break() {
            return Err(machine::Error::Cancelled.into());
        }
        if let State::Ended(_) = guest.state() {
            return Err(machine::Error::Ended.into());
        }
    }
    let seconds = DOORBELL.as_secs();
    Err(Failure::new(Code::Failed, format!("the guest did not ring within {seconds} seconds"))
        .hint("leave --at-doorbell away: then it is taken at once"))
}

/// Filesystems that the agent has frozen. Whatever becomes of this value, they thaw: by word, or by the agent's
/// own clock.
struct Frozen<'g> {
    guest: &'g dyn Guest,
    /// When the freeze was asked for: the agent counts from a later time.
    since: Instant,
}

impl<'g> Frozen<'g> {
    fn freeze(guest: &'g dyn Guest) -> Result<Frozen<'g>, Failure> {
        let refuse = |why: String| {
            Failure::new(Code::Failed, format!("the guest cannot be quiesced: {why}"))
                .hint("--mode crash takes the disk as it is; --mode live takes memory too")
        };
        if guest.state() == State::Paused {
            let why = "the machine is paused, so its agent cannot freeze the filesystems";
            return Err(Failure::new(Code::Refused, why).hint("catnap resume; or --mode crash, or --mode live"));
        }
        let since = Instant::now();
        match ask(guest, &agent::Request::Freeze { seconds: FREEZE }, PATIENCE) {
            Ok(agent::Reply::Ok) => Ok(Frozen { guest, since }),
            Ok(agent::Reply::Error(why)) => Err(refuse(why)),
            Ok(other) => Err(refuse(format!("its agent says {other:?}"))),
            Err(error) => {
                // It may freeze yet.
                drop(Frozen { guest, since });
                Err(refuse(format!("its agent does not answer ({error})")))
            }
        }
    }

    /// Ends it. Fails when it may have ended by itself before.
    fn thaw(self) -> Result<(), Failure> {
        match self.since.elapsed().as_secs() < u64::from(FREEZE) {
            true => Ok(()),
            false => Err(Failure::new(
                Code::Failed,
                format!("the snapshot took longer than the {FREEZE} seconds for which filesystems stay frozen"),
            )
            .hint("try again when the host is less busy")),
        }
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        match ask(self.guest, &agent::Request::Thaw, THAW_PATIENCE) {
            Ok(agent::Reply::Ok) => {}
            other => tracing::warn!("the guest thaws by itself within {FREEZE} seconds: {other:?}"),
        }
    }
}

fn ask(guest: &dyn Guest, request: &agent::Request, patience: Duration) -> io::Result<agent::Reply> {
    let mut stream = guest.agent()?;
    stream.set_read_timeout(Some(patience))?;
    agent::write_line(&mut stream, request)?;
    agent::read_line(&mut stream)
}

/// That a disk was there, and nothing of what was on it.
fn of_drive(drive: &Drive) -> snapshot::Ephemeral {
    snapshot::Ephemeral { device: drive.bay.clone(), size: drive.size, at: drive.at.clone() }
}

/// The same of a machine that is off: what it would start with.
fn of_spec((bay, disk): (usize, &Ephemeral)) -> snapshot::Ephemeral {
    snapshot::Ephemeral { device: format!("bay{bay}"), size: disk.size.bytes(), at: disk.at.clone() }
}

/// Whether a word of a command line does not say who the machine is: that is nobody's business whom a copy is given.
fn tells_nobody(word: &&str) -> bool {
    !word.starts_with("catnap.machine_id=")
}

/// What a host must have for the guest to go on there.
fn of_cpu(shown: &Shown) -> snapshot::Cpu {
    let cpu = shown.cpu();
    let features = cpu.features.into_iter().map(str::to_owned).collect();
    snapshot::Cpu { vendor: cpu.vendor, features, tsc_khz: shown.tsc_khz }
}

/// What people may want to know of this host, and nobody else needs.
fn host_facts() -> serde_json::Map<String, serde_json::Value> {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let facts = [("kernel", kernel.trim()), ("catnap", env!("CARGO_PKG_VERSION"))];
    facts.map(|(name, fact)| (name.to_owned(), fact.into())).into_iter().collect()
}

/// Makes a file appear in the draft without copying it, where that is possible.
fn share(path: &Path, to: &Path) -> Result<(), Failure> {
    match fs::hard_link(path, to) {
        Ok(()) => Ok(()),
        Err(_) => fs::copy(path, to).map(drop).at("copy", path).map_err(failed),
    }
}

fn failed(error: crate::sys::files::Error) -> Failure {
    Failure::new(Code::Failed, error.to_string())
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}
