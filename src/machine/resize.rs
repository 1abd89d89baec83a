//! Giving a running machine vCPUs and RAM, and taking them back.
//!
//! All of it is asking: the monitor offers or asks back, the guest's kernel takes or gives in its own time, and
//! some of it perhaps never. So a resize waits for as long as something moves, and then says how far it came. What
//! the guest did not do by then is not asked for any more:
//!
//! ```text
//!  ask_for            settle: await                          stop_asking
//!  devices offer,     devices and guest agree with what  ──▶ what was not taken is taken back,
//!  ask back       ──▶ was asked, or nothing moves            what was not given is kept
//! ```
//!
//! Linux gives back all that it is asked for, also what its programs would need a moment later, and then stops with
//! "System is deadlocked on memory". So a guest is asked for no more than its agent says is available, less a reserve;
//! and when that gets used up meanwhile, for nothing more.
//!
//! Two are asked whether it is done: the devices, which know what the guest's kernel took and gave, and the
//! guest's agent, which knows what can be used in there. A guest without an agent has only the first.

use std::fmt;
use std::time::{Duration, Instant};

use catnap_guest::protocol::Status;
use serde::{Deserialize, Serialize};

use super::{Error, Machine, Shape, State, agent, lock};
use crate::spec;

/// How long the guest may do nothing before it counts as unable or unwilling. It gives memory back in blocks of
/// 128 MiB, each of which takes a kernel that fills it with zeros first seconds where hosts are emulated; and for so
/// long its agent may be silent, for Linux does such work on the vCPU that takes the interrupts.
const STANDSTILL: Duration = Duration::from_secs(30);
/// How often the guest is asked how far it is.
const GLANCE: Duration = Duration::from_millis(20);
/// How long its agent may take to say so.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long a block of memory that was given back may take to leave the guest's kernel, when nothing else moves. Where
/// pages that cannot be moved lie in several blocks, more of them stay than are needed.
const LEAVING: Duration = Duration::from_secs(5);
/// How long the guest may take to let go of vCPUs that it could not use.
const TAKING_BACK: Duration = Duration::from_secs(2);

/// What must be left to a guest when memory is taken back, in bytes: some for the programs that run while the agent
/// counts, some for the kernel's own watermarks.
const RESERVE: u64 = 64 << 20;

/// What Linux adds and takes away memory in on x86-64, in bytes; more only with 64 GiB or more of it
/// (`probe_memory_block_size` of arch/x86/mm/init_64.c).
const BLOCK: u64 = 128 << 20;

/// The size of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// vCPUs.
    pub cpus: u32,
    /// RAM, in bytes.
    pub memory: u64,
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = if self.cpus == 1 { "" } else { "s" };
        write!(f, "{} vCPU{plural} and {} of memory", self.cpus, spec::Size(self.memory))
    }
}

/// What came of a resize.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resized {
    /// The size before.
    pub before: Size,
    /// The size that was asked for.
    pub wanted: Size,
    /// The size that was reached: what the guest took or kept, and can use.
    pub reached: Size,
    /// What the guest said at the end, if its agent answered.
    pub guest: Option<Seen>,
    /// Whether there is an agent, and it did not answer: then nobody knows what the guest can use.
    #[serde(default)]
    pub unconfirmed: bool,
    /// Milliseconds from asking to the end.
    pub duration_ms: u64,
}

/// A machine's size as its guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// vCPUs that are online.
    pub cpus: u32,
    /// MemTotal in bytes: some less than RAM, for the kernel keeps some to itself.
    pub memory_bytes: u64,
    /// The size of the root disk in bytes.
    pub disk_bytes: u64,
    /// The size of the root filesystem in bytes.
    pub root_bytes: u64,
}

impl Resized {
    /// Whether it came to what was asked for.
    pub fn is_complete(&self) -> bool {
        self.reached == self.wanted && !self.unconfirmed
    }
}

/// A resize that was asked for, and what of it is new.
#[derive(Clone, Debug)]
pub struct Asked {
    before: Size,
    wanted: Size,
    /// The vCPUs that were offered and those that were asked back, a bit each.
    inserted: u64,
    removed: u64,
    /// The new size of the root disk in bytes, when that is another.
    pub(super) disk: Option<u64>,
    since: Instant,
}

impl Asked {
    /// Whether the guest has anything to do.
    pub fn is_change(&self) -> bool {
        self.before != self.wanted || self.disk.is_some()
    }
}

