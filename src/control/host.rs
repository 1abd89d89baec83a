//! Holds a guest for the requests of many connections, over its reboots and until its end.
//!
//! ```text
//!            run             run, guest asks for a reboot            run
//! (none) ----------> guest ------------------------------> (none) ----------> guest ...
//!                      | run, guest ends, or `stop`
//!                      v
//!                    ended
//! ```
//!
//! Invariants: `ended` is set once and never taken back; a guest is dropped by all before the next is built,
//! because both would own the same disk and ports.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use catnap_guest::protocol::Hello;

use super::failure::{Code, Failure};
use super::protocol::{Ended, MAX_RESIZE, Resize, State, Status, Stop, Taken, Taking, Wait};
use super::snapshots::{Keeper, Watch};
use crate::disk::{Mark, Reach};
use crate::machine::{self, Armed, Captured, Drive, End, Machine, MemoryMap, Progress, Resized, Shape, Size};
use crate::snapshot::Digest;
use crate::spec::{Ephemeral, MachineSpec, Name};
use crate::sys::process;

/// What the control protocol needs of a machine.
pub trait Guest: Send + Sync + 'static {
    /// Lets the vCPUs run for the first time.
    fn start(&self) -> Result<(), Failure>;
    /// What it does now.
    fn state(&self) -> machine::State;
    /// Blocks until it has ended.
    fn wait(&self) -> End;
    /// Stops the vCPUs; does nothing when they stand still already.
    fn pause(&self) -> Result<(), Failure>;
    /// Lets them run on; does nothing when they run already.
    fn resume(&self) -> Result<(), Failure>;
    /// Presses the power button.
    fn power_button(&self) -> Result<(), Failure>;
    /// Ends it at once.
    fn stop(&self);
    /// What its console has shown, and what comes.
    fn attach_console(&self) -> (Vec<u8>, Receiver<Vec<u8>>);
    /// Types on its console; gives back how many bytes there was room for.
    fn console_input(&self, bytes: &[u8]) -> usize;
    /// A new connection to its agent.
    fn agent(&self) -> io::Result<UnixStream>;
    /// What its agent said when it was ready; waits for that up to `time`.
    fn hello(&self, time: Duration) -> Option<Hello>;
    /// Takes its disk and, if wanted, state and memory into a folder.
    fn capture(
        &self,
        dir: &Path,
        with_memory: bool,
        may_lie_over: &dyn Fn(&Digest) -> bool,
        watch: Watch<'_>,
    ) -> Result<Captured<'_>, Failure>;
    /// A picture of its memory in so many cells.
    fn memory_map(&self, cells: u32) -> Result<MemoryMap, Failure>;
    /// The size that it has.
    fn size(&self) -> Size;
    /// What it can be resized to.
    fn shape(&self) -> Shape;
    /// Asks it to have another size, and returns when it has or will not, after `time` at the latest.
    fn resize(&self, wanted: Size, time: Duration) -> Result<Resized, Failure>;
    /// What came of the size that it was to wake in.
    fn resized(&self) -> Option<Resized>;
    /// Makes one layer of those under its disk.
    fn flatten_disk(&self, reach: Reach) -> Result<(), Failure>;
    /// Its disks that live in the host's memory.
    fn drives(&self) -> Vec<Drive>;
    /// Puts a blank one in.
    fn attach(&self, wanted: &Ephemeral) -> Result<(), Failure>;
    /// Takes one out.
    fn detach(&self, disk: &str, force: bool) -> Result<(), Failure>;
    /// Pauses it for ever, and gives those away that hold what the marks say.
    fn give(&self, marks: &[Mark]) -> Result<(), Failure>;
    /// Waits for its next ring at the doorbell; `None` when somebody does already.
    fn arm_doorbell(&self) -> Option<Armed>;
}

