//! What a registry is sent of a guest's snapshots: of the first, of a second that had nothing to do, and of a third
//! that wrote a file; and how long a colleague takes who has none of it.

use std::fs::{self, File};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::Result;
use crate::look::{self, until};
use crate::monitor::{Catnap, Monitor, Running, free_port};
use crate::report::{Goal, Row, ms};

/// What is measured.
pub const ROWS: [Row; 7] = [
    Row::new("first_sent_mib", "first push sent, MiB", Goal::None),
    Row::new("second_sent_percent", "second, idle, sent % of it", Goal::AtMost(5.0)),
    Row::new("third_sent_percent", "third, 1 MiB written, sent %", Goal::None),
    Row::new("first_push_ms", "first push, ms", Goal::None),
    Row::new("second_push_ms", "second push, ms", Goal::None),
    Row::new("restore_page_ms", "restore REGISTRY/… to page, ms", Goal::None),
    Row::new("second_pull_ms", "pull of the second, ms", Goal::None),
];

/// What the guest has for itself before each snapshot.
const REST: Duration = Duration::from_secs(2);
/// Something for the guest to do.
const WRITE: [&str; 3] = ["sh", "-c", "dd if=/dev/urandom of=/root/written bs=1024 count=1024 && sync"];

/// Boots a guest, and pushes three snapshots of it, which a colleague then wakes.
pub fn measure(catnap: &Catnap, registry: &Path, folder: &Path) -> Result<Vec<Option<f64>>> {
    let registry = Registry::start(registry, folder)?;
    let mut running = catnap.start(folder)?;
    let pushes = push_three(catnap, &registry, folder, &running).map_err(|error| running.blame(&*error));
    running.end()?;
    let [first, second, third] = pushes?;
    let there = folder.join("colleague");
    let colleague = catnap.elsewhere(&there)?;
    let mut woken = colleague.wake_at(&registry.at("first"), &there)?;
    let page =
        until(woken.started, "page", || look::page(&woken)).map_err(|error| format!("{error}\n{}", woken.said()));
    woken.end()?;
    let pulled = colleague.pull(&registry.at("second"))?;
    let percent = |sent: u64| sent as f64 * 100.0 / first.0 as f64;
    Ok([
        first.0 as f64 / 1048576.0,
        percent(second.0),
        percent(third.0),
        ms(first.1),
        ms(second.1),
        ms(page?.0),
        ms(pulled),
    ]
    .map(Some)
    .into())
}

/// Bytes that were sent, and how long that took.
type Sent = (u64, Duration);

fn push_three(catnap: &Catnap, registry: &Registry, folder: &Path, running: &Running) -> Result<[Sent; 3]> {
    look::up(running)?;
    let mut naps = Vec::new();
    let mut push = |name: &str| -> Result<Sent> {
        thread::sleep(REST);
        let nap = catnap.snapshot(running, folder, name)?.ok_or("catnap takes snapshots")?;
        let sent = catnap.push(&nap, &registry.at(name));
        naps.push(nap);
        sent
    };
    let (first, second) = (push("first")?, push("second")?);
    catnap.exec(running, &WRITE)?;
    let third = push("third")?;
    naps.iter().rev().try_for_each(|nap| catnap.forget(nap))?;
    Ok([first, second, third])
}

/// A registry that is empty. It ends with this value.
struct Registry {
    port: u16,
    process: Child,
}

impl Registry {
    fn start(program: &Path, folder: &Path) -> Result<Registry> {
        let port = free_port()?;
        let (config, storage) = (folder.join("registry.yml"), folder.join("registry"));
        let text = format!(
            "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n\
             storage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: \"127.0.0.1:{port}\"}}\n",
            storage.display()
        );
        fs::write(&config, text)?;
        let mut command = Command::new(program);
        command.arg("serve").arg(&config).stdout(Stdio::null()).stderr(File::create(folder.join("registry.log"))?);
        let process = command.spawn().map_err(|error| format!("{}: {error}", program.display()))?;
        let registry = Registry { port, process };
        until(Instant::now(), "registry", || TcpStream::connect(("127.0.0.1", port)).ok())?;
        Ok(registry)
    }

    fn at(&self, tag: &str) -> String {
        format!("localhost:{}/bench:{tag}", self.port)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
