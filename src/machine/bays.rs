//! The bays of a machine that runs: media are put in and taken out, and the guest's agent is asked to mount and
//! unmount them.
//!
//! Of a bay, three know something: the device what the guest sees, [`Media`] which file is behind it, and the agent
//! what is mounted. Whoever changes one changes all three, and holds `work` meanwhile, so that nobody else does.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::{Duration, Instant};

use catnap_guest::protocol::{AGENT_PORT, Reply, Request, WakeDisk, read_line, write_line};

use super::greeting::Greeting;
use super::lock;
use super::media::{BAYS, Drive, Media, Seat, Standing, name};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::bay::{Bay, BayState, MediumState};
use crate::devices::virtio::mmio::Mmio;
use crate::devices::virtio::vsock::Handle;
use crate::disk::{self, Mark};
use crate::spec::Ephemeral;
use crate::sys::thread::small;

/// How long the agent may take to make a filesystem and mount it, or to unmount one.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a snapshot waits for the guest to write what it holds back.
const SYNCING: Duration = Duration::from_secs(10);
/// How long a guest that boots may take until its agent can be asked. One that is slower mounts nothing.
const BOOTING: Duration = Duration::from_secs(600);

/// Why a medium cannot be put in or taken out.
#[derive(Debug, thiserror::Error)]
pub enum BayError {
    /// No folder is on a tmpfs.
    #[error("this host has no tmpfs for an ephemeral disk: neither the runtime folder nor /dev/shm is one")]
    NoTmpfs,
    /// The medium could not be made.
    #[error(transparent)]
    Disk(#[from] disk::Error),
    /// Something is mounted there already.
    #[error("an ephemeral disk is on {0} already")]
    Taken(String),
    /// All bays are in use.
    #[error("all {BAYS} bays of the machine are in use")]
    Full,
    /// The machine woke from a snapshot of one without bays.
    #[error("the machine has no bays")]
    NoBays,
    /// Nothing of that name is there.
    #[error("there is no ephemeral disk {0}")]
    NotThere(String),
    /// The guest uses it.
    #[error("the guest does not let go of it: {0}")]
    Busy(String),
    /// The agent could not do it.
    #[error("the guest's agent could not {doing}: {why}")]
    Agent {
        /// What it was asked for.
        doing: &'static str,
        /// What it said.
        why: String,
    },
}

/// The bays of one boot of a machine.
pub(super) struct Bays {
    devices: Vec<Arc<Mutex<Mmio<Bay>>>>,
    media: Arc<Media>,
    vsock: Handle,
    /// Held while something changes.
    work: Mutex<()>,
    /// Whether the agent has been asked for all that it has to mount. Until then it counts as not ready.
    settled: (Mutex<bool>, Condvar),
}

impl Bays {
    pub(super) fn new(devices: Vec<Arc<Mutex<Mmio<Bay>>>>, media: Arc<Media>, vsock: Handle) -> Arc<Bays> {
        Arc::new(Bays { devices, media, vsock, work: Mutex::default(), settled: (Mutex::new(true), Condvar::new()) })
    }

    /// What the bays hold.
    pub(super) fn drives(&self) -> Vec<Drive> {
        self.media.drives(&self.states())
    }

    /// What the guest knows of the media in them.
    pub(super) fn states(&self) -> Vec<BayState> {
        self.devices.iter().map(|device| lock(device).device().state()).collect()
    }

    /// Puts a blank medium in and has the agent, if it is `ready`, mount it.
    pub(super) fn attach(&self, wanted: &Ephemeral, ready: bool) -> Result<(), BayError> {
        let _work = lock(&self.work);
        if self.drives().iter().any(|drive| drive.at == wanted.at) {
            return Err(BayError::Taken(wanted.at.clone()));
        }
        let mut refused = BayError::Full;
        for bay in self.usable(ready)? {
            match self.fill(bay, wanted, ready) {
                Ok(()) => return Ok(()),
                // Somebody may still hold what was in this bay; the next one is as good.
                Err(error) => {
                    self.empty_out(bay);
                    refused = error;
                }
            }
        }
        Err(refused)
    }

