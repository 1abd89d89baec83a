//! Catnap itself, by its command line, as people use it.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use ::catnap::control::protocol::Status;
use ::catnap::snapshot::Role;
use ::catnap::spec::{Name, Size};
use ::catnap::store::Store;
use ::catnap::sys::home::Home;

use super::{Guest, Monitor, Running, Site};
use crate::Result;

/// The image that is booted.
const IMAGE: &str = "kitten";
/// The machine's name. Nobody else's can have it: `scripts/bench` has a home of its own.
const NAME: &str = "bench";

/// A catnap that works with the home of the environment.
pub struct Catnap {
    program: PathBuf,
    kernel: Option<PathBuf>,
    memory: Size,
    append: String,
    store: Store,
    /// The machine's name as the store wants it.
    name: Name,
}

impl Catnap {
    /// `kernel` in place of the image's own; `append` to the kernel's command line.
    pub fn new(program: &Path, kernel: Option<&Path>, memory: Size, append: &str) -> Result<Catnap> {
        Ok(Catnap {
            program: std::path::absolute(program)?,
            kernel: kernel.map(std::path::absolute).transpose()?,
            memory,
            append: append.into(),
            store: Store::open(&Home::from_env()?)?,
            name: NAME.parse()?,
        })
    }

    /// Boots once without a clock, which brings everything into the page cache, and finds out what exactly is
    /// booted, so that others can boot the same. What they need is copied to `folder`.
    pub fn warm_up(&self, folder: &Path) -> Result<Guest> {
        // What an earlier run may have left behind when it was killed.
        let _ = self.verb("rm").args(["--force", NAME]).output();
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
        let output = folder.join("output");
        let mut remove = self.verb("rm");
        remove.args(["--force", NAME]).stdout(Stdio::null()).stderr(Stdio::null());
        let home = self.store.home();
        let port = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port();
        let mut command = self.run(port);
        let file = File::create(&output)?;
        command.stdout(file.try_clone()?).stderr(file);

        let started = Instant::now();
        let child = command.spawn().map_err(|error| format!("{}: {error}", self.program.display()))?;
        Ok(Running {
            started,
            child,
            output,
            console: home.state.join("logs").join(NAME).join("console.log"),
            control: home.runtime.join(NAME).join("control.sock"),
            question: "/v1/machine",
            site: Site::Tcp(port),
            finish: Some(Box::new(move |run| {
                run.wait()?;
                remove.status()?;
                Ok(())
            })),
        })
    }

    fn pid(&self, _running: &Running, answer: &str) -> Result<u32> {
        let body = answer.split_once("\r\n\r\n").ok_or("the control socket's answer has no body")?.1;
        Ok(serde_json::from_str::<Status>(body)?.pid)
    }
}

/// What a command says on its standard output.
fn said(command: &mut Command) -> Result<String> {
    let output = command.output()?;
    match output.status.success() {
        true => Ok(String::from_utf8(output.stdout)?),
        false => Err(String::from_utf8_lossy(&output.stderr).into()),
    }
}
