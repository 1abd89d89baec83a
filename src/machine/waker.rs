//! Tells the guest's agent that its machine woke: what time it is, and that it may be one of many now.

use std::io::{self, Read};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use catnap_guest::protocol::{
    AGENT_PORT, Hello, Identity, Reply, Request, Status, VERSION, Wake, WakeDisk, read_line, write_line,
};

use super::Machine;
use crate::devices::virtio::vsock::Handle;
use crate::sys::thread::small;

/// How long the agent may take for one answer; its hooks have ten seconds.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long an agent that does not answer is asked again. One that was not up yet when the snapshot was taken
/// says hello when it is.
const TRYING: Duration = Duration::from_secs(120);
const PAUSE: Duration = Duration::from_millis(20);

/// How a machine is to wake.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wakeup {
    /// The host name of a copy that must be told from its original; `None` for a machine that stays itself.
    pub new_identity: Option<String>,
}

/// Starts a thread that speaks to the agent until it has understood. What the agent then says of itself counts
/// as its hello.
pub(super) fn start(machine: &Arc<Machine>, wakeup: Wakeup) -> io::Result<()> {
    let machine = Arc::downgrade(machine);
    small("waker").spawn(move || keep_telling(&machine, &wakeup)).map(drop)
}

fn keep_telling(machine: &Weak<Machine>, wakeup: &Wakeup) {
    let begun = Instant::now();
    while begun.elapsed() < TRYING {
        // Not held while waiting: a machine that ends must be able to go.
        let parts = machine.upgrade().map(|it| (it.vsock.clone(), it.greeting.clone(), Arc::downgrade(&it.bays)));
        let Some((vsock, greeting, bays)) = parts else { return };
        let disks = bays.upgrade().map_or_else(Vec::new, |bays| bays.told());
        match tell(&vsock, wakeup, disks) {
            Ok(hello) => {
                if let Some(bays) = bays.upgrade() {
                    bays.replace_lost(true);
                }
                return greeting.take(hello);
            }
            Err(error) => tracing::debug!("the agent has not heard of the wake yet: {error}"),
        }
        std::thread::sleep(PAUSE);
    }
    tracing::warn!("the guest's agent was not told that it woke: it does not answer");
    if let Some(machine) = machine.upgrade() {
        machine.bays.replace_lost(false);
    }
}

fn tell(vsock: &Handle, wakeup: &Wakeup, disks: Vec<WakeDisk>) -> io::Result<Hello> {
    let status = match ask(vsock, &Request::Status)? {
        Reply::Status(status) => status,
        other => return Err(io::Error::other(format!("{other:?} in place of a status"))),
    };
    match ask(vsock, &Request::Wake(wake(&status, wakeup, disks)?))? {
        Reply::Ok => {}
        // It did what it could: it is awake, and its log has the rest.
        Reply::Error(why) => tracing::warn!("the guest's agent could not do all that a wake asks for: {why}"),
        other => return Err(io::Error::other(format!("{other:?} in place of an ok"))),
    }
    Ok(Hello { version: VERSION, boot_id: status.boot_id })
}

fn wake(status: &Status, wakeup: &Wakeup, ephemeral: Vec<WakeDisk>) -> io::Result<Wake> {
    let identity = wakeup
        .new_identity
        .as_ref()
        .map(|hostname| Ok::<_, io::Error>(Identity { machine_id: random_hex(16)?, hostname: hostname.clone() }));
    Ok(Wake {
        generation: status.generation.saturating_add(1),
        entropy: random_hex(32)?,
        identity: identity.transpose()?,
        ephemeral,
        // Last, so that it is as late as can be.
        realtime_ns: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_nanos() as u64),
    })
}

fn ask(vsock: &Handle, request: &Request) -> io::Result<Reply> {
    let mut stream = vsock.open(AGENT_PORT)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write_line(&mut stream, request)?;
    read_line(&mut stream)
}

/// So many bytes of the host's entropy, in hexadecimal.
fn random_hex(count: usize) -> io::Result<String> {
    let mut bytes = vec![0; count];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