impl Guest for Machine {
    fn start(&self) -> Result<(), Failure> {
        Ok(Machine::start(self)?)
    }
    fn state(&self) -> machine::State {
        Machine::state(self)
    }
    fn wait(&self) -> End {
        Machine::wait(self)
    }
    fn pause(&self) -> Result<(), Failure> {
        Ok(Machine::pause(self)?)
    }
    fn resume(&self) -> Result<(), Failure> {
        Ok(Machine::resume(self)?)
    }
    fn power_button(&self) -> Result<(), Failure> {
        Ok(Machine::power_button(self)?)
    }
    fn stop(&self) {
        Machine::stop(self);
    }
    fn attach_console(&self) -> (Vec<u8>, Receiver<Vec<u8>>) {
        self.console().attach()
    }
    fn console_input(&self, bytes: &[u8]) -> usize {
        self.console().input(bytes)
    }
    fn agent(&self) -> io::Result<UnixStream> {
        Machine::agent(self)
    }
    fn hello(&self, time: Duration) -> Option<Hello> {
        Machine::hello(self, time)
    }
    fn capture(
        &self,
        dir: &Path,
        with_memory: bool,
        may_lie_over: &dyn Fn(&Digest) -> bool,
        watch: Watch<'_>,
    ) -> Result<Captured<'_>, Failure> {
        Ok(Machine::capture(self, dir, with_memory, may_lie_over, watch)?)
    }
    fn memory_map(&self, cells: u32) -> Result<MemoryMap, Failure> {
        Ok(Machine::memory_map(self, cells)?)
    }
    fn size(&self) -> Size {
        Machine::size(self)
    }
    fn shape(&self) -> Shape {
        Machine::shape(self)
    }
    fn resize(&self, wanted: Size, time: Duration) -> Result<Resized, Failure> {
        Ok(Machine::resize(self, wanted, time)?)
    }
    fn resized(&self) -> Option<Resized> {
        Machine::resized(self)
    }
    fn flatten_disk(&self, reach: Reach) -> Result<(), Failure> {
        Ok(Machine::flatten_disk(self, reach)?)
    }
    fn drives(&self) -> Vec<Drive> {
        Machine::drives(self)
    }
    fn attach(&self, wanted: &Ephemeral) -> Result<(), Failure> {
        Ok(Machine::attach(self, wanted)?)
    }
    fn detach(&self, disk: &str, force: bool) -> Result<(), Failure> {
        Ok(Machine::detach(self, disk, force)?)
    }
    fn give(&self, marks: &[Mark]) -> Result<(), Failure> {
        let given = Machine::give(self, marks)?;
        tracing::info!("{given} of {} ephemeral disks are as they were, and given away", marks.len());
        Ok(())
    }
    fn arm_doorbell(&self) -> Option<Armed> {
        self.doorbell().arm()
    }
}

/// The longest time that a guest's end or a rebuild may take before it counts as stuck.
const STUCK: Duration = Duration::from_secs(10);
/// How long one look at the agent may hold on to a guest that might want to reboot.
const GLANCE: Duration = Duration::from_millis(200);

/// The guest of this process.
pub struct Host {
    spec: MachineSpec,
    keeper: Option<Keeper>,
    begun: Instant,
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Default)]
struct Inner {
    guest: Option<Arc<dyn Guest>>,
    boots: u32,
    running_since_us: u64,
    /// Requests to stop that are under way: then a reboot is an end.
    stopping: u32,
    /// Snapshots and disks that are being worked at: a guest that ends is held until they are done.
    at_work: u32,
    ended: Option<Ended>,
    /// The snapshot that is being taken; of several, the one that was asked for last.
    taking: Option<Taking>,
    taken: Option<Taken>,
}

/// Work at the machine's files, until this is dropped.
pub struct Work<'h>(&'h Host);

/// A snapshot that is being taken, until this is dropped.
pub struct Notice<'h> {
    host: &'h Host,
    begun_us: u64,
}

/// The commands that give a machine a size which it cannot have without another boot.
fn another_boot(name: &Name, shape: Shape, wanted: Size) -> String {
    let Size { cpus, memory } = wanted;
    let size = format!("--cpus {cpus} --memory {}", crate::spec::Size(memory));
    match cpus <= shape.max_cpus && memory <= shape.max_memory {
        true => format!("catnap stop {name} && catnap resize {name} {size} && catnap start {name}"),
        // The envelope is fixed too, until there is another machine.
        false => format!(
            "catnap snapshot create {name}@small && catnap restore {name}@small --name {name}-big --cold {size}"
        ),
    }
}

impl Host {
    /// A host whose guest is still to be put in, and who keeps its snapshots.
    pub fn new(spec: MachineSpec, keeper: Option<Keeper>) -> Host {
        Host { spec, keeper, begun: Instant::now(), inner: Mutex::default(), changed: Condvar::new() }
    }

    /// Who keeps the machine's snapshots.
    pub fn keeper(&self) -> Result<&Keeper, Failure> {
        self.keeper.as_ref().ok_or_else(|| Failure::new(Code::Refused, "this machine has no store for its snapshots"))
    }

    /// Puts a guest in, so that requests reach it, and starts it.
    pub fn start(&self, guest: &Arc<impl Guest>) -> Result<(), Failure> {
        let mut inner = self.lock();
        inner.guest = Some(Arc::clone(guest) as Arc<dyn Guest>);
        inner.boots += 1;
        // Under the lock, so that nobody pauses or stops what does not run yet.
        let started = guest.start();
        inner.running_since_us = process::monotonic_us();
        if started.is_err() {
            inner.guest = None;
        }
        self.changed.notify_all();
        started
    }

