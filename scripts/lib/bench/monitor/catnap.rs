//! Catnap itself, by its command line, as people use it.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ::catnap::control::protocol::{Status, Taken};
use ::catnap::snapshot::Role;
use ::catnap::spec::{Name, Size};
use ::catnap::store::Store;
use ::catnap::sys::home::Home;

use serde_json::Value;

use super::{Guest, Monitor, Nap, Ready, Running, Site};
use crate::Result;

/// The image that is booted.
const IMAGE: &str = "kitten";
/// The machine's name. Nobody else's can have it: `scripts/bench` has a home of its own.
const NAME: &str = "bench";

/// A catnap that works with a home.
#[derive(Clone)]
pub struct Catnap {
    program: PathBuf,
    kernel: Option<PathBuf>,
    memory: Size,
    append: String,
    /// When it is not that of the environment.
    home: Option<PathBuf>,
    store: Store,
    /// The machine's name as the store wants it.
    name: Name,
}

impl Catnap {
    /// With the home of the environment; `kernel` in place of the image's own; `append` to the kernel's command line.
    pub fn new(program: &Path, kernel: Option<&Path>, append: &str) -> Result<Catnap> {
        Ok(Catnap {
            program: std::path::absolute(program)?,
            kernel: kernel.map(std::path::absolute).transpose()?,
            memory: Size::mib(128),
            append: append.into(),
            home: None,
            store: Store::open(&Home::from_env()?)?,
            name: NAME.parse()?,
        })
    }

    /// The same for guests with other RAM.
    pub fn with_memory(&self, memory: Size) -> Catnap {
        Catnap { memory, ..self.clone() }
    }

    /// The same with a home of its own in `folder`, which has a copy of what this one has.
    pub fn moved_to(&self, folder: &Path) -> Result<Catnap> {
        let copied = Command::new("cp").arg("-a").arg(&self.store.home().data).arg(folder.join("data")).status()?;
        if !copied.success() {
            return Err("the home could not be copied".into());
        }
        Ok(Catnap { home: Some(folder.into()), store: Store::open(&Home::at(folder)?)?, ..self.clone() })
    }

    /// Another one with an empty home in `folder`.
    pub fn elsewhere(&self, folder: &Path) -> Result<Catnap> {
        Ok(Catnap { home: Some(folder.into()), store: Store::open(&Home::at(folder)?)?, ..self.clone() })
    }

    /// Pushes a snapshot; how many bytes were sent, and how long that took.
    pub fn push(&self, nap: &Nap, target: &str) -> Result<(u64, Duration)> {
        let begun = Instant::now();
        let pushed = said(self.verb("snapshot").args(["push", &nap.place, target, "--yes", "--json"]))?;
        let pushed: Value = serde_json::from_str(&pushed)?;
        Ok((pushed["sent_bytes"].as_u64().ok_or("a push does not tell what it sent")?, begun.elapsed()))
    }

    /// Pulls a snapshot; how long that took.
    pub fn pull(&self, source: &str) -> Result<Duration> {
        let begun = Instant::now();
        said(self.verb("snapshot").args(["pull", source]))?;
        Ok(begun.elapsed())
    }

    /// Writes a snapshot to a file; how long that took.
    pub fn export(&self, nap: &Nap, file: &Path) -> Result<Duration> {
        let begun = Instant::now();
        said(self.verb("snapshot").args(["export", &nap.place, "--yes"]).arg(file))?;
        Ok(begun.elapsed())
    }

    /// Takes a snapshot in from a file; how long that took.
    pub fn import(&self, file: &Path) -> Result<Duration> {
        let begun = Instant::now();
        said(self.verb("snapshot").arg("import").arg(file))?;
        Ok(begun.elapsed())
    }

    /// The folder with a snapshot's files.
    pub fn files_of(&self, nap: &Nap) -> Result<PathBuf> {
        Ok(self.store.resolve(&nap.place)?.dir)
    }

    /// Wakes a machine from a registry.
    pub fn wake_at(&self, source: &str, folder: &Path) -> Result<Running> {
        let port = free_port()?;
        let mut command = self.verb("restore");
        command.args([source, "--publish", &format!("{port}:80"), "--timeout", "120"]);
        self.spawn(command, NAME, port, folder)
    }

