//! What another size brings, and how long it takes to be there: of Catnap alone, for nobody else has it.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::Result;
use crate::look::{self, until};
use crate::monitor::{Catnap, Monitor, Nap, Running};
use crate::report::{Goal, Row, ms};

/// What is measured.
pub const ROWS: [Row; 7] = [
    Row::new("work_1", "/work per second, 1 vCPU", Goal::None),
    Row::new("work_2", "/work per second, 2 vCPUs", Goal::None),
    Row::new("gain", "2 vCPUs do so many times more", Goal::None),
    Row::new("grow_ms", "resize, twice as large, ms", Goal::None),
    Row::new("shrink_ms", "resize, as it was, ms", Goal::None),
    Row::new("wake_larger_ms", "restore, twice as large, ms", Goal::None),
    Row::new("wake_smaller_ms", "restore, half as large, ms", Goal::None),
];

/// Two sizes that differ by a factor of two, so that each can become the other.
const SMALL: u32 = 1;
const LARGE: u32 = 2;
/// What the guest has for itself before a snapshot, and the load before it is counted.
const REST: Duration = Duration::from_secs(1);

/// Boots a guest of the small size and makes it large, small, and by a wake large and small again. Each time is from
/// the start of the command until the guest itself says on its page that it has that size.
pub fn measure(catnap: &Catnap, folder: &Path) -> Result<Vec<Option<f64>>> {
    let mut running = catnap.start(folder)?;
    let live = live(catnap, &mut running, folder).map_err(|error| running.blame(&*error));
    running.end()?;
    let ([work_1, work_2], [grow, shrink], [small, large]) = live?;
    let wake = |nap: &Nap, cpus| -> Result<Duration> {
        let folder = tempfile::tempdir_in(folder)?;
        let mut woken = catnap.wake_sized(nap, cpus, folder.path())?;
        let seen = sees(catnap, &woken, woken.started, cpus).map_err(|error| woken.blame(&*error));
        woken.end()?;
        seen
    };
    let (larger, smaller) = (wake(&small, LARGE)?, wake(&large, SMALL)?);
    catnap.forget(&large)?;
    catnap.forget(&small)?;
    let times = [grow, shrink, larger, smaller].map(ms);
    Ok([work_1, work_2, work_2 / work_1].into_iter().chain(times).map(Some).collect())
}

/// Answers per second at both sizes, how long it took to become the one and the other, and a snapshot of each.
type Live = ([f64; 2], [Duration; 2], [Nap; 2]);

fn live(catnap: &Catnap, running: &mut Running, folder: &Path) -> Result<Live> {
    look::up(running)?;
    running.child.wait()?;
    let running = &*running;
    let nap = |name| -> Result<Nap> {
        thread::sleep(REST);
        Ok(catnap.snapshot(running, folder, name)?.ok_or("catnap takes snapshots")?)
    };
    let resize = |cpus| -> Result<Duration> {
        let begun = Instant::now();
        let mut command = catnap.resize(cpus)?;
        let seen = sees(catnap, running, begun, cpus);
        match command.wait()?.success() {
            true => seen,
            false => Err("the size was not reached".into()),
        }
    };
    let small = nap("small")?;
    let work_1 = catnap.load(LARGE)?;
    let grow = resize(LARGE)?;
    let work_2 = catnap.load(LARGE)?;
    let large = nap("large")?;
    let shrink = resize(SMALL)?;
    Ok(([work_1, work_2], [grow, shrink], [small, large]))
}

/// The time at which the guest's page says that it has so many vCPUs, and the memory that belongs to them.
fn sees(catnap: &Catnap, running: &Running, begun: Instant, cpus: u32) -> Result<Duration> {
    let is_there = || {
        let status = look::status(running)?;
        let memory = status["memory_bytes"].as_u64()?;
        // MemTotal is less than RAM, by what the kernel keeps to itself; a quarter tells the two sizes apart.
        let most = catnap.guest_memory() * u64::from(cpus);
        let least = most / 4 * 3;
        (status["cpus"] == cpus && (least..most).contains(&memory)).then_some(())
    };
    Ok(until(begun, "new size on the page", is_there)?.0)
}