    /// Takes the medium out of the bay that is called `what` or mounted there, and with it all that is on it. The
    /// agent unmounts it first; `force` takes it out in any case.
    pub(super) fn detach(&self, what: &str, ready: bool, force: bool) -> Result<(), BayError> {
        let _work = lock(&self.work);
        let drive = self.drives().into_iter().find(|drive| drive.bay == what || drive.at == what);
        let drive = drive.ok_or_else(|| BayError::NotThere(what.into()))?;
        let bay = (0..BAYS).find(|bay| name(*bay) == drive.bay).unwrap_or_default();
        let said = match ready {
            true => ask(&self.vsock, &Request::Unmount { bay: drive.bay, force }),
            false => Err(io::Error::other("it is not there to be asked")),
        };
        match said {
            Ok(Reply::Ok) => {}
            _ if force => {}
            Ok(Reply::Error(why)) => return Err(BayError::Busy(why)),
            Ok(other) => return Err(BayError::Agent { doing: "unmount it", why: format!("{other:?}") }),
            Err(error) => return Err(BayError::Agent { doing: "unmount it", why: error.to_string() }),
        }
        self.empty_out(bay);
        Ok(())
    }

    /// Gives the media away to the process that takes the machine's place, as far as they hold what `marks` say.
    /// The machine must stand still. Gives how many.
    pub(super) fn give(&self, marks: &[Mark]) -> Result<usize, BayError> {
        let _work = lock(&self.work);
        let mut given = 0;
        for seat in self.media.seats().iter().flatten() {
            let (path, mark) = (seat.medium.path(), seat.medium.mark());
            // Out of the machine's own folder, which goes with the machine.
            if let (true, Some(to)) = (marks.contains(&mark), path.parent().and_then(|own| own.parent())) {
                given += usize::from(seat.medium.give(to, &mark)?);
            }
        }
        Ok(given)
    }

    /// Has the guest write everything to its media that it still holds back, so that a snapshot of its memory and
    /// what is in the bays are of one moment.
    pub(super) fn sync(&self) {
        if self.media.seats().iter().flatten().any(|seat| seat.standing == Standing::Mounted)
            && let Err(error) = ask_for(&self.vsock, &Request::SyncBays, SYNCING)
        {
            tracing::warn!("the guest holds back what it wrote to its ephemeral disks: {error}");
        }
    }

    /// What the agent is told of its disks when it woke.
    pub(super) fn told(&self) -> Vec<WakeDisk> {
        let told = |drive: Drive| WakeDisk { kept: drive.state != Standing::Lost, bay: drive.bay, at: drive.at };
        self.drives().into_iter().map(told).collect()
    }

    /// After a wake: puts blank media into the place of those that are lost. With an agent, which has let go of the
    /// old ones already.
    pub(super) fn replace_lost(&self, ready: bool) {
        let _work = lock(&self.work);
        let lost: Vec<usize> = (0..self.devices.len()).filter(|bay| self.is_lost(*bay)).collect();
        let mut free: Vec<usize> = (0..self.devices.len()).filter(|bay| self.is_empty(*bay)).collect();
        let mut let_go: Vec<usize> = lost.into_iter().filter(|bay| !ready || self.has_let_go(*bay)).collect();
        for wanted in self.media.wanted().to_vec() {
            if self.media.seats().iter().flatten().any(|seat| seat.at == wanted.at) {
                continue;
            }
            // Into the very bay, if it was that one's: the guest's kernel then sees no other size.
            let same = let_go.iter().position(|bay| self.was_at(*bay, &wanted.at));
            let bay = same.map(|at| let_go.remove(at)).or_else(|| free.pop()).or_else(|| let_go.pop());
            let done = match bay {
                Some(bay) => self.fill(bay, &wanted, ready).map(|()| bay),
                None => Err(BayError::Full),
            };
            match done {
                Ok(bay) => {
                    tracing::warn!("the ephemeral disk on {} is lost: a blank one took its place", wanted.at);
                    if let Some(seat) = &mut self.media.seats()[bay] {
                        seat.note.get_or_insert_with(|| "what was on it is lost: it is blank".into());
                    }
                }
                Err(error) => tracing::warn!("the ephemeral disk on {} is lost, and: {error}", wanted.at),
            }
        }
        let_go.into_iter().for_each(|bay| self.empty_out(bay));
    }

    /// Has a thread ask the agent, once it says hello, to mount what the machine boots with.
    pub(super) fn mount_at_hello(self: &Arc<Bays>, greeting: &Arc<Greeting>) -> io::Result<()> {
        if self.media.seats().iter().all(Option::is_none) {
            return Ok(());
        }
        *lock(&self.settled.0) = false;
        let (bays, greeting) = (Arc::downgrade(self), greeting.clone());
        small("bays").spawn(move || mount_when_ready(&bays, &greeting)).map(drop)
    }

    /// Waits up to `time` until all is mounted that the machine boots with, or could not be; says whether it is.
    pub(super) fn settled(&self, time: Duration) -> bool {
        let (settled, changed) = &self.settled;
        let waiting = changed.wait_timeout_while(lock(settled), time, |settled| !*settled);
        *waiting.unwrap_or_else(std::sync::PoisonError::into_inner).0
    }