    /// Begins to give the machine so many vCPUs, and so many times its memory.
    pub fn resize(&self, cpus: u32) -> Result<Child> {
        Ok(self.verb("resize").arg(NAME).args(self.size(cpus)).stdout(Stdio::null()).spawn()?)
    }

    /// Wakes a snapshot at another size.
    pub fn wake_sized(&self, nap: &Nap, cpus: u32, folder: &Path) -> Result<Running> {
        let port = free_port()?;
        let mut command = self.verb("restore");
        command.arg(&nap.place).args(self.size(cpus));
        command.args(["--publish", &format!("{port}:80"), "--timeout", "120"]);
        self.spawn(command, NAME, port, folder)
    }

    fn size(&self, cpus: u32) -> [String; 4] {
        let memory = Size(self.memory.bytes() * u64::from(cpus));
        ["--cpus".into(), cpus.to_string(), "--memory".into(), memory.to_string()]
    }

    /// How many answers a second the machine's page gives to so many clients at a time.
    pub fn load(&self, clients: u32) -> Result<f64> {
        let clients = clients.to_string();
        let load = said(self.verb("load").args([NAME, "--seconds", "5", "--connections", &clients, "--json"]))?;
        let load: Value = serde_json::from_str(&load)?;
        Ok(load["requests_per_second"].as_f64().ok_or("load does not tell what came of it")?)
    }

    /// A folder on the filesystem where it keeps everything, for what can be made again.
    pub fn beside(&self) -> &Path {
        &self.store.home().cache
    }

    /// Boots once without a clock, which brings everything into the page cache, and finds out what exactly is
    /// booted, so that others can boot the same. What they need is copied to `folder`.
    pub fn warm_up(&self, folder: &Path) -> Result<Guest> {
        // What an earlier run may have left behind when it was killed.
        let _ = self.verb("rm").args(["--force", NAME]).output();
        let snapshots = ["idle", "ticking", "small", "large"].map(|tag| format!("{NAME}@{tag}"));
        let _ = self.verb("snapshot").arg("rm").args(snapshots).output();
        let mut running = self.start(folder)?;
        let guest = self.learn(&mut running, folder);
        running.end()?;
        guest
    }

    fn learn(&self, running: &mut Running, folder: &Path) -> Result<Guest> {
        // `run` is done when the guest's agent answers, and not before that can anything be executed.
        if !running.child.wait()?.success() {
            return Err(running.said().into());
        }
        let shown = said(self.verb("exec").args([NAME, "--", "cat", "/proc/cmdline"]))?;
        let machine = self.store.machine(&self.name)?;
        let image = self.store.resolve(&machine.spec.image)?;
        let file = |role| image.file(role).ok_or("the image lacks a file");
        let (kernel, initrd) = match machine.spec.kernel {
            // Its initramfs is the machine's own, and goes with it.
            Some(kernel) => (kernel, machine.dir.join("initrd")),
            None => (file(Role::Kernel)?, file(Role::Initrd)?),
        };
        let copy = |from: PathBuf, name: &str| -> Result<PathBuf> {
            let to = folder.join(name);
            fs::copy(&from, &to).map_err(|error| format!("{}: {error}", from.display()))?;
            Ok(to)
        };
        Ok(Guest {
            kernel: copy(kernel, "kernel")?,
            initrd: copy(initrd, "initrd")?,
            command_line: shown.trim().into(),
            root: file(Role::Disk)?,
            memory: self.memory,
        })
    }

    fn verb(&self, verb: &str) -> Command {
        let mut command = Command::new(&self.program);
        command.arg(verb).stdin(Stdio::null());
        if let Some(home) = &self.home {
            command.env("CATNAP_HOME", home);
        }
        command
    }