impl Shape {
    /// Refuses a size that the machine cannot have without another boot.
    pub fn check(&self, wanted: Size) -> Result<(), Error> {
        let memory = self.boot_memory..=self.max_memory;
        if !(1..=self.max_cpus).contains(&wanted.cpus) || !memory.contains(&wanted.memory) {
            return Err(Error::Envelope { wanted, shape: *self });
        }
        if !(wanted.memory - self.boot_memory).is_multiple_of(spec::MEMORY_STEP.bytes()) {
            return Err(Error::Step { wanted: wanted.memory, boot: self.boot_memory });
        }
        Ok(())
    }
}

impl Machine {
    /// The size that the machine has: the vCPUs that the guest took, and the RAM that it has plugged in.
    pub fn size(&self) -> Size {
        let cpus = lock(&self.devices.cpus);
        let taken = cpus.present() & !cpus.offered();
        Size { cpus: taken.count_ones(), memory: self.shape.boot_memory + self.plugged() }
    }

    /// Asks the guest to have the size `wanted` and waits until it has it, or nothing moves any more, or `time` is
    /// over. Gives what was reached.
    pub fn resize(&self, wanted: Size, time: Duration) -> Result<Resized, Error> {
        let _alone = lock(&self.resizing);
        match self.state() {
            State::Running => self.settle(&self.ask_for(wanted)?, time),
            State::Paused => Err(Error::Paused),
            State::Ended(_) => Err(Error::Ended),
        }
    }

    /// The first half of a resize: asks, and does not wait.
    pub fn ask_for(&self, wanted: Size) -> Result<Asked, Error> {
        self.shape.check(wanted)?;
        let mut asked =
            Asked { before: self.size(), wanted, inserted: 0, removed: 0, disk: None, since: Instant::now() };
        // What can be given back must be known first, and that the guest tells only when it runs.
        if wanted.memory >= asked.before.memory {
            self.request(wanted.memory - self.shape.boot_memory)?;
        }
        for cpu in 0..self.shape.max_cpus {
            let there = lock(&self.devices.cpus).present() & 1 << cpu != 0;
            if cpu < wanted.cpus && !there {
                self.provide(cpu)?;
                lock(&self.devices.cpus).insert(cpu)?;
                asked.inserted |= 1 << cpu;
            } else if cpu >= wanted.cpus && there {
                lock(&self.devices.cpus).remove(cpu)?;
                asked.removed |= 1 << cpu;
            }
        }
        Ok(asked)
    }

    /// The second half of a resize: waits until the guest has done what was asked, or nothing moves any more, or
    /// `time` is over. What was not done by then is not asked for any more.
    pub(super) fn settle(&self, asked: &Asked, time: Duration) -> Result<Resized, Error> {
        let goal = self.ask_back(asked)?;
        let mut guest = self.await_size(asked, goal, time);
        if self.reached(guest.as_ref()) != asked.wanted {
            self.stop_asking(asked, guest.as_ref())?;
            guest = guest.and(agent::status(&self.vsock, PATIENCE).ok());
        }
        let seen = guest.as_ref().map(|status| Seen {
            cpus: status.cpus,
            memory_bytes: status.memory_bytes,
            disk_bytes: status.disk_bytes,
            root_bytes: status.root_bytes,
        });
        Ok(Resized {
            before: asked.before,
            wanted: asked.wanted,
            reached: self.reached(guest.as_ref()),
            guest: seen,
            unconfirmed: guest.is_none() && self.has_agent(),
            duration_ms: asked.since.elapsed().as_millis() as u64,
        })
    }

    /// Asks for the memory back that the machine is to have no longer, as much of it as the guest can spare. Gives the
    /// size that can be reached.
    fn ask_back(&self, asked: &Asked) -> Result<Size, Error> {
        let (now, mut goal) = (self.size().memory, asked.wanted);
        if goal.memory < now {
            let spare = self.spare();
            goal.memory = goal.memory.max(now - now.min(spare - spare % spec::MEMORY_STEP.bytes()));
            self.request(goal.memory - self.shape.boot_memory)?;
        }
        Ok(goal)
    }

