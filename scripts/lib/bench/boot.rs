//! One boot under the stopwatch, from the start of the first process to a page of the guest's site.

use std::path::Path;
use std::thread;
use std::time::Duration;

use crate::look::{self, READY, ask, shows, until};
use crate::monitor::{Monitor, Running};
use crate::report::{Goal, Row, ms};
use crate::{Result, process};

/// What the guest's program says first.
const FIRST_LINE: &[u8] = b"catnap: init";

/// Long enough for what follows a boot, a visit among them, to be over.
const REST: Duration = Duration::from_secs(3);

/// What is measured. The goals of times are for a host with real KVM.
pub const ROWS: [Row; 6] = [
    Row::new("first_line_ms", "guest's first line, ms", Goal::None),
    Row::new("page_ms", "first page (HTTP 200), ms", Goal::None),
    Row::new("control_ms", "control socket answers, ms", Goal::None),
    Row::new("control_cpu_ms", "CPU time until then, ms", Goal::AtMost(8.0)),
    Row::new("memory_mib", "own memory at the page, MiB", Goal::AtMost(5.0)),
    Row::new("resting_mib", "own memory at rest, MiB", Goal::AtMost(5.0)),
];

/// Boots a guest and takes the times, from process start: until the guest's first line is on the console, its
/// site has sent its page, the control socket answers; the CPU time that the monitor has used by then, vCPUs not
/// counted; and the monitor's own memory when the page has come, and when there was nothing to do for a while.
pub fn measure(monitor: &dyn Monitor, folder: &Path) -> Result<Vec<Option<f64>>> {
    let mut running = monitor.start(folder)?;
    let sample = watch(monitor, &mut running).map_err(|error| running.blame(&*error));
    running.end()?;
    sample
}

fn watch(monitor: &dyn Monitor, running: &mut Running) -> Result<Vec<Option<f64>>> {
    let (begun, console) = (running.started, running.console.clone());
    // Two things are waited for at one time, so that neither look delays the other.
    thread::scope(|scope| {
        let first_line = scope.spawn(|| until(begun, "first line", || shows(&console, FIRST_LINE)));
        let (control, answer) = until(begun, "answer of the control socket", || {
            // A process that has given up is not waited for. `catnap run` goes too, when all is well.
            let gone = running.child.try_wait().ok().flatten().is_some_and(|status| !status.success());
            if gone { Some(Err("it gave up")) } else { ask(running).map(Ok) }
        })?;
        let answer = answer?;
        let pid = monitor.pid(running, &answer)?;
        let cpu = process::cpu_time(pid)?;
        let (first_line, ()) = first_line.join().map_err(|_| "the watcher of the console died")??;
        // Asking a guest that is not up costs the one monitor more than the other, so nobody asks before.
        until(begun, "ready", || shows(&running.console, READY))?;
        let (page, ()) = until(begun, "page", || look::page(running))?;
        let own_memory = || process::own_memory(pid, monitor.guest_memory()).map(|bytes| bytes as f64 / 1048576.0);
        let memory = own_memory()?;
        thread::sleep(REST);
        let times = [first_line, page, control, cpu].map(ms);
        Ok(times.into_iter().chain([memory, own_memory()?]).map(Some).collect())
    })
}
