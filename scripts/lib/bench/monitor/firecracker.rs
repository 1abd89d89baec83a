//! Firecracker, configured by a file and with its API socket, so that it does what `catnap run` does.
//!
//! It finds disk and vsock by paths that are relative to its folder: they are in its snapshots too, and so each
//! clone can have its own.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use catnap_guest::protocol::{Exec, Frame, Request, write_line};
use serde_json::json;

use super::{Guest, Monitor, Nap, Ready, Running, Site, agent, api};
use crate::Result;

/// How long a program in the guest may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// Firecracker, 1.10 or newer.
pub struct Firecracker {
    /// The program.
    pub program: PathBuf,
    /// What it boots.
    pub guest: Guest,
}

impl Monitor for Firecracker {
    fn name(&self) -> &str {
        "firecracker"
    }

    fn guest_memory(&self) -> u64 {
        self.guest.memory.bytes()
    }

    fn start(&self, folder: &Path) -> Result<Running> {
        // It knows raw disks only. A new one each time, as catnap has.
        to_raw(&self.guest.root, "qcow2", &folder.join("root"))?;
        fs::write(folder.join("config"), self.config().to_string())?;
        self.spawn(folder, &["--config-file", "config"])
    }

    fn pid(&self, running: &Running, _answer: &str) -> Result<u32> {
        Ok(running.child.id())
    }

    fn exec(&self, running: &Running, argv: &[&str]) -> Result<()> {
        let Site::Vsock(vsock) = &running.site else { return Err("it has no vsock".into()) };
        let mut stream = agent(vsock, PATIENCE)?;
        let argv = argv.iter().map(|word| word.to_string()).collect();
        write_line(&mut stream, &Request::Exec(Exec { argv, ..Exec::default() }))?;
        loop {
            match Frame::read(&mut stream)? {
                Some(Frame::Exit(0)) => return Ok(()),
                Some(Frame::Stdout(_) | Frame::Stderr(_)) => {}
                other => return Err(format!("the program in the guest: {other:?}").into()),
            }
        }
    }

    /// Its guest stands still until everything is written. The disk is not a part of its snapshots.
    fn snapshot(&self, running: &Running, folder: &Path, name: &str) -> Result<Option<Nap>> {
        let [state, memory, root] = ["state", "memory", "root"].map(|what| folder.join(format!("{name}.{what}")));
        let call = |method, path, body| api::call(&running.control, method, path, &body);
        let begun = Instant::now();
        call("PATCH", "/vm", json!({ "state": "Paused" }))?;
        let create = json!({ "snapshot_type": "Full", "snapshot_path": state, "mem_file_path": memory });
        call("PUT", "/snapshot/create", create)?;
        call("PATCH", "/vm", json!({ "state": "Resumed" }))?;
        let pause = begun.elapsed();
        to_raw(&folder.join("root"), "raw", &root)?;
        // In blocks of 512 bytes, whatever the filesystem's are (stat(2)).
        let written = fs::metadata(memory)?.blocks() * 512;
        let place = folder.join(name).to_string_lossy().into_owned();
        Ok(Some(Nap { pause, total: pause, written, place }))
    }

    fn wake(&self, nap: &Nap, folder: &Path, _clone: Option<u32>, ready: Ready) -> Result<Running> {
        let [state, memory, root] = ["state", "memory", "root"].map(|what| format!("{}.{what}", nap.place));
        to_raw(Path::new(&root), "raw", &folder.join("root"))?;
        ready()?;
        let mut running = self.spawn(folder, &[])?;
        let (control, begun) = (running.control.clone(), running.started);
        running.waking = Some(thread::spawn(move || {
            let memory = json!({ "backend_type": "File", "backend_path": memory });
            let load = json!({ "snapshot_path": state, "mem_backend": memory, "resume_vm": true });
            api::call(&control, "PUT", "/snapshot/load", &load).map(|()| begun.elapsed())
        }));
        Ok(running)
    }

    fn awake(&self, running: &mut Running) -> Result<(Option<Duration>, Option<Duration>)> {
        let waking = running.waking.take().ok_or("it was not woken")?;
        Ok((Some(waking.join().map_err(|_| "the thread that wakes it died")??), None))
    }

    fn forget(&self, nap: &Nap) -> Result<()> {
        ["state", "memory", "root"].iter().try_for_each(|what| Ok(fs::remove_file(format!("{}.{what}", nap.place))?))
    }
}

impl Firecracker {
    fn spawn(&self, folder: &Path, words: &[&str]) -> Result<Running> {
        let [console, control, vsock] = ["console", "control", "vsock"].map(|name| folder.join(name));
        let output = File::create(&console)?;
        let mut command = Command::new(&self.program);
        // What it says of itself is kept out of the guest's console.
        command.args(words).args(["--api-sock", "control", "--log-path", "log", "--level", "Error"]);
        File::create(folder.join("log"))?;
        command.current_dir(folder).stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let started = Instant::now();
        let child = command.spawn().map_err(|error| format!("{}: {error}", self.program.display()))?;
        Ok(Running {
            started,
            child,
            output: console.clone(),
            console,
            control,
            question: "/",
            site: Site::Vsock(vsock),
            waking: None,
            finish: Some(Box::new(|child| {
                child.kill()?;
                child.wait()?;
                Ok(())
            })),
        })
    }

    /// The same machine as catnap's: one vCPU, block, entropy, vsock, serial console.
    fn config(&self) -> serde_json::Value {
        json!({
            "boot-source": {
                "kernel_image_path": self.guest.kernel,
                "initrd_path": self.guest.initrd,
                "boot_args": self.guest.command_line,
            },
            "drives": [{ "drive_id": "root", "path_on_host": "root", "is_root_device": false, "is_read_only": false }],
            "machine-config": { "vcpu_count": 1, "mem_size_mib": self.guest.memory.bytes() >> 20 },
            "vsock": { "guest_cid": 3, "uds_path": "vsock" },
            "entropy": {},
        })
    }
}

/// Makes a raw disk of a disk, with holes where it has zeros.
fn to_raw(from: &Path, format: &str, to: &Path) -> Result<()> {
    let convert = Command::new("qemu-img").args(["convert", "-f", format, "-O", "raw"]).arg(from).arg(to).status();
    match convert.map_err(|error| format!("qemu-img: {error}"))?.success() {
        true => Ok(()),
        false => Err(format!("qemu-img could not copy the disk {}", from.display()).into()),
    }
}