    /// How much memory the guest can spare, in bytes: nobody knows of one without an agent, and nothing of one whose
    /// agent is silent.
    fn spare(&self) -> u64 {
        let deadline = Instant::now() + STANDSTILL;
        while self.has_agent() && self.team.ended().is_none() {
            match agent::status(&self.vsock, PATIENCE) {
                Ok(Status { available_bytes: 0, .. }) => break,
                Ok(status) => return status.available_bytes.saturating_sub(RESERVE),
                Err(_) if Instant::now() >= deadline => return 0,
                Err(_) => std::thread::sleep(GLANCE),
            }
        }
        u64::MAX
    }

    /// Waits until devices and guest have the size `goal`, or nothing moves any more, or `time` is over. Gives what
    /// the guest said last, if anything.
    fn await_size(&self, asked: &Asked, goal: Size, time: Duration) -> Option<Status> {
        let deadline = Instant::now() + time;
        let (mut moved, mut last) = (Instant::now(), None);
        loop {
            let seen = self.devices.changes.count();
            // The guest is asked when the devices have no more to say, or when it may run short.
            let (settled, shrinking) = (self.size() == goal, self.size().memory > goal.memory);
            let guest = if settled || shrinking { agent::status(&self.vsock, PATIENCE).ok() } else { None };
            let short = guest.as_ref().is_some_and(|it| (1..RESERVE / 2).contains(&it.available_bytes));
            if shrinking && short {
                return guest;
            }
            let said = |it: &Status| (it.cpus, it.memory_bytes, it.present_bytes, it.root_bytes);
            let now = (seen, guest.as_ref().filter(|_| settled).map(said));
            if last.replace(now) != Some(now) {
                moved = Instant::now();
            }
            let leaving = guest.as_ref().is_some_and(|status| leaves(self.plugged(), status));
            if settled && self.is_done(asked, goal, guest.as_ref()) && (!leaving || moved.elapsed() >= LEAVING) {
                return guest;
            }
            let refused = lock(&self.devices.cpus).refused() & (asked.inserted | asked.removed) != 0;
            // One that refuses a vCPU may still be at work on its memory.
            let patience = if refused { STANDSTILL / 8 } else { STANDSTILL };
            if moved.elapsed() >= patience || Instant::now() >= deadline || self.team.ended().is_some() {
                return guest.or_else(|| agent::status(&self.vsock, PATIENCE).ok());
            }
            let _ = self.devices.changes.wait_beyond(seen, GLANCE);
        }
    }

    /// Whether the guest, whose devices are done, is done too.
    fn is_done(&self, asked: &Asked, goal: Size, guest: Option<&Status>) -> bool {
        let Some(status) = guest else {
            return !self.has_agent();
        };
        // A filesystem needs some of its disk for itself.
        let disk = asked.disk.is_none_or(|disk| status.disk_bytes == disk && status.root_bytes >= disk / 8 * 7);
        self.reached(Some(status)) == goal && disk
    }

    /// Whether there is an agent to ask. One that never spoke is not waited for; a woken machine's has spoken before.
    fn has_agent(&self) -> bool {
        self.woke || self.hello(Duration::ZERO).is_some()
    }

    /// The size that the guest took *and* can use, as it says itself.
    fn reached(&self, guest: Option<&Status>) -> Size {
        let there = self.size();
        let Some(status) = guest else { return there };
        Size { cpus: there.cpus.min(status.cpus), memory: self.shape.boot_memory + used(self.plugged(), status) }
    }

    /// Takes back what was offered and not taken, and leaves what was asked back and not given.
    fn stop_asking(&self, asked: &Asked, guest: Option<&Status>) -> Result<(), Error> {
        self.request(self.plugged())?;
        // Taken by the kernel and used by nobody: as many as before are online.
        let idle = guest.is_some_and(|status| status.cpus <= asked.before.cpus);
        let mut leaving = 0;
        for cpu in (1..self.shape.max_cpus).filter(|cpu| (asked.inserted | asked.removed) & 1 << cpu != 0) {
            let (bit, mut cpus) = (1 << cpu, lock(&self.devices.cpus));
            if asked.removed & bit != 0 {
                cpus.keep(cpu)?;
            } else if cpus.present() & bit != 0 && (idle || (cpus.offered() | cpus.refused()) & bit != 0) {
                cpus.remove(cpu)?;
                leaving |= bit;
            }
        }
        let deadline = Instant::now() + TAKING_BACK;
        while lock(&self.devices.cpus).present() & leaving != 0 && Instant::now() < deadline {
            let seen = self.devices.changes.count();
            let _ = self.devices.changes.wait_beyond(seen, GLANCE);
        }
        Ok(())
    }

