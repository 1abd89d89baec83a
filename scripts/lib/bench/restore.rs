//! How long a guest that sleeps takes to wake.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use crate::Result;
use crate::look::{self, shows, until};
use crate::monitor::{Monitor, Nap, Running};
use crate::report::{Goal, Row, ms};

/// What is measured.
pub const ROWS: [Row; 7] = [
    Row::new("output_ms", "first new output, ms", Goal::Ratio(0.5)),
    Row::new("page_ms", "first page (HTTP 200), ms", Goal::None),
    Row::new("resumed_ms", "vCPUs run, as it says, ms", Goal::None),
    Row::new("agent_ms", "agent answered, as it says, ms", Goal::None),
    Row::new("cold_output_ms", "cold: first new output, ms", Goal::None),
    Row::new("cold_page_ms", "cold: first page, ms", Goal::None),
    Row::new("cold_resumed_ms", "cold: vCPUs run, ms", Goal::None),
];

/// Prints a word and a number about every millisecond, for as long as the machine lives, and never sleeps in
/// between: a guest that slept when it was snapshotted would sleep on for an unknown time after it woke.
const TICKER: &str = "exec setsid sh -c 'n=0; while :; do n=$((n+1)); echo tick $n; \
    i=0; while [ $i -lt 100 ]; do i=$((i+1)); done; done' </dev/null >/dev/console 2>&1 &";
/// What it prints first.
const TICK: &[u8] = b"tick ";

/// Where a host drops its page cache (Documentation/admin-guide/sysctl/vm.rst); only root may.
const DROP_CACHES: &str = "/proc/sys/vm/drop_caches";

/// Makes a guest tick and puts it to sleep. `None` when the monitor cannot do that.
pub fn prepare(monitor: &dyn Monitor, folder: &Path) -> Result<Option<Nap>> {
    let mut running = monitor.start(folder)?;
    let nap = tick_and_sleep(monitor, &running, folder).map_err(|error| running.blame(&*error));
    running.end()?;
    nap
}

fn tick_and_sleep(monitor: &dyn Monitor, running: &Running, folder: &Path) -> Result<Option<Nap>> {
    look::up(running)?;
    monitor.exec(running, &["sh", "-c", TICKER])?;
    until(running.started, "tick", || shows(&running.console, TICK))?;
    // Lets what the start of it brought about come to rest.
    thread::sleep(Duration::from_secs(1));
    monitor.snapshot(running, folder, "ticking")
}

/// Wakes it twice: with all that it needs in the page cache, and with nothing there, where this user may see to
/// that.
pub fn measure(monitor: &dyn Monitor, nap: &Nap, folder: &Path) -> Result<Vec<Option<f64>>> {
    // What was cold for the last one is warm again for this one when it was woken once.
    let may_drop = fs::OpenOptions::new().write(true).open(DROP_CACHES).is_ok();
    if may_drop {
        wake(monitor, nap, &folder.join("warming"), || Ok(()))?;
    }
    let [output, page, resumed, agent] = wake(monitor, nap, &folder.join("warm"), || Ok(()))?;
    let [cold_output, cold_page, cold_resumed, _] = match may_drop {
        true => wake(monitor, nap, &folder.join("cold"), drop_caches)?,
        false => [None; 4],
    };
    Ok(vec![output, page, resumed, agent, cold_output, cold_page, cold_resumed])
}

fn drop_caches() -> Result<()> {
    // What is not on the disk yet cannot be dropped.
    Command::new("sync").status()?;
    Ok(fs::write(DROP_CACHES, "3")?)
}

fn wake(monitor: &dyn Monitor, nap: &Nap, folder: &Path, ready: fn() -> Result<()>) -> Result<[Option<f64>; 4]> {
    fs::create_dir(folder)?;
    let mut running = monitor.wake(nap, folder, None, ready)?;
    let times = watch(monitor, &mut running).map_err(|error| running.blame(&*error));
    running.end()?;
    times
}

fn watch(monitor: &dyn Monitor, running: &mut Running) -> Result<[Option<f64>; 4]> {
    let (begun, console) = (running.started, running.console.clone());
    // A line's end: one monitor writes byte by byte to its console, the other line by line.
    let (output, ()) = until(begun, "new output", || shows(&console, b"\n"))?;
    let (page, ()) = until(begun, "page", || look::page(running))?;
    let (resumed, agent) = monitor.awake(running)?;
    Ok([Some(ms(output)), Some(ms(page)), resumed.map(ms), agent.map(ms)])
}
