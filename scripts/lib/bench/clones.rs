//! What memory clones of one snapshot cost, when they have nothing to do.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use crate::Result;
use crate::look::{self, ask, until};
use crate::monitor::{Monitor, Nap, Running};
use crate::process;
use crate::report::{Goal, Row};

/// What is measured for each number of clones.
pub const ROWS: [Row; 2] = [
    Row::new("pss_mib", "memory of all (PSS), MiB", Goal::None),
    Row::new("pss_per_clone_mib", "memory per clone, MiB", Goal::None),
];

/// What guests have for themselves before something of them is measured.
const REST: Duration = Duration::from_secs(2);

/// Puts a guest to sleep that has nothing to do. `None` when the monitor cannot do that.
pub fn prepare(monitor: &dyn Monitor, folder: &Path) -> Result<Option<Nap>> {
    let mut running = monitor.start(folder)?;
    let nap = look::up(&running).and_then(|()| {
        thread::sleep(REST);
        monitor.snapshot(&running, folder, "idle")
    });
    let nap = nap.map_err(|error| running.blame(&*error));
    running.end()?;
    nap
}

/// Wakes `count` clones, one after the other, and adds up what memory the host has given to their monitors: of
/// pages that several share, each counts its part.
pub fn measure(monitor: &dyn Monitor, nap: &Nap, count: u32, folder: &Path) -> Result<Vec<Option<f64>>> {
    let mut clones: Vec<Running> = Vec::new();
    let mut pids = Vec::new();
    for n in 0..count {
        let folder = folder.join(n.to_string());
        fs::create_dir(&folder)?;
        let clone = monitor.wake(nap, &folder, Some(n), || Ok(()))?;
        clones.push(clone);
        let clone = clones.last_mut().ok_or("no clone")?;
        let pid = up(monitor, clone).map_err(|error| clone.blame(&*error))?;
        pids.push(pid);
    }
    thread::sleep(REST);
    let sum = pids.iter().map(|pid| process::proportional_memory(*pid)).sum::<Result<u64>>()?;
    clones.iter_mut().try_for_each(Running::end)?;
    let mib = sum as f64 / 1048576.0;
    Ok(vec![Some(mib), Some(mib / f64::from(count))])
}

fn up(monitor: &dyn Monitor, clone: &mut Running) -> Result<u32> {
    until(clone.started, "page", || look::page(clone))?;
    monitor.awake(clone)?;
    let (_, answer) = until(clone.started, "answer of the control socket", || ask(clone))?;
    monitor.pid(clone, &answer)
}
