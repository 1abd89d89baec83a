//! Tells the guest's agent that its machine woke: what time it is, and that it may be one of many now. When the
//! machine is to wake in another size, waits for that too, before anybody is let in.

use std::io;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use catnap_guest::protocol::{Hello, Identity, Reply, Request, Settings, VERSION, Wake, WakeDisk, Woken};

use super::resize::Asked;
use super::{Machine, agent, lock};
use crate::devices::virtio::vsock::Handle;
use crate::sys::thread::small;
use crate::sys::{hex, random};

/// How long the agent may take for one answer; its hooks have ten seconds.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long an agent that does not answer is asked again. One that was not up yet when the snapshot was taken
/// says hello when it is.
const TRYING: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(20);
/// How long the guest has for what it was at before its agent has work to do: that is what people see first.
const LEAD: Duration = Duration::from_millis(5);
/// How long a guest may take to get its new size. Then its ports are opened in any case.
pub const SETTLING: Duration = Duration::from_secs(120);

/// How a machine is to wake.
#[derive(Clone, Debug, Default)]
pub struct Wakeup {
    /// Who a copy is that must be told from its original; `None` for a machine that stays itself.
    pub identity: Option<Identity>,
    /// Settings of its site that change.
    pub settings: Settings,
    /// The size that was asked for before its vCPUs ran.
    pub asked: Option<Asked>,
}

/// Starts a thread that speaks to the agent until it has understood. What the agent then says of itself counts
/// as its hello. Until then, and until the machine has its size, its ports are closed.
pub(super) fn start(machine: &Arc<Machine>, wakeup: Wakeup) -> io::Result<()> {
    let resizes = wakeup.asked.as_ref().is_some_and(Asked::is_change);
    if !resizes {
        machine.forwarder.open()?;
    }
    let machine = Arc::downgrade(machine);
    small("waker").spawn(move || {
        // At the same time, so that an agent which does not answer keeps nobody out for longer than that.
        let sizing = match (&wakeup.asked, machine.upgrade()) {
            (Some(asked), Some(machine)) if resizes => {
                let (asked, sized) = (asked.clone(), machine.clone());
                let thread = small("size").spawn(move || settle(&sized, &asked));
                // Without a thread for it there is no word of the size, but the ports must not stay closed.
                thread.inspect_err(|_| open(&machine)).ok()
            }
            _ => None,
        };
        let hello = keep_telling(&machine, &wakeup);
        let _ = sizing.map(JoinHandle::join);
        // Last, so that whoever waited for the agent finds the machine as it was wanted.
        if let (Some(machine), Some(hello)) = (machine.upgrade(), hello) {
            machine.greeting.take(hello);
        }
    })?;
    Ok(())
}

/// Waits for the new size and lets visitors in, whatever came of it.
fn settle(machine: &Machine, asked: &Asked) {
    let alone = lock(&machine.resizing);
    match machine.settle(asked, SETTLING) {
        Ok(resized) => {
            tracing::info!("woke with {}, {} was wanted", resized.reached, resized.wanted);
            *lock(&machine.resized) = Some(resized);
        }
        Err(error) => tracing::error!("the machine does not get its new size: {error}"),
    }
    drop(alone);
    open(machine);
}

fn open(machine: &Machine) {
    if let Err(error) = machine.forwarder.open() {
        tracing::error!("the forwarded ports stay closed: {error}");
    }
}

fn keep_telling(machine: &Weak<Machine>, wakeup: &Wakeup) -> Option<Hello> {
    let begun = Instant::now();
    std::thread::sleep(LEAD);
    while begun.elapsed() < TRYING {
        // Not held while waiting: a machine that ends must be able to go.
        let (vsock, bays) = machine.upgrade().map(|it| (it.vsock.clone(), Arc::downgrade(&it.bays)))?;
        let disks = bays.upgrade().map_or_else(Vec::new, |bays| bays.told());
        match tell(&vsock, wakeup, disks) {
            Ok(hello) => {
                if let Some(bays) = bays.upgrade() {
                    bays.replace_lost(true);
                }
                return Some(hello);
            }
            Err(error) => tracing::debug!("the agent has not heard of the wake yet: {error}"),
        }
        std::thread::sleep(PAUSE);
    }
    tracing::warn!("the guest's agent was not told that it woke: it does not answer");
    if let Some(machine) = machine.upgrade() {
        machine.bays.replace_lost(false);
    }
    None
}

fn tell(vsock: &Handle, wakeup: &Wakeup, disks: Vec<WakeDisk>) -> io::Result<Hello> {
    match agent::ask(vsock, &Request::Wake(wake(wakeup, disks)?), PATIENCE)? {
        Reply::Woken(Woken { boot_id, failed }) => {
            // It did what it could: it is awake, and its log has the rest.
            if let Some(why) = failed {
                tracing::warn!("the guest's agent could not do all that a wake asks for: {why}");
            }
            Ok(Hello { version: VERSION, boot_id })
        }
        other => Err(io::Error::other(format!("{other:?} in place of what came of the wake"))),
    }
}

fn wake(wakeup: &Wakeup, ephemeral: Vec<WakeDisk>) -> io::Result<Wake> {
    Ok(Wake {
        // One more than it was, whatever that is: to ask first would cost the guest as much as the wake itself.
        generation: 0,
        entropy: hex::encode(&random::bytes::<32>()?),
        identity: wakeup.identity.clone(),
        settings: wakeup.settings.clone(),
        ephemeral,
        // Last, so that it is as late as can be.
        realtime_ns: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_nanos() as u64),
    })
}
