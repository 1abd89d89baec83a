//! The monitors that can be measured. To add one: a file beside this, and a line in [`Peer`].

mod api;
mod catnap;
mod firecracker;

use std::error::Error;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::str::FromStr;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ::catnap::spec::Size;
use catnap_guest::protocol::{AGENT_PORT, Request, write_line};

pub use self::catnap::{Catnap, free_port};
use self::firecracker::Firecracker;
use crate::Result;

/// What every monitor boots.
#[derive(Clone)]
pub struct Guest {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
    /// The command line.
    pub command_line: String,
    /// The root disk, qcow2.
    pub root: PathBuf,
    /// RAM.
    pub memory: Size,
}

impl Guest {
    /// The same with other RAM.
    pub fn with_memory(&self, memory: Size) -> Guest {
        Guest { memory, ..self.clone() }
    }
}

/// A kind of monitor.
pub trait Monitor {
    /// What it is called in the report.
    fn name(&self) -> &str;
    /// The size of the guest's memory, in bytes.
    fn guest_memory(&self) -> u64;
    /// Starts a machine; its files lie in `folder`, which is empty. What can be prepared is prepared before
    /// the clock starts.
    fn start(&self, folder: &Path) -> Result<Running>;
    /// The process that is the monitor, when the control socket has given `answer`.
    fn pid(&self, running: &Running, answer: &str) -> Result<u32>;
    /// Runs a program in the guest and waits for its success.
    fn exec(&self, running: &Running, argv: &[&str]) -> Result<()>;
    /// Takes a snapshot with memory, which the machine goes on after; what files it needs lie in `folder`, if the
    /// monitor has no place for them. `None` when it cannot do that.
    fn snapshot(&self, running: &Running, folder: &Path, name: &str) -> Result<Option<Nap>>;
    /// Wakes a machine from a snapshot, in the empty `folder`; with `clone`, as one of many. The machine that
    /// was put to sleep is gone by now. `ready` is called right before the clock starts.
    fn wake(&self, nap: &Nap, folder: &Path, clone: Option<u32>, ready: Ready) -> Result<Running>;
    /// Waits until the waking is over, and tells when the vCPUs ran and when the guest's agent had answered, as far
    /// as the monitor says so.
    fn awake(&self, running: &mut Running) -> Result<(Option<Duration>, Option<Duration>)>;
    /// Removes a snapshot.
    fn forget(&self, nap: &Nap) -> Result<()>;
}

/// The last preparation for the clock.
pub type Ready = fn() -> Result<()>;

/// A snapshot with memory.
pub struct Nap {
    /// How long the guest stood still.
    pub pause: Duration,
    /// How long all of it took.
    pub total: Duration,
    /// How many bytes of memory were written.
    pub written: u64,
    /// Where its monitor finds it again.
    pub place: String,
}

/// A machine that was started.
pub struct Running {
    /// When its first process was.
    pub started: Instant,
    /// That process.
    pub child: Child,
    /// The file that the process's own output goes to.
    pub output: PathBuf,
    /// The file that its console is written to.
    pub console: PathBuf,
    /// Its control socket, which speaks HTTP.
    pub control: PathBuf,
    /// A path that the control socket answers with 200.
    pub question: &'static str,
    /// Where the guest's site is.
    pub site: Site,
    /// What wakes it, where that is not the process itself; gives the time at which it ran.
    pub waking: Option<JoinHandle<std::result::Result<Duration, String>>>,
    /// Ends the process, and all that belongs to the machine.
    pub finish: Option<Finish>,
}

/// How a machine is ended, given its first process.
pub type Finish = Box<dyn FnOnce(&mut Child) -> Result<()>>;

impl Running {
    /// Ends it, once.
    pub fn end(&mut self) -> Result<()> {
        self.finish.take().map_or(Ok(()), |finish| finish(&mut self.child))
    }

    /// The error, with the end of what the machine and its process have said: for whoever must find out more.
    pub fn blame(&self, error: &dyn Error) -> Box<dyn Error> {
        format!("{error}\n{}", self.said()).into()
    }

    /// The end of what the machine and its process have said.
    pub fn said(&self) -> String {
        let read = |path: &Path| String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
        let both = read(&self.console) + &read(&self.output);
        let lines: Vec<_> = both.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.end();
    }
}

/// How the guest's port 80 is reached.
pub enum Site {
    /// By a port of the host.
    Tcp(u16),
    /// By a Unix socket that leads to the guest's vsock, as Firecracker has it; there the agent forwards.
    Vsock(PathBuf),
}

/// A connection to the site.
pub trait Stream: Read + Write {}
impl Stream for TcpStream {}
impl Stream for UnixStream {}

impl Site {
    /// Connects; `patience` is for each answer.
    pub fn connect(&self, patience: Duration) -> io::Result<Box<dyn Stream>> {
        match self {
            Site::Tcp(port) => {
                let stream = TcpStream::connect(("127.0.0.1", *port))?;
                stream.set_read_timeout(Some(patience))?;
                Ok(Box::new(stream))
            }
            Site::Vsock(path) => {
                let mut stream = agent(path, patience)?;
                write_line(&mut stream, &Request::Forward { port: 80 })?;
                Ok(Box::new(stream))
            }
        }
    }
}

/// A connection to the guest's agent through a Unix socket that leads to the guest's vsock.
fn agent(vsock: &Path, patience: Duration) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(vsock)?;
    stream.set_read_timeout(Some(patience))?;
    writeln!(stream, "CONNECT {AGENT_PORT}")?;
    let mut answer = String::new();
    // Nothing follows the answer before the guest is spoken to, so nothing is lost in the buffer.
    BufReader::new(&stream).read_line(&mut answer)?;
    if answer.starts_with("OK ") { Ok(stream) } else { Err(io::ErrorKind::ConnectionRefused.into()) }
}

/// A monitor that is measured beside Catnap, as it is named on the command line: `firecracker=FILE`.
#[derive(Clone)]
pub struct Peer {
    make: fn(PathBuf, Guest) -> Box<dyn Monitor>,
    program: PathBuf,
}

impl Peer {
    /// The monitor, which will boot `guest`.
    pub fn monitor(&self, guest: Guest) -> Box<dyn Monitor> {
        (self.make)(self.program.clone(), guest)
    }
}

impl FromStr for Peer {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Peer, String> {
        let (kind, program) =
            text.split_once('=').ok_or("write KIND=FILE, such as firecracker=/usr/bin/firecracker")?;
        let make: fn(PathBuf, Guest) -> Box<dyn Monitor> = match kind {
            "firecracker" => |program, guest| Box::new(Firecracker { program, guest }),
            _ => return Err(format!("no monitor called {kind} is known here; firecracker is")),
        };
        let program = std::path::absolute(program).map_err(|error| error.to_string())?;
        if program.is_file() { Ok(Peer { make, program }) } else { Err(format!("{} is no file", program.display())) }
    }
}