    fn settle(&self) {
        *lock(&self.settled.0) = true;
        self.settled.1.notify_all();
    }

    /// The bays that are empty, and then those of which nobody holds any more what was lost.
    fn usable(&self, ready: bool) -> Result<Vec<usize>, BayError> {
        if self.devices.is_empty() {
            return Err(BayError::NoBays);
        }
        let bays = 0..self.devices.len();
        let mut usable: Vec<usize> = bays.clone().filter(|bay| self.is_empty(*bay)).collect();
        if usable.is_empty() && ready {
            usable.extend(bays.filter(|bay| self.is_lost(*bay) && self.has_let_go(*bay)));
        }
        Ok(usable)
    }

    fn is_empty(&self, bay: usize) -> bool {
        lock(&self.devices[bay]).device().is_empty()
    }

    /// Puts a blank medium into a bay.
    fn fill(&self, bay: usize, wanted: &Ephemeral, ready: bool) -> Result<(), BayError> {
        let medium = self.media.make(bay, wanted.size)?;
        self.media.seats()[bay] = Some(Seat::new(medium.clone(), &wanted.at));
        let mut device = lock(&self.devices[bay]);
        device.device_mut().insert(medium, wanted.at.clone());
        device.config_changed();
        drop(device);
        match ready {
            true => self.mount(bay),
            false => {
                self.note(bay, "no agent is in the guest to mount it".into());
                Ok(())
            }
        }
    }

    /// Has the agent mount what is in a bay.
    fn mount(&self, bay: usize) -> Result<(), BayError> {
        let Some((at, size)) = self.media.seats()[bay].as_ref().map(|seat| (seat.at.clone(), seat.medium.length()))
        else {
            return Ok(());
        };
        let why = match ask(&self.vsock, &Request::Mount { bay: name(bay), at, size }) {
            Ok(Reply::Ok) => {
                if let Some(seat) = &mut self.media.seats()[bay] {
                    (seat.standing, seat.note) = (Standing::Mounted, None);
                }
                return Ok(());
            }
            Ok(Reply::Error(why)) => why,
            Ok(other) => format!("it says {other:?}"),
            Err(error) => error.to_string(),
        };
        self.note(bay, why.clone());
        Err(BayError::Agent { doing: "mount it", why })
    }

    fn note(&self, bay: usize, note: String) {
        if let Some(seat) = &mut self.media.seats()[bay] {
            (seat.standing, seat.note) = (Standing::Attached, Some(note));
        }
    }

    /// Takes the medium out, which wipes it.
    fn empty_out(&self, bay: usize) {
        if let Some(device) = self.devices.get(bay) {
            let mut device = lock(device);
            device.device_mut().eject();
            device.config_changed();
        }
        self.media.seats()[bay] = None;
    }

    fn is_lost(&self, bay: usize) -> bool {
        !self.is_empty(bay) && self.media.seats()[bay].is_none()
    }

    fn was_at(&self, bay: usize, at: &str) -> bool {
        matches!(lock(&self.devices[bay]).device().state().medium, Some(MediumState { at: was, .. }) if was == at)
    }

    /// Whether nothing in the guest holds on to what was in a bay. If it does, a new medium there would be written
    /// to by those who mean the old one.
    fn has_let_go(&self, bay: usize) -> bool {
        match ask(&self.vsock, &Request::Unmount { bay: name(bay), force: true }) {
            Ok(Reply::Ok) => true,
            other => {
                tracing::warn!("the guest still holds the lost medium in {}: {other:?}", name(bay));
                false
            }
        }
    }
}

fn mount_when_ready(bays: &Weak<Bays>, greeting: &Greeting) {
    let begun = Instant::now();
    while greeting.wait(Duration::from_millis(200)).is_none() && begun.elapsed() < BOOTING {
        // Not held while waiting: a machine that ends must be able to go.
        if bays.strong_count() == 0 {
            return;
        }
    }
    let Some(bays) = bays.upgrade() else { return };
    let work = lock(&bays.work);
    for bay in 0..BAYS {
        if let Err(error) = bays.mount(bay) {
            tracing::warn!("{}: {error}", name(bay));
        }
    }
    drop(work);
    bays.settle();
}

fn ask(vsock: &Handle, request: &Request) -> io::Result<Reply> {
    ask_for(vsock, request, PATIENCE)
}

fn ask_for(vsock: &Handle, request: &Request, time: Duration) -> io::Result<Reply> {
    let mut stream: UnixStream = vsock.open(AGENT_PORT)?;
    stream.set_read_timeout(Some(time))?;
    write_line(&mut stream, request)?;
    read_line(&mut stream)
}