    /// Stays with the started `guest` until it ends for good; `build` makes the next one for a reboot.
    pub fn run<G: Guest>(&self, mut guest: Arc<G>, mut build: impl FnMut() -> Result<Arc<G>, Failure>) -> Ended {
        let ended = loop {
            match guest.wait() {
                End::Reboot if self.is_stopping() => break Ended::PowerOff,
                // A kernel that panics early reboots too, and would for ever.
                End::Reboot if guest.hello(Duration::ZERO).is_none() => {
                    break Ended::Crash { why: "it rebooted before its agent was ready".into() };
                }
                End::Reboot => {
                    self.let_go(guest);
                    match build().and_then(|next| self.start(&next).map(|()| next)) {
                        Ok(next) => guest = next,
                        Err(failure) => break Ended::Crash { why: format!("the reboot failed: {failure}") },
                    }
                }
                End::Crash(why) => break Ended::Crash { why },
                End::Stopped => break Ended::Forced,
                End::PowerOff => break Ended::PowerOff,
            }
        };
        let mut inner = self.lock();
        inner.guest = None;
        inner.ended = Some(ended.clone());
        self.changed.notify_all();
        ended
    }

    fn is_stopping(&self) -> bool {
        self.lock().stopping > 0
    }

    /// Takes the guest out and waits until no request holds on to it. A snapshot of it is written for as long as it takes.
    fn let_go<G: Guest>(&self, guest: Arc<G>) {
        self.lock().guest = None;
        let last = Arc::downgrade(&guest);
        drop(guest);
        let mut deadline = Instant::now() + STUCK;
        while last.strong_count() > 0 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
            if self.lock().at_work > 0 {
                deadline = Instant::now() + STUCK;
            }
        }
    }

    /// Lets the guest's end wait for this.
    pub fn begin_work(&self) -> Work<'_> {
        self.lock().at_work += 1;
        Work(self)
    }

    /// Waits until all such work is done.
    pub fn end_work(&self) {
        let at_work = |inner: &mut Inner| inner.at_work > 0;
        drop(self.changed.wait_while(self.lock(), at_work).unwrap_or_else(PoisonError::into_inner));
    }

    /// The guest; during a reboot, waits for the next one.
    pub fn guest(&self) -> Result<Arc<dyn Guest>, Failure> {
        let name = &self.spec.name;
        let refuse = |why, hint: String| Failure::new(Code::Refused, format!("{name} {why}")).hint(hint);
        let found = self.guest_after(0).map(|(_, guest)| guest);
        found.ok_or_else(|| match self.lock().ended {
            Some(_) => refuse("is not running any more", format!("catnap start {name}")),
            None => refuse("is still rebooting, or its snapshot is still written", "try again a little later".into()),
        })
    }

    /// The guest of a later boot than number `seen`, with its number. `None` when there will not be one.
    pub fn guest_after(&self, seen: u32) -> Option<(u32, Arc<dyn Guest>)> {
        let wait = |inner: &mut Inner| inner.ended.is_none() && (inner.boots <= seen || inner.guest.is_none());
        let guard = self.changed.wait_timeout_while(self.lock(), STUCK, wait);
        let (inner, _) = guard.unwrap_or_else(PoisonError::into_inner);
        let later = inner.guest.as_ref().filter(|_| inner.boots > seen);
        later.map(|guest| (inner.boots, Arc::clone(guest)))
    }

    /// Waits until the guest has ended, up to `time`.
    pub fn wait_end(&self, time: Duration) -> Option<Ended> {
        let guard = self.changed.wait_timeout_while(self.lock(), time, |inner| inner.ended.is_none());
        guard.unwrap_or_else(PoisonError::into_inner).0.ended.clone()
    }

    /// Waits for what a client asked to wait for, up to `time`.
    pub fn wait(&self, what: Wait, time: Duration) {
        let deadline = Instant::now() + time;
        let left = || deadline.saturating_duration_since(Instant::now());
        match what {
            Wait::End => drop(self.wait_end(time)),
            Wait::Agent => {
                while !left().is_zero() {
                    match self.guest() {
                        Ok(guest) if guest.hello(left().min(GLANCE)).is_none() => {}
                        _ => return,
                    }
                }
            }
        }
    }

    /// Shuts the guest down as the request says.
    pub fn stop(&self, stop: Stop) -> Result<(), Failure> {
        if self.lock().ended.is_some() {
            return Ok(());
        }
        self.lock().stopping += 1;
        let result = self.shut_down(stop);
        self.lock().stopping -= 1;
        match result {
            // What was asked of it came too late, because it had ended just then by itself.
            Err(_) if self.wait_end(Duration::from_millis(100)).is_some() => Ok(()),
            result => result,
        }
    }

    fn shut_down(&self, stop: Stop) -> Result<(), Failure> {
        let guest = self.guest()?;
        if stop.seconds > 0 {
            // A guest that stands still cannot hear its power button.
            guest.resume()?;
            // One that is still booting does not hear it either, so it is pressed again and again.
            for _ in 0..stop.seconds {
                guest.power_button()?;
                if self.wait_end(Duration::from_secs(1)).is_some() {
                    return Ok(());
                }
            }
        }
        if !stop.force {
            let name = &self.spec.name;
            return Err(Failure::new(Code::Refused, format!("{name} still runs {} seconds later", stop.seconds))
                .hint(format!("catnap stop --force {name}")));
        }
        guest.stop();
        drop(guest);
        match self.wait_end(STUCK) {
            Some(_) => Ok(()),
            None => Err(Failure::new(Code::Failed, format!("{} does not end", self.spec.name))
                .hint(format!("kill -9 {}", std::process::id()))),
        }
    }

    /// Gives the guest another size, and has the machine keep it for its next boot, if it has a store.
    pub fn resize(&self, wanted: Resize) -> Result<Resized, Failure> {
        let guest = self.guest()?;
        let (name, now) = (&self.spec.name, guest.size());
        let wanted = Size { cpus: wanted.cpus.unwrap_or(now.cpus), memory: wanted.memory.unwrap_or(now.memory) };
        let refused = |failure: Failure| match failure.hint {
            None => failure.hint(another_boot(name, guest.shape(), wanted)),
            Some(_) => failure,
        };
        let resized = guest.resize(wanted, Duration::from_secs(MAX_RESIZE.into())).map_err(refused)?;
        if let Ok(keeper) = self.keeper() {
            keeper.machine.set_size(guest.size().cpus, guest.size().memory)?;
        }
        Ok(resized)
    }

    /// Lets the status tell of a snapshot that is being taken.
    pub fn begin_taking(&self, name: &str) -> Notice<'_> {
        let begun_us = process::monotonic_us();
        self.lock().taking = Some(Taking { name: name.into(), begun_us, progress: None });
        Notice { host: self, begun_us }
    }

    /// What there is to tell of the machine.
    pub fn status(&self) -> Status {
        let inner = self.lock();
        let (guest, ended, boots) = (inner.guest.clone(), inner.ended.clone(), inner.boots);
        let running_since_us = inner.running_since_us;
        let (taking, taken) = (inner.taking.clone(), inner.taken.clone());
        drop(inner);
        let state = match (&ended, guest.as_ref().map(|guest| guest.state())) {
            (Some(_), _) | (None, Some(machine::State::Ended(_))) => State::Ended,
            (None, Some(machine::State::Running)) => State::Running,
            (None, Some(machine::State::Paused)) => State::Paused,
            (None, None) if boots == 0 => State::Starting,
            (None, None) => State::Rebooting,
        };
        let (size, shape) = (guest.as_ref().map(|guest| guest.size()), guest.as_ref().map(|guest| guest.shape()));
        let resized = guest.as_ref().and_then(|guest| guest.resized());
        Status {
            state,
            ephemeral: guest.as_ref().map_or_else(Vec::new, |guest| guest.drives()),
            agent: guest.and_then(|guest| guest.hello(Duration::ZERO)),
            ended,
            boots,
            uptime_ms: self.begun.elapsed().as_millis() as u64,
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").into(),
            machine: self.spec.clone(),
            running_since_us,
            size,
            shape,
            resized,
            taking,
            taken,
        }
    }

    /// The lock; a thread that panicked with it left no half-made change, each is one assignment.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Notice<'_> {
    /// Tells how far it is.
    pub fn say(&self, progress: Progress) {
        if let Some(taking) = self.host.lock().taking.as_mut().filter(|taking| taking.begun_us == self.begun_us) {
            taking.progress = Some(progress);
        }
    }

    /// Tells what came of it; nothing when it failed.
    pub fn end(self, taken: Option<&Taken>) {
        if let Some(taken) = taken {
            self.host.lock().taken = Some(taken.clone());
        }
    }
}

impl Drop for Work<'_> {
    fn drop(&mut self) {
        self.0.lock().at_work -= 1;
        self.0.changed.notify_all();
    }
}

impl Drop for Notice<'_> {
    fn drop(&mut self) {
        let mut inner = self.host.lock();
        inner.taking = inner.taking.take().filter(|taking| taking.begun_us != self.begun_us);
    }
}
