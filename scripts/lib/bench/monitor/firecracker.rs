//! Firecracker, configured by a file and with its API socket, so that it does what `catnap run` does.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use serde_json::json;

use super::{Guest, Monitor, Running, Site};
use crate::Result;

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
        let [config, console, control, vsock, root] =
            ["config.json", "console", "control", "vsock", "root"].map(|name| folder.join(name));
        // It knows raw disks only. A new one each time, as catnap has.
        let convert = Command::new("qemu-img").args(["convert", "-O", "raw"]).arg(&self.guest.root).arg(&root).status();
        if !convert.map_err(|error| format!("qemu-img: {error}"))?.success() {
            return Err("qemu-img could not convert the root disk".into());
        }
        fs::write(&config, self.config(&root, &vsock).to_string())?;
        let output = File::create(&console)?;
        let mut command = Command::new(&self.program);
        // What it says of itself is kept out of the guest's console.
        command.arg("--config-file").arg(&config).arg("--api-sock").arg(&control);
        command.arg("--log-path").arg(folder.join("log")).args(["--level", "Error"]);
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);

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
            finish: Some(Box::new(|child| {
                child.kill()?;
                child.wait()?;
                Ok(())
            })),
        })
    }

    fn pid(&self, running: &Running, _answer: &str) -> Result<u32> {
        Ok(running.child.id())
    }
}

impl Firecracker {
    /// The same machine as catnap's: one vCPU, block, entropy, vsock, serial console.
    fn config(&self, root: &Path, vsock: &Path) -> serde_json::Value {
        json!({
            "boot-source": {
                "kernel_image_path": self.guest.kernel,
                "initrd_path": self.guest.initrd,
                "boot_args": self.guest.command_line,
            },
            "drives": [{ "drive_id": "root", "path_on_host": root, "is_root_device": false, "is_read_only": false }],
            "machine-config": { "vcpu_count": 1, "mem_size_mib": self.guest.memory.bytes() >> 20 },
            "vsock": { "guest_cid": 3, "uds_path": vsock },
            "entropy": {},
        })
    }
}