    fn run(&self, port: u16) -> Command {
        let mut command = self.verb("run");
        command.args([IMAGE, "--name", NAME, "--cpus", "1", "--memory", &self.memory.to_string()]);
        command.args(["--publish", &format!("{port}:80"), "--append", &self.append]);
        command.args(["--timeout", "120"]);
        if let Some(kernel) = &self.kernel {
            command.arg("--kernel").arg(kernel);
        }
        command
    }
}

impl Monitor for Catnap {
    fn name(&self) -> &str {
        "catnap"
    }

    fn guest_memory(&self) -> u64 {
        self.memory.bytes()
    }

    fn start(&self, folder: &Path) -> Result<Running> {
        let port = free_port()?;
        self.spawn(self.run(port), NAME, port, folder)
    }

    fn pid(&self, _running: &Running, answer: &str) -> Result<u32> {
        let body = answer.split_once("\r\n\r\n").ok_or("the control socket's answer has no body")?.1;
        Ok(serde_json::from_str::<Status>(body)?.pid)
    }

    fn exec(&self, _running: &Running, argv: &[&str]) -> Result<()> {
        said(self.verb("exec").args([NAME, "--"]).args(argv)).map(drop)
    }

    fn snapshot(&self, _running: &Running, _folder: &Path, name: &str) -> Result<Option<Nap>> {
        let place = format!("{NAME}@{name}");
        let begun = Instant::now();
        let taken = said(self.verb("snapshot").args(["create", &place, "--json"]))?;
        let total = begun.elapsed();
        let taken: Taken = serde_json::from_str(&taken)?;
        let pause = Duration::from_micros(taken.pause_us);
        Ok(Some(Nap { pause, total, written: taken.bytes_written, place }))
    }

    fn wake(&self, nap: &Nap, folder: &Path, clone: Option<u32>, ready: Ready) -> Result<Running> {
        let port = free_port()?;
        let name = clone.map_or(NAME.into(), |number| format!("{NAME}-{number}"));
        let mut command = match clone {
            None => self.verb("restore"),
            Some(_) => self.verb("clone"),
        };
        command.arg(&nap.place).args(clone.map(|_| &name));
        command.args(["--publish", &format!("{port}:80"), "--json", "--timeout", "120"]);
        ready()?;
        self.spawn(command, &name, port, folder)
    }

    fn awake(&self, running: &mut Running) -> Result<(Option<Duration>, Option<Duration>)> {
        if !running.child.wait()?.success() {
            return Err("it could not be woken".into());
        }
        let answer: Value = serde_json::from_slice(&fs::read(running.output.with_extension("json"))?)?;
        // `clone` gives a list.
        let woken = answer.get(0).unwrap_or(&answer);
        let time = |key: &str| woken[key].as_u64().map(Duration::from_micros);
        Ok((time("resume_us"), time("ready_us")))
    }

    fn forget(&self, nap: &Nap) -> Result<()> {
        said(self.verb("snapshot").args(["rm", &nap.place])).map(drop)
    }
}

impl Catnap {
    /// Starts a command that brings up a machine.
    fn spawn(&self, mut command: Command, name: &str, port: u16, folder: &Path) -> Result<Running> {
        let output = folder.join("output");
        let mut remove = self.verb("rm");
        remove.args(["--force", name]).stdout(Stdio::null()).stderr(Stdio::null());
        let home = self.store.home();
        command.stdout(File::create(output.with_extension("json"))?).stderr(File::create(&output)?);
        let started = Instant::now();
        let child = command.spawn().map_err(|error| format!("{}: {error}", self.program.display()))?;
        Ok(Running {
            started,
            child,
            output,
            console: home.state.join("logs").join(name).join("console.log"),
            control: home.runtime.join(name).join("control.sock"),
            question: "/v1/machine",
            site: Site::Tcp(port),
            waking: None,
            finish: Some(Box::new(move |run| {
                run.wait()?;
                remove.status()?;
                Ok(())
            })),
        })
    }
}

/// A port that nobody had a moment ago.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

/// What a command says on its standard output.
fn said(command: &mut Command) -> Result<String> {
    let output = command.output()?;
    match output.status.success() {
        true => Ok(String::from_utf8(output.stdout)?),
        false => Err(String::from_utf8_lossy(&output.stderr).into()),
    }
}
