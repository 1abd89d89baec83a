//! What other threads ask of the device.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::stream::Stream;

/// Gets one end of each connection that the guest opens to a port. It runs in the device's worker, so it
/// must hand the stream to someone else and return.
pub type Listener = Box<dyn Fn(UnixStream) + Send>;

/// A wish that the worker fulfils.
pub enum Command {
    Connect { port: u32, preamble: Vec<u8>, stream: Stream },
    Listen { port: u32, listener: Listener },
    HangUp,
}

/// Lets any thread open connections to the guest and listen for its own. Clones lead to the same device.
///
/// Nothing here waits for the guest.
#[derive(Clone)]
pub struct Handle {
    commands: Sender<Command>,
    shared: Arc<Shared>,
}

/// The worker's end of all handles.
pub struct Inbox {
    commands: Receiver<Command>,
    shared: Arc<Shared>,
}

struct Shared {
    /// Readable when there are commands.
    doorbell: EventFd,
    /// Whether the guest's driver is there. If not, nobody may ever look at the commands.
    online: AtomicBool,
}

impl Inbox {
    /// The next command, if there is one.
    pub fn next(&self) -> Option<Command> {
        self.commands.try_recv().ok()
    }

    /// Readable when there are commands, until it is silenced.
    pub fn doorbell_fd(&self) -> RawFd {
        self.shared.doorbell.as_raw_fd()
    }

    /// Call it before looking at the commands, so that whoever rings from now on is heard again.
    pub fn silence(&self) {
        let _ = self.shared.doorbell.read();
    }

    /// The guest's driver came or went.
    pub fn set_online(&self, online: bool) {
        self.shared.online.store(online, Ordering::Release);
    }

    /// Whether the guest's driver is there.
    pub fn is_online(&self) -> bool {
        self.shared.online.load(Ordering::Acquire)
    }
}

impl Handle {
    /// A handle and the inbox that it leads to.
    pub fn new() -> io::Result<(Handle, Inbox)> {
        let (sender, commands) = mpsc::channel();
        let shared = Arc::new(Shared { doorbell: EventFd::new(EFD_NONBLOCK)?, online: AtomicBool::new(false) });
        Ok((Handle { commands: sender, shared: shared.clone() }, Inbox { commands, shared }))
    }

    /// Connects `stream`, any stream socket, to the guest's `port`. The guest receives `preamble` and then
    /// what the stream receives.
    ///
    /// If the guest refuses, does not answer for fifteen seconds, or has no driver yet, the stream is closed
    /// (TCP: reset).
    pub fn connect(&self, port: u32, preamble: Vec<u8>, stream: OwnedFd) {
        let stream = Stream::new(stream);
        if self.shared.online.load(Ordering::Acquire) {
            self.send(Command::Connect { port, preamble, stream });
        }
    }

    /// Connects to the guest's `port`. The stream is there at once; a refusal is seen as its end.
    pub fn open(&self, port: u32) -> io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        self.connect(port, Vec::new(), theirs.into());
        Ok(ours)
    }

    /// Calls `listener` for each connection that the guest opens to `port` of the host from now on. A port
    /// without a listener refuses.
    pub fn listen(&self, port: u32, listener: Listener) {
        self.send(Command::Listen { port, listener });
    }

    /// Ends all connections: the guest has ended, and nobody in it will. Its driver is gone too.
    pub fn hang_up(&self) {
        self.send(Command::HangUp);
    }

    fn send(&self, command: Command) {
        // A command that cannot be sent is dropped, and with it its stream.
        if self.commands.send(command).is_ok() {
            // It fails only when the counter is full, and then the worker is awake already.
            let _ = self.shared.doorbell.write(1);
        }
    }
}