    /// A vCPU that the guest can start.
    fn provide(&self, cpu: u32) -> Result<(), Error> {
        // Nobody pauses while a thread is added.
        let _alone = lock(&self.pausing);
        if self.team.bring_back(cpu) {
            return Ok(());
        }
        let vcpu = self.vm.vcpu(cpu, self.shape.max_cpus)?;
        vcpu.power_on()?;
        Ok(self.team.add(vcpu)?)
    }

    /// Asks for so much plugged memory, if that is not what is asked for already.
    fn request(&self, bytes: u64) -> Result<(), Error> {
        match &self.devices.memory {
            Some(device) if lock(device).device().requested() != bytes => Ok(lock(device).request_size(bytes)?),
            _ => Ok(()),
        }
    }

    fn plugged(&self) -> u64 {
        self.devices.memory.as_ref().map_or(0, |device| lock(device).device().plugged())
    }
}

/// How much of the memory that is plugged in the guest has in use, as MemTotal has grown since its boot. Linux
/// counts all of it, but may keep a little, so a sixteenth is let pass.
fn used(plugged: u64, status: &Status) -> u64 {
    let grown = status.memory_bytes.saturating_sub(status.boot_memory_bytes);
    let unknown = status.boot_memory_bytes == 0;
    if unknown || grown >= plugged - plugged / 16 { plugged } else { grown - grown % spec::MEMORY_STEP.bytes() }
}

/// Whether the guest's kernel still has more blocks of memory than what is plugged in needs. It gives all pages of a
/// block back first and takes the block away then, and while it does, MemTotal shows the block once more.
fn leaves(plugged: u64, status: &Status) -> bool {
    let grown = status.present_bytes.saturating_sub(status.boot_present_bytes);
    status.boot_present_bytes != 0 && grown >= plugged.next_multiple_of(BLOCK) + BLOCK
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn sizes_outside_the_envelope_and_between_its_steps_are_refused() {
        let shape = Shape { cpus: 1, max_cpus: 4, boot_memory: 256 * MIB, max_memory: 1024 * MIB };
        let check = |cpus, memory| shape.check(Size { cpus, memory: memory * MIB });
        for (cpus, memory) in [(1, 256), (4, 1024), (2, 258)] {
            assert!(check(cpus, memory).is_ok());
        }
        for (cpus, memory) in [(0, 256), (5, 256), (u32::MAX, 256), (1, 254), (1, 1026), (1, 0)] {
            assert!(matches!(check(cpus, memory), Err(Error::Envelope { .. })), "{cpus} {memory}");
        }
        assert!(matches!(check(1, 257), Err(Error::Step { .. })));
    }

    #[test]
    fn memory_counts_when_the_guest_has_it_in_use() {
        let status = |boot, now| Status { boot_memory_bytes: boot * MIB, memory_bytes: now * MIB, ..Status::default() };
        assert_eq!(used(768 * MIB, &status(220, 988)), 768 * MIB);
        assert_eq!(used(768 * MIB, &status(220, 975)), 768 * MIB);
        assert_eq!(used(768 * MIB, &status(220, 220)), 0);
        assert_eq!(used(768 * MIB, &status(220, 221 + 256)), 256 * MIB);
        assert_eq!(used(0, &status(220, 200)), 0);
        assert_eq!(used(512 * MIB, &status(0, 0)), 512 * MIB);
    }

    #[test]
    fn a_block_that_leaves_is_seen() {
        let status = |boot, now| Status { boot_present_bytes: boot, present_bytes: now, ..Status::default() };
        let boot = 256 * MIB - 4096;
        for (plugged, grown, leaving) in
            [(256, 384, true), (256, 256, false), (320, 384, false), (320, 512, true), (0, 128, true)]
        {
            assert_eq!(leaves(plugged * MIB, &status(boot, boot + grown * MIB)), leaving, "{plugged} {grown}");
        }
        assert!(!leaves(256 * MIB, &status(boot, boot - 1)));
        assert!(!leaves(0, &status(0, boot)));
    }

    #[test]
    fn a_size_is_shown_in_words() {
        assert_eq!(Size { cpus: 1, memory: 256 * MIB }.to_string(), "1 vCPU and 256M of memory");
        assert_eq!(Size { cpus: 4, memory: 1024 * MIB }.to_string(), "4 vCPUs and 1G of memory");
    }
}
