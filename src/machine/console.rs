//! The guest's serial console, seen from the host: a log file, and whoever is attached.
//!
//! The vCPU that sends a byte only puts it into a buffer. A thread of its own takes what has gathered at
//! the end of a line, or after [`PATIENCE`], and writes it to the log and to the listeners. A full buffer
//! makes the vCPU wait, so that a guest that chatters does not fill the monitor's memory.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::devices::serial::Serial;
use crate::sys::thread::small;

/// How long the beginning of a line (a prompt) may wait for its end.
const PATIENCE: Duration = Duration::from_millis(10);
/// How many bytes may wait for the writer.
const BUFFER: usize = 64 << 10;
/// How much of the past someone who attaches is shown.
const HISTORY: usize = 32 << 10;
/// When the log has grown to this, it becomes `….old`, and a new one begins.
const LOG_LIMIT: u64 = 4 << 20;
/// How many pieces of output a listener may be behind before it misses some.
const LISTENER_BACKLOG: usize = 256;

/// The console of one machine.
pub struct Console {
    shared: Arc<Shared>,
    serial: Mutex<Weak<Mutex<Serial>>>,
    writer: Option<JoinHandle<()>>,
}

struct Shared {
    flow: Mutex<Flow>,
    /// The writer waits here for output, and vCPUs for room.
    changed: Condvar,
}

#[derive(Default)]
struct Flow {
    waiting: Vec<u8>,
    closed: bool,
    history: VecDeque<u8>,
    listeners: Vec<SyncSender<Vec<u8>>>,
}

impl Console {
    /// A console that logs to `path`, going on at the end of what is there.
    pub fn new(path: &Path) -> io::Result<Console> {
        let mut log = Log::open(path)?;
        let shared = Arc::new(Shared { flow: Mutex::default(), changed: Condvar::new() });
        let from = shared.clone();
        let writer = small("console").spawn(move || {
            while let Some(output) = from.next_output() {
                if let Err(error) = log.append(&output) {
                    tracing::warn!("the console's log {} cannot be written: {error}", log.path.display());
                }
                from.publish(output);
            }
        })?;
        Ok(Console { shared, serial: Mutex::default(), writer: Some(writer) })
    }

    /// Where the serial port's output goes.
    pub fn output(&self) -> Box<dyn FnMut(u8) + Send> {
        let shared = self.shared.clone();
        Box::new(move |byte| shared.put(byte))
    }

    /// Where [`Console::input`] goes.
    pub fn connect(&self, serial: &Arc<Mutex<Serial>>) {
        *self.serial.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(serial);
    }

    /// What was shown lately, and a channel that brings what comes. A listener that does not keep up misses
    /// output; one that is dropped is forgotten.
    pub fn attach(&self) -> (Vec<u8>, Receiver<Vec<u8>>) {
        let (sender, receiver) = sync_channel(LISTENER_BACKLOG);
        let mut flow = self.shared.lock();
        if !flow.closed {
            flow.listeners.push(sender);
        }
        (flow.history.iter().copied().collect(), receiver)
    }

    /// Types on the console. Gives back how many bytes the guest's serial port had room for.
    pub fn input(&self, bytes: &[u8]) -> usize {
        let serial = self.serial.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
        let Some(serial) = serial else { return 0 };
        serial.lock().map_or(0, |mut serial| serial.input(bytes))
    }
}

impl Drop for Console {
    /// Nothing that the guest has sent is lost.
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Flow> {
        self.flow.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, byte: u8) {
        let mut flow = self.lock();
        while flow.waiting.len() >= BUFFER && !flow.closed {
            flow = self.changed.wait(flow).unwrap_or_else(PoisonError::into_inner);
        }
        flow.waiting.push(byte);
        // The first byte starts the writer's patience, the end of a line ends it.
        if flow.waiting.len() == 1 || byte == b'\n' {
            self.changed.notify_all();
        }
    }

    /// Blocks until there is output to write; `None` after the last.
    fn next_output(&self) -> Option<Vec<u8>> {
        let mut flow = self.lock();
        while flow.waiting.is_empty() {
            if flow.closed {
                return None;
            }
            flow = self.changed.wait(flow).unwrap_or_else(PoisonError::into_inner);
        }
        let unfinished = |flow: &mut Flow| flow.waiting.last() != Some(&b'\n') && !flow.closed;
        let (mut flow, _) =
            self.changed.wait_timeout_while(flow, PATIENCE, unfinished).unwrap_or_else(PoisonError::into_inner);
        let output = std::mem::take(&mut flow.waiting);
        self.changed.notify_all();
        Some(output)
    }

    fn publish(&self, output: Vec<u8>) {
        let mut flow = self.lock();
        flow.history.extend(&output);
        let excess = flow.history.len().saturating_sub(HISTORY);
        flow.history.drain(..excess);
        flow.listeners
            .retain(|listener| !matches!(listener.try_send(output.clone()), Err(TrySendError::Disconnected(_))));
    }
}

struct Log {
    path: PathBuf,
    file: File,
    length: u64,
}

impl Log {
    fn open(path: &Path) -> io::Result<Log> {
        let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
        let length = file.metadata()?.len();
        Ok(Log { path: path.into(), file, length })
    }

    fn append(&mut self, output: &[u8]) -> io::Result<()> {
        if self.length >= LOG_LIMIT {
            let mut old = self.path.clone().into_os_string();
            old.push(".old");
            std::fs::rename(&self.path, old)?;
            *self = Log::open(&self.path)?;
        }
        self.length += output.len() as u64;
        self.file.write_all(output)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_reaches_the_log_and_those_who_listen() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console.log");
        let console = Console::new(&path).unwrap();
        let mut out = console.output();
        let (history, live) = console.attach();
        assert!(history.is_empty());
        b"miau\n$ ".iter().for_each(|byte| out(*byte));
        let mut seen = Vec::new();
        while seen.len() < 7 {
            seen.extend(live.recv_timeout(Duration::from_secs(10)).unwrap());
        }
        assert_eq!(seen, b"miau\n$ ");
        assert_eq!(console.attach().0, b"miau\n$ ");
        out(b'!');
        drop((out, console));
        assert_eq!(std::fs::read(&path).unwrap(), b"miau\n$ !");
    }

    #[test]
    fn a_guest_that_chatters_fills_neither_memory_nor_disk() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console.log");
        let console = Console::new(&path).unwrap();
        let (_, _never_reads) = console.attach();
        let mut out = console.output();
        (0..2 * LOG_LIMIT + 1000).for_each(|n| out(if n % 100 == 99 { b'\n' } else { b'x' }));
        assert!(console.attach().0.len() <= HISTORY);
        drop((out, console));
        let sizes = ["console.log", "console.log.old"].map(|name| folder.path().join(name).metadata().unwrap().len());
        assert!(sizes.iter().all(|size| *size <= LOG_LIMIT + BUFFER as u64), "{sizes:?}");
    }
}
